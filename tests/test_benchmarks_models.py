"""`benchmarks/models.py`: what it checks, and the command on a CPU."""

import csv
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.models import register_model
from torch import nn

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
import models as benchmark  # noqa: E402
from models import MODELS, Subject, measure, rows_of  # noqa: E402
from turns import alone  # noqa: E402

CPU = torch.device("cpu")


@register_model
def nat_for_benchmark_tests(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    tiny = dict(embed_dim=16, depths=(1, 1), num_heads=(1, 2), dilations=[2, 1], num_classes=5)
    return timm.create_model("dinat_mini", **tiny | kwargs)


def subject() -> Subject:
    """A tiny DiNAT whose compiled model is the eager one."""
    tested = Subject("nat_for_benchmark_tests", 2, 32, torch.float32, CPU, "eager")
    tested.compiled = tested.model
    return tested


def test_a_right_model_is_timed() -> None:
    compiled = Subject("nat_for_benchmark_tests", 2, 32, torch.bfloat16, CPU, "eager")
    results = measure(compiled, steps=1, rounds=1)
    assert list(results) == ["train", "inference"]
    for row in results.values():
        assert row["status"] == "ok" and row["images_per_s"] > 0
        assert max(row["logits_error"], row["gradients_error"]) < 1e-6


def test_training_steps_train() -> None:
    tested = subject()
    before = {name: parameter.detach().clone() for name, parameter in tested.model.named_parameters()}
    measure(tested, steps=1, rounds=1)
    assert all(not torch.equal(parameter, before[name]) for name, parameter in tested.model.named_parameters())


class Changed(nn.Module):
    """A model that went wrong in compilation: its logits or its gradients are scaled."""

    def __init__(self, model: nn.Module, logits: float = 1.0, gradients: float = 1.0) -> None:
        super().__init__()
        self.model, self.logits, self.gradients = model, logits, gradients

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.model(x)
        return self.logits * (x.detach() + self.gradients * (x - x.detach()))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(gradients=1.01), "wrong: gradients_error 1.0e-02"),
        (dict(logits=1.01), "wrong: logits_error 1.0e-02"),
        (dict(logits=float("nan")), "wrong: logits_error inf, gradients_error inf"),
    ],
)
def test_a_wrong_model_is_not_timed(change: dict[str, float], message: str) -> None:
    tested = subject()
    tested.compiled = Changed(tested.model, **change)
    for row in measure(tested, steps=1, rounds=1).values():
        assert row["status"].startswith(message) and "images_per_s" not in row


def test_a_parameter_without_gradient_is_found() -> None:
    tested = subject()
    tested.model.unused = nn.Parameter(torch.zeros(3))
    assert tested.errors()["gradients_error"] == float("inf")


def test_failures_are_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["models.py", "--device", "cpu"])
    options = benchmark.parse_arguments()
    rows = list(rows_of("no_such_model", options))
    assert [row["mode"] for row in rows] == ["train", "inference"]
    assert all(row["status"].startswith("failed: RuntimeError: Unknown model (no_such_model)") for row in rows)


def test_default_models_exist() -> None:
    assert all(timm.is_model(name) for name in MODELS)


def run(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(BENCHMARKS / "models.py"), "--device", "cpu", "--batch-size", "2", "--steps", "1"]
    command += ["--rounds", "1", "--image-size", "32", "--backend", "eager", "--commit", "abc"]
    return subprocess.run([*command, *arguments], capture_output=True, text=True)


def test_command(tmp_path: Path) -> None:
    output = tmp_path / "models.csv"
    first = run("--models", "test_convnext", "--output", str(output))
    assert first.returncode == 0, first.stderr
    assert "test_convnext" in first.stdout and "train" in first.stdout
    second = run("--models", "no_such_model", "--output", str(output), "--append")
    assert second.returncode == 1 and "no_such_model: train failed: RuntimeError" in second.stderr
    with output.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["model"], row["mode"]) for row in rows] == [
        ("test_convnext", "train"), ("test_convnext", "inference"),
        ("no_such_model", "train"), ("no_such_model", "inference"),
    ]  # fmt: skip
    for row in rows:
        assert row["commit"] == "abc" and row["torch"] and row["command"].startswith("python ")
    for row in rows[:2]:
        assert row["status"] == "ok" and float(row["images_per_s"]) > 0 and row["image_size"] == "32"
        assert row["dtype"] == "bfloat16" and float(row["parameters_m"]) == pytest.approx(0.272, abs=0.001)


def test_others_stand_still_while_one_is_timed(tmp_path: Path) -> None:
    """They are stopped and go on afterwards."""
    file = tmp_path / "turns"
    script = (
        f"from pathlib import Path; from turns import join; join(Path({str(file)!r}))\nwhile True: print(1, flush=True)"
    )
    with subprocess.Popen([sys.executable, "-c", script], cwd=BENCHMARKS, stdout=subprocess.PIPE) as counter:
        try:
            assert counter.stdout is not None and counter.stdout.readline()
            with alone(file):
                assert state(counter.pid) == "T"
            while state(counter.pid) == "T":  # a signal takes its time
                pass
        finally:
            counter.kill()


def state(pid: int) -> str:
    """The letter of a process's state, "T" if it is stopped."""
    return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
