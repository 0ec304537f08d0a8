"""What programs of the kernels of `columns.py` take, and how they share the samples: pure functions of the problem."""

from math import ceil, prod

from fused_na.triton.column_blocks import BLOCK, FEWEST_BLOCKS, Blocks
from fused_na.triton.tiles import Extent

SHARED_MEMORY = 228 << 10  # bytes of a multiprocessor
AT_ONCE = {None: 8, 168: 12}  # programs for which it has registers, by the most that a thread may have
START = 0.4  # of the time for a sample, what a program takes to start
MOST_SAMPLES = 64


def shared_bytes(blocks: Blocks, own_tokens: int, moving: Extent, more: int) -> int:
    """Shared memory of a program with room for so many tokens of own columns of its tensors, two stages of two tensors,
    and more bytes."""
    boxes = ceil(BLOCK * blocks.moving / moving[0])
    return 64 * (own_tokens + 2 * 2 * boxes * prod(moving)) + more + 1088  # barriers, and what the system takes


def samples_of_program(
    blocks: Blocks, own: Extent, moving: Extent, registers: int | None, columns: int, batch: int, multiprocessors: int
) -> int:
    """How many samples a program works through on a map: with so many, all programs take the least time if they run one
    such set after the other as many as fit at once.

    Own columns of several samples take twice the shared memory. One sample if a multiprocessor ran fewer programs for
    it, or if own columns have many steps of their own: then little is to be had.

    Args:
        blocks: of a program.
        own, moving: extents of its column, and of the boxes of those that it goes through.
        registers: as `tiles.Tiles` has them.
        columns: own columns of a sample, of all heads.
        batch: samples.
        multiprocessors: of the GPU.
    """
    rows = 2 * 4 * max(32, 1 << (4 * BLOCK * blocks.moving - 1).bit_length())  # log-sum-exps and deltas of a column
    at_once = min(AT_ONCE[registers], SHARED_MEMORY // shared_bytes(blocks, 4 * prod(own), moving, rows))
    if blocks.own > FEWEST_BLOCKS or at_once < AT_ONCE[None]:
        return 1

    def time(samples: int) -> float:  # in that of a sample
        return ceil(columns * ceil(batch / samples) / (at_once * multiprocessors)) * (samples + START)

    return min(range(1, min(batch, MOST_SAMPLES) + 1), key=time)
