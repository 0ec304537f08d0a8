"""The forward kernel: one program attends from one tile of queries of one head to the union of their windows."""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_wait

from fused_na.triton.neighborhood import (
    below,
    bias_center,
    bias_position,
    clamped,
    copy_origin,
    dilated,
    divided,
    head_of,
    load_biases,
    load_rows,
    load_tile,
    locate,
    mask,
    offset,
    store_rows,
    store_tile,
    unravel,
    windows,
)
from fused_na.triton.products import log2, product, reciprocal
from fused_na.triton.walk import first_tile, interior, next_tile, part


@triton.jit
def softmax_step(scores, factor, values, highest, total, accumulator, PRECISION: tl.constexpr):
    """One step of the online softmax in base 2, on scores yet to be multiplied by `factor > 0`, -inf where masked.

    `highest` starts finite, so that a row that has seen no key yet yields no NaN. `total`, `[rows, 8]`, holds partial
    sums, which the threads of a row need to exchange at the end only.
    """
    new_highest = tl.maximum(highest, tl.max(scores, 1) * factor)
    probabilities = tl.exp2(scores * factor - new_highest[:, None])
    rescale = tl.exp2(highest - new_highest)
    by_eights = probabilities.reshape(probabilities.shape[0], probabilities.shape[1] // 8, 8)
    total = total * rescale[:, None] + tl.sum(by_eights, 1)
    accumulator = accumulator * rescale[:, None]
    accumulator = product(probabilities.to(values.dtype), values, accumulator, PRECISION=PRECISION)
    return new_highest, total, accumulator


@triton.jit(
    do_not_specialize=["length_w", "heads", "additional"], do_not_specialize_on_alignment=["length_t", "length_h"]
)
def forward_kernel(
    query,
    key,
    value,
    rpb,
    additional_keys,
    additional_values,
    output,
    lse,
    scale,
    length_t,
    length_h,
    length_w,
    dilations,
    divisors,  # by `geometry.divisor`: of the tiles and the dilation of each axis, and of the heads
    heads,
    additional,
    query_strides,  # batch, t, h, w, heads; head_dim is contiguous
    key_strides,
    value_strides,
    additional_keys_strides,  # batch, tokens, heads
    additional_values_strides,
    HEADS_PER_KV: tl.constexpr,
    KERNEL: tl.constexpr,
    STRIDE: tl.constexpr,
    CAUSAL: tl.constexpr,
    QUERY_TILE: tl.constexpr,
    KEY_TILE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_DIM_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    DILATED: tl.constexpr,
    WIDE: tl.constexpr,
    ONE_TILE: tl.constexpr,
    INTERIOR: tl.constexpr,
    TMA: tl.constexpr,
    OWN_TMA: tl.constexpr,
    OVERLAP: tl.constexpr,  # whether the copy of the bias, launched just before, may still be under way
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    LOG2_E: tl.constexpr = 1.4426950408889634
    QUERIES: tl.constexpr = QUERY_TILE[0] * QUERY_TILE[1] * QUERY_TILE[2]
    KEYS: tl.constexpr = KEY_TILE[0] * KEY_TILE[1] * KEY_TILE[2]
    lengths = (length_t, length_h, length_w)

    rest, group, members, begin = locate(tl.program_id(0), lengths, dilations, divisors, QUERY_TILE, DILATED)
    if (begin[0] >= members[0]) | (begin[1] >= members[1]) | (begin[2] >= members[2]):
        return
    sample = divided(rest, divisors[6])
    head, batch = rest - sample * heads, sample.to(tl.int64)
    head_kv = head // HEADS_PER_KV
    origin = copy_origin(batch, group, lengths, DILATED)

    inner = unravel(tl.arange(0, QUERIES), QUERY_TILE)
    member = clamped(begin, inner, members)
    is_query = below(begin, inner, members)
    token = dilated(group, member, dilations)
    if OWN_TMA:
        q = load_tile(query, origin, begin, head, QUERIES, HEAD_DIM)
    else:
        query_base = head_of(query, batch, head, query_strides[0], query_strides[4], WIDE)
        q = load_rows(query_base, offset(token, query_strides[1:4], WIDE), is_query, HEAD_DIM, BLOCK_D)

    start, end = windows(member, members, KERNEL, STRIDE, CAUSAL)
    first, first_end = windows(begin, members, KERNEL, STRIDE, CAUSAL)
    last = clamped(begin, (QUERY_TILE[0] - 1, QUERY_TILE[1] - 1, QUERY_TILE[2] - 1), members)
    last_start, stop = windows(last, members, KERNEL, STRIDE, CAUSAL)

    key_inner = unravel(tl.arange(0, KEYS), KEY_TILE)
    if not TMA:
        key_base = head_of(key, batch, head_kv, key_strides[0], key_strides[4], WIDE)
        value_base = head_of(value, batch, head_kv, value_strides[0], value_strides[4], WIDE)
    no_group = (group[0] * 0, group[1] * 0, group[2] * 0)
    key_rows = offset(dilated(no_group, key_inner, dilations), key_strides[1:4], WIDE)
    value_rows = offset(dilated(no_group, key_inner, dilations), value_strides[1:4], WIDE)
    if rpb is not None:
        rpb_base = rpb + head * ((2 * KERNEL[0] - 1) * (2 * KERNEL[1] - 1) * (2 * KERNEL[2] - 1)) + bias_center(KERNEL)
        rpb_begin = rpb_base - bias_position(begin, KERNEL)
        if OVERLAP:
            gdc_wait()

    factor = scale * LOG2_E
    highest = tl.full([QUERIES], -1e30, tl.float32)
    total = tl.zeros([QUERIES, 8], tl.float32)
    accumulator = tl.zeros([QUERIES, BLOCK_DV], tl.float32)
    # Tiles that lie in all windows come last, in a loop of their own that needs no mask.
    inner_begin, inner_end = interior(first, first_end, last_start, KEY_TILE)
    for INNER in tl.static_range(2 if INTERIOR else 1):
        walk, steps = part(first, stop, inner_begin, inner_end, KEY_TILE, ONE_TILE, INNER, INTERIOR)
        key_begin = first_tile(walk)
        for _ in tl.range(0, steps, num_stages=STAGES):
            key_token = dilated(group, key_begin, dilations)
            is_key = below(key_begin, key_inner, stop)
            if TMA:
                k = load_tile(key, origin, key_begin, head_kv, KEYS, HEAD_DIM)
            else:
                k = load_rows(key_base + offset(key_token, key_strides[1:4], WIDE), key_rows, is_key, HEAD_DIM, BLOCK_D)
            initial = tl.zeros([QUERIES, KEYS], tl.float32)
            if not INNER:
                biases = None
                if rpb is not None:
                    biases = load_biases(rpb_begin + bias_position(key_begin, KERNEL), QUERY_TILE, KEY_TILE, KERNEL, 1)
                initial = mask(start, end, key_begin, key_inner, QUERY_TILE, KEY_TILE, biases)
            scores = product(q, k.T, initial, PRECISION=PRECISION)
            if TMA:
                v = load_tile(value, origin, key_begin, head_kv, KEYS, HEAD_DIM_V)
            else:
                v_base = value_base + offset(key_token, value_strides[1:4], WIDE)
                v = load_rows(v_base, value_rows, is_key, HEAD_DIM_V, BLOCK_DV)
            highest, total, accumulator = softmax_step(scores, factor, v, highest, total, accumulator, PRECISION)
            key_begin = next_tile(key_begin, walk, KEY_TILE, ONE_TILE)

    if additional_keys is not None:
        extra_keys = head_of(
            additional_keys, batch, head_kv, additional_keys_strides[0], additional_keys_strides[2], WIDE
        )
        extra_values = head_of(
            additional_values, batch, head_kv, additional_values_strides[0], additional_values_strides[2], WIDE
        )
        for extra_begin in tl.range(0, additional, KEYS):
            extra = extra_begin + tl.arange(0, KEYS)
            if WIDE:
                extra = extra.to(tl.int64)
            k = load_rows(extra_keys, extra * additional_keys_strides[1], extra < additional, HEAD_DIM, BLOCK_D)
            v = load_rows(extra_values, extra * additional_values_strides[1], extra < additional, HEAD_DIM_V, BLOCK_DV)
            scores = product(q, k.T, PRECISION=PRECISION)
            scores = tl.where((extra < additional)[None, :], scores, float("-inf"))
            highest, total, accumulator = softmax_step(scores, factor, v, highest, total, accumulator, PRECISION)

    total = tl.sum(total, 1)
    # In memory the output is `[B, *spatial, heads, head_dim_v]` and the log-sum-exp `[B, heads, *spatial]`.
    tokens = length_w.to(tl.int64) * length_h * length_t
    row = offset(token, (length_h * length_w, length_w, 1), WIDE)
    result = accumulator * reciprocal(total)[:, None]
    if OWN_TMA:
        store_tile(output, origin, begin, head, result, QUERY_TILE, HEAD_DIM_V)
    else:
        output_base = output + (batch * tokens * heads + head) * HEAD_DIM_V
        store_rows(output_base, row * heads * HEAD_DIM_V, is_query, result, HEAD_DIM_V, BLOCK_DV)
    tl.store(lse + (batch * heads + head) * tokens + row, (highest + log2(total)) / LOG2_E, mask=is_query)
