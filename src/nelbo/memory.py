"""How much memory work will hold, before it starts; and how many images fit into what is free."""

import contextlib
import os
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = ["free_memory", "memory_estimate", "most_rows"]

SHARE = 0.5  # of the free memory: what a library needs inside an operation is not counted
# What a container may take, has taken, and of that would give back (files read), in both versions of control groups.
CGROUP = (
    ("memory.max", "memory.current", "memory.stat", "inactive_file"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat", "total_inactive_file"),
)
# Rows at once above which nothing gets faster: on a CPU nothing does even before (docs/performance.md).
ENOUGH = {"cpu": 256, "cuda": 8192}


class Live(TorchDispatchMode):
    """Counts the bytes of the tensors made inside that are alive, and the most there were at once."""

    def __init__(self) -> None:
        super().__init__()
        self.known: set[int] = set()
        self.now = self.most = 0

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Any:
        made = function(*arguments, **(keywords or {}))
        before = {t.untyped_storage()._cdata for t in tree_leaves((arguments, keywords)) if isinstance(t, Tensor)}
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self.known | before:
                    self.known.add(storage._cdata)
                    self.now += storage.nbytes()
                    weakref.finalize(storage, self.free, storage._cdata, storage.nbytes())
        self.most = max(self.most, self.now)
        return made

    def free(self, storage: int, size: int) -> None:
        """A tensor's memory was given back."""
        self.known.discard(storage)
        self.now -= size


def memory_estimate(model: nn.Module, loss: Callable[[int], Tensor], images: int) -> dict[str, int]:
    """Bytes held at once: ``weights`` with their moments and average; ``activations`` and gradients, at most.

    ``loss(n)`` is the loss of n images. Nothing is guessed: one image and then two go forward and backward, the tensors
    alive at the peak are counted, and their growth from one to two is that of every image. Where gradients, as large as
    the weights, hide that growth, the forward pass shows it: its peak and all gradients are a bound. What the library
    needs inside an operation comes on top.
    """
    forward, both = [], []
    for n in (1, 2):
        with Live() as live:
            value = loss(n)
            forward.append(live.most)
            value.backward()
        both.append(live.most)
        for parameter in model.parameters():
            parameter.grad = None
    weights = sum(p.numel() * p.element_size() for p in model.parameters())

    def grown(peaks: list[int]) -> int:
        return peaks[0] + (images - 1) * (peaks[1] - peaks[0])

    return {"weights": 4 * weights, "activations": max(grown(both), grown(forward) + weights)}


def free_memory(device: Any) -> int:
    """Bytes that this process may take on a device: of a CPU's, its part of what is free, where several share it."""
    device = torch.device(device)
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    import psutil

    free = [psutil.virtual_memory().available]
    for *names, inactive in CGROUP:
        with contextlib.suppress(OSError, ValueError, KeyError):  # no such limit
            limit, used, parts = ((Path("/sys/fs/cgroup") / name).read_text() for name in names)
            files = dict(line.split() for line in parts.splitlines())[inactive]
            free.append(max(int(limit) - int(used) + int(files), 0))
    return min(free) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def most_rows(work: Callable[[int], Any], device: Any, most: int | None = None) -> int:
    """How many rows at once ``work`` can be given: the largest power of 2 up to ``most`` whose tensors fit into
    ``SHARE`` of the free memory, but 1 at least.

    ``work(n)`` does a little of the work on n rows. Nothing is guessed: it is done with one row and with two, and the
    tensors alive at the peak are counted.
    """
    most = ENOUGH.get(torch.device(device).type, ENOUGH["cuda"]) if most is None else most
    peaks = []
    for rows in (1, 2):
        with Live() as live:
            work(rows)
        peaks.append(live.most)
    each = max(peaks[1] - peaks[0], 1)
    fit = int((SHARE * free_memory(device) - (peaks[0] - each)) // each)
    return 1 << max(min(fit, most), 1).bit_length() - 1
