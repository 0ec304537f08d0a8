"""`python -m nat_models.convert`."""

import json
import re
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from golden_models import MODELS, golden, relative_error, save
from safetensors.torch import load_file

from nat_models.convert import convert, main


def model_kwargs(name: str, **changed: Any) -> list[str]:
    values = golden(name)[0] | changed
    return [f"{key}={value}".replace(" ", "") for key, value in values.items() if value is not None]


@pytest.mark.parametrize("name", ["nat_layerscale", "dinat", "dinat_s", "vitrpb"])
def test_original_weights_to_a_folder(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = save(golden(name)[1], tmp_path / "weights.pth")
    main([str(source), str(tmp_path / "out"), "--model", MODELS[name], "--model-kwargs", *model_kwargs(name)])
    model = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    with torch.no_grad():
        assert relative_error(model(golden(name)[2]["input"]), golden(name)[2]["logits"]) < 1e-4
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architecture"] == MODELS[name] and config["num_classes"] == 10
    assert config["pretrained_cfg"]["crop_pct"] == 0.875
    header, *lines = capsys.readouterr().out.splitlines()
    report = {line.split()[0]: int(line.split()[1]) for line in lines}
    ignored = len(golden(name)[1]) - len(model.state_dict())
    assert header == f"{source} -> {tmp_path / 'out'}: {MODELS[name]}"
    assert report == {
        "matched": len(model.state_dict()),
        "resized": 0,
        "inflated": 0,
        "reinitialised": 0,
        "ignored": ignored,
    }


def test_one_file_with_adaptations_as_a_command(tmp_path: Path) -> None:
    source = save(golden("nat")[1], tmp_path / "weights.safetensors")
    target = tmp_path / "new" / "model.safetensors"
    changed = model_kwargs("nat", kernel_size=9, num_classes=3, in_chans=1)
    command = [sys.executable, "-m", "nat_models.convert", source, target, "--model", "nat_mini"]
    result = subprocess.run([*command, "--model-kwargs", *changed], capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    lines = {line.split()[0]: line.split(maxsplit=2)[1:] for line in result.stdout.splitlines()[1:]}
    assert int(lines["resized"][0]) == 7 and "levels.0.blocks.0.attn.rpb" in lines["resized"][1]
    assert lines["reinitialised"] == ["2", "head.weight, head.bias"]
    weights = load_file(target)
    assert weights["levels.0.blocks.0.attn.rpb"].shape == (1, 17, 17)
    assert weights["head.weight"].shape == (3, 128)
    assert json.loads(target.with_suffix(".json").read_text())["num_classes"] == 3
    assert {path.name for path in target.parent.iterdir()} == {"model.safetensors", "model.json"}


def test_the_name_of_a_published_file_tells_the_model(tmp_path: Path) -> None:
    state = timm.create_model("dinat_mini", num_classes=7).state_dict()
    model = convert(save(dict(state), tmp_path / "dinat_mini_in1k_224.pth"), tmp_path / "out")
    assert model.pretrained_cfg["architecture"] == "dinat_mini" and model.num_classes == 7


def test_the_weights_tell_the_model_where_one_fits(tmp_path: Path) -> None:
    state = timm.create_model("dinat_s_tiny").state_dict()
    model = convert(save({"model": dict(state)}, tmp_path / "weights.pth"), tmp_path / "out")
    assert model.pretrained_cfg["architecture"] == "dinat_s_tiny"


def test_checkpoint_of_the_original_training_code(tmp_path: Path) -> None:
    """As timm's `CheckpointSaver` writes it, which the original code trains with."""
    content = {
        "epoch": 3,
        "arch": "nat_mini",
        "state_dict": golden("nat")[1],
        "args": Namespace(model="nat_mini", lr=0.1),
    }
    source = save(content, tmp_path / "model_best.pth.tar")
    model = convert(source, tmp_path / "out", "nat_mini", **golden("nat")[0]).eval()
    with torch.no_grad():
        assert relative_error(model(golden("nat")[2]["input"]), golden("nat")[2]["logits"]) < 1e-4


def test_models_that_the_weights_cannot_tell_apart(tmp_path: Path) -> None:
    source = save(dict(timm.create_model("nat_mini").state_dict()), tmp_path / "weights.pth")
    with pytest.raises(ValueError, match=f"{str(source)!r} fits nat_mini and dinat_mini: name the model"):
        convert(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_checkpoint_of_a_training_run(tmp_path: Path) -> None:
    lightning = pytest.importorskip("lightning")
    from nat_models.engine.classification import ClassificationModule

    config, state, expected = golden("dinat")
    arguments = {key: value for key, value in config.items() if key != "num_classes" and value is not None}
    names = [f"digit {i}" for i in range(10)]
    module = ClassificationModule("dinat_mini", num_classes=10, class_names=names, model_kwargs=arguments)
    module.model.load_state_dict(state)
    trainer = lightning.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    module.trainer = trainer
    trainer.strategy.connect(module)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    model = convert(tmp_path / "last.ckpt", tmp_path / "out").eval()
    with torch.no_grad():
        assert relative_error(model(expected["input"]), expected["logits"]) < 1e-4
    assert json.loads((tmp_path / "out" / "config.json").read_text())["label_names"] == names


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "nat_mii"], "there is no model 'nat_mii'; perhaps nat_mini"),
        (["--model", "resnet18"], "there is no model 'resnet18'; perhaps "),
        (["--model", "nat_mini.bogus"], "model='nat_mini.bogus': Invalid pretrained tag"),
        (["--model", "nat_mini"], r"do not fit this NAT; missing keys: .*levels.0.blocks.2.norm1.weight"),
        (["--model", "nat_mini", "--model-kwargs", "width=3"], "unexpected keyword argument 'width'"),
        (["--model-kwargs", "features_only=True"], "must be arguments of the model itself, got features_only=True"),
        ([], "fits no registered model as it is: name the model"),
    ],
)
def test_what_a_user_can_correct_is_one_line(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = save(golden("nat")[1], tmp_path / "weights.pth")
    with pytest.raises(SystemExit, match="2"):
        main([str(source), str(tmp_path / "out"), *arguments])
    out, err = capsys.readouterr()
    assert not out and re.match(f"error: .*{message}.*\n$", err)
    assert [path.name for path in tmp_path.iterdir()] == ["weights.pth"]


@pytest.mark.parametrize("target", ["out.pth", "weights.pth/out", "weights.pth/new/out.safetensors"])
def test_outputs_that_cannot_be_written(target: str, tmp_path: Path) -> None:
    source = save(golden("nat")[1], tmp_path / "weights.pth")
    with pytest.raises(ValueError, match="the output .*(ending in .safetensors, got|is below a file)"):
        convert(source, tmp_path / target, "nat_mini")


def test_missing_input_and_existing_output(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="none.pth"):
        convert(tmp_path / "none.pth", tmp_path / "out")
    source = save(golden("nat")[1], tmp_path / "weights.pth")
    (tmp_path / "out").mkdir()
    with pytest.raises(ValueError, match="out' exists already"):
        convert(source, tmp_path / "out")
    (tmp_path / "model.json").touch()
    with pytest.raises(ValueError, match="model.json' exists already"):
        convert(source, tmp_path / "model.safetensors")
    (tmp_path / "damaged.pth").write_bytes(b"damaged")
    with pytest.raises(ValueError, match="cannot load weights from .*damaged.pth"):
        convert(tmp_path / "damaged.pth", tmp_path / "new")
