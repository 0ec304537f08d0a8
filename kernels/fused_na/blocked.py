"""The portable fast path: neighborhood attention over tiles of queries in plain PyTorch, for any device and for export.

Each tile of queries gathers the union of its windows and attends to it in dense matrix products; pairs outside the
neighborhood are masked. Eagerly, work proceeds in chunks that fit a core's cache, and the backward pass computes the
probabilities again, so that memory beyond inputs, outputs and gradients stays that of one chunk. In a traced graph
there is one chunk, so that the batch may be dynamic.
"""

from collections.abc import Iterator
from functools import lru_cache
from itertools import product
from math import ceil, e, log2, prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fused_na.precision import compute_dtype, without_autocast
from fused_na.window import Axis, group_members, window

CHUNK_SCORES = 1 << 18  # scores held at a time: 1 MiB of float32
LOG2_E = log2(e)


class AxisTiles(NamedTuple):
    """The tiles of one axis: `T` tiles of `Q` queries that see `K` keys, with `P` different patterns of who sees whom.

    Lists, not tensors, for they are cached, and a trace in progress would leave its own tensors in the cache.
    """

    query: list[list[int]]  # [T][Q] coordinates; a tile that is not full repeats its group's last one
    padding: list[list[int]]  # [T][Q] 1 where a query is such a repetition, else 0
    key: list[list[int]]  # [T][K] coordinates
    pattern: list[int]  # [T]
    position: list[list[int]]  # [P][Q] queries, counted within the dilation group from the tile's first key
    start: list[list[int]]  # [P][Q] window of each query, counted likewise
    end: list[list[int]]  # [P][Q]


def tile_axis(axis: Axis, size: int) -> AxisTiles:
    """Cuts one axis, dilation group by dilation group, into tiles of `size` queries."""
    tiles = AxisTiles([], [], [], [], [], [], [])
    patterns: dict[tuple, int] = {}
    spans = []
    for group in range(axis.dilation):
        members = group_members(axis, group)
        for begin in range(0, group_members(axis, 0), size):
            query = [min(i, members - 1) for i in range(begin, begin + size)]
            windows = [window(axis, i, members) for i in query]
            first = windows[0][0]
            pattern = tuple(
                (i - first, start - first, end - first) for i, (start, end) in zip(query, windows, strict=True)
            )
            tiles.query.append([i * axis.dilation + group for i in query])
            tiles.padding.append([int(i >= members) for i in range(begin, begin + size)])
            tiles.pattern.append(patterns.setdefault(pattern, len(patterns)))
            spans.append((group, members, first, windows[-1][1]))
    keys = max(end - first for _, _, first, end in spans)
    for group, members, first, _ in spans:
        tiles.key.append([min(j, members - 1) * axis.dilation + group for j in range(first, first + keys)])
    for pattern in patterns:
        for table, column in zip((tiles.position, tiles.start, tiles.end), zip(*pattern, strict=True), strict=True):
            table.append(list(column))
    return tiles


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
    """The tiles of every axis."""
    return tuple(tile_axis(axis, size) for axis, size in zip(axes, choose_tile(axes), strict=True))


@lru_cache(maxsize=256)
def _tile_chunks(axes: tuple[Axis, ...], size: int) -> list[tuple[list, list, list[int]]]:
    """Cuts the tiles into chunks of `size`: each one's tiles by axis, patterns by axis, and pattern of each tile."""
    per_axis = tile_axes(axes)
    tiles = list(product(*(range(len(tiles.query)) for tiles in per_axis)))
    chunks = []
    for begin in range(0, len(tiles), size):
        chunk = tiles[begin : begin + size]
        patterns: dict[tuple, int] = {}
        pattern_of_tile = [
            patterns.setdefault(tuple(a.pattern[i] for a, i in zip(per_axis, tile, strict=True)), len(patterns))
            for tile in chunk
        ]
        chunks.append((list(zip(*chunk, strict=True)), list(zip(*patterns, strict=True)), pattern_of_tile))
    return chunks


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


class _Tiles(NamedTuple):
    """`T` tiles, to be worked on together for `b` samples at a time: `n = b * heads_kv * T` dense problems.

    Each is a matrix of `R = heads / heads_kv * Q` queries and one of `K` keys.
    """

    batches: list[slice]  # of up to b samples
    query_rows: Tensor  # [b, heads_kv, T, R] of the first samples among the query's `B * tokens * heads` rows
    key_rows: Tensor  # [b, heads_kv, T, K] of the first samples among the key's `B * tokens * heads_kv` rows
    padding: Tensor | None  # bool [b, heads_kv, T, R], queries that repeat another; None if there are none
    bias: Tensor  # [heads_kv * P, R * (K + M)], -inf outside the neighborhood; M additional keys
    bias_rows: Tensor  # [b, heads_kv, T] each problem's row of the bias
    bias_index: Tensor  # [P, Q, K] into a head's row of the bias table, whose last entry is for pairs outside


