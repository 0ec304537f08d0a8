"""Where the gradient of the bias is added up, a pure function of the problem."""

from itertools import product
from math import ceil, prod
from operator import mod

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fused_na.triton.slots import PROGRAMS, SLOT, Slots, shares, slots_of
from fused_na.triton.tiles import QUERY_BIAS, Extent, as_three_axes
from fused_na.window import Axis, window

AXES = {
    "one tile": (Axis(7, 7), Axis(7, 7)),
    "map": (Axis(14, 7), Axis(14, 7)),
    "ragged map": (Axis(21, 7), Axis(27, 7)),
    "small windows": (Axis(13, 3), Axis(30, 2)),
    "strip": (Axis(3, 3), Axis(70, 21)),
    "causal map": (Axis(13, 7, 1, 1, True), Axis(19, 5, 1, 1, True)),
    "strided map": (Axis(13, 5, 2), Axis(19, 7, 3)),
    "blocked causal map": (Axis(12, 4, 4), Axis(21, 7, 7, 1, True)),
    "clip": (Axis(8, 7), Axis(9, 7), Axis(11, 7)),
    "causal clip": (Axis(9, 5, 1, 1, True), Axis(10, 7), Axis(11, 3)),
    "strided clip": (Axis(6, 3, 2), Axis(7, 4, 3), Axis(12, 5)),
}


def grid(extent: Extent) -> Tensor:
    """Coordinates of a tile's tokens in order, `[tokens, 3]`."""
    return torch.cartesian_prod(*map(torch.arange, extent))


def sides(axes: tuple[Axis, ...]) -> Tensor:
    return torch.tensor([2 * axis.kernel_size - 1 for axis in as_three_axes(axes)])


def flat(coordinates: Tensor, extents: Tensor) -> Tensor:
    """Places of `[..., 3]` in a flattened tensor of three axes, -1 outside of it."""
    t, h, w = coordinates.unbind(-1)
    place = (t * extents[1] + h) * extents[2] + w
    return torch.where(((coordinates >= 0) & (coordinates < extents)).all(-1), place, -1)


