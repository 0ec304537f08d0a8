"""Steps whose loss or gradient is not finite are left out, counted, and too many of them end the run."""

import csv
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import Callback

from nat_models.data import DataModule
from nat_models.engine.checkpoint import read_checkpoint
from nat_models.engine.checkpoint_io import PREVIOUS
from nat_models.engine.errors import NonFiniteStepsError
from nat_models.engine.host_copy import copy_to_host
from nat_models.engine.last_checkpoint import LastCheckpoint
from nat_models.engine.position import Position

FIELDS = ("step", "epoch", "batch", "rank", "sample")
ASYNCHRONOUS = ("cuda",)
"""Types of devices that work behind the host's back."""


@dataclass(frozen=True)
class _Step:
    """An optimiser step.

    Attributes:
        trainer: whose it is.
        number: counted as `global_step`.
        epoch: that it is in.
        batch: of that epoch, the last of those accumulated.
    """

    trainer: lightning.Trainer
    number: int
    epoch: int
    batch: int


@dataclass(frozen=True)
class _Verdict:
    """Whether a step is left out, which the GPU knows before the host does.

    Attributes:
        step: that it is about.
        found_inf: 1.0 if it is left out, else 0.0; on the GPU.
        on_host: a copy in the host's memory, there once `copied` has passed.
        copied: event of the copy.
    """

    step: _Step
    found_inf: torch.Tensor
    on_host: torch.Tensor
    copied: Any


