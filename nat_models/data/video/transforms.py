"""Transforms of clips: torchvision v2, whose random parameters are drawn once for all frames of a clip."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torchvision import tv_tensors  # type: ignore[import-untyped]
from torchvision.transforms import v2  # type: ignore[import-untyped]
from torchvision.transforms.v2 import functional as F  # type: ignore[import-untyped]

Transform = Callable[[Tensor], Tensor]
INTERPOLATIONS = ("nearest", "nearest-exact", "bilinear", "bicubic")  # what torchvision has for tensors


def training_transform(
    size: tuple[int, int],
    interpolation: str = "bilinear",
    scale: Sequence[float] = (0.08, 1.0),
    ratio: Sequence[float] = (3 / 4, 4 / 3),
    hflip: float = 0.5,
    color_jitter: float | None = None,
    rand_augment: dict[str, Any] | None = None,
    no_aug: bool = False,
) -> Transform:
    """Clip `[T, 3, H, W]` uint8 -> augmented `[3, T, height, width]` uint8.

    Args:
        size: height and width of the result.
        interpolation: of the resize.
        scale, ratio: area (as a share) and aspect ratio of the random crop, `torchvision`'s RandomResizedCrop.
        hflip: probability of a horizontal flip; 0 where classes tell left from right.
        color_jitter: strength of brightness, contrast and saturation changes; None for none.
        rand_augment: arguments of `v2.RandAugment` (`num_ops`, `magnitude`); None for none.
        no_aug: take the centre as evaluation does, and nothing else of the above.
    """
    if no_aug:
        center = evaluation_transform(size, interpolation)
        return lambda clip: center(clip)[0]
    steps: list[Any] = [v2.RandomResizedCrop(size, scale, ratio, v2.InterpolationMode(interpolation), antialias=True)]
    steps.append(v2.RandomHorizontalFlip(hflip))
    if rand_augment:
        steps.append(v2.RandAugment(**rand_augment))
    if color_jitter:
        steps.append(v2.ColorJitter(color_jitter, color_jitter, color_jitter))
    augment = v2.Compose(steps)

    def transform(clip: Tensor) -> Tensor:
        return augment(tv_tensors.Video(clip)).as_subclass(Tensor).transpose(0, 1).contiguous()

    return transform


def evaluation_transform(
    size: tuple[int, int],
    interpolation: str = "bilinear",
    crop_pct: float = 1.0,
    crops: int = 1,
) -> Transform:
    """Clip `[T, 3, H, W]` uint8 -> crops `[crops, 3, T, height, width]` uint8.

    Args:
        size: height and width of the crops.
        interpolation: as in training.
        crop_pct: the shorter side is resized to `1 / crop_pct` times what the crop needs.
        crops: 1 (the centre), or more at equal distances from one end of the longer side to the other.
    """
    height, width = size

    def transform(clip: Tensor) -> Tensor:
        factor = max(height / clip.shape[-2], width / clip.shape[-1]) / crop_pct
        resized = [max(round(side * factor), least) for side, least in zip(clip.shape[-2:], size, strict=True)]
        clip = F.resize(clip, resized, v2.InterpolationMode(interpolation), antialias=True).transpose(0, 1)
        spare_height, spare_width = resized[0] - height, resized[1] - width
        views = []
        for index in range(crops):
            position = index / (crops - 1) if crops > 1 else 0.5
            along_height = crops > 1 and spare_height > spare_width
            top = round((position if along_height else 0.5) * spare_height)
            left = round((0.5 if along_height else position) * spare_width)
            views.append(clip[..., top : top + height, left : left + width])
        return torch.stack(views)

    return transform
