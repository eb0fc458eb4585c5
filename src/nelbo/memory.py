"""How much memory a training will hold, before it starts."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

__all__ = ["memory_estimate"]


def memory_estimate(model: nn.Module, loss: Callable[[int], Tensor], images: int) -> dict[str, int]:
    """Bytes held at once: ``weights`` with gradients, two moments and average; ``activations`` of ``images`` images.

    ``loss(n)`` is the loss of n images. Activations are counted, not guessed: one image goes forward, then two, and
    what the backward pass would keep is added up. What an operation needs for a moment comes on top, and so does, where
    blocks are recomputed in the backward pass, the inside of one block.
    """
    parameters = list(model.parameters())
    owned = {p.untyped_storage().data_ptr() for p in parameters}

    def kept(n: int) -> int:
        held: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            held[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            value = loss(n)
        del value
        return sum(size for pointer, size in held.items() if pointer not in owned)

    one, two = kept(1), kept(2)
    weights = sum(p.numel() * p.element_size() for p in parameters)
    return {"weights": 5 * weights, "activations": one + (images - 1) * (two - one)}
