"""The query's gradient for large windows on Hopper, in Gluon; see `wide.py`."""

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
def fill(key, value, ring, step, batch, tile, head_kv, STAGES: gl.constexpr):
    """Copies the keys and values of a step."""
    keys, values, full, empty = ring
    stage = wait_empty(full, empty, step, key.block_type.nbytes + value.block_type.nbytes, STAGES)
    copy_tile(key, keys, full, stage, batch, tile, head_kv)
    copy_tile(value, values, full, stage, batch, tile, head_kv)


@gluon.jit
def produce(
    own_tensors,
    moving,
    queries,
    grads,
    own_full,
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
    query, grad_output = own_tensors
    key, value = moving
    batch, head, begin = place_of(lengths, heads, divisors, QUERY_TILE)
    for i in gl.static_range(2):
        mbarrier.expect(own_full.index(i), query.block_type.nbytes + grad_output.block_type.nbytes)
        box = box_begin(begin, i, QUERY_TILE, BOX)
        copy_tile(query, queries, own_full, i, batch, box, head)
        copy_tile(grad_output, grads, own_full, i, batch, box, head)

    head_kv = head // HEADS_PER_KV
    outer, outer_steps, inner, inner_steps, tile = walks(
        begin, lengths, KERNEL, STRIDE, CAUSAL, QUERY_TILE, KEY_TILE, INTERIOR, False
    )
    for step in range(0, outer_steps):
        fill(key, value, ring, step, batch, tile, head_kv, STAGES)
        tile = next_tile(tile, outer, KEY_TILE, NEVER)
    if INTERIOR:
        tile = first_tile(inner)
        for step in range(outer_steps, outer_steps + inner_steps):
            fill(key, value, ring, step, batch, tile, head_kv, STAGES)
            tile = next_tile(tile, inner, KEY_TILE, NEVER)


@gluon.jit
def query_step(
    q,
    grad_o,
    ring,
    step,
    steps,
    masks,
    factor,
    row_lse,
    minus_delta,
    grad_scores,
    grad_q,
    score_layout: gl.constexpr,
    QUERY_TILE: gl.constexpr,
    KEY_TILE: gl.constexpr,
    MASKED: gl.constexpr,
    FIRST: gl.constexpr,
    STAGES: gl.constexpr,
):
    """Packed gradients of a step's scores, while those of the step before meet their keys."""
    keys, values, full, empty = ring
    KEYS: gl.constexpr = KEY_TILE[0] * KEY_TILE[1] * KEY_TILE[2]
    HEAD_DIM: gl.constexpr = q.shape[1]
    if MASKED:
        start, end, tile, key_inner = masks
        initial = mask(start, end, tile, key_inner, QUERY_TILE, KEY_TILE)
    else:
        initial = gl.full([q.shape[0], KEYS], 0.0, gl.float32, score_layout)
    k = matrix(keys, step % STAGES, KEYS, HEAD_DIM)
    v = matrix(values, step % STAGES, KEYS, HEAD_DIM)
    scores = warpgroup_mma(q, k.permute((1, 0)), initial, use_acc=MASKED, is_async=True)
    initial_grad = minus_delta[:, None].broadcast_to([q.shape[0], KEYS])
    grad_p = warpgroup_mma(grad_o, v.permute((1, 0)), initial_grad, is_async=True)
    if FIRST:
        scores = warpgroup_mma_wait(1, deps=[scores])
    else:
        grad_q = add_product(grad_scores, matrix(keys, (step - 1) % STAGES, KEYS, HEAD_DIM), grad_q)
        scores = warpgroup_mma_wait(2, deps=[scores])
    probabilities = gl.exp2(scores * factor - row_lse[:, None])
    # ptxas would move the exponentials behind the next wait for products, but not across this one, which is over.
    wait_full(full, step, STAGES)
    if FIRST:
        grad_p = warpgroup_mma_wait(0, deps=[grad_p])
    else:
        grad_p = warpgroup_mma_wait(1, deps=[grad_p])
    grad_scores = packed(probabilities * grad_p, k.dtype)
    wait_full(full, gl.minimum(step + 1, steps - 1), STAGES)
    if not FIRST:
        grad_q = warpgroup_mma_wait(0, deps=[grad_q])
        mbarrier.arrive(empty.index((step - 1) % STAGES))
    return grad_scores, grad_q


@gluon.jit
def attend(
    grad_query,
    output,
    lse,
    grad_lse,
    delta,
    queries,
    grads,
    own_full,
    ring,
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
    """Warpgroup `INDEX`: the gradient of its box of queries, and `delta` of their rows."""
    QUERIES: gl.constexpr = BOX[0] * BOX[1] * BOX[2]
    KEYS: gl.constexpr = KEY_TILE[0] * KEY_TILE[1] * KEY_TILE[2]
    HEAD_DIM: gl.constexpr = grad_query.block_type.shape[4]
    score_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, KEYS, 16])
    width_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HEAD_DIM, 16])
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

    # The output comes by pointers, in the accumulators' layout, so that no sum of a row changes layouts.
    tokens = lengths[2].to(gl.int64) * lengths[1] * lengths[0]
    row = offset(token, (lengths[1] * lengths[2], lengths[2], 1), WIDE)
    output_row = gl.convert_layout(row, gl.SliceLayout(1, width_layout), assert_trivial=True)
    column = gl.arange(0, HEAD_DIM, gl.SliceLayout(0, width_layout))
    output_base = output + (batch.to(gl.int64) * tokens * heads + head) * HEAD_DIM
    o = gl.load(output_base + (output_row * heads * HEAD_DIM)[:, None] + column[None, :])
    row_base = (batch.to(gl.int64) * heads + head) * tokens
    row_lse = gl.load(lse + row_base + row) * LOG2_E
    mbarrier.wait(own_full.index(INDEX), 0)
    grad_o = matrix(grads, INDEX, QUERIES, HEAD_DIM)
    row_delta = gl.sum(o.to(gl.float32) * grad_o.load(width_layout).to(gl.float32), 1)
    row_delta = gl.convert_layout(row_delta, row_layout, assert_trivial=True)
    if grad_lse is not None:
        row_delta -= gl.load(grad_lse + row_base + row)
    gl.store(delta + row_base + row, row_delta, mask=below(own, query_inner, lengths))

    factor = scale * LOG2_E
    # Products of 64 columns read shared memory at its limit: queries in registers spare a quarter of that.
    q = matrix(queries, INDEX, QUERIES, HEAD_DIM).load(gl.DotOperandLayout(0, score_layout, 2))
    grad_q = gl.zeros([QUERIES, HEAD_DIM], gl.float32, width_layout)
    wait_full(ring[2], 0, STAGES)
    masks = (start, end, tile, key_inner)
    grad_scores, grad_q = query_step(
        q,
        grad_o,
        ring,
        0,
        steps,
        masks,
        factor,
        row_lse,
        -row_delta,
        0,
        grad_q,
        score_layout,
        QUERY_TILE,
        KEY_TILE,
        True,
        True,
        STAGES,
    )
    for step in range(1, outer_steps):
        tile = next_tile(tile, outer, KEY_TILE, NEVER)
        masks = (start, end, tile, key_inner)
        grad_scores, grad_q = query_step(
            q,
            grad_o,
            ring,
            step,
            steps,
            masks,
            factor,
            row_lse,
            -row_delta,
            grad_scores,
            grad_q,
            score_layout,
            QUERY_TILE,
            KEY_TILE,
            True,
            False,
            STAGES,
        )
    if INTERIOR:
        for step in range(gl.maximum(outer_steps, 1), steps):
            masks = (start, end, tile, key_inner)
            grad_scores, grad_q = query_step(
                q,
                grad_o,
                ring,
                step,
                steps,
                masks,
                factor,
                row_lse,
                -row_delta,
                grad_scores,
                grad_q,
                score_layout,
                QUERY_TILE,
                KEY_TILE,
                False,
                False,
                STAGES,
            )
    grad_q = add_product(grad_scores, matrix(ring[0], (steps - 1) % STAGES, KEYS, HEAD_DIM), grad_q)
    grad_q = warpgroup_mma_wait(0, deps=[grad_q])
    store_box(grad_query, grad_q * scale, queries, INDEX, batch, own, head)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["length_w", "heads"], do_not_specialize_on_alignment=["length_t", "length_h"])
