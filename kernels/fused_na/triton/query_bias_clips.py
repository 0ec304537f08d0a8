"""What `query_bias.py` computes, for several clips at once: gradients of the query and of the relative positional bias.

Its sums by relative position are what keeps most warps off a multiprocessor, so that here four share one set of them. A
program's warps have a sample each and work at the same place and head in lock step. Twice as many warps hide what a
step waits for.

Tiles of keys are met along t first. Of the five groups of planes of a tile, the next tile along t has three again, so
that their biases and sums stay in registers. Each step completes two groups, a pair, which is staged in shared memory,
and a step later, when all warps have staged theirs, every thread adds the samples' numbers, in order, to some of the
sums. Again there are no atomics, and the order of additions is fixed.

The places of a head are tiles of queries, the items of programs such tiles with up to four samples (`bias_places.py`).
Where the class changes, a program writes its sums as a row and starts anew.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier
from triton.language.extra.cuda import gdc_wait

from fused_na.triton.bias_places import plain, share_of_place
from fused_na.triton.neighborhood import (
    below,
    bias_center,
    bias_position,
    clamped,
    mask,
    read_only,
    unravel,
    windows,
)
from fused_na.triton.query_bias import (
    LOG2_E,
    NUMBERS,
    SLOT_SIZE,
    fill,
    fill_own,
    split_planes,
    tile_of,
)
from fused_na.triton.slots import SAMPLES

WARPS = gl.constexpr(SAMPLES)  # of a program, each with a sample


@gluon.jit
def planes_of_samples(tiles, layout: gl.constexpr):
    """The planes of `[sample, 32, 32]` tiles, as of `query_bias.planes_of`: eight times `[sample, lane, number]`."""
    # [sample, plane of queries, query, plane of keys, eight, pair of columns, column]
    split = tiles.reshape([WARPS, 4, 8, 2, 2, 4, 2]).permute((0, 2, 5, 4, 6, 3, 1))
    return split_planes(split.reshape([WARPS, 32, NUMBERS, 2, 2, 2]), layout)


@gluon.jit
def stage_pair(staged, first, second):
    """Leaves two groups' sums, `[sample, lane, number]`, for `add_staged`."""
    staged.store(gl.join(first, second).permute((0, 3, 1, 2)).reshape([WARPS, 64, NUMBERS]))


@gluon.jit
def add_staged(staged, accumulators, pair, layout: gl.constexpr):
    """Adds what is staged to the sums of a pair, sample after sample."""
    sums = accumulators.index(pair).load(gl.SliceLayout(0, layout))
    accumulators.index(pair).store(sums + gl.sum(staged.load(layout), 0))


