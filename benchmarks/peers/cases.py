r"""A transcription of VDM's flat U-Net, loss, sampler and optimizer held against the public code's own numbers.

The cases (tests/reference, README.md there) are read with numpy alone. A side is an object of functions whose arrays
are the cases' own, parameters by flax names, images (B, H, W, C):

    network(parameters, settings, z, gamma, conditioning)          -> eps_hat, and the vector-Jacobian product of z with
                                                                      ``cotangent``
    loss(parameters, settings, images, conditioning, eps_0, t0, eps) -> its terms (B,), bpd, and the gradient of bpd
    step(parameters, settings, z, s, t, conditioning, eps)         -> z_s
    decode(parameters, settings, z_0)                              -> grey levels
    optimize(parameters, gradients, settings)                      -> parameters and average after each of the steps

What is allowed is at most what ``tests/test_reference.py`` allows nelbo itself (tests/reference/README.md).
"""

import json
from pathlib import Path
from typing import Any, Protocol

import numpy as np

Array = np.ndarray
Parameters = dict[str, Array]
Row = tuple[str, float, float]
VARIANT = "learnable_scalar_T0"  # of vdm_loss: what vdm-cifar10 trains


class Side(Protocol):
    """What is checked."""

    def network(
        self, parameters: Parameters, settings: dict[str, Any], z: Array, gamma: Array, conditioning: Array, v: Array
    ) -> tuple[Array, Array]: ...

    def loss(
        self, parameters: Parameters, settings: dict[str, Any], images: Array, conditioning: Array, eps_0: Array,
        t0: Array, eps: Array,
    ) -> tuple[dict[str, Array], Parameters]: ...  # fmt: skip

    def step(
        self, parameters: Parameters, settings: dict[str, Any], z: Array, s: float, t: float, conditioning: Array,
        eps: Array,
    ) -> Array: ...  # fmt: skip

    def decode(self, parameters: Parameters, settings: dict[str, Any], z_0: Array) -> Array: ...

    def optimize(
        self, parameters: Parameters, gradients: list[Parameters], settings: dict[str, Any]
    ) -> list[tuple[Parameters, Parameters]]: ...


def under(case: Any, prefix: str) -> Parameters:
    """The arrays whose key begins with ``prefix``, named by the rest of it."""
    return {key.removeprefix(prefix): case[key] for key in case.files if key.startswith(prefix)}


def absolute(a: Array, b: Array) -> float:
    """The largest difference; infinite where shapes differ."""
    return float(np.abs(np.asarray(a, np.float64) - b).max()) if np.shape(a) == np.shape(b) else float("inf")


def relative(a: Array, b: Array) -> float:
    """The L2 norm of the difference over that of b; infinite where shapes differ."""
    if np.shape(a) != np.shape(b):
        return float("inf")
    return float(np.linalg.norm(np.asarray(a, np.float64) - b) / max(np.linalg.norm(np.asarray(b, np.float64)), 1e-30))


def networks(side: Side, name: str, case: Any, settings: dict[str, Any]) -> list[Row]:
    """A network on its own."""
    found, of_z = side.network(
        under(case, "params/"), settings, case["in/z"], case["in/g_t"], case["in/conditioning"], case["in/cotangent"]
    )
    return [
        (f"{name} eps_hat", absolute(found, case["out/eps_hat"]), 5e-4),
        (f"{name} eps_hat, relative", relative(found, case["out/eps_hat"]), 1e-4),
        (f"{name} vector-Jacobian product of z", relative(of_z, case["out/vjp_z"]), 5e-4),
    ]


