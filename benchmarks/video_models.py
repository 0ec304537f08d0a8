"""Clips per second and memory of video models in training and inference, and the latency of streams.

    python benchmarks/video_models.py [MODEL ...] [--frames 16 32] [--modes train] [--output results/video_models.csv]

On a GPU under bfloat16 autocast and torch.compile, without dropout and stochastic depth; with `--cuda-graphs` the
host's time does not count, and memory is not known. A model is one of this project's or torchvision's names; after a
colon stands a variant of ours: `nat3d_tiny:flex` has FlexAttention in place of our kernels. Before anything is timed,
logits (of inference) or gradients (of training) are compared with those of the model without torch.compile. Streaming
models are timed frame by frame: their step, and the whole model on its window of the last frames, which is what a model
without a state has to compute.

Compilation takes minutes a model. Processes with a model and a mode each, outputs each and the same `--turns FILE`
compile side by side; while one is timed, the others stand still.
"""

import argparse
import sys
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from statistics import mean, median
from time import perf_counter
from typing import Any
from unittest.mock import patch

import timm
import torch
import torchvision
from providers import block_mask, rule
from record import ROOT, write_csv
from rich.console import Console
from rich.table import Table
from timing import provenance
from torch import Tensor, nn
from torch.nn.attention.flex_attention import flex_attention
from torchvision.models.video import mvit
from turns import alone, join

import nat_models  # noqa: F401  registers the models with timm
from fused_na import packed_neighborhood_attention
from fused_na.window import Axis

ATTENTION = "nat_models.layers.packed_neighborhood_attention"
VARIANTS: dict[str, dict[str, Any]] = {
    "": {},
    "flex": {},
    "rope": dict(position="rope"),
    "windows": dict(stride=7),
}
MODELS = ["swin3d_t", "swin3d_b", "mvit_v2_s", "nat3d_tiny", "nat3d_tiny:flex", "nat3d_tiny_strided", "nat3d_small"]
STREAMS = ["nat_stream_tiny"]
MODES = ["inference", "train"]
NUM_CLASSES = 400
TOLERANCE = 0.05  # of results that should be the same, relative by norm, in bfloat16


