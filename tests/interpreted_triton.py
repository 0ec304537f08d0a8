"""The Triton kernels against the reference and the golden values, in Triton's interpreter.

`test_fused_na_triton.py` runs this file; to run it alone: `TRITON_INTERPRET=1 pytest tests/interpreted_triton.py`.
The interpreter takes milliseconds for every operation of every program, so maps are tiny, and batches and heads few.
"""

import os
import random
from dataclasses import replace
from itertools import product
from math import ceil, prod
from pathlib import Path

import pytest
import test_fused_na_golden as golden
import torch
import triton
import triton.language as tl
from attention_problems import Problem, assert_close, attend_with_gradients, problems
from hypothesis import given, settings
from torch import Tensor
from triton.runtime import interpreter
from triton.tools.tensor_descriptor import TensorDescriptor

from fused_na import merge_attentions, na2d, neighborhood_attention, ops, packed_neighborhood_attention
from fused_na.triton import (
    attention,
    bulk_copy,
    column_classes,
    gpu,
    neighborhood,
    plan,
    prepare,
    walk,
)
from fused_na.triton.geometry import PARTIAL_BYTES, Geometry, divisor
from fused_na.triton.problem import Tensors, problem_of
from fused_na.triton.tiles import Extent, Tiles, Workload, as_three_axes
from fused_na.window import Axis, inverse_window, window

assert os.environ.get("TRITON_INTERPRET") == "1", "set TRITON_INTERPRET=1 before the kernels are imported"

pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning")  # in the interpreter itself


@pytest.fixture(autouse=True)
def new_plans() -> None:
    """Lets a test choose tiles for a problem that another one ran already."""
    plan.plan_of.cache_clear()


