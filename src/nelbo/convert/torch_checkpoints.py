"""What converters of PyTorch files share: reading as data, betas, an optimizer's moments, the size of the images.

Betas are float32 in other programs, which mean the numbers that float32 stands for: where they are those of a form of
nelbo's to 5e-7 of their size, the form's own are taken, in float64.

A state of torch.optim.Adam (or AdamW) counts parameters instead of naming them, in the order of a module's own, which
is that of its state_dict; each has exp_avg, exp_avg_sq and step, as nelbo's optimizer has.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nelbo.config import Config, ObjectiveConfig, ScheduleConfig
from nelbo.convert import Images, known_images
from nelbo.errors import UserError
from nelbo.schedules import BETAS

__all__ = ["adam_moments", "image_shape", "of_noise_levels", "read_torch", "schedule_of_betas", "tensors_of", "widened"]

MOMENTS = ("exp_avg", "exp_avg_sq", "step")


def read_torch(path: Path) -> Any:
    """The contents of a file of torch.save, by torch's weights-only loader; UserError where it is none, is damaged, or
    holds code."""
    if not path.is_file():
        raise UserError(f"there is no file {path}")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # zip, pickle and torch raise what they like
        reason = " ".join(str(error).split())[:160]
        raise UserError(f"{path} cannot be read as a checkpoint of tensors: {reason}") from None


def tensors_of(path: Path, state: Any, what: str) -> dict[str, Tensor]:
    """A state_dict: names -> tensors, floating ones as float32. UserError where it is something else."""
    if not isinstance(state, dict) or not all(
        isinstance(name, str) and isinstance(value, Tensor) for name, value in state.items()
    ):
        raise UserError(f"{path}: {what} is no table of named tensors; it is another program's file")
    return {name: value.float() if value.is_floating_point() else value for name, value in state.items()}


def form_of(betas: np.ndarray) -> str | None:
    """The form whose betas these are; None where there is none."""
    for name, form in BETAS.items() if len(betas) > 1 else ():
        if np.allclose(betas, form(len(betas)), rtol=5e-7, atol=0):
            return name
    return None


def widened(betas: np.ndarray) -> np.ndarray:
    """Betas (T,) as float64, a form's own where they are its."""
    betas = np.asarray(betas, dtype=np.float64)
    form = form_of(betas)
    return betas if form is None else BETAS[form](len(betas))


def schedule_of_betas(betas: np.ndarray, base: ScheduleConfig) -> ScheduleConfig:
    """The schedule of ``widened`` betas."""
    form: Any = form_of(betas)
    values = {"form": form, "betas": None} if form is not None else {"betas": tuple(betas.tolist())}
    return replace(base, kind="betas", ends="fixed", gamma_min=None, timesteps=len(betas), **values)


def of_noise_levels(base: ObjectiveConfig, levels: int, learned: bool) -> ObjectiveConfig:
    """The preset's objective for T = ``levels`` noise levels: with a learned variance hybrid in place of simple,
    without one the reverse; nothing of continuous time."""
    loss: Any = {"simple": "hybrid"} if learned else {"hybrid": "simple"}
    times: Any = "stratified" if base.times == "importance" else base.times
    return replace(
        base, loss=loss.get(base.loss, base.loss), steps=levels - 1, times=times, minimise_variance=False,
        second_order=0.0, prior_scale=1.0,
    )  # fmt: skip


def adam_moments(path: Path, state: Any, parameters: dict[str, Tensor]) -> dict[str, dict[str, Tensor]] | None:
    """ "exp_avg", "exp_avg_sq" and "step" -> names of ``parameters``, in their order -> tensors; None where there are
    none. UserError where they are not those of these parameters."""
    if state is None or (isinstance(state, dict) and not state.get("state")):
        return None
    try:
        order = [number for group in state["param_groups"] for number in group["params"]]
        found: dict[str, dict[str, Tensor]] = {key: {} for key in MOMENTS}
        for number, name in zip(order, parameters, strict=True):
            for key in MOMENTS if number in state["state"] else ():
                value = torch.as_tensor(state["state"][number][key], dtype=torch.float32)
                if value.shape != (() if key == "step" else parameters[name].shape):
                    raise ValueError(f"{key} of {name} has shape {tuple(value.shape)}")
                found[key][name] = value
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        said = f"it lacks {error}" if isinstance(error, KeyError) else " ".join(str(error).split())[:160]
        raise UserError(f"{path}: its optimizer is no Adam of this network: {said}") from None
    return found


def image_shape(source: Path, channels: int, base: Config, images: Images) -> tuple[tuple[int, int, int], int | None]:
    """(C, H, W), which the file does not say, and the levels of such images where they are known: what the user says,
    or what the preset's data set has. UserError where neither does, or its channels are others."""
    known, name = known_images(base), base.data.source
    if images.size is not None:
        if min(images.size) < 1:
            raise UserError(f"--size must be a height and a width above 0, got {' '.join(map(str, images.size))}")
        shape = (channels, *images.size)
        return shape, images.levels or (known[1] if known is not None and known[0] == shape else None)
    if known is None:
        raise UserError(
            f"{source} does not say how large its images are, and the images of data.source = {name} are not known "
            "here: give --size HEIGHT WIDTH"
        )
    if known[0][0] != channels:
        raise UserError(
            f"{source} is of images of {channels} channels, and {name} has images of "
            f"{'x'.join(map(str, known[0]))}: give --data.source, or --size HEIGHT WIDTH"
        )
    return known[0], images.levels or known[1]
