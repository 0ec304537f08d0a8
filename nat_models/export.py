"""`python -m nat_models.export RUN [OUT]`: a run of `train.py` in timm's format, with a model card.

RUN is a run folder, whose best checkpoint is taken, or a checkpoint in one. Where training averaged the weights
(`callbacks=ema`) these are the averaged ones. OUT is a new folder (default: `export` in the run folder) that
`timm.create_model("local-dir:OUT", pretrained=True)` loads and that can go to a model hub as it is: it holds
`model.safetensors`, `config.json` with the run's classes, image size and normalisation, and `README.md` with its scores
and recipe.
"""

import argparse
import sys
from pathlib import Path
from shlex import join
from tempfile import TemporaryDirectory
from typing import Any

from omegaconf import OmegaConf
from safetensors import SafetensorError
from timm.models import save_for_hf

from nat_models.engine.checkpoint import find_run, read_checkpoint
from nat_models.engine.evaluation import load_classifier
from nat_models.engine.report import METRIC_TITLES
from nat_models.engine.run_folder import read_data_config, read_manifest, read_results

PACKAGES = ("nat-models", "torch", "torchvision", "timm", "lightning", "triton", "numpy", "av")
RECIPE = ("model", "optim", "trainer", "seed")
RECIPE_DATA = ("sampling", "test_views", "batch_size", "augmentation", "repeats")


def export(run: str | Path, target: str | Path | None = None) -> Path:
    """Writes the folder, see above.

    Returns:
        The folder.

    Raises:
        FileNotFoundError, ValueError: `run` is none, or `target` exists.
    """
    run_dir, checkpoint = find_run(run)
    target = run_dir / "export" if target is None else Path(target)
    if target.exists():
        raise ValueError(f"the output {str(target)!r} exists already")
    module, class_names = load_classifier(checkpoint)
    started_from_published = OmegaConf.load(run_dir / "config.yaml").model.pretrained
    for key in ("tag",) if started_from_published else ("tag", "license", "origin_url"):
        module.model.pretrained_cfg.pop(key, None)  # type: ignore[union-attr, operator]  # of the published weights
    data_config = read_data_config(run_dir)
    target.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=target.parent) as folder:
        written = Path(folder) / "written"
        labels = {"label_names": class_names}
        save_for_hf(module.model, str(written), labels, safe_serialization=True, data_config=data_config)
        (written / "README.md").write_text(model_card(run_dir, checkpoint, target.name), encoding="utf-8")
        written.rename(target)
    return target


def model_card(run_dir: Path, checkpoint: Path, name: str) -> str:
    """The text of the model card: what the model is, its scores where they were measured, and how it was trained."""
    cfg: Any = OmegaConf.load(run_dir / "config.yaml")
    data = cfg.data
    is_video = "sampling" in data
    task = "video-classification" if is_video else "image-classification"
    hparams = read_checkpoint(checkpoint)["hyper_parameters"]
    height, width = read_data_config(run_dir)["input_size"][1:]
    inputs = f"clips of {data.sampling.num_frames} frames" if is_video else "images"
    averaged = ", the exponential moving average of training" if cfg.callbacks.get("ema") is not None else ""
    lines = [
        "---",
        "library_name: timm",
        f"pipeline_tag: {task}",
        f"tags: [timm, {task}]",
        "---",
        f"# {name}",
        "",
        f"`{hparams['model_name']}` for {inputs} of {height} x {width} pixels, {hparams['num_classes']} classes, "
        f"trained on {data.name} with nat-models. The weights are those of `{checkpoint.name}`{averaged}.",
        "",
        "## Scores",
        "",
        *_scores(run_dir, checkpoint),
        "",
        "## Use",
        "",
        "```python",
        "import timm",
        "",
        "import nat_models  # registers the models with timm",
        "",
        f'model = timm.create_model("local-dir:{name}", pretrained=True).eval()',
    ]
    if not is_video:
        lines += ["transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))"]
    lines += ["```", "", "## Training", "", *_training(run_dir), "", "```yaml"]
    recipe = {key: cfg[key] for key in RECIPE} | {"data": {key: data[key] for key in RECIPE_DATA if key in data}}
    recipe["callbacks"] = sorted(name for name, callback in cfg.callbacks.items() if callback is not None)
    lines += [OmegaConf.to_yaml(OmegaConf.create(recipe)).strip(), "```"]
    return "\n".join(lines) + "\n"


def _scores(run_dir: Path, checkpoint: Path) -> list[str]:
    """A table of what training or `eval.py` measured of this checkpoint."""
    results: dict[str, Any] | None = None
    for folder in (run_dir, run_dir / "evaluation" / checkpoint.stem):
        found = read_results(folder)
        if found is not None:
            if folder != run_dir or (run_dir / found["checkpoint"]).resolve() == checkpoint.resolve():
                results = found
    if results is None:
        return ["This checkpoint was not evaluated."]
    images = f"{results['images']} samples of the validation split"
    excluded = f"; {results['excluded']} were left out" if results.get("excluded") else ""
    rows = [f"| {title} | {100 * results['metrics'][key]:.2f} % |" for key, title in METRIC_TITLES.items()
            if key in results["metrics"]]  # fmt: skip
    return [f"After {results['epoch']} epochs, on {images}{excluded}:", "", "| metric | value |", "|---|---|", *rows]


def _training(run_dir: Path) -> list[str]:
    """The manifest's main entries."""
    manifest = read_manifest(run_dir)
    if manifest is None:
        return ["How this was trained is not recorded."]
    git = manifest["git"]
    commit = "unknown" if git is None else git["commit"] + (", with changes" if git["changes"] else "")
    versions = ", ".join(f"{name} {manifest['packages'][name]}" for name in PACKAGES if name in manifest["packages"])
    lines = [
        f"- Command: `{join(manifest['command'])}`",
        f"- Commit: {commit}",
        f"- Versions: Python {manifest['python']}, {versions}",
        f"- Device: {manifest['world_size']} x {manifest['device']}",
        f"- Started: {manifest['started']}",
    ]
    if ingredients := manifest.get("soup"):
        lines += ["- Mean of the weights of:", *(f"  - `{path}`" for path in ingredients)]
    return lines


def main(arguments: list[str] | None = None) -> None:
    """Exports; exits with status 2 and one line for what the user can correct."""
    parser = argparse.ArgumentParser(prog="python -m nat_models.export", description="A run in timm's format.")
    parser.add_argument("run", metavar="RUN", help="run folder of train.py, or a checkpoint in one")
    parser.add_argument("target", metavar="OUT", nargs="?", help="new folder (default: export in the run folder)")
    options = parser.parse_args(arguments)
    try:
        target = export(options.run, options.target)
    except (ValueError, OSError, SafetensorError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    print(f'{options.run} -> {target}: timm.create_model("local-dir:{target}", pretrained=True)')


if __name__ == "__main__":
    main()
