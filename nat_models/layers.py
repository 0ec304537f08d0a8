"""Building blocks of the model families, for one, two or three spatial axes alike.

Maps are channels-last, `[B, *spatial, C]`: `B` batch, `*spatial` = `[L]`, `[H, W]` or `[T, H, W]`, `C` channels.
Images and clips come channels-first, `[B, in_chans, *spatial]`. Parameter names are those of the original NAT code
(https://github.com/SHI-Labs/Neighborhood-Attention-Transformer).
"""

from collections.abc import Sequence
from itertools import chain
from typing import Any, ClassVar, TypeVar

import torch
from timm.layers import DropPath, register_notrace_function, register_notrace_module, trunc_normal_
from timm.layers import Mlp as TimmMlp
from timm.models import checkpoint
from torch import Tensor, nn
from torch.nn import functional as F

from fused_na import packed_neighborhood_attention
from nat_models.settings import check_number

_T = TypeVar("_T", int, bool)


class NeighborhoodAttention(nn.Module):
    """Multi-head neighborhood attention with relative positional biases; use the subclass for the number of axes.

    A map smaller than `kernel_size * dilation` is zero-padded at the end of the axis up to that size before the
    projection to query, key and value, and cropped after attention, as the original code does: published weights were
    trained and tested that way.

    Args:
        dim: channels in and out.
        num_heads: heads; must divide `dim`.
        kernel_size: neighborhood per axis; an int holds for all axes.
        stride: queries that share one neighborhood, per axis; 1 is a sliding window, `kernel_size` a blocked one.
        dilation: distance between neighbors, per axis.
        is_causal: per axis, whether neighborhoods end at the query itself.
        rel_pos_bias: learn a bias `rpb [num_heads, 2 * kernel_size - 1, ...]` per relative position.
        qkv_bias: bias in the projection to query, key and value.
        qk_scale: factor on the dot products; None means `(dim / num_heads) ** -0.5`.
        proj_drop: dropout rate after the output projection.

    Raises:
        ValueError: an argument out of its range; the message names it.

    Sources: https://arxiv.org/abs/2204.07143, https://arxiv.org/abs/2209.15001 (dilation).
    """

    num_axes: ClassVar[int]

    def __init__(
        self,
        dim: int,
        num_heads: int,
        kernel_size: int | Sequence[int] = 7,
        stride: int | Sequence[int] = 1,
        dilation: int | Sequence[int] = 1,
        is_causal: bool | Sequence[bool] = False,
        rel_pos_bias: bool = True,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        proj_drop: float = 0.0,
    ) -> None:
        super().__init__()
        check_number("num_heads", num_heads, 1, whole=True)
        check_number("proj_drop", proj_drop, 0, 1)
        if dim % num_heads:
            raise ValueError(f"num_heads must divide the {dim} channels, got {num_heads}")
        self.num_heads = num_heads
        self.kernel_size = self._per_axis("kernel_size", kernel_size)
        self.stride = self._per_axis("stride", stride)
        self.dilation = self._per_axis("dilation", dilation)
        self.is_causal = self._per_axis("is_causal", is_causal)
        if min(self.kernel_size) < 1:
            raise ValueError(f"kernel_size must be at least 1, got {kernel_size}")
        if min(self.dilation) < 1:
            raise ValueError(f"dilation must be at least 1, got {dilation}")
        if any(not 1 <= s <= k for s, k in zip(self.stride, self.kernel_size, strict=True)):
            raise ValueError(f"stride must be between 1 and kernel_size {kernel_size}, got {stride}")
        self.qk_scale = qk_scale

        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.rpb = None
        if rel_pos_bias:
            self.rpb = nn.Parameter(torch.empty(num_heads, *(2 * k - 1 for k in self.kernel_size)))
            trunc_normal_(self.rpb, std=0.02)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)

    def _per_axis(self, name: str, value: _T | Sequence[_T]) -> tuple[_T, ...]:
        values = tuple(value) if isinstance(value, Sequence) else (value,) * self.num_axes
        if len(values) != self.num_axes or not all(isinstance(x, int) for x in values):  # a bool is one
            kind = "bool" if name == "is_causal" else "integer"
            raise ValueError(f"{name} must be one {kind} or one per axis ({self.num_axes}), got {value!r}")
        return values

    def forward(self, x: Tensor) -> Tensor:
        """`[B, *spatial, dim]` -> `[B, *spatial, dim]`."""
        spatial = x.shape[1:-1]
        kernel_size, rpb = self.neighborhood(spatial)
        padding = [max(k * d - n, 0) for k, d, n in zip(kernel_size, self.dilation, spatial, strict=True)]
        if any(padding):
            x = F.pad(x, [0, 0, *chain.from_iterable((0, after) for after in reversed(padding))])
        qkv = self.encode_positions(self.qkv(x).unflatten(-1, (3, self.num_heads, -1)))
        stride = tuple(map(min, self.stride, kernel_size))
        x = packed_neighborhood_attention(qkv, kernel_size, stride, self.dilation, self.is_causal, self.qk_scale, rpb)
        if any(padding):
            x = x[(slice(None), *(slice(n) for n in spatial))]
        return self.proj_drop(self.proj(x.flatten(-2)))

    def neighborhood(self, spatial: Sequence[int]) -> tuple[tuple[int, ...], Tensor | None]:
        """Kernel size and biases for a map of this size."""
        return self.kernel_size, self.rpb

    def encode_positions(self, qkv: Tensor) -> Tensor:
        """What to do to query and key in `[B, *spatial, 3, heads, head_dim]` before attention: nothing but in
        subclasses."""
        return qkv

    def extra_repr(self) -> str:
        return (
            f"num_heads={self.num_heads}, kernel_size={self.kernel_size}, stride={self.stride}, "
            f"dilation={self.dilation}, is_causal={self.is_causal}, rel_pos_bias={self.rpb is not None}"
        )


