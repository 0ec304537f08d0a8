"""Which moments of a video make a clip: dense (length x stride), uniform segments (TSN), and the views of evaluation.

All functions return times in seconds from the first frame; `Video.frames_at` tells the frames shown then.
"""

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Generator

from nat_models.settings import check_number


@dataclass(frozen=True)
class Sampling:
    """How clips are taken.

    Args:
        num_frames: frames of a clip.
        mode: `dense` takes frames `stride` apart from a start that is random in training; `uniform` divides the video
            into `num_frames` equal segments and takes one moment of each, random in training (TSN, Wang et al. 2016,
            arXiv:1608.00859).
        stride: frames from one to the next of a dense clip, at `frame_rate`.
        frame_rate: frames per second that `stride` counts; None: the video's own mean rate.
        repeat_frame: the clip's middle frame takes the place of all others, which removes all motion.

    A dense clip that is longer than the video ends with repetitions of the last frame.

    Raises:
        ValueError: names the argument.
    """

    num_frames: int = 16
    mode: Literal["dense", "uniform"] = "dense"
    stride: int = 2
    frame_rate: float | None = None
    repeat_frame: bool = False

    def __post_init__(self) -> None:
        for name in ("num_frames", "stride"):
            check_number(f"data.sampling.{name}", getattr(self, name), 1, whole=True)
        if self.mode not in ("dense", "uniform"):
            raise ValueError(f"data.sampling.mode must be dense or uniform, got {self.mode!r}")
        if self.frame_rate is not None and not self.frame_rate > 0:
            raise ValueError(f"data.sampling.frame_rate must be positive or null, got {self.frame_rate!r}")

    def random_clip(self, duration: float, num_frames: int, generator: Generator | None = None) -> list[float]:
        """Times of a training clip of a video of `num_frames` frames in `duration` seconds."""
        if self.mode == "dense":
            position = torch.rand((), dtype=torch.float64, generator=generator).item()
            return self._repeated(self._dense(duration, num_frames, position))
        offsets = torch.rand(self.num_frames, dtype=torch.float64, generator=generator).tolist()
        return self._repeated(self._uniform(duration, num_frames, offsets))

    def clips(self, duration: float, num_frames: int, num_clips: int) -> list[list[float]]:
        """Times of the `num_clips` clips of evaluation, which do not depend on chance.

        Dense clips start at equal distances from the first possible start to the last, a single one in the middle;
        uniform ones take moments at equal distances within each segment.
        """
        if self.mode == "dense":
            positions = [index / (num_clips - 1) for index in range(num_clips)] if num_clips > 1 else [0.5]
            clips = [self._dense(duration, num_frames, position) for position in positions]
        else:
            offsets = [(index + 0.5) / num_clips for index in range(num_clips)]
            clips = [self._uniform(duration, num_frames, [offset] * self.num_frames) for offset in offsets]
        return [self._repeated(clip) for clip in clips]

    def interval(self, rate: float) -> float:
        """Seconds from one frame of a dense clip to the next, in a video of `rate` frames per second."""
        return self.stride / (self.frame_rate or rate)

    def without_motion(self) -> "Sampling":
        """The same, with the middle frame in the place of all others."""
        return replace(self, repeat_frame=True)

    def _dense(self, duration: float, num_frames: int, position: float) -> list[float]:
        """A clip that starts at `position` (0..1) of the possible starts."""
        rate = self.frame_rate or num_frames / duration
        span = (self.num_frames - 1) * self.stride + 1
        starts = max(round(duration * rate) - span, 0) + 1
        start = min(int(position * starts), starts - 1)
        return [_middle(start + index * self.stride, rate) for index in range(self.num_frames)]

    def _uniform(self, duration: float, num_frames: int, offsets: list[float]) -> list[float]:
        """A clip with one moment of each segment, at `offsets` (0..1) of its length."""
        segment = num_frames / self.num_frames
        rate = num_frames / duration
        return [_middle(int((index + offset) * segment + 1e-6), rate) for index, offset in enumerate(offsets)]

    def _repeated(self, clip: list[float]) -> list[float]:
        return [clip[len(clip) // 2]] * len(clip) if self.repeat_frame else clip


def _middle(interval: int, rate: float) -> float:
    """The middle of a frame's interval: containers round timestamps, so a time at an interval's edge would not do."""
    return (interval + 0.5) / rate
