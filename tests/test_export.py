"""Leaving Python: every family through `torch.export` and ONNX Runtime, with any batch size."""

from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import timm
import torch
from golden_models import relative_error
from torch import Tensor, nn

import nat_models  # noqa: F401  registers the models

TINY: dict[str, dict[str, Any]] = {
    "nat_small": dict(embed_dim=16, depths=(1,), num_heads=(1,)),  # with layer scale
    "dinat_mini": dict(embed_dim=16, depths=(1, 1), num_heads=(1, 2), dilations=[1, 3]),
    "dinat_s_tiny": dict(embed_dim=16, depths=(1, 1), num_heads=(1, 2), dilations=[2, 1]),
    "dinat_isotropic_small": dict(embed_dim=16, depth=2, num_heads=2),  # the first block is isotropic NAT's
    "vitrpb_small": dict(embed_dim=16, depth=1, num_heads=2, img_size=(64, 48)),
}
SIZE = (64, 48)  # maps of later stages, of dilated blocks and of isotropic models are padded


def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(name, num_classes=5, **TINY[name]).eval()


def images(batch: int) -> Tensor:
    return torch.randn(batch, 3, *SIZE, generator=torch.Generator().manual_seed(batch))


@pytest.mark.parametrize("name", TINY)
@torch.no_grad()
def test_any_batch_outside_python(name: str, tmp_path: Path) -> None:
    model = build(name)
    program = torch.export.export(model, (images(3),), dynamic_shapes=({0: torch.export.Dim("batch")},))
    operators = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert not any("fused_na" in operator for operator in operators)  # plain operators, for any runtime
    torch.onnx.export(program, f=tmp_path / "model.onnx", verbose=False)
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    (argument,) = session.get_inputs()
    assert argument.shape[1:] == [3, *SIZE] and not isinstance(argument.shape[0], int)
    for batch in (1, 2, 7):
        expected = model(images(batch))
        assert relative_error(program.module()(images(batch)), expected) < 1e-5
        (logits,) = session.run(None, {argument.name: images(batch).numpy()})
        assert relative_error(torch.from_numpy(logits), expected) < 1e-4


def test_the_size_of_the_images_is_fixed() -> None:
    """As docs/models.md says; tiles are found for one size of the map."""
    size = {axis: torch.export.Dim(name) for axis, name in ((2, "height"), (3, "width"))}
    with torch.no_grad(), pytest.raises(torch._dynamo.exc.UserError, match=r"Constraints violated \((height|width)"):
        torch.export.export(build("nat_small"), (images(1),), dynamic_shapes=(size,))
