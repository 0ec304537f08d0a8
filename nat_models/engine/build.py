"""From a composed config to the data module, the trainer and the module; errors of the user surface here."""

import logging
import os
import warnings
from typing import Any

import lightning
import timm
import torch
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from lightning.pytorch.callbacks import WeightAveraging
from omegaconf import DictConfig, OmegaConf
from timm.data import resolve_data_config
from timm.scheduler import create_scheduler_v2

from nat_models.data import DataModule
from nat_models.engine.checkpoint_io import VerifiedCheckpointIO
from nat_models.engine.classification import ClassificationModule
from nat_models.engine.errors import in_sweep
from nat_models.engine.sharding import FullyShardedStrategy
from nat_models.names import check_model_name
from nat_models.settings import check_number, check_settings

MODEL_ARGUMENTS = ("num_classes", "class_names", "in_chans", "optimizer", "schedule")
"""Of the module, that are no settings of `model`."""
SCHEDULE_ARGUMENTS = ("optimizer", "num_epochs", "step_on_epochs", "updates_per_epoch")
IMAGE_SETTINGS = ("img_size", "in_chans", "mean", "std", "interpolation", "crop_pct")


def build_datamodule(cfg: DictConfig) -> DataModule:
    """The data module of `cfg.data`, with its datasets opened.

    Image settings that the config leaves `null` are filled in, in `cfg` too, with what timm says the model expects.
    """
    check_model_name(cfg.model.model_name)
    pretrained_cfg = None if ":" in cfg.model.model_name else timm.get_pretrained_cfg(cfg.model.model_name)
    expected = resolve_data_config(
        {"in_chans": cfg.data.get("in_chans")}, pretrained_cfg.to_dict() if pretrained_cfg else {}
    )
    expected |= {"in_chans": expected["input_size"][0], "img_size": list(expected["input_size"][1:])}
    for key in IMAGE_SETTINGS:
        if key in cfg.data and cfg.data[key] is None:
            cfg.data[key] = expected[key]
    datamodule = _build_node("data", cfg.data)
    datamodule.setup("fit")
    return datamodule


def build_evaluation_datamodule(cfg: DictConfig, hparams: dict[str, Any]) -> DataModule:
    """The data module of a run's `cfg.data` with its validation split opened.

    Args:
        cfg: resolved config of the run.
        hparams: hyper-parameters of the checkpoint to evaluate; its classes decide the labels.
    """
    datamodule = _build_node("data", cfg.data)
    datamodule.classes = hparams["class_names"] or []
    datamodule.setup("validate")
    for name in ("num_classes", "in_chans"):
        if getattr(datamodule, name) != hparams[name]:
            raise ValueError(f"the checkpoint has {name}={hparams[name]}, but the data {getattr(datamodule, name)}")
    return datamodule


def build_trainer(cfg: DictConfig) -> lightning.Trainer:
    """The trainer of `cfg.trainer` with the callbacks and loggers of the config; a `null` entry drops one of them."""
    settings = instantiate(cfg.trainer, _convert_="all")
    check_settings("trainer", settings, lightning.Trainer, given=("callbacks", "logger", "plugins"))
    if settings.get("fast_dev_run"):
        raise ValueError("trainer.fast_dev_run must be false, for it saves no checkpoint; debug=smoke trains two steps")
    callbacks = [_build_node(f"callbacks.{name}", node) for name, node in cfg.callbacks.items() if node is not None]
    if isinstance(settings["strategy"], FullyShardedStrategy):
        if any(isinstance(callback, WeightAveraging) for callback in callbacks):
            raise ValueError("callbacks=ema does not work with trainer=fsdp: averaged weights cannot be sharded")
    loggers = {name: _build_logger(name, logger) for name, logger in cfg.logger.items() if logger is not None}
    trainer = lightning.Trainer(
        **settings,
        callbacks=callbacks,
        logger=list(loggers.values()),
        plugins=[VerifiedCheckpointIO()],
    )
    environment = getattr(trainer.strategy, "cluster_environment", None)
    if in_sweep() and trainer.num_devices > 1 and not getattr(environment, "creates_processes_externally", True):
        # Lightning would start the other processes by this very command, and each of them a sweep of its own.
        raise ValueError(
            f"trainer.devices must be 1 in a sweep, got {trainer.num_devices}, unless something else starts the "
            f"processes: torchrun --nproc-per-node {trainer.num_devices} train.py ..., or hydra/launcher=slurm"
        )
    check_number("trainer.accumulate_grad_batches", trainer.accumulate_grad_batches, 1, whole=True)
    check_number("trainer.limit_train_batches", trainer.limit_train_batches, above=0)
    return trainer