class _Chunk(NamedTuple):
    """Tiles of some samples; names as in `_Tiles`."""

    batch: slice
    shape: tuple[int, int, int]  # b, heads_kv, T
    query_rows: Tensor  # [n * R]
    key_rows: Tensor  # [n * K]
    padding: Tensor | None  # [n, R, 1]
    bias_rows: Tensor  # [n]


def _chunk(tiles: _Tiles, batch: slice, query: Tensor, key: Tensor) -> _Chunk:
    b = batch.stop - batch.start
    return _Chunk(
        batch,
        (b, *tiles.bias_rows.shape[1:]),
        (tiles.query_rows[:b] + batch.start * prod(query.shape[1:-1])).flatten(),
        (tiles.key_rows[:b] + batch.start * prod(key.shape[1:-1])).flatten(),
        None if tiles.padding is None else tiles.padding[:b].flatten(0, 2)[..., None],
        tiles.bias_rows[:b].flatten(),
    )


def _rows(tokens: Tensor, batch_size: int, map_size: int, heads: int, heads_kv: int) -> Tensor:
    """Rows `[batch, heads_kv, T, heads / heads_kv * Q]` of tokens `[T, Q]` among `batch * map_size * heads`."""
    sample = torch.arange(batch_size, device=tokens.device).reshape(-1, 1, 1, 1, 1)
    head = torch.arange(heads, device=tokens.device).reshape(1, heads_kv, 1, -1, 1)
    return (sample * (map_size * heads) + (tokens[:, None] * heads + head)).flatten(3)


