"""Lets processes of a benchmark compile side by side and be timed one at a time."""

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def turn(file: Path | None, alone: bool) -> Iterator[None]:
    """A process's turn, by a lock on a file that all processes name.

    Args:
        file: created if need be; None for a process that is on its own anyway, which never waits.
        alone: whether to wait until no other process has a turn of either kind, or only until none is alone.
    """
    if file is None:
        yield
        return
    with file.open("a") as lock:  # to close it is to let go
        fcntl.flock(lock, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
        yield
