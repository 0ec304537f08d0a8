"""The key's and value's gradients for large windows on Hopper, in Gluon; see `wide.py`.

The producer also brings, a stage, the rows of log-sum-exp and delta and the place of the tile, and arrives on `full` a
second time once they are stored.
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

from fused_na.triton.neighborhood import below, clamped, inverse_windows, mask, offset, unravel
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
def advanced(tile, walk, step, QUERY_TILE: gl.constexpr, HEADS_PER_KV: gl.constexpr):
    """The tile of `step`, given that of the step before: each comes once for every head that shares the keys."""
    t, h, w = next_tile(tile, walk, QUERY_TILE, NEVER)
    if HEADS_PER_KV > 1:
        moves = step % HEADS_PER_KV == 0
        t, h, w = gl.where(moves, t, tile[0]), gl.where(moves, h, tile[1]), gl.where(moves, w, tile[2])
    return t, h, w


@gluon.jit
def fill(
    moving,
    ring,
    step,
    batch,
    head,
    heads,
    tile,
    lengths,
    QUERY_TILE: gl.constexpr,
    MASKED: gl.constexpr,
    WIDE: gl.constexpr,
    STAGES: gl.constexpr,
):
    """Copies the queries of a step, the gradients of their outputs, and their rows of log-sum-exp and delta."""
    query, grad_output, lse, delta = moving
    queries, grads, lse_rows, delta_rows, places, full, empty = ring
    QUERIES: gl.constexpr = QUERY_TILE[0] * QUERY_TILE[1] * QUERY_TILE[2]
    inner = unravel(gl.arange(0, QUERIES, gl.BlockedLayout([1], [32], [1], [0])), QUERY_TILE)
    strides = (lengths[1] * lengths[2], lengths[2], 1)
    tokens = lengths[2].to(gl.int64) * lengths[1] * lengths[0]
    base = (batch.to(gl.int64) * heads + head) * tokens + offset(tile, strides, WIDE)
    rows = base + offset(inner, strides, False)
    # These take long, so they are asked for before the wait.
    if MASKED:
        exists = below(tile, inner, lengths)
        row_lse = gl.load(lse + rows, mask=exists, other=0.0)
        row_delta = gl.load(delta + rows, mask=exists, other=0.0)
    else:
        row_lse = gl.load(lse + rows)
        row_delta = gl.load(delta + rows)
    stage = wait_empty(full, empty, step, query.block_type.nbytes + grad_output.block_type.nbytes, STAGES)
    copy_tile(query, queries, full, stage, batch, tile, head)
    copy_tile(grad_output, grads, full, stage, batch, tile, head)
    lse_rows.index(stage).store(row_lse * LOG2_E)
    delta_rows.index(stage).store(-row_delta)
    axis = gl.arange(0, 4, gl.BlockedLayout([1], [32], [1], [0]))
    places.index(stage).store(gl.where(axis == 0, tile[0], gl.where(axis == 1, tile[1], tile[2])))
    mbarrier.arrive(full.index(stage))


@gluon.jit
def produce(
    own_tensors,
    moving,
    keys,
    values,
    own_full,
    ring,
    lengths,
    heads,
    divisors,
    HEADS_PER_KV: gl.constexpr,
    KERNEL: gl.constexpr,
    STRIDE: gl.constexpr,
    CAUSAL: gl.constexpr,
    KEY_TILE: gl.constexpr,
    BOX: gl.constexpr,
    QUERY_TILE: gl.constexpr,
    INTERIOR: gl.constexpr,
    STAGES: gl.constexpr,
    WIDE: gl.constexpr,
):
    """The producer warp."""
    key, value = own_tensors
    batch, head_kv, begin = place_of(lengths, heads // HEADS_PER_KV, divisors, KEY_TILE)
    for i in gl.static_range(2):
        mbarrier.expect(own_full.index(i), key.block_type.nbytes + value.block_type.nbytes)
        box = box_begin(begin, i, KEY_TILE, BOX)
        copy_tile(key, keys, own_full, i, batch, box, head_kv)
        copy_tile(value, values, own_full, i, batch, box, head_kv)

    outer, outer_steps, inner, inner_steps, tile = walks(
        begin, lengths, KERNEL, STRIDE, CAUSAL, KEY_TILE, QUERY_TILE, INTERIOR, True
    )
    masked_steps = outer_steps * HEADS_PER_KV
    for step in range(0, masked_steps):
        head = head_kv * HEADS_PER_KV + step % HEADS_PER_KV
        fill(moving, ring, step, batch, head, heads, tile, lengths, QUERY_TILE, True, WIDE, STAGES)
        tile = advanced(tile, outer, step + 1, QUERY_TILE, HEADS_PER_KV)
    if INTERIOR:
        tile = first_tile(inner)
        for step in range(masked_steps, masked_steps + inner_steps * HEADS_PER_KV):
            head = head_kv * HEADS_PER_KV + step % HEADS_PER_KV
            fill(moving, ring, step, batch, head, heads, tile, lengths, QUERY_TILE, False, WIDE, STAGES)
            tile = advanced(tile, inner, step + 1, QUERY_TILE, HEADS_PER_KV)


@gluon.jit
def place_of_step(places, stage):
    """First query of a step's tile; spares the warpgroups the walk, whose registers they lack."""
    layout: gl.constexpr = gl.BlockedLayout([4], [32], [gl.num_warps()], [0])
    place = places.index(stage).load(layout)
    axis = gl.arange(0, 4, layout)
    t, h = gl.sum(gl.where(axis == 0, place, 0), 0), gl.sum(gl.where(axis == 1, place, 0), 0)
    return t, h, gl.sum(gl.where(axis == 2, place, 0), 0)