class Flex:
    """`packed_neighborhood_attention` by FlexAttention, for the calls that it has been prepared for."""

    def __init__(self) -> None:
        self.problems: dict[tuple, tuple] = {}

    def prepare(self, qkv: Tensor, *options: Any) -> Tensor:
        """Stands in for attention while a model runs once: readies the rule and the mask of its calls.

        Raises:
            RuntimeError: FlexAttention does not give what our kernels do, on random inputs of the same shapes.
        """
        problem = self._problem(qkv, options)
        if problem in self.problems:
            return qkv.select(-3, 0)
        attends, place = rule(tuple(map(Axis, *problem)))
        tokens, device = qkv.shape[1:-3].numel(), qkv.device
        mask = block_mask(attends, tokens, device)
        self.problems[problem] = (mask, place)
        inputs = torch.randn(qkv.shape, dtype=qkv.dtype, device=device)
        *others, rpb = options
        rpb = None if rpb is None else torch.randn_like(rpb)
        expected = packed_neighborhood_attention(inputs, *others, rpb)
        actual = compiled(self.attend, device)(inputs, *others, rpb)
        error = ((actual - expected).float().norm() / expected.float().norm()).item()
        if not error < TOLERANCE:
            raise RuntimeError(f"FlexAttention differs by {error:.1e} from neighborhood attention of {problem}")
        return qkv.select(-3, 0)

    def attend(self, qkv: Tensor, *options: Any) -> Tensor:
        """The arguments of `packed_neighborhood_attention` up to `rpb`; the same result."""
        mask, place = self.problems[self._problem(qkv, options)]
        *_, scale, rpb = options
        score_mod = None
        if rpb is not None:
            bias = rpb.flatten(1)

            def score_mod(score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
                return score + bias[head, place(query, key)]

        query, key, value = qkv.flatten(1, -4).transpose(1, -2).unbind(2)  # each [B, heads, tokens, head_dim]
        output = flex_attention(query, key, value, score_mod=score_mod, block_mask=mask, scale=scale)
        return output.transpose(1, 2).unflatten(1, qkv.shape[1:-3])

    @staticmethod
    def _problem(qkv: Tensor, options: tuple) -> tuple:
        kernel_size, stride, dilation, is_causal, *_ = options
        return tuple(map(tuple, (qkv.shape[1:-3], kernel_size, stride, dilation, is_causal)))


def build(name: str, frames: int, size: int) -> nn.Module:
    """A model for clips of so many frames of `size` x `size`; torchvision's by torchvision's names."""
    name, _, variant = name.partition(":")
    if timm.is_model(name):
        settings = dict(num_classes=NUM_CLASSES, num_frames=frames, drop_path_rate=0.0)
        return timm.create_model(name, **settings | VARIANTS[variant])
    if name == "mvit_v2_s":  # whose positions are for 16 x 224 x 224 unless told otherwise
        build_mvit, sizes = mvit._mvit, dict(temporal_size=frames, spatial_size=(size, size))
        with patch.object(mvit, "_mvit", lambda **arguments: build_mvit(**arguments | sizes)):
            model = mvit.mvit_v2_s(num_classes=NUM_CLASSES)
    else:
        model = torchvision.models.get_model(name, num_classes=NUM_CLASSES)
    for module in model.modules():
        if isinstance(module, (nn.Dropout, torchvision.ops.StochasticDepth)):
            module.p = 0.0
    return model


def autocast(device: torch.device) -> torch.autocast:
    """bfloat16 on a GPU, nothing on the CPU."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


def compiled(function: Callable, device: torch.device, cuda_graphs: bool = False) -> Callable:
    """Compiled on a GPU, as it is on the CPU."""
    mode = "reduce-overhead" if cuda_graphs else None
    return torch.compile(function, dynamic=False, mode=mode) if device.type == "cuda" else function


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def seconds(call: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Median time of a call with all its work on the device."""
    for _ in range(3 if device.type == "cuda" else 1):
        call()
    times = []
    for _ in range(repeats):
        synchronize(device)
        begin = perf_counter()
        call()
        synchronize(device)
        times.append(perf_counter() - begin)
    return median(times)


def measure(call: Callable[[], object], device: torch.device, repeats: int) -> tuple[float, float | str]:
    """Median seconds of a call that has been called before, and the peak of memory in GiB while it ran, model included;
    none on the CPU.
    """
    if device.type != "cuda":
        return seconds(call, device, repeats), ""
    torch.cuda.reset_peak_memory_stats()
    return seconds(call, device, repeats), torch.cuda.max_memory_allocated() / 2**30


def clip_rows(name: str, frames: int, options: argparse.Namespace, device: torch.device) -> list[dict[str, Any]]:
    """Times of a model in training (with the optimiser's step) and inference."""
    torch.manual_seed(0)
    torch.compiler.reset()
    clip = torch.randn(options.batch_size, 3, frames, options.image_size, options.image_size, device=device)
    labels = torch.randint(NUM_CLASSES, (len(clip),), device=device)
    rows = []
    row: dict[str, Any] = dict(model=name, frames=frames, image_size=options.image_size, batch_size=len(clip))
    row["cuda_graphs"] = "yes" if options.cuda_graphs else "no"
    for mode in options.modes:
        result: dict[str, Any] = dict(clips_per_s="", ms="", peak_gib="", max_error="", status="ok")
        flex = Flex()
        is_flex = name.endswith(":flex")
        attention = partial(patch, ATTENTION, flex.attend) if is_flex else nullcontext
        try:
            model = build(name, frames, options.image_size).to(device)
            row["parameters_m"] = f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f}"
            if is_flex:
                with patch(ATTENTION, flex.prepare):
                    inference(model, clip, labels)
            model.train(mode == "train")
            fast = compiled(model, device, options.cuda_graphs)
            compute = gradients if mode == "train" else inference
            expected = compute(model, clip, labels)
            torch.cuda.empty_cache()  # which other processes may need
            with attention():
                actual = compute(fast, clip, labels)
            error = ((actual - expected).norm() / expected.norm()).item()
            result["max_error"] = f"{error:.1e}"
            if not error < TOLERANCE:
                raise RuntimeError(f"compiled, the results differ by {error:.1e}")
            actual = expected = None
            optimizer = torch.optim.AdamW(model.parameters(), fused=device.type == "cuda")
            run = partial(train_step, fast, optimizer) if mode == "train" else partial(inference, fast)
            torch.cuda.empty_cache()
            with alone(options.turns), attention():
                elapsed, peak = measure(partial(run, clip, labels), device, options.repeats)
            result["clips_per_s"], result["ms"] = f"{len(clip) / elapsed:.2f}", f"{1e3 * elapsed:.2f}"
            if peak and not options.cuda_graphs:
                result["peak_gib"] = f"{peak:.2f}"
        except Exception as failure:  # out of memory, a kernel that does not compile: as many kinds
            result["status"] = f"failed: {type(failure).__name__}: {(str(failure).splitlines() or [''])[0][:200]}"
        model = fast = optimizer = run = actual = expected = None
        torch.compiler.reset()
        torch.cuda.empty_cache()
        rows.append(row | dict(mode=mode) | result)
        print(name, frames, mode, result, file=sys.stderr, flush=True)
    return [dict(parameters_m="") | r for r in rows]


