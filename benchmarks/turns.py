"""Lets processes of a benchmark compile side by side and be timed one at a time."""

import fcntl
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

import torch


def join(file: Path | None) -> None:
    """Makes this process one of those that name the file; None for a process that is on its own anyway.

    It becomes the leader of a process group, since compilers are processes of their own.
    """
    if file is None:
        return
    if os.getpgrp() != os.getpid():
        os.setpgrp()
    signal.signal(signal.SIGUSR1, _stand_still)
    with file.open("a") as members:
        fcntl.flock(members, fcntl.LOCK_EX)
        members.write(f"{os.getpid()}\n")


@contextmanager
def alone(file: Path | None) -> Iterator[None]:
    """Stops all other processes that have joined, with their children, until this one is done.

    Others that want to be alone wait, as do those that join meanwhile.
    """
    if file is None:
        yield
        return
    with file.open("r+") as members:
        fcntl.flock(members, fcntl.LOCK_EX)
        others = [int(line) for line in members if int(line) != os.getpid()]
        for process in others:
            with suppress(ProcessLookupError):  # some are done
                os.kill(process, signal.SIGUSR1)
        while not all(map(_stands_still, others)):
            time.sleep(0.01)
        try:
            yield
        finally:
            for process in others:
                with suppress(ProcessLookupError):
                    os.killpg(process, signal.SIGCONT)


def _stand_still(number: int, frame: FrameType | None) -> None:
    """Lets the GPU finish what this process has asked of it, and stops the process and its children."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    os.killpg(os.getpgrp(), signal.SIGSTOP)


def _stands_still(process: int) -> bool:
    """Whether a process is stopped, or gone."""
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return True
    return state in "TZX"
