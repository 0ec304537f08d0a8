"""Which columns of queries add up the gradient of the bias together: a pure function of the problem."""

from functools import lru_cache
from itertools import groupby
from math import ceil, prod
from typing import NamedTuple

from fused_na.triton.tiles import Extent, as_three_axes
from fused_na.window import Axis, window


class Classes(NamedTuple):
    """Columns of queries by how far away the first column of keys is that they meet.

    Sums of `query_columns.py` mean the same relative positions wherever that is the same. Along h and along w it is so
    where no border shifts windows: there columns are alike and make a class. Each other one is a class of its own.
    Along the first axis all are alike. Classes of a map are the products of those along its axes.
    """

    counts: Extent  # most columns of keys of a column of queries, along each axis
    before: Extent  # columns of queries before those that are alike, along each axis
    alike: Extent  # at least 1
    after: Extent

    @property
    def number(self) -> int:
        """How many classes there are."""
        return prod(before + 1 + after for before, after in zip(self.before, self.after, strict=True))

    @property
    def places(self) -> Extent:
        """Columns of queries along each axis."""
        t, h, w = map(sum, zip(self.before, self.alike, self.after, strict=True))
        return t, h, w


@lru_cache(maxsize=1024)
def classes_of(axes: tuple[Axis, ...], query: Extent, key: Extent) -> Classes:
    """The classes of a problem without dilation.

    Args:
        axes: two or three axes.
        query, key: columns of queries and of keys, as extents along `(t, h, w)`.
    """
    first, *others = as_three_axes(axes)
    along = [_along(*axis) for axis in zip(others, query[1:], key[1:], strict=True)]
    counts, before, alike, after = ((h, w) for h, w in zip(*along, strict=True))
    return Classes((1, *counts), (0, *before), (ceil(first.length / query[0]), *alike), (0, *after))


def _along(axis: Axis, query: int, key: int) -> tuple[int, int, int, int]:
    """Most columns of keys of a column of queries, and columns of queries before, in and after the longest row of those
    whose first keys lie as far from their first queries."""
    n, most, bases = axis.length, 0, []
    for begin in range(0, n, query):
        start, stop = window(axis, begin, n)[0], window(axis, min(begin + query, n) - 1, n)[1]
        most = max(most, ceil((stop - start) / key))
        bases.append(start - begin)
    rows = [len(list(row)) for _, row in groupby(bases)]
    alike = max(rows)
    before = sum(rows[: rows.index(alike)])
    return most, before, alike, len(bases) - before - alike


def odd(extent: Extent) -> Extent:
    """Sizes as kernels take them: odd and not 1, lest Triton compile anew for those that are 1 or divisible by 16."""
    t, h, w = (2 * size + 3 for size in extent)
    return t, h, w
