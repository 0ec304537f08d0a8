"""The gradient of the relative positional bias from the rows of sums that `query_columns.py` leaves.

Two kernels, lest few programs read many rows: one adds up the rows of each class, the other, by relative position, the
numbers of all classes.
"""

import triton
import triton.language as tl

from fused_na.triton.bias_places import columns_of_class, first_place, plain
from fused_na.triton.neighborhood import unravel, window

QUERIES = tl.constexpr(8)  # places of a block's rows that lanes tell apart, each with four lanes
LANES = tl.constexpr(64)  # numbers of a warp


@triton.jit
def rows_of_class(kind_h, kind_w, before, alike, places, chunks, share):
    """Of a class: its first column, its first row, and how many rows it has."""
    first, size = columns_of_class(kind_h, kind_w, before, alike, places)
    item = first_place(first, size, places) * chunks
    last_item = item + size[0] * size[1] * size[2] * chunks - 1
    first_row = item // share + kind_h * (places[2] - alike[2] + 1) + kind_w
    return first, first_row, last_item // share - item // share + 1


@triton.jit(do_not_specialize=["chunks", "share", "rows"])
def sum_classes_kernel(
    partial,
    before,
    alike,
    all_places,  # along each axis
    chunks,  # items of a place
    share,  # items of a program
    rows,  # of a head
    COUNTS: tl.constexpr,
    SPAN: tl.constexpr,
    ROWS: tl.constexpr,  # of a step
    STEPS: tl.constexpr,  # at once
    NUMBERS: tl.constexpr,  # of a program
):
    """Adds up a class's rows, in place of the first; the others need not stay in a cache.

    It is to run with as many registers as the loads of its steps take: unasked, the compiler takes fewer, and has two
    loads under way.
    """
    ROW: tl.constexpr = COUNTS[1] * COUNTS[2] * (2 * SPAN + 1) * LANES
    BLOCKS: tl.constexpr = (ROW + NUMBERS - 1) // NUMBERS
    before, alike, places = plain(before), plain(alike), plain(all_places)
    classes_h, classes_w = places[1] - alike[1] + 1, places[2] - alike[2] + 1
    pid = tl.program_id(0)
    kind = pid // BLOCKS
    head, kind = kind // (classes_h * classes_w), kind % (classes_h * classes_w)
    kind_h, kind_w = kind // classes_w, kind % classes_w
    _, first_row, count = rows_of_class(kind_h, kind_w, before, alike, places, chunks, share)
    number = pid % BLOCKS * NUMBERS + tl.arange(0, NUMBERS)
    first = partial + (head * rows + first_row) * ROW + number
    index = tl.arange(0, ROWS)[:, None]
    total = tl.zeros([ROWS, NUMBERS], tl.float32)
    for done in range(0, count, STEPS * ROWS):
        for step in tl.static_range(STEPS):
            row = done + step * ROWS + index
            exists = (row < count) & (number < ROW)[None, :]
            total += tl.load(first[None, :] + row * ROW, exists, other=0.0, eviction_policy="evict_first")
    tl.store(first, tl.sum(total, 0), number < ROW)


@triton.jit(do_not_specialize=["length_h", "length_w", "chunks", "share", "rows"])
def fold_columns_kernel(
    partial,
    grad_rpb,
    length_h,
    length_w,
    before,
    alike,
    all_places,  # as in `sum_classes_kernel`, as the next three
    chunks,
    share,
    rows,
    KERNEL: tl.constexpr,
    STRIDE: tl.constexpr,
    CAUSAL: tl.constexpr,
    QUERY_TILE: tl.constexpr,
    KEY_TILE: tl.constexpr,
    COUNTS: tl.constexpr,
    LEAD: tl.constexpr,
    FIRST: tl.constexpr,
    SPAN: tl.constexpr,
    CLASSES: tl.constexpr,  # at once
    WIDTH: tl.constexpr,  # relative positions of a program
):
    """Adds up the classes' sums by relative position."""
    SIDES: tl.constexpr = (2 * KERNEL[0] - 1, 2 * KERNEL[1] - 1, 2 * KERNEL[2] - 1)
    BLOCKS: tl.constexpr = (SIDES[2] + WIDTH - 1) // WIDTH
    HALF: tl.constexpr = (2, QUERY_TILE[1], QUERY_TILE[2])  # of a block
    DISTANCES: tl.constexpr = 2 * SPAN + 1
    before, alike, places = plain(before), plain(alike), plain(all_places)
    classes_w = places[2] - alike[2] + 1
    classes = (places[1] - alike[1] + 1) * classes_w
    pid = tl.program_id(0)
    line = pid // BLOCKS  # head and relative position along t and h
    head, position_t, position_h = line // SIDES[1] // SIDES[0], line // SIDES[1] % SIDES[0], line % SIDES[1]
    # Lanes along w, whose numbers lie side by side: Triton gives them to the first axis.
    position_w = pid % BLOCKS * WIDTH + tl.arange(0, WIDTH)[:, None, None]
    query = tl.arange(0, QUERIES)[None, :, None]
    inner_t, inner_h, inner_w = unravel(query, HALF)
    # In units of a block's half along t: which number, and the lower bit of the key's place.
    apart_t = position_t - (KERNEL[0] - 1) + inner_t - (4 * (FIRST - LEAD) - 2)
    exists_t = (apart_t >= 0) & (apart_t < 2 * DISTANCES) & (position_w < SIDES[2])
    total = tl.zeros([WIDTH, QUERIES, CLASSES], tl.float32)
    for done in range(0, classes, CLASSES):
        kind = done + tl.arange(0, CLASSES)[None, None, :]
        column, row, _ = rows_of_class(kind // classes_w, kind % classes_w, before, alike, places, chunks, share)
        begin_h, begin_w = column[1] * QUERY_TILE[1], column[2] * QUERY_TILE[2]
        start_h, _ = window(begin_h, length_h, KERNEL[1], STRIDE[1], CAUSAL[1])
        start_w, _ = window(begin_w, length_w, KERNEL[2], STRIDE[2], CAUSAL[2])
        key_h = begin_h - start_h + position_h - (KERNEL[1] - 1) + inner_h
        key_w = begin_w - start_w + position_w - (KERNEL[2] - 1) + inner_w
        exists = exists_t & (key_h >= 0) & (key_h < COUNTS[1] * KEY_TILE[1])
        exists = exists & (key_w >= 0) & (key_w < COUNTS[2] * KEY_TILE[2]) & (kind < classes)
        key = (apart_t % 2 * KEY_TILE[1] + key_h % KEY_TILE[1]) * KEY_TILE[2] + key_w % KEY_TILE[2]
        step = (head * rows + row) * (COUNTS[1] * COUNTS[2]) + key_h // KEY_TILE[1] * COUNTS[2] + key_w // KEY_TILE[2]
        number = (step * DISTANCES + apart_t // 2) * LANES + (query * 4 + key // 2) * 2 + key % 2
        total += tl.load(partial + number, exists, other=0.0)
    result = tl.sum(tl.sum(total, 2), 1)
    place = line * SIDES[2] + pid % BLOCKS * WIDTH + tl.arange(0, WIDTH)
    tl.store(grad_rpb + place, result, pid % BLOCKS * WIDTH + tl.arange(0, WIDTH) < SIDES[2])
