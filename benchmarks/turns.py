"""Lets processes of a benchmark compile side by side and be timed one at a time."""

import fcntl
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

SETTLE = 1.0  # seconds for the GPU to finish what the stopped processes have asked of it, which is as a rule one call


def join(file: Path | None) -> None:
    """Makes this process one of those that name the file; None for a process that is on its own anyway.

    It becomes the leader of a process group, since compilers are processes of their own.
    """
    if file is None:
        return
    if os.getpgrp() != os.getpid():
        os.setpgrp()
    with file.open("a") as members:
        fcntl.flock(members, fcntl.LOCK_EX)
        members.write(f"{os.getpid()}\n")


@contextmanager
def alone(file: Path | None) -> Iterator[None]:
    """Stops all other processes that have joined, with their children, until this one is done.

    They stop wherever they are: one that was asked to stop by itself would first finish the backward pass that it is
    compiling, while all others wait. Others that want to be alone wait, as do those that join meanwhile.
    """
    if file is None:
        yield
        return
    with file.open("r+") as members:
        fcntl.flock(members, fcntl.LOCK_EX)
        others = [int(line) for line in members if int(line) != os.getpid()]
        for process in others:
            with suppress(ProcessLookupError):  # some are done
                os.killpg(process, signal.SIGSTOP)
        while not all(map(_stands_still, others)):
            time.sleep(0.01)
        if torch.cuda.is_available():
            time.sleep(SETTLE)
        try:
            yield
        finally:
            for process in others:
                with suppress(ProcessLookupError):
                    os.killpg(process, signal.SIGCONT)


def _stands_still(process: int) -> bool:
    """Whether a process is stopped, or gone."""
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return True
    return state in "TZX"
