"""How checkpoints are written to and read from files: whole, checksummed, the last but one kept."""

from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO

from nat_models.checksums import append_checksum, check_checksum
from nat_models.engine.errors import CheckpointWriteError
from nat_models.engine.files import replace_file

LAST, PREVIOUS = "last.ckpt", "previous.ckpt"


class VerifiedCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint aside and renames it, keeps the `last.ckpt` of before as `previous.ckpt`, checks on reading.

    Raises:
        CheckpointWriteError: a checkpoint cannot be written.
        ValueError: on loading, the checkpoint is damaged.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        if storage_options is not None:
            raise TypeError("VerifiedCheckpointIO takes no storage_options")
        path = Path(path)
        archive = BytesIO()
        torch.save(checkpoint, archive)
        append_checksum(archive)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            replace_file(path, archive.getbuffer(), keep=path.with_name(PREVIOUS) if path.name == LAST else None)
        except OSError as error:
            before = f"; {path.name} of before is intact" if path.exists() else ""
            size = archive.getbuffer().nbytes / 1e6
            raise CheckpointWriteError(
                f"cannot write the checkpoint {path} ({size:.1f} MB): {error.strerror}{before}"
            ) from error

    def load_checkpoint(self, path: str | Path, map_location: Any = None, weights_only: bool | None = None) -> Any:
        check_checksum(path)
        return super().load_checkpoint(path, map_location or (lambda storage, location: storage), weights_only)
