"""Evaluating a checkpoint: what `train.py` does at its end and `eval.py` later, by the same function."""

import csv
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning
from hydra.utils import instantiate

from nat_models.data import DataModule, UndecodableImageError
from nat_models.engine.callbacks import PredictionRecorder
from nat_models.engine.checkpoint import read_checkpoint
from nat_models.engine.classification import ClassificationModule
from nat_models.engine.files import replace_file
from nat_models.engine.plots import plot_confusion, plot_mistakes, plot_per_class
from nat_models.engine.position import Position
from nat_models.engine.progress import TrainingProgress

EVALUATION_TRAINER_KEYS = ("accelerator", "devices", "num_nodes", "strategy", "precision", "deterministic")
LIMITS = ("limit_val_batches", "overfit_batches")  # those of training hold here too; 0 is none


@dataclass
class Evaluation:
    """Result of `evaluate`.

    Attributes:
        epoch: epochs that the evaluated weights were trained for.
        metrics: `val/loss`, `val/top1`, `val/top5` (above 5 classes), `val/mean_class_accuracy`; accuracies in 0..1.
        class_names: in label order.
        predictions: counts, confusion matrix and mistakes.
        excluded: videos that the user left out.
    """

    epoch: int
    metrics: dict[str, float]
    class_names: list[str]
    predictions: PredictionRecorder
    excluded: int = 0


def evaluate(checkpoint: str | Path, datamodule: DataModule, trainer_config: dict[str, Any]) -> Evaluation:
    """Validates the weights of a checkpoint (the averaged ones where training averaged them).

    Args:
        checkpoint: file written by `train.py`.
        datamodule: gives the validation batches.
        trainer_config: arguments of `lightning.Trainer`; those that concern training are left out, limits of
            validation are not.

    Raises:
        FileNotFoundError, ValueError: the checkpoint cannot be read, or is damaged.
        UndecodableImageError: a validation image cannot be decoded, or a streamed dataset left some out.
    """
    epoch = Position.of(read_checkpoint(checkpoint)).epoch  # first: it checks the file
    module, class_names = load_classifier(checkpoint)
    predictions = PredictionRecorder()
    trainer = lightning.Trainer(
        **instantiate({key: trainer_config[key] for key in EVALUATION_TRAINER_KEYS if key in trainer_config}),
        **{key: trainer_config[key] for key in LIMITS if trainer_config.get(key)},
        callbacks=[predictions, TrainingProgress()],
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
    )
    metrics = trainer.validate(module, datamodule, verbose=False)[0]
    evaluated, expected = int(predictions.label_counts[:, 0].sum()), len(datamodule.val_dataset)
    is_limited = isinstance(trainer.limit_val_batches, int) or trainer.limit_val_batches < 1
    if evaluated != expected and not is_limited:
        raise UndecodableImageError(f"only {evaluated} of the {expected} validation images could be evaluated")
    if indices := [index for index, *_ in predictions.predictions]:
        assert is_limited or indices == list(range(expected)), "each video is evaluated once"
    return Evaluation(epoch, dict(metrics), class_names, predictions, len(getattr(datamodule, "excluded", [])))


def load_classifier(checkpoint: str | Path) -> tuple[ClassificationModule, list[str]]:
    """The module of a checkpoint of `train.py`, on the CPU, and its class names in label order."""
    module = ClassificationModule.load_from_checkpoint(checkpoint, map_location="cpu", weights_only=True)
    return module, module.hparams["class_names"] or [str(label) for label in range(module.hparams["num_classes"])]


def save_evaluation(evaluation: Evaluation, folder: Path, datamodule: DataModule, record: dict[str, Any]) -> None:
    """Writes `per_class.csv`, `predictions.csv` (of videos), pictures, and, when all are there, `results.json`.

    Args:
        evaluation: of `evaluate`.
        folder: created if missing.
        datamodule: tells the normalisation of the images.
        record: further entries for `results.json`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    counts = evaluation.predictions.label_counts
    record = record | ({"excluded": evaluation.excluded} if evaluation.excluded else {})
    with open(folder / "per_class.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["label", "class", "images", "correct", "accuracy"])
        for label, (images, correct) in enumerate(counts.tolist()):
            accuracy = f"{correct / images:.6f}" if images else ""
            writer.writerow([label, evaluation.class_names[label], images, correct, accuracy])
    if evaluation.predictions.predictions:
        with open(folder / "predictions.csv", "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["path", "label", "predicted", "probability"])
            for index, label, predicted, probability in evaluation.predictions.predictions:
                path = datamodule.val_dataset.videos[index].path
                writer.writerow([path, label, predicted, f"{probability:.6f}"])
    if evaluation.predictions.confusion is not None:
        plot_confusion(evaluation.predictions.confusion, evaluation.class_names, folder / "confusion_matrix.png")
    plot_per_class(counts, evaluation.class_names, folder / "per_class.png")
    plot_mistakes(
        evaluation.predictions.mistakes,
        int((counts[:, 0] - counts[:, 1]).sum()),
        evaluation.class_names,
        datamodule.mean,
        datamodule.std,
        folder / "misclassified.png",
    )
    summary = record | {"epoch": evaluation.epoch, "images": int(counts[:, 0].sum()), "metrics": evaluation.metrics}
    replace_file(folder / "results.json", (json.dumps(summary, indent=2) + "\n").encode())
