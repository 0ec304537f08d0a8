"""The gradient of the relative positional bias from the rows of sums that `query_bias_columns.py` leaves."""

import triton
import triton.language as tl

from fused_na.triton.bias_places import first_place, plain, shares_of_class
from fused_na.triton.neighborhood import unravel, window

QUERIES = tl.constexpr(8)  # places of a block's rows that lanes tell apart, each with four lanes
STEPS = tl.constexpr(2)  # through the rows, at once


@triton.jit(do_not_specialize=["length_t", "length_h", "length_w", "chunks", "share", "rows"])
def fold_columns_kernel(
    partial,
    grad_rpb,
    length_h,
    length_w,
    before,
    alike,
    all_places,  # along each axis
    chunks,  # items of a place
    share,  # items of a program
    rows,  # of a head
    KERNEL: tl.constexpr,
    STRIDE: tl.constexpr,
    CAUSAL: tl.constexpr,
    QUERY_TILE: tl.constexpr,
    KEY_TILE: tl.constexpr,
    COUNTS: tl.constexpr,
    LEAD: tl.constexpr,
    FIRST: tl.constexpr,
    SPAN: tl.constexpr,
    CLASSES: tl.constexpr,  # along w, at once
    ROWS: tl.constexpr,  # of each of them, in a step
    WIDTH: tl.constexpr,  # relative positions of a program
):
    SIDES: tl.constexpr = (2 * KERNEL[0] - 1, 2 * KERNEL[1] - 1, 2 * KERNEL[2] - 1)
    BLOCKS: tl.constexpr = (SIDES[2] + WIDTH - 1) // WIDTH
    HALF: tl.constexpr = (2, QUERY_TILE[1], QUERY_TILE[2])  # of a block
    NUMBERS: tl.constexpr = 2 * SPAN + 1
    SLOT_SIZE: tl.constexpr = NUMBERS * 64
    ROW: tl.constexpr = COUNTS[1] * COUNTS[2] * SLOT_SIZE
    before, alike, places = plain(before), plain(alike), plain(all_places)
    groups = alike
    classes_h, classes_w = places[1] - groups[1] + 1, places[2] - groups[2] + 1
    pid = tl.program_id(0)
    line = pid // BLOCKS  # head and relative position along t and h
    head, position_t, position_h = line // SIDES[1] // SIDES[0], line // SIDES[1] % SIDES[0], line % SIDES[1]
    position_w = pid % BLOCKS * WIDTH + tl.arange(0, WIDTH)[None, None, :]
    query = tl.arange(0, QUERIES)[None, :, None]
    inner_t, inner_h, inner_w = unravel(query, HALF)
    # In units of a block's half along t: which number, and the lower bit of the key's place.
    apart_t = position_t - (KERNEL[0] - 1) + inner_t - (4 * (FIRST - LEAD) - 2)
    exists_t = (apart_t >= 0) & (apart_t < 2 * NUMBERS)
    index = tl.arange(0, CLASSES * ROWS)[:, None, None]
    total = tl.zeros([CLASSES * ROWS, QUERIES, WIDTH], tl.float32)
    for first_class in range(0, classes_w, CLASSES):
        kind_w = first_class + index // ROWS
        first_w, size_w = shares_of_class(kind_w, before[2], groups[2])
        begin_w = first_w * QUERY_TILE[2]
        start_w, end_w = window(begin_w, length_w, KERNEL[2], STRIDE[2], CAUSAL[2])
        key_w = begin_w - start_w + position_w - (KERNEL[2] - 1) + inner_w
        exists_w = exists_t & (key_w >= 0) & (key_w < COUNTS[2] * KEY_TILE[2]) & (position_w < SIDES[2])
        for kind_h in range(classes_h):
            first_h, size_h = shares_of_class(kind_h, before[1], groups[1])
            begin_h = first_h * QUERY_TILE[1]
            start_h, end_h = window(begin_h, length_h, KERNEL[1], STRIDE[1], CAUSAL[1])
            first_key_h = begin_h - start_h + position_h - (KERNEL[1] - 1)
            if (first_key_h > -QUERY_TILE[1]) & (first_key_h < COUNTS[1] * KEY_TILE[1]):
                key_h = first_key_h + inner_h
                exists = exists_w & (key_h >= 0) & (key_h < COUNTS[1] * KEY_TILE[1])
                column = (apart_t % 2 * KEY_TILE[1] + key_h % KEY_TILE[1]) * KEY_TILE[2] + key_w % KEY_TILE[2]
                number = (key_h // KEY_TILE[1] * COUNTS[2] + key_w // KEY_TILE[2]) * SLOT_SIZE
                number += apart_t // 2 * 64 + (query * 4 + column // 2) * 2 + column % 2
                item = first_place((0, first_h, first_w), (places[0], size_h, size_w), places) * chunks
                item_end = item + places[0] * size_h * size_w * chunks
                count = tl.where(kind_w < classes_w, (item_end - 1) // share - item // share + 1, 0)
                row = head * rows + item // share + index % ROWS + kind_h * classes_w + kind_w
                numbers = partial + (row * ROW + number)
                most = (places[0] * size_h * groups[2] * chunks - 1) // share + 2  # rows of a class along w
                for done in range(0, most, STEPS * ROWS):
                    for step in tl.static_range(STEPS):
                        ahead = done + step * ROWS
                        total += tl.load(numbers + ahead * ROW, exists & (ahead + index % ROWS < count), other=0.0)
    result = tl.sum(tl.sum(total, 1), 0)
    place = line * SIDES[2] + pid % BLOCKS * WIDTH + tl.arange(0, WIDTH)
    tl.store(grad_rpb + place, result, pid % BLOCKS * WIDTH + tl.arange(0, WIDTH) < SIDES[2])
