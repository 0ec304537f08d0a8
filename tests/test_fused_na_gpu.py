"""The Triton kernels on a GPU: random problems against the reference in float64, memory, large tensors, and PyTorch's
ways to run them. Independent tests, for `pytest -m gpu -n 12`: most of the time goes into compiling kernels.
"""

import json
import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from math import prod
from pathlib import Path

import pytest
import torch
import torch.distributed
from attention_problems import Problem, attend_with_gradients
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from fused_na import blocked, na1d, na2d, na3d, neighborhood_attention, ops, packed_neighborhood_attention
from fused_na.triton import plan, prepare
from fused_na.triton.attention import unscaled
from fused_na.triton.geometry import Geometry
from fused_na.triton.launch import Launch
from fused_na.triton.problem import Problem as LaunchProblem
from fused_na.triton.problem import Tensors
from fused_na.triton.tiles import Tiles, Workload, fits_columns, ranked_tiles
from fused_na.window import Axis

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]

DEVICE = "cuda"
PRECISIONS = {  # dtype, tf32, largest relative error
    "bfloat16": (torch.bfloat16, False, 1e-2),
    "float16": (torch.float16, False, 2e-3),
    "float32": (torch.float32, False, 1e-5),
    "tf32": (torch.float32, True, 1e-3),
}
FAMILIES = 60
HEAD_DIMS = [32, 64, 128, 16, 8, 24, 48, 96, 256, 40, 80, 72, 112, 192, 136, 160, 200, 248]


