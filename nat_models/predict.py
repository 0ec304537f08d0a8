"""`python -m nat_models.predict MODEL_OR_RUN INPUT...`: the five most likely classes of images or videos, with bars.

MODEL is a name in timm's registry, with its published weights or those of `--checkpoint FILE`; RUN a run folder of
`train.py`, or a checkpoint in one. INPUT is a file, or a folder of them: images or videos, as the model takes.
`--attention` also draws where queries attend in an image, `--annotate` writes a copy of a video with its classes.
"""

import argparse
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import timm
import torch
from omegaconf import OmegaConf
from PIL import Image, ImageOps
from rich.bar import Bar
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from timm.data import ImageNetInfo, get_img_extensions, infer_imagenet_subset, resolve_input_data_config
from timm.utils import natural_key
from torch import Tensor, nn

from nat_models.attention import LayerAttention, capture_attention
from nat_models.checkpoints import infer_sizes, read_file, rename, unwrap
from nat_models.convert import add_model_kwargs_option, check_model_kwargs
from nat_models.data import UndecodableImageError
from nat_models.data.datasets import DECODE_ERRORS
from nat_models.data.device_transforms import DeviceTransform
from nat_models.data.transforms import create_transform
from nat_models.data.video.annotated_copy import AnnotatedCopy, copy_paths, read_frames
from nat_models.data.video.annotations import VIDEO_EXTENSIONS, LabelledVideo
from nat_models.data.video.dataset import EvaluationViews, VideoOpener
from nat_models.data.video.decoding import FRAME_EXTENSIONS
from nat_models.data.video.sampling import Sampling
from nat_models.data.video.transforms import evaluation_transform
from nat_models.engine.checkpoint import find_run
from nat_models.engine.evaluation import load_classifier
from nat_models.engine.plots import plot_attention
from nat_models.engine.run_folder import read_data_config
from nat_models.names import check_model_name

TOP = 5
IMAGE_EXTENSIONS = get_img_extensions(as_set=True) | {".bmp", ".gif", ".tif", ".tiff", ".webp"}


@dataclass(frozen=True)
class Views:
    """How videos are looked at, as `VideoDataModule` does in evaluation.

    Attributes:
        sampling: how clips are taken.
        clips, crops: of each video.
        decoder, frame_rate: see `open_video`.
    """

    sampling: Sampling
    clips: int = 1
    crops: int = 1
    decoder: str = "pyav"
    frame_rate: float = 30.0


@dataclass
class Predictor:
    """A classifier with its classes and the way it takes images.

    Attributes:
        model: in eval mode.
        class_names: in label order.
        data_config: timm's: `input_size`, `mean`, `std`, `interpolation`, `crop_pct`.
        views: of videos, whose mean decides; None for models of images.
    """

    model: nn.Module
    class_names: Sequence[str]
    data_config: dict[str, Any]
    views: Views | None = None

    def __post_init__(self) -> None:
        if not self.class_names:
            raise ValueError("the model has no classifier: its weights have no head")
        in_chans, *size = self.data_config["input_size"]
        if in_chans not in (1, 3):
            raise ValueError(f"the model takes images of {in_chans} channels, but files hold 1 (grey) or 3 (RGB)")
        for key in ("mean", "std"):
            if len(self.data_config[key]) != in_chans:  # timm describes a grey model by the colours' values
                self.data_config[key] = [fmean(self.data_config[key])] * in_chans
        self.model.eval()
        settings = {key: value for key, value in self.data_config.items() if key != "input_size"}
        self.transform: Callable[[Image.Image], Tensor] = create_transform(tuple(size), **settings)

    def read(self, path: Path) -> Tensor:
        """A file as the model takes it: an image `[1, in_chans, H, W]`, or a video's views `[views, 3, T, H, W]`.

        Raises:
            UndecodableImageError, VideoError: the file cannot be decoded.
        """
        if self.views is not None:
            return self._read_views(path, self.views)
        mode = "L" if self.data_config["input_size"][0] == 1 else "RGB"
        try:
            with Image.open(path) as image:
                return self.transform(upright(image).convert(mode))[None]
        except DECODE_ERRORS as error:
            raise UndecodableImageError(f"cannot decode {str(path)!r}: {error}") from error

    def _read_views(self, path: Path, views: Views) -> Tensor:
        _, *size = self.data_config["input_size"]
        settings = {key: self.data_config[key] for key in ("interpolation", "crop_pct")}
        transform = evaluation_transform((size[0], size[1]), crops=views.crops, **settings)
        opener = VideoOpener(views.decoder, views.frame_rate)
        video = LabelledVideo(str(path), label=0)
        pixels = EvaluationViews([video], opener, views.sampling, transform, views.clips)[0][0]
        normalize = DeviceTransform(self.data_config["mean"], self.data_config["std"], spatial_axes=3)
        return normalize([pixels], None)[0]

    @torch.inference_mode()
    def predict(self, pixels: Tensor) -> list[tuple[str, float]]:
        """The most likely classes of what `read` returned, with their probabilities: of views the mean's."""
        device = next(self.model.parameters()).device
        probabilities = [self.model(view[None].to(device)).cpu().double().softmax(-1)[0] for view in pixels]
        return self.most_likely(torch.stack(probabilities).mean(0))

    def most_likely(self, probabilities: Tensor) -> list[tuple[str, float]]:
        """The first five classes of `probabilities [num_classes]`, most likely first."""
        values, labels = probabilities.topk(min(TOP, len(self.class_names)))
        return [(self.class_names[label], value) for label, value in zip(labels.tolist(), values.tolist(), strict=True)]


