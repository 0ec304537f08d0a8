"""Ways to compute attention on a problem.

Each provider prepares itself once and returns what is timed, a function from query, key, value
`[B, *spatial, heads, head_dim]` and a bias or None to an output of that shape, and the problem which that solves.
"""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from math import prod

import torch
from problems import Problem
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention

from fused_na import neighborhood_attention
from fused_na.reference import axis_tables
from fused_na.window import Axis

Attend = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]
Provider = Callable[[Problem, torch.dtype, torch.device, bool], tuple[Attend, Problem]]


class Unsupported(Exception):
    """A provider cannot compute a problem, or it would not mean anything; says why."""


def fused_na(problem: Problem, dtype: torch.dtype, device: torch.device, has_rpb: bool) -> tuple[Attend, Problem]:
    """This project's operation."""

    def run(query: Tensor, key: Tensor, value: Tensor, rpb: Tensor | None) -> Tensor:
        return neighborhood_attention(query, key, value, **problem.options, rpb=rpb)

    return run, problem


def sequence(problem: Problem, dtype: torch.dtype, device: torch.device, has_rpb: bool) -> tuple[Attend, Problem]:
    """This project's operation on the tokens in a row, each with as many keys as the problem's windows have.

    Another problem, and an easier one: what locality in more than one dimension costs is the distance from it.
    """
    if has_rpb:
        raise Unsupported("the bias has no meaning on tokens in a row")
    row = Axis(problem.tokens, prod(axis.kernel_size for axis in problem.axes))
    attend, flat = fused_na(replace(problem, axes=(row,)), dtype, device, False)

    def run(query: Tensor, key: Tensor, value: Tensor, rpb: Tensor | None) -> Tensor:
        return attend(*(x.flatten(1, -3) for x in (query, key, value)), None).view(query.shape)

    return run, flat


def natten(problem: Problem, dtype: torch.dtype, device: torch.device, has_rpb: bool) -> tuple[Attend, Problem]:
    """NATTEN as it chooses its kernels by default."""
    if has_rpb:
        raise Unsupported("NATTEN has no relative positional biases since 0.20")
    try:
        from natten import na1d, na2d, na3d
    except ImportError as error:
        raise Unsupported(f"natten cannot be imported: {error}") from None
    operation = (na1d, na2d, na3d)[len(problem.axes) - 1]
    return lambda query, key, value, rpb: operation(query, key, value, **problem.options), problem


def sdpa(problem: Problem, dtype: torch.dtype, device: torch.device, has_rpb: bool) -> tuple[Attend, Problem]:
    """Full attention of all tokens to all, by cuDNN or FlashAttention."""
    if has_rpb:
        raise Unsupported("full attention has no relative positional bias")
    if any(axis.dilation > 1 or axis.stride > 1 or axis.is_causal for axis in problem.axes):
        raise Unsupported("full attention knows no dilation, stride or causal axis: see the case without")
    backends = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]

    def run(query: Tensor, key: Tensor, value: Tensor, rpb: Tensor | None) -> Tensor:
        with sdpa_kernel(backends, set_priority=True) if device.type == "cuda" else nullcontext():
            output = scaled_dot_product_attention(*map(_heads_first, (query, key, value)))
        return _heads_last(output, query.shape)

    return run, replace(problem, axes=tuple(Axis(axis.length, axis.length) for axis in problem.axes))


def masked_sdpa(problem: Problem, dtype: torch.dtype, device: torch.device, has_rpb: bool) -> tuple[Attend, Problem]:
    """Full attention with the neighborhood as an explicit mask `[tokens, tokens]`, an additive bias of 0 and -inf."""
    if has_rpb:
        raise Unsupported("not written")
    if problem.tokens**2 * dtype.itemsize > 4 << 30:
        raise Unsupported(f"a mask of {problem.tokens} x {problem.tokens} tokens takes more than 4 GiB")
    attends = torch.ones(1, 1, dtype=torch.bool)
    for table, _ in map(axis_tables, problem.axes):
        attends = (attends[:, None, :, None] & table[None, :, None, :]).flatten(2).flatten(0, 1)
    mask = torch.zeros(attends.shape, dtype=dtype).masked_fill_(~attends, float("-inf")).to(device)

    def run(query: Tensor, key: Tensor, value: Tensor, rpb: Tensor | None) -> Tensor:
        output = scaled_dot_product_attention(*map(_heads_first, (query, key, value)), attn_mask=mask)
        return _heads_last(output, query.shape)

    return run, problem


