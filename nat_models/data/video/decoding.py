"""From a video on disk to the frames shown at given times: one small protocol, a class for each kind of storage.

A *time* is in seconds from the first frame's presentation time. The frame shown at time `t` is the last one whose
timestamp is at most `t`; before the first and after the last frame these two are shown. Frame numbers play no part, so
that constant and variable frame rates are read alike.
"""

import io
import json
import tarfile
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Container, Iterator, Sequence
from functools import cache, lru_cache
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from timm.utils import natural_key
from torch import Tensor

DECODERS = ("pyav", "torchcodec", "torchcodec-cuda")
FRAME_EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
SHARD_SEPARATOR = ".tar/"
# A file that ends earlier than its header says, by more than this many seconds, was cut off.
END_TOLERANCE = 0.5
# Codecs whose containers hold packets that show no frame, so that only decoding tells the frames.
HIDDEN_FRAME_CODECS = ("vp8",)
TRANSPORT_STREAMS = (".ts", ".mts", ".m2ts")


class VideoError(ValueError):
    """A video that cannot be read as it should be; the message names the file and says what is wrong."""


class Video(Protocol):
    """An opened video.

    Attributes:
        duration: seconds from the first frame's timestamp to the end of the last frame.
        num_frames: frames in the file.
    """

    duration: float
    num_frames: int

    def frames_at(self, times: Sequence[float]) -> Tensor:
        """The frames shown at `times` (seconds, any order, repetitions allowed): `[len(times), 3, H, W]` uint8 RGB.

        Raises:
            VideoError: one of them cannot be decoded.
        """
        ...


def open_video(path: str | Path, decoder: str = "pyav", frame_rate: float = 30.0) -> Video:
    """Opens a video file, a folder of frames, or a sample of a shard (`SHARD.tar/KEY`).

    Args:
        path: which of the three it is, is told by what is there.
        decoder: of video files: `pyav`, `torchcodec` or `torchcodec-cuda`.
        frame_rate: frames per second of folders and shards, which do not tell it themselves.

    Raises:
        VideoError: missing, damaged, without frames.
        ValueError: unknown or missing decoder.
    """
    if SHARD_SEPARATOR in str(path):
        shard, _, key = str(path).rpartition(SHARD_SEPARATOR)
        return ShardVideo(Path(f"{shard}.tar"), key, frame_rate)
    if Path(path).is_dir():
        return FrameFolder(Path(path), frame_rate)
    if not Path(path).is_file():
        raise VideoError(f"cannot decode {path}: there is no such file")
    if decoder == "pyav":
        return PyAVVideo(Path(path))
    check_decoder(decoder)
    return TorchCodecVideo(Path(path), "cuda" if decoder == "torchcodec-cuda" else "cpu")


@cache
def check_decoder(decoder: str) -> None:
    """Raises ValueError unless `decoder` is known and works here."""
    if decoder not in DECODERS:
        raise ValueError(f"data.decoder={decoder!r} is unknown; allowed are {', '.join(DECODERS)}")
    try:
        if decoder == "pyav":
            import av  # noqa: F401
        else:
            import torchcodec.decoders

            if torchcodec.ffmpeg_major_version is None:
                raise ImportError("torchcodec found none")
    except (ImportError, RuntimeError, OSError, AttributeError) as error:
        hint = "pip install 'nat-models[video]'" if decoder == "pyav" else "it needs FFmpeg's shared libraries"
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"data.decoder={decoder!r} cannot be used here ({hint}): {reason}") from error


def decoder_version(decoder: str) -> str:
    """Decoder, version and FFmpeg behind it, for the record of a run."""
    check_decoder(decoder)
    if decoder == "pyav":
        import av

        libavcodec = ".".join(map(str, av.library_versions["libavcodec"]))
        return f"PyAV {av.__version__} (libavcodec {libavcodec})"
    import torchcodec

    return f"{decoder} {version('torchcodec')} (FFmpeg {torchcodec.ffmpeg_major_version})"


def shown_at(timestamps: Sequence[float], times: Sequence[float]) -> list[int]:
    """Indices of the frames shown at `times`, given all frames' ascending `timestamps`, both in seconds."""
    return [max(bisect_right(timestamps, time) - 1, 0) for time in times]


