"""The portable fast path: neighborhood attention over tiles of queries in plain PyTorch, for any device and for export.

Each tile of queries gathers the union of its windows and attends to it in dense matrix products; pairs outside the
neighborhood are masked. Eagerly, work proceeds in chunks that fit a core's cache, and the backward pass computes the
probabilities again, so that memory beyond inputs, outputs and gradients stays that of one chunk. In a traced graph
there is one chunk, so that the batch may be dynamic.
"""

from collections.abc import Iterator
from functools import lru_cache
from math import ceil, e, log2, prod
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses import FakeTensor

from fused_na.precision import compute_dtype, without_autocast
from fused_na.tiling import Tiles, tile_axes, tile_map
from fused_na.window import Axis

CHUNK_SCORES = 1 << 18  # scores held at a time for each thread: 1 MiB of float32
LOG2_E = log2(e)


class _Block(NamedTuple):
    """`T` tiles, worked on together for up to `b` samples at a time: `n = b * heads_kv * T` dense problems.

    Each is a matrix of `R = heads / heads_kv * Q` queries and one of `K` keys.
    """

    query_rows: Tensor  # [b, heads_kv, T, R] among the rows `b * tokens * heads` of the query
    key_rows: Tensor  # [b, heads_kv, T, K] among the rows `b * tokens * heads_kv` of the key
    padding: Tensor | None  # bool [b, heads_kv, T, R], queries that repeat another; None if there are none
    bias_rows: Tensor  # [heads_kv * T] each problem's row of the bias `[heads_kv * P, R * (K + M)]`
    bias_index: Tensor  # [P, Q, K] into a head's row of the bias table, whose last entry is for pairs outside

    def chunks(self, batches: list[slice]) -> Iterator["_Chunk"]:
        """The same tiles of all samples, at most `b` at a time."""
        for batch in batches:
            b = batch.stop - batch.start
            yield _Chunk(
                batch,
                (b, *self.query_rows.shape[1:3]),
                self.query_rows[:b].flatten(),
                self.key_rows[:b].flatten(),
                None if self.padding is None else self.padding[:b].flatten(0, 2)[..., None],
            )


class _Chunk(NamedTuple):
    """A block's tiles of some samples, flat; names as in `_Block`."""

    batch: slice
    shape: tuple[int, int, int]  # b, heads_kv, T
    query_rows: Tensor  # [n * R]
    key_rows: Tensor  # [n * K]
    padding: Tensor | None  # [n, R, 1]


