"""The gradient of the relative positional bias from the rows of sums that programs leave (`bias_places.py`)."""

import triton
import triton.language as tl

from fused_na.triton.bias_places import first_place, groups_of, plain, shares_of_class, tiles_of_share
from fused_na.triton.neighborhood import unravel, window
from fused_na.triton.slots import SLOT

SLOT_SIZE = tl.constexpr(SLOT)
QUERIES = tl.constexpr(8)  # of a plane, each with four lanes
NUMBERS = tl.constexpr(4)  # of a lane, as matrix units give them: two neighbors among each 8 keys
STEPS = tl.constexpr(2)  # through the rows, at once


@triton.jit(do_not_specialize=["length_t", "length_h", "length_w", "chunks", "share", "rows"])
def fold_rows_kernel(
    partial,
    grad_rpb,
    length_t,
    length_h,
    length_w,
    before,  # `slots.Slots`; odd, as the next three
    alike,
    box,
    places,  # along each axis
    chunks,  # items of a place
    share,  # items of a program
    rows,  # of a head
    KERNEL: tl.constexpr,
    STRIDE: tl.constexpr,
    CAUSAL: tl.constexpr,
    QUERY_TILE: tl.constexpr,
    KEY_TILE: tl.constexpr,
    COUNTS: tl.constexpr,
    GROUPS: tl.constexpr,  # slots at a place of the tile of keys along h and w
    MIXED: tl.constexpr,  # whether programs have items of several classes
    CLASSES: tl.constexpr,  # along w, at once
    ROWS: tl.constexpr,  # of each of them, in a step
    WIDTH: tl.constexpr,  # relative positions of a program
):
    """Adds up `WIDTH` relative positions along w of one head: in a row each of a plane's queries meets one in one
    number of one slot. `partial` is `[heads, rows, h, w, group, lane, number]`."""
    tl.static_assert(KEY_TILE[2] % 8 == 0)
    SIDES: tl.constexpr = (2 * KERNEL[0] - 1, 2 * KERNEL[1] - 1, 2 * KERNEL[2] - 1)
    BLOCKS: tl.constexpr = (SIDES[2] + WIDTH - 1) // WIDTH
    ROW: tl.constexpr = COUNTS[1] * COUNTS[2] * GROUPS * SLOT_SIZE
    before, alike, box, places = plain(before), plain(alike), plain(box), plain(places)
    groups = groups_of(alike, box)
    classes = places[0] - groups[0] + 1, places[1] - groups[1] + 1, places[2] - groups[2] + 1
    pid = tl.program_id(0)
    line = pid // BLOCKS  # head and relative position along t and h
    head, position_t, position_h = line // SIDES[1] // SIDES[0], line // SIDES[1] % SIDES[0], line % SIDES[1]
    position_w = pid % BLOCKS * WIDTH + tl.arange(0, WIDTH)[None, None, :]
    query = tl.arange(0, QUERIES)[None, :, None]
    inner_t, inner_h, inner_w = unravel(query, QUERY_TILE)
    index = tl.arange(0, CLASSES * ROWS)[:, None, None]
    total = tl.zeros([CLASSES * ROWS, QUERIES, WIDTH], tl.float32)
    for first_class in range(0, classes[2], CLASSES):
        kind_w = first_class + index // ROWS
        first_w, size_w = shares_of_class(kind_w, before[2], groups[2])
        begin_w = tiles_of_share(first_w, before[2], alike[2], box[2])[0] * QUERY_TILE[2]
        start_w, end_w = window(begin_w, length_w, KERNEL[2], STRIDE[2], CAUSAL[2])
        # Where in the tiles of keys the query meets the relative position.
        key_w = begin_w - start_w + position_w - (KERNEL[2] - 1) + inner_w
        exists_w = (key_w >= 0) & (key_w < COUNTS[2] * KEY_TILE[2]) & (position_w < SIDES[2])
        number_w = key_w // KEY_TILE[2] * (GROUPS * SLOT_SIZE)
        number_w += key_w % 8 // 2 * NUMBERS + key_w % KEY_TILE[2] // 8 * 2 + key_w % 2
        for kind_th in range(classes[0] * classes[1]):
            kind_t, kind_h = kind_th // classes[1], kind_th % classes[1]
            first_t, size_t = shares_of_class(kind_t, before[0], groups[0])
            first_h, size_h = shares_of_class(kind_h, before[1], groups[1])
            begin_t = tiles_of_share(first_t, before[0], alike[0], box[0])[0] * QUERY_TILE[0]
            begin_h = tiles_of_share(first_h, before[1], alike[1], box[1])[0] * QUERY_TILE[1]
            start_t, end_t = window(begin_t, length_t, KERNEL[0], STRIDE[0], CAUSAL[0])
            start_h, end_h = window(begin_h, length_h, KERNEL[1], STRIDE[1], CAUSAL[1])
            # Groups count from where the last plane of queries meets the first key.
            group = begin_t - start_t + position_t - (KERNEL[0] - 1) + (QUERY_TILE[0] - 1)
            first_key_h = begin_h - start_h + position_h - (KERNEL[1] - 1)
            is_met = (group >= 0) & (group < COUNTS[0] * KEY_TILE[0] + QUERY_TILE[0] - 1)
            is_met &= (first_key_h > -QUERY_TILE[1]) & (first_key_h < COUNTS[1] * KEY_TILE[1])
            if is_met:
                key_h = first_key_h + inner_h
                exists = exists_w & (key_h >= 0) & (key_h < COUNTS[1] * KEY_TILE[1])
                number_h = key_h // KEY_TILE[1] * (COUNTS[2] * GROUPS * SLOT_SIZE)
                number_h += key_h % KEY_TILE[1] * (KEY_TILE[2] // 8 * 2) + query * (4 * NUMBERS)
                # A class has the rows of all programs from that of its first item to that of its last.
                item = first_place((first_t, first_h, first_w), (size_t, size_h, size_w), places) * chunks
                item_end = item + size_t * size_h * size_w * chunks
                count = tl.where(kind_w < classes[2], (item_end - 1) // share - item // share + 1, 0)
                row = head * rows + item // share + index % ROWS
                if MIXED:
                    row += kind_th * classes[2] + kind_w
                numbers = partial + (row * ROW + (number_w + (number_h + group * SLOT_SIZE)))
                most = (size_t * size_h * groups[2] * chunks - 1) // share + 2  # rows of a class along w
                for done in range(0, most, STEPS * ROWS):
                    for step in tl.static_range(STEPS):
                        ahead = done + step * ROWS
                        total += tl.load(numbers + ahead * ROW, exists & (ahead + index % ROWS < count), other=0.0)
    result = tl.sum(tl.sum(total, 1), 0)
    place = line * SIDES[2] + pid % BLOCKS * WIDTH + tl.arange(0, WIDTH)
    tl.store(grad_rpb + place, result, pid % BLOCKS * WIDTH + tl.arange(0, WIDTH) < SIDES[2])
