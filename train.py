"""Trains a classifier: `python train.py [experiment=NAME] [KEY=VALUE ...]`; without arguments a NAT on digits.

The run folder, printed at the start and the end, holds checkpoints, the resolved config, versions, metrics and plots.
"""

import time
from pathlib import Path
from typing import Any

import hydra
from omegaconf import DictConfig

from nat_models.data import VideoDataModule
from nat_models.engine.build import (
    build_datamodule,
    build_module,
    build_trainer,
    check_optimized_metric,
    plain,
    prepare_process,
)
from nat_models.engine.checkpoint import best_checkpoint
from nat_models.engine.errors import RUN_ERRORS, SETUP_ERRORS, exit_on
from nat_models.engine.evaluation import evaluate, save_evaluation
from nat_models.engine.plots import plot_curves
from nat_models.engine.report import print_setup, print_table, result_rows
from nat_models.engine.resume import choose_run, config_digest, continue_run
from nat_models.engine.run_folder import record_run


@hydra.main(version_base="1.3", config_path="configs", config_name="train")
def main(cfg: DictConfig) -> float:
    """Trains, evaluates the best checkpoint, writes the report; returns `optimized_metric` of it."""
    with exit_on(SETUP_ERRORS, Path(cfg.run_dir)):
        prepare_process(cfg)
        digest = config_digest(cfg)
        going_on = choose_run(cfg)
        datamodule = build_datamodule(cfg)
        trainer = build_trainer(cfg)
        module = build_module(cfg, datamodule, trainer)
        check_optimized_metric(cfg.optimized_metric, module)
        continue_run(cfg, datamodule, trainer, module)
        run_dir = Path(cfg.run_dir)
        if trainer.is_global_zero:
            record_run(cfg, digest, run_dir, datamodule, trainer.world_size, trainer.strategy.root_device)
    if trainer.is_global_zero:
        print_setup(cfg, datamodule, trainer, module, run_dir)
        if going_on is not None:
            print(going_on, flush=True)

    start = time.monotonic()
    with exit_on(RUN_ERRORS, run_dir):
        trainer.fit(module, datamodule, ckpt_path=cfg.ckpt_path, weights_only=True)
        seconds = time.monotonic() - start
        checkpoint = best_checkpoint(trainer)
        evaluation = evaluate(checkpoint, datamodule, plain(cfg.trainer))
        static = None
        if isinstance(datamodule, VideoDataModule) and datamodule.static_baseline:
            static = evaluate(checkpoint, datamodule.without_motion(), plain(cfg.trainer))

    if trainer.is_global_zero:
        record: dict[str, Any] = {
            "checkpoint": str(checkpoint.relative_to(run_dir.resolve())),
            "training_seconds": round(seconds, 1),
        }
        if static is not None:
            record["top1_without_motion"] = static.metrics["val/top1"]
        save_evaluation(evaluation, run_dir, datamodule, record)
        plot_curves(run_dir / "csv" / "metrics.csv", run_dir / "curves.png")
        rows = result_rows(evaluation, static, seconds, datamodule) | {"Run folder": str(run_dir)}
        title = f"{checkpoint.stem.capitalize()} checkpoint (epoch {evaluation.epoch}) on the validation split"
        print_table(title, rows)
    return evaluation.metrics[cfg.optimized_metric]


if __name__ == "__main__":
    main()