def family(index: int) -> list[Problem]:
    """Five random legal problems that share what kernels are compiled for, as far as possible.

    They share kernel size, stride, causality, head_dim, heads per key head and bias; they differ in lengths (one small
    map and one of several tiles), dilation, batch, heads, additional tokens, scale and memory layout.
    """
    draw = random.Random(index)
    rank = 1 + index % 3
    longest = {1: 1200, 2: 34, 3: 11}[rank]
    kernel_size = tuple(draw.randint(1, draw.choice([3, 7, longest // 3, longest // 2])) for _ in range(rank))
    if index % 10 == 9:
        kernel_size = tuple(draw.randint(1, {1: 200, 2: 14, 3: 6}[rank]) for _ in range(rank))
    while prod(kernel_size) < 6:
        # The gradient of a softmax over very few keys is a small difference of large terms: rounding of inputs alone
        # exceeds any relative tolerance. The interpreter's tests cover such windows in float32.
        kernel_size = tuple(draw.randint(2, 6) for _ in range(rank))
    stride = tuple(draw.choice([1, 1, k, draw.randint(1, k)]) for k in kernel_size)
    is_causal = tuple(draw.random() < 0.3 for _ in range(rank))
    head_dim = HEAD_DIMS[index % len(HEAD_DIMS)]
    head_dim_v = draw.choice([head_dim, head_dim, head_dim, 8 * draw.randint(1, 32)])
    heads_per_kv = draw.choice([1, 1, 1, 2, 3])
    has_rpb = draw.random() < 0.6
    has_additional = draw.random() < 0.25

    small = tuple(k + draw.randint(0, 5) if index % 10 != 9 else k for k in kernel_size)  # now and then the whole map
    large = tuple(draw.randint(max(k, 2 * longest // 3), longest) for k in kernel_size)
    problems = []
    for spatial, layout, dilate in [
        (small, "contiguous", False),
        (small, "heads first", False),
        (large, "packed", False),
        (large, "packed", True),
        (large, "contiguous", True),
    ]:
        heads_kv = draw.randint(1, 2)
        problems.append(
            Problem(
                spatial,
                kernel_size,
                stride,
                tuple(draw.randint(1, n // k) if dilate else 1 for n, k in zip(spatial, kernel_size, strict=True)),
                is_causal,
                batch=draw.randint(1, 3) if spatial is small else draw.randint(1, 2),
                heads=heads_kv * heads_per_kv,
                heads_kv=heads_kv,
                head_dim=head_dim,
                head_dim_v=head_dim_v,
                scale=draw.choice([None, None, None, 0.5 * head_dim**-0.5, -(head_dim**-0.5), 0.0]),
                has_rpb=has_rpb,
                additional=draw.choice([0, 1, 17, 100]) if has_additional else None,
                layout=layout,
            )
        )
    return problems


@contextmanager
def nan_in_new_tensors() -> Iterator[None]:
    """Fills all newly allocated tensors with NaN, so that an element which no kernel writes shows."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@contextmanager
def tf32(enabled: bool) -> Iterator[None]:
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = enabled
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the expected norm, infinite where anything is not finite."""
    assert actual.shape == expected.shape
    error = torch.linalg.vector_norm(actual.double() - expected) / torch.linalg.vector_norm(expected).clamp(1e-30)
    return error.item() if error.isfinite() else float("inf")


def errors(
    problem: Problem, inputs: dict[str, Tensor], backend: str = "reference", has_grad_lse: bool = True
) -> dict[str, float]:
    """Relative errors of output, log-sum-exp and gradients against another backend in float64."""
    with nan_in_new_tensors():
        actual = attend_with_gradients(problem, inputs, "triton", has_grad_lse)
    expected = {name: x.double() for name, x in inputs.items()}
    expected = attend_with_gradients(problem, expected, backend, has_grad_lse)
    return {name: relative_error(actual[name], x) for name, x in expected.items() if x.numel()}


@pytest.mark.parametrize(
    ("index", "precision"),
    [
        (index, precision)
        for index in range(FAMILIES)
        for precision, every in [("bfloat16", 1), ("float32", 1), ("float16", 4), ("tf32", 5)]
        if index % every == 0
    ],
)
def test_random_problems(index: int, precision: str) -> None:
    dtype, allow_tf32, tolerance = PRECISIONS[precision]
    wrong = []
    for seed, problem in enumerate(family(index)):
        inputs = problem.inputs(dtype, DEVICE, seed)
        if problem.has_rpb and seed % 2:
            inputs["rpb"] = inputs["rpb"].float()
        with tf32(allow_tf32):
            found = errors(problem, inputs)
        wrong += [f"{name}: {error:.1e} in {problem}" for name, error in found.items() if not error < tolerance]
    assert not wrong, "\n".join(wrong)


def test_there_are_enough_random_problems() -> None:
    """At least 500 in bfloat16 and float32, of which many do not fit in one tile."""
    drawn = [problem for index in range(FAMILIES) for problem in family(index)]
    assert 2 * len(set(drawn)) >= 500
    assert sum(prod(problem.spatial) >= 300 for problem in drawn) >= 150
    assert {problem.head_dim for problem in drawn} >= {8, 16, 32, 64, 128, 256}
    assert all(any(getattr(problem, name) for problem in drawn) for name in ("has_rpb", "additional"))
    for rank in (1, 2, 3):
        some = [problem for problem in drawn if len(problem.spatial) == rank]
        assert any(max(x.stride) > 1 for x in some) and any(max(x.dilation) > 1 for x in some)
        assert any(any(x.is_causal) for x in some) and any(x.heads > x.heads_kv for x in some)


WORKLOADS = {  # the benchmarks' maps and windows, with few heads
    "img_s1": Problem((56, 56), (7, 7), (1, 1), (1, 1), (False, False), head_dim=32, head_dim_v=32),
    "img_s1_dilation8": Problem((56, 56), (7, 7), (1, 1), (8, 8), (False, False), head_dim=32, head_dim_v=32),
    "img_s2": Problem((28, 28), (7, 7), (1, 1), (1, 1), (False, False), head_dim=32, head_dim_v=32),
    "img_s2_dilation4": Problem((28, 28), (7, 7), (1, 1), (4, 4), (False, False), head_dim=32, head_dim_v=32),
    "img_s3": Problem((14, 14), (7, 7), (1, 1), (1, 1), (False, False), head_dim=32, head_dim_v=32),
    "img_s4": Problem((7, 7), (7, 7), (1, 1), (1, 1), (False, False), head_dim=32, head_dim_v=32),
    "vid_s1": Problem((16, 56, 56), (7,) * 3, (1,) * 3, (1,) * 3, (False,) * 3, 1, head_dim=32, head_dim_v=32),
    "vid_s1_causal": Problem(
        (16, 56, 56), (7,) * 3, (1,) * 3, (1,) * 3, (True, False, False), 1, head_dim=32, head_dim_v=32
    ),
    "vid_s2": Problem((16, 28, 28), (7,) * 3, (1,) * 3, (1,) * 3, (False,) * 3, 1, head_dim=32, head_dim_v=32),
    "vid_s3": Problem((16, 14, 14), (7,) * 3, (1,) * 3, (1,) * 3, (False,) * 3, 1, head_dim=32, head_dim_v=32),
    "one_d": Problem((32768,), (2048,), (1,), (1,), (False,), 1, 1, 1, 128, 128),
    "flux": Problem((256, 256), (80, 80), (1, 1), (1, 1), (False, False), 1, 1, 1, 128, 128),
    "flux_stride16x16": Problem((256, 256), (80, 80), (16, 16), (1, 1), (False, False), 1, 1, 1, 128, 128),
    "hunyuan": Problem((30, 48, 80), (18, 24, 24), (1, 1, 1), (1, 1, 1), (False,) * 3, 1, 1, 1, 128, 128),
    "hunyuan_stride16x8x8": Problem((30, 48, 80), (18, 24, 24), (16, 8, 8), (1, 1, 1), (False,) * 3, 1, 1, 1, 128, 128),
    "hunyuan_d64": Problem((30, 48, 80), (9, 15, 15), (1, 1, 1), (1, 1, 1), (False,) * 3, 1, 1, 1, 64, 64),
}


@pytest.mark.parametrize("has_rpb", [False, True], ids=["", "rpb"])
@pytest.mark.parametrize("name", WORKLOADS)
def test_benchmark_workloads(name: str, has_rpb: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against the other backend that does not hold all pairs at once."""
    monkeypatch.setattr(blocked, "CHUNK_SCORES", 1 << 20)
    problem = replace(WORKLOADS[name], has_rpb=has_rpb, layout="packed")
    found = errors(problem, problem.inputs(torch.bfloat16, DEVICE), "blocked")
    assert max(found.values()) < 1e-2, found


_FEW = dict(batch=2, heads=2, heads_kv=2, head_dim=128, head_dim_v=128)
WIDE = {  # what the wide kernels can take: one to many tiles, with and without tiles inside all windows
    "one tile": Problem((64,), (32,), (1,), (1,), (False,), **_FEW),
    "two tiles": Problem((300,), (140,), (1,), (1,), (False,), **_FEW),
    "shared heads": Problem((1000,), (411,), (1,), (1,), (False,), **_FEW | dict(heads=6)),
    "sequence, strided": Problem((1003,), (512,), (128,), (1,), (False,), **_FEW),
    "sequence, causal": Problem((999,), (300,), (1,), (1,), (True,), **_FEW),
    "sequence, causal, one step": Problem((1034,), (300,), (1,), (1,), (True,), **_FEW),
    "full attention": Problem((777,), (777,), (1,), (1,), (False,), **_FEW),
    "tiny map": Problem((5, 6), (3, 2), (1, 1), (1, 1), (False, False), **_FEW),
    "map": Problem((45, 51), (24, 37), (1, 1), (1, 1), (False, False), **_FEW | dict(heads=3, heads_kv=1)),
    "map, strided": Problem((48, 48), (32, 32), (16, 16), (1, 1), (False, False), **_FEW),
    "map, odd stride": Problem((41, 50), (30, 33), (7, 5), (1, 1), (False, False), **_FEW),
    "map, causal": Problem((40, 37), (29, 20), (3, 1), (1, 1), (True, False), **_FEW),
    "clip": Problem((9, 14, 21), (5, 9, 15), (1, 1, 1), (1, 1, 1), (False,) * 3, **_FEW),
    "clip, strided": Problem((10, 16, 16), (6, 8, 8), (4, 8, 8), (1, 1, 1), (False,) * 3, **_FEW),
    "clip, causal": Problem((9, 13, 18), (6, 11, 16), (1, 1, 2), (1, 1, 1), (True, False, False), **_FEW),
}


@pytest.mark.parametrize("way", ["packed", "packed, forced", "packed, forced, 64-bit", "heads first"])
@pytest.mark.parametrize("problem", WIDE.values(), ids=WIDE.keys())
def test_wide_windows(problem: Problem, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through the wide kernels where they are the fastest, through them in any case, also with the offsets of large
    tensors and without a gradient of the log-sum-exp, and where heads do not lie side by side, without them."""
    layout, *special = way.split(", ")
    if "forced" in special:

        def wide_tiles(kernel: str, workload: Workload) -> Tiles:
            ranked = [tiles for _, tiles in ranked_tiles(kernel, workload)]
            return next((tiles for tiles in ranked if tiles.is_wide), ranked[0])

        monkeypatch.setattr(plan, "choose_tiles", wide_tiles)
    if "64-bit" in special:

        def with_wide_offsets(problem: LaunchProblem) -> Geometry:
            result = Geometry(problem)
            result.arguments["WIDE"] = True
            return result

        monkeypatch.setattr(plan, "Geometry", with_wide_offsets)
    plan.plan_of.cache_clear()
    for dtype, tolerance in ((torch.bfloat16, 1e-2), (torch.float16, 2e-3)):
        inputs = replace(problem, layout=layout).inputs(dtype, DEVICE)
        found = errors(problem, inputs, has_grad_lse="64-bit" not in special)
        assert max(found.values()) < tolerance, found
    plan.plan_of.cache_clear()


def workload_of(problem: Problem) -> Workload:
    """What tiles are chosen for, in 16 bits."""
    rule = problem.spatial, problem.kernel_size, problem.stride, problem.dilation, problem.is_causal
    return Workload(tuple(map(Axis, *rule)), problem.head_dim, problem.head_dim_v, 2, problem.has_rpb)


_BIASED = dict(head_dim=32, head_dim_v=32, has_rpb=True, layout="packed")
BIASED = {  # small windows, which columns can take but for a few wide ones
    "one tile": Problem((7, 7), (7, 7), (1, 1), (1, 1), (False, False), 3, **_BIASED),
    "map": Problem((14, 14), (7, 7), (1, 1), (1, 1), (False, False), 5, **_BIASED),
    "ragged map": Problem((21, 27), (7, 7), (1, 1), (1, 1), (False, False), 7, 3, 3, **_BIASED),
    "chunks of samples": Problem((21, 27), (7, 7), (1, 1), (1, 1), (False, False), 40, 3, 3, **_BIASED),
    "shared heads": Problem((15, 17), (5, 3), (1, 1), (1, 1), (False, False), 3, 6, 2, **_BIASED),
    "even windows": Problem((19, 22), (6, 4), (1, 1), (1, 1), (False, False), 2, **_BIASED),
    "wide windows": Problem((25, 40), (15, 34), (1, 1), (1, 1), (False, False), 2, **_BIASED),
    "strip": Problem((3, 90), (3, 21), (1, 1), (1, 1), (False, False), 2, **_BIASED),
    "causal": Problem((13, 19), (7, 7), (1, 1), (1, 1), (True, False), 4, **_BIASED),
    "causal on both axes": Problem((13, 19), (7, 5), (1, 1), (1, 1), (True, True), 4, **_BIASED),
    "strided": Problem((13, 19), (5, 7), (2, 3), (1, 1), (False, False), 3, **_BIASED),
    "blocks": Problem((12, 21), (4, 7), (4, 7), (1, 1), (False, True), 3, **_BIASED),
    "scaled": Problem((14, 20), (7, 7), (1, 1), (1, 1), (False, False), 2, scale=0.5, **_BIASED),
    "contiguous": Problem((14, 20), (7, 7), (1, 1), (1, 1), (False, False), 2, **_BIASED | dict(layout="contiguous")),
    "clip": Problem((8, 9, 11), (7, 7, 7), (1, 1, 1), (1, 1, 1), (False,) * 3, 2, **_BIASED),
    "causal clip": Problem((9, 10, 11), (5, 7, 3), (1, 1, 1), (1, 1, 1), (True, False, False), 2, **_BIASED),
    "strided clip": Problem((6, 7, 12), (3, 4, 5), (2, 3, 1), (1, 1, 1), (False, False, True), 2, 4, 2, **_BIASED),
    "dilated map": Problem((28, 42), (7, 7), (1, 1), (4, 2), (False, False), 5, 4, 2, **_BIASED),
    "dilation on one axis": Problem((14, 63), (5, 7), (2, 1), (1, 3), (False, True), 3, **_BIASED),
    "dilated clip": Problem((8, 9, 12), (3, 3, 4), (1, 1, 1), (2, 3, 1), (True, False, False), 3, **_BIASED),
    "clips": Problem((8, 8, 8), (3, 3, 3), (1, 1, 1), (1, 1, 1), (False,) * 3, 9, **_BIASED),
    "three clips": Problem((8, 12, 14), (7, 7, 7), (1, 1, 1), (1, 1, 1), (False,) * 3, 3, **_BIASED),
    "ragged clips": Problem((9, 11, 13), (7, 7, 7), (1, 1, 1), (1, 1, 1), (False,) * 3, 5, **_BIASED),
    "tile of clips": Problem((4, 4, 2), (3, 4, 2), (1, 1, 1), (1, 1, 1), (False,) * 3, 5, **_BIASED),
    "clips of shared heads": Problem((8, 9, 15), (5, 7, 3), (1, 1, 1), (1, 1, 1), (False,) * 3, 4, 6, 2, **_BIASED),
    "causal clips": Problem((13, 10, 11), (5, 7, 3), (1, 1, 1), (1, 1, 1), (True, False, False), 5, 4, 1, **_BIASED),
    "clips causal on all axes": Problem((9, 10, 11), (5, 7, 3), (1, 1, 1), (1, 1, 1), (True,) * 3, 3, **_BIASED),
    "strided clips": Problem((6, 7, 12), (3, 4, 5), (2, 3, 1), (1, 1, 1), (False, False, True), 9, 4, 2, **_BIASED),
    "clips in blocks": Problem((8, 9, 16), (4, 3, 8), (4, 3, 8), (1, 1, 1), (False,) * 3, 4, **_BIASED),
    "short clips": Problem((2, 14, 21), (2, 7, 10), (1, 1, 1), (1, 1, 1), (False,) * 3, 8, **_BIASED),
    "long clips": Problem((40, 6, 5), (9, 3, 4), (1, 1, 1), (1, 1, 1), (True, False, False), 6, 1, 1, **_BIASED),
    "wide windows in clips": Problem((5, 7, 25), (3, 5, 14), (1, 1, 2), (1, 1, 1), (False,) * 3, 3, **_BIASED),
    "contiguous clips": Problem(
        (8, 9, 11), (7, 7, 7), (1, 1, 1), (1, 1, 1), (False,) * 3, 4, scale=0.5, **_BIASED | dict(layout="contiguous")
    ),
}


DILATED = {  # lengths that dilations divide, so that groups come through bulk copies
    "sequence": Problem((120,), (9,), (2,), (5,), (True,), 3, 2, 1, 32, 64),
    "map": Problem((28, 35), (7, 6), (1, 2), (4, 5), (False, False), 2, 4, 2, 32, 32, additional=3),
    "dilation on one axis": Problem((13, 34), (7, 7), (1, 1), (1, 2), (False, False), 2, 2, 2, 64, 64),
    "wide windows": Problem((48, 64), (16, 20), (1, 1), (3, 2), (True, False), 1, 2, 1, 128, 128),
    "clip": Problem((6, 12, 14), (3, 3, 7), (1, 2, 1), (2, 3, 1), (True, False, False), 2, 2, 2, 32, 32),
}


@pytest.mark.parametrize("layout", ["packed", "contiguous", "heads first"])
@pytest.mark.parametrize("has_rpb", [False, True], ids=["", "rpb"])
@pytest.mark.parametrize("problem", DILATED.values(), ids=DILATED.keys())
def test_dilations_that_divide_lengths(problem: Problem, has_rpb: bool, layout: str) -> None:
    problem = replace(problem, has_rpb=has_rpb, layout=layout)
    for dtype, tolerance in ((torch.bfloat16, 1e-2), (torch.float16, 2e-3)):
        found = errors(problem, problem.inputs(dtype, DEVICE))
        assert max(found.values()) < tolerance, found


@pytest.fixture
def planned(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Names of the plans that run, of which none is left from another test, nor for the next."""
    if torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("needs a Hopper GPU")
    names: list[str] = []
    run = plan.Plan.run

    def recorded(self: plan.Plan, tensors: Tensors) -> Tensors:
        names.append(self.kernel)
        return run(self, tensors)

    monkeypatch.setattr(plan.Plan, "run", recorded)
    plan.plan_of.cache_clear()
    yield names
    plan.plan_of.cache_clear()


@pytest.fixture
def launched(planned: list[str], monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the kernels that run, by plans of this test's own."""
    names: list[str] = []
    call = Launch.__call__

    def recorded(self: Launch, tensors: Tensors) -> None:
        names.append(self.kernel.__name__)
        call(self, tensors)

    monkeypatch.setattr(Launch, "__call__", recorded)
    return names


def check_and_repeat(problem: Problem, has_grad_lse: bool) -> None:
    """All results against the reference in float64, and the same bits each time."""
    names = ["output", "log-sum-exp"]

    def results(inputs: dict[str, Tensor], backend: str) -> list[Tensor]:
        leaves = {name: x.detach().requires_grad_() for name, x in inputs.items()}
        found = neighborhood_attention(**leaves, **problem.options, return_lse=True, backend=backend)
        generator = torch.Generator(DEVICE).manual_seed(1)
        incoming = [torch.randn(x.shape, device=DEVICE, generator=generator).to(x.dtype) for x in found]
        if backend == "reference":
            incoming[0] = incoming[0].to(dtype).double()
        wanted = slice(2 if has_grad_lse else 1)
        return [*found, *torch.autograd.grad(found[wanted], tuple(leaves.values()), incoming[wanted])]

    for dtype, tolerance in ((torch.bfloat16, 1e-2), (torch.float16, 2e-3)):
        inputs = problem.inputs(dtype, DEVICE)
        if problem.has_rpb:
            inputs["rpb"] = inputs["rpb"].float()
        expected = results({name: x.double() for name, x in inputs.items()}, "reference")
        with nan_in_new_tensors():
            actual = results(inputs, "triton")
            for _ in range(2):
                assert all(map(torch.equal, results(inputs, "triton"), actual))
        pairs = zip([*names, *inputs], actual, expected, strict=True)
        found = {name: relative_error(x, y) for name, x, y in pairs}
        assert max(found.values()) < tolerance, found


_NARROW = dict(head_dim=32, head_dim_v=32, layout="packed")
COLUMNS = {name: x for name, x in BIASED.items() if fits_columns(workload_of(x))} | {
    "high map": Problem((75, 9), (7, 7), (1, 1), (1, 1), (False, False), 2, **_NARROW),
    "high windows": Problem((50, 9), (15, 7), (1, 1), (1, 1), (False, False), 2, **_NARROW),
    "high causal map": Problem((37, 21), (7, 7), (3, 1), (1, 1), (True, False), 2, 4, 2, **_NARROW),
    "clips of 16": Problem((16, 14, 14), (7, 7, 7), (1, 1, 1), (1, 1, 1), (False,) * 3, 4, **_NARROW),
    "clips of 13": Problem((13, 11, 9), (7, 5, 7), (1, 1, 1), (1, 1, 1), (False,) * 3, 2, **_NARROW),
    "clips of 32": Problem((32, 7, 9), (7, 7, 7), (1, 1, 1), (1, 1, 1), (False,) * 3, 2, **_NARROW),
    "strided clips of 16": Problem((16, 14, 14), (7, 7, 7), (2, 4, 4), (1, 1, 1), (False,) * 3, 3, **_NARROW),
}


@pytest.mark.parametrize("tokens", [32, 64])
@pytest.mark.parametrize("way", ["", "few programs", "bias", "bias, few programs"])
@pytest.mark.parametrize("name", COLUMNS)
def test_columns(
    name: str,
    way: str,
    tokens: int,
    launched: list[str],
    prefers_columns: Callable[[int], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    prefers_columns(tokens)
    if "few" in way:
        monkeypatch.setattr(prepare, "MULTIPROCESSORS", 1)
        monkeypatch.setattr(prepare, "samples_of_program", lambda *_: 4)
    problem = COLUMNS[name]
    batch = max(problem.batch, 9) if "few" in way else problem.batch
    check_and_repeat(replace(problem, has_rpb="bias" in way, batch=batch), has_grad_lse=tokens == 32)
    backward = ["query_columns_kernel"]
    if "bias" in way:
        backward = ["query_bias_columns_kernel", "sum_classes_kernel", "fold_columns_kernel"]
    expected = {"forward_columns_kernel", *backward, "key_value_columns_kernel"}
    assert {x for x in launched if x != "bias_copy_kernel"} == expected


PACKED = list((WORKLOADS | WIDE | BIASED | DILATED | COLUMNS).values())


@pytest.mark.parametrize("index", range(len(PACKED)))
def test_packed(index: int) -> None:
    """The gradient of query, key and value in one tensor is theirs as single tensors, bit by bit."""
    problem = PACKED[index]
    shape = (problem.batch, *problem.spatial, 3, problem.heads, problem.head_dim)
    qkv = torch.randn(shape, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
    wanted = [qkv]
    options = problem.options
    if problem.has_rpb:
        wanted.append(torch.randn(problem.heads, *(2 * k - 1 for k in problem.kernel_size), device=DEVICE))
        options |= {"rpb": wanted[1].requires_grad_()}
    with nan_in_new_tensors():
        outputs = [neighborhood_attention(*qkv.unbind(-3), **options), packed_neighborhood_attention(qkv, **options)]
        expected, actual = (torch.autograd.grad(x.float().sin().sum(), wanted) for x in outputs)
    assert torch.equal(*outputs) and all(map(torch.equal, actual, expected))
    assert all(x.isfinite().all() for x in actual)


@pytest.mark.parametrize("name", ["map", "ragged clips"])
def test_query_and_bias_with_a_bias_of_each_dtype(name: str, planned: list[str]) -> None:
    """One after the other, on the same shapes: its gradient is written in its own."""
    problem = BIASED[name]
    inputs = problem.inputs(torch.bfloat16, DEVICE)
    for dtype in (torch.bfloat16, torch.float32, torch.bfloat16):
        found = attend_with_gradients(problem, inputs | {"rpb": inputs["rpb"].to(dtype)}, "triton")
        expected = {name: x.double() for name, x in (inputs | {"rpb": inputs["rpb"].to(dtype)}).items()}
        expected = attend_with_gradients(problem, expected, "reference")
        assert found["gradient of rpb"].dtype == dtype
        assert relative_error(found["gradient of rpb"], expected["gradient of rpb"]) < 1e-2
    assert planned.count("query_bias") == 3


@pytest.mark.parametrize("name", ["ragged map", "ragged clips"])
def test_query_and_bias_beside_infinite_scores(name: str, planned: list[str]) -> None:
    """A bias too large for a float32 exponential outside of the map does no harm to the sums."""
    problem = BIASED[name]
    inputs = problem.inputs(torch.bfloat16, DEVICE)
    inputs["rpb"] = inputs["rpb"] + 300.0
    found = errors(problem, inputs)
    assert found["gradient of query"] < 1e-2 and found["gradient of rpb"] < 1e-2, found
    assert "query_bias" in planned


def test_query_and_bias_in_a_cuda_graph(planned: list[str]) -> None:
    """Captured after a first call and replayed on other values."""
    problem = BIASED["map"]
    inputs = problem.inputs(torch.bfloat16, DEVICE)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        attend_with_gradients(problem, inputs, "triton")
    torch.cuda.current_stream().wait_stream(side)
    leaves = {name: x.detach().requires_grad_() for name, x in inputs.items()}
    incoming = torch.randn_like(inputs["query"])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = torch.autograd.grad(na2d(**leaves, kernel_size=7), tuple(leaves.values()), incoming)
    with torch.no_grad():
        leaves["query"].copy_(leaves["query"].flip(0))
    graph.replay()
    expected = torch.autograd.grad(na2d(**leaves, kernel_size=7), tuple(leaves.values()), incoming)
    assert all(map(torch.equal, captured, expected)) and "query_bias" in planned


@pytest.mark.parametrize("index", range(0, FAMILIES, 5))
def test_repeats_are_bit_identical(index: int) -> None:
    problem = replace(family(index)[2], batch=8)
    inputs = problem.inputs(torch.bfloat16, DEVICE)
    results = [attend_with_gradients(problem, inputs, "triton") for _ in range(3)]
    for first, second in pairwise(results):
        assert all(torch.equal(first[name], second[name]) for name in first)


def test_default_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton wherever it can compute the call, else the portable one."""
    query, key, value = torch.randn(3, 2, 6, 7, 2, 16, device=DEVICE).unbind()
    expected = na2d(query, key, value, 3, backend="triton")
    with monkeypatch.context() as patch:
        patch.setattr(blocked, "attend", None)
        assert torch.equal(na2d(query, key, value, 3), expected)
    assert relative_error(expected, na2d(query.double(), key.double(), value.double(), 3)) < 1e-5
    narrow = [x[..., :12] for x in (query, key, value)]
    assert relative_error(na2d(*narrow, 3), na2d(*(x.double() for x in narrow), 3, backend="reference")) < 1e-5


# Memory.


def allocations(function: Callable[[], object]) -> tuple[int, int]:
    """How many tensors a call allocates, and by how many bytes it raises the peak of memory in use."""
    function()  # compiles the kernels
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_stats()
    result = function()
    after = torch.cuda.memory_stats()
    del result
    count = after["allocation.all.allocated"] - before["allocation.all.allocated"]
    return count, after["requested_bytes.all.peak"] - before["requested_bytes.all.current"]


def views(layout: str, heads: int = 2, head_dim: int = 32) -> list[Tensor]:
    """Query, key and value on a map of 56 x 56 that share memory, each a leaf."""
    if layout == "packed":
        packed = torch.randn(4, 56, 56, 3, heads, head_dim, device=DEVICE, dtype=torch.bfloat16)
        return [x.detach().requires_grad_() for x in packed.unbind(-3)]
    packed = torch.randn(3, heads, 4, 56, 56, head_dim, device=DEVICE, dtype=torch.bfloat16)
    return [x.movedim(0, -2).detach().requires_grad_() for x in packed.unbind()]


@pytest.mark.parametrize("layout", ["packed", "heads outermost"])
@pytest.mark.parametrize("dilation", [1, 8])
@pytest.mark.parametrize("has_rpb", [False, True], ids=["", "rpb"])
def test_views_are_read_in_place(has_rpb: bool, dilation: int, layout: str) -> None:
    """Forward allocates output and log-sum-exp; backward the gradients, a row vector and the bias's partial sums; both
    a bias divided by the scale, with zeros around it.
    """
    inputs = views(layout)
    assert not any(x.is_contiguous() for x in inputs)
    rpb = torch.randn(2, 13, 13, device=DEVICE, requires_grad=True) if has_rpb else None

    def forward() -> Tensor:
        output = na2d(*inputs, kernel_size=7, dilation=dilation, rpb=rpb)
        assert isinstance(output, Tensor)
        return output

    tensor = inputs[0].numel() * 2
    rows = inputs[0].numel() // 32 * 4
    bias = 0 if rpb is None else unscaled(rpb, 1.0).untyped_storage().nbytes()
    count, peak = allocations(forward)
    assert count <= (3 if has_rpb else 2)
    assert peak <= tensor + rows + bias

    output = forward()
    incoming = torch.randn_like(output)
    wanted = inputs if rpb is None else [*inputs, rpb]
    count, peak = allocations(lambda: torch.autograd.grad(output, wanted, incoming, retain_graph=True))
    assert count <= (8 if has_rpb else 4)
    assert peak <= 3 * tensor + rows + (2 * bias + (64 << 20) if has_rpb else 0)


def packed_views(
    batch: int, spatial: tuple[int, ...], heads: int, heads_kv: int, head_dim: int, heads_outermost: bool
) -> list[Tensor]:
    shape = [batch, *spatial, head_dim]
    shape.insert(0 if heads_outermost else -1, heads + 2 * heads_kv)
    packed = torch.empty(shape, device=DEVICE, dtype=torch.bfloat16).normal_()
    if heads_outermost:
        packed = packed.movedim(0, -2)
    return [x.detach().requires_grad_() for x in packed.split([heads, heads_kv, heads_kv], dim=-2)]


@pytest.mark.parametrize(
    ("batch", "spatial", "heads", "heads_kv", "kernel_size", "heads_outermost", "crop", "compared"),
    [
        (1, (70_400, 10), 24, 1, (5, 3), False, (slice(None), slice(-32, None)), (slice(None), slice(-16, None))),
        (360_000, (8,), 2, 2, 5, False, slice(-8, None), slice(-8, None)),
        (1, (8_400_000,), 3, 3, 5, True, (slice(None), slice(-32, None)), (slice(None), slice(-16, None))),
    ],
    ids=["sample", "batch", "heads"],
)
def test_past_32_bit_offsets(
    batch: int,
    spatial: tuple[int, ...],
    heads: int,
    heads_kv: int,
    kernel_size: int | tuple[int, ...],
    heads_outermost: bool,
    crop,
    compared,
) -> None:
    """The far end of large tensors against the reference on a crop: 19 GB for one sample, 13 GB for 360000, 52 GB where
    heads are outermost.

    Input and output of the one sample, and the input of the batch, have more than 2^31 elements; the last of the
    outermost heads starts beyond as many.
    """
    inputs = packed_views(batch, spatial, heads, heads_kv, 128, heads_outermost)
    assert max(inputs[0].stride(0) * batch, inputs[0].stride(-2) * (heads - 1)) > 2**31
    with nan_in_new_tensors():
        output = neighborhood_attention(*inputs, kernel_size=kernel_size)
        assert isinstance(output, Tensor)
        incoming = torch.empty_like(output).normal_()
        gradients = torch.autograd.grad(output, inputs, incoming)

    ends = [x[crop].detach().double().requires_grad_() for x in inputs]
    expected = neighborhood_attention(*ends, kernel_size=kernel_size, backend="reference")
    assert isinstance(expected, Tensor)
    expected_gradients = torch.autograd.grad(expected, ends, incoming[crop].double())
    for actual, end in zip((output, *gradients), (expected, *expected_gradients), strict=True):
        assert relative_error(actual[compared], end[compared]) < 1e-2
        assert actual.detach().flatten()[::997].isfinite().all()


# PyTorch around the operation.


class Attention(nn.Module):
    """Attention on a packed projection, as models use it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.qkv = nn.Linear(64, 192)
        self.rpb = nn.Parameter(torch.randn(2, 5, 7, 7))
        self.projection = nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.qkv(x).unflatten(-1, (3, 2, 32)).unbind(-3)
        output = na3d(query, key, value, (3, 4, 4), rpb=self.rpb, is_causal=(True, False, False), backend="triton")
        assert isinstance(output, Tensor)
        return self.projection(output.flatten(-2))


def clips(batch: int = 2) -> Tensor:
    generator = torch.Generator(DEVICE).manual_seed(batch)
    return torch.randn(batch, 4, 9, 10, 64, device=DEVICE, generator=generator)


def trained(function: Callable[[Tensor], Tensor], module: nn.Module, x: Tensor) -> list[Tensor]:
    """Output and gradients of input and parameters."""
    x = x.clone().requires_grad_()
    output = function(x)
    return [output.detach().clone(), *torch.autograd.grad(output.square().sum(), (x, *module.parameters()))]


def assert_equal(actual: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    assert all(relative_error(x, y.double()) <= tolerance for x, y in zip(actual, expected, strict=True))


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("autocast", [False, True], ids=["", "autocast"])
def test_compile(autocast: bool, dynamic: bool, fresh_compiler: None) -> None:
    module = Attention().to(DEVICE)
    compiled = torch.compile(module, fullgraph=True, dynamic=dynamic)
    with torch.autocast(DEVICE, torch.bfloat16, enabled=autocast):
        for batch in (2, 3, 5):
            expected = trained(module, module, clips(batch))
            assert_equal(trained(compiled, module, clips(batch)), expected, 2e-2 if autocast else 1e-4)


@pytest.mark.parametrize("autocast", [False, True], ids=["", "autocast"])
def test_compile_reduce_overhead(autocast: bool, fresh_compiler: None) -> None:
    """The compiler records CUDA graphs from the second call on, and sees to it that calls leave no memory behind."""
    plan.plan_of.cache_clear()
    module = Attention().to(DEVICE)
    compiled = torch.compile(module, fullgraph=True, mode="reduce-overhead")
    torch._dynamo.utils.counters.clear()
    for seed in range(4):
        torch.manual_seed(seed)
        x = torch.randn_like(clips())
        torch.compiler.cudagraph_mark_step_begin()
        with torch.autocast(DEVICE, torch.bfloat16, enabled=autocast):
            actual = trained(compiled, module, x)
            assert_equal(actual, trained(module, module, x), 2e-2 if autocast else 1e-4)
    assert torch._dynamo.utils.counters["inductor"]["cudagraph_skips"] == 0


def test_cuda_graph() -> None:
    """Forward and backward, captured once and replayed on other inputs."""
    module = Attention().to(DEVICE)
    x = clips()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        trained(module, module, x)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = trained(module, module, x)
    for batch in (3, 4):
        x.copy_(clips(batch)[:2])
        graph.replay()
        assert_equal(results, trained(module, module, x), 1e-5)


def test_checkpoint() -> None:
    module = Attention().to(DEVICE)
    expected = trained(module, module, clips())
    actual = trained(lambda x: checkpoint(module, x, use_reentrant=False), module, clips())
    assert_equal(actual, expected, 0)


def test_threads_and_streams() -> None:
    """Concurrent training steps, each in a thread and on a stream of its own."""
    module = Attention().to(DEVICE)
    expected = [trained(module, module, clips(batch)) for batch in range(1, 9)]
    torch.cuda.synchronize()

    def step(batch: int) -> list[Tensor]:
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            results = trained(module, module, clips(batch))
        stream.synchronize()
        return results

    with ThreadPoolExecutor(4) as pool:
        for actual, one in zip(pool.map(step, range(1, 9)), expected, strict=True):
            assert_equal(actual, one, 1e-5)


def test_autocast() -> None:
    """As on inputs rounded beforehand; gradients come in the dtype of the tensors they belong to."""
    problem = Problem((9, 10), (3, 4), (1, 2), (2, 1), (False, True), heads=4, head_dim=32, has_rpb=True, additional=5)
    inputs = problem.inputs(torch.float32, DEVICE)
    rounded = {name: x if name == "rpb" else x.bfloat16() for name, x in inputs.items()}
    expected = attend_with_gradients(problem, rounded, "triton")
    with torch.autocast(DEVICE, torch.bfloat16):
        actual = attend_with_gradients(problem, inputs, "triton")
    assert actual["output"].dtype == torch.bfloat16
    for name in inputs:
        assert actual[f"gradient of {name}"].dtype == torch.float32
    for name, x in expected.items():
        assert relative_error(actual[name], x.double()) < 1e-6, name


def test_distributed_data_parallel(tmp_path: Path) -> None:
    """In a group of one process."""
    module = Attention().to(DEVICE)
    expected = trained(module, module, clips())
    torch.distributed.init_process_group("nccl", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        parallel = DistributedDataParallel(module, device_ids=[torch.cuda.current_device()])
        output = parallel(clips())
        output.square().sum().backward()
        gradients = [parameter.grad for parameter in module.parameters()]
    finally:
        torch.distributed.destroy_process_group()
    assert_equal([output.detach()], expected[:1], 0)
    for actual, gradient in zip(gradients, expected[2:], strict=True):
        assert actual is not None and relative_error(actual, gradient.double()) < 1e-6


@pytest.mark.parametrize("has_rpb", [True, False], ids=["rpb", "additional"])
def test_operators_pass_opcheck(has_rpb: bool) -> None:
    additional = None if has_rpb else 3
    problem = Problem((9, 10), (3, 4), (2, 1), (1, 2), (True, False), has_rpb=has_rpb, additional=additional)
    inputs = problem.inputs(torch.float32, DEVICE)
    names = ("query", "key", "value", "rpb", "additional_keys", "additional_values")
    tensors = [x if x is None else x.requires_grad_() for x in map(inputs.get, names)]
    options = *map(list, (problem.kernel_size, problem.stride, problem.dilation, problem.is_causal)), 0.3
    torch.library.opcheck(ops.forward, (*tensors, *options))

    tensors = [x if x is None else x.detach() for x in tensors]
    output, lse = ops.forward(*tensors, *options)
    incoming = torch.randn_like(output), torch.randn_like(lse)
    torch.library.opcheck(ops.backward, (*incoming, *tensors, output, lse, *options, has_rpb))


@pytest.mark.parametrize("has_rpb", [False, True], ids=["", "rpb"])
def test_a_plan_serves_tensors_of_any_alignment(has_rpb: bool) -> None:
    """The same shapes and strides at addresses that do and do not allow wide loads, in turn."""
    problem = Problem((20, 20), (7, 7), (1, 1), (1, 1), (False, False), head_dim=32, head_dim_v=32, has_rpb=has_rpb)
    inputs = problem.inputs(torch.bfloat16, DEVICE)
    expected = attend_with_gradients(problem, inputs, "triton")
    for shift in (0, 1, 8, 4, 0):
        moved = {
            name: torch.empty(x.numel() + shift, dtype=x.dtype, device=DEVICE)[shift:].view(x.shape).copy_(x)
            for name, x in inputs.items()
        }
        actual = attend_with_gradients(problem, moved, "triton")
        for name, x in expected.items():
            torch.testing.assert_close(actual[name], x, rtol=1e-2, atol=1e-2, msg=f"{name} at {shift}")


def test_tensors_on_another_device_than_the_current_one() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    problem = Problem((9, 9), (3, 3), (1, 1), (1, 1), (False, False), head_dim=32, head_dim_v=32, has_rpb=True)
    results = []
    for device in ("cuda:0", "cuda:1"):
        inputs = {name: x.to(device) for name, x in problem.inputs(torch.bfloat16, "cpu").items()}
        results.append(attend_with_gradients(problem, inputs, "triton"))
    for name, x in results[0].items():
        assert torch.equal(x.cpu(), results[1][name].cpu()), name


def test_autotuning_measures_once(tmp_path: Path) -> None:
    """`FUSED_NA_AUTOTUNE=1` in a process of its own: right results, and a cache that the next process only reads. The
    kernel of the query's and the bias's gradients, which takes a head_dim of 32, has nothing to be measured."""
    code = """
import torch
from fused_na import na2d
torch.manual_seed(0)
for head_dim in (64, 32):
    leaves = torch.randn(3, 2, 20, 20, 2, head_dim, device="cuda", dtype=torch.bfloat16).unbind()
    leaves = [x.requires_grad_() for x in (*leaves, torch.randn(2, 9, 9, device="cuda"))]
    expected = [x.detach().double().requires_grad_() for x in leaves]
    for (*qkv, rpb), backend in ((leaves, None), (expected, "reference")):
        na2d(*qkv, 5, rpb=rpb, backend=backend).square().sum().backward()
    for x, y in zip(leaves, expected, strict=True):
        error = torch.linalg.vector_norm(x.grad - y.grad) / torch.linalg.vector_norm(y.grad)
        assert error < 2e-2, (head_dim, list(x.shape), error.item())
"""
    environment = os.environ | {"FUSED_NA_AUTOTUNE": "1", "FUSED_NA_CACHE": str(tmp_path)}
    written = []
    for _ in range(2):
        subprocess.run([sys.executable, "-c", code], env=environment, check=True)
        (cache,) = tmp_path.iterdir()
        written.append((cache.stat().st_mtime_ns, sorted(key.split("'")[1] for key in json.loads(cache.read_text()))))
    assert written[0] == written[1]
    assert written[0][1] == ["bias", "forward", "forward", "key_value", "key_value", "query"]


def test_illegal_calls_fail_before_a_kernel_is_launched() -> None:
    query, key, value = torch.randn(3, 1, 8, 2, 16, device=DEVICE).unbind()
    with pytest.raises(ValueError, match="kernel_size"):
        na1d(query, key, value, 9, backend="triton")
    with pytest.raises(ValueError, match="head_dim"):
        neighborhood_attention(query[..., :12], key[..., :12], value, 3, backend="triton")
    with pytest.raises(ValueError, match="float64"):
        neighborhood_attention(query.double(), key.double(), value.double(), 3, backend="triton")
    torch.cuda.synchronize()
