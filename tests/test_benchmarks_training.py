"""`benchmarks/input.py` and `benchmarks/distributed.py` on a CPU: what they make, count and write."""

import csv
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
import distributed  # noqa: E402
import input as loading  # noqa: E402


def test_images_are_as_large_as_imagenets(tmp_path):
    mean_bytes = loading.write_folder(tmp_path, images=20, links=2, workers=1)
    assert 100_000 < mean_bytes < 120_000
    assert len(list(tmp_path.glob("train/*/*.jpg"))) == 40 and len(list(tmp_path.glob("val/*/*.jpg"))) == 10


def test_loading_and_training_are_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(loading, "SKIPPED", 1)
    monkeypatch.setattr(loading, "PROFILED", 1)
    output = tmp_path / "input.csv"
    arguments = ["--device", "cpu", "--model", "test_resnet", "--image-size", "32", "--images", "20", "--links", "2"]
    arguments += ["--workers", "1", "--batch-size", "4", "--steps", "3", "--output", str(output)]
    arguments += ["--trace", str(tmp_path / "trace.json.gz")]
    monkeypatch.setattr(sys, "argv", ["input.py", *arguments])
    assert loading.main() == 0
    with open(output, newline="") as file:
        rows = list(csv.DictReader(file))
    training = {row["source"]: row for row in rows if row["case"] == "training"}
    assert list(training) == ["batches at hand", "shards", "folder"]
    for row in training.values():
        step, wait = float(row["step_ms"]), float(row["data_wait_ms"])
        assert float(row["images_per_second"]) == pytest.approx(4000 / (step + wait), rel=1e-2)
        assert float(row["data_wait"]) == pytest.approx(wait / (step + wait), abs=1e-3)
    stages = [row["stage"] for row in rows if row["case"] == "stage, one core" and row["source"] == "shards"]
    assert stages[:2] == ["read", "decode"] and "RandAugment" in stages
    assert all(float(row["images_per_second"]) > 0 for row in rows if row["case"] == "loader")
    assert (tmp_path / "trace.json.gz").stat().st_size > 1000


def test_processes_are_measured_on_batches_at_hand(monkeypatch):
    monkeypatch.setattr(distributed, "SKIPPED", 1)
    job = {"device": "cpu", "processes": 1, "model": "test_resnet", "batch_size": 4, "shape": (3, 32, 32), "steps": 3}
    found = distributed.measure_speed(job)
    assert found["images_per_second"] > 0 and found["step_ms"] > 0
