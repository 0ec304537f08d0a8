"""The Gluon kernels against the reference, on PyTorch's tensors, which takes no GPU; `gluon_on_torch.py` tells how.

Every problem goes through the public operation, and so through all of its kernels. Maps are tiny, and batches and heads
few: the operations of a step take some milliseconds.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace

import gluon_on_torch
import pytest
import torch
from attention_problems import Problem, assert_close, attend_with_gradients
from gluon_on_torch import STAND_INS, nothing, on_torch, wait_for_products
from torch import Tensor

from fused_na import functional, packed_neighborhood_attention
from fused_na.triton import geometry, gpu, plan, prepare, tiles
from fused_na.triton.launch import Launch
from fused_na.triton.problem import Tensors
from fused_na.triton.tiles import Candidate, Tiles, Workload

KERNELS = ("forward", "query", "key_value", "query_bias")


def clear_caches() -> None:
    for cached in (plan.plan_of, plan.fuses_bias, on_torch):
        cached.cache_clear()


@pytest.fixture(autouse=True)
def launched(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Names of the kernels that run, on the CPU as on a Hopper GPU. New tensors hold NaN, so that an element which no
    kernel writes shows."""
    names: list[str] = []

    def launch(self: Launch, tensors: Tensors) -> None:
        names.append(self.kernel.__name__)
        gluon_on_torch.launch(self, tensors)

    monkeypatch.setattr(Launch, "__call__", launch)
    monkeypatch.setattr(gpu, "capability", lambda device: 9)
    monkeypatch.setattr(functional, "_why_not_triton", lambda *tensors: None)
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    clear_caches()
    yield names
    clear_caches()
    torch.use_deterministic_algorithms(False)


def check(problem: Problem, has_grad_lse: bool = True) -> None:
    """Output, log-sum-exp and all gradients against the reference in float64 on the same inputs."""
    inputs = problem.inputs(torch.float16)
    doubles = {name: x.double() for name, x in inputs.items()}
    expected = attend_with_gradients(problem, doubles, "reference", has_grad_lse)
    actual = attend_with_gradients(problem, inputs, "triton", has_grad_lse)
    assert_close(actual, expected, 2e-3)


def check_packed(problem: Problem) -> None:
    """Output and gradients of query, key and value in one tensor."""
    inputs = replace(problem, heads_kv=problem.heads).inputs(torch.float16)
    inputs["qkv"] = torch.stack([inputs.pop(name) for name in ("query", "key", "value")], -3)
    results = []
    for backend, dtype in (("triton", torch.float16), ("reference", torch.float64)):
        leaves = {name: x.detach().to(dtype).requires_grad_() for name, x in inputs.items()}
        output = packed_neighborhood_attention(**leaves, **problem.options, backend=backend)
        gradients = torch.autograd.grad(output.sin().sum(), tuple(leaves.values()))
        results.append({"output": output.detach()} | dict(zip(leaves, gradients, strict=True)))
    assert_close(*results, 2e-3)


