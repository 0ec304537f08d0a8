"""Checksums of checkpoints.

`torch.save` writes a zip archive, which may end with a comment that no reader minds: there the SHA-256 of all that
precedes it is kept. Being in the same file, it cannot be of another one.
"""

import hashlib
import os
from io import BytesIO
from pathlib import Path

LABEL = b"sha256:"
COMMENT_SIZE = len(LABEL) + 64
LENGTH_SIZE = 2  # bytes of the archive that hold the comment's length, just before it
CHUNK = 1 << 24


def append_checksum(archive: BytesIO) -> None:
    """Enters the checksum into an archive of `torch.save` that has no comment yet."""
    size = archive.seek(-LENGTH_SIZE, os.SEEK_END)
    with archive.getbuffer() as content:
        digest = hashlib.sha256(content[:size]).hexdigest()
    archive.write(COMMENT_SIZE.to_bytes(LENGTH_SIZE, "little") + LABEL + digest.encode())


def check_checksum(path: str | Path) -> None:
    """Raises ValueError if a file carries a checksum and it is not that of its content."""
    with open(path, "rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(size - COMMENT_SIZE, 0))
        comment = file.read()
        if not comment.startswith(LABEL):
            return
        file.seek(0)
        digest = hashlib.sha256()
        remaining = size - COMMENT_SIZE - LENGTH_SIZE
        while remaining > 0:
            chunk = file.read(min(CHUNK, remaining))
            digest.update(chunk)
            remaining -= len(chunk)
    if comment.removeprefix(LABEL) != digest.hexdigest().encode():
        raise ValueError(f"{str(path)!r} is damaged: its content is not that of its checksum")