def _bias_table(axes: tuple[Axis, ...], rpb: Tensor | None, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Additive score of every relative position, to base 2, and -inf as last entry: `[heads or 1, positions + 1]`."""
    if rpb is None:
        flat = torch.zeros(1, prod(2 * axis.kernel_size - 1 for axis in axes), dtype=dtype, device=device)
    else:
        flat = rpb.flatten(1).to(dtype) * LOG2_E
    return torch.nn.functional.pad(flat, (0, 1), value=float("-inf"))


def _tiles(
    query: Tensor, key: Tensor, axes: tuple[Axis, ...], table: Tensor, additional: int, single_chunk: bool
) -> Iterator[_Tiles]:
    """Cuts a problem into chunks, or into a single one; `table` is the bias table `[heads or 1, positions + 1]`."""
    batch_size, heads, heads_kv = query.shape[0], query.shape[-2], key.shape[-2]
    group = heads // heads_kv
    per_axis = tile_axes(axes)
    count = prod(len(tiles.query) for tiles in per_axis)
    tile_scores = heads * prod(len(tiles.query[0]) * len(tiles.key[0]) for tiles in per_axis)
    has_padding = any(1 in padding for tiles in per_axis for padding in tiles.padding)
    if single_chunk:
        tile_step, batch_step, batches = count, batch_size, [slice(0, batch_size)]
    else:
        tile_step = min(max(1, CHUNK_SCORES // tile_scores), count)
        batch_step = max(1, CHUNK_SCORES // (tile_scores * tile_step))
        batches = [slice(i, min(i + batch_step, batch_size)) for i in range(0, batch_size, batch_step)]
        batch_step = min(batch_step, batch_size)

    lengths = [axis.length for axis in axes]
    biases = [2 * axis.kernel_size - 1 for axis in axes]
    for tiles_by_axis, patterns_by_axis, pattern_of_tile in _tile_chunks(axes, tile_step):
        tiles = [torch.tensor(i) for i in tiles_by_axis]
        query_tokens = _outer_sum([torch.tensor(a.query)[i] for a, i in zip(per_axis, tiles, strict=True)], lengths)
        key_tokens = _outer_sum([torch.tensor(a.key)[i] for a, i in zip(per_axis, tiles, strict=True)], lengths)
        padding = None
        if has_padding:
            padding = _outer_sum([torch.tensor(a.padding)[i] for a, i in zip(per_axis, tiles, strict=True)], lengths)
            padding = (padding > 0)[:, None].expand(batch_step, heads_kv, -1, group, -1).flatten(3).to(query.device)

        offsets = []
        for axis, a, which in zip(axes, per_axis, patterns_by_axis, strict=True):
            position, start, end = torch.tensor([a.position, a.start, a.end])[:, torch.tensor(which), :, None]
            key_position = torch.arange(len(a.key[0]))
            offset = key_position - position + axis.kernel_size - 1
            offsets.append(offset.where((key_position >= start) & (key_position < end), table.shape[1]))
        # One axis outside the window is enough to exceed every index into the table.
        bias_index = _outer_sum(offsets, biases).clamp(max=table.shape[1] - 1).to(query.device)
        bias = table.index_select(1, bias_index.flatten()).reshape(-1, *bias_index.shape)
        bias = bias.expand(heads, -1, -1, -1).reshape(heads_kv, group, *bias_index.shape).transpose(1, 2)
        bias = torch.nn.functional.pad(bias, (0, additional)).flatten(0, 1).flatten(1)
        bias_rows = torch.arange(heads_kv)[:, None] * len(bias_index) + torch.tensor(pattern_of_tile)

        yield _Tiles(
            batches,
            _rows(query_tokens.to(query.device), batch_step, prod(lengths), heads, heads_kv),
            _rows(key_tokens.to(query.device), batch_step, prod(lengths), heads_kv, heads_kv),
            padding,
            bias,
            bias_rows.to(query.device).expand(batch_step, -1, -1),
            bias_index,
        )


def _gather(x: Tensor, rows: Tensor, additional: Tensor | None, chunk: _Chunk, dtype: torch.dtype) -> Tensor:
    """A chunk's matrices `[n, rows + M, width]` of `x [..., width]` and `additional [B, M, heads_kv, width]`."""
    b, heads_kv, tiles = chunk.shape
    width = x.shape[-1]
    matrices = x.reshape(-1, width).index_select(0, rows).to(dtype).reshape(b * heads_kv * tiles, -1, width)
    if additional is None:
        return matrices
    extra = additional[chunk.batch].transpose(1, 2).to(dtype).unsqueeze(2)
    extra = extra.expand(-1, -1, tiles, -1, -1).reshape(b * heads_kv * tiles, -1, width)
    return torch.cat([matrices, extra], dim=1)


def _scores(query: Tensor, key: Tensor, bias: Tensor, bias_rows: Tensor, scale: float) -> Tensor:
    """Scaled and biased scores `[n, R, K + M]` of one chunk's matrices, to base 2: exp2 is faster than exp."""
    bias = bias.index_select(0, bias_rows).reshape(*query.shape[:2], key.shape[1])
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
        for tiles in _tiles(query, key, axes, table, additional, single_chunk):
            for batch in tiles.batches:
                chunk = _chunk(tiles, batch, query, key)
                q = _gather(query, chunk.query_rows, None, chunk, dtype)
                k = _gather(key, chunk.key_rows, additional_keys, chunk, dtype)
                v = _gather(value, chunk.key_rows, additional_values, chunk, dtype)
                scores = _scores(q, k, tiles.bias, chunk.bias_rows, scale)
                highest = scores.amax(-1, keepdim=True)
                weights = scores.sub_(highest).exp2_()
                total = weights.sum(-1, keepdim=True)
                out = (weights @ v).div_(total)
                # A padding slot holds the same query as its owner: it is no matter which of them is written last.
                output.view(-1, width).index_copy_(0, chunk.query_rows, out.flatten(0, 1).to(output.dtype))
                lse.view(-1).index_copy_(0, chunk.query_rows, total.log2_().add_(highest).flatten())
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
        with without_autocast(query.device):
            for tiles in _tiles(query, key, axes, table, additional, single_chunk):
                grad_bias = torch.zeros_like(tiles.bias)
                for batch in tiles.batches:
                    chunk = _chunk(tiles, batch, query, key)
                    q = _gather(query, chunk.query_rows, None, chunk, dtype)
                    k = _gather(key, chunk.key_rows, additional_keys, chunk, dtype)
                    v = _gather(value, chunk.key_rows, additional_values, chunk, dtype)
                    grad_out = _gather(grad_output, chunk.query_rows, None, chunk, dtype)
                    chunk_lse, chunk_delta = (
                        x.view(-1).index_select(0, chunk.query_rows).reshape(*q.shape[:2], 1) for x in (lse, delta)
                    )
                    if chunk.padding is not None:
                        chunk_lse = chunk_lse.masked_fill(chunk.padding, float("inf"))  # probabilities become 0
                    probabilities = _scores(q, k, tiles.bias, chunk.bias_rows, scale).sub_(chunk_lse).exp2_()
                    grad_scores = (grad_out @ v.mT).sub_(chunk_delta).mul_(probabilities)
                    _scatter_add(grad_query, chunk.query_rows, grad_scores @ k, None, chunk)
                    _scatter_add(grad_key, chunk.key_rows, grad_scores.mT @ q, grad_additional_keys, chunk)
                    _scatter_add(grad_value, chunk.key_rows, probabilities.mT @ grad_out, grad_additional_values, chunk)
                    if rpb is not None:
                        grad_bias.index_add_(0, chunk.bias_rows, grad_scores.flatten(1))
                if rpb is not None:
                    patterns, queries, keys = tiles.bias_index.shape
                    grad_bias = grad_bias.reshape(key.shape[-2], patterns, -1, queries, keys + additional)
                    grad_bias = grad_bias[..., :keys].transpose(1, 2).reshape(len(table), -1)
                    grad_table.index_add_(1, tiles.bias_index.flatten(), grad_bias)
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
