"""`python -m nat_models.stream` on small videos."""

import re
import subprocess
import sys
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from video_files import SIZE, rotate_display, write_video

from nat_models.data.video.annotated_copy import AnnotatedCopy, copy_paths, draw_prediction, read_frames
from nat_models.data.video.decoding import VideoError, open_video
from nat_models.predict import load_model
from nat_models.stream import classify, main, summary

TINY: dict[str, Any] = dict(embed_dim=8, depths=(1, 1), num_heads=(1, 2), kernel_size=3, num_frames=6)
TINY_ARGUMENTS = ["--model-kwargs", *(f"{key}={value}".replace(" ", "") for key, value in TINY.items())]


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "weights.safetensors"
    model = timm.create_model("nat_stream_tiny", num_classes=7, **TINY)
    torch.nn.init.normal_(model.head.weight)
    save_file(model.state_dict(), path)
    return path


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_video(tmp_path_factory.mktemp("video") / "video.mp4", num_frames=12, rate=30)


def test_frames_come_in_order(video: Path) -> None:
    frames = list(read_frames(str(video)))
    assert [float(frame.time) for frame in frames] == pytest.approx([i / 30 for i in range(12)], abs=1e-3)
    expected = open_video(video).frames_at([float(frame.time) + 1e-3 for frame in frames])
    for frame, pixels in zip(frames, expected, strict=True):
        assert (torch.from_numpy(np.array(frame.image)).int() - pixels.permute(1, 2, 0).int()).abs().float().mean() < 2


def test_frames_of_avi_files_have_the_times_of_their_order(tmp_path: Path) -> None:
    """Their timestamps are in the order of decoding, which B-frames make another one."""
    frames = list(read_frames(str(write_video(tmp_path / "video.avi", num_frames=12))))
    assert [float(frame.time) for frame in frames] == pytest.approx([i / 30 for i in range(12)])


def test_timestamps_that_begin_anew_begin_a_stream(video: Path, weights: Path) -> None:
    predictor, frames = load_model("nat_stream_tiny", weights, **TINY), list(read_frames(str(video)))
    answers = [answer for _, answer in classify(predictor, frames + frames, 10, compiled=False)]
    for first, second in zip(answers[: len(frames)], answers[len(frames) :], strict=True):
        assert (first.time, first.prediction) == (second.time, second.prediction)


def test_answers_are_those_of_the_whole_clip(video: Path, weights: Path) -> None:
    predictor = load_model("nat_stream_tiny", weights, **TINY)
    answer_of_frame = [answer for _, answer in classify(predictor, read_frames(str(video)), 10, compiled=False)]
    answers = answer_of_frame[::3]
    assert answer_of_frame == [answer for answer in answers for _ in range(3)]
    taken = list(read_frames(str(video)))[::3]
    assert [answer.time for answer in answers] == [float(frame.time) for frame in taken]
    clip = torch.stack([predictor.transform(frame.image) for frame in taken], 1)[None]
    with torch.no_grad():
        probabilities = predictor.model.forward_frames(clip)[0].softmax(-1)
    assert len(answers) == len(probabilities) == 4
    for answer, expected in zip(answers, probabilities, strict=True):
        values, labels = expected.topk(5)
        assert [name for name, _ in answer.prediction] == [predictor.class_names[label] for label in labels.tolist()]
        assert [p for _, p in answer.prediction] == pytest.approx(values.tolist(), rel=1e-3) and answer.latency > 0


def test_command(video: Path, weights: Path) -> None:
    command = [sys.executable, "-m", "nat_models.stream", "nat_stream_tiny", str(video), "--checkpoint", str(weights)]
    result = subprocess.run([*command, *TINY_ARGUMENTS], capture_output=True, text=True, cwd=video.parent)
    assert result.returncode == 0, result.stderr
    *lines, last = result.stdout.splitlines()
    assert len(lines) == 6 and all(re.fullmatch(r" +\d\.\d\d s +[\d.]+ ms +[\d.]+ %  [0-6]", line) for line in lines)
    assert re.fullmatch(
        "6 frames, every second one with a new answer; latency of 2 of these, after 1 to warm up: "
        r"median [\d.]+ ms, longest [\d.]+ ms", last,
    )  # fmt: skip


