"""The key's and value's gradients by columns; see `columns.py`.

On maps a column meets few others, so that starting takes a good part of a program's time. There, if columns are short,
a program keeps its place, head and dilation group and goes through several *samples*. Its copies run ahead: a sample's
last step starts those of the next one's first column, and the own columns of two samples have room. What comes of a
sample is copied from where its own column was, while the next one is at work. (Programs of the forward pass and of the
query's gradient gain nothing by it, and those of long columns lose.)
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma

from fused_na.triton.columns import (
    COLUMN,
    LEFT,
    LOG2_E,
    RIGHT,
    SCORES,
    STAGES,
    allocate,
    allocate_barriers,
    block,
    fill,
    following,
    initial_of,
    initial_scores,
    neighbors,
    rows_of,
    turned,
)
from fused_na.triton.neighborhood import copy_origin, divided, locate, unravel


@gluon.jit
def load_rows(lse, delta, series, begin, group, dilations, lengths, members, exists, TILE, MOVING: gl.constexpr):
    """Log-sum-exps and deltas of a column of queries, where it exists."""
    NUMBERS: gl.constexpr = 32 if MOVING <= 2 else (64 if MOVING <= 4 else 128)
    BLOCK: gl.constexpr = (4, TILE[1], TILE[2])
    inner = unravel(gl.arange(0, NUMBERS, gl.BlockedLayout([NUMBERS // 32], [32], [1], [0])), BLOCK)
    numbers, is_query = rows_of(series, begin, inner, group, dilations, lengths, members)
    is_query = is_query & (inner[0] < 4 * MOVING) & exists
    return gl.load(lse + numbers, mask=is_query, other=0.0), gl.load(delta + numbers, mask=is_query, other=0.0)


@gluon.jit(
    do_not_specialize=["length_w", "heads", "batches", "apart"],
    do_not_specialize_on_alignment=["length_t", "length_h"],
)
def key_value_columns_kernel(
    query,
    key,
    value,
    rpb,
    lse,
    delta,
    grad_output,
    grad_key,
    grad_value,
    scale,
    length_t,
    length_h,
    length_w,
    dilations,
    divisors,  # as in `key_value_kernel`
    heads,
    batches,
    apart,  # by how much a program's samples differ
    HEADS_PER_KV: gl.constexpr,
    KERNEL: gl.constexpr,
    STRIDE: gl.constexpr,
    CAUSAL: gl.constexpr,
    QUERY_TILE: gl.constexpr,
    KEY_TILE: gl.constexpr,
    DILATED: gl.constexpr,
    AHEAD: gl.constexpr,  # whether a program has several samples
    OWN: gl.constexpr,  # this and the next six: `column_blocks.Blocks`
    MOVING: gl.constexpr,
    LEAD: gl.constexpr,
    MET: gl.constexpr,
    WHOLE: gl.constexpr,
    FIRST: gl.constexpr,
    SPAN: gl.constexpr,
):
    """Gradients of a column of keys and values of some samples. All tensors but `lse` and `delta` as descriptors."""
    HEAD_DIM: gl.constexpr = query.block_type.shape[4]
    BOXES: gl.constexpr = (4 * MOVING + QUERY_TILE[0] - 1) // QUERY_TILE[0]
    PLACES: gl.constexpr = 2 if AHEAD else 1
    own, own_tensors = (allocate(key, PLACES), allocate(value, PLACES)), (key, value)
    moving, buffers = (query, grad_output), (allocate(query, STAGES * BOXES), allocate(grad_output, STAGES * BOXES))
    NUMBERS: gl.constexpr = 32 if MOVING <= 2 else (64 if MOVING <= 4 else 128)
    numbers = gl.allocate_shared_memory(gl.float32, [2, NUMBERS], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    full, own_full = allocate_barriers()

    lengths = (length_t, length_h, length_w)
    heads_kv = heads // HEADS_PER_KV
    rest, group, members, begin = locate(gl.program_id(0), lengths, dilations, divisors, KEY_TILE, DILATED)
    first_sample = divided(rest, divisors[6])
    head_kv = rest - first_sample * heads_kv
    origin = copy_origin(first_sample, group, lengths, DILATED)
    fill(own_tensors, own, own_full, 0, origin, begin, head_kv, True, 1)
    rows, first, counts = neighbors(begin, members, KERNEL, STRIDE, CAUSAL, KEY_TILE, QUERY_TILE, False)
    head = head_kv * HEADS_PER_KV
    query_begin = (begin[0] - 4 * LEAD, first[1], first[2])
    fill(moving, buffers, full, 0, origin, query_begin, head, True, BOXES)
    series = gl.cast(first_sample, gl.int64) * heads + head
    new_lse, new_delta = load_rows(
        lse, delta, series, query_begin, group, dilations, lengths, members, True, QUERY_TILE, MOVING
    )

    factor = scale * LOG2_E
    stage, phase, place, own_phase = 0, 0, 0, 0
    step = (head * 0, head * 0, head * 0)
    samples = gl.cdiv(batches - first_sample, apart) if AHEAD else 1
    for number in range(samples):
        sample, has_next = first_sample + number * apart, number + 1 < samples
        next_sample = sample + apart if AHEAD else sample
        next_origin = copy_origin(next_sample, group, lengths, DILATED)
        grad_k, grad_v = gl.tuple(()), gl.tuple(())
        for _ in gl.static_range(OWN):
            grad_k = grad_k + (gl.zeros([16, HEAD_DIM], gl.float32, SCORES),)
            grad_v = grad_v + (gl.zeros([16, HEAD_DIM], gl.float32, SCORES),)
        mbarrier.wait(own_full.index(place), own_phase)
        steps = counts[0] * counts[1] * HEADS_PER_KV
        for index in range(steps):
            numbers.index(0).store(new_lse * LOG2_E)
            numbers.index(1).store(-new_delta)
            step = following(step, counts, HEADS_PER_KV)
            next_begin = (query_begin[0], first[1] + step[1] * QUERY_TILE[1], first[2] + step[2] * QUERY_TILE[2])
            next_head = head_kv * HEADS_PER_KV + step[0]
            exists = has_next | (index + 1 < steps)
            next_column_origin = gl.where(index + 1 == steps, next_origin, origin)
            fill(moving, buffers, full, stage ^ 1, next_column_origin, next_begin, next_head, exists, BOXES)
            series = gl.cast(gl.where(index + 1 == steps, next_sample, sample), gl.int64) * heads + next_head
            new_lse, new_delta = load_rows(
                lse, delta, series, next_begin, group, dilations, lengths, members, exists, QUERY_TILE, MOVING
            )
            if AHEAD:
                if index == 0:
                    tma.store_wait(0)  # of the sample before, from where the next one comes
                    fill(own_tensors, own, own_full, place ^ 1, next_origin, begin, head_kv, has_next, 1)
            initials = initial_scores(
                rows, rpb, head, begin, query_begin, FIRST, SPAN, KEY_TILE, QUERY_TILE, KERNEL, False
            )
            mbarrier.wait(full.index(stage), phase)
            for b in gl.static_range(MOVING):
                q, grad_o = block(buffers[0], stage, b, BOXES), block(buffers[1], stage, b, BOXES)
                q_columns, grad_columns = q.permute((1, 0)).load(RIGHT), grad_o.permute((1, 0)).load(RIGHT)
                q_rows, grad_rows = q.load(RIGHT), grad_o.load(RIGHT)
                column_lse = numbers.index(0).slice(16 * b, 16).load(COLUMN)
                minus_delta = numbers.index(1).slice(16 * b, 16).load(COLUMN)
                minus_delta = minus_delta[None, :] + gl.zeros([16, 16], gl.float32, SCORES)
                new_k, new_v = gl.tuple(()), gl.tuple(())
                for a in gl.static_range(OWN):
                    gk, gv = grad_k[a], grad_v[a]
                    if (MET >> (a * MOVING + b)) & 1:
                        initial = initial_of(
                            initials,
                            a,
                            b,
                            begin,
                            query_begin,
                            members,
                            MOVING,
                            WHOLE,
                            FIRST,
                            KEY_TILE,
                            QUERY_TILE,
                            KERNEL,
                            STRIDE,
                            CAUSAL,
                            False,
                        )
                        k, v = block(own[0], place, a, 1).load(LEFT), block(own[1], place, a, 1).load(LEFT)
                        probabilities = gl.exp2(mma_v2(k, q_columns, initial) * factor - column_lse[None, :])
                        gv = mma_v2(gl.convert_layout(probabilities.to(value.dtype), LEFT), grad_rows, gv)
                        grad_scores = probabilities * mma_v2(v, grad_columns, minus_delta)
                        gk = mma_v2(gl.convert_layout(grad_scores.to(query.dtype), LEFT), q_rows, gk)
                    new_k, new_v = new_k + (gk,), new_v + (gv,)
                grad_k, grad_v = new_k, new_v
            query_begin, head = next_begin, next_head
            stage, phase = turned(stage, phase)

        for a in gl.static_range(OWN):
            block(own[0], place, a, 1).store((grad_k[a] * scale).to(key.dtype))
            block(own[1], place, a, 1).store(grad_v[a].to(value.dtype))
        fence_async_shared()
        target = [origin, begin[0], begin[1], begin[2], head_kv * HEAD_DIM]
        tma.async_copy_shared_to_global(grad_key, target, own[0].index(place))
        tma.async_copy_shared_to_global(grad_value, target, own[1].index(place))
        place, own_phase = turned(place, own_phase)
        origin = next_origin
    tma.store_wait(0)
