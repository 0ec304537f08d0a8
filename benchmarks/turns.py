"""Lets processes of a benchmark compile side by side and be timed one at a time."""

import fcntl
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


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

    Others that want to be alone wait, as do those that join meanwhile.
    """
    if file is None:
        yield
        return
    with file.open("r+") as members:
        fcntl.flock(members, fcntl.LOCK_EX)
        others = [int(line) for line in members if int(line) != os.getpid()]
        _send(others, signal.SIGSTOP)
        try:
            yield
        finally:
            _send(others, signal.SIGCONT)


def _send(groups: list[int], number: signal.Signals) -> None:
    for group in groups:
        with suppress(ProcessLookupError):  # some are done
            os.killpg(group, number)
