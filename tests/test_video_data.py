"""Sampling, lists, transforms, damaged videos, the generated digits, and the video data module."""

import csv
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from training_runs import run
from video_files import numbers_in, picture, write_video

from nat_models.data import VideoDataModule, VideoError
from nat_models.data.video.annotations import LabelledVideo, detect_form, read_annotations
from nat_models.data.video.dataset import DamagedDataError, TrainingClips, VideoOpener
from nat_models.data.video.decoding import open_video
from nat_models.data.video.moving_digits import MOTIONS, write_moving_digits
from nat_models.data.video.sampling import Sampling
from nat_models.data.video.transforms import evaluation_transform, training_transform
from nat_models.scan import main as scan

CLASSES = ["jump", "run", "walk"]


# Sampling


@given(
    num_frames=st.integers(1, 90),
    rate=st.floats(1, 120),
    length=st.integers(1, 12),
    stride=st.integers(1, 6),
    num_clips=st.integers(1, 5),
)
def test_dense_clips_are_whole_strides_within_the_video(num_frames, rate, length, stride, num_clips):
    sampling = Sampling(length, "dense", stride)
    span = (length - 1) * stride + 1
    for times in [
        sampling.random_clip(num_frames / rate, num_frames),
        *sampling.clips(num_frames / rate, num_frames, 3),
    ]:
        indices = [min(int(time * rate), num_frames - 1) for time in times]
        if span <= num_frames:
            assert [index - indices[0] for index in indices] == [stride * index for index in range(length)]
        else:  # from the first frame, then the last again and again
            assert indices == [min(stride * index, num_frames - 1) for index in range(length)]
    clips = sampling.clips(num_frames / rate, num_frames, num_clips)
    starts = [int(clip[0] * rate) for clip in clips]
    last = max(num_frames - span, 0)
    assert starts == sorted(starts) and starts[-1] == (last if num_clips > 1 else (last + 1) // 2)
    assert num_clips == 1 or starts[0] == 0


@given(num_frames=st.integers(1, 90), rate=st.floats(1, 120), length=st.integers(1, 12), num_clips=st.integers(1, 4))
def test_uniform_clips_have_one_moment_of_each_segment(num_frames, rate, length, num_clips):
    sampling = Sampling(length, "uniform")
    duration = num_frames / rate
    for clip in [sampling.random_clip(duration, num_frames), *sampling.clips(duration, num_frames, num_clips)]:
        for index, time in enumerate(clip):
            frame = int(time * rate)
            first, last = index * num_frames / length, (index + 1) * num_frames / length
            assert int(first + 1e-6) <= frame <= last


def test_random_starts_reach_every_frame_evenly():
    sampling = Sampling(4, "dense", 2)
    starts = Counter(int(sampling.random_clip(12 / 25, 12)[0] * 25) for _ in range(3000))
    assert set(starts) == set(range(6)) and min(starts.values()) > 400


def test_a_frame_rate_makes_the_stride_a_time():
    slow, fast = (Sampling(4, "dense", 2, frame_rate=10).clips(3.0, frames, 1)[0] for frames in (30, 180))
    assert slow == fast and np.diff(slow) == pytest.approx([0.2] * 3)


def test_clips_of_a_file_are_the_right_frames(tmp_path):
    video = open_video(write_video(tmp_path / "video.mp4", 60))
    clips = Sampling(8, "dense", 3).clips(video.duration, video.num_frames, 3)
    expected = [[start + 3 * index for index in range(8)] for start in (0, 19, 38)]
    assert [numbers_in(video.frames_at(clip)) for clip in clips] == expected
    (uniform,) = Sampling(6, "uniform").clips(video.duration, video.num_frames, 1)
    assert numbers_in(video.frames_at(uniform)) == [5, 15, 25, 35, 45, 55]
    (still,) = Sampling(8, "dense", 3, repeat_frame=True).clips(video.duration, video.num_frames, 1)
    assert len(set(numbers_in(video.frames_at(still)))) == 1


@pytest.mark.parametrize(("name", "value"), [("num_frames", 0), ("stride", 1.5), ("mode", "tsn"), ("frame_rate", -1)])
def test_bad_sampling_is_named(name, value):
    with pytest.raises(ValueError, match=rf"data.sampling.{name} .*{value}"):
        Sampling(**{name: value})


# Lists


def touch(root: Path, *names: str) -> list[str]:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return [str(root / name) for name in names]


def labels(found) -> dict[str, str]:
    return {Path(video.path).name: found.classes[video.label] for video in found.videos}


def test_folder_per_class(tmp_path):
    touch(tmp_path, "train/walk/a.mp4", "train/run/b.avi", "train/run/notes.txt", "train/jump/c d.webm")
    touch(tmp_path, "train/jump/frames_of_e/1.jpg")
    found = read_annotations("train", tmp_path)
    assert found.form == "folder" and found.classes == CLASSES
    assert labels(found) == {"a.mp4": "walk", "b.avi": "run", "c d.webm": "jump", "frames_of_e": "jump"}


@pytest.mark.parametrize("separator", [" ", ",", "\t", ", "])
@pytest.mark.parametrize("numbers", [False, True])
def test_paths_with_labels(tmp_path, separator, numbers):
    (tmp_path / "videos").mkdir()
    (absolute,) = touch(tmp_path, "elsewhere/c.mp4")
    touch(tmp_path / "videos", "a 1.mp4", "x/b.mp4")
    rows = [("a 1.mp4", "2" if numbers else "walk"), ("x/b.mp4", "0" if numbers else "jump")]
    rows.append((absolute, "1" if numbers else "run"))
    (tmp_path / "list.txt").write_text("\n".join(separator.join(row) for row in rows) + "\n\n")
    found = read_annotations(tmp_path / "list.txt", tmp_path / "videos")
    assert found.form == "list" and [video.label for video in found.videos] == [2, 0, 1]
    assert found.classes == (["0", "1", "2"] if numbers else CLASSES)


def test_frame_folders(tmp_path):
    touch(tmp_path, "a/1.jpg", "b c/1.jpg")
    (tmp_path / "frames.txt").write_text("a 30 1\nb c 12 0\n")
    found = read_annotations(tmp_path / "frames.txt")
    assert found.form == "frames" and [(video.label, video.num_frames) for video in found.videos] == [(1, 30), (0, 12)]
    opener = VideoOpener("pyav", 30.0)
    with pytest.raises(VideoError, match="only 0 of its 30|cannot decode"):
        opener(found.videos[0]).frames_at([0.0])


def test_kinetics_csv(tmp_path):
    touch(tmp_path, "abc_-12345_000010_000020.mp4", "train/playing chess/xyz_000001_000011.mp4")
    touch(tmp_path, "tap_dancing/qqq_000000_000010.mkv")
    (tmp_path / "kinetics.csv").write_text(
        "label,youtube_id,time_start,time_end,split\ndunking,abc_-12345,10,20,train\nplaying chess,xyz,1,11,train\n"
        "tap dancing,qqq,0,10,train\ndunking,gone,5,15,train\n"
    )
    found = read_annotations("kinetics.csv", tmp_path)
    assert found.form == "kinetics" and found.classes == ["dunking", "playing chess", "tap dancing"]
    assert [video.label for video in found.videos] == [0, 1, 2]
    assert [Path(path).name for path in found.missing] == ["gone_000005_000015.mp4"]


def test_something_something_json(tmp_path):
    touch(tmp_path / "videos", "7.webm", "8.mp4")
    entries = [{"id": "7", "label": "moving a cup up", "template": "Moving [something] up"}]
    entries.append({"id": "8", "label": "dropping a pen", "template": "Dropping [something]"})
    (tmp_path / "train.json").write_text(json.dumps(entries))
    with pytest.raises(FileNotFoundError, match="labels.json"):
        read_annotations(tmp_path / "train.json", tmp_path / "videos")
    (tmp_path / "labels.json").write_text(json.dumps({"Moving something up": "0", "Dropping something": "1"}))
    found = read_annotations(tmp_path / "train.json", tmp_path / "videos")
    assert found.form == "something" and labels(found) == {
        "7.webm": "Moving something up",
        "8.mp4": "Dropping something",
    }
    assert [video.label for video in found.videos] == [0, 1]


def test_ucf101_and_hmdb51_splits(tmp_path):
    touch(tmp_path, "Archery/v_1.avi", "Biking/v_2.avi", "Archery/v_3.avi")
    splits = tmp_path / "splits"
    splits.mkdir()
    (splits / "classInd.txt").write_text("1 Archery\n2 Biking\n")
    (splits / "trainlist01.txt").write_text("Archery/v_1.avi 1\nBiking/v_2.avi 2\n")
    (splits / "testlist01.txt").write_text("Archery/v_3.avi\n")
    train, test = (read_annotations(f"splits/{name}list01.txt", tmp_path) for name in ("train", "test"))
    assert (train.form, train.classes) == ("ucf101", ["Archery", "Biking"]) == (test.form, test.classes)
    assert [video.label for video in train.videos] == [0, 1] and labels(test) == {"v_3.avi": "Archery"}
    assert test.holes == ["Biking"]
    for name in ("Archery", "Biking"):
        files = {"Archery": "v_1.avi 1\nv_3.avi 2\n", "Biking": "v_2.avi 1\nv_9.avi 0\n"}
        (splits / f"{name}_test_split1.txt").write_text(files[name])
    train, test = (read_annotations("splits/*_test_split1.txt", tmp_path, training=flag) for flag in (True, False))
    assert train.form == "hmdb51" and labels(train) == {"v_1.avi": "Archery", "v_2.avi": "Biking"}
    assert labels(test) == {"v_3.avi": "Archery"}


def test_problems_of_lists_are_found(tmp_path, caplog):
    touch(tmp_path, "a.mp4", "b.mp4")
    (tmp_path / "list.csv").write_text("a.mp4,0\nb.mp4,3\na.mp4,0\ngone.mp4,1\n")
    found = read_annotations("list.csv", tmp_path)
    assert [Path(path).name for path in found.duplicates] == ["a.mp4"] and found.holes == ["1", "2"]
    assert "1 videos are missing" in caplog.text and "gone.mp4" in caplog.text
    (tmp_path / "two.csv").write_text("a.mp4,0\na.mp4,1\n")
    with pytest.raises(ValueError, match="a.mp4 two labels, '0' and '1'"):
        read_annotations("two.csv", tmp_path)
    with pytest.raises(ValueError, match="'swim', which is not among the 3 classes"):
        (tmp_path / "swim.csv").write_text("a.mp4,swim\n")
        read_annotations("swim.csv", tmp_path, classes=CLASSES)
    (tmp_path / "odd.csv").write_text("one word and many more of them here\n")
    with pytest.raises(ValueError, match="line 1|no videos"):
        read_annotations("odd.csv", tmp_path, form="frames")
    (tmp_path / "lost.csv").write_text("gone.mp4,0\n")
    with pytest.raises(ValueError, match="leads to no videos"):
        read_annotations("lost.csv", tmp_path)
    with pytest.raises(FileNotFoundError, match="nowhere.csv"):
        read_annotations("nowhere.csv", tmp_path)
    with pytest.raises(ValueError, match="data.annotation_form='coco'|'coco' is unknown"):
        read_annotations("list.csv", tmp_path, form="coco")
    (tmp_path / "single").write_text("word\n")
    with pytest.raises(ValueError, match="no known list"):
        detect_form(tmp_path / "single")


# Transforms


def test_a_clip_gets_the_same_parameters_for_all_its_frames():
    frame = torch.randint(0, 256, (1, 3, 40, 56), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    clip = frame.expand(6, -1, -1, -1)
    augment = training_transform((32, 24), color_jitter=0.4, rand_augment={"num_ops": 2, "magnitude": 9})
    seen = set()
    for _ in range(20):
        result = augment(clip)
        assert result.shape == (3, 6, 32, 24) and result.dtype == torch.uint8
        assert torch.equal(result, result[:, :1].expand_as(result))
        seen.add(result.numpy().tobytes())
    assert len(seen) > 15  # chance may repeat itself, or make all pixels black


def test_flips_are_off_where_asked():
    clip = torch.arange(256, dtype=torch.uint8).expand(2, 3, 64, 256)
    augment = training_transform((32, 128), scale=(1.0, 1.0), ratio=(4.0, 4.0), hflip=0.0)
    assert all((augment(clip)[..., -1] > augment(clip)[..., 0]).all() for _ in range(20))


def test_crops_of_evaluation_go_from_end_to_end():
    pixels = torch.arange(96, dtype=torch.uint8).expand(2, 3, 32, 96)  # grey by column
    views = evaluation_transform((32, 32), crops=3)(pixels)
    assert views.shape == (3, 3, 2, 32, 32)
    for view, left in zip(views, (0, 32, 64), strict=True):
        assert view[0, 0, 0].tolist() == list(range(left, left + 32))
    upright = evaluation_transform((32, 32), crops=3)(pixels.transpose(2, 3))
    torch.testing.assert_close(upright, views.transpose(3, 4))
    (center,) = evaluation_transform((32, 32))(pixels)
    torch.testing.assert_close(center, views[1])
    (resized,) = evaluation_transform((32, 32), crop_pct=0.5)(pixels)
    assert resized.shape == (3, 2, 32, 32)


# Damaged videos


@pytest.fixture
def damaged(tmp_path):
    """Fourteen videos of two classes in lists; five of class 0 are damaged, a sixth has a single frame."""
    for index in range(7):
        write_video(tmp_path / f"0_{index}.mp4", 16, first_number=16 * index)
        write_video(tmp_path / f"1_{index}.mp4", 16, first_number=128 + 16 * index)
    write_video(tmp_path / "0_0.mp4", 1, first_number=3)
    whole = write_video(tmp_path / "0_1.mp4", 16, container_options={"movflags": "faststart"})
    whole.write_bytes(whole.read_bytes()[:-300])
    (tmp_path / "0_2.mp4").write_bytes(b"")
    (tmp_path / "0_3.mp4").write_text("not a video")
    write_video(tmp_path / "0_4.mp4", 0)
    (tmp_path / "0_5.mp4").write_bytes((tmp_path / "0_6.mp4").read_bytes()[:400])
    rows = [f"{label}_{index}.mp4,{label}\n" for label in (0, 1) for index in range(7)]
    (tmp_path / "train.csv").write_text("".join(rows))
    (tmp_path / "validation.csv").write_text("0_0.mp4,0\n0_6.mp4,0\n1_0.mp4,1\n0_3.mp4,0\n")
    return tmp_path


def data_module(root: Path, **settings) -> VideoDataModule:
    settings = {"img_size": 32, "batch_size": 2, "sampling": {"num_frames": 4, "stride": 2}} | settings
    return VideoDataModule("test", str(root), **settings)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_damaged_training_videos_are_replaced_within_their_class_and_listed(damaged, num_workers):
    listed = damaged / "undecodable.txt"
    data = data_module(damaged, damaged_limit=0.5, undecodable_list=str(listed), num_workers=num_workers)
    data.setup("fit")
    found = Counter(int(label) for _, labels in data.train_dataloader() for label in labels)
    assert found == {0: 7, 1: 7}
    assert data.undecodable_paths() == [str(damaged / f"0_{index}.mp4") for index in range(1, 6)]


def test_a_replacement_is_of_the_same_class(damaged):
    videos = [LabelledVideo(str(damaged / f"{label}_{index}.mp4"), label) for label in (0, 1) for index in (3, 6)]
    clips = TrainingClips(
        videos, VideoOpener("pyav", 30), Sampling(2), lambda clip: clip.transpose(0, 1), damaged_limit=1.0
    )
    clip, label = clips[0]
    assert label == 0 and set(numbers_in(clip.transpose(0, 1))) <= set(range(96, 112))


def test_too_many_damaged_training_videos_stop_the_run(damaged):
    data = data_module(damaged, damaged_limit=0.2, undecodable_list=str(damaged / "list.txt"), num_workers=0)
    data.setup("fit")
    with pytest.raises(DamagedDataError, match=r"3 of 14 training videos are damaged, listed in .*list.txt"):
        for index in range(14):
            data.train_dataset[index]
    assert len(data.undecodable_paths()) == 3
    missing = data_module(damaged)
    (damaged / "1_5.mp4").unlink()
    with pytest.raises(FileNotFoundError, match="1 of 14 training videos are missing.*1_5.mp4"):
        missing.setup("fit")


def test_nothing_is_replaced_in_evaluation(damaged):
    data = data_module(damaged, eval_batch_size=1)
    data.setup("fit")
    with pytest.raises(VideoError, match="0_3.mp4"):
        list(data.val_dataloader())
    (damaged / "bad.txt").write_text(f"{damaged}/0_3.mp4\n")
    data = data_module(damaged, excluded_list=str(damaged / "bad.txt"))
    data.setup("fit")
    batches = list(data.val_dataloader())
    assert [int(label) for batch in batches for label in batch[1]] == [0, 0, 1]
    assert [int(index) for batch in batches for index in batch[2]] == [0, 1, 2]
    assert data.describe()["Evaluation"].endswith("1 videos excluded")
    (damaged / "0_0.mp4").unlink()
    with pytest.raises(FileNotFoundError, match="1 validation videos are missing.*0_0.mp4"):
        data_module(damaged).setup("validate")


# The data module


def test_one_decode_serves_all_views(tmp_path, monkeypatch):
    write_video(tmp_path / "a.mp4", 30)
    (tmp_path / "validation.csv").write_text("a.mp4,0\n")
    (tmp_path / "train.csv").write_text("a.mp4,0\n")
    views = {"test_views": {"clips": 3, "crops": 3}, "batch_size": 4, "repeats": 4}
    data = data_module(tmp_path, **views, augmentation={"hflip": 0.0, "scale": (1.0, 1.0)}, img_size=64)
    data.setup("fit")
    opened = []
    monkeypatch.setattr(
        data.opener,
        "__class__",
        type(
            "Counting",
            (VideoOpener,),
            {"__call__": lambda self, video: (opened.append(video), VideoOpener.__call__(self, video))[1]},
        ),
    )
    ((batch, labels, indices),) = data.val_dataloader()
    assert batch.shape == (1, 9, 3, 4, 64, 64) and labels.tolist() == [0] and indices.tolist() == [0]
    assert len(opened) == 1
    ((clips, labels),) = data.train_dataloader()
    assert clips.shape == (4, 3, 4, 64, 64) and labels.tolist() == [0] * 4 and len(opened) == 2
    assert len({clip.sum().item() for clip in clips}) > 1


@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        ("decoder", "decord", "data.decoder='decord'"),
        ("repeats", 3, "data.repeats=3 must divide"),
        ("test_views", {"clips": 0}, "data.test_views.clips"),
        ("test_views", {"frames": 2}, "data.test_views must hold"),
        ("img_size", 0, "data.img_size"),
        ("num_workers", -1, "data.num_workers"),
    ],
)
def test_bad_settings_are_named(tmp_path, setting, value, message):
    with pytest.raises(ValueError, match=message):
        data_module(tmp_path, **{setting: value})


