"""How attention is checked and timed."""

import sys
from collections.abc import Callable, Sequence
from math import ceil
from pathlib import Path
from statistics import median
from time import perf_counter

import torch
from problems import Inputs, Problem
from providers import Attend, Provider, Unsupported
from record import environment
from torch import Tensor
from turns import alone

PASSES = ("fwd", "bwd")
GRAPH_BELOW = 8.0  # ms: shorter calls are timed inside a CUDA graph, where the host's overhead does not count
CACHE = 200 << 20  # bytes that a round of calls reads, several times a GPU's L2 cache
TOLERANCE = {torch.bfloat16: 1e-2, torch.float16: 5e-3, torch.float32: 1e-4}  # relative, by norm


def measure(
    problem: Problem,
    provider: Provider,
    passes: Sequence[str],
    dtype: torch.dtype,
    device: torch.device,
    has_rpb: bool = False,
    repeats: int = 20,
    turns: Path | None = None,
) -> dict[str, dict[str, str | float]]:
    """Checks a provider on a problem, and if it is right, times it.

    Args:
        passes: of `PASSES`.
        repeats: timed rounds, of which the median is reported.
        turns: a file of `turns.py`, for processes that compile side by side.

    Returns:
        By pass: `status` ("ok" or why there is no time), and if it is ok `ms` (GPU time), `host_ms` (time of an eager
        call on the host) and `max_error` (of all tensors checked). Backward is forward and backward less forward.
    """
    sets = ceil(CACHE / problem.bytes(False, dtype.itemsize)) if device.type == "cuda" else 1
    try:
        rounds = [problem.inputs(dtype, device, has_rpb, seed) for seed in range(sets)]
        attend, solved = provider(problem, dtype, device, has_rpb)
        found = errors(solved, attend, rounds[0], "bwd" in passes)
        error = max(found.values())
        if not error <= TOLERANCE[dtype]:
            wrong = ", ".join(f"{name} {e:.1e}" for name, e in found.items() if not e <= TOLERANCE[dtype])
            return {name: {"status": f"wrong: {wrong}", "max_error": error} for name in passes}
        forward = [_forward(attend, inputs) for inputs in rounds]
        both = [_forward_and_backward(attend, inputs) for inputs in rounds] if "bwd" in passes else []
        for calls in (forward, both):
            if calls:
                calls[0]()  # compiles what is still to be compiled
        with alone(turns):
            times = {"fwd": (milliseconds(forward, device, repeats), host_milliseconds(forward[0], device))}
            if both:
                total = milliseconds(both, device, repeats), host_milliseconds(both[0], device)
                times["bwd"] = (total[0] - times["fwd"][0], total[1] - times["fwd"][1])
    except Unsupported as reason:
        return {name: {"status": f"skipped: {reason}"} for name in passes}
    except Exception as failure:  # refused arguments, out of memory, a kernel that does not compile: as many kinds
        lines = str(failure).splitlines() or [""]
        return {name: {"status": f"failed: {type(failure).__name__}: {lines[0][:200]}"} for name in passes}
    finally:
        torch.cuda.empty_cache()
    return {
        name: {"status": "ok", "ms": times[name][0], "host_ms": times[name][1], "max_error": error} for name in passes
    }


def provenance(device: torch.device, commit: str | None) -> dict[str, str | int]:
    """Device, versions, commit (as told, or as git says) and command line, to go with each row of a table."""
    where = environment(device) | {"command": " ".join(["python", *sys.argv])}
    return where | ({"commit": commit} if commit else {})


