"""The Lightning module for classification: any timm model, timm's optimisers, schedules, mixup and cutmix."""

from functools import partial
from pathlib import Path
from typing import Any

import lightning
import timm
import torch
from lightning.pytorch.plugins import Precision
from lightning.pytorch.utilities import GradClipAlgorithmType
from timm.optim import create_optimizer_v2, list_optimizers
from timm.scheduler import create_scheduler_v2
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.nn import functional as F
from torchmetrics import Metric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy

from nat_models.checkpoints import least_share
from nat_models.data.device_transforms import Mixup, batch_generator
from nat_models.data.seeding import BATCH, run_seed, seed_generators
from nat_models.engine.distillation import Distillation
from nat_models.engine.metrics import Mean
from nat_models.engine.position import Position
from nat_models.engine.sharding import shard
from nat_models.names import check_model_name
from nat_models.settings import check_choice, check_number, check_settings

LEAST_SHARE = 0.95
TRAIN_METRICS = ("train_loss", "train_top1")
COMPILE_MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")
"""Of `torch.compile`."""
SCHEDULES = ("cosine", "tanh", "step", "multistep", "poly", "wsd", "rsqrt", "constant")
"""Those of timm that step once an optimiser step."""
FUSED_OPTIMIZERS = ("adam", "adamw")
"""Those that are fused on a GPU, unless settings say otherwise. Fused SGD does not take sharded parameters."""