def upright(image: Image.Image) -> Image.Image:
    """As its camera says it was held, and with grey values of 16 bits brought to 8, which Pillow would cut off."""
    image = ImageOps.exif_transpose(image)
    return image.point(lambda value: value / 256).convert("L") if image.mode.startswith("I") else image


def load_run(path: str | Path) -> Predictor:
    """The predictor of a run folder of `train.py` (its best checkpoint), or of a checkpoint in one.

    Raises:
        FileNotFoundError, ValueError: it is none.
    """
    run_dir, checkpoint = find_run(path)
    module, class_names = load_classifier(checkpoint)
    data = OmegaConf.load(run_dir / "config.yaml").data
    views = None
    if "sampling" in data:
        decoding = dict(decoder=data.decoder, frame_rate=data.frame_rate)
        views = Views(Sampling(**data.sampling), **(data.test_views or {}), **decoding)
    return Predictor(module.model, class_names, read_data_config(run_dir), views)


def load_model(name: str, checkpoint: str | Path | None = None, **model_kwargs: Any) -> Predictor:
    """The predictor of a model in timm's registry.

    Args:
        name: registered name, `hf-hub:...` or `local-dir:...`.
        checkpoint: file with its weights, of any form that `nat_models.checkpoints` reads; None takes the published
            ones.
        model_kwargs: arguments of the model that differ from the named one's.

    Raises:
        FileNotFoundError: no such checkpoint.
        ValueError: there is no such model, the weights do not fit it or are for other classes, or a name with a
            source has a `checkpoint`.
    """
    check_model_name(name, "model")
    check_model_kwargs(model_kwargs)
    weights: dict[str, Any] = {}
    if checkpoint is not None:
        if ":" in name:
            raise ValueError(f"--checkpoint is for registered models, {name!r} has weights of its own")
        content = read_file(checkpoint)
        if "hyper_parameters" in content:
            raise ValueError(f"{str(checkpoint)!r} was written by train.py: give it, or its run folder, as the model")
        state_dict = rename(unwrap(content, str(checkpoint)))
        weights = {"pretrained_cfg_overlay": dict(file=str(checkpoint))}
        weights |= infer_sizes(state_dict, timm.get_pretrained_cfg(name))
    try:
        model = timm.create_model(name, pretrained=True, **weights | model_kwargs)
    except TypeError as error:
        raise ValueError(f"model_kwargs={model_kwargs} do not fit {name}: {error}") from error
    cfg: dict[str, Any] = model.pretrained_cfg  # type: ignore[assignment]
    if model.num_classes not in (0, cfg["num_classes"]):
        raise ValueError(
            f"the weights are for {cfg['num_classes']} classes: num_classes={model.num_classes} has no head"
        )
    num_frames = getattr(model, "num_frames", None)  # of video models, which the recipes train with stride 2
    views = None if num_frames is None else Views(Sampling(num_frames, stride=2), clips=4, crops=3)
    return Predictor(model, _class_names(model), resolve_input_data_config(model), views)


def _class_names(model: nn.Module) -> list[str]:
    """From the description of the weights, ImageNet's by the number of classes, else the labels."""
    num_classes: int = model.num_classes  # type: ignore[assignment]
    names = model.pretrained_cfg.get("label_names")  # type: ignore[union-attr, operator]
    if names is not None and len(names) == num_classes:
        return list(names)
    subset = infer_imagenet_subset(model)
    if subset is None:
        return [str(label) for label in range(num_classes)]
    info = ImageNetInfo(subset)
    return [info.index_to_description(label) for label in range(num_classes)]