def losses(side: Side, name: str, case: Any, settings: dict[str, Any]) -> list[Row]:
    """The training loss and the norms of its gradient."""
    parameters = under(case, "params/")
    parameters = {k: v for k, v in parameters.items() if not k.startswith("gamma/") or k in ("gamma/w", "gamma/b")}
    draws = [case[f"draw/{VARIANT}/{draw}"] for draw in ("eps_0", "t0", "eps")]
    terms, gradient = side.loss(parameters, settings, case["in/images"], case["in/conditioning"], *draws)
    recorded = under(case, f"out/{VARIANT}/")
    rows: list[Row] = [
        (f"{name} eps_hat", absolute(terms["eps_hat"], recorded["eps_hat"]), 5e-4),
        (f"{name} eps_hat, relative", relative(terms["eps_hat"], recorded["eps_hat"]), 1e-4),
        *(
            (f"{name} {term}", relative(terms[term], recorded[term]), 1e-5)
            for term in ("loss_recon", "loss_diff", "bpd")
        ),
    ]
    # A pixel's part of the prior term is a small difference of numbers near 1, of which float32 loses up to 2^-24.
    of_prior = case["in/images"][0].size * 2**-24 / float(recorded["loss_klz"].mean())
    rows.append((f"{name} loss_klz", relative(terms["loss_klz"], recorded["loss_klz"]), 1e-5 + of_prior))
    norms = under(case, f"out/{VARIANT}/grad_l2/")
    if norms.keys() != gradient.keys():
        raise ValueError(f"{name}: gradients of other parameters than the case's")
    for key, norm in norms.items():
        if not key.endswith("k/bias") and gradient[key].size > 1:  # the first is 0, a single number can cancel
            ours = np.linalg.norm(np.asarray(gradient[key], np.float64))
            rows.append((f"{name} gradient of {key}", float(abs(ours - norm) / norm), 2e-3))
    return rows


def ancestral(side: Side, name: str, case: Any, settings: dict[str, Any]) -> list[Row]:
    """A sampling step, and the decoder."""
    parameters, i, steps = under(case, "params/"), int(case["in/i"]), int(case["in/T"])
    z_s = side.step(
        parameters, settings, case["in/z_t"], (steps - i - 1) / steps, (steps - i) / steps, case["in/conditioning"],
        case["draw/eps"],
    )  # fmt: skip
    decoded = side.decode(parameters, settings, case["in/z_0"])
    return [
        (f"{name} z_s", absolute(z_s, case["out/z_s"]), 2e-4),
        (f"{name} decoded", absolute(decoded, case["out/x"]), 0.0),
    ]


def optimizers(side: Side, name: str, case: Any, settings: dict[str, Any]) -> list[Row]:
    """AdamW and the average."""
    steps = sorted({key.split("/")[1] for key in case.files if key.startswith("in/step")})
    found = side.optimize(under(case, "params/"), [under(case, f"in/{step}/grad/") for step in steps], settings)
    rows = []
    for step, both in zip(steps, found, strict=True):
        for kind, ours in zip(("params", "ema"), both, strict=True):
            recorded = under(case, f"out/{step}/{kind}/")
            rows.append((f"{name} {step} {kind}", max(absolute(ours[k], v) for k, v in recorded.items()), 1e-7))
    return rows


KINDS = {"score_unet_vdm": networks, "vdm_loss": losses, "vdm_ancestral": ancestral, "optimizer": optimizers}
NEEDED = ("vdm_loss", "vdm_ancestral", "optimizer")


def check(side: Side, folder: Path) -> list[Row]:
    """(what, difference, allowed) for every case of the folder that the side is a transcription of."""
    rows: list[Row] = []
    seen = set()
    for path in sorted(folder.glob("*.npz")):
        kind = next((kind for kind in KINDS if path.stem.startswith(kind)), None)
        if kind is None:
            continue
        with np.load(path, allow_pickle=False) as case:
            settings = json.loads(str(case["meta/config"]))
            if settings.get("with_attention"):  # everywhere: not what is timed
                continue
            rows += KINDS[kind](side, path.stem, case, settings)
        seen.add(kind)
    if missing := [kind for kind in NEEDED if kind not in seen]:
        raise FileNotFoundError(f"{folder} has no case of {', '.join(missing)}")
    return rows