@gluon.jit
def packed_product(pairs, x, dtype: gl.constexpr):
    """Packed products of packed numbers with float32, rounded once."""
    even, odd = gl.split(x.reshape([x.shape[0], x.shape[1] // 2, 2]))
    from_bfloat16: gl.constexpr = "shl.b32 even, $1, 16; and.b32 odd, $1, 0xffff0000;"
    from_float16: gl.constexpr = "mov.b32 {low, high}, $1; cvt.f32.f16 even, low; cvt.f32.f16 odd, high;"
    unpack: gl.constexpr = from_bfloat16 if dtype == gl.bfloat16 else from_float16
    name: gl.constexpr = "bf16x2" if dtype == gl.bfloat16 else "f16x2"
    # Not pure, lest it be moved before the wait for the products that are in flight.
    return gl.inline_asm_elementwise(
        "{.reg .b32 even, odd; .reg .b16 low, high; "
        + unpack
        + "mul.f32 even, even, $2; mul.f32 odd, odd, $3; cvt.rn."
        + name
        + ".f32 $0, odd, even;}",
        "=r,r,r,r",
        [pairs, even, odd],
        dtype=gl.int32,
        is_pure=False,
        pack=1,
    )


@gluon.jit
def key_value_step(
    k,
    v,
    ring,
    step,
    steps,
    masks,
    factor,
    grad_scores,
    grad_k,
    grad_v,
    score_layout: gl.constexpr,
    KEY_TILE: gl.constexpr,
    QUERY_TILE: gl.constexpr,
    MASKED: gl.constexpr,
    FIRST: gl.constexpr,
    STAGES: gl.constexpr,
):
    """Packed gradients of a step's scores, `[keys, queries]`, while those of the step before meet their queries.

    Probabilities are rounded before they are multiplied for them, as they are for the value: that halves the registers
    they take, and without it they spill.
    """
    queries, grads, lse_rows, delta_rows, places, full, empty = ring
    QUERIES: gl.constexpr = QUERY_TILE[0] * QUERY_TILE[1] * QUERY_TILE[2]
    HEAD_DIM: gl.constexpr = k.shape[1]
    row_layout: gl.constexpr = gl.SliceLayout(0, score_layout)
    stage = step % STAGES
    nothing = gl.full([k.shape[0], QUERIES], 0.0, gl.float32, score_layout)
    if MASKED:
        start, end, query_inner = masks
        initial = mask(start, end, place_of_step(places, stage), query_inner, KEY_TILE, QUERY_TILE)
    else:
        initial = nothing
    q = matrix(queries, stage, QUERIES, HEAD_DIM)
    grad_o = matrix(grads, stage, QUERIES, HEAD_DIM)
    scores = warpgroup_mma(k, q.permute((1, 0)), initial, use_acc=MASKED, is_async=True)
    # To start from minus delta had ptxas wait for the scores first, in the masked loop of one warpgroup.
    grad_p = warpgroup_mma(v, grad_o.permute((1, 0)), nothing, use_acc=False, is_async=True)
    if FIRST:
        scores = warpgroup_mma_wait(1, deps=[scores])
    else:
        before = matrix(queries, (step - 1) % STAGES, QUERIES, HEAD_DIM)
        grad_k = add_product(grad_scores, before, grad_k)
        scores = warpgroup_mma_wait(2, deps=[scores])
    probabilities = packed(gl.exp2(scores * factor - lse_rows.index(stage).load(row_layout)[None, :]), k.dtype)
    grad_v = add_product(probabilities, grad_o, grad_v)
    if FIRST:
        grad_p = warpgroup_mma_wait(1, deps=[grad_p])
    else:
        grad_p = warpgroup_mma_wait(2, deps=[grad_p])
    grad_p = grad_p + delta_rows.index(stage).load(row_layout)[None, :]
    grad_scores = packed_product(probabilities, grad_p, k.dtype)
    # ptxas moves few of the gradients of scores across this.
    wait_full(full, gl.minimum(step + 1, steps - 1), STAGES)
    if FIRST:
        grad_v = warpgroup_mma_wait(0, deps=[grad_v])
    else:
        grad_k, grad_v = warpgroup_mma_wait(0, deps=[grad_k, grad_v])
        mbarrier.arrive(empty.index((step - 1) % STAGES))
    return grad_scores, grad_k, grad_v


@gluon.jit
def collect(
    grad_key,
    grad_value,
    keys,
    values,
    own_full,
    ring,
    lengths,
    heads,
    divisors,
    scale,
    HEADS_PER_KV: gl.constexpr,
    KERNEL: gl.constexpr,
    STRIDE: gl.constexpr,
    CAUSAL: gl.constexpr,
    KEY_TILE: gl.constexpr,
    BOX: gl.constexpr,
    QUERY_TILE: gl.constexpr,
    INTERIOR: gl.constexpr,
    STAGES: gl.constexpr,
    INDEX: gl.constexpr,
):
    """Warpgroup `INDEX`: the gradients of its box of keys and values."""
    KEYS: gl.constexpr = BOX[0] * BOX[1] * BOX[2]
    QUERIES: gl.constexpr = QUERY_TILE[0] * QUERY_TILE[1] * QUERY_TILE[2]
    HEAD_DIM: gl.constexpr = grad_key.block_type.shape[4]
    score_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, QUERIES, 16])
    width_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HEAD_DIM, 16])

    batch, head_kv, begin = place_of(lengths, heads // HEADS_PER_KV, divisors, KEY_TILE)
    _, outer_steps, _, inner_steps, _ = walks(
        begin, lengths, KERNEL, STRIDE, CAUSAL, KEY_TILE, QUERY_TILE, INTERIOR, True
    )
    masked_steps = outer_steps * HEADS_PER_KV
    steps = masked_steps + inner_steps * HEADS_PER_KV
    own = box_begin(begin, INDEX, KEY_TILE, BOX)
    key_inner = unravel(gl.arange(0, KEYS, gl.SliceLayout(1, score_layout)), BOX)
    start, end = inverse_windows(clamped(own, key_inner, lengths), lengths, KERNEL, STRIDE, CAUSAL)
    query_inner = unravel(gl.arange(0, QUERIES, gl.SliceLayout(0, score_layout)), QUERY_TILE)

    masks = (start, end, query_inner)
    factor = scale * LOG2_E
    k = matrix(keys, INDEX, KEYS, HEAD_DIM)
    v = matrix(values, INDEX, KEYS, HEAD_DIM)
    grad_k = gl.zeros([KEYS, HEAD_DIM], gl.float32, width_layout)
    grad_v = gl.zeros([KEYS, HEAD_DIM], gl.float32, width_layout)
    mbarrier.wait(own_full.index(INDEX), 0)
    wait_full(ring[5], 0, STAGES)
    grad_scores, grad_k, grad_v = key_value_step(
        k, v, ring, 0, steps, masks, factor, 0, grad_k, grad_v, score_layout, KEY_TILE, QUERY_TILE, True, True, STAGES
    )
    for step in range(1, masked_steps):
        grad_scores, grad_k, grad_v = key_value_step(
            k,
            v,
            ring,
            step,
            steps,
            masks,
            factor,
            grad_scores,
            grad_k,
            grad_v,
            score_layout,
            KEY_TILE,
            QUERY_TILE,
            True,
            False,
            STAGES,
        )
    if INTERIOR:
        for step in range(gl.maximum(masked_steps, 1), steps):
            grad_scores, grad_k, grad_v = key_value_step(
                k,
                v,
                ring,
                step,
                steps,
                masks,
                factor,
                grad_scores,
                grad_k,
                grad_v,
                score_layout,
                KEY_TILE,
                QUERY_TILE,
                False,
                False,
                STAGES,
            )
    grad_k = add_product(grad_scores, matrix(ring[0], (steps - 1) % STAGES, QUERIES, HEAD_DIM), grad_k)
    grad_k, grad_v = warpgroup_mma_wait(0, deps=[grad_k, grad_v])
    store_box(grad_value, grad_v, values, INDEX, batch, own, head_kv)
    store_box(grad_key, grad_k * scale, keys, INDEX, batch, own, head_kv)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["length_w", "heads"], do_not_specialize_on_alignment=["length_t", "length_h"])
