"""`python -m nat_models.predict`, on models in the registry and on runs of `train.py`."""

import csv
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from omegaconf import OmegaConf
from PIL import Image
from safetensors.torch import save_file
from timm.data import ImageNetInfo
from training_runs import CLASSES, compose_train, train, write_image, write_image_folder
from video_files import write_video

from nat_models import stream
from nat_models.convert import convert
from nat_models.data.video.annotated_copy import draw_prediction, read_frames
from nat_models.engine.build import build_evaluation_datamodule
from nat_models.engine.checkpoint import read_checkpoint
from nat_models.predict import attention_files, draw_attention, find_inputs, load_model, load_run, main

TINY: dict[str, Any] = dict(embed_dim=8, depths=(1, 2), num_heads=(1, 2), kernel_size=3, dilations=[2, [1, 2]])
TINY_ARGUMENTS = ["--model-kwargs", *(f"{key}={value}".replace(" ", "") for key, value in TINY.items())]


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of one epoch on tiny images of three classes."""
    folder = tmp_path_factory.mktemp("run")
    root = write_image_folder(folder / "images")
    kwargs = ",".join(f"{key}:{value}" for key, value in TINY.items()).translate(str.maketrans("()", "[]"))
    settings = ["model.model_name=dinat_mini", "data.img_size=[32,48]", "data.batch_size=4", "trainer.accelerator=cpu"]
    settings += [f"+model.model_kwargs={{{kwargs}}}", "data.mean=[0.1,0.2,0.3]", "data.crop_pct=1.0"]
    settings += [
        "optim.schedule.warmup_epochs=0",
        "optim.schedule.cooldown_epochs=0",
        "trainer.max_epochs=1",
        "data.num_workers=0",
    ]
    train(compose_train(folder / "run", "experiment=none", "data=imagenet", f"data.root={root}", *settings))
    return folder / "run"


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights of a tiny DiNAT for ImageNet."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "weights.safetensors"
    save_file(timm.create_model("dinat_mini", **TINY).state_dict(), path)
    return path


@pytest.fixture
def image(tmp_path: Path) -> Path:
    write_image(tmp_path / "image.jpg", seed=7, size=(60, 50))
    return tmp_path / "image.jpg"


def printed_predictions(output: str) -> list[tuple[float, str]]:
    """`(percent, class)` of every line with a bar."""
    found = re.findall(r"^ *([\d.]+) % +[█▉▊▋▌▍▎▏▐▕]* +(\S.*?) *$", output, flags=re.MULTILINE)
    return [(float(percent), name) for percent, name in found]


def test_a_model_with_weights_as_a_command(weights: Path, image: Path) -> None:
    command = [sys.executable, "-m", "nat_models.predict", "dinat_mini", str(image), "--checkpoint", str(weights)]
    command += ["--attention", "picture.png", "--queries", "0,0", "100,223", *TINY_ARGUMENTS]
    result = subprocess.run(command, capture_output=True, text=True, cwd=image.parent)
    assert result.returncode == 0, result.stderr
    assert "image.jpg" in result.stdout and "attention drawn into picture.png" in result.stdout

    model = timm.create_model("dinat_mini", pretrained=True, pretrained_cfg_overlay=dict(file=str(weights)), **TINY)
    pixels = timm.data.create_transform(**timm.data.resolve_model_data_config(model))(Image.open(image))
    with torch.no_grad():
        probabilities, labels = model.eval()(pixels[None]).softmax(-1)[0].topk(5)
    info = ImageNetInfo()
    percents = [round(100 * probability, 1) for probability in probabilities.tolist()]
    names = [info.index_to_description(label) for label in labels.tolist()]
    assert printed_predictions(result.stdout) == list(zip(percents, names, strict=True))
    with Image.open(image.parent / "picture.png") as picture:
        assert picture.width > 500


def test_a_run_predicts_as_it_evaluates(run_dir: Path, image: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main([str(run_dir), str(image)])
    printed = printed_predictions(capsys.readouterr().out)
    main([str(run_dir / "checkpoints" / "best.ckpt"), str(image)])
    assert printed_predictions(capsys.readouterr().out) == printed
    assert {name for _, name in printed} == set(CLASSES) and sum(p for p, _ in printed) == pytest.approx(100, abs=0.2)

    predictor = load_run(run_dir)
    hparams = read_checkpoint(run_dir / "checkpoints" / "best.ckpt")["hyper_parameters"]
    datamodule = build_evaluation_datamodule(OmegaConf.load(run_dir / "config.yaml"), hparams)
    for index in range(3):
        pixels = predictor.read(Path(datamodule.val_dataset.path(index)))
        batch = [datamodule.val_dataset[index][0][None]]
        assert torch.equal(pixels, datamodule.on_after_batch_transfer(batch, 0)[0])


def test_converted_weights_know_their_classes(run_dir: Path, tmp_path: Path) -> None:
    checkpoint = run_dir / "checkpoints" / "best.ckpt"
    with pytest.raises(ValueError, match=f"python -m nat_models.export {checkpoint}"):
        convert(checkpoint, tmp_path / "exported")
    convert(Path(shutil.copy(checkpoint, tmp_path)), tmp_path / "exported")
    assert load_model(f"local-dir:{tmp_path / 'exported'}").class_names == CLASSES


def test_grey_images_and_unnamed_classes(image: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = timm.create_model("dinat_mini", num_classes=2, in_chans=1, **TINY)
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    predictor = load_model("dinat_mini", tmp_path / "weights.pth", **TINY)
    pixels = predictor.read(image)
    assert pixels.shape == (1, 1, 224, 224) and {name for name, _ in predictor.predict(pixels)} == {"0", "1"}


def test_images_are_read_upright_and_with_all_their_bits(weights: Path, image: Path, tmp_path: Path) -> None:
    predictor = load_model("dinat_mini", weights, **TINY)
    with Image.open(image) as upright:
        turned = upright.transpose(Image.Transpose.ROTATE_90)
        exif = Image.Exif()
        exif[0x0112] = 6  # to be turned by 270 degrees, counterclockwise
        turned.save(tmp_path / "turned.png", exif=exif)
        upright.save(tmp_path / "upright.png")
    assert torch.equal(predictor.read(tmp_path / "turned.png"), predictor.read(tmp_path / "upright.png"))

    grey = np.linspace(0, 255, 64 * 64).round().astype(np.uint16).reshape(64, 64)
    Image.fromarray(grey * 256).save(tmp_path / "16.png")
    Image.fromarray(grey.astype(np.uint8)).save(tmp_path / "8.png")
    assert torch.equal(predictor.read(tmp_path / "16.png"), predictor.read(tmp_path / "8.png"))


def test_full_attention_predicts_at_the_size_that_it_covers(image: Path, tmp_path: Path) -> None:
    sizes: dict[str, Any] = dict(embed_dim=16, depth=2, num_heads=2, img_size=96)
    save_file(timm.create_model("vitrpb_small", **sizes).state_dict(), tmp_path / "weights.safetensors")
    predictor = load_model("vitrpb_small", tmp_path / "weights.safetensors", **sizes)
    assert predictor.read(image).shape == (1, 3, 96, 96)


def test_folders_are_searched_in_natural_order(tmp_path: Path) -> None:
    for name in ("b/10.png", "b/9.PNG", "a.jpg"):
        write_image(tmp_path / name, seed=0)
    (tmp_path / "b" / "notes.txt").write_text("no image")
    found = find_inputs([tmp_path / "b", tmp_path / "a.jpg", tmp_path], of_videos=False)
    assert [str(path.relative_to(tmp_path)) for path in found] == [
        "b/9.PNG", "b/10.png", "a.jpg", "a.jpg", "b/9.PNG", "b/10.png"
    ]  # fmt: skip


def test_pictures_go_into_a_folder(
    weights: Path, image: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_image(tmp_path / "$5_$10.png", seed=8, size=(40, 80))
    arguments = ["dinat_mini", str(tmp_path), "--checkpoint", str(weights), *TINY_ARGUMENTS]
    main([*arguments, "--attention", str(tmp_path / "new" / "folder")])
    assert capsys.readouterr().out.count("attention drawn into") == 2
    assert {p.name for p in (tmp_path / "new" / "folder").iterdir()} == {"image_attention.png", "$5_$10_attention.png"}


def test_one_picture_for_each_image() -> None:
    with pytest.raises(ValueError, match="more than one image would be drawn into 'x.png'"):
        attention_files("x.png", [Path("a.jpg"), Path("b.jpg")])
    with pytest.raises(ValueError, match="more than one image"):
        attention_files("x", [Path("a/1.jpg"), Path("b/1.png")])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nat_minny", "{image}"], "model='nat_minny' is not a registered model; the nearest names are "),
        (["nat_mini.in2k", "{image}"], "model='nat_mini.in2k'"),
        (["nat_mini", "nowhere.jpg"], "there is no file 'nowhere.jpg'"),
        (["{run}", "{empty}"], "there are no images (.bmp, .gif, .jpeg, .jpg, .png, .tif, .tiff, .webp) in the folder"),
        (["nat_mini", "{image}", "--checkpoint", "nowhere.pth"], "there is no file 'nowhere.pth'"),
        (["nat_mini", "{image}", "--checkpoint", "{weights}"], "do not fit this NAT; missing keys"),
        (["nat_mini", "{image}", "--checkpoint", "{best}"], "was written by train.py: give it, or its run folder"),
        (["nat_mini", "{image}", "--checkpoint", "{weights}", "--model-kwargs", "width=3"], "do not fit nat_mini"),
        (
            ["nat_mini", "{image}", "--model-kwargs", "features_only=True"],
            "arguments of the model itself, got features_",
        ),
        (
            ["dinat_mini", "{image}", "--checkpoint", "{weights}", *TINY_ARGUMENTS, "num_classes=3"],
            "the weights are for 1000 classes: num_classes=3 has no head",
        ),
        (["local-dir:{exported}", "{image}", "--checkpoint", "{weights}"], "'local-dir:{exported}' has weights of its"),
        (["{empty}", "{image}"], "there is no checkpoint"),
        (["{image}", "{image}"], "is not a checkpoint of train.py"),
        (["{run}", "{image}", "--checkpoint", "{weights}"], "are for registered models"),
        (["{run}", "{image}", "--annotate"], "--annotate is for models of videos"),
        (["{run}", "{image}", "--device", "gpu"], "--device='gpu' cannot be used: "),
        (["{run}", "{image}", "--device", "xpu"], "--device='xpu' cannot be used: "),
        (["{exported}", "{image}"], "holds a model in timm's format: give local-dir:{exported}"),
        (["{run}", "{image}", "--attention", "a.jpg"], "must be a folder or a file ending in .png, got 'a.jpg'"),
        (["{run}", "{damaged}"], "cannot decode '{damaged}'"),
        (["{run}", "{image}", "--attention", "--queries", "5,48"], "5,48 is not in the image of 32 x 48"),
    ],
)
def test_mistakes_get_one_line(
    arguments: list[str], message: str, run_dir: Path, weights: Path, image: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    (tmp_path / "empty").mkdir()
    (tmp_path / "damaged.jpg").write_bytes(image.read_bytes()[:300])
    names = dict(image=image, weights=weights, run=run_dir, best=run_dir / "checkpoints" / "best.ckpt")
    names |= dict(empty=tmp_path / "empty", damaged=tmp_path / "damaged.jpg", exported=tmp_path / "exported")
    (tmp_path / "exported").mkdir()
    (tmp_path / "exported" / "config.json").write_text("{}")
    with pytest.raises(SystemExit, match="2"):
        main([argument.format(**names) for argument in arguments])
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith("error: ") and message.format(**names) in error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--queries", "1,2"], "--queries needs --attention"),
        (["--attention", "--queries", "1"], "'1' is not ROW,COLUMN"),
        (["--model-kwargs", "kernel_size=5", "other.jpg"], "--model-kwargs: 'other.jpg' is not KEY=VALUE"),
    ],
)
def test_options_are_checked(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["nat_mini", "image.jpg", *arguments])
    assert message in capsys.readouterr().err


def test_attention_needs_neighborhoods(image: Path, tmp_path: Path) -> None:
    timm.models.save_for_hf(timm.create_model("test_resnet", num_classes=4), str(tmp_path / "resnet"))
    predictor = load_model(f"local-dir:{tmp_path / 'resnet'}")
    with pytest.raises(ValueError, match="--attention needs a model with neighborhood attention"):
        draw_attention(predictor, predictor.read(image), [(0, 0)], "", tmp_path / "x.png")


CLIPS: dict[str, Any] = dict(embed_dim=8, depths=[1], num_heads=[1], kernel_size=3, num_frames=4)


@pytest.fixture(scope="module")
def video_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of one epoch on small videos of three classes, which lie in `videos/` beside it."""
    folder = tmp_path_factory.mktemp("video_run")
    for index in range(6):
        write_video(folder / "videos" / f"{index}.mp4", 10, size=(72, 48), first_number=20 * index)
    for name in ("train", "validation"):
        (folder / f"{name}.csv").write_text("".join(f"videos/{i}.mp4,{'abc'[i % 3]}\n" for i in range(6)))
    settings = ["experiment=none", "data=video", "data.name=test", f"data.root={folder}", "data.img_size=32"]
    settings += [
        "model.model_name=nat_stream_tiny",
        "data.batch_size=3",
        "data.num_workers=0",
        "trainer.accelerator=cpu",
    ]
    settings += [f"+model.model_kwargs.{key}={value}".replace(" ", "") for key, value in CLIPS.items()]
    settings += ["data.sampling.num_frames=4", "data.test_views={clips: 2, crops: 3}", "trainer.max_epochs=1"]
    settings += ["optim.schedule.warmup_epochs=0", "optim.schedule.cooldown_epochs=0"]
    train(compose_train(folder / "run", *settings))
    return folder / "run"


