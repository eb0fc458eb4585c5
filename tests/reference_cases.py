"""Reading reference cases. Names and layouts are translated by ``nelbo.convert.flax_checkpoints``; sizes are read off
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
from nelbo.convert.flax_checkpoints import (
    FOURIER,
    GROUPS,
    in_our_order,
    network_names,
    schedule_names,
    state_of,
    unet_sizes,
)
from nelbo.networks import CNNEncoder, FlatUNet, PixelNoiseUNet, UNetEncoder
from nelbo.parameterizations import velocity_from_epsilon

__all__ = [
    "Case",
    "Comparison",
    "VelocityFromEpsilon",
    "build_encoder",
    "build_network",
    "build_schedule",
    "load",
    "without_gradient",
]

Parameters = dict[str, Tensor]


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
    shapes = {name: tuple(parameter.shape) for name, parameter in module.named_parameters()}
    module.load_state_dict(state_of(parameters, names, shapes))


def build_network(parameters: Parameters, config: dict[str, Any], pixelwise: bool) -> FlatUNet:
    """The denoiser that has these parameters (flax names)."""
    image_channels = parameters["conv_out/kernel"].shape[-1]
    sizes = unet_sizes(parameters, image_channels)
    cls = PixelNoiseUNet if pixelwise else FlatUNet
    network = cls(
        image_channels,
        sizes.channels,
        sizes.levels,
        sizes.columns - cls.time_features(image_channels, sizes.channels),
        FOURIER[: sizes.fourier],
        config["gamma_min"],
        config["gamma_max"],
        groups=GROUPS,
        attention_everywhere=sizes.everywhere,
    )
    load(network, parameters, network_names(parameters))
    return network


def build_encoder(parameters: Parameters, shape: tuple[int, int, int]) -> CNNEncoder | UNetEncoder:
    """The encoder of images of ``shape`` (C, H, W) that has these parameters (flax names)."""
    encoder: CNNEncoder | UNetEncoder
    parameters = in_our_order(parameters, shape)
    if "CONV1/kernel" in parameters:
        encoder = CNNEncoder(shape, parameters["DENSE/kernel"].shape[1])
    else:
        heads = [array for name, array in parameters.items() if re.match(r"dense_layer_final.*/bias", name)]
        sizes = unet_sizes(parameters, shape[0])
        encoder = UNetEncoder(
            shape,
            len(heads[0]),
            len(heads),
            channels=sizes.channels,
            levels=sizes.levels,
            fourier=FOURIER[: sizes.fourier],
            groups=GROUPS,
            attention_everywhere=sizes.everywhere,
        )
    load(encoder, parameters, network_names(parameters))
    return encoder


def build_schedule(parameters: Parameters, config: dict[str, Any], shape: tuple[int, int, int]) -> schedules.Schedule:
    """The schedule of images of ``shape`` (C, H, W) that has these parameters (flax names)."""
    ends = config["gamma_min"], config["gamma_max"]
    parameters = in_our_order(parameters, shape)
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
