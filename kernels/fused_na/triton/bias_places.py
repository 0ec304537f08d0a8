"""Where programs of `query_columns.py` find their columns of queries, and where they leave sums of the bias gradient.

The columns of a head, its places, are in the order of their classes (`column_classes.py`). Each of them, with a sample,
is an item, and programs have equal numbers of items. A program leaves a row of sums for each class that it meets: row
`program + class` of the head, since from a row to the next either program or class moves on by one. Where both do, a
row is left out. Within a class, its programs take the items in turn. `fold_columns.py` adds up all rows.
"""

import triton
import triton.language as tl


@triton.jit
def plain(extent):
    """An extent that the host made odd (`column_classes.odd`)."""
    return (extent[0] >> 1) - 1, (extent[1] >> 1) - 1, (extent[2] >> 1) - 1


@triton.jit
def unravel_along(index, extents):
    """Coordinates `(t, h, w)` in extents that are not known when compiling."""
    rest = index // extents[2]
    return rest // extents[1], rest % extents[1], index % extents[2]


@triton.jit
def extent_of_class(kind, before, alike):
    """First column of a class along an axis, and how many it has."""
    return tl.where(kind > before, kind + alike - 1, kind), tl.where(kind == before, alike, 1)


@triton.jit
def columns_of_class(kind_h, kind_w, before, alike, places):
    """First column of a class, and how many it has along each axis; all those along the first one."""
    first_h, size_h = extent_of_class(kind_h, before[1], alike[1])
    first_w, size_w = extent_of_class(kind_w, before[2], alike[2])
    return (0, first_h, first_w), (places[0], size_h, size_w)


@triton.jit
def class_of_column(index, before, alike):
    """Class of a column along an axis."""
    return tl.where(index < before, index, tl.where(index >= before + alike, index - alike + 1, before))


@triton.jit
def first_place(first, size, places):
    """A class's first place, from its first column and its sizes along the axes."""
    return size[0] * (first[1] * places[2] + size[1] * first[2])


@triton.jit
def class_of_place(index, before, alike, places):
    """Class of a place."""
    kind_h = class_of_column(index // (places[0] * places[2]), before[1], alike[1])
    first_h, size_h = extent_of_class(kind_h, before[1], alike[1])
    rest = index - first_h * (places[0] * places[2])
    kind_w = class_of_column(rest // (places[0] * size_h), before[2], alike[2])
    return kind_h * (places[2] - alike[2] + 1) + kind_w


@triton.jit
def item_in_turn(turn, program, begin, end):
    """Which of the items of a class a program has as number `turn` of its share, if its programs take one at a time, in
    their order. The class reaches from `begin` to before `end`, each a program and a number of its share."""
    # Before it come the programs' items of earlier turns, and of this one those of the programs before.
    earlier = (end[0] - begin[0]) * turn + tl.minimum(end[1], turn) - tl.minimum(begin[1], turn)
    return earlier + program - begin[0] - tl.where(begin[1] > turn, 1, 0)
