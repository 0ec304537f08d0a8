"""The dense oracle: neighborhood attention as masked full attention in plain PyTorch, slow on purpose.

Time and memory grow with the square of the number of tokens. The other backends are tested against this one.
"""

from collections.abc import Callable
from math import prod

import torch
from torch import Tensor

from fused_na.precision import compute_dtype
from fused_na.window import Axis, group_members, window


def axis_tables(axis: Axis) -> tuple[Tensor, Tensor]:
    """Whether each query attends to each key, bool, and their offset into the bias, int64; both `[length, length]`.

    The offset is clamped into the bias where they do not attend.
    """
    windows = [window(axis, x // axis.dilation, group_members(axis, x % axis.dilation)) for x in range(axis.length)]
    start, end = torch.tensor(windows).T[:, :, None]
    coordinate = torch.arange(axis.length)
    group, member = coordinate % axis.dilation, coordinate // axis.dilation
    attends = (member >= start) & (member < end) & (group == group[:, None])
    offset = member - member[:, None] + axis.kernel_size - 1
    return attends, offset.clamp(0, 2 * axis.kernel_size - 2)


def _outer(per_axis: list[Tensor], combine: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Combines one `[length, length]` table per axis into one `[tokens, tokens]` table."""
    combined = per_axis[0]
    for table in per_axis[1:]:
        rows, columns = combined.shape
        size = table.shape[0]
        combined = combine(combined[:, None, :, None], table[None, :, None, :]).reshape(rows * size, columns * size)
    return combined


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    axes: tuple[Axis, ...],
    scale: float,
    rpb: Tensor | None,
    additional_keys: Tensor | None,
    additional_values: Tensor | None,
    return_lse: bool,
) -> tuple[Tensor, Tensor | None]:
    """Neighborhood attention over already checked arguments; see `fused_na.neighborhood_attention` for their meaning.

    Computes in float64 for float64 inputs and in float32 for everything else.

    Returns:
        output `[B, *spatial, heads, head_dim_v]` in the query's dtype; with `return_lse` the log-sum-exp
        `[B, *spatial, heads]` in the computing dtype, else None.
    """
    dtype = compute_dtype(query.dtype)
    repeats = query.shape[-2] // key.shape[-2]

    def heads_first(x: Tensor, repeats: int = 1) -> Tensor:
        return x.flatten(1, -3).transpose(1, 2).to(dtype).repeat_interleave(repeats, dim=1)

    attends, offsets = zip(*map(axis_tables, axes), strict=True)
    scores = heads_first(query) @ heads_first(key, repeats).mT * scale
    if rpb is not None:
        sizes = [2 * axis.kernel_size - 1 for axis in axes]
        strided = [offset * prod(sizes[i + 1 :]) for i, offset in enumerate(offsets)]
        index = _outer(strided, torch.add).to(rpb.device)
        scores = scores + rpb.to(dtype).flatten(1)[:, index]
    mask = _outer(list(attends), torch.logical_and).to(query.device)
    scores = scores.masked_fill(~mask, float("-inf"))
    values = heads_first(value, repeats)
    if additional_keys is not None and additional_values is not None:
        additional_scores = heads_first(query) @ heads_first(additional_keys, repeats).mT * scale
        scores = torch.cat([scores, additional_scores], dim=-1)
        values = torch.cat([values, heads_first(additional_values, repeats)], dim=-2)
    lse = scores.logsumexp(-1).transpose(1, 2).reshape(query.shape[:-1]) if return_lse else None
    output = scores.softmax(-1) @ values
    output = output.transpose(1, 2).reshape(*query.shape[:-1], value.shape[-1])
    return output.to(query.dtype), lse
