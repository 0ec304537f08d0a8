"""Kills a short training run (SIGKILL) at random moments, lets it go on, and compares it with an uninterrupted one.

    python benchmarks/kill_and_resume.py [--kills 10] [--seed 0] [--output results/kill_and_resume.csv] [KEY=VALUE ...]

Each trial is a run of its own, killed at a moment between its set-up and the end of its last epoch, then continued with
`ckpt_path=auto`. All that a checkpoint holds must be equal to the last bit, and all metrics that were logged.
"""

import argparse
import csv
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from threading import Timer
from typing import Any

import torch
from record import ROOT, environment, write_csv

SETTINGS = [
    "experiment=none",
    "data=digits",
    "data.batch_size=16",
    "model.model_name=test_vit",
    "+model.model_kwargs={img_size: 32, drop_path_rate: 0.2}",
    "optim.schedule.warmup_epochs=1",
    "optim.schedule.cooldown_epochs=0",
    "optim.base_batch=null",
    "trainer.accelerator=cpu",
    "trainer.devices=1",
    "trainer.max_epochs=3",
    "trainer.limit_train_batches=10",
    "trainer.log_every_n_steps=1",
    "callbacks.last.every_n_train_steps=3",
]


def differences(first: Path, second: Path) -> list[str]:
    """Names of what differs between two finished runs: entries of their checkpoints, lines of their metrics."""
    found = []
    for name in ("last.ckpt", "best.ckpt"):
        left, right = (
            dict(_entries(torch.load(run / "checkpoints" / name, weights_only=True))) for run in (first, second)
        )
        found += [
            f"{name}{key}" for key in sorted(left.keys() | right.keys()) if not _equal(left.get(key), right.get(key))
        ]
    left, right = (_logged(run / "csv" / "metrics.csv") for run in (first, second))
    if len(left) != len(right):
        found.append(f"metrics.csv has {len(left)} and {len(right)} rows")
    return found + [
        f"metrics.csv, row {i}: {a} and {b}" for i, (a, b) in enumerate(zip(left, right, strict=False)) if a != b
    ]


def _logged(path: Path) -> list[dict[str, str]]:
    """What was logged, but for times."""
    with open(path, newline="") as file:
        return [
            {key: text for key, text in row.items() if not key.startswith("speed/")} for row in csv.DictReader(file)
        ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--output", type=Path, help="csv file of the outcome")
    parser.add_argument("--commit", help="recorded instead of what git says, for a copy without its history")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="for train.py, after the script's own")
    arguments = parser.parse_args()
    overrides = ["trainer.max_epochs=10", *arguments.overrides]
    where = environment(torch.device("cuda" if "trainer.accelerator=gpu" in overrides else "cpu"))
    where |= {"commit": arguments.commit} if arguments.commit else {}
    moments = random.Random(arguments.seed)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        reference = Path(folder) / "reference"
        seconds = train(reference, overrides)
        print(f"uninterrupted: {seconds:.1f} s of training")
        for trial in range(arguments.kills):
            run_dir = Path(folder) / str(trial)
            moment = moments.uniform(0, seconds)
            train(run_dir, overrides, moment)
            kept = [name for name in ("last.ckpt", "previous.ckpt") if (run_dir / "checkpoints" / name).exists()]
            step = torch.load(run_dir / "checkpoints" / kept[0], weights_only=True)["global_step"] if kept else None
            train(run_dir, [*overrides, "ckpt_path=auto"])
            found = differences(reference, run_dir)
            outcome = "; ".join(found) or "equal to the last bit"
            print(f"killed after {moment:5.2f} s, went on from step {step or 0:3d}: {outcome}", flush=True)
            row = {"killed_after_s": round(moment, 2), "resumed_from_step": step or 0, "differences": len(found)}
            rows.append({"settings": " ".join(arguments.overrides)} | row | where)
            if arguments.output is not None:
                write_csv(arguments.output, rows)
    sys.exit(any(row["differences"] for row in rows))


def train(run_dir: Path, overrides: Sequence[str], kill_after: float | None = None) -> float:
    """Runs `train.py`; kills it some seconds after its first line. Returns the seconds from there to its last epoch."""
    command = [sys.executable, str(ROOT / "train.py"), *SETTINGS, f"run_dir={run_dir}", *overrides]
    process = subprocess.Popen(command, cwd=run_dir.parent, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    process.stdout.readline()
    start = end = time.monotonic()
    if kill_after is not None:
        Timer(kill_after, process.kill).start()
    for line in process.stdout:
        if line.startswith("epoch "):
            end = time.monotonic()
    if process.wait() not in (0, -signal.SIGKILL):
        raise SystemExit(f"{' '.join(command)} failed")
    return end - start


def _entries(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """The leaves of nested dicts and lists, but for paths of files."""
    if isinstance(value, dict):
        for name, entry in value.items():
            yield from _entries(entry, f"{key}/{Path(name).name}" if isinstance(name, str) else f"{key}/{name}")
    elif isinstance(value, (list, tuple)):
        for index, entry in enumerate(value):
            yield from _entries(entry, f"{key}/{index}")
    elif not (isinstance(value, str) and os.path.isabs(value)):
        yield key, value


def _equal(left: Any, right: Any) -> bool:
    if isinstance(left, torch.Tensor) and isinstance(right, torch.Tensor):
        return torch.equal(left.cpu(), right.cpu())  # a score that was read from a checkpoint stays on the CPU
    return type(left) is type(right) and left == right


if __name__ == "__main__":
    main()
