"""Write checkpoints of reference cases with flax and optax themselves: python tests/flax/make.py [FOLDER]

Without a folder, the two fixtures beside this file; with one, ckpt-N.flax of every case below, as large as they are.
Needs jax, flax, optax, clu, tensorflow-cpu (which clu writes with) and the reference cases in ../reference. The states
are those of the three projects: step, params, ema_params, opt_state; MuLAN's optimizer is one AdamW for score_model and
one for the rest, each masked, the others' a single one, in i-DODE perhaps after clipping and within optax.MultiSteps.
clu writes flax.serialization's bytes, and so do flax's own checkpoints without orbax; both are checked here.
"""

import json
import lzma
import sys
import tempfile
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from clu import checkpoint
from flax.training import checkpoints
from jax import numpy as jnp

import flax
from flax import serialization, struct, traverse_util

HERE = Path(__file__).resolve().parent
CASES = ("vdm_loss", "mulan_epsilon_loss", "mulan_velocity_loss_small", "idode_loss_small")
STORED = "mulan_velocity_loss_small"
GAMMA = {"learnable_scalar": ("w", "b"), "fixed": ()}


class TrainState(struct.PyTreeNode):
    step: int
    params: Any
    ema_params: Any
    opt_state: Any


def adamw() -> optax.GradientTransformation:
    def decayed(params: Any) -> Any:
        flat = traverse_util.flatten_dict(params)
        return traverse_util.unflatten_dict({path: path[-1] != "bias" for path in flat})

    return optax.adamw(1.0, b1=0.9, b2=0.99, eps=1e-8, weight_decay=0.01, mask=decayed)


def only(score: bool) -> Any:
    def mask(tree: Any) -> Any:
        flat = traverse_util.flatten_dict(tree)
        return traverse_util.unflatten_dict({path: (path[0] == "score_model") == score for path in flat})

    return mask


def optimizer(name: str) -> optax.GradientTransformation:
    if name.startswith("mulan"):
        return optax.chain(optax.masked(adamw(), only(True)), optax.masked(adamw(), only(False)))
    if name.startswith("idode"):
        return optax.MultiSteps(optax.chain(optax.clip_by_global_norm(1e9), adamw()), 2)
    return adamw()


def state(name: str) -> TrainState:
    """Two steps with gradients that are mostly 0, so that files compress; averages that differ where it shows."""
    with np.load(HERE.parent / "reference" / f"{name}.npz") as case:
        kept = {key.removeprefix("params/"): case[key] for key in case.files if key.startswith("params/")}
        own = GAMMA.get(json.loads(str(case["meta/config"]))["gamma_type"])
    if own is not None:  # a case of several schedules
        kept = {key: a for key, a in kept.items() if not key.startswith("gamma/") or key.split("/")[1] in own}
    flat = {tuple(key.split("/")): jnp.asarray(array) for key, array in kept.items()}
    params = traverse_util.unflatten_dict(flat)

    def average(path: Any, a: Any) -> Any:
        return -a if a.ndim < 2 or "conv_out" in path else a

    def gradient(path: Any, a: Any) -> Any:
        number = np.arange(a.size).reshape(a.shape)
        return jnp.where(number % 16 == 0, a + 0.25, 0.0).astype(a.dtype)

    ema = traverse_util.unflatten_dict({path: average(path, a) for path, a in flat.items()})
    gradients = traverse_util.unflatten_dict({path: gradient(path, a) for path, a in flat.items()})
    transformation = optimizer(name)
    opt_state = transformation.init(params)
    for _ in range(2):
        _, opt_state = transformation.update(gradients, opt_state, params)
    return TrainState(step=1234, params=params, ema_params=ema, opt_state=opt_state)


def write(tree: Any) -> bytes:
    """The bytes of flax.serialization, which the checkpoints of clu, and of flax without orbax, must hold too."""
    content = serialization.to_bytes(tree)
    flax.config.update("flax_use_orbax_checkpointing", False)
    with tempfile.TemporaryDirectory() as folder:
        path = checkpoints.save_checkpoint(folder, tree, 1)
        assert Path(path).read_bytes() == content, "flax's checkpoint differs from its serialization"
    with tempfile.TemporaryDirectory() as folder:
        checkpoint.Checkpoint(folder).save(tree)
        assert (Path(folder) / "ckpt-1.flax").read_bytes() == content, "clu's checkpoint differs from it"
    return content


def pieces() -> bytes:
    """Every kind of leaf, in pieces of at most 64 bytes."""
    serialization.MAX_CHUNK_SIZE = 64
    numbers = np.arange(60).reshape(3, 4, 5)
    tree = {name: numbers.astype(name) for name in ("float16", "float32", "float64", "int8", "int64", "uint8")}
    tree |= {"bfloat16": jnp.asarray(numbers / 7, jnp.bfloat16), "bool": numbers % 2 == 0}
    tree |= {"small": np.float32([1.5, -2]), "empty": np.zeros((0, 3), np.float32), "scalar": np.float32(0.1)}
    tree |= {"complex64": (numbers + 1j * numbers[::-1]).astype(np.complex64), "complex": 1.5 - 2j, "none": None}
    tree |= {"deep": {"list": [1, {"x": np.int32([7])}], "tuple": (), "text": "ä", "true": True, "number": 2**40}}
    return serialization.to_bytes(tree)


if __name__ == "__main__":
    print({m.__name__: m.__version__ for m in (jax, flax, optax, np)})
    if len(sys.argv) > 1:
        for number, name in enumerate(CASES, 1):
            folder = Path(sys.argv[1]) / name
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"ckpt-{number}.flax").write_bytes(write(state(name)))
    else:
        (HERE / f"{STORED}.flax.xz").write_bytes(lzma.compress(write(state(STORED)), preset=9 | lzma.PRESET_EXTREME))
        (HERE / "pieces.flax").write_bytes(pieces())
