"""The gradient of the query together with that of the relative positional bias, for small windows on Hopper, in Gluon.

At a fixed place on the map a pair's relative position does not depend on the sample. A program, which is one warp, owns
tiles of queries of one head and dilation group and goes through samples for each of them, and adds up `ds` by relative
position: first in registers, over the pairs of a thread that share one, then in shared memory, where every thread has
words of its own. There are no atomics and no exchange between threads, and the order of additions is fixed.

A tile of scores, 32 queries by 32 keys, is seen as planes: the pairs of the queries of one t, 8, and the keys of one t,
16, of which a thread has `NUMBERS`. Planes with the same distance along t have the same relative positions and make a
group, which loads its biases once. A slot, `[lane, number]`, holds the sums of a group at one place along h and w of
its tile of keys. Tiles of keys start at the first window of their tile of queries, so that slots mean the same relative
positions wherever the first key less the first query is the same. Such tiles of queries make a class (`slots.py`), and
a program never mixes classes. `bias_places.py` tells where its sums go, and `fold_rows.py` adds them up.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma
from triton.language.extra.cuda import gdc_wait

from fused_na.triton.bias_places import groups_of, plain, share_of_place, tiles_of_share, unravel_along
from fused_na.triton.neighborhood import (
    below,
    bias_center,
    bias_position,
    clamped,
    copy_origin,
    dilated,
    mask,
    read_only,
    unravel,
    windows,
)
from fused_na.triton.slots import SLOT

LOG2_E = gl.constexpr(1.4426950408889634)
NUMBERS = gl.constexpr(4)  # of a thread in a plane
SLOT_SIZE = gl.constexpr(SLOT)  # numbers of a warp in a plane


@gluon.jit
def split_planes(planes, layout: gl.constexpr):
    """The parts of `[..., 2, 2, 2]`, whose last two dimensions are the plane of queries and the first of them that of
    keys, as `planes_of` orders them."""
    even, odd = gl.split(planes)
    first, third = gl.split(even)
    second, fourth = gl.split(odd)
    parts = gl.split(first) + gl.split(second) + gl.split(third) + gl.split(fourth)
    result = gl.tuple(())
    for i in gl.static_range(8):
        result = result + (gl.convert_layout(parts[i], layout, assert_trivial=True),)
    return result


@gluon.jit
def planes_of(tile, lane_layout: gl.constexpr):
    """The planes of a `[32, 32]` tile, those of the first queries first: eight times `[lane, number]`."""
    # [plane of queries, query, plane of keys, eight, pair of columns, column]; query and pair of columns make the lane.
    split = tile.reshape([4, 8, 2, 2, 4, 2]).permute((1, 4, 3, 5, 2, 0)).reshape([32, NUMBERS, 2, 2, 2])
    return split_planes(split, lane_layout)


@gluon.jit
def tile_of(groups, layout: gl.constexpr):
    """A `[32, 32]` tile whose planes are those of their groups: the inverse of `planes_of`."""
    first, second = gl.join(groups[3], groups[4]), gl.join(groups[2], groups[3])
    third, fourth = gl.join(groups[1], groups[2]), gl.join(groups[0], groups[1])
    tile = gl.join(gl.join(first, third), gl.join(second, fourth))
    tile = tile.reshape([8, 4, 2, 2, 2, 4]).permute((5, 0, 4, 2, 1, 3)).reshape([32, 32])
    return gl.convert_layout(tile, layout, assert_trivial=True)


@gluon.jit
def accumulate(accumulators, grad_scores, slot, lane_layout: gl.constexpr):
    """Adds a tile's pairs to the slots of their groups, the first one at `slot`."""
    planes = planes_of(grad_scores, lane_layout)
    sums = gl.tuple(())
    for group in gl.static_range(5):
        total = accumulators.index(slot + group).load(lane_layout)
        for i in gl.static_range(8):
            if i % 2 - i // 2 + 3 == group:
                total = total + planes[i]
        sums = sums + (total,)
    for group in gl.static_range(5):
        accumulators.index(slot + group).store(sums[group])


