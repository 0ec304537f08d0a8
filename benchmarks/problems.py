"""The attention problems that are timed: their shapes, inputs, useful work and NATTEN's figures."""

import random
from dataclasses import dataclass, replace
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from fused_na.window import Axis, group_members, window


class Inputs(NamedTuple):
    """Tensors of one call; query, key and value are slices of one packed projection, as models have them."""

    query: Tensor  # [B, *spatial, heads, head_dim]
    key: Tensor
    value: Tensor
    rpb: Tensor | None  # [heads, 2 * kernel_size - 1, ...], float32
    incoming: Tensor  # gradient of the output, [B, *spatial, heads, head_dim]


@dataclass(frozen=True)
class Problem:
    """Self-attention of `heads` heads on `batch` maps, whose axes hold the neighborhood."""

    batch: int
    axes: tuple[Axis, ...]
    heads: int
    head_dim: int

    @property
    def spatial(self) -> tuple[int, ...]:
        return tuple(axis.length for axis in self.axes)

    @property
    def tokens(self) -> int:
        return prod(self.spatial)

    @property
    def options(self) -> dict[str, tuple]:
        """The neighborhood as `fused_na` and NATTEN take it."""
        _, *per_axis = zip(*self.axes, strict=True)
        return dict(zip(("kernel_size", "stride", "dilation", "is_causal"), per_axis, strict=True))

    @property
    def pairs(self) -> int:
        """Pairs of query and key of one head and sample."""
        return prod(
            sum(end - start for start, end in map(self._window(axis), range(axis.length))) for axis in self.axes
        )

    def neighbors(self, token: int) -> tuple[Tensor, Tensor]:
        """Flat tokens that a flat token attends to, and their places in the flattened bias; both int64 `[keys]`."""
        keys, places = torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
        for axis, x in zip(self.axes, torch.unravel_index(torch.tensor(token), self.spatial), strict=True):
            d, k = axis.dilation, axis.kernel_size
            member = torch.arange(*self._window(axis)(x.item()))
            keys = (keys[:, None] * axis.length + member * d + x % d).flatten()
            places = (places[:, None] * (2 * k - 1) + member - x // d + k - 1).flatten()
        return keys, places

    def flops(self, backward: bool) -> int:
        """Useful floating-point operations: two matrix products in forward, five in backward."""
        return (10 if backward else 4) * self.batch * self.heads * self.pairs * self.head_dim

    def bytes(self, backward: bool, itemsize: int) -> int:
        """The least memory traffic: query, key, value and output; in backward these and the gradients of all four."""
        return (8 if backward else 4) * self.batch * self.tokens * self.heads * self.head_dim * itemsize

    def inputs(self, dtype: torch.dtype, device: torch.device, has_rpb: bool, seed: int) -> Inputs:
        """Standard normal tensors."""
        generator = torch.Generator(device).manual_seed(seed)
        shape = self.batch, *self.spatial, 3, self.heads, self.head_dim
        packed = torch.empty(shape, dtype=dtype, device=device).normal_(generator=generator)
        incoming = torch.empty(packed.select(-3, 0).shape, dtype=dtype, device=device).normal_(generator=generator)
        sides = (2 * axis.kernel_size - 1 for axis in self.axes)
        rpb = torch.randn(self.heads, *sides, device=device, generator=generator) if has_rpb else None
        return Inputs(*packed.unbind(-3), rpb, incoming)

    @staticmethod
    def _window(axis: Axis):
        return lambda x: window(axis, x // axis.dilation, group_members(axis, x % axis.dilation))


def _square(length: int, kernel_size: int, dilation: int = 1) -> tuple[Axis, ...]:
    return (Axis(length, kernel_size, 1, dilation),) * 2


def _clip(side: int, is_causal: bool = False) -> tuple[Axis, ...]:
    return Axis(16, 7, 1, 1, is_causal), Axis(side, 7), Axis(side, 7)


SUITES = {
    "image": {
        "img_s1": Problem(128, _square(56, 7), 2, 32),
        "img_s2": Problem(128, _square(28, 7), 4, 32),
        "img_s3": Problem(128, _square(14, 7), 8, 32),
        "img_s4": Problem(128, _square(7, 7), 16, 32),
        "img_s1_dilation8": Problem(128, _square(56, 7, 8), 2, 32),
        "img_s2_dilation4": Problem(128, _square(28, 7, 4), 4, 32),
    },
    "video": {
        "vid_s1": Problem(4, _clip(56), 2, 32),
        "vid_s1_causal": Problem(4, _clip(56, is_causal=True), 2, 32),
        "vid_s2": Problem(4, _clip(28), 4, 32),
        "vid_s3": Problem(4, _clip(14), 8, 32),
    },
    "large": {
        "one_d": Problem(1, (Axis(32768, 2048),), 8, 128),
        "flux": Problem(1, (Axis(256, 80),) * 2, 24, 128),
        "flux_stride16x16": Problem(1, (Axis(256, 80, 16),) * 2, 24, 128),
        "hunyuan": Problem(1, (Axis(30, 18), Axis(48, 24), Axis(80, 24)), 24, 128),
        "hunyuan_stride16x8x8": Problem(1, (Axis(30, 18, 16), Axis(48, 24, 8), Axis(80, 24, 8)), 24, 128),
        "hunyuan_d64": Problem(1, (Axis(30, 9), Axis(48, 15), Axis(80, 15)), 24, 64),
    },
    "smoke": {
        "tiny": Problem(2, _square(6, 3), 2, 16),
        "tiny_1d": Problem(2, (Axis(40, 6, 4, 2),), 2, 16),
        "tiny_2d": Problem(2, (Axis(9, 4, 1, 2), Axis(10, 5, 3)), 2, 16),
        "tiny_3d": Problem(1, (Axis(4, 3, 1, 1, True), Axis(5, 3), Axis(6, 2, 2)), 2, 16),
    },
}


def random_problem(seed: int) -> Problem:
    """A sequence, map or clip with windows of up to 512 tokens at head_dim 32, or larger ones at head_dim 64 or 128, in
    as many samples as make about 100 MB of tensors or 2 TFLOP."""
    draw = random.Random(seed)
    rank, is_small = 1 + seed % 3, draw.random() < 0.6
    lengths, sizes = {
        (1, True): ([(256, 4096)], [(3, 255)]),
        (2, True): ([(14, 112)] * 2, [(3, 13)] * 2),
        (3, True): ([(4, 32), (14, 56), (14, 56)], [(2, 7), (3, 7), (3, 7)]),
        (1, False): ([(4096, 32768)], [(256, 2048)]),
        (2, False): ([(64, 192)] * 2, [(23, 64)] * 2),
        (3, False): ([(8, 32), (24, 64), (24, 64)], [(4, 8), (11, 24), (11, 24)]),
    }[rank, is_small]
    is_strided, is_dilated = draw.random() < 0.25, is_small and draw.random() < 0.25
    axes = []
    for length_bounds, size_bounds in zip(lengths, sizes, strict=True):
        length = draw.randint(*length_bounds)
        size = draw.randint(size_bounds[0], min(length, size_bounds[1]))
        stride = draw.randint(1, size) if is_strided else 1
        axes.append(Axis(length, size, stride, draw.randint(1, length // size) if is_dilated else 1))
    if draw.random() < 0.2:
        axes[0] = axes[0]._replace(is_causal=True)
    head_dim = 32 if is_small else draw.choice([64, 128])
    one = Problem(1, tuple(axes), draw.choice([1, 2, 4, 8]), head_dim)
    batch = min(100e6 / one.bytes(False, 2), 2e12 / one.flops(False))
    return replace(one, batch=max(1, round(batch)))


# NATTEN 0.21.7, built from source: milliseconds in bfloat16 on one H100 80GB, forward and backward, the best of all its
# configurations for Hopper (token permutation included), on contiguous inputs; measured as `timing.py` does.
NATTEN_MS = {
    "img_s1": (0.674, 2.517),
    "img_s2": (0.353, 1.198),
    "img_s3": (0.130, 0.474),
    "img_s1_dilation8": (0.272, 0.818),
    "img_s2_dilation4": (0.141, 0.434),
    "vid_s1": (0.898, 2.464),
    "vid_s1_causal": (0.843, None),
    "vid_s2": (0.401, 1.151),
    "vid_s3": (0.249, 0.793),
    "one_d": (0.767, 3.271),
    "flux": (17.53, 62.26),
    "flux_stride16x16": (9.00, None),
    "hunyuan": (75.10, 259.4),
    "hunyuan_stride16x8x8": (26.91, 141.7),
    "hunyuan_d64": (17.76, 47.89),
}
