"""The portable fast path: neighborhood attention over tiles of queries in plain PyTorch, for any device and for export.

Each tile of queries gathers the union of its windows and attends to it in dense matrix products; pairs outside the
neighborhood are masked. Eagerly, work proceeds in chunks that fit a core's cache, and the backward pass computes the
probabilities again, so that memory beyond inputs, outputs and gradients stays that of one chunk. In a traced graph
there is one chunk, so that the batch may be dynamic.
"""

from collections.abc import Iterator
from functools import lru_cache
from itertools import product
from math import ceil, prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fused_na.precision import compute_dtype, without_autocast
from fused_na.window import Axis, group_members, window

CHUNK_SCORES = 1 << 18  # scores held at a time: 1 MiB of float32


class AxisTiles(NamedTuple):
    """The tiles of one axis: `T` tiles of `Q` queries and `K` keys each, counted within a tile's dilation group."""

    keys: int  # K
    group: list[int]  # [T]
    members: list[int]  # [T]
    query: list[list[int]]  # [T][Q]; a tile that is not full repeats its group's last member
    start: list[list[int]]  # [T][Q] window of each query
    end: list[list[int]]  # [T][Q]
    padding: list[list[int]]  # [T][Q] -1 where a query is such a repetition, else 0


def tile_axis(axis: Axis, size: int) -> AxisTiles:
    """Cuts one axis, dilation group by dilation group, into tiles of `size` queries."""
    tiles = AxisTiles(0, [], [], [], [], [], [])
    keys = 0
    for group in range(axis.dilation):
        members = group_members(axis, group)
        for begin in range(0, group_members(axis, 0), size):
            query = [min(i, members - 1) for i in range(begin, begin + size)]
            start, end = zip(*(window(axis, i, members) for i in query), strict=True)
            tiles.group.append(group)
            tiles.members.append(members)
            tiles.query.append(query)
            tiles.start.append(list(start))
            tiles.end.append(list(end))
            tiles.padding.append([-1 if i >= members else 0 for i in range(begin, begin + size)])
            keys = max(keys, end[-1] - start[0])
    return tiles._replace(keys=keys)


def _tile_sizes(axis: Axis) -> list[tuple[int, int, int]]:
    """(queries a tile, tiles, keys a tile) for every even split of the axis into tiles of at most 64 queries."""
    members = group_members(axis, 0)
    splits = []
    for size in sorted({ceil(members / parts) for parts in range(1, members + 1)}):
        if size <= 64:
            edges = [(begin, min(begin + size, members) - 1) for begin in range(0, members, size)]
            keys = max(window(axis, last, members)[1] - window(axis, first, members)[0] for first, last in edges)
            splits.append((size, len(edges) * axis.dilation, keys))
    return splits


def choose_tile(axes: tuple[Axis, ...]) -> tuple[int, ...]:
    """Queries per tile and axis that minimise an estimate of the time (weights measured on a CPU with AVX-512)."""

    def cost(choice: tuple[tuple[int, int, int], ...]) -> float:
        queries, tiles, keys = (prod(column) for column in zip(*choice, strict=True))
        # Gathering a key and its value costs about as much as 8 scores, and products of few rows run slowly.
        return tiles * keys * (queries + 8) * (1 + 4 / queries)

    best = min(product(*map(_tile_sizes, axes)), key=cost)
    return tuple(queries for queries, _, _ in best)


@lru_cache(maxsize=256)
def tile_axes(axes: tuple[Axis, ...]) -> tuple[AxisTiles, ...]:
    """The tiles of every axis. Lists, not tensors, so that no trace in progress can leave its tensors in the cache."""
    return tuple(tile_axis(axis, size) for axis, size in zip(axes, choose_tile(axes), strict=True))