def find_inputs(paths: Iterable[str | Path], of_videos: bool) -> list[Path]:
    """The files given, and all images, or videos, in and below the folders given.

    A folder that holds images only is, for a model of videos, a video of these frames.

    Raises:
        FileNotFoundError: a path does not exist.
        ValueError: a folder holds neither, or a file is of the other kind.
    """
    extensions = set(VIDEO_EXTENSIONS) if of_videos else IMAGE_EXTENSIONS
    kind, other = ("videos", "images") if of_videos else ("images", "videos")
    found: list[Path] = []
    for path in map(Path, paths):
        if path.is_dir():
            files = [file for file in path.rglob("*") if file.suffix.lower() in extensions and file.is_file()]
            if of_videos and not files and any(file.suffix.lower() in FRAME_EXTENSIONS for file in path.iterdir()):
                files = [path]
            if not files:
                raise ValueError(f"there are no {kind} ({', '.join(sorted(extensions))}) in the folder {str(path)!r}")
            found += sorted(files, key=lambda file: natural_key(str(file)))
        elif path.suffix.lower() in (IMAGE_EXTENSIONS if of_videos else VIDEO_EXTENSIONS):
            raise ValueError(f"the model takes {kind}, not {other} such as {str(path)!r}")
        elif path.is_file():
            found.append(path)
        else:
            raise FileNotFoundError(f"there is no file {str(path)!r}")
    return found


def attention_files(target: str | Path, images: Sequence[Path]) -> list[Path]:
    """Where each image's picture goes: `target` itself if it ends in `.png`, else `target/NAME_attention.png`.

    Raises:
        ValueError: two images would share a picture, or `target` is a file of another kind.
    """
    target = Path(target)
    if target.suffix != ".png" and (target.suffix.lower() in IMAGE_EXTENSIONS or target.is_file()):
        raise ValueError(f"--attention must be a folder or a file ending in .png, got {str(target)!r}")
    files = [target if target.suffix == ".png" else target / f"{image.stem}_attention.png" for image in images]
    shared = next((file for file in files if files.count(file) > 1), None)
    if shared is not None:
        raise ValueError(f"--attention={str(target)!r}: more than one image would be drawn into {str(shared)!r}")
    return files


def draw_attention(
    predictor: Predictor, image: Tensor, queries: Sequence[tuple[int, int]], title: str, path: Path
) -> None:
    """Draws where queries of an image `[1, in_chans, H, W]` attend, see `plot_attention`.

    Raises:
        ValueError: the model has no neighborhood attention, or a query lies outside the image.
    """
    height, width = image.shape[2:]
    for row, column in queries:
        if not (0 <= row < height and 0 <= column < width):
            raise ValueError(f"--queries: {row},{column} is not in the image of {height} x {width} that the model gets")
    with capture_attention(predictor.model) as captured:
        predictor.predict(image)
    if not captured:
        raise ValueError("--attention needs a model with neighborhood attention (python -m nat_models.list)")
    mean, std = predictor.data_config["mean"], predictor.data_config["std"]
    plot_attention(image[0], mean, std, _shown_layers(captured), queries, title, path)


