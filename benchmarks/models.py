"""Images per second and peak memory of compiled models, training and inference, checked before they are timed.

    python benchmarks/models.py
    python benchmarks/models.py --models nat_tiny swin_tiny_patch4_window7_224 --batch-size 256

Compilation takes minutes a model. Processes with a model each, an output each and the same `--turns FILE` compile side
by side; while one is timed, the others stand still.

A training step is forward, backward and AdamW (fused on a GPU). Models run under autocast in `--dtype` and in
torch.compile, on random images of the size that their description in timm says, and without stochastic depth, so that
compiled gradients can be compared with eager ones. Rates are medians over rounds. `peak_gib` is the most that tensors
took, which is not known with `--cuda-graphs`, as graphs keep memory of their own; `reserved_gib` the most that PyTorch
held of the GPU, with what was free in its blocks and with graphs, in inference those of training too. Rows are written
as they come; a model that is wrong or fails has `status` instead, and the exit status is 1.
"""

import argparse
import csv
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import median
from time import perf_counter

import timm
import torch
from attention import Row, print_table
from record import ROOT, write_csv
from timing import provenance
from torch import Tensor, nn
from torch.nn import functional as F
from turns import alone, join

import nat_models  # noqa: F401  registers the models with timm

MODELS = [
    "nat_mini",
    "nat_tiny",
    "nat_base",
    "dinat_tiny",
    "dinat_s_tiny",
    "swin_tiny_patch4_window7_224",
    "convnext_tiny",
    "swin_base_patch4_window7_224",
    "convnext_base",
]
COLUMNS = ["model", "mode", "batch_size", "image_size", "dtype", "cuda_graphs", "status", "images_per_s", "peak_gib"]
COLUMNS += ["reserved_gib", "logits_error", "gradients_error", "parameters_m"]
TOLERANCE = {torch.bfloat16: 0.05, torch.float16: 0.02, torch.float32: 1e-3}
"""Relative, by norm; autocast to bfloat16 alone changes logits and gradients by about 0.01."""


class Subject:
    """A model, eager and compiled, with a batch of random images and labels."""

    def __init__(
        self,
        name: str,
        batch_size: int,
        image_size: int | None,
        dtype: torch.dtype,
        device: torch.device,
        backend: str,
        cuda_graphs: bool = False,
    ) -> None:
        torch.manual_seed(0)
        self.model = timm.create_model(name, drop_path_rate=0.0).to(device)
        in_chans, *size = self.model.pretrained_cfg["input_size"]
        size = size if image_size is None else [image_size, image_size]
        self.images = torch.randn(batch_size, in_chans, *size, device=device)
        self.labels = torch.randint(self.model.num_classes, (batch_size,), device=device)
        mode = "reduce-overhead" if cuda_graphs else None
        self.compiled: nn.Module = torch.compile(self.model, backend=backend, mode=mode)  # type: ignore[assignment]
        self.device, self.dtype, self.cuda_graphs = device, dtype, cuda_graphs

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def infer(self, model: nn.Module) -> Tensor:
        """Logits `[B, num_classes]`."""
        model.eval()
        torch.compiler.cudagraph_mark_step_begin()
        with torch.no_grad(), self._autocast():
            return model(self.images)

    def backward(self, model: nn.Module) -> None:
        """Leaves the gradients of the cross-entropy in the parameters."""
        model.train()
        model.zero_grad(set_to_none=True)
        torch.compiler.cudagraph_mark_step_begin()
        with self._autocast():
            loss = F.cross_entropy(model(self.images), self.labels)
        loss.backward()

    def gradients(self, model: nn.Module) -> Tensor:
        """All gradients, one after the other."""
        self.backward(model)
        missing = torch.full((1,), torch.nan, device=self.device)
        gradients = [parameter.grad for parameter in self.model.parameters() if parameter.requires_grad]
        return torch.cat([missing if gradient is None else gradient.flatten() for gradient in gradients])

    def errors(self) -> dict[str, float]:
        """How far logits and gradients of the compiled model are from the eager one's, relative, by norm.

        Infinite where anything is not finite or a parameter has no gradient.
        """
        found = {}
        for name, compute in (("logits_error", self.infer), ("gradients_error", self.gradients)):
            expected = compute(self.model).float()
            torch.cuda.empty_cache()  # which other processes may need
            actual = compute(self.compiled).float()
            error = torch.linalg.vector_norm(actual - expected) / torch.linalg.vector_norm(expected)
            found[name] = error.item() if error.isfinite() else float("inf")
        return found


