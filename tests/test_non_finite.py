"""Steps that are not finite: the device leaves them out while the host is ahead, to the same effect as if it waited."""

import csv
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from timm.optim import create_optimizer_v2

from nat_models.data import ImageDataModule
from nat_models.engine import non_finite
from nat_models.engine.build import quiet_lightning
from nat_models.engine.checkpoint import read_checkpoint
from nat_models.engine.checkpoint_io import VerifiedCheckpointIO
from nat_models.engine.classification import ClassificationModule
from nat_models.engine.errors import NonFiniteStepsError
from nat_models.engine.last_checkpoint import LastCheckpoint
from nat_models.engine.non_finite import SkipNonFiniteSteps
from nat_models.engine.step_times import StepTimes

STEPS = 5  # an epoch
ADAMW = {"opt": "adamw", "lr": 1e-3, "weight_decay": 0.05, "fused": True}
POISONED = ({3}, {0, 1}, {4, 5}, {9})
"""Batches that are NaN: within an epoch, before a finite one, at an epoch's end and after it, at the end."""
SGD = {"opt": "sgd", "lr": 1e-2, "weight_decay": 0.05, "fused": True}


class LateEvent:
    """Of a copy that is made no earlier than somebody waits for it."""

    def __init__(self, source: torch.Tensor, copy: torch.Tensor) -> None:
        self.source, self.copy = source, copy

    def synchronize(self) -> None:
        self.copy.copy_(self.source)


@pytest.fixture(autouse=True)
def quiet():
    quiet_lightning()


@pytest.fixture
def late(monkeypatch):
    """Called, has verdicts come late on the CPU too, as late as the host waits for them."""

    def copy_late(flag: torch.Tensor) -> tuple[torch.Tensor, LateEvent]:
        copy = torch.full_like(flag, 0.5)
        return copy, LateEvent(flag, copy)

    def begin() -> None:
        monkeypatch.setattr(non_finite, "ASYNCHRONOUS", ("cpu",))
        monkeypatch.setattr(non_finite, "copy_to_host", copy_late)

    return begin


class Watch(Callback):
    """Makes batches NaN, and keeps what is known of each step at its end.

    Args:
        poisoned: batches, counted over all epochs.
    """

    def __init__(self, poisoned: set[int]) -> None:
        self.poisoned = poisoned
        self.skipped: list[float] = []  # as logged
        self.is_pending: list[bool] = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        if trainer.current_epoch * STEPS + batch_idx in self.poisoned:
            batch[0][0] = float("nan")

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        self.skipped.append(trainer.callback_metrics["train/skipped_steps"].item())
        self.is_pending.append(callback_of(trainer)._pending is not None)


def callback_of(trainer: lightning.Trainer) -> SkipNonFiniteSteps:
    return next(callback for callback in trainer.callbacks if isinstance(callback, SkipNonFiniteSteps))


class Fit:
    """Two epochs of a small model on a few digits, some of whose batches are NaN."""

    def __init__(
        self,
        folder: Path,
        poisoned: set[int],
        *callbacks: Callback,
        optimizer: dict[str, Any] = ADAMW,
        max_consecutive: int = 10,
        model: tuple[str, dict[str, Any]] = ("test_vit", {"img_size": 32}),
        **settings: Any,
    ) -> None:
        folder.mkdir(exist_ok=True)
        self.csv = folder / "skipped.csv"
        lightning.seed_everything(0, verbose=False)
        schedule = {"sched": "constant"}
        self.module = ClassificationModule(
            model[0], 10, in_chans=1, model_kwargs=model[1], optimizer=optimizer, schedule=schedule
        )
        self.data = ImageDataModule("digits", img_size=32, in_chans=1, batch_size=8, augmentation={"no_aug": True})
        self.watch = Watch(poisoned)
        self.trainer = lightning.Trainer(
            callbacks=[SkipNonFiniteSteps(str(self.csv), max_consecutive), *callbacks, self.watch],
            logger=False,
            enable_checkpointing=any(isinstance(callback, ModelCheckpoint) for callback in callbacks),
            enable_progress_bar=False,
            enable_model_summary=False,
            limit_train_batches=STEPS,
            limit_val_batches=0,
            gradient_clip_val=1.0,
            plugins=[VerifiedCheckpointIO()],
            **({"accelerator": "cpu", "max_epochs": 2} | settings),
        )

    def run(self, **settings: Any) -> "Fit":
        self.trainer.fit(self.module, self.data, **settings)
        return self

    def skipped_steps(self) -> list[int]:
        """Those that the file names."""
        if not self.csv.exists():
            return []
        with open(self.csv, newline="") as file:
            return sorted({int(row["step"]) for row in csv.DictReader(file)})


