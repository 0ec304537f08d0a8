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
from gluon_on_torch import STAND_INS, nothing, on_torch, value, wait_for_products
from test_fused_na_slots import place_in_plane
from torch import Tensor

from fused_na import functional, packed_neighborhood_attention
from fused_na.triton import geometry, gpu, plan, prepare, query_bias, query_bias_clips, tiles
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


def check(problem: Problem, has_grad_lse: bool = True, dtype: torch.dtype = torch.float16) -> None:
    """Output, log-sum-exp and all gradients against the reference in float64 on the same inputs."""
    inputs = problem.inputs(dtype)
    doubles = {name: x.double() for name, x in inputs.items()}
    expected = attend_with_gradients(problem, doubles, "reference", has_grad_lse)
    actual = attend_with_gradients(problem, inputs, "triton", has_grad_lse)
    assert_close(actual, expected, {torch.float16: 2e-3, torch.bfloat16: 1.5e-2}[dtype])


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


_BIASED = dict(head_dim=32, head_dim_v=32, has_rpb=True, layout="packed")
_SCALED = dict(layout="contiguous", scale=0.5)
MAPS = {  # what `query_bias_kernel` takes, on tiles of 4 x 8 queries and 2 x 16 keys
    "one tile": Problem((3, 5), (3, 5), (1, 1), (1, 1), (False, False), 3, 1, 1, **_BIASED),
    "map": Problem((11, 26), (3, 5), (1, 1), (1, 1), (False, False), 2, 1, 1, **_BIASED),
    "shared heads": Problem((5, 9), (3, 4), (1, 1), (1, 1), (False, False), 2, 4, 2, **_BIASED),
    "wide windows": Problem((6, 21), (4, 19), (1, 1), (1, 1), (False, False), 2, 1, 1, **_BIASED),
    "causal": Problem((11, 11), (5, 3), (1, 1), (1, 1), (True, False), 2, 1, 1, **_BIASED),
    "causal on both axes": Problem((6, 10), (3, 5), (2, 1), (1, 1), (True, True), 3, 1, 1, **_BIASED),
    "strided": Problem((9, 12), (5, 7), (2, 3), (1, 1), (False, False), 2, 1, 1, **_BIASED),
    "blocks": Problem((8, 9), (4, 3), (4, 3), (1, 1), (False, True), 3, 1, 1, **_BIASED),
    "dilated": Problem((10, 12), (3, 4), (1, 1), (2, 3), (False, True), 2, 2, 1, **_BIASED),
    "dilation on one axis": Problem((6, 20), (4, 3), (2, 1), (1, 2), (True, False), 2, 1, 1, **_BIASED),
    "contiguous": Problem((7, 8), (3, 3), (1, 1), (1, 1), (False, False), 3, **_BIASED | _SCALED),
    "two clips": Problem((5, 5, 3), (3, 3, 2), (1, 1, 1), (1, 1, 1), (True, False, False), 2, 1, 1, **_BIASED),
    "dilated clips": Problem((4, 6, 4), (2, 3, 2), (1, 1, 1), (1, 2, 1), (False,) * 3, 3, 1, 1, **_BIASED),
}
CLIPS = {  # what `query_bias_clips_kernel` takes, on tiles of 4 x 4 x 2 queries and 2 x 2 x 8 keys
    "clips": Problem((5, 5, 3), (3, 3, 3), (1, 1, 1), (1, 1, 1), (False,) * 3, 5, 1, 1, **_BIASED),
    "one tile": Problem((4, 4, 2), (3, 4, 2), (1, 1, 1), (1, 1, 1), (False,) * 3, 4, 1, 1, **_BIASED),
    "alike tiles": Problem((3, 4, 10), (3, 2, 3), (1, 1, 1), (1, 1, 1), (False,) * 3, 5, 1, 1, **_BIASED),
    "short": Problem((2, 6, 12), (2, 3, 8), (1, 1, 1), (1, 1, 1), (False,) * 3, 3, 1, 1, **_BIASED),
    "shared heads": Problem((3, 5, 4), (3, 2, 3), (1, 1, 1), (1, 1, 1), (False,) * 3, 3, 2, 1, **_BIASED),
    "causal": Problem((9, 3, 3), (4, 3, 2), (1, 1, 1), (1, 1, 1), (True, False, False), 6, 1, 1, **_BIASED),
    "causal on all axes": Problem((5, 5, 3), (3, 2, 3), (2, 1, 1), (1, 1, 1), (True,) * 3, 3, 1, 1, **_BIASED),
    "strided": Problem((6, 7, 4), (3, 4, 3), (2, 3, 1), (1, 1, 1), (False, False, True), 3, 1, 1, **_BIASED),
    "wide windows": Problem((4, 4, 12), (2, 3, 11), (1, 1, 2), (1, 1, 1), (False,) * 3, 3, 1, 1, **_BIASED),
    "contiguous": Problem((4, 5, 3), (3, 3, 2), (1, 1, 1), (1, 1, 1), (False,) * 3, 9, 1, 1, **_BIASED | _SCALED),
}