def key_value_wide_kernel(
    query,
    key,
    value,
    lse,
    delta,
    grad_output,
    grad_key,
    grad_value,
    scale,
    length_t,
    length_h,
    length_w,
    divisors,  # as in `key_value_kernel`
    heads,
    HEADS_PER_KV: gl.constexpr,
    KERNEL: gl.constexpr,
    STRIDE: gl.constexpr,
    CAUSAL: gl.constexpr,
    QUERY_TILE: gl.constexpr,
    KEY_TILE: gl.constexpr,
    BOX: gl.constexpr,  # a warpgroup's half of `KEY_TILE`
    WIDE: gl.constexpr,
    INTERIOR: gl.constexpr,
    STAGES: gl.constexpr,
):
    """What `key_value_kernel` does without bias, additional keys and dilation; all tensors but `lse` and `delta` as
    descriptors."""
    gl.static_assert(STAGES > 2)
    lengths = (length_t, length_h, length_w)
    QUERIES: gl.constexpr = QUERY_TILE[0] * QUERY_TILE[1] * QUERY_TILE[2]
    barrier: gl.constexpr = mbarrier.MBarrierLayout()
    row_layout: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    keys = gl.allocate_shared_memory(key.dtype, [2] + key.block_type.shape, key.layout)
    values = gl.allocate_shared_memory(value.dtype, [2] + value.block_type.shape, value.layout)
    queries = gl.allocate_shared_memory(query.dtype, [STAGES] + query.block_type.shape, query.layout)
    grads = gl.allocate_shared_memory(grad_output.dtype, [STAGES] + grad_output.block_type.shape, grad_output.layout)
    lse_rows = gl.allocate_shared_memory(gl.float32, [STAGES, QUERIES], row_layout)
    delta_rows = gl.allocate_shared_memory(gl.float32, [STAGES, QUERIES], row_layout)
    places = gl.allocate_shared_memory(gl.int32, [STAGES, 4], row_layout)
    own_full = gl.allocate_shared_memory(gl.int64, [2, 1], barrier)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barrier)
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barrier)
    for i in gl.static_range(2):
        mbarrier.init(own_full.index(i), 1)
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), 2)
        mbarrier.init(empty.index(i), 2)
    fence_async_shared()

    ring = (queries, grads, lse_rows, delta_rows, places, full, empty)
    own_tensors = (key, value)
    moving = (query, grad_output, lse, delta)
    # Constants in a tuple that is given a name become tensors, so these calls repeat themselves.
    gl.warp_specialize(
        [
            (
                collect,
                (
                    grad_key,
                    grad_value,
                    keys,
                    values,
                    own_full,
                    ring,
                    lengths,
                    heads,
                    divisors,
                    scale,
                    HEADS_PER_KV,
                    KERNEL,
                    STRIDE,
                    CAUSAL,
                    KEY_TILE,
                    BOX,
                    QUERY_TILE,
                    INTERIOR,
                    STAGES,
                    0,
                ),
            ),
            (
                collect,
                (
                    grad_key,
                    grad_value,
                    keys,
                    values,
                    own_full,
                    ring,
                    lengths,
                    heads,
                    divisors,
                    scale,
                    HEADS_PER_KV,
                    KERNEL,
                    STRIDE,
                    CAUSAL,
                    KEY_TILE,
                    BOX,
                    QUERY_TILE,
                    INTERIOR,
                    STAGES,
                    1,
                ),
            ),
            (
                produce,
                (
                    own_tensors,
                    moving,
                    keys,
                    values,
                    own_full,
                    ring,
                    lengths,
                    heads,
                    divisors,
                    HEADS_PER_KV,
                    KERNEL,
                    STRIDE,
                    CAUSAL,
                    KEY_TILE,
                    BOX,
                    QUERY_TILE,
                    INTERIOR,
                    STAGES,
                    WIDE,
                ),
            ),
        ],
        [4, 1],
        [REGISTERS[0], REGISTERS[1]],
    )