def _axis_tables(axis: Axis, tiles: AxisTiles, which: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """int64 tables of the tiles `which [T]`.

    Query coordinates and padding `[T, Q]`, key coordinates `[T, K]`, and offsets along this axis of the relative
    positional bias `[T, Q, K]`, -1 outside the window.
    """
    group, members, query, start, end, padding = (torch.tensor(table)[which] for table in tiles[1:])
    key = start[:, :1] + torch.arange(tiles.keys)
    is_neighbor = (key[:, None] >= start[..., None]) & (key[:, None] < end[..., None])
    offset = torch.where(is_neighbor, key[:, None] - query[..., None] + axis.kernel_size - 1, -1)
    key = torch.minimum(key, members[:, None] - 1)
    return query * axis.dilation + group[:, None], padding, key * axis.dilation + group[:, None], offset


def _join(per_axis: list[Tensor], sizes: list[int]) -> Tensor:
    """Joins indices `[T, Q_i, ...]` into axes of these sizes to flat ones `[T, Q, ...]`; negative ones become -1."""
    joined = per_axis[0]
    for table, size in zip(per_axis[1:], sizes[1:], strict=True):
        tiles, *outer_shape = joined.shape
        inner_shape = table.shape[1:]
        outer = joined.reshape(tiles, *(n for a in outer_shape for n in (a, 1)))
        inner = table.reshape(tiles, *(n for b in inner_shape for n in (1, b)))
        joined = torch.where((outer < 0) | (inner < 0), -1, outer * size + inner)
        joined = joined.reshape(tiles, *(a * b for a, b in zip(outer_shape, inner_shape, strict=True)))
    return joined


class _Chunk(NamedTuple):
    """Tiles worked on together: `n = b * heads_kv * T` dense problems of `queries = heads / heads_kv * Q` by `K`."""

    batch: slice
    query_rows: Tensor  # [n * queries] among the query's `B * tokens * heads` rows
    key_rows: Tensor  # [n * K] among the key's `B * tokens * heads_kv` rows
    padding: Tensor | None  # bool [n * queries], slots that repeat a query; None if there are none
    bias: Tensor  # [b, heads_kv, T, queries, K + M], -inf outside the neighborhood; M additional keys
    bias_index: Tensor  # [T, Q, K] into a head's row of the bias table, whose last entry is for pairs outside


def _rows(tokens: Tensor, batch: slice, map_size: int, heads: int, heads_kv: int) -> Tensor:
    """Rows of tokens `[T, Q]` among `B * map_size * heads`, ordered as `[b, heads_kv, T, heads / heads_kv, Q]`."""
    sample = torch.arange(batch.start, batch.stop, device=tokens.device).reshape(-1, 1, 1, 1, 1)
    head = torch.arange(heads, device=tokens.device).reshape(1, heads_kv, 1, -1, 1)
    return ((sample * map_size + tokens[:, None]) * heads + head).flatten()


def _bias_table(axes: tuple[Axis, ...], rpb: Tensor | None, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Additive score of every relative position, and -inf as last entry: `[heads or 1, positions + 1]`."""
    if rpb is None:
        flat = torch.zeros(1, prod(2 * axis.kernel_size - 1 for axis in axes), dtype=dtype, device=device)
    else:
        flat = rpb.flatten(1).to(dtype)
    return torch.nn.functional.pad(flat, (0, 1), value=float("-inf"))


def _chunks(
    query: Tensor, key: Tensor, axes: tuple[Axis, ...], table: Tensor, additional: int, single: bool
) -> Iterator[_Chunk]:
    """Cuts a problem into chunks, or into a single one; `table` is the bias table `[heads or 1, positions + 1]`."""
    batch_size, heads, heads_kv = query.shape[0], query.shape[-2], key.shape[-2]
    group = heads // heads_kv
    per_axis = tile_axes(axes)
    counts = [len(tiles.query) for tiles in per_axis]
    tile_scores = heads * prod(len(tiles.query[0]) * tiles.keys for tiles in per_axis)
    has_padding = any(min(map(min, tiles.padding)) < 0 for tiles in per_axis)
    if single:
        tile_step, batches = prod(counts), [slice(0, batch_size)]
    else:
        tile_step = min(max(1, CHUNK_SCORES // tile_scores), prod(counts))
        step = max(1, CHUNK_SCORES // (tile_scores * tile_step))
        batches = [slice(start, min(start + step, batch_size)) for start in range(0, batch_size, step)]

    lengths = [axis.length for axis in axes]
    join_sizes = (lengths, [1] * len(axes), lengths, [2 * axis.kernel_size - 1 for axis in axes])
    for tile in torch.arange(prod(counts)).split(tile_step):
        tables = map(_axis_tables, axes, per_axis, torch.unravel_index(tile, counts))
        query_tokens, padding, key_tokens, bias_index = (
            _join(list(per_axis_tables), sizes).to(query.device)
            for per_axis_tables, sizes in zip(zip(*tables, strict=True), join_sizes, strict=True)
        )
        bias_index = bias_index.where(bias_index >= 0, table.shape[1] - 1)
        bias = table.index_select(1, bias_index.flatten()).reshape(-1, 1, *bias_index.shape)
        bias = (
            bias.expand(heads, -1, -1, -1, -1).reshape(heads_kv, group, *bias_index.shape).transpose(1, 2).flatten(2, 3)
        )
        if additional:
            bias = torch.nn.functional.pad(bias, (0, additional))
        for batch in batches:
            b = batch.stop - batch.start
            yield _Chunk(
                batch,
                _rows(query_tokens, batch, prod(lengths), heads, heads_kv),
                _rows(key_tokens, batch, prod(lengths), heads_kv, heads_kv),
                (padding < 0)[:, None].expand(b, heads_kv, -1, group, -1).flatten() if has_padding else None,
                bias.expand(b, -1, -1, -1, -1),
                bias_index,
            )


def _gather(x: Tensor, rows: Tensor, additional: Tensor | None, chunk: _Chunk, dtype: torch.dtype) -> Tensor:
    """A chunk's matrices `[n, rows + M, width]` of `x [all rows, width]` and `additional [B, M, heads_kv, width]`."""
    b, heads_kv, tiles = chunk.bias.shape[:3]
    width = x.shape[-1]
    matrices = x.index_select(0, rows).to(dtype).reshape(b * heads_kv * tiles, -1, width)
    if additional is None:
        return matrices
    extra = additional[chunk.batch].transpose(1, 2).to(dtype).unsqueeze(2)
    extra = extra.expand(-1, -1, tiles, -1, -1).reshape(b * heads_kv * tiles, -1, width)
    return torch.cat([matrices, extra], dim=1)


def _scores(query: Tensor, key: Tensor, chunk: _Chunk, scale: float) -> Tensor:
    """Scaled and biased scores `[n, queries, keys]` of one chunk's matrices."""
    bias = chunk.bias.clone(memory_format=torch.contiguous_format).flatten(0, 2)
    return bias.baddbmm_(query, key.mT, alpha=scale)


class _BlockedAttention(torch.autograd.Function):
    """Tensors as in `attend`; returns the output and, where asked for, the log-sum-exp."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        rpb: Tensor | None,
        additional_keys: Tensor | None,
        additional_values: Tensor | None,
        axes: tuple[Axis, ...],
        scale: float,
        return_lse: bool,
        single_chunk: bool,
    ) -> tuple[Tensor, Tensor | None]:
        ctx.save_for_backward(query, key, value, rpb, additional_keys, additional_values)
        ctx.axes, ctx.scale, ctx.single_chunk = axes, scale, single_chunk
        dtype = compute_dtype(query.dtype)
        table = _bias_table(axes, rpb, dtype, query.device)
        additional = 0 if additional_keys is None else additional_keys.shape[1]
        width = value.shape[-1]
        output = query.new_empty(*query.shape[:-1], width)
        lse = query.new_empty(query.shape[:-1], dtype=dtype) if return_lse else None
        query_all, key_all, value_all = (x.reshape(-1, x.shape[-1]) for x in (query, key, value))
        for chunk in _chunks(query, key, axes, table, additional, single_chunk):
            q = _gather(query_all, chunk.query_rows, None, chunk, dtype)
            k = _gather(key_all, chunk.key_rows, additional_keys, chunk, dtype)
            v = _gather(value_all, chunk.key_rows, additional_values, chunk, dtype)
            scores = _scores(q, k, chunk, scale)
            out = scores.softmax(-1) @ v
            # A padding slot holds the same query as its owner, so that it is no matter which of them is written last.
            output.view(-1, width).index_copy_(0, chunk.query_rows, out.reshape(-1, width).to(output.dtype))
            if lse is not None:
                lse.view(-1).index_copy_(0, chunk.query_rows, scores.logsumexp(-1).flatten())
        return output, lse

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_output: Tensor, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
        inputs = ctx.saved_tensors  # read once: activation checkpointing allows no more
        query, key, value, rpb, additional_keys, additional_values = inputs
        axes, scale, single_chunk = ctx.axes, ctx.scale, ctx.single_chunk
        dtype = compute_dtype(query.dtype)
        table = _bias_table(axes, rpb, dtype, query.device)
        additional = 0 if additional_keys is None else additional_keys.shape[1]
        sources = (query, key, value, table, additional_keys, additional_values)
        grads = [None if x is None else torch.zeros(x.shape, dtype=dtype, device=x.device) for x in sources]
        grad_query, grad_key, grad_value, grad_table, grad_additional_keys, grad_additional_values = grads
        assert grad_query is not None and grad_key is not None and grad_value is not None and grad_table is not None
        query_all, key_all, value_all = (x.reshape(-1, x.shape[-1]) for x in (query, key, value))
        grad_output_all = grad_output.reshape(-1, grad_output.shape[-1])
        with without_autocast(query.device):
            for chunk in _chunks(query, key, axes, table, additional, single_chunk):
                q = _gather(query_all, chunk.query_rows, None, chunk, dtype)
                k = _gather(key_all, chunk.key_rows, additional_keys, chunk, dtype)
                v = _gather(value_all, chunk.key_rows, additional_values, chunk, dtype)
                grad_out = _gather(grad_output_all, chunk.query_rows, None, chunk, dtype)
                probabilities = _scores(q, k, chunk, scale).softmax(-1)
                is_padding = None if chunk.padding is None else chunk.padding.reshape(*q.shape[:2], 1)
                if is_padding is not None:
                    grad_out = grad_out.masked_fill(is_padding, 0)
                # The fused form of p * (dp - sum(p * dp)): one pass over the scores instead of three.
                grad_scores = torch._softmax_backward_data(grad_out @ v.mT, probabilities, -1, dtype)
                if grad_lse is not None:
                    grad_l = grad_lse.reshape(-1).index_select(0, chunk.query_rows).reshape(*q.shape[:2], 1)
                    if is_padding is not None:
                        grad_l = grad_l.masked_fill(is_padding, 0)
                    grad_scores = grad_scores + probabilities * grad_l

                _scatter_add(grad_query, chunk.query_rows, (grad_scores @ k).mul_(scale), None, chunk)
                _scatter_add(grad_key, chunk.key_rows, (grad_scores.mT @ q).mul_(scale), grad_additional_keys, chunk)
                _scatter_add(grad_value, chunk.key_rows, probabilities.mT @ grad_out, grad_additional_values, chunk)
                if rpb is not None:
                    window_scores = grad_scores[..., : grad_scores.shape[-1] - additional]
                    per_head = window_scores.reshape(*chunk.bias.shape[:3], -1, *chunk.bias_index.shape[1:])
                    per_head = per_head.sum(0).transpose(1, 2).reshape(len(table), -1)
                    grad_table.index_add_(1, chunk.bias_index.flatten(), per_head)
        grad_rpb = None if rpb is None else grad_table[:, :-1].reshape(rpb.shape)
        grads = [grad_query, grad_key, grad_value, grad_rpb, grad_additional_keys, grad_additional_values]
        typed = [None if g is None else g.to(x.dtype) for g, x in zip(grads, inputs, strict=True)]
        return *typed, None, None, None, None


def _scatter_add(grad: Tensor, rows: Tensor, matrices: Tensor, grad_additional: Tensor | None, chunk: _Chunk) -> None:
    """The transpose of `_gather`: adds matrices `[n, rows + M, width]` to the gradients of what they came from."""
    width = matrices.shape[-1]
    if grad_additional is not None:
        additional = grad_additional.shape[1]
        extra = matrices[:, matrices.shape[1] - additional :].reshape(*chunk.bias.shape[:3], additional, width)
        grad_additional[chunk.batch] += extra.sum(2).transpose(1, 2)
        matrices = matrices[:, : matrices.shape[1] - additional]
    grad.view(-1, width).index_add_(0, rows, matrices.reshape(-1, width))


@torch.compiler.allow_in_graph  # torch.compile then sees the tensor operations, not how tiles are found
def _apply(*arguments: Any) -> tuple[Tensor, Tensor | None]:
    return _BlockedAttention.apply(*arguments)


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    axes: tuple[Axis, ...],
    scale: float,
    rpb: Tensor | None,
    additional_keys: Tensor | None,
    additional_values: Tensor | None,
    return_lse: bool,
) -> tuple[Tensor, Tensor | None]:
    """Neighborhood attention over already checked arguments; see `fused_na.neighborhood_attention` for their meaning.

    Computes in float64 for float64 inputs and in float32 for everything else.

    Returns:
        output `[B, *spatial, heads, head_dim_v]` in the query's dtype; with `return_lse` the log-sum-exp
        `[B, *spatial, heads]` in the computing dtype, else None.
    """
    single_chunk = torch.compiler.is_compiling()
    return _apply(
        query, key, value, rpb, additional_keys, additional_values, axes, scale, return_lse, single_chunk
    )  # fmt: skip