def query_wide_kernel(
    query,
    key,
    value,
    output,
    lse,
    grad_output,
    grad_lse,
    grad_query,
    delta,
    scale,
    length_t,
    length_h,
    length_w,
    divisors,  # as in `query_kernel`
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
    """What `query_kernel` does without bias, additional keys and dilation; query, key, value and the gradients of
    output and query as descriptors."""
    gl.static_assert(STAGES > 2)
    lengths = (length_t, length_h, length_w)
    barrier: gl.constexpr = mbarrier.MBarrierLayout()
    queries = gl.allocate_shared_memory(query.dtype, [2] + query.block_type.shape, query.layout)
    grads = gl.allocate_shared_memory(grad_output.dtype, [2] + grad_output.block_type.shape, grad_output.layout)
    keys = gl.allocate_shared_memory(key.dtype, [STAGES] + key.block_type.shape, key.layout)
    values = gl.allocate_shared_memory(value.dtype, [STAGES] + value.block_type.shape, value.layout)
    own_full = gl.allocate_shared_memory(gl.int64, [2, 1], barrier)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barrier)
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barrier)
    for i in gl.static_range(2):
        mbarrier.init(own_full.index(i), 1)
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), 1)
        mbarrier.init(empty.index(i), 2)
    fence_async_shared()

    ring = (keys, values, full, empty)
    own_tensors = (query, grad_output)
    moving = (key, value)
    # Constants in a tuple that is given a name become tensors, so these calls repeat themselves.
    gl.warp_specialize(
        [
            (
                attend,
                (
                    grad_query,
                    output,
                    lse,
                    grad_lse,
                    delta,
                    queries,
                    grads,
                    own_full,
                    ring,
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
                    grad_query,
                    output,
                    lse,
                    grad_lse,
                    delta,
                    queries,
                    grads,
                    own_full,
                    ring,
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
                    own_tensors,
                    moving,
                    queries,
                    grads,
                    own_full,
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
