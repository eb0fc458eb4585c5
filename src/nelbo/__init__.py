"""nelbo trains diffusion models for likelihood and says, in bits per dimension with an error bar, how good they are.

    model = nelbo.load("runs/demo")                         # or nelbo.build("mulan-digits")
    terms = nelbo.elbo(model, images)                       # Terms, nats per image
    result = nelbo.likelihood.vlb(model, images)            # BitsPerDim
    images = nelbo.sample(model, 64)
    nelbo.save_pretrained("runs/demo", "demo")              # to share; nelbo.load("demo"), or a hub id

Images are uint8, (batch, channels, height, width). Importing nelbo imports no torch: parts load where they are used.
"""

import importlib
from typing import Any

__version__ = "0.1.0"

__all__ = [
    "DiffusionModel",
    "UserError",
    "build",
    "ddpm",
    "elbo",
    "from_pretrained",
    "likelihood",
    "load",
    "push_to_hub",
    "sample",
    "save_pretrained",
]

_HOMES = {
    "DiffusionModel": "nelbo.model",
    "UserError": "nelbo.errors",
    "build": "nelbo.api",
    "ddpm": "nelbo.api",
    "elbo": "nelbo.api",
    "from_pretrained": "nelbo.api",
    "load": "nelbo.api",
    "push_to_hub": "nelbo.sharing",
    "sample": "nelbo.samplers",
    "save_pretrained": "nelbo.sharing",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    try:
        return importlib.import_module(f"nelbo.{name}")
    except ModuleNotFoundError as error:
        if error.name != f"nelbo.{name}":
            raise
        raise AttributeError(f"module 'nelbo' has no attribute {name!r}") from None
