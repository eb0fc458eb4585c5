"""Reading reference cases: the public implementations' names and layouts, translated into nelbo's.

The public code is written in flax: images (B, H, W, C), convolution kernels (H, W, in, out), dense kernels (in, out),
and per-pixel schedules as vectors whose entry (h W + w) C + c belongs to row h, column w, channel c. Sizes are read off
the arrays. `tests/reference/README.md` lists the cases.
"""

import json
import math
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from nelbo import schedules
from nelbo.networks import CNNEncoder, FlatUNet, PixelNoiseUNet, UNetEncoder
from nelbo.parameterizations import velocity_from_epsilon

__all__ = [
    "GROUPS",
    "Case",
    "Comparison",
    "VelocityFromEpsilon",
    "build_encoder",
    "build_network",
    "build_schedule",
    "channels_first",
    "layer_names",
    "load",
    "network_names",
    "schedule_names",
    "unflatten",
    "without_gradient",
]

GROUPS = 32  # of every flax GroupNorm here

LEAF = {"kernel": "weight", "scale": "weight", "bias": "bias"}
BLOCK = {
    "GroupNorm_0": "norm_1",
    "conv1": "conv_1",
    "cond_proj": "project",
    "GroupNorm_1": "norm_2",
    "conv2": "conv_2",
    "nin_shortcut": "shortcut",
}
ATTENTION = {"GroupNorm_0": "norm", "q": "q", "k": "k", "v": "v", "proj_out": "out"}
NETWORK = {
    "dense0": "trunk.dense_0",
    "dense1": "trunk.dense_1",
    "conv_in": "trunk.conv_in",
    "GroupNorm_0": "norm",
    "conv_out": "conv_out",
    "dense_layer_final": "heads.0",
    "dense_layer_final_mu": "heads.0",
    "dense_layer_final_sigma": "heads.1",
    "CONV1": "conv_1",
    "CONV2": "conv_2",
    "DENSE": "heads.0",
}
SCHEDULE = {
    "dense_1": "dense_1",
    "dense_2": "dense_2",
    "dense_out_a": "head_a",
    "dense_out_b": "head_b",
    "dense_out_c": "head_d",
    "l1": "l1",
    "l2": "l2",
    "l_int": "l_int",
    "l3": "l3",
}
Parameters = dict[str, Tensor]


def channels_first(a: Tensor) -> Tensor:
    """(*, H, W, C) -> (*, C, H, W)."""
    return a.movedim(-1, -3).contiguous()


def unflatten(a: Tensor, shape: tuple[int, int, int]) -> Tensor:
    """(*, H W C) -> (*, C, H, W) for images of ``shape`` (C, H, W)."""
    return channels_first(a.reshape(*a.shape[:-1], *shape[1:], shape[0]))


class Case:
    """One file: its arrays as tensors, its configuration, and the variants that it holds."""

    def __init__(self, path: Path) -> None:
        with np.load(path, allow_pickle=False) as arrays:
            self.arrays = {key: arrays[key] for key in arrays.files}
        self.name = path.name
        self.config: dict[str, Any] = json.loads(str(self.arrays["meta/config"]))

    def __contains__(self, key: str) -> bool:
        return key in self.arrays

    def __getitem__(self, key: str) -> Tensor:
        if key not in self.arrays:
            raise KeyError(f"{self.name} has no {key}")
        return torch.as_tensor(self.arrays[key])

    def under(self, prefix: str) -> dict[str, Tensor]:
        """The arrays whose key begins with ``prefix``, named by the rest of it."""
        return {key.removeprefix(prefix): self[key] for key in self.arrays if key.startswith(prefix)}

    def variants(self, output: str) -> list[str]:
        """v/ for every key out/v/``output``; the empty string where there is out/``output``."""
        matches = (re.fullmatch(rf"out/((?:[^/]+/)?){output}", key) for key in self.arrays)
        return list(dict.fromkeys(match[1] for match in matches if match))

    def settings(self, variant: str) -> dict[str, Any]:
        """The configuration of a variant: what the file says of it, or else what its name says."""
        name = variant.removesuffix("/")
        own = self.config.get("variants", {}).get(name)
        if own is None:
            own = {}
            if steps := re.search(r"(?:^|_)T(\d+)$", name):
                own["sm_n_timesteps"] = int(steps[1])
            if gamma := re.match("learnable_scalar|learnable_nnet|fixed", name):
                own["gamma_type"] = gamma[0]
            if name.startswith("velocity"):
                own["velocity_from_epsilon"] = name.startswith("velocity_from_epsilon")
        return self.config | own


