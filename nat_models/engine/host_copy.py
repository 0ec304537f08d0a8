"""What the host reads of the GPU's results late, so as not to wait for them."""

import torch
from torch import Tensor


def copy_to_host(flag: Tensor) -> tuple[Tensor, torch.cuda.Event | None]:
    """A copy in the host's memory, and the event after which it is there; None: it is there."""
    on_host = flag.to("cpu", non_blocking=True)  # which is pinned memory
    if not flag.is_cuda:
        return on_host, None
    copied = torch.cuda.Event()
    copied.record()
    return on_host, copied
