"""Callbacks of training and evaluation that Lightning does not bring."""

from dataclasses import dataclass
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from torchmetrics.classification import MulticlassConfusionMatrix, MulticlassStatScores

from nat_models.data import DataModule

MAX_MISTAKES = 25
MAX_CONFUSION_CLASSES = 1000


class UndecodableCount(Callback):
    """Logs the number of training images that could not be decoded so far, as `data/undecodable`, after each epoch."""

    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        datamodule: DataModule = trainer.datamodule  # type: ignore[attr-defined]
        pl_module.log("data/undecodable", float(len(datamodule.undecodable_paths())), rank_zero_only=True)


@dataclass
class Mistake:
    """A misclassified input: normalised image or clip `[C, *spatial]`, two labels, the probability of the wrong one."""

    image: Tensor
    label: int
    predicted: int
    probability: float


class PredictionRecorder(Callback):
    """Keeps what the metrics of a validation pass do not show.

    Attributes:
        label_counts: `[num_classes, 2]` int64: images of each class, and how many of them were classified correctly.
        confusion: `[num_classes, num_classes]` int64, true class by predicted class; None above 1,000 classes.
        mistakes: the most confident mistakes, at most 25, most confident first; of clips four frames.
        predictions: index in the dataset, label, predicted class and its probability, of every video, by index.
    """

    def __init__(self) -> None:
        self.label_counts: Tensor
        self.confusion: Tensor | None = None
        self.mistakes: list[Mistake] = []
        self.predictions: list[tuple[int, int, int, float]] = []

    def on_validation_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        num_classes = pl_module.hparams["num_classes"]
        self._stat_scores = MulticlassStatScores(num_classes, average=None).to(pl_module.device)
        self._confusion = None
        if num_classes <= MAX_CONFUSION_CLASSES:
            self._confusion = MulticlassConfusionMatrix(num_classes).to(pl_module.device)

    def on_validation_batch_end(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        images, labels, *indices = batch
        if images.ndim == 6:  # views of videos, of which four frames of the first are shown
            frames = torch.linspace(0, images.shape[3] - 1, 4).round().long()
            images = images[:, 0, :, frames]
        self._stat_scores.update(outputs, labels)
        if self._confusion is not None:
            self._confusion.update(outputs, labels)
        probability, predicted = outputs.float().softmax(dim=1).max(dim=1)
        for i in (predicted != labels).nonzero().flatten().tolist():
            mistake = Mistake(images[i].float().cpu(), int(labels[i]), int(predicted[i]), float(probability[i]))
            self.mistakes.append(mistake)
        if indices:
            columns = (indices[0], labels, predicted, probability)
            self.predictions += zip(*(column.tolist() for column in columns), strict=True)
        self.mistakes = sorted(self.mistakes, key=lambda mistake: -mistake.probability)[:MAX_MISTAKES]

    def on_validation_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        correct, _, _, _, support = self._stat_scores.compute().unbind(dim=1)
        self.label_counts = support.new_empty(len(support), 2)
        self.label_counts[:, 0], self.label_counts[:, 1] = support, correct
        self.label_counts = self.label_counts.cpu()
        if self._confusion is not None:
            self.confusion = self._confusion.compute().cpu()
        self.predictions = sorted(_of_all_ranks(self.predictions))
        probabilities = sorted(_of_all_ranks([mistake.probability for mistake in self.mistakes]), reverse=True)
        shown = [mistake for mistake in self.mistakes if mistake.probability in probabilities[:MAX_MISTAKES]]
        self.mistakes = sorted(_of_all_ranks(shown), key=lambda mistake: -mistake.probability)[:MAX_MISTAKES]


def _of_all_ranks(items: list[Any]) -> list[Any]:
    """The items of all ranks, in the order of the ranks."""
    if not torch.distributed.is_initialized():
        return items
    of_ranks: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(of_ranks, items)
    return [item for of_rank in of_ranks for item in of_rank]