@gluon.jit
def item_of(
    index,
    chunks,
    before,
    alike,
    places,
    lengths,
    KERNEL: gl.constexpr,
    STRIDE: gl.constexpr,
    CAUSAL: gl.constexpr,
    QUERY_TILE: gl.constexpr,
    KEY_TILE: gl.constexpr,
):
    """Class, first query, first key, counts of tiles of keys and first sample of an item."""
    kind, tile = share_of_place(index // chunks, before, alike, places)
    begin = (tile[0] * QUERY_TILE[0], tile[1] * QUERY_TILE[1], tile[2] * QUERY_TILE[2])
    start, start_end = windows(begin, lengths, KERNEL, STRIDE, CAUSAL)
    last = clamped(begin, (QUERY_TILE[0] - 1, QUERY_TILE[1] - 1, QUERY_TILE[2] - 1), lengths)
    last_start, stop = windows(last, lengths, KERNEL, STRIDE, CAUSAL)
    count_t = gl.cdiv(stop[0] - start[0], KEY_TILE[0])
    count_h = gl.cdiv(stop[1] - start[1], KEY_TILE[1])
    count_w = gl.cdiv(stop[2] - start[2], KEY_TILE[2])
    return kind, begin, start, (count_t, count_h, count_w), index % chunks * WARPS


@gluon.jit
def following_tile(step, item, after, COUNTS: gl.constexpr):
    """The step after `(items ahead, t, h, w)`: a tile of keys of `item` or, one item ahead, of `after`."""
    items, t, h, w = step
    count_t = gl.where(items > 0, after[3][0], item[3][0])
    count_h = gl.where(items > 0, after[3][1], item[3][1])
    count_w = gl.where(items > 0, after[3][2], item[3][2])
    t += 1
    carry = t == count_t
    t = gl.where(carry, 0, t)
    if COUNTS[2] > 1:
        w = gl.where(carry, w + 1, w)
        carry = carry & (w == count_w)
        w = gl.where(carry, 0, w)
    h = gl.where(carry, h + 1, h)
    carry = carry & (h == count_h)
    h = gl.where(carry, 0, h)
    return gl.where(carry, items + 1, items), t, h, w


@gluon.jit
def fill_step(ring, stage, step, item, after, head_kv, exists, KEY_TILE: gl.constexpr):
    """Starts the copies of a step, at most one item ahead, into a stage, where it exists."""
    items, t, h, w = step
    start_t = gl.where(items > 0, after[2][0], item[2][0]) + t * KEY_TILE[0]
    start_h = gl.where(items > 0, after[2][1], item[2][1]) + h * KEY_TILE[1]
    start_w = gl.where(items > 0, after[2][2], item[2][2]) + w * KEY_TILE[2]
    sample = gl.where(items > 0, after[4], item[4])
    fill(ring, stage, sample, (start_t, start_h, start_w), head_kv, exists)


@gluon.jit
def load_group_biases(pointers, number_key, KERNEL: gl.constexpr):
    """Biases of the five groups of a tile of keys, of which the fourth has the keys that are `number_key` from where
    `pointers` point to."""
    biases = gl.tuple(())
    for group in gl.static_range(5):
        group_key = (number_key[0] + (group - 3), number_key[1], number_key[2])
        biases = biases + (read_only(pointers[:, None] + bias_position(group_key, KERNEL)[None, :]),)
    return biases


@gluon.jit(
    do_not_specialize=["length_t", "length_h", "length_w", "batches", "heads", "chunks", "items", "share", "rows"]
)
def query_bias_clips_kernel(
    query,
    key,
    value,
    grad_output,
    output,
    rpb,
    lse,
    grad_lse,
    grad_query,
    delta,
    partial,
    scale,
    length_t,
    length_h,
    length_w,
    before,  # tiles of queries before those that are alike, along each axis: `slots.Slots`; odd, as the next two
    alike,
    places,  # tiles of queries, along each axis
    batches,
    heads,
    chunks,  # of the samples: items of a place
    items,  # of a head
    share,  # items of a program
    rows,  # of a head
    HEADS_PER_KV: gl.constexpr,
    KERNEL: gl.constexpr,
    STRIDE: gl.constexpr,
    CAUSAL: gl.constexpr,
    QUERY_TILE: gl.constexpr,
    KEY_TILE: gl.constexpr,
    PACK: gl.constexpr,  # as in `query_kernel`
    COUNTS: gl.constexpr,  # most tiles of keys of a tile of queries, along each axis
    STAGES: gl.constexpr,
):
    """Gradients and `delta` of a share of the items of one head, and its sums of `ds`: `partial` is
    `[heads, rows, h, w, pair, group, lane, number]`. Query, key, value, incoming gradient and output as descriptors of
    tiles of four samples, of which those beyond the batch are zeros."""
    gl.static_assert(QUERY_TILE[0] == 4 and QUERY_TILE[1] * QUERY_TILE[2] == 8)
    gl.static_assert(KEY_TILE[0] == 2 and KEY_TILE[1] * KEY_TILE[2] == 16)
    gl.static_assert(STAGES == 2)
    HEAD_DIM: gl.constexpr = query.block_type.shape[4]
    PAIRS: gl.constexpr = COUNTS[0] + 2  # of groups, at a place of the tile of keys along h and w
    ALL_PAIRS: gl.constexpr = PAIRS * COUNTS[1] * COUNTS[2]
    QUERY_PLANE: gl.constexpr = (1, QUERY_TILE[1], QUERY_TILE[2])
    KEY_PLANE: gl.constexpr = (1, KEY_TILE[1], KEY_TILE[2])
    PLANE_STEP: gl.constexpr = (2 * KERNEL[1] - 1) * (2 * KERNEL[2] - 1)
    layout: gl.constexpr = gl.NVMMADistributedLayout(
        version=[2, 0], warps_per_cta=[WARPS, 1, 1], instr_shape=[1, 16, 8]
    )
    left: gl.constexpr = gl.DotOperandLayout(0, layout, 2)
    right: gl.constexpr = gl.DotOperandLayout(1, layout, 2)
    rows_layout: gl.constexpr = gl.SliceLayout(2, layout)
    sample_layout: gl.constexpr = gl.SliceLayout(1, rows_layout)
    own_row_layout: gl.constexpr = gl.SliceLayout(0, rows_layout)
    tile_layout: gl.constexpr = gl.SliceLayout(0, layout)  # of what all samples share
    row_layout: gl.constexpr = gl.SliceLayout(1, tile_layout)
    column_layout: gl.constexpr = gl.SliceLayout(0, tile_layout)
    planes_layout: gl.constexpr = gl.BlockedLayout([1, 1, NUMBERS], [1, 32, 1], [WARPS, 1, 1], [2, 1, 0])
    lane_layout: gl.constexpr = gl.SliceLayout(0, planes_layout)
    # A thread adds up two numbers of a pair, over all samples.
    add_layout: gl.constexpr = gl.BlockedLayout([WARPS, 1, 2], [1, 16, 2], [1, WARPS, 1], [2, 1, 0])
    pair_layout: gl.constexpr = gl.SliceLayout(0, add_layout)

    keys = gl.allocate_shared_memory(key.dtype, [STAGES] + key.block_type.shape, key.layout)
    values = gl.allocate_shared_memory(value.dtype, [STAGES] + value.block_type.shape, value.layout)
    own = gl.allocate_shared_memory(query.dtype, [3] + query.block_type.shape, query.layout)
    unswizzled: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    # One pair more takes what is staged while that is nothing yet.
    accumulators = gl.allocate_shared_memory(gl.float32, [ALL_PAIRS + 1, 64, NUMBERS], unswizzled)
    unswizzled_samples: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [2, 1, 0])
    staged = gl.allocate_shared_memory(gl.float32, [WARPS, 64, NUMBERS], unswizzled_samples)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    own_full = gl.allocate_shared_memory(gl.int64, [1, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), 1)
    mbarrier.init(own_full.index(0), 1)
    fence_async_shared()
    no_pair = gl.zeros([64, NUMBERS], gl.float32, pair_layout)
    no_group = gl.zeros([WARPS, 32, NUMBERS], gl.float32, planes_layout)
    for cleared in range(ALL_PAIRS):
        accumulators.index(cleared).store(no_pair)
    ring = (key, value, keys, values, full)
    own_tensors = (query, grad_output, output)

    before, alike, places = plain(before), plain(alike), plain(places)
    pid = gl.program_id(0)
    head = pid % heads  # programs of all heads read the same part of memory at a time
    program = pid // heads
    head_kv = head // HEADS_PER_KV
    begin_item = program * share
    end_item = gl.minimum(begin_item + share, items)
    lengths = (length_t, length_h, length_w)
    tokens = length_w.to(gl.int64) * length_h * length_t
    factor = scale * LOG2_E

    row_inner = unravel(gl.arange(0, 32, row_layout), QUERY_TILE)
    own_row_inner = unravel(gl.arange(0, 32, own_row_layout), QUERY_TILE)
    key_inner = unravel(gl.arange(0, 32, column_layout), KEY_TILE)
    column = gl.arange(0, HEAD_DIM, gl.SliceLayout(0, gl.SliceLayout(1, layout)))
    sample_inner = gl.arange(0, WARPS, sample_layout)
    # In a plane a lane has the keys `lane_key + number_key` of one query.
    lane = gl.arange(0, 32, gl.SliceLayout(1, lane_layout))
    number = gl.arange(0, NUMBERS, gl.SliceLayout(0, lane_layout))
    lane_inner = unravel(lane // 4, QUERY_TILE)
    lane_key = unravel(lane % 4 * 2, KEY_TILE)
    number_key = unravel(number // 2 * 8 + number % 2, KEY_TILE)
    rpb_base = rpb + head * ((2 * KERNEL[0] - 1) * (2 * KERNEL[1] - 1) * (2 * KERNEL[2] - 1)) + bias_center(KERNEL)
    rpb_rows = rpb_base + (bias_position(lane_key, KERNEL) - bias_position(lane_inner, KERNEL))
    gdc_wait()  # for the copy of the biases, which was launched just before
    pair_numbers = (gl.arange(0, 64, gl.SliceLayout(1, pair_layout)) * NUMBERS)[:, None]
    pair_numbers += gl.arange(0, NUMBERS, gl.SliceLayout(0, pair_layout))[None, :]

    # The ring runs on over items: their last step already copies the first tile of the next one.
    item = item_of(begin_item, chunks, before, alike, places, lengths, KERNEL, STRIDE, CAUSAL, QUERY_TILE, KEY_TILE)
    fill_own(own_tensors, own, own_full, item[4], item[1], head, True)
    ahead = (0, 0, 0, 0)
    fill_step(ring, 0, ahead, item, item, head_kv, True, KEY_TILE)
    ahead = following_tile(ahead, item, item, COUNTS)
    stage, phase, own_phase = 0, 0, 0
    for index in range(begin_item, end_item):
        has_after = index + 1 < end_item
        after = item_of(index + 1, chunks, before, alike, places, lengths, KERNEL, STRIDE, CAUSAL, QUERY_TILE, KEY_TILE)
        kind, begin, start, counts, first_sample = item
        row_start, row_end = windows(clamped(begin, row_inner, lengths), lengths, KERNEL, STRIDE, CAUSAL)
        member = clamped(begin, own_row_inner, lengths)
        is_query = below(begin, own_row_inner, lengths)
        is_row = (first_sample + sample_inner < batches)[:, None] & is_query[None, :]
        width_t = (row_end[0] - row_start[0]).to(gl.uint32, bitcast=True)
        lane_start, lane_end = windows(clamped(begin, lane_inner, lengths), lengths, KERNEL, STRIDE, CAUSAL)
        lane_start = (lane_start[0], lane_start[1] - lane_key[1], lane_start[2] - lane_key[2])
        lane_end = (lane_end[0], lane_end[1] - lane_key[1], lane_end[2] - lane_key[2])
        row = (member[0] * length_h + member[1]) * length_w + member[2]
        batch = (first_sample + sample_inner).to(gl.int64)
        token_rows = (batch * heads + head)[:, None] * tokens + row[None, :]
        # Rows outside the map get probability 0 from an infinite log-sum-exp, whatever their scores.
        row_lse = gl.load(lse + token_rows, mask=is_row, other=float("inf")) * LOG2_E
        rpb_lane = rpb_rows + bias_position((start[0] - begin[0], start[1] - begin[1], start[2] - begin[2]), KERNEL)
        biases = load_group_biases(rpb_lane, number_key, KERNEL)

        mbarrier.wait(own_full.index(0), own_phase)
        own_phase = own_phase ^ 1
        q = own.index(0).reshape([WARPS, 32, HEAD_DIM]).load(left)
        grad_o = own.index(1).reshape([WARPS, 32, HEAD_DIM]).load(left)
        o = own.index(2).reshape([WARPS, 32, HEAD_DIM]).load(left)
        row_delta = gl.convert_layout(gl.sum(o.to(gl.float32) * grad_o.to(gl.float32), 2), rows_layout)
        fill_own(own_tensors, own, own_full, after[4], after[1], head, has_after)
        if grad_lse is not None:
            row_delta -= gl.load(grad_lse + token_rows, mask=is_row, other=0.0)
        gl.store(delta + token_rows, row_delta, mask=is_row)
        minus_delta = (-row_delta)[:, :, None] + gl.zeros([WARPS, 32, 32], gl.float32, layout)

        grad_q = gl.zeros([WARPS, 32, HEAD_DIM], gl.float32, layout)
        tile_h, tile_w = 0, 0
        first_pair = 0
        for _ in range(counts[1] * counts[2]):
            key_begin = (start[0], start[1] + tile_h * KEY_TILE[1], start[2] + tile_w * KEY_TILE[2])
            masks = mask(lane_start, lane_end, key_begin, number_key, QUERY_PLANE, KEY_PLANE)
            groups = gl.tuple(())
            for group in gl.static_range(5):
                groups = groups + (biases[group] + masks,)
            rpb_next = rpb_lane + (5 - 3) * PLANE_STEP
            carried = (no_group, no_group, no_group)
            pair = ALL_PAIRS  # nothing is staged yet
            for t in range(counts[0]):
                fill_step(
                    ring, gl.where(stage == 1, 0, 1), ahead, item, after, head_kv, has_after | (ahead[0] == 0), KEY_TILE
                )
                ahead = following_tile(ahead, item, after, COUNTS)
                # Biases of the next tile, of which this one has the first three.
                next_biases = rpb_next[:, None] + bias_position(number_key, KERNEL)[None, :]
                fourth, fifth = read_only(next_biases), read_only(next_biases + PLANE_STEP)
                rpb_next += 2 * PLANE_STEP
                add_staged(staged, accumulators, pair, add_layout)
                pair = first_pair + t
                initial = tile_of(groups, tile_layout)[None, :, :] + gl.zeros([WARPS, 32, 32], gl.float32, layout)

                mbarrier.wait(full.index(stage), phase)
                k = keys.index(stage).reshape([WARPS, 32, HEAD_DIM])
                v = values.index(stage).reshape([WARPS, 32, HEAD_DIM])
                scores = mma_v2(q, k.permute((0, 2, 1)).load(right), initial) * factor
                # The mask along t, in which few of a thread's pairs differ: cheaper than to add it to all of them.
                offset_t = (start[0] + t * KEY_TILE[0] + key_inner[0])[None, :] - row_start[0][:, None]
                is_inside = offset_t.to(gl.uint32, bitcast=True) < width_t[:, None]
                subtrahend = gl.where(is_inside[None, :, :], row_lse[:, :, None], float("inf"))
                probabilities = gl.exp2(scores - subtrahend)
                grad_scores = probabilities * mma_v2(grad_o, v.permute((0, 2, 1)).load(right), minus_delta)
                grad_q = mma_v2(gl.convert_layout(grad_scores.to(key.dtype), left), k.load(right), grad_q)

                planes = planes_of_samples(grad_scores, planes_layout)
                # Two for each plane of queries, the last of which meets the first groups.
                stage_pair(staged, carried[0] + planes[6], carried[1] + planes[7] + planes[4])
                carried = (carried[2] + planes[5] + planes[2], planes[3] + planes[0], planes[1])
                groups = (groups[2], groups[3], groups[4], fourth + masks, fifth + masks)

                phase = gl.where(stage == 1, phase ^ 1, phase)
                stage = gl.where(stage == 1, 0, stage + 1)

            # Biases of the next tiles along h and w, before what waits for all warps.
            tile_w += 1
            carry = tile_w == counts[2]
            tile_h = gl.where(carry, tile_h + 1, tile_h)
            tile_w = gl.where(carry, 0, tile_w)
            apart = (
                start[0] - begin[0],
                start[1] - begin[1] + tile_h * KEY_TILE[1],
                start[2] - begin[2] + tile_w * KEY_TILE[2],
            )
            rpb_lane = rpb_rows + bias_position(apart, KERNEL)
            biases = load_group_biases(rpb_lane, number_key, KERNEL)
            add_staged(staged, accumulators, pair, add_layout)
            stage_pair(staged, carried[0], carried[1])
            add_staged(staged, accumulators, pair + 1, add_layout)
            stage_pair(staged, carried[2], no_group)
            add_staged(staged, accumulators, pair + 2, add_layout)
            first_pair = (tile_h * COUNTS[2] + tile_w) * PAIRS

        base = batch * tokens * heads * PACK + head
        grad_rows = grad_query + (base[:, None] + (row * heads * PACK)[None, :]) * HEAD_DIM
        result = (grad_q * scale).to(grad_query.dtype.element_ty)
        gl.store(grad_rows[:, :, None] + column[None, :][:, None, :], result, mask=is_row[:, :, None])

        if (not has_after) | (after[0] != kind):
            pairs = partial + (head * rows + program + kind) * (ALL_PAIRS * 2 * SLOT_SIZE)
            for written in range(ALL_PAIRS):
                sums = accumulators.index(written).load(pair_layout)
                gl.store(pairs + written * (2 * SLOT_SIZE) + pair_numbers, sums)
                accumulators.index(written).store(no_pair)
        ahead = (ahead[0] - 1, ahead[1], ahead[2], ahead[3])
        item = after
