"""Where queries attend: the probabilities that the attention layers of a model do not keep."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from fused_na.window import Axis, group_members, window
from nat_models.layers import NeighborhoodAttention


@dataclass
class LayerAttention:
    """What one layer attended with in a forward pass.

    Attributes:
        query, key, value: `[B, *padded, heads, head_dim]`, over the map as it was padded for attention.
        spatial: size of the map before padding.
        axes: the attention problem, axis by axis.
        scale: factor on the dot products.
        rpb: biases `[heads, 2 * kernel_size - 1, ...]`, or None.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    spatial: tuple[int, ...]
    axes: list[Axis]
    scale: float
    rpb: Tensor | None

    def probabilities(self, position: Sequence[int]) -> Tensor:
        """Attention `[B, heads, *padded]` of the query at `position` to every token, 0 outside its neighborhood.

        Raises:
            ValueError: `position` lies outside the map.
        """
        neighbors, places = self._neighbors(position)
        query: Any = tuple(position)
        keys = self.key[:, *neighbors]  # [B, neighbors, heads, head_dim]
        scores = torch.einsum("bhd,bnhd->bhn", self.query[:, *query], keys).float() * self.scale
        if self.rpb is not None:
            scores = scores + self.rpb[:, *places]
        probabilities = scores.new_zeros(*scores.shape[:2], *self.key.shape[1:-2])
        probabilities[:, :, *neighbors] = scores.softmax(-1)
        return probabilities

    def neighborhood(self, position: Sequence[int]) -> Tensor:
        """Which tokens the query at `position` attends to, bool `[*padded]`."""
        attends = torch.zeros(self.key.shape[1:-2], dtype=torch.bool, device=self.key.device)
        attends[self._neighbors(position)[0]] = True
        return attends

    def _neighbors(self, position: Sequence[int]) -> tuple[Any, Any]:
        """Coordinates of a query's keys, and their places in the bias: for each axis a list, as indices of tensors."""
        if not all(0 <= x < n for x, n in zip(position, self.spatial, strict=True)):
            raise ValueError(f"position must lie on the map of size {list(self.spatial)}, got {list(position)}")
        per_axis = zip(*map(_axis_neighbors, self.axes, position), strict=True)
        coordinates, places = (tuple(map(list, zip(*product(*x), strict=True))) for x in per_axis)
        return coordinates, places


def _axis_neighbors(axis: Axis, x: int) -> tuple[list[int], list[int]]:
    """`LayerAttention._neighbors` on one axis."""
    group, index = x % axis.dilation, x // axis.dilation
    members = range(*window(axis, index, group_members(axis, group)))
    return [j * axis.dilation + group for j in members], [j - index + axis.kernel_size - 1 for j in members]


@contextmanager
def capture_attention(model: nn.Module) -> Iterator[dict[str, LayerAttention]]:
    """Within the context, a forward pass of `model` fills the dict: its attention layers by name, in their order.

    Queries, keys and values stay in memory as long as the dict does; probabilities are computed when asked for.
    """
    captured: dict[str, LayerAttention] = {}
    projected: dict[nn.Module, Tensor] = {}

    def keep_projection(qkv: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        projected[qkv] = output.detach()

    def capture(name: str, layer: NeighborhoodAttention, inputs: tuple[Tensor]) -> None:
        spatial = tuple(inputs[0].shape[1:-1])
        qkv = layer.encode_positions(projected.pop(layer.qkv).unflatten(-1, (3, layer.num_heads, -1)))
        query, key, value = qkv.unbind(-3)
        kernel_size, rpb = layer.neighborhood(spatial)
        stride = map(min, layer.stride, kernel_size)  # as in the layer, where few frames make its neighborhood smaller
        axes = list(map(Axis, query.shape[1:-2], kernel_size, stride, layer.dilation, layer.is_causal))
        scale = query.shape[-1] ** -0.5 if layer.qk_scale is None else layer.qk_scale
        rpb = None if rpb is None else rpb.detach()
        captured[name] = LayerAttention(query, key, value, spatial, axes, scale, rpb)

    handles = []
    for name, module in model.named_modules():
        if isinstance(module, NeighborhoodAttention):
            handles.append(module.qkv.register_forward_hook(keep_projection))
            handles.append(module.register_forward_hook(lambda *args, name=name: capture(name, *args[:2])))
    try:
        yield captured
    finally:
        for handle in handles:
            handle.remove()
