"""Building blocks of the video families: what clips `[B, in_chans, T, H, W]` need beyond `nat_models.layers`.

Maps are `[B, T, H, W, C]`.
"""

from collections.abc import Sequence
from typing import Any

import torch
from timm.layers import register_notrace_module, trunc_normal_
from torch import Tensor, nn

from nat_models.layers import Block, ConvDownsampler, ConvTokenizer, NeighborhoodAttention3D, PatchEmbed

POSITIONS = ("rpb", "rope")
LEAST_ROTARY_DIM = 6
"""Channels of a head; with less, `rotary_angles` leaves height and width none."""


@register_notrace_module
class ClipAttention(NeighborhoodAttention3D):
    """Neighborhood attention over time and space in one call.

    The bias of a relative position is the sum of two that are learned: of its rows and columns, `rpb`, which is that
    of images, and of its frames, `temporal_rpb [num_heads, 2 * kernel_size - 1]`, which starts at zero. One table of
    all three would be a fiftieth of the parameters of a whole model.

    Clips shorter than the neighborhood have all their frames as neighborhood, with the biases of the distances that
    occur; height and width are padded as for images, see `NeighborhoodAttention`.

    Args:
        dim: channels in and out.
        num_heads: heads; must divide `dim`.
        position: what tells a query where a key is: "rpb", learned biases of relative positions, or "rope", rotary
            embeddings of time, height and width.
        options: keywords of `NeighborhoodAttention`.

    Raises:
        ValueError: an argument out of its range, or with "rope" heads of less than 6 channels; the message names it.
    """

    def __init__(self, dim: int, num_heads: int, position: str = "rpb", **options: Any) -> None:
        if position not in POSITIONS:
            raise ValueError(f"position must be one of {', '.join(map(repr, POSITIONS))}, got {position!r}")
        for name in ("kernel_size", "stride", "dilation"):
            check_per_axis(name, options.get(name, 1))
        super().__init__(dim, num_heads, rel_pos_bias=False, **options)
        frames, *rows_and_columns = (2 * k - 1 for k in self.kernel_size)
        self.temporal_rpb = None
        if position == "rpb":
            self.rpb = nn.Parameter(torch.empty(num_heads, *rows_and_columns))
            self.temporal_rpb = nn.Parameter(torch.zeros(num_heads, frames))
            trunc_normal_(self.rpb, std=0.02)
        elif dim // num_heads % 2 or dim // num_heads < LEAST_ROTARY_DIM:
            raise ValueError(
                f"position='rope' needs an even head_dim (channels per head) of at least {LEAST_ROTARY_DIM}, for time, "
                f"height and width to turn a pair each, got {dim} / {num_heads} = {dim // num_heads}"
            )
        self.position = position

    def neighborhood(self, spatial: Sequence[int]) -> tuple[tuple[int, ...], Tensor | None]:
        """Kernel size and biases, cropped to the frames of a map `spatial = [T, H, W]`."""
        frames, (kernel_size, *others), dilation = spatial[0], self.kernel_size, self.dilation[0]
        # Padding at the end is out of sight for causal attention only: the others go by the smallest group of frames.
        group = -(-frames // dilation) if self.is_causal[0] else max(frames // dilation, 1)
        cropped = min(kernel_size, group)
        if self.rpb is None or self.temporal_rpb is None:
            return (cropped, *others), None
        temporal_rpb = self.temporal_rpb[:, kernel_size - cropped : kernel_size + cropped - 1]
        return (cropped, *others), self.rpb[:, None] + temporal_rpb[:, :, None, None]

    def encode_positions(self, qkv: Tensor) -> Tensor:
        """Rotates query and key in `[B, T, H, W, 3, heads, head_dim]` where `position` is "rope"."""
        if self.position == "rpb":
            return qkv
        angles = rotary_angles([torch.arange(n, device=qkv.device) for n in qkv.shape[1:4]], qkv.shape[-1])
        return torch.cat([rotate(qkv[..., :2, :, :], angles.unsqueeze(-2)), qkv[..., 2:, :, :]], -3)


def rotary_angles(positions: Sequence[Tensor], head_dim: int, base: float = 100.0) -> Tensor:
    """Angles `[*lengths, head_dim / 2]` of axial rotary embeddings, each channel pair turned by one axis.

    Height and width take three eighths of the pairs each, time the rest. Wavelengths grow geometrically from 2 pi
    tokens towards `2 * pi * base`; a base of 100 suits windows, where distances are short.

    Args:
        positions: coordinates `[length]` of each axis: time, height, width.
        head_dim: channels of a head, even and at least 6.

    Sources: https://arxiv.org/abs/2104.09864, axial as in https://arxiv.org/abs/2403.13298.
    """
    spatial = head_dim // 2 * 3 // 8
    lengths = [len(x) for x in positions]
    angles = []
    for axis, (x, pairs) in enumerate(zip(positions, (head_dim // 2 - 2 * spatial, spatial, spatial), strict=True)):
        frequencies = base ** (-torch.arange(pairs, device=x.device) / max(pairs, 1))
        shape = [1] * len(lengths)
        shape[axis] = lengths[axis]
        angles.append((x[:, None] * frequencies).view(*shape, pairs).expand(*lengths, pairs))
    return torch.cat(angles, -1)


def rotate(x: Tensor, angles: Tensor) -> Tensor:
    """`x [B, *lengths, heads, head_dim]` with its channel pairs `(i, i + head_dim / 2)` turned by `angles`."""
    first, second = x.float().chunk(2, -1)
    cos, sin = angles.cos().unsqueeze(-2), angles.sin().unsqueeze(-2)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1).to(x.dtype)


class DividedBlock(Block):
    """A block that attends in space, then in time, then applies its MLP: divided space-time attention.

    The attention in time starts with an output of zero, so that the block starts as a block for images that is applied
    to each frame.

    Args:
        dim: channels in and out.
        attn: attention in space.
        temporal_attn: attention in time.
        options: keywords of `Block`.

    Source: https://arxiv.org/abs/2102.05095.
    """

    def __init__(self, dim: int, attn: nn.Module, temporal_attn: ClipAttention, **options: Any) -> None:
        super().__init__(dim, attn, **options)
        self.temporal_norm = nn.LayerNorm(dim)
        self.temporal_attn = temporal_attn

    def _forward(self, x: Tensor) -> Tensor:
        x = self.add_branch(x, self.attn(self.norm1(x)), self.gamma1)
        x = self.add_branch(x, self.temporal_attn(self.temporal_norm(x)), None)
        return self.add_branch(x, self.mlp(self.norm2(x)), self.gamma2)

    def init_temporal_output(self) -> None:
        """Makes the output of the attention in time zero."""
        nn.init.zeros_(self.temporal_attn.proj.weight)
        nn.init.zeros_(self.temporal_attn.proj.bias)


@register_notrace_module
class ClipTokenizer(ConvTokenizer):
    """`ConvTokenizer` for clips: two frames become one, height and width are reduced by 4.

    The last frame of a clip of odd length is repeated.

    Args:
        in_chans: channels of the clips.
        embed_dim: channels of the tokens.
    """

    def __init__(self, in_chans: int, embed_dim: int) -> None:
        super().__init__(in_chans, embed_dim, kernel_sizes=((1, 3, 3), (2, 3, 3)), strides=((1, 2, 2), (2, 2, 2)))
        self.in_chans = in_chans

    def forward(self, x: Tensor) -> Tensor:
        """`[B, in_chans, T, H, W]` -> `[B, T / 2, H / 4, W / 4, embed_dim]`."""
        check_clips(x, self.in_chans)
        return super().forward(repeat_last_frame(x, 2))


@register_notrace_module
class TubeletEmbed(PatchEmbed):
    """`PatchEmbed` for clips, `patch_size` frames, rows and columns; the last frame fills up the clip."""

    def __init__(self, in_chans: int, embed_dim: int, patch_size: Sequence[int]) -> None:
        super().__init__(in_chans, embed_dim, patch_size)
        self.in_chans = in_chans

    def forward(self, x: Tensor) -> Tensor:
        """`[B, in_chans, T, H, W]` -> `[B, *[T, H, W] / patch_size, embed_dim]`."""
        check_clips(x, self.in_chans)
        return super().forward(repeat_last_frame(x, self.patch_size[0]))


def check_clips(x: Tensor, in_chans: int) -> None:
    """Raises ValueError unless `x` is `[B, in_chans, T, H, W]` with frames in it."""
    if x.dim() != 5 or x.shape[1] != in_chans or 0 in x.shape[2:]:
        raise ValueError(f"clips must be [B, {in_chans}, T, H, W] with T, H and W from 1 up, got {list(x.shape)}")


def check_per_axis(name: str, value: Any) -> None:
    """Raises ValueError unless `value` is a whole number, or three of them: for time, height and width."""
    is_triple = isinstance(value, Sequence) and not isinstance(value, str) and len(value) == 3
    if not all(type(number) is int for number in (value if is_triple else [value])):
        raise ValueError(f"{name} must be an integer, or three, for time, height and width, got {value!r}")


def repeat_last_frame(x: Tensor, multiple: int) -> Tensor:
    """Clips `[B, in_chans, T, H, W]` with `T` filled up to a multiple."""
    missing = -x.shape[2] % multiple
    return torch.cat([x, x[:, :, -1:].expand(-1, -1, missing, -1, -1)], 2) if missing else x


class FrameDownsampler(ConvDownsampler):
    """Halves height and width of each frame and doubles the channels."""

    def __init__(self, dim: int) -> None:
        super().__init__(dim, kernel_size=(1, 3, 3), stride=(1, 2, 2))
