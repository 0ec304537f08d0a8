"""The Triton kernels as PyTorch operators: `fused_na::forward` and `fused_na::backward`, with fakes and autograd.

As operators they are opaque to torch.compile, export and the flop counter, which see one node with known shapes. They
are defined through `torch.library.Library`: `torch.library.custom_op` would add its own checks to every call, which
take longer on the host than the launches.

Without key and value, query holds all three, `[B, *spatial, 3, heads, head_dim]`, and its gradient theirs.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.flop_counter import register_flop_formula

from fused_na.window import Axis, group_members, window

_INPUTS = "Tensor query, Tensor? key, Tensor? value, Tensor? rpb, Tensor? additional_keys, Tensor? additional_values"
_RULE = "int[] kernel_size, int[] stride, int[] dilation, bool[] is_causal, float scale"

_library = torch.library.Library("fused_na", "DEF")
_library.define(f"forward({_INPUTS}, {_RULE}) -> (Tensor, Tensor)", tags=torch.Tag.pt2_compliant_tag)
_library.define(
    f"backward(Tensor grad_output, Tensor? grad_lse, {_INPUTS}, Tensor output, Tensor lse, {_RULE}, bool needs_rpb)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    tags=torch.Tag.pt2_compliant_tag,
)
forward = torch.ops.fused_na.forward.default
backward = torch.ops.fused_na.backward.default


def _axes(
    query: Tensor, kernel_size: Sequence[int], stride: Sequence[int], dilation: Sequence[int], is_causal: Sequence[bool]
) -> tuple[Axis, ...]:
    return tuple(map(Axis, query.shape[1:-2], kernel_size, stride, dilation, is_causal))


def _unpacked(query: Tensor, key: Tensor | None, value: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value, whether they are packed or not."""
    if key is None or value is None:
        query, key, value = query.unbind(-3)
    return query, key, value


def _on_device(x: Tensor) -> AbstractContextManager:
    """Launches go to the current device, which need not be the tensors'."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


@torch.library.impl(_library, "forward", "CUDA")
@torch.library.impl(_library, "forward", "CPU")  # for Triton's interpreter
def _(
    query: Tensor,
    key: Tensor | None,
    value: Tensor | None,
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
    from fused_na.triton import attention

    query, key, value = _unpacked(query, key, value)
    axes = _axes(query, kernel_size, stride, dilation, is_causal)
    with _on_device(query):
        return attention.forward(query, key, value, axes, scale, rpb, additional_keys, additional_values)


@torch.library.register_fake(forward, lib=_library)
def _(query, key, value, rpb, additional_keys, additional_values, kernel_size, stride, dilation, is_causal, scale):
    query, _, value = _unpacked(query, key, value)
    output = query.new_empty((*query.shape[:-1], value.shape[-1]))
    batch, *spatial, heads, _ = query.shape
    return output, query.new_empty((batch, heads, *spatial), dtype=torch.float32).movedim(1, -1)


@torch.library.impl(_library, "backward", "CUDA")
@torch.library.impl(_library, "backward", "CPU")
def _(
    grad_output: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor | None,
    value: Tensor | None,
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
) -> tuple[Tensor, ...]:
    """Gradients of query, key, value, rpb and additional keys and values; those of what is not there, or of a bias that
    needs none, are empty."""
    from fused_na.triton import attention

    is_packed = key is None
    query, key, value = _unpacked(query, key, value)
    axes = _axes(query, kernel_size, stride, dilation, is_causal)
    with _on_device(query):
        gradients = attention.backward(
            grad_output, grad_lse, query, key, value, axes, scale, rpb, additional_keys, additional_values, output,
            lse, needs_rpb, is_packed,
        )  # fmt: skip
    return tuple(query.new_empty(0) if gradient is None else gradient for gradient in gradients)


@torch.library.register_fake(backward, lib=_library)
def _(
    grad_output, grad_lse, query, key, value, rpb, additional_keys, additional_values, output, lse,
    kernel_size, stride, dilation, is_causal, scale, needs_rpb,
):  # fmt: skip
    def contiguous(x: Tensor | None) -> Tensor:
        return query.new_empty(0) if x is None else x.new_empty(x.shape)

    rpb = rpb if needs_rpb else None
    return tuple(map(contiguous, (query, key, value, rpb, additional_keys, additional_values)))


class _Attention(torch.autograd.Function):
    """Makes `forward` differentiable, once."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor]:
        result = _without_autograd(*inputs)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs[:6], *result)
        ctx.rule = inputs[6:]
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
        *tensors, output, lse = ctx.saved_tensors
        needed = ctx.needs_input_grad
        if grad_output is None:
            grad_output = torch.zeros_like(output)
        gradients = backward(grad_output, grad_lse, *tensors, output, lse, *ctx.rule, needed[3])
        return *(g if need else None for g, need in zip(gradients, needed, strict=False)), *(None,) * 5


