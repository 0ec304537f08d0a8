"""Training steps as `train.py` takes them, measured once they run steadily."""

import logging
import warnings
from collections.abc import Iterator
from typing import Any

import lightning
import torch
from torch import Tensor

from nat_models.engine.classification import ClassificationModule
from nat_models.engine.last_checkpoint import ask_no_process_for_sigterm
from nat_models.engine.step_times import StepTimes

MIXUP = {"mixup_alpha": 0.8, "cutmix_alpha": 1.0}  # of the ImageNet recipes
logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
warnings.filterwarnings("ignore", module="lightning")


class SteadySteps(StepTimes):
    """The times of an epoch's steps after the first `skipped` ones: compilation and start-up do not count."""

    def __init__(self, skipped: int) -> None:
        super().__init__()
        self.skipped = skipped

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == self.skipped:
            if self._on_gpu:
                torch.cuda.synchronize()
            self.on_train_epoch_start(trainer, pl_module)
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)


class Repeated:
    """A loader that is never waited for: the same batch `length` times."""

    def __init__(self, batch: tuple[Tensor, ...], length: int) -> None:
        self.batch = tuple(tensor.pin_memory() for tensor in batch) if torch.cuda.is_available() else batch
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        return iter([self.batch] * self.length)


def module_for(model: str, num_classes: int, compile: bool | str, **settings: Any) -> ClassificationModule:
    """A classifier with the ImageNet recipes' optimiser."""
    optimizer = {"opt": "adamw", "lr": 1e-4, "weight_decay": 0.05}
    schedule = {"sched": "constant"}
    torch.manual_seed(0)
    return ClassificationModule(
        model, num_classes, optimizer=optimizer, schedule=schedule, compile=compile, **({"mixup": MIXUP} | settings)
    )


def trainer_for(
    times: StepTimes, steps: int, callbacks: list[lightning.Callback], **settings: Any
) -> lightning.Trainer:
    """A trainer of one epoch of `steps` steps, without validation, logs and checkpoints."""
    trainer = lightning.Trainer(
        max_epochs=1,
        limit_train_batches=steps,
        limit_val_batches=0,
        gradient_clip_val=5.0,
        callbacks=[times, *callbacks],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **settings,
    )
    ask_no_process_for_sigterm(trainer)  # as `LastCheckpoint` has it
    return trainer