def inference(model: nn.Module, clip: Tensor, labels: Tensor) -> Tensor:
    """Logits `[B, classes]`, float32, without a graph."""
    torch.compiler.cudagraph_mark_step_begin()
    with torch.no_grad(), autocast(clip.device):
        return model(clip).float()


def backward(model: nn.Module, clip: Tensor, labels: Tensor) -> None:
    """Leaves the gradients of the cross-entropy in the parameters."""
    torch.compiler.cudagraph_mark_step_begin()
    with autocast(clip.device):
        loss = nn.functional.cross_entropy(model(clip), labels)
    loss.backward()


def gradients(model: nn.Module, clip: Tensor, labels: Tensor) -> Tensor:
    """All gradients, one after the other."""
    backward(model, clip, labels)
    result = torch.cat([parameter.grad.flatten() for parameter in model.parameters() if parameter.grad is not None])
    model.zero_grad()
    return result


def train_step(model: nn.Module, optimizer: torch.optim.Optimizer, clip: Tensor, labels: Tensor) -> None:
    """Forward, backward and the optimiser's step."""
    backward(model, clip, labels)
    optimizer.step()
    optimizer.zero_grad()


def stream_rows(name: str, options: argparse.Namespace, device: torch.device) -> list[dict[str, Any]]:
    """Latency of one stream per frame: of its step, and of the whole model on the window of its head."""
    rows = []
    for mode in ("default", "reduce-overhead") if device.type == "cuda" else ("eager",):
        torch.manual_seed(0)
        torch.compiler.reset()
        row = dict(model=name, image_size=options.image_size, window=options.window, compiled=mode)
        results: dict[str, dict[str, str]] = {"": {}}
        status = "ok"
        try:
            model = build(name, options.window, options.image_size).to(device).eval()
            results = latencies(model, mode, options, device)
        except Exception as failure:  # as for clips
            status = f"failed: {type(failure).__name__}: {(str(failure).splitlines() or [''])[0][:200]}"
        empty = dict.fromkeys(("ms_per_frame", "window_over_this", "peak_gib", "state_mib", "max_error"), "")
        rows += [row | dict(way=way) | empty | result | dict(status=status) for way, result in results.items()]
        print(rows, file=sys.stderr, flush=True)
    return rows