@register_notrace_module  # a leaf for timm's FX feature extraction, as its padding depends on the size of the map
class NeighborhoodAttention1D(NeighborhoodAttention):
    """`NeighborhoodAttention` on sequences `[B, L, dim]`."""

    num_axes = 1


@register_notrace_module
class NeighborhoodAttention2D(NeighborhoodAttention):
    """`NeighborhoodAttention` on feature maps `[B, H, W, dim]`."""

    num_axes = 2


@register_notrace_module
class NeighborhoodAttention3D(NeighborhoodAttention):
    """`NeighborhoodAttention` on feature volumes `[B, T, H, W, dim]`."""

    num_axes = 3


@register_notrace_module
class Mlp(TimmMlp):
    """timm's MLP, which in training computes its activation again in backward instead of keeping it.

    Backward reads the activation's input in any case; what this adds is to write the output once more, some percent of
    a block's traffic. An `autograd.Function` would not do: torch.compile finds both activations to be one and keeps it.
    """

    def forward(self, x: Tensor) -> Tensor:
        """`[..., in_features]` -> `[..., out_features]`."""
        x = self.fc1(x)
        if self.training and x.requires_grad and not self.drop1.p:  # dropout would have to be drawn again
            return checkpoint(self._after_fc1, x, preserve_rng_state=False)
        return self._after_fc1(x)

    def _after_fc1(self, x: Tensor) -> Tensor:
        return self.drop2(self.fc2(self.norm(self.drop1(self.act(x)))))


class Block(nn.Module):
    """Pre-norm transformer block: attention, then MLP, each with residual, layer scale and stochastic depth.

    Args:
        dim: channels in and out.
        attn: attention module on maps `[B, *spatial, dim]`.
        mlp_ratio: width of the MLP's hidden layer over `dim`.
        layer_scale: initial value of the learned factors `gamma1`, `gamma2 [dim]` on the two branches; None leaves
            them out.
        proj_drop: dropout rate in the MLP.
        drop_path: rate of dropping a branch per sample in training.
    """

    def __init__(
        self,
        dim: int,
        attn: nn.Module,
        mlp_ratio: float = 4.0,
        layer_scale: float | None = None,
        proj_drop: float = 0.0,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        check_number("mlp_ratio", mlp_ratio, above=0)
        self.norm1 = nn.LayerNorm(dim)
        self.attn = attn
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), drop=proj_drop)
        self.gamma1 = None if layer_scale is None else nn.Parameter(torch.full((dim,), float(layer_scale)))
        self.gamma2 = None if layer_scale is None else nn.Parameter(torch.full((dim,), float(layer_scale)))
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.grad_checkpointing = False

    def forward(self, x: Tensor) -> Tensor:
        """`[B, *spatial, dim]` -> `[B, *spatial, dim]`."""
        return checkpoint(self._forward, x) if self.grad_checkpointing else self._forward(x)

    def _forward(self, x: Tensor) -> Tensor:
        x = self.add_branch(x, self.attn(self.norm1(x)), self.gamma1)
        return self.add_branch(x, self.mlp(self.norm2(x)), self.gamma2)

    def add_branch(self, x: Tensor, branch: Tensor, gamma: Tensor | None) -> Tensor:
        """The residual connection: `x` and a branch's output, both `[B, *spatial, dim]`, with layer scale `gamma`."""
        return x + self.drop_path(branch if gamma is None else gamma * branch)


