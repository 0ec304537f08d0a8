"""`python -m nat_models.soup RUN_OR_CHECKPOINT... OUT`: the mean of the weights of several trainings of one model.

OUT is a new run folder: that of the first one with the mean as its best checkpoint, for `eval.py`, `predict` and
`export`. `--greedy` takes the checkpoints from the best to the worst on the validation split, and leaves out those that
would make the mean worse.

Source: Model soups, https://arxiv.org/abs/2203.05482, section 2 and algorithm 1.
"""

import argparse
import json
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from omegaconf import OmegaConf
from torch import Tensor

from nat_models.engine.build import build_evaluation_datamodule, plain, prepare_process
from nat_models.engine.checkpoint import find_run, read_checkpoint
from nat_models.engine.checkpoint_io import VerifiedCheckpointIO
from nat_models.engine.errors import DATA_ERRORS, SETUP_ERRORS, CheckpointWriteError, message_of
from nat_models.engine.evaluation import evaluate
from nat_models.engine.run_folder import read_data_config, read_manifest

SAME = ("model_name", "num_classes", "in_chans", "class_names", "model_kwargs")
ERRORS: tuple[type[Exception], ...] = (*SETUP_ERRORS, *DATA_ERRORS, CheckpointWriteError)
# Arguments that only training knows, or that only say where it began.
MAY_DIFFER = ("drop_path_rate", "drop_rate", "attn_drop_rate", "proj_drop_rate", "pretrained_cfg_overlay")


def soup(ingredients: Sequence[str | Path], target: str | Path, greedy: bool = False) -> list[Path]:
    """Writes the run folder, see above.

    Args:
        ingredients: run folders or checkpoints, two or more.
        target: the new folder.
        greedy: choose by validation, with the data of the first run.

    Returns:
        The checkpoints that went into the mean.

    Raises:
        FileNotFoundError, ValueError: one of them is no run, they differ in architecture, classes or preparation of
            images, or `target` exists.
    """
    target = Path(target)
    if target.exists():
        raise ValueError(f"the output {str(target)!r} exists already")
    if len(ingredients) < 2:
        raise ValueError(f"a soup needs two or more runs or checkpoints, got {len(ingredients)}")
    runs = [find_run(ingredient) for ingredient in ingredients]
    run_dir, first = runs[0]
    for other_dir, other in runs[1:]:
        check_same(run_dir, first, other_dir, other)
    checkpoints = [checkpoint for _, checkpoint in runs]
    target.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=target.parent) as folder:
        written = Path(folder) / "written"
        (written / "checkpoints").mkdir(parents=True)
        best = written / "checkpoints" / "best.ckpt"
        if greedy:
            checkpoints = choose(checkpoints, score_of(run_dir, first), Path(folder) / "candidate.ckpt")
        write_mean(checkpoints, best)
        shutil.copy(run_dir / "config.yaml", written)
        if (manifest := read_manifest(run_dir)) is not None:
            manifest.pop("config_digest", None)  # no run that ckpt_path=auto could go on with
            manifest["soup"] = [str(checkpoint) for checkpoint in checkpoints]
            (written / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")
        written.rename(target)
    return checkpoints


def check_same(run_dir: Path, checkpoint: Path, other_dir: Path, other: Path) -> None:
    """Raises ValueError unless two checkpoints are of one architecture, with the same classes and inputs."""

    def settings(folder: Path, path: Path) -> dict[str, Any]:
        hparams = read_checkpoint(path)["hyper_parameters"]
        same = {key: hparams.get(key) for key in SAME}
        kwargs = same["model_kwargs"] or {}
        same["model_kwargs"] = {key: value for key, value in kwargs.items() if key not in MAY_DIFFER}
        return same | read_data_config(folder)

    of_first, of_other = settings(run_dir, checkpoint), settings(other_dir, other)
    for key, value in of_first.items():
        if of_other[key] != value:
            raise ValueError(f"{str(other)!r} has {key}={of_other[key]!r}, but {str(checkpoint)!r} {value!r}")


def write_mean(checkpoints: Sequence[Path], target: Path) -> None:
    """Writes a checkpoint with the mean of the weights of `checkpoints`, in float64, and all else of the first."""
    mean: dict[str, Tensor] = {}
    first = read_checkpoint(checkpoints[0])
    for path in checkpoints:
        for name, value in read_checkpoint(path)["state_dict"].items():
            if value.is_floating_point():
                mean[name] = mean.get(name, 0) + value.double() / len(checkpoints)
    state = {name: mean[name].to(value.dtype) if name in mean else value for name, value in first["state_dict"].items()}
    kept = ("pytorch-lightning_version", "hyper_parameters", "loops", "epoch", "global_step")
    VerifiedCheckpointIO().save_checkpoint({key: first[key] for key in kept} | {"state_dict": state}, target)


def score_of(run_dir: Path, checkpoint: Path) -> Callable[[Path], float]:
    """A function of a checkpoint: its top-1 accuracy (0..1) on the validation split of a run."""
    cfg = OmegaConf.create(plain(OmegaConf.load(run_dir / "config.yaml")))
    cfg.trainer.update(devices=1, num_nodes=1, strategy="auto")
    prepare_process(cfg)
    datamodule = build_evaluation_datamodule(cfg, read_checkpoint(checkpoint)["hyper_parameters"])
    return lambda path: evaluate(path, datamodule, plain(cfg.trainer)).metrics["val/top1"]


def choose(checkpoints: Sequence[Path], score: Callable[[Path], float], candidate: Path) -> list[Path]:
    """The greedy soup: from the best on, each checkpoint with which the mean is at least as good as without it.

    Args:
        checkpoints: to choose from.
        score: of a checkpoint's weights, the higher the better.
        candidate: file for the means to score.
    """
    scores = {path: score(path) for path in checkpoints}
    best, *others = sorted(scores, key=lambda path: -scores[path])
    chosen, highest = [best], scores[best]
    print(f"{100 * highest:.2f} %  {best}", flush=True)
    for path in others:
        write_mean([*chosen, path], candidate)
        with_it = score(candidate)
        taken = with_it >= highest
        if taken:
            chosen, highest = [*chosen, path], with_it
        verdict = "taken" if taken else "left out"
        print(f"{100 * scores[path]:.2f} %  {path}: {verdict}, the mean with it has {100 * with_it:.2f} %", flush=True)
    return chosen


def main(arguments: list[str] | None = None) -> None:
    """Averages; exits with status 2 and one line for what the user can correct."""
    parser = argparse.ArgumentParser(prog="python -m nat_models.soup", description="The mean of trained weights.")
    parser.add_argument("runs", metavar="RUN_OR_CHECKPOINT", nargs="+", help="run folders of train.py, or checkpoints")
    parser.add_argument("target", metavar="OUT", help="new run folder")
    parser.add_argument("--greedy", action="store_true", help="leave out what makes the validation score worse")
    options = parser.parse_args(arguments)
    try:
        chosen = soup(options.runs, options.target, options.greedy)
    except ERRORS as error:
        print(f"error: {message_of(error)}", file=sys.stderr)
        raise SystemExit(2) from None
    print(f"mean of {len(chosen)} checkpoints in {options.target}: python eval.py run={options.target}")


if __name__ == "__main__":
    main()
