"""Isotropic models: one resolution throughout, with (dilated) neighborhood attention or full attention (ViT-RPB).

Dilated Neighborhood Attention Transformer, appendix, https://arxiv.org/abs/2209.15001
Original code and weights: https://github.com/SHI-Labs/Neighborhood-Attention-Transformer (MIT license)
"""

from collections.abc import Sequence
from typing import Any

from timm.layers import calculate_drop_path_rates, register_notrace_module, to_2tuple
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from nat_models._timm import update_model_input_size
from nat_models.backbone import Backbone
from nat_models.checkpoints import build_model, dinat_cfg, resize_rpb
from nat_models.layers import Block, NeighborhoodAttention2D, PatchEmbed
from nat_models.settings import check_number

__all__ = ["NATIsotropic"]  # register_model adds the entry points


@register_notrace_module
class MapAttention(NeighborhoodAttention2D):
    """Full attention with relative positional biases: the neighborhood is the whole map, `kernel_size` its size.

    A smaller map uses the biases of the positions that it has; on a larger one the neighborhood slides.
    """

    def neighborhood(self, spatial: Sequence[int]) -> tuple[tuple[int, ...], Tensor | None]:
        """Kernel size and biases, cropped to the map."""
        kernel_size = tuple(map(min, self.kernel_size, spatial))
        if kernel_size == self.kernel_size or self.rpb is None:
            return kernel_size, self.rpb
        kept = (slice(k - n, k + n - 1) for k, n in zip(self.kernel_size, kernel_size, strict=True))
        return kernel_size, self.rpb[(slice(None), *kept)]

    def set_kernel_size(self, kernel_size: tuple[int, ...]) -> None:
        """Attention over maps of another size; the biases are resized bicubically."""
        if kernel_size == self.kernel_size:
            return
        self.kernel_size = kernel_size
        if self.rpb is not None:
            resized = resize_rpb(self.rpb.detach(), (2 * k - 1 for k in kernel_size))
            self.rpb = nn.Parameter(resized, requires_grad=self.rpb.requires_grad)


