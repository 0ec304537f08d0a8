"""DiNAT_s: Swin Transformer's patch embedding and patch merging around (dilated) neighborhood attention.

Dilated Neighborhood Attention Transformer, https://arxiv.org/abs/2209.15001
Swin Transformer, https://arxiv.org/abs/2103.14030
Original code and weights: https://github.com/SHI-Labs/Neighborhood-Attention-Transformer (MIT license)
"""

from typing import Any

from timm.layers import register_notrace_module
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn
from torch.nn import functional as F

from nat_models.checkpoints import build_model, dinat_cfg
from nat_models.layers import PatchEmbed
from nat_models.nat import DILATIONS_224, DILATIONS_384, NAT, features_of_stages

__all__ = ["DiNAT_s"]  # register_model adds the entry points


@register_notrace_module  # a leaf for timm's FX feature extraction, as its padding depends on the size of the map
class PatchMerging(nn.Module):
    """Joins each 2 x 2 tokens into one of twice the channels; a map of odd size is zero-padded at the end.

    Args:
        dim: channels in.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4 * dim)
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, H, W, dim]` -> `[B, H / 2, W / 2, 2 * dim]`."""
        height, width = x.shape[1:3]
        if height % 2 or width % 2:
            x = F.pad(x, (0, 0, 0, width % 2, 0, height % 2))
        x = x.unflatten(2, (-1, 2)).unflatten(1, (-1, 2))  # [B, H / 2, 2, W / 2, 2, dim]
        x = x.permute(0, 1, 3, 4, 2, 5).flatten(3)  # Swin's order: down first, then right
        return self.reduction(self.norm(x))


class DiNAT_s(NAT):
    """DiNAT_s; arguments as for `NAT`."""

    stages_name = "layers"
    embed_layer = PatchEmbed
    downsample_layer = PatchMerging


def _create_dinat_s(variant: str, pretrained: bool = False, **kwargs: Any) -> nn.Module:
    feature_cfg = features_of_stages(kwargs)
    return build_model(DiNAT_s, variant, pretrained, feature_cfg=feature_cfg, **kwargs)


def _cfg(file: str, **kwargs: Any) -> dict[str, Any]:
    return dinat_cfg(file, first_conv="patch_embed.proj", **kwargs)


_384: dict[str, Any] = dict(input_size=(3, 384, 384), pool_size=(12, 12), crop_pct=1.0)

default_cfgs = generate_default_cfgs(
    {
        "dinat_s_tiny.in1k": _cfg("imagenet1k/dinat_s_tiny_in1k_224.pth"),
        "dinat_s_small.in1k": _cfg("imagenet1k/dinat_s_small_in1k_224.pth"),
        "dinat_s_base.in1k": _cfg("imagenet1k/dinat_s_base_in1k_224.pth"),
        "dinat_s_large.in22k_ft_in1k": _cfg("imagenet1k/dinat_s_large_in1k_224.pth"),
        "dinat_s_large_384.in22k_ft_in1k": _cfg("imagenet1k/dinat_s_large_in1k_384.pth", **_384),
        "dinat_s_large_21k.in22k": _cfg("imagenet22k/dinat_s_large_in22k_224.pth", num_classes=21841),
    }
)

_TINY: dict[str, Any] = dict(embed_dim=96, depths=(2, 2, 6, 2), num_heads=(3, 6, 12, 24), mlp_ratio=4)
_SMALL: dict[str, Any] = dict(embed_dim=96, depths=(2, 2, 18, 2), num_heads=(3, 6, 12, 24), mlp_ratio=4)
_BASE: dict[str, Any] = dict(embed_dim=128, depths=(2, 2, 18, 2), num_heads=(4, 8, 16, 32), mlp_ratio=4)
_LARGE: dict[str, Any] = dict(embed_dim=192, depths=(2, 2, 18, 2), num_heads=(6, 12, 24, 48), mlp_ratio=4)


@register_model
def dinat_s_tiny(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """DiNAT_s-Tiny: 28 M parameters."""
    args = dict(_TINY, dilations=DILATIONS_224, drop_path_rate=0.2)
    return _create_dinat_s("dinat_s_tiny", pretrained, **args | kwargs)


@register_model
def dinat_s_small(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """DiNAT_s-Small: 50 M parameters."""
    args = dict(_SMALL, dilations=DILATIONS_224, drop_path_rate=0.3)
    return _create_dinat_s("dinat_s_small", pretrained, **args | kwargs)


@register_model
def dinat_s_base(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """DiNAT_s-Base: 88 M parameters."""
    args = dict(_BASE, dilations=DILATIONS_224, drop_path_rate=0.5)
    return _create_dinat_s("dinat_s_base", pretrained, **args | kwargs)


@register_model
def dinat_s_large(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """DiNAT_s-Large: 197 M parameters, from ImageNet-22k to 1k at 224 x 224."""
    args = dict(_LARGE, dilations=DILATIONS_224, drop_path_rate=0.35)
    return _create_dinat_s("dinat_s_large", pretrained, **args | kwargs)


@register_model
def dinat_s_large_384(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """DiNAT_s-Large at 384 x 384, with larger dilations."""
    args = dict(_LARGE, dilations=DILATIONS_384, drop_path_rate=0.35)
    return _create_dinat_s("dinat_s_large_384", pretrained, **args | kwargs)


@register_model
def dinat_s_large_21k(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """DiNAT_s-Large on the 21,841 classes of ImageNet-22k."""
    args = dict(_LARGE, dilations=DILATIONS_224, drop_path_rate=0.2)
    return _create_dinat_s("dinat_s_large_21k", pretrained, **args | kwargs)
