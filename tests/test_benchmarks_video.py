"""The benchmark of video models, tiny and on the CPU."""

import csv
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from unittest.mock import patch

import pytest
import timm
import torch
from torch import Tensor, nn

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

from video_models import ATTENTION, Flex, build, clip_rows, stream_rows  # noqa: E402


@pytest.fixture
def model() -> nn.Module:
    config = dict(embed_dim=32, depths=(2, 1), num_heads=(2, 2), kernel_size=3, stride=(1, 2, 2))
    return timm.create_model("nat3d_tiny", dilations=[[(1, 2, 2), 1], 1], **config).eval()


@torch.no_grad()
def test_flex_attention_takes_the_place_of_ours(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if "attn" in name:
            parameter.normal_(std=0.3)  # so that attention matters
    flex, clip = Flex(), torch.randn(1, 3, 6, 32, 32)
    expected = model(clip)
    with patch(ATTENTION, flex.prepare):
        assert (model(clip) - expected).abs().max() > 0.1
    with patch(ATTENTION, flex.attend):
        compiled = torch.compile(model, backend="eager", fullgraph=True, dynamic=False)
        torch.testing.assert_close(compiled(clip), expected, rtol=1e-3, atol=1e-4)


def test_another_attention_is_not_timed(model: nn.Module) -> None:
    class Wrong(Flex):
        def attend(self, qkv: Tensor, *options: object) -> Tensor:
            return qkv.select(-3, 0)

    with pytest.raises(RuntimeError, match="FlexAttention differs by"), patch(ATTENTION, Wrong().prepare):
        model(torch.randn(1, 3, 6, 32, 32))


@pytest.mark.parametrize("mode", ["inference", "train"])
def test_a_model_that_compiles_wrongly_is_not_timed(mode: str) -> None:
    class Doubled(nn.Sequential):
        def forward(self, clip: Tensor) -> Tensor:
            return 2 * super().forward(clip)

    options = Namespace(batch_size=1, image_size=32, modes=[mode], cuda_graphs=False, turns=None, repeats=1)
    with patch("video_models.compiled", lambda model, *_: Doubled(model)):
        (row,) = clip_rows("nat3d_mini", 2, options, torch.device("cpu"))
    assert row["status"].startswith("failed: RuntimeError: compiled, the results differ by") and not row["ms"]


def test_mvit_takes_clips_of_any_length() -> None:
    with torch.device("meta"):
        model = build("mvit_v2_s", 32, 224).eval()
        assert model(torch.empty(1, 3, 32, 224, 224)).shape == (1, 400)


def test_script(tmp_path: Path) -> None:
    clips = tmp_path / "clips.csv"
    command = [
        sys.executable, str(BENCHMARKS / "video_models.py"), "nat3d_mini", "swin3d_t", "--device", "cpu",
        "--frames", "2", "--batch-size", "1", "--image-size", "32", "--repeats", "1", "--streams",
        "--commit", "abc", "--output", str(clips),
    ]  # fmt: skip
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    rows = list(csv.DictReader(clips.open()))
    assert [(row["model"], row["mode"]) for row in rows] == [
        (name, mode) for name in ("nat3d_mini", "swin3d_t") for mode in ("inference", "train")
    ]
    for row in rows:
        assert row["status"] == "ok" and float(row["clips_per_s"]) == pytest.approx(1e3 / float(row["ms"]), rel=0.05)
        assert float(row["max_error"]) < 1e-5
        assert row["commit"] == "abc" and row["torch"] and row["command"].startswith("python ")


def test_streams() -> None:
    config = dict(embed_dim=8, depths=(1, 1), num_heads=(1, 1), kernel_size=3, num_classes=4)
    options = Namespace(image_size=32, window=4, repeats=1, turns=None)
    with patch("video_models.build", lambda *arguments: timm.create_model("nat_stream_tiny", **config)):
        rows = stream_rows("nat_stream_tiny", options, torch.device("cpu"))
    assert [row["way"] for row in rows] == ["step, new map", "step, no map", "step, mean", "window"]
    for row in rows:
        assert row["status"] == "ok" and row["window"] == 4
        assert float(row["ms_per_frame"]) > 0 and float(row["max_error"]) < 1e-3
    new, none, average, _ = (float(row["ms_per_frame"]) for row in rows)
    assert average == pytest.approx((new + none) / 2, abs=1e-3)


def test_unknown_models_are_named() -> None:
    command = [sys.executable, str(BENCHMARKS / "video_models.py"), "nat3d_tiny:fast"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 2 and "'nat3d_tiny:fast' is neither one of this project's" in result.stderr
