"""Isotropic NAT for video: tubelets of frames, one resolution throughout, neighborhood attention over time and space.

Dilated Neighborhood Attention Transformer, appendix, https://arxiv.org/abs/2209.15001
Tubelets: ViViT, https://arxiv.org/abs/2103.15691
"""

from collections.abc import Sequence
from typing import Any

from timm.layers import calculate_drop_path_rates
from timm.models import generate_default_cfgs, register_model
from torch import nn

from nat_models.backbone import Backbone
from nat_models.checkpoints import build_clip_model, dinat_cfg
from nat_models.clip_layers import ClipAttention, TubeletEmbed
from nat_models.layers import Block
from nat_models.settings import check_number

__all__ = ["NATIso3D"]  # register_model adds the entry points


class NATIso3D(Backbone):
    """Isotropic NAT over clips `[B, in_chans, T, H, W]` of any number of frames and any size.

    Args:
        num_frames: frames of the clips that the model is meant for; kept as an attribute, others work as well.
        patch_size: frames, rows and columns of a tubelet.
        embed_dim: channels of all blocks.
        depth: number of blocks.
        num_heads: attention heads.
        mlp_ratio: width of the MLPs' hidden layer over the channels.
        kernel_size: neighborhood of the attention in frames, rows and columns; one number holds for all three.
        stride: queries that share a neighborhood, likewise.
        dilation: dilation of every second block, starting with the second, likewise; the others have 1.
        position: "rpb" (learned biases, as in the image models) or "rope" (rotary embeddings).
        num_classes: outputs of the classifier; 0 leaves it out.
        in_chans: channels of the clips.
        global_pool: "avg", "max", "avgmax" or "" for none.
        qkv_bias: bias in the projections to query, key and value.
        drop_rate: dropout rate before the classifier.
        proj_drop_rate: dropout rate after attention and in the MLPs.
        drop_path_rate: rate of stochastic depth at the last block, growing linearly from 0 at the first.

    Raises:
        ValueError: a value out of its range.
    """

    output_fmt = "NTHWC"
    stages_name = "layers"
    stage_pattern = [("", None)]

    def __init__(
        self,
        num_frames: int = 16,
        patch_size: Sequence[int] = (2, 16, 16),
        embed_dim: int = 384,
        depth: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        kernel_size: int | Sequence[int] = (5, 7, 7),
        stride: int | Sequence[int] = 1,
        dilation: int | Sequence[int] = 1,
        position: str = "rpb",
        num_classes: int = 1000,
        in_chans: int = 3,
        global_pool: str = "avg",
        qkv_bias: bool = True,
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        sizes = dict(num_frames=num_frames, embed_dim=embed_dim, depth=depth, in_chans=in_chans)
        for name, value in sizes.items():
            check_number(name, value, 1, whole=True)
        check_number("drop_path_rate", drop_path_rate, 0, 1)
        is_triple = isinstance(patch_size, Sequence) and len(patch_size) == 3
        if not is_triple or not all(type(n) is int and n >= 1 for n in patch_size):
            raise ValueError(f"patch_size must be three integers, of frames, rows and columns, got {patch_size!r}")
        self.num_frames = num_frames
        self.in_chans = in_chans
        self.embed_dim = embed_dim
        self.patch_embed = TubeletEmbed(in_chans, embed_dim, patch_size)
        drop_path_rates: Any = calculate_drop_path_rates(drop_path_rate, depth)
        blocks = []
        for i in range(depth):
            attn = ClipAttention(
                embed_dim,
                num_heads,
                position,
                kernel_size=kernel_size,
                stride=stride,
                dilation=dilation if i % 2 else 1,
                qkv_bias=qkv_bias,
                proj_drop=proj_drop_rate,
            )
            blocks.append(Block(embed_dim, attn, mlp_ratio, proj_drop=proj_drop_rate, drop_path=drop_path_rates[i]))
        self.layers = nn.Sequential(*blocks)
        self.feature_info = [
            dict(num_chs=embed_dim, reduction=patch_size[-1], module=f"{self.stages_name}.{i}") for i in range(depth)
        ]
        self.init_head(embed_dim, num_classes, global_pool, drop_rate)


default_cfgs = generate_default_cfgs(
    {
        "nat_iso3d_small.in1k": dinat_cfg(
            "isotropic/nat_isotropic_small_in1k_224.pth", first_conv="patch_embed.proj", pool_size=(14, 14)
        ),
    }
)


@register_model
def nat_iso3d_small(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Isotropic NAT3D-Small: 22 M parameters."""
    feature_cfg = dict(flatten_sequential=True, out_indices=kwargs.pop("out_indices", 3))
    args = dict(drop_path_rate=0.1) | kwargs
    return build_clip_model(NATIso3D, "nat_iso3d_small", pretrained, feature_cfg=feature_cfg, **args)
