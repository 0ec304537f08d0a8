"""Trains a classifier: `python train.py [experiment=NAME] [KEY=VALUE ...]`; without arguments a NAT on digits.

The run folder, printed at the start and the end, holds checkpoints, the resolved config, versions, metrics and plots.
"""

import os
import time
from pathlib import Path
from typing import Any

import hydra
import torch
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
from nat_models.engine.errors import RUN_ERRORS, SETUP_ERRORS, exit_on, in_sweep
from nat_models.engine.evaluation import evaluate, save_evaluation
from nat_models.engine.files import remove_if_empty
from nat_models.engine.plots import plot_curves
from nat_models.engine.report import print_setup, print_table, result_rows
from nat_models.engine.resume import choose_run, config_digest, continue_run, finished_run
from nat_models.engine.run_folder import hydra_folder, record_run


@hydra.main(version_base="1.3", config_path="configs", config_name="train")
def main(cfg: DictConfig) -> float:
    """Trains, evaluates the best checkpoint, writes the report; returns `optimized_metric` of it."""
    made_by_hydra = hydra_folder(cfg)
    with exit_on(SETUP_ERRORS, made_by_hydra):
        prepare_process(cfg)
        if (finished := finished_run(cfg)) is not None:
            remove_if_empty(made_by_hydra)
            print(f"ckpt_path=auto: {finished[0]} is finished")
            return finished[1][cfg.optimized_metric]
        digest = config_digest(cfg)
        going_on = choose_run(cfg)
        run_dir = Path(cfg.run_dir)
        if run_dir.absolute() != made_by_hydra.absolute():
            remove_if_empty(made_by_hydra)
        datamodule = build_datamodule(cfg)
        trainer = build_trainer(cfg)
        module = build_module(cfg, datamodule, trainer)
        check_optimized_metric(cfg.optimized_metric, module)
    with exit_on(SETUP_ERRORS, run_dir):
        continue_run(cfg, datamodule, trainer, module)
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
        with exit_on(SETUP_ERRORS):  # a file that is damaged, as one to begin from
            checkpoint, instead_of_best = best_checkpoint(trainer)
        if instead_of_best is not None and trainer.is_global_zero:
            print(instead_of_best, flush=True)
        evaluation = evaluate(checkpoint, datamodule, plain(cfg.trainer))
        static = None
        if isinstance(datamodule, VideoDataModule) and datamodule.static_baseline:
            static = evaluate(checkpoint, datamodule.without_motion(), plain(cfg.trainer))

        if trainer.is_global_zero:
            record: dict[str, Any] = {"checkpoint": os.path.relpath(checkpoint, run_dir.resolve())}
            record["training_seconds"] = round(seconds, 1)
            if static is not None:
                record["top1_without_motion"] = static.metrics["val/top1"]
            plot_curves(run_dir / "csv" / "metrics.csv", run_dir / "curves.png")
            save_evaluation(evaluation, run_dir, datamodule, record)  # last: its results.json marks a finished run

    if trainer.is_global_zero:
        title = f"{checkpoint.stem.capitalize()} checkpoint (epoch {evaluation.epoch}) on the validation split"
        print_table(title, result_rows(evaluation, static, seconds, datamodule) | {"Run folder": str(run_dir)})
    if torch.distributed.is_initialized() and not in_sweep():
        torch.distributed.destroy_process_group()  # lest its threads outlive what they use
    return evaluation.metrics[cfg.optimized_metric]


if __name__ == "__main__":
    main()
