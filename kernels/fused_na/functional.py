"""The public operations: argument checks and backend choice. The rule is in `window.py`, the work in the backends.

Shapes use `B` batch, `*spatial` one to three axes of tokens (`[L]`, `[H, W]` or `[T, H, W]`), and heads last.
"""

import os
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from operator import index
from typing import TypeVar

import torch
from torch import Tensor

from fused_na import blocked, ops, reference
from fused_na.precision import is_autocast_enabled, without_autocast
from fused_na.window import Axis

_T = TypeVar("_T")

HAS_TRITON = find_spec("triton") is not None
BACKENDS = ("triton", "blocked", "reference")
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def na1d(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] = 1,
    dilation: int | Sequence[int] = 1,
    is_causal: bool | Sequence[bool] = False,
    scale: float | None = None,
    rpb: Tensor | None = None,
    additional_keys: Tensor | None = None,
    additional_values: Tensor | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Neighborhood attention on sequences, `[B, L, heads, head_dim]`; see `neighborhood_attention`."""
    _check_rank("na1d", query, 1)
    return neighborhood_attention(
        query, key, value, kernel_size, stride, dilation, is_causal, scale, rpb, additional_keys, additional_values,
        return_lse, backend,
    )  # fmt: skip


def na2d(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] = 1,
    dilation: int | Sequence[int] = 1,
    is_causal: bool | Sequence[bool] = False,
    scale: float | None = None,
    rpb: Tensor | None = None,
    additional_keys: Tensor | None = None,
    additional_values: Tensor | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Neighborhood attention on feature maps, `[B, H, W, heads, head_dim]`; see `neighborhood_attention`."""
    _check_rank("na2d", query, 2)
    return neighborhood_attention(
        query, key, value, kernel_size, stride, dilation, is_causal, scale, rpb, additional_keys, additional_values,
        return_lse, backend,
    )  # fmt: skip


def na3d(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] = 1,
    dilation: int | Sequence[int] = 1,
    is_causal: bool | Sequence[bool] = False,
    scale: float | None = None,
    rpb: Tensor | None = None,
    additional_keys: Tensor | None = None,
    additional_values: Tensor | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Neighborhood attention on clips, `[B, T, H, W, heads, head_dim]`; see `neighborhood_attention`."""
    _check_rank("na3d", query, 3)
    return neighborhood_attention(
        query, key, value, kernel_size, stride, dilation, is_causal, scale, rpb, additional_keys, additional_values,
        return_lse, backend,
    )  # fmt: skip


def neighborhood_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] = 1,
    dilation: int | Sequence[int] = 1,
    is_causal: bool | Sequence[bool] = False,
    scale: float | None = None,
    rpb: Tensor | None = None,
    additional_keys: Tensor | None = None,
    additional_values: Tensor | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of every token to the tokens of its neighborhood, over one, two or three spatial axes.

    Generalised neighborhood attention as in arXiv 2204.07143, 2209.15001 and 2504.16922, with relative positional
    biases. Differentiable in every tensor. Under autocast, query, key, value and the additional tokens are cast as for
    scaled_dot_product_attention.

    Args:
        query: `[B, *spatial, heads, head_dim]`; float16, bfloat16, float32 or float64. Views, such as slices of a
            packed qkv projection, are fine.
        key: `[B, *spatial, heads_kv, head_dim]`, where `heads_kv` divides `heads` (grouped-query attention).
        value: `[B, *spatial, heads_kv, head_dim_v]`.
        kernel_size: window size in tokens per axis; an int holds for all axes. `kernel_size * dilation` may not exceed
            the axis. Windows shift at borders instead of shrinking, so every query has exactly `kernel_size` keys on a
            non-causal axis.
        stride: queries per axis that share a window, 1 to `kernel_size`; 1 is a sliding window, `kernel_size` blocked
            attention.
        dilation: gap between a window's tokens per axis; 1 is a dense window.
        is_causal: per axis, whether windows end at the query itself.
        scale: factor on the dot products; None means `head_dim ** -0.5`.
        rpb: relative positional bias `[heads, 2 * kernel_size_1 - 1, ...]` added to the scaled scores, float32 or the
            query's dtype.
        additional_keys: `[B, M, heads_kv, head_dim]`, tokens which every query attends to as well, in the same softmax.
        additional_values: `[B, M, heads_kv, head_dim_v]`.
        return_lse: also return the log-sum-exp of each query's scores.
        backend: "triton", "blocked" (plain PyTorch, any device), "reference" (dense, slow); None picks the fastest
            that runs here.

    Returns:
        `[B, *spatial, heads, head_dim_v]` in the query's dtype; with `return_lse` also the natural log-sum-exp
        `[B, *spatial, heads]` in float32 (float64 for float64 inputs).

    Raises:
        ValueError: an illegal argument; the message names it, the value given and what is allowed.
    """
    _check_tensors(query=query, key=key, value=value)
    _check_tensors(True, rpb=rpb, additional_keys=additional_keys, additional_values=additional_values)
    query, key, value, additional_keys, additional_values = _autocast(
        query, key, value, additional_keys, additional_values
    )
    axes = _check_arguments(
        query, key, value, kernel_size, stride, dilation, is_causal, rpb, additional_keys, additional_values
    )
    scale = _checked_scale(scale, query)
    attend = _backend(backend, query, value)
    with without_autocast(query.device):
        output, lse = attend(query, key, value, axes, scale, rpb, additional_keys, additional_values, return_lse)
    if not return_lse:
        return output
    assert lse is not None
    return output, lse


