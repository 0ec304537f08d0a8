"""The forward kernel for large windows on Hopper, in Gluon; see `wide.py`.

Each warpgroup has the product of the next scores and that of the last probabilities with their values in flight while
it works on the softmax between them, as in FlashAttention-3 (https://arxiv.org/abs/2407.08608, section 3.2).

Of `steps` tiles, step `i` in `0 .. steps` reads keys `i` and values `i - 1`, so these share a stage of the ring and its
barriers: step 0 has no values, step `steps` no keys. Warpgroups release step `i - 1` in step `i` and wait for step
`i + 1` at its end, which takes two stages.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from fused_na.triton.neighborhood import below, clamped, mask, offset, unravel, windows
from fused_na.triton.walk import NEVER, first_tile, next_tile
from fused_na.triton.wide import (
    LOG2_E,
    REGISTERS,
    add_product,
    box_begin,
    copy_tile,
    matrix,
    packed,
    place_of,
    store_box,
    wait_empty,
    wait_full,
    walks,
)


@gluon.jit
def fill(key, value, ring, step, batch, key_tile, value_tile, head, STAGES: gl.constexpr):
    """Copies the keys and values of a step."""
    stage = wait_empty(ring[2], ring[3], step, key.block_type.nbytes + value.block_type.nbytes, STAGES)
    copy_tile(key, ring[0], ring[2], stage, batch, key_tile, head)
    copy_tile(value, ring[1], ring[2], stage, batch, value_tile, head)


@gluon.jit
def produce(
    tensors,
    queries,
    query_full,
    ring,
    lengths,
    heads,
    divisors,
    HEADS_PER_KV: gl.constexpr,
    KERNEL: gl.constexpr,
    STRIDE: gl.constexpr,
    CAUSAL: gl.constexpr,
    QUERY_TILE: gl.constexpr,
    BOX: gl.constexpr,
    KEY_TILE: gl.constexpr,
    INTERIOR: gl.constexpr,
    STAGES: gl.constexpr,
):
    """The producer warp."""
    query, key, value = tensors
    batch, head, begin = place_of(lengths, heads, divisors, QUERY_TILE)
    for i in gl.static_range(2):
        mbarrier.expect(query_full.index(i), query.block_type.nbytes)
        copy_tile(query, queries, query_full, i, batch, box_begin(begin, i, QUERY_TILE, BOX), head)

    head_kv = head // HEADS_PER_KV
    outer, outer_steps, inner, inner_steps, tile = walks(
        begin, lengths, KERNEL, STRIDE, CAUSAL, QUERY_TILE, KEY_TILE, INTERIOR, False
    )
    steps = outer_steps + inner_steps
    stage = wait_empty(ring[2], ring[3], 0, key.block_type.nbytes, STAGES)
    copy_tile(key, ring[0], ring[2], stage, batch, tile, head_kv)
    for step in range(1, outer_steps):
        upcoming = next_tile(tile, outer, KEY_TILE, NEVER)
        fill(key, value, ring, step, batch, upcoming, tile, head_kv, STAGES)
        tile = upcoming
    if INTERIOR:
        upcoming = first_tile(inner)
        if outer_steps == 0:
            upcoming = next_tile(tile, inner, KEY_TILE, NEVER)
        for step in range(gl.maximum(outer_steps, 1), steps):
            fill(key, value, ring, step, batch, upcoming, tile, head_kv, STAGES)
            tile = upcoming
            upcoming = next_tile(tile, inner, KEY_TILE, NEVER)
    stage = wait_empty(ring[2], ring[3], steps, value.block_type.nbytes, STAGES)
    copy_tile(value, ring[1], ring[2], stage, batch, tile, head_kv)


@gluon.jit
def highest_of_rows(scores):
    """`gl.max(scores, 1)` in few dependent steps: a thread first compares numbers of several places."""
    ROWS: gl.constexpr = scores.shape[0]
    PLACES: gl.constexpr = scores.shape[1] // 32
    parts = gl.max(scores.reshape([ROWS, PLACES, 32]), 1)
    return gl.convert_layout(gl.max(parts, 1), gl.SliceLayout(1, scores.type.layout), assert_trivial=True)


@gluon.jit
def sums_of_threads(probabilities):
    """Sums of rows, still apart by columns modulo 8 so that no thread needs another's: `[rows, 8]`."""
    return gl.sum(probabilities.reshape([probabilities.shape[0], probabilities.shape[1] // 8, 8]), 1)


@gluon.jit
def softmax(scores, dtype: gl.constexpr, factor, highest, total):
    """Packed probabilities of scores that are yet to be multiplied by `factor > 0`, the new highest scores and sums of
    rows, and what all that came before is to be multiplied by."""
    new_highest = gl.maximum(highest, highest_of_rows(scores) * factor)
    probabilities = gl.exp2(scores * factor - new_highest[:, None])
    rescale = gl.exp2(highest - new_highest)
    total_row: gl.constexpr = gl.SliceLayout(1, total.type.layout)
    total = total * gl.convert_layout(rescale, total_row, assert_trivial=True)[:, None]
    return packed(probabilities, dtype), new_highest, total + sums_of_threads(probabilities), rescale


@gluon.jit
def attend_step(
    q,
    ring,
    step,
    masks,
    factor,
    state,
    accumulator,
    score_layout: gl.constexpr,
    QUERY_TILE: gl.constexpr,
    KEY_TILE: gl.constexpr,
    MASKED: gl.constexpr,
    STAGES: gl.constexpr,
):
    """Scores of a step and their softmax, while the probabilities of the step before meet their values."""
    keys, values, _, empty = ring
    probabilities, highest, total, _ = state
    KEYS: gl.constexpr = KEY_TILE[0] * KEY_TILE[1] * KEY_TILE[2]
    if MASKED:
        start, end, tile, key_inner = masks
        initial = mask(start, end, tile, key_inner, QUERY_TILE, KEY_TILE)
    else:
        initial = gl.full([q.shape[0], KEYS], 0.0, gl.float32, score_layout)
    k = matrix(keys, step % STAGES, KEYS, accumulator.shape[1])
    scores = warpgroup_mma(q, k.permute((1, 0)), initial, use_acc=MASKED, is_async=True)
    v = matrix(values, step % STAGES, KEYS, accumulator.shape[1])
    accumulator = add_product(probabilities, v, accumulator)
    mbarrier.arrive(empty.index((step - 1) % STAGES))

    scores = warpgroup_mma_wait(1, deps=[scores])
    state = softmax(scores, values.dtype, factor, highest, total)
    # ptxas would move the softmax behind the second wait for products, but not across this one for a barrier.
    wait_full(ring[2], step + 1, STAGES)
    accumulator = warpgroup_mma_wait(0, deps=[accumulator])
    row: gl.constexpr = gl.SliceLayout(1, accumulator.type.layout)
    return state, accumulator * gl.convert_layout(state[3], row, assert_trivial=True)[:, None]


@gluon.jit
def attend(
    output,
    queries,
    query_full,
    ring,
    lse,
    lengths,
    heads,
    divisors,
    scale,
    KERNEL: gl.constexpr,
    STRIDE: gl.constexpr,
    CAUSAL: gl.constexpr,
    QUERY_TILE: gl.constexpr,
    BOX: gl.constexpr,
    KEY_TILE: gl.constexpr,
    INTERIOR: gl.constexpr,
    STAGES: gl.constexpr,
    WIDE: gl.constexpr,
    INDEX: gl.constexpr,
):
    """Warpgroup `INDEX`: attends from its box of queries and writes their output."""
    QUERIES: gl.constexpr = BOX[0] * BOX[1] * BOX[2]
    KEYS: gl.constexpr = KEY_TILE[0] * KEY_TILE[1] * KEY_TILE[2]
    HEAD_DIM: gl.constexpr = output.block_type.shape[4]
    score_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, KEYS, 16])
    output_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HEAD_DIM, 16])
    row_layout: gl.constexpr = gl.SliceLayout(1, score_layout)

    batch, head, begin = place_of(lengths, heads, divisors, QUERY_TILE)
    outer, outer_steps, inner, inner_steps, tile = walks(
        begin, lengths, KERNEL, STRIDE, CAUSAL, QUERY_TILE, KEY_TILE, INTERIOR, False
    )
    steps = outer_steps + inner_steps

    own = box_begin(begin, INDEX, QUERY_TILE, BOX)
    query_inner = unravel(gl.arange(0, QUERIES, row_layout), BOX)
    token = clamped(own, query_inner, lengths)
    start, end = windows(token, lengths, KERNEL, STRIDE, CAUSAL)
    key_inner = unravel(gl.arange(0, KEYS, gl.SliceLayout(0, score_layout)), KEY_TILE)

    factor = scale * LOG2_E
    keys, values, full, _ = ring
    q = matrix(queries, INDEX, QUERIES, HEAD_DIM)
    mbarrier.wait(query_full.index(INDEX), 0)
    wait_full(full, 0, STAGES)
    k = matrix(keys, 0, KEYS, HEAD_DIM)
    initial = mask(start, end, tile, key_inner, QUERY_TILE, KEY_TILE)
    scores = warpgroup_mma(q, k.permute((1, 0)), initial, is_async=True)
    scores = warpgroup_mma_wait(0, deps=[scores])
    highest = gl.full([QUERIES], -1e30, gl.float32, row_layout)
    state = softmax(scores, values.dtype, factor, highest, gl.zeros_like(sums_of_threads(scores)))
    accumulator = gl.zeros([QUERIES, HEAD_DIM], gl.float32, output_layout)
    wait_full(ring[2], 1, STAGES)

    for step in range(1, outer_steps):
        tile = next_tile(tile, outer, KEY_TILE, NEVER)
        masks = (start, end, tile, key_inner)
        state, accumulator = attend_step(
            q, ring, step, masks, factor, state, accumulator, score_layout, QUERY_TILE, KEY_TILE, True, STAGES
        )
    if INTERIOR:
        for step in range(gl.maximum(outer_steps, 1), steps):
            masks = (start, end, tile, key_inner)
            state, accumulator = attend_step(
                q, ring, step, masks, factor, state, accumulator, score_layout, QUERY_TILE, KEY_TILE, False, STAGES
            )
    probabilities, highest, total, _ = state
    v = matrix(values, steps % STAGES, KEYS, HEAD_DIM)
    accumulator = add_product(probabilities, v, accumulator)
    accumulator = warpgroup_mma_wait(0, deps=[accumulator])
    total = gl.convert_layout(gl.sum(total, 1), row_layout, assert_trivial=True)

    accumulator = accumulator * gl.convert_layout(1.0 / total, gl.SliceLayout(1, output_layout))[:, None]
    store_box(output, accumulator, queries, INDEX, batch, own, head)
    tokens = lengths[2].to(gl.int64) * lengths[1] * lengths[0]
    row = offset(token, (lengths[1] * lengths[2], lengths[2], 1), WIDE)
    lse_row = lse + (batch.to(gl.int64) * heads + head) * tokens + row
    gl.store(lse_row, (highest + gl.log2(total)) / LOG2_E, mask=below(own, query_inner, lengths))
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["length_w", "heads"], do_not_specialize_on_alignment=["length_t", "length_h"])
def forward_wide_kernel(
    query,
    key,
    value,
    output,
    lse,
    scale,
    length_t,
    length_h,
    length_w,
    divisors,  # as in `forward_kernel`
    heads,
    HEADS_PER_KV: gl.constexpr,
    KERNEL: gl.constexpr,
    STRIDE: gl.constexpr,
    CAUSAL: gl.constexpr,
    QUERY_TILE: gl.constexpr,
    BOX: gl.constexpr,  # a warpgroup's half of `QUERY_TILE`
    KEY_TILE: gl.constexpr,
    WIDE: gl.constexpr,
    INTERIOR: gl.constexpr,
    STAGES: gl.constexpr,
):
    """What `forward_kernel` does without bias, additional keys and dilation; all tensors but `lse` as descriptors."""
    lengths = (length_t, length_h, length_w)
    barrier: gl.constexpr = mbarrier.MBarrierLayout()
    queries = gl.allocate_shared_memory(query.dtype, [2] + query.block_type.shape, query.layout)
    keys = gl.allocate_shared_memory(key.dtype, [STAGES] + key.block_type.shape, key.layout)
    values = gl.allocate_shared_memory(value.dtype, [STAGES] + value.block_type.shape, value.layout)
    query_full = gl.allocate_shared_memory(gl.int64, [2, 1], barrier)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barrier)
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barrier)
    for i in gl.static_range(2):
        mbarrier.init(query_full.index(i), 1)
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), 1)
        mbarrier.init(empty.index(i), 2)
    fence_async_shared()

    ring = (keys, values, full, empty)
    tensors = (query, key, value)
    # Constants in a tuple that is given a name become tensors, so these calls repeat themselves.
    gl.warp_specialize(
        [
            (
                attend,
                (
                    output,
                    queries,
                    query_full,
                    ring,
                    lse,
                    lengths,
                    heads,
                    divisors,
                    scale,
                    KERNEL,
                    STRIDE,
                    CAUSAL,
                    QUERY_TILE,
                    BOX,
                    KEY_TILE,
                    INTERIOR,
                    STAGES,
                    WIDE,
                    0,
                ),
            ),
            (
                attend,
                (
                    output,
                    queries,
                    query_full,
                    ring,
                    lse,
                    lengths,
                    heads,
                    divisors,
                    scale,
                    KERNEL,
                    STRIDE,
                    CAUSAL,
                    QUERY_TILE,
                    BOX,
                    KEY_TILE,
                    INTERIOR,
                    STAGES,
                    WIDE,
                    1,
                ),
            ),
            (
                produce,
                (
                    tensors,
                    queries,
                    query_full,
                    ring,
                    lengths,
                    heads,
                    divisors,
                    HEADS_PER_KV,
                    KERNEL,
                    STRIDE,
                    CAUSAL,
                    QUERY_TILE,
                    BOX,
                    KEY_TILE,
                    INTERIOR,
                    STAGES,
                ),
            ),
        ],
        [4, 1],
        [REGISTERS[0], REGISTERS[1]],
    )
