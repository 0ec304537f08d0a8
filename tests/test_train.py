"""`train.py` and `eval.py` as a user runs them."""

import csv
import json
import shutil
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image
from training_runs import compose_train, run, train, write_image_folder

EPOCHS = 4
SHORT = ["optim.schedule.warmup_epochs=1", "optim.base_lr=2e-3"]


@pytest.fixture(scope="module")
def digits_run(tmp_path_factory) -> tuple[Path, str]:
    """The run folder and the output of a shortened `python train.py`."""
    folder = tmp_path_factory.mktemp("digits")
    process = run(folder, "train.py", f"trainer.max_epochs={EPOCHS}", *SHORT)
    assert process.returncode == 0, process.stderr
    (run_dir,) = (folder / "runs" / "digits").iterdir()
    return run_dir, process.stdout


def epochs_of(run_dir: Path, metric: str) -> dict[int, float]:
    with open(run_dir / "csv" / "metrics.csv", newline="") as file:
        return {int(row["epoch"]): float(row[metric]) for row in csv.DictReader(file) if row[metric]}


def test_training_prints_what_matters(digits_run):
    run_dir, output = digits_run
    assert "Effective batch" in output and "Learning rate" in output and "1437 training, 360 validation" in output
    for epoch in range(1, EPOCHS + 1):
        (line,) = [line for line in output.splitlines() if line.startswith(f"epoch {epoch}/{EPOCHS} ")]
        assert all(word in line for word in ("loss", "top-1", "images/s", "data wait", "ETA"))
    table = output[output.index("Best checkpoint (epoch") :]
    assert "Top-1 accuracy" in table and "Training time" in table and str(run_dir) in table


def test_run_folder_is_complete(digits_run):
    run_dir, _ = digits_run
    config = OmegaConf.load(run_dir / "config.yaml")
    assert config.run_dir == str(run_dir) and config.data.name == "digits"
    assert json.loads((run_dir / "manifest.json").read_text())["seed"] == config.seed
    results = json.loads((run_dir / "results.json").read_text())
    top1 = epochs_of(run_dir, "val/top1")
    assert results["images"] == 360 and list(top1) == list(range(EPOCHS))
    assert results["metrics"]["val/top1"] == max(top1.values()) == top1[results["epoch"] - 1]
    assert results["metrics"]["val/top1"] > 0.5  # chance is 0.1
    assert len(epochs_of(run_dir, "train/loss_epoch")) == EPOCHS
    assert list((run_dir / "tensorboard").glob("events.*"))
    assert {path.name for path in (run_dir / "checkpoints").iterdir()} == {"best.ckpt", "last.ckpt", "previous.ckpt"}
    with open(run_dir / "per_class.csv", newline="") as file:
        assert sum(int(row["images"]) for row in csv.DictReader(file)) == 360
    for plot in ("curves", "confusion_matrix", "misclassified", "per_class", "training_batch"):
        with Image.open(run_dir / f"{plot}.png") as image:
            assert image.width > 500


def test_evaluation_reproduces_the_recorded_accuracy(digits_run):
    run_dir, _ = digits_run
    by_run = run(run_dir.parent, "eval.py", f"run={run_dir}", "data.eval_batch_size=77")
    assert by_run.returncode == 0, by_run.stderr
    assert "the same" in by_run.stdout
    recorded = json.loads((run_dir / "results.json").read_text())
    repeated = json.loads((run_dir / "evaluation" / "best" / "results.json").read_text())
    assert repeated["metrics"]["val/top1"] == recorded["metrics"]["val/top1"]
    assert (run_dir / "evaluation" / "best" / "per_class.csv").read_text() == (run_dir / "per_class.csv").read_text()

    moved = shutil.copytree(run_dir, run_dir.parent.parent / "moved")
    (moved / "results.json").write_text(json.dumps(recorded)[:40])  # damaged: nothing to compare with
    config = (moved / "config.yaml").read_text()
    (moved / "config.yaml").write_text(config.replace("num_nodes: 1", "num_nodes: 2"))  # trained by two machines
    by_file = run(moved, "eval.py", "ckpt_path=checkpoints/last.ckpt")
    assert by_file.returncode == 0, by_file.stderr
    last = json.loads((moved / "evaluation" / "last" / "results.json").read_text())
    assert last["metrics"]["val/top1"] == epochs_of(run_dir, "val/top1")[EPOCHS - 1]


