"""NAT and DiNAT: hierarchical transformers of neighborhood attention with overlapping convolutions between the stages.

Neighborhood Attention Transformer, https://arxiv.org/abs/2204.07143
Dilated Neighborhood Attention Transformer, https://arxiv.org/abs/2209.15001
Original code and weights: https://github.com/SHI-Labs/Neighborhood-Attention-Transformer (MIT license)
"""

from collections.abc import Callable, Sequence
from itertools import cycle, islice
from typing import Any, ClassVar

from timm.layers import calculate_drop_path_rates
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from nat_models.backbone import Backbone
from nat_models.checkpoints import build_model, dinat_cfg, nat_cfg
from nat_models.layers import Block, ConvDownsampler, ConvTokenizer, NeighborhoodAttention2D
from nat_models.settings import check_number

__all__ = ["NAT"]  # register_model adds the entry points


class Level(nn.Module):
    """One stage: blocks at one resolution, then the reduction to the next stage's map.

    Args:
        blocks: modules on maps `[B, *spatial, C]`.
        downsample: reduction to the next stage; None in the last one.
    """

    def __init__(self, blocks: Sequence[nn.Module], downsample: nn.Module | None) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*blocks)
        self.downsample = downsample

    def forward(self, x: Tensor | tuple[Tensor, Tensor]) -> Tensor | tuple[Tensor, Tensor]:
        """Takes what the level before returned: `(its features, this level's map)`; the first level takes its map.

        Returns:
            `(features [B, *spatial, C], next level's map, of half the size and 2 * C channels)`; the last level its
            features alone.
        """
        features = self.blocks(x[1] if isinstance(x, tuple) else x)
        return features if self.downsample is None else (features, self.downsample(features))


def check_depths(depths: Any) -> None:
    """Raises ValueError where `depths` are not blocks per stage."""
    is_sequence = isinstance(depths, Sequence) and len(depths) > 0
    if not is_sequence or not all(isinstance(depth, int) and depth > 0 for depth in depths):
        raise ValueError(f"depths must hold at least one stage with at least one block each, in integers, got {depths}")


def features_of_stages(kwargs: dict[str, Any]) -> dict[str, Any]:
    """timm's settings for features of a hierarchical model, of all stages unless `out_indices` is one of its keywords.

    Raises:
        ValueError: as `check_depths`.
    """
    check_depths(kwargs["depths"])
    all_stages = tuple(range(len(kwargs["depths"])))
    return dict(flatten_sequential=True, out_indices=kwargs.pop("out_indices", all_stages))


def per_stage(name: str, value: Any, depths: Sequence[int]) -> list[Any]:
    """One entry for each stage of `depths`, from such a sequence or from one value for all; `name` is for the error."""
    values = list(value) if isinstance(value, Sequence) else [value] * len(depths)
    if len(values) != len(depths):
        raise ValueError(f"{name} must hold one entry for each of the {len(depths)} stages of depths, got {value}")
    return values


class Hierarchical(Backbone):
    """Backbones of stages that halve the map and double the channels, from one stage to the next."""

    stages_name = "levels"
    stage_pattern = [(r"\.blocks\.(\d+)", None), (r"\.downsample", (99999,))]
    embed_layer: ClassVar[Callable[..., nn.Module]]
    downsample_layer: ClassVar[Callable[..., nn.Module]]

    def init_stages(
        self,
        embed_dim: int,
        depths: Sequence[int],
        dilations: Any,
        drop_path_rate: float,
        make_block: Callable[..., nn.Module],
        **options: Any,
    ) -> None:
        """Adds the stages and describes them in `feature_info`.

        Args:
            embed_dim: channels of the first stage.
            depths: blocks per stage.
            dilations: per stage, one or those that its blocks take in turn; None means 1 everywhere.
            drop_path_rate: rate of stochastic depth at the last block, growing linearly from 0 at the first.
            make_block: a block from the keywords `dim`, `drop_path`, `dilation` and those of `options`.
            options: what is the same for the blocks of a stage: one for all stages, or one per stage.

        Raises:
            ValueError: no stages or blocks, or settings that are not as many as the stages.
        """
        check_depths(depths)
        check_number("drop_path_rate", drop_path_rate, 0, 1)
        self.embed_dim = embed_dim
        dilations = per_stage("dilations", 1 if dilations is None else dilations, depths)
        options = {name: per_stage(name, values, depths) for name, values in options.items()}
        drop_path_rates: Any = calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True)
        levels, self.feature_info = [], []
        for i, depth in enumerate(depths):
            dim = embed_dim * 2**i
            turns = dilations[i] if isinstance(dilations[i], Sequence) else [dilations[i]]
            if not turns:
                raise ValueError(f"dilations must hold at least one dilation per stage, got {dilations}")
            same = {name: values[i] for name, values in options.items()}
            blocks = [
                make_block(dim=dim, drop_path=rate, dilation=turn, **same)
                for turn, rate in zip(islice(cycle(turns), depth), drop_path_rates[i], strict=True)
            ]
            levels.append(Level(blocks, self.downsample_layer(dim) if i < len(depths) - 1 else None))
            self.feature_info.append(dict(num_chs=dim, reduction=4 * 2**i, module=f"{self.stages_name}.{i}"))
        self.add_module(self.stages_name, nn.Sequential(*levels))