def flex(problem: Problem, dtype: torch.dtype, device: torch.device, has_rpb: bool) -> tuple[Attend, Problem]:
    """FlexAttention over flattened tokens with the rule computed in its kernels; compiled, except on the CPU."""
    compiled = device.type == "cuda"
    torch._dynamo.reset()  # every problem is compiled anew, and only so many versions of one function are allowed
    attends, place = rule(problem.axes)
    mask = block_mask(attends, problem.tokens, device)

    def run(query: Tensor, key: Tensor, value: Tensor, rpb: Tensor | None) -> Tensor:
        score_mod = None
        if rpb is not None:
            bias = rpb.flatten(1)

            def score_mod(score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
                return score + bias[head, place(query, key)]

        heads_first = map(_heads_first, (query, key, value))
        return _heads_last(flex_attention(*heads_first, score_mod=score_mod, block_mask=mask), query.shape)

    return torch.compile(run, fullgraph=True, dynamic=False) if compiled else run, problem


def block_mask(attends: Callable[..., Tensor], tokens: int, device: torch.device) -> BlockMask:
    """FlexAttention's mask; by a compiled function where not all pairs of tokens fit into memory.

    Elsewhere that costs minutes for nothing: the function sorts blocks, which for 65 to 128 of them compiles slowly.
    """
    is_large = device.type == "cuda" and tokens**2 > 1 << 28
    return create_block_mask(attends, None, None, tokens, tokens, device, _compile=is_large)


def rule(axes: tuple[Axis, ...]) -> tuple[Callable[..., Tensor], Callable[[Tensor, Tensor], Tensor]]:
    """The neighborhood in plain arithmetic on flat tokens: FlexAttention's `mask_mod`, and a pair's place in the bias.

    The place is clamped into the bias for pairs that do not attend.
    """

    def divided(x: Tensor, n: int) -> tuple[Tensor, Tensor]:
        """Quotient and remainder of positions; cheaper on a GPU than `//` and `%`, which heed signs."""
        quotient = torch.div(x, n, rounding_mode="trunc")
        return quotient, x - quotient * n

    def members(query: Tensor, key: Tensor) -> list[tuple[Axis, Tensor, Tensor, Tensor, Tensor]]:
        """Per axis: members of query and key in their groups, the query's group, whether both share it."""
        found = []
        for axis in reversed(axes):
            (query, q), (key, k) = divided(query, axis.length), divided(key, axis.length)
            (q, q_group), (k, k_group) = divided(q, axis.dilation), divided(k, axis.dilation)
            found.append((axis, q, k, q_group, q_group == k_group))
        return found[::-1]

    def attends(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        everywhere = query == query
        for axis, q, k, group, same in members(query, key):
            size, s, d = axis.kernel_size, axis.stride, axis.dilation
            count = divided(axis.length - group + d - 1, d)[0]
            leader = torch.minimum(divided(q, s)[0] * s + (s - 1 if axis.is_causal else s // 2), count - 1)
            if axis.is_causal:
                inside = (k >= leader - size + 1) & (k <= q)
            else:
                start = torch.minimum((leader - size // 2).clamp(min=0), count - size)
                inside = (k >= start) & (k < start + size)
            everywhere = everywhere & inside & same
        return everywhere

    def place(query: Tensor, key: Tensor) -> Tensor:
        index = 0 * query
        for axis, q, k, _, _ in members(query, key):
            size = axis.kernel_size
            index = index * (2 * size - 1) + (k - q + size - 1).clamp(0, 2 * size - 2)
        return index

    return attends, place


def _heads_first(x: Tensor) -> Tensor:
    """`[B, *spatial, heads, head_dim]` as a view `[B, heads, tokens, head_dim]`."""
    return x.flatten(1, -3).transpose(1, 2)


def _heads_last(x: Tensor, shape: torch.Size) -> Tensor:
    """`[B, heads, tokens, head_dim]` as a view of shape `[B, *spatial, heads, head_dim]`."""
    return x.transpose(1, 2).unflatten(1, shape[1:-2])


PROVIDERS: dict[str, Provider] = {"fused_na": fused_na, "flex": flex, "sdpa": sdpa, "natten": natten}
