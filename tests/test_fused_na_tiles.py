"""The choice of tiles, a pure function of the problem."""

import time
from itertools import product
from math import ceil, prod

import pytest
from attention_problems import Problem, problems
from hypothesis import given, settings
from hypothesis import strategies as st

from fused_na.triton.tiles import (
    CANDIDATES,
    Extent,
    Tiles,
    Workload,
    always_one_tile,
    as_three_axes,
    choose_tiles,
    executed_scores,
    extents,
    steps_on_axis,
)
from fused_na.window import Axis, group_members, inverse_window, window

KERNELS = ["forward", "query", "key_value", "bias"]
AXES = {
    "one token": (Axis(1, 1),),
    "sequence": (Axis(32768, 2048),),
    "long sequence": (Axis(1 << 20, 9, 4, 3),),
    "short sequence": (Axis(7, 3),),
    "image": (Axis(56, 7), Axis(56, 7)),
    "dilated image": (Axis(56, 7, 1, 8), Axis(56, 7, 1, 8)),
    "full image": (Axis(7, 7), Axis(7, 7)),
    "high strip": (Axis(300, 5), Axis(2, 2)),
    "wide strip": (Axis(2, 2), Axis(300, 5)),
    "large image": (Axis(256, 80, 16), Axis(256, 80, 16)),
    "larger image": (Axis(1024, 9), Axis(1024, 9)),
    "dilated mixed causal image": (Axis(50, 4, 3, 7, True), Axis(61, 6, 2, 5)),
    "clip": (Axis(16, 7, 1, 1, True), Axis(56, 7), Axis(56, 7)),
    "small clip": (Axis(2, 2), Axis(3, 1), Axis(3, 3)),
    "dilated clip": (Axis(16, 2, 2, 3), Axis(30, 5, 1, 4), Axis(31, 5)),
    "large clip": (Axis(30, 18, 16), Axis(48, 24, 8), Axis(80, 24, 8)),
    "larger clip": (Axis(64, 7), Axis(96, 7), Axis(96, 7)),
}
SHARED_MEMORY = 227 << 10  # bytes a program may have on Hopper


def padded(head_dim: int) -> int:
    return max(16, 1 << (head_dim - 1).bit_length())


def assert_legal(tiles: Tiles, kernel: str, axes: tuple[Axis, ...], head_dim: int, head_dim_v: int, size: int) -> None:
    for extent in (tiles.query, tiles.key):
        assert all(n >= 1 and n & (n - 1) == 0 for n in extent), "extents are powers of two"
        assert 16 <= prod(extent) <= 256, "matrix products have at least 16 rows, bulk copies at most 256"
        t, h, w = extent
        limits = [2 * group_members(axis, 0) - 1 for axis in as_three_axes(axes)]
        assert t <= limits[0] and h <= limits[1], "tiles reach beyond a map along w alone"
        assert w <= limits[2] or (2 * t > limits[0] and 2 * h > limits[1]), "and only where the map is smaller"
    assert tiles.num_warps in (1, 2, 4, 8) and tiles.num_stages >= 1
    # Each stage holds a tile of keys and values, or of queries and gradients of the output; the rest is in registers.
    rows = tiles.num_stages * prod(tiles.query if kernel == "key_value" else tiles.key)
    assert rows * (padded(head_dim) + padded(head_dim_v)) * size <= SHARED_MEMORY


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("axes", AXES.values(), ids=AXES.keys())
def test_every_head_dim_and_dtype(axes: tuple[Axis, ...], kernel: str) -> None:
    """All widths on the smaller maps; on the large ones, where a choice takes longer, one of every kind."""
    is_large = prod(axis.length for axis in axes) > 5000
    widths = [8, 32, 64, 96, 128, 256] if is_large else range(8, 264, 8)
    for head_dim, size in product(widths, (2, 4)):
        for head_dim_v in {head_dim, 32, 264 - head_dim}:
            tiles = choose_tiles(kernel, Workload(axes, head_dim, head_dim_v, size))
            assert_legal(tiles, kernel, axes, head_dim, head_dim_v, size)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("has_rpb", [False, True], ids=["", "rpb"])
@pytest.mark.parametrize("limit", [227, 163, 99], ids=["Hopper", "A100", "Ada"])
def test_tiles_fit_in_shared_memory(limit: int, has_rpb: bool, kernel: str) -> None:
    """A stage holds a tile of both tensors that a kernel loops over; a bias of float32 is laid out anew."""
    for axes, head_dim, size in product(AXES.values(), [32, 64, 128, 256], [2, 4]):
        tiles = choose_tiles(kernel, Workload(axes, head_dim, head_dim, size, has_rpb, limit << 10))
        moving, stationary = (tiles.query, tiles.key) if kernel == "key_value" else (tiles.key, tiles.query)
        own = head_dim if kernel == "forward" else 2 * head_dim
        bytes_taken = size * (tiles.num_stages * prod(moving) * 2 * head_dim + prod(stationary) * own)
        assert bytes_taken + has_rpb * 4 * prod(moving) * prod(stationary) <= limit << 10, (axes, head_dim, size)


@settings(max_examples=60)
@given(problem=problems(), kernel=st.sampled_from(KERNELS), head_dim=st.integers(1, 32), size=st.sampled_from([2, 4]))
def test_any_legal_problem(problem: Problem, kernel: str, head_dim: int, size: int) -> None:
    axes = tuple(map(Axis, problem.spatial, problem.kernel_size, problem.stride, problem.dilation, problem.is_causal))
    tiles = choose_tiles(kernel, Workload(axes, 8 * head_dim, 8 * head_dim, size))
    assert_legal(tiles, kernel, axes, 8 * head_dim, 8 * head_dim, size)


