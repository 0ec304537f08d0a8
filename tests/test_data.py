"""Datasets and the data module: splits, labels, transforms, undecodable images, and errors before any work."""

import struct
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits
from training_runs import CLASSES, write_image, write_image_folder

from nat_models.data import ImageDataModule, UndecodableImageError, create_source
from nat_models.data.datasets import DigitsDataset

SETTINGS = {"batch_size": 4, "img_size": 32}


def folder_module(root: Path, **settings) -> ImageDataModule:
    return ImageDataModule("folder", str(root), val_split="val", **(SETTINGS | settings))


def test_digits_split_is_stratified_fixed_and_complete():
    train, val = DigitsDataset("train"), DigitsDataset("validation")
    assert (len(train), len(val)) == (1437, 360)
    pixels, targets = load_digits(return_X_y=True)
    share = {label: count / 1797 for label, count in Counter(targets.tolist()).items()}
    for label, count in Counter(val.targets.tolist()).items():
        assert abs(count - 360 * share[label]) < 1
    together = np.concatenate([train.images, val.images]).reshape(1797, 64)
    expected = np.round(pixels * 255 / 16).astype(np.uint8)
    assert np.array_equal(np.unique(together, axis=0), np.unique(expected, axis=0))
    assert np.array_equal(DigitsDataset("validation").images, val.images)


def test_digits_batches():
    data = ImageDataModule("digits", img_size=32, in_chans=1, mean=[0.3], std=[0.4], crop_pct=1.0, batch_size=8)
    data.setup("fit")
    batch = next(iter(data.val_dataloader()))
    assert batch[0].dtype == torch.uint8
    images, labels = data.on_after_batch_transfer(batch, 0)
    assert images.shape == (8, 1, 32, 32) and images.dtype == torch.float32
    assert labels.dtype == torch.int64 and data.classes == [str(digit) for digit in range(10)]
    small, label = data.val_dataset.source[0]
    expected = np.asarray(small.resize((32, 32), Image.Resampling.BICUBIC), dtype=np.float32) / 255
    torch.testing.assert_close(images[0, 0], torch.from_numpy((expected - 0.3) / 0.4))
    assert labels[0] == label


def test_folder_labels_follow_the_natural_order_in_both_splits(tmp_path):
    write_image_folder(tmp_path)
    for file in (tmp_path / "val" / "class_1").iterdir():
        file.unlink()
    (tmp_path / "val" / "class_1").rmdir()  # without it, labels numbered per split would be off by one
    data = folder_module(tmp_path)
    data.setup("fit")
    assert data.classes == CLASSES
    for dataset, first in ((data.train_dataset, 0), (data.val_dataset, 1)):
        labels = {Path(dataset.path(i)).parent.name: dataset[i][1] for i in range(len(dataset))}
        assert labels == {name: label for label, name in enumerate(CLASSES) if label >= first}


def test_folder_evaluation_needs_no_training_split(tmp_path):
    write_image_folder(tmp_path)
    (tmp_path / "train").rename(tmp_path / "elsewhere")
    data = folder_module(tmp_path)
    data.classes = ["class_0", *CLASSES]
    data.setup("validate")
    assert [int(label) for _, labels in data.val_dataloader() for label in labels] == [1, 1, 2, 2, 3, 3]


def test_timm_and_torchvision_names(tmp_path):
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    digits, targets = load_digits(return_X_y=True)
    for prefix, count in (("train", 20), ("t10k", 10)):
        images = np.zeros((count, 28, 28), dtype=np.uint8)
        images[:, 10:18, 10:18] = digits[:count].reshape(-1, 8, 8) * 15
        labels = targets[:count].astype(np.uint8)
        image_file = struct.pack(">4i", 0x803, count, 28, 28) + images.tobytes()
        label_file = struct.pack(">2i", 0x801, count) + labels.tobytes()
        (raw / f"{prefix}-images-idx3-ubyte").write_bytes(image_file)
        (raw / f"{prefix}-labels-idx1-ubyte").write_bytes(label_file)
    data = ImageDataModule("torch/mnist", str(tmp_path), **SETTINGS)
    data.setup("fit")
    assert (len(data.train_dataset), len(data.val_dataset), len(data.classes)) == (20, 10, 10)
    images, labels = next(iter(data.val_dataloader()))
    assert images.shape == (4, 3, 32, 32) and labels.tolist() == targets[:4].tolist()


def test_webdataset_shards(tmp_path):
    wds = pytest.importorskip("webdataset")
    for split, count in (("train", 12), ("val", 6)):
        with wds.TarWriter(str(tmp_path / f"{split}-0.tar")) as shard:
            for index in range(count):
                write_image(tmp_path / "image.jpg", index)
                content = (tmp_path / "image.jpg").read_bytes()
                shard.write({"__key__": f"{index:04d}", "jpg": content, "cls": str(index % 3)})
    splits = {"train_split": "train-0.tar|12", "val_split": "val-0.tar|6", "num_classes": 3}
    data = ImageDataModule("wds/shards", str(tmp_path), **SETTINGS, **splits)
    data.setup("fit")
    assert sum(len(labels) for _, labels in data.train_dataloader()) == 12
    assert [int(label) for _, labels in data.val_dataloader() for label in labels] == [0, 1, 2, 0, 1, 2]


