"""`python -m nat_models.stream` on small videos."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from video_files import write_video

from nat_models.data.video.decoding import VideoError, open_video
from nat_models.predict import load_model
from nat_models.stream import classify, main, read_frames

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


def test_frames_come_in_order_at_the_rate(video: Path) -> None:
    frames = list(read_frames(str(video), 15))
    assert [time for time, _ in frames] == pytest.approx([i / 15 for i in range(6)], abs=1e-3)
    expected = open_video(video).frames_at([time for time, _ in frames])
    for (_, image), frame in zip(frames, expected, strict=True):
        actual = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(image.height, image.width, 3)
        assert (actual.int() - frame.permute(1, 2, 0).int()).abs().float().mean() < 2
    assert len(list(read_frames(str(video), 1000))) == 12


def test_answers_are_those_of_the_whole_clip(video: Path, weights: Path) -> None:
    predictor = load_model("nat_stream_tiny", weights, **TINY)
    answers = list(classify(predictor, read_frames(str(video), 10), compiled=False))
    clip = torch.stack([predictor.transform(image) for _, image in read_frames(str(video), 10)], 1)[None]
    with torch.no_grad():
        probabilities = predictor.model.forward_frames(clip)[0].softmax(-1)
    assert len(answers) == len(probabilities) == 4
    for answer, expected in zip(answers, probabilities, strict=True):
        assert answer.class_name == predictor.class_names[int(expected.argmax())]
        assert answer.probability == pytest.approx(expected.max().item(), rel=1e-3) and answer.latency > 0


def test_command(video: Path, weights: Path) -> None:
    command = [sys.executable, "-m", "nat_models.stream", "nat_stream_tiny", str(video), "--checkpoint", str(weights)]
    result = subprocess.run([*command, *TINY_ARGUMENTS], capture_output=True, text=True, cwd=video.parent)
    assert result.returncode == 0, result.stderr
    *lines, summary = result.stdout.splitlines()
    assert len(lines) == 6 and all(re.fullmatch(r" +\d\.\d\d s +[\d.]+ ms +[\d.]+ %  [0-6]", line) for line in lines)
    assert summary.startswith("6 frames, latency of a frame: median ")


def test_mistakes_are_named(video: Path, weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "notes.mp4"
    text.write_text("no video")
    images = tmp_path / "image.pth"
    torch.save(timm.create_model("nat_mini", embed_dim=8, depths=(1,), num_heads=(1,)).state_dict(), images)
    image_model = ["nat_mini", "--checkpoint", str(images), "--model-kwargs", "embed_dim=8", "depths=(1,)"]
    for arguments, message in (
        (["nat_stream_tiny", str(text), "--checkpoint", str(weights), *TINY_ARGUMENTS], "error: cannot decode "),
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
    with pytest.raises(VideoError, match="cannot decode"):
        list(read_frames(str(tmp_path / "missing.mp4"), 15))
