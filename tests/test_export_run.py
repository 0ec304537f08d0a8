"""`python -m nat_models.export` and `python -m nat_models.soup` on runs of `train.py`."""

import json
import resource
import shutil
import subprocess
import sys
from contextlib import chdir
from pathlib import Path

import pytest
import timm
import torch
from omegaconf import OmegaConf
from PIL import Image
from safetensors.torch import save_file
from training_runs import CLASSES, compose_train, run, train, write_image_folder
from video_files import write_video

from nat_models.convert import main as convert_main
from nat_models.engine.checkpoint import read_checkpoint
from nat_models.export import export
from nat_models.export import main as export_main
from nat_models.predict import load_model, load_run
from nat_models.soup import choose, soup
from nat_models.soup import main as soup_main

SIZES = ["+model.model_kwargs={embed_dim: 8, depths: [1, 2], num_heads: [1, 2], kernel_size: 3}"]
SHORT = ["optim.schedule.warmup_epochs=0", "optim.schedule.cooldown_epochs=0", "trainer.max_epochs=1"]
SHORT += ["trainer.accelerator=cpu", "data.num_workers=0", "data.batch_size=4"]


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    return write_image_folder(tmp_path_factory.mktemp("images"))


def image_run(run_dir: Path, images: Path, *overrides: str) -> Path:
    """The run folder of one epoch of a tiny NAT on tiny images of three classes."""
    settings = ["experiment=none", "data=imagenet", f"data.root={images}", "model.model_name=nat_mini", *SIZES, *SHORT]
    settings += ["data.img_size=[32,48]", "data.mean=[0.1,0.2,0.3]", "data.std=[0.4,0.5,0.6]", "data.crop_pct=0.9"]
    train(compose_train(run_dir, *settings, *overrides))
    return run_dir


@pytest.fixture(scope="module")
def runs(tmp_path_factory, images) -> list[Path]:
    """Three runs that differ in their seed, the first with averaged weights."""
    folder = tmp_path_factory.mktemp("runs")
    callbacks = {0: ["callbacks=ema"]}
    return [image_run(folder / str(i), images, f"seed={i}", *callbacks.get(i, [])) for i in range(3)]


