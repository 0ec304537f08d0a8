"""What is asked of a GPU."""

import torch
import triton

from fused_na.triton.tiles import HOPPER_SHARED_MEMORY


def capability(device: torch.device) -> int:
    """The major number of a GPU's compute capability, 9 of Hopper; 0 of a CPU."""
    return torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 0


def overlaps(device: torch.device) -> bool:
    """Whether a kernel can start before the one launched just before it has ended, if both are written for it."""
    return capability(device) >= 9


def shared_memory(device: torch.device) -> int:
    """Bytes that one program may have; of a CPU, as many as on Hopper."""
    if device.type != "cuda":
        return HOPPER_SHARED_MEMORY
    return triton.runtime.driver.active.utils.get_device_properties(device.index)["max_shared_mem"]
