"""Packs images into tar shards to train from: `python -m nat_models.shards SOURCE OUT`.

SOURCE is a folder with SPLIT/CLASS/IMAGE, or a name of timm's datasets (`torch/cifar10`, `hfds/USER/NAME`, ...). Train
with `data=shards data.root=OUT`. Files are copied as they are after a trial decoding, larger ones than `--short-side`
as JPEG; images that never were files are written as PNG. Shards are written in parallel, each under another name until
it is complete, so a run that was stopped goes on where it was when it is started again, and gives the same bytes.
"""

import argparse
import hashlib
import io
import json
import os
import re
import sys
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from rich.console import Console
from rich.progress import track
from torch.utils.data import DataLoader, Dataset

from nat_models.claim import claim_folder
from nat_models.data.datasets import DECODE_ERRORS, UndecodableImageError, class_names, create_source, is_streamed
from nat_models.data.shards import HEADER, read_index

EXTENSIONS = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}


class ShardWriter(Dataset):
    """Item `i` writes shard `i` of a split, unless it is there, and is its record.

    Args:
        source: of `create_source`.
        out: folder of the shards.
        split: their name.
        images_per_shard: the last one may hold fewer.
        short_side: larger images are reduced to it, in pixels; None keeps all as they are.
        quality: of the JPEG files of reduced images.
        skip_undecodable: leave out images that cannot be decoded, and record them; else they are errors.

    Raises:
        UndecodableImageError: on access, see `skip_undecodable`.
    """

    def __init__(
        self,
        source: Any,
        out: Path,
        split: str,
        images_per_shard: int,
        short_side: int | None,
        quality: int,
        skip_undecodable: bool,
    ) -> None:
        self.source = source
        self.out, self.split = out, split
        self.images_per_shard = images_per_shard
        self.short_side, self.quality = short_side, quality
        self.skip_undecodable = skip_undecodable
        self.parts = out / f".{split}.parts"

    def __len__(self) -> int:
        return -(-len(self.source) // self.images_per_shard)

    def __getitem__(self, number: int) -> dict[str, Any]:
        path = self.out / f"{self.split}-{number:06d}.tar"
        part = self.parts / f"{number:06d}.json"
        if part.exists() and path.exists():
            record = json.loads(part.read_text(encoding="utf-8"))
            if path.stat().st_size == record["bytes"]:
                return record
        partial = path.with_suffix(".tar.partial")
        positions, skipped = [], []
        with tarfile.open(partial, "w", format=tarfile.USTAR_FORMAT) as tar:
            start = number * self.images_per_shard
            for index in range(start, min(start + self.images_per_shard, len(self.source))):
                try:
                    content, extension, label = self._image(index)
                except DECODE_ERRORS as error:
                    if not self.skip_undecodable:
                        raise UndecodableImageError(f"cannot decode {self._name(index)}: {error}") from None
                    skipped.append(self._name(index))
                    continue
                key = f"{index:08d}{_key_suffix(self._name(index))}"
                positions.append([number, tar.offset + HEADER, len(content), label])
                _add(tar, f"{key}.{extension}", content)
                _add(tar, f"{key}.cls", str(label).encode())
        with open(partial, "rb") as file:
            os.fsync(file.fileno())
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        os.replace(partial, path)
        record = {"file": path.name, "images": len(positions), "bytes": path.stat().st_size, "sha256": sha256}
        record |= {"positions": positions, "skipped": skipped}
        _write(part, json.dumps(record).encode())
        return record

    def _image(self, index: int) -> tuple[bytes, str, int]:
        """Encoded image, its extension, its label."""
        if hasattr(self.source, "reader"):
            file, label = self.source.reader[index]
            with file:
                content = file.read()
            image: Image.Image = Image.open(io.BytesIO(content))
            image.load()
            if image.format in EXTENSIONS and not self._is_large(image):
                return content, EXTENSIONS[image.format], int(label)
        else:
            image, label = self.source[index]
        encoded = io.BytesIO()
        if self.short_side is not None and self._is_large(image):
            factor = self.short_side / min(image.size)
            size = (round(image.width * factor), round(image.height * factor))
            reduced = image.convert("L" if image.mode == "L" else "RGB").resize(size, Image.Resampling.BICUBIC)
            reduced.save(encoded, "JPEG", quality=self.quality)
            return encoded.getvalue(), "jpg", int(label)
        image.save(encoded, "PNG")
        return encoded.getvalue(), "png", int(label)

    def _is_large(self, image: Image.Image) -> bool:
        return self.short_side is not None and min(image.size) > self.short_side

    def _name(self, index: int) -> str:
        return self.source.filename(index) if hasattr(self.source, "reader") else f"image {index}"


def write_split(writer: ShardWriter, classes: list[str], settings: dict[str, Any], workers: int) -> dict[str, Any]:
    """Writes the shards of a split in `workers` processes (0: in this one), then its index, which is returned.

    Raises:
        ValueError: a stopped run with other settings left its shards.
        UndecodableImageError: see `ShardWriter`.
    """
    writer.parts.mkdir(parents=True, exist_ok=True)
    settings_file = writer.parts / "settings.json"
    if settings_file.exists() and (found := json.loads(settings_file.read_text())) != settings:
        raise ValueError(
            f"{writer.out} holds unfinished shards of {writer.split!r} that were made with {found}, not {settings}; "
            f"give the same again, or remove {writer.parts}"
        )
    _write(settings_file, json.dumps(settings).encode())
    loader = DataLoader(writer, batch_size=None, num_workers=min(workers, len(writer)))
    console = Console(stderr=True)
    records = list(track(loader, f"Writing {writer.split}", len(writer), console=console))
    positions = np.array([row for record in records for row in record.pop("positions")], np.int64).reshape(-1, 4)
    skipped = [name for record in records for name in record.pop("skipped")]
    encoded = io.BytesIO()
    np.save(encoded, positions)
    content = encoded.getvalue()
    table: dict[str, Any] = {"file": f"{writer.split}.npy", "bytes": len(content)}
    table["sha256"] = hashlib.sha256(content).hexdigest()
    index = {"images": len(positions), "classes": classes, "skipped": skipped, **settings}
    index |= {"positions": table, "shards": records}
    _write(writer.out / table["file"], content)
    _write(writer.out / f"{writer.split}.json", json.dumps(index, indent=1).encode())
    for path in writer.parts.iterdir():
        path.unlink()
    writer.parts.rmdir()
    return index


def damaged_files(out: str, split: str) -> list[str]:
    """Files of a split that are missing or whose sha256 is not that of the index: shards, and positions with labels."""
    damaged = []
    index = read_index(out, split)
    for record in track([*index["shards"], index["positions"]], f"Checking {split}", console=Console(stderr=True)):
        path = Path(out) / record["file"]
        if not path.is_file():
            damaged.append(str(path))
            continue
        with open(path, "rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != record["sha256"]:
                damaged.append(str(path))
    return damaged


def _key_suffix(name: str) -> str:
    """What of a file's name goes into its key in the shard; webdataset ends keys at the first dot."""
    stem = os.path.splitext(name)[0]
    return "" if stem.startswith("image ") else "-" + re.sub(r"[^\w/-]", "_", stem, flags=re.ASCII)[-80:]


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


def _write(path: Path, content: bytes) -> None:
    """Writes a file whole or not at all."""
    partial = path.with_name(path.name + ".partial")
    with open(partial, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    parser = argparse.ArgumentParser(prog="python -m nat_models.shards", description=(__doc__ or "").split("\n\n")[1])
    parser.add_argument("source", help="folder with SPLIT/CLASS/IMAGE, or a name of timm's datasets")
    parser.add_argument("out", help="folder of the shards")
    parser.add_argument("--root", help="folder of a timm dataset")
    parser.add_argument("--splits", nargs="+", default=["train", "val"], help="the first one's classes hold for all")
    parser.add_argument("--images-per-shard", type=int, default=4096, help="default: %(default)s")
    parser.add_argument("--short-side", type=int, help="reduce larger images to it, in pixels (default: keep all)")
    parser.add_argument("--quality", type=int, default=90, help="of reduced images' JPEG (default: %(default)s)")
    parser.add_argument("--skip-undecodable", action="store_true", help="leave such images out, and list them")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes (default: one a core)")
    parser.add_argument("--check", action="store_true", help="compare the checksums of finished shards instead")
    options = parser.parse_args(arguments)
    for name, least in (("images_per_shard", 1), ("short_side", 1), ("quality", 1), ("workers", 0)):
        if (value := getattr(options, name)) is not None and value < least:
            parser.error(f"--{name.replace('_', '-')} must be at least {least}, got {value}")
    try:
        if options.check:
            return _check(options.out, options.splits)
        _write_all(options)
    except (ValueError, OSError) as error:
        # An error from a worker process carries that process's traceback; its last line is the message.
        lines = [line for line in str(error).splitlines() if line.strip()]
        parser.error(lines[-1].removeprefix(f"{type(error).__module__}.{type(error).__qualname__}: "))
    return 0


def _write_all(options: argparse.Namespace) -> None:
    if is_streamed(options.source):
        raise ValueError(f"{options.source!r} is a stream already, whose length and order nobody knows")
    is_folder = Path(options.source).is_dir()
    name, root = ("folder", options.source) if is_folder else (options.source, options.root)
    settings = {"source": options.source, "images_per_shard": options.images_per_shard}
    settings |= {"short_side": options.short_side, "quality": options.quality}
    out, classes = Path(options.out), None
    for split in options.splits:
        source = create_source(name, root, split, classes)
        classes = classes or class_names(source)
        if classes is None:
            raise ValueError(f"{options.source!r} does not tell its classes")
        settings["source_images"] = len(source)
        if is_folder:  # others tell names only with their images
            names = "\n".join(source.filenames())
            settings["source_names"] = hashlib.sha256(names.encode("utf-8", "surrogateescape")).hexdigest()
        if (out / f"{split}.json").exists():
            found = read_index(options.out, split)
            if {key: found.get(key) for key in settings} != settings or found["classes"] != classes:
                raise ValueError(f"{out} holds shards of {split!r} that were made otherwise; remove them first")
            print(f"{split}: complete")
            continue
        claim_folder(out, "out")  # two commands would write into each other's files
        writer = ShardWriter(
            source, out, split, options.images_per_shard, options.short_side, options.quality, options.skip_undecodable
        )
        index = write_split(writer, classes, settings, options.workers)
        size = sum(shard["bytes"] for shard in index["shards"])
        print(f"{split}: {index['images']} images in {len(index['shards'])} shards, {size / 1e9:.2f} GB")
        for skipped in index["skipped"]:
            print(f"left out, cannot be decoded: {skipped}")


def _check(out: str, splits: Sequence[str]) -> int:
    damaged = [path for split in splits for path in damaged_files(out, split)]
    for path in damaged:
        print(f"damaged: {path}")
    if not damaged:
        print("all shards, positions and labels are as they were written")
    return 1 if damaged else 0


if __name__ == "__main__":
    sys.exit(main())
