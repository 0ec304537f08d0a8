"""Lists of labelled videos: every form in which datasets come, read into one.

| form        | what it is                                                                                   |
|-------------|----------------------------------------------------------------------------------------------|
| `folder`    | a folder with a folder per class, which hold the videos                                      |
| `list`      | lines "path label", separated by a tab, a comma or a space; labels are numbers or names      |
| `frames`    | lines "folder total label": frame folders with their numbers of frames                       |
| `shards`    | webdataset shards (`*.tar`), whose samples hold frames and `cls` (a label)                   |
| `kinetics`  | csv with columns `label`, `youtube_id`, `time_start`, `time_end`                             |
| `something` | Something-Something's json; `labels.json` lies beside it                                     |
| `ucf101`    | `trainlist01.txt`, `testlist01.txt`; `classInd.txt` lies beside them                         |
| `hmdb51`    | `*_test_split1.txt`, one a class: "name 1" is for training, 2 for test, 0 for neither        |

A relative path is relative to the root of the data.
"""

import csv
import json
import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from timm.utils import natural_key

from nat_models.data.video.decoding import FRAME_EXTENSIONS, SHARD_SEPARATOR, read_member, shard_samples

log = logging.getLogger(__name__)

FORMS = ("folder", "list", "frames", "shards", "kinetics", "something", "ucf101", "hmdb51")
VIDEO_EXTENSIONS = (".mp4", ".avi", ".mkv", ".webm", ".mov", ".m4v", ".mpg", ".mpeg", ".flv", ".ts", ".wmv", ".3gp")


@dataclass(frozen=True)
class LabelledVideo:
    """A video by its path (for shards `SHARD.tar/KEY`), its label, and its number of frames where the list tells it."""

    path: str
    label: int
    num_frames: int | None = None


@dataclass
class Annotations:
    """A list of videos, without those that are missing.

    Attributes:
        videos: in the order of the list, each once.
        classes: names in label order.
        form: of the list, as in the table above.
        missing: paths of the list that do not exist.
        duplicates: paths that the list holds more than once, with one label.
        holes: classes without a video.
        wrong_labels: path -> what is wrong with its label, where such are allowed.
    """

    videos: list[LabelledVideo]
    classes: list[str]
    form: str
    missing: list[str] = field(default_factory=list)
    duplicates: list[str] = field(default_factory=list)
    holes: list[str] = field(default_factory=list)
    wrong_labels: dict[str, str] = field(default_factory=dict)

    def problems(self) -> list[str]:
        """One line for each kind of problem."""
        found = [("videos are missing", self.missing), ("videos are listed more than once", self.duplicates)]
        found.append(("classes have no video", self.holes))
        return [
            f"{len(names)} {text}: {', '.join(names[:3])}{', ...' * (len(names) > 3)}" for text, names in found if names
        ]


