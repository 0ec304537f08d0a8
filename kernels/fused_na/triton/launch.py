"""Launches the kernels on checked arguments."""

from collections.abc import Callable
from functools import cache
from math import ceil, prod

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from fused_na.triton import autotune
from fused_na.triton.backward import additional_kernel, bias_fold_kernel, bias_kernel, key_value_kernel, query_kernel
from fused_na.triton.forward import forward_kernel
from fused_na.triton.forward_small import forward_small_kernel
from fused_na.triton.tiles import (
    HOPPER_SHARED_MEMORY,
    Extent,
    Tiles,
    Workload,
    as_three_axes,
    block_width,
    choose_tiles,
)
from fused_na.window import Axis

PARTIAL_BYTES = 64 << 20  # memory that the partial sums of the bias gradient may take


def _spatial_strides(x: Tensor) -> tuple[int, ...]:
    """Strides of batch, t, h, w and heads, with the axes placed as by `as_three_axes`."""
    batch, *spatial, heads, _ = x.stride()
    t, h, w = {1: [0, 0, *spatial], 2: [spatial[0], 0, spatial[-1]], 3: spatial}[len(spatial)]
    return batch, t, h, w, heads


def _rows_contiguous(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _has_bulk_copies(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 9


@cache
def _shared_memory(device: torch.device) -> int:
    if device.type != "cuda":
        return HOPPER_SHARED_MEMORY
    return triton.runtime.driver.active.utils.get_device_properties(device.index)["max_shared_mem"]


class _Launch:
    """Arguments that every kernel of one problem shares."""

    def __init__(self, axes: tuple[Axis, ...], query: Tensor, key: Tensor, value: Tensor, *others: Tensor) -> None:
        t, h, w = as_three_axes(axes)
        self.axes = axes
        self.batch, self.heads, self.heads_kv = query.shape[0], query.shape[-2], key.shape[-2]
        self.head_dim, self.head_dim_v, self.itemsize = query.shape[-1], value.shape[-1], query.element_size()
        self.shared_memory = _shared_memory(query.device)
        self.groups = t.dilation * h.dilation * w.dilation
        self.lengths = {"length_t": t.length, "length_h": h.length, "length_w": w.length}
        self.dilations = (t.dilation, h.dilation, w.dilation)
        self.rule = {
            "KERNEL": (t.kernel_size, h.kernel_size, w.kernel_size),
            "STRIDE": (t.stride, h.stride, w.stride),
            "CAUSAL": (t.is_causal, h.is_causal, w.is_causal),
        }
        # A tensor's last element decides whether 32-bit offsets reach within a sample; outputs are contiguous in the
        # tokens.
        reach = [
            sum((n - 1) * s for n, s in zip(x.shape[1:], x.stride()[1:], strict=True))
            for x in (query, key, value, *others)
        ]
        contiguous = prod(axis.length for axis in axes) * self.heads * max(self.head_dim, self.head_dim_v)
        precision = "tf32" if query.dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32 else "ieee"
        self.common = {
            "HEADS_PER_KV": self.heads // self.heads_kv,
            "HEAD_DIM": self.head_dim,
            "HEAD_DIM_V": self.head_dim_v,
            "BLOCK_D": block_width(self.head_dim),
            "BLOCK_DV": block_width(self.head_dim_v),
            "WIDE": max(*reach, contiguous) >= 2**31,
            "PRECISION": precision,
        }

    def run(self, kernel: str, rpb: Tensor | None, run: Callable[[Tiles], None]) -> None:
        """Calls `run` with the tiles for a kernel."""
        widths = (self.head_dim, self.head_dim_v, self.itemsize)
        workload = Workload(self.axes, *widths, rpb is not None, self.shared_memory)
        if autotune.is_enabled():
            run(autotune.measured_tiles(kernel, workload, run))
        else:
            run(choose_tiles(kernel, workload))

    def tiling(self, tiles: Tiles, extent: Extent, loaded: dict[str, Tensor]) -> dict:
        """Arguments that depend on the tiles. `loaded` are the tensors that a kernel loads in tiles of `extent`; they
        become descriptors for the bulk copy engine where that was chosen and the machine and the layouts allow it.
        """
        arguments: dict = {
            "QUERY_TILE": tiles.query,
            "KEY_TILE": tiles.key,
            "STAGES": tiles.num_stages,
            "num_warps": tiles.num_warps,
            "num_stages": tiles.num_stages,
            "TMA": False,
        }
        if not tiles.bulk or self.groups > 1 or not all(map(self.can_copy_in_bulk, loaded.values())):
            return arguments
        for name, x in loaded.items():
            batch, t, h, w, _ = _spatial_strides(x)
            shape = [self.batch, *self.lengths.values(), x.shape[-2] * x.shape[-1]]
            # Axes of length 1 need a legal stride all the same.
            strides = [batch, t or w, h or w, w, 1]
            arguments[name] = TensorDescriptor(x, shape, strides, [1, *extent, x.shape[-1]])
        return arguments | {"TMA": True}

    def can_copy_in_bulk(self, x: Tensor) -> bool:
        """Whether tiles of a tensor can be loaded by Hopper's bulk copy engine: heads side by side, 16-byte steps."""
        *strides, heads = _spatial_strides(x)
        return (
            _has_bulk_copies(x.device)
            and x.shape[-1] in (16, 32, 64, 128, 256)
            and heads == x.shape[-1]
            and x.data_ptr() % 16 == 0
            and all(stride * x.element_size() % 16 == 0 and stride >= 0 for stride in strides)
            and strides[0] > 0
            and strides[3] > 0
        )

    def has_interior(self, tiles: Tiles) -> bool:
        """Whether a pair of tiles can lie wholly inside the neighborhood, so that looking for one pays."""
        return all(
            query + key - stride <= kernel_size
            for query, key, stride, kernel_size in zip(
                tiles.query, tiles.key, self.rule["STRIDE"], self.rule["KERNEL"], strict=True
            )
        )

    def count(self, extent: tuple[int, int, int]) -> int:
        """Tiles of all dilation groups of one sample and head."""
        return self.groups * prod(
            ceil(ceil(axis.length / axis.dilation) / size)
            for axis, size in zip(as_three_axes(self.axes), extent, strict=True)
        )


def _additional(keys: Tensor | None, values: Tensor | None) -> dict:
    return {
        "additional_keys": keys,
        "additional_values": values,
        "additional_keys_strides": (0, 0, 0) if keys is None else keys.stride()[:3],
        "additional_values_strides": (0, 0, 0) if values is None else values.stride()[:3],
    }


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    axes: tuple[Axis, ...],
    scale: float,
    rpb: Tensor | None,
    additional_keys: Tensor | None,
    additional_values: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Output `[B, *spatial, heads, head_dim_v]` and float32 log-sum-exp `[B, *spatial, heads]`, both contiguous."""
    query, key, value = map(_rows_contiguous, (query, key, value))
    if additional_keys is not None and additional_values is not None:
        additional_keys, additional_values = map(_rows_contiguous, (additional_keys, additional_values))
    output = query.new_empty((*query.shape[:-1], value.shape[-1]))
    lse = query.new_empty(query.shape[:-1], dtype=torch.float32)
    if output.numel() == 0:
        return output, lse
    launch = _Launch(axes, query, key, value)
    tensors = {
        "query": query,
        "key": key,
        "value": value,
        # The kernels add the bias to scores that are not yet scaled.
        "rpb": None if rpb is None else rpb.float() / scale,
        "output": output,
        "lse": lse,
        "scale": scale,
        "dilations": launch.dilations,
        "heads": launch.heads,
        "query_strides": _spatial_strides(query),
        "key_strides": _spatial_strides(key),
        "value_strides": _spatial_strides(value),
        **launch.lengths,
        **launch.rule,
        **launch.common,
    }

    def run(tiles: Tiles) -> None:
        grid = (launch.count(tiles.query) * launch.heads * launch.batch,)
        arguments = tensors | launch.tiling(tiles, tiles.key, {"key": key, "value": value})
        if tiles.by_row and additional_keys is None:
            forward_small_kernel[grid](**arguments)
        else:
            forward_kernel[grid](
                **arguments,
                **_additional(additional_keys, additional_values),
                additional=0 if additional_keys is None else additional_keys.shape[1],
                INTERIOR=launch.has_interior(tiles),
            )

    launch.run("forward", rpb, run)
    return output, lse


def backward(
    grad_output: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    axes: tuple[Axis, ...],
    scale: float,
    rpb: Tensor | None,
    additional_keys: Tensor | None,
    additional_values: Tensor | None,
    output: Tensor,
    lse: Tensor,
    needs_rpb: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of query, key, value, rpb (where needed), and additional keys and values (where given), all
    contiguous."""
    query, key, value, grad_output = map(_rows_contiguous, (query, key, value, grad_output))
    if additional_keys is not None and additional_values is not None:
        additional_keys, additional_values = map(_rows_contiguous, (additional_keys, additional_values))
    rpb = None if rpb is None else rpb.contiguous()
    grad_lse = None if grad_lse is None else grad_lse.contiguous()
    grad_query, grad_key, grad_value = (
        torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (query, key, value)
    )
    grad_rpb = torch.empty_like(rpb) if rpb is not None and needs_rpb else None
    delta = torch.empty_like(lse)
    additional = 0 if additional_keys is None else additional_keys.shape[1]
    if output.numel() == 0:
        optional = [None if x is None else torch.zeros_like(x) for x in (grad_rpb, additional_keys, additional_values)]
        return grad_query, grad_key, grad_value, optional[0], optional[1], optional[2]

    launch = _Launch(axes, query, key, value, grad_output)
    tensors = {
        "query": query,
        "key": key,
        "value": value,
        "rpb": rpb,
        "lse": lse,
        "delta": delta,
        "grad_output": grad_output,
        "scale": scale,
        "dilations": launch.dilations,
        "heads": launch.heads,
        "query_strides": _spatial_strides(query),
        "key_strides": _spatial_strides(key),
        "value_strides": _spatial_strides(value),
        "grad_output_strides": _spatial_strides(grad_output),
        **launch.lengths,
        **launch.rule,
        **launch.common,
    }

    def run_query(tiles: Tiles) -> None:
        query_kernel[(launch.count(tiles.query) * launch.heads * launch.batch,)](
            **(tensors | launch.tiling(tiles, tiles.key, {"key": key, "value": value})),
            **_additional(additional_keys, additional_values),
            additional=additional,
            output=output,
            grad_lse=grad_lse,
            grad_query=grad_query,
            INTERIOR=launch.has_interior(tiles),
        )

    def run_key_value(tiles: Tiles) -> None:
        key_value_kernel[(launch.count(tiles.key) * launch.heads_kv * launch.batch,)](
            **(tensors | launch.tiling(tiles, tiles.query, {"query": query, "grad_output": grad_output})),
            grad_key=grad_key,
            grad_value=grad_value,
            INTERIOR=launch.has_interior(tiles),
        )

    launch.run("query", rpb, run_query)  # first: it writes delta, which the others read
    launch.run("key_value", rpb, run_key_value)
    if grad_rpb is not None:
        _bias_gradient(launch, tensors, grad_rpb)
    grad_keys, grad_values = None, None
    if additional_keys is not None and additional_values is not None:
        grad_keys, grad_values = _additional_gradients(launch, tensors, additional_keys, additional_values)
    return grad_query, grad_key, grad_value, grad_rpb, grad_keys, grad_values


def _bias_gradient(launch: _Launch, tensors: dict, grad_rpb: Tensor) -> None:
    kernel_size = launch.rule["KERNEL"]

    def run(tiles: Tiles) -> None:
        offsets = tuple(ceil((q + 2 * k - 2) / c) for q, k, c in zip(tiles.query, kernel_size, tiles.key, strict=True))
        positions = launch.count(tiles.query)
        block = prod(offsets) * launch.heads * prod(tiles.query) * prod(tiles.key)
        # Enough programs to fill any GPU a few times over, within the memory that partial sums may take.
        wanted = min(ceil(8192 / (prod(offsets) * launch.heads)), max(1, PARTIAL_BYTES // (4 * block)))
        batch_splits = min(launch.batch, ceil(wanted / positions))
        items = positions * batch_splits
        items_per_split = ceil(items / min(wanted, items))
        splits = ceil(items / items_per_split)
        partial = torch.empty((splits, block), dtype=torch.float32, device=grad_rpb.device)
        extents = {"QUERY_TILE": tiles.query, "KEY_TILE": tiles.key, "OFFSETS": offsets}
        bias_kernel[(prod(offsets) * launch.heads * splits,)](
            **tensors,
            **extents,
            partial=partial,
            batches=launch.batch,
            batch_splits=batch_splits,
            items=items,
            items_per_split=items_per_split,
            STAGES=tiles.num_stages,
            num_warps=tiles.num_warps,
            num_stages=tiles.num_stages,
        )
        bias_fold_kernel[(grad_rpb.numel(),)](
            partial, grad_rpb, launch.heads, splits, KERNEL=kernel_size, **extents, num_warps=1
        )

    launch.run("bias", grad_rpb, run)


def _additional_gradients(launch: _Launch, tensors: dict, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    width = max(launch.head_dim, launch.head_dim_v)
    rows = 16 if launch.itemsize * width > 512 else 32
    tokens = prod(axis.length for axis in launch.axes)
    blocks = ceil(keys.shape[1] / rows)
    programs = blocks * launch.heads_kv * launch.batch
    if programs == 0:
        return torch.zeros_like(keys), torch.zeros_like(values)
    splits = min(ceil(tokens / rows), max(1, 1024 // programs))
    partial_keys = torch.empty((splits, *keys.shape), dtype=torch.float32, device=keys.device)
    partial_values = torch.empty((splits, *values.shape), dtype=torch.float32, device=values.device)
    names = ("query", "lse", "delta", "grad_output", "scale", "heads", "query_strides", "grad_output_strides")
    additional_kernel[(programs * splits,)](
        **{name: tensors[name] for name in names},
        **launch.lengths,
        **launch.common,
        **_additional(keys, values),
        partial_keys=partial_keys,
        partial_values=partial_values,
        batches=launch.batch,
        additional=keys.shape[1],
        tokens_per_split=ceil(tokens / splits),
        QUERIES=rows,
        KEYS=rows,
        num_warps=4,
        num_stages=2,
    )
    return partial_keys.sum(0).to(keys.dtype), partial_values.sum(0).to(values.dtype)
