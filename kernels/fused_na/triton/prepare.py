"""Each kernel's launches, for a problem and tiles."""

from collections.abc import Callable
from functools import lru_cache
from math import ceil, prod
from typing import Any

from fused_na.triton import gpu
from fused_na.triton.backward import additional_kernel, bias_fold_kernel, bias_kernel, key_value_kernel, query_kernel
from fused_na.triton.column_blocks import BLOCK, Blocks, blocks_of
from fused_na.triton.column_classes import odd
from fused_na.triton.column_programs import SHARED_MEMORY, samples_of_program, shared_bytes
from fused_na.triton.fold_columns import LANES, fold_columns_kernel, sum_classes_kernel
from fused_na.triton.forward import forward_kernel
from fused_na.triton.forward_columns import forward_columns_kernel
from fused_na.triton.forward_wide import forward_wide_kernel
from fused_na.triton.geometry import PARTIAL_BYTES, Geometry
from fused_na.triton.key_value_columns import key_value_columns_kernel
from fused_na.triton.key_value_wide import key_value_wide_kernel
from fused_na.triton.launch import Launch, Prepared
from fused_na.triton.problem import Problem
from fused_na.triton.query_columns import query_bias_columns_kernel, query_columns_kernel
from fused_na.triton.query_wide import query_wide_kernel
from fused_na.triton.tiles import Extent, Tiles, as_three_axes, half
from fused_na.window import Axis

MULTIPROCESSORS = 132  # of an H100
COLUMNS_AT_ONCE = 8  # programs of `query_bias_columns_kernel` for which one has registers


def _forward(geometry: Geometry, tiles: Tiles) -> Prepared:
    moving = {"key": tiles.key, "value": tiles.key}
    if tiles.is_wide:
        return _wide(geometry, forward_wide_kernel, tiles, tiles.query, geometry.heads, moving, ("query", "output"))
    own = "query", "output"
    overlap = geometry.problem.rpb is not None and gpu.overlaps(geometry.problem.device)
    options: dict[str, Any] = {"OVERLAP": overlap, "launch_pdl": overlap}
    if tiles.is_columns:
        options |= _blocks(geometry, tiles, True).arguments
        launch = geometry.launch(forward_columns_kernel, tiles, tiles.query, geometry.heads, moving, own, **options)
        return Prepared([launch])
    return Prepared([geometry.launch(forward_kernel, tiles, tiles.query, geometry.heads, moving, own, **options)])


def _wide(
    geometry: Geometry,
    kernel: Any,
    tiles: Tiles,
    own: Extent,
    heads: int,
    moving: dict[str, Extent],
    own_tensors: tuple[str, ...],
) -> Prepared:
    """A kernel whose two warpgroups have half of the own tile each."""
    box = half(own)
    return Prepared([geometry.launch(kernel, tiles, own, heads, moving | dict.fromkeys(own_tensors, box), BOX=box)])


def _query(geometry: Geometry, tiles: Tiles) -> Prepared:
    moving = {"key": tiles.key, "value": tiles.key}
    if tiles.is_wide:
        halved = "query", "grad_output", "grad_query"
        return _wide(geometry, query_wide_kernel, tiles, tiles.query, geometry.heads, moving, halved)
    own = "query", "grad_output", "output", "grad_query"
    if tiles.is_columns:
        options = _blocks(geometry, tiles, True).arguments
        launch = geometry.launch(query_columns_kernel, tiles, tiles.query, geometry.heads, moving, own, **options)
        return Prepared([launch])
    return Prepared([geometry.launch(query_kernel, tiles, tiles.query, geometry.heads, moving, own)])


