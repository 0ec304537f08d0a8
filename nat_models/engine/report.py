"""The tables that `train.py` and `eval.py` print."""

from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning
from omegaconf import DictConfig
from rich import box
from rich.console import Console
from rich.table import Table

from nat_models.checkpoints import LoadReport, loaded_share
from nat_models.data import DataModule
from nat_models.engine.build import effective_batch, learning_rate
from nat_models.engine.classification import ClassificationModule
from nat_models.engine.evaluation import Evaluation

METRIC_TITLES = {
    "val/top1": "Top-1 accuracy",
    "val/top5": "Top-5 accuracy",
    "val/mean_class_accuracy": "Mean class accuracy",
}


def print_setup(
    cfg: DictConfig,
    datamodule: DataModule,
    trainer: lightning.Trainer,
    module: ClassificationModule,
    run_dir: Path,
) -> None:
    """What will be trained, on what, and with which effective batch and learning rate."""
    batch = effective_batch(datamodule, trainer)
    lr = f"{learning_rate(cfg, batch):.3g}"
    if cfg.optim.base_batch:
        lr += f" = {cfg.optim.base_lr:.3g} x {batch} / {cfg.optim.base_batch} (linear scaling)"
    parameters = sum(parameter.numel() for parameter in module.model.parameters())
    rows = {
        "Model": f"{cfg.model.model_name}, {parameters / 1e6:.2f} M parameters",
        **_weights(module.model),
        **datamodule.describe(),
        "Device": f"{trainer.world_size} x {trainer.strategy.root_device.type}, precision {trainer.precision}",
        "Effective batch": f"{batch} = {datamodule.batch_size} per device x {trainer.world_size} devices"
        f" x {trainer.accumulate_grad_batches} accumulated",
        "Learning rate": lr,
        "Epochs": f"{trainer.max_epochs}" + (f", at most {trainer.max_steps} steps" if trainer.max_steps > 0 else ""),
        "Run folder": str(run_dir),
    }
    if cfg.ckpt_path:
        rows["Resumed from"] = str(cfg.ckpt_path)
    print_table("Training", rows)


def _weights(model: Any) -> dict[str, str]:
    """What became of the weights that training starts from, where there are some."""
    report: LoadReport | None = getattr(model, "load_report", None)
    if report is None:
        return {}
    text = f"{100 * loaded_share(model, report):.1f} % of the backbone's parameters loaded"
    for title, names in (("new", report.reinitialised), ("ignored", report.ignored)):
        if names:
            text += f"; {title}: {', '.join(names[:4])}" + (f" and {len(names) - 4} more" if len(names) > 4 else "")
    return {"Weights": text}


def metric_rows(metrics: dict[str, float], excluded: int = 0) -> dict[str, str]:
    """Titles and texts of the metrics of `evaluate`, and of the number of videos that were left out."""
    rows = {"Excluded videos": f"{excluded}, without which the score is"} if excluded else {}
    rows |= {title: f"{100 * metrics[name]:.2f} %" for name, title in METRIC_TITLES.items() if name in metrics}
    return rows | {"Loss": f"{metrics['val/loss']:.4f}"}


def result_rows(
    evaluation: Evaluation, static: Evaluation | None, seconds: float, datamodule: DataModule
) -> dict[str, str]:
    """The rows of a trained model: its metrics, its top-1 without motion, training time, and what was not decoded."""
    rows = metric_rows(evaluation.metrics, evaluation.excluded)
    if static is not None:
        rows["Top-1, one frame repeated"] = f"{100 * static.metrics['val/top1']:.2f} %"
    rows["Training time"] = str(timedelta(seconds=round(seconds)))
    if undecodable := datamodule.undecodable_paths():
        rows["Undecodable files"] = f"{len(undecodable)}, listed in {datamodule.undecodable_list}"
    return rows


def print_table(title: str, rows: dict[str, str]) -> None:
    """A two-column table on stdout."""
    table = Table(title=title, title_justify="left", show_header=False, box=box.SIMPLE_HEAD, min_width=64)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, text in rows.items():
        table.add_row(name, text)
    console = Console(width=None if Console().is_terminal else 120)
    console.print(table)