def assert_same(one: Fit, other: Fit) -> None:
    """Compares weights, state of the optimiser, and all that is told about steps that were left out, to the bit."""
    weights, states = (
        [f.module.state_dict() for f in (one, other)],
        [f.trainer.optimizers[0].state for f in (one, other)],
    )
    for name, value in weights[0].items():
        assert torch.equal(value, weights[1][name]) and value.isfinite().all(), name
    assert len(states[0]) == len(states[1]) > 0
    for left, right in zip(*(state.values() for state in states), strict=True):
        assert left.keys() == right.keys()
        assert all(torch.equal(value, right[name]) for name, value in left.items())
    assert one.skipped_steps() == other.skipped_steps()
    assert not one.csv.exists() or one.csv.read_text() == other.csv.read_text()
    assert one.watch.skipped == other.watch.skipped
    assert callback_of(one.trainer).state_dict() == callback_of(other.trainer).state_dict()


@pytest.mark.parametrize("poisoned, optimizer", [*((batches, ADAMW) for batches in POISONED), (POISONED[1], SGD)])
def test_late_verdicts_change_nothing(tmp_path, late, poisoned, optimizer):
    waits = Fit(tmp_path / "waits", poisoned, optimizer=optimizer).run()
    late()
    ahead = Fit(tmp_path / "ahead", poisoned, optimizer=optimizer).run()
    assert_same(waits, ahead)
    assert waits.skipped_steps() == sorted(poisoned)
    assert waits.watch.skipped == [len([batch for batch in poisoned if batch <= step]) for step in range(2 * STEPS)]
    assert not any(waits.watch.is_pending)
    first = min(set(range(2 * STEPS)) - poisoned)  # which makes the optimiser's state
    assert ahead.watch.is_pending == [step > first for step in range(2 * STEPS)]
    assert not hasattr(ahead.trainer.optimizers[0], "found_inf")


def test_late_verdicts_on_accumulated_batches(tmp_path, late):
    waits = Fit(tmp_path / "waits", {2, 9}, accumulate_grad_batches=2).run()
    late()
    ahead = Fit(tmp_path / "ahead", {2, 9}, accumulate_grad_batches=2).run()
    assert_same(waits, ahead)
    assert ahead.skipped_steps() == [1, 5]  # the last one of an epoch has a batch of its own
    assert any(ahead.watch.is_pending)


class Saves(LastCheckpoint):
    """Keeps the steps after which it saves, and the steps left out that each checkpoint counts."""

    def __init__(self, folder: Path) -> None:
        super().__init__(str(folder), every_n_train_steps=1)
        self.saved: list[tuple[int, int]] = []

    def _save(self, trainer) -> None:
        is_due = self._to_save is not None
        super()._save(trainer)
        if is_due:
            checkpoint = read_checkpoint(self.path)
            counted = next(state["total"] for state in checkpoint["callbacks"].values() if "total" in state)
            self.saved.append((checkpoint["global_step"], counted))


