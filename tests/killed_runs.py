"""Runs that are killed, preempted, or left with damaged files go on exactly as if nothing had happened.

`test_resume.py` runs this file; to run it alone: `pytest tests/killed_runs.py`.
"""

import csv
import errno
import importlib
import json
import os
import platform
import random
import resource
import runpy
import signal
import sys
import traceback
from collections.abc import Callable
from itertools import count
from pathlib import Path
from unittest.mock import patch

import pytest
import timm
import torch
import torch.utils.tensorboard  # here, for all forked processes
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from training_runs import REPOSITORY, compose_train, run, train, write_image
from video_files import write_video

from nat_models.checkpoints import read_file
from nat_models.claim import claim_folder
from nat_models.data import ImageDataModule, VideoDataModule
from nat_models.engine import evaluation, plots
from nat_models.engine.callbacks import UndecodableCount
from nat_models.engine.checkpoint import read_checkpoint
from nat_models.engine.checkpoint_io import VerifiedCheckpointIO
from nat_models.engine.classification import ClassificationModule
from nat_models.engine.last_checkpoint import LastCheckpoint
from nat_models.engine.position import Position
from nat_models.engine.resume import choose_run
from nat_models.engine.run_folder import read_results

sys.path.insert(0, str(REPOSITORY / "benchmarks"))
from kill_and_resume import SETTINGS, differences  # noqa: E402

SMALL = [*SETTINGS, "trainer.limit_val_batches=1", "callbacks.contact_sheet=null"]
VARIANTS = {
    "plain": [],
    "workers": ["data.num_workers=2"],
    "ema_accumulation_mixup": [
        "callbacks=ema",
        "callbacks.ema.decay=0.9",
        "trainer.accumulate_grad_batches=3",
        "model.mixup={mixup_alpha: 0.8, cutmix_alpha: 1.0}",
        "callbacks.last.every_n_train_steps=1",
    ],
    "max_steps": ["trainer.max_steps=24", "trainer.check_val_every_n_epoch=2"],
}


def in_child(run_dir: Path, *overrides: str, prepare: Callable[[], None] = lambda: None) -> int:
    """Trains in a forked process, without the plots at the end; its exit status, negative for a signal.

    Args:
        run_dir: run folder.
        overrides: of the config.
        prepare: called in the process first.
    """
    return forked(lambda: train(compose_train(run_dir, *overrides)), prepare)


def command_in_child(folder: Path, *arguments: str, prepare: Callable[[], None] = lambda: None) -> int:
    """The same for the command `python train.py ARGUMENTS` in a folder."""

    def command() -> None:
        os.chdir(folder)
        evaluation.save_evaluation = plots.plot_curves = lambda *_: None
        with patch.object(sys, "argv", [str(REPOSITORY / "train.py"), *arguments]):
            runpy.run_path(sys.argv[0], run_name="__main__")

    return forked(command, prepare)


