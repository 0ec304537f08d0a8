"""Finding and checking checkpoints before they are used."""

from pathlib import Path
from typing import Any
from zipfile import is_zipfile

import lightning
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, WeightAveraging

from nat_models.checksums import check_checksum
from nat_models.data import DataModule
from nat_models.engine.checkpoint_io import PREVIOUS
from nat_models.engine.classification import ClassificationModule
from nat_models.engine.errors import message_of
from nat_models.engine.last_checkpoint import LastCheckpoint
from nat_models.engine.position import Batch, Position

ARCHITECTURE = ("model_name", "model_kwargs", "num_classes", "in_chans")


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """A checkpoint of `ClassificationModule`, its tensors mapped from the file; nothing in it is executed.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file cannot be read, is damaged, or something else wrote it.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no checkpoint {str(path)!r}")
    if not is_zipfile(path):
        raise ValueError(f"{str(path)!r} is not a checkpoint of train.py, or it is damaged")
    check_checksum(path)
    try:
        checkpoint = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except Exception as error:  # torch.load has no error type of its own
        raise ValueError(f"{str(path)!r} cannot be read as a checkpoint: {message_of(error)}") from error
    keys = {"pytorch-lightning_version", "state_dict", "hyper_parameters"}
    if not isinstance(checkpoint, dict) or not keys <= checkpoint.keys():
        raise ValueError(f"{str(path)!r} was not written by train.py: it lacks {', '.join(sorted(keys))}")
    if "model_name" not in checkpoint["hyper_parameters"]:
        raise ValueError(f"{str(path)!r} is a Lightning checkpoint, but not one of ClassificationModule")
    return checkpoint


def check_resumable(
    path: str | Path, module: ClassificationModule, trainer: lightning.Trainer, datamodule: DataModule
) -> None:
    """Raises ValueError unless training can go on from this checkpoint with these settings.

    The architecture, the optimiser but for its learning rate, and whether weights are averaged must be the same; within
    an epoch also what decides which samples its batches have, but for the number of devices.
    """
    checkpoint = read_checkpoint(path)
    saved, given = checkpoint["hyper_parameters"], f"ckpt_path={str(path)!r}"
    for key in ARCHITECTURE:
        if saved.get(key) != module.hparams[key]:
            raise ValueError(
                f"{given} holds a model with {key}={saved.get(key)!r}, but this run's is "
                f"{module.hparams[key]!r}; give the experiment and the settings of the run that wrote it"
            )
    if "optimizer_states" not in checkpoint:
        raise ValueError(f"{given} holds no optimiser state, so training cannot go on from it")
    before, now = saved["optimizer"] or {}, module.hparams["optimizer"] or {}
    for key in sorted((before.keys() | now.keys()) - {"lr"}):
        if before.get(key) != now.get(key):
            raise ValueError(
                f"{given} holds the state of an optimiser with optim.optimizer.{key}={before.get(key)!r}, but this "
                f"run's is {now.get(key)!r}; of optim.optimizer, only the learning rate (optim.base_lr) may change"
            )
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    averaged = "current_model_state" in checkpoint
    if averaged != any(isinstance(callback, WeightAveraging) for callback in callbacks):
        had, has, choice = ("averaged", "not averaged", "ema") if averaged else ("not averaged", "averaged", "default")
        raise ValueError(
            f"{given} is of a run whose weights are {had}, but this run's are {has} (callbacks.ema); averaging can "
            f"neither begin nor end within a run: give callbacks={choice}"
        )
    if Position.of(checkpoint).batch and "batch" in checkpoint:
        _check_batch(given, Batch(**checkpoint["batch"]), Batch.of(trainer, datamodule))


def _check_batch(given: str, before: Batch, now: Batch) -> None:
    """Raises ValueError unless an epoch can go on with batches of this kind."""
    if before.size != now.size and before.size * before.devices != now.size * now.devices:
        change = f"data.batch_size={before.size} on {before.devices} device(s), but this run's is {now.size} on "
        change += f"{now.devices}; it or the product must stay the same"
    elif before.accumulated != now.accumulated:
        change = f"trainer.accumulate_grad_batches={before.accumulated}, but this run's is {now.accumulated}; it must "
        change += "stay the same"
    else:
        return
    raise ValueError(f"{given} was saved within an epoch with {change}, or begin from a checkpoint of an epoch's end")


def check_unfinished(path: str | Path, trainer: lightning.Trainer) -> None:
    """Raises ValueError if a checkpoint was trained for as many epochs as the trainer would."""
    epochs_done = Position.of(read_checkpoint(path)).epoch
    if trainer.max_epochs is not None and trainer.max_epochs >= 0 and epochs_done >= trainer.max_epochs:
        raise ValueError(
            f"ckpt_path={str(path)!r} was trained for {epochs_done} epochs already; "
            f"trainer.max_epochs={trainer.max_epochs} must be larger"
        )


def best_checkpoint(trainer: lightning.Trainer) -> tuple[Path, str | None]:
    """The best checkpoint that `fit` wrote, or the last where none was measured.

    Where it is damaged or missing, the last whole one takes its place, and a sentence says so.

    Raises:
        ValueError: none is whole.
    """
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    best = [callback.best_model_path for callback in callbacks if isinstance(callback, ModelCheckpoint)]
    last = [callback.path.resolve() for callback in callbacks if isinstance(callback, LastCheckpoint)]
    failures: list[str] = []
    for path in [*(Path(path) for path in best if path), *last, *(path.with_name(PREVIOUS) for path in last)]:
        try:
            epoch = Position.of(read_checkpoint(path)).epoch
        except (ValueError, OSError) as error:
            failures.append(message_of(error))
            continue
        why = f"{'; '.join(failures)}; the score is that of {path} (epoch {epoch}), not of the best epoch"
        return path, why if failures else None
    raise ValueError(f"no checkpoint is left to evaluate: {'; '.join(failures) or 'none was written'}")


def find_run(path: str | Path) -> tuple[Path, Path]:
    """`(run folder, checkpoint)` for the path of either, as `find_checkpoint` for one of its arguments."""
    return find_checkpoint(str(path), None) if Path(path).is_dir() else find_checkpoint(None, str(path))


def find_checkpoint(run: str | None, ckpt_path: str | None) -> tuple[Path, Path]:
    """`(run folder, checkpoint)` for what the user gave: a run folder (its best checkpoint), a checkpoint, or both.

    Raises:
        ValueError: neither is given, or one of them is not of `train.py`.
        FileNotFoundError: one of them does not exist.
    """
    if run is None and ckpt_path is None:
        raise ValueError("give run=FOLDER (a run folder of train.py) or ckpt_path=FILE")
    run_dir = Path(run) if run is not None else Path(str(ckpt_path)).resolve().parent.parent
    if run is not None and not run_dir.is_dir():
        raise FileNotFoundError(f"run={run!r} is not a folder")
    checkpoint = Path(ckpt_path) if ckpt_path is not None else run_dir / "checkpoints" / "best.ckpt"
    read_checkpoint(checkpoint)
    if not (run_dir / "config.yaml").is_file():
        raise ValueError(f"{str(run_dir)!r} is not a run folder of train.py: it holds no config.yaml; give run=FOLDER")
    return run_dir, checkpoint