@pytest.mark.parametrize("programs", [None, 1], ids=["", "fewest programs"])
@pytest.mark.parametrize("problem", MAPS.values(), ids=MAPS.keys())
@pytest.mark.usefixtures("no_columns")
def test_query_and_bias(
    problem: Problem, programs: int | None, launched: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a sample for each program, and few programs that go through all samples of several tiles."""
    if programs is not None:
        monkeypatch.setattr(prepare, "PROGRAMS", {2: programs, 3: programs})
    check(problem, has_grad_lse=programs is None)
    assert launched[2:] == ["bias_copy_kernel", "query_bias_kernel", "fold_rows_kernel", "key_value_kernel"]


@pytest.mark.usefixtures("no_columns")
def test_query_and_bias_with_parts_of_the_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of which the last is smaller."""
    monkeypatch.setattr(prepare, "PROGRAMS", {2: 6})
    check(replace(MAPS["one tile"], batch=5, heads=2), dtype=torch.bfloat16)


@pytest.mark.parametrize("programs", [None, 3], ids=["", "few programs"])
@pytest.mark.parametrize("problem", CLIPS.values(), ids=CLIPS.keys())
@pytest.mark.usefixtures("no_columns")
def test_query_and_bias_of_clips(
    problem: Problem, programs: int | None, launched: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With an item for each program, and few programs with items of several classes."""
    if programs is not None:
        monkeypatch.setattr(prepare, "CLIPS_PROGRAMS", programs)
    check(problem, has_grad_lse=programs is None)
    assert launched[2:] == ["bias_copy_kernel", "query_bias_clips_kernel", "fold_rows_kernel", "key_value_kernel"]


@pytest.mark.parametrize("problem", [MAPS["map"], MAPS["dilated"], CLIPS["clips"]], ids=["map", "dilated", "clips"])
@pytest.mark.usefixtures("no_columns")
def test_query_and_bias_packed(problem: Problem) -> None:
    check_packed(problem)


_NARROW = dict(head_dim=32, head_dim_v=32, layout="packed")
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
    "contiguous": Problem((8, 3, 5), (7, 3, 3), (1, 1, 1), (1, 1, 1), (False,) * 3, 3, **_NARROW | _SCALED),
}


@pytest.fixture(params=[32, 64], ids=["32 tokens", "64 tokens"])
def columns(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
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


@pytest.mark.parametrize("has_rpb", [True, False], ids=["bias", ""])
@pytest.mark.parametrize("problem", COLUMNS.values(), ids=COLUMNS.keys())
def test_columns(
    problem: Problem, has_rpb: bool, columns: None, launched: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a bias, by programs of one item and by few of many, which meet several classes."""
    for programs in (10**6, 2) if has_rpb else (1,):
        monkeypatch.setattr(prepare, "MULTIPROCESSORS", programs)
        monkeypatch.setattr(prepare, "COLUMNS_AT_ONCE", 1)
        clear_caches()
        launched.clear()
        check(replace(problem, has_rpb=has_rpb), has_grad_lse=programs != 2)
        backward = ["query_bias_columns_kernel" if has_rpb else "query_columns_kernel", "key_value_columns_kernel"]
        if has_rpb:
            backward = ["bias_copy_kernel", backward[0], "fold_columns_kernel", backward[1]]
            assert launched.pop(0) == "bias_copy_kernel"
        assert launched == ["forward_columns_kernel", *backward]


@pytest.mark.parametrize("problem", [COLUMNS["map"], COLUMNS["clip"]], ids=["map", "clip"])
def test_columns_packed(problem: Problem, columns: None) -> None:
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


def test_planes_of_a_tile() -> None:
    """Each plane holds its queries and keys where the slots expect them, and tiles consist of their groups' planes."""
    planes_of, tile_of = on_torch(query_bias.planes_of), on_torch(query_bias.tile_of)
    tile = value(torch.arange(32 * 32).view(32, 32))
    row, column = torch.arange(8)[:, None], torch.arange(16)[None, :]
    planes = planes_of(tile, None)
    for i, plane in enumerate(planes):
        expected = tile[i // 2 * 8 :, i % 2 * 16 :][:8, :16]
        assert torch.equal(plane.flatten()[place_in_plane(row, column)], expected)

    tiles = torch.stack([tile, -tile, 2 * tile, -2 * tile])
    of_samples = on_torch(query_bias_clips.planes_of_samples)(tiles, None)
    for plane, together in zip(planes, of_samples, strict=True):
        assert torch.equal(together, torch.stack([plane, -plane, 2 * plane, -2 * plane]))

    groups = torch.randn(5, 32, 4).unbind()
    built = planes_of(tile_of(groups, None), None)
    for i, plane in enumerate(built):
        assert torch.equal(plane, groups[i % 2 - i // 2 + 3])
