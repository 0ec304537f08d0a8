"""The choice of tiles: a pure function of the problem, which needs no GPU."""

from collections.abc import Iterator
from functools import lru_cache
from itertools import product
from math import ceil, prod
from typing import NamedTuple

from fused_na.triton.column_blocks import BLOCK, FEWEST_BLOCKS, MOST_MOVING, PLACES, blocks_of
from fused_na.window import Axis, group_members, inverse_window, window

Extent = tuple[int, int, int]  # sizes along t, h and w
HOPPER_SHARED_MEMORY = 232448  # bytes that one program may have


class Workload(NamedTuple):
    """What tiles are chosen for."""

    axes: tuple[Axis, ...]
    head_dim: int  # of query and key
    head_dim_v: int  # of value
    itemsize: int  # bytes of an element, 2 or 4
    has_rpb: bool = False
    shared_memory: int = HOPPER_SHARED_MEMORY
    is_wide: bool = False  # whether the kernels of `wide.py` can be taken
    has_columns: bool = False  # whether those of `columns.py` can


class Tiles(NamedTuple):
    """Launch parameters of one kernel; extents are powers of two."""

    query: Extent
    key: Extent
    num_warps: int
    num_stages: int
    bulk: bool = False  # load through the bulk copy engine where the machine and the layout allow it
    max_registers: int | None = None  # of a thread; fewer let more programs run at once, None leaves it to the compiler
    is_wide: bool = False  # whether it is one of the kernels of `wide.py`
    is_columns: bool = False  # whether it is one of those of `columns.py`


class Candidate(NamedTuple):
    """A way to run a kernel: tokens of its own tile, tokens of the tiles it loops over, and how fast it works then."""

    stationary: int
    moving: int
    num_warps: int
    num_stages: int
    bulk: bool
    rate: float  # executed TFLOP/s of the score products on one H100
    max_registers: int | None = None
    is_wide: bool = False
    is_columns: bool = False  # of whose own column the tokens are `stationary`


