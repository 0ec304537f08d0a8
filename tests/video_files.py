"""Small videos for the tests, with each frame's number drawn into its picture so that compression cannot hide it."""

import struct
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import torch
from torch import Tensor

BITS = 8
SIZE = (96, 64)  # width and height
BLACK, WHITE = 30, 225


def picture(number: int, size: tuple[int, int] = SIZE) -> np.ndarray:
    """`[H, W, 3]` uint8: the number's eight bits as vertical bars, the highest on the left, below a white band."""
    width, height = size
    pixels = np.full((height, width, 3), BLACK, np.uint8)
    pixels[: height // 4] = WHITE
    for bit in range(BITS):
        if number >> (BITS - 1 - bit) & 1:
            pixels[height // 4 :, bit * width // BITS : (bit + 1) * width // BITS] = WHITE
    return pixels


def numbers_in(frames: Tensor) -> list[int]:
    """The numbers drawn into frames `[T, 3, H, W]` that are the right way up; fails where they are not."""
    height, width = frames.shape[-2:]
    numbers = []
    for frame in frames.float().mean(dim=1):
        assert frame[: height // 8].mean() > 180, "the white band is not at the top"
        bars = frame[height // 2 : height * 7 // 8].mean(dim=0)
        centers = [int((bit + 0.5) * width / BITS) for bit in range(BITS)]
        numbers.append(int("".join("1" if bars[center] > 128 else "0" for center in centers), 2))
    return numbers


def write_video(
    path: Path,
    num_frames: int = 60,
    codec: str = "libx264",
    rate: Fraction | int = 30,
    size: tuple[int, int] = SIZE,
    pixel_format: str = "yuv420p",
    timestamps: Sequence[int] | None = None,
    time_base: Fraction | None = None,
    keyframe_every: int = 12,
    options: dict[str, str] | None = None,
    container_options: dict[str, str] | None = None,
    audio: bool = False,
    first_number: int = 0,
) -> Path:
    """Writes numbered frames; `timestamps` (in `time_base`) makes the frame rate variable. Returns `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    settings = {
        "libx265": {"x265-params": "log-level=none"},
        # Without temporal filtering, which blends neighbouring frames.
        "libsvtav1": {"svtav1-params": "lp=1:enable-tf=0", "preset": "8", "crf": "15"},
    }
    with av.open(str(path), "w", options=container_options or {}) as container:
        stream = container.add_stream(codec, rate=rate, options=settings.get(codec, {}) | (options or {}))
        stream.width, stream.height, stream.pix_fmt = *size, pixel_format
        stream.codec_context.gop_size = keyframe_every
        stream.codec_context.thread_count = 1
        if codec in ("mpeg4", "libvpx-vp9"):
            stream.bit_rate = 2_000_000
        if time_base is not None:
            stream.codec_context.time_base = time_base
        sound = container.add_stream("aac", rate=16000, layout="mono") if audio else None
        container.start_encoding()  # a file even of no frames
        for index in range(num_frames):
            frame = av.VideoFrame.from_ndarray(picture(first_number + index, size), format="rgb24")
            frame.pts = index if timestamps is None else timestamps[index]
            frame.time_base = time_base or Fraction(1) / Fraction(rate)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
        if sound is not None:
            silence = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
            silence.sample_rate = 16000
            for index in range(int(16 * num_frames / float(rate)) + 8):
                silence.pts = index * 1024
                container.mux(sound.encode(silence))
            container.mux(sound.encode())
    return path


def rotate_display(path: Path) -> None:
    """Marks an MP4 file to be shown turned clockwise by 90 degrees, by the matrix in its track header.

    The matrix (a b u, c d v, x y w of ISO/IEC 14496-12) maps a point (p, q) to (a p + c q + x, b p + d q + y).
    """
    content = bytearray(path.read_bytes())
    start = content.index(b"tkhd") + 4 + 40  # version 0: 40 bytes of other fields
    one = 1 << 16
    assert struct.unpack(">9i", content[start : start + 36]) == (one, 0, 0, 0, one, 0, 0, 0, 1 << 30)
    content[start : start + 36] = struct.pack(">9i", 0, one, 0, -one, 0, 0, SIZE[1] * one, 0, 1 << 30)
    path.write_bytes(content)


def trim(path: Path, first: int, num_frames: int, rate: int = 30) -> None:
    """Leaves frames out of an MP4 file by its edit list, as programs do that cut without encoding anew.

    An edit has a duration in units of the movie's time scale (1/1000 s here) and a start in those of the media's
    (ISO/IEC 14496-12).
    """
    content = bytearray(path.read_bytes())
    (scale,) = struct.unpack_from(">I", content, content.index(b"mdhd") + 4 + 12)
    entry = content.index(b"elst") + 4 + 4
    count, _, start = struct.unpack_from(">IIi", content, entry)
    assert count == 1
    struct.pack_into(">Ii", content, entry + 4, 1000 * num_frames // rate, start + first * scale // rate)
    path.write_bytes(content)


def upright(frames: Tensor) -> Tensor:
    """Frames `[T, 3, H, W]` turned back, counter-clockwise by 90 degrees."""
    return torch.rot90(frames, 1, dims=(-2, -1))
