"""Times neighborhood attention beside other implementations, each checked before it is timed.

    python benchmarks/attention.py --suite image --pass both --out results/attention.csv
    python benchmarks/attention.py --case img_s1 --providers fused_na,sdpa --dtype bfloat16 --rpb without

Cases are those of `problems.py`. Times are medians on the device, see `timing.py`; `x_NAME` is how many times as long
NAME takes, and `natten_published_ms` are `problems.NATTEN_MS`. The file is written anew after each case. Exits with 1
if fused_na is wrong or fails. FlexAttention takes long to compile: processes with cases, providers and outputs of their
own and the same `--turns FILE` compile side by side; while one is timed, the others stand still.
"""

import argparse
import sys
from itertools import product
from pathlib import Path

import torch
from problems import NATTEN_MS, SUITES, Problem
from providers import PROVIDERS
from record import write_csv
from rich import box
from rich.console import Console
from rich.table import Table
from timing import PASSES, measure, provenance
from turns import join

CASES = {name: problem for suite in SUITES.values() for name, problem in suite.items()}
Row = dict[str, str | float]


def rows_of(case: str, problem: Problem, dtype: torch.dtype, has_rpb: bool, options: argparse.Namespace) -> list[Row]:
    """One row for each provider and pass."""
    rows = []
    device = torch.device(options.device)
    for provider in options.providers:
        repeats = 3 if options.quick else 20
        results = measure(problem, PROVIDERS[provider], options.passes, dtype, device, has_rpb, repeats, options.turns)
        for name, result in results.items():
            row: Row = {"case": case, "provider": provider, "pass": name, "dtype": str(dtype).removeprefix("torch.")}
            row |= {"rpb": "with" if has_rpb else "without"} | result
            if "ms" in result:
                seconds = result["ms"] / 1e3
                row["tflops"] = problem.flops(name == "bwd") / seconds / 1e12
                row["tb_per_s"] = problem.bytes(name == "bwd", dtype.itemsize) / seconds / 1e12
            rows.append(row)
    for row in rows:
        others = {other["provider"]: other["ms"] for other in rows if other["pass"] == row["pass"] and "ms" in other}
        published = NATTEN_MS.get(case, (None, None))[PASSES.index(row["pass"])]
        if published and dtype == torch.bfloat16 and not has_rpb:
            row["natten_published_ms"] = others["natten_published"] = published
        if "ms" in row:
            row |= {f"x_{other}": ms / row["ms"] for other, ms in others.items() if other != row["provider"]}
    return rows


def print_table(rows: list[Row], columns: list[str]) -> None:
    """The times, then what has none and why."""
    timed = [row for row in rows if row["status"] == "ok"]
    columns = [column for column in columns if column != "status" and any(column in row for row in timed)]
    table = Table(*columns, box=box.SIMPLE)
    for row in timed:
        cells = (row.get(column, "") for column in columns)
        table.add_row(*(f"{cell:.3g}" if isinstance(cell, float) else str(cell) for cell in cells))
    console = Console(width=20 * len(columns))
    console.print(table)
    for status in dict.fromkeys(row["status"] for row in rows if row["status"] != "ok"):
        same = dict.fromkeys(" ".join(map(str, list(row.values())[:3])) for row in rows if row["status"] == status)
        console.print(f"{status}\n    {', '.join(same)}", highlight=False)


def listed(allowed):
    """A comma-separated choice of names, as an argument's type."""

    def parse(text: str) -> list[str]:
        names = text.split(",")
        for name in names:
            if name not in allowed:
                raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(allowed)}")
        return names

    return parse


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--suite", choices=["image", "video", "large", "all", "smoke"], help="smoke: tiny, for the CPU")
    which.add_argument("--case", type=listed(CASES), metavar="NAME,...", help=f"of {', '.join(CASES)}")
    parser.add_argument("--providers", type=listed(PROVIDERS), default=list(PROVIDERS), metavar="NAME,...")
    parser.add_argument("--pass", choices=["fwd", "bwd", "both"], default="both", dest="passes")
    parser.add_argument(
        "--dtype", type=listed(["bfloat16", "float16", "float32"]), help="default: bfloat16, and float16 on images"
    )
    parser.add_argument("--rpb", choices=["with", "without", "both"], default="both", help="relative positional bias")
    parser.add_argument("--quick", action="store_true", help="few repeats, for a first look")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--turns", type=Path, metavar="FILE", help="processes that name it take turns at timing")
    parser.add_argument("--commit", help="recorded instead of what git says, for a copy without its history")
    parser.add_argument("--out", type=Path, metavar="FILE.csv")
    options = parser.parse_args()
    options.passes = list(PASSES) if options.passes == "both" else [options.passes]
    return options


def main() -> None:
    options = parse_arguments()
    join(options.turns)
    suites = [name for name in SUITES if name != "smoke"] if options.suite == "all" else [options.suite]
    names = options.case or [name for suite in suites for name in SUITES[suite]]
    columns = ["case", "provider", "pass", "dtype", "rpb", "status", "ms", "host_ms", "tflops", "tb_per_s", "max_error"]
    ratios = [f"x_{name}" for name in options.providers] + ["natten_published_ms", "x_natten_published"]
    where = provenance(torch.device(options.device), options.commit)
    rows: list[Row] = []
    for case in names:
        dtypes = options.dtype or (["bfloat16", "float16"] if case in SUITES["image"] else ["bfloat16"])
        biases = {"with": [True], "without": [False], "both": [False, True]}[options.rpb]
        for dtype, has_rpb in product(dtypes, biases):
            rows += rows_of(case, CASES[case], getattr(torch, dtype), has_rpb, options)
            if options.out:
                write_csv(options.out, [{name: row.get(name, "") for name in columns + ratios} | where for row in rows])
            print(f"{case} {dtype} {'with' if has_rpb else 'without'} rpb done", file=sys.stderr, flush=True)

    print_table(rows, columns + ratios)
    sys.exit(any(row["provider"] == "fused_na" and row["status"] != "ok" for row in rows))


if __name__ == "__main__":
    main()
