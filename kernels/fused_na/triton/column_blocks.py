"""Which blocks of two columns are met, for the kernels of `columns.py`: a pure function of the problem."""

from functools import lru_cache
from math import lcm
from typing import NamedTuple

from fused_na.window import Axis, group_members, inverse_window, window

BLOCK = 4  # tokens of a block along the first axis
PLACES = ((1, 4), (2, 2), (4, 1))  # along h and w, the ways in which those of a column can lie
FEWEST_BLOCKS = 2  # of an own column, if the axis has as many
MOST_MOVING = 8  # blocks of a column that is gone through
MOST_MET = 14  # pairs of blocks of a step: with more, kernels spill


class Blocks(NamedTuple):
    """The blocks of a program's own column, which rows are of, and of those that it goes through, along the first axis.

    `met` and `whole` have bit `a * moving + b` for own block `a` and block `b`, which are `b - a` apart.
    """

    own: int  # blocks of an own column
    moving: int  # of the columns that it goes through
    lead: int  # by how many these start before it
    met: int  # whether some tokens of two blocks see each other
    whole: int  # whether all do
    first: int  # least distance of two that are met
    span: int  # from it to the largest, which counts
    box: int  # tokens that are copied at once

    @property
    def is_small(self) -> bool:
        """Whether a kernel made of them is a good one."""
        return self.moving <= MOST_MOVING and self.met.bit_count() <= MOST_MET

    @property
    def arguments(self) -> dict[str, int]:
        """Of the kernels."""
        return {name.upper(): x for name, x in self._asdict().items() if name != "box"}


def _columns(axis: Axis, members: int, size: int) -> list[int]:
    """Where columns of `size` tokens begin, of those that differ: away from the borders, windows repeat themselves."""
    begins = range(0, members, size)
    border, period = axis.kernel_size // size + 2, lcm(axis.stride, size) // size
    if len(begins) <= 2 * border + period:
        return list(begins)
    return [*begins[: border + period], *begins[-border:]]


@lru_cache(maxsize=4096)
def blocks_of(axis: Axis, most: int, over_keys: bool) -> Blocks:
    """The blocks of the largest group along an axis whose dilation divides it.

    Args:
        axis: the first axis.
        most: blocks of an own column, if the axis has as many.
        over_keys: whether columns of queries go through those of keys, or the other way round.
    """
    members = group_members(axis, 0)
    interval = window if over_keys else inverse_window
    own = min(most, -(-members // BLOCK))
    own = 1 << (own - 1).bit_length()
    met: set[tuple[int, int]] = set()
    spans: list[tuple[int, int, list[tuple[int, int]]]] = []  # of each own block: its column, itself, what rows see
    for begin in _columns(axis, members, own * BLOCK):
        for a in range(own):
            rows = range(begin + a * BLOCK, min(begin + (a + 1) * BLOCK, members))
            seen = [interval(axis, row, members) for row in rows]
            spans.append((begin, a, seen))
            for start, end in seen:
                met |= {(a, b) for b in range((start - begin) // BLOCK, -((begin - end) // BLOCK))}
    partial = {
        (a, b)
        for begin, a, seen in spans
        for b in {b for other, b in met if other == a}
        if any(start > begin + b * BLOCK or end < begin + (b + 1) * BLOCK for start, end in seen)
    }
    is_one = own * BLOCK >= members
    lead = 0 if is_one else -min(b for _, b in met)
    moving = own if is_one else lead + 1 + max(b for _, b in met)

    def bits(pairs: set[tuple[int, int]]) -> int:
        return sum(1 << a * moving + b + lead for a, b in pairs)

    distances = [b + lead - a for a, b in met]
    first, span = min(distances), max(distances) - min(distances) + 1
    # Boxes are powers of two; few large ones, unless they copy what is not met.
    box = moving * BLOCK if moving in (1, 2, 4) else 2 * BLOCK
    return Blocks(own, moving, lead, bits(met), bits(met - partial), first, span, box)
