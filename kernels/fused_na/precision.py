"""Which numbers the backends compute in, whatever the caller's tensors and autocast say."""

from contextlib import AbstractContextManager, nullcontext

import torch


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64 tensors, float32 for everything else."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def is_autocast_enabled(device: torch.device) -> bool:
    """`torch.is_autocast_enabled`, false instead of an error on the meta device."""
    return device.type != "meta" and torch.is_autocast_enabled(device.type)


def without_autocast(device: torch.device) -> AbstractContextManager:
    """Keeps autocast from casting a backend's own products. Leaves no trace in exported graphs if it is off anyway."""
    return torch.autocast(device.type, enabled=False) if is_autocast_enabled(device) else nullcontext()