def _shown_layers(captured: dict[str, LayerAttention], most: int = 4) -> dict[str, LayerAttention]:
    """Of each stage the last layer of each dilation; of `most` stages, evenly spread, where there are more."""
    stages: dict[str, dict[tuple[int, ...], str]] = {}
    for name, layer in captured.items():
        dilation = tuple(axis.dilation for axis in layer.axes)
        stages.setdefault(name.partition(".blocks.")[0], {})[dilation] = name
    shown = list(stages.values())
    if len(shown) > most:
        shown = [shown[len(shown) * (i + 1) // most - 1] for i in range(most)]
    return {name: captured[name] for stage in shown for name in stage.values()}


def print_prediction(path: Path, prediction: Sequence[tuple[str, float]]) -> None:
    """The classes of one image with bars."""
    table = Table(show_header=False, box=None)
    table.add_column(justify="right")
    table.add_column(width=30)
    table.add_column()
    for name, probability in prediction:
        table.add_row(f"{100 * probability:.1f} %", Bar(1, 0, probability, color="cyan"), escape(name))
    console = Console(width=None if Console().is_terminal else 120, highlight=False)
    console.print(escape(str(path)), style="bold", soft_wrap=True)
    console.print(table)
    console.print()


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """The options beside MODEL_OR_RUN that `load` wants."""
    parser.add_argument("--checkpoint", metavar="FILE", help="weights of MODEL (default: download the published ones)")
    add_model_kwargs_option(parser)
    parser.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", help="(default: %(default)s)"
    )


def add_annotate_option(parser: argparse.ArgumentParser) -> None:
    """`--annotate`, for `copy_path`."""
    parser.add_argument(
        "--annotate", nargs="?", const=".", metavar="PATH",
        help="also write an annotated copy of the video, to PATH: an .mp4 file, or a folder (default: the current one)",
    )  # fmt: skip


def load(options: argparse.Namespace) -> Predictor:
    """The predictor of `options.model`, a run if there is such a path and else a registered model, on its device.

    Raises:
        FileNotFoundError, ValueError: as `load_run` and `load_model`, or options that do not go with a run.
    """
    if not Path(options.model).exists():
        predictor = load_model(options.model, options.checkpoint, **options.model_kwargs)
    elif options.checkpoint or options.model_kwargs:
        raise ValueError(f"--checkpoint and --model-kwargs are for registered models, {options.model!r} is a run")
    elif (Path(options.model) / "config.json").is_file():
        raise ValueError(f"{options.model!r} holds a model in timm's format: give local-dir:{options.model}")
    else:
        predictor = load_run(options.model)
    try:
        predictor.model.to(options.device)
    except (RuntimeError, AssertionError) as error:  # no such device, none of that name, or none in this build
        raise ValueError(f"--device={options.device!r} cannot be used: {str(error).splitlines()[0]}") from None
    return predictor


def parse_query(text: str) -> tuple[int, int]:
    """`row,col` -> `(row, col)`."""
    try:
        row, column = map(int, text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not ROW,COLUMN in pixels, such as 112,40") from None
    return row, column


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m nat_models.predict", description="Classifies images and videos.")
    parser.add_argument("model", metavar="MODEL_OR_RUN", help="registered name, or run folder of train.py")
    parser.add_argument("inputs", nargs="+", metavar="INPUT", help="image or video file, or folder that holds some")
    parser.add_argument(
        "--attention", nargs="?", const=".", metavar="PATH",
        help="also draw where queries attend, into PATH: a .png file, or a folder (default: the current one)",
    )  # fmt: skip
    parser.add_argument(
        "--queries", nargs="+", type=parse_query, metavar="ROW,COLUMN",
        help="pixels of the image as the model gets it (default: the centre, the upper right, and the lower left edge)",
    )  # fmt: skip
    add_annotate_option(parser)
    add_model_options(parser)
    options = parser.parse_args(arguments)
    if options.queries and options.attention is None:
        parser.error("--queries needs --attention")
    return options


def main(arguments: list[str] | None = None) -> None:
    """Prints predictions, image by image; exits with status 2 and one line for what the user can correct."""
    options = parse_arguments(arguments)
    try:
        missing = next((path for path in options.inputs if not Path(path).exists()), None)
        if missing is not None:
            raise FileNotFoundError(f"there is no file {missing!r}")
        predictor = load(options)
        inputs = find_inputs(options.inputs, predictor.views is not None)
        pictures, copies = [], []
        if options.attention is not None:
            if predictor.views is not None:
                raise ValueError("--attention is for models of images")
            pictures = attention_files(options.attention, inputs)
        if options.annotate is not None:
            if predictor.views is None:
                raise ValueError("--annotate is for models of videos")
            copies = copy_paths(options.annotate, inputs)
        for i, path in enumerate(inputs):
            pixels = predictor.read(path)
            prediction = predictor.predict(pixels)
            print_prediction(path, prediction)
            if pictures:
                height, width = pixels.shape[2:]
                default = [(height // 2, width // 2), (height // 4, 3 * width // 4), (3 * height // 4, 0)]
                (name, probability), *_ = prediction
                title = f"{path.name}: {name} ({100 * probability:.0f} %)"
                draw_attention(predictor, pixels, options.queries or default, title, pictures[i])
                print(f"attention drawn into {pictures[i]}\n")
            if copies:
                with AnnotatedCopy(copies[i]) as copy:
                    for frame in read_frames(str(path)):
                        copy.write(frame, prediction)
                print(f"annotated copy in {copies[i]}\n")
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
