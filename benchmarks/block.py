"""What attention takes of the half of a transformer block that holds it, as models run both.

    python benchmarks/block.py --suite image --out results/block.csv

`attention` is `packed_neighborhood_attention` with a bias, whose backward leaves the gradients of the projection and of
the bias; `block` is normalisation, projection, attention, projection and residual connection, under autocast and
compiled, whose backward leaves the gradients of its input and of all parameters. Cases are those of `attention.py`.

Outputs and the gradients of the inputs are checked before anything is timed, on the first sample: attention by PyTorch
alone (`backend="blocked"`) in float32. Times are medians on the device, see `timing.py`; backward is forward and
backward less forward.
"""

import argparse
import sys
from collections.abc import Callable
from contextlib import nullcontext
from math import ceil
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from attention import CASES, Row, listed, print_table
from problems import SUITES, Problem
from record import write_csv
from timing import CACHE, PASSES, TOLERANCE, milliseconds, provenance
from torch import Tensor, nn
from turns import alone, join

from fused_na import neighborhood_attention, packed_neighborhood_attention
from nat_models.layers import (
    NeighborhoodAttention,
    NeighborhoodAttention1D,
    NeighborhoodAttention2D,
    NeighborhoodAttention3D,
)

ATTENTION = (NeighborhoodAttention1D, NeighborhoodAttention2D, NeighborhoodAttention3D)
Part = Callable[[Tensor], Tensor]


class Half(nn.Module):
    """The half of `nat_models.layers.Block` that holds attention, for a problem."""

    def __init__(self, problem: Problem) -> None:
        super().__init__()
        dim = problem.heads * problem.head_dim
        self.norm = nn.LayerNorm(dim)
        self.attn: NeighborhoodAttention = ATTENTION[len(problem.axes) - 1](dim, problem.heads, **problem.options)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, *spatial, C]` -> `[B, *spatial, C]`."""
        return x + self.attn(self.norm(x))


def parts(problem: Problem, dtype: torch.dtype, device: torch.device) -> dict[str, tuple[Part, list[Tensor], tuple]]:
    """By name: the function that is timed, its parameters, and the shape and dtype of its input."""
    torch.manual_seed(0)
    half = Half(problem).to(device)
    assert half.attn.rpb is not None
    nn.init.normal_(half.attn.rpb)
    rule = tuple(problem.options.values())
    maps = problem.batch, *problem.spatial

    def attention(qkv: Tensor) -> Tensor:
        return packed_neighborhood_attention(qkv, *rule, None, half.attn.rpb)

    torch.compiler.reset()
    compiled = torch.compile(half, fullgraph=True, dynamic=False) if device.type == "cuda" else half

    def block(x: Tensor) -> Tensor:
        with torch.autocast(device.type, dtype) if dtype != torch.float32 else nullcontext():
            return compiled(x)

    width = problem.heads * problem.head_dim
    return {
        "attention": (attention, [half.attn.rpb], ((*maps, 3, problem.heads, problem.head_dim), dtype)),
        "block": (block, list(half.parameters()), ((*maps, width), torch.float32)),
    }


def error_of(part: Part, inputs: Tensor, incoming: Tensor) -> float:
    """The larger relative error, by norm, of output and input's gradient, on the first sample."""

    def first(part: Part, inputs: Tensor) -> list[Tensor]:
        inputs = inputs.detach().requires_grad_()
        output = part(inputs)
        gradient = torch.autograd.grad(output, inputs, incoming[: len(inputs)].to(output.dtype))[0]
        return [x[0].float() for x in (output.detach(), gradient)]

    actual = first(part, inputs)

    def portable(qkv: Tensor, *rule: Any) -> Tensor | tuple[Tensor, Tensor]:
        return neighborhood_attention(*qkv.unbind(-3), *rule, backend="blocked")

    with (
        patch("nat_models.layers.packed_neighborhood_attention", portable),
        patch(f"{__name__}.packed_neighborhood_attention", portable),
        patch("torch.autocast", lambda *_: nullcontext()),
        torch.compiler.set_stance("force_eager"),
    ):
        expected = first(part, inputs[:1].float())
    errors = [((x - y).norm() / y.norm()).item() for x, y in zip(actual, expected, strict=True)]
    return max(errors) if all(x.isfinite().all() for x in actual) else float("inf")


def rows_of(
    case: str, problem: Problem, dtype: torch.dtype, device: torch.device, repeats: int, turns: Path | None
) -> list[Row]:
    """One row for each part and pass."""
    rows: list[Row] = []
    for name, (part, parameters, (shape, input_dtype)) in parts(problem, dtype, device).items():
        sets = ceil(CACHE / problem.bytes(False, dtype.itemsize)) if device.type == "cuda" else 1
        inputs = [torch.randn(shape, dtype=input_dtype, device=device).requires_grad_() for _ in range(sets)]
        incoming = torch.randn_like(part(inputs[0]))
        error = error_of(part, inputs[0], incoming)
        row: Row = {"case": case, "part": name, "dtype": str(dtype).removeprefix("torch."), "max_error": error}
        if not error <= TOLERANCE[dtype]:
            rows += [row | {"pass": which, "status": "wrong"} for which in PASSES]
            continue

        def both(x: Tensor, part=part, parameters=parameters, incoming=incoming) -> object:
            return torch.autograd.grad(part(x), [x, *parameters], incoming)

        with alone(turns):
            forward = milliseconds([lambda x=x, part=part: part(x) for x in inputs], device, repeats)
            total = milliseconds([lambda x=x, both=both: both(x) for x in inputs], device, repeats)
        rows += [row | {"pass": "fwd", "status": "ok", "ms": forward}]
        rows += [row | {"pass": "bwd", "status": "ok", "ms": total - forward}]
    for row in rows:
        same = [other for other in rows if other["pass"] == row["pass"] and "ms" in other]
        if len(same) == 2:
            row["share"] = float(row["ms"]) / float(same[1]["ms"])
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--suite", choices=["image", "video"])
    which.add_argument("--case", type=listed(CASES), metavar="NAME,...", help=f"of {', '.join(CASES)}")
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16")
    parser.add_argument("--quick", action="store_true", help="few repeats, for a first look")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--turns", type=Path, metavar="FILE", help="processes that name it take turns at timing")
    parser.add_argument("--commit", help="recorded instead of what git says, for a copy without its history")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.csv")
    options = parser.parse_args()
    join(options.turns)
    device, dtype = torch.device(options.device), getattr(torch, options.dtype)
    where = provenance(device, options.commit)
    columns = ["case", "part", "pass", "dtype", "status", "ms", "share", "max_error"]
    rows: list[Row] = []
    for case in options.case or SUITES[options.suite]:
        rows += rows_of(case, CASES[case], dtype, device, 3 if options.quick else 20, options.turns)
        write_csv(options.out, [{name: row.get(name, "") for name in columns} | where for row in rows])
    print_table(rows, columns)
    sys.exit(any(row["status"] != "ok" for row in rows))


if __name__ == "__main__":
    main()
