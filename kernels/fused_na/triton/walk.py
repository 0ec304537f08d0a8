"""The order in which a program goes through the tiles that its own tile meets: along w, then h, then t.

A box of tiles is given by its first members and the members where it ends. A program may walk through a box without a
hole and through the hole afterwards, so that either loop knows something about its tiles. Steps are additions and
selections: a division by a number that the compiler does not know costs about 15 instructions, on every thread. What
axes of small windows have, one tile for the whole box whatever the place, is known before: `ONE_TILE`.
"""

import triton
import triton.language as tl

NEVER = tl.constexpr((False, False, False))


@triton.jit
def interior(first, first_end, last_start, TILE: tl.constexpr):
    """The box of tiles that all rows attend to as a whole, in a grid that starts at `first`: its begin and its end,
    the same on all axes where there is none. Bounds are the first row's end and the last row's start."""
    t = tl.cdiv(last_start[0] - first[0], TILE[0]) * TILE[0]
    h = tl.cdiv(last_start[1] - first[1], TILE[1]) * TILE[1]
    w = tl.cdiv(last_start[2] - first[2], TILE[2]) * TILE[2]
    size_t = tl.maximum((first_end[0] - first[0]) // TILE[0] * TILE[0] - t, 0)
    size_h = tl.maximum((first_end[1] - first[1]) // TILE[1] * TILE[1] - h, 0)
    size_w = tl.maximum((first_end[2] - first[2]) // TILE[2] * TILE[2] - w, 0)
    exists = (size_t > 0) & (size_h > 0) & (size_w > 0)
    begin = first[0] + t, first[1] + h, first[2] + w
    end_t = begin[0] + tl.where(exists, size_t, 0)
    end_h = begin[1] + tl.where(exists, size_h, 0)
    return begin, (end_t, end_h, begin[2] + tl.where(exists, size_w, 0))


@triton.jit
def count_tiles(begin, end, TILE: tl.constexpr, ONE_TILE: tl.constexpr):
    """Tiles that cover a box."""
    t = 1 if ONE_TILE[0] else tl.cdiv(end[0] - begin[0], TILE[0])
    h = 1 if ONE_TILE[1] else tl.cdiv(end[1] - begin[1], TILE[1])
    w = 1 if ONE_TILE[2] else tl.cdiv(end[2] - begin[2], TILE[2])
    return t * h * w


@triton.jit
def part(
    first,
    stop,
    inner_begin,
    inner_end,
    TILE: tl.constexpr,
    ONE_TILE: tl.constexpr,
    INNER: tl.constexpr,
    INTERIOR: tl.constexpr,
):
    """A walk through the box inside (`INNER`), through the box around it, or without `INTERIOR` through the whole box.

    Returns `((begin, end, hole_begin, hole_end), steps)`.
    """
    nothing = (0, 0, 0)
    if INNER:
        return (inner_begin, inner_end, nothing, nothing), count_tiles(inner_begin, inner_end, TILE, NEVER)
    if INTERIOR:
        steps = count_tiles(first, stop, TILE, ONE_TILE) - count_tiles(inner_begin, inner_end, TILE, NEVER)
        return (first, stop, inner_begin, inner_end), steps
    return (first, stop, nothing, nothing), count_tiles(first, stop, TILE, ONE_TILE)


@triton.jit
def _outside(t, h, w, walk):
    """The first tile from the beginning of a row or plane on that does not lie in the hole."""
    begin, end, hole_begin, hole_end = walk
    spans_rows = (hole_begin[2] == begin[2]) & (hole_end[2] >= end[2])
    spans_planes = spans_rows & (hole_begin[1] == begin[1]) & (hole_end[1] >= end[1])
    t = tl.where(spans_planes & (t == hole_begin[0]), hole_end[0], t)
    in_planes = (t >= hole_begin[0]) & (t < hole_end[0])
    h = tl.where(spans_rows & in_planes & (h == hole_begin[1]), hole_end[1], h)
    in_rows = in_planes & (h >= hole_begin[1]) & (h < hole_end[1])
    return t, h, tl.where(in_rows & (w == hole_begin[2]), hole_end[2], w)


@triton.jit
def first_tile(walk):
    """First members of a walk's first tile."""
    begin = walk[0]
    return _outside(begin[0], begin[1], begin[2], walk)


@triton.jit
def next_tile(tile, walk, TILE: tl.constexpr, ONE_TILE: tl.constexpr):
    """First members of the tile after `tile`; beyond the box after the last one."""
    begin, end, hole_begin, hole_end = walk
    t, h, w = tile
    in_planes = (t >= hole_begin[0]) & (t < hole_end[0])
    in_rows = in_planes & (h >= hole_begin[1]) & (h < hole_end[1])
    w += TILE[2]
    w = tl.where(in_rows & (w == hole_begin[2]), hole_end[2], w)
    ends_row = True if ONE_TILE[2] else w >= end[2]
    w = tl.where(ends_row, begin[2], w)
    h = tl.where(ends_row, h + TILE[1], h)
    spans_rows = (hole_begin[2] == begin[2]) & (hole_end[2] >= end[2])
    h = tl.where(spans_rows & in_planes & (h == hole_begin[1]), hole_end[1], h)
    ends_plane = ends_row if ONE_TILE[1] else h >= end[1]
    h = tl.where(ends_plane, begin[1], h)
    return _outside(tl.where(ends_plane, t + TILE[0], t), h, w, walk)
