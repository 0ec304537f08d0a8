"""The neighborhood and its inverse, one axis at a time: the rule that every backend follows.

A coordinate `x` on an axis with dilation `d` is member `x // d` of dilation group `x % d`. Within a group, a query attends to one interval of
members (its window), and a key is attended by one interval of members (its inverse window); both follow from the definitions of
neighborhood attention (Hassani et al., arXiv 2204.07143), dilation (arXiv 2209.15001) and stride and causality (arXiv 2504.16922).
On several axes a query attends to a key iff it does on every axis. All intervals here are half open.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Axis(NamedTuple):
    """One axis of a neighborhood attention problem.

    Legal iff `1 <= kernel_size`, `kernel_size * dilation <= length`, `1 <= stride <= kernel_size` and `1 <= dilation`.
    """

    length: int
    kernel_size: int
    stride: int = 1
    dilation: int = 1
    is_causal: bool = False


def group_members(axis: Axis, group: Tensor) -> Tensor:
    """Number of coordinates in dilation group `group` (integer tensor, any shape)."""
    return (axis.length - group + axis.dilation - 1) // axis.dilation


def window(axis: Axis, query: Tensor, members: Tensor) -> tuple[Tensor, Tensor]:
    """Keys that a query attends to: `[start, end)` as in-group indices.

    Args:
        axis: the axis.
        query: in-group indices of queries, integer tensor of any shape.
        members: size of each query's dilation group, broadcastable to `query`.
    """
    k, s = axis.kernel_size, axis.stride
    if axis.is_causal:
        leader = torch.minimum(query // s * s + s - 1, members - 1)
        return (leader - k + 1).clamp(min=0), query + 1
    leader = torch.minimum(query // s * s + s // 2, members - 1)
    start = torch.minimum((leader - k // 2).clamp(min=0), members - k)
    return start, start + k


def inverse_window(axis: Axis, key: Tensor, members: Tensor) -> tuple[Tensor, Tensor]:
    """Queries that attend to a key: `[first, end)` as in-group indices; the inverse of `window`, with the same arguments."""
    k, s = axis.kernel_size, axis.stride
    if axis.is_causal:
        last = torch.where(key + k >= members, members - 1, (key + k - s) // s * s + s - 1)
        return key.clone(), torch.minimum(last + 1, members)
    # A window starts at or before `key` iff its leader does not pass `key + k // 2`, and reaches it iff its leader is at least
    # `key - k + 1 + k // 2`; next to the borders, where windows are shifted inwards, every leader will do.
    first = torch.where(key < k, 0, -((key - k + 1 + k // 2 - s // 2) // -s) * s)
    last = torch.where(key >= members - k, members - 1, (key + k // 2 - s // 2) // s * s + s - 1)
    return first, torch.minimum(last + 1, members)


def attends(axis: Axis) -> Tensor:
    """Whether each query attends to each key: boolean `[length, length]`."""
    coordinate = torch.arange(axis.length)
    group, member = coordinate % axis.dilation, coordinate // axis.dilation
    start, end = window(axis, member, group_members(axis, group))
    in_window = (member >= start[:, None]) & (member < end[:, None])
    return in_window & (group == group[:, None])


def bias_index(axis: Axis) -> Tensor:
    """Position of each query-key pair along this axis of the relative positional bias: int64 `[length, length]`.

    Only meaningful where `attends` holds; elsewhere clamped into `[0, 2 * kernel_size - 2]`.
    """
    member = torch.arange(axis.length) // axis.dilation
    offset = member - member[:, None] + axis.kernel_size - 1
    return offset.clamp(0, 2 * axis.kernel_size - 2)
