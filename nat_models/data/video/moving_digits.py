"""Moving digits: a generated dataset of real video files, whose classes no single frame can tell.

A handwritten digit of scikit-learn moves in one of eight directions or turns in one of two: ten classes. Directions
wrap around at the borders, and digits of all classes lie anywhere at any angle, so that single frames of all classes
are alike. Training and validation show different digits.
"""

import json
import os
import shutil
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image
from scipy import ndimage  # type: ignore[import-untyped]

from nat_models.data.datasets import DigitsDataset

# Class -> step to the right and down, and turn to the left, each in units of its speed.
MOTIONS = {
    "right": (1, 0, 0),
    "down-right": (1, 1, 0),
    "down": (0, 1, 0),
    "down-left": (-1, 1, 0),
    "left": (-1, 0, 0),
    "up-left": (-1, -1, 0),
    "up": (0, -1, 0),
    "up-right": (1, -1, 0),
    "clockwise": (0, 0, -1),
    "counter-clockwise": (0, 0, 1),
}
SETTINGS = {"version": 1, "side": 32, "digit": 16, "frames": 20, "frame_rate": 10, "crf": 8}
PIXELS_A_FRAME = (1.0, 1.8)
DEGREES_A_FRAME = (10.0, 18.0)


def write_moving_digits(root: Path) -> None:
    """Writes `train.csv` and `validation.csv` and their H.264 files, unless `root` holds them already.

    The files depend on nothing but this code. Processes that start at the same time do not disturb each other: each
    writes to a folder of its own, and the first to be done gives it its name.
    """
    settings = root / "settings.json"
    if settings.is_file() and json.loads(settings.read_text()) == SETTINGS:
        return
    root.parent.mkdir(parents=True, exist_ok=True)
    if root.exists() and not settings.is_file() and any(root.iterdir()):
        raise ValueError(f"data.root={str(root)!r} holds something else; moving_digits needs a folder of its own")
    folder = Path(tempfile.mkdtemp(prefix=f"{root.name}-", dir=root.parent))
    try:
        for seed, split in enumerate(("train", "validation")):
            _write_split(folder, split, np.random.default_rng(seed))
        (folder / "settings.json").write_text(json.dumps(SETTINGS) + "\n")
        if settings.is_file() and json.loads(settings.read_text()) != SETTINGS:
            shutil.rmtree(root)
        try:
            os.rename(folder, root)
        except OSError:
            if not settings.is_file():
                raise
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def frames(digit: Image.Image, motion: str, random: np.random.Generator) -> np.ndarray:
    """A digit in motion: `[T, side, side]` uint8; where it starts, at which angle and how fast, is random."""
    side, size = SETTINGS["side"], SETTINGS["digit"]
    canvas = np.zeros((side, side), np.float32)
    corner = (side - size) // 2
    enlarged = np.asarray(digit.resize((size, size), Image.Resampling.BICUBIC))
    canvas[corner : corner + size, corner : corner + size] = enlarged
    x, y, angle = random.uniform(0, side), random.uniform(0, side), random.uniform(0, 360)
    right, down, turn = MOTIONS[motion]
    step, degrees = random.uniform(*PIXELS_A_FRAME), random.uniform(*DEGREES_A_FRAME)
    step /= np.hypot(right, down) or 1
    pictures = []
    for frame in range(SETTINGS["frames"]):
        turned = ndimage.rotate(canvas, angle + frame * turn * degrees, reshape=False, order=1)
        moved = (y + frame * down * step, x + frame * right * step)
        pictures.append(ndimage.shift(turned, moved, order=1, mode="grid-wrap"))
    return np.stack(pictures).clip(0, 255).astype(np.uint8)


def _write_split(folder: Path, split: str, random: np.random.Generator) -> None:
    digits = DigitsDataset(split)
    (folder / split).mkdir()
    lines = []
    for index in range(len(digits)):
        digit, _ = digits[index]
        motion = list(MOTIONS)[index % len(MOTIONS)]
        name = f"{split}/{index:04d}.mp4"
        _write_video(folder / name, frames(digit, motion, random))
        lines.append(f"{name},{motion}\n")
    (folder / f"{split}.csv").write_text("".join(lines))


def _write_video(path: Path, pictures: np.ndarray) -> None:
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=SETTINGS["frame_rate"], options={"crf": str(SETTINGS["crf"])})
        stream.width = stream.height = SETTINGS["side"]
        stream.pix_fmt = "yuv420p"
        stream.codec_context.thread_count = 1
        for picture in pictures:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="gray")))
        container.mux(stream.encode())