@pytest.fixture(autouse=True)
def no_overlap(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter runs one kernel after the other, and has no instructions that say so."""
    monkeypatch.setattr(gpu, "overlaps", lambda device: False)


AXES = {  # of a map, per rank: length, kernel_size, stride, dilation, is_causal
    "1d": [Axis(37, 5)],
    "1d even": [Axis(36, 4)],
    "1d single": [Axis(35, 1)],
    "1d pair": [Axis(40, 2, 2)],
    "1d full": [Axis(40, 40)],
    "1d stride": [Axis(45, 6, 4)],
    "1d even stride": [Axis(41, 8, 3)],
    "1d blocks": [Axis(42, 6, 6)],
    "1d uneven blocks": [Axis(43, 5, 5)],
    "1d dilation": [Axis(47, 4, 1, 3)],
    "1d widest dilation": [Axis(40, 5, 1, 8)],
    "1d stride dilation": [Axis(46, 6, 4, 4)],
    "1d causal": [Axis(40, 6, 1, 1, True)],
    "1d causal full": [Axis(35, 35, 1, 1, True)],
    "1d causal blocks": [Axis(38, 4, 4, 1, True)],
    "1d causal stride dilation": [Axis(45, 5, 3, 2, True)],
    "1d one token": [Axis(1, 1)],
    "2d": [Axis(6, 3), Axis(7, 3)],
    "2d odd even": [Axis(5, 3), Axis(9, 4)],
    "2d single": [Axis(5, 1), Axis(8, 5)],
    "2d full": [Axis(6, 6), Axis(7, 7)],
    "2d strips": [Axis(6, 6), Axis(8, 3)],
    "2d stride": [Axis(7, 4, 3), Axis(8, 5, 2)],
    "2d blocks": [Axis(6, 3, 3), Axis(8, 4, 4)],
    "2d dilation": [Axis(7, 2, 1, 3), Axis(9, 3, 1, 2)],
    "2d dilation on one axis": [Axis(7, 3), Axis(9, 3, 1, 3)],
    "2d stride dilation": [Axis(9, 4, 3, 2), Axis(6, 5, 2, 1)],
    "2d causal": [Axis(6, 4, 1, 1, True), Axis(7, 3, 1, 1, True)],
    "2d mixed causal": [Axis(6, 3), Axis(8, 5, 1, 1, True)],
    "2d mixed causal stride dilation": [Axis(9, 4, 2, 2, True), Axis(6, 4, 3)],
    "3d": [Axis(3, 2), Axis(3, 2), Axis(5, 3)],
    "3d single": [Axis(3, 1), Axis(4, 1), Axis(4, 3)],
    "3d full": [Axis(2, 2), Axis(2, 2), Axis(4, 4)],
    "3d stride": [Axis(3, 2, 2), Axis(3, 3, 3), Axis(5, 2)],
    "3d dilation": [Axis(2, 1), Axis(4, 2, 1, 2), Axis(5, 2, 2, 2)],
    "3d causal time": [Axis(4, 3, 1, 1, True), Axis(3, 2), Axis(3, 2)],
    "3d causal": [Axis(5, 2, 2, 2, True), Axis(2, 2, 1, 1, True), Axis(3, 2, 1, 1, True)],
}
FEW = Problem((5, 6), (2, 3), (2, 1), (2, 1), (False, True), batch=1, heads=1, heads_kv=1, has_rpb=True)
VARIANTS = {
    "batch and heads": replace(FEW, batch=2, heads=2, heads_kv=2),
    "grouped queries": replace(FEW, heads=4, heads_kv=2),
    "grouped queries, packed": replace(FEW, batch=2, heads=3, layout="packed"),
    "packed": replace(FEW, batch=2, heads=2, heads_kv=2, layout="packed"),
    "heads first": replace(FEW, batch=2, heads=2, heads_kv=2, layout="heads first"),
    "packed in 3d": Problem(
        (3, 3, 4), (2, 2, 2), (1, 1, 2), (1, 1, 2), (True, False, False), 1, 2, 1, has_rpb=True, layout="packed"
    ),
    "head_dim 24": replace(FEW, head_dim=24, head_dim_v=24),
    "wider values": replace(FEW, head_dim=8, head_dim_v=40),
    "narrower values": replace(FEW, head_dim=72, head_dim_v=8),
    "head_dim 256": replace(FEW, head_dim=256, head_dim_v=256, has_rpb=False),
    "negative scale": replace(FEW, scale=-0.7),
    "zero scale": replace(FEW, scale=0.0),
    "large scale": replace(FEW, scale=3.0),
    "no additional keys": replace(FEW, additional=0),
    "one additional key": replace(FEW, additional=1),
    "many additional keys": replace(FEW, additional=45, has_rpb=False),
    "additional keys, batch, grouped queries": replace(
        FEW, batch=2, heads=4, heads_kv=2, head_dim_v=16, additional=5, has_rpb=False
    ),
    "additional keys in 1d": Problem((21,), (4,), (2,), (3,), (True,), 1, 2, 1, 8, 16, has_rpb=True, additional=7),
    "additional keys in 3d": Problem((3, 3, 4), (2, 3, 3), (1,) * 3, (1,) * 3, (True,) * 3, 1, 1, 1, additional=3),
    "no batch": replace(FEW, batch=0, additional=2),
}  # fmt: skip


@pytest.fixture(autouse=True, scope="module")
def fast_interpreter():
    """Leaves out the interpreter's overflow checks of all integer arithmetic, which take half of its time."""
    options = interpreter.interpreter_builder.options
    interpreter.interpreter_builder.options = interpreter.InterpreterOptions(sanitize_overflow=False)
    yield
    interpreter.interpreter_builder.options = options


@pytest.fixture(autouse=True)
def nan_in_new_tensors():
    """Fills all newly allocated tensors with NaN, so that an element which no kernel writes shows."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory and torch.zeros(1).new_empty(1).isnan()
    yield
    torch.use_deterministic_algorithms(False)


def check(problem: Problem, dtype: torch.dtype = torch.float32, tolerance: float = 1e-5) -> None:
    """Output, log-sum-exp and all gradients against the reference in float64 on the same inputs."""
    inputs = problem.inputs(dtype)
    expected = attend_with_gradients(problem, {name: x.double() for name, x in inputs.items()}, "reference")
    assert_close(attend_with_gradients(problem, inputs, "triton"), expected, tolerance)


@pytest.mark.parametrize("has_rpb", [False, True], ids=["", "rpb"])
@pytest.mark.parametrize("axes", AXES.values(), ids=AXES.keys())
def test_windows(axes: list[Axis], has_rpb: bool) -> None:
    check(Problem(*zip(*axes, strict=True), batch=1, heads=1, heads_kv=1, has_rpb=has_rpb))


@pytest.mark.parametrize("problem", VARIANTS.values(), ids=VARIANTS.keys())
def test_tensors(problem: Problem) -> None:
    check(problem)


@settings(max_examples=8)
@given(problem=problems(max_tokens=24))
def test_any_legal_problem(problem: Problem) -> None:
    batch, group = min(problem.batch, 2), min(problem.heads // problem.heads_kv, 2)
    width = 8 * problem.head_dim  # 8, 32 or 64
    check(replace(
        problem, batch=batch, heads=group, heads_kv=1, head_dim=width,
        head_dim_v=16 if problem.head_dim_v == 3 else width,
    ))  # fmt: skip


@pytest.mark.parametrize(
    ("axes", "query", "key"),
    [
        ([Axis(37, 4, 3, 2, True)], (1, 1, 16), (1, 1, 16)),
        ([Axis(37, 6, 2)], (1, 1, 32), (1, 1, 16)),
        # With tiles away from all borders, of which the bias's kernel computes mask and bias once.
        ([Axis(80, 5)], (1, 1, 16), (1, 1, 16)),
        ([Axis(90, 6, 2)], (1, 1, 16), (1, 1, 32)),
        ([Axis(70, 7, 1, 1, True)], (1, 1, 16), (1, 1, 16)),
        ([Axis(10, 3), Axis(26, 4)], (2, 1, 8), (4, 1, 4)),
        ([Axis(6, 3), Axis(6, 3, 3)], (4, 1, 4), (2, 1, 8)),
        ([Axis(7, 3, 1, 2), Axis(4, 2, 1, 1, True)], (2, 1, 8), (4, 1, 4)),
        ([Axis(3, 2, 1, 1, True), Axis(4, 3), Axis(3, 2)], (2, 2, 4), (1, 4, 4)),
        ([Axis(4, 2), Axis(3, 2), Axis(4, 2, 1, 2)], (4, 2, 2), (2, 8, 1)),
    ],
)
def test_any_tiles(axes: list[Axis], query: Extent, key: Extent, monkeypatch: pytest.MonkeyPatch) -> None:
    """The result does not depend on the tiles; these are among the smallest, so that every map has several."""
    monkeypatch.setattr(plan, "choose_tiles", lambda *problem: Tiles(query, key, num_warps=1, num_stages=1))
    check(Problem(*zip(*axes, strict=True), batch=1, heads=1, heads_kv=1, has_rpb=True))


@pytest.mark.parametrize("bulk", [False, True], ids=["loads", "bulk copies"])
@pytest.mark.parametrize("has_rpb", [False, True], ids=["", "rpb"])
@pytest.mark.parametrize(
    "axes",
    [
        [Axis(72, 40, 8)],  # has pairs of tiles that need no mask, as the next one has
        [Axis(9, 7), Axis(12, 8, 3)],
        [Axis(9, 4, 1, 2, True), Axis(7, 3, 2)],
        [Axis(8, 4, 1, 2, True), Axis(7, 3, 2)],
        [Axis(8, 3, 1, 2), Axis(9, 2, 1, 3)],
        [Axis(8, 3, 1, 2), Axis(10, 2, 1, 3)],
        [Axis(40, 5, 2, 4)],
        [Axis(5, 3, 2, 1, True), Axis(4, 3), Axis(5, 4)],
        [Axis(4, 2, 1, 2, True), Axis(3, 3), Axis(6, 2, 1, 3)],
    ],
)
def test_loads_and_bulk_copies(axes: list[Axis], has_rpb: bool, bulk: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """With and without the GPU's engine for bulk copies."""
    query = [(1, 1, 16), (4, 1, 4), (2, 2, 4)][len(axes) - 1]
    key = [(1, 1, 16), (4, 1, 4), (1, 4, 4)][len(axes) - 1]
    monkeypatch.setattr(plan, "choose_tiles", lambda *problem: Tiles(query, key, 1, 1, bulk))
    monkeypatch.setattr(gpu, "capability", lambda device: 9)
    described = []
    monkeypatch.setattr(bulk_copy, "TensorDescriptor", lambda *x: described.append(x) or TensorDescriptor(*x))
    is_dilated = any(axis.dilation > 1 for axis in axes)
    batch, heads = (2, 2) if is_dilated and len(axes) == 2 else (1, 1)
    problem = Problem(
        *zip(*axes, strict=True), batch, heads, 1, head_dim=16, head_dim_v=32, has_rpb=has_rpb, layout="packed"
    )
    inputs = problem.inputs(torch.float32)
    if has_rpb and len(axes) == 3:  # forward alone, for time's sake
        results = [
            neighborhood_attention(**inputs, **problem.options, return_lse=True, backend=backend)
            for backend in ("reference", "triton")
        ]
        torch.testing.assert_close(*results)
    else:
        check(problem)
    assert bool(described) == (bulk and not any(axis.length % axis.dilation for axis in axes))


@pytest.mark.parametrize("rise", [60.0, -60.0], ids=["rise", "fall"])
def test_scores_far_from_each_other(rise: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Along the keys, so that what was added up counts for nothing, or what follows does."""
    monkeypatch.setattr(plan, "choose_tiles", lambda *problem: Tiles((1, 1, 16), (1, 1, 8), 1, 1))
    problem = Problem((45,), (23,), (1,), (1,), (False,), 1, 1, 1, 16, 16, scale=1.0)
    inputs = problem.inputs(torch.float32)
    inputs["query"], inputs["key"] = inputs["query"].abs() / 16, torch.ones_like(inputs["key"])
    inputs["key"] *= torch.linspace(-rise, rise, 45)[:, None, None]
    expected = attend_with_gradients(problem, {name: x.double() for name, x in inputs.items()}, "reference")
    assert expected["output"].isfinite().all()
    assert_close(attend_with_gradients(problem, inputs, "triton"), expected, 1e-4)


@pytest.mark.parametrize("bulk", [False, True], ids=["stores", "bulk copies"])
@pytest.mark.parametrize(
    "axes",
    [
        [Axis(40, 5, 2, 4)],
        [Axis(5, 4, 1, 1, True), Axis(7, 3, 2)],
        [Axis(4, 3, 2, 1, True), Axis(3, 3), Axis(5, 2)],
    ],
)
def test_packed(axes: list[Axis], bulk: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The gradient of query, key and value in one tensor is theirs as single tensors, bit by bit."""
    tile = [(1, 1, 16), (4, 1, 4), (1, 4, 4)][len(axes) - 1]
    monkeypatch.setattr(plan, "choose_tiles", lambda *problem: Tiles(tile, tile, 1, 1, bulk))
    monkeypatch.setattr(gpu, "capability", lambda device: 9)
    problem = Problem(*zip(*axes, strict=True))
    shape = (2 if len(axes) < 3 else 1, *problem.spatial, 3, 2, 16)
    qkv = torch.randn(shape, generator=torch.Generator().manual_seed(0), requires_grad=True)
    options: dict = problem.options | {"backend": "triton"}
    outputs = [neighborhood_attention(*qkv.unbind(-3), **options), packed_neighborhood_attention(qkv, **options)]
    expected, actual = (torch.autograd.grad(x.sin().sum(), qkv)[0] for x in outputs)
    assert torch.equal(*outputs) and torch.equal(actual, expected)


@pytest.mark.parametrize("changes", [dict(scale=-0.7), dict(scale=0.0), dict(batch=0)], ids=str)
def test_packed_tensors(changes: dict) -> None:
    problem = replace(FEW, **changes)
    inputs = problem.inputs(torch.float32)
    qkv = torch.stack([inputs[name] for name in ("query", "key", "value")], -3).requires_grad_()
    results = []
    for backend in ("triton", "reference"):
        output = packed_neighborhood_attention(qkv, rpb=inputs["rpb"], **problem.options, backend=backend)
        results.append((output, *torch.autograd.grad(output.sin().sum(), qkv)))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("far", ["heads", "additional tokens", "additional heads"])
def test_past_32_bit_offsets(far: str, tmp_path: Path) -> None:
    """Three of them more than 2^30 elements apart, in files with holes in place of what lies between them."""
    is_additional = far.startswith("additional")
    problem = replace(FEW, heads=3, heads_kv=3, has_rpb=not is_additional, additional=3 if is_additional else None)
    inputs = problem.inputs(torch.float16)
    expected = attend_with_gradients(problem, {name: x.double() for name, x in inputs.items()}, "reference")
    step = (1 << 30) + 512

    def spread(name: str) -> Tensor:
        x = inputs[name]
        strides = list(x.stride())
        strides[1 if far == "additional tokens" else -2] = step
        file = torch.from_file(str(tmp_path / name), shared=True, size=3 * step, dtype=x.dtype)
        return file.as_strided(x.shape, strides).copy_(x)

    names = ("additional_keys", "additional_values") if is_additional else ("query", "key", "value")
    inputs |= {name: spread(name) for name in names}
    assert_close(attend_with_gradients(problem, inputs, "triton"), expected, tolerance=3e-3)


@pytest.mark.parametrize("axis", [1, 2])
def test_expanded_gradients(axis: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The gradient of a sum over an axis repeats itself along it, which bulk copies would not."""
    monkeypatch.setattr(plan, "choose_tiles", lambda *problem: Tiles((4, 1, 4), (4, 1, 4), 1, 1, True))
    monkeypatch.setattr(gpu, "capability", lambda device: 9)
    inputs = [x.requires_grad_() for x in torch.randn(3, 1, 6, 7, 1, 16).unbind()]
    gradients = [
        torch.autograd.grad(na2d(*inputs, 3, backend=backend).sum(axis).square().sum(), inputs)
        for backend in ("reference", "triton")
    ]
    torch.testing.assert_close(*gradients)


def test_a_problem_is_planned_once() -> None:
    """Whatever the tensors' values; other strides are another problem."""
    query, key, value = torch.randn(3, 1, 6, 6, 1, 8)
    for tensors in ((query, key, value), (query + 1, key, value), (query.transpose(1, 2), key, value)):
        na2d(*tensors, 3, backend="triton")
    assert (plan.plan_of.cache_info().hits, plan.plan_of.cache_info().misses) == (1, 2)


@pytest.mark.parametrize("path", golden.GOLDEN, ids=lambda path: path.stem)
def test_golden_values(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With one tile for every dilation group: the interpreter is slow in programs, not in what one program does."""

    def choose_tiles(kernel: str, workload: Workload) -> Tiles:
        axes = as_three_axes(workload.axes)
        t, h, w = (triton.next_power_of_2(ceil(axis.length / axis.dilation)) for axis in axes)
        tile = t, h, max(w, 16 // (t * h))
        return Tiles(tile, tile, num_warps=1, num_stages=1)

    monkeypatch.setattr(plan, "choose_tiles", choose_tiles)
    golden.test_golden_values(path, "triton")


def test_float16() -> None:
    check(replace(FEW, heads=2, additional=2), torch.float16, tolerance=3e-3)


def test_float32_bias_with_float16_inputs() -> None:
    inputs = FEW.inputs(torch.float16)
    inputs["rpb"] = FEW.inputs(torch.float32)["rpb"]
    actual = attend_with_gradients(FEW, inputs, "triton")
    assert actual["gradient of rpb"].dtype == torch.float32
    expected = attend_with_gradients(FEW, {name: x.double() for name, x in inputs.items()}, "reference")
    assert_close(actual, expected, tolerance=3e-3)


def test_large_scores_do_not_overflow() -> None:
    inputs = FEW.inputs(torch.float32)
    inputs["query"] *= 1e4
    expected = attend_with_gradients(FEW, inputs, "reference")["output"]
    actual = attend_with_gradients(FEW, inputs, "triton")
    assert all(x.isfinite().all() for x in actual.values())
    assert_close({"output": actual["output"]}, {"output": expected}, tolerance=1e-4)


@pytest.mark.parametrize(
    ("wanted", "result"),
    [("query", 0), ("query", 1), ("value", 0), ("rpb", 0), ("rpb", 1), ("additional_keys", 0), ("additional_keys", 1)],
)
def test_one_gradient_of_one_result(wanted: str, result: int) -> None:
    """Of the output (0) or of the log-sum-exp (1) alone."""
    problem = replace(FEW, additional=2)

    def gradient(backend: str) -> Tensor:
        inputs = problem.inputs(torch.float32)
        inputs[wanted].requires_grad_()
        results = neighborhood_attention(**inputs, **problem.options, return_lse=True, backend=backend)
        return torch.autograd.grad(results[result].sin().sum(), inputs[wanted])[0]

    assert_close({wanted: gradient("triton")}, {wanted: gradient("reference")}, tolerance=1e-5)


def test_merge_attentions_trains() -> None:
    """Merging attention to the neighborhood and to other tokens is attention to both; so are the gradients."""
    problem = replace(FEW, additional=3)
    inputs = {name: x.requires_grad_() for name, x in problem.inputs(torch.float32).items()}
    query, scale = inputs["query"], problem.head_dim**-0.5
    scores = torch.einsum("bxyhd,bnhd->bxyhn", query, inputs["additional_keys"]) * scale
    others = torch.einsum("bxyhn,bnhd->bxyhd", scores.softmax(-1), inputs["additional_values"])
    near = neighborhood_attention(
        query, inputs["key"], inputs["value"], rpb=inputs["rpb"], **problem.options, return_lse=True, backend="triton"
    )
    merged, lse = merge_attentions([near[0], others], [near[1], scores.logsumexp(-1)])
    together = neighborhood_attention(**inputs, **problem.options, return_lse=True, backend="reference")
    torch.testing.assert_close((merged, lse), together)
    loss, expected = (result.sin().sum() for result in (merged, together[0]))
    gradients = [torch.autograd.grad(x, tuple(inputs.values())) for x in (loss, expected)]
    torch.testing.assert_close(*gradients)


@triton.jit
def intervals_kernel(index, members, kernel, stride, results, CAUSAL: tl.constexpr, INVERSE: tl.constexpr):
    # The interpreter lets a kernel's constants be tensors, so that one launch covers all windows.
    place = tl.arange(0, 1024) + tl.program_id(0) * 1024
    index, members = tl.load(index + place), tl.load(members + place)
    kernel, stride = tl.load(kernel + place), tl.load(stride + place)
    if INVERSE:
        start, end = neighborhood.inverse_window(index, members, kernel, stride, CAUSAL)
    else:
        start, end = neighborhood.window(index, members, kernel, stride, CAUSAL)
    tl.store(results + 2 * place, start)
    tl.store(results + 2 * place + 1, end)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("rule", [window, inverse_window])
def test_kernels_follow_the_window_rule(rule, is_causal: bool) -> None:
    """On all windows in dilation groups of up to 18 members."""
    cases = [
        (index, n, k, s) for n in range(1, 19) for k in range(1, n + 1) for s in range(1, k + 1) for index in range(n)
    ]
    expected = [rule(Axis(n, k, s, 1, is_causal), index, n) for index, n, k, s in cases]
    blocks = ceil(len(cases) / 1024)
    cases += [(0, 1, 1, 1)] * (blocks * 1024 - len(cases))
    columns = [torch.tensor(column, dtype=torch.int32) for column in zip(*cases, strict=True)]
    results = torch.empty(blocks * 1024, 2, dtype=torch.int32)
    intervals_kernel[(blocks,)](*columns, results, CAUSAL=is_causal, INVERSE=rule is inverse_window)
    assert results[: len(expected)].tolist() == [list(interval) for interval in expected]


@triton.jit
def quotients_kernel(numbers, divisors, results):
    place = tl.program_id(0) * 1024 + tl.arange(0, 1024)
    tl.store(results + place, neighborhood.divided(tl.load(numbers + place), tl.load(divisors + place)))


def test_divisions_by_multiplication() -> None:
    """Exact for all numbers and divisors that can be, the hardest at powers of two and at multiples of the divisor."""
    draw = random.Random(0)
    powers = [1 << i for i in range(31)]
    divisors = [n for power in powers for n in (power - 1, power, power + 1) if n > 0] + [2**31 - 1, 56, 98, 25088]
    pairs = [
        (min(max(number, 0), 2**31 - 1), n)
        for n in divisors
        for multiple in (0, n, draw.randrange(2**31) // n * n, (2**31 - 1) // n * n, 2**31 - 1)
        for number in (multiple - 1, multiple, multiple + 1)
    ]
    pairs += [(0, 1)] * (-len(pairs) % 1024)
    numbers = torch.tensor([number for number, _ in pairs], dtype=torch.int32)
    packed = torch.tensor([divisor(n) for _, n in pairs])
    results = torch.empty_like(numbers)
    quotients_kernel[(len(pairs) // 1024,)](numbers, packed, results)
    assert results.tolist() == [number // n for number, n in pairs]


@triton.jit
def parts_kernel(numbers, steps, results, total: tl.constexpr, TILE: tl.constexpr, ONE_TILE: tl.constexpr):
    first = tl.load(numbers), tl.load(numbers + 1), tl.load(numbers + 2)
    first_end = tl.load(numbers + 3), tl.load(numbers + 4), tl.load(numbers + 5)
    last_start = tl.load(numbers + 6), tl.load(numbers + 7), tl.load(numbers + 8)
    end = tl.load(numbers + 9), tl.load(numbers + 10), tl.load(numbers + 11)
    inner_begin, inner_end = walk.interior(first, first_end, last_start, TILE)
    for INNER in tl.static_range(2):
        way, count = walk.part(first, end, inner_begin, inner_end, TILE, ONE_TILE, INNER, True)
        tl.store(steps + INNER, count)
        tile = walk.first_tile(way)
        for step in range(count):
            for axis in tl.static_range(3):
                tl.store(results + (INNER * total + step) * 3 + axis, tile[axis])
            tile = walk.next_tile(tile, way, TILE, ONE_TILE)


@pytest.mark.parametrize("seed", range(40))
def test_a_grid_is_its_interior_and_the_rest(seed: int) -> None:
    """Every tile is met once, in order: those inside all windows in one part, the others around them in the other."""
    draw = random.Random(seed)
    tile = tuple(draw.choice([1, 1, 2, 4]) for _ in range(3))
    first = [draw.randint(0, 9) for _ in range(3)]
    # Interiors that reach to the sides of the grid are the ones to get wrong.
    last_start = [x + draw.choice([0, 0, 1, 3]) for x in first]
    first_end = [x + draw.randint(1, 9) for x in last_start]
    end = [x + draw.choice([0, 0, 1, 3]) for x in first_end]
    begins = list(product(*(range(*bounds) for bounds in zip(first, end, tile, strict=True))))
    inner = [
        all(b >= s and b + t <= e for b, s, t, e in zip(begin, last_start, tile, first_end, strict=True))
        for begin in begins
    ]
    steps = torch.zeros(2, dtype=torch.int32)
    results = torch.zeros(2, len(begins), 3, dtype=torch.int32)
    numbers = torch.tensor([*first, *first_end, *last_start, *end], dtype=torch.int32)
    one_tile = tuple(seed % 2 == 1 and e - f <= size for f, e, size in zip(first, end, tile, strict=True))
    parts_kernel[(1,)](numbers, steps, results, total=len(begins), TILE=tile, ONE_TILE=one_tile)
    for part in (0, 1):
        expected = [begin for begin, is_inner in zip(begins, inner, strict=True) if is_inner == part]
        assert steps[part] == len(expected)
        assert [tuple(tile) for tile in results[part, : steps[part]].tolist()] == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_copy_of_the_bias(dtype: torch.dtype) -> None:
    """Of scores that are yet to be scaled, and between zeros; of a bias that is not contiguous too."""
    rpb = torch.randn(5, 2, 13, dtype=dtype).movedim(0, 2)
    copy = attention.unscaled(rpb, 0.3)
    assert copy is not None and torch.equal(copy, rpb.float() / 0.3)
    room = torch.empty(0).set_(copy.untyped_storage())
    margin = copy.storage_offset()
    assert len(room) == 2 * margin + rpb.numel() and margin >= 13 + 2 * attention.LARGEST_TILE
    assert not room[:margin].any() and not room[-margin:].any()


def relative_positions(axes: tuple[Axis, ...], tiles: Tiles, arguments: dict, kind: int) -> Tensor:
    """Place in the flattened bias of all numbers of a class's row, -1 of those that belong to none."""
    classes, three = column_classes.classes_of(axes, tiles.query, tiles.key), as_three_axes(axes)
    classes_w = classes.before[2] + 1 + classes.after[2]
    bases = []
    for x, index in ((1, kind // classes_w), (2, kind % classes_w)):
        column = index if index <= classes.before[x] else index + classes.alike[x] - 1
        begin = column * tiles.query[x]
        bases.append(window(three[x], begin, three[x].length)[0] - begin)
    _, rows_h, rows_w = tiles.query
    _, columns_h, columns_w = tiles.key
    found = []
    for step_h, step_w in product(*map(range, classes.counts[1:])):
        for distance in range(2 * arguments["SPAN"] + 1):
            for lane, pair in product(range(32), range(2)):
                q, k = lane // 4, 2 * (lane % 4) + pair
                t = 2 * distance + k // (columns_h * columns_w) - q // (rows_h * rows_w)
                t += 4 * (arguments["FIRST"] - arguments["LEAD"]) - 2
                h = bases[0] + step_h * columns_h + k // columns_w % columns_h - q // rows_w % rows_h
                w = bases[1] + step_w * columns_w + k % columns_w - q % rows_w
                place = 0
                for apart, axis in zip((t, h, w), three, strict=True):
                    outside = place < 0 or abs(apart) >= axis.kernel_size
                    place = -1 if outside else place * (2 * axis.kernel_size - 1) + apart + axis.kernel_size - 1
                found.append(place)
    return torch.tensor(found)


@pytest.mark.parametrize(
    ("axes", "batch", "heads", "multiprocessors"),
    [
        ((Axis(7, 7), Axis(7, 7)), 3, 2, 1),
        ((Axis(14, 5), Axis(20, 7)), 5, 1, 2),  # programs may end between the items of a class
        ((Axis(13, 3, 2), Axis(19, 5, 3)), 3, 1, 1),
        ((Axis(13, 3, 1, 1, True), Axis(30, 2)), 2, 2, 1000),  # an item for each
        ((Axis(8, 7), Axis(9, 3), Axis(11, 5)), 4, 2, 1),
        ((Axis(9, 5, 1, 1, True), Axis(10, 7), Axis(11, 3)), 5, 2, 2),
        ((Axis(6, 3, 2), Axis(7, 4, 3), Axis(12, 5)), 3, 1, 1),
    ],
)
def test_sums_of_the_bias_gradient(
    axes: tuple[Axis, ...], batch: int, heads: int, multiprocessors: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What adds up the rows that programs leave, on random ones, and nothing in rows that are left out."""
    monkeypatch.setattr(gpu, "capability", lambda device: 9)
    monkeypatch.setattr(prepare, "MULTIPROCESSORS", multiprocessors)
    query = torch.empty(batch, *(axis.length for axis in axes), heads, 32, dtype=torch.bfloat16)
    rpb = torch.empty(heads, *(2 * axis.kernel_size - 1 for axis in axes))
    tensors: Tensors = dict.fromkeys(["query", "key", "value", "grad_output", "output"], query)
    tensors |= dict(rpb=rpb, grad_rpb=rpb, additional_keys=None, additional_values=None)
    geometry = Geometry(problem_of(axes, 1.0, tensors))
    assert geometry.fuses_bias
    tiles = plan.choose_tiles("query_bias", geometry.workload)
    prepared = prepare.PREPARE["query_bias"](geometry, tiles)
    main, *sums = prepared.launches
    shape, arguments = prepared.workspaces["partial"], main.arguments
    assert 4 * prod(shape) <= PARTIAL_BYTES

    classes = column_classes.classes_of(axes, tiles.query, tiles.key)
    kinds = []
    for h, w in product(range(classes.places[1]), range(classes.places[2])):
        along = zip((h, w), classes.before[1:], classes.alike[1:], strict=True)
        kind_h, kind_w = (min(x, before) + max(0, x - before - alike + 1) for x, before, alike in along)
        kinds += [kind_h * (classes.before[2] + 1 + classes.after[2]) + kind_w] * classes.places[0]
    items = [kind for kind in sorted(kinds) for _ in range(batch)]
    assert len(items) == arguments["items"]
    kind_of_row = {item // arguments["share"] + kind: kind for item, kind in enumerate(items)}
    assert max(kind_of_row) == shape[1] - 1

    partial = torch.full(shape, torch.nan)
    partial[:, list(kind_of_row)] = torch.randn(heads, len(kind_of_row), shape[2])
    expected = torch.zeros(heads, rpb[0].numel(), dtype=torch.float64)
    for row, kind in kind_of_row.items():
        places = relative_positions(axes, tiles, arguments, kind)
        expected.index_add_(1, places[places >= 0], partial[:, row, places >= 0].double())
    for launch in sums:
        launch({"grad_rpb": rpb.fill_(torch.nan), "partial": partial})
    torch.testing.assert_close(rpb.flatten(1).double(), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("has_rpb", [True, False], ids=["rpb", "additional"])
def test_operators_pass_opcheck(has_rpb: bool) -> None:
    """The forward operator with its autograd, and the backward operator on its own."""
    additional = None if has_rpb else 2
    problem = Problem((3, 4), (2, 2), (1, 1), (1, 1), (True, False), 1, 1, 1, has_rpb=has_rpb, additional=additional)
    inputs = problem.inputs(torch.float32)
    names = ("query", "key", "value", "rpb", "additional_keys", "additional_values")
    tensors = [x if x is None else x.requires_grad_() for x in map(inputs.get, names)]
    options = *map(list, (problem.kernel_size, problem.stride, problem.dilation, problem.is_causal)), 0.3
    torch.library.opcheck(ops.forward, (*tensors, *options))

    tensors = [x if x is None else x.detach() for x in tensors]
    output, lse = ops.forward(*tensors, *options)
    incoming = torch.randn_like(output), torch.randn_like(lse)
    torch.library.opcheck(ops.backward, (*incoming, *tensors, output, lse, *options, has_rpb))


def test_operators_pass_opcheck_on_packed_tensors() -> None:
    qkv, rpb = torch.randn(1, 3, 4, 3, 1, 8), torch.randn(1, 3, 3)
    tensors, options = (qkv, None, None, rpb, None, None), ([2, 2], [1, 1], [1, 1], [True, False], 0.3)
    torch.library.opcheck(ops.forward, (qkv.clone().requires_grad_(), *tensors[1:], *options))
    output, lse = ops.forward(*tensors, *options)
    incoming = torch.randn_like(output), torch.randn_like(lse)
    torch.library.opcheck(ops.backward, (*incoming, *tensors, output, lse, *options, True))


@pytest.mark.parametrize("packed", [False, True], ids=["", "packed"])
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compile(dynamic: bool, packed: bool) -> None:
    rpb = torch.randn(1, 3, 3, requires_grad=True)

    def attend(qkv: Tensor) -> Tensor:
        if packed:
            return packed_neighborhood_attention(qkv, kernel_size=2, rpb=rpb, backend="triton").sin().sum()
        return na2d(*qkv.unbind(-3), kernel_size=2, rpb=rpb, backend="triton").sin().sum()

    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for batch in (2, 3):
        qkv = torch.randn(batch, 3, 4, 3, 1, 8, requires_grad=True)
        expected, actual = (torch.autograd.grad(function(qkv), (qkv, rpb)) for function in (attend, compiled))
        torch.testing.assert_close(actual, expected)
