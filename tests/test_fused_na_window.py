"""The window rule against its definition, taken literally on lists of coordinates."""

from itertools import product

import pytest
import torch

from fused_na import na1d, na2d, neighborhood_attention
from fused_na.reference import axis_tables
from fused_na.window import Axis, group_members, inverse_window, window


def legal_axes(length: int) -> list[Axis]:
    return [
        Axis(length, k, s, d, c)
        for k in range(1, length + 1)
        for s in range(1, k + 1)
        for d in range(1, length // k + 1)
        for c in (False, True)
    ]


def attended(axis: Axis, query: int) -> list[int]:
    """The coordinates that `query` attends to."""
    members = list(range(query % axis.dilation, axis.length, axis.dilation))
    blocks = [members[begin : begin + axis.stride] for begin in range(0, len(members), axis.stride)]
    block = next(block for block in blocks if query in block)
    if axis.is_causal:  # the window ends at the block's last member, and nobody sees what comes after himself
        last = members.index(block[-1])
        return [key for key in members[max(0, last - axis.kernel_size + 1) : last + 1] if key <= query]
    leader = block[min(axis.stride // 2, len(block) - 1)]
    windows = [members[begin : begin + axis.kernel_size] for begin in range(len(members) - axis.kernel_size + 1)]
    return min(windows, key=lambda keys: abs(keys[axis.kernel_size // 2] - leader))


@pytest.mark.parametrize("length", range(1, 25))
def test_window_and_inverse_window(length: int) -> None:
    for axis in legal_axes(length):
        neighbors = {query: attended(axis, query) for query in range(length)}
        for x in range(length):
            group, members = x % axis.dilation, group_members(axis, x % axis.dilation)
            assert members == len(range(group, length, axis.dilation))
            start, end = window(axis, x // axis.dilation, members)
            assert [i * axis.dilation + group for i in range(start, end)] == neighbors[x], (axis, x)
            first, end = inverse_window(axis, x // axis.dilation, members)
            queries = [i * axis.dilation + group for i in range(first, end)]
            assert queries == [query for query in range(length) if x in neighbors[query]], (axis, x)


@pytest.mark.parametrize("length", [1, 2, 7, 12])
def test_tables_of_the_reference(length: int) -> None:
    for axis in legal_axes(length):
        attends, offset = axis_tables(axis)
        for query in range(length):
            keys = attended(axis, query)
            assert attends[query].nonzero().flatten().tolist() == keys
            assert offset[query, keys].tolist() == [
                (key - query) // axis.dilation + axis.kernel_size - 1 for key in keys
            ]


def probabilities(spatial: tuple[int, ...], **options) -> torch.Tensor:
    """Attention probabilities `[tokens, tokens]` of random queries and keys, read off with one-hot values."""
    tokens = torch.Size(spatial).numel()
    query, key = torch.randn(2, 1, *spatial, 1, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    value = torch.eye(tokens, dtype=torch.float64).reshape(1, *spatial, 1, tokens)
    return neighborhood_attention(query, key, value, **options).reshape(tokens, tokens)


def test_corners_keep_all_their_keys() -> None:
    counts = (probabilities((9, 8), kernel_size=(5, 4)) > 0).sum(-1)
    assert counts.eq(5 * 4).all()
    corner = (probabilities((9, 8), kernel_size=(5, 4)) > 0)[0].reshape(9, 8)
    assert corner[:5, :4].all()


def test_window_of_the_whole_map_is_full_attention() -> None:
    query, key, value = torch.randn(3, 2, 5, 6, 3, 8, dtype=torch.float64).unbind()
    expected = torch.nn.functional.scaled_dot_product_attention(
        *(x.flatten(1, 2).transpose(1, 2) for x in (query, key, value))
    )
    output = na2d(query, key, value, kernel_size=(5, 6))
    torch.testing.assert_close(output.flatten(1, 2).transpose(1, 2), expected)


def test_window_of_one_returns_the_values() -> None:
    query, key, value = torch.randn(3, 2, 5, 3, 8, dtype=torch.float64).unbind()
    torch.testing.assert_close(na1d(query, key, value, kernel_size=1), value)


def test_stride_of_a_whole_window_is_blocked_attention() -> None:
    """Windows of 4 x 3 on an 8 x 9 map partition it, as in Swin."""
    query, key, value = torch.randn(3, 2, 8, 9, 2, 8, dtype=torch.float64).unbind()

    def blocks(x: torch.Tensor) -> torch.Tensor:
        return x.reshape(2, 2, 4, 3, 3, 2, 8).permute(0, 1, 3, 5, 2, 4, 6).flatten(4, 5)

    expected = torch.nn.functional.scaled_dot_product_attention(blocks(query), blocks(key), blocks(value))
    output = na2d(query, key, value, kernel_size=(4, 3), stride=(4, 3))
    torch.testing.assert_close(blocks(output), expected)


def test_even_windows_look_one_further_to_the_left() -> None:
    attends = probabilities((9,), kernel_size=4) > 0
    assert attends[4].nonzero().flatten().tolist() == [2, 3, 4, 5]


def test_causal_windows_shrink_at_the_start() -> None:
    attends = probabilities((7,), kernel_size=3, is_causal=True) > 0
    assert [row.nonzero().flatten().tolist() for row in attends[:4]] == [[0], [0, 1], [0, 1, 2], [1, 2, 3]]


def test_dilation_groups_do_not_mix() -> None:
    attends = probabilities((12,), kernel_size=3, dilation=3) > 0
    for query, key in product(range(12), repeat=2):
        assert not attends[query, key] or query % 3 == key % 3


def test_time_may_be_causal_and_space_not() -> None:
    attends = probabilities((4, 5, 5), kernel_size=(2, 3, 3), is_causal=(True, False, False)) > 0
    attends = attends.reshape(4, 5, 5, 4, 5, 5)
    assert attends[2, 2, 2].any((1, 2)).tolist() == [False, True, True, False]
    assert attends[2, 2, 2].any((0, 2)).tolist() == [False, True, True, True, False]
    assert attends[0, 0, 0].sum() == 1 * 3 * 3
