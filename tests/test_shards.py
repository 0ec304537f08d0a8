"""`python -m nat_models.shards`: the images and labels of the folder, resumable, checksummed, readable by others."""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from training_runs import CLASSES, compose_train, train, write_image, write_image_folder

from nat_models.claim import claim_folder
from nat_models.data import ImageDataModule, UndecodableImageError, create_source
from nat_models.data.datasets import class_names
from nat_models.shards import ShardWriter
from nat_models.shards import main as shards

SETTINGS = {"val_split": "val", "batch_size": 4, "img_size": 32}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Twelve training and six validation images of three classes, one of them a PNG file, one in grey."""
    root = write_image_folder(tmp_path_factory.mktemp("images"))
    write_image(root / "train" / "class_10" / "a name.with dots and ü.png", 77)
    Image.fromarray(np.arange(40 * 48, dtype=np.uint8).reshape(40, 48)).save(root / "train" / "class_2" / "grey.jpg")
    return root


def pack(folder: Path, out: Path, *options: str, status: int = 0) -> Path:
    assert shards([str(folder), str(out), "--images-per-shard", "4", "--workers", "0", *options]) == status
    return out


@pytest.fixture(scope="module")
def packed(folder, tmp_path_factory) -> Path:
    return pack(folder, tmp_path_factory.mktemp("shards") / "out")


def test_shards_hold_the_folders_files_in_its_order(folder, packed):
    for split, count in (("train", 14), ("val", 6)):
        source, expected = (
            create_source(name, str(root), split) for name, root in (("shards", packed), ("folder", folder))
        )
        assert len(source) == len(expected) == count and class_names(source) == class_names(expected) == CLASSES
        for index in range(count):
            (file, label), (original, original_label) = source.reader[index], expected.reader[index]
            with original:
                assert file.read() == original.read() and label == original_label
            stem = Path(expected.filename(index)).with_suffix("").name
            assert source.filename(index, absolute=True).startswith(
                f"{packed}/{split}-00000{index // 4}.tar/{index:08d}-"
            )
            assert stem in source.filename(index) or "dots" in stem
    assert "a_name_with_dots_and" in "".join(create_source("shards", str(packed)).filenames())


def test_data_module_reads_shards_as_it_reads_the_folder(folder, packed):
    batches = []
    for name, root in (("folder", folder), ("shards", packed)):
        data = ImageDataModule(name, str(root), num_workers=2 * (name == "shards"), **SETTINGS)
        data.setup("fit")
        batches.append([*data.train_dataloader(), *data.val_dataloader()])
        assert data.classes == CLASSES
    assert len(batches[0]) == len(batches[1]) == 3 + 2
    for (images, labels), (other_images, other_labels) in zip(*batches, strict=True):
        assert torch.equal(images, other_images) and torch.equal(labels, other_labels)


def test_webdataset_and_timm_can_stream_them(folder, packed):
    pytest.importorskip("webdataset")
    source = create_source("wds/shards", str(packed), "train-{000000..000003}.tar|14")
    labels = [label for _, label in source]
    expected = create_source("folder", str(folder), "train")
    assert labels == [expected.reader[index][1] for index in range(14)]


def test_index_counts_and_checksums_find_damage(folder, tmp_path, capsys):
    out = pack(folder, tmp_path / "out")
    index = json.loads((out / "train.json").read_text())
    assert index["images"] == sum(shard["images"] for shard in index["shards"]) == 14 and len(index["shards"]) == 4
    assert pack(folder, out, "--check") == out
    assert "as they were written" in capsys.readouterr().out
    damaged = out / "train-000002.tar"
    content = bytearray(damaged.read_bytes())
    content[700] ^= 1
    damaged.write_bytes(content)
    pack(folder, out, "--check", status=1)
    assert f"damaged: {damaged}" in capsys.readouterr().out
    damaged.write_bytes(content[:-512])
    with pytest.raises(ValueError, match="train-000002.tar has .* bytes, but its index says"):
        create_source("shards", str(out))
    damaged.unlink()
    with pytest.raises(FileNotFoundError, match="train-000002.tar.* is missing"):
        create_source("shards", str(out))


def test_checksums_and_sizes_find_damage_of_labels(folder, tmp_path, capsys):
    out = pack(folder, tmp_path / "out")
    path = out / "train.npy"
    positions = np.load(path)
    positions[:, -1] = np.roll(positions[:, -1], 1)
    np.save(path, positions)
    pack(folder, out, "--check", status=1)
    assert f"damaged: {path}" in capsys.readouterr().out
    path.write_bytes(path.read_bytes()[:400])
    with pytest.raises(ValueError, match="train.npy has 400 bytes, but its index says"):
        create_source("shards", str(out))


def contents(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in out.iterdir()}


def test_a_stopped_run_goes_on_and_gives_the_same_bytes(folder, packed, tmp_path, capsys):
    out = tmp_path / "out"

    class Stopping(ShardWriter):
        def _image(self, index):
            if index == 9:
                raise KeyboardInterrupt
            return super()._image(index)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("nat_models.shards.ShardWriter", Stopping)
        pack(folder, out)
    assert {path.name for path in out.glob("*.tar*")} == {
        "train-000000.tar",
        "train-000001.tar",
        "train-000002.tar.partial",
    }
    with pytest.raises(FileNotFoundError, match="no complete shards of 'train'"):
        create_source("shards", str(out))
    with pytest.raises(SystemExit):
        pack(folder, out, "--short-side", "32")
    assert "unfinished shards of 'train' that were made with" in capsys.readouterr().err
    written = (out / "train-000001.tar").stat().st_mtime_ns
    pack(folder, out, "--workers", "2")
    assert (out / "train-000001.tar").stat().st_mtime_ns == written
    assert contents(out) == contents(packed)
    pack(folder, out)
    assert "train: complete" in capsys.readouterr().out
    with pytest.raises(SystemExit):  # another folder has another number of images
        pack(write_image_folder(tmp_path / "images"), out)
    assert "were made otherwise" in capsys.readouterr().err


def test_shards_of_as_many_other_images_are_not_complete(tmp_path, capsys):
    folder, out = write_image_folder(tmp_path / "images"), tmp_path / "out"
    pack(folder, out)
    (folder / "train" / "class_2" / "1.jpg").rename(folder / "train" / "class_2" / "other.jpg")
    with pytest.raises(SystemExit):
        pack(folder, out)
    assert "were made otherwise" in capsys.readouterr().err


def test_two_commands_do_not_write_the_same_shards(folder, tmp_path):
    claim_folder(tmp_path / "out", "out")
    command = [sys.executable, "-m", "nat_models.shards", str(folder), "out", "--workers", "0"]
    process = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert process.returncode == 2
    assert f"error: out='out' is in use by process {os.getpid()} on" in process.stderr.splitlines()[-1]
    assert [path.name for path in (tmp_path / "out").iterdir()] == [".claim"]


def test_reduced_images_have_the_short_side(folder, tmp_path):
    out = pack(folder, tmp_path / "out", "--short-side", "20")
    source = create_source("shards", str(out))
    sizes = Counter(Image.open(source.reader[index][0]).size for index in range(14))
    assert sizes == {(24, 20): 14}
    with pytest.raises(SystemExit):
        pack(folder, out)


def test_undecodable_images_are_errors_or_listed(folder, tmp_path, capsys):
    root = write_image_folder(tmp_path / "images")
    (root / "train" / "class_2" / "1.jpg").write_bytes((root / "train" / "class_2" / "2.jpg").read_bytes()[:500])
    for workers in ("0", "2"):
        with pytest.raises(SystemExit):
            pack(root, tmp_path / "out", "--workers", workers)
        assert "error: cannot decode class_2/1.jpg: " in capsys.readouterr().err.splitlines()[-1]
    pack(root, tmp_path / "out", "--skip-undecodable")
    assert "left out, cannot be decoded: class_2/1.jpg" in capsys.readouterr().out
    source = create_source("shards", str(tmp_path / "out"))
    assert Counter(source.reader[index][1] for index in range(len(source))) == {0: 4, 1: 3, 2: 4}


def test_damage_in_a_shard_is_reported_with_the_images_name(folder, tmp_path):
    out = pack(folder, tmp_path / "out")
    source = create_source("shards", str(out), "val")
    _, offset, size, _ = source.reader.positions[3].tolist()
    path = out / "val-000000.tar"
    content = bytearray(path.read_bytes())
    content[offset : offset + size] = bytes(size)
    path.write_bytes(content)
    data = ImageDataModule("shards", str(out), **SETTINGS)
    data.setup("fit")
    with pytest.raises(UndecodableImageError, match=r"val-000000.tar/00000003-class_2/1.jpg"):
        list(data.val_dataloader())


def test_datasets_without_files_are_kept_exactly(tmp_path, capsys):
    digits = create_source("digits", split="validation")
    pack(Path("digits"), tmp_path, "--splits", "validation", "--images-per-shard", "200")
    data = ImageDataModule("shards", str(tmp_path), val_split="validation", in_chans=1, img_size=8, crop_pct=1.0)
    data.setup("validate")
    assert len(data.val_dataset) == 360 and "360 images in 2 shards" in capsys.readouterr().out
    for index in (0, 100, 359):
        image, label = digits[index]
        assert torch.equal(data.val_dataset[index][0][0], torch.from_numpy(np.array(image)))
        assert data.val_dataset[index][1] == label


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere", "out"], "'nowhere' is unknown"),
        (["wds/images", "out"], "is a stream already"),
        (["digits", "out", "--workers", "-1"], "--workers must be at least 0, got -1"),
        (["digits", "out", "--check"], "'out' is not a folder"),
    ],
)
def test_mistakes_get_one_line(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        shards(arguments)
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_command_then_training_from_its_shards(folder, tmp_path):
    command = [
        sys.executable,
        "-m",
        "nat_models.shards",
        str(folder),
        "out",
        "--workers",
        "2",
        "--images-per-shard",
        "5",
    ]
    process = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    assert "train: 14 images in 3 shards" in process.stdout
    settings = ["experiment=imagenet/nat_mini", "data=shards", f"data.root={tmp_path / 'out'}", "data.img_size=32"]
    settings += [
        "model.model_name=test_resnet",
        "~model.model_kwargs.drop_path_rate",
        "data.batch_size=4",
        "debug=smoke",
    ]
    train(compose_train(tmp_path / "run", *settings, "trainer.accelerator=cpu", "trainer.precision=32-true"))
    assert json.loads((tmp_path / "run" / "results.json").read_text())["images"] == 6