def test_training_resumes(digits_run, tmp_path):
    run_dir, _ = digits_run
    last = run_dir / "checkpoints" / "last.ckpt"
    process = run(tmp_path, "train.py", f"trainer.max_epochs={EPOCHS + 1}", f"ckpt_path={last}", *SHORT)
    assert process.returncode == 0, process.stderr
    assert "Resumed from" in process.stdout
    (resumed,) = (tmp_path / "runs" / "digits").iterdir()
    assert list(epochs_of(resumed, "val/top1")) == [EPOCHS]
    before, after = (torch.load(path, weights_only=True) for path in (last, resumed / "checkpoints" / "last.ckpt"))
    steps = before["global_step"] // EPOCHS
    assert after["global_step"] == before["global_step"] + steps
    assert next(iter(after["optimizer_states"][0]["state"].values()))["step"] == after["global_step"]


@pytest.mark.parametrize(
    ("script", "arguments", "message"),
    [
        ("train.py", ["model.model_name=nat_minni"], "the nearest names are nat_mini"),
        ("train.py", ["ckpt_path=foreign.ckpt"], "foreign.ckpt"),
        ("eval.py", ["run=nowhere"], "run='nowhere' is not a folder"),
        ("eval.py", ["ckpt_path=foreign.ckpt"], "foreign.ckpt"),
    ],
)
def test_mistakes_get_one_line(tmp_path, script, arguments, message):
    torch.save({"weight": torch.zeros(2)}, tmp_path / "foreign.ckpt")
    process = run(tmp_path, script, *arguments)
    assert process.returncode == 2
    assert process.stderr.count("\n") == 1 and process.stderr.startswith("error: ") and message in process.stderr
    assert not list(tmp_path.glob("runs/digits/*"))


def tiny_folder_run(run_dir: Path, root: Path, *overrides: str, max_epochs: int = 1) -> float:
    settings = ["model.model_name=test_resnet", "data.img_size=32", "data.batch_size=4", "trainer.accelerator=cpu"]
    settings += [
        "optim.schedule.warmup_epochs=0",
        "optim.schedule.cooldown_epochs=0",
        f"trainer.max_epochs={max_epochs}",
    ]
    return train(compose_train(run_dir, "experiment=none", "data=imagenet", f"data.root={root}", *settings, *overrides))


def test_undecodable_training_image_is_counted_and_listed(tmp_path, capsys):
    root = write_image_folder(tmp_path / "images")
    damaged = root / "train" / "class_2" / "1.jpg"
    damaged.write_bytes(damaged.read_bytes()[:400])
    tiny_folder_run(tmp_path / "run", root, "data.num_workers=2", max_epochs=2)
    assert set((tmp_path / "run" / "undecodable.txt").read_text().splitlines()) == {str(damaged)}
    assert epochs_of(tmp_path / "run", "data/undecodable") == {0: 1.0, 1: 1.0}
    assert "Undecodable files" in capsys.readouterr().out


@pytest.mark.parametrize("num_workers", [0, 2])
def test_undecodable_validation_image_ends_the_run_with_its_path(tmp_path, capsys, num_workers):
    root = write_image_folder(tmp_path / "images")
    (root / "val" / "class_2" / "1.jpg").write_bytes(b"no image")
    with pytest.raises(SystemExit) as exit_info:
        tiny_folder_run(tmp_path / "run", root, f"data.num_workers={num_workers}")
    assert exit_info.value.code == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"error: cannot decode {root}/val/class_2/1.jpg")


def test_same_seed_same_weights(tmp_path):
    root = write_image_folder(tmp_path / "images")
    weights = []
    for name, seed in (("first", 1), ("second", 1), ("other", 2)):
        tiny_folder_run(tmp_path / name, root, "data.num_workers=2", f"seed={seed}", "model.mixup={mixup_alpha: 0.5}")
        checkpoint = torch.load(tmp_path / name / "checkpoints" / "last.ckpt", weights_only=True)
        weights.append(torch.cat([value.flatten().double() for value in checkpoint["state_dict"].values()]))
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_checkpoints_may_lie_on_another_disk(tmp_path):
    run_dir, scratch = tmp_path / "run", tmp_path / "scratch"
    for folder in (run_dir, scratch):
        folder.mkdir()
    (run_dir / "checkpoints").symlink_to(scratch)
    settings = ["experiment=none", "data=fake", "model.model_name=test_resnet", "data.img_size=32", "debug=smoke"]
    settings += ["optim.schedule.warmup_epochs=0", "optim.schedule.cooldown_epochs=0", "trainer.max_epochs=1"]
    settings += ["trainer.accelerator=cpu", "trainer.max_steps=-1", "trainer.limit_train_batches=2"]
    train(compose_train(run_dir, *settings))
    results = run_dir / "results.json"
    assert (run_dir / json.loads(results.read_text())["checkpoint"]).resolve() == scratch / "best.ckpt"
    results.unlink()  # as if killed in the evaluation
    train(compose_train(run_dir, *settings, "ckpt_path=auto"))
    assert results.exists()
