"""How the blocked backend cuts a map: tiles of queries, the keys each tile sees, and which tiles look alike.

All of it is lists of integers, for it is cached, and a trace in progress would leave its own tensors in the cache.
"""

from functools import lru_cache
from itertools import product
from math import ceil, prod
from typing import NamedTuple

from fused_na.window import Axis, group_members, window


class AxisTiles(NamedTuple):
    """The tiles of one axis: `T` tiles of `Q` queries that see `K` keys, with `P` different patterns of who sees whom.

    Positions of a pattern are counted within the dilation group, from the tile's first key.
    """

    query: list[list[int]]  # [T][Q] coordinates; a tile that is not full repeats its group's last one
    padding: list[list[int]]  # [T][Q] 1 where a query is such a repetition, else 0
    key: list[list[int]]  # [T][K] coordinates
    pattern: list[int]  # [T]
    position: list[list[int]]  # [P][Q] of each query
    start: list[list[int]]  # [P][Q] of its window
    end: list[list[int]]  # [P][Q]


class Tiles(NamedTuple):
    """`T` tiles of a whole map, with `P` different patterns."""

    tiles: list[tuple[int, ...]]  # [axes][T] the tile on each axis
    patterns: list[tuple[int, ...]]  # [axes][P] the pattern on each axis
    pattern: list[int]  # [T] the pattern of each tile


def tile_axis(axis: Axis, size: int) -> AxisTiles:
    """Cuts one axis, dilation group by dilation group, into tiles of `size` queries."""
    tiles = AxisTiles([], [], [], [], [], [], [])
    patterns: dict[tuple, int] = {}
    spans = []
    for group in range(axis.dilation):
        members = group_members(axis, group)
        for begin in range(0, group_members(axis, 0), size):
            query = [min(i, members - 1) for i in range(begin, begin + size)]
            windows = [window(axis, i, members) for i in query]
            first = windows[0][0]
            pattern = tuple((i - first, s - first, e - first) for i, (s, e) in zip(query, windows, strict=True))
            tiles.query.append([i * axis.dilation + group for i in query])
            tiles.padding.append([int(i >= members) for i in range(begin, begin + size)])
            tiles.pattern.append(patterns.setdefault(pattern, len(patterns)))
            spans.append((group, members, first, windows[-1][1]))
    keys = max(end - first for _, _, first, end in spans)
    for group, members, first, _ in spans:
        tiles.key.append([min(j, members - 1) * axis.dilation + group for j in range(first, first + keys)])
    for pattern in patterns:
        position, start, end = zip(*pattern, strict=True)
        tiles.position.append(list(position))
        tiles.start.append(list(start))
        tiles.end.append(list(end))
    return tiles


def _even_splits(axis: Axis) -> list[tuple[int, int, int]]:
    """(queries a tile, tiles, keys a tile) for every even split of the axis into tiles of at most 64 queries."""
    members = group_members(axis, 0)
    splits = []
    for size in sorted({ceil(members / parts) for parts in range(1, members + 1)}):
        if size <= 64:
            edges = [(begin, min(begin + size, members) - 1) for begin in range(0, members, size)]
            keys = max(window(axis, last, members)[1] - window(axis, first, members)[0] for first, last in edges)
            splits.append((size, len(edges) * axis.dilation, keys))
    return splits


def choose_tile(axes: tuple[Axis, ...]) -> tuple[int, ...]:
    """Queries per tile and axis that minimise an estimate of the time (weights measured on a CPU with AVX-512)."""

    def cost(choice: tuple[tuple[int, int, int], ...]) -> float:
        queries, tiles, keys = (prod(column) for column in zip(*choice, strict=True))
        # Gathering a key and its value costs about as much as 8 scores, and products of few rows run slowly.
        return tiles * keys * (queries + 8) * (1 + 4 / queries)

    best = min(product(*map(_even_splits, axes)), key=cost)
    return tuple(queries for queries, _, _ in best)


@lru_cache(maxsize=256)
def tile_axes(axes: tuple[Axis, ...]) -> tuple[AxisTiles, ...]:
    """The tiles of every axis."""
    return tuple(tile_axis(axis, size) for axis, size in zip(axes, choose_tile(axes), strict=True))


@lru_cache(maxsize=256)
def tile_map(axes: tuple[Axis, ...], size: int) -> list[Tiles]:
    """All tiles of a map, `size` of them at a time."""
    per_axis = tile_axes(axes)
    all_tiles = list(product(*(range(len(a.query)) for a in per_axis)))
    parts = []
    for begin in range(0, len(all_tiles), size):
        tiles = all_tiles[begin : begin + size]
        patterns: dict[tuple, int] = {}
        pattern = [
            patterns.setdefault(tuple(a.pattern[i] for a, i in zip(per_axis, tile, strict=True)), len(patterns))
            for tile in tiles
        ]
        parts.append(Tiles(list(zip(*tiles, strict=True)), list(zip(*patterns, strict=True)), pattern))
    return parts