class ConvTokenizer(nn.Module):
    """Tokens from two overlapping convolutions; by default they reduce height and width by 4.

    Args:
        in_chans: channels of the input.
        embed_dim: channels of the tokens; the first convolution has half of them.
        kernel_sizes: kernel of each of the two convolutions, per axis. An axis is padded by `(kernel - 1) // 2`.
        strides: their strides, likewise.
    """

    def __init__(
        self,
        in_chans: int,
        embed_dim: int,
        kernel_sizes: Sequence[Sequence[int]] = ((3, 3), (3, 3)),
        strides: Sequence[Sequence[int]] = ((2, 2), (2, 2)),
    ) -> None:
        super().__init__()
        check_number("in_chans", in_chans, 1, whole=True)
        check_number("embed_dim", embed_dim, 2, whole=True)
        self.proj = nn.Sequential(
            convolution(in_chans, embed_dim // 2, kernel_sizes[0], strides[0]),
            convolution(embed_dim // 2, embed_dim, kernel_sizes[1], strides[1]),
        )
        self.norm = nn.LayerNorm(embed_dim)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, in_chans, *spatial]` -> `[B, *smaller spatial, embed_dim]`."""
        return self.norm(self.proj(channels_last(x)).movedim(1, -1))


class ConvDownsampler(nn.Module):
    """Overlapping convolution from `dim` to `2 * dim` channels; by default it halves height and width.

    Args:
        dim: channels in.
        kernel_size: per axis, padded by `(kernel - 1) // 2`.
        stride: per axis.
    """

    def __init__(self, dim: int, kernel_size: Sequence[int] = (3, 3), stride: Sequence[int] = (2, 2)) -> None:
        super().__init__()
        self.reduction = convolution(dim, 2 * dim, kernel_size, stride, bias=False)
        self.norm = nn.LayerNorm(2 * dim)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, *spatial, dim]` -> `[B, *smaller spatial, 2 * dim]`."""
        return self.norm(self.reduction(channels_last(x.movedim(-1, 1))).movedim(1, -1))


@register_notrace_module
class TubeletConv(nn.Conv3d):
    """A convolution over clips whose kernel and stride in time are equal: output frames have input frames of their own.

    Such frames are joined as channels of a two-dimensional convolution, which is faster than one in three dimensions
    and takes channels-last clips as they lie in memory. Frames left over at the end of a clip are dropped.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        assert self.kernel_size[0] == self.stride[0] and self.padding[0] == 0

    def forward(self, input: Tensor) -> Tensor:
        """`[B, in_chans, T, H, W]` -> `[B, out_chans, T / stride, H / stride, W / stride]`."""
        frames, batch_size = self.stride[0], input.shape[0]  # len() would fix the batch size when exported
        x = input.transpose(1, 2)[:, : input.shape[2] // frames * frames]
        x = x.flatten(0, 1).unflatten(0, (-1, frames)).flatten(1, 2)  # [B * T / stride, stride * in_chans, H, W]
        weight = self.weight.transpose(1, 2).flatten(1, 2)
        x = F.conv2d(channels_last(x), weight, self.bias, self.stride[1:], self.padding[1:])
        return x.unflatten(0, (batch_size, -1)).transpose(1, 2)


@register_notrace_module
class PatchEmbed(nn.Module):
    """Tokens from patches that do not overlap; the input is zero-padded at the end of an axis to whole patches.

    Args:
        in_chans: channels of the input.
        embed_dim: channels of the tokens.
        patch_size: per axis.
    """

    def __init__(self, in_chans: int, embed_dim: int, patch_size: Sequence[int] = (4, 4)) -> None:
        super().__init__()
        check_number("in_chans", in_chans, 1, whole=True)
        check_number("embed_dim", embed_dim, 1, whole=True)
        self.patch_size = tuple(patch_size)
        self.proj = convolution(in_chans, embed_dim, self.patch_size, self.patch_size, padding=[0] * len(patch_size))
        self.norm = nn.LayerNorm(embed_dim)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, in_chans, *spatial]` -> `[B, *spatial / patch_size, embed_dim]`."""
        padding = [-n % p for n, p in zip(x.shape[2:], self.patch_size, strict=True)]
        if any(padding):
            x = F.pad(x, list(chain.from_iterable((0, after) for after in reversed(padding))))
        return self.norm(self.proj(channels_last(x)).movedim(1, -1))


@register_notrace_function
def channels_last(x: Tensor) -> Tensor:
    """Images `[B, C, H, W]` with channels side by side in memory, and other inputs of convolutions as they are.

    A convolution's output lies as its input does, and torch.compile lets the blocks that follow have their maps lie the
    same way, though all but the convolutions work on the channels of one token after the other.
    """
    return x.contiguous(memory_format=torch.channels_last) if x.ndim == 4 else x


def convolution(
    in_chans: int,
    out_chans: int,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int] | None = None,
    bias: bool = True,
) -> nn.Module:
    """A convolution over `len(kernel_size)` axes; each is padded by `(kernel - 1) // 2` where `padding` is None."""
    if padding is None:
        padding = [(k - 1) // 2 for k in kernel_size]
    conv: Any = (nn.Conv1d, nn.Conv2d, TubeletConv)[len(kernel_size) - 1]
    return conv(in_chans, out_chans, tuple(kernel_size), tuple(stride), tuple(padding), bias=bias)
