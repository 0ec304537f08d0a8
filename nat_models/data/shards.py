"""Images in a few large tar files, any of which is read by its position.

`python -m nat_models.shards` writes them. Every split has `SPLIT-000000.tar`, ..., an index `SPLIT.json` (class names,
number of images, size and sha256 of each file) and `SPLIT.npy`, each image's position and label. The tar files are
webdataset shards as well (`KEY.jpg` and `KEY.cls`), so others can stream them; here they are read at random, and with
that an epoch's order, its length and its division among processes are those of any other dataset.
"""

import io
import json
import os
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from timm.data.readers.reader import Reader

SHARD, OFFSET, SIZE, LABEL = range(4)  # columns of the positions
HEADER = 512  # bytes of a file's header in a tar, which stands right before it


class ShardReader(Reader):
    """Opened images and their labels, for timm's `ImageDataset`.

    Args:
        root: folder of the shards.
        split: name of the split.

    Raises:
        ValueError: no `root`, or a file has another size than the index says.
        FileNotFoundError: there is no such folder, index or file.
    """

    def __init__(self, root: str | None, split: str) -> None:
        super().__init__()
        index = read_index(root, split)
        records = [*index["shards"], index["positions"]]
        paths = [Path(root or "") / record["file"] for record in records]
        for path, record in zip(paths, records, strict=True):
            if not path.is_file():
                raise FileNotFoundError(f"{path}, of the shards of data.root={root!r}, is missing")
            if path.stat().st_size != record["bytes"]:
                raise ValueError(f"{path} has {path.stat().st_size} bytes, but its index says {record['bytes']}")
        self.class_to_idx = {name: label for label, name in enumerate(index["classes"])}
        *self.paths, positions = paths
        self.positions = np.load(positions, mmap_mode="r")

    def __len__(self) -> int:
        return len(self.positions)

    def __getitem__(self, index: int) -> tuple[BinaryIO, int]:
        shard, offset, size, label = self.positions[index].tolist()
        return io.BytesIO(_read(self.paths[shard], offset, size)), label

    def _filename(self, index: int, basename: bool = False, absolute: bool = False) -> str:
        shard, offset, *_ = self.positions[index].tolist()
        path = self.paths[shard]
        member = _read(path, offset - HEADER, 100).rstrip(b"\0").decode()
        return os.path.basename(member) if basename else f"{path if absolute else path.name}/{member}"


def read_index(root: str | None, split: str) -> dict[str, Any]:
    """The index of a split's shards.

    Raises:
        ValueError: no `root`.
        FileNotFoundError: there is no such folder or index.
    """
    if root is None:
        raise ValueError("data.root must be set to the folder that holds the shards")
    if not Path(root).is_dir():
        raise FileNotFoundError(f"data.root={root!r} is not a folder")
    path = Path(root) / f"{split}.json"
    if not path.is_file():
        found = ", ".join(sorted(file.stem for file in Path(root).glob("*.json"))) or "none"
        raise FileNotFoundError(
            f"data.root={root!r} holds no complete shards of {split!r}; its splits: {found}. "
            "python -m nat_models.shards writes them, or goes on where it was stopped"
        )
    return json.loads(path.read_text(encoding="utf-8"))


@lru_cache(maxsize=512)
def _opened(path: Path) -> BinaryIO:
    return open(path, "rb", buffering=0)


def _read(path: Path, offset: int, size: int) -> bytes:
    """Reads without moving the file's position, which processes that were forked share."""
    return os.pread(_opened(path).fileno(), size, offset)
