"""Neighborhood attention problems for the tests of every backend: random legal ones, their inputs and results."""

from dataclasses import dataclass
from math import prod

import torch
from hypothesis import strategies as st
from torch import Tensor

from fused_na import neighborhood_attention


@dataclass(frozen=True)
class Problem:
    """Arguments of one legal call, all but the tensors."""

    spatial: tuple[int, ...]
    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    is_causal: tuple[bool, ...]
    batch: int = 2
    heads: int = 2
    heads_kv: int = 2
    head_dim: int = 8
    head_dim_v: int = 8
    scale: float | None = None
    has_rpb: bool = False
    additional: int | None = None
    layout: str = "contiguous"

    @property
    def options(self) -> dict:
        return {
            "kernel_size": self.kernel_size,
            "stride": self.stride,
            "dilation": self.dilation,
            "is_causal": self.is_causal,
            "scale": self.scale,
        }

    def inputs(self, dtype: torch.dtype = torch.float64, device: str = "cpu", seed: int = 0) -> dict[str, Tensor]:
        """Random tensors by argument name, in the layout that the problem asks for."""
        generator = torch.Generator().manual_seed(seed)

        def random(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype)

        heads_kv, d, d_v = self.heads_kv, self.head_dim, self.head_dim_v
        outer = (self.batch, *self.spatial)
        if self.layout == "packed":  # one projection, as models have it: [B, *spatial, channels of q, k and v]
            packed = random(*outer, self.heads * d + heads_kv * (d + d_v))
            query, key, value = packed.split([self.heads * d, heads_kv * d, heads_kv * d_v], dim=-1)
            query, key = query.unflatten(-1, (self.heads, d)), key.unflatten(-1, (heads_kv, d))
            value = value.unflatten(-1, (heads_kv, d_v))
        elif self.layout == "heads first":
            query = random(self.batch, self.heads, *self.spatial, d).movedim(1, -2)
            key = random(self.batch, heads_kv, *self.spatial, d).movedim(1, -2)
            value = random(d_v, self.batch, heads_kv, *self.spatial).movedim(0, -1).movedim(1, -2)
        else:
            query, key = random(*outer, self.heads, d), random(*outer, heads_kv, d)
            value = random(*outer, heads_kv, d_v)
        inputs = {"query": query, "key": key, "value": value}
        if self.has_rpb:
            inputs["rpb"] = random(self.heads, *(2 * k - 1 for k in self.kernel_size))
        if self.additional is not None:
            inputs["additional_keys"] = random(self.batch, self.additional, heads_kv, d)
            inputs["additional_values"] = random(self.batch, self.additional, heads_kv, d_v)
        return inputs


@st.composite
def problems(draw: st.DrawFn, max_tokens: int = 200) -> Problem:
    """Any legal problem on a map of at most `max_tokens` tokens."""
    rank = draw(st.integers(1, 3))
    longest = {1: max_tokens, 2: 16, 3: 7}[rank]
    spatial, kernel_size, stride, dilation = [], [], [], []
    for _ in range(rank):
        length = draw(st.integers(1, max(1, min(longest, max_tokens // prod(spatial)))))
        k = draw(st.integers(1, length))
        spatial.append(length)
        kernel_size.append(k)
        stride.append(draw(st.integers(1, k)))
        dilation.append(draw(st.integers(1, length // k)))
    heads_kv, group = draw(st.sampled_from([(1, 1), (2, 1), (1, 3), (2, 2)]))
    head_dim = draw(st.sampled_from([1, 4, 8]))
    return Problem(
        tuple(spatial),
        tuple(kernel_size),
        tuple(stride),
        tuple(dilation),
        is_causal=tuple(draw(st.lists(st.booleans(), min_size=rank, max_size=rank))),
        batch=draw(st.integers(1, 3)),
        heads=heads_kv * group,
        heads_kv=heads_kv,
        head_dim=head_dim,
        head_dim_v=draw(st.sampled_from([head_dim, 3])),
        scale=draw(st.sampled_from([None, 0.3, 2.0])),
        has_rpb=draw(st.booleans()),
        additional=draw(st.sampled_from([None, None, 0, 1, 5])),
        layout=draw(st.sampled_from(["contiguous", "packed", "heads first"])),
    )


def attend_with_gradients(
    problem: Problem, inputs: dict[str, Tensor], backend: str | None, has_grad_lse: bool = True
) -> dict[str, Tensor]:
    """Output, log-sum-exp and the gradient of every input under random incoming gradients of both, or the output's
    alone, by name."""
    inputs = {name: x.detach().requires_grad_() for name, x in inputs.items()}
    output, lse = neighborhood_attention(**inputs, **problem.options, return_lse=True, backend=backend)
    generator = torch.Generator().manual_seed(1)
    incoming = [
        torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.device, x.dtype) for x in (output, lse)
    ]
    used = slice(2 if has_grad_lse else 1)
    gradients = torch.autograd.grad((output, lse)[used], tuple(inputs.values()), incoming[used])
    return {"output": output.detach(), "lse": lse.detach()} | {
        f"gradient of {name}": gradient for name, gradient in zip(inputs, gradients, strict=True)
    }


def assert_close(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    """Each tensor lies within `tolerance` of the expected one, relative to the latter's largest element."""
    assert actual.keys() == expected.keys()
    for name, x in expected.items():
        y = actual[name]
        assert y.shape == x.shape, f"{name}: shape {list(y.shape)}, expected {list(x.shape)}"
        if x.numel():
            difference = (y.double() - x.double()).abs().max().item()
            largest = x.double().abs().max().item()
            assert difference <= tolerance * max(largest, 1e-3), f"{name}: off by {difference}, largest {largest}"
