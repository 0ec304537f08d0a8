"""A folder that a command writes belongs to one such command at a time."""

import errno
import fcntl
import os
import platform
from pathlib import Path
from typing import IO

CLAIM = ".claim"
_claims: list[IO[str]] = []  # a file that is closed, or collected as garbage, lets the folder go


def claim_folder(folder: Path, argument: str) -> None:
    """Keeps a folder, created if missing, to this process until it ends, however it ends.

    By a lock of the process on a file, which its loaders' workers do not inherit. File systems without locks are not
    guarded.

    Args:
        folder: the folder.
        argument: what to call it in the error.

    Raises:
        ValueError: another process has it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = open(folder / CLAIM, "a+")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EAGAIN):
            return
        file.seek(0)
        raise ValueError(
            f"{argument}={str(folder)!r} is in use by {file.read().strip()}; wait for its end, "
            f"or set another {argument}"
        ) from None
    file.truncate(0)
    file.write(f"process {os.getpid()} on {platform.node()}\n")
    file.flush()
    _claims.append(file)