@pytest.mark.parametrize("is_late", [False, True])
def test_no_checkpoint_is_saved_after_a_step_left_out(tmp_path, late, is_late):
    if is_late:
        late()
    saves = Saves(tmp_path)
    best = ModelCheckpoint(tmp_path, filename="best", enable_version_counter=False)
    fit = Fit(tmp_path, {2, 4, 9}, saves, best).run()
    assert saves.saved == [(1, 0), (2, 0), (4, 1), (6, 2), (7, 2), (8, 2), (9, 2)]  # steps that are done
    checkpoint = read_checkpoint(tmp_path / "best.ckpt")  # whose weights are those of before, and thus good
    assert checkpoint["global_step"] == 10 and callback_of(fit.trainer).state_key in checkpoint["callbacks"]
    assert checkpoint["callbacks"][callback_of(fit.trainer).state_key] == {"total": 3}
    assert {state["step"].item() for state in checkpoint["optimizer_states"][0]["state"].values()} == {7.0}


@pytest.mark.parametrize("is_late", [False, True])
def test_every_checkpoint_counts_the_step_before_it(tmp_path, late, is_late):
    if is_late:
        late()
    every = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=3, save_top_k=-1)
    fit = Fit(tmp_path, {2, 3}, every).run()
    key = callback_of(fit.trainer).state_key
    counted = [read_checkpoint(tmp_path / f"step={step}.ckpt")["callbacks"][key]["total"] for step in (3, 6, 9)]
    assert counted == [1, 2, 2]


def test_a_run_goes_on_from_before_late_verdicts(tmp_path, late):
    late()
    whole = Fit(tmp_path / "whole", {3, 7}).run()
    Fit(tmp_path / "parts", {3, 7}, Saves(tmp_path / "parts"), max_steps=8).run()
    rest = Fit(tmp_path / "parts", {3, 7})
    rest.data.start = (1, 2)
    rest.run(ckpt_path=tmp_path / "parts" / "last.ckpt", weights_only=True)
    assert rest.watch.skipped == whole.watch.skipped[7:]
    rest.watch.skipped = whole.watch.skipped
    assert rest.skipped_steps() == [3, 7]
    rest.csv.unlink(), whole.csv.unlink()
    assert_same(whole, rest)


@pytest.mark.parametrize("is_late", [False, True])
def test_the_limit_ends_a_run_at_the_latest_a_step_later(tmp_path, late, is_late):
    if is_late:
        late()
    saves = Saves(tmp_path)
    fit = Fit(tmp_path, {6, 7, 8}, saves, max_consecutive=1)
    with pytest.raises(NonFiniteStepsError, match="not finite in 2 steps in a row and 2 in all.* of step 5;"):
        fit.run()
    assert fit.skipped_steps() == [6, 7] and saves.saved[-1] == (6, 0)
    fit = Fit(tmp_path / "unsaved", {6, 7, 8}, max_consecutive=1)
    with pytest.raises(NonFiniteStepsError, match="not finite in 2 steps in a row and 2 in all"):
        fit.run()
    assert fit.skipped_steps() == [6, 7] and fit.trainer.global_step == (8 if is_late else 7)


@pytest.mark.parametrize("poisoned, batches", [({3, 4}, 5), ({8, 9}, 10)])
def test_the_limit_ends_a_run_within_the_epoch(tmp_path, late, poisoned, batches):
    late()
    fit = Fit(tmp_path, poisoned, max_consecutive=1)
    with pytest.raises(NonFiniteStepsError):
        fit.run()
    assert len(fit.watch.skipped) == batches and fit.skipped_steps() == sorted(poisoned)


class Stop(Callback):
    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        if batch_idx == 3:
            raise OSError("no such file")


@pytest.mark.parametrize("max_consecutive", [0, 10])
def test_an_error_does_not_lose_a_verdict(tmp_path, late, max_consecutive):
    late()
    fit = Fit(tmp_path, {3}, Stop(), max_consecutive=max_consecutive)
    with pytest.raises(OSError, match="no such file"):
        fit.run()
    assert fit.skipped_steps() == [3]