def forked(function: Callable[[], object], prepare: Callable[[], None]) -> int:
    with patch.object(sys, "path", [str(REPOSITORY), *sys.path]):
        script = importlib.import_module("train")
    child = os.fork()
    if child == 0:
        status = 1
        try:
            prepare()
            # A GPU cannot be used in a process that is forked from one that has used it.
            with patch.object(torch.cuda, "is_available", return_value=False):
                with patch.object(script, "save_evaluation"), patch.object(script, "plot_curves"):
                    function()
            status = 0
        except SystemExit as exit_error:
            status = exit_error.code  # type: ignore[assignment]
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)  # type: ignore[arg-type]
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def kill_self(*arguments: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def at_call(
    number: int, owner: type, name: str, action: Callable[..., object] = kill_self, ever_after: bool = False
) -> Callable[[], None]:
    """For `prepare`: makes the `number`-th call of a method, or all from it on, do something else first."""

    def prepare() -> None:
        original, calls = getattr(owner, name), count(1)

        def method(*arguments):
            call = next(calls)
            if call == number or (ever_after and call > number):
                action(*arguments)
            return original(*arguments)

        setattr(owner, name, method)

    return prepare


@pytest.fixture(scope="module")
def reference(tmp_path_factory) -> Callable[[str], Path]:
    """The run folder of a variant's uninterrupted run."""
    folder, done = tmp_path_factory.mktemp("reference"), set()

    def run_dir(variant: str) -> Path:
        if variant not in done:
            assert in_child(folder / variant, *SMALL, *VARIANTS[variant]) == 0
            done.add(variant)
        return folder / variant

    return run_dir


MOMENTS = {
    "before_the_first_checkpoint": at_call(2, ClassificationModule, "training_step"),
    "within_an_epoch": at_call(9, ClassificationModule, "training_step"),
    "before_an_epoch's_metrics_are_logged": at_call(2, UndecodableCount, "on_train_epoch_end"),
    "in_the_first_step_of_an_epoch": at_call(11, ClassificationModule, "training_step"),
    "at_the_end": at_call(1, LastCheckpoint, "on_train_end"),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_killed_and_moved(tmp_path, reference, moment):
    assert in_child(tmp_path / "run", *SMALL, prepare=MOMENTS[moment]) == -signal.SIGKILL
    run_dir = (tmp_path / "run").rename(tmp_path / "moved")
    assert in_child(run_dir, *SMALL, "ckpt_path=auto") == 0
    assert differences(reference("plain"), run_dir) == []
    best = read_checkpoint(run_dir / "checkpoints" / "last.ckpt")["callbacks"]
    assert [state["dirpath"] for state in best.values() if "dirpath" in state] == [str(run_dir / "checkpoints")]


@pytest.mark.parametrize("variant, step", [("workers", 9), ("ema_accumulation_mixup", 18), ("max_steps", 11)])
def test_every_setting_goes_on_exactly(tmp_path, reference, variant, step):
    run_dir = tmp_path / "run"
    prepare = at_call(step, ClassificationModule, "training_step")
    assert in_child(run_dir, *SMALL, *VARIANTS[variant], prepare=prepare) == -signal.SIGKILL
    # Neither do the workers that remain change what is drawn.
    other_workers = ["data.num_workers=1"] if variant == "workers" else []
    assert in_child(run_dir, *SMALL, *VARIANTS[variant], *other_workers, "ckpt_path=auto") == 0
    assert differences(reference(variant), run_dir) == []


def test_killed_at_a_random_moment(tmp_path, reference):
    run_dir, seed = tmp_path / "run", random.randrange(1 << 32)
    print("seed", seed)
    seconds = random.Random(seed).uniform(0, 2)
    # The timer's signal, which nothing handles, ends the process as abruptly as SIGKILL.

    def prepare() -> None:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_REAL, seconds)

    status = in_child(run_dir, *SMALL, prepare=prepare)
    assert status in (0, -signal.SIGALRM)
    assert in_child(run_dir, *SMALL, "ckpt_path=auto") == 0
    assert differences(reference("plain"), run_dir) == []
    events = EventAccumulator(str(run_dir / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("train/loss_step")] == list(range(30))


def test_auto_finds_the_newest_unfinished_run_with_these_settings(tmp_path, reference, capfd):
    kill = at_call(6, ClassificationModule, "training_step")
    for other in ([], ["seed=1"]):
        assert command_in_child(tmp_path, *SMALL, *other, prepare=kill) == -signal.SIGKILL
    unfinished, _ = runs = sorted((tmp_path / "runs" / "none").iterdir())
    (unfinished / "results.json").write_text('{"epoch": 1, "met')  # which is none
    assert command_in_child(tmp_path, *SMALL, "ckpt_path=auto") == 0
    assert f"going on from {unfinished}/checkpoints/last.ckpt (epoch 0, batch 3)" in capfd.readouterr().out
    assert sorted((tmp_path / "runs" / "none").iterdir()) == runs
    assert differences(reference("plain"), unfinished) == []
    assert len(json.loads((unfinished / "manifest.json").read_text())["resumed"]) == 1

    (unfinished / "results.json").write_text("{}")  # which is written at the end
    assert command_in_child(tmp_path, *SMALL, "ckpt_path=auto", prepare=kill) == -signal.SIGKILL
    assert "runs/none holds no unfinished run with these settings; starting anew" in capfd.readouterr().out
    assert len(list((tmp_path / "runs" / "none").iterdir())) == 3


def test_a_sweep_that_is_repeated_leaves_out_what_is_finished(tmp_path, capfd):
    sweep = ["-m", *SMALL, "ckpt_path=auto"]
    assert command_in_child(tmp_path, *sweep) == 0
    (run_dir,) = tmp_path.glob("runs/none/*/0")
    (run_dir / "results.json").write_text('{"metrics": {"val/top1": 0.5}}')
    assert command_in_child(tmp_path, *sweep) == 0
    assert f"ckpt_path=auto: {run_dir} is finished" in capfd.readouterr().out
    assert list(tmp_path.glob("runs/none/*/0")) == [run_dir]


def test_pretrained_weights_are_read_only_once(tmp_path):
    base = tmp_path / "base.pth"
    torch.save(timm.create_model("test_vit", img_size=32).state_dict(), base)
    settings = [*SMALL, "model.pretrained=true", f"+model.model_kwargs.pretrained_cfg_overlay={{file: {base}}}"]
    kill = at_call(6, ClassificationModule, "training_step")
    assert in_child(tmp_path / "run", *settings, prepare=kill) == -signal.SIGKILL
    base.unlink()
    assert in_child(tmp_path / "run", *settings, "ckpt_path=auto") == 0


def test_batch_stays_the_same_within_an_epoch(tmp_path, capfd):
    kill = at_call(6, ClassificationModule, "training_step")
    assert in_child(tmp_path / "run", *SMALL, prepare=kill) == -signal.SIGKILL
    for other, message in [
        ("data.batch_size=8", "data.batch_size=16 on 1 device(s), but this run's is 8 on 1; it or the product must"),
        ("trainer.accumulate_grad_batches=2", "trainer.accumulate_grad_batches=1, but this run's is 2; it must stay"),
    ]:
        assert in_child(tmp_path / "run", *SMALL, other, "ckpt_path=auto") == 2
        assert f"was saved within an epoch with {message}" in capfd.readouterr().err
    kill = at_call(8, ClassificationModule, "training_step")  # in the first step of an epoch
    assert in_child(tmp_path / "run", *SMALL, "ckpt_path=auto", prepare=kill) == -signal.SIGKILL
    other = ["data.batch_size=8", "trainer.limit_train_batches=2"]
    assert in_child(tmp_path / "run", *SMALL, *other, "ckpt_path=auto") == 0
    (line,) = [line for line in capfd.readouterr().out.splitlines() if line.startswith("epoch 3/3")]
    assert line.endswith("ETA 0:00:00")


def test_loggers_elsewhere_go_on_with_their_runs(tmp_path, reference):
    checkpoint = read_checkpoint(reference("plain") / "checkpoints" / "last.ckpt")
    assert checkpoint["logger_ids"] == {"ContinuedCSVLogger": "", "TensorBoardLogger": ""}
    checkpoint["logger_ids"] = {"WandbLogger": "w1", "MLFlowLogger": "m1"}
    VerifiedCheckpointIO().save_checkpoint(checkpoint, tmp_path / "checkpoints" / "last.ckpt")
    for name, key, expected in (("wandb", "id", "w1"), ("mlflow", "run_id", "m1")):
        cfg = compose_train(tmp_path, *SMALL, f"logger={name}", "ckpt_path=auto")
        choose_run(cfg)
        assert cfg.logger[name][key] == expected


def shards(folder: Path) -> ImageDataModule:
    wds = pytest.importorskip("webdataset")
    for name in range(4):
        with wds.TarWriter(str(folder / f"{name}.tar")) as shard:
            for index in range(6):
                write_image(folder / "image.jpg", 10 * name + index)
                content = (folder / "image.jpg").read_bytes()
                shard.write({"__key__": f"{name}{index}", "jpg": content, "cls": str(index % 3)})
    splits = {"train_split": "{0..3}.tar|24", "val_split": "0.tar|6", "num_classes": 3}
    return ImageDataModule("wds/shards", str(folder), img_size=16, batch_size=3, num_workers=2, **splits)


def videos(folder: Path) -> VideoDataModule:
    for index in range(8):
        write_video(folder / f"{index}.mp4", 12, size=(32, 32))
    (folder / "train.csv").write_text("".join(f"{index}.mp4,{index % 2}\n" for index in range(8)))
    (folder / "validation.csv").write_text("0.mp4,0\n1.mp4,1\n")
    sampling = {"num_frames": 2, "stride": 2}
    return VideoDataModule("list", str(folder), sampling=sampling, img_size=16, batch_size=2, repeats=2)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["16-mixed", "bf16-mixed"])
def test_killed_on_a_gpu(tmp_path, precision):
    settings = ["trainer.accelerator=gpu", f"trainer.precision={precision}", "deterministic=true"]
    process = run(tmp_path, "benchmarks/kill_and_resume.py", "--kills", "3", *settings)
    assert process.returncode == 0, process.stdout


@pytest.mark.parametrize("create", [shards, videos])
def test_data_goes_on_within_an_epoch(tmp_path, create):
    data = create(tmp_path)
    data.setup("fit")
    loader = data.train_dataloader()
    for epoch in (0, 1):
        for stateful in (loader.sampler, loader.dataset):
            getattr(stateful, "set_epoch", lambda _: None)(epoch)
        batches = list(loader)
    assert len(batches) == 8
    resumed = create(tmp_path)
    resumed.setup("fit")
    resumed.start = (1, 5)
    rest = list(resumed.train_dataloader())
    assert len(rest) == 3
    for (images, labels), (expected_images, expected_labels) in zip(rest, batches[5:], strict=True):
        assert torch.equal(images, expected_images) and torch.equal(labels, expected_labels)


@pytest.mark.parametrize(("number", "num_workers"), [(signal.SIGTERM, 0), (signal.SIGUSR1, 1)])
def test_preempted(tmp_path, reference, capfd, number, num_workers):
    run_dir = tmp_path / "run"

    def prepare() -> None:
        os.setpgrp()
        at_call(5, ClassificationModule, "training_step", lambda *_: os.killpg(0, number))()

    assert in_child(run_dir, *SMALL, f"data.num_workers={num_workers}", prepare=prepare) == 75
    assert f"stopped by {number.name} after step 5" in capfd.readouterr().out
    assert in_child(run_dir, *SMALL, "ckpt_path=auto") == 0
    assert "(epoch 0, batch 5)" in capfd.readouterr().out
    assert differences(reference("plain"), run_dir) == []


def test_preempted_outside_of_training(tmp_path):
    prepare = at_call(1, ClassificationModule, "configure_optimizers", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    assert in_child(tmp_path / "run", *SMALL, prepare=prepare) == 75


def full_disk(*arguments: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize(
    ("action", "status"),
    [(lambda *_: os.kill(os.getpid(), signal.SIGTERM), 75), (full_disk, 2)],
    ids=["signal", "full"],
)
def test_stopped_while_the_report_is_written(tmp_path, capfd, action, status):
    run_dir = tmp_path / "run"
    settings = [*SMALL, "trainer.max_epochs=2"]

    def report(prepare: Callable[[], None]) -> int:
        def main() -> None:
            importlib.import_module("train").save_evaluation = evaluation.save_evaluation  # which `forked` leaves out
            train(compose_train(run_dir, *settings, "ckpt_path=auto"))

        return forked(main, prepare)

    assert report(lambda: setattr(evaluation, "plot_mistakes", action)) == status
    message = f"error: [Errno 28] No space left on device; the run folder is {run_dir}"
    assert capfd.readouterr().err.splitlines()[-1:] == [message] * (status == 2)
    assert not (run_dir / "results.json").exists()
    assert report(lambda: None) == 0
    assert read_results(run_dir)["epoch"] in (1, 2)


def test_damaged_checkpoints(tmp_path, reference, capfd):
    run_dir = tmp_path / "run"
    assert in_child(run_dir, *SMALL, prepare=at_call(18, ClassificationModule, "training_step")) == -signal.SIGKILL
    last, previous = (run_dir / "checkpoints" / name for name in ("last.ckpt", "previous.ckpt"))
    damage(last)
    (last.parent / "last.ckpt.tmp").write_bytes(b"what a killed process leaves")
    soon = at_call(5, ClassificationModule, "training_step")
    assert in_child(run_dir, *SMALL, "ckpt_path=auto", prepare=soon) == -signal.SIGKILL
    assert [Position.of(read_checkpoint(path)).step for path in (last, previous)] == [15, 12]
    assert in_child(run_dir, *SMALL, "ckpt_path=auto") == 0
    output = capfd.readouterr().out
    assert f"going on from {previous} (epoch 1, batch 2) because '{last}' is damaged" in output
    assert differences(reference("plain"), run_dir) == []
    assert {path.name for path in last.parent.iterdir()} == {"best.ckpt", "last.ckpt", "previous.ckpt"}

    damage(last)
    last.replace(previous)
    assert in_child(run_dir, *SMALL, "ckpt_path=auto") == 2
    assert "remove the run folder to start anew" in capfd.readouterr().err
    for read in (read_checkpoint, read_file, VerifiedCheckpointIO().load_checkpoint):
        with pytest.raises(ValueError, match="is damaged: its content is not that of its checksum"):
            read(previous)


def test_damaged_best_checkpoint(tmp_path, capfd):
    folder = tmp_path / "run" / "checkpoints"

    def damaged(*names: str) -> Callable[[], None]:
        return at_call(1, ClassificationModule, "on_fit_end", lambda *_: [damage(folder / name) for name in names])

    assert in_child(tmp_path / "run", *SMALL, prepare=damaged("best.ckpt")) == 0
    output = capfd.readouterr().out
    assert f"'{folder}/best.ckpt' is damaged: its content is not that of its checksum; the score is that of" in output
    assert f"{folder}/last.ckpt (epoch 3), not of the best epoch" in output and "Last checkpoint (epoch 3)" in output
    (folder / "best.ckpt").unlink()
    assert in_child(tmp_path / "run", *SMALL, "ckpt_path=auto", prepare=damaged("last.ckpt")) == 0
    output = capfd.readouterr().out
    assert f"there is no checkpoint '{folder}/best.ckpt'; '{folder}/last.ckpt' is damaged" in output
    assert f"{folder}/previous.ckpt (epoch 2), not of the best epoch" in output
    prepare = damaged("last.ckpt", "previous.ckpt")
    damage(folder / "last.ckpt")  # which makes it whole again
    assert in_child(tmp_path / "run", *SMALL, "ckpt_path=auto", prepare=prepare) == 2
    assert capfd.readouterr().err.splitlines()[-1].startswith("error: no checkpoint is left to evaluate: there is no")


def damage(path: Path) -> None:
    """Flips one bit in the middle of a file, where tensors are."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def limit_file_size() -> None:
    """As `ulimit -f`, which is as near to a full disk as a test comes without mounting one."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, resource.RLIM_INFINITY))


def test_full_disk(tmp_path, reference, capfd):
    run_dir = tmp_path / "run"
    prepare = at_call(6, ClassificationModule, "training_step", lambda *_: limit_file_size())
    assert in_child(run_dir, *SMALL, prepare=prepare) == 2
    error = capfd.readouterr().err.splitlines()[-1]
    assert error.startswith(f"error: cannot write the checkpoint {run_dir}/checkpoints/last.ckpt (")
    assert "File too large; last.ckpt of before is intact" in error
    assert not list(run_dir.rglob("*.tmp"))
    assert Position.of(read_checkpoint(run_dir / "checkpoints" / "last.ckpt")).step == 3
    assert in_child(run_dir, *SMALL, "ckpt_path=auto") == 0
    assert differences(reference("plain"), run_dir) == []


def test_run_folder_that_cannot_be_written(capfd):
    assert in_child(Path("/proc/run"), *SMALL) == 2
    assert "error: [Errno 2] No such file or directory: '/proc/run'" in capfd.readouterr().err


def test_run_folder_with_a_run_is_not_overwritten(tmp_path, reference, capfd):
    assert in_child(reference("plain"), *SMALL) == 2
    assert "holds a run already; ckpt_path=auto goes on with it" in capfd.readouterr().err
    folder = tmp_path / "folder"
    folder.mkdir()
    assert command_in_child(folder, *SMALL, f"run_dir={reference('plain')}") == 2
    assert "holds a run already" in capfd.readouterr().err
    assert not list(folder.glob("runs/none/*"))  # of which Hydra makes one


def test_run_folder_in_use_is_left_alone(tmp_path, capfd):
    claim_folder(tmp_path, "run_dir")
    claim_folder(tmp_path, "run_dir")  # as often as one process likes
    assert in_child(tmp_path, *SMALL, "ckpt_path=auto") == 2
    assert f"in use by process {os.getpid()} on {platform.node()}; wait for its end" in capfd.readouterr().err
    assert not (tmp_path / "checkpoints").exists()


def poison(module, batch, batch_idx) -> None:
    batch[0][0] = float("nan")


def test_non_finite_step_is_skipped(tmp_path):
    run_dir = tmp_path / "run"
    prepare = at_call(8, ClassificationModule, "training_step", poison)
    assert in_child(run_dir, *SMALL, prepare=prepare) == 0
    with open(run_dir / "csv" / "metrics.csv", newline="") as file:
        skipped = {
            int(row["step"]): float(row["train/skipped_steps"]) for row in csv.DictReader(file) if row["train/lr"]
        }
    assert skipped == {step: float(step >= 7) for step in range(30)}
    with open(run_dir / "skipped_steps.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    data = ImageDataModule("digits", img_size=32, in_chans=1, batch_size=16)
    data.setup("fit")
    data.trainer = None
    assert [row["sample"] for row in rows] == data.training_samples(0, 7)
    assert {(row["step"], row["epoch"], row["batch"], row["rank"]) for row in rows} == {("7", "0", "7", "0")}
    last = read_checkpoint(run_dir / "checkpoints" / "last.ckpt")
    assert last["global_step"] == 30 and last["optimizer_states"][0]["state"][0]["step"] == 29
    assert all(value.isfinite().all() for value in last["state_dict"].values())


def test_too_many_non_finite_steps_end_the_run(tmp_path, capfd):
    run_dir = tmp_path / "run"
    prepare = at_call(8, ClassificationModule, "training_step", poison, ever_after=True)
    assert in_child(run_dir, *SMALL, "callbacks.non_finite.max_consecutive=1", prepare=prepare) == 2
    error = capfd.readouterr().err.splitlines()[-1]
    assert error.startswith("error: the loss or the gradient was not finite in 2 steps in a row and 2 in all;")
    good = f"the last good checkpoint is {run_dir}/checkpoints/last.ckpt, of step 6"
    assert f"{good}; {run_dir}/skipped_steps.csv lists" in error


def test_no_checkpoint_is_replaced_while_steps_are_skipped(tmp_path, reference, capfd):
    settings = [*SMALL, "callbacks.last.every_n_train_steps=1", "callbacks.non_finite.max_consecutive=5"]
    last, previous = (tmp_path / "run" / "checkpoints" / name for name in ("last.ckpt", "previous.ckpt"))

    def stop_while_skipping() -> None:
        at_call(8, ClassificationModule, "training_step", poison, ever_after=True)()
        at_call(12, ClassificationModule, "training_step", lambda *_: os.kill(os.getpid(), signal.SIGTERM))()

    assert in_child(tmp_path / "run", *settings, prepare=stop_while_skipping) == 75  # in the second epoch
    assert "stopped by SIGTERM after step 12, which is left out, so that nothing is saved" in capfd.readouterr().out
    diverged = at_call(1, ClassificationModule, "training_step", poison, ever_after=True)
    assert in_child(tmp_path / "run", *settings, "ckpt_path=auto", prepare=diverged) == 2
    error = capfd.readouterr().err.splitlines()[-1]
    assert "in 6 steps in a row and 6 in all" in error and f"the last good checkpoint is {previous}, of step 6" in error
    assert [Position.of(read_checkpoint(path)).step for path in (last, previous)] == [7, 6]
    assert in_child(tmp_path / "run", *settings, "ckpt_path=auto") == 0
    assert differences(reference("plain"), tmp_path / "run") == []
