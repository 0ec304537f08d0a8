"""NAT and DiNAT for video: hierarchical transformers of joint neighborhood attention over time and space.

Each image model has a video model of its dimensions: neighborhoods of 7 x 7 tokens become 7 frames of 7 x 7, learned
biases cover distances in time as well, and the stem joins two frames. Image weights are inflated: on a clip that stands
still a model with them answers as the image model does.

Neighborhood Attention Transformer, https://arxiv.org/abs/2204.07143
Dilated Neighborhood Attention Transformer, https://arxiv.org/abs/2209.15001
Inflation: Quo Vadis, Action Recognition?, https://arxiv.org/abs/1705.07750
"""

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from timm.models import generate_default_cfgs, register_model
from torch import nn

from nat_models.checkpoints import build_clip_model, dinat_cfg, nat_cfg
from nat_models.clip_layers import ClipAttention, ClipTokenizer, DividedBlock, FrameDownsampler
from nat_models.layers import Block
from nat_models.nat import Hierarchical, features_of_stages
from nat_models.settings import check_number

__all__ = ["NAT3D", "NATDivided"]  # register_model adds the entry points

PerAxis = int | Sequence[int]
"""One number for time, height and width, or three."""


class NAT3D(Hierarchical):
    """Joint space-time NAT; with `dilations` DiNAT.

    Clips are `[B, in_chans, T, H, W]`, of any number of frames and any size from 32 x 32.

    Args:
        num_frames: frames of the clips that the model is meant for; kept as an attribute, others work as well.
        embed_dim: channels of the first stage; every following stage doubles them.
        depths: blocks per stage; at least one stage.
        num_heads: attention heads per stage.
        mlp_ratio: width of the MLPs' hidden layer over the channels.
        kernel_size: neighborhood of the attention in frames, rows and columns: one number, three for all stages, or
            one or three per stage. Three different numbers for three stages are an error: they might be either.
        stride: queries that share a neighborhood, likewise; more is faster, `kernel_size` is window attention.
        dilations: per stage, the dilations that its blocks take in turn, each one number or three; None means 1.
        position: "rpb" (learned biases, as in the image models) or "rope" (rotary embeddings).
        layer_scale: initial value of the layer scale; None leaves it out.
        num_classes: outputs of the classifier; 0 leaves it out.
        in_chans: channels of the clips.
        global_pool: "avg", "max", "avgmax" or "" for none.
        qkv_bias: bias in the projections to query, key and value.
        drop_rate: dropout rate before the classifier.
        proj_drop_rate: dropout rate after attention and in the MLPs.
        drop_path_rate: rate of stochastic depth at the last block, growing linearly from 0 at the first.

    Raises:
        ValueError: settings per stage that are not as many as the stages, or a value out of its range.
    """

    output_fmt = "NTHWC"
    embed_layer: ClassVar[Callable[..., nn.Module]] = ClipTokenizer
    downsample_layer: ClassVar[Callable[..., nn.Module]] = FrameDownsampler

    def __init__(
        self,
        num_frames: int = 32,
        embed_dim: int = 64,
        depths: Sequence[int] = (3, 4, 6, 5),
        num_heads: Sequence[int] = (2, 4, 8, 16),
        mlp_ratio: float = 3.0,
        kernel_size: PerAxis | Sequence[PerAxis] = 7,
        stride: PerAxis | Sequence[PerAxis] = 1,
        dilations: Sequence[int | Sequence[PerAxis]] | None = None,
        position: str = "rpb",
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
        check_number("num_frames", num_frames, 1, whole=True)
        self.num_frames = num_frames
        self.in_chans = in_chans
        self.patch_embed = self.embed_layer(in_chans, embed_dim)

        def make_block(dim: int, drop_path: float, **options: Any) -> nn.Module:
            options |= dict(position=position, qkv_bias=qkv_bias, proj_drop=proj_drop_rate)
            block = dict(mlp_ratio=mlp_ratio, layer_scale=layer_scale, proj_drop=proj_drop_rate, drop_path=drop_path)
            return self.make_block(dim, options, block)

        self.init_stages(
            embed_dim,
            depths,
            dilations,
            drop_path_rate,
            make_block,
            num_heads=num_heads,
            kernel_size=_same_for_stages("kernel_size", kernel_size, depths),
            stride=_same_for_stages("stride", stride, depths),
        )
        self.init_head(self.feature_info[-1]["num_chs"], num_classes, global_pool, drop_rate)

    def make_block(self, dim: int, attention: dict[str, Any], block: dict[str, Any]) -> nn.Module:
        """A block of `dim` channels, from the keywords of `ClipAttention` and of `Block`."""
        return Block(dim, ClipAttention(dim, **attention), **block)


class NATDivided(NAT3D):
    """NAT whose blocks attend in space, then in time; arguments as for `NAT3D`.

    With image weights it starts as the image model applied to each pair of frames: attention in time starts with an
    output of zero.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        for module in self.modules():
            if isinstance(module, DividedBlock):
                module.init_temporal_output()

    def make_block(self, dim: int, attention: dict[str, Any], block: dict[str, Any]) -> nn.Module:
        """A `DividedBlock`; the neighborhood is cut into its frames and its rows and columns."""
        with torch.device("meta"):  # so that errors name the arguments as they were given, not cut
            ClipAttention(dim, **attention)
        per_axis = ("kernel_size", "stride", "dilation")
        time, space = dict(attention), dict(attention)
        for name in per_axis:
            value = attention[name]
            frames, *rows_and_columns = value if isinstance(value, Sequence) else [value] * 3
            time[name], space[name] = (frames, 1, 1), (1, *rows_and_columns)
        return DividedBlock(dim, ClipAttention(dim, **space), ClipAttention(dim, **time), **block)


def _same_for_stages(name: str, value: Any, depths: Sequence[int]) -> Any:
    """Three numbers, of time, height and width, are meant for every stage."""
    if type(value) is int:
        return value
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise ValueError(f"{name} must be an integer, or three, or either for each stage, got {value!r}")
    if len(value) != 3 or not all(isinstance(n, int) for n in value):
        return value
    if len(depths) == 3 and len(set(value)) > 1:
        raise ValueError(
            f"{name}={value} may be of time, height and width or of the three stages; give three numbers for each "
            f"stage, such as {[list(value)] * 3} or {[[n] * 3 for n in value]}"
        )
    return [tuple(value)] * len(depths)


def create_nat3d(model_cls: type[NAT3D], variant: str, pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """A hierarchical video model of timm's registry."""
    feature_cfg = features_of_stages(kwargs)
    return build_clip_model(model_cls, variant, pretrained, feature_cfg=feature_cfg, **kwargs)


default_cfgs = generate_default_cfgs(
    {
        "nat3d_mini.in1k": nat_cfg("nat_mini.pth"),
        "nat3d_tiny.in1k": nat_cfg("nat_tiny.pth"),
        "nat3d_tiny_strided.in1k": nat_cfg("nat_tiny.pth"),
        "nat3d_small.in1k": nat_cfg("nat_small.pth"),
        "nat3d_base.in1k": nat_cfg("nat_base.pth"),
        "dinat3d_tiny.in1k": dinat_cfg("imagenet1k/dinat_tiny_in1k_224.pth"),
        "dinat3d_small.in1k": dinat_cfg("imagenet1k/dinat_small_in1k_224.pth"),
        "dinat3d_base.in1k": dinat_cfg("imagenet1k/dinat_base_in1k_224.pth"),
        "nat_divided_tiny.in1k": nat_cfg("nat_tiny.pth"),
    }
)

DILATIONS_3D = tuple(((2, 1, 1), (1, d, d)) for d in (8, 4, 2, 1))
"""In time, then in space, where the image model's blocks have dilations 1 and `d`; 16 frames hold 7 of every second."""

MINI: dict[str, Any] = dict(embed_dim=64, depths=(3, 4, 6, 5), num_heads=(2, 4, 8, 16), mlp_ratio=3)
TINY: dict[str, Any] = dict(embed_dim=64, depths=(3, 4, 18, 5), num_heads=(2, 4, 8, 16), mlp_ratio=3)
SMALL: dict[str, Any] = dict(embed_dim=96, depths=(3, 4, 18, 5), num_heads=(3, 6, 12, 24), mlp_ratio=2)
BASE: dict[str, Any] = dict(embed_dim=128, depths=(3, 4, 18, 5), num_heads=(4, 8, 16, 32), mlp_ratio=2)


@register_model
def nat3d_mini(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """NAT3D-Mini: 20 M parameters."""
    return create_nat3d(NAT3D, "nat3d_mini", pretrained, **dict(MINI, drop_path_rate=0.1) | kwargs)


@register_model
def nat3d_tiny(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """NAT3D-Tiny: 28 M parameters."""
    return create_nat3d(NAT3D, "nat3d_tiny", pretrained, **dict(TINY, drop_path_rate=0.1) | kwargs)


@register_model
def nat3d_tiny_strided(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """NAT3D-Tiny for speed: blocks of 2 frames of 4 x 4 queries share a neighborhood. Weights are those of NAT3D-Tiny.

    Queries are not in the middle of theirs, so with image weights it only starts close to the image model.
    """
    args = dict(TINY, stride=(2, 4, 4), drop_path_rate=0.1)
    return create_nat3d(NAT3D, "nat3d_tiny_strided", pretrained, **args | kwargs)


@register_model
def nat3d_small(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """NAT3D-Small: 51 M parameters, layer scale."""
    args = dict(SMALL, layer_scale=1e-5, drop_path_rate=0.2)
    return create_nat3d(NAT3D, "nat3d_small", pretrained, **args | kwargs)


@register_model
def nat3d_base(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """NAT3D-Base: 90 M parameters, layer scale."""
    args = dict(BASE, layer_scale=1e-5, drop_path_rate=0.3)
    return create_nat3d(NAT3D, "nat3d_base", pretrained, **args | kwargs)


@register_model
def dinat3d_tiny(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """DiNAT3D-Tiny: 28 M parameters."""
    args = dict(TINY, dilations=DILATIONS_3D, drop_path_rate=0.1)
    return create_nat3d(NAT3D, "dinat3d_tiny", pretrained, **args | kwargs)


@register_model
def dinat3d_small(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """DiNAT3D-Small: 51 M parameters, no layer scale (as DiNAT-Small)."""
    args = dict(SMALL, dilations=DILATIONS_3D, drop_path_rate=0.2)
    return create_nat3d(NAT3D, "dinat3d_small", pretrained, **args | kwargs)


@register_model
def dinat3d_base(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """DiNAT3D-Base: 90 M parameters, layer scale."""
    args = dict(BASE, dilations=DILATIONS_3D, layer_scale=1e-5, drop_path_rate=0.3)
    return create_nat3d(NAT3D, "dinat3d_base", pretrained, **args | kwargs)


@register_model
def nat_divided_tiny(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """NAT-Tiny with attention in time after that in space: 38 M parameters."""
    return create_nat3d(NATDivided, "nat_divided_tiny", pretrained, **dict(TINY, drop_path_rate=0.1) | kwargs)
