"""Weights in every form a user may bring, and a clear error for the ones that do not fit."""

import io
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from golden_models import MODELS, golden, load, relative_error, save
from safetensors.torch import load_file
from timm.models import save_for_hf
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from nat_models.checkpoints import adapt_state_dict, read_file, rename, resize_rpb

HUGGING_FACE = {"nat": "nat", "nat_layerscale": "nat", "dinat": "dinat"}
"""Golden file -> prefix that Hugging Face gives the model's parameters."""


def logits_error(name: str, model: nn.Module) -> float:
    with torch.no_grad():
        return relative_error(model(golden(name)[2]["input"]), golden(name)[2]["logits"])


def wrong(name: str, path: Path, message: str, **kwargs: Any) -> None:
    """Loading fails with an error that names the file."""
    with pytest.raises(ValueError, match=message) as error:
        load(name, path, **kwargs)
    assert str(path) in str(error.value)


def hugging_face(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Original names -> Hugging Face's, in the other direction from the project's own table."""
    renamed: dict[str, Tensor] = {}
    for key, value in state.items():
        parts = key.split(".")
        if parts[0] == "patch_embed":
            inner = "patch_embeddings.projection" if parts[1] == "proj" else "norm"
            renamed[".".join([prefix, "embeddings", inner, *parts[2:]])] = value
        elif parts[0] == "norm":
            renamed[f"{prefix}.layernorm.{parts[1]}"] = value
        elif parts[0] == "head":
            renamed[f"classifier.{parts[1]}"] = value
        elif parts[2] == "downsample":
            renamed[f"{prefix}.encoder.{key}"] = value
        else:
            layer = f"{prefix}.encoder.levels.{parts[1]}.layers.{parts[3]}"
            rest = ".".join(parts[4:])
            if rest.startswith("attn.qkv."):
                for name, part in zip(("query", "key", "value"), value.chunk(3), strict=True):
                    renamed[f"{layer}.attention.self.{name}.{parts[-1]}"] = part.clone()
            elif rest == "gamma1":
                gammas = torch.stack([value, state[key.replace("gamma1", "gamma2")]])
                renamed[f"{layer}.layer_scale_parameters"] = gammas
            elif rest != "gamma2":
                names = {
                    "norm1": "layernorm_before",
                    "norm2": "layernorm_after",
                    "attn.rpb": "attention.self.rpb",
                    "attn.proj": "attention.output.dense",
                    "mlp.fc1": "intermediate.dense",
                    "mlp.fc2": "output.dense",
                }
                original = next(name for name in names if rest.startswith(name))
                renamed[f"{layer}.{names[original]}{rest.removeprefix(original)}"] = value
    return renamed


@pytest.mark.parametrize("suffix", [".bin", ".safetensors"])
@pytest.mark.parametrize("name", HUGGING_FACE)
def test_hugging_face_names(name: str, suffix: str, tmp_path: Path) -> None:
    state = hugging_face(golden(name)[1], HUGGING_FACE[name])
    assert any(key.endswith("attention.self.key.bias") for key in state)
    assert logits_error(name, load(name, save(state, tmp_path / f"model{suffix}"))) < 1e-4


def test_renaming_leaves_no_shared_memory() -> None:
    """safetensors refuses to write tensors that share memory."""
    renamed = rename(hugging_face(golden("nat_layerscale")[1], "nat"))
    assert len({value.untyped_storage().data_ptr() for value in renamed.values()}) == len(renamed)


@pytest.mark.parametrize("wrapper", ["model", "state_dict", "state_dict_ema"])
def test_wrapped_state_dicts(wrapper: str, tmp_path: Path) -> None:
    path = save({wrapper: golden("nat")[1], "epoch": 3, "metric": 0.5}, tmp_path / "checkpoint.pth")
    assert logits_error("nat", load("nat", path)) < 1e-4


def test_averaged_weights_come_first(tmp_path: Path) -> None:
    state = golden("nat")[1]
    other = {key: torch.zeros_like(value) for key, value in state.items()}
    path = save({"state_dict": other, "state_dict_ema": state}, tmp_path / "checkpoint.pth")
    assert logits_error("nat", load("nat", path)) < 1e-4


@pytest.mark.parametrize("prefix", ["model.", "model._orig_mod.", "_orig_mod.model.", "module.", "_orig_mod."])
def test_prefixes_of_wrapping_modules(prefix: str, tmp_path: Path) -> None:
    state = {f"{prefix}{key}": value for key, value in golden("nat")[1].items()}
    path = save({"state_dict": state, "hyper_parameters": {"model_name": "nat_mini"}}, tmp_path / "last.ckpt")
    assert logits_error("nat", load("nat", path)) < 1e-4


def test_names_that_come_twice_are_an_error(tmp_path: Path) -> None:
    state = golden("nat")[1]
    path = save(state | {"model.head.bias": state["head.bias"]}, tmp_path / "weights.pth")
    wrong("nat", path, "holds more than one head.bias: with and without the prefix of model.head.bias")


def test_the_average_of_torch(tmp_path: Path) -> None:
    config, state, _ = golden("nat")
    average = AveragedModel(timm.create_model("nat_mini", **config))
    average.module.load_state_dict(state)
    model = load("nat", save(average.state_dict(), tmp_path / "average.PTH"))
    assert logits_error("nat", model) < 1e-4 and model.load_report.ignored == ["n_averaged"]


def test_state_dict_in_memory() -> None:
    config, state, _ = golden("nat")
    overlay = dict(state_dict={"model": state})
    model = timm.create_model("nat_mini", pretrained=True, pretrained_cfg_overlay=overlay, **config).eval()
    assert logits_error("nat", model) < 1e-4
    overlay["state_dict"] = {"model": golden("dinat_s")[1]}
    with pytest.raises(ValueError, match="the weights of the given state dict do not fit this NAT"):
        timm.create_model("nat_mini", pretrained=True, pretrained_cfg_overlay=overlay, **config)


# --- adaptation ------------------------------------------------------------------------------------------------------


def body(model: nn.Module) -> dict[str, Tensor]:
    return {key: value for key, value in model.state_dict().items() if not key.startswith("head.")}


def assert_same_body(model: nn.Module, state: dict[str, Tensor]) -> None:
    for key, value in body(model).items():
        torch.testing.assert_close(value, state[key], msg=key)


@pytest.mark.parametrize("num_classes", [5, 0])
def test_another_class_count_gets_a_new_head_only(num_classes: int, tmp_path: Path) -> None:
    state = golden("nat")[1]
    model = load("nat", save(state, tmp_path / "weights.pth"), num_classes=num_classes)
    assert_same_body(model, state)
    assert model.num_classes == num_classes
    assert num_classes == 0 or model.head.weight.shape == (5, 128)
    report, head = model.load_report, ["head.weight", "head.bias"]
    assert (report.ignored, report.reinitialised) == ((head, []) if num_classes == 0 else ([], head))


def test_head_is_kept_where_the_file_has_as_many_classes(tmp_path: Path) -> None:
    """Even if the registered cfg says 1000, and without saying so in the overlay."""
    path = save(golden("nat")[1], tmp_path / "weights.pth")
    overlay = dict(file=str(path))
    model = timm.create_model("nat_mini", pretrained=True, pretrained_cfg_overlay=overlay, **golden("nat")[0])
    assert logits_error("nat", model.eval()) < 1e-4
    assert model.pretrained_cfg["num_classes"] == 10


def test_weights_without_head(tmp_path: Path) -> None:
    state = {key: value for key, value in golden("nat")[1].items() if not key.startswith("head.")}
    path = save(state, tmp_path / "backbone.safetensors")
    wrong("nat", path, r"missing keys: head\.weight, head\.bias")
    assert_same_body(load("nat", path, num_classes=7), state)
    overlay = dict(file=str(path), num_classes=0)
    model = timm.create_model("nat_mini", pretrained=True, pretrained_cfg_overlay=overlay, **golden("nat")[0])
    assert_same_body(model, state)


@pytest.mark.parametrize("in_chans", [1, 2, 4])
def test_other_input_channels(in_chans: int, tmp_path: Path) -> None:
    state = golden("nat")[1]
    model = load("nat", save(state, tmp_path / "weights.pth"), in_chans=in_chans)
    weight = model.patch_embed.proj[0].weight
    assert weight.shape[1] == in_chans
    if in_chans == 1:
        torch.testing.assert_close(weight, state["patch_embed.proj.0.weight"].sum(1, keepdim=True))
    assert {key for key, value in model.state_dict().items() if not torch.equal(value, state[key])} == {
        "patch_embed.proj.0.weight"
    }


def test_from_one_input_channel_to_three(tmp_path: Path) -> None:
    state = golden("nat")[1] | {"patch_embed.proj.0.weight": golden("nat")[1]["patch_embed.proj.0.weight"][:, :1]}
    path = save({key: value.contiguous() for key, value in state.items()}, tmp_path / "grey.pth")
    grey, colour = load("nat", path, in_chans=1), load("nat", path)
    x = torch.randn(1, 1, 64, 64)
    torch.testing.assert_close(colour(x.expand(-1, 3, -1, -1)), grey(x), rtol=1e-4, atol=1e-5)


def cubic_interpolation(table: np.ndarray, size: int) -> np.ndarray:
    """One axis resampled by Keys' cubic convolution (a = -0.75), pixel centres aligned, borders repeated."""

    def kernel(x: float) -> float:
        x, a = abs(x), -0.75
        if x <= 1:
            return (a + 2) * x**3 - (a + 3) * x**2 + 1
        return a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a if x < 2 else 0.0

    rows = []
    for i in range(size):
        centre = (i + 0.5) * len(table) / size - 0.5
        taps = range(int(np.floor(centre)) - 1, int(np.floor(centre)) + 3)
        rows.append(sum(kernel(centre - t) * table[min(max(t, 0), len(table) - 1)] for t in taps))
    return np.stack(rows)


def test_biases_resize_bicubically(tmp_path: Path) -> None:
    rpb = torch.randn(3, 13, 13)
    resized = resize_rpb(rpb, (21, 17))
    expected = np.stack([cubic_interpolation(cubic_interpolation(head, 21).T, 17).T for head in rpb.double().numpy()])
    torch.testing.assert_close(resized, torch.from_numpy(expected).float(), rtol=1e-4, atol=1e-5)
    state = golden("dinat")[1]
    model = load("dinat", save(state, tmp_path / "weights.pth"), kernel_size=11)
    for key, value in model.state_dict().items():
        expected_value = resize_rpb(state[key], (21, 21)) if key.endswith("rpb") else state[key]
        torch.testing.assert_close(value, expected_value)


def test_full_attention_of_another_image_size(tmp_path: Path) -> None:
    state = golden("vitrpb")[1]
    model = load("vitrpb", save(state, tmp_path / "weights.pth"), img_size=(96, 160))
    for key, value in model.state_dict().items():
        torch.testing.assert_close(value, resize_rpb(state[key], (11, 19)) if key.endswith("rpb") else state[key])
    assert len(model.load_report.ignored) == 3  # the original's relative_position_index


def test_report() -> None:
    config, state, _ = golden("nat")
    model = timm.create_model("nat_mini", **(config | dict(kernel_size=5, num_classes=3, in_chans=1)))
    weights, report = adapt_state_dict(state | {"levels.0.blocks.0.attn.relative_position_index": torch.ones(1)}, model)
    assert report.reinitialised == ["head.weight", "head.bias"]
    assert report.ignored == ["levels.0.blocks.0.attn.relative_position_index"]
    biases = [key for key in state if key.endswith("rpb")]
    assert sorted(report.resized) == sorted([*biases, "patch_embed.proj.0.weight"])
    assert len(report.matched) + len(report.resized) + 2 == len(state)
    assert weights.keys() == state.keys()


def test_features_only(tmp_path: Path) -> None:
    state = golden("nat")[1]
    model = load("nat", save(state, tmp_path / "weights.pth"), features_only=True)
    loaded = {key.replace("levels_", "levels."): value for key, value in model.state_dict().items()}
    assert loaded.keys() == {key for key in state if key.startswith(("patch_embed", "levels"))}
    for key, value in loaded.items():
        torch.testing.assert_close(value, state[key])


def test_save_for_hf_and_back(tmp_path: Path) -> None:
    config, state, expected = golden("dinat")
    model = load("dinat", save(state, tmp_path / "weights.pth"))
    folder = tmp_path / "exported"
    save_for_hf(model, folder, model_args=config)
    again = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    with torch.no_grad():
        torch.testing.assert_close(again(expected["input"]), model(expected["input"]))


def test_model_hub(tmp_path: Path) -> None:
    """`hf-hub:` on what a download leaves in the hub's cache, without a network."""
    config, state, expected = golden("dinat")
    revision = tmp_path / "models--someone--dinat" / "snapshots" / "0123"
    save_for_hf(load("dinat", save(state, tmp_path / "weights.pth")), revision, model_args=config)
    (revision.parents[1] / "refs").mkdir()
    (revision.parents[1] / "refs" / "main").write_text("0123")
    save({"input": expected["input"]}, tmp_path / "input.safetensors")
    code = (
        "import nat_models, timm, torch; from safetensors.torch import load_file, save_file\n"
        "model = timm.create_model('hf-hub:someone/dinat', pretrained=True).eval()\n"
        "save_file({'logits': model(load_file('input.safetensors')['input']).detach()}, 'logits.safetensors')"
    )
    hub = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(tmp_path)}
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=hub, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert relative_error(load_file(tmp_path / "logits.safetensors")["logits"], expected["logits"]) < 1e-4


