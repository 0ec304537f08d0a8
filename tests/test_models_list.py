"""`python -m nat_models.list`, and that its figures are what the models count to."""

import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from golden_models import ZOO

from nat_models.complexity import multiply_adds
from nat_models.list import main, published_models

PUBLISHED = {entry["name"]: entry for entry in ZOO}


def test_every_registered_model_is_listed() -> None:
    ours = {
        name for name in timm.list_models() if timm.models.model_entrypoint(name).__module__.startswith("nat_models")
    }
    listed = [row["model"] for row in published_models()]
    assert set(listed) == ours and len(listed) == len(ours)


@pytest.mark.parametrize("row", published_models(), ids=lambda row: row["model"])
def test_figures(row: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nat_models.layers.neighborhood_attention", lambda query, *arguments: query)
    with torch.device("meta"):
        model = timm.create_model(row["model"]).eval()
    cfg = model.pretrained_cfg
    *frames, size = map(int, row["image"].split("x"))
    assert size == cfg["input_size"][1] and frames == ([model.num_frames] if hasattr(model, "num_frames") else [])
    assert row["params_M"] == f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f}"
    assert row["gflops"] == f"{multiply_adds(model, (3, *frames, size, size)) / 1e9:.2f}"
    assert row["weights"] == cfg["tag"]
    assert row["top1"] == str(PUBLISHED.get(row["model"], {}).get("top1", ""))


def names(lines: list[str]) -> list[str]:
    return [line.split()[0] for line in lines]


def test_command() -> None:
    command = [sys.executable, "-m", "nat_models.list", "nat_*"]
    output = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent, check=True).stdout
    header, *lines = output.splitlines()
    assert header.split("  ")[0] == "model" and header.endswith("weights")
    assert names(lines) == [
        "nat_mini", "nat_tiny", "nat_small", "nat_base", "nat_isotropic_small", "nat_isotropic_base",
        "nat_divided_tiny", "nat_stream_tiny", "nat_stream_small", "nat_iso3d_small",
    ]  # fmt: skip
    assert lines[1].split() == ["nat_tiny", "224", "27.90", "4.30", "83.2", "in1k"]
    assert len({line.rindex("  ") for line in lines}) == 1  # aligned


def test_part_of_a_name(capsys: pytest.CaptureFixture[str]) -> None:
    main(["21k"])
    lines = capsys.readouterr().out.splitlines()[1:]
    assert names(lines) == ["dinat_large_21k", "dinat_large_21k_11x11", "dinat_s_large_21k"]
    assert lines[0].split()[4] == "-"
    main([])
    assert names(capsys.readouterr().out.splitlines()[1:]) == [row["model"] for row in published_models()]


def test_no_match_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["resnet*"])
    out, err = capsys.readouterr()
    assert "no model matches 'resnet*'" in err and not out