def test_who_leaves_out_steps_on_the_device(monkeypatch):
    monkeypatch.setattr(non_finite, "ASYNCHRONOUS", ("cpu",))

    def stepped(opt: str, **settings: Any) -> torch.optim.Optimizer:
        model = torch.nn.Linear(2, 2)
        optimizer = create_optimizer_v2(model, opt, lr=0.1, **settings)
        model(torch.ones(1, 2)).sum().backward()
        optimizer.step()
        return optimizer

    def skips(optimizer: torch.optim.Optimizer, device: str = "cpu") -> bool:
        return non_finite._skips_on_device(optimizer, torch.device(device))

    fused = stepped("adamw", fused=True)
    assert skips(fused) and skips(stepped("adam", fused=True)) and skips(stepped("sgd", fused=True))
    assert not skips(fused, "meta")
    assert not skips(create_optimizer_v2(torch.nn.Linear(2, 2), "adamw", fused=True))
    for opt in ("adamw", "sgd", "lamb", "muon"):
        assert not skips(stepped(opt)), opt
    assert not skips(stepped("lookahead_adamw", fused=True))
    fused.load_state_dict(stepped("adamw").state_dict())  # of an older run
    assert not skips(fused)


NAT = ("nat_mini", {"embed_dim": 32, "depths": [2, 2], "num_heads": [1, 2], "kernel_size": 3})


@pytest.mark.gpu
@pytest.mark.parametrize("poisoned", POISONED)
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_late_verdicts_of_a_gpu_change_nothing(tmp_path, monkeypatch, poisoned, precision):
    settings = {"accelerator": "gpu", "devices": 1, "precision": precision, "deterministic": True, "model": NAT}
    optimizer = {"opt": "adamw", "lr": 1e-3, "weight_decay": 0.05}  # which is fused, as nothing else is said
    ahead = Fit(tmp_path / "ahead", poisoned, optimizer=optimizer, **settings).run()
    monkeypatch.setattr(non_finite, "ASYNCHRONOUS", ())
    waits = Fit(tmp_path / "waits", poisoned, optimizer=optimizer, **settings).run()
    assert_same(waits, ahead)
    assert any(ahead.watch.is_pending) and not any(waits.watch.is_pending)


class NoWaiting(Callback):
    """Makes the host's waiting for the GPU an error, from the fourth batch of an epoch to the end of the ninth."""

    batches = 0

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        if batch_idx == 3:
            torch.cuda.set_sync_debug_mode("error")

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        self.batches += 1
        if batch_idx == 8:
            torch.cuda.set_sync_debug_mode("default")

    def on_exception(self, trainer, pl_module, exception) -> None:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_a_training_step_never_waits_for_the_gpu(tmp_path):
    module = ClassificationModule(
        NAT[0],
        10,
        model_kwargs=NAT[1] | {"drop_path_rate": 0.2},
        optimizer={"opt": "adamw", "lr": 1e-3, "weight_decay": 0.05},
        schedule={"sched": "constant"},
        mixup={"mixup_alpha": 0.8, "cutmix_alpha": 1.0},
    )
    augmentation = {"re_prob": 0.5, "re_mode": "pixel"}
    data = ImageDataModule("fake", img_size=64, batch_size=16, num_workers=0, augmentation=augmentation)
    skip, last, no_waiting = (
        SkipNonFiniteSteps(str(tmp_path / "skipped.csv")),
        LastCheckpoint(str(tmp_path)),
        NoWaiting(),
    )
    trainer = lightning.Trainer(
        accelerator="gpu",
        devices=1,
        precision="bf16-mixed",
        gradient_clip_val=1.0,
        max_epochs=1,
        limit_train_batches=10,
        limit_val_batches=0,
        log_every_n_steps=1000,
        callbacks=[StepTimes(), skip, last, no_waiting],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, data)
    assert no_waiting.batches == 10 and trainer.global_step == 10
