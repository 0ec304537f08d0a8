"""The forward pass by columns; see `columns.py`."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma
from triton.language.extra.cuda import gdc_wait

from fused_na.triton.columns import (
    LEFT,
    LOG2_E,
    RIGHT,
    ROW,
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
    places,
    rows_of,
    turned,
)
from fused_na.triton.neighborhood import copy_origin, divided, locate
from fused_na.triton.products import log2, reciprocal


@gluon.jit(do_not_specialize=["length_w", "heads"], do_not_specialize_on_alignment=["length_t", "length_h"])
def forward_columns_kernel(
    query,
    key,
    value,
    rpb,
    output,
    lse,
    scale,
    length_t,
    length_h,
    length_w,
    dilations,
    divisors,  # as in `forward_kernel`
    heads,
    HEADS_PER_KV: gl.constexpr,
    KERNEL: gl.constexpr,
    STRIDE: gl.constexpr,
    CAUSAL: gl.constexpr,
    QUERY_TILE: gl.constexpr,
    KEY_TILE: gl.constexpr,
    DILATED: gl.constexpr,
    OVERLAP: gl.constexpr,  # as in `forward_kernel`
    OWN: gl.constexpr,  # this and the next six: `column_blocks.Blocks`
    MOVING: gl.constexpr,
    LEAD: gl.constexpr,
    MET: gl.constexpr,
    WHOLE: gl.constexpr,
    FIRST: gl.constexpr,
    SPAN: gl.constexpr,
):
    """Attends from a column of queries. Query, key, value and output as descriptors."""
    HEAD_DIM: gl.constexpr = query.block_type.shape[4]
    BOXES: gl.constexpr = (4 * MOVING + KEY_TILE[0] - 1) // KEY_TILE[0]
    queries = allocate(query, 1)
    moving, buffers = (key, value), (allocate(key, STAGES * BOXES), allocate(value, STAGES * BOXES))
    full, own_full = allocate_barriers()

    lengths = (length_t, length_h, length_w)
    rest, group, members, begin = locate(gl.program_id(0), lengths, dilations, divisors, QUERY_TILE, DILATED)
    sample = divided(rest, divisors[6])
    head, batch = rest - sample * heads, sample.to(gl.int64)
    head_kv = head // HEADS_PER_KV
    origin = copy_origin(batch, group, lengths, DILATED)
    fill((query,), (queries,), own_full, 0, origin, begin, head, True, 1)
    rows, first, counts = neighbors(begin, members, KERNEL, STRIDE, CAUSAL, QUERY_TILE, KEY_TILE, True)
    key_begin = (begin[0] - 4 * LEAD, first[1], first[2])
    fill(moving, buffers, full, 0, origin, key_begin, head_kv, True, BOXES)
    if OVERLAP:
        gdc_wait()

    factor = scale * LOG2_E
    ones = gl.full([16, 8], 1.0, value.dtype, RIGHT)  # adds up rows
    highest, totals, results = gl.tuple(()), gl.tuple(()), gl.tuple(())
    for _ in gl.static_range(OWN):
        highest = highest + (gl.full([16], -1e30, gl.float32, ROW),)
        totals = totals + (gl.zeros([16, 8], gl.float32, SCORES),)
        results = results + (gl.zeros([16, HEAD_DIM], gl.float32, SCORES),)
    mbarrier.wait(own_full.index(0), 0)
    stage, phase = 0, 0
    step = (head * 0, head * 0, head * 0)
    steps = counts[0] * counts[1]
    for index in range(steps):
        step = following(step, counts, 1)
        next_begin = (key_begin[0], first[1] + step[1] * KEY_TILE[1], first[2] + step[2] * KEY_TILE[2])
        fill(moving, buffers, full, stage ^ 1, origin, next_begin, head_kv, index + 1 < steps, BOXES)
        initials = initial_scores(rows, rpb, head, begin, key_begin, FIRST, SPAN, QUERY_TILE, KEY_TILE, KERNEL, True)
        mbarrier.wait(full.index(stage), phase)
        new_highest, new_totals, new_results = gl.tuple(()), gl.tuple(()), gl.tuple(())
        for a in gl.static_range(OWN):
            q = block(queries, 0, a, 1).load(LEFT)
            scores, top = gl.tuple(()), initials[0]
            for b in gl.static_range(MOVING):
                score = initials[0]  # where it is none
                if (MET >> (a * MOVING + b)) & 1:
                    initial = initial_of(
                        initials,
                        a,
                        b,
                        begin,
                        key_begin,
                        members,
                        MOVING,
                        WHOLE,
                        FIRST,
                        QUERY_TILE,
                        KEY_TILE,
                        KERNEL,
                        STRIDE,
                        CAUSAL,
                        True,
                    )
                    k = block(buffers[0], stage, b, BOXES).permute((1, 0)).load(RIGHT)
                    score = mma_v2(q, k, initial)
                    if (MET >> (a * MOVING)) & ((1 << b) - 1):
                        top = gl.maximum(top, score)
                    else:
                        top = score
                scores = scores + (score,)
            reference = gl.maximum(highest[a], gl.max(top, 1) * factor)
            rescale = gl.exp2(highest[a] - reference)
            total, result = totals[a] * rescale[:, None], results[a] * rescale[:, None]
            for b in gl.static_range(MOVING):
                if (MET >> (a * MOVING + b)) & 1:
                    probabilities = gl.exp2(scores[b] * factor - reference[:, None])
                    probabilities = gl.convert_layout(probabilities.to(value.dtype), LEFT)
                    total = mma_v2(probabilities, ones, total)
                    result = mma_v2(probabilities, block(buffers[1], stage, b, BOXES).load(RIGHT), result)
            new_highest = new_highest + (reference,)
            new_totals, new_results = new_totals + (total,), new_results + (result,)
        highest, totals, results = new_highest, new_totals, new_results
        key_begin = next_begin
        stage, phase = turned(stage, phase)

    for a in gl.static_range(OWN):
        total = gl.max(totals[a], 1)  # of equal ones
        block(queries, 0, a, 1).store((results[a] * reciprocal(total)[:, None]).to(output.dtype))
        block_begin = (begin[0] + 4 * a, begin[1], begin[2])
        numbers, is_query = rows_of(
            batch * heads + head, block_begin, places(QUERY_TILE, ROW), group, dilations, lengths, members
        )
        gl.store(lse + numbers, (highest[a] + log2(total)) / LOG2_E, mask=is_query)
    fence_async_shared()
    tma.async_copy_shared_to_global(output, [origin, begin[0], begin[1], begin[2], head * HEAD_DIM], queries.index(0))
    tma.store_wait(0)
