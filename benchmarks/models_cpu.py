"""Images per second of models on the CPU, side by side in one process.

    python benchmarks/models_cpu.py [MODEL ...] [--baseline swin_tiny_patch4_window7_224]

Each round times every model once, so that a change in the machine's load meets all of them alike; reported are the
medians over the rounds of the images per second and of the ratio to the baseline within a round.
"""

import argparse
from pathlib import Path
from statistics import median
from time import perf_counter

import timm
import torch
from record import ROOT, write_csv
from rich.console import Console
from rich.table import Table
from timing import provenance
from torch import Tensor, nn

import nat_models  # noqa: F401  registers the models with timm

MODES = ("forward", "forward+backward")


def forward(model: nn.Module, images: Tensor) -> Tensor:
    """Inference: `[B, classes]` logits without a graph."""
    model.eval()
    with torch.inference_mode():
        return model(images)


def forward_backward(model: nn.Module, images: Tensor) -> Tensor:
    """What a training step does but for the optimiser; returns the logits."""
    model.train()
    model.zero_grad()
    logits = model(images)
    logits.logsumexp(-1).sum().backward()
    return logits


def check(model: nn.Module, images: Tensor) -> None:
    """Raises unless all logits and gradients are finite, so that no broken model is timed; warms up as well."""
    for name, step in (("logits", forward), ("training logits", forward_backward)):
        if not step(model, images).isfinite().all():
            raise RuntimeError(f"{type(model).__name__}: {name} are not finite")
    for name, parameter in model.named_parameters():
        if parameter.grad is None or not parameter.grad.isfinite().all():
            raise RuntimeError(f"{type(model).__name__}: no finite gradient of {name}")


def measure(models: dict[str, nn.Module], images: Tensor, rounds: int) -> dict[tuple[str, str], list[float]]:
    """Images per second of each round by model and mode."""
    rates: dict[tuple[str, str], list[float]] = {(name, mode): [] for name in models for mode in MODES}
    for _ in range(rounds):
        for mode, step in zip(MODES, (forward, forward_backward), strict=True):
            for name, model in models.items():
                start = perf_counter()
                step(model, images)
                rates[name, mode].append(len(images) / (perf_counter() - start))
    return rates


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=["nat_tiny"], help="timm names (default: nat_tiny)")
    parser.add_argument("--baseline", default="swin_tiny_patch4_window7_224", help="timm name (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=8, help="images (default: %(default)s)")
    parser.add_argument("--image-size", type=int, default=224, help="pixels a side (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=10, help="(default: %(default)s)")
    parser.add_argument(
        "--threads", type=int, default=torch.get_num_threads(), help="(default: one a core, %(default)s)"
    )
    parser.add_argument("--output", type=Path, default=ROOT / "results" / "models_cpu.csv", help="CSV to write")
    arguments = parser.parse_args()

    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    images = torch.randn(arguments.batch_size, 3, arguments.image_size, arguments.image_size)
    models = {name: timm.create_model(name) for name in dict.fromkeys([arguments.baseline, *arguments.models])}
    for model in models.values():
        check(model, images)
    rates = measure(models, images, arguments.rounds)

    recorded = provenance(torch.device("cpu"), None)
    rows = []
    for (name, mode), rate in rates.items():
        ratios = [r / baseline for r, baseline in zip(rate, rates[arguments.baseline, mode], strict=True)]
        rows.append(
            {
                "model": name,
                "parameters_m": f"{sum(p.numel() for p in models[name].parameters()) / 1e6:.2f}",
                "mode": mode,
                "batch_size": arguments.batch_size,
                "image_size": arguments.image_size,
                "images_per_s": f"{median(rate):.2f}",
                "baseline": arguments.baseline,
                "ratio": f"{median(ratios):.3f}",
                "rounds": arguments.rounds,
                **recorded,
            }
        )
    table = Table("model", "mode", "images/s", "ratio")
    for row in rows:
        table.add_row(row["model"], row["mode"], row["images_per_s"], row["ratio"])
    console = Console()
    console.print(f"batch {arguments.batch_size} at {arguments.image_size}, medians of {arguments.rounds} rounds")
    console.print(", ".join(f"{name} {value}" for name, value in recorded.items()))
    console.print(table)
    write_csv(arguments.output, rows)
    console.print(f"written to {arguments.output}")


if __name__ == "__main__":
    main()
