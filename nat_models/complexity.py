"""Multiply-adds of a model, as papers count them ("GFLOPs")."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from nat_models.layers import NeighborhoodAttention


def multiply_adds(model: nn.Module, input_size: Sequence[int]) -> int:
    """Multiply-adds of one forward pass over one sample: convolutions, linear layers, and attention's two products.

    Args:
        model: on any device; on "meta" counting costs no arithmetic and no memory.
        input_size: `(in_chans, *spatial)` of the sample.
    """
    total = 0

    def count(module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        nonlocal total
        if isinstance(module, NeighborhoodAttention):
            batch, *spatial, dim = output.shape
            kernel_size, _ = module.neighborhood(spatial)
            padded = (max(n, k * d) for n, k, d in zip(spatial, kernel_size, module.dilation, strict=True))
            total += 2 * batch * math.prod(padded) * math.prod(kernel_size) * dim
        else:
            total += output.numel() * module.weight[0].numel()  # type: ignore[index]

    counted = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, NeighborhoodAttention)
    handles = [module.register_forward_hook(count) for module in model.modules() if isinstance(module, counted)]
    parameter = next(model.parameters())
    try:
        with torch.no_grad():
            model(torch.empty(1, *input_size, device=parameter.device, dtype=parameter.dtype))
    finally:
        for handle in handles:
            handle.remove()
    return total