class Comparison:
    """Differences between our numbers and a case's, each beside what is allowed."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.rows: list[tuple[str, float, float]] = []
        self.seen: set[str] = set()

    def __call__(
        self,
        key: str,
        ours: Tensor,
        *,
        absolute: float = 0,
        relative: float = 0,
        layout: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        """Compare with out/``key``, if recorded: the largest difference or the relative L2 one, as is allowed.

        ``layout`` turns the recorded array into our layout.
        """
        if f"out/{key}" not in self.case:
            return
        self.seen.add(f"out/{key}")
        theirs = self.case[f"out/{key}"]
        self.values(key, ours, layout(theirs) if layout else theirs, absolute=absolute, relative=relative)

    def values(self, name: str, ours: Tensor, theirs: Tensor, *, absolute: float = 0, relative: float = 0) -> None:
        """The same for two tensors in hand."""
        a, b = ours.detach().double(), theirs.double()
        assert a.shape == b.shape, f"{self.case.name}, {name}: our shape {tuple(a.shape)}, recorded {tuple(b.shape)}"
        if absolute:
            self.rows.append((f"{name} abs", float((a - b).abs().max()), absolute))
        if relative:
            self.rows.append((f"{name} rel", float((a - b).norm() / b.norm().clamp(min=1e-30)), relative))

    def gradients(self, key: str, module: nn.Module, names: dict[str, str], noise: set[str], tolerance: float) -> None:
        """The norms out/``key``* of a module's gradients, ``names`` from theirs to ours, passing over ``noise``.

        The gradient of a single number can cancel: it is measured against the typical entry of its layer's, if larger.
        """
        ours = dict(module.named_parameters())
        recorded = {theirs: float(array) for theirs, array in self.case.under(f"out/{key}").items()}
        for theirs, name in names.items():
            parameter, allowed = ours[name], tolerance
            if theirs in noise:
                self.skip(key + theirs)
                continue
            if parameter.numel() == 1 and recorded.get(theirs):
                layer = [k for k in recorded if k in names and k.rpartition("/")[0] == theirs.rpartition("/")[0]]
                entries = sum(ours[names[k]].numel() for k in layer)
                typical = math.sqrt(sum(recorded[k] ** 2 for k in layer) / entries)
                allowed *= max(1.0, typical / recorded[theirs])
            gradient = torch.zeros(()) if parameter.grad is None else parameter.grad.norm()
            self(key + theirs, gradient, relative=allowed)

    def skip(self, key: str) -> None:
        """out/``key`` is rounding noise."""
        self.seen.add(f"out/{key}")

    def finish(self, complete: bool) -> None:
        """Print every difference; fail with those that are too large, and if nothing was compared.

        ``complete``: fail also where an output of the case was not looked at.
        """
        for name, difference, allowed in self.rows:
            print(f"{self.case.name:34} {name:64} {difference:8.1e} of {allowed:.0e}")
        wrong = [
            f"{name}: {difference:.2e}, allowed {allowed:.0e}"
            for name, difference, allowed in self.rows
            if not difference <= allowed
        ]
        assert not wrong, f"{self.case.name}: {len(wrong)} of {len(self.rows)} differ\n  " + "\n  ".join(wrong)
        assert self.rows, f"{self.case.name}: nothing in it could be compared"
        left = sorted({key for key in self.case.arrays if key.startswith("out/")} - self.seen)
        assert not (complete and left), f"{self.case.name}: not compared: {', '.join(left)}"


class VelocityFromEpsilon(nn.Module):
    """A noise network read as a velocity network."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, z: Tensor, gamma: Tensor, conditioning: Tensor | None) -> Tensor:
        return velocity_from_epsilon(z, gamma, self.network(z, gamma, conditioning))


def layer_names(parameters: Iterable[str], table: dict[str, str]) -> dict[str, str]:
    """flax name -> nelbo name of a layer's parameters."""
    return {name: f"{table[name.split('/')[0]]}.{LEAF[name.split('/')[1]]}" for name in parameters}


def network_names(parameters: Iterable[str]) -> dict[str, str]:
    """flax name -> nelbo name of a denoiser's or an encoder's parameters."""
    names = {}
    for name in parameters:
        first, *rest, leaf = name.split("/")
        if level := re.fullmatch(r"(down|mid|up)\.(block|attn)_(\d+)", first):
            part, kind, number = level[1], level[2], int(level[3])
            place = {"down": f"trunk.down.{number}", "mid": f"trunk.middle.{number - 1}", "up": f"up.{number}"}[part]
            own = f"block.{BLOCK[rest[0]]}" if kind == "block" else f"attention.{ATTENTION[rest[0]]}"
            # mid.attn_1 stands between mid.block_1 and mid.block_2: it is the attention of our first level.
            names[name] = f"{place}.{own}.{LEAF[leaf]}"
        else:
            names[name] = f"{NETWORK[first]}.{LEAF[leaf]}"
    return names


def schedule_names(parameters: Iterable[str]) -> dict[str, str]:
    """flax name -> nelbo name of a schedule's parameters."""
    scalar = {"w": "slope", "b": "start"}
    return {
        name: scalar.get(name) or f"interior.{next(iter(layer_names([name], SCHEDULE).values()))}"
        for name in parameters
    }


