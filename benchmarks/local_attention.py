"""Fused neighborhood attention against local attention by masking, on the same 1-D, 2-D and 3-D problems.

    python benchmarks/local_attention.py --out results/local_attention.csv

Writes a CSV and, beside it, a PNG of the same name. All ways are checked before they are timed (`timing.py`). They are:

- `fused_na`: this project's operation;
- `masked`: full attention with the neighborhood as an explicit mask of tokens x tokens;
- `flex`: FlexAttention over flattened tokens, the rule computed in its kernels;
- `sequence`: a 1-D sliding window over the flattened tokens with as many keys, which is another, easier problem: the
  upper bound for any kernel that works on several dimensions.
"""

import argparse
import sys
from pathlib import Path

import matplotlib
import torch
from attention import Row, print_table
from problems import SUITES, Problem
from providers import Provider, flex, fused_na, masked_sdpa, sequence
from record import write_csv
from timing import PASSES, measure, provenance
from turns import join

from fused_na.window import Axis

WAYS: dict[str, Provider] = {"fused_na": fused_na, "masked": masked_sdpa, "flex": flex, "sequence": sequence}
PROBLEMS = {
    "1-D: 8192 tokens, window 256": Problem(4, (Axis(8192, 256),), 8, 64),
    "2-D: 56 x 56, window 7 x 7": SUITES["image"]["img_s1"],
    "2-D: 96 x 96, window 13 x 13": Problem(8, (Axis(96, 13),) * 2, 8, 64),
    "3-D: 16 x 28 x 28, window 7 x 7 x 7": SUITES["video"]["vid_s2"],
}
TINY = {
    "1-D: 40 tokens, window 6": Problem(2, (Axis(40, 6),), 2, 16),
    "2-D: 8 x 8, window 3 x 3": Problem(2, (Axis(8, 3),) * 2, 2, 16),
}


def plot(rows: list[Row], path: Path) -> None:
    """Bars of milliseconds by problem and way, one panel for each pass."""
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, len(PASSES), figsize=(14, 5), sharey=True, layout="constrained")
    problems = list(dict.fromkeys(row["problem"] for row in rows))
    for panel, name in zip(panels, PASSES, strict=True):
        for i, way in enumerate(WAYS):
            times = {
                row["problem"]: row["ms"] for row in rows if (row["pass"], row["way"]) == (name, way) and "ms" in row
            }
            places = [problems.index(x) + 0.2 * i for x in times]
            bars = panel.bar(places, times.values(), width=0.18, color=f"C{i}", label=way)
            panel.bar_label(bars, fmt="%.3g", fontsize=7)
        panel.set_xticks(
            [i + 0.3 for i in range(len(problems))],
            [x.replace(": ", "\n").replace(", ", "\n") for x in problems],
            fontsize=8,
        )
        panel.set_title({"fwd": "forward", "bwd": "backward"}[name])
    panels[0].set_yscale("log")
    panels[0].set_ylabel("milliseconds")
    panels[0].legend()
    figure.suptitle(f"{rows[0]['device']}, {rows[0]['dtype']}, torch {rows[0]['torch']}, triton {rows[0]['triton']}")
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.csv")
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--quick", action="store_true", help="tiny problems and few repeats, for a first look on a CPU")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--turns", type=Path, metavar="FILE", help="processes that name it take turns at timing")
    parser.add_argument("--commit", help="recorded instead of what git says, for a copy without its history")
    options = parser.parse_args()
    join(options.turns)

    device, dtype = torch.device(options.device), getattr(torch, options.dtype)
    where = provenance(device, options.commit)
    rows: list[Row] = []
    for name, problem in (TINY if options.quick else PROBLEMS).items():
        for way in options.ways:
            repeats = 3 if options.quick else 20
            results = measure(problem, WAYS[way], PASSES, dtype, device, False, repeats, options.turns)
            for which, result in results.items():
                rows.append({"problem": name, "way": way, "pass": which, "dtype": options.dtype} | result | where)
    for row in rows:
        ours = [other for other in rows if other["way"] == "fused_na" and "ms" in other]
        same = [other["ms"] for other in ours if (other["problem"], other["pass"]) == (row["problem"], row["pass"])]
        if same and "ms" in row:
            row["times_fused_na"] = row["ms"] / same[0]
    columns = ["problem", "way", "pass", "dtype", "status", "ms", "host_ms", "times_fused_na", "max_error"]
    write_csv(options.out, [{name: row.get(name, "") for name in [*columns, *where]} for row in rows])
    plot(rows, options.out.with_suffix(".png"))
    print_table(rows, columns)
    sys.exit(any(row["way"] == "fused_na" and row["status"] != "ok" for row in rows))


if __name__ == "__main__":
    main()