@torch.no_grad()
def latencies(model: Any, mode: str, options: argparse.Namespace, device: torch.device) -> dict[str, dict[str, str]]:
    """By way: what `stream_rows` records. `mode` is torch.compile's, or "eager"."""
    size, window = options.image_size, options.window
    clip = torch.randn(1, 3, window, size, size, device=device)
    step, forward = model.step, model.__call__
    if mode != "eager":
        step, forward = (torch.compile(function, dynamic=False, mode=mode) for function in (step, forward))
    with autocast(device):
        state = model.init_state(1, size, size)
        held = []  # states with an even and an odd number of frames
        for t in range(window // 2 * 2):
            held = [*held[-1:], state]
            logits, state = step(clip[:, :, t : t + 1], state)
            logits, state = logits.clone(), state.clone()
        expected = model(clip[:, :, : window // 2 * 2])
        error = ((logits[:, -1] - expected).float().norm() / expected.float().norm()).item()
        if not error < TOLERANCE:
            raise RuntimeError(f"the step's logits differ by {error:.1e} from the whole model's")
        forward(clip)
    with alone(options.turns), autocast(device):
        new, none = (measure(lambda s=s: step(clip[:, :, :1], s), device, options.repeats) for s in held)
        times = {"step, new map": new, "step, no map": none}
        times["step, mean"] = mean((new[0], none[0])), max(new[1], none[1])  # every second frame adds a map
        times["window"] = measure(lambda: forward(clip), device, options.repeats)
    state_mib = sum(x.nbytes for x in (state.stem, *state.past, state.pooled)) / 2**20
    return {
        way: dict(
            ms_per_frame=f"{1e3 * elapsed:.3f}",
            window_over_this=f"{times['window'][0] / elapsed:.2f}",
            peak_gib=peak and f"{peak:.3f}",
            state_mib=f"{state_mib:.1f}",
            max_error=f"{error:.1e}",
        )
        for way, (elapsed, peak) in times.items()
    }


def show(rows: list[dict[str, Any]]) -> None:
    """A table of the rows."""
    table = Table(*rows[0])
    for row in rows:
        table.add_row(*map(str, row.values()))
    Console(width=180).print(table)


def known(name: str) -> str:
    """A model with its variant, as an argument's type."""
    model, _, variant = name.partition(":")
    is_ours = timm.is_model(model) and timm.models.model_entrypoint(model).__module__.startswith("nat_models")
    if not (is_ours and variant in VARIANTS) and not (model in MODELS and not variant):
        allowed = "one of this project's, with a variant of " + ", ".join(filter(None, VARIANTS))
        raise argparse.ArgumentTypeError(f"{name!r} is neither {allowed}, nor swin3d_t, swin3d_b or mvit_v2_s")
    return name


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", type=known, help=f"(default: {' '.join(MODELS)})")
    parser.add_argument("--streams", nargs="*", type=known, default=STREAMS, help="(default: %(default)s)")
    parser.add_argument("--frames", nargs="*", type=int, default=[16, 32], help="of a clip (default: %(default)s)")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=MODES, help="(default: all)")
    parser.add_argument("--batch-size", type=int, default=8, help="clips (default: %(default)s)")
    parser.add_argument("--image-size", type=int, default=224, help="pixels a side (default: %(default)s)")
    parser.add_argument("--window", type=int, default=32, help="frames of a stream's window (default: %(default)s)")
    parser.add_argument("--cuda-graphs", action="store_true", help="clips with mode='reduce-overhead', as of models.py")
    parser.add_argument("--repeats", type=int, default=20, help="of which the median counts (default: %(default)s)")
    parser.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", help="(default: %(default)s)"
    )
    parser.add_argument("--commit", help="recorded instead of what git says, for a copy without its history")
    parser.add_argument("--output", type=Path, default=ROOT / "results" / "video_models.csv", help="CSV to write")
    parser.add_argument(
        "--stream-output", type=Path, default=ROOT / "results" / "video_streams.csv", help="CSV of the latencies"
    )
    parser.add_argument("--turns", type=Path, metavar="FILE", help="names the processes on the same GPU")
    options = parser.parse_args()
    join(options.turns)
    device = torch.device(options.device)
    torch.set_float32_matmul_precision("high")
    torch._dynamo.config.cache_size_limit = 64  # a model's blocks differ in shapes and settings
    where = provenance(device, options.commit)
    rows: list[dict[str, Any]] = []
    for frames in options.frames:
        for name in options.models or MODELS:
            rows += [row | where for row in clip_rows(name, frames, options, device)]
            write_csv(options.output, rows)  # a run that is cut off leaves what it has
    streams = [row | where for name in options.streams for row in stream_rows(name, options, device)]
    for title, table, path in (("clips", rows, options.output), ("streams", streams, options.stream_output)):
        if table:
            show([{key: value for key, value in row.items() if key not in where} for row in table])
            write_csv(path, table)
            print(f"{title} written to {path}")
    sys.exit(any(row["status"] != "ok" for row in rows + streams))


if __name__ == "__main__":
    main()