def without_gradient(parameters: Iterable[str], alone: bool, pixelwise: bool = False, whole: bool = True) -> set[str]:
    """Parameters (flax names) whose gradient is zero in exact arithmetic: what is recorded there is rounding noise.

    A softmax does not see the bias of the keys. A normalisation whose groups are single channels (``alone``) removes
    whatever is constant over an image: time and conditioning (unless ``pixelwise``), the bias before it and, in a
    ``whole`` network, the biases that meet nothing but such normalisations: those of the last level, or, without
    skips (an encoder), of all.
    """
    parameters = list(parameters)
    patterns = [r"(.*/)?k/bias"]
    if alone:
        patterns.append(r"(.*/)?conv1/bias")
    if alone and not pixelwise:
        patterns.append(r"dense[01]/.*|(.*/)?cond_proj/kernel")
    if alone and whole:
        ups = [int(level[1]) for name in parameters if (level := re.match(r"up\.block_(\d+)", name))]
        level = rf"up\.\w+_{max(ups)}/" if ups else "(.*/)?"
        patterns.append(rf"{level}(conv_in|conv2|nin_shortcut|v|proj_out)/bias")
    return {name for name in parameters if any(re.fullmatch(pattern, name) for pattern in patterns)}


def load(module: nn.Module, parameters: Parameters, names: dict[str, str]) -> None:
    """Put recorded parameters into a module; on both sides, every parameter must have its partner."""
    shapes = {name: parameter.shape for name, parameter in module.named_parameters()}
    state = {}
    for theirs, array in parameters.items():
        if array.ndim == 4:
            array = array.permute(3, 2, 0, 1)
        elif array.ndim == 2:
            array = array.T.reshape(shapes[names[theirs]])  # the shortcut is a 1x1 convolution
        state[names[theirs]] = array
    module.load_state_dict(state)


def _levels(parameters: Parameters) -> int:
    return len({name.split("/")[0] for name in parameters if name.startswith("down.block_")})


def _attention(parameters: Parameters) -> bool:
    return any(re.match(r"(down|up)\.attn_", name) for name in parameters)


def _fourier(parameters: Parameters, image_channels: int) -> tuple[float, ...]:
    return (6.0, 7.0) if parameters["conv_in/kernel"].shape[2] > image_channels else ()


def build_network(parameters: Parameters, config: dict[str, Any], pixelwise: bool) -> FlatUNet:
    """The denoiser that has these parameters (flax names)."""
    image_channels, channels = parameters["conv_out/kernel"].shape[-1], parameters["conv_in/kernel"].shape[-1]
    cls = PixelNoiseUNet if pixelwise else FlatUNet
    network = cls(
        image_channels,
        channels,
        _levels(parameters),
        parameters["dense0/kernel"].shape[0] - cls.time_features(image_channels, channels),
        _fourier(parameters, image_channels),
        config["gamma_min"],
        config["gamma_max"],
        groups=GROUPS,
        attention_everywhere=_attention(parameters),
    )
    load(network, parameters, network_names(parameters))
    return network


def build_encoder(parameters: Parameters, shape: tuple[int, int, int]) -> CNNEncoder | UNetEncoder:
    """The encoder of images of ``shape`` (C, H, W) that has these parameters (flax names)."""
    encoder: CNNEncoder | UNetEncoder
    if "CONV1/kernel" in parameters:
        kernel = parameters["DENSE/kernel"]
        encoder = CNNEncoder(shape, kernel.shape[1])
        flat = unflatten(kernel.T, (len(kernel) // (shape[1] * shape[2]), *shape[1:])).flatten(1)
        parameters = parameters | {"DENSE/kernel": flat.T}
    else:
        heads = [array for name, array in parameters.items() if re.match(r"dense_layer_final.*/bias", name)]
        encoder = UNetEncoder(
            shape,
            len(heads[0]),
            len(heads),
            channels=parameters["conv_in/kernel"].shape[-1],
            levels=_levels(parameters),
            fourier=_fourier(parameters, shape[0]),
            groups=GROUPS,
            attention_everywhere=_attention(parameters),
        )
    load(encoder, parameters, network_names(parameters))
    return encoder


def build_schedule(parameters: Parameters, config: dict[str, Any], shape: tuple[int, int, int]) -> schedules.Schedule:
    """The schedule of images of ``shape`` (C, H, W) that has these parameters (flax names)."""
    ends = config["gamma_min"], config["gamma_max"]
    if "l_int/kernel" in parameters or "dense_out_a/kernel" in parameters:
        parameters = {
            name: unflatten(array, shape).flatten(-3) if re.match("dense_out_|l3/", name) else array
            for name, array in parameters.items()
        }
    if "dense_out_a/kernel" in parameters:
        condition, width = parameters["dense_1/kernel"].shape
        schedule = schedules.Schedule(schedules.Polynomial(shape, condition, width), *ends)
    elif "l_int/kernel" in parameters:
        inputs, width = parameters["l2/kernel"].shape
        schedule = schedules.Schedule(schedules.PixelMonotone(shape, *ends, inputs - 1, width), *ends, "free")
    elif "l2/kernel" in parameters:
        width = parameters["l2/kernel"].shape[1]
        schedule = schedules.Schedule(schedules.Monotone(*ends, width), *ends, "free")
    else:
        schedule = schedules.Schedule(schedules.Linear(), *ends, "learned" if "w" in parameters else "fixed")
    load(schedule, parameters, schedule_names(parameters))
    return schedule
