"""Going on with a run: which one, from which checkpoint, and what is dropped of its logs."""

import hashlib
from pathlib import Path

import lightning
from hydra.core.hydra_config import HydraConfig
from lightning.pytorch.loggers import TensorBoardLogger
from omegaconf import DictConfig, OmegaConf

from nat_models.claim import claim_folder
from nat_models.data import DataModule
from nat_models.engine.checkpoint import check_resumable, check_unfinished, read_checkpoint
from nat_models.engine.checkpoint_io import LAST, PREVIOUS
from nat_models.engine.classification import ClassificationModule
from nat_models.engine.csv_logger import drop_rows
from nat_models.engine.errors import in_sweep, message_of
from nat_models.engine.files import remove_temporaries
from nat_models.engine.position import Position
from nat_models.engine.run_folder import read_manifest, read_results

AUTO = "auto"
LOGGER_IDS = {"WandbLogger": "id", "MLFlowLogger": "run_id"}  # their arguments


def config_digest(cfg: DictConfig) -> str:
    """Identifies the settings of a run, whichever folder it is in and whatever it goes on from."""
    settings = cfg.copy()
    settings.run_dir, settings.ckpt_path = "", None
    return hashlib.sha256(OmegaConf.to_yaml(settings, resolve=True, sort_keys=True).encode()).hexdigest()


def choose_run(cfg: DictConfig) -> str | None:
    """Sets `cfg.run_dir`, `cfg.ckpt_path` and loggers' ids to what `ckpt_path=auto` means; a sentence about it.

    With `run_dir` set, or if its folder holds a run already, it is that one; else the newest run of the experiment with
    the same settings that has no results yet. Its last checkpoint is taken, or the one before if that is damaged;
    without any, training starts anew.

    Raises:
        ValueError: the run's checkpoints are all damaged; or it has some, but `ckpt_path` is not set.
    """
    new_dir = Path(cfg.run_dir)
    if cfg.ckpt_path is None and _checkpoints(new_dir):
        raise ValueError(f"run_dir={cfg.run_dir!r} holds a run already; ckpt_path=auto goes on with it")
    if cfg.ckpt_path != AUTO:
        return None
    digest = config_digest(cfg)
    run_dir = new_dir
    is_default = HydraConfig.initialized() and Path(HydraConfig.get().runtime.output_dir) == new_dir.absolute()
    if is_default and not _checkpoints(new_dir):
        newest = _newest_run(digest, is_finished=False)
        if newest is None:
            cfg.ckpt_path = None
            return f"ckpt_path=auto: {_runs()} holds no unfinished run with these settings; starting anew"
        run_dir = newest
    checkpoint, sentence = last_checkpoint(run_dir)
    cfg.ckpt_path = checkpoint and str(checkpoint)
    if checkpoint is not None:
        _set_logger_ids(cfg, read_checkpoint(checkpoint).get("logger_ids", {}))
    cfg.run_dir = str(run_dir)
    return f"ckpt_path=auto: {sentence}"


def finished_run(cfg: DictConfig) -> tuple[Path, dict[str, float]] | None:
    """The newest finished run with these settings and its metrics, which a sweep with `ckpt_path=auto` leaves out."""
    if cfg.ckpt_path != AUTO or not in_sweep():
        return None
    run_dir = _newest_run(config_digest(cfg), is_finished=True)
    results = None if run_dir is None else read_results(run_dir)
    return None if run_dir is None or results is None else (run_dir, results["metrics"])


def last_checkpoint(run_dir: Path) -> tuple[Path | None, str]:
    """The newest checkpoint of a run that is whole, or None if there is none at all, and a sentence about it.

    Raises:
        ValueError: there are some, but all are damaged.
    """
    damaged: list[str] = []
    for path in _checkpoints(run_dir):
        try:
            position = Position.of(read_checkpoint(path))
        except ValueError as error:
            damaged.append(message_of(error))
            continue
        where = f"epoch {position.epoch}, batch {position.batch}"
        because = f" because {'; '.join(damaged)}" if damaged else ""
        return path, f"going on from {path} ({where}){because}"
    if damaged:
        raise ValueError(f"ckpt_path=auto: {'; '.join(damaged)}; remove the run folder to start anew")
    return None, f"{run_dir} holds no checkpoint; starting anew"


def continue_run(
    cfg: DictConfig, datamodule: DataModule, trainer: lightning.Trainer, module: ClassificationModule
) -> None:
    """Lets the data begin and the logs go on where `cfg.ckpt_path` was saved, or at the beginning if it is None.

    Raises:
        FileNotFoundError, ValueError: training cannot go on from there, or another process trains in the run folder. In
            its own folder a training may be finished already: what may be left to do is the evaluation.
    """
    run_dir, position = Path(cfg.run_dir), Position(0, 0, 0)
    if cfg.ckpt_path is not None:
        check_resumable(cfg.ckpt_path, module, trainer, datamodule)
        if Path(cfg.ckpt_path).parent.resolve() != (run_dir / "checkpoints").resolve():
            check_unfinished(cfg.ckpt_path, trainer)
        position = Position.of(read_checkpoint(cfg.ckpt_path))
    datamodule.start = (position.epoch, position.batch)
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            logger._kwargs["purge_step"] = position.step  # an argument of the SummaryWriter that it will open
    if trainer.is_global_zero:
        claim_folder(run_dir, "run_dir")
        for folder in (run_dir, run_dir / "csv", run_dir / "checkpoints"):
            remove_temporaries(folder)
        (run_dir / "results.json").unlink(missing_ok=True)  # of before, when the run was to be shorter
        for path in (run_dir / "csv" / "metrics.csv", run_dir / "skipped_steps.csv"):
            drop_rows(path, position.step)


def _set_logger_ids(cfg: DictConfig, ids: dict[str, str]) -> None:
    """Lets loggers that keep runs elsewhere go on with the same ones."""
    for logger in cfg.logger.values():
        class_name = logger._target_.rpartition(".")[2] if logger is not None else ""
        if class_name in LOGGER_IDS and class_name in ids:
            logger[LOGGER_IDS[class_name]] = ids[class_name]


def _checkpoints(run_dir: Path) -> list[Path]:
    folder = run_dir / "checkpoints"
    return [folder / name for name in (LAST, PREVIOUS) if (folder / name).exists()]


def _runs() -> Path:
    """The folder of this experiment's runs."""
    return Path("runs") / HydraConfig.get().runtime.choices["experiment"]


def _newest_run(digest: str, is_finished: bool) -> Path | None:
    """The newest run of this experiment that has these settings, a checkpoint, and results or none."""
    manifests = _runs().absolute().glob("**/manifest.json")
    for manifest in sorted(manifests, key=lambda path: path.stat().st_mtime, reverse=True):
        run_dir = manifest.parent
        is_wanted = _checkpoints(run_dir) and (read_results(run_dir) is not None) == is_finished
        if is_wanted and (read_manifest(run_dir) or {}).get("config_digest") == digest:
            return run_dir
    return None
