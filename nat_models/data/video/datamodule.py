"""The video data module: one class for every list of videos, and for the generated moving digits."""

import os
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.overrides.distributed import UnrepeatedDistributedSampler
from torch import Tensor
from torch.utils.data import DataLoader, default_collate

from nat_models.data.datamodule import check_img_size, split_augmentation
from nat_models.data.datasets import read_undecodable
from nat_models.data.device_transforms import DeviceTransform
from nat_models.data.seeding import SeededSamples, TrainingSampler
from nat_models.data.video.annotations import Annotations, LabelledVideo, read_annotations
from nat_models.data.video.dataset import EvaluationViews, TrainingClips, VideoOpener
from nat_models.data.video.decoding import check_decoder, decoder_version
from nat_models.data.video.moving_digits import write_moving_digits
from nat_models.data.video.sampling import Sampling
from nat_models.data.video.transforms import INTERPOLATIONS, evaluation_transform, training_transform
from nat_models.data.workers import ignore_preemption
from nat_models.settings import check_choice, check_number, check_settings


class VideoDataModule(lightning.LightningDataModule):
    """Training batches `(clips [B, 3, T, H, W], labels [B])`, evaluation batches `(views, labels, indices)`.

    Views are `[B, clips * crops, 3, T, H, W]`; indices are those of the videos in the validation list. Clips leave the
    loaders as uint8 and become float32 on the device: see `on_after_batch_transfer`.

    Args:
        name: of the dataset; `moving_digits` is generated into `root`, others are read from the lists.
        root: folder that the lists and the paths in them start from.
        train_list, val_list: files, folders or patterns, see `nat_models.data.video.annotations`.
        list_form: form of both; None: detected.
        excluded_list: file of paths, one a line, that are left out of evaluation; their number stands beside the score.
        num_classes: None takes it from the lists.
        decoder: of video files: `pyav`, `torchcodec` or `torchcodec-cuda` (in the main process: `num_workers=0`).
        frame_rate: frames per second of frame folders and shards.
        sampling: arguments of `Sampling`.
        val_views: `{clips, crops}` of each video in validation while training.
        test_views: `{clips, crops}` in evaluation; the score is of the mean of their probabilities.
        img_size: side, or `(height, width)`, in pixels of the clips the model gets.
        mean, std: normalisation per channel, for pixels in 0..1.
        interpolation: of resizing.
        crop_pct: evaluation resizes the short side to `img_size / crop_pct`.
        batch_size: clips per device and step.
        eval_batch_size: videos per device in evaluation; None means `batch_size`.
        num_workers: worker processes per device; 0 loads in the main process.
        augmentation: arguments of `training_transform`; those that begin with `re_` are arguments of `RandomErasing`.
        repeats: clips of each video in a batch (repeated augmentation); divides `batch_size`.
        seed: of the order and the augmentation of the training videos.
        undecodable_list: file that collects the paths of damaged training videos.
        damaged_limit: share of the training videos that may be missing or damaged.
        static_baseline: also evaluate with each clip's middle frame repeated, which shows what motion tells.

    Raises:
        ValueError, FileNotFoundError: from the constructor and `setup`, for arguments and data that cannot work.
    """

    in_chans = 3

    def __init__(
        self,
        name: str,
        root: str | None = None,
        train_list: str = "train.csv",
        val_list: str = "validation.csv",
        list_form: str | None = None,
        excluded_list: str | None = None,
        num_classes: int | None = None,
        decoder: str = "pyav",
        frame_rate: float = 30.0,
        sampling: dict[str, Any] | None = None,
        val_views: dict[str, int] | None = None,
        test_views: dict[str, int] | None = None,
        img_size: int | list[int] = 224,
        mean: list[float] | None = None,
        std: list[float] | None = None,
        interpolation: str = "bilinear",
        crop_pct: float = 1.0,
        batch_size: int = 8,
        eval_batch_size: int | None = None,
        num_workers: int = 0,
        augmentation: dict[str, Any] | None = None,
        repeats: int = 1,
        seed: int = 0,
        undecodable_list: str | None = None,
        damaged_limit: float = 0.01,
        static_baseline: bool = False,
    ) -> None:
        super().__init__()
        check_number("data.batch_size", batch_size, 1, whole=True)
        check_number("data.eval_batch_size", batch_size if eval_batch_size is None else eval_batch_size, 1, whole=True)
        check_number("data.repeats", repeats, 1, whole=True)
        if batch_size % repeats:
            raise ValueError(f"data.repeats={repeats} must divide data.batch_size={batch_size}")
        check_number("data.num_workers", num_workers, 0, whole=True)
        check_choice("data.interpolation", interpolation, INTERPOLATIONS)
        check_settings("data.sampling", sampling or {}, Sampling)
        if decoder == "torchcodec-cuda" and num_workers:
            raise ValueError(f"data.decoder={decoder!r} works in the main process: data.num_workers must be 0")
        if root is None:
            raise ValueError("data.root must be set to the folder that holds the videos")
        check_decoder(decoder)
        self.dataset_name = name
        self.root = Path(root)
        self.train_list, self.val_list, self.list_form = train_list, val_list, list_form
        self.excluded_list = Path(excluded_list) if excluded_list else None
        self.num_classes = num_classes
        self.opener = VideoOpener(decoder, frame_rate)
        self.sampling = Sampling(**(sampling or {}))
        self.val_views = _check_views("data.val_views", val_views)
        self.test_views = _check_views("data.test_views", test_views)
        self.img_size = check_img_size(img_size)
        self.mean, self.std = tuple(mean or [0.5] * 3), tuple(std or [0.5] * 3)
        self.interpolation = interpolation
        self.crop_pct = crop_pct
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size or batch_size
        self.num_workers = num_workers
        self.augmentation, erasing = split_augmentation(augmentation)
        check_settings("data.augmentation", self.augmentation, training_transform, given=("size", "interpolation"))
        self.device_transform = DeviceTransform(self.mean, self.std, 3, erasing)
        self.repeats = repeats
        self.seed = seed
        self.undecodable_list = Path(undecodable_list) if undecodable_list else None
        self.damaged_limit = damaged_limit
        self.static_baseline = static_baseline
        self.start = (0, 0)  # epoch and batch that training starts with
        self.classes: list[str] = []
        self.excluded: list[str] = []
        self.train_dataset: Any = None
        self.val_dataset: Any = None

    def setup(self, stage: str) -> None:
        """Reads the validation list and, for `stage="fit"`, the training list, whose classes then hold for both.

        To evaluate without the training list, set `classes` to the class names in label order first.
        """
        if self.dataset_name == "moving_digits":
            write_moving_digits(self.root)
        if not self.root.is_dir():
            raise FileNotFoundError(f"data.root={str(self.root)!r} is not a folder")
        if stage == "fit" and self.train_dataset is None:
            train = self._read(self.train_list, training=True)
            self._set_classes(train.classes)
            if len(train.videos) * self.repeats < self.batch_size:
                raise ValueError(f"data.batch_size={self.batch_size} exceeds the {len(train.videos)} training videos")
            self._check_missing(train)
            self.train_dataset = TrainingClips(
                train.videos,
                self.opener,
                self.sampling,
                training_transform(self.img_size, self.interpolation, **self.augmentation),
                self.repeats,
                self.undecodable_list,
                self.damaged_limit,
            )
        if self.val_dataset is None:
            val = self._read(self.val_list, training=False)
            self._set_classes(self.classes or val.classes)
            self.val_dataset = self._evaluation(self._without_excluded(val), self.sampling, self.test_views)

    def train_dataloader(self) -> DataLoader:
        videos = self.batch_size // self.repeats
        return DataLoader(
            SeededSamples(self.train_dataset, self.seed),
            batch_size=videos,
            sampler=TrainingSampler(self.train_dataset, videos, self.seed, *self.start),
            drop_last=True,
            collate_fn=default_collate if self.repeats == 1 else _collate_repeats,
            **self._workers(),
        )

    def val_dataloader(self) -> DataLoader:
        """The views of `val_views` within `fit`, of `test_views` otherwise."""
        dataset = self.val_dataset
        if self.trainer is not None and self.trainer.state.fn == "fit":
            dataset = self._evaluation(list(dataset.videos), dataset.sampling, self.val_views)
        sampler = None
        if torch.distributed.is_initialized():
            # Lightning's default sampler repeats videos until the ranks have equally many, which changes the score.
            sampler = UnrepeatedDistributedSampler(dataset, shuffle=False)
        return DataLoader(dataset, batch_size=self.eval_batch_size, sampler=sampler, **self._workers())

    def test_dataloader(self) -> DataLoader:
        """The validation list: the datasets here have no other labelled one."""
        return self.val_dataloader()

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Normalises the clips, and in training erases rectangles of them, on the device."""
        return self.device_transform(batch, self.trainer)

    def without_motion(self) -> "VideoDataModule":
        """Makes the validation clips repeat their middle frame; returns itself."""
        self.val_dataset.sampling = self.sampling.without_motion()
        return self

    def undecodable_paths(self) -> list[str]:
        """Training videos that could not be decoded so far, on all ranks and workers."""
        return read_undecodable(self.undecodable_list)

    def training_samples(self, epoch: int, batch_idx: int) -> list[str]:
        """Paths of the videos of one batch of this process."""
        sampler = TrainingSampler(self.train_dataset, self.batch_size // self.repeats, self.seed)
        return [str(self.train_dataset.videos[index].path) for index in sampler.batch(epoch, batch_idx)]

    def describe(self) -> dict[str, str]:
        """Rows of the table that opens a run."""
        height, width = self.img_size
        sampling = self.sampling
        frames = f"{sampling.num_frames} frames"
        how = f"stride {sampling.stride}" if sampling.mode == "dense" else "one of each segment"
        views = f"{self.test_views[0]} x {self.test_views[1]} views (clips x crops) a video"
        counts = f"{len(self.train_dataset)} training, {len(self.val_dataset)} validation videos"
        return {
            "Data": f"{self.dataset_name}: {counts}, {self.num_classes} classes",
            "Clip": f"{frames}, {how}, {height} x {width}, {self.in_chans} channels",
            "Evaluation": views + (f"; {len(self.excluded)} videos excluded" if self.excluded else ""),
            "Decoder": decoder_version(self.opener.decoder),
        }

    def _read(self, source: str, training: bool) -> Annotations:
        return read_annotations(source, self.root, self.list_form, self.classes or None, training)

    def _set_classes(self, classes: list[str]) -> None:
        if self.num_classes not in (None, len(classes)):
            raise ValueError(f"data.num_classes={self.num_classes}, but the lists have {len(classes)} classes")
        self.classes, self.num_classes = classes, len(classes)

    def _check_missing(self, train: Annotations) -> None:
        total = len(train.videos) + len(train.missing)
        if len(train.missing) > self.damaged_limit * total:
            raise FileNotFoundError(
                f"{len(train.missing)} of {total} training videos are missing, more than data.damaged_limit="
                f"{self.damaged_limit:g} of them: {', '.join(train.missing[:3])}"
            )

    def _without_excluded(self, val: Annotations) -> list[LabelledVideo]:
        excluded: set[str] = set()
        if self.excluded_list is not None:
            excluded = set(self.excluded_list.read_text(encoding="utf-8").splitlines())
        excluded = {os.path.abspath(path) for path in excluded}
        missing = [path for path in val.missing if os.path.abspath(path) not in excluded]
        if missing:
            raise FileNotFoundError(
                f"{len(missing)} validation videos are missing, none of which may be left out unless "
                f"data.excluded_list names it: {', '.join(missing[:3])}"
            )
        known = {os.path.abspath(path) for path in [*val.missing, *(video.path for video in val.videos)]}
        self.excluded = sorted(excluded & known)
        return [video for video in val.videos if os.path.abspath(video.path) not in excluded]

    def _evaluation(self, videos: list[LabelledVideo], sampling: Sampling, views: tuple[int, int]) -> EvaluationViews:
        clips, crops = views
        transform = evaluation_transform(self.img_size, self.interpolation, self.crop_pct, crops)
        return EvaluationViews(videos, self.opener, sampling, transform, clips)

    def _workers(self) -> dict[str, Any]:
        return {
            "num_workers": self.num_workers,
            "worker_init_fn": ignore_preemption,
            "pin_memory": torch.cuda.is_available(),
            "persistent_workers": self.num_workers > 0,
        }


def _collate_repeats(items: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    clips, labels = default_collate(items)
    return clips.flatten(0, 1), labels.flatten()


def _check_views(name: str, views: dict[str, int] | None) -> tuple[int, int]:
    views = {"clips": 1, "crops": 1} | (views or {})
    if views.keys() != {"clips", "crops"}:
        raise ValueError(f"{name} must hold clips and crops, got {sorted(views)}")
    for key, value in views.items():
        check_number(f"{name}.{key}", value, 1, whole=True)
    return views["clips"], views["crops"]