class SkipNonFiniteSteps(Callback):
    """Leaves out optimiser steps whose gradient is not finite, which it is not where the loss is not.

    The weights and the state of the optimiser stay as they are. The number of steps left out so far is logged as
    `train/skipped_steps`, the samples of their batches are appended to a file. As the weights may have diverged while
    they were still finite, no `LastCheckpoint` is written until a step is finite again.

    With fp16, `GradScaler` leaves such steps out as a matter of course, to find the scale that fits. They count only
    when the scale has come down to 1, where it cannot be the reason any more.

    On a GPU, fused optimisers leave out steps themselves, and the host, which has launched most of the next step by
    then, reads the verdict there: before the optimiser's next step, or earlier if a checkpoint is saved, the epoch ends
    or validation begins. With other optimisers the host waits for it in every step.

    Args:
        path: csv file of the samples: optimiser step, epoch, batch, rank, and the sample's path or number.
        max_consecutive: more such steps in a row end the run.
        max_total: so do more in all.

    Raises:
        NonFiniteStepsError: in training, past a limit.
    """

    def __init__(self, path: str, max_consecutive: int = 10, max_total: int = 100) -> None:
        self.path = Path(path)
        self.max_consecutive = max_consecutive
        self.max_total = max_total
        self.consecutive = self.total = 0
        self._first = 0  # of the consecutive ones, counted as `global_step`
        self._pending: _Verdict | None = None

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self._pending = None  # of a run that ended with an error
        for callback in _last_checkpoints(trainer):
            callback.is_held = self.is_last_step_skipped

    def on_before_optimizer_step(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        self._read_verdict()
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        if scaler is not None and scaler.get_scale() > 1:
            return
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        norm: Any = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        if hasattr(norm, "full_tensor"):  # of sharded parameters
            norm = norm.full_tensor()
        step = _Step(trainer, trainer.global_step, trainer.current_epoch, trainer.fit_loop.epoch_loop.batch_idx)
        if scaler is None and _skips_on_device(optimizer, norm.device):
            found_inf = norm.isfinite().logical_not().float()
            optimizer.found_inf = found_inf  # type: ignore[attr-defined]
            self._pending = _Verdict(step, found_inf, *copy_to_host(found_inf))
            return
        is_finite = bool(norm.isfinite())
        if not is_finite:
            optimizer.zero_grad()  # optimisers leave parameters without a gradient alone
        self._count(step, is_finite)

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        for optimizer in trainer.optimizers:
            vars(optimizer).pop("found_inf", None)
        # Not a number, for whose copy to the GPU Lightning would wait.
        skipped = torch.full((), float(self.total), device=pl_module.device)
        if self._pending is not None:
            skipped += self._pending.found_inf
        pl_module.log("train/skipped_steps", skipped)

    def on_validation_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self._read_verdict()

    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self._read_verdict()

    def on_exception(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, exception: BaseException
    ) -> None:
        if trainer.world_size == 1:  # others might not come to gather their samples
            with suppress(Exception):  # past a limit, of the GPU or a full disk; the first error is the one to show
                self._read_verdict()

    def is_last_step_skipped(self) -> bool:
        """Whether the last optimiser step was left out; waits for the GPU if need be."""
        self._read_verdict()
        return self.consecutive > 0

    def state_dict(self) -> dict[str, Any]:
        self._read_verdict()
        return {"total": self.total}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.total = state_dict["total"]

    def _read_verdict(self) -> None:
        """Takes in the verdict on the last step where it is still pending."""
        verdict, self._pending = self._pending, None
        if verdict is not None:
            verdict.copied.synchronize()
            self._count(verdict.step, is_finite=not verdict.on_host)

    def _count(self, step: _Step, is_finite: bool) -> None:
        if is_finite:
            self.consecutive = 0
            return
        if self.consecutive == 0:
            self._first = step.number
        self.consecutive += 1
        self.total += 1
        self._record(step)
        if self.consecutive > self.max_consecutive or self.total > self.max_total:
            raise NonFiniteStepsError(self._message(step.trainer))

    def _record(self, step: _Step) -> None:
        """Appends the samples of all ranks' batches of a step to the file."""
        trainer = step.trainer
        datamodule: DataModule = trainer.datamodule  # type: ignore[attr-defined]
        rows = []
        for batch_idx in range(step.batch - step.batch % trainer.accumulate_grad_batches, step.batch + 1):
            samples = datamodule.training_samples(step.epoch, batch_idx) or ["unknown: a streamed dataset"]
            where = (step.number, step.epoch, batch_idx, trainer.global_rank)
            rows += [(*where, sample) for sample in samples]
        if trainer.world_size > 1:
            of_ranks: list[Any] = [None] * trainer.world_size
            torch.distributed.all_gather_object(of_ranks, rows)
            rows = [row for of_rank in of_ranks for row in of_rank]
        if trainer.is_global_zero:
            is_new = not self.path.exists()
            with open(self.path, "a", newline="", encoding="utf-8") as file:
                csv.writer(file).writerows([FIELDS, *rows] if is_new else rows)

    def _message(self, trainer: lightning.Trainer) -> str:
        return (
            f"the loss or the gradient was not finite in {self.consecutive} steps in a row and {self.total} in all; "
            f"callbacks.non_finite allows max_consecutive={self.max_consecutive} and max_total={self.max_total}; "
            f"{self._last_good(trainer)}; {self.path} lists the samples of these steps' batches"
        )

    def _last_good(self, trainer: lightning.Trainer) -> str:
        """Names the last checkpoint from which a step was finite: the very weights may have diverged of one without."""
        for last in _last_checkpoints(trainer):
            for path in (last.path, last.path.with_name(PREVIOUS)):
                with suppress(OSError, ValueError):  # missing or damaged
                    step = Position.of(read_checkpoint(path)).step
                    if step < self._first:
                        return f"the last good checkpoint is {path}, of step {step}"
        return "no checkpoint is known to be good, as no step from one was finite"


def _skips_on_device(optimizer: torch.optim.Optimizer, device: torch.device) -> bool:
    """Whether the device itself leaves out a step, for which `GradScaler`'s way to say so is `optimizer.found_inf`."""
    # The settings of groups are those of the checkpoint that a run goes on from.
    is_fused = all(group.get("fused") for group in optimizer.param_groups)
    takes_flag = is_fused and getattr(optimizer, "_step_supports_amp_scaling", False)
    # The first step makes the state; of fused SGD, even if it is left out, with a momentum that is uninitialised.
    return device.type in ASYNCHRONOUS and takes_flag and len(optimizer.state) > 0


def _last_checkpoints(trainer: lightning.Trainer) -> list[LastCheckpoint]:
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return [callback for callback in callbacks if isinstance(callback, LastCheckpoint)]
