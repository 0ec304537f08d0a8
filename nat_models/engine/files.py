"""Writing files that are whole or not there, whenever the process or the machine stops."""

import os
from contextlib import suppress
from pathlib import Path

TEMPORARY = ".tmp"


def replace_file(path: Path, content: bytes | memoryview, keep: Path | None = None) -> None:
    """Writes a file aside, to the disk itself, and only then gives it its name.

    Args:
        path: the file; its folder exists.
        content: all of it.
        keep: the name that the file of before gets.

    Raises:
        OSError: it cannot be written; the file of before is then as it was.
    """
    temporary = path.with_name(path.name + TEMPORARY)
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        if keep is not None and path.exists():
            os.replace(path, keep)
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except OSError:
        with suppress(OSError):
            temporary.unlink()
        raise


def remove_temporaries(folder: Path) -> None:
    """Removes what processes that were killed while writing have left."""
    for path in folder.glob(f"*{TEMPORARY}"):
        path.unlink(missing_ok=True)


def remove_if_empty(folder: Path) -> None:
    """Removes a folder that holds nothing."""
    with suppress(OSError):
        folder.rmdir()


def _sync_folder(folder: Path) -> None:
    """Writes the names in a folder to the disk, where the system knows such a thing."""
    if hasattr(os, "O_DIRECTORY"):
        descriptor = os.open(folder, os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
