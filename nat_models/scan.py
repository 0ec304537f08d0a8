"""Checks videos before they are trained on: `python -m nat_models.scan DATA`.

DATA is a list of videos of any known form, a folder with a folder per class, or a shard. Every frame of every video is
decoded. The output folder then holds `report.csv` (every video: readable, damaged, too short or wrong label, and why),
`clean.tsv` (a list of the readable ones, to train on) and `damaged.txt` (the paths of all others, for
`data.excluded_list`). The exit status is 1 where some are not readable.
"""

import argparse
import csv
import os
import sys
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.progress import track
from rich.table import Table

from nat_models.data.video.annotations import FORMS, LabelledVideo, read_annotations
from nat_models.data.video.dataset import VideoOpener
from nat_models.data.video.decoding import DECODERS, VideoError, check_decoder

STATES = ("readable", "damaged", "too short", "wrong label")
FRAMES_AT_ONCE = 64


@dataclass(frozen=True)
class Checked:
    """A video, one of `STATES`, and why; `num_frames` and `seconds` where they could be told."""

    path: str
    state: str
    num_frames: int = 0
    seconds: float = 0.0
    reason: str = ""


def check(video: LabelledVideo, opener: VideoOpener, min_frames: int) -> Checked:
    """Decodes a video from its first frame to its last."""
    try:
        opened = opener(video)
        interval = opened.duration / opened.num_frames
        times = [(index + 0.5) * interval for index in range(opened.num_frames)]
        for start in range(0, len(times), FRAMES_AT_ONCE):
            opened.frames_at(times[start : start + FRAMES_AT_ONCE])
    except VideoError as error:
        return Checked(video.path, "damaged", reason=str(error).removeprefix(f"cannot decode {video.path}: "))
    state, reason = "readable", ""
    if opened.num_frames < min_frames:
        state, reason = "too short", f"{opened.num_frames} frames, fewer than {min_frames}"
    return Checked(video.path, state, opened.num_frames, opened.duration, reason)


def scan(
    source: str,
    root: str | None,
    form: str | None,
    train_list: str | None,
    opener: VideoOpener,
    min_frames: int,
    workers: int,
    training: bool,
) -> tuple[list[Checked], dict[str, str]]:
    """Checks a list in `workers` processes: the results in the list's order, and the class name of each path."""
    classes = read_annotations(train_list, root, form).classes if train_list else None
    found = read_annotations(source, root, form, classes, training, allow_wrong_labels=True)
    results = [Checked(path, "damaged", reason="there is no such file") for path in found.missing]
    results += [Checked(path, "wrong label", reason=f"it has {text}") for path, text in found.wrong_labels.items()]
    job = partial(check, opener=opener, min_frames=min_frames)
    with ProcessPoolExecutor(workers) as pool:
        checked = pool.map(job, found.videos, chunksize=4)
        console = Console(stderr=True)
        results += track(checked, "Decoding", len(found.videos), console=console, disable=not console.is_terminal)
    return results, {video.path: found.classes[video.label] for video in found.videos}


def write(results: Sequence[Checked], class_names: dict[str, str], folder: Path) -> None:
    """Writes `report.csv`, `clean.tsv` and `damaged.txt`."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "report.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "class", "state", "frames", "seconds", "reason"])
        for result in results:
            frames = [result.num_frames, f"{result.seconds:.3f}"] if result.num_frames else ["", ""]
            writer.writerow([result.path, class_names.get(result.path, ""), result.state, *frames, result.reason])
    readable = [result.path for result in results if result.state == "readable"]
    others = [result.path for result in results if result.state != "readable"]
    clean = "".join(f"{os.path.abspath(path)}\t{class_names[path]}\n" for path in readable)
    (folder / "clean.tsv").write_text(clean, encoding="utf-8")
    (folder / "damaged.txt").write_text("".join(f"{os.path.abspath(path)}\n" for path in others), encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    parser = argparse.ArgumentParser(prog="python -m nat_models.scan", description=(__doc__ or "").split("\n\n")[1])
    parser.add_argument("data", help="list of videos, folder with a folder per class, or shards")
    parser.add_argument("--root", help="folder that relative paths of the list start from (default: the list's own)")
    parser.add_argument("--form", choices=FORMS, help="form of the list (default: detected)")
    parser.add_argument("--train-list", help="list whose classes hold, where DATA is a validation list")
    parser.add_argument("--test-split", action="store_true", help="of an hmdb51 split, check the test videos")
    parser.add_argument("--min-frames", type=int, default=2, help="fewer frames are too short (default: 2)")
    parser.add_argument("--decoder", choices=DECODERS[:2], default="pyav", help="default: pyav")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes (default: one a core)")
    parser.add_argument("--output", type=Path, default=Path("scan"), help="folder of the results (default: scan)")
    options = parser.parse_args(arguments)
    try:
        check_decoder(options.decoder)
        results, class_names = scan(
            options.data,
            options.root,
            options.form,
            options.train_list,
            VideoOpener(options.decoder, frame_rate=30.0),
            options.min_frames,
            options.workers,
            not options.test_split,
        )
    except (ValueError, FileNotFoundError) as error:
        parser.error(str(error))
    write(results, class_names, options.output)
    counts = Counter(result.state for result in results)
    table = Table("state", "videos", title=f"{len(results)} videos of {options.data}", title_justify="left")
    for state in STATES:
        table.add_row(state, str(counts[state]))
    Console().print(table)
    problems = [result for result in results if result.state != "readable"]
    for result in problems[:20]:
        print(f"{result.path}: {result.state}: {result.reason}")
    if len(problems) > 20:
        print(f"... and {len(problems) - 20} more")
    print(f"written to {options.output}: report.csv, clean.tsv, damaged.txt")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