def test_exported_run_is_a_timm_model(runs, tmp_path):
    command = [sys.executable, "-m", "nat_models.export", str(runs[0]), str(tmp_path / "out" / "nat_of_mine")]
    process = subprocess.run(command, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    target = tmp_path / "out" / "nat_of_mine"
    assert {path.name for path in target.iterdir()} == {"model.safetensors", "config.json", "README.md"}
    assert not {"tag", "license", "url"} & json.loads((target / "config.json").read_text())["pretrained_cfg"].keys()
    model = timm.create_model(f"local-dir:{target}", pretrained=True)
    config = timm.data.resolve_model_data_config(model)
    assert config["input_size"] == (3, 32, 48) and config["crop_pct"] == 0.9
    assert tuple(config["mean"]) == (0.1, 0.2, 0.3) and tuple(config["std"]) == (0.4, 0.5, 0.6)
    averaged = read_checkpoint(runs[0] / "checkpoints" / "best.ckpt")["state_dict"]  # callbacks=ema puts these here
    for name, value in model.state_dict().items():
        assert torch.equal(value, averaged[f"model.{name}"]), name
    predictor, of_run = load_model(f"local-dir:{target}"), load_run(runs[0])
    assert predictor.class_names == CLASSES
    path = next((Path(OmegaConf.load(runs[0] / "config.yaml").data.root) / "val").rglob("*.jpg"))
    assert predictor.predict(predictor.read(path)) == of_run.predict(of_run.read(path))
    with Image.open(path) as image:
        transform = timm.data.create_transform(**config)
        assert torch.equal(transform(image.convert("RGB"))[None], predictor.read(path))


def test_model_card_says_what_was_measured_and_how(runs, tmp_path):
    card = (export(runs[0], tmp_path / "out") / "README.md").read_text()
    results = json.loads((runs[0] / "results.json").read_text())
    assert f"| Top-1 accuracy | {100 * results['metrics']['val/top1']:.2f} % |" in card
    assert "`nat_mini` for images of 32 x 48 pixels, 3 classes" in card and "exponential moving average" in card
    manifest = json.loads((runs[0] / "manifest.json").read_text())
    assert manifest["git"] is None or manifest["git"]["commit"] in card
    assert f"torch {manifest['packages']['torch']}" in card and "base_lr:" in card
    front = card.split("---")[1]
    assert OmegaConf.create(front)["pipeline_tag"] == "image-classification"
    code = card.split("```python")[1].split("```")[0]
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 0, result.stderr

    last = (export(runs[1] / "checkpoints" / "last.ckpt", tmp_path / "last") / "README.md").read_text()
    assert "This checkpoint was not evaluated." in last and "moving average" not in last


def test_exported_video_model(tmp_path):
    for index in range(4):
        write_video(tmp_path / f"{index}.mp4", 8, size=(48, 48), first_number=20 * index)
    for name in ("train", "validation"):
        (tmp_path / f"{name}.csv").write_text("".join(f"{i}.mp4,{i % 2}\n" for i in range(4)))
    settings = ["experiment=none", "data=video", "data.name=test", f"data.root={tmp_path}", "data.img_size=32", *SHORT]
    settings += ["model.model_name=nat3d_mini", *SIZES, "+model.model_kwargs.num_frames=4"]
    settings += ["data.sampling.num_frames=4", "data.test_views={clips: 1, crops: 1}"]
    train(compose_train(tmp_path / "run", *settings))
    target = export(tmp_path / "run")
    assert target == tmp_path / "run" / "export"
    model = timm.create_model(f"local-dir:{target}", pretrained=True).eval()
    clip = torch.randn(1, 3, 4, 32, 32)
    with torch.no_grad():
        assert torch.equal(model(clip), load_run(tmp_path / "run").model(clip))
    card = (target / "README.md").read_text()
    assert "pipeline_tag: video-classification" in card and "clips of 4 frames of 32 x 32 pixels" in card


def test_uniform_soup_is_the_mean_and_evaluates_as_a_run(runs, tmp_path, capsys):
    soup_main([*map(str, runs), str(tmp_path / "soup")])
    assert "mean of 3 checkpoints" in capsys.readouterr().out
    states = [read_checkpoint(folder / "checkpoints" / "best.ckpt")["state_dict"] for folder in runs]
    mean = read_checkpoint(tmp_path / "soup" / "checkpoints" / "best.ckpt")["state_dict"]
    assert mean.keys() == states[0].keys()
    for name, value in mean.items():
        torch.testing.assert_close(value, sum(state[name] for state in states) / 3, rtol=1e-5, atol=1e-7)
    process = run(tmp_path, "eval.py", f"run={tmp_path / 'soup'}", "trainer.accelerator=cpu")
    assert process.returncode == 0, process.stderr
    card = (export(tmp_path / "soup") / "README.md").read_text()
    assert "| Top-1 accuracy |" in card and str(runs[2] / "checkpoints" / "best.ckpt") in card


def test_greedy_soup_takes_what_does_not_harm(runs, tmp_path, capsys):
    paths = [folder / "checkpoints" / "best.ckpt" for folder in runs]
    scores = {paths[0]: 0.5, paths[1]: 0.7, paths[2]: 0.6}
    candidate = tmp_path / "candidate.ckpt"
    means = iter([0.65, 0.7])  # with the second best, which harms, and then with the third, which does not

    chosen = choose(paths, lambda path: next(means) if path == candidate else scores[path], candidate)
    assert chosen == [paths[1], paths[0]]
    soup_main([*map(str, runs[:2]), str(tmp_path / "greedy"), "--greedy"])
    assert "mean of" in capsys.readouterr().out and (tmp_path / "greedy" / "config.yaml").is_file()


def test_soups_of_what_does_not_mix(runs, images, tmp_path):
    other = image_run(tmp_path / "dilated", images, "+model.model_kwargs.dilations=[1,2]")
    smaller = shutil.copytree(runs[1], tmp_path / "smaller")
    cfg = OmegaConf.load(smaller / "config.yaml")
    cfg.data.mean = [0.5, 0.5, 0.5]
    OmegaConf.save(cfg, smaller / "config.yaml")
    for ingredients, message in (
        ([runs[0], other], "has model_kwargs="),
        ([runs[0], smaller], "has mean=.*0.5, 0.5, 0.5"),
        ([runs[0]], "needs two or more runs or checkpoints, got 1"),
        ([runs[0], tmp_path / "nowhere"], "nowhere"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            soup(ingredients, tmp_path / "soup")
    with pytest.raises(ValueError, match="exists already"):
        soup(runs[:2], tmp_path / "smaller")
    assert not (tmp_path / "soup").exists()


def test_mistakes_get_one_line(runs, tmp_path, capsys):
    (tmp_path / "there").mkdir()
    torch.save({"weight": torch.zeros(1)}, tmp_path / "foreign.ckpt")
    for main, arguments, message in (
        (export_main, [runs[0], tmp_path / "there"], "exists already"),
        (export_main, [tmp_path / "foreign.ckpt"], "was not written by train.py"),
        (export_main, [tmp_path / "nowhere"], "there is no checkpoint"),
        (soup_main, [runs[0], tmp_path / "foreign.ckpt", tmp_path / "soup"], "was not written by train.py"),
    ):
        with pytest.raises(SystemExit, match="2"):
            main([str(argument) for argument in arguments])
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and error.startswith("error: ") and message in error


def test_a_full_disk_gets_one_line(runs, tmp_path, capsys):
    weights = tmp_path / "weights.safetensors"
    model = timm.create_model("nat_mini", embed_dim=8, depths=[1, 2], num_heads=[1, 2])
    save_file(model.state_dict(), weights)
    sizes = ["--model", "nat_mini", "--model-kwargs", "embed_dim=8", "depths=[1,2]", "num_heads=[1,2]"]
    commands = [(export_main, [runs[0], "out"]), (soup_main, [*runs, "out"]), (convert_main, [weights, "out", *sizes])]
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    for main, arguments in commands:
        with pytest.raises(SystemExit, match="2"), chdir(tmp_path):
            resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))  # of a file
            try:
                main([str(argument) for argument in arguments])
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and error.startswith("error: ") and "File too large" in error
        assert list(tmp_path.iterdir()) == [weights]
