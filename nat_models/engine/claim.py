"""A run folder belongs to one training at a time."""

import errno
import fcntl
import os
import platform
from pathlib import Path
from typing import IO

CLAIM = ".claim"
_claims: list[IO[str]] = []  # a file that is closed, or collected as garbage, lets the folder go


def claim_folder(run_dir: Path) -> None:
    """Keeps a run folder, created if missing, to this process until it ends, however it ends.

    By a lock of the process on a file, which its loaders' workers do not inherit. File systems without locks are not
    guarded.

    Raises:
        ValueError: another process has it.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    file = open(run_dir / CLAIM, "a+")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EAGAIN):
            return
        file.seek(0)
        raise ValueError(
            f"run_dir={str(run_dir)!r} is in use by {file.read().strip()}; wait for its end, or set another run_dir"
        ) from None
    file.truncate(0)
    file.write(f"process {os.getpid()} on {platform.node()}\n")
    file.flush()
    _claims.append(file)
