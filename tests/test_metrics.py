"""Metrics of training: right, and worked out without the host reading what lies on the device."""

from typing import Any

import lightning
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torchmetrics import MeanMetric

from nat_models.data import ImageDataModule
from nat_models.engine.classification import ClassificationModule
from nat_models.engine.metrics import Mean

READS = {"_local_scalar_dense", "_unique2", "unique_dim", "nonzero", "masked_select", "bincount", "equal"}
"""Operators of ATen whose result, or its shape, the host has to know."""


class HostReadsNothing(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func.overloadpacket.__name__ not in READS, f"{func} waits for the device"
        return func(*args, **(kwargs or {}))


class Watched(ClassificationModule):
    steps = 0

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.steps += 1
        with HostReadsNothing():
            return super().training_step(batch, batch_idx)


def test_mean_is_that_of_torchmetrics() -> None:
    generator = torch.Generator().manual_seed(0)
    ours, reference = Mean(), MeanMetric()
    assert ours.metric_state.keys() == reference.metric_state.keys()  # of checkpoints
    for epoch in range(2):
        for weight in (1.0, 3, torch.tensor(2.0), torch.tensor(0.0)):
            value = torch.randn([], generator=generator)
            expected = reference(value, weight)
            assert torch.equal(ours(value, weight), expected) or (weight == 0 and expected.isnan())
        assert torch.equal(ours.compute(), reference.compute()), epoch
        ours.reset(), reference.reset()


def test_a_training_step_never_waits_for_the_device() -> None:
    """Without mixup, whose `one_hot` looks at the labels on the CPU alone."""
    data = ImageDataModule("fake", img_size=32, batch_size=8, num_classes=10, augmentation={"no_aug": True})
    small = {"embed_dim": 16, "depths": [1, 1], "num_heads": [1, 1], "kernel_size": 3, "drop_path_rate": 0.1}
    module = Watched("nat_mini", 10, model_kwargs=small)
    settings: dict[str, Any] = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar"), False)
    trainer = lightning.Trainer(
        max_epochs=1,
        limit_train_batches=3,
        limit_val_batches=1,
        accelerator="cpu",
        enable_model_summary=False,
        **settings,
    )
    trainer.fit(module, data)
    assert module.steps == 3


def test_the_watch_sees_what_the_host_reads() -> None:
    labels = torch.tensor([1, 1, 2])
    for read in (lambda: bool(labels[0]), lambda: labels.unique(), lambda: MeanMetric()(torch.tensor(1.0))):
        with pytest.raises(AssertionError, match="waits for the device"), HostReadsNothing():
            read()
