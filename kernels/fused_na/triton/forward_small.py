"""The forward kernel for small windows: little arithmetic around the matrix products.

One warp attends from a small tile of queries, one key row along `t` at a time. The mask of the `h` and `w` axes is
the same for every `t`; it enters as the initial accumulator of the scores. On `t` whole rows of scores are in or out,
which costs nothing but a choice of the exponent's reference. Two-dimensional maps have their first axis as `t`.
"""

import triton
import triton.language as tl

from fused_na.triton.neighborhood import (
    below,
    bias_center,
    bias_position,
    clamped,
    dilated,
    inside_plane,
    load_bias,
    load_rows,
    load_tile,
    locate,
    offset,
    store_rows,
    unravel,
    windows,
)
from fused_na.triton.products import product

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit(do_not_specialize=["length_w", "heads"], do_not_specialize_on_alignment=["length_t", "length_h"])
def forward_small_kernel(
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
    heads,
    query_strides,  # batch, t, h, w, heads; head_dim is contiguous
    key_strides,
    value_strides,
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
    WIDE: tl.constexpr,
    TMA: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    """`rpb` must be divided by `scale`, and `KEY_TILE[0]` be 1."""
    QUERIES: tl.constexpr = QUERY_TILE[0] * QUERY_TILE[1] * QUERY_TILE[2]
    KEYS: tl.constexpr = KEY_TILE[1] * KEY_TILE[2]
    lengths = (length_t, length_h, length_w)

    rest, group, members, begin = locate(tl.program_id(0), lengths, dilations, QUERY_TILE)
    if (begin[0] >= members[0]) | (begin[1] >= members[1]) | (begin[2] >= members[2]):
        return
    head = rest % heads
    batch = (rest // heads).to(tl.int64)
    head_kv = head // HEADS_PER_KV

    inner = unravel(tl.arange(0, QUERIES), QUERY_TILE)
    member = clamped(begin, inner, members)
    is_query = below(begin, inner, members)
    token = dilated(group, member, dilations)
    query_base = query + batch * query_strides[0] + head * query_strides[4]
    q = load_rows(query_base, offset(token, query_strides[1:4], WIDE), is_query, HEAD_DIM, BLOCK_D)

    start, end = windows(member, members, KERNEL, STRIDE, CAUSAL)
    first, _ = windows(begin, members, KERNEL, STRIDE, CAUSAL)
    last = clamped(begin, (QUERY_TILE[0] - 1, QUERY_TILE[1] - 1, QUERY_TILE[2] - 1), members)
    _, stop = windows(last, members, KERNEL, STRIDE, CAUSAL)
    grid_h = tl.cdiv(stop[1] - first[1], KEY_TILE[1])
    grid_w = tl.cdiv(stop[2] - first[2], KEY_TILE[2])

    key_inner = unravel(tl.arange(0, KEYS), KEY_TILE)
    if not TMA:
        key_base = key + batch * key_strides[0] + head_kv * key_strides[4]
        value_base = value + batch * value_strides[0] + head_kv * value_strides[4]
    if rpb is not None:
        rpb_base = rpb + head * ((2 * KERNEL[0] - 1) * (2 * KERNEL[1] - 1) * (2 * KERNEL[2] - 1)) + bias_center(KERNEL)
        query_position = bias_position(member, KERNEL)

    factor = scale * LOG2_E
    highest = tl.full([QUERIES], -1e30, tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    accumulator = tl.zeros([QUERIES, BLOCK_DV], tl.float32)
    for plane in range(grid_h * grid_w):
        key_begin = (first[0], first[1] + plane // grid_w * KEY_TILE[1], first[2] + plane % grid_w * KEY_TILE[2])
        is_key = (key_begin[1] + key_inner[1] < stop[1]) & (key_begin[2] + key_inner[2] < stop[2])
        inside = inside_plane(start, end, key_begin, key_inner, QUERY_TILE, KEY_TILE)
        mask = tl.where(inside, 0.0, float("-inf"))
        origin = dilated(group, key_begin, dilations)
        columns = (key_inner[0], key_inner[1] * dilations[1], key_inner[2] * dilations[2])
        key_rows = offset(columns, key_strides[1:4], WIDE)
        value_rows = offset(columns, value_strides[1:4], WIDE)
        if not TMA:
            key_row = key_base + offset(origin, key_strides[1:4], WIDE)
            value_row = value_base + offset(origin, value_strides[1:4], WIDE)
        if rpb is not None:
            key_member = (key_inner[0] + first[0], key_begin[1] + key_inner[1], key_begin[2] + key_inner[2])
            bias = rpb_base + (bias_position(key_member, KERNEL)[None, :] - query_position[:, None])
        for t in tl.range(first[0], stop[0], num_stages=STAGES):
            if TMA:
                k = load_tile(key, batch, (t, key_begin[1], key_begin[2]), head_kv, KEYS, HEAD_DIM)
                v = load_tile(value, batch, (t, key_begin[1], key_begin[2]), head_kv, KEYS, HEAD_DIM_V)
            else:
                shift = (t - first[0]).to(tl.int64) * dilations[0]
                k = load_rows(key_row + shift * key_strides[1], key_rows, is_key, HEAD_DIM, BLOCK_D)
                v = load_rows(value_row + shift * value_strides[1], value_rows, is_key, HEAD_DIM_V, BLOCK_DV)
            in_row = (t >= start[0]) & (t < end[0])
            initial = mask
            if rpb is not None:
                bias_shift = (t - first[0]) * ((2 * KERNEL[1] - 1) * (2 * KERNEL[2] - 1))
                initial = load_bias(bias + bias_shift, inside & in_row[:, None], t < stop[0])
            scores = product(q, k.T, initial, PRECISION=PRECISION)
            # `highest` starts finite, so that a row that has seen no key yet yields no NaN.
            new_highest = tl.maximum(highest, tl.where(in_row, tl.max(scores, 1) * factor, -1e30))
            reference = tl.where(in_row, new_highest, float("inf"))
            probabilities = tl.exp2(scores * factor - reference[:, None])
            rescale = tl.exp2(highest - new_highest)
            total = total * rescale + tl.sum(probabilities, 1)
            accumulator = accumulator * rescale[:, None]
            accumulator = product(probabilities.to(v.dtype), v, accumulator, PRECISION=PRECISION)
            highest = new_highest

    # In memory the output is `[B, *spatial, heads, head_dim_v]` and the log-sum-exp `[B, heads, *spatial]`.
    tokens = length_w.to(tl.int64) * length_h * length_t
    row = offset(token, (length_h * length_w, length_w, 1), WIDE)
    output_base = output + (batch * tokens * heads + head) * HEAD_DIM_V
    store_rows(
        output_base, row * heads * HEAD_DIM_V, is_query, accumulator * (1.0 / total)[:, None], HEAD_DIM_V, BLOCK_DV
    )
    tl.store(lse + (batch * heads + head) * tokens + row, (highest + tl.log2(total)) / LOG2_E, mask=is_query)