def test_key_and_value_by_columns_that_are_the_whole_axis_take_few_registers() -> None:
    for length, dilation, registers in ((7, 1, 168), (56, 8, 168), (14, 1, None), (56, 1, None)):
        axis = Axis(length, 7, 1, dilation)
        tiles = choose_tiles("key_value", Workload((axis, axis), 32, 32, 2, has_columns=True))
        assert tiles.is_columns and tiles.max_registers == registers


@pytest.mark.parametrize("kernel", KERNELS)
def test_least_time_of_all_candidates(kernel: str) -> None:
    """No other shape of the same sizes executes fewer scores, and no other candidate's would take less time."""
    axes = AXES["dilated mixed causal image"]
    over_keys = kernel != "key_value"
    three = as_three_axes(axes)
    times = {
        (s, m, candidate): executed_scores(three, s, m, over_keys) / candidate.rate
        for candidate in CANDIDATES[kernel, "wide"]
        if not candidate.is_wide
        for s in extents(candidate.stationary, three)
        for m in extents(candidate.moving, three)
    }
    tiles = choose_tiles(kernel, Workload(axes, 128, 128, 2))
    chosen = (tiles.query, tiles.key) if over_keys else (tiles.key, tiles.query)
    assert min(time for (s, m, _), time in times.items() if (s, m) == chosen) == min(times.values())


@settings(max_examples=100)
@given(problem=problems(), query=st.sampled_from([1, 2, 4, 8, 16]), key=st.sampled_from([8, 16, 32]))
def test_axes_of_one_tile(problem: Problem, query: int, key: int) -> None:
    """Where it is said that one tile of keys always does, no tile of queries needs two."""
    axes = tuple(map(Axis, problem.spatial, problem.kernel_size, problem.stride, problem.dilation, problem.is_causal))
    for axis in axes:
        if always_one_tile(axis, query, key):
            tiles = sum(ceil(group_members(axis, group) / query) for group in range(axis.dilation))
            assert steps_on_axis(axis, query, key, True) == tiles


def test_one_tile_is_seen_where_it_does() -> None:
    assert always_one_tile(Axis(56, 7), 8, 16) and always_one_tile(Axis(56, 7), 10, 16)
    assert not always_one_tile(Axis(56, 7), 11, 16)
    assert always_one_tile(Axis(56, 7, 4), 8, 16) and not always_one_tile(Axis(56, 7, 4), 10, 16)


def work_counted(axes: tuple[Axis, ...], stationary: Extent, moving: Extent, over_keys: bool) -> int:
    """Scores that a kernel executes, counted tile by tile on the windows of all of a tile's members."""
    interval = window if over_keys else inverse_window
    total = 0
    for groups in product(*(range(axis.dilation) for axis in axes)):
        members = [group_members(axis, group) for axis, group in zip(axes, groups, strict=True)]
        tiles = (range(0, n, size) for n, size in zip(members, stationary, strict=True))
        for begins in product(*tiles):
            steps = 1
            for axis, n, begin, size, step in zip(axes, members, begins, stationary, moving, strict=True):
                intervals = [interval(axis, i, n) for i in range(begin, min(begin + size, n))]
                first, end = min(start for start, _ in intervals), max(end for _, end in intervals)
                steps *= len(range(first, end, step))
            total += steps * prod(stationary) * prod(moving)
    return total


@settings(max_examples=60)
@given(
    problem=problems(max_tokens=100),
    sizes=st.lists(st.sampled_from([1, 2, 4, 8]), min_size=6, max_size=6),
    over_keys=st.booleans(),
)
def test_executed_scores(problem: Problem, sizes: list[int], over_keys: bool) -> None:
    axes = as_three_axes(
        tuple(map(Axis, problem.spatial, problem.kernel_size, problem.stride, problem.dilation, problem.is_causal))
    )
    stationary, moving = tuple(sizes[:3]), tuple(sizes[3:])
    expected = work_counted(axes, stationary, moving, over_keys)
    assert executed_scores(axes, stationary, moving, over_keys) == expected


@pytest.mark.parametrize("rows", [16, 32, 128])
@pytest.mark.parametrize("axes", AXES.values(), ids=AXES.keys())
def test_extents(axes: tuple[Axis, ...], rows: int) -> None:
    found = list(extents(rows, as_three_axes(axes)))
    assert found and len(set(found)) == len(found)
    assert all(prod(extent) == rows for extent in found)


@pytest.mark.parametrize("axes", [AXES[name] for name in ("sequence", "large image", "large clip", "larger clip")])
def test_the_choice_is_quick_and_always_the_same(axes: tuple[Axis, ...]) -> None:
    """Every kernel within 50 ms of processor time when nothing is cached."""
    for kernel in KERNELS:
        times, choices = [], set()
        for _ in range(3):
            choose_tiles.cache_clear()
            steps_on_axis.cache_clear()
            begin = time.process_time()
            choices.add(choose_tiles(kernel, Workload(axes, 128, 128, 2)))
            times.append(time.process_time() - begin)
        assert len(choices) == 1
        assert min(times) < 0.05, f"{kernel}: {min(times):.3f} s"
