"""Which columns add up the gradient of the bias together, and how programs find them."""

from itertools import product
from math import ceil

import pytest
import torch
from gluon_on_torch import on_torch, value

from fused_na.triton.bias_places import class_of_place, columns_of_class, first_place, item_in_turn, unravel_along
from fused_na.triton.column_classes import Classes, classes_of
from fused_na.triton.tiles import Extent, as_three_axes
from fused_na.window import Axis, window

AXES = {
    "one column": (Axis(7, 7), Axis(4, 4)),
    "map": (Axis(14, 7), Axis(14, 7)),
    "ragged map": (Axis(21, 7), Axis(27, 7)),
    "small windows": (Axis(13, 3), Axis(30, 2)),
    "causal map": (Axis(13, 7, 1, 1, True), Axis(19, 5, 1, 1, True)),
    "strided map": (Axis(13, 5, 2), Axis(19, 7, 3)),
    "clip": (Axis(8, 7), Axis(9, 7), Axis(11, 7)),
    "long clip": (Axis(40, 7), Axis(12, 5), Axis(15, 3)),
    "causal clip": (Axis(9, 5, 1, 1, True), Axis(10, 7), Axis(11, 3, 1, 1, True)),
    "strided clip": (Axis(6, 3, 2), Axis(7, 4, 3), Axis(12, 5)),
}
EXTENTS = [((8, 1, 4), (16, 1, 4)), ((16, 2, 2), (8, 4, 1)), ((16, 4, 1), (16, 2, 2))]


def columns_by_class(classes: Classes) -> list[list[Extent]]:
    """Columns of queries of each class as the kernels find them, place by place."""
    before, alike, places = (tuple(map(value, extent)) for extent in (classes.before, classes.alike, classes.places))
    count = classes.places[0] * classes.places[1] * classes.places[2]
    kinds = on_torch(class_of_place)(value(torch.arange(count)), before, alike, places).tolist()
    assert kinds == sorted(kinds) and set(kinds) == set(range(classes.number))
    classes_w = classes.places[2] - classes.alike[2] + 1
    found = []
    for kind in range(classes.number):
        first, size = on_torch(columns_of_class)(
            value(kind // classes_w), value(kind % classes_w), before, alike, places
        )
        assert int(on_torch(first_place)(first, size, places)) == kinds.index(kind)
        within = on_torch(unravel_along)(value(torch.arange(kinds.count(kind))), size)
        t, h, w = ((start + x).tolist() for start, x in zip(first, within, strict=True))
        found.append(list(zip(t, h, w, strict=True)))
    return found


@pytest.mark.parametrize("extents", EXTENTS, ids=str)
@pytest.mark.parametrize("axes", AXES.values(), ids=AXES.keys())
def test_classes(axes: tuple[Axis, ...], extents: tuple[Extent, Extent]) -> None:
    """Each column has one place. Those of a class meet first keys equally far away along h and along w, and no column
    meets more columns of keys than there is room for."""
    query, key = extents
    if len(axes) == 2:
        query, key = (query[0], 1, query[1] * query[2]), (key[0], 1, key[1] * key[2])
    classes, three = classes_of(axes, query, key), as_three_axes(axes)
    columns = columns_by_class(classes)
    counts = [range(ceil(axis.length / size)) for axis, size in zip(three, query, strict=True)]
    assert sorted(sum(columns, [])) == list(product(*counts))
    for own in columns:
        bases = set()
        for column in own:
            base = []
            for x in (1, 2):
                axis, begin = three[x], column[x] * query[x]
                last = min(begin + query[x], axis.length) - 1
                start, end = window(axis, begin, axis.length)[0], window(axis, last, axis.length)[1]
                assert ceil((end - start) / key[x]) <= classes.counts[x]
                base.append(start - begin)
            bases.add(tuple(base))
        assert len(bases) == 1


def test_columns_that_no_border_shifts_are_alike() -> None:
    classes = classes_of((Axis(56, 7), Axis(51, 7)), (8, 1, 4), (16, 1, 4))
    assert classes == Classes((1, 1, 3), (0, 0, 1), (7, 1, 11), (0, 0, 1))
    assert classes.number == 3 and classes.places == (7, 1, 13)


@pytest.mark.parametrize(("share", "begin", "end"), [(1, 3, 9), (4, 0, 23), (5, 7, 8), (5, 7, 31), (6, 12, 24)])
def test_items_in_turn(share: int, begin: int, end: int) -> None:
    """All of them, in the order of the programs' turns."""
    ends = [(value(item // share), value(item % share)) for item in (begin, end)]
    turns = sorted((item % share, item // share) for item in range(begin, end))
    items = [on_torch(item_in_turn)(*map(value, turn), *ends) for turn in turns]
    assert items == list(range(end - begin))
