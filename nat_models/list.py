"""`python -m nat_models.list [PATTERN]`: a table of the registered models."""

import argparse
import csv
from fnmatch import fnmatchcase
from importlib import resources

COLUMNS = {  # column of published.csv -> title
    "model": "model",
    "image": "image",
    "params_M": "params (M)",
    "gflops": "GFLOPs",
    "top1": "top-1 (%)",
    "weights": "weights",
}


def published_models() -> list[dict[str, str]]:
    """Rows of `published.csv`: every registered model by name, with

    - `image`: height and width that the other columns hold for; of video models frames, height and width: "32x224";
    - `params_M`, `gflops`: parameters in millions and multiply-adds in 10^9, counted, head included;
    - `top1`: published ImageNet-1k top-1 accuracy of the weights in percent; empty where there is none;
    - `weights`: timm's tag of the published weights; video models inflate those of an image model.
    """
    with resources.files("nat_models").joinpath("published.csv").open() as file:
        return list(csv.DictReader(file))


def main(arguments: list[str] | None = None) -> None:
    """Prints the table; exits with status 2 where no model matches."""
    parser = argparse.ArgumentParser(prog="python -m nat_models.list", description="Lists the registered models.")
    parser.add_argument("pattern", nargs="?", default="", help="part of a name, or a shell pattern such as 'nat_*'")
    pattern = parser.parse_args(arguments).pattern
    shell_pattern = pattern if set(pattern) & set("*?[") else f"*{pattern}*"
    rows = [row for row in published_models() if fnmatchcase(row["model"], shell_pattern)]
    if not rows:
        parser.error(f"no model matches {pattern!r}")
    table = [list(COLUMNS.values()), *([row[column] or "-" for column in COLUMNS] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for name, *numbers, weights in table:
        aligned = (number.rjust(width) for number, width in zip(numbers, widths[1:-1], strict=True))
        print("  ".join([name.ljust(widths[0]), *aligned, weights]))


if __name__ == "__main__":
    main()
