"""Means of training and evaluation that never wait for the GPU."""

import torch
from torch import Tensor
from torchmetrics import Metric


class Mean(Metric):
    """The weighted mean of scalars.

    One that is NaN makes the mean so. torchmetrics' `MeanMetric` would leave it out: the host looks at each one, and so
    waits for the GPU in every step.
    """

    full_state_update = False
    mean_value: Tensor
    weight: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("mean_value", torch.tensor(0.0), dist_reduce_fx="sum")
        self.add_state("weight", torch.tensor(0.0), dist_reduce_fx="sum")

    def update(self, value: Tensor, weight: Tensor | float = 1.0) -> None:
        """Adds a scalar."""
        self.mean_value += value * weight
        self.weight += weight

    def compute(self) -> Tensor:
        """The mean of all so far, NaN of none."""
        return self.mean_value / self.weight
