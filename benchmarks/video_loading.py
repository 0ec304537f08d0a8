"""Clips per second and core from video files: ours beside decoding whole files with PyAV, and decord where installed.

    python benchmarks/video_loading.py

Each reads clips of 32 frames, 2 apart, at random starts, from generated H.264 files of 10 s, 30 frames/s and 340 x 256
pixels: with a keyframe every 12 frames, as data prepared for training has, and every 250, which is x264's default. One
thread. Before anything is timed, all must give the same frames. Reported are medians over rounds in which all take
their turn, of clips per second and of the ratio to decoding whole files.
"""

import argparse
import random
import tempfile
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from time import perf_counter

import av
import numpy as np
import torch
from PIL import Image
from record import ROOT, environment, write_csv
from rich.console import Console
from rich.table import Table
from torch import Tensor

from nat_models.data.video.decoding import check_decoder, decoder_version, open_video
from nat_models.data.video.sampling import Sampling

WIDTH, HEIGHT, RATE, NUM_FRAMES = 340, 256, 30, 300
KEYFRAMES = (12, 250)
SAMPLING = Sampling(num_frames=32, mode="dense", stride=2)
SPAN = (SAMPLING.num_frames - 1) * SAMPLING.stride + 1
Reader = Callable[[Path, int], Tensor]
"""File and number of the first frame -> clip `[32, 3, H, W]`."""


def write_file(path: Path, keyframe_every: int) -> None:
    """A view that pans over a random landscape."""
    noise = np.random.default_rng(0).integers(0, 256, (40, 90, 3), dtype=np.uint8)
    landscape = np.asarray(Image.fromarray(noise).resize((WIDTH + NUM_FRAMES, HEIGHT + NUM_FRAMES), Image.BICUBIC))
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=RATE)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        stream.codec_context.gop_size = keyframe_every
        for i in range(NUM_FRAMES):
            view = np.ascontiguousarray(landscape[i : i + HEIGHT, i : i + WIDTH])
            container.mux(stream.encode(av.VideoFrame.from_ndarray(view, format="rgb24")))
        container.mux(stream.encode())


def decode_all(path: Path, start: int) -> Tensor:
    """What a plain loop does: every frame to RGB, then those of the clip; with one thread, as the others."""
    to_rgb = av.video.reformatter.VideoReformatter()
    with av.open(str(path)) as container:
        container.streams.video[0].codec_context.thread_count = 1
        decoded = container.decode(video=0)
        frames = [to_rgb.reformat(frame, format="rgb24", threads=1).to_ndarray() for frame in decoded]
    return torch.from_numpy(np.stack(frames[start : start + SPAN : SAMPLING.stride])).permute(0, 3, 1, 2)


def ours(decoder: str) -> Reader:
    """This project's way, with one of its decoders."""

    def read(path: Path, start: int) -> Tensor:
        video = open_video(path, decoder)
        return video.frames_at([(start + index * SAMPLING.stride + 0.5) / RATE for index in range(SAMPLING.num_frames)])

    return read


def decord(path: Path, start: int) -> Tensor:
    """decord's reader with one thread."""
    from decord import VideoReader

    frames = VideoReader(str(path), num_threads=1).get_batch(range(start, start + SPAN, SAMPLING.stride))
    return torch.from_numpy(frames.asnumpy()).permute(0, 3, 1, 2)


def readers() -> dict[str, Reader]:
    """All that work here; the first is what the others are compared with."""
    found: dict[str, Reader] = {"decode all": decode_all, "pyav": ours("pyav")}
    try:
        check_decoder("torchcodec")
        found["torchcodec"] = ours("torchcodec")
    except ValueError:
        pass
    return found | ({"decord": decord} if find_spec("decord") else {})


def check(found: dict[str, Reader], path: Path) -> None:
    """Raises unless all readers give the same frames, but for rounding in the conversion to RGB."""
    for start in (0, 117, NUM_FRAMES - SPAN):
        expected = decode_all(path, start).int()
        for name, reader in found.items():
            difference = (reader(path, start).int() - expected).abs().float().mean().item()
            if difference > 2:
                raise RuntimeError(f"{name}: the clip at frame {start} differs by {difference:.1f} in the mean")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=30, help="(default: %(default)s)")
    parser.add_argument("--output", type=Path, default=ROOT / "results" / "video_loading.csv", help="CSV to write")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    found, starts, rows = readers(), random.Random(0), []
    recorded = environment(torch.device("cpu"))
    with tempfile.TemporaryDirectory() as folder:
        for keyframe_every in KEYFRAMES:
            path = Path(folder) / f"{keyframe_every}.mp4"
            write_file(path, keyframe_every)
            check(found, path)
            seconds: dict[str, list[float]] = {name: [] for name in found}
            for _ in range(arguments.rounds):
                start = starts.randrange(NUM_FRAMES - SPAN + 1)
                for name, reader in found.items():
                    begin = perf_counter()
                    reader(path, start)
                    seconds[name].append(perf_counter() - begin)
            for name, times in seconds.items():
                ratios = [whole / time for whole, time in zip(seconds["decode all"], times, strict=True)]
                row = {"reader": name, "keyframe_every": keyframe_every, "clips_per_s": f"{1 / median(times):.2f}"}
                row |= {"ratio": f"{median(ratios):.2f}", "rounds": str(arguments.rounds)}
                rows.append(row | {"pyav": decoder_version("pyav"), **recorded})
    table = Table("reader", "keyframe every", "clips/s and core", "ratio")
    for row in rows:
        table.add_row(row["reader"], str(row["keyframe_every"]), row["clips_per_s"], row["ratio"])
    console = Console()
    console.print(", ".join(f"{name} {value}" for name, value in recorded.items()))
    console.print(table)
    write_csv(arguments.output, rows)
    console.print(f"written to {arguments.output}")


if __name__ == "__main__":
    main()