def measure(subject: Subject, steps: int, rounds: int, turns: Path | None = None) -> dict[str, Row]:
    """Images per second and peak memory by mode, if the compiled model is right; its errors in any case."""
    found = subject.errors()
    result: Row = dict(found)
    wrong = [f"{name} {error:.1e}" for name, error in found.items() if not error <= TOLERANCE[subject.dtype]]
    if wrong:
        return {mode: result | {"status": f"wrong: {', '.join(wrong)}"} for mode in ("train", "inference")}

    optimizer = torch.optim.AdamW(subject.model.parameters(), lr=1e-5, fused=subject.device.type == "cuda")

    def train() -> None:
        subject.backward(subject.compiled)
        optimizer.step()

    with alone(turns):
        results = {"train": result | rate(train, subject, steps, rounds)}
        optimizer.zero_grad(set_to_none=True)
        optimizer.state.clear()
        results["inference"] = result | rate(lambda: subject.infer(subject.compiled), subject, steps, rounds)
    return results


def rate(step: Callable[[], object], subject: Subject, steps: int, rounds: int) -> Row:
    """Images per second, and on a GPU peak memory in GiB, of a step that is repeated."""
    device = torch.get_device_module(subject.device)
    for _ in range(3):
        step()
    if subject.device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    rates = []
    for _ in range(rounds):
        device.synchronize()
        begin = perf_counter()
        for _ in range(steps):
            step()
        device.synchronize()
        rates.append(steps * len(subject.images) / (perf_counter() - begin))
    result: Row = {"status": "ok", "images_per_s": median(rates)}
    if subject.device.type == "cuda":
        result["reserved_gib"] = torch.cuda.max_memory_reserved() / 2**30
        if not subject.cuda_graphs:
            result["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
    return result


def rows_of(name: str, options: argparse.Namespace) -> Iterable[Row]:
    """One row for training and one for inference."""
    device, dtype = torch.device(options.device), getattr(torch, options.dtype)
    row: Row = {"model": name, "batch_size": options.batch_size, "dtype": options.dtype}
    row["cuda_graphs"] = "yes" if options.cuda_graphs else "no"
    try:
        subject = Subject(
            name, options.batch_size, options.image_size, dtype, device, options.backend, options.cuda_graphs
        )
        row["image_size"] = subject.images.shape[-1]
        row["parameters_m"] = sum(parameter.numel() for parameter in subject.model.parameters()) / 1e6
        results = measure(subject, options.steps, options.rounds, options.turns)
    except Exception as failure:  # an unknown name, out of memory, what torch.compile cannot do: as many kinds
        lines = str(failure).splitlines() or [""]
        status = f"failed: {type(failure).__name__}: {lines[0][:200]}"
        results = {mode: {"status": status} for mode in ("train", "inference")}
    torch.compiler.reset()
    return [row | {"mode": mode} | result for mode, result in results.items()]


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=MODELS, metavar="NAME", help="timm names (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=128, help="images (default: %(default)s)")
    parser.add_argument("--image-size", type=int, help="pixels a side, for models that take any (default: the model's)")
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16")
    parser.add_argument("--backend", default="inductor", help="of torch.compile (default: %(default)s)")
    parser.add_argument(
        "--cuda-graphs", action="store_true", help="compile with mode='reduce-overhead': the host's time does not count"
    )
    parser.add_argument("--steps", type=int, default=10, help="in a round (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="(default: %(default)s)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--commit", help="recorded instead of what git says, for a copy without its history")
    parser.add_argument("--output", type=Path, metavar="FILE.csv", help="(default: results/models_DEVICE.csv)")
    parser.add_argument("--append", action="store_true", help="keep the rows that the output file has")
    parser.add_argument("--turns", type=Path, metavar="FILE", help="names the processes on the same GPU")
    return parser.parse_args()


def main() -> None:
    options = parse_arguments()
    join(options.turns)
    where = provenance(torch.device(options.device), options.commit)
    device_name = re.sub(r"\W+", "_", str(where["device"])).strip("_").lower()
    output = options.output or ROOT / "results" / f"models_{device_name}.csv"
    written: list[dict] = []
    if options.append and output.exists():
        with output.open(newline="") as file:
            written = [{name: row.get(name, "") for name in [*COLUMNS, *where]} for row in csv.DictReader(file)]
    rows: list[Row] = []
    for name in options.models:
        rows += rows_of(name, options)
        write_csv(output, written + [{key: row.get(key, "") for key in COLUMNS} | where for row in rows])
        done = ", ".join(f"{row['mode']} {row.get('images_per_s', row['status'])}" for row in rows[-2:])
        print(f"{name}: {done}", file=sys.stderr, flush=True)
    print_table(rows, COLUMNS)
    print(f"written to {output}")
    sys.exit(any(row["status"] != "ok" for row in rows))


if __name__ == "__main__":
    main()
