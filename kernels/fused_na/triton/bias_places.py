"""Where programs of `query_bias.py` and `query_bias_clips.py` find their tiles of queries, and where they leave sums.

Along an axis tiles are shared out: up to `box` of those that are alike to a share, each other one to a share of its
own. The shares of a head, its places, are in the order of their classes (`slots.py`). Each of them, with a chunk of the
samples, is an item, and programs have equal numbers of items. A program with one item leaves its sums in a row of that
number. One with several leaves a row for each class that it meets: row `program + class` of the head, since from a row
to the next either program or class moves on by one. Where both do, a row is left out. `fold_rows.py` adds up all rows
by relative position.
"""

import triton
import triton.language as tl


@triton.jit
def plain(extent):
    """An extent that the host made odd (`slots.odd`)."""
    return (extent[0] >> 1) - 1, (extent[1] >> 1) - 1, (extent[2] >> 1) - 1


@triton.jit
def unravel_along(index, extents):
    """Coordinates `(t, h, w)` in extents that are not known when compiling."""
    rest = index // extents[2]
    return rest // extents[1], rest % extents[1], index % extents[2]


@triton.jit
def groups_of(alike, box):
    """Shares along each axis of the tiles that are alike."""
    return tl.cdiv(alike[0], box[0]), tl.cdiv(alike[1], box[1]), tl.cdiv(alike[2], box[2])


@triton.jit
def tiles_of_share(index, before, alike, box):
    """First tile of queries of a share along an axis, and how many it has."""
    groups = tl.cdiv(alike, box)
    group = index - before
    is_alike = (group >= 0) & (group < groups)
    other = tl.where(group < 0, index, index - groups + alike)
    first = tl.where(is_alike, before + group * box, other)
    return first, tl.where(is_alike, tl.minimum(box, alike - group * box), 1)


@triton.jit
def shares_of_class(kind, before, groups):
    """First share of a class along an axis, and how many it has."""
    return tl.where(kind > before, kind + groups - 1, kind), tl.where(kind == before, groups, 1)


@triton.jit
def class_of_share(index, before, groups):
    """Of a share along an axis: its class, that class's first share, and how many that has."""
    is_before, is_after = index < before, index >= before + groups
    kind = tl.where(is_before, index, tl.where(is_after, index - groups + 1, before))
    first, size = shares_of_class(kind, before, groups)
    return kind, first, size


@triton.jit
def first_place(first, size, places):
    """Place of a class's first share, from the class's first shares and sizes along the axes."""
    return first[0] * (places[1] * places[2]) + size[0] * (first[1] * places[2] + size[1] * first[2])


@triton.jit
def share_of_place(index, before, groups, places):
    """Class and share `(t, h, w)` of a place."""
    kind_t, first_t, size_t = class_of_share(index // (places[1] * places[2]), before[0], groups[0])
    index -= first_t * (places[1] * places[2])
    kind_h, first_h, size_h = class_of_share(index // (size_t * places[2]), before[1], groups[1])
    index -= first_h * (size_t * places[2])
    kind_w, first_w, size_w = class_of_share(index // (size_t * size_h), before[2], groups[2])
    index -= first_w * (size_t * size_h)
    classes_h, classes_w = places[1] - groups[1] + 1, places[2] - groups[2] + 1
    t, h, w = unravel_along(index, (size_t, size_h, size_w))
    return (kind_t * classes_h + kind_h) * classes_w + kind_w, (first_t + t, first_h + h, first_w + w)