# By kernel and regime, measured on an H100 and used everywhere. Rates only matter against each other.
CANDIDATES = {
    # Windows of at most 512 tokens at head_dim up to 32: one warp a program, bound by instructions and latency.
    ("forward", "small"): [
        Candidate(32, 64, 1, 3, True, 125, max_registers=168),
        Candidate(32, 32, 1, 3, True, 120, max_registers=128),
    ],
    ("forward", "small volume"): [
        Candidate(32, 64, 1, 3, True, 105),
        Candidate(32, 32, 1, 3, True, 95, max_registers=168),
    ],
    ("query", "small"): [
        Candidate(32, 32, 1, 3, True, 100, max_registers=168),
        Candidate(32, 16, 1, 3, True, 97, max_registers=128),
    ],
    ("query", "small volume"): [Candidate(32, 32, 1, 3, True, 100, max_registers=168)],
    ("key_value", "small"): [Candidate(32, 16, 1, 3, True, 75, max_registers=168)],
    ("key_value", "small volume"): [Candidate(32, 32, 1, 3, True, 75)],
    ("bias", "small"): [Candidate(16, 64, 1, 2, True, 60, max_registers=168)],
    ("bias", "small volume"): [Candidate(32, 32, 1, 2, True, 60, max_registers=168)],
    # The same where dilation groups differ in size, so that no bulk copy takes them; measured on groups of one or few
    # tiles. Groups of one size are to tiles what maps of that size are.
    ("forward", "small uneven"): [Candidate(64, 32, 1, 2, False, 70), Candidate(32, 32, 1, 2, False, 60)],
    ("query", "small uneven"): [Candidate(64, 32, 1, 2, False, 54), Candidate(32, 32, 1, 3, False, 52)],
    ("key_value", "small uneven"): [Candidate(64, 64, 2, 2, False, 53), Candidate(32, 32, 1, 2, False, 45)],
    ("bias", "small uneven"): [Candidate(64, 32, 2, 3, False, 40)],
    # The same with a relative positional bias, whose loads and addresses take registers.
    ("forward", "small with bias"): [Candidate(32, 32, 1, 3, True, 66, max_registers=168)],
    ("query", "small with bias"): [Candidate(32, 32, 1, 3, True, 47, max_registers=168)],
    ("forward", "small volume with bias"): [Candidate(16, 64, 1, 2, True, 69)],
    ("query", "small volume with bias"): [Candidate(16, 32, 1, 3, True, 56)],
    ("forward", "small uneven with bias"): [Candidate(32, 32, 1, 2, False, 39, max_registers=128)],
    ("query", "small uneven with bias"): [Candidate(32, 16, 1, 3, False, 30, max_registers=128)],
    ("key_value", "small uneven with bias"): [Candidate(32, 16, 1, 3, False, 29, max_registers=168)],
    # The same at a head_dim above 32, not measured: two warps share what does not fit in the registers of one.
    ("key_value", "small at 64"): [Candidate(32, 32, 2, 2, True, 1)],
    # Everything else in 16 bits: warpgroup products, bound by the pipeline of softmax and products. The slowest
    # candidates are for GPUs with less shared memory, and for biases.
    ("forward", "wide"): [
        Candidate(128, 128, 4, 3, True, 630, 168, is_wide=True),
        Candidate(128, 128, 8, 3, True, 510),
        Candidate(64, 64, 4, 3, True, 485),
        Candidate(64, 64, 4, 2, True, 380),
    ],
    ("forward", "sequence"): [
        Candidate(128, 128, 4, 3, True, 630, 168, is_wide=True),
        Candidate(64, 64, 4, 3, True, 480),
        Candidate(64, 64, 4, 2, True, 390),
    ],
    ("query", "sequence"): [
        Candidate(128, 64, 4, 4, True, 360, 168, is_wide=True),
        Candidate(64, 64, 4, 2, True, 300),
        Candidate(64, 32, 4, 2, True, 200),
    ],
    ("key_value", "sequence"): [
        Candidate(128, 64, 4, 4, True, 190, 168, is_wide=True),
        Candidate(64, 64, 4, 2, True, 160),
        Candidate(64, 32, 4, 2, True, 110),
    ],
    ("bias", "sequence"): [Candidate(64, 64, 4, 1, False, 100)],
    ("forward", "narrow"): [Candidate(64, 64, 4, 2, True, 400)],
    ("query", "wide"): [
        Candidate(128, 64, 4, 4, True, 395, 168, is_wide=True),
        Candidate(64, 64, 4, 2, True, 320),
        Candidate(64, 32, 4, 2, True, 200),
    ],
    ("query", "narrow"): [Candidate(64, 64, 4, 2, True, 315)],
    ("key_value", "wide"): [
        Candidate(128, 64, 4, 4, True, 200, 168, is_wide=True),
        Candidate(64, 64, 4, 2, True, 165),
        Candidate(64, 32, 4, 2, True, 110),
    ],
    ("key_value", "narrow"): [Candidate(64, 64, 4, 3, True, 178), Candidate(64, 64, 4, 1, False, 147)],
    ("bias", "wide"): [Candidate(64, 64, 4, 1, False, 100)],
    ("bias", "narrow"): [Candidate(64, 64, 4, 1, False, 100)],
    # A head_dim under 64 beside windows or another head_dim that are not small. Matrix units of single warps: warpgroup
    # products of 32 columns gave a wrong output on an H100 for head_dim 72 with head_dim_v 24 (Triton 3.6).
    **{(kernel, "mixed"): [Candidate(32, 32, 2, 2, False, 1)] for kernel in ("forward", "query", "key_value")},
    ("bias", "mixed"): [Candidate(32, 32, 2, 1, False, 1)],
    # head_dim over 128, and float32 without tf32, which has no matrix units to use.
    ("forward", "widest"): [Candidate(64, 64, 8, 2, False, 2), Candidate(32, 32, 4, 2, False, 1)],
    ("query", "widest"): [Candidate(64, 32, 8, 2, False, 2), Candidate(32, 32, 4, 1, False, 1)],
    ("key_value", "widest"): [Candidate(32, 32, 4, 1, False, 1)],
    ("bias", "widest"): [Candidate(32, 32, 4, 1, False, 1)],
    **{
        (kernel, "float32"): [Candidate(32, 32, 4, 1, False, 1)] for kernel in ("forward", "query", "key_value", "bias")
    },
    **{
        (kernel, "widest float32"): [Candidate(16, 16, 4, 1, False, 1)]
        for kernel in ("forward", "query", "key_value", "bias")
    },
}


# Of the kernels of `columns.py`, by the number of axes, besides those above: of own columns of 64 and of 32 tokens.
# Measured on an H200 against those that are above, of which the rates were kept. "query_bias" has no others.
COLUMN_RATES = {
    ("forward", 2): (124, 126),
    ("forward", 3): (105, 112),
    ("query", 2): (108, 140),
    ("query", 3): (100, 112),
    ("key_value", 2): (82, 84),
    ("key_value", 3): (84, 80),
    ("query_bias", 2): (72, 90),
    ("query_bias", 3): (103, 102),
}
COLUMNS = {
    which: [
        Candidate(tokens, 64, 1, 2, True, rate, is_columns=True) for tokens, rate in zip((64, 32), rates, strict=True)
    ]
    for which, rates in COLUMN_RATES.items()
}


