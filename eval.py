"""Evaluates a checkpoint: `python eval.py run=FOLDER`, or `ckpt_path=FILE`, with the data and precision of its run.

Writes `results.json`, `per_class.csv` and plots to `FOLDER/evaluation/CHECKPOINT/`.
"""

from pathlib import Path

import hydra
import torch
from omegaconf import DictConfig, OmegaConf

from nat_models.engine.build import build_evaluation_datamodule, plain, prepare_process
from nat_models.engine.checkpoint import find_checkpoint, read_checkpoint
from nat_models.engine.errors import RUN_ERRORS, SETUP_ERRORS, exit_on
from nat_models.engine.evaluation import evaluate, save_evaluation
from nat_models.engine.report import metric_rows, print_table
from nat_models.engine.run_folder import read_results


@hydra.main(version_base="1.3", config_path="configs", config_name="eval")
def main(cfg: DictConfig) -> None:
    """Evaluates, compares with what training recorded for the same checkpoint, and writes the report."""
    with exit_on(SETUP_ERRORS):
        run_dir, checkpoint = find_checkpoint(cfg.run, cfg.ckpt_path)
        hparams = read_checkpoint(checkpoint)["hyper_parameters"]
        run_cfg = OmegaConf.create(plain(OmegaConf.load(run_dir / "config.yaml")))
        for group in ("data", "trainer"):
            run_cfg[group].update({key: value for key, value in cfg[group].items() if value is not None})
        prepare_process(run_cfg)
        datamodule = build_evaluation_datamodule(run_cfg, hparams)

    with exit_on(RUN_ERRORS):
        evaluation = evaluate(checkpoint, datamodule, plain(run_cfg.trainer))
        if torch.distributed.is_initialized() and torch.distributed.get_rank() != 0:
            return
        output_dir = Path(cfg.output_dir or run_dir / "evaluation" / checkpoint.stem)
        save_evaluation(evaluation, output_dir, datamodule, {"checkpoint": str(checkpoint)})
    rows = {"Checkpoint": f"{checkpoint}, epoch {evaluation.epoch}"}
    rows |= metric_rows(evaluation.metrics, evaluation.excluded)
    recorded = read_results(run_dir) or {}
    if (run_dir / recorded.get("checkpoint", "")).resolve() == checkpoint.resolve():
        top1 = recorded["metrics"]["val/top1"]
        verdict = "the same" if top1 == evaluation.metrics["val/top1"] else f"DIFFERENT: {100 * top1:.4f} %"
        rows["Recorded in training"] = verdict
    print_table("Validation split", rows | {"Written to": str(output_dir)})


if __name__ == "__main__":
    main()