def read_annotations(
    source: str | Path,
    root: str | Path | None = None,
    form: str | None = None,
    classes: Sequence[str] | None = None,
    training: bool = True,
    allow_wrong_labels: bool = False,
) -> Annotations:
    """Reads a list of videos.

    Args:
        source: file, folder (`folder`) or pattern of files (`hmdb51`, `shards`); relative to `root` where that exists.
        root: folder that relative paths of the list start from; None: the source's own folder.
        form: one of the table above; None: detected.
        classes: names in label order; None: what the list tells. In evaluation those of training.
        training: which part of an `hmdb51` split is wanted.
        allow_wrong_labels: leave out videos with a label that is not among the classes, or with two labels, instead of
            raising an error.

    Raises:
        FileNotFoundError: no such source.
        ValueError: unknown form, a line that does not fit it, a label that is not among the classes, a path with two
            labels, no videos at all.
    """
    path = Path(source) if root is None or not _exists(Path(root) / source) else Path(root) / source
    if not _exists(path):
        raise FileNotFoundError(f"there is no list of videos {str(source)!r}" + (f" in {root}" if root else ""))
    form = form or detect_form(path)
    if form not in FORMS:
        raise ValueError(f"data.annotation_form={form!r} is unknown; allowed are {', '.join(FORMS)}")
    folder = Path(root) if root is not None else (path if path.is_dir() else path.parent)
    rows, told = _READERS[form](path, folder, training)
    names = list(classes or told or _names([label for _, label, _ in rows]))
    numbers = {name: number for number, name in enumerate(names)}
    videos: dict[str, LabelledVideo] = {}
    found = Annotations([], names, form)
    for entry, label, num_frames in rows:
        number = _number(label, numbers)
        known = videos.get(entry)
        if number is None:
            found.wrong_labels[entry] = f"the label {label!r}, which is not among the {len(names)} classes"
        elif known is None:
            videos[entry] = LabelledVideo(entry, number, num_frames)
        elif known.label == number:
            found.duplicates.append(entry)
        else:
            found.wrong_labels[entry] = f"two labels, {names[known.label]!r} and {names[number]!r}"
    for entry, problem in found.wrong_labels.items():
        if not allow_wrong_labels:
            raise ValueError(f"{path} gives {entry} {problem}")
        videos.pop(entry, None)
    for video in videos.values():
        there = SHARD_SEPARATOR in video.path or Path(video.path).exists()
        (found.videos if there else found.missing).append(video if there else video.path)  # type: ignore[arg-type]
    counts = Counter(video.label for video in found.videos)
    found.holes = [name for number, name in enumerate(names) if not counts[number]]
    if not found.videos:
        raise ValueError(
            f"{path} ({form}) leads to no videos in {folder}" + "".join(f"; {p}" for p in found.problems()[:1])
        )
    for problem in found.problems():
        log.warning("%s: %s", path, problem)
    return found


def detect_form(path: Path) -> str:
    """The form of a list, from its name and its first line.

    Raises:
        ValueError: it looks like none of them.
    """
    if path.is_dir():
        return "folder"
    if path.suffix == ".tar":
        return "shards"
    if "_test_split" in path.name:
        return "hmdb51"
    if path.name.startswith(("trainlist", "testlist")):
        return "ucf101"
    if path.suffix == ".json":
        return "something"
    with open(path, encoding="utf-8") as file:
        first = next((line.strip() for line in file if line.strip()), "")
    if {"label", "youtube_id", "time_start"} <= set(first.split(",")):
        return "kinetics"
    words = _split(first)
    if len(words) == 2:
        return "list"
    if len(words) == 3 and words[1].isdigit():
        return "frames"
    raise ValueError(
        f"{path} looks like no known list of videos; name its form in data.annotation_form: {first[:80]!r}"
    )


Rows = tuple[list[tuple[str, str, int | None]], list[str] | None]  # (path, label, frames) of each video; class names


def _read_folder(path: Path, folder: Path, training: bool) -> Rows:
    rows: list[tuple[str, str, int | None]] = []
    for class_folder in sorted((p for p in path.iterdir() if p.is_dir()), key=lambda p: natural_key(p.name)):
        for file in sorted(class_folder.iterdir(), key=lambda p: natural_key(p.name)):
            is_frames = file.is_dir() and any(image.suffix.lower() in FRAME_EXTENSIONS for image in file.iterdir())
            if is_frames or file.suffix.lower() in VIDEO_EXTENSIONS:
                rows.append((str(file), class_folder.name, None))
    return rows, None


def _read_list(path: Path, folder: Path, training: bool) -> Rows:
    return [(_in(folder, words[0]), words[1], None) for words in _lines(path, 2)], None


def _read_frames(path: Path, folder: Path, training: bool) -> Rows:
    return [(_in(folder, words[0]), words[2], int(words[1])) for words in _lines(path, 3)], None


def _read_shards(path: Path, folder: Path, training: bool) -> Rows:
    rows: list[tuple[str, str, int | None]] = []
    for shard in _matches(path):
        for key, members in shard_samples(shard).items():
            if "cls" not in members:
                raise ValueError(f"sample {key} of {shard} has no label (a member {key}.cls)")
            rows.append((f"{shard}/{key}", read_member(shard, members["cls"]).decode().strip(), None))
    return rows, None