def test_latencies_are_those_of_new_answers_without_warming_up(video: Path, weights: Path) -> None:
    predictor, frames = load_model("nat_stream_tiny", weights, **TINY), list(read_frames(str(video)))
    answers = [answer for _, answer in classify(predictor, frames[:5] + frames[:3], 30, compiled=False)]
    assert [answer.is_new for answer in answers] == [True, False, True, False, True, True, False, True]
    latencies = [9.0, 0.002, 0.004, 0.003, 0.001]
    assert "latency of 4 of these, after 1 to warm up: median 2.5 ms, longest 4.0 ms" in summary(
        10, latencies, compiled=False
    )
    assert "latency of 2 of these, after 3 to warm up: median 2.0 ms, longest 3.0 ms" in summary(
        10, latencies, compiled=True
    )
    assert summary(2, latencies[:1], compiled=False) == "2 frames, too few to tell a latency"


@pytest.mark.parametrize(("name", "reason"), [("cut.mkv", "its last"), ("cut.avi", "it is cut off or damaged")])
def test_a_video_that_was_cut_off_ends_with_an_error(
    name: str, reason: str, weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_video(tmp_path / name, codec="mpeg4")
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    command = ["nat_stream_tiny", str(path), "--checkpoint", str(weights), *TINY_ARGUMENTS]
    with pytest.raises(SystemExit, match="2"):
        main([*command, "--rate", "30", "--annotate", str(tmp_path)])
    out, err = capsys.readouterr()
    frames = len(out.splitlines())
    assert 4 < frames < 50 and err.startswith(f"error: cannot decode {path} after {frames} frames: {reason}")
    assert not list(tmp_path.glob("*_annotated.mp4"))


def test_frames_of_a_live_stream_may_be_lost(tmp_path: Path) -> None:
    path = write_video(tmp_path / "cut.avi", codec="mpeg4")
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert len(list(read_frames(path.as_uri()))) > 4  # an address, not a file


VARIABLE = [0, 1, 5, 6, 20, 21, 22, 50, 51, 60]  # in 1/90 s


@pytest.mark.parametrize(
    ("name", "settings", "rotated"),
    [
        ("even.mp4", dict(rate=Fraction(30000, 1001)), False),
        ("rotated.mp4", dict(size=SIZE), True),
        ("odd.mkv", dict(size=(321, 243), pixel_format="yuv444p"), False),
        ("variable.mp4", dict(timestamps=VARIABLE, time_base=Fraction(1, 90)), False),
        ("other.avi", dict(codec="mpeg4"), False),
        ("single.mp4", dict(num_frames=1), False),
    ],
)
def test_annotated_copy_frame_by_frame(
    name: str, settings: dict[str, Any], rotated: bool, weights: Path, tmp_path: Path
) -> None:
    source = write_video(tmp_path / name, **{"num_frames": 10, "size": (320, 240), "first_number": 3} | settings)
    if rotated:
        rotate_display(source)
    command = ["nat_stream_tiny", str(source), "--checkpoint", str(weights), *TINY_ARGUMENTS]
    main([*command, "--rate", "12", "--annotate", str(tmp_path / "out")])
    copied = list(read_frames(str(tmp_path / "out" / f"{source.stem}_annotated.mp4")))
    predictor = load_model("nat_stream_tiny", weights, **TINY)
    expected = list(classify(predictor, read_frames(str(source)), 12, compiled=False))
    assert len({str(answer.prediction) for _, answer in expected}) > 1 or len(expected) == 1
    for copy, (frame, answer) in zip(copied, expected, strict=True):
        assert copy.time == frame.time
        width, height = draw_prediction(frame.image, answer.prediction).size
        assert copy.image.size == (width + width % 2, height + height % 2)
    with av.open(str(tmp_path / "out" / f"{source.stem}_annotated.mp4")) as container:
        (stream,) = container.streams
        assert stream.codec_context.name == "h264" and stream.codec_context.pix_fmt == "yuv420p"
        assert float(stream.duration * stream.time_base) == pytest.approx(open_video(source).duration, abs=0.04)
    drawn = [np.asarray(draw_prediction(frame.image, answer.prediction), int) for frame, answer in expected]
    for index, copy in enumerate(copied):
        pixels = np.asarray(copy.image, int)[: drawn[index].shape[0], : drawn[index].shape[1]]
        distances = [np.abs(pixels - other).mean() for other in drawn]
        assert distances[index] < 2.5 and distances[index] <= min(distances)


def test_names_with_a_colon_are_files(weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_video(tmp_path / "video.mp4", num_frames=3).rename("12:30.mp4")  # FFmpeg sees a protocol of the name 12
    main(["nat_stream_tiny", "12:30.mp4", "--checkpoint", str(weights), *TINY_ARGUMENTS, "--annotate"])
    assert open_video(Path("12:30_annotated.mp4")).num_frames == 3


def test_prediction_is_drawn_in_the_corner_and_nowhere_else() -> None:
    image = Image.new("RGB", (400, 200), (90, 120, 150))
    prediction = [("cat", 0.5), ("dög", 0.25), ("bird", 0.125)]
    pixels = np.asarray(draw_prediction(image, prediction), int)
    rows, columns = np.nonzero(np.abs(pixels - (90, 120, 150)).sum(-1))
    assert rows.min() == columns.min() == 0 and rows.max() < 50 and columns.max() < 100
    assert pixels.max() > 240  # letters
    small = draw_prediction(image.resize((40, 20)), prediction)
    assert small.size == (360, 180) and np.asarray(small).max() > 240  # large enough for letters
    others = [np.asarray(draw_prediction(image, [("cat", p)]), int) for p in (0.5, 0.4)]
    assert np.abs(others[0] - others[1]).max() > 100


def test_a_copy_does_not_overwrite_its_video(video: Path, weights: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = video.read_bytes()
    command = ["nat_stream_tiny", str(video), "--checkpoint", str(weights), *TINY_ARGUMENTS]
    with pytest.raises(SystemExit, match="2"):
        main([*command, "--annotate", str(video)])
    assert "the copy would overwrite" in capsys.readouterr().err and video.read_bytes() == content


class FullDisk:
    """A container that cannot write what it is given."""

    def mux(self, packets: Any) -> None:
        raise OSError(28, "No space left on device")


def test_a_copy_that_cannot_be_written_is_named_and_leaves_nothing(
    video: Path, weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["nat_stream_tiny", str(video), "--checkpoint", str(weights), *TINY_ARGUMENTS, "--annotate"]
    (tmp_path / "folder.mp4").mkdir()
    with pytest.raises(SystemExit, match="2"):
        main([*command, str(tmp_path / "folder.mp4")])
    assert f"error: cannot write {str(tmp_path / 'folder.mp4')!r}: Is a directory" in capsys.readouterr().err
    path = tmp_path / "copy.mp4"
    with pytest.raises(OSError, match="No space left"), AnnotatedCopy(path) as copy:
        copy.write(next(read_frames(str(video))), [("cat", 1.0)])
        copy._container = FullDisk()
    assert not path.exists()


@pytest.mark.parametrize("error", [VideoError, KeyboardInterrupt])
def test_a_copy_that_did_not_begin_leaves_an_earlier_one(error: type[BaseException], tmp_path: Path) -> None:
    path = tmp_path / "copy.mp4"
    path.write_text("an earlier one")
    with pytest.raises(error), AnnotatedCopy(path):
        raise error
    assert path.read_text() == "an earlier one"


@pytest.mark.parametrize("name", ["copy.mkv", "copy.MP4", "notes.txt"])
def test_copies_of_other_formats_are_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("not a folder")
    with pytest.raises(ValueError, match=rf"--annotate must be a folder or a file ending in .mp4, got .*{name}'"):
        copy_paths(tmp_path / name, ["video.mp4"])


def test_mistakes_are_named(video: Path, weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "notes.mp4"
    text.write_text("no video")
    images = tmp_path / "image.pth"
    torch.save(timm.create_model("nat_mini", embed_dim=8, depths=(1,), num_heads=(1,)).state_dict(), images)
    image_model = ["nat_mini", "--checkpoint", str(images), "--model-kwargs", "embed_dim=8", "depths=(1,)"]
    for arguments, message in (
        (["nat_stream_tiny", str(text), "--checkpoint", str(weights), *TINY_ARGUMENTS], "error: cannot decode "),
        (
            ["nat_stream_tiny", str(text), "--checkpoint", str(weights), *TINY_ARGUMENTS, "--annotate", str(tmp_path)],
            "error: cannot decode ",
        ),
        (
            [
                "nat_stream_tiny",
                str(video),
                "--checkpoint",
                str(weights),
                *TINY_ARGUMENTS,
                "--annotate",
                f"{text}/x.mp4",
            ],
            "exists",
        ),
        (
            [image_model[0], str(video), *image_model[1:], "num_heads=(1,)"],
            "error: the model must be a streaming one (nat_stream_*), got a NAT",
        ),
        (["nat_stream_huge", str(video)], "error: model='nat_stream_huge' is not a registered model"),
        (["nat_stream_tiny", str(video), "--rate", "0"], "--rate must be positive, got 0.0"),
    ):
        with pytest.raises(SystemExit, match="2"):
            main(arguments)
        assert message in capsys.readouterr().err
    assert not list(tmp_path.glob("*_annotated.mp4"))
    with pytest.raises(VideoError, match="cannot decode"):
        list(read_frames(str(tmp_path / "missing.mp4")))
