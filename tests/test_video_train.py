"""Video classifiers from files to a number: evaluation over views, ranks and batch sizes, and `train.py` on videos."""

import csv
import json
import sys
from pathlib import Path

import lightning
import numpy as np
import pytest
import torch
from PIL import Image
from training_runs import compose_train, run, train
from video_files import write_video

from nat_models.data import VideoDataModule
from nat_models.engine.build import build_datamodule, build_module, build_trainer, quiet_lightning
from nat_models.engine.callbacks import Mistake, PredictionRecorder
from nat_models.engine.classification import ClassificationModule
from nat_models.engine.plots import plot_mistakes

NUM_CLASSES = 3
TINY = {"embed_dim": 8, "depths": [1], "num_heads": [1], "kernel_size": 3, "num_frames": 4}
TINY_OVERRIDES = [f"model.model_kwargs.{key}={json.dumps(value).replace(' ', '')}" for key, value in TINY.items()]


@pytest.fixture(autouse=True)
def quiet():
    quiet_lightning()


@pytest.fixture(scope="module")
def videos(tmp_path_factory) -> Path:
    """Eleven videos of three classes for both splits: numbers of frames and sizes differ."""
    root = tmp_path_factory.mktemp("videos")
    rows = []
    for index in range(11):
        size = (64, 48) if index % 2 else (48, 64)
        write_video(root / f"{index}" / "same_name.mp4", 12 + index, size=size, first_number=9 * index)
        rows.append(f"{index}/same_name.mp4,{index % NUM_CLASSES}\n")
    for name in ("train", "validation"):
        (root / f"{name}.csv").write_text("".join(rows))
    return root


def data_module(root: Path, **settings) -> VideoDataModule:
    settings = {"test_views": {"clips": 2, "crops": 3}, "sampling": {"num_frames": 4, "stride": 2}} | settings
    return VideoDataModule("test", str(root), img_size=32, **settings)


def tiny_module() -> ClassificationModule:
    torch.manual_seed(1)
    module = ClassificationModule("nat3d_mini", NUM_CLASSES, model_kwargs=TINY)
    torch.nn.init.normal_(module.model.head.weight)
    return module.eval()


def validate(root: Path, module: ClassificationModule, **settings) -> tuple[dict[str, float], PredictionRecorder]:
    recorder = PredictionRecorder()
    trainer = lightning.Trainer(
        accelerator="cpu", logger=False, callbacks=[recorder], enable_progress_bar=False, enable_model_summary=False
    )
    return dict(trainer.validate(module, data_module(root, **settings), verbose=False)[0]), recorder


def test_score_is_of_the_mean_probabilities_whatever_the_batch(videos):
    module = tiny_module()
    data = data_module(videos)
    data.setup("validate")
    expected = []
    with torch.inference_mode():
        for index in range(11):
            (views,) = data.on_after_batch_transfer([data.val_dataset[index][0][None]], 0)[0]
            probabilities = [module(view[None]).double().softmax(dim=1)[0] for view in views]
            assert len(probabilities) == 6
            expected.append(sum(probabilities) / 6)
    expected = torch.stack(expected)
    labels = torch.tensor([index % NUM_CLASSES for index in range(11)])
    for settings in ({"eval_batch_size": 1}, {"eval_batch_size": 4, "num_workers": 2}, {"eval_batch_size": 11}):
        metrics, recorder = validate(videos, module, **settings)
        assert metrics["val/top1"] == pytest.approx((expected.argmax(dim=1) == labels).double().mean().item())
        loss = -expected[torch.arange(11), labels].log().mean().item()
        assert metrics["val/loss"] == pytest.approx(loss, abs=1e-6)
        assert [(index, label) for index, label, _, _ in recorder.predictions] == list(enumerate(labels.tolist()))
        assert [p for *_, p in recorder.predictions] == pytest.approx(expected.amax(dim=1).tolist(), abs=1e-6)


def test_views_of_validation_while_training_are_those_asked_for(videos):
    data = data_module(videos, val_views={"clips": 1}, batch_size=2)
    seen = []

    class Shapes(lightning.Callback):
        def on_validation_batch_end(self, trainer, pl_module, outputs, batch, *args):
            seen.append(batch[0].shape[1])

    settings = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    settings |= {"callbacks": [Shapes()], "limit_val_batches": 1, "enable_checkpointing": False}
    trainer = lightning.Trainer(**settings, max_epochs=1, limit_train_batches=1, num_sanity_val_steps=0)
    module = ClassificationModule("nat3d_mini", NUM_CLASSES, model_kwargs=TINY)
    trainer.fit(module, data)
    lightning.Trainer(**settings).validate(module, data, verbose=False)
    assert seen == [1, 6]


@pytest.mark.parametrize("mixup", [{"mixup_alpha": 1.0}, {"mixup_alpha": 0.0, "cutmix_alpha": 1.0}])
def test_mixup_and_cutmix_do_the_same_to_all_frames(mixup):
    module = ClassificationModule("nat3d_mini", NUM_CLASSES, model_kwargs=TINY, mixup=mixup)
    clips = torch.randn(4, 3, 1, 32, 32).expand(4, 3, 4, 32, 32)
    seen = []
    module.forward = lambda images: (seen.append(images), torch.zeros(len(images), NUM_CLASSES, requires_grad=True))[1]
    module._trainer = lightning.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    module.trainer.strategy._optimizers = [torch.optim.SGD(module.parameters(), lr=0.1)]
    module.log = lambda *args, **kwargs: None
    module.training_step((clips.contiguous(), torch.tensor([0, 1, 2, 0])), 0)
    (mixed,) = seen
    assert mixed.shape == clips.shape and torch.equal(mixed, mixed[:, :, :1].expand_as(mixed))
    assert not torch.equal(mixed, clips)