def packed_neighborhood_attention(
    qkv: Tensor,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] = 1,
    dilation: int | Sequence[int] = 1,
    is_causal: bool | Sequence[bool] = False,
    scale: float | None = None,
    rpb: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """`neighborhood_attention` of query, key and value in one tensor, as a layer's projection has them.

    The same as `neighborhood_attention(*qkv.unbind(-3), ...)`, but that the backward pass writes the gradient of `qkv`
    where PyTorch would put together three, which takes about as long as to read and write `qkv` once.

    Args:
        qkv: `[B, *spatial, 3, heads, head_dim]`: query, key and value of each token.
        kernel_size, stride, dilation, is_causal, scale, rpb, backend: as for `neighborhood_attention`.

    Returns:
        `[B, *spatial, heads, head_dim]` in the dtype of `qkv`.

    Raises:
        ValueError: an illegal argument; the message names it, the value given and what is allowed.
    """
    _check_tensors(qkv=qkv)
    _check_tensors(True, rpb=rpb)
    if not 5 <= qkv.dim() <= 7 or qkv.shape[-3] != 3 or 0 in qkv.shape[-2:] or qkv.dtype not in _DTYPES:
        raise ValueError(
            "qkv must be [B, *spatial, 3, heads, head_dim] with 1 to 3 spatial axes, in float16, bfloat16, float32 or "
            f"float64, got {_describe(qkv)}"
        )
    (qkv,) = _autocast(qkv)
    query, key, value = qkv.unbind(-3)
    axes = _check_arguments(query, key, value, kernel_size, stride, dilation, is_causal, rpb, None, None)
    scale = _checked_scale(scale, query)
    attend = _backend(backend, query, value)
    with without_autocast(qkv.device):
        if attend is ops.attend:
            return ops.attend_packed(qkv, axes, scale, rpb)
        return attend(query, key, value, axes, scale, rpb, None, None, False)[0]


