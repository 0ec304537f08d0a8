"""How near the shipped choice of tiles comes to the best that a search finds, kernel by kernel.

    python benchmarks/tiles.py --case img_s1,vid_s1 --rpb with --out results/tiles.csv
    python benchmarks/tiles.py --out results/tiles.csv      # all cases, and 30 random problems

Every choice runs on the same tensors; its result is compared with the shipped choice's, which the tests hold against
the reference; it is timed as in `timing.py`. Rows are the shipped choice and the fastest others. Processes of their own
compile the kernels beforehand, into Triton's cache.
"""

import argparse
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import product
from multiprocessing import get_context
from pathlib import Path

import torch
import triton
from attention import CASES, Row, listed, print_table
from problems import Problem, random_problem
from record import write_csv
from timing import milliseconds, provenance
from torch import Tensor
from turns import alone, join

from fused_na.triton import attention
from fused_na.triton.geometry import Geometry
from fused_na.triton.plan import plan_of
from fused_na.triton.prepare import PREPARE
from fused_na.triton.problem import Tensors, problem_of
from fused_na.triton.tiles import (
    Tiles,
    as_three_axes,
    choose_tiles,
    column_pairs,
    executed_in_columns,
    executed_scores,
    extents,
    regime,
)

PROBLEMS = CASES | {f"random_{seed}": random_problem(seed) for seed in range(30)}
RESULTS = {
    "forward": ("output", "lse"),
    "query": ("grad_query", "delta"),
    "key_value": ("grad_key", "grad_value"),
    "bias": ("grad_rpb",),
}
# Rows of a kernel's own tile, rows of the tiles it loops over, warps.
SMALL = [(rows, moving, warps) for rows, warps in ((16, 1), (32, 1), (64, 2)) for moving in (16, 32, 64)]
SMALL += [(64, 32, 4), (64, 64, 4)]
REGISTERS = (None, 168, 128)  # at most, of a thread of the small ones
LARGE = [(64, 32, 4), (64, 64, 4), (128, 32, 4), (128, 64, 4), (128, 32, 8), (128, 64, 8), (128, 128, 8)]
# Rows of the tiles that the kernels of `wide.py` loop over, and stages.
WIDE = [(128, 3), (64, 3), (64, 4)]


class Subject:
    """One kernel on the tensors of a problem; the tiles are still to be given."""

    def __init__(self, problem: Problem, kernel: str, has_rpb: bool, device: torch.device, dtype: torch.dtype) -> None:
        query, key, value, rpb, incoming = problem.inputs(dtype, device, has_rpb, seed=0)
        scale = problem.head_dim**-0.5
        output, lse = attention.forward(query, key, value, problem.axes, scale, rpb, None, None)
        self.tensors: Tensors = {"query": query, "key": key, "value": value, "rpb": attention.unscaled(rpb, scale)}
        self.tensors |= {"additional_keys": None, "additional_values": None}
        if kernel != "forward":
            self.tensors |= {"grad_output": incoming, "grad_lse": None}
        self.kernel, self.problem = kernel, problem_of(problem.axes, scale, self.tensors)
        self.geometry = Geometry(self.problem)
        rows = lse.movedim(-1, 1)  # as the kernels take them
        self.tensors |= {"output": output, "lse": rows, "delta": torch.empty_like(rows)}
        written = {"grad_query": query, "grad_key": key, "grad_value": value, "grad_rpb": rpb}
        for name, x in written.items():
            self.tensors[name] = None if x is None else torch.empty(x.shape, dtype=x.dtype, device=device)
        if kernel in ("key_value", "bias"):
            plan_of("query", self.problem).run(self.tensors)  # writes delta

    @property
    def shipped(self) -> Tiles:
        return choose_tiles(self.kernel, self.geometry.workload)

    def candidates(self) -> Iterator[Tiles]:
        """The shipped choice, then for each number of rows, warps and stages the extents that execute least, with bulk
        copies where these can be, and by columns."""
        yield self.shipped
        axes = as_three_axes(self.problem.axes)
        workload, over_keys = self.geometry.workload, self.kernel != "key_value"
        is_small = regime(workload).startswith("small")
        bulk = not any(axis.length % axis.dilation for axis in axes)
        ways: list[tuple[int, int, int, int, int | None, bool]] = []
        for (rows, moving, warps), stages in product(SMALL if is_small else LARGE, (2, 3)):
            limits = REGISTERS if is_small and rows * moving <= 1024 else (None,)
            ways += [(rows, moving, warps, stages, registers, False) for registers in limits]
        if workload.is_wide and self.kernel != "bias":
            ways += [(128, moving, 4, stages, 168, True) for moving, stages in WIDE]
        found = {self.shipped}
        for rows, moving, warps, stages, registers, is_wide in ways:
            tilings = [
                (executed_scores(axes, s, m, over_keys), -m[2], -s[2], s, m)
                for s in extents(rows, axes)
                for m in extents(moving, axes)
            ]
            if tilings:
                *_, s, m = min(tilings)
                query, key = (s, m) if over_keys else (m, s)
                tiles = Tiles(query, key, warps, stages, bulk, registers, is_wide)
                if tiles not in found:
                    found.add(tiles)
                    yield tiles
        if workload.has_columns and self.kernel != "bias":
            for tokens, registers in product((16, 32, 64), REGISTERS):
                tilings = [
                    (executed_in_columns(axes, *pair, over_keys), *pair)
                    for pair in column_pairs(axes, tokens, over_keys)
                ]
                for executed, s, m in tilings:
                    query, key = (s, m) if over_keys else (m, s)
                    tiles = Tiles(query, key, 1, 2, True, registers, is_columns=True)
                    if executed == min(tilings)[0] and tiles not in found:
                        found.add(tiles)
                        yield tiles

    def prepare(self, tiles: Tiles) -> Callable[[], object]:
        """What runs the kernel with certain tiles, after it ran once."""
        prepared = PREPARE[self.kernel](self.geometry, tiles)
        for name in RESULTS[self.kernel]:
            result = self.tensors[name]
            assert result is not None
            result.fill_(torch.nan)

        def run() -> None:
            prepared.run(self.tensors, self.problem.device)

        run()
        return run

    def results(self) -> Tensor:
        return torch.cat([self.tensors[name].float().flatten() for name in RESULTS[self.kernel]])  # type: ignore[union-attr]


