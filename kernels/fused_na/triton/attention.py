"""Forward and backward pass on checked tensors."""

from functools import lru_cache
from math import ceil, prod

import torch
from torch import Tensor

from fused_na.triton import gpu
from fused_na.triton.bias_copy import bias_copy_kernel
from fused_na.triton.launch import Launch
from fused_na.triton.plan import fuses_bias, plan_of
from fused_na.triton.prepare import prepare_additional
from fused_na.triton.problem import Layout, Tensors, layout_of, problem_of
from fused_na.window import Axis

LARGEST_TILE = 128  # tokens of a tile along an axis


def _rows_contiguous(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


@lru_cache(maxsize=4096)
def _bias_copy(device: torch.device, rpb: Layout, scale: float) -> tuple[Launch, int]:
    """What copies a contiguous bias for the kernels, and how many zeros there are to be on either side of it: as far as
    kernels reach for pairs of tokens that do not attend to each other."""
    row, margin = 1, 0
    for size in reversed(rpb.shape[1:]):
        margin += row * (size + 2 * LARGEST_TILE)
        row *= size
    margin += -margin % 4  # keeps the alignment
    biases = prod(rpb.shape)
    arguments = {"scale": scale, "margin": margin, "biases": biases, "BLOCK": 1024, "num_warps": 4}
    arguments["OVERLAP"] = gpu.overlaps(device)
    return Launch(bias_copy_kernel, ceil((biases + 2 * margin) / 1024), arguments), margin


def unscaled(rpb: Tensor | None, scale: float) -> Tensor | None:
    """A bias as the kernels take it: float32, of scores that are yet to be scaled, and with zeros around it in memory.

    By one launch, where PyTorch takes two: beside the small kernels of small maps that shows.
    """
    if rpb is None:
        return None
    rpb = rpb.detach().contiguous()
    launch, margin = _bias_copy(rpb.device, layout_of(rpb), scale)
    room = torch.empty(rpb.numel() + 2 * margin, dtype=torch.float32, device=rpb.device)
    launch({"rpb": rpb, "biases_copy": room})
    return room[margin : margin + rpb.numel()].view(rpb.shape)


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
    """Contiguous output `[B, *spatial, heads, head_dim_v]`, and float32 log-sum-exp `[B, *spatial, heads]` with heads
    outermost in memory.
    """
    query, key, value = map(_rows_contiguous, (query, key, value))
    if additional_keys is not None and additional_values is not None:
        additional_keys, additional_values = map(_rows_contiguous, (additional_keys, additional_values))
    output = query.new_empty((*query.shape[:-1], value.shape[-1]))
    batch, *spatial, heads, _ = query.shape
    lse = query.new_empty((batch, heads, *spatial), dtype=torch.float32)
    if output.numel() == 0:
        return output, lse.movedim(1, -1)
    tensors: Tensors = {
        "query": query,
        "key": key,
        "value": value,
        "rpb": unscaled(rpb, scale),
        "additional_keys": additional_keys,
        "additional_values": additional_values,
    }
    problem = problem_of(axes, scale, tensors)
    plan_of("forward", problem).run(tensors | {"output": output, "lse": lse})
    return output, lse.movedim(1, -1)


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
    is_packed: bool,
) -> tuple[Tensor | None, ...]:
    """Gradients of query, key, value, rpb (where needed), and additional keys and values (where given), all contiguous.

    Where `is_packed`, the first is `[B, *spatial, 3, heads, head_dim]`, those of query, key and value, which are of one
    shape then; the second and the third are None.
    """
    query, key, value, grad_output = map(_rows_contiguous, (query, key, value, grad_output))
    if additional_keys is not None and additional_values is not None:
        additional_keys, additional_values = map(_rows_contiguous, (additional_keys, additional_values))
    lse = lse.movedim(-1, 1).contiguous()
    grad_lse = None if grad_lse is None else grad_lse.movedim(-1, 1).contiguous()
    gradients: list[Tensor | None]
    if is_packed:
        packed = query.new_empty((*query.shape[:-2], 3, *query.shape[-2:]))
        grad_query, grad_key, grad_value = packed.unbind(-3)
        gradients = [packed, None, None]
    else:
        grad_query, grad_key, grad_value = (x.new_empty(x.shape) for x in (query, key, value))
        gradients = [grad_query, grad_key, grad_value]
    grad_rpb = rpb.new_empty(rpb.shape) if rpb is not None and needs_rpb else None
    if output.numel() == 0:
        optional = [None if x is None else torch.zeros_like(x) for x in (grad_rpb, additional_keys, additional_values)]
        return *gradients, *optional

    tensors: Tensors = {
        "query": query,
        "key": key,
        "value": value,
        "rpb": unscaled(rpb, scale),
        "additional_keys": additional_keys,
        "additional_values": additional_values,
        "grad_output": grad_output,
        "grad_lse": grad_lse,
        "output": output,
        "lse": lse,
        "grad_rpb": grad_rpb,
    }
    problem = problem_of(axes, scale, tensors, pack=3 if is_packed else 1)
    tensors |= {
        "delta": torch.empty_like(lse),
        "grad_query": grad_query,
        "grad_key": grad_key,
        "grad_value": grad_value,
    }
    is_fused = fuses_bias(problem)
    # First of all: it writes delta, which the others read.
    plan_of("query_bias" if is_fused else "query", problem).run(tensors)
    plan_of("key_value", problem).run(tensors)
    if grad_rpb is not None and not is_fused:
        plan_of("bias", problem).run(tensors)
    grad_keys, grad_values = None, None
    if additional_keys is not None and additional_values is not None:
        if additional_keys.numel() == 0:
            grad_keys, grad_values = torch.zeros_like(additional_keys), torch.zeros_like(additional_values)
        else:
            partial = prepare_additional(problem).run(tensors, query.device)
            grad_keys, grad_values = (
                partial[name].sum(0).to(query.dtype)  # type: ignore[union-attr]
                for name in ("partial_keys", "partial_values")
            )
    return *gradients, grad_rpb, grad_keys, grad_values
