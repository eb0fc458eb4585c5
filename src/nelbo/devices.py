"""Where figures are computed, in which arithmetic, and with which versions."""

import contextlib
import os
import platform
from typing import Any

import numpy as np
import torch

import nelbo
from nelbo.errors import UserError

__all__ = ["choose_device", "full_float32", "versions"]


def choose_device(name: str | None = None) -> torch.device:
    """The device of that name; without one a GPU where there is one, of several processes on a machine to each its own
    (LOCAL_RANK), else the CPU."""
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        if device.type == "cuda" and device.index is None and "LOCAL_RANK" in os.environ:
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(device)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device must name a device of this machine, such as cpu or cuda, got {name!r} "
                        f"({str(error).splitlines()[0]})") from None  # fmt: skip
    return device


def full_float32() -> contextlib.AbstractContextManager[Any]:
    """Inside, a GPU's convolutions keep all 24 bits of float32 (torch lets them drop 13), and repeat exactly."""
    return torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False)


def versions() -> dict[str, str]:
    """What a figure was made with."""
    return {
        "nelbo": nelbo.__version__,
        "torch": torch.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
    }