def place_in_plane(row: Tensor, column: Tensor) -> Tensor:
    """Number of a slot that holds a query and a key of a plane: four numbers a lane, as matrix units give them."""
    return (row * 4 + column % 8 // 2) * 4 + column // 8 * 2 + column % 2


def slots_for(axes: tuple[Axis, ...]) -> Slots:
    tiles = QUERY_BIAS[len(axes)]
    return slots_of(axes, tiles.query, tiles.key)


def classes_of(axes: tuple[Axis, ...]) -> list[tuple[Extent, list[Extent]]]:
    """First key less first query, and first queries of the tiles, of each class in order."""
    slots, along = slots_for(axes), []
    for x, (axis, size) in enumerate(zip(as_three_axes(axes), QUERY_BIAS[len(axes)].query, strict=True)):
        begins = list(range(0, axis.length, size))
        before, alike, after = slots.before[x], slots.alike[x], slots.after[x]
        assert len(begins) == before + alike + after
        rows = [begins[i : i + 1] for i in range(before)]
        rows += [begins[before : before + alike], *([i] for i in begins[before + alike :])]
        along.append([(window(axis, row[0], axis.length)[0] - row[0], row) for row in rows])
    return [
        ((t, h, w), list(product(rows_t, rows_h, rows_w))) for (t, rows_t), (h, rows_h), (w, rows_w) in product(*along)
    ]


def relative_positions(axes: tuple[Axis, ...]) -> Tensor:
    """Place in the flattened bias of all numbers `[classes, slots, SLOT]`, -1 of those that belong to none."""
    tiles = QUERY_BIAS[len(axes)]
    t, h, w = slots_for(axes).counts
    first = grid((t * tiles.key[0] + tiles.query[0] - 1, h, w)) * torch.tensor([1, *tiles.key[1:]])
    first[:, 0] -= tiles.query[0] - 1
    inner = grid((1, *tiles.key[1:]))[None, :] - grid((1, *tiles.query[1:]))[:, None]
    in_slot = torch.zeros(SLOT, 3, dtype=torch.int64)
    in_slot[place_in_plane(torch.arange(8)[:, None], torch.arange(16)[None, :])] = inner
    bases = torch.tensor([base for base, _ in classes_of(axes)])
    relative = bases[:, None, None] + first[None, :, None] + in_slot[None, None]
    return flat(relative + sides(axes) // 2, sides(axes))


@pytest.mark.parametrize("axes", AXES.values(), ids=AXES.keys())
def test_every_pair_has_one_number_of_its_relative_position(axes: tuple[Axis, ...]) -> None:
    """A walk as the kernel's, tile by tile, meets every pair of the neighborhood once, in a slot that is there."""
    tiles, slots, positions = QUERY_BIAS[len(axes)], slots_for(axes), relative_positions(axes)
    three = as_three_axes(axes)
    lengths, key_extent = torch.tensor([axis.length for axis in three]), torch.tensor(tiles.key)
    tokens = grid((three[0].length, three[1].length, three[2].length))
    # `[tokens, 3, 2]`: start and end of each query's window along each axis.
    windows = torch.tensor([[window(a, x, a.length) for a, x in zip(three, q, strict=True)] for q in tokens.tolist()])
    is_neighbor = ((tokens >= windows[:, None, :, 0]) & (tokens < windows[:, None, :, 1])).all(-1)
    met = torch.zeros_like(is_neighbor, dtype=torch.int64)
    begins_met = []
    for kind, (base, begins) in enumerate(classes_of(axes)):
        for begin in begins:
            begins_met.append(begin)
            query = torch.tensor(begin) + grid(tiles.query)
            query = query[(query < lengths).all(-1)]
            own = windows[flat(query, lengths)]
            start, stop = torch.tensor(begin) + torch.tensor(base), own[..., 1].amax(0)
            assert torch.equal(start, own[..., 0].amin(0))
            steps = [ceil(int(n) / size) for n, size in zip(stop - start, tiles.key, strict=True)]
            assert all(n <= most for n, most in zip(steps, slots.counts, strict=True))
            for step in grid((steps[0], steps[1], steps[2])):
                key = start + step * key_extent + grid(tiles.key)
                is_pair = ((key >= own[:, None, :, 0]) & (key < own[:, None, :, 1])).all(-1)
                pair = flat(query, lengths)[:, None] * len(tokens) + flat(key, lengths)
                met.view(-1)[pair[is_pair]] += 1
                q, k = (query - torch.tensor(begin))[:, None].unbind(-1), grid(tiles.key)[None].unbind(-1)
                plane = step[0] * tiles.key[0] + k[0] - q[0] + tiles.query[0] - 1
                slot = (plane * slots.counts[1] + step[1]) * slots.counts[2] + step[2]
                number = place_in_plane(q[1] * tiles.query[2] + q[2], k[1] * tiles.key[2] + k[2])
                assert slot.min() >= 0 and slot.max() < slots.number
                position = flat(key - query[:, None] + sides(axes) // 2, sides(axes))
                assert torch.equal(positions[kind, slot, number][is_pair], position[is_pair])
    assert torch.equal(met, is_neighbor.long())
    assert sorted(begins_met) == [tuple(x) for x in tokens.tolist() if not any(map(mod, x, tiles.query))]


def test_tiles_that_no_border_shifts_are_alike() -> None:
    slots = slots_for((Axis(56, 7), Axis(51, 7)))
    assert (slots.before, slots.alike, slots.after) == ((1, 0, 1), (13, 1, 5), (0, 0, 1))
    assert slots.classes == 6 and slots.shares((4, 1, 2)) == (5, 1, 5)
    assert slots.counts == (5, 1, 1) and slots.number == 13 and slots.bytes == 13 * 512


EXTENTS = st.tuples(*[st.integers(1, 40)] * 3)
OTHERS = st.tuples(*[st.integers(0, 3)] * 3)


@given(
    before=OTHERS,
    alike=EXTENTS,
    after=OTHERS,
    heads=st.integers(1, 40),
    batch=st.integers(1, 300),
    wanted=st.integers(1, 3000),
    room=st.integers(0, 3000),
)
def test_shares(before: Extent, alike: Extent, after: Extent, heads: int, batch: int, wanted: int, room: int) -> None:
    """No more programs than asked for, or than there is memory for, and of several tiles only with all samples."""
    slots = Slots((1, 1, 1), 5, before, alike, after)
    assert slots.classes == prod(b + 1 + a for b, a in zip(before, after, strict=True))
    least = heads * slots.classes
    limit = least + room
    box, samples = shares(slots, heads, batch, wanted, limit * slots.bytes)
    programs = heads * prod(slots.shares(box)) * ceil(batch / samples)
    assert all(1 <= size <= n for size, n in zip(box, alike, strict=True)) and 1 <= samples <= batch
    assert programs <= limit and programs <= max(wanted, least)
    assert box == (1, 1, 1) or samples == batch or 2 * programs <= wanted + least
    assert box != (1, 1, 1) or 2 * programs >= min(wanted, limit, heads * prod(slots.shares(box)) * batch)


@pytest.mark.parametrize(
    ("axes", "batch", "heads", "expected"),
    [
        ((Axis(56, 7), Axis(56, 7)), 128, 2, ((1, 1, 1), 26)),
        ((Axis(28, 7), Axis(28, 7)), 128, 4, ((1, 1, 1), 15)),
        ((Axis(14, 7), Axis(14, 7)), 128, 8, ((1, 1, 1), 8)),
        ((Axis(16, 7), Axis(56, 7), Axis(56, 7)), 4, 2, ((1, 1, 3), 4)),
        ((Axis(16, 7), Axis(28, 7), Axis(28, 7)), 4, 4, ((1, 1, 1), 4)),
        ((Axis(16, 7), Axis(14, 7), Axis(14, 7)), 4, 8, ((1, 1, 1), 4)),
    ],
    ids=["img_s1", "img_s2", "img_s3", "vid_s1", "vid_s2", "vid_s3"],
)
def test_shares_of_the_benchmarks(axes: tuple[Axis, ...], batch: int, heads: int, expected: tuple[Extent, int]) -> None:
    """Those that were the fastest on an H100, or nearly so."""
    assert shares(slots_for(axes), heads, batch, PROGRAMS[len(axes)], 64 << 20) == expected
