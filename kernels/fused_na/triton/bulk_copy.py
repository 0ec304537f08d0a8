"""Tensors as Hopper's bulk copy engine takes them: by descriptors, tile by tile."""

from math import prod

import torch
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor as GluonTensorDescriptor
from triton.tools.tensor_descriptor import TensorDescriptor

from fused_na.triton.problem import Layout
from fused_na.triton.tiles import Extent
from fused_na.window import Axis


def can_copy(layout: Layout, axes: tuple[Axis, ...]) -> bool:
    """Whether tiles of a tensor can be copied: heads side by side, 16-byte steps, and no axis along which it repeats
    itself, as expanded tensors do. With dilation also groups of one size, and tokens at an even distance."""
    *strides, heads = layout.spatial_strides
    is_copyable = (
        layout.shape[-1] in (16, 32, 64, 128, 256)
        and heads == layout.shape[-1]
        and layout.is_aligned
        and all(stride * layout.dtype.itemsize % 16 == 0 and stride >= 0 for stride in strides)
        and strides[0] > 0
        and strides[3] > 0
        and all(stride > 0 for size, stride in zip(layout.shape, layout.strides, strict=True) if size > 1)
    )
    if all(axis.dilation == 1 for axis in axes):
        return is_copyable
    sizes = layout.shape[:-2]
    distances = [prod(sizes[i + 1 :]) * layout.strides[-3] for i in range(len(sizes))]
    is_even = all(n == 1 or x == y for n, x, y in zip(sizes, layout.strides, distances, strict=False))
    return is_copyable and is_even and not any(axis.length % axis.dilation for axis in axes)


def described(layout: Layout, axes: tuple[Axis, Axis, Axis], tile: Extent) -> tuple[list[int], ...]:
    """Shape, strides and block of tiles of one head, of a tensor seen as `[B, t, h, w, heads * head_dim]`.

    With dilation t, h and w are those of a group, and in place of samples the tokens of all of them count, from any of
    which on a group can lie (`neighborhood.copy_origin`): a view that overlaps itself.
    """
    batch, heads, width = layout.shape[0], *layout.shape[-2:]
    stride, *others, stride_w, _ = layout.spatial_strides
    if any(axis.dilation > 1 for axis in axes):
        batch, stride = batch * prod(axis.length for axis in axes), stride_w
    members = [axis.length // axis.dilation for axis in axes]
    # Axes of length 1 need a legal stride all the same.
    steps = [(x or stride_w) * axis.dilation for x, axis in zip((*others, stride_w), axes, strict=True)]
    return [batch, *members, heads * width], [stride, *steps, 1], [1, *tile, width]


def describe(layout: Layout, axes: tuple[Axis, Axis, Axis], tile: Extent, x: Tensor) -> TensorDescriptor:
    """A tensor's descriptor for kernels in Triton."""
    return TensorDescriptor(x, *described(layout, axes, tile))


def describe_for_gluon(layout: Layout, axes: tuple[Axis, Axis, Axis], tile: Extent, x: Tensor) -> GluonTensorDescriptor:
    """A tensor's descriptor for kernels in Gluon, of 16-bit elements."""
    shape, strides, block = described(layout, axes, tile)
    element = gl.bfloat16 if layout.dtype == torch.bfloat16 else gl.float16
    return GluonTensorDescriptor(x, shape, strides, block, gl.NVMMASharedLayout.get_default_for(block, element))