def _read_kinetics(path: Path, folder: Path, training: bool) -> Rows:
    with open(path, newline="", encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    rows: list[tuple[str, str, int | None]] = []
    for line in lines:
        start, end = int(float(line["time_start"])), int(float(line["time_end"]))
        stem = f"{line['youtube_id']}_{start:06d}_{end:06d}"
        parents = [folder / line.get("split", ""), folder]
        places = [parent / line["label"].replace(" ", gap) for parent in parents for gap in (" ", "_")] + parents
        files = (place / f"{stem}{extension}" for place in places for extension in (".mp4", ".mkv", ".webm"))
        rows.append(
            (str(next((file for file in files if file.is_file()), places[0] / f"{stem}.mp4")), line["label"], None)
        )
    return rows, sorted({line["label"] for line in lines})


def _read_something(path: Path, folder: Path, training: bool) -> Rows:
    entries = json.loads(path.read_text(encoding="utf-8"))
    labels_file = path.parent / "labels.json"
    if not labels_file.is_file():
        raise FileNotFoundError(f"{labels_file} is missing, which numbers the classes of {path.name}")
    numbers = json.loads(labels_file.read_text(encoding="utf-8"))
    rows: list[tuple[str, str, int | None]] = []
    for entry in entries:
        files = [folder / f"{entry['id']}{extension}" for extension in (".webm", ".mp4")]
        template = entry["template"].replace("[", "").replace("]", "")
        rows.append((str(next((file for file in files if file.is_file()), files[0])), template, None))
    return rows, sorted(numbers, key=lambda name: int(numbers[name]))


def _read_ucf101(path: Path, folder: Path, training: bool) -> Rows:
    index = path.parent / "classInd.txt"
    if not index.is_file():
        raise FileNotFoundError(f"{index} is missing, which numbers the classes of {path.name}")
    names = [words[1] for words in sorted(_lines(index, 2), key=lambda words: int(words[0]))]
    with open(path, encoding="utf-8") as file:
        entries = [line.split()[0] for line in file if line.strip()]
    return [(_in(folder, entry), entry.partition("/")[0], None) for entry in entries], names


def _read_hmdb51(path: Path, folder: Path, training: bool) -> Rows:
    rows: list[tuple[str, str, int | None]] = []
    names = []
    for file in _matches(path):
        name = file.name.partition("_test_split")[0]
        names.append(name)
        chosen = [words[0] for words in _lines(file, 2) if words[1] == ("1" if training else "2")]
        rows += [(str(folder / name / entry), name, None) for entry in chosen]
    return rows, names


_READERS = {
    "folder": _read_folder,
    "list": _read_list,
    "frames": _read_frames,
    "shards": _read_shards,
    "kinetics": _read_kinetics,
    "something": _read_something,
    "ucf101": _read_ucf101,
    "hmdb51": _read_hmdb51,
}


def _matches(pattern: Path) -> list[Path]:
    return sorted(pattern.parent.glob(pattern.name))


def _exists(path: Path) -> bool:
    return path.exists() or ("*" in path.name and bool(_matches(path)))


def _in(folder: Path, entry: str) -> str:
    return str(folder / entry)  # an absolute path stays what it is


def _split(line: str) -> list[str]:
    """The words of a line; a path may hold spaces, since what follows it is taken from the end."""
    for separator in ("\t", ","):
        if separator in line:
            return [word.strip() for word in line.split(separator)]
    words = line.rsplit(maxsplit=2)
    return words if len(words) == 3 and words[1].isdigit() else line.rsplit(maxsplit=1)


def _lines(path: Path, num_words: int) -> list[list[str]]:
    lines = []
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            words = _split(line.strip())
            if len(words) == 3 and num_words == 2:  # a path that ends in a number
                words = line.strip().rsplit(maxsplit=1)
            if len(words) != num_words:
                raise ValueError(f"{path}, line {number}: expected {num_words} values, got {line.strip()[:80]!r}")
            lines.append(words)
    return lines


def _names(labels: list[str]) -> list[str]:
    """Class names in label order: numbers up to the largest, else the names in natural order."""
    if all(label.isdigit() for label in labels):
        return [str(number) for number in range(max(map(int, labels), default=-1) + 1)]
    return sorted(set(labels), key=natural_key)


def _number(label: str, numbers: dict[str, int]) -> int | None:
    if label.isdigit() and label not in numbers and int(label) < len(numbers):
        return int(label)
    return numbers.get(label)
