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
def test_figures(row: dict[str, str]) -> None:
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
    """As in the README, with what was measured, which notes below the table tell."""
    command = [sys.executable, "-m", "nat_models.list", "nat_*"]
    output = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent, check=True).stdout
    header, *lines = [line for line in output.splitlines() if not line.startswith("train, ")]
    assert header.split("  ")[0] == "model" and "weights" in header.split()
    assert names(lines) == [
        "nat_mini", "nat_tiny", "nat_small", "nat_base", "nat_isotropic_small", "nat_isotropic_base",
        "nat_divided_tiny", "nat_stream_tiny", "nat_stream_small", "nat_iso3d_small",
    ]  # fmt: skip
    assert lines[1].split()[:6] == ["nat_tiny", "224", "27.90", "4.30", "83.2", "in1k"]
    assert len({line.index("in1k") for line in lines}) == 1  # aligned


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty results folder."""
    monkeypatch.setattr("nat_models.list.RESULTS", tmp_path)
    return tmp_path


def test_throughput_where_it_was_measured(results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """On the device of the newest row, and in the faster way."""
    columns = "model,mode,batch_size,dtype,cuda_graphs,status,images_per_s,device,torch,commit,date"
    rows = [
        "nat_tiny,train,64,bfloat16,no,ok,1000,GPU A,2.11.0,abc,2026-01-02",
        "nat_tiny,train,64,bfloat16,yes,ok,1234.56,GPU A,2.11.0,abc,2026-01-02",
        "nat_tiny,inference,64,bfloat16,yes,ok,9876.5,GPU A,2.11.0,abd,2026-01-03",
        "nat_mini,inference,64,bfloat16,yes,wrong: logits_error 0.1,,GPU A,2.11.0,abc,2026-01-04",
        "nat_mini,train,8,bfloat16,yes,ok,5,GPU A,2.11.0,abc,2026-01-02",
        "resnet50,train,64,bfloat16,yes,ok,1,GPU A,2.11.0,abc,2026-01-02",
    ]
    (results / "models_a.csv").write_text("\n".join([columns, *rows]) + "\n")
    (results / "models_b.csv").write_text(f"{columns}\nnat_mini,train,8,float32,no,ok,7,GPU B,2.11.0,def,2026-01-01\n")
    (results / "models_cpu.csv").write_text("model,mode,images_per_s,device\nnat_mini,forward,3.2,CPU\n")
    main(["nat_*i*"])
    header, *lines, note = capsys.readouterr().out.splitlines()
    assert header.split()[-2:] == ["train", "inference"]
    measured = {line.split()[0]: line.split()[6:] for line in lines}
    assert measured["nat_tiny"] == ["1235", "9876"] and measured["nat_mini"] == ["-", "-"]
    assert note == (
        "train, inference: images per second on GPU A, compiled, with CUDA graphs where that is faster: bfloat16, "
        "batch 64, torch 2.11.0, commit abc, abd"
    )
    main(["dinat_tiny"])
    assert capsys.readouterr().out.splitlines()[0].endswith("weights")  # nothing measured, no columns


def test_part_of_a_name(results: Path, capsys: pytest.CaptureFixture[str]) -> None:
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
