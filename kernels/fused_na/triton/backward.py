"""The backward kernels. Each gradient is owned by the program that writes it, so that results are deterministic.

`lse`, `grad_lse` and `delta` are `[B, heads, *spatial]` in memory, so that the rows of a tile lie side by side.

With scores `s`, probabilities `p = exp(s - lse)` and incoming gradients `do` and `dlse`:
`delta = rowsum(o * do) - dlse`, `ds = p * (do @ v.T - delta)`, `dq = ds @ k * scale`, `dk = ds.T @ q * scale`,
`dv = p.T @ do`, and the gradient of a relative position's bias is the sum of `ds` over all pairs at that position.
"""

import triton
import triton.language as tl

from fused_na.triton.neighborhood import (
    below,
    bias_center,
    bias_position,
    clamped,
    copy_origin,
    dilated,
    divided,
    head_of,
    inverse_windows,
    is_unshifted,
    load_biases,
    load_row_pair,
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
from fused_na.triton.products import product
from fused_na.triton.walk import NEVER, first_tile, interior, next_tile, part

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit(
    do_not_specialize=["length_w", "heads", "additional"], do_not_specialize_on_alignment=["length_t", "length_h"]
)
def query_kernel(
    query,
    key,
    value,
    rpb,
    additional_keys,
    additional_values,
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
    dilations,
    divisors,  # by `geometry.divisor`: of the tiles and the dilation of each axis, and of the heads
    heads,
    additional,
    query_strides,  # batch, t, h, w, heads; head_dim is contiguous
    key_strides,
    value_strides,
    grad_output_strides,
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
    PACK: tl.constexpr,  # 3 where the gradients of query, key and value lie side by side for each token, else 1
    DILATED: tl.constexpr,
    WIDE: tl.constexpr,
    ONE_TILE: tl.constexpr,
    INTERIOR: tl.constexpr,
    TMA: tl.constexpr,
    OWN_TMA: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Gradient of one tile of queries of one head, and `delta` of its rows, which the other kernels read."""
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
    tokens = length_w.to(tl.int64) * length_h * length_t
    row = offset(token, (length_h * length_w, length_w, 1), WIDE)
    if OWN_TMA:
        q = load_tile(query, origin, begin, head, QUERIES, HEAD_DIM)
        grad_o = load_tile(grad_output, origin, begin, head, QUERIES, HEAD_DIM_V)
        o = load_tile(output, origin, begin, head, QUERIES, HEAD_DIM_V)
    else:
        query_base = head_of(query, batch, head, query_strides[0], query_strides[4], WIDE)
        q = load_rows(query_base, offset(token, query_strides[1:4], WIDE), is_query, HEAD_DIM, BLOCK_D)
        grad_base = head_of(grad_output, batch, head, grad_output_strides[0], grad_output_strides[4], WIDE)
        grad_o = load_rows(grad_base, offset(token, grad_output_strides[1:4], WIDE), is_query, HEAD_DIM_V, BLOCK_DV)
        output_base = output + (batch * tokens * heads + head) * HEAD_DIM_V
        o = load_rows(output_base, row * heads * HEAD_DIM_V, is_query, HEAD_DIM_V, BLOCK_DV)
    row_delta = tl.sum(o.to(tl.float32) * grad_o.to(tl.float32), 1)
    row_base = (batch * heads + head) * tokens
    if grad_lse is not None:
        row_delta -= tl.load(grad_lse + row_base + row, mask=is_query, other=0.0)
    tl.store(delta + row_base + row, row_delta, mask=is_query)
    row_lse = tl.load(lse + row_base + row, mask=is_query, other=0.0) * LOG2_E
    minus_delta = tl.broadcast_to(-row_delta[:, None], (QUERIES, KEYS))  # to start a product with, which is free

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

    grad_q = tl.zeros([QUERIES, BLOCK_D], tl.float32)
    inner_begin, inner_end = interior(first, first_end, last_start, KEY_TILE)
    for INNER in tl.static_range(2 if INTERIOR else 1):  # as in forward
        walk, steps = part(first, stop, inner_begin, inner_end, KEY_TILE, ONE_TILE, INNER, INTERIOR)
        key_begin = first_tile(walk)
        for _ in tl.range(0, steps, num_stages=STAGES):
            key_token = dilated(group, key_begin, dilations)
            is_key = below(key_begin, key_inner, stop)
            if TMA:
                k = load_tile(key, origin, key_begin, head_kv, KEYS, HEAD_DIM)
                v = load_tile(value, origin, key_begin, head_kv, KEYS, HEAD_DIM_V)
            else:
                v_base = value_base + offset(key_token, value_strides[1:4], WIDE)
                k = load_rows(key_base + offset(key_token, key_strides[1:4], WIDE), key_rows, is_key, HEAD_DIM, BLOCK_D)
                v = load_rows(v_base, value_rows, is_key, HEAD_DIM_V, BLOCK_DV)
            initial = tl.zeros([QUERIES, KEYS], tl.float32)
            if not INNER:
                biases = None
                if rpb is not None:
                    biases = load_biases(rpb_begin + bias_position(key_begin, KERNEL), QUERY_TILE, KEY_TILE, KERNEL, 1)
                initial = mask(start, end, key_begin, key_inner, QUERY_TILE, KEY_TILE, biases)
            scores = product(q, k.T, initial, PRECISION=PRECISION) * (scale * LOG2_E)
            probabilities = tl.exp2(scores - row_lse[:, None])
            grad_scores = probabilities * product(grad_o, v.T, minus_delta, PRECISION=PRECISION)
            grad_q = product(grad_scores.to(k.dtype), k, grad_q, PRECISION=PRECISION)
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
            scores = product(q, k.T, PRECISION=PRECISION) * (scale * LOG2_E)
            probabilities = tl.where((extra < additional)[None, :], tl.exp2(scores - row_lse[:, None]), 0.0)
            grad_scores = probabilities * product(grad_o, v.T, minus_delta, PRECISION=PRECISION)
            grad_q = product(grad_scores.to(k.dtype), k, grad_q, PRECISION=PRECISION)

    if OWN_TMA:
        store_tile(grad_query, origin, begin, head, grad_q * scale, QUERY_TILE, HEAD_DIM)
    else:
        base = grad_query + (batch * tokens * heads * PACK + head) * HEAD_DIM
        store_rows(base, row * heads * (PACK * HEAD_DIM), is_query, grad_q * scale, HEAD_DIM, BLOCK_D)


@triton.jit(do_not_specialize=["length_w", "heads"], do_not_specialize_on_alignment=["length_t", "length_h"])
def key_value_kernel(
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
    divisors,  # by `geometry.divisor`: of the tiles and the dilation of each axis, and of the heads
    heads,
    query_strides,  # batch, t, h, w, heads; head_dim is contiguous
    key_strides,
    value_strides,
    grad_output_strides,
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
    PACK: tl.constexpr,  # as in `query_kernel`
    DILATED: tl.constexpr,
    WIDE: tl.constexpr,
    INTERIOR: tl.constexpr,
    TMA: tl.constexpr,
    OWN_TMA: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Gradients of one tile of keys and values of one head, over the queries of its inverse windows."""
    QUERIES: tl.constexpr = QUERY_TILE[0] * QUERY_TILE[1] * QUERY_TILE[2]
    KEYS: tl.constexpr = KEY_TILE[0] * KEY_TILE[1] * KEY_TILE[2]
    lengths = (length_t, length_h, length_w)

    rest, group, members, begin = locate(tl.program_id(0), lengths, dilations, divisors, KEY_TILE, DILATED)
    if (begin[0] >= members[0]) | (begin[1] >= members[1]) | (begin[2] >= members[2]):
        return
    heads_kv = heads // HEADS_PER_KV
    sample = divided(rest, divisors[6])
    head_kv, batch = rest - sample * heads_kv, sample.to(tl.int64)
    origin = copy_origin(batch, group, lengths, DILATED)

    inner = unravel(tl.arange(0, KEYS), KEY_TILE)
    member = clamped(begin, inner, members)
    is_key = below(begin, inner, members)
    token = dilated(group, member, dilations)
    if OWN_TMA:
        k = load_tile(key, origin, begin, head_kv, KEYS, HEAD_DIM)
        v = load_tile(value, origin, begin, head_kv, KEYS, HEAD_DIM_V)
    else:
        key_base = head_of(key, batch, head_kv, key_strides[0], key_strides[4], WIDE)
        value_base = head_of(value, batch, head_kv, value_strides[0], value_strides[4], WIDE)
        k = load_rows(key_base, offset(token, key_strides[1:4], WIDE), is_key, HEAD_DIM, BLOCK_D)
        v = load_rows(value_base, offset(token, value_strides[1:4], WIDE), is_key, HEAD_DIM_V, BLOCK_DV)

    start, end = inverse_windows(member, members, KERNEL, STRIDE, CAUSAL)
    first, first_end = inverse_windows(begin, members, KERNEL, STRIDE, CAUSAL)
    last = clamped(begin, (KEY_TILE[0] - 1, KEY_TILE[1] - 1, KEY_TILE[2] - 1), members)
    last_start, stop = inverse_windows(last, members, KERNEL, STRIDE, CAUSAL)

    query_inner = unravel(tl.arange(0, QUERIES), QUERY_TILE)
    no_group = (group[0] * 0, group[1] * 0, group[2] * 0)
    query_token = dilated(no_group, query_inner, dilations)
    query_rows = offset(query_token, query_strides[1:4], WIDE)
    grad_rows = offset(query_token, grad_output_strides[1:4], WIDE)
    row_strides = (length_h * length_w, length_w, 1)
    lse_rows = offset(query_token, row_strides, WIDE)
    tokens = length_w.to(tl.int64) * length_h * length_t

    grad_k = tl.zeros([KEYS, BLOCK_D], tl.float32)
    grad_v = tl.zeros([KEYS, BLOCK_DV], tl.float32)
    inner_begin, inner_end = interior(first, first_end, last_start, QUERY_TILE)
    for INNER in tl.static_range(2 if INTERIOR else 1):  # as in forward
        walk, steps = part(first, stop, inner_begin, inner_end, QUERY_TILE, NEVER, INNER, INTERIOR)
        for sharer in range(HEADS_PER_KV):
            head = head_kv * HEADS_PER_KV + sharer
            query_begin = first_tile(walk)
            for _ in tl.range(0, steps, num_stages=STAGES):
                query_origin = dilated(group, query_begin, dilations)
                is_query = below(query_begin, query_inner, stop)
                if TMA:
                    q = load_tile(query, origin, query_begin, head, QUERIES, HEAD_DIM)
                    grad_o = load_tile(grad_output, origin, query_begin, head, QUERIES, HEAD_DIM_V)
                else:
                    query_base = head_of(query, batch, head, query_strides[0], query_strides[4], WIDE)
                    query_base += offset(query_origin, query_strides[1:4], WIDE)
                    q = load_rows(query_base, query_rows, is_query, HEAD_DIM, BLOCK_D)
                    grad_base = head_of(grad_output, batch, head, grad_output_strides[0], grad_output_strides[4], WIDE)
                    grad_base += offset(query_origin, grad_output_strides[1:4], WIDE)
                    grad_o = load_rows(grad_base, grad_rows, is_query, HEAD_DIM_V, BLOCK_DV)
                row_base = (batch * heads + head) * tokens + offset(query_origin, row_strides, WIDE)
                row_lse, row_delta = load_row_pair(lse + row_base, delta + row_base, lse_rows, is_query, INNER)
                row_lse *= LOG2_E

                initial = tl.zeros([KEYS, QUERIES], tl.float32)
                if not INNER:
                    biases = None
                    if rpb is not None:
                        rpb_base = rpb + head * ((2 * KERNEL[0] - 1) * (2 * KERNEL[1] - 1) * (2 * KERNEL[2] - 1))
                        rpb_base += bias_center(KERNEL) + bias_position(begin, KERNEL)
                        rpb_begin = rpb_base - bias_position(query_begin, KERNEL)
                        biases = load_biases(rpb_begin, KEY_TILE, QUERY_TILE, KERNEL, -1)
                    initial = mask(start, end, query_begin, query_inner, KEY_TILE, QUERY_TILE, biases)
                scores = product(k, q.T, initial, PRECISION=PRECISION) * (scale * LOG2_E)
                probabilities = tl.exp2(scores - row_lse[None, :])
                grad_v = product(probabilities.to(grad_o.dtype), grad_o, grad_v, PRECISION=PRECISION)
                minus_delta = tl.broadcast_to(-row_delta[None, :], (KEYS, QUERIES))
                grad_scores = probabilities * product(v, grad_o.T, minus_delta, PRECISION=PRECISION)
                grad_k = product(grad_scores.to(q.dtype), q, grad_k, PRECISION=PRECISION)
                query_begin = next_tile(query_begin, walk, QUERY_TILE, NEVER)

    if OWN_TMA:
        store_tile(grad_key, origin, begin, head_kv, grad_k * scale, KEY_TILE, HEAD_DIM)
        store_tile(grad_value, origin, begin, head_kv, grad_v, KEY_TILE, HEAD_DIM_V)
    else:
        row = offset(token, row_strides, WIDE) * heads_kv * PACK
        row_base = batch * tokens * heads_kv * PACK + head_kv
        store_rows(grad_key + row_base * HEAD_DIM, row * HEAD_DIM, is_key, grad_k * scale, HEAD_DIM, BLOCK_D)
        store_rows(grad_value + row_base * HEAD_DIM_V, row * HEAD_DIM_V, is_key, grad_v, HEAD_DIM_V, BLOCK_DV)


@triton.jit(
    do_not_specialize=["length_w", "heads", "batches", "batch_splits", "items", "items_per_split"],
    do_not_specialize_on_alignment=["length_t", "length_h"],
)
def bias_kernel(
    query,
    key,
    value,
    rpb,
    lse,
    delta,
    grad_output,
    partial,
    scale,
    length_t,
    length_h,
    length_w,
    dilations,
    divisors,  # by `geometry.divisor`: of the tiles and the dilation of each axis, and of the heads
    heads,
    batches,
    batch_splits,
    items,
    items_per_split,
    query_strides,  # batch, t, h, w, heads; head_dim is contiguous
    key_strides,
    value_strides,
    grad_output_strides,
    HEADS_PER_KV: tl.constexpr,
    KERNEL: tl.constexpr,
    STRIDE: tl.constexpr,
    CAUSAL: tl.constexpr,
    QUERY_TILE: tl.constexpr,
    KEY_TILE: tl.constexpr,
    LEAD: tl.constexpr,
    OFFSETS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_DIM_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    DILATED: tl.constexpr,
    WIDE: tl.constexpr,
    TMA: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Sums `ds` over a share of all query tiles, at one offset between query tile and key tile.

    At a fixed offset a pair's relative position depends on its place in the tile alone, so that tiles add up in
    registers. Samples are the inner loop: they share a tile's mask and bias. Key tiles start `LEAD` before their query
    tile's first member, and on from there.
    `partial` is `[splits, heads, offsets, queries, keys]`; `items` counts tiles over groups and parts of the batch.
    """
    QUERIES: tl.constexpr = QUERY_TILE[0] * QUERY_TILE[1] * QUERY_TILE[2]
    KEYS: tl.constexpr = KEY_TILE[0] * KEY_TILE[1] * KEY_TILE[2]
    lengths = (length_t, length_h, length_w)
    pid = tl.program_id(0)
    place = unravel(pid % (OFFSETS[0] * OFFSETS[1] * OFFSETS[2]), OFFSETS)
    head = pid // (OFFSETS[0] * OFFSETS[1] * OFFSETS[2]) % heads
    split = pid // (OFFSETS[0] * OFFSETS[1] * OFFSETS[2]) // heads
    head_kv = head // HEADS_PER_KV

    inner = unravel(tl.arange(0, QUERIES), QUERY_TILE)
    key_inner = unravel(tl.arange(0, KEYS), KEY_TILE)
    tokens = length_w.to(tl.int64) * length_h * length_t
    rpb_base = rpb + head * ((2 * KERNEL[0] - 1) * (2 * KERNEL[1] - 1) * (2 * KERNEL[2] - 1)) + bias_center(KERNEL)
    part = tl.cdiv(batches, batch_splits)

    total = tl.zeros([QUERIES, KEYS], tl.float32)
    initial = tl.full([QUERIES, KEYS], float("-inf"), tl.float32)
    was_unshifted = False
    for item in range(split * items_per_split, tl.minimum((split + 1) * items_per_split, items)):
        _, group, members, begin = locate(item // batch_splits, lengths, dilations, divisors, QUERY_TILE, DILATED)
        first_batch = item % batch_splits * part
        first, _ = windows(begin, members, KERNEL, STRIDE, CAUSAL)
        last = clamped(begin, (QUERY_TILE[0] - 1, QUERY_TILE[1] - 1, QUERY_TILE[2] - 1), members)
        _, stop = windows(last, members, KERNEL, STRIDE, CAUSAL)
        key_begin = (
            begin[0] + place[0] * KEY_TILE[0] - LEAD[0],
            begin[1] + place[1] * KEY_TILE[1] - LEAD[1],
            begin[2] + place[2] * KEY_TILE[2] - LEAD[2],
        )
        overlaps = (key_begin[0] < stop[0]) & (key_begin[1] < stop[1]) & (key_begin[2] < stop[2])
        overlaps &= (key_begin[0] + KEY_TILE[0] > first[0]) & (key_begin[1] + KEY_TILE[1] > first[1])
        overlaps &= key_begin[2] + KEY_TILE[2] > first[2]
        overlaps &= (begin[0] < members[0]) & (begin[1] < members[1]) & (begin[2] < members[2])
        if overlaps:
            member = clamped(begin, inner, members)
            is_query = below(begin, inner, members)
            token = dilated(group, member, dilations)
            lse_rows = offset(token, (length_h * length_w, length_w, 1), WIDE)
            key_member = (key_begin[0] + key_inner[0], key_begin[1] + key_inner[1], key_begin[2] + key_inner[2])
            if not TMA:
                query_rows = offset(token, query_strides[1:4], WIDE)
                grad_rows = offset(token, grad_output_strides[1:4], WIDE)
                is_key = below(key_begin, key_inner, stop)
                is_key &= (key_member[0] >= first[0]) & (key_member[1] >= first[1]) & (key_member[2] >= first[2])
                key_token = dilated(group, key_member, dilations)
                key_rows = offset(key_token, key_strides[1:4], WIDE)
                value_rows = offset(key_token, value_strides[1:4], WIDE)

            unshifted = is_unshifted(begin, members, QUERY_TILE, KERNEL, STRIDE, CAUSAL)
            if not (unshifted & was_unshifted):  # else the last tile's mask and bias hold for this one too
                start, end = windows(member, members, KERNEL, STRIDE, CAUSAL)
                rpb_begin = rpb_base + (bias_position(key_begin, KERNEL) - bias_position(begin, KERNEL))
                biases = load_biases(rpb_begin, QUERY_TILE, KEY_TILE, KERNEL, 1)
                initial = mask(start, end, key_begin, key_inner, QUERY_TILE, KEY_TILE, biases)
                initial = tl.where(is_query[:, None], initial, float("-inf"))
            was_unshifted = unshifted
            for sample in tl.range(0, tl.minimum(part, batches - first_batch), num_stages=STAGES):
                batch = (first_batch + sample).to(tl.int64)
                if TMA:
                    origin = copy_origin(batch, group, lengths, DILATED)
                    q = load_tile(query, origin, begin, head, QUERIES, HEAD_DIM)
                    k = load_tile(key, origin, key_begin, head_kv, KEYS, HEAD_DIM)
                    v = load_tile(value, origin, key_begin, head_kv, KEYS, HEAD_DIM_V)
                    grad_o = load_tile(grad_output, origin, begin, head, QUERIES, HEAD_DIM_V)
                else:
                    query_base = head_of(query, batch, head, query_strides[0], query_strides[4], WIDE)
                    key_base = head_of(key, batch, head_kv, key_strides[0], key_strides[4], WIDE)
                    value_base = head_of(value, batch, head_kv, value_strides[0], value_strides[4], WIDE)
                    grad_base = head_of(grad_output, batch, head, grad_output_strides[0], grad_output_strides[4], WIDE)
                    q = load_rows(query_base, query_rows, is_query, HEAD_DIM, BLOCK_D)
                    k = load_rows(key_base, key_rows, is_key, HEAD_DIM, BLOCK_D)
                    v = load_rows(value_base, value_rows, is_key, HEAD_DIM_V, BLOCK_DV)
                    grad_o = load_rows(grad_base, grad_rows, is_query, HEAD_DIM_V, BLOCK_DV)
                row_base = (batch * heads + head) * tokens
                row_lse, row_delta = load_row_pair(lse + row_base, delta + row_base, lse_rows, is_query, False)
                row_lse *= LOG2_E
                scores = product(q, k.T, initial, PRECISION=PRECISION) * (scale * LOG2_E)
                probabilities = tl.exp2(scores - row_lse[:, None])
                total += probabilities * (product(grad_o, v.T, PRECISION=PRECISION) - row_delta[:, None])
    pair = tl.arange(0, QUERIES)[:, None] * KEYS + tl.arange(0, KEYS)[None, :]
    tl.store(partial + pid.to(tl.int64) * (QUERIES * KEYS) + pair, total)


@triton.jit(do_not_specialize=["heads", "splits"])
def bias_fold_kernel(
    partial,
    grad_rpb,
    heads,
    splits,
    KERNEL: tl.constexpr,
    QUERY_TILE: tl.constexpr,
    KEY_TILE: tl.constexpr,
    LEAD: tl.constexpr,
    OFFSETS: tl.constexpr,
):
    """Adds up one relative position of one head: each query of a tile meets it in exactly one tile offset and key."""
    QUERIES: tl.constexpr = QUERY_TILE[0] * QUERY_TILE[1] * QUERY_TILE[2]
    KEYS: tl.constexpr = KEY_TILE[0] * KEY_TILE[1] * KEY_TILE[2]
    PLACES: tl.constexpr = OFFSETS[0] * OFFSETS[1] * OFFSETS[2]
    POSITIONS: tl.constexpr = (2 * KERNEL[0] - 1) * (2 * KERNEL[1] - 1) * (2 * KERNEL[2] - 1)
    pid = tl.program_id(0)
    head = pid // POSITIONS
    position = unravel(pid % POSITIONS, (2 * KERNEL[0] - 1, 2 * KERNEL[1] - 1, 2 * KERNEL[2] - 1))
    inner = unravel(tl.arange(0, QUERIES), QUERY_TILE)
    t = inner[0] + position[0] + (LEAD[0] - KERNEL[0] + 1)
    h = inner[1] + position[1] + (LEAD[1] - KERNEL[1] + 1)
    w = inner[2] + position[2] + (LEAD[2] - KERNEL[2] + 1)
    place = ((t // KEY_TILE[0]) * OFFSETS[1] + h // KEY_TILE[1]) * OFFSETS[2] + w // KEY_TILE[2]
    pair_key = (t % KEY_TILE[0] * KEY_TILE[1] + h % KEY_TILE[1]) * KEY_TILE[2] + w % KEY_TILE[2]
    pair = (place * QUERIES + tl.arange(0, QUERIES)) * KEYS + pair_key
    total = tl.zeros([QUERIES], tl.float32)
    for split in range(splits):
        total += tl.load(partial + (split * heads + head).to(tl.int64) * (PLACES * QUERIES * KEYS) + pair)
    tl.store(grad_rpb + pid, tl.sum(total, 0))


@triton.jit(
    do_not_specialize=["length_w", "heads", "additional", "tokens_per_split"],
    do_not_specialize_on_alignment=["length_t", "length_h"],
)
def additional_kernel(
    query,
    additional_keys,
    additional_values,
    lse,
    delta,
    grad_output,
    partial_keys,
    partial_values,
    scale,
    length_t,
    length_h,
    length_w,
    batches,
    heads,
    additional,
    tokens_per_split,
    query_strides,  # batch, t, h, w, heads; head_dim is contiguous
    grad_output_strides,
    additional_keys_strides,  # batch, tokens, heads
    additional_values_strides,
    HEADS_PER_KV: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_DIM_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Gradients of a block of additional tokens of one head over a share of the queries.

    The partial sums are float32 `[splits, B, M, heads_kv, head_dim]` and `[splits, B, M, heads_kv, head_dim_v]`.
    """
    heads_kv = heads // HEADS_PER_KV
    blocks = tl.cdiv(additional, KEYS)
    pid = tl.program_id(0)
    extra = pid % blocks * KEYS + tl.arange(0, KEYS)
    if WIDE:
        extra = extra.to(tl.int64)
    is_extra = extra < additional
    head_kv = pid // blocks % heads_kv
    batch = (pid // blocks // heads_kv % batches).to(tl.int64)
    split = pid // blocks // heads_kv // batches

    keys_base = head_of(additional_keys, batch, head_kv, additional_keys_strides[0], additional_keys_strides[2], WIDE)
    values_base = head_of(
        additional_values, batch, head_kv, additional_values_strides[0], additional_values_strides[2], WIDE
    )
    k = load_rows(keys_base, extra * additional_keys_strides[1], is_extra, HEAD_DIM, BLOCK_D)
    v = load_rows(values_base, extra * additional_values_strides[1], is_extra, HEAD_DIM_V, BLOCK_DV)
    tokens = length_t * length_h * length_w
    grad_k = tl.zeros([KEYS, BLOCK_D], tl.float32)
    grad_v = tl.zeros([KEYS, BLOCK_DV], tl.float32)
    begin = split * tokens_per_split
    stop = tl.minimum(begin + tokens_per_split, tokens)
    for head in range(head_kv * HEADS_PER_KV, (head_kv + 1) * HEADS_PER_KV):
        for first in range(begin, stop, QUERIES):
            index = first + tl.arange(0, QUERIES)
            is_query = index < stop
            token = (index // (length_h * length_w), index // length_w % length_h, index % length_w)
            query_base = head_of(query, batch, head, query_strides[0], query_strides[4], WIDE)
            q = load_rows(query_base, offset(token, query_strides[1:4], WIDE), is_query, HEAD_DIM, BLOCK_D)
            grad_base = head_of(grad_output, batch, head, grad_output_strides[0], grad_output_strides[4], WIDE)
            grad_o = load_rows(grad_base, offset(token, grad_output_strides[1:4], WIDE), is_query, HEAD_DIM_V, BLOCK_DV)
            row = (batch * heads + head) * tokens + index
            row_lse = tl.load(lse + row, mask=is_query, other=0.0) * LOG2_E
            row_delta = tl.load(delta + row, mask=is_query, other=0.0)
            scores = product(k, q.T, PRECISION=PRECISION) * (scale * LOG2_E)
            probabilities = tl.where(is_query[None, :], tl.exp2(scores - row_lse[None, :]), 0.0)
            grad_v = product(probabilities.to(grad_o.dtype), grad_o, grad_v, PRECISION=PRECISION)
            grad_scores = probabilities * (product(v, grad_o.T, PRECISION=PRECISION) - row_delta[None, :])
            grad_k = product(grad_scores.to(q.dtype), q, grad_k, PRECISION=PRECISION)
    row = ((split * batches + batch) * additional + extra) * heads_kv + head_kv
    store_rows(partial_keys, row * HEAD_DIM, is_extra, grad_k * scale, HEAD_DIM, BLOCK_D)
    store_rows(partial_values, row * HEAD_DIM_V, is_extra, grad_v, HEAD_DIM_V, BLOCK_DV)