_NARROW = dict(head_dim=32, head_dim_v=32, layout="packed")
_CONTIGUOUS = _NARROW | dict(layout="contiguous", scale=0.5)
COLUMNS = {  # what the kernels of columns take: one or several columns along the first axis, of 4, 8 and 16 tokens
    "map": Problem((14, 9), (7, 5), (1, 1), (1, 1), (False, False), 2, 1, 1, **_NARROW),
    "narrow map": Problem((9, 3), (3, 2), (1, 1), (1, 1), (False, False), 2, 2, 1, **_NARROW),
    "high map": Problem((37, 6), (7, 3), (1, 1), (1, 1), (False, False), 1, 1, 1, **_NARROW),
    "wide windows": Problem((40, 5), (13, 2), (1, 1), (1, 1), (False, False), 1, 1, 1, **_NARROW),
    "causal map": Problem((22, 6), (5, 3), (1, 1), (1, 1), (True, False), 1, 1, 1, **_NARROW),
    "causal on both axes": Problem((9, 10), (4, 5), (2, 1), (1, 1), (True, True), 3, 1, 1, **_NARROW),
    "strided map": Problem((21, 11), (6, 7), (4, 3), (1, 1), (False, False), 1, 2, 2, **_NARROW),
    "dilated map": Problem((36, 12), (4, 3), (1, 1), (2, 3), (False, True), 2, 2, 2, **_NARROW),
    "clip": Problem((16, 5, 6), (7, 3, 4), (1, 1, 1), (1, 1, 1), (False,) * 3, 1, 1, 1, **_NARROW),
    "uneven clip": Problem((13, 3, 5), (7, 3, 3), (1, 1, 1), (1, 1, 1), (False,) * 3, 2, 1, 1, **_NARROW),
    "short clip": Problem((5, 7, 3), (5, 4, 3), (1, 1, 1), (1, 1, 1), (False,) * 3, 2, 1, 1, **_NARROW),
    "long clip": Problem((21, 4, 3), (6, 2, 3), (1, 1, 1), (1, 1, 1), (False,) * 3, 1, 1, 1, **_NARROW),
    "causal clip": Problem((16, 5, 4), (7, 3, 2), (1, 1, 1), (1, 1, 1), (True, False, False), 1, 1, 1, **_NARROW),
    "strided clip": Problem((11, 5, 9), (7, 5, 6), (2, 4, 4), (1, 1, 1), (False,) * 3, 1, 1, 1, **_NARROW),
    "dilated clip": Problem((12, 6, 4), (3, 3, 2), (1, 1, 1), (2, 2, 1), (False,) * 3, 2, 1, 1, **_NARROW),
    "shared heads": Problem((8, 4, 3), (3, 3, 2), (1, 1, 1), (1, 1, 1), (False,) * 3, 2, 4, 2, **_NARROW),
    "contiguous": Problem((8, 3, 5), (7, 3, 3), (1, 1, 1), (1, 1, 1), (False,) * 3, 3, **_CONTIGUOUS),
}


