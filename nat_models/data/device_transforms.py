"""What is done to whole batches on the device: normalisation, random erasing, mixup and CutMix.

Worker processes hand out uint8, a quarter of the bytes of float32. On NVIDIA GPUs the steps here are compiled. Their
random parameters come from `batch_generator`, not a global generator: a run that is resumed at a batch draws for it
what the uninterrupted run drew.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, wraps
from importlib.util import find_spec
from typing import Any, Literal

import lightning
import numpy as np
import torch
from torch import Tensor

from nat_models.data.seeding import run_seed

ERASED_AREA = (0.02, 1 / 3)  # of the image; these two are timm's and torchvision's defaults
ERASED_LOG_ASPECT = (math.log(0.3), -math.log(0.3))
ATTEMPTS = 10  # at a rectangle that fits


def batch_generator(trainer: lightning.Trainer, purpose: str) -> np.random.Generator:
    """Randomness for the batch that `trainer` is at: a function of seed, epoch, batch, rank and purpose alone."""
    batch = trainer.fit_loop.epoch_loop.batch_idx
    key = (run_seed(), trainer.current_epoch, batch + 1, trainer.global_rank, *purpose.encode())
    return np.random.default_rng(key)


def compiled_on_cuda(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, through `torch.compile` where its first tensor is on an NVIDIA GPU and Triton is installed."""

    @cache
    def compiled() -> Callable[..., Any]:
        return torch.compile(function) if find_spec("triton") else function

    @wraps(function)
    def call(first: Tensor, *others: Any) -> Any:
        return (compiled() if first.is_cuda else function)(first, *others)

    return call


@dataclass(frozen=True)
class RandomErasing:
    """Rectangles of noise or zeros in normalised images (Zhong et al. 2017, arXiv:1708.04896), drawn as timm does.

    Args:
        prob: share of the images that are erased.
        mode: `const` erases to 0, the mean; `rand` to one normal value a channel; `pixel` to one a pixel and channel.
        count: up to this many rectangles an image, which share the area.

    Raises:
        ValueError: `mode` is another one.
    """

    prob: float
    mode: Literal["const", "rand", "pixel"] = "const"
    count: int = 1

    def __post_init__(self) -> None:
        if self.mode not in ("const", "rand", "pixel"):
            raise ValueError(f"data.augmentation.re_mode must be const, rand or pixel, got {self.mode!r}")

    def boxes(self, batch_size: int, height: int, width: int, generator: np.random.Generator) -> Tensor:
        """Rectangles `[batch_size, count, 4]`: top, bottom (exclusive), left, right (exclusive); empty for none."""
        shape = (batch_size, self.count, ATTEMPTS)
        counts = generator.integers(1, self.count + 1, (batch_size, 1, 1))
        area = generator.uniform(*ERASED_AREA, shape) * height * width / counts
        aspect = np.exp(generator.uniform(*ERASED_LOG_ASPECT, shape))
        heights = np.rint(np.sqrt(area * aspect)).astype(np.int64)
        widths = np.rint(np.sqrt(area / aspect)).astype(np.int64)
        fits = (heights < height) & (widths < width)
        first = fits.argmax(axis=2)[..., None]
        heights, widths = (np.take_along_axis(sides, first, axis=2)[..., 0] for sides in (heights, widths))
        top = generator.integers(0, np.maximum(height - heights, 0) + 1)
        left = generator.integers(0, np.maximum(width - widths, 0) + 1)
        is_erased = fits.any(axis=2) & (np.arange(self.count) < counts[..., 0])
        is_erased &= generator.random((batch_size, 1)) < self.prob
        boxes = np.stack([top, top + heights, left, left + widths], axis=2)
        return torch.from_numpy(boxes * is_erased[..., None])

    def noise(self, images: Tensor, generator: np.random.Generator) -> Tensor:
        """What the rectangles of `images` `[B, C, *, H, W]` are filled with; of a clip, all frames with the same."""
        batch_size, channels, *frames, height, width = images.shape
        ones = [1] * len(frames)
        if self.mode == "const":
            return torch.zeros([], device=images.device)
        shape = [batch_size, channels, *ones, *((height, width) if self.mode == "pixel" else (1, 1))]
        on_device = torch.Generator(images.device).manual_seed(int(generator.integers(2**63)))
        return torch.randn(shape, generator=on_device, device=images.device)


