"""Where `query_bias.py` and `query_bias_clips.py` add up the gradient of the bias: a pure function of the problem, for
which it takes no GPU."""

from functools import lru_cache
from itertools import groupby
from math import ceil, prod
from typing import NamedTuple

from fused_na.triton.tiles import Extent, as_three_axes
from fused_na.window import Axis, window

SLOT = 128  # numbers of a slot, four for each lane of a warp
# Programs by the number of axes, for the 132 multiprocessors of an H100: on maps each runs 8 at once, and more programs
# were slower; on clips it runs 4, which differ more in length and share the work best by the dozen.
PROGRAMS = {2: 132 * 8, 3: 132 * 12}
SAMPLES = 4  # of a program of `query_bias_clips.py` at once
CLIPS_PROGRAMS = 132 * 2  # of it, as many as run at once; with 4 to 24 for each multiprocessor their rows cost more


class Slots(NamedTuple):
    """The sums of a program, and which tiles of queries may share them.

    A slot holds the pairs of planes, the queries and the keys of one t. Its indices are the plane of keys less that of
    queries, counted from the last plane of queries on, and the place of the tile of keys along h and along w.

    In two tiles of queries slots mean the same relative positions if their first keys lie as far from their first
    queries. Along an axis that is so where no border shifts windows: there tiles are alike and make a class. Each other
    one is a class of its own. Classes of a map are the products of those along its axes.
    """

    counts: Extent  # most tiles of keys of a tile of queries, along each axis
    number: int  # of slots
    before: Extent  # tiles of queries before those that are alike, along each axis
    alike: Extent  # at least 1
    after: Extent

    @property
    def bytes(self) -> int:
        """Of the sums of a program, float32."""
        return self.number * SLOT * 4

    @property
    def classes(self) -> int:
        """Number of classes."""
        return prod(self.shares(self.alike))

    def shares(self, box: Extent) -> Extent:
        """Programs along each axis that share the tiles, with up to `box` of the tiles that are alike for each."""
        t, h, w = (
            before + ceil(alike / size) + after
            for before, alike, after, size in zip(self.before, self.alike, self.after, box, strict=True)
        )
        return t, h, w


@lru_cache(maxsize=1024)
def slots_of(axes: tuple[Axis, ...], query: Extent, key: Extent) -> Slots:
    """The slots of a problem without dilation.

    Args:
        axes: one to three axes.
        query, key: tiles of queries and of keys, as extents along `(t, h, w)`.
    """
    along = [_along(*axis) for axis in zip(as_three_axes(axes), query, key, strict=True)]
    counts, before, alike, after = ((t, h, w) for t, h, w in zip(*along, strict=True))
    return Slots(counts, (counts[0] * key[0] + query[0] - 1) * counts[1] * counts[2], before, alike, after)


@lru_cache(maxsize=1024)
def column_slots(axes: tuple[Axis, ...], query: Extent, key: Extent) -> Slots:
    """The same for columns, whose blocks lie alike along the first axis wherever they are."""
    first, *others = as_three_axes(axes)
    along = [_along(*axis) for axis in zip(others, query[1:], key[1:], strict=True)]
    counts, before, alike, after = ((h, w) for h, w in zip(*along, strict=True))
    return Slots((1, *counts), prod(counts), (0, *before), (ceil(first.length / query[0]), *alike), (0, *after))


def _along(axis: Axis, query: int, key: int) -> tuple[int, int, int, int]:
    """Most tiles of keys of a tile of queries, and tiles of queries before, in and after the longest row of tiles whose
    first keys lie as far from their first queries."""
    n, most, bases = axis.length, 0, []
    for begin in range(0, n, query):
        start, stop = window(axis, begin, n)[0], window(axis, min(begin + query, n) - 1, n)[1]
        most = max(most, ceil((stop - start) / key))
        bases.append(start - begin)
    rows = [len(list(row)) for _, row in groupby(bases)]
    alike = max(rows)
    before = sum(rows[: rows.index(alike)])
    return most, before, alike, len(bases) - before - alike


def shares(slots: Slots, heads: int, batch: int, programs: int, memory: int) -> tuple[Extent, int]:
    """The box of tiles that are alike, and the samples, of a program.

    A program works out a tile's windows once for all its samples, and writes its sums once for all its tiles. So where
    tiles are few, it has one and a chunk of the samples, and where they are many, several and all samples. Boxes grow
    along the axis of most programs, lest few programs have most of the tiles.

    Args:
        slots: of the problem.
        heads, batch: of the problem; heads times dilation groups, whose programs are their own.
        programs: at most how many there shall be, unless there are more classes.
        memory: bytes that their sums may take, enough for a program of each head and class.
    """
    wanted = min(programs, memory // slots.bytes)
    box = (1, 1, 1)
    while heads * prod(slots.shares(box)) > wanted:
        groups = [ceil(alike / size) for alike, size in zip(slots.alike, box, strict=True)]
        most, axis = max((n, x) for x, n in enumerate(groups))
        if most == 1:
            break
        t, h, w = (size + (x == axis) for x, size in enumerate(box))
        box = t, h, w
    chunks = min(batch, max(1, wanted // (heads * prod(slots.shares(box)))))
    return box, ceil(batch / chunks)


def odd(extent: Extent) -> Extent:
    """Sizes as kernels take them: odd and not 1, lest Triton compile anew for those that are 1 or divisible by 16."""
    t, h, w = (2 * size + 3 for size in extent)
    return t, h, w