def regime(workload: Workload) -> str:
    """What a problem is bound by, as far as tiles are concerned; a second key of `CANDIDATES`."""
    axes = workload.axes
    width = max(workload.head_dim, workload.head_dim_v)
    if workload.itemsize == 4:
        return "float32" if width <= 128 else "widest float32"
    if prod(axis.kernel_size for axis in axes) <= 512 and width <= 64:
        if width > 32:
            return "small at 64"
        if any(axis.length % axis.dilation for axis in axes):
            return "small uneven"
        return "small volume" if len(axes) == 3 else "small"
    if min(workload.head_dim, workload.head_dim_v) <= 32:
        return "mixed"
    if width <= 64:
        return "narrow"
    if width > 128:
        return "widest"
    return "sequence" if len(axes) == 1 else "wide"


def fits_columns(workload: Workload) -> bool:
    """Whether the kernels of columns can take a workload, on Hopper and if tensors can be copied in bulk."""
    first = as_three_axes(workload.axes)[0]
    return (
        regime(workload) in ("small", "small volume")
        and workload.head_dim == workload.head_dim_v == 32
        and len(workload.axes) > 1
        and first.kernel_size <= BLOCK * MOST_MOVING
        and all(blocks_of(first, FEWEST_BLOCKS, over_keys).is_small for over_keys in (True, False))
    )


def as_three_axes(axes: tuple[Axis, ...]) -> tuple[Axis, Axis, Axis]:
    """The problem as the kernels see it: `(t, h, w)`, where a map is `(t, w)` and a sequence `(w,)`."""
    one = Axis(1, 1)
    if len(axes) == 1:
        return one, one, axes[0]
    if len(axes) == 2:
        return axes[0], one, axes[1]
    return axes[0], axes[1], axes[2]


@lru_cache(maxsize=4096)
def steps_on_axis(axis: Axis, stationary: int, moving: int, over_keys: bool) -> int:
    """Pairs of tiles on one axis that a kernel works through, over all dilation groups.

    With `over_keys` tiles of `stationary` queries meet the `moving` keys of their windows, else tiles of keys the
    queries of their inverse windows. The pairs of a whole problem are the product over its axes.
    """
    interval = window if over_keys else inverse_window
    steps = 0
    for group in range(axis.dilation):
        members = group_members(axis, group)
        for begin in range(0, members, stationary):
            last = min(begin + stationary, members) - 1
            steps += ceil((interval(axis, last, members)[1] - interval(axis, begin, members)[0]) / moving)
    return steps