class NATIsotropic(Backbone):
    """Isotropic NAT and DiNAT, and with `kernel_size=None` ViT-RPB.

    Args:
        img_size: image size, one or (height, width), whose map full attention covers; neighborhoods do not depend on
            it.
        patch_size: size of the square patches.
        embed_dim: channels of all blocks.
        depth: number of blocks.
        num_heads: attention heads.
        mlp_ratio: width of the MLPs' hidden layer over the channels.
        kernel_size: neighborhood of the attention; None means the whole map, full attention.
        dilation: dilation of every second block, starting with the second; the others have 1.
        num_classes: outputs of the classifier; 0 leaves it out.
        in_chans: channels of the images.
        global_pool: "avg", "max", "avgmax" or "" for none.
        qkv_bias: bias in the projections to query, key and value.
        drop_rate: dropout rate before the classifier.
        proj_drop_rate: dropout rate after attention and in the MLPs.
        drop_path_rate: rate of stochastic depth at the last block, growing linearly from 0 at the first.

    Raises:
        ValueError: a value out of its range.
    """

    stages_name = "layers"
    stage_pattern = [("", None)]

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        embed_dim: int = 384,
        depth: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        kernel_size: int | None = 7,
        dilation: int = 1,
        num_classes: int = 1000,
        in_chans: int = 3,
        global_pool: str = "avg",
        qkv_bias: bool = True,
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        check_number("depth", depth, 1, whole=True)
        check_number("patch_size", patch_size, 1, whole=True)
        check_number("drop_path_rate", drop_path_rate, 0, 1)
        self.in_chans = in_chans
        self.embed_dim = embed_dim
        self.patch_size = patch_size
        self.patch_embed = PatchEmbed(in_chans, embed_dim, (patch_size, patch_size))
        drop_path_rates: Any = calculate_drop_path_rates(drop_path_rate, depth)
        map_size = self._map_size(img_size)
        attention = NeighborhoodAttention2D if kernel_size is not None else MapAttention
        blocks = [
            Block(
                embed_dim,
                attention(
                    embed_dim,
                    num_heads,
                    kernel_size if kernel_size is not None else map_size,
                    dilation=dilation if i % 2 else 1,
                    qkv_bias=qkv_bias,
                    proj_drop=proj_drop_rate,
                ),
                mlp_ratio=mlp_ratio,
                proj_drop=proj_drop_rate,
                drop_path=drop_path_rates[i],
            )
            for i in range(depth)
        ]
        self.layers = nn.Sequential(*blocks)
        self.feature_info = [
            dict(num_chs=embed_dim, reduction=patch_size, module=f"{self.stages_name}.{i}") for i in range(depth)
        ]
        self.init_head(embed_dim, num_classes, global_pool, drop_rate)

    def _map_size(self, img_size: int | tuple[int, int]) -> tuple[int, ...]:
        sizes = to_2tuple(img_size)
        if len(sizes) != 2:
            raise ValueError(f"img_size must be one integer or (height, width), got {img_size!r}")
        for size in sizes:
            check_number("img_size", size, 1, whole=True)
        return tuple(-(-n // self.patch_size) for n in sizes)

    def set_input_size(self, img_size: int | tuple[int, int]) -> None:
        """Lets full attention cover the map of another image size; its biases are resized bicubically.

        Args:
            img_size: one size or (height, width).
        """
        map_size = self._map_size(img_size)
        for module in self.modules():
            if isinstance(module, MapAttention):
                module.set_kernel_size(map_size)
        update_model_input_size(self, img_size)


def _create_nat_isotropic(variant: str, pretrained: bool = False, **kwargs: Any) -> nn.Module:
    feature_cfg = dict(flatten_sequential=True, out_indices=kwargs.pop("out_indices", 3))
    return build_model(NATIsotropic, variant, pretrained, feature_cfg=feature_cfg, **kwargs)


def _cfg(file: str, **kwargs: Any) -> dict[str, Any]:
    args = dict(first_conv="patch_embed.proj", pool_size=(14, 14)) | kwargs
    return dinat_cfg(f"isotropic/{file}", **args)


default_cfgs = generate_default_cfgs(
    {
        "nat_isotropic_small.in1k": _cfg("nat_isotropic_small_in1k_224.pth"),
        "nat_isotropic_base.in1k": _cfg("nat_isotropic_base_in1k_224.pth"),
        "dinat_isotropic_small.in1k": _cfg("dinat_isotropic_small_in1k_224.pth"),
        "dinat_isotropic_base.in1k": _cfg("dinat_isotropic_base_in1k_224.pth"),
        "vitrpb_small.in1k": _cfg("vitrpb_small_in1k_224.pth", fixed_input_size=True),
        "vitrpb_base.in1k": _cfg("vitrpb_base_in1k_224.pth", fixed_input_size=True),
    }
)

_SMALL: dict[str, Any] = dict(embed_dim=384, num_heads=12, drop_path_rate=0.1)
_BASE: dict[str, Any] = dict(embed_dim=768, num_heads=24, drop_path_rate=0.4)


@register_model
def nat_isotropic_small(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Isotropic NAT-Small: 22 M parameters."""
    return _create_nat_isotropic("nat_isotropic_small", pretrained, **dict(_SMALL) | kwargs)


@register_model
def nat_isotropic_base(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Isotropic NAT-Base: 86 M parameters."""
    return _create_nat_isotropic("nat_isotropic_base", pretrained, **dict(_BASE) | kwargs)


@register_model
def dinat_isotropic_small(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Isotropic DiNAT-Small: 22 M parameters."""
    return _create_nat_isotropic("dinat_isotropic_small", pretrained, **dict(_SMALL, dilation=2) | kwargs)


@register_model
def dinat_isotropic_base(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Isotropic DiNAT-Base: 86 M parameters."""
    return _create_nat_isotropic("dinat_isotropic_base", pretrained, **dict(_BASE, dilation=2) | kwargs)


@register_model
def vitrpb_small(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ViT-Small with relative positional biases: 22 M parameters."""
    return _create_nat_isotropic("vitrpb_small", pretrained, **dict(_SMALL, kernel_size=None) | kwargs)


@register_model
def vitrpb_base(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ViT-Base with relative positional biases: 86 M parameters."""
    return _create_nat_isotropic("vitrpb_base", pretrained, **dict(_BASE, kernel_size=None) | kwargs)
