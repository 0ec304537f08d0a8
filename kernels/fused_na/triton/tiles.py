"""The choice of tiles: a pure function of the problem, which needs no GPU."""

from collections.abc import Iterator
from functools import lru_cache
from math import ceil, prod
from typing import NamedTuple

from fused_na.window import Axis, group_members, inverse_window, window

Extent = tuple[int, int, int]  # sizes along t, h and w


class Tiles(NamedTuple):
    """Launch parameters of one kernel; extents are powers of two."""

    query: Extent
    key: Extent
    num_warps: int
    num_stages: int
    rows: int = 0  # key rows along t that the kernel for small windows takes at once; 0 is the general kernel


def as_three_axes(axes: tuple[Axis, ...]) -> tuple[Axis, Axis, Axis]:
    """The problem as the kernels see it: `(t, h, w)`, where a map is `(t, w)` and a sequence `(w,)`."""
    one = Axis(1, 1)
    if len(axes) == 1:
        return one, one, axes[0]
    if len(axes) == 2:
        return axes[0], one, axes[1]
    return axes[0], axes[1], axes[2]


@lru_cache(maxsize=4096)
def steps_on_axis(axis: Axis, stationary: int, moving: int, over_keys: bool) -> int:
    """Pairs of tiles on one axis that a kernel works through, over all dilation groups.

    With `over_keys` tiles of `stationary` queries meet the `moving` keys of their windows, else tiles of keys the queries
    of their inverse windows. The pairs of a whole problem are the product over its axes.
    """
    interval = window if over_keys else inverse_window
    steps = 0
    for group in range(axis.dilation):
        members = group_members(axis, group)
        for begin in range(0, members, stationary):
            last = min(begin + stationary, members) - 1
            steps += ceil((interval(axis, last, members)[1] - interval(axis, begin, members)[0]) / moving)
    return steps


def extents(rows: int, axes: tuple[Axis, Axis, Axis]) -> Iterator[Extent]:
    """Tiles of `rows` tokens that do not reach beyond the map where they need not."""
    limits = [1 << (group_members(axis, 0) - 1).bit_length() for axis in axes]
    rows = rows if rows <= prod(limits) else rows  # a small map is padded along w
    for t in (1 << i for i in range(rows.bit_length())):
        for h in (1 << i for i in range((rows // t).bit_length())):
            w = rows // t // h
            if t <= limits[0] and h <= limits[1] and (w <= limits[2] or t * h == limits[0] * limits[1]):
                yield t, h, w


def executed_scores(axes: tuple[Axis, Axis, Axis], stationary: Extent, moving: Extent, over_keys: bool) -> int:
    """Scores that a kernel computes for each head and batch, whether or not they lie in the neighborhood."""
    steps = prod(steps_on_axis(axis, s, m, over_keys) for axis, s, m in zip(axes, stationary, moving, strict=True))
    return steps * prod(stationary) * prod(moving)


def best_extents(
    axes: tuple[Axis, Axis, Axis], stationary_rows: int, moving_rows: int, over_keys: bool
) -> tuple[Extent, Extent]:
    """The tiles of given sizes that execute the fewest scores; of equals, those with the longest runs along w."""
    return min(
        ((s, m) for s in extents(stationary_rows, axes) for m in extents(moving_rows, axes)),
        key=lambda pair: (executed_scores(axes, *pair, over_keys), -pair[1][2], -pair[0][2]),
    )


@lru_cache(maxsize=1024)
def choose_tiles(kernel: str, axes: tuple[Axis, ...], head_dim: int, head_dim_v: int, itemsize: int) -> Tiles:
    """Tiles for one kernel of a problem.

    Args:
        kernel: "forward", "query", "key_value" or "bias".
        axes: the problem's spatial axes.
        head_dim: of query and key.
        head_dim_v: of value.
        itemsize: bytes of an element, 2 or 4.
    """
    three = as_three_axes(axes)
    width = max(head_dim, head_dim_v)
    is_small = prod(axis.kernel_size for axis in axes) <= 512 and width <= 64 and itemsize == 2
    if is_small:
        stationary, moving, num_warps = 32, 32, 1
    elif itemsize == 4:
        stationary, moving, num_warps = 32, 32, 4
    elif kernel == "forward":
        stationary, moving, num_warps = (128, 64, 8) if width > 64 else (128, 64, 4)
    else:
        stationary, moving, num_warps = (64, 64, 4) if width <= 128 else (64, 32, 4)
    if itemsize == 4 and width > 128:
        stationary, moving = 16, 16
    over_keys = kernel != "key_value"
    s, m = best_extents(three, stationary, moving, over_keys)
    return Tiles(s if over_keys else m, m if over_keys else s, num_warps, 2)