def test_a_video_run_predicts_as_it_evaluates(video_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with open(video_run / "predictions.csv", newline="") as file:
        recorded = list(csv.DictReader(file))
    main([str(video_run), str(video_run.parent / "videos")])
    groups = capsys.readouterr().out.strip().split("\n\n")
    assert len(groups) == len(recorded) == 6
    for row, group in zip(recorded, groups, strict=True):
        (percent, name), *others = printed_predictions(group)
        assert name == "abc"[int(row["predicted"])] and len(others) == 2
        assert percent == pytest.approx(100 * float(row["probability"]), abs=0.051)


def test_annotated_copies_hold_the_prediction_of_the_video(
    video_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    videos = [video_run.parent / "videos" / f"{index}.mp4" for index in (1, 4)]
    main([str(video_run), *map(str, videos), "--annotate", str(tmp_path)])
    assert capsys.readouterr().out.count("annotated copy in ") == 2
    predictor = load_run(video_run)
    for video in videos:
        prediction = predictor.predict(predictor.read(video))
        frames = list(read_frames(str(video)))
        copied = list(read_frames(str(tmp_path / f"{video.stem}_annotated.mp4")))
        for frame, copy in zip(frames, copied, strict=True):
            expected = np.asarray(draw_prediction(frame.image, prediction), int)
            assert copy.time == frame.time and np.abs(np.asarray(copy.image, int) - expected).mean() < 3


def test_a_run_of_a_streaming_model_streams(video_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stream.main([str(video_run), str(video_run.parent / "videos" / "2.mp4"), "--rate", "30"])
    *lines, summary = capsys.readouterr().out.splitlines()
    assert len(lines) == 10 and all(line[-1] in "abc" for line in lines) and summary.startswith("10 frames")


@pytest.mark.parametrize(
    ("sampling", "times"),
    [
        (dict(), [0, 2, 4, 6, 8]),
        (dict(stride=5), [0, 5]),
        (dict(stride=2, frame_rate=15), [0, 4, 8]),
        (dict(mode="uniform"), None),
    ],
)
def test_a_run_streams_frames_as_far_apart_as_in_its_clips(
    sampling: dict[str, Any], times: list[int] | None, video_run: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    shutil.copytree(video_run, tmp_path / "run")
    cfg = OmegaConf.load(tmp_path / "run" / "config.yaml")
    cfg.data.sampling.update(sampling)
    OmegaConf.save(cfg, tmp_path / "run" / "config.yaml")
    arguments = [str(tmp_path / "run"), str(video_run.parent / "videos" / "2.mp4")]  # ten frames, 30 a second
    if times is None:
        with pytest.raises(SystemExit, match="2"):
            stream.main(arguments)
        assert "--rate must be given: clips of data.sampling.mode=uniform have no fixed rate" in capsys.readouterr().err
        return
    stream.main(arguments)
    printed = [float(line.split()[0]) for line in capsys.readouterr().out.splitlines()[:-1]]
    assert printed == pytest.approx([time / 30 for time in times], abs=0.006)


def test_inputs_of_models_of_clips(video_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_image(tmp_path / "frames" / "1.jpg", seed=0)
    video = video_run.parent / "videos" / "0.mp4"
    assert find_inputs([tmp_path / "frames", video], of_videos=True) == [tmp_path / "frames", video]
    main([str(video_run), str(tmp_path / "frames")])
    assert len(printed_predictions(capsys.readouterr().out)) == 3
    both = [str(video), str(video)]
    for arguments, message in (
        ([str(tmp_path / "frames" / "1.jpg")], "the model takes videos, not images such as"),
        ([str(video), "--attention"], "--attention is for models of images"),
        ([*both, "--annotate", str(tmp_path / "one.mp4")], "more than one video would be copied to"),
    ):
        with pytest.raises(SystemExit, match="2"):
            main([str(video_run), *arguments])
        assert message in capsys.readouterr().err


def test_a_registered_model_of_clips_takes_its_number_of_frames(tmp_path: Path) -> None:
    torch.save(timm.create_model("nat3d_mini", **CLIPS).state_dict(), tmp_path / "weights.pth")
    predictor = load_model("nat3d_mini", tmp_path / "weights.pth", **CLIPS)
    video = write_video(tmp_path / "video.mp4", 12)
    assert predictor.read(video).shape == (12, 3, 4, 224, 224)


def test_weights_without_a_head_are_no_classifier(tmp_path: Path) -> None:
    torch.save(timm.create_model("dinat_mini", num_classes=0, **TINY).state_dict(), tmp_path / "weights.pth")
    with pytest.raises(ValueError, match="the model has no classifier"):
        load_model("dinat_mini", tmp_path / "weights.pth", **TINY)
