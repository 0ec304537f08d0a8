"""The pictures of runs and predictions, as PNG files."""

import csv
import textwrap
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import torch
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize, PowerNorm
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator
from torch import Tensor
from torch.nn import functional as F

from nat_models.attention import LayerAttention
from nat_models.engine.callbacks import Mistake

TRAIN_COLOR, VAL_COLOR = "tab:blue", "tab:orange"
QUERY_COLOR = "red"
DPI = 150
MAX_BARS = 40
WHITE = 1000.0  # in normalised pixels: whiter than any


def read_epochs(metrics_csv: Path) -> dict[str, list[tuple[int, float]]]:
    """Metric name -> `(epoch, value)` of each value that Lightning's CSV logger recorded; epochs count from 1."""
    series: dict[str, list[tuple[int, float]]] = defaultdict(list)
    with open(metrics_csv, newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            for name, value in row.items():
                if value and name not in ("epoch", "step"):
                    series[name].append((int(float(row["epoch"])) + 1, float(value)))
    return series


def plot_curves(metrics_csv: Path, path: Path) -> None:
    """Loss and top-1 accuracy of training and validation over the epochs."""
    series = read_epochs(metrics_csv)
    figure = Figure(figsize=(10, 4), layout="constrained")
    loss_axes, accuracy_axes = figure.subplots(1, 2)
    for axes, metric, scale in ((loss_axes, "loss", 1), (accuracy_axes, "top1", 100)):
        for name, label, color in (
            (f"train/{metric}_epoch", "training (augmented)", TRAIN_COLOR),
            (f"val/{metric}", "validation", VAL_COLOR),
        ):
            epochs = [epoch for epoch, _ in series[name]]
            values = [value * scale for _, value in series[name]]
            axes.plot(epochs, values, label=label, color=color, marker="o" if len(epochs) < 3 else None)
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
        axes.legend()
    loss_axes.set_title("Loss")
    loss_axes.set_ylabel("cross-entropy")
    accuracy_axes.set_title("Top-1 accuracy")
    accuracy_axes.set_ylabel("top-1 (%)")
    if series["val/top1"]:
        epoch, best = max(series["val/top1"], key=lambda point: (point[1], -point[0]))
        accuracy_axes.plot(epoch, 100 * best, "o", color=VAL_COLOR)
        accuracy_axes.set_title(f"Top-1: best validation {100 * best:.2f} % (epoch {epoch})")
    figure.savefig(path, dpi=DPI)


def plot_confusion(confusion: Tensor, class_names: Sequence[str], path: Path) -> None:
    """Confusion matrix `[num_classes, num_classes]`, true class by predicted class; counts where they are legible."""
    num_classes = len(confusion)
    correct, total = int(confusion.diagonal().sum()), int(confusion.sum())
    shares = confusion / confusion.sum(dim=1, keepdim=True).clamp(min=1)
    side = min(4 + 0.35 * num_classes, 14)
    figure = Figure(figsize=(side + 1, side), layout="constrained")
    axes = figure.subplots()
    # Single mistakes among many images stay visible because the colour follows the square root of the share.
    image = axes.imshow(shares.numpy(), cmap="Blues", norm=PowerNorm(0.5, vmin=0, vmax=1))
    figure.colorbar(image, ax=axes, label="share of the true class", fraction=0.046, pad=0.03)
    axes.set_title(f"Confusion matrix: {total - correct} of {total} wrong, top-1 {100 * correct / max(total, 1):.2f} %")
    axes.set_xlabel("predicted class")
    axes.set_ylabel("true class")
    if num_classes <= 40:
        rotation = 0 if max(map(len, class_names)) <= 3 else 90
        axes.set_xticks(range(num_classes), [_shorten(name, 20) for name in class_names], rotation=rotation)
        axes.set_yticks(range(num_classes), [_shorten(name, 20) for name in class_names])
        for row, column in confusion.nonzero().tolist():
            color = "white" if shares[row, column] > 0.3 else "black"
            axes.text(column, row, str(int(confusion[row, column])), ha="center", va="center", color=color, fontsize=8)
    figure.savefig(path, dpi=DPI)


def plot_per_class(label_counts: Tensor, class_names: Sequence[str], path: Path) -> None:
    """Accuracy of each class as bars, worst first; of more than 40 classes the 40 worst.

    Args:
        label_counts: `[num_classes, 2]`: samples of each class and how many of them were classified correctly.
        class_names: in label order.
        path: PNG file to write.
    """
    present = [label for label, (total, _) in enumerate(label_counts.tolist()) if total]
    accuracy = {label: 100 * label_counts[label, 1].item() / label_counts[label, 0].item() for label in present}
    shown = sorted(present, key=lambda label: accuracy[label])[:MAX_BARS]
    mean = sum(accuracy.values()) / max(len(present), 1)
    figure = Figure(figsize=(8, 1.5 + 0.25 * len(shown)), layout="constrained")
    axes = figure.subplots()
    bars = axes.barh(range(len(shown)), [accuracy[label] for label in shown], color=VAL_COLOR)
    counts = [f"{label_counts[label, 1]}/{label_counts[label, 0]}" for label in shown]
    # On white, lest the line of the mean run through them.
    axes.bar_label(bars, counts, padding=3, fontsize=8, bbox={"color": "white", "pad": 1}, zorder=3)
    axes.axvline(mean, color="black", linewidth=1, linestyle="--")
    axes.set_yticks(range(len(shown)), [_shorten(class_names[label], 30) for label in shown])
    axes.invert_yaxis()
    axes.set_xlim(0, 110)
    axes.set_xlabel("accuracy (%)")
    which = f"the {len(shown)} worst of {len(present)} classes" if len(shown) < len(present) else "all classes"
    axes.set_title(f"Accuracy of {which}; mean of all {mean:.2f} %")
    figure.savefig(path, dpi=DPI)


def plot_batch(
    images: Tensor,
    labels: Sequence[int],
    class_names: Sequence[str],
    mean: Sequence[float],
    std: Sequence[float],
    path: Path,
) -> None:
    """Contact sheet of a batch as the model gets it: a row for each clip, from left to right in time; images in a grid.

    Args:
        images: `[B, C, H, W]` or `[B, C, T, H, W]`, normalised; of many the first 32, or the first 8 clips.
        labels: of each.
        class_names: in label order.
        mean, std: of the normalisation, to undo it.
        path: PNG file to write; its folder is created if missing.
    """
    is_clips = images.ndim == 5
    images = images[: 8 if is_clips else 32].float().cpu()
    if is_clips:
        frames = torch.linspace(0, images.shape[2] - 1, min(images.shape[2], 8)).round().long()
        images = F.pad(images[:, :, frames], (0, 1), value=WHITE).permute(0, 1, 3, 2, 4).flatten(3, 4)  # side by side
    columns = 1 if is_clips else min(8, len(images))
    rows = -(-len(images) // columns)
    size = (9.0, 1.5 * rows) if is_clips else (1.4 * columns + 0.5, 1.7 * rows)
    figure = Figure(figsize=size, layout="constrained")
    for axes in figure.subplots(rows, columns, squeeze=False).flat:
        axes.axis("off")
    for axes, image, label in zip(figure.axes, images, labels, strict=False):
        axes.imshow(_pixels(image, mean, std).numpy(), cmap="gray", vmin=0, vmax=1)
        axes.set_title(_shorten(class_names[label], 60 if is_clips else 16), fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=DPI)


def plot_mistakes(
    mistakes: Sequence[Mistake],
    num_mistakes: int,
    class_names: Sequence[str],
    mean: Sequence[float],
    std: Sequence[float],
    path: Path,
) -> None:
    """Grid of misclassified images with true and predicted class; of a clip, four frames in reading order.

    Args:
        mistakes: those to show, most confident first.
        num_mistakes: how many there are in all.
        class_names: in label order.
        mean, std: of the normalisation, to undo it.
        path: PNG file to write.
    """
    columns = min(max(len(mistakes), 2), 5)
    rows = max(-(-len(mistakes) // columns), 1)
    figure = Figure(figsize=(2.4 * columns, 2.8 * rows + 0.5), layout="constrained")
    for axes in figure.subplots(rows, columns, squeeze=False).flat:
        axes.axis("off")
    for axes, mistake in zip(figure.axes, mistakes, strict=False):
        axes.imshow(_pixels(_frames_in_one(mistake.image), mean, std).numpy(), cmap="gray", vmin=0, vmax=1)
        true, predicted = (_shorten(class_names[i], 24) for i in (mistake.label, mistake.predicted))
        axes.set_title(f"true: {true}\npredicted: {predicted} ({100 * mistake.probability:.0f} %)", fontsize=9)
    title = f"{num_mistakes} mistake{'' if num_mistakes == 1 else 's'}, most confident first"
    figure.suptitle(title if mistakes else "No mistakes")
    figure.savefig(path, dpi=DPI)


def plot_attention(
    image: Tensor,
    mean: Sequence[float],
    std: Sequence[float],
    layers: dict[str, LayerAttention],
    queries: Sequence[tuple[int, int]],
    title: str,
    path: Path,
) -> None:
    """Where queries attend: a row for each query; the image, then a column for each layer.

    The query's token is framed. Tokens of its neighborhood have the colour of their attention, mean over the heads, as
    a multiple of what each would get if all got the same; the scale is one for all panels.

    Args:
        image: `[C, H, W]`, normalised.
        mean, std: of the normalisation, to undo it.
        layers: captured with this image as first sample, by name.
        queries: pixels (row, column).
        title: of the picture.
        path: PNG file to write; its folder is created if missing.
    """
    height, width = image.shape[1:]
    pixels = _pixels(image, mean, std)
    attention = [[_relative_attention(layer, height, width, query) for layer in layers.values()] for query in queries]
    colors = ScalarMappable(Normalize(0, max(float(x.nan_to_num().max()) for row in attention for x in row)), "viridis")
    columns = 1 + len(layers)
    panel = min(2.3, 20 / columns)
    figure = Figure(figsize=(panel * columns + 1, panel * height / width * len(queries) + 1), layout="constrained")
    panels = figure.subplots(len(queries), columns, squeeze=False)
    extent = (0, width, height, 0)
    for (row, column), row_panels, row_attention in zip(queries, panels, attention, strict=True):
        first, *others = row_panels
        first.imshow(pixels.numpy(), cmap="gray", vmin=0, vmax=1, extent=extent)
        first.plot(column + 0.5, row + 0.5, "+", color=QUERY_COLOR, markersize=10, markeredgewidth=2, clip_on=False)
        first.set_ylabel(f"query at {row}, {column}")
        for axes, layer, relative in zip(others, layers.values(), row_attention, strict=True):
            axes.imshow(0.4 * pixels.mean(-1).numpy(), cmap="gray", vmin=0, vmax=1, extent=extent)
            axes.imshow(relative.numpy(), cmap=colors.cmap, norm=colors.norm, extent=extent, alpha=0.75)
            token = _token(layer, height, width, (row, column))
            high, wide = height / layer.spatial[0], width / layer.spatial[1]
            frame = Rectangle((token[1] * wide, token[0] * high), wide, high)
            axes.add_patch(frame)
            frame.set(fill=False, edgecolor=QUERY_COLOR, linewidth=1.5, clip_on=False)
        for axes in row_panels:
            axes.set(xticks=[], yticks=[], xlim=(0, width), ylim=(height, 0))
    panels[0, 0].set_title("image", fontsize=8)
    for axes, (name, layer) in zip(panels[0, 1:], layers.items(), strict=True):
        kernel, dilation = (" x ".join(str(getattr(x, key)) for x in layer.axes) for key in ("kernel_size", "dilation"))
        dilated = "" if all(axis.dilation == 1 for axis in layer.axes) else f", dilation {dilation}"
        map_size = " x ".join(map(str, layer.spatial))
        axes.set_title(f"{name.removesuffix('.attn')}\n{kernel}{dilated} on {map_size}", fontsize=8)
    figure.colorbar(colors, ax=panels, label="attention / uniform attention", fraction=0.02, pad=0.01)
    figure.suptitle(_literal(title))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=DPI)


def _literal(text: str) -> str:
    """Text for Matplotlib, which takes what is between two dollar signs for a formula."""
    return text.replace("$", r"\$")


def _shorten(name: str, width: int) -> str:
    return _literal(textwrap.shorten(name, width))


def _token(layer: LayerAttention, height: int, width: int, pixel: tuple[int, int]) -> tuple[int, int]:
    """The token of a layer's map at a pixel of an image."""
    return pixel[0] * layer.spatial[0] // height, pixel[1] * layer.spatial[1] // width


def _relative_attention(layer: LayerAttention, height: int, width: int, query: tuple[int, int]) -> Tensor:
    """Attention over uniform attention `[*layer.spatial]`, mean over the heads; NaN outside the neighborhood."""
    token = _token(layer, height, width, query)
    attends = layer.neighborhood(token)
    relative = layer.probabilities(token)[0].mean(0) * attends.sum()
    rows, columns = layer.spatial
    return relative.masked_fill(~attends, float("nan"))[:rows, :columns].cpu()


def _frames_in_one(image: Tensor) -> Tensor:
    """Four frames of a clip `[C, T, H, W]`, first to last, with lines between; images stay as they are."""
    if image.ndim == 3:
        return image
    frames = F.pad(image[:, torch.linspace(0, image.shape[1] - 1, 4).round().long()], (0, 1, 0, 1), value=WHITE)
    return frames.unflatten(1, (2, 2)).permute(0, 1, 3, 2, 4).flatten(3, 4).flatten(1, 2)


def _pixels(image: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """A normalised image `[C, *spatial]` as it was, `[*spatial, C]` in 0..1."""
    shape = (-1, *[1] * (image.ndim - 1))
    pixels = image * torch.tensor(std).view(shape) + torch.tensor(mean).view(shape)
    return pixels.clamp(0, 1).movedim(0, -1)