class DeviceTransform:
    """Batches of uint8 images or clips -> normalised float32, with random erasing in training.

    Args:
        mean, std: per channel, for pixels in 0..1.
        spatial_axes: axes after the channels: 2 of images, 3 of clips.
        erasing: of training batches; None for none.
    """

    def __init__(
        self, mean: Sequence[float], std: Sequence[float], spatial_axes: int, erasing: RandomErasing | None = None
    ) -> None:
        self.mean, self.std = (_per_channel(values, spatial_axes) for values in (mean, std))
        self.erasing = erasing

    def __call__(self, batch: Sequence[Tensor], trainer: lightning.Trainer | None) -> tuple[Tensor, ...]:
        """`(images [B, *, C, *spatial] uint8, ...)` -> the same with float32, erased if `trainer` is training."""
        images, *others = batch
        assert images.dtype == torch.uint8
        self.mean, self.std = self.mean.to(images.device), self.std.to(images.device)
        if self.erasing is None or trainer is None or not trainer.training:
            return _normalize(images, self.mean, self.std), *others
        generator = batch_generator(trainer, "erasing")
        height, width = images.shape[-2:]
        boxes = self.erasing.boxes(len(images), height, width, generator).to(images.device, non_blocking=True)
        noise = self.erasing.noise(images, generator)
        return _normalize_and_erase(images, self.mean, self.std, boxes, noise), *others


