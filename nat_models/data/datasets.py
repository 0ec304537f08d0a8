"""Where images come from: folders, every dataset name timm knows, scikit-learn's digits, random images.

A *source* is a map-style dataset of undecoded or PIL images with integer labels; `DecodedImages` decodes and transforms
it. Streamed sources (`wds/`, `tfds/`, `hfids/`) are timm's `IterableImageDataset`, which decode on their own.
"""

import logging
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from timm.data import ImageDataset, create_dataset, get_img_extensions
from timm.utils import natural_key
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.datasets import FakeData  # type: ignore[import-untyped]

from nat_models.data.shards import ShardReader

log = logging.getLogger(__name__)

TIMM_PREFIXES = ("torch", "hfds", "hfids", "tfds", "wds")
STREAMED_PREFIXES = ("hfids", "tfds", "wds")
DECODE_ERRORS = (OSError, EOFError, SyntaxError, ValueError, struct.error, Image.DecompressionBombError)
MAX_CONSECUTIVE_FAILURES = 100


class UndecodableImageError(ValueError):
    """An image that cannot be read where none may be replaced, or too many in a row; the message names the file."""


class DigitsDataset(Dataset):
    """scikit-learn's 1,797 handwritten digits (UCI optdigits), PIL images of 8 x 8 grey pixels in 10 classes.

    `split="validation"` is a fifth of them (360), stratified by class and always the same; any other split the rest.
    """

    classes = [str(digit) for digit in range(10)]

    def __init__(self, split: str) -> None:
        from sklearn.datasets import load_digits  # type: ignore[import-untyped]
        from sklearn.model_selection import train_test_split  # type: ignore[import-untyped]

        pixels, targets = load_digits(return_X_y=True)
        images = np.round(pixels.reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
        train, validation = train_test_split(np.arange(len(targets)), test_size=0.2, stratify=targets, random_state=0)
        indices = validation if split == "validation" else train
        self.images, self.targets = images[indices], targets[indices]

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return Image.fromarray(self.images[index]), int(self.targets[index])


class DecodedImages(Dataset):
    """Decodes and transforms the images of a map-style source.

    Args:
        source: dataset with `(PIL image, label)` items, or timm's `ImageDataset`, whose reader gives opened files. Its
            own decoding is not used, because it replaces undecodable images in evaluation too.
        transform: PIL image -> `[C, H, W]`.
        mode: PIL mode the images are converted to, `"RGB"` or `"L"`.
        replace_undecodable: if True, the next decodable image takes the place of one that cannot be decoded (in a
            folder mostly of the same class; always with its own label), and the path is reported; else it is an error.
        undecodable_list: file to which the paths of undecodable images are appended, one a line. Worker processes
            append to the same file; a path may appear once for each.

    Raises:
        UndecodableImageError: on access, see `replace_undecodable`; always after 100 undecodable images in a row.
    """

    def __init__(
        self,
        source: Any,
        transform: Callable[[Image.Image], Tensor],
        mode: str,
        replace_undecodable: bool,
        undecodable_list: Path | None = None,
    ) -> None:
        self.source = source
        self.transform = transform
        self.mode = mode
        self.replace_undecodable = replace_undecodable
        self.undecodable_list = undecodable_list
        self._reported: set[int] = set()

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        for attempt in range(MAX_CONSECUTIVE_FAILURES):
            candidate = (index + attempt) % len(self)
            try:
                image, target = self._decode(candidate)
            except DECODE_ERRORS as error:
                if not self.replace_undecodable:
                    raise UndecodableImageError(f"cannot decode {self.path(candidate)}: {error}") from error
                self._report(candidate, error)
            else:
                return self.transform(image), target
        raise UndecodableImageError(
            f"{MAX_CONSECUTIVE_FAILURES} images in a row cannot be decoded, the first is {self.path(index)}"
        )

    def path(self, index: int) -> str:
        """The file of an image, or its index where the source has no files."""
        if hasattr(self.source, "reader"):
            return self.source.filename(index, absolute=True) or f"image {index}"
        samples = getattr(self.source, "samples", None)
        return str(samples[index][0]) if samples else f"image {index}"

    def _decode(self, index: int) -> tuple[Image.Image, int]:
        if not hasattr(self.source, "reader"):
            image, target = self.source[index]
            return image.convert(self.mode), int(target)
        file, target = self.source.reader[index]
        with file:
            return Image.open(file).convert(self.mode), int(target)

    def _report(self, index: int, error: Exception) -> None:
        if index in self._reported:
            return
        self._reported.add(index)
        log.warning("undecodable image %s replaced by the next one: %s", self.path(index), error)
        if self.undecodable_list is not None:
            with open(self.undecodable_list, "a", encoding="utf-8") as file:
                file.write(f"{self.path(index)}\n")


def is_streamed(name: str) -> bool:
    """Whether a dataset name is read as a stream, without random access."""
    return name.partition("/")[0].lower() in STREAMED_PREFIXES


def create_source(
    name: str,
    root: str | None = None,
    split: str = "train",
    classes: list[str] | None = None,
    num_classes: int | None = None,
    **timm_kwargs: Any,
) -> Any:
    """One split of a dataset.

    Args:
        name: `folder` (`root/split/class/*.jpg`), `shards` (written by `nat_models.shards`), `digits`, `fake`, or a
            name of `timm.data.create_dataset`: `torch/cifar10`, `hfds/user/name`, `wds/...`, ...
        root: folder of the dataset; `digits` and `fake` need none.
        split: for `folder` the sub-folder, for timm's names what timm makes of it.
        classes: for `folder`: class names in label order, so that all splits agree; None or empty takes the folders.
        num_classes: for `fake`.
        **timm_kwargs: handed to `timm.data.create_dataset` for timm's names.

    Raises:
        ValueError, FileNotFoundError: unknown name, missing folder, empty class folder, class folder that is not in
            `classes`, or what timm reports.
    """
    prefix = name.partition("/")[0].lower()
    if name == "digits":
        return DigitsDataset(split)
    if name == "fake":
        size, offset = (128, 1_000_000) if split == "validation" else (512, 0)
        return FakeData(size, image_size=(3, 64, 64), num_classes=num_classes or 10, random_offset=offset)
    if name == "folder":
        folder, class_map = _scan_class_folders(root, split, classes)
        return create_dataset("", root=str(folder), search_split=False, class_map=class_map)
    if name == "shards":
        reader = ShardReader(root, split)
        if classes and classes != (found := list(reader.class_to_idx)):
            raise ValueError(f"the shards of {split!r} have the classes {found[:3]}..., not {classes[:3]}...")
        return ImageDataset(root, reader=reader)
    if prefix not in TIMM_PREFIXES or prefix == name:
        prefixes = ", ".join(f"{p}/..." for p in TIMM_PREFIXES)
        raise ValueError(f"data.name={name!r} is unknown; allowed are folder, shards, digits, fake, {prefixes}")
    try:
        return create_dataset(name, root=root, split=split, **timm_kwargs)
    except (AssertionError, RuntimeError, ImportError, OSError, TypeError) as error:
        raise ValueError(f"data.name={name!r}, data.root={root!r}, split {split!r}: {error}") from error


def class_names(source: Any) -> list[str] | None:
    """Class names in label order, or None where the source does not know them."""
    class_to_idx = getattr(getattr(source, "reader", None), "class_to_idx", None)
    if class_to_idx:
        return sorted(class_to_idx, key=class_to_idx.__getitem__)
    classes = getattr(source, "classes", None)
    if classes is None and isinstance(source, FakeData):
        classes = range(source.num_classes)
    return None if classes is None else [str(name) for name in classes]


def _scan_class_folders(root: str | None, split: str, classes: list[str] | None) -> tuple[Path, dict[str, int]]:
    """`root/split` and the label of each of its class folders, in timm's (natural) order."""
    if root is None:
        raise ValueError("data.root must be set to the folder that holds the images")
    if not Path(root).is_dir():
        raise FileNotFoundError(f"data.root={root!r} is not a folder")
    folder = Path(root) / split
    if not folder.is_dir():
        found = ", ".join(sorted(path.name for path in Path(root).iterdir() if path.is_dir())[:10]) or "none"
        raise FileNotFoundError(f"data.root={root!r} has no sub-folder {split!r}; its sub-folders: {found}")
    extensions = get_img_extensions(as_set=True)
    class_folders = []
    for path in folder.iterdir():
        if path.is_dir():
            class_folders.append(path)
        elif path.suffix.lower() in extensions:
            raise ValueError(f"{path} lies outside a class folder; images belong in {folder}/CLASS/")
    if not class_folders:
        raise ValueError(f"{folder} has no class folders")
    for path in class_folders:
        if not any(file.suffix.lower() in extensions for file in path.iterdir()):
            raise ValueError(f"class folder {path} holds no images ({', '.join(sorted(extensions))})")
        if classes and path.name not in classes:
            raise ValueError(f"class folder {path} is not among the {len(classes)} classes of the training split")
    names = classes or sorted((path.name for path in class_folders), key=natural_key)
    if len(class_folders) < len(names):
        log.warning("%s has only %d of the %d classes", folder, len(class_folders), len(names))
    return folder, {name: label for label, name in enumerate(names)}


def read_undecodable(path: Path | None) -> list[str]:
    """The files that an `undecodable_list` names, each once; none where there is no such list."""
    return sorted(set(path.read_text(encoding="utf-8").splitlines())) if path is not None and path.exists() else []
