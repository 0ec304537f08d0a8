"""Frames of a video one after the other, and a copy of it with a prediction drawn into each."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from math import ceil
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from matplotlib import get_data_path
from PIL import Image, ImageDraw, ImageFont

from nat_models.data.video.annotations import VIDEO_EXTENSIONS
from nat_models.data.video.decoding import VideoError, check_decoder, frames_told, is_unordered, missing_seconds

FONT = f"{get_data_path()}/fonts/ttf/DejaVuSans.ttf"  # with more letters than Pillow's own
READABLE = 180  # pixels a side: a twentieth of it still makes a letter

Prediction = Sequence[tuple[str, float]]
"""Classes with their probabilities, most likely first."""


@dataclass
class Frame:
    """A decoded frame.

    Attributes:
        decoded: PyAV's frame.
        time: in seconds from the first frame.
        time_base: unit of the video's timestamps, in seconds.
        rate: frames per second of the video, by and large.
    """

    decoded: Any
    time: Fraction
    time_base: Fraction
    rate: Fraction

    @cached_property
    def image(self) -> Image.Image:
        """The picture in RGB, upright as the file asks for."""
        image = self.decoded.to_image()
        return image.rotate(self.decoded.rotation, expand=True) if self.decoded.rotation else image


def read_frames(source: str) -> Iterator[Frame]:
    """Decodes all frames of a video: whatever FFmpeg opens.

    A file must be whole. Of other sources, live ones, parts may be lost on the way.

    Raises:
        ValueError: PyAV is missing.
        VideoError: the video cannot be opened or decoded, is cut off, or holds no frames; the message says after how
            many.
    """
    check_decoder("pyav")
    import av

    is_file = Path(source).is_file()
    begin, number, packets = None, 0, 0
    end = Fraction(0)

    def failure(reason: object) -> VideoError:
        return VideoError(f"cannot decode {source}{f' after {number} frames' if number else ''}: {reason}")

    try:
        # Of a relative path FFmpeg would take what is before a colon for a protocol.
        with av.open(str(Path(source).absolute()) if is_file else source) as container:
            stream: Any = container.streams.best("video")
            if stream is None:
                raise failure("it holds no video")
            rate = Fraction(stream.average_rate or stream.guessed_rate or 30)
            unordered = is_unordered(container, stream)
            for packet in container.demux(stream):
                packets += packet.size > 0
                if is_file and packet.is_corrupt:
                    raise failure("it is cut off or damaged")
                decoded: Any
                for decoded in packet.decode():
                    if is_file and decoded.is_corrupt:
                        raise failure("the next one is damaged")
                    if decoded.pts is None or unordered:  # raw streams have no timestamps
                        time = number / rate
                    else:
                        time = decoded.pts * stream.time_base
                    end = time + 1 / rate
                    begin = time if begin is None else begin
                    number += 1
                    yield Frame(decoded, time - begin, stream.time_base, rate)
            if is_file and packets < (told := frames_told(container, stream)):
                raise failure(f"only {packets} of its {told} frames are there")
            missing = missing_seconds(stream, float(end)) if is_file else 0.0
            if missing:
                raise failure(f"its last {missing:.1f} seconds are missing")
    except (av.error.FFmpegError, EOFError) as error:
        raise failure(error) from error
    if begin is None:
        raise failure("it holds no frames")


def copy_paths(target: str | Path, sources: Sequence[str | Path]) -> list[Path]:
    """Where each video's copy goes: `target` itself if it ends in `.mp4`, else `target/NAME_annotated.mp4`.

    Raises:
        ValueError: two videos would share a copy, a copy would overwrite a video, or `target` is another file.
    """
    target = Path(target)
    if target.suffix != ".mp4" and (target.suffix.lower() in VIDEO_EXTENSIONS or target.is_file()):
        raise ValueError(f"--annotate must be a folder or a file ending in .mp4, got {str(target)!r}")
    paths = [target if target.suffix == ".mp4" else target / f"{Path(s).stem}_annotated.mp4" for s in sources]
    shared = next((path for path in paths if paths.count(path) > 1), None)
    if shared is not None:
        raise ValueError(f"--annotate={str(target)!r}: more than one video would be copied to {str(shared)!r}")
    originals = {Path(source).resolve() for source in sources}
    overwritten = next((path for path in paths if path.resolve() in originals), None)
    if overwritten is not None:
        raise ValueError(f"--annotate={str(target)!r}: the copy would overwrite {str(overwritten)!r}")
    return paths


class AnnotatedCopy:
    """An H.264 file, without sound, of the frames that are written to it, each at its own time.

    Sides are those of the upright frames, small ones enlarged; an odd one gains a row or column, which repeats the
    last, since H.264 in the common pixel format (4:2:0) has even sides. Use it as a context: an error removes the
    unfinished file. What is there already stays until the first frame is written.

    Args:
        path: file to write, which ends in `.mp4`; its folder is created if missing.
    """

    def __init__(self, path: Path) -> None:
        import av

        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self._container = av.open(str(path.absolute()), "w")
        self._stream: Any = None
        self._last = -1

    def write(self, frame: Frame, prediction: Prediction) -> None:
        """Adds a frame with a prediction."""
        import av

        image = np.asarray(draw_prediction(frame.image, prediction))
        if self._stream is None:
            self._open_stream(image, frame)
        height, width = self._stream.height, self._stream.width
        image = image[:height, :width]  # should the size change within the video
        image = np.pad(image, ((0, height - image.shape[0]), (0, width - image.shape[1]), (0, 0)), "edge")
        encoded = av.VideoFrame.from_ndarray(image, format="rgb24")
        # Timestamps of a damaged file may stand still, which no encoder takes.
        self._last = max(round(frame.time / frame.time_base), self._last + 1)
        encoded.pts, encoded.time_base = self._last, frame.time_base
        self._container.mux(self._stream.encode(encoded))

    def _open_stream(self, image: np.ndarray, frame: Frame) -> None:
        import av

        height, width, _ = image.shape
        # Frames have times of their own; only the last one's duration follows from the rate.
        stream: Any = self._container.add_stream("libx264", rate=frame.rate, options={"crf": "18"})
        stream.height, stream.width = height + height % 2, width + width % 2
        stream.pix_fmt = "yuv420p"
        stream.codec_context.time_base = frame.time_base
        try:
            self._container.start_encoding()  # opens the file now, not at the encoder's first output
        except av.error.FFmpegError as error:
            raise OSError(f"cannot write {str(self.path)!r}: {error.strerror}") from error
        self._stream = stream

    def __enter__(self) -> "AnnotatedCopy":
        return self

    def __exit__(
        self, error_type: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        is_whole = error_type is None or issubclass(error_type, KeyboardInterrupt)  # how a live stream ends
        try:
            if is_whole and self._stream is not None:
                self._container.mux(self._stream.encode())
            self._container.close()
        except BaseException:
            is_whole = False
            raise
        finally:
            if not is_whole and self._stream is not None:
                self.path.unlink(missing_ok=True)


def draw_prediction(image: Image.Image, prediction: Prediction) -> Image.Image:
    """The image with a line for each class on a dark box in its upper left corner, letters a twentieth of its height.

    An image with a side of less than `READABLE` pixels is enlarged by a whole factor beforehand.
    """
    factor = ceil(READABLE / min(image.size))
    image = image.resize((image.width * factor, image.height * factor), Image.Resampling.BICUBIC)
    size = image.height / 20
    font = ImageFont.truetype(FONT, size)
    margin = round(size / 2)
    step = round(1.3 * size)
    lines = [f"{100 * probability:.1f} %  {name}" for name, probability in prediction]
    box = Image.new("RGBA", image.size)
    draw = ImageDraw.Draw(box)
    width = 2 * margin + max(draw.textlength(line, font) for line in lines)
    draw.rectangle((0, 0, width, 2 * margin + step * len(lines)), fill=(0, 0, 0, 160))
    for number, line in enumerate(lines):
        draw.text((margin, margin + number * step), line, "white", font)
    return Image.alpha_composite(image.convert("RGBA"), box).convert("RGB")