class Mixup:
    """Mixes each image with that at its place in the reversed batch, as timm's `Mixup` does.

    Either all pixels (mixup, Zhang et al. 2017, arXiv:1710.09412) or those of a box (CutMix, Yun et al. 2019,
    arXiv:1905.04899).

    Args:
        num_classes: of the targets.
        mixup_alpha, cutmix_alpha: of the Beta distribution of the own image's share; 0 turns one of the two off.
        prob: of mixing at all.
        switch_prob: of CutMix where both are on.
        mode: whether a `batch` shares one draw, a `pair` of images does, or each image (`elem`) has its own.
        label_smoothing: weight of the uniform distribution in the targets.

    Raises:
        ValueError: `mode` is another one, or both alphas are 0.
    """

    def __init__(
        self,
        num_classes: int,
        mixup_alpha: float = 1.0,
        cutmix_alpha: float = 0.0,
        prob: float = 1.0,
        switch_prob: float = 0.5,
        mode: Literal["batch", "pair", "elem"] = "batch",
        label_smoothing: float = 0.0,
    ) -> None:
        if mode not in ("batch", "pair", "elem"):
            raise ValueError(f"model.mixup.mode must be batch, pair or elem, got {mode!r}")
        if not (mixup_alpha > 0 or cutmix_alpha > 0):
            raise ValueError("model.mixup needs mixup_alpha or cutmix_alpha above 0; null turns mixing off")
        self.num_classes = num_classes
        self.mixup_alpha, self.cutmix_alpha = mixup_alpha, cutmix_alpha
        self.prob = prob
        self.cutmix_prob = 0.0 if cutmix_alpha <= 0 else 1.0 if mixup_alpha <= 0 else switch_prob
        self.mode = mode
        self.label_smoothing = label_smoothing

    def __call__(self, images: Tensor, labels: Tensor, generator: np.random.Generator) -> tuple[Tensor, Tensor]:
        """Images `[B, C, *, H, W]`, labels `[B]` -> mixed images, targets `[B, num_classes]`; a clip's frames alike."""
        height, width = images.shape[-2:]
        shares, boxes = self.draw(len(images), height, width, generator)
        on_device = (tensor.to(images.device, non_blocking=True) for tensor in (shares, boxes))
        return _mix(images, labels, *on_device, self.num_classes, self.label_smoothing)

    def draw(self, batch_size: int, height: int, width: int, generator: np.random.Generator) -> tuple[Tensor, Tensor]:
        """Each image's own share `[batch_size]`, float32, and the box `[batch_size, 1, 4]` taken from the other.

        Boxes are empty where the whole image is mixed; elsewhere the share is that of the area outside the box.
        """
        draws = {"batch": 1, "pair": -(-batch_size // 2), "elem": batch_size}[self.mode]
        cuts = generator.random(draws) < self.cutmix_prob
        # An alpha of 0 is never used, but has to be drawn with.
        cutmix_alpha, mixup_alpha = (alpha or 1.0 for alpha in (self.cutmix_alpha, self.mixup_alpha))
        cut_shares = generator.beta(cutmix_alpha, cutmix_alpha, draws)
        shares = np.where(cuts, cut_shares, generator.beta(mixup_alpha, mixup_alpha, draws))
        shares[generator.random(draws) >= self.prob] = 1.0
        sides = np.sqrt(1 - shares) * cuts
        boxes = np.empty((draws, 2, 2), np.int64)
        for axis, length in enumerate((height, width)):
            side = (length * sides).astype(np.int64)
            centre = generator.integers(0, length, draws)
            boxes[:, axis, 0] = np.clip(centre - side // 2, 0, length)
            boxes[:, axis, 1] = np.clip(centre + (side + 1) // 2, 0, length)
        areas = (boxes[:, :, 1] - boxes[:, :, 0]).prod(axis=1)
        shares = np.where(cuts, 1 - areas / (height * width), shares)
        # The second image of a pair has the first one's draw.
        own = np.minimum(np.arange(batch_size), np.arange(batch_size)[::-1]) if self.mode == "pair" else slice(None)
        shares, boxes = (np.broadcast_to(x[own], (batch_size, *x.shape[1:])) for x in (shares, boxes.reshape(-1, 1, 4)))
        return torch.tensor(shares, dtype=torch.float32), torch.tensor(boxes)


def _per_channel(values: Sequence[float], spatial_axes: int) -> Tensor:
    return torch.tensor(values, dtype=torch.float32).view(-1, *[1] * spatial_axes)


def _inside(boxes: Tensor, images: Tensor) -> Tensor:
    """Whether pixels are in one of their image's boxes `[B, N, 4]`: `[B, 1, ..., H, W]` for `images`."""
    height, width = images.shape[-2:]
    rows, columns = (torch.arange(length, device=images.device) for length in (height, width))
    top, bottom, left, right = boxes[..., None].unbind(2)
    in_rows, in_columns = (rows >= top) & (rows < bottom), (columns >= left) & (columns < right)
    inside = (in_rows[:, :, :, None] & in_columns[:, :, None, :]).any(dim=1)
    return inside.view(len(images), *[1] * (images.ndim - 3), height, width)


@compiled_on_cuda
def _normalize(images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    return (images.float() / 255 - mean) / std


@compiled_on_cuda
def _normalize_and_erase(images: Tensor, mean: Tensor, std: Tensor, boxes: Tensor, noise: Tensor) -> Tensor:
    return torch.where(_inside(boxes, images), noise, (images.float() / 255 - mean) / std)


@compiled_on_cuda
def _mix(
    images: Tensor, labels: Tensor, shares: Tensor, boxes: Tensor, num_classes: int, smoothing: float
) -> tuple[Tensor, Tensor]:
    is_cut = (boxes[..., 1] > boxes[..., 0]) & (boxes[..., 3] > boxes[..., 2])
    own = torch.where(is_cut[:, 0], 1.0, shares).view(-1, *[1] * (images.ndim - 1))
    mixed = own * images + (1 - own) * images.flip(0)
    mixed = torch.where(_inside(boxes, images), images.flip(0), mixed)
    one_hot = torch.nn.functional.one_hot(labels, num_classes).float()
    targets = one_hot * (1 - smoothing) + smoothing / num_classes
    return mixed, shares[:, None] * targets + (1 - shares[:, None]) * targets.flip(0)
