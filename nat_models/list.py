"""`python -m nat_models.list [PATTERN]`: a table of the registered models."""

import argparse
import csv
from fnmatch import fnmatchcase
from importlib import resources
from pathlib import Path

COLUMNS = {  # column of published.csv -> title
    "model": "model",
    "image": "image",
    "params_M": "params (M)",
    "gflops": "GFLOPs",
    "top1": "top-1 (%)",
    "weights": "weights",
}
LEFT = ("model", "weights")
RESULTS = Path(__file__).parent.parent / "results"  # of a working copy; an installed package has none


def published_models() -> list[dict[str, str]]:
    """Rows of `published.csv`: every registered model by name, with

    - `image`: height and width that the other columns hold for; of video models frames, height and width: "32x224";
    - `params_M`, `gflops`: parameters in millions and multiply-adds in 10^9, counted, head included;
    - `top1`: published ImageNet-1k top-1 accuracy of the weights in percent; empty where there is none;
    - `weights`: timm's tag of the published weights; video models inflate those of an image model.
    """
    with resources.files("nat_models").joinpath("published.csv").open() as file:
        return list(csv.DictReader(file))


def measured_models() -> dict[str, dict[str, dict[str, str]]]:
    """Images per second that `benchmarks/models.py` measured: how -> model -> mode ("train", "inference") -> rate."""
    measured: dict[str, dict[str, dict[str, str]]] = {}
    for path in sorted(RESULTS.glob("models_*.csv")):
        with path.open(newline="") as file:
            for row in csv.DictReader(file):
                if row.get("status") == "ok":
                    graphs = " with CUDA graphs" if row["cuda_graphs"] == "yes" else ""
                    how = f"compiled{graphs}, on {row['device']}: {row['dtype']}, batch {row['batch_size']}"
                    how += f", torch {row['torch']}, commit {row['commit']}"
                    measured.setdefault(how, {}).setdefault(row["model"], {})[row["mode"]] = row["images_per_s"]
    return measured


def main(arguments: list[str] | None = None) -> None:
    """Prints the table; exits with status 2 where no model matches."""
    parser = argparse.ArgumentParser(prog="python -m nat_models.list", description="Lists the registered models.")
    parser.add_argument("pattern", nargs="?", default="", help="part of a name, or a shell pattern such as 'nat_*'")
    pattern = parser.parse_args(arguments).pattern
    shell_pattern = pattern if set(pattern) & set("*?[") else f"*{pattern}*"
    rows = [row for row in published_models() if fnmatchcase(row["model"], shell_pattern)]
    if not rows:
        parser.error(f"no model matches {pattern!r}")
    columns = {title: [row[column] or "-" for row in rows] for column, title in COLUMNS.items()}
    measured, notes = _measured_columns([row["model"] for row in rows])
    aligned = []
    for title, cells in (columns | measured).items():
        width = max(map(len, [title, *cells]))
        aligned.append([f"{cell:{'<' if title in LEFT else '>'}{width}}" for cell in [title, *cells]])
    for line in zip(*aligned, strict=True):
        print("  ".join(line).rstrip())
    for note in notes:
        print(note)


def _measured_columns(names: list[str]) -> tuple[dict[str, list[str]], list[str]]:
    """Two columns for each way in which any of these models was measured, and a note on it."""
    columns: dict[str, list[str]] = {}
    notes: list[str] = []
    for how, models in measured_models().items():
        if models.keys().isdisjoint(names):
            continue
        number = len(notes) + 1
        for mode in ("train", "inference"):
            rates = [models.get(name, {}).get(mode) for name in names]
            columns[f"{mode} [{number}]"] = ["-" if rate is None else f"{float(rate):.0f}" for rate in rates]
        notes.append(f"[{number}] images per second, {how}")
    return columns, notes


if __name__ == "__main__":
    main()
