"""How far the training of a checkpoint is, and in batches of which kind."""

from dataclasses import dataclass
from typing import Any

import lightning

from nat_models.data import DataModule


@dataclass(frozen=True)
class Position:
    """Where training goes on.

    Attributes:
        epoch: epochs that are finished, which is the index of the one to go on with.
        batch: batches of that epoch that are done.
        step: optimiser steps that are done, over all epochs.
    """

    epoch: int
    batch: int
    step: int

    @classmethod
    def of(cls, checkpoint: dict[str, Any]) -> "Position":
        """The position of a Lightning checkpoint."""
        loops = checkpoint["loops"]["fit_loop"]
        epochs = loops["epoch_progress"]["current"]
        batches = loops["epoch_loop.batch_progress"]["current"]
        is_within_epoch = epochs["ready"] > epochs["processed"]
        return cls(epochs["processed"], batches["ready"] if is_within_epoch else 0, checkpoint["global_step"])


@dataclass(frozen=True)
class Batch:
    """What makes up the batch of an optimiser step.

    Attributes:
        size: samples per device.
        devices: that train together.
        accumulated: batches of each device.
    """

    size: int
    devices: int
    accumulated: int

    @classmethod
    def of(cls, trainer: lightning.Trainer, datamodule: DataModule) -> "Batch":
        """That of a run."""
        return cls(datamodule.batch_size, trainer.world_size, trainer.accumulate_grad_batches)
