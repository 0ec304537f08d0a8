"""Steps whose loss or gradient is not finite are left out, counted, and too many of them end the run."""

import csv
from contextlib import suppress
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import Callback

from nat_models.data import DataModule
from nat_models.engine.checkpoint import read_checkpoint
from nat_models.engine.checkpoint_io import PREVIOUS
from nat_models.engine.errors import NonFiniteStepsError
from nat_models.engine.last_checkpoint import LastCheckpoint
from nat_models.engine.position import Position

FIELDS = ("step", "epoch", "batch", "rank", "sample")


class SkipNonFiniteSteps(Callback):
    """Leaves out optimiser steps whose gradient is not finite, which it is not where the loss is not.

    The weights and the state of the optimiser stay as they are. The number of steps left out so far is logged as
    `train/skipped_steps`, the samples of their batches are appended to a file. As the weights may have diverged while
    they were still finite, no `LastCheckpoint` is written until a step is finite again.

    With fp16, `GradScaler` leaves such steps out as a matter of course, to find the scale that fits. They count only
    when the scale has come down to 1, where it cannot be the reason any more.

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

    def on_before_optimizer_step(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        if scaler is not None and scaler.get_scale() > 1:
            return
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        norm: Any = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        if hasattr(norm, "full_tensor"):  # of sharded parameters
            norm = norm.full_tensor()
        is_finite = bool(norm.isfinite())
        for callback in _last_checkpoints(trainer):
            callback.is_held = not is_finite
        if is_finite:
            self.consecutive = 0
            return
        if self.consecutive == 0:
            self._first = trainer.global_step
        optimizer.zero_grad()  # optimisers leave parameters without a gradient alone
        self.consecutive += 1
        self.total += 1
        self._record(trainer)
        if self.consecutive > self.max_consecutive or self.total > self.max_total:
            raise NonFiniteStepsError(self._message(trainer))

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        pl_module.log("train/skipped_steps", float(self.total))

    def state_dict(self) -> dict[str, Any]:
        return {"total": self.total}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.total = state_dict["total"]

    def _record(self, trainer: lightning.Trainer) -> None:
        """Appends the samples of all ranks' batches of this step to the file."""
        datamodule: DataModule = trainer.datamodule  # type: ignore[attr-defined]
        last = trainer.fit_loop.epoch_loop.batch_idx
        rows = []
        for batch_idx in range(last - last % trainer.accumulate_grad_batches, last + 1):
            samples = datamodule.training_samples(trainer.current_epoch, batch_idx) or ["unknown: a streamed dataset"]
            where = (trainer.global_step, trainer.current_epoch, batch_idx, trainer.global_rank)
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


def _last_checkpoints(trainer: lightning.Trainer) -> list[LastCheckpoint]:
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return [callback for callback in callbacks if isinstance(callback, LastCheckpoint)]