def _key_value(geometry: Geometry, tiles: Tiles) -> Prepared:
    moving = {"query": tiles.query, "grad_output": tiles.query}
    own = "key", "value", "grad_key", "grad_value"
    if tiles.is_wide:
        return _wide(geometry, key_value_wide_kernel, tiles, tiles.key, geometry.heads_kv, moving, own)
    if tiles.is_columns:
        blocks, samples = _blocks(geometry, tiles, False), 1
        columns = geometry.groups * prod(geometry.tiles_per_axis(tiles.key)) * geometry.heads_kv
        if len(geometry.problem.axes) == 2:
            samples = samples_of_program(
                blocks, tiles.key, tiles.query, tiles.max_registers, columns, geometry.batch, MULTIPROCESSORS
            )
        apart = ceil(geometry.batch / samples)
        options = blocks.arguments | {"AHEAD": samples > 1, "apart": apart, "programs": columns * apart}
        launch = geometry.launch(key_value_columns_kernel, tiles, tiles.key, geometry.heads_kv, moving, own, **options)
        return Prepared([launch])
    return Prepared([geometry.launch(key_value_kernel, tiles, tiles.key, geometry.heads_kv, moving, own)])


def _bias(geometry: Geometry, tiles: Tiles) -> Prepared:
    axes = as_three_axes(geometry.problem.axes)
    lead = tuple(map(_lead, axes, tiles.key))
    offsets = tuple(
        ceil((query + axis.kernel_size - 1 + before) / key)
        for axis, query, key, before in zip(axes, tiles.query, tiles.key, lead, strict=True)
    )
    positions = geometry.groups * prod(geometry.tiles_per_axis(tiles.query))
    block = prod(offsets) * geometry.heads * prod(tiles.query) * prod(tiles.key)
    # Enough programs to fill any GPU a few times over, within the memory that partial sums may take.
    wanted = min(ceil(8192 / (prod(offsets) * geometry.heads)), max(1, PARTIAL_BYTES // (4 * block)))
    batch_splits = min(geometry.batch, ceil(wanted / positions))
    items = positions * batch_splits
    items_per_split = ceil(items / min(wanted, items))
    splits = ceil(items / items_per_split)
    own: dict[str, Any] = {
        "LEAD": lead,
        "OFFSETS": offsets,
        "batch_splits": batch_splits,
        "items": items,
        "items_per_split": items_per_split,
        "programs": prod(offsets) * geometry.heads * splits,
    }
    moving = {"query": tiles.query, "grad_output": tiles.query, "key": tiles.key, "value": tiles.key}
    fold = geometry.arguments | own | {"QUERY_TILE": tiles.query, "KEY_TILE": tiles.key, "splits": splits}
    rpb = geometry.problem.rpb
    assert rpb is not None
    launches = [
        geometry.launch(bias_kernel, tiles, tiles.query, geometry.heads, moving, **own),
        Launch(bias_fold_kernel, prod(rpb.shape), fold | {"num_warps": 1}),
    ]
    return Prepared(launches, {"partial": (splits, block)})


def _blocks(geometry: Geometry, tiles: Tiles, over_keys: bool) -> Blocks:
    own = tiles.query if over_keys else tiles.key
    return blocks_of(as_three_axes(geometry.problem.axes)[0], own[0] // BLOCK, over_keys)


def _query_bias(geometry: Geometry, tiles: Tiles) -> Prepared:
    classes, heads, blocks = geometry.classes(tiles), geometry.heads, _blocks(geometry, tiles, True)
    chunks = geometry.batch * geometry.groups
    items = prod(classes.places) * chunks
    row = prod(classes.counts) * (2 * blocks.span + 1) * LANES.value
    shared = [shared_bytes(blocks, 3 * prod(tiles.query), tiles.key, more) for more in (0, 4 * row)]
    at_once = min(COLUMNS_AT_ONCE, SHARED_MEMORY // shared[0])
    in_shared = at_once * shared[1] <= SHARED_MEMORY  # if no fewer programs run at once
    most = PARTIAL_BYTES // (4 * row * heads) - classes.number + 1
    share = ceil(items / max(1, min(MULTIPROCESSORS * at_once // heads, most)))
    programs = ceil(items / share)
    rows = programs + classes.number - 1
    overlap = gpu.overlaps(geometry.problem.device)
    own: dict[str, Any] = {"before": odd(classes.before), "alike": odd(classes.alike)}
    own |= {"all_places": odd(classes.places), "COUNTS": classes.counts}
    own |= {"chunks": chunks, "items": items, "share": share, "rows": rows}
    own |= blocks.arguments | {"IN_SHARED": in_shared, "programs": programs * heads}
    own |= {"OVERLAP": overlap, "launch_pdl": overlap}
    moving = {"key": tiles.key, "value": tiles.key}
    read = "query", "grad_output", "output", "grad_query"
    launch = geometry.launch(query_bias_columns_kernel, tiles, tiles.query, heads, moving, read, **own)
    # For each class two programs on a multiprocessor or a few more, unless rows are short or heads many.
    numbers = min(256, max(32, 1 << (heads * row // (2 * MULTIPROCESSORS)).bit_length()))
    warps = 2 if numbers == 256 else 4  # without sums over threads where rows are few
    sums = own | {"NUMBERS": numbers, "ROWS": 128 * warps // numbers, "STEPS": 8, "num_warps": warps, "maxnreg": 64}
    fold = geometry.arguments | own | {"QUERY_TILE": tiles.query, "KEY_TILE": tiles.key}
    fold |= {"CLASSES": 16 if len(geometry.problem.axes) == 3 else 4, "WIDTH": 16, "num_warps": 1}
    for name, axis in zip("hw", as_three_axes(geometry.problem.axes)[1:], strict=True):
        fold[f"length_{name}"] = axis.length // axis.dilation
    rpb = geometry.problem.grad_rpb
    assert rpb is not None
    launches = [
        launch,
        Launch(sum_classes_kernel, heads * classes.number * ceil(row / numbers), sums),
        Launch(fold_columns_kernel, prod(rpb.shape[:-1]) * ceil(rpb.shape[-1] / fold["WIDTH"]), fold),
    ]
    return Prepared(launches, {"partial": (heads, rows, row)})


def _lead(axis: Axis, key_tile: int) -> int:
    """How far before a query tile its key tiles start: by whole tiles before the windows away from the borders, so
    that these meet as few tiles as can be, and far enough for the windows at the end of the axis.
    """
    k, s = axis.kernel_size, axis.stride
    inner = k - s if axis.is_causal else k // 2 - s // 2
    return inner + ceil(max(0, k - 1 - inner) / key_tile) * key_tile


PREPARE: dict[str, Callable[[Geometry, Tiles], Prepared]] = {
    "forward": _forward,
    "query": _query,
    "key_value": _key_value,
    "bias": _bias,
    "query_bias": _query_bias,
}


@lru_cache(maxsize=4096)
def prepare_additional(problem: Problem) -> Prepared:
    """The gradients of additional keys and values, as partial sums over shares of the queries."""
    geometry = Geometry(problem)
    keys, values = problem.additional_keys, problem.additional_values
    assert keys is not None and values is not None
    width = max(geometry.head_dim, geometry.head_dim_v)
    rows = 16 if problem.query.dtype.itemsize * width > 512 else 32
    tokens = prod(axis.length for axis in problem.axes)
    programs = ceil(keys.shape[1] / rows) * geometry.heads_kv * geometry.batch
    splits = min(ceil(tokens / rows), max(1, 1024 // programs))
    arguments = geometry.arguments | {
        "tokens_per_split": ceil(tokens / splits),
        "QUERIES": rows,
        "KEYS": rows,
        "num_warps": 4,
        "num_stages": 2,
    }
    workspaces = {"partial_keys": (splits, *keys.shape), "partial_values": (splits, *values.shape)}
    return Prepared([Launch(additional_kernel, programs * splits, arguments)], workspaces)
