"""What a launch depends on, which is all but the tensors' addresses."""

from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fused_na.triton import autotune
from fused_na.window import Axis

Tensors = dict[str, Tensor | None]  # by the names of the kernels' arguments


class Layout(NamedTuple):
    """A tensor without its address, of which only the alignment matters to a launch."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype
    is_aligned: bool  # to 16 bytes

    @property
    def spatial_strides(self) -> tuple[int, ...]:
        """Strides of batch, t, h, w and heads, with the axes placed as by `as_three_axes`."""
        batch, *spatial, heads, _ = self.strides
        t, h, w = {1: [0, 0, *spatial], 2: [spatial[0], 0, spatial[-1]], 3: spatial}[len(spatial)]
        return batch, t, h, w, heads


def layout_of(x: Tensor | None) -> Layout | None:
    """How a tensor lies in memory, None of none."""
    return None if x is None else Layout(x.shape, x.stride(), x.dtype, x.data_ptr() % 16 == 0)


def contiguous(shape: tuple[int, ...], dtype: torch.dtype, pack: int = 1) -> Layout:
    """How a new tensor `[..., heads, head_dim]` lies in memory, or one of `pack` that share it token by token."""
    *outer, heads, width = shape
    strides = (pack * heads * width * prod(outer[axis + 1 :]) for axis in range(len(outer)))
    return Layout(shape, (*strides, width, 1), dtype, is_aligned=True)


class Problem(NamedTuple):
    """What the launches of a forward or backward pass depend on.

    `pack` is 3 where the gradients of query, key and value lie side by side for each token, and 1 where each is a
    contiguous tensor.
    """

    device: torch.device
    axes: tuple[Axis, ...]
    scale: float
    allow_tf32: bool
    is_autotuned: bool
    pack: int
    query: Layout
    key: Layout
    value: Layout
    rpb: Layout | None
    additional_keys: Layout | None
    additional_values: Layout | None
    grad_output: Layout | None = None
    grad_lse: Layout | None = None
    output: Layout | None = None
    lse: Layout | None = None
    grad_rpb: Layout | None = None


def problem_of(axes: tuple[Axis, ...], scale: float, tensors: Tensors, pack: int = 1) -> Problem:
    """The problem of tensors that are named as its layouts are."""
    query = tensors["query"]
    assert query is not None
    # Follows `allow_tf32` too, which itself raises once a program has set `fp32_precision`.
    allow_tf32 = torch.backends.cuda.matmul.fp32_precision == "tf32"
    layouts: dict[str, Any] = {name: layout_of(x) for name, x in tensors.items()}
    return Problem(query.device, axes, scale, allow_tf32, autotune.is_enabled(), pack, **layouts)
