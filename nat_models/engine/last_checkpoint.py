"""Checkpoints from which a run goes on exactly, in the middle of an epoch too, and before it is preempted."""

import signal
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from types import FrameType
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger

from nat_models.data import DataModule
from nat_models.data.workers import PREEMPTION_SIGNALS
from nat_models.engine.checkpoint_io import LAST, PREVIOUS
from nat_models.engine.errors import Preempted
from nat_models.engine.host_copy import copy_to_host
from nat_models.engine.position import Batch, Position


class LastCheckpoint(Callback):
    """Saves `last.ckpt` after every epoch, within epochs every so many steps or minutes, and on SIGTERM and SIGUSR1.

    Lightning restarts exactly from the state that its loops have at the end of a step or of an epoch, but logs the
    step's or the epoch's metrics only afterwards. So this state is taken down there, and the checkpoint written as soon
    as the metrics are on disk: when the next step or epoch begins.

    After a signal, the checkpoint is saved at the end of the step, or of the validation pass, and the run ends with
    `Preempted`. Lightning's own handlers of these signals, SLURM's among them, are out of use while training. Several
    processes hear of each other's signals and clocks a step late, so that none of them waits for its GPU.

    While steps are left out because they are not finite, which `SkipNonFiniteSteps` tells when it is asked, nothing is
    saved: the weights may be the reason. The checkpoint of before stays, from which a run that is stopped then goes on.

    Stands before callbacks that change the weights when training ends, `EMAWeightAveraging` among them.

    Args:
        dirpath: folder of the checkpoint.
        every_n_train_steps: optimiser steps from one checkpoint to the next within an epoch; None: only by time.
        every_n_minutes: minutes at most from one checkpoint to the next within an epoch; None: only by steps.

    Raises:
        ValueError: one of them is not positive.
    """

    def __init__(
        self, dirpath: str, every_n_train_steps: int | None = None, every_n_minutes: float | None = 15.0
    ) -> None:
        for name, value in (("every_n_train_steps", every_n_train_steps), ("every_n_minutes", every_n_minutes)):
            if value is not None and not value > 0:
                raise ValueError(f"callbacks.last.{name} must be positive or null, got {value!r}")
        self.path = Path(dirpath) / LAST
        self.every_n_train_steps = every_n_train_steps
        self.every_n_minutes = every_n_minutes
        self.is_held: Callable[[], bool] = bool  # False, unless `SkipNonFiniteSteps` puts itself here
        self._signal: signal.Signals | None = None
        self._handlers: dict[signal.Signals, Any] = {}
        self._saved_at = 0.0
        self._begins_epoch = False  # whether the checkpoint that the run goes on from was saved at the end of an epoch
        self._to_save: dict[str, Any] | None = None  # what replaces entries of Lightning's checkpoint
        self._asked: tuple[torch.Tensor, torch.cuda.Event | None] | None = None  # how many processes want one saved

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        if self._begins_epoch:
            trainer.fit_loop.epoch_loop.restarting = False
        self._saved_at = time.monotonic()
        ask_no_process_for_sigterm(trainer)
        self._handlers = {number: signal.signal(number, self._on_signal) for number in PREEMPTION_SIGNALS}

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        is_step = (batch_idx + 1) % trainer.accumulate_grad_batches == 0 and not trainer.is_last_batch
        if is_step and self._is_due(trainer):
            self._take_down(trainer)

    def on_train_batch_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._save(trainer)

    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self._take_down(trainer)

    def on_train_epoch_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self._save(trainer)

    def on_train_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self._save(trainer)
        self._stop_if_asked(trainer)
        self._restore_handlers()

    def on_exception(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, exception: BaseException
    ) -> None:
        self._restore_handlers()

    def on_save_checkpoint(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        datamodule: DataModule = trainer.datamodule  # type: ignore[attr-defined]
        checkpoint["batch"] = asdict(Batch.of(trainer, datamodule))
        checkpoint["logger_ids"] = {type(logger).__name__: logger.version for logger in trainer.loggers}
        if self._to_save is not None:
            checkpoint["epoch"] = self._to_save["epoch"]
            checkpoint["loops"]["fit_loop"] = self._to_save["fit_loop"]

    def on_load_checkpoint(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        # With max_steps, Lightning takes an epoch at whose end a checkpoint was saved for one to be resumed within.
        for epochs in checkpoint["loops"]["fit_loop"]["epoch_progress"].values():
            epochs["completed"] = epochs["processed"]
        self._begins_epoch = Position.of(checkpoint).batch == 0
        folder = self.path.resolve().parent
        path = Path(str(trainer.ckpt_path))
        if path.resolve().parent == folder:
            if path.name == PREVIOUS and trainer.is_global_zero:
                self.path.unlink(missing_ok=True)  # being damaged, it must not become the previous one
            for callback in trainer.checkpoint_callbacks:
                if isinstance(callback, ModelCheckpoint) and callback.state_key in checkpoint["callbacks"]:
                    state = checkpoint["callbacks"][callback.state_key]
                    _relocate(state, folder)  # else the best score is forgotten where the run folder has been moved
                    callback.current_score = state["current_score"]  # Lightning saves it, but does not restore it

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._signal = signal.Signals(number)

    def _restore_handlers(self) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers = {}

    def _is_due(self, trainer: lightning.Trainer) -> bool:
        """Whether a checkpoint is to be saved now, the same on all ranks."""
        by_step = self.every_n_train_steps is not None and trainer.global_step % self.every_n_train_steps == 0
        by_time = self.every_n_minutes and time.monotonic() - self._saved_at >= 60 * self.every_n_minutes
        is_wanted = bool(self._signal or by_time)
        if trainer.world_size == 1:
            return by_step or is_wanted
        is_due = by_step or self._was_wanted()
        if not is_due:
            wanted = torch.full((), float(is_wanted), device=trainer.strategy.root_device)
            torch.distributed.all_reduce(wanted)
            self._asked = copy_to_host(wanted)
        return is_due

    def _was_wanted(self) -> bool:
        """Whether any rank wanted one when all were asked."""
        if self._asked is None:
            return False
        (wanted, copied), self._asked = self._asked, None
        if copied is not None:
            copied.synchronize()
        return bool(wanted)

    def _agreed(self, trainer: lightning.Trainer, decision: bool) -> bool:
        """Whether any rank has decided so."""
        return trainer.strategy.reduce_boolean_decision(decision, all=False)

    def _take_down(self, trainer: lightning.Trainer) -> None:
        if self.is_held():
            self._stop_if_asked(trainer)
        else:
            self._to_save = {"epoch": trainer.current_epoch, "fit_loop": trainer.fit_loop.state_dict()}

    def _save(self, trainer: lightning.Trainer) -> None:
        if self._to_save is None:
            return
        for logger in trainer.loggers:
            logger.save()
            if isinstance(logger, TensorBoardLogger) and trainer.is_global_zero:
                logger.experiment.flush()
        trainer.save_checkpoint(self.path)
        self._to_save = self._asked = None
        self._saved_at = time.monotonic()
        self._stop_if_asked(trainer)

    def _stop_if_asked(self, trainer: lightning.Trainer) -> None:
        """Raises `Preempted` after a signal to any rank; what is worth saving has been saved."""
        if not self._agreed(trainer, self._signal is not None):
            return
        if trainer.is_global_zero:
            reason = f"stopped by {self._signal.name}" if self._signal else "stopped by a signal to another process"
            saved = "which is left out, so that nothing is saved" if self.is_held() else f"which {self.path} holds"
            print(
                f"{reason} after step {trainer.global_step}, {saved}; to go on, repeat the command "
                f"with ckpt_path=auto run_dir={self.path.parent.parent}",
                flush=True,
            )
        raise Preempted


def ask_no_process_for_sigterm(trainer: lightning.Trainer) -> None:
    """Keeps Lightning from asking the first of several processes in every batch, which would wait for the GPU."""
    trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]


def _relocate(state: dict[str, Any], folder: Path) -> None:
    """Makes the paths in the state of a `ModelCheckpoint` those of files of the same names in `folder`."""

    def here(path: str) -> str:
        return str(folder / Path(path).name) if path else path

    for key in ("best_model_path", "kth_best_model_path", "last_model_path"):
        state[key] = here(state[key])
    state["best_k_models"] = {here(path): score for path, score in state["best_k_models"].items()}
    state["dirpath"] = str(folder)
