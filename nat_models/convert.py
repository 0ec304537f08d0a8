"""`python -m nat_models.convert IN OUT`: weights of any known form -> timm's format, with a report.

IN is a file of the original code, of Hugging Face's `Nat*` and `Dinat*` models, or a checkpoint of `train.py` outside
its run folder; those in it are for `nat_models.export`, as the run tells the images' size and normalisation. OUT is a
folder that `timm.create_model("local-dir:OUT", pretrained=True)` loads and that can go to a model hub as it is. If OUT
ends in `.safetensors` it is one file, with its description in a `.json` file beside it.
"""

import argparse
import difflib
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from urllib.parse import urlparse

import timm
import torch
from safetensors import SafetensorError
from timm.models import save_for_hf
from timm.utils import ParseKwargs
from torch import Tensor, nn

import nat_models  # noqa: F401  registers the models
from nat_models.checkpoints import adapt_state_dict, infer_sizes, read_file, rename, unwrap
from nat_models.list import published_models
from nat_models.names import check_model_name

WEIGHTS = (".pth", ".pt", ".bin", ".ckpt", ".safetensors")  # ends of names of files with weights
NOT_OF_MODELS = {"features_only", "checkpoint_path", "pretrained", "pretrained_cfg", "pretrained_cfg_overlay"}


def convert(source: str | Path, target: str | Path, model_name: str | None = None, **model_kwargs: Any) -> nn.Module:
    """Reads weights, fits them to a model, and writes them in timm's format.

    Args:
        source: file with weights.
        target: folder, or file name ending in `.safetensors`; must not exist yet.
        model_name: a registered name. None takes it from a checkpoint of `train.py`, from the name of a published
            file, or from the weights where exactly one registered model has such weights.
        model_kwargs: arguments of the model that differ from the named one's (`num_classes`, `kernel_size`, ...).
            Numbers of classes and input channels are the file's unless given.

    Returns:
        The model with the weights; its `load_report` says what became of them.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the weights cannot be read or do not fit, the model cannot be told, `target` exists, or `source` is
            in its run folder.
    """
    source, target = Path(source), Path(target)
    is_file = target.suffix == ".safetensors"
    if target.suffix in WEIGHTS and not is_file:
        raise ValueError(f"the output must be a folder or a file ending in .safetensors, got {str(target)!r}")
    below = next(folder for folder in target.absolute().parents if folder.exists())
    if not below.is_dir():
        raise ValueError(f"the output {str(target)!r} is below a file, {str(below)!r}")
    check_model_kwargs(model_kwargs)
    for path in (target, target.with_suffix(".json")) if is_file else (target,):
        if path.exists():
            raise ValueError(f"the output {str(path)!r} exists already")
    content = read_file(source)
    if "hyper_parameters" in content and (source.resolve().parent.parent / "config.yaml").is_file():
        raise ValueError(f"{str(source)!r} is a checkpoint in its run folder: python -m nat_models.export {source}")
    weights = rename(unwrap(content, str(source)))
    settings = content.get("hyper_parameters") or {}
    name = model_name or settings.get("model_name") or _name_of_file(source) or _name_of_weights(source, weights)
    arguments = infer_sizes(weights, _pretrained_cfg(name)) | (settings.get("model_kwargs") or {}) | model_kwargs
    try:
        model = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=dict(file=str(source)), **arguments)
    except TypeError as error:
        raise ValueError(f"model_kwargs={model_kwargs} do not fit {name}: {error}") from error
    labels = {"label_names": settings["class_names"]} if settings.get("class_names") else {}
    target.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=target.parent) as folder:
        written = Path(folder) / "written"
        save_for_hf(model, str(written), model_config=labels, safe_serialization=True)
        if is_file:
            (written / "model.safetensors").rename(target)
            (written / "config.json").rename(target.with_suffix(".json"))
        else:
            written.rename(target)
    return model


def check_model_kwargs(model_kwargs: Mapping[str, Any]) -> None:
    """Raises ValueError if there are arguments of timm's `create_model` among those of the model."""
    for name in NOT_OF_MODELS & model_kwargs.keys():
        raise ValueError(f"model_kwargs must be arguments of the model itself, got {name}={model_kwargs[name]!r}")


def _pretrained_cfg(name: str) -> Any:
    names = [row["model"] for row in published_models()]
    if name.partition(".")[0] not in names:
        nearest = difflib.get_close_matches(name, names, n=3) or names
        raise ValueError(f"there is no model {name!r}; perhaps {', '.join(nearest)}")
    check_model_name(name, "model")
    return timm.get_pretrained_cfg(name)


def _name_of_file(source: Path) -> str | None:
    """The model whose published weights are called like this file."""
    for name in (row["model"] for row in published_models()):
        if source.name == Path(urlparse(_pretrained_cfg(name).url).path).name:
            return name
    return None


def _name_of_weights(source: Path, weights: Mapping[str, Tensor]) -> str:
    """The one registered model with parameters of these names and shapes."""
    fitting = []
    for name in (row["model"] for row in published_models()):
        with torch.device("meta"):
            model = timm.create_model(name, **infer_sizes(weights, _pretrained_cfg(name)))
        try:
            report = adapt_state_dict(weights, model)[1]
        except ValueError:
            continue
        if not report.resized and not report.inflated:
            fitting.append(name)
    if len(fitting) != 1:
        found = f"fits {' and '.join(fitting)}" if fitting else "fits no registered model as it is"
        raise ValueError(f"{str(source)!r} {found}: name the model")
    return fitting[0]


class _ModelKwargs(ParseKwargs):
    """timm's, with a message instead of a traceback for what is no KEY=VALUE."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        for value in values:
            if "=" not in value:
                raise argparse.ArgumentError(self, f"{value!r} is not KEY=VALUE, such as kernel_size=11")
        super().__call__(parser, namespace, values, option_string)


def add_model_kwargs_option(parser: argparse.ArgumentParser) -> None:
    """`--model-kwargs KEY=VALUE...`, a dict."""
    parser.add_argument(
        "--model-kwargs", nargs="+", default={}, action=_ModelKwargs, metavar="KEY=VALUE",
        help="arguments of the model that differ, for example num_classes=10 kernel_size=11",
    )  # fmt: skip


def main(arguments: list[str] | None = None) -> None:
    """Converts and prints the report; exits with status 2 and one line for what the user can correct."""
    parser = argparse.ArgumentParser(prog="python -m nat_models.convert", description="Weights into timm's format.")
    parser.add_argument("source", metavar="IN", help="file with weights: .pth, .bin, .ckpt, .safetensors")
    parser.add_argument("target", metavar="OUT", help="new folder, or new file ending in .safetensors")
    parser.add_argument("--model", help="registered name, where the file does not tell it (python -m nat_models.list)")
    add_model_kwargs_option(parser)
    options = parser.parse_args(arguments)
    try:
        model = convert(options.source, options.target, options.model, **options.model_kwargs)
    except (ValueError, OSError, SafetensorError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    print(f"{options.source} -> {options.target}: {model.pretrained_cfg['architecture']}")  # type: ignore[index]
    for kind, keys in asdict(model.load_report).items():  # type: ignore[call-overload]
        print(f"{kind:14}{len(keys):5}  {', '.join(keys) if kind != 'matched' else ''}".rstrip())


if __name__ == "__main__":
    main()