def test_checkpoint_path(tmp_path: Path) -> None:
    config, state, _ = golden("nat")
    path = save(state, tmp_path / "weights.safetensors")
    model = timm.create_model("nat_mini", checkpoint_path=str(path), **config).eval()
    assert logits_error("nat", model) < 1e-4


# --- errors ----------------------------------------------------------------------------------------------------------


def test_missing_and_unexpected_keys_are_named(tmp_path: Path) -> None:
    state = dict(golden("nat")[1])
    state["levels.0.blocks.0.attn.bias"] = state.pop("levels.0.blocks.0.attn.rpb")
    path = save(state, tmp_path / "weights.pth")
    message = (
        r"do not fit this NAT; missing keys: levels\.0\.blocks\.0\.attn\.rpb; "
        r"unexpected keys: levels\.0\.blocks\.0\.attn\.bias"
    )
    wrong("nat", path, message)
    wrong("nat", path, message, num_classes=3)  # timm alone would accept anything with another head
    wrong("nat", path, message, features_only=True)


def test_weights_of_another_width_are_named(tmp_path: Path) -> None:
    path = save(golden("nat")[1], tmp_path / "weights.pth")
    wrong("nat", path, r"keys of another shape: .*proj\.0\.bias \(\[8\], not \[16\]\).* and \d+ more", embed_dim=32)