def test_moving_digits_are_written_once_and_tell_nothing_in_a_single_frame(tmp_path, monkeypatch):
    from nat_models.data.video import moving_digits

    def fewer(split):
        dataset = moving_digits_dataset(split)
        dataset.images, dataset.targets = dataset.images[:20], dataset.targets[:20]
        return dataset

    moving_digits_dataset = moving_digits.DigitsDataset
    monkeypatch.setattr(moving_digits, "DigitsDataset", fewer)
    root = tmp_path / "cache" / "moving_digits"
    write_moving_digits(root)
    written = {path: path.stat().st_mtime_ns for path in root.rglob("*")}
    write_moving_digits(root)
    assert {path: path.stat().st_mtime_ns for path in root.rglob("*")} == written
    assert [path.name for path in root.parent.iterdir()] == ["moving_digits"]
    found = read_annotations("train.csv", root)
    assert Counter(video.label for video in found.videos) == {label: 2 for label in range(10)}
    video = open_video(found.videos[0].path)
    assert video.num_frames == 20 and video.frames_at([0.0]).shape == (1, 3, 32, 32)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").touch()
    with pytest.raises(ValueError, match="holds something else"):
        write_moving_digits(tmp_path / "full")


def test_digits_move_as_their_class_says():
    digit = Image.fromarray(picture(255, (8, 8))[..., 0])
    for motion, (right, down, turn) in MOTIONS.items():
        from nat_models.data.video.moving_digits import frames

        clip = frames(digit, motion, np.random.default_rng(5)).astype(float)
        spectra = [np.fft.fft2(picture) for picture in clip]
        shift = np.abs(np.fft.ifft2(spectra[1] * spectra[0].conj()))  # correlation of two frames, wrapped
        y, x = np.unravel_index(shift.argmax(), shift.shape)
        y, x = (y + 16) % 32 - 16, (x + 16) % 32 - 16
        if turn:
            assert abs(x) <= 1 and abs(y) <= 1
        else:
            assert (np.sign(x), np.sign(y)) == (right, down)