@gluon.jit
def following(step, counts, COUNTS: gl.constexpr):
    """The step after `(sample, t, h, w)`, whose tile of keys is counted along each axis; of `counts` tiles, of which no
    tile of queries has more than `COUNTS`."""
    sample, t, h, w = step
    carry = w == w
    if COUNTS[2] > 1:
        w += 1
        carry = w == counts[2]
        w = gl.where(carry, 0, w)
    if COUNTS[1] > 1:
        h = gl.where(carry, h + 1, h)
        carry = h == counts[1]
        h = gl.where(carry, 0, h)
    if COUNTS[0] > 1:
        t = gl.where(carry, t + 1, t)
        carry = t == counts[0]
        t = gl.where(carry, 0, t)
    return gl.where(carry, sample + 1, sample), t, h, w


@gluon.jit
def tile_begin(start, step, KEY_TILE: gl.constexpr):
    """First key of a step's tile."""
    return start[0] + step[1] * KEY_TILE[0], start[1] + step[2] * KEY_TILE[1], start[2] + step[3] * KEY_TILE[2]


@gluon.jit
def fill(ring, stage, origin, begin, head_kv, exists):
    """Starts the copies of a tile of keys and their values into a stage, where it exists. It begins at `begin` of the
    sample at `origin`, as of `copy_origin`."""
    key, value, keys, values, full = ring
    place = [origin, begin[0], begin[1], begin[2], head_kv * key.block_type.shape[4]]
    mbarrier.expect(full.index(stage), key.block_type.nbytes + value.block_type.nbytes, pred=exists)
    tma.async_copy_global_to_shared(key, place, full.index(stage), keys.index(stage), pred=exists)
    tma.async_copy_global_to_shared(value, place, full.index(stage), values.index(stage), pred=exists)


@gluon.jit
def fill_own(tensors, own, own_full, origin, begin, head, exists):
    """Starts the copies of a tile of queries, incoming gradients and outputs, where it exists."""
    place = [origin, begin[0], begin[1], begin[2], head * tensors[0].block_type.shape[4]]
    mbarrier.expect(own_full.index(0), 3 * tensors[0].block_type.nbytes, pred=exists)
    for i in gl.static_range(3):
        tma.async_copy_global_to_shared(tensors[i], place, own_full.index(0), own.index(i), pred=exists)