def extents(rows: int, axes: tuple[Axis, Axis, Axis]) -> Iterator[Extent]:
    """Tiles of `rows` tokens that do not reach beyond the map where they need not; what is too much goes along w."""
    limits = [1 << (group_members(axis, 0) - 1).bit_length() for axis in axes]
    for t in (1 << i for i in range(rows.bit_length())):
        for h in (1 << i for i in range((rows // t).bit_length())):
            w = rows // t // h
            if t <= limits[0] and h <= limits[1] and (w <= limits[2] or t * h == limits[0] * limits[1]):
                yield t, h, w


def half(extent: Extent) -> Extent:
    """Half of a tile, as the warpgroups of the kernels of `wide.py` divide it: along the first axis that it can."""
    axis = next(i for i, size in enumerate(extent) if size > 1)
    t, h, w = (size // 2 if i == axis else size for i, size in enumerate(extent))
    return t, h, w


def executed_scores(axes: tuple[Axis, Axis, Axis], stationary: Extent, moving: Extent, over_keys: bool) -> int:
    """Scores that a kernel computes for each head and batch, whether or not they lie in the neighborhood."""
    steps = prod(steps_on_axis(axis, s, m, over_keys) for axis, s, m in zip(axes, stationary, moving, strict=True))
    return steps * prod(stationary) * prod(moving)


def column_pairs(axes: tuple[Axis, Axis, Axis], own: int, over_keys: bool) -> Iterator[tuple[Extent, Extent]]:
    """Own columns of `own` tokens, fewer if they are the least there are, and the boxes of those they meet, which are
    copied at once."""
    most = own // (BLOCK * prod(PLACES[0]))
    blocks = blocks_of(axes[0], most, over_keys)
    if not blocks.is_small or blocks.own < most > FEWEST_BLOCKS:
        return
    wide = [(h, w) for h, w in PLACES if h == 1 or axes[1].length > 1]
    for (own_h, own_w), (h, w) in product(wide, wide):
        yield (blocks.own * BLOCK, own_h, own_w), (blocks.box, h, w)


def executed_in_columns(axes: tuple[Axis, Axis, Axis], own: Extent, moving: Extent, over_keys: bool) -> int:
    """As `executed_scores`, of the kernels of columns."""
    blocks = blocks_of(axes[0], own[0] // BLOCK, over_keys)
    columns = ceil(group_members(axes[0], 0) / own[0]) * axes[0].dilation
    steps = prod(steps_on_axis(axis, s, m, over_keys) for axis, s, m in zip(axes[1:], own[1:], moving[1:], strict=True))
    return columns * steps * blocks.met.bit_count() * prod((BLOCK, *own[1:])) * prod((BLOCK, *moving[1:]))


def can_lie_inside(axes: tuple[Axis, Axis, Axis], query: Extent, key: Extent) -> bool:
    """Whether a tile of keys can lie in all windows of a tile of queries."""
    return all(q + k - axis.stride <= axis.kernel_size for q, k, axis in zip(query, key, axes, strict=True))


def always_one_tile(axis: Axis, query: int, key: int) -> bool:
    """Whether the windows of a tile of queries lie in one tile of keys on every map that has such an axis."""
    return ceil((query - 1) / axis.stride) * axis.stride + axis.kernel_size <= key


def estimated_time(
    axes: tuple[Axis, Axis, Axis], stationary: Extent, moving: Extent, over_keys: bool, candidate: Candidate
) -> float:
    """How long a kernel takes, in no particular unit."""
    if candidate.is_columns:
        return executed_in_columns(axes, stationary, moving, over_keys) / candidate.rate
    time = executed_scores(axes, stationary, moving, over_keys) / candidate.rate
    # The wide kernels gain most from tiles without masks.
    return time if not candidate.is_wide or can_lie_inside(axes, stationary, moving) else 1.05 * time


def block_width(head_dim: int) -> int:
    """Columns that a kernel holds for a head."""
    return max(16, 1 << (head_dim - 1).bit_length())


def shared_bytes(kernel: str, candidate: Candidate, workload: Workload) -> int:
    """About as much shared memory as a program takes."""
    moving = block_width(workload.head_dim) + block_width(workload.head_dim_v)
    stationary = block_width(workload.head_dim) if kernel == "forward" else moving
    rows = candidate.moving * candidate.num_stages * moving + candidate.stationary * stationary
    bias = 4 * candidate.moving * candidate.stationary if workload.has_rpb else 0
    return workload.itemsize * rows + bias + 2048


def _pairs(candidate: Candidate, axes: tuple[Axis, Axis, Axis], over_keys: bool) -> Iterator[tuple[Extent, Extent]]:
    """Own tiles and those they meet, as a candidate may have them."""
    if candidate.is_columns:
        return column_pairs(axes, candidate.stationary, over_keys)
    return product(extents(candidate.stationary, axes), extents(candidate.moving, axes))


def ranked_tiles(kernel: str, workload: Workload) -> list[tuple[float, Tiles]]:
    """All choices for one kernel of a workload with their estimated times, best first: "forward", "query", "key_value",
    "bias" or, where columns fit, "query_bias".
    """
    three = as_three_axes(workload.axes)
    which = regime(workload)
    biased = CANDIDATES.get((kernel, f"{which} with bias")) if workload.has_rpb else None
    candidates = biased or CANDIDATES.get((kernel, which)) or CANDIDATES.get((kernel, "small"), [])
    if workload.has_columns:
        candidates = candidates + COLUMNS.get((kernel, len(workload.axes)), [])
    fitting = [
        c
        for c in candidates
        if shared_bytes(kernel, c, workload) <= workload.shared_memory and (workload.is_wide or not c.is_wide)
    ]
    over_keys = kernel != "key_value"
    # Of equals, more moving tokens along t: ptxas serialises the products of some kernels whose moving tile has one.
    ranked = sorted(
        (estimated_time(three, s, m, over_keys, candidate), -m[2], -s[2], s, -m[0], m, candidate)
        for candidate in fitting or candidates[-1:]
        for s, m in _pairs(candidate, three, over_keys)
    )
    width = max(workload.head_dim, workload.head_dim_v)
    choices = []
    for cost, _, _, stationary, _, moving, c in ranked:
        query, key = (stationary, moving) if over_keys else (moving, stationary)
        # Limits were measured at head_dim 32, and those of the wide kernels at their own; they would make others spill.
        registers = c.max_registers if c.is_wide or width <= 32 else None
        if c.is_columns and kernel == "key_value" and group_members(three[0], 0) <= stationary[0] == 8:
            registers = 168  # of so little it hardly spills, and half as many programs more run at once
        choices.append((cost, Tiles(query, key, c.num_warps, c.num_stages, c.bulk, registers, c.is_wide, c.is_columns)))
    return choices


@lru_cache(maxsize=1024)
def choose_tiles(kernel: str, workload: Workload) -> Tiles:
    """The first of `ranked_tiles`, with its arguments."""
    return ranked_tiles(kernel, workload)[0][1]
