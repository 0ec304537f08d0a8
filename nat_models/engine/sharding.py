"""Fully sharded data parallelism (FSDP2): each GPU keeps a part of the parameters, gradients and optimiser state."""

from datetime import timedelta

from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard


class FullyShardedStrategy(ModelParallelStrategy):
    """Lightning's FSDP2 with all devices in one group; checkpoints are single files, as those of other strategies.

    Args:
        timeout: of collective operations.
    """

    def __init__(self, timeout: timedelta) -> None:
        super().__init__(tensor_parallel_size=1, save_distributed_checkpoint=False, timeout=timeout)

    def setup_environment(self) -> None:
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()


def shard(model: nn.Module, mesh: DeviceMesh) -> None:
    """Shards a timm model over a mesh, block by block where it has modules called `blocks`."""
    for name, module in model.named_modules():
        if name.split(".")[-1] == "blocks":
            for block in module.children():
                fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
