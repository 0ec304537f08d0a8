"""Lightning's CSV logger, for runs that go on in the folder that they began in."""

import csv
import io
from pathlib import Path

from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter
from lightning.pytorch.loggers.logger import rank_zero_experiment

from nat_models.engine.files import replace_file


class ContinuedCSVLogger(CSVLogger):
    """Appends to the `metrics.csv` that is there, where Lightning's would delete it.

    Args:
        save_dir: folder in which the folder `name` of the file lies.
        name: of that folder.
    """

    def __init__(self, save_dir: str, name: str) -> None:
        super().__init__(save_dir, name, version="")

    @property
    @rank_zero_experiment
    def experiment(self) -> ExperimentWriter:
        if self._experiment is None:
            self._experiment = _ContinuedWriter(self.log_dir)
        return self._experiment  # type: ignore[return-value]


class _ContinuedWriter(ExperimentWriter):
    def _check_log_dir_exists(self) -> None:
        path = Path(self.metrics_file_path)
        if path.exists():
            with open(path, newline="") as file:
                self.metrics_keys = list(csv.DictReader(file).fieldnames or [])

    def _rewrite_with_new_header(self, fieldnames: list[str]) -> None:
        path = Path(self.metrics_file_path)
        with open(path, newline="") as file:
            _write(path, fieldnames, list(csv.DictReader(file)))


def drop_rows(path: Path, step: int) -> None:
    """Removes the rows from `step` on, which a process has written that was killed after its last checkpoint.

    Args:
        path: csv file with a column `step`; may be missing.
        step: optimiser steps that the checkpoint counts. Rows count from 0.
    """
    if not path.exists():
        return
    text = path.read_text(encoding="utf-8")
    whole_lines = text[: text.rfind("\n") + 1]
    reader = csv.DictReader(io.StringIO(whole_lines, newline=""))
    kept = [row for row in reader if int(row["step"]) < step]
    _write(path, list(reader.fieldnames or []), kept)


def _write(path: Path, fieldnames: list[str], rows: list[dict[str, str]]) -> None:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, fieldnames)
    writer.writeheader()
    writer.writerows(rows)
    replace_file(path, text.getvalue().encode())
