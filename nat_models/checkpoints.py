"""Weights from wherever they come: other parameter names, other window sizes, other heads; clear errors for the rest.

timm loads the file (`timm.create_model(name, pretrained=True, pretrained_cfg_overlay=dict(file=PATH))`, safely: tensors
only, nothing in the file is executed) and calls `checkpoint_filter_fn`, which understands

- the original code's weights, plain or under `model`, `state_dict`, `state_dict_ema`;
- Hugging Face's `Nat*` and `Dinat*` weights;
- this project's Lightning checkpoints, compiled models included, and exported weights;
- for a video model, the weights of its image model in any of these forms.
"""

import pickle
import re
import struct
import warnings
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import torch
from safetensors.torch import load_file
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import FeatureGraphNet, FeatureHookNet, adapt_input_conv, build_model_with_cfg, resolve_pretrained_cfg
from torch import Tensor, nn
from torch.nn import functional as F

from nat_models.checksums import check_checksum
from nat_models.inflation import inflate, is_of_images, temporal_parameters

_WRAPPERS = ("state_dict_ema", "model_ema", "state_dict", "model")
_PREFIXES = re.compile(r"^(?:(?:model|module|_orig_mod)\.)+")  # of Lightning modules, DDP and torch.compile
# A buffer of the original ViT-RPB that follows from the map's size, and a counter of torch's AveragedModel.
_IGNORED = re.compile(r"\.relative_position_index$|^n_averaged$")
_HUGGING_FACE = (
    (r"^(?:di)?nat\.", ""),
    (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^embeddings\.norm\.", "patch_embed.norm."),
    (r"^encoder\.levels\.(\d+)\.layers\.", r"levels.\1.blocks."),
    (r"^encoder\.levels\.", "levels."),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    (r"\.attention\.self\.rpb$", ".attn.rpb"),
    (r"\.attention\.output\.dense\.", ".attn.proj."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"(\.blocks\.\d+)\.output\.dense\.", r"\1.mlp.fc2."),
    (r"^layernorm\.", "norm."),
    (r"^classifier\.", "head."),
)
_OF_DAMAGE = (pickle.UnpicklingError, EOFError, LookupError, AssertionError, struct.error)  # without a telling message
_least_share: ContextVar[float] = ContextVar("least_share", default=1.0)


def nat_cfg(file: str, **kwargs: Any) -> dict[str, Any]:
    """timm's description of weights published with the NAT paper.

    Args:
        file: the weights, below their folder on the project's page.
        kwargs: fields of timm's `PretrainedCfg`; the others are of a hierarchical model on ImageNet-1k at 224.
    """
    paper = dict(paper_name="Neighborhood Attention Transformer", paper_ids="arXiv:2204.07143")
    return _cfg(f"nat/checkpoints/CLS/{file}", **paper, **kwargs)


def dinat_cfg(file: str, **kwargs: Any) -> dict[str, Any]:
    """`nat_cfg` for the DiNAT paper."""
    paper = dict(paper_name="Dilated Neighborhood Attention Transformer", paper_ids="arXiv:2209.15001")
    return _cfg(f"dinat/checkpoints/{file}", **paper, **kwargs)


def _cfg(path: str, **kwargs: Any) -> dict[str, Any]:
    return {
        "url": f"https://shi-labs.com/projects/{path}",
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": (7, 7),
        "crop_pct": 0.875,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "patch_embed.proj.0",
        "classifier": "head",
        "license": "mit",
        "origin_url": "https://github.com/SHI-Labs/Neighborhood-Attention-Transformer",
        **kwargs,
    }


def build_model(model_cls: Callable[..., nn.Module], variant: str, pretrained: bool, **kwargs: Any) -> nn.Module:
    """timm's `build_model_with_cfg` with this module's filter, and with errors that name the checkpoint.

    Raises:
        FileNotFoundError: there is no such checkpoint file.
        ValueError: the checkpoint cannot be read or downloaded, or does not fit the model. A download that cannot be
            read is removed from the cache. Or `feature_cls` is "fx".
    """
    feature_cls = kwargs.get("feature_cls")
    if kwargs.get("features_only") and (feature_cls is FeatureGraphNet or str(feature_cls).lower() == "fx"):
        # The last node of a stage in a traced graph is its downsampling, so the maps would be the next stage's.
        raise ValueError(f"feature_cls must be 'list', 'dict', 'hook' or 'getter', got {feature_cls!r}")
    if not pretrained:
        return _without_last_downsampling(build_model_with_cfg(model_cls, variant, pretrained, **kwargs))
    cfg = resolve_pretrained_cfg(variant, kwargs.get("pretrained_cfg"), kwargs.get("pretrained_cfg_overlay"))
    source = _source(vars(cfg))
    if cfg.file and cfg.source != "local-dir" and not Path(cfg.file).is_file():
        raise FileNotFoundError(f"there is no file {str(cfg.file)!r}")
    is_reading = False  # timm builds the model, then reads the checkpoint, whose errors alone are the checkpoint's

    def build(**arguments: Any) -> nn.Module:
        nonlocal is_reading
        model = model_cls(**arguments)
        is_reading = True
        return model

    def filter_read(state_dict: dict[str, Any], model: nn.Module) -> dict[str, Tensor]:
        nonlocal is_reading
        is_reading = False
        return checkpoint_filter_fn(state_dict, model)

    try:
        return _without_last_downsampling(
            build_model_with_cfg(build, variant, pretrained, pretrained_filter_fn=filter_read, **kwargs)
        )
    except Exception as error:  # damaged files raise of every kind
        if not is_reading:
            raise
        if source == cfg.url:
            folder = Path(kwargs.get("cache_dir") or Path(torch.hub.get_dir()) / "checkpoints")
            (folder / Path(urlparse(source).path).name).unlink(missing_ok=True)
        raise ValueError(f"cannot load weights from {source}: {_reason(error)}") from error


def _without_last_downsampling(model: nn.Module) -> nn.Module:
    """A model as timm built it; one that takes features by hooks ends with its last stage, whose output is a map."""
    if isinstance(model, FeatureHookNet):
        last = list(model.values())[-1]
        if getattr(last, "downsample", None) is not None:
            last.downsample = None  # type: ignore[assignment]
    return model


def build_clip_model(
    model_cls: Callable[..., nn.Module], variant: str, pretrained: bool, feature_cfg: dict[str, Any], **kwargs: Any
) -> nn.Module:
    """`build_model` for video models: timm's feature extractors know no formats with time, so theirs is set here."""
    if not kwargs.get("features_only"):
        return build_model(model_cls, variant, pretrained, feature_cfg=feature_cfg, **kwargs)
    if kwargs.get("feature_cls") != "getter":
        feature_cfg = feature_cfg | dict(output_fmt="NHWC")
    model = build_model(model_cls, variant, pretrained, feature_cfg=feature_cfg, **kwargs)
    model.output_fmt = {"NHWC": "NTHWC", "NCHW": "NCTHW"}[model.output_fmt]  # type: ignore[index,assignment]
    return model


def load_image_weights(model: nn.Module, file: str | Path) -> "LoadReport":
    """Gives a video model, already built, the inflated weights of an image model; see `nat_models.inflation`.

    `timm.create_model(name, pretrained=True, pretrained_cfg_overlay=dict(file=FILE))` does the same while building.

    Args:
        model: a video model of this project, from `timm.create_model` without `features_only`.
        file: weights of its image model, in any form that `checkpoint_filter_fn` understands.

    Returns:
        What became of the weights, also left in `model.load_report`.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the weights cannot be read or do not fit, or timm did not build the model, or for features only.
    """
    if "classifier" not in getattr(model, "pretrained_cfg", {}):
        raise ValueError(
            f"model must be one of timm.create_model, without features_only, got a {type(model).__name__}; with "
            "features_only give create_model the file: pretrained=True, pretrained_cfg_overlay=dict(file=FILE)"
        )
    model.pretrained_cfg = {**model.pretrained_cfg, "file": str(file)}  # type: ignore[dict-item,assignment]
    weights, report = adapt_state_dict(read_file(file), model)
    kept = {key: value for key, value in weights.items() if key not in report.reinitialised}
    model.load_state_dict(kept, strict=False)
    model.load_report = report  # type: ignore[assignment]
    return report


def read_file(path: str | Path) -> dict[str, Any]:
    """What a file with weights holds, read without executing anything in it.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file cannot be read, is damaged, or holds something else.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no file {str(path)!r}")
    check_checksum(path)
    try:
        if Path(path).suffix.lower() == ".safetensors":
            content = load_file(path)
        else:
            with torch.serialization.safe_globals([Namespace]):  # timm's training keeps its arguments so
                content = torch.load(path, "cpu", weights_only=True)
    except Exception as error:  # damaged files raise of every kind
        raise ValueError(f"cannot load weights from {path}: {_reason(error)}") from error
    if not isinstance(content, dict):
        raise ValueError(f"cannot load weights from {path}: it holds no state dict")
    return content


def checkpoint_filter_fn(state_dict: dict[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """The weights of `state_dict` under the names and in the shapes of `model`; the filter that timm calls.

    What the checkpoint is for, its number of classes and of input channels, is entered into `model.pretrained_cfg`, so
    that timm re-initialises the head or adapts the first convolution exactly where the model's differ. What became of
    the weights is left in `model.load_report`.

    Raises:
        ValueError: the weights do not fit; the message names the keys.
    """
    weights, model.load_report = adapt_state_dict(state_dict, model)  # type: ignore[assignment]
    return weights


@dataclass
class LoadReport:
    """What became of the weights, by parameter name of the model (`ignored`: of the checkpoint)."""

    matched: list[str] = field(default_factory=list)
    resized: list[str] = field(default_factory=list)
    inflated: list[str] = field(default_factory=list)
    reinitialised: list[str] = field(default_factory=list)
    ignored: list[str] = field(default_factory=list)


@contextmanager
def least_share(share: float) -> Iterator[None]:
    """Within this context, weights suffice that hold `share` (0..1) of the parameters of a model's backbone.

    What they lack starts new and what does not fit is ignored; `load_report` tells. Elsewhere everything must fit. This
    is a context because timm hands no argument of `create_model` to the filter that it calls.
    """
    token = _least_share.set(share)
    try:
        yield
    finally:
        _least_share.reset(token)


def loaded_share(model: nn.Module, report: LoadReport) -> float:
    """Share of the parameters of a model's backbone, all but the classifier, that came from the weights.

    What only a video model has does not count where an image model's weights are inflated: it starts new by design.
    """
    cfg: dict[str, Any] = model.pretrained_cfg  # type: ignore[assignment]
    left_out = set(temporal_parameters(model.state_dict())) if report.inflated else set()
    left_out |= {f"{cfg['classifier']}.weight", f"{cfg['classifier']}.bias"}
    sizes = {name: value.numel() for name, value in model.named_parameters() if name not in left_out}
    loaded = {*report.matched, *report.resized, *report.inflated}
    return sum(size for name, size in sizes.items() if name in loaded) / sum(sizes.values())


def adapt_state_dict(state_dict: Mapping[str, Any], model: nn.Module) -> tuple[dict[str, Tensor], LoadReport]:
    """`checkpoint_filter_fn` with a report. The head is listed as re-initialised where timm will leave it random.

    Weights must fit altogether, or, within `least_share`, by that share. Warns where an image model's attention had
    other neighborhoods than the video model, the whole map (ViT-RPB) for example, or the latter has no use for biases.

    Raises:
        ValueError: the weights do not fit; the message names the keys.
    """
    cfg: dict[str, Any] = model.pretrained_cfg  # type: ignore[assignment]
    weights = rename(unwrap(state_dict, _source(cfg)))
    report = LoadReport(ignored=[key for key in weights if _IGNORED.search(key)])
    weights = {key: value for key, value in weights.items() if key not in report.ignored}
    expected = model.state_dict()

    head, first_conv = cfg["classifier"], cfg["first_conv"]
    if f"{head}.weight" in weights:
        cfg["num_classes"] = len(weights[f"{head}.weight"])
    if f"{first_conv}.weight" in weights:
        cfg["input_size"] = (weights[f"{first_conv}.weight"].shape[1], *cfg["input_size"][1:])
    replaced = []
    if cfg["num_classes"] != model.num_classes:
        replaced = [f"{head}.weight", f"{head}.bias"]
        report.reinitialised = [key for key in replaced if key in expected]
        report.ignored += [key for key in replaced if key in weights and key not in expected]
    new: list[str] = []
    left_out: list[str] = []
    if is_of_images(weights, expected):
        weights, report.inflated, left_out = inflate(weights, expected)
        report.ignored += left_out
        new = temporal_parameters(expected)
        report.reinitialised += new

    misshaped = {}
    for key in [key for key in expected if key in weights and key not in replaced]:
        shape, wanted = weights[key].shape, expected[key].shape
        if shape == wanted:
            if key not in report.inflated:
                report.matched.append(key)
        elif key.endswith("rpb") and len(shape) == len(wanted) and shape[0] == wanted[0]:
            weights[key] = resize_rpb(weights[key], wanted[1:])
            report.resized.append(key)
        elif key == f"{first_conv}.weight" and len(shape) == 5 and shape[:1] + shape[2:] == wanted[:1] + wanted[2:]:
            weights[key] = adapt_input_conv(wanted[1], weights[key].flatten(2, 3)).view(wanted)
            cfg["input_size"] = (wanted[1], *cfg["input_size"][1:])  # which timm would adapt, but for images only
            report.resized.append(key)
        elif key == f"{first_conv}.weight" and shape[:1] + shape[2:] == wanted[:1] + wanted[2:]:
            report.resized.append(key)
        else:
            misshaped[key] = f"{key} ({list(shape)}, not {list(wanted)})"
    report.inflated = [key for key in report.inflated if key not in misshaped]
    missing = [key for key in expected if key not in weights and key not in replaced + new]
    unexpected = [key for key in weights if key not in expected and key not in replaced]
    problems = {
        "missing keys": missing,
        "unexpected keys": unexpected,
        "keys of another shape": list(misshaped.values()),
    }
    if any(problems.values()):
        share, least = loaded_share(model, report), _least_share.get()
        if share < least or least == 1:
            listed = "; ".join(f"{name}: {_listing(keys)}" for name, keys in problems.items() if keys)
            needed = "" if least == 1 else f", but {100 * least:g} % are needed unless model.from_scratch=true"
            raise ValueError(
                f"the weights of {_source(cfg)} do not fit this {type(model).__name__}; {listed}; "
                f"they hold {100 * share:.1f} % of the backbone's parameters{needed}"
            )
        new += [*missing, *misshaped]
        report.reinitialised += [*missing, *misshaped]
        report.ignored += unexpected
        weights = {key: value for key, value in weights.items() if key not in unexpected}
    resized = [key for key in report.resized if key.endswith("rpb")]
    for keys, change in ((resized, "resized to other neighborhoods"), (left_out, "left out for rotary embeddings")):
        if report.inflated and keys:
            warnings.warn(
                f"this {type(model).__name__} will not answer as the image model whose weights it has, even on a clip "
                f"that stands still: biases of attention were {change} ({_listing(keys, 2)})",
                stacklevel=2,
            )
    return weights | {key: expected[key] for key in new}, report


def unwrap(state_dict: Mapping[str, Any], source: str) -> dict[str, Tensor]:
    """The bare state dict: out of training checkpoints, without the prefixes of wrapping modules.

    Args:
        state_dict: what the file holds.
        source: name of the file, for the error.

    Raises:
        ValueError: there are other things than tensors in it, or a name comes twice.
    """
    for wrapper in _WRAPPERS:
        if isinstance(state_dict, Mapping) and isinstance(state_dict.get(wrapper), Mapping):
            state_dict = state_dict[wrapper]
    if not isinstance(state_dict, Mapping):
        raise ValueError(f"cannot load weights from {source}: it holds no state dict")
    others = [str(key) for key, value in state_dict.items() if not isinstance(value, Tensor)]
    if others:
        raise ValueError(f"{source} holds no state dict, itself or as {' or '.join(_WRAPPERS)}, but {_listing(others)}")
    bare: dict[str, Tensor] = {}
    for key, value in state_dict.items():
        name = _PREFIXES.sub("", key)
        if name in bare:
            raise ValueError(f"{source} holds more than one {name}: with and without the prefix of {key}")
        bare[name] = value
    return bare


def rename(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Hugging Face's names of `Nat*` and `Dinat*` models -> the original ones; other names stay.

    Query, key and value become one `qkv`; `layer_scale_parameters [2, dim]` become `gamma1` and `gamma2`.
    """
    if not any("embeddings.patch_embeddings." in key for key in weights):
        return dict(weights)
    weights = dict(weights)
    for query in [name for name in weights if ".attention.self.query." in name]:
        parts = [query.replace(".query.", f".{part}.") for part in ("query", "key", "value")]
        if all(part in weights for part in parts):
            qkv = query.replace(".attention.self.query.", ".attn.qkv.")
            weights[qkv] = torch.cat([weights.pop(part) for part in parts])
    for name in [name for name in weights if name.endswith(".layer_scale_parameters")]:
        for gamma, row in zip(("gamma1", "gamma2"), weights.pop(name).unbind(), strict=True):
            weights[name.replace("layer_scale_parameters", gamma)] = row.clone()
    for pattern, replacement in _HUGGING_FACE:
        weights = {re.sub(pattern, replacement, name): value for name, value in weights.items()}
    return weights


def infer_sizes(weights: Mapping[str, Tensor], cfg: Any) -> dict[str, Any]:
    """Numbers of classes and input channels that weights are for, as arguments of the model.

    Args:
        weights: by their original names, see `rename`.
        cfg: timm's `PretrainedCfg` of the model.
    """
    head, first_conv = weights.get(f"{cfg.classifier}.weight"), weights.get(f"{cfg.first_conv}.weight")
    sizes = {"num_classes": 0 if head is None else len(head)}
    return sizes if first_conv is None else sizes | {"in_chans": first_conv.shape[1]}


def resize_rpb(rpb: Tensor, size: Iterable[int]) -> Tensor:
    """Biases of one or two axes for another kernel size.

    Args:
        rpb: relative positional biases `[heads, 2 * k_1 - 1, 2 * k_2 - 1]`, resized bicubically, as the 11 x 11 models
            were made, or `[heads, 2 * k - 1]`, linearly.
        size: new extents of the axes.
    """
    mode = "bicubic" if rpb.dim() == 3 else "linear"
    return F.interpolate(rpb[None].float(), tuple(size), mode=mode)[0].to(rpb.dtype)


def _source(cfg: Mapping[str, Any]) -> str:
    if cfg.get("state_dict"):
        return "the given state dict"
    return next((str(cfg[key]) for key in ("file", "hf_hub_id", "url") if cfg.get(key)), "nowhere")


def _reason(error: Exception) -> str:
    if isinstance(error, AttributeError):
        return "it holds no state dict"
    if isinstance(error, _OF_DAMAGE) or isinstance(error.__cause__, pickle.UnpicklingError):
        return "it is damaged, of another format, or holds objects that only unsafe unpickling would restore"
    return str(error) or type(error).__name__


def _listing(keys: list[str], limit: int = 8) -> str:
    return ", ".join(keys[:limit]) + (f" and {len(keys) - limit} more" if len(keys) > limit else "")