class NAT(Hierarchical):
    """NAT, and with `dilations` DiNAT.

    Args:
        embed_dim: channels of the first stage; every following stage doubles them.
        depths: blocks per stage; at least one stage.
        num_heads: attention heads per stage.
        mlp_ratio: width of the MLPs' hidden layer over the channels.
        kernel_size: neighborhood of the attention, one for all stages or one per stage.
        dilations: per stage, the dilations that its blocks take in turn; `[1, 8]` over 3 blocks means 1, 8, 1. None
            means 1 everywhere.
        layer_scale: initial value of the layer scale; None leaves it out.
        num_classes: outputs of the classifier; 0 leaves it out.
        in_chans: channels of the images.
        global_pool: "avg", "max", "avgmax" or "" for none.
        qkv_bias: bias in the projections to query, key and value.
        drop_rate: dropout rate before the classifier.
        proj_drop_rate: dropout rate after attention and in the MLPs.
        drop_path_rate: rate of stochastic depth at the last block, growing linearly from 0 at the first.

    Raises:
        ValueError: settings per stage that are not as many as the stages, or a value out of its range.
    """

    embed_layer: ClassVar[Callable[..., nn.Module]] = ConvTokenizer
    downsample_layer: ClassVar[Callable[..., nn.Module]] = ConvDownsampler

    def __init__(
        self,
        embed_dim: int = 64,
        depths: Sequence[int] = (3, 4, 6, 5),
        num_heads: Sequence[int] = (2, 4, 8, 16),
        mlp_ratio: float = 3.0,
        kernel_size: int | Sequence[int] = 7,
        dilations: Sequence[int | Sequence[int]] | None = None,
        layer_scale: float | None = None,
        num_classes: int = 1000,
        in_chans: int = 3,
        global_pool: str = "avg",
        qkv_bias: bool = True,
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        self.in_chans = in_chans
        self.patch_embed = self.embed_layer(in_chans, embed_dim)

        def make_block(dim: int, drop_path: float, **options: Any) -> nn.Module:
            attn = NeighborhoodAttention2D(dim, qkv_bias=qkv_bias, proj_drop=proj_drop_rate, **options)
            return Block(dim, attn, mlp_ratio, layer_scale, proj_drop_rate, drop_path)

        self.init_stages(
            embed_dim,
            depths,
            dilations,
            drop_path_rate,
            make_block,
            num_heads=num_heads,
            kernel_size=kernel_size,
        )
        self.init_head(self.feature_info[-1]["num_chs"], num_classes, global_pool, drop_rate)


def _create_nat(variant: str, pretrained: bool = False, **kwargs: Any) -> nn.Module:
    feature_cfg = features_of_stages(kwargs)
    return build_model(NAT, variant, pretrained, feature_cfg=feature_cfg, **kwargs)


_384: dict[str, Any] = dict(input_size=(3, 384, 384), pool_size=(12, 12), crop_pct=1.0)

default_cfgs = generate_default_cfgs(
    {
        "nat_mini.in1k": nat_cfg("nat_mini.pth"),
        "nat_tiny.in1k": nat_cfg("nat_tiny.pth"),
        "nat_small.in1k": nat_cfg("nat_small.pth"),
        "nat_base.in1k": nat_cfg("nat_base.pth"),
        "dinat_mini.in1k": dinat_cfg("imagenet1k/dinat_mini_in1k_224.pth"),
        "dinat_tiny.in1k": dinat_cfg("imagenet1k/dinat_tiny_in1k_224.pth"),
        "dinat_small.in1k": dinat_cfg("imagenet1k/dinat_small_in1k_224.pth"),
        "dinat_base.in1k": dinat_cfg("imagenet1k/dinat_base_in1k_224.pth"),
        "dinat_large.in22k_ft_in1k": dinat_cfg("imagenet1k/dinat_large_in22k_in1k_224.pth"),
        "dinat_large_384.in22k_ft_in1k": dinat_cfg("imagenet1k/dinat_large_in22k_in1k_384.pth", **_384),
        "dinat_large_384_11x11.in22k_ft_in1k": dinat_cfg("imagenet1k/dinat_large_in22k_in1k_384_11x11.pth", **_384),
        "dinat_large_21k.in22k": dinat_cfg("imagenet22k/dinat_large_in22k_224.pth", num_classes=21841),
        "dinat_large_21k_11x11.in22k": dinat_cfg(
            "imagenet22k/dinat_large_in22k_224_11x11interp.pth", num_classes=21841
        ),
    }
)

DILATIONS_224 = ((1, 8), (1, 4), (1, 2), (1, 1))
DILATIONS_384 = ((1, 13), (1, 6), (1, 3), (1, 1))
_MINI: dict[str, Any] = dict(embed_dim=64, depths=(3, 4, 6, 5), num_heads=(2, 4, 8, 16), mlp_ratio=3)
_TINY: dict[str, Any] = dict(embed_dim=64, depths=(3, 4, 18, 5), num_heads=(2, 4, 8, 16), mlp_ratio=3)
_SMALL: dict[str, Any] = dict(embed_dim=96, depths=(3, 4, 18, 5), num_heads=(3, 6, 12, 24), mlp_ratio=2)
_BASE: dict[str, Any] = dict(embed_dim=128, depths=(3, 4, 18, 5), num_heads=(4, 8, 16, 32), mlp_ratio=2)
_LARGE: dict[str, Any] = dict(embed_dim=192, depths=(3, 4, 18, 5), num_heads=(6, 12, 24, 48), mlp_ratio=2)


@register_model
def nat_mini(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """NAT-Mini: 20 M parameters."""
    return _create_nat("nat_mini", pretrained, **dict(_MINI, drop_path_rate=0.2) | kwargs)


@register_model
def nat_tiny(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """NAT-Tiny: 28 M parameters."""
    return _create_nat("nat_tiny", pretrained, **dict(_TINY, drop_path_rate=0.2) | kwargs)


@register_model
def nat_small(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """NAT-Small: 51 M parameters, layer scale."""
    return _create_nat("nat_small", pretrained, **dict(_SMALL, layer_scale=1e-5, drop_path_rate=0.3) | kwargs)


@register_model
def nat_base(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """NAT-Base: 90 M parameters, layer scale."""
    return _create_nat("nat_base", pretrained, **dict(_BASE, layer_scale=1e-5, drop_path_rate=0.5) | kwargs)


@register_model
def dinat_mini(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """DiNAT-Mini: 20 M parameters."""
    args = dict(_MINI, dilations=DILATIONS_224, drop_path_rate=0.2)
    return _create_nat("dinat_mini", pretrained, **args | kwargs)


@register_model
def dinat_tiny(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """DiNAT-Tiny: 28 M parameters."""
    args = dict(_TINY, dilations=DILATIONS_224, drop_path_rate=0.2)
    return _create_nat("dinat_tiny", pretrained, **args | kwargs)


@register_model
def dinat_small(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """DiNAT-Small: 51 M parameters, no layer scale (unlike NAT-Small)."""
    args = dict(_SMALL, dilations=DILATIONS_224, drop_path_rate=0.3)
    return _create_nat("dinat_small", pretrained, **args | kwargs)


@register_model
def dinat_base(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """DiNAT-Base: 90 M parameters, layer scale."""
    args = dict(_BASE, dilations=DILATIONS_224, layer_scale=1e-5, drop_path_rate=0.5)
    return _create_nat("dinat_base", pretrained, **args | kwargs)


@register_model
def dinat_large(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """DiNAT-Large: 200 M parameters, from ImageNet-22k to 1k at 224 x 224."""
    args = dict(_LARGE, dilations=DILATIONS_224, drop_path_rate=0.35)
    return _create_nat("dinat_large", pretrained, **args | kwargs)


@register_model
def dinat_large_384(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """DiNAT-Large at 384 x 384, with larger dilations."""
    args = dict(_LARGE, dilations=DILATIONS_384, drop_path_rate=0.35)
    return _create_nat("dinat_large_384", pretrained, **args | kwargs)


@register_model
def dinat_large_384_11x11(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """DiNAT-Large at 384 x 384, with 11 x 11 neighborhoods."""
    args = dict(_LARGE, kernel_size=11, dilations=DILATIONS_224, drop_path_rate=0.35)
    return _create_nat("dinat_large_384_11x11", pretrained, **args | kwargs)


@register_model
def dinat_large_21k(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """DiNAT-Large on the 21,841 classes of ImageNet-22k."""
    args = dict(_LARGE, dilations=DILATIONS_224, drop_path_rate=0.2)
    return _create_nat("dinat_large_21k", pretrained, **args | kwargs)


@register_model
def dinat_large_21k_11x11(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """`dinat_large_21k` with its biases resized to 11 x 11 neighborhoods: where fine-tuning at 384 started."""
    args = dict(_LARGE, kernel_size=11, dilations=DILATIONS_224, drop_path_rate=0.2)
    return _create_nat("dinat_large_21k_11x11", pretrained, **args | kwargs)
