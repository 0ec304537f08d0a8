"""Where the time of training goes: on a clock of the test's own, on the GPU's timeline, and in a run's metrics."""

import time
from types import SimpleNamespace

import pytest
import torch

from nat_models.engine.step_times import StepTimes


class Recorder:
    """A module that keeps what is logged."""

    def __init__(self, device: str) -> None:
        self.device = torch.device(device)
        self.logged: dict[str, float] = {}

    def log_dict(self, metrics: dict[str, float], rank_zero_only: bool) -> None:
        self.logged |= metrics


def test_waits_and_steps_add_up_and_validation_is_left_out(monkeypatch):
    clock = [100.0]
    monkeypatch.setattr("nat_models.engine.step_times.time.perf_counter", lambda: clock[0])
    times, module, trainer = StepTimes(), Recorder("cpu"), SimpleNamespace(world_size=2)
    for epoch in range(2):
        times.on_train_epoch_start(trainer, module)
        for batch in range(4):
            clock[0] += 1.0 + epoch  # loading
            times.on_train_batch_start(trainer, module, None, batch)
            clock[0] += 3.0  # computing
            times.on_train_batch_end(trainer, module, None, (torch.zeros(5, 1),), batch)
            if batch == 1:
                clock[0] += 50.0  # validation
                times.on_validation_end(trainer, module)
        times.on_train_epoch_end(trainer, module)
        wait = 1.0 + epoch
        assert module.logged == {
            "speed/images_per_second": pytest.approx(2 * 5 / (3.0 + wait)),
            "speed/step_ms": pytest.approx(3000.0),
            "speed/data_wait_ms": pytest.approx(1000.0 * wait),
            "speed/data_wait": pytest.approx(wait / (3.0 + wait)),
        }


@pytest.mark.gpu
@pytest.mark.parametrize("loader_is_slow", [False, True])
def test_only_a_gpu_that_has_nothing_to_do_waits(loader_is_slow):
    times, module, trainer = StepTimes(), Recorder("cuda"), SimpleNamespace(world_size=1)
    clock = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    images, cycles = torch.zeros(8, 3, device="cuda"), 20_000_000
    for _ in range(50):  # until the GPU has raised its clock
        torch.cuda._sleep(cycles)
    clock[0].record()
    torch.cuda._sleep(cycles)
    clock[1].record()
    clock[1].synchronize()
    busy = clock[0].elapsed_time(clock[1])
    times.on_train_epoch_start(trainer, module)
    for batch in range(6):
        if loader_is_slow:  # the GPU falls idle
            torch.cuda.synchronize()
            time.sleep(busy / 1000)
        times.on_train_batch_start(trainer, module, images, batch)
        torch.cuda._sleep(cycles)
        times.on_train_batch_end(trainer, module, None, (images,), batch)
        if not loader_is_slow:
            assert times.epoch.steps < batch + 1, "the host must run ahead of the GPU"
    times.on_train_epoch_end(trainer, module)
    assert times.epoch.steps == 6 and times.epoch.images == 48
    assert module.logged["speed/step_ms"] == pytest.approx(busy, rel=0.3)
    assert (0.4 < module.logged["speed/data_wait"] < 0.7) if loader_is_slow else module.logged["speed/data_wait"] < 0.02
    assert module.logged["speed/gpu_peak_gib"] > 0