def merge_attentions(outputs: Sequence[Tensor], lses: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Combines attention over disjoint sets of keys into attention over their union. Differentiable.

    Args:
        outputs: partial outputs, each `[..., heads, head_dim_v]`, all of one shape and dtype.
        lses: their log-sum-exps, each `[..., heads]`, natural logarithm.

    Returns:
        The merged output in the dtype of the partial ones, and its log-sum-exp.

    Raises:
        ValueError: no outputs, different numbers of outputs and log-sum-exps, or shapes that do not belong together.
    """
    if len(outputs) == 0 or len(outputs) != len(lses):
        raise ValueError(
            f"outputs and lses must be as many, at least one; got {len(outputs)} outputs and {len(lses)} log-sum-exps"
        )
    for output, lse in zip(outputs, lses, strict=True):
        if output.shape != outputs[0].shape or output.dtype != outputs[0].dtype or output.device != outputs[0].device:
            raise ValueError(
                f"outputs must share one shape, dtype and device, "
                f"got {_describe(output)} beside {_describe(outputs[0])}"
            )
        if lse.device != output.device:
            raise ValueError(f"lses must be on the outputs' device {output.device}, got {_describe(lse)}")
        if lse.shape != output.shape[:-1]:
            raise ValueError(
                f"lses must have shape {list(output.shape[:-1])} (outputs without head_dim), got {list(lse.shape)}"
            )
    stacked = torch.stack(list(lses))
    lse = torch.logsumexp(stacked, dim=0)
    weights = torch.exp(stacked - lse)
    merged = sum(weight[..., None] * output for weight, output in zip(weights, outputs, strict=True))
    assert isinstance(merged, Tensor)
    return merged.to(outputs[0].dtype), lse


def available_backends(
    query: Tensor, key: Tensor, value: Tensor, additional_keys: Tensor | None = None
) -> dict[str, str | None]:
    """Which backends can run on these tensors: None for those that can, for the others why they cannot.

    Args:
        query, key, value: as for `neighborhood_attention`.
        additional_keys: likewise.
    """
    return {"triton": _why_not_triton(query, value), "blocked": None, "reference": None}


def _why_not_triton(query: Tensor, value: Tensor) -> str | None:
    if not HAS_TRITON:
        return "triton is not installed"
    is_interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if query.device.type != "cuda" and not is_interpreted and query.device.type != "meta":
        return f"it needs an NVIDIA GPU, the tensors are on {query.device}"
    if query.device.type == "cuda" and torch.version.hip is not None:
        return "it needs an NVIDIA GPU, this PyTorch is for AMD's"
    if query.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"it computes in float16, bfloat16 and float32, not {str(query.dtype).removeprefix('torch.')}"
    for name, width in (("head_dim", query.shape[-1]), ("head_dim_v", value.shape[-1])):
        if width % 8 or not 8 <= width <= 256:
            return f"{name} must be a multiple of 8 from 8 to 256, got {width}"
    return None


def _backend(name: str | None, query: Tensor, value: Tensor) -> Callable[..., tuple[Tensor, Tensor | None]]:
    if name is None:
        # On the meta device the operator is its shapes alone, whereas the blocked backend would cut every tile.
        is_for_triton = query.device.type in ("cuda", "meta") and _why_not_triton(query, value) is None
        name = "triton" if is_for_triton else "blocked"
    if name == "blocked":
        return blocked.attend
    if name == "reference":
        return reference.attend
    if name == "triton":
        reason = _why_not_triton(query, value)
        if reason is not None:
            raise ValueError(f"backend='triton' cannot run this call: {reason}")
        return ops.attend
    raise ValueError(f"backend must be one of {', '.join(map(repr, BACKENDS))} or None, got {name!r}")


def _autocast(*tensors: Tensor | None) -> list:
    device = next(t.device for t in tensors if t is not None)
    if not is_autocast_enabled(device):
        return list(tensors)
    dtype = torch.get_autocast_dtype(device.type)
    return [t.to(dtype) if t is not None and t.dtype in _DTYPES and t.dtype != torch.float64 else t for t in tensors]


def _checked_scale(scale: float | None, query: Tensor) -> float:
    if scale is None:
        return query.shape[-1] ** -0.5
    if not isinstance(scale, (int, float)) or not abs(scale) < float("inf"):
        raise ValueError(f"scale must be a finite number or None, got {scale!r}")
    return float(scale)


def _describe(x: Tensor) -> str:
    return f"{str(x.dtype).removeprefix('torch.')} {list(x.shape)} on {x.device}"


def _check_tensors(optional: bool = False, **tensors: object) -> None:
    for name, x in tensors.items():
        if not isinstance(x, Tensor) and not (optional and x is None):
            raise ValueError(f"{name} must be a tensor{' or None' if optional else ''}, got {type(x).__name__}")


def _check_rank(name: str, query: Tensor, rank: int) -> None:
    _check_tensors(query=query)
    if query.dim() != rank + 3:
        layout = ("[B, L, heads, head_dim]", "[B, H, W, heads, head_dim]", "[B, T, H, W, heads, head_dim]")[rank - 1]
        raise ValueError(f"{name}: query must have {rank + 3} dimensions, {layout}; got shape {list(query.shape)}")


def _per_axis(name: str, value: _T | Sequence[_T], rank: int, kind: type) -> list[_T]:
    values = list(value) if isinstance(value, Sequence) else [value] * rank
    if len(values) != rank:
        raise ValueError(f"{name} must be one {kind.__name__} or one per spatial axis ({rank}), got {value!r}")
    for v in values:
        if not isinstance(v, kind) or (kind is int and isinstance(v, bool)):
            raise ValueError(f"{name} must be of type {kind.__name__}, got {value!r}")
    return values


def _check_arguments(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int],
    dilation: int | Sequence[int],
    is_causal: bool | Sequence[bool],
    rpb: Tensor | None,
    additional_keys: Tensor | None,
    additional_values: Tensor | None,
) -> tuple[Axis, ...]:
    """Raises ValueError for anything illegal, else returns the problem axis by axis."""
    rank = query.dim() - 3
    if rank not in (1, 2, 3):
        raise ValueError(
            f"query must be [B, *spatial, heads, head_dim] with 1 to 3 spatial axes, got shape {list(query.shape)}"
        )
    if query.dtype not in _DTYPES:
        raise ValueError(f"query must be float16, bfloat16, float32 or float64, got {_describe(query)}")
    for name, x in (("key", key), ("value", value)):
        if x.dtype != query.dtype or x.device != query.device:
            raise ValueError(
                f"{name} must have the query's dtype and device, got {_describe(x)} for query {_describe(query)}"
            )
        if x.shape[:-2] != query.shape[:-2] or x.dim() != query.dim():
            raise ValueError(
                f"{name} must match the query in batch and spatial axes, "
                f"got {list(x.shape)} for query {list(query.shape)}"
            )
    heads, head_dim = query.shape[-2:]
    heads_kv, head_dim_v = value.shape[-2:]
    if heads < 1 or head_dim < 1:
        raise ValueError(f"query must have at least one head and head_dim at least 1, got shape {list(query.shape)}")
    if head_dim_v < 1:
        raise ValueError(f"value must have head_dim at least 1, got shape {list(value.shape)}")
    if key.shape[-1] != head_dim:
        raise ValueError(f"key must have the query's head_dim {head_dim}, got {key.shape[-1]}")
    if key.shape[-2] != heads_kv:
        raise ValueError(f"key and value must have as many heads, got {key.shape[-2]} and {heads_kv}")
    if heads_kv == 0 or heads % heads_kv:
        raise ValueError(f"heads of key and value must divide the query's {heads} heads, got {heads_kv}")

    axes = []
    kernel_sizes = _per_axis("kernel_size", kernel_size, rank, int)
    strides = _per_axis("stride", stride, rank, int)
    dilations = _per_axis("dilation", dilation, rank, int)
    causals = _per_axis("is_causal", is_causal, rank, bool)
    for i, (length, k, s, d, c) in enumerate(
        zip(query.shape[1:-2], kernel_sizes, strides, dilations, causals, strict=True)
    ):
        if k < 1:
            raise ValueError(f"kernel_size must be at least 1, got {k} on spatial axis {i}")
        if d < 1:
            raise ValueError(f"dilation must be at least 1, got {d} on spatial axis {i}")
        if k * d > length:
            raise ValueError(
                f"kernel_size * dilation must not exceed the map, "
                f"got {k} * {d} = {k * d} for length {length} on spatial axis {i}"
            )
        if not 1 <= s <= k:
            raise ValueError(f"stride must be between 1 and kernel_size {k}, got {s} on spatial axis {i}")
        axes.append(Axis(index(length), index(k), index(s), index(d), c))  # where compiled, of this size

    if rpb is not None:
        shape = [heads, *(2 * k - 1 for k in kernel_sizes)]
        if list(rpb.shape) != shape:
            raise ValueError(f"rpb must have shape [heads, 2 * kernel_size - 1, ...] = {shape}, got {list(rpb.shape)}")
        if rpb.device != query.device or rpb.dtype not in (torch.float32, query.dtype):
            raise ValueError(
                f"rpb must be float32 or the query's dtype, on its device; "
                f"got {_describe(rpb)} for query {_describe(query)}"
            )
    if (additional_keys is None) != (additional_values is None):
        raise ValueError("additional_keys and additional_values must be given together")
    if additional_keys is not None and additional_values is not None:
        for name, x, width in (
            ("additional_keys", additional_keys, head_dim),
            ("additional_values", additional_values, head_dim_v),
        ):
            if x.dtype != query.dtype or x.device != query.device:
                raise ValueError(
                    f"{name} must have the query's dtype and device, got {_describe(x)} for query {_describe(query)}"
                )
            if x.dim() != 4 or x.shape[0] != query.shape[0] or list(x.shape[2:]) != [heads_kv, width]:
                raise ValueError(
                    f"{name} must be [B, M, heads_kv, head_dim] = [{query.shape[0]}, M, {heads_kv}, {width}], "
                    f"got {list(x.shape)}"
                )
        if additional_keys.shape[1] != additional_values.shape[1]:
            raise ValueError(
                f"additional_keys and additional_values must hold as many tokens, "
                f"got {additional_keys.shape[1]} and {additional_values.shape[1]}"
            )
    return tuple(axes)