@pytest.fixture(params=[32, 64], ids=["32 tokens", "64 tokens"])
def columns(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Columns, of up to so many tokens, whatever else might be faster."""

    def choose_tiles(kernel: str, workload: Workload) -> Tiles:
        assert workload.has_columns
        candidates = {
            (of, rank): [Candidate(n, 64, 1, 2, True, 1e6 * n, is_columns=True) for n in (32, request.param)]
            for of in KERNELS
            for rank in (2, 3)
        }
        with monkeypatch.context() as patched:
            patched.setattr(tiles, "COLUMNS", candidates)
            return tiles.choose_tiles.__wrapped__(kernel, workload)

    monkeypatch.setattr(plan, "choose_tiles", choose_tiles)
    monkeypatch.setattr(geometry, "choose_tiles", choose_tiles)
    return request.param


@pytest.mark.parametrize("has_rpb", [True, False], ids=["bias", ""])
@pytest.mark.parametrize("problem", COLUMNS.values(), ids=COLUMNS.keys())
def test_columns(
    problem: Problem, has_rpb: bool, columns: int, launched: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By programs of three samples out of five, on maps. With a bias, by programs of one item, by some whose sums
    rarely fit into shared memory, and by two that meet several classes and have room."""
    for multiprocessors, at_once in ((10**6, 1), (1, 10**6), (2, 1)) if has_rpb else ((1, 1),):
        monkeypatch.setattr(prepare, "MULTIPROCESSORS", multiprocessors)
        monkeypatch.setattr(prepare, "COLUMNS_AT_ONCE", at_once)
        samples = 1 if multiprocessors > 2 else 3
        monkeypatch.setattr(prepare, "samples_of_program", lambda *_, samples=samples: samples)
        clear_caches()
        launched.clear()
        batch = problem.batch if has_rpb or len(problem.spatial) == 3 else 5
        check(replace(problem, has_rpb=has_rpb, batch=batch), has_grad_lse=multiprocessors != 2)
        backward = ["query_bias_columns_kernel" if has_rpb else "query_columns_kernel", "key_value_columns_kernel"]
        if has_rpb:
            backward = ["bias_copy_kernel", backward[0], "sum_classes_kernel", "fold_columns_kernel", backward[1]]
            assert launched.pop(0) == "bias_copy_kernel"
        assert launched == ["forward_columns_kernel", *backward]


@pytest.mark.parametrize("problem", [COLUMNS["map"], COLUMNS["clip"]], ids=["map", "clip"])
def test_columns_packed(problem: Problem, columns: int) -> None:
    check_packed(replace(problem, has_rpb=True))


_WIDE = dict(head_dim=128, head_dim_v=128, layout="packed")
WIDE = {  # what the wide kernels take: one to many tiles, with and without tiles inside all windows
    "one tile": Problem((12,), (7,), (1,), (1,), (False,), 1, 2, 2, **_WIDE),
    "sequence": Problem((150,), (81,), (1,), (1,), (False,), 1, 1, 1, **_WIDE),
    "shared heads": Problem((70,), (50,), (1,), (1,), (False,), 2, 4, 2, **_WIDE),
    "causal": Problem((103,), (70,), (3,), (1,), (True,), 1, 1, 1, **_WIDE),
    "strided": Problem((130,), (64,), (32,), (1,), (False,), 1, 1, 1, **_WIDE),
    "full attention": Problem((50,), (50,), (1,), (1,), (False,), 2, 1, 1, **_WIDE),
    "map": Problem((9, 18), (8, 14), (1, 1), (1, 1), (False, False), 1, 2, 1, **_WIDE),
    "causal map": Problem((10, 15), (7, 6), (3, 1), (1, 1), (True, False), 1, 1, 1, **_WIDE),
    "clip": Problem((4, 7, 9), (3, 6, 8), (1, 1, 2), (1, 1, 1), (False,) * 3, 1, 1, 1, **_WIDE),
    "causal clip": Problem((4, 6, 7), (3, 5, 6), (1, 1, 1), (1, 1, 1), (True, False, False), 1, 1, 1, **_WIDE),
}
TILES = {1: ((1, 1, 16), (1, 1, 32)), 2: ((4, 1, 4), (4, 1, 8)), 3: ((2, 2, 4), (2, 4, 4))}  # own, and moving


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """The wide kernels, on tiles so small that a small map has several."""

    def choose_tiles(kernel: str, workload: Workload) -> Tiles:
        assert workload.is_wide
        own, moving = TILES[len(workload.axes)]
        query, key = (moving, own) if kernel == "key_value" else (own, moving)
        return Tiles(query, key, num_warps=4, num_stages=2 if kernel == "forward" else 3, bulk=True, is_wide=True)

    monkeypatch.setattr(plan, "choose_tiles", choose_tiles)


@pytest.mark.parametrize("problem", WIDE.values(), ids=WIDE.keys())
def test_wide_windows(problem: Problem, small_tiles: None, launched: list[str]) -> None:
    check(problem, has_grad_lse=problem.batch == 1)
    assert launched == ["forward_wide_kernel", "query_wide_kernel", "key_value_wide_kernel"]


def test_wide_windows_packed(small_tiles: None) -> None:
    check_packed(WIDE["sequence"])


def fill_at_once(full: gluon_on_torch.Barriers, empty: object, step: Tensor, bytes: int, STAGES: int) -> Tensor:
    """As `wide.wait_empty`, without its wait."""
    gluon_on_torch.expect(full.index(step % STAGES), bytes)
    return step % STAGES


@pytest.mark.parametrize(
    ("name", "mistaken", "message"),
    [
        ("wait_full", nothing, "a product of what is not there"),
        ("wait_empty", fill_at_once, "an arrival of a later phase"),
        ("warpgroup_mma_wait", lambda under_way, deps: wait_for_products(under_way + 1, deps), "'Product' object"),
        ("below", lambda begin, inner, end: torch.ones_like(inner[2]) > 0, "an access outside of a tensor"),
    ],
)
def test_mistakes_show(
    name: str, mistaken: Callable, message: str, small_tiles: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reading what has not been copied, copying over what is still read, taking products before they are there, and
    writing rows that do not exist."""
    monkeypatch.setitem(STAND_INS, name, mistaken)
    with pytest.raises((AssertionError, AttributeError), match=message):
        check(WIDE["sequence"])
