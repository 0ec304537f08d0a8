"""The image data module: one class for ImageNet folders, timm's datasets, the digits and random images."""

from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.overrides.distributed import UnrepeatedDistributedSampler
from torch.utils.data import DataLoader

from nat_models.data.datasets import DecodedImages, class_names, create_source, is_streamed, read_undecodable
from nat_models.data.device_transforms import DeviceTransform, RandomErasing
from nat_models.data.seeding import SeededSamples, SeededStream, StreamLoader, TrainingSampler
from nat_models.data.transforms import create_transform
from nat_models.data.workers import ignore_preemption
from nat_models.settings import check_choice, check_number, check_settings

INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "box", "hamming", "lanczos")
TRANSFORM_ARGUMENTS = ("input_size", "is_training", "mean", "std", "normalize")
"""Of timm's transform, that are no settings of `data.augmentation`."""


class ImageDataModule(lightning.LightningDataModule):
    """Training and validation batches `(images [B, in_chans, H, W], labels [B] int64)`.

    Images leave the loaders as uint8 and become float32 on the device: see `on_after_batch_transfer`.

    Args:
        name: dataset, see `nat_models.data.create_source`.
        root: folder of the dataset.
        train_split, val_split: names of the two splits; for `folder` the sub-folders of `root`.
        num_classes: None takes it from the dataset; needed where the dataset cannot tell.
        img_size: side, or `(height, width)`, in pixels of the images the model gets.
        in_chans: 3 decodes to RGB, 1 to grey.
        mean, std: normalisation per channel, for pixels in 0..1.
        interpolation: of the resize in evaluation, and in training unless `augmentation` names another.
        crop_pct: evaluation resizes the short side to `img_size / crop_pct` and takes the centre.
        batch_size: images per device and step.
        eval_batch_size: images per device in evaluation; None means `batch_size`.
        num_workers: worker processes per device; 0 loads in the main process.
        augmentation: arguments of `timm.data.create_transform` for training (`scale`, `hflip`, `auto_augment`, ...);
            those that begin with `re_` are arguments of `RandomErasing`.
        dataset_kwargs: further arguments of `timm.data.create_dataset` (`download`, `input_key`, `target_key`, ...).
        seed: of the order and the augmentation of the training images.
        undecodable_list: file that collects the paths of undecodable training images.

    Raises:
        ValueError, FileNotFoundError: from the constructor and `setup`, for arguments and data that cannot work.
    """

    def __init__(
        self,
        name: str,
        root: str | None = None,
        train_split: str = "train",
        val_split: str = "validation",
        num_classes: int | None = None,
        img_size: int | list[int] = 224,
        in_chans: int = 3,
        mean: list[float] | None = None,
        std: list[float] | None = None,
        interpolation: str = "bicubic",
        crop_pct: float = 0.875,
        batch_size: int = 128,
        eval_batch_size: int | None = None,
        num_workers: int = 0,
        augmentation: dict[str, Any] | None = None,
        dataset_kwargs: dict[str, Any] | None = None,
        seed: int = 0,
        undecodable_list: str | None = None,
    ) -> None:
        super().__init__()
        check_number("data.batch_size", batch_size, 1, whole=True)
        check_number("data.eval_batch_size", batch_size if eval_batch_size is None else eval_batch_size, 1, whole=True)
        check_number("data.num_workers", num_workers, 0, whole=True)
        check_choice("data.interpolation", interpolation, INTERPOLATIONS)
        if in_chans not in (1, 3):
            raise ValueError(f"data.in_chans must be 1 (grey) or 3 (RGB), got {in_chans!r}")
        self.dataset_name = name
        self.root = root
        self.train_split = train_split
        self.val_split = val_split
        self.num_classes = num_classes
        self.img_size = check_img_size(img_size)
        self.in_chans = in_chans
        self.mean = tuple(mean or [0.5] * in_chans)
        self.std = tuple(std or [0.5] * in_chans)
        if not len(self.mean) == len(self.std) == in_chans:
            raise ValueError(f"data.mean={self.mean} and data.std={self.std} need data.in_chans={in_chans} values")
        self.interpolation = interpolation
        self.crop_pct = crop_pct
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size or batch_size
        self.num_workers = num_workers
        self.augmentation, erasing = split_augmentation(augmentation)
        check_settings("data.augmentation", self.augmentation, create_transform, given=TRANSFORM_ARGUMENTS)
        if "interpolation" in self.augmentation:
            names = (*INTERPOLATIONS, "random")
            check_choice("data.augmentation.interpolation", self.augmentation["interpolation"], names)
        self.device_transform = DeviceTransform(self.mean, self.std, 2, erasing)
        self.dataset_kwargs = dataset_kwargs or {}
        self.seed = seed
        self.undecodable_list = Path(undecodable_list) if undecodable_list else None
        self.start = (0, 0)  # epoch and batch that training starts with
        self.classes: list[str] = []
        self.train_dataset: Any = None
        self.val_dataset: Any = None

    def setup(self, stage: str) -> None:
        """Opens the validation split and, for `stage="fit"`, the training split, whose classes then hold for both.

        To evaluate without the training split, set `classes` to the class names in label order first.
        """
        if stage == "fit" and self.train_dataset is None:
            train = self._source(self.train_split, is_training=True)
            self._set_classes(class_names(train))
            if len(train) < self.batch_size:
                raise ValueError(f"data.batch_size={self.batch_size} exceeds the {len(train)} training images")
            self.train_dataset = self._decoded(train, is_training=True)
        if self.val_dataset is None:
            val = self._source(self.val_split, is_training=False)
            self._set_classes(class_names(val) or self.classes or None)
            self.val_dataset = self._decoded(val, is_training=False)

    def train_dataloader(self) -> DataLoader:
        epoch, start = self.start
        if is_streamed(self.dataset_name):
            stream = SeededStream(self.train_dataset, self.seed, epoch, start)
            return StreamLoader(
                stream, drop_last=True, generator=stream.generator, **self._loader_settings(self.batch_size)
            )
        return DataLoader(
            SeededSamples(self.train_dataset, self.seed),
            sampler=TrainingSampler(self.train_dataset, self.batch_size, self.seed, epoch, start),
            drop_last=True,
            persistent_workers=self.num_workers > 0,
            **self._loader_settings(self.batch_size),
        )

    def val_dataloader(self) -> DataLoader:
        sampler = None
        if torch.distributed.is_initialized() and not is_streamed(self.dataset_name):
            # Lightning's default sampler repeats images until the ranks have equally many, which changes the score.
            sampler = UnrepeatedDistributedSampler(self.val_dataset, shuffle=False)
        return DataLoader(
            self.val_dataset,
            sampler=sampler,
            persistent_workers=self.num_workers > 0,
            **self._loader_settings(self.eval_batch_size),
        )

    def test_dataloader(self) -> DataLoader:
        """The validation split: the datasets here have no other labelled one."""
        return self.val_dataloader()

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Normalises the images, and in training erases rectangles of them, on the device."""
        return self.device_transform(batch, self.trainer)

    def undecodable_paths(self) -> list[str]:
        """Training images that could not be decoded so far, on all ranks and workers."""
        return read_undecodable(self.undecodable_list)

    def training_samples(self, epoch: int, batch_idx: int) -> list[str]:
        """Names of the images of one batch of this process; of a streamed dataset nothing is known."""
        if is_streamed(self.dataset_name):
            return []
        indices = TrainingSampler(self.train_dataset, self.batch_size, self.seed).batch(epoch, batch_idx)
        return [self.train_dataset.path(index) for index in indices]

    def describe(self) -> dict[str, str]:
        """Rows of the table that opens a run."""
        height, width = self.img_size
        counts = f"{len(self.train_dataset)} training, {len(self.val_dataset)} validation images"
        return {
            "Data": f"{self.dataset_name}: {counts}, {self.num_classes} classes",
            "Image": f"{height} x {width}, {self.in_chans} channels",
        }

    def _source(self, split: str, is_training: bool) -> Any:
        kwargs = dict(self.dataset_kwargs)
        if is_streamed(self.dataset_name):
            batch_size = self.batch_size if is_training else self.eval_batch_size
            kwargs |= {"is_training": is_training, "batch_size": batch_size}
            kwargs |= {"seed": self.seed, "input_img_mode": self._mode}
        return create_source(self.dataset_name, self.root, split, self.classes, self.num_classes, **kwargs)

    @property
    def _mode(self) -> str:
        return "L" if self.in_chans == 1 else "RGB"

    def _set_classes(self, classes: list[str] | None) -> None:
        if classes is None:
            if self.num_classes is None:
                raise ValueError(f"data.num_classes must be set: data.name={self.dataset_name!r} does not tell it")
            classes = [str(label) for label in range(self.num_classes)]
        if self.num_classes not in (None, len(classes)):
            raise ValueError(f"data.num_classes={self.num_classes}, but the dataset has {len(classes)} classes")
        self.classes, self.num_classes = classes, len(classes)

    def _decoded(self, source: Any, is_training: bool) -> Any:
        settings: dict[str, Any] = {"interpolation": self.interpolation}
        settings |= self.augmentation if is_training else {"crop_pct": self.crop_pct}
        transform = create_transform(
            self.img_size, is_training, mean=self.mean, std=self.std, normalize=False, **settings
        )
        if is_streamed(self.dataset_name):
            source.transform = transform
            source.set_loader_cfg(num_workers=self.num_workers)
            return source
        return DecodedImages(source, transform, self._mode, is_training, self.undecodable_list if is_training else None)

    def _loader_settings(self, batch_size: int) -> dict[str, Any]:
        return {
            "batch_size": batch_size,
            "num_workers": self.num_workers,
            "worker_init_fn": ignore_preemption,
            "pin_memory": torch.cuda.is_available(),
        }


def split_augmentation(augmentation: dict[str, Any] | None) -> tuple[dict[str, Any], RandomErasing | None]:
    """The augmentation of single images, done by the loaders, and the random erasing of batches, done on the device."""
    settings = augmentation or {}
    on_loader = {key: value for key, value in settings.items() if not key.startswith("re_")}
    erasing = {key.removeprefix("re_"): value for key, value in settings.items() if key.startswith("re_")}
    if settings.get("no_aug") or not erasing.get("prob"):
        return on_loader, None
    check_settings("data.augmentation.re_*", erasing, RandomErasing)
    return on_loader, RandomErasing(**erasing)


def check_img_size(img_size: Any) -> tuple[int, int]:
    """`(height, width)` of a side or a pair; ValueError if it is neither."""
    sides = [img_size, img_size] if isinstance(img_size, int) else img_size
    valid = isinstance(sides, (list, tuple)) and len(sides) == 2
    if not valid or not all(isinstance(side, int) and not isinstance(side, bool) and side > 0 for side in sides):
        raise ValueError(f"data.img_size must be a positive integer or [height, width], got {img_size!r}")
    height, width = sides
    return height, width
