"""Where `query_bias.py` adds up the gradient of the bias: a pure function of the problem, which needs no GPU."""

from functools import lru_cache
from itertools import product
from math import ceil
from typing import NamedTuple

from fused_na.triton.tiles import Extent, as_three_axes
from fused_na.window import Axis, window

SLOT = 128  # numbers of a slot, four for each lane of a warp
# Programs by the number of axes, for the 132 multiprocessors of an H100: on maps each runs 8 at once, and more programs
# were slower; on clips it runs 4, which differ more in length and share the work best by the dozen.
PROGRAMS = {2: 132 * 8, 3: 132 * 12}


class Class(NamedTuple):
    """Tiles of queries in which slots mean the same relative positions."""

    base: Extent  # first key less first query along each axis, `(t, h, w)`
    begins: tuple[Extent, ...]  # first queries of the tiles, in order


class Slots(NamedTuple):
    """The sums of a program, and the tiles of queries that may share them.

    A slot holds the pairs of planes, the queries and the keys of one t. Its indices are the plane of keys less that of
    queries, counted from the last plane of queries on, and the place of the tile of keys along h and along w.
    """

    counts: Extent  # most tiles of keys of a tile of queries, along each axis
    number: int  # of slots
    classes: tuple[Class, ...]  # those of most tiles first; borders shift windows, which makes more than one

    @property
    def bytes(self) -> int:
        """Of the sums of a program, float32."""
        return self.number * SLOT * 4


@lru_cache(maxsize=256)
def slots_of(axes: tuple[Axis, ...], query: Extent, key: Extent) -> Slots:
    """The slots of a problem without dilation.

    Args:
        axes: one to three axes.
        query, key: tiles of queries and of keys, as extents along `(t, h, w)`.
    """
    counts, begins_by_base = [], []
    for axis, q, k in zip(as_three_axes(axes), query, key, strict=True):
        n = axis.length
        most, begins = 1, dict[int, list[int]]()
        for begin in range(0, n, q):
            start, stop = window(axis, begin, n)[0], window(axis, min(begin + q, n) - 1, n)[1]
            most = max(most, ceil((stop - start) / k))
            begins.setdefault(start - begin, []).append(begin)
        counts.append(most)
        begins_by_base.append(begins)
    along_t, along_h, along_w = begins_by_base
    classes = [
        Class((t, h, w), tuple(product(along_t[t], along_h[h], along_w[w])))
        for t, h, w in product(along_t, along_h, along_w)
    ]
    classes.sort(key=lambda kind: -len(kind.begins))
    t, h, w = counts
    planes = t * key[0] + query[0] - 1
    return Slots((t, h, w), planes * h * w, tuple(classes))


def shares(slots: Slots, heads: int, batch: int, programs: int, memory: int) -> tuple[int, int]:
    """Tiles of queries and samples of a program.

    A program works out a tile's windows once for all its samples, and writes its sums once for all its tiles. So it has
    one tile and a chunk of the samples where there are few tiles, and several tiles and all samples where there are
    many. As no program mixes classes, there may be up to one more than asked for of each head and class.

    Args:
        slots: of the problem.
        heads, batch: of the problem.
        programs: about how many there shall be.
        memory: bytes that their sums may take, enough for two programs of each head and class.
    """
    wanted = min(programs, memory // slots.bytes - heads * len(slots.classes))
    tiles = heads * sum(len(kind.begins) for kind in slots.classes)
    chunks = min(batch, max(1, wanted // tiles))
    return ceil(tiles / wanted), ceil(batch / chunks)