def rows_of(
    case: str, kernel: str, has_rpb: bool, top: int, turns: Path | None, device: torch.device, dtype: torch.dtype
) -> list[Row]:
    """The shipped choice and the `top` fastest others, which are timed again, more often."""
    subject = Subject(PROBLEMS[case], kernel, has_rpb, device, dtype)
    subject.prepare(subject.shipped)
    expected = subject.results()
    right: list[tuple[Row, Callable[[], object]]] = []
    failed: list[Row] = []
    for tiles in subject.candidates():
        row: Row = {"case": case, "kernel": kernel, "rpb": "with" if has_rpb else "without"}
        row |= {"tiles": " ".join("x".join(map(str, x)) for x in tiles[:2])}
        row |= {"warps": tiles.num_warps, "stages": tiles.num_stages}
        row |= {"registers": tiles.max_registers or "any"}
        row |= {"loads": "bulk" if tiles.bulk else "pointers"}
        row |= {"by": "columns" if tiles.is_columns else "wide tiles" if tiles.is_wide else "tiles"}
        try:
            run = subject.prepare(tiles)
        except triton.runtime.errors.OutOfResources as error:
            failed.append(row | {"status": f"failed: {error}"})
            continue
        error = (torch.linalg.vector_norm(subject.results() - expected) / torch.linalg.vector_norm(expected)).item()
        if not error < 0.02:
            failed.append(row | {"status": f"wrong: differs by {error:.1e} from the shipped choice"})
            continue
        right.append((row | {"status": "ok", "max_error": error}, run))
    with alone(turns):
        for row, run in right:
            row["ms"] = milliseconds([run], device, repeats=1)
        shipped, *others = right
        others.sort(key=lambda pair: pair[0]["ms"])
        chosen = [shipped, *others[:top]]
        for row, run in chosen:
            row["ms"] = milliseconds([run], device, repeats=7)
            row["times_shipped"] = row["ms"] / shipped[0]["ms"]  # type: ignore[operator]
    shipped[0]["choice"] = "shipped"
    return [row for row, _ in chosen] + failed


def compile_share(jobs: list, device: torch.device, dtype: torch.dtype, share: int, shares: int) -> None:
    """Runs a share of all choices once, so that their kernels are in Triton's cache."""
    for case, kernel, has_rpb in jobs:
        subject = Subject(PROBLEMS[case], kernel, has_rpb, device, dtype)
        for tiles in list(subject.candidates())[share::shares]:
            with suppress(triton.runtime.errors.OutOfResources):
                subject.prepare(tiles)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--case", type=listed(PROBLEMS), metavar="NAME,...", help=f"of {', '.join(PROBLEMS)} (default: all)"
    )
    parser.add_argument("--kernels", type=listed(RESULTS), default=list(RESULTS), metavar="NAME,...")
    parser.add_argument("--rpb", choices=["with", "without"], default="without", help="relative positional bias")
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16")
    parser.add_argument("--device", default="cuda:0", help="cpu with TRITON_INTERPRET=1, to see that it runs")
    parser.add_argument("--top", type=int, default=3, help="others to list (default: %(default)s)")
    parser.add_argument("--processes", type=int, default=8, help="that compile (default: %(default)s)")
    parser.add_argument("--turns", type=Path, metavar="FILE", help="processes that name it take turns at timing")
    parser.add_argument("--commit", help="recorded instead of what git says, for a copy without its history")
    parser.add_argument("--out", type=Path, metavar="FILE.csv")
    options = parser.parse_args()
    join(options.turns)
    has_rpb = options.rpb == "with"
    kernels = [kernel for kernel in options.kernels if has_rpb or kernel != "bias"]
    cases = options.case or [name for name in PROBLEMS if not name.startswith("tiny")]
    jobs = [(case, kernel, has_rpb) for case in cases for kernel in kernels]

    context = get_context("spawn")
    where = torch.device(options.device), getattr(torch, options.dtype)
    processes = [
        context.Process(target=compile_share, args=(jobs, *where, share, options.processes))
        for share in range(options.processes)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()

    rows = [row for job in jobs for row in rows_of(*job, options.top, options.turns, *where)]
    columns = [
        "case",
        "kernel",
        "rpb",
        "tiles",
        "warps",
        "stages",
        "registers",
        "loads",
        "by",
        "choice",
        "status",
        "ms",
        "times_shipped",
    ]
    found = provenance(where[0], options.commit)
    if options.out:
        write_csv(options.out, [{name: row.get(name, "") for name in [*columns, "max_error"]} | found for row in rows])
    print_table(rows, columns)
    others = [row for row in rows if "times_shipped" in row and row.get("choice") != "shipped"]
    if others:
        best = min(others, key=lambda row: row["times_shipped"])
        worst = f"{best['case']} {best['kernel']}"
        print(f"Furthest from the best found: {worst}, {1 / best['times_shipped']:.3f} of its time")


if __name__ == "__main__":
    main()
