"""The Triton kernels as PyTorch operators: `fused_na::forward` and `fused_na::backward`, with fakes and autograd.

As operators they are opaque to torch.compile, export and the flop counter, which see one node with known shapes.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from fused_na.window import Axis, group_members, window


def _axes(
    query: Tensor, kernel_size: Sequence[int], stride: Sequence[int], dilation: Sequence[int], is_causal: Sequence[bool]
) -> tuple[Axis, ...]:
    return tuple(map(Axis, query.shape[1:-2], kernel_size, stride, dilation, is_causal))


@torch.library.custom_op("fused_na::forward", mutates_args=(), device_types=("cuda", "cpu"))
def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rpb: Tensor | None,
    additional_keys: Tensor | None,
    additional_values: Tensor | None,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
    is_causal: Sequence[bool],
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Output `[B, *spatial, heads, head_dim_v]` and float32 log-sum-exp `[B, *spatial, heads]`."""
    from fused_na.triton import launch

    axes = _axes(query, kernel_size, stride, dilation, is_causal)
    return launch.forward(query, key, value, axes, scale, rpb, additional_keys, additional_values)


@forward.register_fake
def _(query, key, value, rpb, additional_keys, additional_values, kernel_size, stride, dilation, is_causal, scale):
    output = query.new_empty((*query.shape[:-1], value.shape[-1]))
    return output, query.new_empty(query.shape[:-1], dtype=torch.float32)


@torch.library.custom_op("fused_na::backward", mutates_args=(), device_types=("cuda", "cpu"))
def backward(
    grad_output: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rpb: Tensor | None,
    additional_keys: Tensor | None,
    additional_values: Tensor | None,
    output: Tensor,
    lse: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
    is_causal: Sequence[bool],
    scale: float,
    needs_rpb: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, key, value, rpb and additional keys and values; of the last three, those that are
    not wanted are empty."""
    from fused_na.triton import launch

    axes = _axes(query, kernel_size, stride, dilation, is_causal)
    gradients = launch.backward(
        grad_output, grad_lse, query, key, value, axes, scale, rpb, additional_keys, additional_values, output, lse,
        needs_rpb,
    )  # fmt: skip
    q, k, v, *optional = (query.new_empty(0) if gradient is None else gradient for gradient in gradients)
    bias, keys, values = optional
    return q, k, v, bias, keys, values


@backward.register_fake
def _(
    grad_output, grad_lse, query, key, value, rpb, additional_keys, additional_values, output, lse,
    kernel_size, stride, dilation, is_causal, scale, needs_rpb,
):  # fmt: skip
    def contiguous(x: Tensor | None) -> Tensor:
        return query.new_empty(0) if x is None else x.new_empty(x.shape)

    rpb = rpb if needs_rpb else None
    return tuple(map(contiguous, (query, key, value, rpb, additional_keys, additional_values)))


def _setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    *tensors, kernel_size, stride, dilation, is_causal, scale = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, *output)
    ctx.parameters = kernel_size, stride, dilation, is_causal, scale


def _autograd(ctx: Any, grad_output: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
    *tensors, output, lse = ctx.saved_tensors
    if grad_output is None:
        grad_output = torch.zeros_like(output)
    gradients = backward(grad_output, grad_lse, *tensors, output, lse, *ctx.parameters, ctx.needs_input_grad[3])
    return *(g if needed else None for g, needed in zip(gradients, ctx.needs_input_grad, strict=False)), *(None,) * 5


forward.register_autograd(_autograd, setup_context=_setup_context)


def _score_count(query_shape: Sequence[int], additional: Sequence[int] | None, *rule: Sequence) -> int:
    """Query-key pairs that the result depends on, over batch and heads."""
    batch, *spatial, heads, _ = query_shape
    pairs, tokens = 1, 1
    for axis in map(Axis, spatial, *rule):
        windows = (window(axis, x // axis.dilation, group_members(axis, x % axis.dilation)) for x in range(axis.length))
        pairs *= sum(end - start for start, end in windows)
        tokens *= axis.length
    return batch * heads * (pairs + tokens * (0 if additional is None else additional[1]))


@register_flop_formula(torch.ops.fused_na.forward)
def _(
    query, key, value, rpb, additional_keys, additional_values, kernel_size, stride, dilation, is_causal, scale,
    out_shape=None, **_,
) -> int:  # fmt: skip
    """Two products over the pairs of the neighborhood, however many a kernel executes."""
    scores = _score_count(query, additional_keys, kernel_size, stride, dilation, is_causal)
    return 2 * scores * (query[-1] + value[-1])


@register_flop_formula(torch.ops.fused_na.backward)
def _(
    grad_output, grad_lse, query, key, value, rpb, additional_keys, additional_values, output, lse,
    kernel_size, stride, dilation, is_causal, scale, needs_rpb, out_shape=None, **_,
) -> int:  # fmt: skip
    """Five products: the scores again and the gradients of query, key, value and probabilities."""
    scores = _score_count(query, additional_keys, kernel_size, stride, dilation, is_causal)
    return 2 * scores * (3 * query[-1] + 2 * value[-1])


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
    """Neighborhood attention over already checked arguments; see `fused_na.neighborhood_attention` for their
    meaning."""
    if scale <= 0:  # the kernels scale after taking the maximum
        query, scale = query * scale, 1.0
    _, kernel_size, stride, dilation, is_causal = map(list, zip(*axes, strict=True))
    return forward(
        query, key, value, rpb, additional_keys, additional_values, kernel_size, stride, dilation, is_causal, scale
    )
