"""The original models' weights and answers in `tests/golden`, and the zoo's published figures."""

import json
from functools import cache
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

import nat_models  # noqa: F401  registers the models

GOLDEN = Path(__file__).parent / "golden"
ZOO: list[dict[str, Any]] = json.loads((GOLDEN / "zoo.json").read_text())
MODELS = {
    "nat": "nat_mini",
    "nat_layerscale": "nat_mini",
    "dinat": "dinat_mini",
    "dinat_small_input": "dinat_mini",
    "dinat_s": "dinat_s_tiny",
    "nat_isotropic": "nat_isotropic_small",
    "dinat_isotropic": "dinat_isotropic_small",
    "vitrpb": "vitrpb_small",
}
"""A golden file's name -> the registered model that its constructor arguments turn into the golden one."""


@cache
def golden(name: str) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, Tensor]]:
    """`(constructor arguments, original state dict, other tensors)` of a golden file."""
    with safe_open(GOLDEN / f"{name}.safetensors", "pt") as file:
        config = json.loads(file.metadata()["config"])
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  not a dict
    config = {key: value for key, value in config.items() if key not in ("family", "layer")}
    state = {key.removeprefix("state."): value for key, value in tensors.items() if key.startswith("state.")}
    return config, state, {key: value for key, value in tensors.items() if not key.startswith("state.")}


def save(state: Any, path: Path) -> Path:
    """Writes what `path`'s suffix says: safetensors, or `torch.save`."""
    save_file(state, path) if path.suffix == ".safetensors" else torch.save(state, path)
    return path


def load(name: str, path: Path, **kwargs: Any) -> nn.Module:
    """The model of a golden file in eval mode, with weights from `path`, as a user loads them."""
    config = golden(name)[0] | kwargs
    overlay = dict(file=str(path), num_classes=golden(name)[0]["num_classes"])
    return timm.create_model(MODELS[name], pretrained=True, pretrained_cfg_overlay=overlay, **config).eval()


@torch.no_grad()
def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Largest absolute difference over the largest expected value."""
    return ((actual - expected).abs().max() / expected.abs().max()).item()