@gluon.jit(do_not_specialize=["length_t", "length_h", "length_w", "batches", "heads", "samples_per_program", "chunks"])
def query_bias_kernel(
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
    dilations,
    before,  # tiles of queries before those that are alike, along each axis: `slots.Slots`; odd, as the next three
    alike,
    box,  # of tiles that are alike, most of a program
    places,  # shares of the tiles, along each axis
    batches,
    heads,
    samples_per_program,
    chunks,  # of the samples, for each dilation group: programs of a head and place
    HEADS_PER_KV: gl.constexpr,
    KERNEL: gl.constexpr,
    STRIDE: gl.constexpr,
    CAUSAL: gl.constexpr,
    QUERY_TILE: gl.constexpr,
    KEY_TILE: gl.constexpr,
    PACK: gl.constexpr,  # as in `query_kernel`
    DILATED: gl.constexpr,
    COUNTS: gl.constexpr,  # most tiles of keys of a tile of queries, along each axis
    GROUPS: gl.constexpr,  # slots at a place of the tile of keys along h and w
    STAGES: gl.constexpr,
):
    """Gradients and `delta` of a share of the tiles of queries, of one head, one dilation group and some samples, and
    its sums of `ds`: `partial` is `[heads, rows, h, w, group, lane, number]`. Query, key, value, incoming gradient and
    output as descriptors; dilations divide the lengths."""
    gl.static_assert(QUERY_TILE[0] == 4 and QUERY_TILE[1] * QUERY_TILE[2] == 8)
    gl.static_assert(KEY_TILE[0] == 2 and KEY_TILE[1] * KEY_TILE[2] == 16)
    HEAD_DIM: gl.constexpr = query.block_type.shape[4]
    SLOTS: gl.constexpr = COUNTS[1] * COUNTS[2] * GROUPS
    QUERY_PLANE: gl.constexpr = (1, QUERY_TILE[1], QUERY_TILE[2])
    KEY_PLANE: gl.constexpr = (1, KEY_TILE[1], KEY_TILE[2])
    layout: gl.constexpr = gl.NVMMADistributedLayout(version=[2, 0], warps_per_cta=[1, 1], instr_shape=[16, 8])
    left: gl.constexpr = gl.DotOperandLayout(0, layout, 2)
    right: gl.constexpr = gl.DotOperandLayout(1, layout, 2)
    row_layout: gl.constexpr = gl.SliceLayout(1, layout)
    column_layout: gl.constexpr = gl.SliceLayout(0, layout)
    lane_layout: gl.constexpr = gl.BlockedLayout([1, NUMBERS], [32, 1], [1, 1], [1, 0])

    keys = gl.allocate_shared_memory(key.dtype, [STAGES] + key.block_type.shape, key.layout)
    values = gl.allocate_shared_memory(value.dtype, [STAGES] + value.block_type.shape, value.layout)
    own = gl.allocate_shared_memory(query.dtype, [3] + query.block_type.shape, query.layout)
    unswizzled: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    accumulators = gl.allocate_shared_memory(gl.float32, [SLOTS, 32, NUMBERS], unswizzled)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    own_full = gl.allocate_shared_memory(gl.int64, [1, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), 1)
    mbarrier.init(own_full.index(0), 1)
    fence_async_shared()
    for cleared in range(SLOTS):
        accumulators.index(cleared).store(gl.zeros([32, NUMBERS], gl.float32, lane_layout))
    ring = (key, value, keys, values, full)
    own_tensors = (query, grad_output, output)

    before, alike, box, places = plain(before), plain(alike), plain(box), plain(places)
    pid = gl.program_id(0)  # the row that it leaves
    chunk, rest = pid % chunks, pid // chunks
    all_places = places[0] * places[1] * places[2]
    share = share_of_place(rest % all_places, before, groups_of(alike, box), places)[1]
    tile_t, tiles_t = tiles_of_share(share[0], before[0], alike[0], box[0])
    tile_h, tiles_h = tiles_of_share(share[1], before[1], alike[1], box[1])
    tile_w, tiles_w = tiles_of_share(share[2], before[2], alike[2], box[2])
    head = rest // all_places
    head_kv = head // HEADS_PER_KV
    dilation_group = (0, 0, 0)
    lengths = (length_t, length_h, length_w)
    if DILATED:
        all_groups = dilations[0] * dilations[1] * dilations[2]
        dilation_group, chunk = unravel_along(chunk % all_groups, dilations), chunk // all_groups
        lengths = (length_t // dilations[0], length_h // dilations[1], length_w // dilations[2])
    first_sample = chunk * samples_per_program
    samples = gl.minimum(samples_per_program, batches - first_sample)
    tokens = length_w.to(gl.int64) * length_h * length_t
    first_origin = copy_origin(first_sample, dilation_group, (length_t, length_h, length_w), DILATED)
    samples_apart = length_t * length_h * length_w if DILATED else 1
    factor = scale * LOG2_E

    row_inner = unravel(gl.arange(0, 32, row_layout), QUERY_TILE)
    key_inner = unravel(gl.arange(0, 32, column_layout), KEY_TILE)
    column = gl.arange(0, HEAD_DIM, column_layout)
    # In a plane a lane has the keys `lane_key + number_key` of one query.
    lane = gl.arange(0, 32, gl.SliceLayout(1, lane_layout))
    number = gl.arange(0, NUMBERS, gl.SliceLayout(0, lane_layout))
    lane_inner = unravel(lane // 4, QUERY_TILE)
    lane_key = unravel(lane % 4 * 2, KEY_TILE)
    number_key = unravel(number // 2 * 8 + number % 2, KEY_TILE)
    rpb_base = rpb + head * ((2 * KERNEL[0] - 1) * (2 * KERNEL[1] - 1) * (2 * KERNEL[2] - 1)) + bias_center(KERNEL)
    rpb_rows = rpb_base + (bias_position(lane_key, KERNEL) - bias_position(lane_inner, KERNEL))
    gdc_wait()  # for the copy of the biases, which was launched just before

    stage, phase, own_phase = 0, 0, 0
    for index in range(tiles_t * tiles_h * tiles_w):
        t, h, w = unravel_along(index, (tiles_t, tiles_h, tiles_w))
        begin = ((tile_t + t) * QUERY_TILE[0], (tile_h + h) * QUERY_TILE[1], (tile_w + w) * QUERY_TILE[2])
        member = clamped(begin, row_inner, lengths)
        is_query = below(begin, row_inner, lengths)
        token = dilated(dilation_group, member, dilations)
        row = (token[0] * length_h + token[1]) * length_w + token[2]
        row_start, row_end = windows(member, lengths, KERNEL, STRIDE, CAUSAL)
        width_t = (row_end[0] - row_start[0]).to(gl.uint32, bitcast=True)
        lane_start, lane_end = windows(clamped(begin, lane_inner, lengths), lengths, KERNEL, STRIDE, CAUSAL)
        lane_start = (lane_start[0], lane_start[1] - lane_key[1], lane_start[2] - lane_key[2])
        lane_end = (lane_end[0], lane_end[1] - lane_key[1], lane_end[2] - lane_key[2])
        start, start_end = windows(begin, lengths, KERNEL, STRIDE, CAUSAL)
        last = clamped(begin, (QUERY_TILE[0] - 1, QUERY_TILE[1] - 1, QUERY_TILE[2] - 1), lengths)
        last_start, stop = windows(last, lengths, KERNEL, STRIDE, CAUSAL)
        count_t = gl.cdiv(stop[0] - start[0], KEY_TILE[0]) if COUNTS[0] > 1 else 1
        count_h = gl.cdiv(stop[1] - start[1], KEY_TILE[1]) if COUNTS[1] > 1 else 1
        count_w = gl.cdiv(stop[2] - start[2], KEY_TILE[2]) if COUNTS[2] > 1 else 1
        counts = (count_t, count_h, count_w)
        steps = count_t * count_h * count_w
        all_steps = samples * steps

        # The ring runs on over samples: their last step already copies the first tile of the next one.
        fill_own(own_tensors, own, own_full, first_origin, begin, head, True)
        ahead, fill_stage = (0, 0, 0, 0), stage
        for early in gl.static_range(STAGES - 1):
            origin = first_origin + ahead[0] * samples_apart
            fill(ring, fill_stage, origin, tile_begin(start, ahead, KEY_TILE), head_kv, early < all_steps)
            ahead = following(ahead, counts, COUNTS)
            fill_stage = gl.where(fill_stage == STAGES - 1, 0, fill_stage + 1)
        done = 0
        step = (0, 0, 0, 0)
        row_base = (first_sample.to(gl.int64) * heads + head) * tokens
        # Rows outside the map get probability 0 from an infinite log-sum-exp, whatever their scores.
        next_lse = gl.load(lse + row_base + row, mask=is_query, other=float("inf"))
        for sample in range(samples):
            row_lse = next_lse * LOG2_E
            batch = (first_sample + sample).to(gl.int64)
            row_base = (batch * heads + head) * tokens
            has_next = sample + 1 < samples
            if has_next:
                next_lse = gl.load(lse + row_base + heads * tokens + row, mask=is_query, other=float("inf"))
            mbarrier.wait(own_full.index(0), own_phase)
            own_phase = own_phase ^ 1
            q = own.index(0).reshape([32, HEAD_DIM]).load(left)
            grad_o = own.index(1).reshape([32, HEAD_DIM]).load(left)
            o = own.index(2).reshape([32, HEAD_DIM]).load(left)
            row_delta = gl.convert_layout(gl.sum(o.to(gl.float32) * grad_o.to(gl.float32), 1), row_layout)
            next_origin = first_origin + (sample + 1) * samples_apart
            fill_own(own_tensors, own, own_full, next_origin, begin, head, has_next)
            if grad_lse is not None:
                row_delta -= gl.load(grad_lse + row_base + row, mask=is_query, other=0.0)
            gl.store(delta + row_base + row, row_delta, mask=is_query)
            minus_delta = (-row_delta)[:, None] + gl.zeros([32, 32], gl.float32, layout)

            grad_q = gl.zeros([32, HEAD_DIM], gl.float32, layout)
            for _ in range(steps):
                origin, ahead_begin = first_origin + ahead[0] * samples_apart, tile_begin(start, ahead, KEY_TILE)
                fill(ring, fill_stage, origin, ahead_begin, head_kv, done + (STAGES - 1) < all_steps)
                ahead = following(ahead, counts, COUNTS)
                fill_stage = gl.where(fill_stage == STAGES - 1, 0, fill_stage + 1)

                slot = (step[2] * COUNTS[2] + step[3]) * GROUPS + step[1] * 2
                key_begin = tile_begin(start, step, KEY_TILE)
                step = following(step, counts, COUNTS)
                apart = (key_begin[0] - begin[0], key_begin[1] - begin[1], key_begin[2] - begin[2])
                masks = mask(lane_start, lane_end, key_begin, number_key, QUERY_PLANE, KEY_PLANE)
                rpb_step = rpb_rows + bias_position(apart, KERNEL)
                groups = gl.tuple(())
                for group in gl.static_range(5):
                    group_key = (number_key[0] + (group - 3), number_key[1], number_key[2])
                    biases = read_only(rpb_step[:, None] + bias_position(group_key, KERNEL)[None, :])
                    groups = groups + (biases + masks,)
                initial = tile_of(groups, layout)

                mbarrier.wait(full.index(stage), phase)
                k = keys.index(stage).reshape([32, HEAD_DIM])
                v = values.index(stage).reshape([32, HEAD_DIM])
                scores = mma_v2(q, k.permute((1, 0)).load(right), initial) * factor
                # The mask along t, in which few of a thread's pairs differ: cheaper than to add it to all of them.
                offset_t = (key_begin[0] + key_inner[0])[None, :] - row_start[0][:, None]
                is_inside = offset_t.to(gl.uint32, bitcast=True) < width_t[:, None]
                probabilities = gl.exp2(scores - gl.where(is_inside, row_lse[:, None], float("inf")))
                grad_scores = probabilities * mma_v2(grad_o, v.permute((1, 0)).load(right), minus_delta)
                grad_q = mma_v2(gl.convert_layout(grad_scores.to(key.dtype), left), k.load(right), grad_q)
                accumulate(accumulators, grad_scores, slot, lane_layout)

                phase = gl.where(stage == STAGES - 1, phase ^ 1, phase)
                stage = gl.where(stage == STAGES - 1, 0, stage + 1)
                done += 1

            grad_base = grad_query + (batch * tokens * heads * PACK + head) * HEAD_DIM
            grad_rows = grad_base + (row * heads * (PACK * HEAD_DIM))[:, None]
            result = (grad_q * scale).to(grad_query.dtype.element_ty)
            gl.store(grad_rows + column[None, :], result, mask=is_query[:, None])

    own_numbers = partial + pid * (SLOTS * SLOT_SIZE) + (lane * NUMBERS)[:, None] + number[None, :]
    for written in range(SLOTS):
        gl.store(own_numbers + written * SLOT_SIZE, accumulators.index(written).load(lane_layout))
