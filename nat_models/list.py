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


def measured_models() -> tuple[dict[str, dict[str, float]], str]:
    """Images per second that `benchmarks/models.py` measured on the device where it ran last: model -> mode ("train",
    "inference") -> rate, with or without CUDA graphs, whichever is faster; and a note on it."""
    rows: list[dict[str, str]] = []
    for path in sorted(RESULTS.glob("models_*.csv")):
        with path.open(newline="") as file:
            rows += [row for row in csv.DictReader(file) if row.get("status") == "ok"]
    if not rows:
        return {}, ""
    last = max(rows, key=lambda row: row["date"])
    rows = [row for row in rows if all(row[name] == last[name] for name in ("device", "dtype", "batch_size"))]
    measured: dict[str, dict[str, float]] = {}
    for row in rows:
        rates = measured.setdefault(row["model"], {})
        rates[row["mode"]] = max(rates.get(row["mode"], 0.0), float(row["images_per_s"]))
    commits = ", ".join(sorted({row["commit"] for row in rows}))
    note = f"images per second on {last['device']}, compiled, with CUDA graphs where that is faster: {last['dtype']}, "
    return measured, note + f"batch {last['batch_size']}, torch {last['torch']}, commit {commits}"


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
    measured, note = measured_models()
    is_measured = any(row["model"] in measured for row in rows)
    for mode in ("train", "inference") if is_measured else ():
        rates = [measured.get(row["model"], {}).get(mode) for row in rows]
        columns[mode] = ["-" if rate is None else f"{rate:.0f}" for rate in rates]
    aligned = []
    for title, cells in columns.items():
        width = max(map(len, [title, *cells]))
        aligned.append([f"{cell:{'<' if title in LEFT else '>'}{width}}" for cell in [title, *cells]])
    for line in zip(*aligned, strict=True):
        print("  ".join(line).rstrip())
    if is_measured:
        print(f"train, inference: {note}")


if __name__ == "__main__":
    main()
