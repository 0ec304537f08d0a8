"""Tiles by measurement, for problems and GPUs that the shipped choice does not know: `FUSED_NA_AUTOTUNE=1`.

Every plausible choice is compiled and timed once for each kernel of a new workload, which takes seconds; what was found
is kept in `FUSED_NA_CACHE` (default `~/.cache/fused_na`), one JSON file for each GPU model and Triton version.
"""

import json
import os
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
import triton
import triton.testing

from fused_na.triton.tiles import Tiles, Workload, ranked_tiles

# Choices whose estimate exceeds the best one's by more than this are not measured, nor more than MEASURED of them.
SLACK = 1.15
MEASURED = 8


def is_enabled() -> bool:
    """Whether the environment asks for measured tiles."""
    return os.environ.get("FUSED_NA_AUTOTUNE") == "1"


def measured_tiles(kernel: str, workload: Workload, run: Callable[[Tiles], object]) -> Tiles | None:
    """The fastest choice for a kernel, from the cache on disk or by timing `run` with each.

    None where neither is possible: nothing can be measured while a CUDA graph is captured.

    Args:
        kernel, workload: as for `choose_tiles`.
        run: launches the kernel with the given tiles.

    Raises:
        ValueError: the file is no cache.
    """
    path = _cache_file()
    found = _kept(path)
    key = repr((kernel, tuple(map(tuple, workload.axes)), *workload[1:]))
    choices = {json.dumps(tiles): tiles for tiles in _choices(kernel, workload)}
    kept = json.dumps(found.get(key))
    if kept not in choices:  # not measured yet, or by a version of this package whose choices were others
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            return None
        kept = json.dumps(_fastest(list(choices.values()), run))
        found[key] = json.loads(kept)
        _write(path, found)
    return choices[kept]


@cache
def _kept(path: Path) -> dict:
    return _read(path)


def _read(path: Path) -> dict:
    try:
        found = json.loads(path.read_text()) if path.exists() else {}
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise ValueError(f"FUSED_NA_CACHE: {path} is damaged; remove it, and tiles are measured again")
    return found


def _write(path: Path, found: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(f".{os.getpid()}")
    unfinished.write_text(json.dumps(_read(path) | found, indent=1))  # several processes may tune at once
    unfinished.replace(path)


def _cache_file() -> Path:
    folder = Path(os.environ.get("FUSED_NA_CACHE", Path.home() / ".cache" / "fused_na"))
    name = torch.cuda.get_device_name().replace(" ", "-")
    return folder / f"{name}-triton{triton.__version__}.json"


def _choices(kernel: str, workload: Workload) -> list[Tiles]:
    ranked = ranked_tiles(kernel, workload)
    return [tiles for cost, tiles in ranked if cost <= SLACK * ranked[0][0]][:MEASURED]


def _fastest(choices: list[Tiles], run: Callable[[Tiles], object]) -> Tiles:
    times = [triton.testing.do_bench(lambda tiles=tiles: run(tiles), return_mode="median") for tiles in choices]
    return choices[times.index(min(times))]