def errors(problem: Problem, attend: Attend, inputs: Inputs, with_gradients: bool, count: int = 24) -> dict[str, float]:
    """Relative errors by norm of the output at some queries, and of all gradients where only these have one incoming.

    The expected values are attention in float32 over each query's gathered window. Half of the queries follow on each
    other, so that keys collect gradients from several; infinite where anything is not finite.
    """
    generator = torch.Generator().manual_seed(0)
    total = problem.batch * problem.tokens
    begin = torch.randint(total, (1,), generator=generator)
    run = (begin + torch.arange(count // 2)) % total
    picked = torch.cat([torch.randint(total, (count // 2,), generator=generator), run]).unique()
    sample, token = (
        (picked // problem.tokens).to(inputs.query.device),
        (picked % problem.tokens).to(inputs.query.device),
    )

    query, key, value, rpb = (None if x is None else x.detach().requires_grad_(with_gradients) for x in inputs[:4])
    wanted = {"dq": query, "dk": key, "dv": value} | ({} if rpb is None else {"drpb": rpb})
    poison = [torch.full_like(inputs.incoming, torch.nan) for _ in range(4)]
    del poison  # so that a result which is not written is likely not to be finite
    output = attend(query, key, value, rpb)
    if output.shape != inputs.query.shape:
        raise ValueError(f"the output has shape {list(output.shape)}")
    incoming = inputs.incoming.flatten(1, -3)[sample, token]
    actual = {"out": output.flatten(1, -3)[sample, token].detach()}
    finite = output.isfinite().all()
    if with_gradients:
        sparse = torch.zeros_like(output).flatten(1, -3)
        sparse[sample, token] = incoming
        gradients = torch.autograd.grad(output, tuple(wanted.values()), sparse.view(output.shape))
        actual |= dict(zip(wanted, gradients, strict=True))
    del output

    expected = _expected(problem, inputs, sample, token, incoming if with_gradients else None)
    found = {}
    for name, x in expected.items():
        difference = actual[name].float().view(x.shape) - x
        error = torch.linalg.vector_norm(difference) / torch.linalg.vector_norm(x).clamp(min=1e-30)
        found[name] = error.item() if finite and error.isfinite() else float("inf")
    return found


def _expected(
    problem: Problem, inputs: Inputs, samples: Tensor, tokens: Tensor, incoming: Tensor | None
) -> dict[str, Tensor]:
    """Output `[queries, heads, head_dim]` of some queries, and the gradients under theirs, one query at a time."""
    flat = [x.detach().flatten(1, -3).float() for x in inputs[:3]]
    bias = [] if inputs.rpb is None else [inputs.rpb.detach().flatten(1).clone()]
    leaves = [x.requires_grad_(incoming is not None) for x in (*flat, *bias)]
    query, key, value, *bias = leaves
    outputs = []
    for i, (sample, token) in enumerate(zip(samples.tolist(), tokens.tolist(), strict=True)):
        keys, places = (x.to(query.device) for x in problem.neighbors(token))
        scores = torch.einsum("hd,khd->hk", query[sample, token], key[sample, keys]) * problem.head_dim**-0.5
        if bias:
            scores = scores + bias[0][:, places]
        output = torch.einsum("hk,khd->hd", scores.softmax(-1), value[sample, keys])
        outputs.append(output.detach())
        if incoming is not None:
            output.backward(incoming[i].float())
    gradients = {} if incoming is None else zip(("dq", "dk", "dv", "drpb"), (x.grad for x in leaves), strict=False)
    return {"out": torch.stack(outputs)} | dict(gradients)


def _forward(attend: Attend, inputs: Inputs) -> Callable[[], object]:
    return lambda: attend(*inputs[:4])


def _forward_and_backward(attend: Attend, inputs: Inputs) -> Callable[[], object]:
    leaves = [None if x is None else x.detach().requires_grad_() for x in inputs[:4]]
    wanted = [x for x in leaves if x is not None]
    return lambda: torch.autograd.grad(attend(*leaves), wanted, inputs.incoming)


def milliseconds(calls: Sequence[Callable[[], object]], device: torch.device, repeats: int) -> float:
    """Median time of a call on the device. The calls do the same work on different tensors, and are made in turn."""
    if device.type != "cuda":
        return median(host_milliseconds(calls[i % len(calls)], device, 1) for i in range(repeats))
    for call in calls:
        call()
    estimate = median(_gpu_milliseconds(calls[i % len(calls)]) for i in range(3))
    if estimate >= GRAPH_BELOW:
        repeats = min(repeats, max(3, ceil(1000 / estimate)))
        return median(_gpu_milliseconds(calls[i % len(calls)]) for i in range(repeats))
    number = len(calls) * ceil(max(1, 20 / estimate) / len(calls))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        calls[0]()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for i in range(number):
            calls[i % len(calls)]()
    graph.replay()
    return median(_gpu_milliseconds(graph.replay) for _ in range(repeats)) / number


def _gpu_milliseconds(call: Callable[[], object]) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    begin.record()
    call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)


def host_milliseconds(call: Callable[[], object], device: torch.device, repeats: int = 20) -> float:
    """Median time until an eager call returns, which on a GPU is not when its work is done."""
    times: list[float] = []
    while len(times) < repeats and (len(times) < 3 or sum(times) < 1000):
        if device.type == "cuda":
            torch.cuda.synchronize()
        begin = perf_counter()
        call()
        times.append(1e3 * (perf_counter() - begin))
    return median(times)
