"""Runs that are repeated: from their folder's record, and bit by bit with deterministic=true."""

import json
import subprocess

import lightning
import pytest
import torch
from omegaconf import OmegaConf
from training_runs import compose_train, run, train

from nat_models.data import ImageDataModule
from nat_models.engine import run_folder
from nat_models.engine.build import check_deterministic
from nat_models.engine.classification import ClassificationModule

SMALL = ["model.model_kwargs.depths=[1,1]", "model.model_kwargs.embed_dim=16", "model.model_kwargs.num_heads=[1,2]"]
SMALL += ["trainer.max_epochs=2", "optim.schedule.warmup_epochs=1", "trainer.limit_train_batches=5"]


def test_the_record_of_a_run_repeats_it(tmp_path):
    settings = [
        *SMALL,
        "deterministic=true",
        "seed=3",
        "model.mixup={mixup_alpha: 0.5}",
        "data.augmentation.scale=[0.6,1]",
    ]
    process = run(tmp_path, "train.py", *settings, "+data.augmentation.re_prob=0.5")
    assert process.returncode == 0, process.stderr
    (first,) = (tmp_path / "runs" / "digits").iterdir()
    manifest = json.loads((first / "manifest.json").read_text())

    repeated = tmp_path / "repeated"
    train(compose_train(repeated, *manifest["overrides"]))
    assert OmegaConf.load(first / "config.yaml").trainer.deterministic is True
    configs = [OmegaConf.to_yaml(OmegaConf.load(folder / "config.yaml")) for folder in (first, repeated)]
    assert configs[0].replace(str(first), "RUN") == configs[1].replace(str(repeated), "RUN")
    again = json.loads((repeated / "manifest.json").read_text())
    for key in ("data", "packages", "seed", "cpu_threads", "world_size", "python", "config_digest"):
        assert again[key] == manifest[key], key
    weights = [torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True) for folder in (first, repeated)]
    for name, value in weights[0]["state_dict"].items():
        assert torch.equal(value, weights[1]["state_dict"][name]), name
    scores = [json.loads((folder / "results.json").read_text())["metrics"] for folder in (first, repeated)]
    assert scores[0] == scores[1]


def test_patch_makes_the_commit_the_working_copy(tmp_path, monkeypatch):
    def git(*arguments: str) -> None:
        command = ["git", "-C", str(tmp_path / "copy"), "-c", "user.name=a", "-c", "user.email=a@b", *arguments]
        subprocess.run(command, check=True, capture_output=True)

    package = tmp_path / "copy" / "package"
    package.mkdir(parents=True)
    for name in ("code.py", "gone.py", "config.yaml", "pyproject.toml"):
        (package / name).write_text(f"{name}\n")
    git("init")
    git("add", ".")
    git("commit", "-m", "first")
    monkeypatch.setattr(run_folder._git, "__kwdefaults__", {"folder": package, "index": None})
    assert run_folder.uncommitted_changes() == b""
    (package / "code.py").write_text("changed\n")
    (package / "gone.py").unlink()
    (package / "new.py").write_bytes("latin \xe9\n".encode("latin-1"))
    (package / "large.bin").write_bytes(b"data")
    changed = {path.name: path.read_bytes() for path in package.iterdir() if path.suffix != ".bin"}
    patch = run_folder.uncommitted_changes()
    git("stash", "--include-untracked")
    (tmp_path / "changes.patch").write_bytes(patch)
    git("apply", str(tmp_path / "changes.patch"))
    assert {path.name: path.read_bytes() for path in package.iterdir()} == changed
    monkeypatch.setattr(run_folder._git, "__kwdefaults__", {"folder": tmp_path, "index": None})
    assert run_folder.uncommitted_changes() is None


def test_kernels_chosen_by_measurement_are_refused(monkeypatch):
    monkeypatch.setenv("FUSED_NA_AUTOTUNE", "1")
    with pytest.raises(ValueError, match="deterministic=true needs FUSED_NA_AUTOTUNE=0"):
        check_deterministic()


@pytest.mark.gpu
@pytest.mark.parametrize("compile", [False, True, "reduce-overhead"])
@pytest.mark.parametrize("model, size", [("nat_mini", 64), ("dinat_mini", 64)])
def test_training_on_a_gpu_repeats_its_bits(model, size, compile):
    def trained() -> dict[str, torch.Tensor]:
        lightning.seed_everything(1, verbose=False)
        augmentation = {"re_prob": 0.5, "re_mode": "pixel"}
        data = ImageDataModule("fake", img_size=size, batch_size=64, num_workers=4, seed=1, augmentation=augmentation)
        kwargs = {"embed_dim": 32, "depths": [2, 2], "num_heads": [1, 2], "drop_path_rate": 0.2}
        if model.startswith("dinat"):
            kwargs["dilations"] = [[1, 2], [1, 1]]
        module = ClassificationModule(
            model,
            10,
            model_kwargs=kwargs,
            optimizer={"opt": "adamw", "lr": 1e-3, "weight_decay": 0.05},
            schedule={"sched": "constant"},
            mixup={"mixup_alpha": 0.8, "cutmix_alpha": 1.0},
            compile=compile,
        )
        settings = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
        trainer = lightning.Trainer(
            accelerator="gpu", devices=1, precision="bf16-mixed", deterministic=True, max_epochs=2, **settings
        )
        trainer.fit(module, data)
        return module.state_dict()

    first, second = trained(), trained()
    for name, value in first.items():
        assert torch.equal(value, second[name]), name
