"""A picture of what the model is trained on, augmentation included."""

from pathlib import Path
from typing import Any

import lightning
from lightning.pytorch.callbacks import Callback

from nat_models.engine.plots import plot_batch


class ContactSheet(Callback):
    """Writes the first training batch, before mixup, to a PNG file.

    Args:
        path: the file.
    """

    def __init__(self, path: str) -> None:
        self.path = Path(path)
        self._written = False

    def on_train_batch_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self._written or not trainer.is_global_zero:
            return
        images, labels = batch
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        plot_batch(images, labels.tolist(), data.classes, data.mean, data.std, self.path)
        self._written = True
