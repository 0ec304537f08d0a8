"""Where the time of training goes: waiting for data, or computing."""

import time
from collections import deque
from dataclasses import dataclass
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import Callback

GIB = 1 << 30


@dataclass
class EpochTimes:
    """Sums over the steps measured so far in an epoch.

    Attributes:
        steps: their number; a step is one batch of one process.
        images: their images, on all processes.
        step_seconds: computing them, from when their batch is ready to the end of the optimiser's work.
        wait_seconds: from the end of one step until the next one's batch is loaded, on the device and normalised.
    """

    steps: int = 0
    images: int = 0
    step_seconds: float = 0.0
    wait_seconds: float = 0.0

    @property
    def seconds(self) -> float:
        return self.step_seconds + self.wait_seconds

    @property
    def wait_share(self) -> float:
        return self.wait_seconds / self.seconds if self.seconds else 0.0

    @property
    def images_per_second(self) -> float:
        return self.images / self.seconds if self.seconds else 0.0

    def metrics(self) -> dict[str, float]:
        """What is logged."""
        steps = max(self.steps, 1)
        return {
            "speed/images_per_second": self.images_per_second,
            "speed/step_ms": 1000 * self.step_seconds / steps,
            "speed/data_wait_ms": 1000 * self.wait_seconds / steps,
            "speed/data_wait": self.wait_share,
        }


class StepTimes(Callback):
    """Measures steps and the wait between them, and logs both after each epoch, as the first process sees them.

    On a GPU, which works behind the host's back, the times are those of the GPU's own timeline: a loader that is slower
    than the host but faster than the GPU makes nobody wait. Events are read once they have passed; the host waits for
    the GPU at an epoch's end only. Whatever the trainer does between two steps counts as waiting, validation excepted.

    Attributes:
        epoch: of the present epoch, or the last one.
    """

    def __init__(self) -> None:
        self.epoch = EpochTimes()
        self._on_gpu = False
        self._pending: deque[tuple[Any, Any, int]] = deque()  # from, to, images of a step or 0 of a wait
        self._last: Any = None

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self.on_train_epoch_start(trainer, pl_module)  # Lightning does not, where a run goes on within an epoch

    def on_train_epoch_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self._on_gpu = pl_module.device.type == "cuda"
        if self._on_gpu:
            torch.cuda.reset_peak_memory_stats()
        self.epoch = EpochTimes()
        self._pending.clear()
        self._last = self._now()

    def on_train_batch_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._passed(0)

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._passed(len(batch[0]) * trainer.world_size)
        self.read()

    def on_validation_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self._last = self._now()

    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        if self._on_gpu:
            self._last.synchronize()
        self.read()
        metrics = self.epoch.metrics()
        if (peak := self.gpu_peak()) is not None:
            metrics["speed/gpu_peak_gib"] = peak / GIB
        pl_module.log_dict(metrics, rank_zero_only=True)

    def read(self) -> EpochTimes:
        """Takes in all that has passed; does not wait for the GPU."""
        while self._pending:
            start, end, images = self._pending[0]
            if self._on_gpu and not end.query():
                break
            self._pending.popleft()
            seconds = start.elapsed_time(end) / 1000 if self._on_gpu else end - start
            if images:
                self.epoch.steps += 1
                self.epoch.images += images
                self.epoch.step_seconds += seconds
            else:
                self.epoch.wait_seconds += seconds
        return self.epoch

    def gpu_peak(self) -> int | None:
        """Bytes that tensors took on the GPU at most in this epoch; None on the CPU."""
        return torch.cuda.max_memory_allocated() if self._on_gpu else None

    def _passed(self, images: int) -> None:
        now = self._now()
        self._pending.append((self._last, now, images))
        self._last = now

    def _now(self) -> Any:
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event
