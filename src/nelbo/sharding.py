"""Networks that do not fit: each of several processes holds its rows of every tensor (torch's fully sharded data
parallelism, FSDP2).

Weights, gradients, moments and average take 1/n of their memory in each of n processes; a block's weights are gathered
while it runs. Rows are those of dimension 0, in as equal parts as there are.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

__all__ = ["is_part", "place_like", "rows", "shard", "whole"]


def shard(module: nn.Module, network: nn.Module, device: Any) -> None:
    """Shard ``module`` in place, the blocks of ``network`` inside it one by one. All processes must call this."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(torch.device(device).type, (dist.get_world_size(),))
    for block in reversed(list(_blocks(network))):  # from the inside out
        fully_shard(block, mesh=mesh)
    fully_shard(module, mesh=mesh)


def _blocks(network: nn.Module) -> Iterator[nn.Module]:
    """The elements of module lists, which run as a whole."""
    for module in network.modules():
        if isinstance(module, nn.ModuleList):
            yield from (block for block in module if not isinstance(block, nn.ModuleList) and list(block.parameters()))


def is_part(tensor: Any) -> bool:
    """Whether this process holds a part of the tensor only: torch's DTensor, whose module takes time to import."""
    return hasattr(tensor, "full_tensor")


def rows(tensor: Any) -> Tensor:
    """This process's part of a tensor that may be sharded."""
    return tensor.to_local() if is_part(tensor) else tensor


def whole(tensor: Any) -> Tensor:
    """All of a tensor that may be sharded. All processes must call this."""
    return tensor.full_tensor() if is_part(tensor) else tensor


def place_like(tensor: Tensor, like: Any) -> Tensor:
    """A whole tensor, which every process has, sharded where ``like`` is, and lying in memory as that does; one of
    another shape as it is."""
    if tensor.shape != like.shape:
        return tensor
    if not is_part(like):
        return torch.empty_like(like, dtype=tensor.dtype, requires_grad=False).copy_(tensor)
    tensor = tensor.to(like.device)
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None)
