"""Progress of training: loss, accuracy, speed and time left."""

import time
from datetime import timedelta
from typing import Any

import lightning
from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.callbacks.progress.rich_progress import BatchesProcessedColumn, CustomBarColumn
from rich import get_console
from rich.progress import TextColumn

from nat_models.engine.classification import ClassificationModule
from nat_models.engine.last_checkpoint import LastCheckpoint
from nat_models.engine.step_times import GIB, StepTimes


class TrainingProgress(RichProgressBar):
    """Lightning's rich progress bar with what one wants to know; one line an epoch where output is not a terminal."""

    def __init__(self) -> None:
        self.is_terminal = get_console().is_terminal
        super().__init__(refresh_rate=10 if self.is_terminal else 0)
        self._fit_start = 0.0
        self._first_step = 0

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self._fit_start = time.monotonic()
        self._first_step = trainer.global_step
        super().on_train_start(trainer, pl_module)

    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        super().on_train_epoch_end(trainer, pl_module)
        if not self.is_terminal and trainer.is_global_zero:
            metrics = self.get_metrics(trainer, pl_module)
            texts = [f"{name} {_text(value)}" for name, value in metrics.items()]
            print("  ".join([f"epoch {trainer.current_epoch + 1}/{trainer.max_epochs}", *texts]), flush=True)

    def on_exception(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, exception: BaseException
    ) -> None:
        super().on_exception(trainer, pl_module, exception)
        if isinstance(exception, KeyboardInterrupt) and trainer.is_global_zero:
            callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
            paths = [callback.path for callback in callbacks if isinstance(callback, LastCheckpoint)]
            saved = [f"; go on with ckpt_path=auto run_dir={path.parent.parent}" for path in paths if path.exists()]
            print("".join(["interrupted", *saved]), flush=True)

    def get_metrics(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> dict[str, Any]:
        logged = trainer.callback_metrics
        names = {"loss": "train/loss", "top-1": "train/top1", "val": "val/top1"}
        metrics: dict[str, Any] = {short: logged[name].item() for short, name in names.items() if name in logged}
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, StepTimes):
                metrics |= _speed(callback)
        return metrics | {"ETA": self._time_left(trainer)}

    def _get_train_description(self, current_epoch: int) -> str:
        return f"Epoch {current_epoch + 1}/{self.trainer.max_epochs}"

    def configure_columns(self, trainer: lightning.Trainer) -> list:
        bar = CustomBarColumn(bar_width=10, complete_style="cyan", finished_style="cyan", pulse_style="cyan")
        return [TextColumn("{task.description}"), bar, BatchesProcessedColumn(style="")]

    def _time_left(self, trainer: lightning.Trainer) -> str:
        steps_done = trainer.global_step - self._first_step
        if steps_done == 0:
            return "-:--:--"
        module: ClassificationModule = trainer.lightning_module  # type: ignore[assignment]
        seconds = (time.monotonic() - self._fit_start) / steps_done * module.steps_left()
        return str(timedelta(seconds=round(seconds)))


def _speed(times: StepTimes) -> dict[str, str]:
    epoch = times.read()
    speed = {"images/s": f"{epoch.images_per_second:.0f}"}
    if epoch.steps:
        step, wait = (1000 * seconds / epoch.steps for seconds in (epoch.step_seconds, epoch.wait_seconds))
        speed |= {"step": f"{step:.0f} ms", "data wait": f"{wait:.0f} ms = {100 * epoch.wait_share:.0f} %"}
    peak = times.gpu_peak()
    return speed if peak is None else speed | {"GPU": f"{peak / GIB:.1f} GiB"}


def _text(value: Any) -> str:
    return f"{value:.3f}" if isinstance(value, float) else str(value)
