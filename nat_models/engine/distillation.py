"""Knowledge distillation: a frozen teacher's answers as further targets.

Sources: Distilling the Knowledge in a Neural Network, https://arxiv.org/abs/1503.02531 (soft), and Training
data-efficient image transformers & distillation through attention, https://arxiv.org/abs/2012.12877, section 4 (hard).
"""

from collections.abc import Sequence
from typing import Any

import timm
import torch
from timm.data import resolve_model_data_config
from torch import Tensor
from torch.nn import functional as F

from nat_models.names import check_model_name


class Distillation:
    """A teacher and its share in the loss.

    The teacher gets the pixels that the model gets, mixed and erased as they are, normalised by its own mean and
    standard deviation and resized to its own size. This is no module, and copies share the teacher: its weights are in
    no checkpoint, optimiser or average.

    Args:
        num_classes: of the model; the teacher must have as many.
        in_chans: channels of the model's input.
        teacher: name in timm's registry, with its published weights; or `local-dir:...`, as `nat_models.export` writes.
        teacher_kwargs: arguments of `timm.create_model`, for example `pretrained_cfg_overlay: {file: WEIGHTS}`.
        kind: `soft`: the Kullback-Leibler divergence from the teacher's probabilities; `hard`: the cross-entropy with
            the teacher's most likely class.
        alpha: weight of the teacher in the loss (0..1); the labels have the rest.
        temperature: divides the logits of both in the soft kind, whose loss is multiplied by its square.

    Raises:
        ValueError: names the argument.
    """

    def __init__(
        self,
        num_classes: int,
        in_chans: int,
        teacher: str,
        teacher_kwargs: dict[str, Any] | None = None,
        kind: str = "soft",
        alpha: float = 0.5,
        temperature: float = 1.0,
    ) -> None:
        if kind not in ("soft", "hard"):
            raise ValueError(f"model.distillation.kind must be soft or hard, got {kind!r}")
        if not 0 <= alpha <= 1:
            raise ValueError(f"model.distillation.alpha must be in 0..1, got {alpha!r}")
        if not temperature > 0:
            raise ValueError(f"model.distillation.temperature must be positive, got {temperature!r}")
        check_model_name(teacher, "model.distillation.teacher")
        try:
            self.teacher: Any = timm.create_model(teacher, pretrained=True, **(teacher_kwargs or {}))
        except (TypeError, RuntimeError) as error:
            raise ValueError(f"model.distillation.teacher={teacher!r}: {' '.join(str(error).split())}") from error
        if self.teacher.num_classes != num_classes:
            raise ValueError(
                f"model.distillation.teacher={teacher!r} has {self.teacher.num_classes} classes, the data {num_classes}"
            )
        expected = resolve_model_data_config(self.teacher)
        teacher_chans, *size = expected["input_size"]
        if teacher_chans not in (in_chans, 3):
            raise ValueError(
                f"model.distillation.teacher={teacher!r} takes {teacher_chans} channels, but data.in_chans={in_chans}"
            )
        self.teacher.requires_grad_(False).eval()
        self.kind, self.alpha, self.temperature = kind, alpha, temperature
        self._size, self._channels = size, teacher_chans
        self._mean, self._std = expected["mean"], expected["std"]

    def __deepcopy__(self, memo: dict[int, Any]) -> "Distillation":
        return self

    def to(self, device: torch.device) -> None:
        """Moves the teacher."""
        self.teacher.to(device)

    def loss(self, loss: Tensor, logits: Tensor, images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
        """The loss by the labels with the teacher's share.

        Args:
            loss: by the labels, scalar.
            logits: of the model, `[B, num_classes]`.
            images: what it got, `[B, C, *spatial]`.
            mean, std: by which they are normalised, per channel.
        """
        with torch.no_grad():
            answers = self.teacher(self.prepare(images, mean, std)).float()
        logits = logits.float()
        if self.kind == "hard":
            distance = F.cross_entropy(logits, answers.argmax(dim=1))
        else:
            own, target = ((x / self.temperature).log_softmax(dim=1) for x in (logits, answers))
            distance = F.kl_div(own, target, reduction="batchmean", log_target=True) * self.temperature**2
        return (1 - self.alpha) * loss + self.alpha * distance

    def prepare(self, images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
        """Images `[B, C, *spatial]`, normalised by `mean` and `std`, as the teacher takes them; grey ones become RGB.

        Of clips each frame is resized.
        """
        shape = (-1, *[1] * (images.ndim - 2))
        old_mean, old_std, new_mean, new_std = (
            torch.tensor(values, dtype=torch.float32).view(shape).to(images.device, non_blocking=True)
            for values in (mean, std, self._mean, self._std)
        )
        images = (images.float() * old_std + old_mean).expand(-1, self._channels, *images.shape[2:])
        if list(images.shape[-2:]) != self._size:
            frames = images.movedim(1, -3)  # of clips; images stay as they are
            resized = F.interpolate(frames.flatten(0, -4), self._size, mode="bicubic", antialias=True)
            images = resized.unflatten(0, frames.shape[:-3]).movedim(-3, 1)
        return (images - new_mean) / new_std
