"""The table and the picture in `docs/` of what `attention.py` measured.

    python benchmarks/attention_report.py results/attention-h100.csv docs/attention-h100.png

Prints Markdown: times in milliseconds, and how many times as long the others take; draws the times of all cases beside
the floor, the longest of what memory, exponentials and products need on that GPU.
"""

import argparse
import csv
from pathlib import Path

import matplotlib
from problems import NATTEN_MS, SUITES

CASES = {name: problem for suite in ("image", "video", "large") for name, problem in SUITES[suite].items()}
PASSES = {"fwd": "forward", "bwd": "backward"}
OTHERS = {"flex": "FlexAttention", "sdpa": "full attention", "natten_published": "NATTEN"}
# One H100 80GB: bytes and floating-point operations a second, measured (docs/kernel-budget.md); exponentials a second,
# 16 a cycle of each of 132 multiprocessors at 1.755 GHz.
BANDWIDTH, PRODUCTS, EXPONENTIALS = 3.02e12, 773e12, 16 * 132 * 1.755e9

Times = dict[tuple[str, str, str, str], float]  # milliseconds by case, provider, pass and "with" or "without" bias


def read(path: Path) -> Times:
    """Times in bfloat16."""
    with path.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["dtype"] == "bfloat16" and row["ms"]]
    times = {(row["case"], row["provider"], row["pass"], row["rpb"]): float(row["ms"]) for row in rows}
    for case, published in NATTEN_MS.items():
        for name, ms in zip(PASSES, published, strict=True):
            if ms is not None:
                times[case, "natten_published", name, "without"] = ms
    return times


def floor(case: str, which: str) -> float:
    """Milliseconds that no kernel can undercut."""
    problem, backward = CASES[case], which == "bwd"
    exponentials = problem.batch * problem.heads * problem.pairs
    seconds = (
        problem.bytes(backward, 2) / BANDWIDTH,
        problem.flops(backward) / PRODUCTS,
        exponentials / EXPONENTIALS,
    )
    return 1e3 * max(seconds)


def table(times: Times, rpb: str) -> str:
    """Markdown, a row for each case that was timed."""
    names = [name for name in OTHERS if any((name, rpb) == (key[1], key[3]) for key in times)]
    header = ["case"]
    for which in PASSES.values():
        header += [
            f"{which} ms",
            *(["of the time without"] if rpb == "with" else []),
            *(OTHERS[name] for name in names),
        ]
    lines = [header, ["---"] * len(header)]
    for case in CASES:
        if (case, "fused_na", "fwd", rpb) not in times:
            continue
        line = [case]
        for which in PASSES:
            ours = times[case, "fused_na", which, rpb]
            line.append(f"{ours:.3g}")
            if rpb == "with":
                plain = times.get((case, "fused_na", which, "without"))
                line.append(f"{ours / plain:.2f}" if plain else "")
            for name in names:
                other = times.get((case, name, which, rpb))
                line.append(f"{other / ours:.1f}x" if other else "")
        lines.append(line)
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def plot(times: Times, path: Path) -> None:
    """Bars of milliseconds, a row for each pass, the floor as a line across each case."""
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(2, 1, figsize=(15, 9), layout="constrained")
    providers = {"fused_na": "fused_na"} | OTHERS
    for panel, (which, title) in zip(panels, PASSES.items(), strict=True):
        for i, (name, label) in enumerate(providers.items()):
            found = {j: times.get((case, name, which, "without")) for j, case in enumerate(CASES)}
            shown = {j: ms for j, ms in found.items() if ms is not None}
            panel.bar([j + 0.2 * (i - 1.5) for j in shown], shown.values(), width=0.18, color=f"C{i}", label=label)
        floors = [floor(case, which) for case in CASES]
        panel.hlines(floors, [j - 0.45 for j in range(len(CASES))], [j + 0.45 for j in range(len(CASES))], color="k")
        panel.plot([], [], "k", label="floor")
        panel.set_yscale("log")
        panel.set_ylabel(f"{title}, milliseconds")
        panel.set_xticks(range(len(CASES)), CASES, rotation=20, ha="right", fontsize=9)
    panels[0].legend(ncols=5)
    figure.suptitle("Neighborhood attention in bfloat16 on one H100 80GB; full attention attends to all tokens")
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("times", type=Path, metavar="TIMES.csv")
    parser.add_argument("picture", type=Path, metavar="PICTURE.png")
    options = parser.parse_args()
    times = read(options.times)
    print(table(times, "without"), table(times, "with"), sep="\n\n")
    plot(times, options.picture)


if __name__ == "__main__":
    main()