# python -m nat_models.scan


def test_scan_sorts_videos_and_its_lists_train_and_evaluate(damaged, capsys):
    with open(damaged / "train.csv", "a") as file:
        file.write("gone.mp4,1\n1_6.mp4,0\n")
    assert scan(["--workers", "2", "--output", str(damaged / "scan"), str(damaged / "train.csv")]) == 1
    with open(damaged / "scan" / "report.csv", newline="") as file:
        rows = {Path(row["path"]).name: row for row in csv.DictReader(file)}
    states = {name: row["state"] for name, row in rows.items()}
    assert len(states) == 15 and Counter(states.values()) == {
        "readable": 7,
        "damaged": 6,
        "too short": 1,
        "wrong label": 1,
    }
    assert states["0_0.mp4"] == "too short" and states["gone.mp4"] == "damaged" and states["1_6.mp4"] == "wrong label"
    assert all(states[f"0_{index}.mp4"] == "damaged" for index in range(1, 6))
    assert (rows["0_6.mp4"]["frames"], rows["0_6.mp4"]["class"]) == ("16", "0")
    assert "two labels" in rows["1_6.mp4"]["reason"] and "no such file" in rows["gone.mp4"]["reason"]
    output = capsys.readouterr().out
    assert "wrong label" in output and "0_3.mp4: damaged" in output

    clean = read_annotations(damaged / "scan" / "clean.tsv")
    assert sorted(labels(clean)) == ["0_6.mp4", *(f"1_{index}.mp4" for index in range(6))]
    settings = {"train_list": "scan/clean.tsv", "excluded_list": str(damaged / "scan" / "damaged.txt")}
    data = data_module(damaged, **settings)
    data.setup("fit")
    assert sum(len(labels) for _, labels in data.train_dataloader()) == 6  # pairs of seven
    assert len(list(data.val_dataset)) == 2 and len(data.excluded) == 2


def test_scan_of_a_folder_that_is_fine(tmp_path):
    write_video(tmp_path / "walk" / "a.mp4", 70, keyframe_every=20)
    assert scan(["--workers", "1", "--output", str(tmp_path / "scan"), str(tmp_path)]) == 0
    assert (tmp_path / "scan" / "damaged.txt").read_text() == ""


def test_scan_says_what_is_wrong_with_its_arguments(tmp_path):
    process = run(tmp_path, "nat_models/scan.py", "nowhere.csv")
    assert process.returncode == 2 and "no list of videos 'nowhere.csv'" in process.stderr