@pytest.mark.parametrize("auto_augment", ["rand-m0-mstd0-inc0", "rand-m10-mstd0-inc0", "rand-m10-mstd0-inc1"])
@pytest.mark.parametrize("in_chans", [1, 3])
def test_randaugment_at_both_ends_of_its_range(auto_augment, in_chans):
    data = ImageDataModule("fake", img_size=16, in_chans=in_chans, augmentation={"auto_augment": auto_augment})
    data.setup("fit")
    assert all(data.train_dataset[index % 8][0].shape == (in_chans, 16, 16) for index in range(300))


@pytest.fixture
def damaged_folder(tmp_path):
    """A folder whose first training and first validation image of `class_1` cannot be decoded."""
    write_image_folder(tmp_path, train_per_class=4)
    content = (tmp_path / "train" / "class_1" / "0.jpg").read_bytes()
    (tmp_path / "train" / "class_1" / "0.jpg").write_bytes(content[: len(content) // 2])
    (tmp_path / "val" / "class_1" / "0.jpg").write_text("not an image")
    return tmp_path


@pytest.mark.parametrize("num_workers", [0, 2])
def test_undecodable_training_image_is_replaced_and_listed(damaged_folder, num_workers):
    listed = damaged_folder / "undecodable.txt"
    data = folder_module(damaged_folder, num_workers=num_workers, undecodable_list=str(listed))
    data.setup("fit")
    labels = Counter(int(label) for _, labels in data.train_dataloader() for label in labels)
    assert labels == {0: 4, 1: 4, 2: 4}  # its place is taken by an image of the same class
    assert data.undecodable_paths() == [str(damaged_folder / "train" / "class_1" / "0.jpg")]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_undecodable_validation_image_is_an_error_with_its_path(damaged_folder, num_workers):
    data = folder_module(damaged_folder, num_workers=num_workers)
    data.setup("fit")
    with pytest.raises(UndecodableImageError, match="val/class_1/0.jpg"):
        list(data.val_dataloader())
    assert data.undecodable_paths() == []


def test_replacement_gives_up(tmp_path):
    write_image_folder(tmp_path)
    for file in (tmp_path / "train").rglob("*.jpg"):
        file.write_bytes(b"")
    data = folder_module(tmp_path)
    data.setup("fit")
    with pytest.raises(UndecodableImageError, match="in a row"):
        data.train_dataset[0]


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("img_size", "32"),
        ("img_size", 32.0),
        ("img_size", 0),
        ("img_size", [3, 32, 32]),
        ("batch_size", 0),
        ("batch_size", -4),
        ("batch_size", 2.5),
        ("eval_batch_size", 0),
        ("num_workers", -1),
        ("in_chans", 4),
        ("mean", [0.5]),
    ],
)
def test_bad_settings_are_named(setting, value):
    with pytest.raises(ValueError, match=rf"data\.{setting}.*{str(value)[:4].strip('[')}"):
        ImageDataModule("digits", **(SETTINGS | {setting: value}))


def test_missing_folders(tmp_path):
    with pytest.raises(ValueError, match="data.root must be set"):
        create_source("folder")
    with pytest.raises(FileNotFoundError, match="data.root='/does/not/exist'"):
        create_source("folder", "/does/not/exist")
    write_image_folder(tmp_path)
    with pytest.raises(FileNotFoundError, match="no sub-folder 'validation'; its sub-folders: train, val"):
        create_source("folder", str(tmp_path), "validation")


def test_folder_layouts_that_would_give_wrong_labels(tmp_path):
    write_image_folder(tmp_path)
    (tmp_path / "train" / "class_3").mkdir()
    with pytest.raises(ValueError, match="class_3 holds no images"):
        create_source("folder", str(tmp_path))
    write_image(tmp_path / "train" / "class_3" / "images" / "0.jpg", 0)
    with pytest.raises(ValueError, match="class_3 holds no images"):
        create_source("folder", str(tmp_path))
    write_image(tmp_path / "train" / "class_3" / "0.jpg", 0)
    create_source("folder", str(tmp_path))
    write_image(tmp_path / "train" / "stray.jpg", 0)
    with pytest.raises(ValueError, match="stray.jpg lies outside a class folder"):
        create_source("folder", str(tmp_path))
    write_image(tmp_path / "val" / "class_4" / "0.jpg", 0)
    with pytest.raises(ValueError, match="class_4 is not among the 3 classes"):
        create_source("folder", str(tmp_path), "val", CLASSES)


@pytest.mark.parametrize("name", ["imagenet", "torch/unknown", "torch", "zip/cifar10"])
def test_unknown_names(name):
    with pytest.raises(ValueError, match=f"data.name='{name}'"):
        create_source(name, "/tmp")


def test_number_of_classes_must_agree(tmp_path):
    data = ImageDataModule("digits", num_classes=5, in_chans=1)
    with pytest.raises(ValueError, match="data.num_classes=5, but the dataset has 10 classes"):
        data.setup("fit")


def test_batch_larger_than_the_training_split(tmp_path):
    data = folder_module(write_image_folder(tmp_path), batch_size=64)
    with pytest.raises(ValueError, match="data.batch_size=64 exceeds the 12 training images"):
        data.setup("fit")
