"""Labelled videos as training clips and as the views of evaluation; one decode of a video serves all of them."""

import logging
from collections import defaultdict
from collections.abc import Sequence
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset

from nat_models.data.video.annotations import LabelledVideo
from nat_models.data.video.decoding import Video, VideoError, open_video
from nat_models.data.video.sampling import Sampling
from nat_models.data.video.transforms import Transform

log = logging.getLogger(__name__)


class DamagedDataError(VideoError):
    """More training videos than allowed cannot be read; the message names some and the list of all."""


class VideoOpener:
    """Opens labelled videos with one decoder.

    Args:
        decoder, frame_rate: see `open_video`.

    Raises:
        VideoError: on call, see `open_video`; also where a frame folder has fewer frames than its list says.
    """

    def __init__(self, decoder: str, frame_rate: float) -> None:
        self.decoder, self.frame_rate = decoder, frame_rate

    def __call__(self, video: LabelledVideo) -> Video:
        opened = open_video(video.path, self.decoder, self.frame_rate)
        if video.num_frames is not None and opened.num_frames < video.num_frames:
            raise VideoError(
                f"cannot decode {video.path}: only {opened.num_frames} of its {video.num_frames} frames are there"
            )
        return opened


class TrainingClips(Dataset):
    """One augmented clip of each video, `(clip [3, T, H, W] uint8, label)`; or several, see `repeats`.

    A video that cannot be read is replaced by a random one of its class. Its path is appended to `damaged_list`, which
    all worker processes share, and beyond the limit the run stops.

    Args:
        videos: what to read.
        opener: opens one.
        sampling: how clips are taken.
        transform: of a clip, see `training_transform`.
        repeats: clips of each video (repeated augmentation, Hoffer et al. 2020, arXiv:1901.09335), from one decode:
            items are then `(clips [repeats, 3, T, H, W], labels [repeats])`.
        damaged_list: file of the damaged videos' paths, one a line; a path may appear once for each process.
        damaged_limit: share of the videos that may be damaged.

    Raises:
        DamagedDataError: on access, too many videos are damaged, or all of a class.
    """

    def __init__(
        self,
        videos: Sequence[LabelledVideo],
        opener: VideoOpener,
        sampling: Sampling,
        transform: Transform,
        repeats: int = 1,
        damaged_list: Path | None = None,
        damaged_limit: float = 0.01,
    ) -> None:
        self.videos = videos
        self.opener = opener
        self.sampling = sampling
        self.transform = transform
        self.repeats = repeats
        self.damaged_list = damaged_list
        self.damaged_limit = damaged_limit
        self._damaged: set[int] = set()
        self._of_class: dict[int, list[int]] = defaultdict(list)
        for index, video in enumerate(videos):
            self._of_class[video.label].append(index)

    def __len__(self) -> int:
        return len(self.videos)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        label = self.videos[index].label
        tried: set[int] = set()
        while True:
            try:
                clips = self._clips(index)
                break
            except VideoError as error:
                self._report(index, error)
                tried.add(index)
                # What other samples found damaged must not count: it depends on which ones this process has read.
                candidates = [other for other in self._of_class[label] if other not in tried]
                if not candidates:
                    raise DamagedDataError(f"all videos of class {label} are damaged: {error}") from error
                index = candidates[int(torch.randint(len(candidates), ()))]
        if self.repeats == 1:
            return clips[0], torch.tensor(label)
        return torch.stack(clips), torch.full((self.repeats,), label)

    def _clips(self, index: int) -> list[Tensor]:
        video = self.opener(self.videos[index])
        times = [self.sampling.random_clip(video.duration, video.num_frames) for _ in range(self.repeats)]
        frames = video.frames_at(list(chain(*times)))
        return [self.transform(clip) for clip in frames.split(self.sampling.num_frames)]

    def _report(self, index: int, error: VideoError) -> None:
        if index in self._damaged:
            return
        self._damaged.add(index)
        log.warning("replaced by another video of its class: %s", error)
        count = len(self._damaged)
        if self.damaged_list is not None:
            with open(self.damaged_list, "a", encoding="utf-8") as file:
                file.write(f"{self.videos[index].path}\n")
            count = len(set(self.damaged_list.read_text(encoding="utf-8").splitlines()))
        if count > self.damaged_limit * len(self.videos):
            where = f", listed in {self.damaged_list}" if self.damaged_list else ""
            raise DamagedDataError(
                f"{count} of {len(self.videos)} training videos are damaged{where}, more than data.damaged_limit="
                f"{self.damaged_limit:g} of them; the last: {error}"
            ) from error


class EvaluationViews(Dataset):
    """All views of each video, `(views [clips * crops, 3, T, H, W] uint8, label, index)`. Nothing is ever replaced.

    Args:
        videos: what to read.
        opener: opens one.
        sampling: how clips are taken.
        transform: a clip's crops, see `evaluation_transform`.
        num_clips: clips of each video.

    Raises:
        VideoError: on access, the video cannot be read.
    """

    def __init__(
        self,
        videos: Sequence[LabelledVideo],
        opener: VideoOpener,
        sampling: Sampling,
        transform: Transform,
        num_clips: int,
    ) -> None:
        self.videos = videos
        self.opener = opener
        self.sampling = sampling
        self.transform = transform
        self.num_clips = num_clips

    def __len__(self) -> int:
        return len(self.videos)

    def __getitem__(self, index: int) -> tuple[Tensor, int, int]:
        video = self.opener(self.videos[index])
        times = self.sampling.clips(video.duration, video.num_frames, self.num_clips)
        frames = video.frames_at(list(chain(*times)))
        views = torch.cat([self.transform(clip) for clip in frames.split(self.sampling.num_frames)])
        return views, self.videos[index].label, index
