"""Several processes on one machine (gloo): the run of one process, one folder, and an end when one of them dies."""

import csv
import json
import sys
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from lightning.pytorch.strategies import DDPStrategy
from omegaconf import OmegaConf
from training_runs import REPOSITORY, compose_train, run, train, write_image_folder

from nat_models.engine import build
from nat_models.engine.build import build_trainer
from nat_models.engine.run_folder import launch_time
from nat_models.engine.sharding import FullyShardedStrategy

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
# A tiny model without random layers; the augmentation is a function of the sample, not of the process.
TINY = ["model.model_kwargs.depths=[1,1]", "model.model_kwargs.embed_dim=16", "model.model_kwargs.num_heads=[1,2]"]
TINY += ["model.model_kwargs.drop_path_rate=0", "trainer.max_epochs=2", "optim.schedule.warmup_epochs=1"]
TINY += ["data.eval_batch_size=90"]


def rows_of(path: Path) -> list[dict[str, str]]:
    """Those of a csv file, but for the columns of speed."""
    with open(path, newline="") as file:
        return [{key: row[key] for key in row if not key.startswith("speed/")} for row in csv.DictReader(file)]


def losses(run_dir: Path) -> dict[str, list[float]]:
    """The losses of training and validation after each epoch."""
    with open(run_dir / "csv" / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    return {name: [float(row[name]) for row in rows if row[name]] for name in ("train/loss_epoch", "val/loss")}


def weights(run_dir: Path) -> dict[str, torch.Tensor]:
    return torch.load(run_dir / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]


@pytest.fixture(scope="module")
def one_process(tmp_path_factory) -> Path:
    """A run with 64 images a step."""
    run_dir = tmp_path_factory.mktemp("one") / "run"
    train(compose_train(run_dir, *TINY, "data.batch_size=64"))
    return run_dir


def assert_same_training(run_dir: Path, expected: Path) -> None:
    """Sums are taken in another order, nothing else: losses agree to 1e-4, weights to 1e-3 of their size."""
    for name, values in losses(expected).items():
        assert len(values) == 2 and losses(run_dir)[name] == pytest.approx(values, rel=1e-4), name
    trained = weights(run_dir)
    for name, value in weights(expected).items():
        assert (trained[name] - value).norm() <= 1e-3 * value.norm() + 1e-6, name


@pytest.mark.parametrize("trainer", ["ddp", "fsdp"])
def test_two_processes_train_as_one_with_the_same_effective_batch(one_process, tmp_path, trainer):
    settings = [*TINY, f"trainer={trainer}", "trainer.devices=2", "data.batch_size=32"]
    process = run(tmp_path, "train.py", *settings, launcher=TORCHRUN)
    assert process.returncode == 0, process.stderr
    assert "64 = 32 per device x 2 devices x 1 accumulated" in process.stdout
    (run_dir,) = (tmp_path / "runs" / "digits").iterdir()
    assert_same_training(run_dir, one_process)
    results = json.loads((run_dir / "results.json").read_text())
    assert results["images"] == 360
    assert json.loads((run_dir / "manifest.json").read_text())["world_size"] == 2
    expected = json.loads((one_process / "results.json").read_text())
    assert results["metrics"]["val/top1"] == pytest.approx(expected["metrics"]["val/top1"], abs=1 / 360)


LATE = """
import sys
from types import SimpleNamespace

import torch

sys.path.insert(0, {tests!r})
from training_runs import compose_train, train

from nat_models.engine import non_finite
from nat_models.engine.classification import ClassificationModule

step = ClassificationModule.training_step


def poisoned_step(module, batch, batch_idx):
    if (module.current_epoch, batch_idx, module.global_rank) in [(0, 5, 0), (1, 3, 1)]:
        batch[0][0] = float("nan")
    return step(module, batch, batch_idx)


def copy_late(flag):
    print("the host is ahead", flush=True)
    copy = torch.full_like(flag, 0.5)
    return copy, SimpleNamespace(synchronize=lambda: copy.copy_(flag))


ClassificationModule.training_step = poisoned_step
if {is_late}:
    non_finite.ASYNCHRONOUS = ("cpu",)
    non_finite.copy_to_host = copy_late
train(compose_train({run_dir!r}, *sys.argv[1:]))
"""


@pytest.mark.slow
def test_processes_leave_out_the_same_steps_when_verdicts_come_late(tmp_path):
    """Of sharded parameters; without shards, processes do what one does (`test_non_finite.py`)."""
    settings = [*TINY, "trainer=fsdp", "trainer.devices=2", "data.batch_size=32", "+optim.optimizer.fused=true"]
    for name in ("waits", "ahead"):
        script = tmp_path / f"{name}.py"
        tests, run_dir = str(REPOSITORY / "tests"), str(tmp_path / name)
        script.write_text(LATE.format(tests=tests, run_dir=run_dir, is_late=name == "ahead"))
        process = run(tmp_path, str(script), *settings, launcher=TORCHRUN)
        assert process.returncode == 0, process.stderr
        assert ("the host is ahead" in process.stdout) == (name == "ahead")
    waits, ahead = (tmp_path / name for name in ("waits", "ahead"))
    for file in ("skipped_steps.csv", "csv/metrics.csv"):
        assert rows_of(waits / file) == rows_of(ahead / file), file
    assert {(row["epoch"], row["batch"], row["rank"]) for row in rows_of(ahead / "skipped_steps.csv")} == {
        (epoch, batch, rank) for epoch, batch in (("0", "5"), ("1", "3")) for rank in ("0", "1")
    }
    for name, value in weights(waits).items():
        assert torch.equal(value, weights(ahead)[name]) and value.isfinite().all(), name


PREEMPTED = """
import os
import signal
import sys

sys.path.insert(0, {tests!r})
from training_runs import compose_train, train

from nat_models.engine.classification import ClassificationModule

step = ClassificationModule.training_step


def step_and_signal(module, batch, batch_idx):
    if (batch_idx, module.global_rank) == (5, 1):
        os.kill(os.getpid(), signal.SIGTERM)
    return step(module, batch, batch_idx)


ClassificationModule.training_step = step_and_signal
train(compose_train({run_dir!r}, *sys.argv[1:]))
"""


def test_a_signal_to_one_process_stops_all_after_the_next_step(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(PREEMPTED.format(tests=str(REPOSITORY / "tests"), run_dir=str(tmp_path / "run")))
    settings = [*TINY, "trainer=ddp", "trainer.devices=2", "data.batch_size=32"]
    process = run(tmp_path, str(script), *settings, launcher=TORCHRUN)
    assert process.returncode != 0, process.stderr
    assert "stopped by a signal to another process after step 7" in process.stdout, process.stdout
    assert torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 7


def test_sharded_models_are_evaluated_on_what_the_processes_do_not_divide(tmp_path):
    root = write_image_folder(tmp_path / "images", val_per_class=1)  # three: one process has a batch more
    settings = ["experiment=none", "data=imagenet", f"data.root={root}", "data.img_size=32", "data.batch_size=4"]
    settings += ["data.eval_batch_size=1", "data.num_workers=0", "model.model_name=test_vit"]
    settings += ["+model.model_kwargs.img_size=32", "trainer=fsdp", "trainer.accelerator=cpu", "trainer.devices=2"]
    settings += ["trainer.max_epochs=1", "optim.schedule.warmup_epochs=0", "optim.schedule.cooldown_epochs=0"]
    process = run(tmp_path, "train.py", *settings, "run_dir=run", launcher=TORCHRUN, timeout=100)
    assert process.returncode == 0, process.stderr
    one = run(tmp_path, "eval.py", "run=run", "trainer.accelerator=cpu")
    assert one.returncode == 0, one.stderr
    assert "the same" in one.stdout and "DIFFERENT" not in one.stdout


def test_accumulation_trains_as_the_larger_batch(one_process, tmp_path):
    settings = ["data.batch_size=32", "trainer.accumulate_grad_batches=2", "trainer.limit_train_batches=44"]
    train(compose_train(tmp_path, *TINY, *settings))
    assert_same_training(tmp_path, one_process)


def test_a_process_that_dies_ends_the_run_with_its_error(tmp_path):
    root = write_image_folder(tmp_path / "images", val_per_class=4)
    (root / "val" / "class_1" / "1.jpg").write_bytes(b"no image")  # the second image: the second process's first one
    settings = ["experiment=none", "data=imagenet", f"data.root={root}", "data.img_size=32", "data.batch_size=4"]
    settings += ["model.model_name=test_resnet", "trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2"]
    settings += ["trainer.max_epochs=1", "optim.schedule.warmup_epochs=0", "optim.schedule.cooldown_epochs=0"]
    process = run(tmp_path, "train.py", *settings, "data.num_workers=1", launcher=TORCHRUN, timeout=100)
    assert process.returncode != 0
    assert f"error: cannot decode {root}/val/class_1/1.jpg" in process.stderr


def test_strategies_are_built_with_their_timeout(tmp_path):
    for choice, strategy in (("ddp", DDPStrategy), ("fsdp", FullyShardedStrategy)):
        trainer = build_trainer(compose_train(tmp_path, f"trainer={choice}", "trainer.devices=2"))
        assert type(trainer.strategy) is strategy and trainer.strategy._timeout == timedelta(minutes=10)
        assert trainer.world_size == 2


def test_averaged_weights_are_refused_where_they_cannot_be_sharded(tmp_path):
    with pytest.raises(ValueError, match="callbacks=ema does not work with trainer=fsdp"):
        build_trainer(compose_train(tmp_path, "trainer=fsdp", "callbacks=ema"))


def test_processes_of_a_sweep_are_started_by_others(tmp_path, monkeypatch):
    monkeypatch.setattr(build, "in_sweep", lambda: True)
    cfg = compose_train(tmp_path, "trainer=ddp", "trainer.devices=2")
    with pytest.raises(ValueError, match="trainer.devices must be 1 in a sweep, got 2, unless .* --nproc-per-node 2"):
        build_trainer(cfg)
    for name in ("LOCAL_RANK", "RANK", "GROUP_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.setenv(name, "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "of torchrun")
    assert build_trainer(cfg).world_size == 2


def test_processes_of_a_slurm_job_agree_on_the_run_folder(monkeypatch):
    assert launch_time.__wrapped__().startswith("20")
    for name, value in {"JOB_ID": "12", "STEP_ID": "0", "STEP_NUM_TASKS": "8", "PROCID": "3"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    assert launch_time.__wrapped__() == "slurm-12-0"
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    assert launch_time.__wrapped__() == "slurm-12-0-2"
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "1")  # of an interactive job, whose runs share the step
    assert launch_time.__wrapped__().startswith("20")
    monkeypatch.setenv("SUBMITIT_EXECUTOR", "slurm")
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "10")
    assert launch_time.__wrapped__() == "slurm-10-0-2"


def test_slurm_launcher_asks_for_one_task_a_gpu():
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    with initialize_config_dir(str(REPOSITORY / "configs"), version_base="1.3"):
        overrides = ["hydra/launcher=slurm", "trainer.devices=4", "hydra.launcher.partition=gpu"]
        cfg = compose("train", overrides, return_hydra_config=True)
    launcher = OmegaConf.to_container(cfg.hydra.launcher, resolve=True)
    assert launcher["_target_"].endswith("SlurmLauncher") and launcher["partition"] == "gpu"
    assert launcher["tasks_per_node"] == launcher["gpus_per_node"] == 4