def test_weights_of_another_depth_are_named(tmp_path: Path) -> None:
    path = save(golden("nat")[1], tmp_path / "weights.pth")
    wrong("nat", path, r"unexpected keys: levels\.0\.blocks\.1", depths=(1, 1, 2, 1))
    wrong("nat", path, r"missing keys: levels\.1\.blocks\.1", depths=(2, 2, 2, 1))


def test_weights_without_layer_scale_are_an_error(tmp_path: Path) -> None:
    path = save(golden("nat_layerscale")[1], tmp_path / "weights.pth")
    wrong("nat", path, r"unexpected keys: .*gamma1", kernel_size=5)


def test_incomplete_hugging_face_weights_are_an_error(tmp_path: Path) -> None:
    state = hugging_face(golden("nat")[1], "nat")
    del state["nat.encoder.levels.0.layers.0.attention.self.key.weight"]
    wrong("nat", save(state, tmp_path / "model.safetensors"), r"missing keys: levels\.0\.blocks\.0\.attn\.qkv\.weight")


def test_foreign_weights_are_an_error(tmp_path: Path) -> None:
    state = timm.create_model("resnet18", num_classes=10).state_dict()
    path = save(dict(state), tmp_path / "resnet18.safetensors")
    wrong("nat", path, r"missing keys: .*; unexpected keys: .*bn1\..* and \d+ more")


