"""How much memory a training will hold, before it starts."""

import weakref
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = ["memory_estimate"]


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
    """Bytes held at once: ``weights`` with their moments and average; ``activations`` and gradients at the peak.

    ``loss(n)`` is the loss of n images. Nothing is guessed: one image and then two go forward and backward, and the
    tensors alive at the peak are counted. What the library needs inside an operation comes on top.
    """

    def peak(n: int) -> int:
        with Live() as live:
            loss(n).backward()
        for parameter in parameters:
            parameter.grad = None
        return live.most

    parameters = list(model.parameters())
    one, two = peak(1), peak(2)
    weights = sum(p.numel() * p.element_size() for p in parameters)
    return {"weights": 4 * weights, "activations": one + (images - 1) * (two - one)}
