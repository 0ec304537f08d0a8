"""Small image folders for the tests, and the commands of the repository, in this process and as a user runs them."""

import importlib
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig
from PIL import Image

REPOSITORY = Path(__file__).resolve().parent.parent
CLASSES = ["class_1", "class_2", "class_10"]  # natural order, which is not the alphabetical one


def write_image(path: Path, seed: int, size: tuple[int, int] = (48, 40)) -> None:
    """Writes a random RGB image of `size` (width, height)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


def write_image_folder(root: Path, train_per_class: int = 4, val_per_class: int = 2) -> Path:
    """Writes `root/train/CLASS/*.jpg` and `root/val/CLASS/*.jpg`; returns `root`."""
    for split, count in (("train", train_per_class), ("val", val_per_class)):
        for label, name in enumerate(CLASSES):
            for index in range(count):
                write_image(root / split / name / f"{index}.jpg", seed=100 * label + index)
    return root


def compose_train(run_dir: Path, *overrides: str) -> DictConfig:
    """The config that `python train.py OVERRIDES` gets, with `run_dir` as run folder."""
    with initialize_config_dir(str(REPOSITORY / "configs"), version_base="1.3"):
        return compose("train", [f"run_dir={run_dir}", *overrides])


def train(cfg: DictConfig) -> float:
    """Runs `train.py`'s function in this process; returns what it returns."""
    sys.path.insert(0, str(REPOSITORY))
    try:
        return importlib.import_module("train").main(cfg)
    finally:
        sys.path.remove(str(REPOSITORY))


def run(
    folder: Path, script: str, *arguments: str, launcher: Sequence[str] = (), timeout: float = 300
) -> subprocess.CompletedProcess:
    """Runs `python SCRIPT ARGUMENTS` in `folder`, as a user does."""
    command = [*(launcher or [sys.executable]), str(REPOSITORY / script), *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=timeout)