class PyAVVideo:
    """A video file through PyAV, whose wheel brings FFmpeg: any container and codec that FFmpeg knows.

    Opening reads the packets, which tell every frame's timestamp and which are keyframes, without decoding them.
    `frames_at` seeks to the keyframe before the first wanted frame, decodes from there, and seeks again where a later
    keyframe saves decoding. Rotation that the file asks for (phones) is applied. One thread: loaders have processes.

    Raises:
        VideoError: not a video, no frames, or cut off before the end that its header tells.
    """

    def __init__(self, path: Path) -> None:
        import av

        self._path = path
        self._errors = (av.error.FFmpegError, EOFError)
        self._to_rgb = av.video.reformatter.VideoReformatter()  # one for all frames, since setting it up takes long
        try:
            self._open()
            self._index_packets()
        except self._errors as error:
            raise VideoError(f"cannot decode {path}: {_reason(error)}") from error

    def frames_at(self, times: Sequence[float]) -> Tensor:
        try:
            try:
                frames = self._decode(shown_at(self._timestamps, times))
            except _MissingFrame:
                packets = self.num_frames
                self._index_frames()
                if self.num_frames != packets:
                    message = f"only {self.num_frames} of its {packets} frames can be decoded"
                    raise VideoError(f"cannot decode {self._path}: {message}") from None
                frames = self._decode(shown_at(self._timestamps, times))
        except self._errors as error:
            raise VideoError(f"cannot decode {self._path}: {_reason(error)}") from error
        return torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2)

    def _open(self) -> None:
        import av

        self._container = av.open(str(self._path.absolute()))  # lest FFmpeg take what is before a colon for a protocol
        self._stream: Any = self._container.streams.best("video")
        if self._stream is None:
            raise VideoError(f"cannot decode {self._path}: it holds no video")
        self._stream.codec_context.thread_count = 1

    def _index_packets(self) -> None:
        """The timestamps and keyframes, from the packets."""
        pts: list[int | None] = []
        keyframes, packets, last_duration = [], 0, 0
        for packet in self._container.demux(self._stream):
            if packet.size == 0:
                continue
            packets += 1
            if packet.is_corrupt:
                raise VideoError(f"cannot decode {self._path}: it is cut off or damaged after {packets - 1} frames")
            if packet.is_discard:  # the file's edit list leaves it out
                continue
            pts.append(packet.pts)
            last_duration = packet.duration or last_duration
            if packet.is_keyframe:
                keyframes.append(packet.pts)
        if packets < (told := frames_told(self._container, self._stream)):
            raise VideoError(f"cannot decode {self._path}: only {packets} of its {told} frames are there")
        context = self._stream.codec_context
        # Frames that no other frame refers to need no decoding; these two codecs tell them, packet by packet.
        self._skips = context.name in ("h264", "hevc") and self._container.format.name != "avi"
        if None in pts or is_unordered(self._container, self._stream) or context.name in HIDDEN_FRAME_CODECS:
            self._index_frames()
        else:
            self._set_index(pts, keyframes, last_duration)  # type: ignore[arg-type]

    def _index_frames(self) -> None:
        """The timestamps and keyframes, by decoding: for files whose packets do not tell them."""
        self._skips = False
        self._open()
        frames = [(frame.pts, frame.key_frame, frame.duration) for frame in self._container.decode(self._stream)]
        pts = [time for time, _, _ in frames]
        if None in pts or any(later <= earlier for earlier, later in pairwise(pts)):
            self._set_index(list(range(len(frames))), [], 0)
        else:
            self._set_index(pts, [time for time, is_key, _ in frames if is_key], frames[-1][2] if frames else 0)

    def _set_index(self, pts: list[int], keyframes: list[int], last_duration: int) -> None:
        """Times are in units of the stream's time base; without keyframes they are the frames' numbers."""
        if not pts:
            raise VideoError(f"cannot decode {self._path}: it holds no frames")
        self._pts, self._keyframes = sorted(set(pts)), sorted(keyframes)
        self.num_frames = len(self._pts)
        rate = float(self._stream.average_rate or self._stream.guessed_rate or 30)
        unit = float(self._stream.time_base) if keyframes else 1 / rate
        self._timestamps = [(time - self._pts[0]) * unit for time in self._pts]
        interval = self._timestamps[-1] / (self.num_frames - 1) if self.num_frames > 1 else 1 / rate
        self.duration = self._timestamps[-1] + (last_duration * unit or interval)
        missing = missing_seconds(self._stream, self._pts[0] * unit + self.duration)
        if missing:
            raise VideoError(f"cannot decode {self._path}: its last {missing:.1f} seconds are missing")

    def _decode(self, indices: Sequence[int]) -> list[np.ndarray]:
        """Frames `[H, W, 3]`."""
        pixels: dict[int, np.ndarray] = {}
        frames: Iterator[tuple[int, Any]] = iter(())
        position: int | None = None
        wanted = {self._pts[index] for index in indices}
        for index in sorted(set(indices)):
            pts = self._pts[index]
            keyframe = self._keyframe_before(pts)
            if position is None or keyframe > position:
                frames = self._frames_from(keyframe, wanted)
            frame = _advance(frames, pts)
            if frame is None:  # not every container finds the keyframe it is asked for
                frames = self._frames_from(self._pts[0], wanted)
                frame = _advance(frames, pts)
            if frame is None:
                raise _MissingFrame
            if frame.is_corrupt:
                seconds = f"{self._timestamps[index]:.3f} s"
                raise VideoError(f"cannot decode {self._path}: the frame at {seconds} is damaged")
            pixels[index], position = self._rgb(frame), pts
        return [pixels[index] for index in indices]

    def _frames_from(self, keyframe: int, wanted: Container[int]) -> Iterator[tuple[int, Any]]:
        """Frames with their times, from a keyframe on: the wanted ones at least."""
        if keyframe == self._pts[0]:
            self._open()
        else:
            self._container.seek(keyframe, stream=self._stream)
        if not self._keyframes:
            return enumerate(self._container.decode(self._stream))
        return ((frame.pts, frame) for frame in self._decode_wanted(wanted))

    def _decode_wanted(self, wanted: Container[int]) -> Iterator[Any]:
        for packet in self._container.demux(self._stream):
            if self._skips:
                self._stream.codec_context.skip_frame = "DEFAULT" if packet.pts in wanted else "NONREF"
            yield from packet.decode()

    def _keyframe_before(self, pts: int) -> int:
        index = bisect_right(self._keyframes, pts) - 1
        return self._keyframes[index] if index >= 0 else self._pts[0]

    def _rgb(self, frame: Any) -> np.ndarray:
        # All frames in the size of the first, should the resolution change within the file.
        context = self._stream.codec_context
        pixels = self._to_rgb.reformat(frame, context.width, context.height, "rgb24", threads=1).to_ndarray()
        return np.rot90(pixels, frame.rotation // 90) if frame.rotation else pixels


def is_unordered(container: Any, stream: Any) -> bool:
    """Whether the timestamps of PyAV's stream are in the order of decoding, which B-frames make another one: in AVI."""
    context = stream.codec_context
    return container.format.name == "avi" and context.has_b_frames and context.name != "mpeg4"


def frames_told(container: Any, stream: Any) -> int:
    """Frames that PyAV's stream should have by the header of its container; 0 where that does not tell."""
    if container.format.name.startswith("mov"):  # an edit list leaves frames out of MP4 files, and of the index
        return min(stream.frames, len(stream.index_entries))
    return stream.frames


def missing_seconds(stream: Any, end: float) -> float:
    """How much later than `end`, in seconds, PyAV's stream should end; 0 within `END_TOLERANCE`, or if nothing tells.

    Matroska and WebM files do not tell the number of frames, but their streams' ends.
    """
    told = stream.metadata.get("DURATION", "")
    if told.count(":") != 2:
        return 0.0
    hours, minutes, seconds = (float(part) for part in told.split(":"))
    missing = 3600 * hours + 60 * minutes + seconds - end
    return missing if missing > END_TOLERANCE else 0.0


class _MissingFrame(Exception):
    """Decoding passed the time of a wanted frame without showing it."""


def _advance(frames: Iterator[tuple[int, Any]], wanted: int) -> Any:
    """The frame of the wanted time, or None where decoding passes that time without it."""
    for pts, frame in frames:
        if pts == wanted:
            return frame
        if pts > wanted:
            return None
    return None


class TorchCodecVideo:
    """A video file through torchcodec, on the CPU or decoded by an NVIDIA GPU (`device="cuda"`).

    It relies on packets that tell their frames' times, and does not read transport streams to their end.

    Raises:
        VideoError: not a video, without frames, or of a kind that torchcodec does not read to the frame.
    """

    def __init__(self, path: Path, device: str = "cpu") -> None:
        from torchcodec.decoders import VideoDecoder

        self._path = path
        try:
            self._decoder = VideoDecoder(str(path.absolute()), device=device, seek_mode="exact", num_ffmpeg_threads=1)
            metadata: Any = self._decoder.metadata
            self._begin, end = metadata.begin_stream_seconds, metadata.end_stream_seconds
            self.num_frames = metadata.num_frames or 0
        except (RuntimeError, ValueError) as error:
            raise VideoError(f"cannot decode {path}: {_reason(error)}") from error
        if not self.num_frames:
            raise VideoError(f"cannot decode {path}: it holds no frames")
        container, codec = path.suffix.lower(), metadata.codec
        unordered = container == ".avi" and codec in ("h264", "hevc")
        if container in TRANSPORT_STREAMS or codec in HIDDEN_FRAME_CODECS or unordered:
            raise VideoError(
                f"cannot decode {path}: torchcodec may miss frames of {codec} in {container} files; data.decoder=pyav "
                f"reads them"
            )
        told = metadata.num_frames_from_header
        if told and self.num_frames < told:
            raise VideoError(f"cannot decode {path}: only {self.num_frames} of its {told} frames are there")
        self.duration = end - self._begin

    def frames_at(self, times: Sequence[float]) -> Tensor:
        last = np.nextafter(self._begin + self.duration, -np.inf)
        seconds = [min(max(self._begin + time, self._begin), last) for time in times]
        try:
            return self._decoder.get_frames_played_at(seconds).data.cpu()
        except (RuntimeError, ValueError, IndexError) as error:
            reason = f"{_reason(error).rstrip('.')}; data.decoder=pyav may read it"
            raise VideoError(f"cannot decode {self._path}: {reason}") from error


class FrameFolder:
    """A folder of images, one a frame, in the natural order of their names.

    Raises:
        VideoError: no images in the folder.
    """

    def __init__(self, folder: Path, frame_rate: float) -> None:
        files = [path for path in folder.iterdir() if path.suffix.lower() in FRAME_EXTENSIONS]
        self._files = sorted(files, key=lambda path: natural_key(path.name))
        if not self._files:
            raise VideoError(f"cannot decode {folder}: it holds no images ({', '.join(FRAME_EXTENSIONS)})")
        self._frame_rate = frame_rate
        self.num_frames = len(self._files)
        self.duration = self.num_frames / frame_rate

    def frames_at(self, times: Sequence[float]) -> Tensor:
        timestamps = [index / self._frame_rate for index in range(self.num_frames)]
        indices = shown_at(timestamps, times)
        decoded = {index: _decode_image(self._files[index].read_bytes(), self._files[index]) for index in set(indices)}
        return _stack([decoded[index] for index in indices], self._files[0].parent)


class ShardVideo:
    """A sample of a webdataset shard whose frames are images: members `KEY.000000.jpg`, `KEY.000001.jpg`, ...

    A member `KEY.json` may hold `timestamps` (seconds, one a frame); else `frame_rate` tells them. Members are read
    where they lie in the file, so a shard serves random access like any other storage.

    Raises:
        VideoError: no such shard, no such sample, or no frames in it.
    """

    def __init__(self, shard: Path, key: str, frame_rate: float) -> None:
        self._name = f"{shard}/{key}"
        self._shard = shard
        members = shard_samples(shard).get(key, {})
        names = sorted((name for name in members if f".{name}".lower().endswith(FRAME_EXTENSIONS)), key=natural_key)
        if not names:
            raise VideoError(f"cannot decode {self._name}: the shard holds no frames of it")
        self._members = [members[name] for name in names]
        self.num_frames = len(names)
        self._timestamps = [index / frame_rate for index in range(self.num_frames)]
        if "json" in members:
            told = json.loads(read_member(shard, members["json"])).get("timestamps", self._timestamps)
            if len(told) != self.num_frames:
                raise VideoError(f"cannot decode {self._name}: {len(told)} timestamps for {self.num_frames} frames")
            self._timestamps = [time - told[0] for time in told]
        interval = self._timestamps[-1] / (self.num_frames - 1) if self.num_frames > 1 else 1 / frame_rate
        self.duration = self._timestamps[-1] + interval

    def frames_at(self, times: Sequence[float]) -> Tensor:
        indices = shown_at(self._timestamps, times)
        decoded = {
            index: _decode_image(read_member(self._shard, self._members[index]), self._name) for index in set(indices)
        }
        return _stack([decoded[index] for index in indices], self._name)


@lru_cache(maxsize=4096)
def shard_samples(shard: Path) -> dict[str, dict[str, tuple[int, int]]]:
    """Key -> extension -> `(offset, size)` in bytes of every sample of a tar file, in webdataset's naming.

    Raises:
        VideoError: missing or damaged tar file.
    """
    samples: dict[str, dict[str, tuple[int, int]]] = defaultdict(dict)
    try:
        with tarfile.open(shard, "r:") as tar:
            for member in tar:
                if member.isfile():
                    folder, _, name = member.name.rpartition("/")
                    stem, _, extension = name.partition(".")
                    samples[f"{folder}/{stem}" if folder else stem][extension] = (member.offset_data, member.size)
    except (OSError, tarfile.TarError) as error:
        raise VideoError(f"cannot read the shard {shard}: {error}") from error
    return dict(samples)


def read_member(shard: Path, member: tuple[int, int]) -> bytes:
    """The bytes at `(offset, size)` of a tar file."""
    offset, size = member
    with open(shard, "rb") as file:
        file.seek(offset)
        return file.read(size)


def _decode_image(content: bytes, name: str | Path) -> np.ndarray:
    try:
        return np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise VideoError(f"cannot decode {name}: {error}") from error


def _stack(images: Sequence[np.ndarray], name: str | Path) -> Tensor:
    if len({image.shape for image in images}) > 1:
        raise VideoError(f"cannot decode {name}: its frames differ in size")
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)


def _reason(error: BaseException) -> str:
    """What an FFmpeg error says, without its number and the path; of others the first line."""
    text = getattr(error, "strerror", None) or str(error)
    return (text.strip().splitlines() or [type(error).__name__])[0]