def test_mistakes_of_clips_are_shown_as_frames(tmp_path):
    clip = torch.stack([torch.full((3, 20, 30), value) for value in torch.linspace(-1, 1, 8)], dim=1)
    plot_mistakes([Mistake(clip, 0, 1, 0.9)], 1, ["a", "b"], [0.5] * 3, [0.5] * 3, tmp_path / "mistakes.png")
    pixels = np.asarray(Image.open(tmp_path / "mistakes.png").convert("L"))
    assert len(np.unique(pixels)) > 4 and min(pixels.shape) > 200


def video_settings(root: Path, *overrides: str) -> list[str]:
    settings = ["experiment=none", "data=video", "data.name=test", f"data.root={root}", "data.img_size=32"]
    settings += ["model.model_name=nat3d_mini", *(f"+{override}" for override in TINY_OVERRIDES)]
    settings += ["data.batch_size=4", "data.num_workers=0", "data.sampling.num_frames=4", "trainer.accelerator=cpu"]
    settings += ["optim.schedule.warmup_epochs=0", "optim.schedule.cooldown_epochs=0", "trainer.max_epochs=1"]
    return [*settings, "data.test_views={clips: 2, crops: 3}", *overrides]


def test_damaged_data_trains_evaluates_and_loses_nothing_silently(videos, tmp_path, capsys):
    damaged = {
        "empty.mp4": b"",
        "text.mp4": b"not a video",
        "cut.mp4": (videos / "1" / "same_name.mp4").read_bytes()[:-400],
    }
    rows = (videos / "train.csv").read_text().replace("0/same", f"{videos}/0/same").splitlines()
    rows = [f"{videos}/{index}/same_name.mp4,{index % NUM_CLASSES}" for index in range(11)]
    for name, content in damaged.items():
        (tmp_path / name).write_bytes(content)
        rows.append(f"{name},0")
    write_video(tmp_path / "zero.mp4", 0)
    write_video(tmp_path / "single.mp4", 1)
    rows += ["zero.mp4,1", "single.mp4,2"]
    (tmp_path / "train.csv").write_text("\n".join(rows))
    (tmp_path / "validation.csv").write_text("\n".join([*rows[:11], "single.mp4,2"]))
    train(compose_train(tmp_path / "run", *video_settings(tmp_path, "data.damaged_limit=0.5", "data.batch_size=1")))
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["images"] == 12
    listed = {Path(line).name for line in (tmp_path / "run" / "undecodable.txt").read_text().splitlines()}
    assert listed == {*damaged, "zero.mp4"}
    assert "Undecodable files" in capsys.readouterr().out
    with open(tmp_path / "run" / "predictions.csv", newline="") as file:
        predictions = list(csv.DictReader(file))
    assert [row["path"] for row in predictions][-1].endswith("single.mp4") and len(predictions) == 12

    with pytest.raises(SystemExit):
        train(compose_train(tmp_path / "strict", *video_settings(tmp_path, "data.damaged_limit=0.01")))
    assert "training videos are damaged, listed in" in capsys.readouterr().err
    (tmp_path / "validation.csv").write_text("\n".join([*rows[:11], "text.mp4,0"]))
    with pytest.raises(SystemExit):
        train(compose_train(tmp_path / "eval", *video_settings(tmp_path, "data.damaged_limit=0.5")))
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"error: cannot decode {tmp_path}/text.mp4")


def test_train_then_evaluate_on_one_and_two_processes(videos, tmp_path, capsys):
    run_dir = tmp_path / "run"
    train(compose_train(run_dir, *video_settings(videos), "data.static_baseline=true"))
    output = capsys.readouterr().out
    assert "Decoder" in output and "PyAV" in output and "one frame repeated" in output
    recorded = json.loads((run_dir / "results.json").read_text())
    assert recorded["images"] == 11 and 0 <= recorded["top1_without_motion"] <= 1
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    two = ["trainer.devices=2", "data.eval_batch_size=2", f"output_dir={tmp_path / 'two'}"]
    process = run(tmp_path, "eval.py", f"run={run_dir}", *two, launcher=torchrun)
    assert process.returncode == 0, process.stderr
    repeated = json.loads((tmp_path / "two" / "results.json").read_text())
    assert repeated["images"] == 11
    for name, value in recorded["metrics"].items():
        assert repeated["metrics"][name] == pytest.approx(value, abs=1e-6), name
    for name in ("per_class.csv", "predictions.csv"):
        assert len((tmp_path / "two" / name).read_text().splitlines()) == len((run_dir / name).read_text().splitlines())
    assert (tmp_path / "two" / "per_class.csv").read_text() == (run_dir / "per_class.csv").read_text()
    pictures = [np.asarray(Image.open(folder / "misclassified.png"), int) for folder in (tmp_path / "two", run_dir)]
    assert np.abs(pictures[0] - pictures[1]).mean() < 1  # of the mistakes of both processes


def test_moving_digits_experiment_builds(videos, tmp_path):
    overrides = ["experiment=moving_digits", "data.name=test", f"data.root={videos}", "data.num_classes=null"]
    cfg = compose_train(tmp_path, *overrides, "data.batch_size=2")
    data = build_datamodule(cfg)
    module = build_module(cfg, data, build_trainer(cfg))
    clips, _ = data.on_after_batch_transfer(next(iter(data.train_dataloader())), 0)
    assert module(clips).shape == (2, NUM_CLASSES)
