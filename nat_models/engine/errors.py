"""One clear line for what a user can correct; tracebacks stay for bugs."""

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from hydra.core.hydra_config import HydraConfig
from hydra.errors import InstantiationException
from hydra.types import RunMode
from lightning.fabric.utilities.exceptions import MisconfigurationException
from omegaconf.errors import OmegaConfBaseException

from nat_models.data import UndecodableImageError, VideoError
from nat_models.data.workers import PREEMPTION_SIGNALS
from nat_models.engine.files import remove_if_empty

PREEMPTED_STATUS = 75  # EX_TEMPFAIL of sysexits.h: the same command, later, may go on


class NonFiniteStepsError(RuntimeError):
    """The loss or the gradient was not finite too often."""


class CheckpointWriteError(RuntimeError):
    """A checkpoint cannot be written; the message names it and what is left."""


class Preempted(Exception):
    """A signal asked the run to stop, and there is nothing left to save."""


SETUP_ERRORS: tuple[type[Exception], ...] = (
    ValueError,
    OSError,
    MisconfigurationException,
    InstantiationException,
    OmegaConfBaseException,
)
DATA_ERRORS: tuple[type[Exception], ...] = (UndecodableImageError, VideoError)
RUN_ERRORS: tuple[type[Exception], ...] = (
    *DATA_ERRORS,
    NonFiniteStepsError,
    CheckpointWriteError,
    MisconfigurationException,  # some of Lightning's checks need the length of the data
    OSError,
)


OF_ONE_PROCESS: tuple[type[Exception], ...] = (*DATA_ERRORS, CheckpointWriteError, OSError)
"""Which one of several processes may have alone."""


@contextmanager
def exit_on(error_types: tuple[type[Exception], ...], folder: Path | None = None) -> Iterator[None]:
    """Turns errors of these types into `error: ...` on stderr and exit status 2, and removes `folder` if it is empty.

    An OSError that names no file, as that of a full disk, names `folder`. One of a sweep fails alone, unless the error
    may be that of one of several processes: the others would wait for it in this run. A run that is preempted ends with
    status 75, and its sweep with it, at once where it has no handlers of its own for the signals; further ones change
    nothing about that.

    `HYDRA_FULL_ERROR=1` in the environment keeps the traceback, as it does for Hydra's own errors.
    """
    handlers: dict[Any, Any] = {number: signal.signal(number, _preempt) for number in PREEMPTION_SIGNALS}
    try:
        yield
    except Preempted:
        # Schedulers repeat their signals, and srun sends one to the other processes as soon as the first has left.
        handlers = dict.fromkeys(handlers, signal.SIG_IGN)
        raise SystemExit(PREEMPTED_STATUS) from None
    except error_types as error:
        if os.environ.get("HYDRA_FULL_ERROR", "0") != "0":
            raise
        message = message_of(error)
        if folder is not None:
            if isinstance(error, OSError) and error.filename is None:  # of a full disk, say
                message += f"; the run folder is {folder}"
            remove_if_empty(folder)
        print(f"error: {message}", file=sys.stderr, flush=True)
        is_of_one = torch.distributed.is_initialized() and isinstance(error, OF_ONE_PROCESS)
        if in_sweep() and not is_of_one:
            raise  # to Hydra, for which this training failed; the others go on
        raise SystemExit(2) from None
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def in_sweep() -> bool:
    """Whether this run is one of several that one command starts."""
    return HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN


def _preempt(number: int, frame: FrameType | None) -> None:
    raise Preempted


def message_of(error: BaseException) -> str:
    """The one line that matters of an error's message."""
    if isinstance(error, InstantiationException) and error.__cause__ is not None:
        return message_of(error.__cause__)
    lines = [line for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    if isinstance(error, (*DATA_ERRORS, OSError)):
        # An error from a loader's worker process carries that process's traceback; its last line is the message.
        return lines[-1].removeprefix(f"{type(error).__module__}.{type(error).__qualname__}: ")
    return lines[0]
