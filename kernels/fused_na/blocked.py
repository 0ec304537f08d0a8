"""The portable fast path: neighborhood attention over tiles of queries in plain PyTorch, for any device and for export.

Each tile of queries gathers the union of its windows and attends to it in dense matrix products; pairs outside the neighborhood are masked.
Eagerly, work proceeds in chunks that fit a core's cache, and the backward pass computes the probabilities again, so that memory beyond
inputs, outputs and gradients stays that of one chunk. In a traced graph there is one chunk, so that the batch may be dynamic.
"""

from collections.abc import Iterator
from functools import lru_cache
from itertools import product
from math import ceil, prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fused_na.window import Axis, group_members, window

CHUNK_SCORES = 1 << 18  # scores held at a time: 1 MiB of float32


class AxisTiles(NamedTuple):
    """The tiles of one axis: `T` tiles of `Q` queries and `K` keys each, as int64 tensors."""

    query: Tensor  # [T, Q] coordinates; a tile that is not full repeats its group's last token
    padding: Tensor  # [T, Q] -1 for such a repetition, else 0
    key: Tensor  # [T, K] coordinates
    bias_index: Tensor  # [T, Q, K] offset along this axis of the relative positional bias, -1 outside the window


@lru_cache(maxsize=256)
def choose_tile(axes: tuple[Axis, ...]) -> tuple[int, ...]:
    """Queries per tile and axis that minimise an estimate of the problem's time (weights measured on a CPU with AVX-512)."""

    def candidates(axis: Axis) -> list[tuple[int, int, int]]:
        """(queries a tile, tiles, keys a tile) for every even split of the axis."""
        members = ceil(axis.length / axis.dilation)
        sizes = {ceil(members / parts) for parts in range(1, members + 1)}
        return [
            (
                size,
                ceil(members / size) * axis.dilation,
                min(members, axis.kernel_size + (size + axis.stride - 2) // axis.stride * axis.stride),
            )
            for size in sizes
            if size <= 64
        ]

    def cost(choice: tuple[tuple[int, int, int], ...]) -> float:
        queries, tiles, keys = (prod(column) for column in zip(*choice, strict=True))
        # Gathering a key and its value costs about as much as 16 scores, and products of few rows run at a fraction of full speed.
        return tiles * keys * (queries + 16) * (1 + 8 / queries)

    best = min(product(*map(candidates, axes)), key=cost)
    return tuple(queries for queries, _, _ in best)


def tile_axis(axis: Axis, tile: int) -> AxisTiles:
    """Cuts one axis, dilation group by dilation group, into tiles of `tile` queries."""
    group = torch.arange(axis.dilation)
    members = group_members(axis, group)
    tiles_per_group = ceil(ceil(axis.length / axis.dilation) / tile)
    group = group.repeat_interleave(tiles_per_group)[:, None]
    members = members.repeat_interleave(tiles_per_group)[:, None]
    query = (torch.arange(tiles_per_group) * tile).repeat(axis.dilation)[:, None] + torch.arange(tile)
    padding = torch.where(query < members, 0, -1)
    query = torch.minimum(query, members - 1)
    start, end = window(axis, query, members)
    first = start.amin(1, keepdim=True)
    key = first + torch.arange(int((end.amax(1, keepdim=True) - first).max()))
    attends = (key[:, None] >= start[..., None]) & (key[:, None] < end[..., None])
    bias_index = torch.where(attends, key[:, None] - query[..., None] + axis.kernel_size - 1, -1)
    key = torch.minimum(key, members - 1)
    return AxisTiles(query * axis.dilation + group, padding, key * axis.dilation + group, bias_index)


def _build_tiles(axes: tuple[Axis, ...]) -> tuple[AxisTiles, ...]:
    return tuple(tile_axis(axis, tile) for axis, tile in zip(axes, choose_tile(axes), strict=True))


_cached_tiles = lru_cache(maxsize=256)(_build_tiles)


def _join(per_axis: list[Tensor], sizes: list[int]) -> Tensor:
    """Joins indices `[T, Q_i, ...]` into axes of the given sizes to flat indices `[T, Q, ...]`; a negative index makes the joined one -1."""
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
    """Tiles that are worked on together, as `n = b * heads_kv * T` dense problems of `queries = heads / heads_kv * Q` by `K`."""

    batch: slice
    query_rows: Tensor  # [n * queries] among the query's `B * tokens * heads` rows
    key_rows: Tensor  # [n * K] among the key's `B * tokens * heads_kv` rows
    padding: Tensor | None  # bool [n * queries], slots that repeat a query; None if there are none
    bias: Tensor  # [b, heads_kv, T, queries, K + M], -inf outside the neighborhood; M additional keys
    bias_index: Tensor  # [T, Q, K] into one head's row of the bias table; its last entry is for pairs outside the neighborhood


def _rows(tokens: Tensor, batch: slice, map_size: int, heads: int, heads_kv: int) -> Tensor:
    """Rows of tokens `[T, Q]` in a `[B * map_size * heads, head_dim]` view, ordered as `[b, heads_kv, T, heads / heads_kv, Q]`."""
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


def _chunks(query: Tensor, key: Tensor, axes: tuple[Axis, ...], table: Tensor, additional: int) -> Iterator[_Chunk]:
    """Cuts a problem into chunks; `table` is the bias table `[heads or 1, positions + 1]`."""
    batch_size, heads, heads_kv = query.shape[0], query.shape[-2], key.shape[-2]
    group = heads // heads_kv
    # Tables made while a graph is traced belong to that trace alone.
    traced = torch.compiler.is_compiling() or type(query) not in (Tensor, torch.nn.Parameter)
    per_axis = (_build_tiles if traced else _cached_tiles)(axes)
    counts = [tiles.query.shape[0] for tiles in per_axis]
    tile_scores = heads * prod(tiles.bias_index[0].numel() for tiles in per_axis)
    has_padding = any(tiles.query.numel() > axis.length for tiles, axis in zip(per_axis, axes, strict=True))
    tile_step = prod(counts) if traced else max(1, CHUNK_SCORES // tile_scores)
    batch_step = batch_size if traced else max(1, CHUNK_SCORES // (tile_scores * min(tile_step, prod(counts))))

    lengths = [axis.length for axis in axes]
    for tile in torch.arange(prod(counts)).split(tile_step):
        which = torch.unravel_index(tile, counts)
        query_tokens, padding, key_tokens, bias_index = (
            _join([tiles[field][i] for tiles, i in zip(per_axis, which, strict=True)], sizes).to(query.device)
            for field, sizes in enumerate((lengths, [1] * len(axes), lengths, [2 * axis.kernel_size - 1 for axis in axes]))
        )
        bias_index = bias_index.where(bias_index >= 0, table.shape[1] - 1)
        bias = table.index_select(1, bias_index.flatten()).reshape(-1, 1, *bias_index.shape)
        bias = bias.expand(heads, -1, -1, -1, -1).reshape(heads_kv, group, *bias_index.shape).transpose(1, 2).flatten(2, 3)
        if additional:
            bias = torch.nn.functional.pad(bias, (0, additional))
        for start in range(0, batch_size, batch_step):
            batch = slice(start, min(start + batch_step, batch_size))
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
    """Rows of `x` as the matrices of a chunk `[n, rows, width]`, followed by the additional tokens `[B, M, heads_kv, width]`."""
    b, heads_kv, tiles = chunk.bias.shape[:3]
    width = x.shape[-1]
    matrices = x.reshape(-1, width).index_select(0, rows).to(dtype).reshape(b * heads_kv * tiles, -1, width)
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
    ) -> tuple[Tensor, Tensor | None]:
        ctx.save_for_backward(query, key, value, rpb, additional_keys, additional_values)
        ctx.axes, ctx.scale = axes, scale
        dtype = _compute_dtype(query)
        table = _bias_table(axes, rpb, dtype, query.device)
        additional = 0 if additional_keys is None else additional_keys.shape[1]
        width = value.shape[-1]
        output = query.new_empty(*query.shape[:-1], width)
        lse = query.new_empty(query.shape[:-1], dtype=dtype) if return_lse else None
        for chunk in _chunks(query, key, axes, table, additional):
            q = _gather(query, chunk.query_rows, None, chunk, dtype)
            k = _gather(key, chunk.key_rows, additional_keys, chunk, dtype)
            v = _gather(value, chunk.key_rows, additional_values, chunk, dtype)
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
        query, key, value, rpb, additional_keys, additional_values = ctx.saved_tensors
        axes, scale = ctx.axes, ctx.scale
        dtype = _compute_dtype(query)
        table = _bias_table(axes, rpb, dtype, query.device)
        additional = 0 if additional_keys is None else additional_keys.shape[1]
        sources = (query, key, value, table, additional_keys, additional_values)
        grads = [None if x is None else torch.zeros(x.shape, dtype=dtype, device=x.device) for x in sources]
        grad_query, grad_key, grad_value, grad_table, grad_additional_keys, grad_additional_values = grads
        assert grad_query is not None and grad_key is not None and grad_value is not None and grad_table is not None
        for chunk in _chunks(query, key, axes, table, additional):
            q = _gather(query, chunk.query_rows, None, chunk, dtype)
            k = _gather(key, chunk.key_rows, additional_keys, chunk, dtype)
            v = _gather(value, chunk.key_rows, additional_values, chunk, dtype)
            grad_out = _gather(grad_output, chunk.query_rows, None, chunk, dtype)
            probabilities = _scores(q, k, chunk, scale).softmax(-1)
            correction = torch.zeros((), dtype=dtype, device=query.device)
            if grad_lse is not None:
                correction = grad_lse.reshape(-1).index_select(0, chunk.query_rows).reshape(*q.shape[:2], 1)
            if chunk.padding is not None:
                grad_out = grad_out.masked_fill(chunk.padding.reshape(*q.shape[:2], 1), 0)
                correction = correction.masked_fill(chunk.padding.reshape(*q.shape[:2], 1), 0)
            grad_probabilities = grad_out @ v.mT
            correction = correction - (probabilities * grad_probabilities).sum(-1, keepdim=True)
            grad_scores = grad_probabilities.add_(correction).mul_(probabilities)

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
        typed = [None if g is None else g.to(x.dtype) for g, x in zip(grads, ctx.saved_tensors, strict=True)]
        return *typed, None, None, None


def _scatter_add(grad: Tensor, rows: Tensor, matrices: Tensor, grad_additional: Tensor | None, chunk: _Chunk) -> None:
    """The transpose of `_gather`: adds matrices `[n, rows, width]` to the gradients of the tokens that they came from."""
    width = matrices.shape[-1]
    if grad_additional is not None:
        additional = grad_additional.shape[1]
        extra = matrices[:, matrices.shape[1] - additional :].reshape(*chunk.bias.shape[:3], additional, width)
        grad_additional[chunk.batch] += extra.sum(2).transpose(1, 2)
        matrices = matrices[:, : matrices.shape[1] - additional]
    grad.view(-1, width).index_add_(0, rows, matrices.reshape(-1, width))


def _compute_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


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
        output `[B, *spatial, heads, head_dim_v]` in the query's dtype; with `return_lse` the log-sum-exp `[B, *spatial, heads]` in the
        computing dtype, else None.
    """
    return _BlockedAttention.apply(
        query, key, value, rpb, additional_keys, additional_values, axes, scale, return_lse
    )  # fmt: skip
