"""Training and evaluation: the Lightning module, its set-up from a config, callbacks, plots and the run folder."""

from nat_models.engine.build import build_datamodule, build_module, build_trainer
from nat_models.engine.classification import ClassificationModule
from nat_models.engine.run_folder import record_run

__all__ = ["ClassificationModule", "build_datamodule", "build_module", "build_trainer", "record_run"]