class ClassificationModule(lightning.LightningModule):
    """Trains and evaluates a timm classifier.

    All arguments are plain values, so that `load_from_checkpoint(path, weights_only=True)` needs neither Hydra nor the
    data. With `EMAWeightAveraging` on, validation uses the averaged weights and a checkpoint's `state_dict` holds them;
    the weights that the optimiser steps are in `current_model_state`.

    Args:
        model_name: name in timm's registry (`nat_mini`, ...), or `hf-hub:...`, `local-dir:...`.
        num_classes: outputs of the classifier.
        class_names: their names in label order, kept for evaluation and prediction.
        in_chans: channels of the input.
        model_kwargs: further arguments of `timm.create_model` (`drop_path_rate`, `depths`, ...).
        pretrained: start from the published weights, or from those of `model_kwargs.pretrained_cfg_overlay.file`. They
            must hold 95 % of the parameters of the backbone; timm's own models take only weights that fit altogether.
        init_from_image: weights of an image model that `pretrained` inflates for the video model, a file or the name of
            a published model (`nat_tiny`, `dinat_large.in22k_ft_in1k`); None: those of the video model's own size.
        from_scratch: start with what fits of them, however little that is. This, `pretrained` and `init_from_image` are
            not kept in checkpoints, which bring their own weights.
        optimizer: arguments of `timm.optim.create_optimizer_v2` (`opt`, `lr`, `weight_decay`, `layer_decay`, ...). One-
            dimensional parameters, biases and the model's `no_weight_decay()` are not decayed. `backbone_lr_factor`
            scales the learning rate of all but the classifier, on top of `layer_decay`. Adam and AdamW are `fused` on a
            GPU, except with fp16, unless it or `foreach` is given.
        schedule: arguments of `timm.scheduler.create_scheduler_v2` (`sched`, `warmup_epochs`, `cooldown_epochs`,
            `warmup_lr`, `min_lr`, ...); steps once an optimiser step and ends with `trainer.max_epochs`.
        mixup: arguments of `Mixup` (`mixup_alpha`, `cutmix_alpha`, `prob`, `switch_prob`, `mode`) or None.
        label_smoothing: weight of the uniform distribution in the training target.
        distillation: arguments of `Distillation` but the sizes, or None. Not kept in checkpoints.
        compile: run the model through `torch.compile`: whether, or one of `COMPILE_MODES`. "reduce-overhead" replays
            CUDA graphs, which pays where the host cannot launch kernels as fast as the GPU runs them.

    Raises:
        ValueError: unknown model name (with the nearest ones), arguments that the model, `Mixup` or `Distillation` does
            not take, weights that do not fit, or unknown way to compile.
    """

    def __init__(
        self,
        model_name: str,
        num_classes: int,
        class_names: list[str] | None = None,
        in_chans: int = 3,
        model_kwargs: dict[str, Any] | None = None,
        pretrained: bool = False,
        init_from_image: str | None = None,
        from_scratch: bool = False,
        optimizer: dict[str, Any] | None = None,
        schedule: dict[str, Any] | None = None,
        mixup: dict[str, Any] | None = None,
        label_smoothing: float = 0.0,
        distillation: dict[str, Any] | None = None,
        compile: bool | str = False,
    ) -> None:
        if not isinstance(compile, bool) and compile not in COMPILE_MODES:
            raise ValueError(f"model.compile={compile}: must be true, false or one of {', '.join(COMPILE_MODES)}")
        check_number("model.label_smoothing", label_smoothing, 0, 1)
        check_settings("model.mixup", mixup or {}, Mixup, given=("num_classes", "label_smoothing"))
        if distillation:
            check_settings("model.distillation", distillation, Distillation, given=("num_classes", "in_chans"))
        super().__init__()
        self.save_hyperparameters(ignore=["pretrained", "init_from_image", "from_scratch", "distillation"])
        check_model_name(model_name)
        sizes: dict[str, Any] = {"num_classes": num_classes, "in_chans": in_chans}
        if init_from_image is not None:
            if not pretrained:
                raise ValueError(f"model.init_from_image={init_from_image!r} needs model.pretrained=true")
            if (model_kwargs or {}).get("pretrained_cfg_overlay"):
                raise ValueError(
                    "model.init_from_image and model.model_kwargs.pretrained_cfg_overlay both name weights to start "
                    "from; one must be null"
                )
            model_kwargs = {**(model_kwargs or {}), "pretrained_cfg_overlay": _image_weights(init_from_image)}
        try:
            with least_share(0.0 if from_scratch else LEAST_SHARE):
                self.model = timm.create_model(model_name, pretrained=pretrained, **sizes, **(model_kwargs or {}))
        except TypeError as error:
            raise ValueError(f"model.model_kwargs={model_kwargs} does not fit {model_name}: {error}") from error
        except RuntimeError as error:  # of timm's own models
            if not pretrained:
                raise
            raise ValueError(f"model.pretrained=true: {' '.join(str(error).split())}") from error
        if init_from_image is not None and not getattr(getattr(self.model, "load_report", None), "inflated", None):
            raise ValueError(
                f"model.init_from_image={init_from_image!r} must be weights of images, and model.model_name="
                f"{model_name} a video model; other weights are for model.model_kwargs.pretrained_cfg_overlay.file"
            )
        self._start = Position(0, 0, 0)
        self.mixup = Mixup(num_classes, label_smoothing=label_smoothing, **mixup) if mixup else None
        self.label_smoothing = label_smoothing
        self.distillation = Distillation(num_classes, in_chans, **distillation) if distillation else None
        self.train_loss, self.val_loss, self.test_loss = Mean(), Mean(), Mean()
        accuracy = partial(MulticlassAccuracy, num_classes, validate_args=False)  # to validate waits for the GPU
        self.train_top1 = accuracy(average="micro")
        metrics: dict[str, Metric | MetricCollection] = {
            "top1": accuracy(average="micro"),
            "mean_class_accuracy": accuracy(average="macro"),
        }
        if num_classes > 5:
            metrics["top5"] = accuracy(average="micro", top_k=5)
        self.val_metrics = MetricCollection(metrics, prefix="val/")
        self.test_metrics = self.val_metrics.clone(prefix="test/")

    def setup(self, stage: str) -> None:
        compile = self.hparams["compile"]
        if compile:
            torch.compiler.reset()  # what another model of this process has left, graphs and limits of recompilation
            self.model.compile(mode=None if compile is True else compile)

    def configure_model(self) -> None:
        """Shards the model over the devices where the strategy has given it some to share (`FullyShardedStrategy`)."""
        if self.device_mesh is not None and not isinstance(self.model, FSDPModule):
            shard(self.model, self.device_mesh["data_parallel"])

    def forward(self, images: Tensor) -> Tensor:
        """Images `[B, C, *spatial]` -> logits `[B, num_classes]`."""
        return self.model(images)

    def on_fit_start(self) -> None:
        if self.distillation is not None:
            self.distillation.to(self.device)

    def on_train_epoch_start(self) -> None:
        dataset: Any = getattr(self.trainer.train_dataloader, "dataset", None)
        if hasattr(dataset, "set_epoch"):  # streamed datasets shuffle by epoch
            dataset.set_epoch(self.current_epoch)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        # What is random in the model depends on the batch alone, so that nothing needs to be restored on resuming.
        seed_generators(BATCH, run_seed(), self.current_epoch, batch_idx, self.global_rank)
        # Gradients lie where the CUDA graph of a backward pass put them, and are yet to be added to.
        if batch_idx % self.trainer.accumulate_grad_batches == 0:
            self._let_graphs_overwrite_results()

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        if self.mixup is None:
            logits = self(images)
            loss = F.cross_entropy(logits, labels, label_smoothing=self.label_smoothing)
        else:
            images, soft_labels = self.mixup(images, labels, batch_generator(self.trainer, "mixup"))
            logits = self(images)
            loss = F.cross_entropy(logits, soft_labels)
            labels = soft_labels.argmax(dim=1)  # the accuracy counts the class with the larger share
        if self.distillation is not None:
            datamodule: Any = self.trainer.datamodule  # type: ignore[attr-defined]
            loss = self.distillation.loss(loss, logits, images, datamodule.mean, datamodule.std)
        finite = loss.detach().isfinite()
        self.train_loss(loss.detach().where(finite, 0.0), weight=finite * len(images))
        self.train_top1(logits, labels)
        self.log("train/loss", self.train_loss, on_step=True, on_epoch=True, batch_size=len(images))
        self.log("train/top1", self.train_top1, on_step=True, on_epoch=True, batch_size=len(images))
        # Not a number, for whose copy to the GPU Lightning would wait.
        self.log("train/lr", torch.tensor(max(group["lr"] for group in self.trainer.optimizers[0].param_groups)))
        # A loss that is not finite makes all gradients so, on all ranks: SkipNonFiniteSteps then skips the step.
        return loss * torch.where(finite, 1.0, torch.nan)

    def on_validation_start(self) -> None:
        self._most_val_batches = torch.tensor(float(self.trainer.num_val_batches[0]), device=self.device)
        if self.device_mesh is not None:
            strategy = self.trainer.strategy
            self._most_val_batches = strategy.reduce(self._most_val_batches, reduce_op="max")

    def on_validation_batch_end(self, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        # Each image is evaluated once, so some processes may have a batch less. But all gather a sharded model at once.
        if batch_idx + 1 == self.trainer.num_val_batches[0] < self._most_val_batches:
            self._logits(batch[0])

    def on_validation_batch_start(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self._let_graphs_overwrite_results()

    def on_test_batch_start(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self._let_graphs_overwrite_results()

    def _let_graphs_overwrite_results(self) -> None:
        """Tells CUDA graphs that nobody needs the results of earlier steps any more."""
        if self.hparams["compile"]:
            torch.compiler.cudagraph_mark_step_begin()

    def validation_step(self, batch: tuple[Tensor, ...], batch_idx: int) -> Tensor:
        return self._evaluation_step(batch, self.val_loss, self.val_metrics, "val/loss")

    def test_step(self, batch: tuple[Tensor, ...], batch_idx: int) -> Tensor:
        return self._evaluation_step(batch, self.test_loss, self.test_metrics, "test/loss")

    def _evaluation_step(
        self, batch: tuple[Tensor, ...], mean_loss: Mean, metrics: MetricCollection, loss_name: str
    ) -> Tensor:
        images, labels = batch[:2]
        logits = self._logits(images)
        mean_loss(F.cross_entropy(logits, labels), weight=len(images))
        metrics(logits, labels)
        self.log(loss_name, mean_loss, batch_size=len(images))
        self.log_dict(metrics, batch_size=len(images))
        return logits

    def _logits(self, images: Tensor) -> Tensor:
        """`forward`, or of views `[B, V, C, T, H, W]` of videos the logarithm of the mean of their probabilities."""
        if images.ndim < 6:
            return self(images)
        probabilities = self(images.flatten(0, 1)).double().softmax(dim=1)
        return probabilities.unflatten(0, images.shape[:2]).mean(dim=1).log().float()

    def configure_optimizers(self) -> Any:
        optimizer, scheduler = self.build_optimizer(self.trainer.max_epochs or 0, self._steps_per_epoch())
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def build_optimizer(self, max_epochs: int, steps_per_epoch: int) -> tuple[torch.optim.Optimizer, Any]:
        """The optimiser of the model and its schedule; ValueError if their settings do not fit."""
        settings = dict(self.hparams["optimizer"] or {"opt": "adamw"})
        if "opt" in settings:
            name = str(settings["opt"]).lower().removeprefix("lookahead_")
            check_choice("optim.optimizer.opt", name, [str(known) for known in list_optimizers()])
        check_settings("optim.optimizer", settings, create_optimizer_v2, given=("model_or_params",))
        schedule = dict(self.hparams["schedule"] or {"sched": "constant"})
        check_choice("optim.schedule.sched", schedule.get("sched", "cosine"), SCHEDULES)
        where = f"optim.optimizer={settings}"
        is_open = str(settings.get("opt")).lower() in FUSED_OPTIMIZERS and not settings.keys() & {"fused", "foreach"}
        # Under fp16, Lightning does not clip the gradients of a fused optimiser.
        if is_open and next(self.model.parameters()).is_cuda and not self._is_scaled():
            settings["fused"] = True
        try:
            factor = settings.pop("backbone_lr_factor", 1.0)
            optimizer = create_optimizer_v2(self.model, **settings)
            if factor != 1.0:
                model: Any = self.model
                _scale_backbone(optimizer, model.get_classifier(), factor)
            where = f"optim.schedule={schedule}"
            scheduler, _ = create_scheduler_v2(
                optimizer,
                num_epochs=max_epochs - schedule.get("cooldown_epochs", 0),
                step_on_epochs=False,
                updates_per_epoch=steps_per_epoch,
                **schedule,
            )
        except (AssertionError, ImportError, TypeError, ValueError) as error:
            raise ValueError(f"{where}: {' '.join(str(error).split())}") from error
        return optimizer, scheduler

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        if self._is_scaled():
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)
        else:
            # Under autocast Lightning refuses this for fused optimisers, which might have to unscale gradients first.
            plugin: Any = self.trainer.precision_plugin
            algorithm = GradClipAlgorithmType(gradient_clip_algorithm or "norm")
            Precision.clip_gradients(plugin, optimizer, gradient_clip_val or 0.0, algorithm)

    def _is_scaled(self) -> bool:
        """Whether losses and gradients are scaled, as with fp16."""
        return getattr(self.trainer.precision_plugin, "scaler", None) is not None

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        scheduler.step_update(self._schedule_step())

    def steps_left(self) -> int:
        """Optimiser steps from here to the end of training, 0 where it has none."""
        max_epochs, max_steps = self.trainer.max_epochs or -1, self.trainer.max_steps
        ends = [max_epochs * self._steps_per_epoch() - self._schedule_step()] if max_epochs > 0 else []
        return min(ends + ([max_steps - self.global_step] if max_steps >= 0 else []), default=0)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        reduce = self.trainer.strategy.reduce
        checkpoint["train_metrics"] = {
            name: {
                key: reduce(state.clone(), reduce_op="sum") for key, state in getattr(self, name).metric_state.items()
            }
            for name in TRAIN_METRICS
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self._start = Position.of(checkpoint)
        # The sums of all ranks go on in the first one; those of a finished epoch are of no more use.
        if "train_metrics" in checkpoint and self._start.batch and self.global_rank == 0:
            for name, states in checkpoint["train_metrics"].items():
                metric = getattr(self, name)
                for key, state in states.items():
                    setattr(metric, key, state.to(metric.device))
        # The learning rate is a function of the position and this run's settings alone, so a longer run can be resumed.
        checkpoint["lr_schedulers"] = []

    def _schedule_step(self) -> int:
        """Steps that would have been done here if the run had always had as many an epoch as now.

        Another effective batch before the checkpoint that it goes on from has made it more or fewer.
        """
        before = self._start.epoch * self._steps_per_epoch() + self._start.batch // self.trainer.accumulate_grad_batches
        return before + self.global_step - self._start.step

    def _steps_per_epoch(self) -> int:
        self.trainer.estimated_stepping_batches  # noqa: B018  loads the training data, which sets num_training_batches
        batches = self.trainer.num_training_batches
        if batches == float("inf"):
            raise ValueError("the training data does not tell its length, which the schedule needs")
        return -(-int(batches) // self.trainer.accumulate_grad_batches)


def _image_weights(source: str) -> dict[str, Any]:
    """What replaces a model's `pretrained_cfg` for it to start from a file or from a published model's weights."""
    if Path(source).is_file():
        return {"file": source}
    if not timm.is_model(source):
        raise ValueError(f"model.init_from_image={source!r} is neither a file nor a registered model")
    check_model_name(source, "model.init_from_image")
    cfg: Any = timm.get_pretrained_cfg(source)
    return {"url": cfg.url}


def _scale_backbone(optimizer: torch.optim.Optimizer, classifier: torch.nn.Module, factor: float) -> None:
    """Splits the parameter groups so that all parameters but the classifier's learn at `factor` times their rate.

    timm's schedules multiply a group's learning rate by its `lr_scale`.
    """
    head = {id(parameter) for parameter in classifier.parameters()}
    groups = list(optimizer.param_groups)
    optimizer.param_groups.clear()
    for group in groups:
        for in_head in (False, True):
            parameters = [parameter for parameter in group["params"] if (id(parameter) in head) == in_head]
            if parameters:
                scale = group.get("lr_scale", 1.0) * (1.0 if in_head else factor)
                optimizer.add_param_group(group | {"params": parameters, "lr_scale": scale})