def _chunks(
    query: Tensor, key: Tensor, axes: tuple[Axis, ...], single_chunk: bool
) -> Iterator[tuple[_Block, Iterator[_Chunk]]]:
    """Cuts a problem into blocks of chunks, or into a single one."""
    per_axis = tile_axes(axes)
    batch_size, heads, heads_kv = query.shape[0], query.shape[-2], key.shape[-2]
    count = prod(len(a.query) for a in per_axis)
    if single_chunk:
        # Not cached: a trace in progress would leave its own tensors.
        block = _block.__wrapped__(axes, count, 0, batch_size, heads, heads_kv, query.device)
        yield block, block.chunks([slice(0, batch_size)])
        return
    tile_scores = heads * prod(len(a.query[0]) * len(a.key[0]) for a in per_axis)
    chunk_scores = CHUNK_SCORES * torch.get_num_threads()
    tile_step = min(max(1, chunk_scores // tile_scores), count)
    batch_step = max(1, min(chunk_scores // (tile_scores * tile_step), batch_size))
    batches = [slice(i, min(i + batch_step, batch_size)) for i in range(0, batch_size, batch_step)]
    cut = _block.__wrapped__ if isinstance(query, FakeTensor) else _block
    for index in range(ceil(count / tile_step)):
        block = cut(axes, tile_step, index, batch_step, heads, heads_kv, query.device)
        yield block, block.chunks(batches)


@lru_cache(maxsize=32)  # the few blocks of a model's few sizes of maps
def _block(
    axes: tuple[Axis, ...],
    tile_step: int,
    index: int,
    batch_step: int,
    heads: int,
    heads_kv: int,
    device: torch.device,
) -> _Block:
    """The block of tiles from `index * tile_step` on."""
    per_axis = tile_axes(axes)
    tiles = tile_map(axes, tile_step)[index]
    lengths = [axis.length for axis in axes]
    query_tokens, key_tokens, padding = (
        _tokens(tables, tiles, lengths).to(device)
        for tables in zip(*((a.query, a.key, a.padding) for a in per_axis), strict=True)
    )
    is_padding = (padding > 0)[:, None].expand(batch_step, heads_kv, -1, heads // heads_kv, -1).flatten(3)
    bias_rows = torch.arange(heads_kv)[:, None] * len(tiles.patterns[0]) + torch.tensor(tiles.pattern)
    return _Block(
        _rows(query_tokens, batch_step, prod(lengths), heads, heads_kv),
        _rows(key_tokens, batch_step, prod(lengths), heads_kv, heads_kv),
        is_padding if any(1 in row for a in per_axis for row in a.padding) else None,
        bias_rows.flatten().to(device),
        _bias_index(axes, tiles).to(device),
    )


def _tokens(tables: tuple[list[list[int]], ...], tiles: Tiles, lengths: list[int]) -> Tensor:
    """Tokens of the map `[T, Q]` from each axis's coordinates `[its tiles][Q]`; or `K` keys instead of queries."""
    per_axis = [torch.tensor(table)[torch.tensor(i)] for table, i in zip(tables, tiles.tiles, strict=True)]
    return _outer_sum(per_axis, lengths)


def _outer_sum(per_axis: list[Tensor], sizes: list[int]) -> Tensor:
    """Joins indices `[T, n_i, ...]` into axes of these sizes to flat indices `[T, n_1 * n_2 * ..., ...]`."""
    joined = per_axis[0]
    for table, size in zip(per_axis[1:], sizes[1:], strict=True):
        tiles, *outer = joined.shape
        inner = table.shape[1:]
        joined = (joined * size).reshape(tiles, *(n for a in outer for n in (a, 1)))
        joined = joined + table.reshape(tiles, *(n for b in inner for n in (1, b)))
        joined = joined.reshape(tiles, *(a * b for a, b in zip(outer, inner, strict=True)))
    return joined


def _rows(tokens: Tensor, batch_size: int, map_size: int, heads: int, heads_kv: int) -> Tensor:
    """Rows `[batch, heads_kv, T, heads / heads_kv * Q]` of tokens `[T, Q]` among `batch * map_size * heads`."""
    sample = torch.arange(batch_size, device=tokens.device).reshape(-1, 1, 1, 1, 1)
    head = torch.arange(heads, device=tokens.device).reshape(1, heads_kv, 1, -1, 1)
    return (sample * (map_size * heads) + (tokens[:, None] * heads + head)).flatten(3)


def _bias_index(axes: tuple[Axis, ...], tiles: Tiles) -> Tensor:
    """Index of each pair of a tile's query and key into the bias table `[P, Q, K]`; the last entry outside windows."""
    sizes = [2 * axis.kernel_size - 1 for axis in axes]
    offsets = []
    for axis, a, which in zip(axes, tile_axes(axes), tiles.patterns, strict=True):
        position, start, end = torch.tensor([a.position, a.start, a.end])[:, torch.tensor(which), :, None]
        key = torch.arange(len(a.key[0]))
        offset = key - position + axis.kernel_size - 1
        # On one axis outside is enough to exceed all positions.
        offsets.append(offset.where((key >= start) & (key < end), prod(sizes)))
    return _outer_sum(offsets, sizes).clamp(max=prod(sizes))


def _bias_table(axes: tuple[Axis, ...], rpb: Tensor | None, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Additive score of every relative position, to base 2, and -inf as last entry: `[heads or 1, positions + 1]`."""
    if rpb is None:
        flat = torch.zeros(1, prod(2 * axis.kernel_size - 1 for axis in axes), dtype=dtype, device=device)
    else:
        flat = rpb.flatten(1).to(dtype) * LOG2_E
    return torch.nn.functional.pad(flat, (0, 1), value=float("-inf"))


def _bias(table: Tensor, block: _Block, heads: int, heads_kv: int, additional: int) -> Tensor:
    """Additive scores `[heads_kv * P, R * (K + M)]` of a block's patterns, -inf outside the neighborhood."""
    bias = table.index_select(1, block.bias_index.flatten()).reshape(-1, *block.bias_index.shape)
    bias = bias.expand(heads, -1, -1, -1).reshape(heads_kv, -1, *block.bias_index.shape).transpose(1, 2)
    return torch.nn.functional.pad(bias, (0, additional)).flatten(0, 1).flatten(1)


def _gather(x: Tensor, rows: Tensor, additional: Tensor | None, chunk: _Chunk, dtype: torch.dtype) -> Tensor:
    """A chunk's matrices `[n, rows + M, width]` of `x [..., width]` and `additional [B, M, heads_kv, width]`."""
    b, heads_kv, tiles = chunk.shape
    width = x.shape[-1]
    matrices = x[chunk.batch].view(-1, width).index_select(0, rows).to(dtype).reshape(b * heads_kv * tiles, -1, width)
    if additional is None:
        return matrices
    extra = additional[chunk.batch].transpose(1, 2).to(dtype).unsqueeze(2)
    extra = extra.expand(-1, -1, tiles, -1, -1).reshape(b * heads_kv * tiles, -1, width)
    return torch.cat([matrices, extra], dim=1)


def _scores(query: Tensor, key: Tensor, bias: Tensor, block: _Block, chunk: _Chunk, scale: float) -> Tensor:
    """Scaled and biased scores `[n, R, K + M]` of one chunk's matrices, to base 2: exp2 is faster than exp."""
    rows = block.bias_rows.expand(chunk.shape[0], -1).flatten()
    bias = bias.index_select(0, rows).reshape(*query.shape[:2], key.shape[1])
    return bias.baddbmm_(query, key.mT, alpha=scale * LOG2_E)


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
        dtype = compute_dtype(query.dtype)
        table = _bias_table(axes, rpb, dtype, query.device)
        additional = 0 if additional_keys is None else additional_keys.shape[1]
        width = value.shape[-1]
        query, key, value = query.contiguous(), key.contiguous(), value.contiguous()
        output = query.new_empty(*query.shape[:-1], width)
        lse = query.new_empty(query.shape[:-1], dtype=dtype)  # to base 2
        for block, chunks in _chunks(query, key, axes, single_chunk):
            bias = _bias(table, block, query.shape[-2], key.shape[-2], additional)
            for chunk in chunks:
                q = _gather(query, chunk.query_rows, None, chunk, dtype)
                k = _gather(key, chunk.key_rows, additional_keys, chunk, dtype)
                v = _gather(value, chunk.key_rows, additional_values, chunk, dtype)
                scores = _scores(q, k, bias, block, chunk, scale)
                highest = scores.amax(-1, keepdim=True)
                weights = scores.sub_(highest).exp2_()
                total = weights.sum(-1, keepdim=True)
                out = (weights @ v).div_(total)
                # A padding slot holds the same query as its owner: it is no matter which of them is written last.
                rows = chunk.query_rows
                output[chunk.batch].view(-1, width).index_copy_(0, rows, out.flatten(0, 1).to(output.dtype))
                lse[chunk.batch].view(-1).index_copy_(0, rows, total.log2_().add_(highest).flatten())
        ctx.save_for_backward(query, key, value, rpb, additional_keys, additional_values, output, lse)
        ctx.axes, ctx.scale, ctx.single_chunk = axes, scale, single_chunk
        return output, lse / LOG2_E if return_lse else None

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_output: Tensor, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
        *inputs, output, lse = ctx.saved_tensors
        query, key, value, rpb, additional_keys, additional_values = inputs
        axes, scale, single_chunk = ctx.axes, ctx.scale, ctx.single_chunk
        dtype = compute_dtype(query.dtype)
        table = _bias_table(axes, rpb, dtype, query.device)
        additional = 0 if additional_keys is None else additional_keys.shape[1]
        sources = (query, key, value, table, additional_keys, additional_values)
        grads = [None if x is None else torch.zeros(x.shape, dtype=dtype, device=x.device) for x in sources]
        grad_query, grad_key, grad_value, grad_table, grad_additional_keys, grad_additional_values = grads
        assert grad_query is not None and grad_key is not None and grad_value is not None and grad_table is not None
        # What the softmax takes off the gradient of every score: sum over j of p_j * dp_j = output . grad_output.
        delta = (output.to(dtype) * grad_output).sum(-1)
        delta = delta if grad_lse is None else delta - grad_lse
        grad_output = grad_output.contiguous()
        with without_autocast(query.device):
            for block, chunks in _chunks(query, key, axes, single_chunk):
                bias = _bias(table, block, query.shape[-2], key.shape[-2], additional)
                grad_bias = torch.zeros_like(bias)
                for chunk in chunks:
                    q = _gather(query, chunk.query_rows, None, chunk, dtype)
                    k = _gather(key, chunk.key_rows, additional_keys, chunk, dtype)
                    v = _gather(value, chunk.key_rows, additional_values, chunk, dtype)
                    grad_out = _gather(grad_output, chunk.query_rows, None, chunk, dtype)
                    chunk_lse, chunk_delta = (
                        x[chunk.batch].view(-1).index_select(0, chunk.query_rows).reshape(*q.shape[:2], 1)
                        for x in (lse, delta)
                    )
                    if chunk.padding is not None:
                        chunk_lse = chunk_lse.masked_fill(chunk.padding, float("inf"))  # probabilities become 0
                    probabilities = _scores(q, k, bias, block, chunk, scale).sub_(chunk_lse).exp2_()
                    grad_scores = (grad_out @ v.mT).sub_(chunk_delta).mul_(probabilities)
                    _scatter_add(grad_query, chunk.query_rows, grad_scores @ k, None, chunk)
                    _scatter_add(grad_key, chunk.key_rows, grad_scores.mT @ q, grad_additional_keys, chunk)
                    _scatter_add(grad_value, chunk.key_rows, probabilities.mT @ grad_out, grad_additional_values, chunk)
                    if rpb is not None:
                        grad_samples = grad_scores.view(chunk.shape[0], -1, bias.shape[1]).sum(0)
                        grad_bias.index_add_(0, block.bias_rows, grad_samples)
                if rpb is not None:
                    patterns, queries, keys = block.bias_index.shape
                    grad_bias = grad_bias.reshape(key.shape[-2], patterns, -1, queries, keys + additional)
                    grad_bias = grad_bias[..., :keys].transpose(1, 2).reshape(len(table), -1)
                    grad_table.index_add_(1, block.bias_index.flatten(), grad_bias)
        grad_rpb = None if rpb is None else grad_table[:, :-1].reshape(rpb.shape)
        for g in (grad_query, grad_key, grad_additional_keys):
            if g is not None:
                g.mul_(scale)
        grads = [grad_query, grad_key, grad_value, grad_rpb, grad_additional_keys, grad_additional_values]
        typed = [None if g is None else g.to(x.dtype) for g, x in zip(grads, inputs, strict=True)]
        return *typed, None, None, None, None


def _scatter_add(grad: Tensor, rows: Tensor, matrices: Tensor, grad_additional: Tensor | None, chunk: _Chunk) -> None:
    """The transpose of `_gather`: adds matrices `[n, rows + M, width]` to the gradients of what they came from."""
    width = matrices.shape[-1]
    if grad_additional is not None:
        additional = grad_additional.shape[1]
        extra = matrices[:, matrices.shape[1] - additional :].reshape(*chunk.shape, additional, width)
        grad_additional[chunk.batch] += extra.sum(2).transpose(1, 2)
        matrices = matrices[:, : matrices.shape[1] - additional]
    grad[chunk.batch].view(-1, width).index_add_(0, rows, matrices.reshape(-1, width))


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
