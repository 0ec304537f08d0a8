"""Where the gradient of the bias is added up, a pure function of the problem."""

from math import ceil, prod
from operator import mod

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fused_na.triton.slots import PROGRAMS, SLOT, Class, Slots, shares, slots_of
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


def relative_positions(axes: tuple[Axis, ...]) -> Tensor:
    """Place in the flattened bias of all numbers `[classes, slots, SLOT]`, -1 of those that belong to none."""
    tiles = QUERY_BIAS[len(axes)]
    slots = slots_of(axes, tiles.query, tiles.key)
    t, h, w = slots.counts
    first = grid((t * tiles.key[0] + tiles.query[0] - 1, h, w)) * torch.tensor([1, *tiles.key[1:]])
    first[:, 0] -= tiles.query[0] - 1
    inner = grid((1, *tiles.key[1:]))[None, :] - grid((1, *tiles.query[1:]))[:, None]
    in_slot = torch.zeros(SLOT, 3, dtype=torch.int64)
    in_slot[place_in_plane(torch.arange(8)[:, None], torch.arange(16)[None, :])] = inner
    bases = torch.tensor([kind.base for kind in slots.classes])
    relative = bases[:, None, None] + first[None, :, None] + in_slot[None, None]
    return flat(relative + sides(axes) // 2, sides(axes))


def slots_for(axes: tuple[Axis, ...]) -> Slots:
    tiles = QUERY_BIAS[len(axes)]
    return slots_of(axes, tiles.query, tiles.key)


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
    for kind, (base, begins) in enumerate(slots.classes):
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


def test_windows_that_no_border_shifts_are_one_class() -> None:
    slots = slots_for((Axis(56, 7), Axis(56, 7)))
    assert [(kind.base, len(kind.begins)) for kind in slots.classes] == [
        ((-3, 0, -3), 78), ((-3, 0, 0), 13), ((0, 0, -3), 6), ((0, 0, 0), 1),
    ]  # fmt: skip
    assert slots.counts == (5, 1, 1) and slots.number == 13 and slots.bytes == 13 * 512


@given(
    tiles=st.lists(st.integers(1, 300), min_size=1, max_size=20),
    heads=st.integers(1, 40),
    batch=st.integers(1, 300),
    wanted=st.integers(1, 3000),
    room=st.integers(0, 3000),
)
def test_shares(tiles: list[int], heads: int, batch: int, wanted: int, room: int) -> None:
    """As many programs as asked for, or as there is memory for, and of several tiles only if they have all samples."""
    slots = Slots((1, 1, 1), 5, tuple(Class((0, 0, 0), ((0, 0, 0),) * n) for n in tiles))
    least = heads * len(tiles)
    limit = 2 * least + room
    per_program, samples = shares(slots, heads, batch, wanted, limit * slots.bytes)
    programs = heads * sum(ceil(n / per_program) for n in tiles) * ceil(batch / samples)
    assert per_program >= 1 and 1 <= samples <= batch
    assert programs <= limit and programs <= wanted + least
    assert per_program == 1 or samples == batch
    assert 3 * programs >= min(wanted, limit - least, heads * sum(tiles) * batch)


@pytest.mark.parametrize(
    ("axes", "batch", "heads", "expected"),
    [
        ((Axis(56, 7), Axis(56, 7)), 128, 2, (1, 26)),
        ((Axis(28, 7), Axis(28, 7)), 128, 4, (1, 15)),
        ((Axis(14, 7), Axis(14, 7)), 128, 8, (1, 8)),
        ((Axis(16, 7), Axis(56, 7), Axis(56, 7)), 4, 2, (2, 4)),
        ((Axis(16, 7), Axis(28, 7), Axis(28, 7)), 4, 4, (1, 4)),
        ((Axis(16, 7), Axis(14, 7), Axis(14, 7)), 4, 8, (1, 4)),
    ],
    ids=["img_s1", "img_s2", "img_s3", "vid_s1", "vid_s2", "vid_s3"],
)
def test_shares_of_the_benchmarks(axes: tuple[Axis, ...], batch: int, heads: int, expected: tuple[int, int]) -> None:
    """Those that were the fastest on an H100, or nearly so."""
    assert shares(slots_for(axes), heads, batch, PROGRAMS[len(axes)], 64 << 20) == expected


def test_large_maps_are_quick() -> None:
    """Tiles are grouped by axis: no window is worked out for each tile."""
    slots = slots_for((Axis(64, 7), Axis(512, 7), Axis(512, 7)))
    assert sum(len(kind.begins) for kind in slots.classes) == prod((16, 128, 256))