def build_module(cfg: DictConfig, datamodule: DataModule, trainer: lightning.Trainer) -> ClassificationModule:
    """The module of `cfg.model` and `cfg.optim`, for the classes of the data and the effective batch of the trainer.

    With `cfg.ckpt_path`, from which all weights will come, pretrained ones are not read.
    """
    if datamodule.batch_size % 2 and cfg.model.mixup is not None:
        raise ValueError(f"data.batch_size must be even with model.mixup, got {datamodule.batch_size}")
    if cfg.model.pretrained and (missing := OmegaConf.missing_keys(cfg.model)):
        raise ValueError(f"model.{min(missing)} must be set, or model.pretrained=false to start from scratch")
    model, optim = plain(cfg.model), plain(cfg.optim)
    check_settings("model", model, ClassificationModule, given=MODEL_ARGUMENTS)
    check_settings("optim.schedule", optim["schedule"], create_scheduler_v2, given=SCHEDULE_ARGUMENTS)
    before, after = (optim["schedule"].get(key, 0) for key in ("warmup_epochs", "cooldown_epochs"))
    if trainer.max_epochs is None or trainer.max_epochs <= before + after:
        raise ValueError(
            f"trainer.max_epochs={trainer.max_epochs} must exceed the sum of optim.schedule.warmup_epochs={before} and "
            f"optim.schedule.cooldown_epochs={after}"
        )
    module = ClassificationModule(
        **(model | ({"pretrained": False, "init_from_image": None} if cfg.ckpt_path is not None else {})),
        num_classes=len(datamodule.classes),
        class_names=datamodule.classes,
        in_chans=datamodule.in_chans,
        optimizer=optim["optimizer"] | {"lr": learning_rate(cfg, effective_batch(datamodule, trainer))},
        schedule=optim["schedule"],
    )
    clip, num_frames = getattr(datamodule, "sampling", None), getattr(module.model, "num_frames", None)
    if clip is not None and num_frames not in (None, clip.num_frames):
        raise ValueError(
            f"model.model_kwargs.num_frames must be data.sampling.num_frames={clip.num_frames}, got {num_frames}"
        )
    module.build_optimizer(trainer.max_epochs, steps_per_epoch=1)  # so that mistakes show before the run folder exists
    return module


def _build_node(argument: str, cfg: DictConfig) -> Any:
    """What a config node with a `_target_` describes; ValueError, with the argument's name, if settings do not fit."""
    target = instantiate(cfg, _convert_="all", _partial_=True)
    check_settings(argument, target.keywords, target.func)
    return instantiate(cfg, _convert_="all")


def _build_logger(name: str, cfg: DictConfig) -> Any:
    try:
        return _build_node(f"logger.{name}", cfg)
    except InstantiationException as error:
        if isinstance(error.__cause__, ImportError):
            raise ValueError(
                f"logger.{name} needs a package that is missing: pip install 'nat-models[{name}]'"
            ) from error
        raise


def check_optimized_metric(name: str, module: ClassificationModule) -> None:
    """Raises ValueError unless evaluating the module gives a metric of this name."""
    names = ["val/loss", *map(str, module.val_metrics.keys())]
    if name not in names:
        raise ValueError(f"optimized_metric={name!r} is unknown; allowed are {', '.join(names)}")


def effective_batch(datamodule: DataModule, trainer: lightning.Trainer) -> int:
    """Images per optimiser step: batch per device x devices x accumulation."""
    return datamodule.batch_size * trainer.world_size * trainer.accumulate_grad_batches


def learning_rate(cfg: DictConfig, batch: int) -> float:
    """`optim.base_lr`, scaled linearly from `optim.base_batch` images per step to `batch`; `null` means not scaled."""
    check_number("optim.base_lr", cfg.optim.base_lr, 0)
    if cfg.optim.base_batch is not None:
        check_number("optim.base_batch", cfg.optim.base_batch, above=0)
    return cfg.optim.base_lr * (batch / cfg.optim.base_batch if cfg.optim.base_batch is not None else 1.0)


def plain(cfg: Any) -> dict[str, Any]:
    """A config node as a resolved dict of plain values."""
    return OmegaConf.to_container(cfg, resolve=True)  # type: ignore[return-value]


def prepare_process(cfg: DictConfig) -> None:
    """Seeds every generator (workers' too) with `cfg.seed` and sets the number of threads.

    With `cfg.deterministic`, compiled code does without choices by measurement; Lightning's trainer sees to the rest.
    """
    quiet_lightning()
    check_number("seed", cfg.seed, 0, 2**32 - 1, whole=True)
    if cfg.num_threads is not None:
        check_number("num_threads", cfg.num_threads, 1, whole=True)
    if cfg.get("deterministic", False):
        from torch._inductor import config as inductor

        check_deterministic()
        inductor.deterministic = True
    lightning.seed_everything(cfg.seed, workers=True, verbose=False)
    if cfg.num_threads is not None:
        torch.set_num_threads(cfg.num_threads)


def check_deterministic() -> None:
    """Raises ValueError where the environment asks for attention kernels chosen by measurement."""
    if os.environ.get("FUSED_NA_AUTOTUNE") == "1":
        raise ValueError("deterministic=true needs FUSED_NA_AUTOTUNE=0: measured tiles differ from run to run")


def quiet_lightning() -> None:
    """Drops Lightning's hints; `train.py` prints what they say, or the config decides it."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=".*treespec, LeafSpec.* is deprecated")
    warnings.filterwarnings("ignore", message="You're using the WeightAveraging callback with a model that overrides")
    warnings.filterwarnings("ignore", message="The dirpath has changed from")
    warnings.filterwarnings("ignore", message=".*could not find the monitored key")
    warnings.filterwarnings("ignore", message="Checkpoint directory .* exists and is not empty")
    warnings.filterwarnings("ignore", message="You're resuming from a checkpoint that ended before the epoch ended")
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message=".*recommended to use `self.log.*sync_dist=True")
    warnings.filterwarnings("ignore", message=".*is smaller than the logging interval.*")