class Malicious:
    def __reduce__(self) -> Any:
        return Path.touch, (Path(type(self).target),)  # type: ignore[attr-defined]


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize(
    "content", [b"", b"not a checkpoint", pickle.dumps({"a": 1}, protocol=2), b"PK\x03\x04 broken archive"]
)
def test_unreadable_file(content: bytes, suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"weights{suffix}"
    path.write_bytes(content)
    wrong("nat", path, "weights")


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_truncated_file(suffix: str, tmp_path: Path) -> None:
    path = save(golden("nat")[1], tmp_path / f"weights{suffix}")
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    wrong("nat", path, "cannot load weights from")


def test_truncated_file_of_the_older_format(tmp_path: Path) -> None:
    """Where it ends decides which exception PyTorch's reader raises."""
    buffer = io.BytesIO()
    torch.save(golden("nat")[1], buffer, _use_new_zipfile_serialization=False)
    content, path = buffer.getvalue(), tmp_path / "weights.pth"
    for size in (*range(0, 3000, 200), len(content) // 2, len(content) - 1):
        path.write_bytes(content[:size])
        wrong("nat", path, "cannot load weights from")
        with pytest.raises(ValueError, match=f"cannot load weights from {path}"):
            read_file(path)


@pytest.mark.parametrize("content", [[torch.ones(1)], {"epoch": 3}, torch.ones(1), {"model": {"a": 1}}])
def test_file_without_a_state_dict(content: Any, tmp_path: Path) -> None:
    wrong("nat", save(content, tmp_path / "weights.pth"), "cannot load weights from|holds no state dict")


def test_what_a_file_holds_instead_is_named(tmp_path: Path) -> None:
    path = save({"ema": golden("nat")[1], "epoch": 3}, tmp_path / "weights.pth")
    wrong("nat", path, "holds no state dict, itself or as state_dict_ema or .* or model, but ema, epoch")


def test_nothing_in_a_file_is_executed(tmp_path: Path) -> None:
    Malicious.target = tmp_path / "executed"  # type: ignore[attr-defined]
    path = tmp_path / "weights.pth"
    torch.save({"model": golden("nat")[1], "extra": Malicious()}, path)
    wrong("nat", path, "cannot load weights from")
    assert not (tmp_path / "executed").exists()
    torch.load(path, weights_only=False)
    assert (tmp_path / "executed").exists()


@pytest.mark.parametrize("name", ["none.pth", "folder"])
def test_missing_file(name: str, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(FileNotFoundError, match=re.escape(f"there is no file '{tmp_path / name}'")):
        load("nat", tmp_path / name)


@pytest.mark.parametrize("name", MODELS)
def test_loaded_names_are_complete(name: str, tmp_path: Path) -> None:
    """The golden weights name every parameter of the model: none is left at its random value."""
    state = golden(name)[1]
    model = load(name, save(state, tmp_path / "weights.pth"))
    for key, parameter in model.named_parameters():
        assert torch.equal(parameter, state[key]), key
