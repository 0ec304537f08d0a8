"""Time of neighborhood attention against the number of tokens, which should be a line.

    python benchmarks/scaling.py --out results/scaling.csv

Maps of 64 x 64 to 1024 x 1024 tokens with windows of 7 x 7 and 13 x 13, and clips of 8 x 32 x 32 to 64 x 96 x 96 with
windows of 5 x 5 x 5; one sample, 4 heads of 32. A line is fitted to each series by relative errors: `start_us`, what a
call takes however small it is, and `ns_per_token`. `times_line` is the time over the line's: 1 is linear growth.
Writes a PNG beside the CSV. Checked and timed as in `timing.py`.
"""

import argparse
from pathlib import Path

import matplotlib
import numpy as np
import torch
from attention import Row, print_table
from problems import Problem
from providers import fused_na
from record import write_csv
from timing import PASSES, measure, provenance
from turns import join

from fused_na.window import Axis


def _map(side: int, kernel_size: int) -> Problem:
    return Problem(1, (Axis(side, kernel_size),) * 2, 4, 32)


def _clip(frames: int, side: int) -> Problem:
    return Problem(1, (Axis(frames, 5), Axis(side, 5), Axis(side, 5)), 4, 32)


SERIES = {
    "map, 7 x 7": [_map(side, 7) for side in (64, 128, 256, 512, 1024)],
    "map, 13 x 13": [_map(side, 13) for side in (64, 128, 256, 512, 1024)],
    "clip, 5 x 5 x 5": [_clip(*size) for size in ((8, 32), (16, 48), (32, 64), (64, 64), (64, 96))],
}
TINY = {"map, 3 x 3": [_map(side, 3) for side in (4, 8)]}


def fit_line(rows: list[Row]) -> None:
    """Adds to two or more rows of one series the line that fits them best, and how far each is from it."""
    if len(rows) < 2:
        return
    tokens, times = (np.array([row[name] for row in rows], dtype=float) for name in ("tokens", "ms"))
    (start, rate), *_ = np.linalg.lstsq(np.stack([1 / times, tokens / times], axis=1), np.ones(len(rows)))
    for row, time, line in zip(rows, times, start + rate * tokens, strict=True):
        row |= {"start_us": 1e3 * start, "ns_per_token": 1e6 * rate, "times_line": time / line}


def plot(rows: list[Row], path: Path) -> None:
    """Milliseconds by tokens, one panel for each pass, beside lines of linear growth."""
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, len(PASSES), figsize=(12, 5), sharey=True, layout="constrained")
    for panel, name in zip(panels, PASSES, strict=True):
        for i, series in enumerate(dict.fromkeys(row["series"] for row in rows)):
            points = [
                (row["tokens"], row["ms"])
                for row in rows
                if (row["series"], row["pass"]) == (series, name) and "ms" in row
            ]
            if points:
                tokens, times = zip(*points, strict=True)
                panel.loglog(tokens, times, "o-", color=f"C{i}", label=series)
                panel.loglog(tokens, [times[-1] * n / tokens[-1] for n in tokens], ":", color=f"C{i}")
        panel.set_title({"fwd": "forward", "bwd": "backward"}[name])
        panel.set_xlabel("tokens")
    panels[0].set_ylabel("milliseconds (dotted: in proportion)")
    panels[0].legend()
    figure.suptitle(f"{rows[0]['device']}, {rows[0]['dtype']}, torch {rows[0]['torch']}, triton {rows[0]['triton']}")
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.csv")
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16")
    parser.add_argument("--quick", action="store_true", help="tiny problems and few repeats, for a first look on a CPU")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--turns", type=Path, metavar="FILE", help="processes that name it take turns at timing")
    parser.add_argument("--commit", help="recorded instead of what git says, for a copy without its history")
    options = parser.parse_args()
    join(options.turns)

    device, dtype = torch.device(options.device), getattr(torch, options.dtype)
    where = provenance(device, options.commit)
    rows: list[Row] = []
    for series, problems in (TINY if options.quick else SERIES).items():
        for problem in problems:
            repeats = 3 if options.quick else 20
            results = measure(problem, fused_na, PASSES, dtype, device, False, repeats, options.turns)
            size = " x ".join(map(str, problem.spatial))
            for name, result in results.items():
                row: Row = {"series": series, "size": size, "tokens": problem.tokens, "pass": name}
                rows.append(row | {"dtype": options.dtype} | result | where)
    for series, name in dict.fromkeys((row["series"], row["pass"]) for row in rows):
        fit_line([row for row in rows if (row["series"], row["pass"]) == (series, name) and "ms" in row])
    columns = ["series", "size", "tokens", "pass", "dtype", "status", "ms", "start_us", "ns_per_token"]
    columns += ["times_line", "max_error"]
    write_csv(options.out, [{name: row.get(name, "") for name in [*columns, *where]} for row in rows])
    plot(rows, options.out.with_suffix(".png"))
    print_table(rows, columns)


if __name__ == "__main__":
    main()
