"""The neighborhood and its inverse, one axis at a time: the rule that every backend follows.

A coordinate `x` on an axis with dilation `d` is member `x // d` of dilation group `x % d`. Within a group, a query
attends to one interval of members (its window), and a key is attended by one interval of members (its inverse window);
both follow from the definitions of neighborhood attention (arXiv 2204.07143), dilation (arXiv 2209.15001), and stride
and causality (arXiv 2504.16922). On several axes a query attends to a key iff it does on every axis. All intervals are
half open.
"""

from typing import NamedTuple


class Axis(NamedTuple):
    """One axis of a neighborhood attention problem.

    Legal iff `1 <= kernel_size`, `kernel_size * dilation <= length`, `1 <= stride <= kernel_size` and `1 <= dilation`.
    """

    length: int
    kernel_size: int
    stride: int = 1
    dilation: int = 1
    is_causal: bool = False


def group_members(axis: Axis, group: int) -> int:
    """Number of coordinates in dilation group `group`."""
    return (axis.length - group + axis.dilation - 1) // axis.dilation


def window(axis: Axis, query: int, members: int) -> tuple[int, int]:
    """Keys `[start, end)` that in-group index `query` attends to, in a group of `members`."""
    k, s = axis.kernel_size, axis.stride
    if axis.is_causal:
        leader = min(query // s * s + s - 1, members - 1)
        return max(leader - k + 1, 0), query + 1
    leader = min(query // s * s + s // 2, members - 1)
    start = min(max(leader - k // 2, 0), members - k)
    return start, start + k


def inverse_window(axis: Axis, key: int, members: int) -> tuple[int, int]:
    """Queries `[first, end)` that attend to in-group index `key`, in a group of `members`: the inverse of `window`."""
    k, s = axis.kernel_size, axis.stride
    if axis.is_causal:
        return key, members if key + k >= members else min((key + k - s) // s * s + s, members)
    # A window starts at or before `key` iff its leader does not pass `key + k // 2`, and reaches it iff its leader is
    # at least `key - k + 1 + k // 2`; next to the borders, where windows are shifted inwards, every leader will do.
    first = 0 if key < k else -((key - k + 1 + k // 2 - s // 2) // -s) * s
    end = members if key >= members - k else min((key + k // 2 - s // 2) // s * s + s, members)
    return first, end
