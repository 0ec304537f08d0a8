"""Captured attention: probabilities of chosen queries against the layer's own output, the mask and the reference."""

from itertools import product
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from fused_na.reference import axis_tables
from nat_models.attention import LayerAttention, capture_attention
from nat_models.clip_layers import ClipAttention
from nat_models.layers import NeighborhoodAttention1D, NeighborhoodAttention2D, NeighborhoodAttention3D
from nat_models.nat_isotropic import MapAttention

LAYERS = {
    "plain": (NeighborhoodAttention2D, dict(kernel_size=3), (5, 7)),
    "dilated": (NeighborhoodAttention2D, dict(kernel_size=(3, 2), dilation=(2, 3)), (7, 8)),
    "padded": (NeighborhoodAttention2D, dict(kernel_size=3, dilation=2), (4, 7)),
    "strided, causal, scaled": (
        NeighborhoodAttention2D,
        dict(kernel_size=4, stride=(2, 1), is_causal=(False, True), qk_scale=0.7, rel_pos_bias=False),
        (6, 5),
    ),
    "sequence": (NeighborhoodAttention1D, dict(kernel_size=5), (9,)),
    "volume": (NeighborhoodAttention3D, dict(kernel_size=(2, 3, 3), is_causal=(True, False, False)), (3, 4, 4)),
    "rotary volume": (ClipAttention, dict(kernel_size=(2, 3, 3), position="rope"), (3, 4, 4)),
    "short clip": (ClipAttention, dict(kernel_size=3, stride=(3, 2, 2), dilation=(2, 1, 1)), (3, 4, 4)),
    "whole map": (MapAttention, dict(kernel_size=(4, 6)), (4, 6)),
    "cropped map": (MapAttention, dict(kernel_size=(4, 6)), (3, 2)),
}


def captured(layer: nn.Module, spatial: tuple[int, ...]) -> tuple[LayerAttention, Tensor]:
    """What a layer attended with on a random map, and its output before the projection `[B, *spatial, dim]`."""
    outputs: list[Tensor] = []
    layer.proj.register_forward_pre_hook(lambda module, inputs: outputs.append(inputs[0]))
    with torch.no_grad(), capture_attention(nn.Sequential(layer)) as found:
        layer(torch.randn(2, *spatial, layer.proj.in_features))
    assert list(found) == ["0"]
    return found["0"], outputs[0]


@pytest.mark.parametrize("name", LAYERS)
def test_probabilities_are_the_layer_s(name: str) -> None:
    layer_class, arguments, spatial = LAYERS[name]
    torch.manual_seed(0)
    layer = layer_class(12, num_heads=2, **arguments)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.5)
    attention, output = captured(layer, spatial)
    assert attention.spatial == spatial
    masks = [axis_tables(axis)[0] for axis in attention.axes]
    for position in product(*map(range, spatial)):
        probabilities = attention.probabilities(position)
        assert probabilities.shape == (2, 2, *attention.key.shape[1:-2])
        torch.testing.assert_close(probabilities.flatten(2).sum(-1), torch.ones(2, 2))
        inside = torch.ones((), dtype=torch.bool)
        for mask, x in zip(masks, position, strict=True):
            inside = inside[..., None] & mask[x]
        assert torch.equal(attention.neighborhood(position), inside)
        assert not probabilities[:, :, ~inside].any()
        attended = torch.einsum("bhn,bnhd->bhd", probabilities.flatten(2), attention.value.flatten(1, -3))
        torch.testing.assert_close(attended.flatten(1), output[(slice(None), *position)])


def test_layers_are_captured_by_name_and_hooks_are_removed() -> None:
    config: dict[str, Any] = dict(embed_dim=8, depths=(2, 1), num_heads=(1, 2), num_classes=3)
    model = timm.create_model("dinat_mini", dilations=[[1, 2], 1], **config).eval()
    with torch.no_grad(), capture_attention(model) as found:
        model(torch.randn(1, 3, 64, 48))
    assert list(found) == ["levels.0.blocks.0.attn", "levels.0.blocks.1.attn", "levels.1.blocks.0.attn"]
    assert [layer.spatial for layer in found.values()] == [(16, 12), (16, 12), (8, 6)]
    assert [layer.axes[0].dilation for layer in found.values()] == [1, 2, 1]
    assert found["levels.1.blocks.0.attn"].key.shape == (1, 8, 7, 2, 8)  # padded to the window
    found.clear()
    model(torch.randn(1, 3, 32, 32))
    assert not found


def test_nothing_is_captured_without_neighborhood_attention() -> None:
    with capture_attention(nn.Linear(2, 2)) as found:
        pass
    assert not found


def test_positions_outside_the_map_are_named() -> None:
    attention, _ = captured(NeighborhoodAttention2D(8, 2, kernel_size=3), (5, 7))
    for position in ((5, 0), (0, -1)):
        with pytest.raises(ValueError, match=r"position must lie on the map of size \[5, 7\], got \["):
            attention.probabilities(position)
