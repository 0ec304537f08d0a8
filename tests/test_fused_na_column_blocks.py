"""Which blocks of columns are met, against all pairs of tokens."""

from math import prod

from hypothesis import example, given
from hypothesis import strategies as st

from fused_na.triton.column_blocks import BLOCK, blocks_of
from fused_na.triton.tiles import as_three_axes, column_pairs, executed_in_columns
from fused_na.window import Axis, group_members, inverse_window, window


@st.composite
def even_axes(draw: st.DrawFn, longest: int = 40) -> Axis:
    """Axes whose dilation divides their length."""
    members, dilation = draw(st.integers(1, longest)), draw(st.integers(1, 3))
    kernel_size = draw(st.integers(1, members))
    stride = draw(st.integers(1, kernel_size))
    return Axis(members * dilation, kernel_size, stride, dilation, draw(st.booleans()))


@given(even_axes(), st.sampled_from([1, 2, 4]), st.booleans())
@example(Axis(16, 7), 4, True)
@example(Axis(203, 7, 3), 2, True)
@example(Axis(150, 9, 5, 1, True), 1, False)
@example(Axis(170, 21, 20), 4, False)
@example(Axis(56, 7), 4, False)
def test_blocks_hold_all_pairs(axis: Axis, most: int, over_keys: bool) -> None:
    """A pair of blocks is met if and only if somewhere tokens of the two see each other, and whole if wherever the own
    block has tokens, all see all of the other's."""
    blocks = blocks_of(axis, most, over_keys)
    members = group_members(axis, 0)
    assert blocks.own <= most and blocks.own.bit_count() == 1
    assert blocks.own * BLOCK >= members or blocks.own == most
    interval = window if over_keys else inverse_window
    sees: dict[tuple[int, int], list[list[bool]]] = {}
    for begin in range(0, members, blocks.own * BLOCK):
        for a in range(blocks.own):
            rows = range(begin + BLOCK * a, min(begin + BLOCK * (a + 1), members))
            for b in range(blocks.moving):
                first = begin + BLOCK * (b - blocks.lead)
                seen = [
                    [interval(axis, row, members)[0] <= x < interval(axis, row, members)[1] for row in rows]
                    for x in range(first, first + BLOCK)
                ]
                sees.setdefault((a, b), []).extend(seen if rows else [])
            # None lies outside of the columns that are gone through.
            for row in rows:
                start, end = interval(axis, row, members)
                assert begin - BLOCK * blocks.lead <= start
                assert end <= begin + BLOCK * (blocks.moving - blocks.lead)
    distances = []
    for (a, b), seen in sees.items():
        bit = a * blocks.moving + b
        is_met = any(map(any, seen))
        assert blocks.met >> bit & 1 == is_met
        assert blocks.whole >> bit & 1 == (is_met and all(map(all, seen)))
        distances += [b - a] if is_met else []
    assert (min(distances), max(distances)) == (blocks.first, blocks.first + blocks.span - 1)
    assert max(blocks.met, blocks.whole) < 1 << blocks.own * blocks.moving


def test_blocks_of_long_clips() -> None:
    """Of 16 frames with windows of 7, a column needs 10 of the 16 pairs of its blocks, and none of the 4 beside the
    diagonal is whole; longer ones, and maps, need 12 of 24."""
    clip = blocks_of(Axis(16, 7), 4, True)
    assert (clip.own, clip.moving, clip.lead, clip.met.bit_count(), clip.whole.bit_count()) == (4, 4, 0, 10, 4)
    for length in (28, 56, 112):
        for over_keys in (True, False):
            blocks = blocks_of(Axis(length, 7), 4, over_keys)
            assert (blocks.moving, blocks.lead, blocks.met.bit_count(), blocks.box) == (6, 1, 12, 8)
    assert blocks_of(Axis(56, 7), 4, True).is_small
    assert not blocks_of(Axis(56, 31), 4, True).is_small


@given(st.tuples(even_axes(20), even_axes(6), even_axes(9)), st.booleans())
def test_executed_scores_of_columns(axes: tuple[Axis, Axis, Axis], over_keys: bool) -> None:
    """Counted as the kernels go through columns."""
    interval = window if over_keys else inverse_window
    for own, moving in column_pairs(axes, 64, over_keys):
        blocks = blocks_of(axes[0], own[0] // BLOCK, over_keys)
        steps = -(-group_members(axes[0], 0) // own[0]) * axes[0].dilation
        for axis, size, other in zip(axes[1:], own[1:], moving[1:], strict=True):
            members, along = group_members(axis, 0), 0
            for begin in range(0, members, size):
                last = min(begin + size, members) - 1
                along += -(-(interval(axis, last, members)[1] - interval(axis, begin, members)[0]) // other)
            steps *= along * axis.dilation
        pairs = (BLOCK * prod(own[1:])) * (BLOCK * prod(moving[1:]))
        assert executed_in_columns(axes, own, moving, over_keys) == steps * blocks.met.bit_count() * pairs


def test_columns_of_maps_lie_in_rows() -> None:
    pairs = list(column_pairs(as_three_axes((Axis(14, 7), Axis(14, 7))), 64, True))
    assert pairs == [((16, 1, 4), (16, 1, 4))]
