"""Outputs, log-sum-exps and gradients of NATTEN (0.14.6 for `na*`, 0.21.7 for `gna*`), in float32."""

import json
from pathlib import Path

import pytest
import torch
from attention_problems import assert_close
from safetensors import safe_open

from fused_na import neighborhood_attention

GOLDEN = sorted((Path(__file__).parent / "golden").glob("*na[123]d*.safetensors"))
ARGUMENTS = {"q": "query", "k": "key", "v": "value"}  # the others are called as here


@pytest.mark.parametrize("backend", ["reference", "blocked"])
@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_golden_values(path: Path, backend: str) -> None:
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}
        metadata = file.metadata()
    options = {
        name: json.loads(metadata[name])
        for name in ("kernel_size", "stride", "dilation", "is_causal")
        if name in metadata
    }
    names = [name for name in tensors if f"d{name}" in tensors and name != "out"]
    inputs = {ARGUMENTS.get(name, name): tensors[name].requires_grad_() for name in names}
    output, lse = neighborhood_attention(**inputs, **options, return_lse=True, backend=backend)
    gradients = torch.autograd.grad(output, tuple(inputs.values()), tensors["dout"])

    actual = {"out": output, "lse": lse} | {f"d{name}": g for name, g in zip(names, gradients, strict=True)}
    expected = {name: x for name, x in tensors.items() if name not in names and name != "dout"}
    assert len(expected) >= 4
    assert_close({name: actual[name].detach() for name in expected}, expected, tolerance=1e-5)


def test_every_kind_of_golden_file_is_here() -> None:
    assert {path.stem[:4] for path in GOLDEN} >= {"na1d", "na2d", "gna1", "gna2", "gna3"}