def _without_autograd(*inputs: Any) -> tuple[Tensor, Tensor]:
    with torch._C._AutoDispatchBelowAutograd():
        return forward(*inputs)


@torch.library.impl(_library, "forward", "Autograd")
def _(*inputs: Any) -> tuple[Tensor, Tensor]:
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs[:6]):
        return _Attention.apply(*inputs)
    return _without_autograd(*inputs)


def _counts(
    query: Sequence[int], value: Sequence[int] | None, additional: Sequence[int] | None, *rule: Sequence
) -> tuple[int, int, int]:
    """Query-key pairs that the result depends on, over batch and heads, and head_dim of keys and values, all from
    shapes."""
    batch, *spatial, heads, head_dim = query
    if value is None:
        *spatial, _ = spatial
        value = query
    pairs, tokens = 1, 1
    for axis in map(Axis, spatial, *rule):
        windows = (window(axis, x // axis.dilation, group_members(axis, x % axis.dilation)) for x in range(axis.length))
        pairs *= sum(end - start for start, end in windows)
        tokens *= axis.length
    pairs += tokens * (0 if additional is None else additional[1])
    return batch * heads * pairs, head_dim, value[-1]


@register_flop_formula(torch.ops.fused_na.forward)
def _(
    query, key, value, rpb, additional_keys, additional_values, kernel_size, stride, dilation, is_causal, scale,
    out_shape=None, **_,
) -> int:  # fmt: skip
    """Two products over the pairs of the neighborhood, however many a kernel executes."""
    scores, width, width_v = _counts(query, value, additional_keys, kernel_size, stride, dilation, is_causal)
    return 2 * scores * (width + width_v)


@register_flop_formula(torch.ops.fused_na.backward)
def _(
    grad_output, grad_lse, query, key, value, rpb, additional_keys, additional_values, output, lse,
    kernel_size, stride, dilation, is_causal, scale, needs_rpb, out_shape=None, **_,
) -> int:  # fmt: skip
    """Five products: the scores again and the gradients of query, key, value and probabilities."""
    scores, width, width_v = _counts(query, value, additional_keys, kernel_size, stride, dilation, is_causal)
    return 2 * scores * (3 * width + 2 * width_v)


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
    return forward(query, key, value, rpb, additional_keys, additional_values, *_rule(axes), scale)


def attend_packed(qkv: Tensor, axes: tuple[Axis, ...], scale: float, rpb: Tensor | None) -> Tensor:
    """The output of `attend` on query, key and value in one tensor `[B, *spatial, 3, heads, head_dim]`."""
    if scale <= 0:
        query, key, value = qkv.unbind(-3)
        return attend(query, key, value, axes, scale, rpb, None, None, return_lse=False)[0]
    return forward(qkv, None, None, rpb, None, None, *_rule(axes), scale)[0]


def _rule(axes: tuple[Axis, ...]) -> list[list]:
    """Kernel size, stride, dilation and causality, each over all axes."""
    _, *rule = map(list, zip(*axes, strict=True))
    return rule
