r"""AdamW as the public implementations set it up: who is decayed, the learning rate of a step, the moving average.

    (1)  p  <-  p - eta_n ( m_hat / (sqrt(v_hat) + eps) + w p ),     w = 0 for every parameter named ``bias``
    (2)  eta_n = eta min(n/warmup, 1) d(n),  n = 0, 1, ..            so that the first step of a warm-up moves nothing
    (3)  ema <-  ema + (1 - decay) (p - ema)                         after each step

d(n) falls from 1 to 0 between the end of the warm-up and the end of the run (linear, cosine), or stays 1. Decayed are
kernels, scales of normalisations and the free parameters of schedules. torch's AdamW is (1).
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

from nelbo.config import OptimizerConfig

__all__ = ["learning_rate_factor", "parameter_groups", "update_ema"]


def parameter_groups(model: nn.Module, optimizer: OptimizerConfig, noise_names: set[str]) -> list[dict[str, Any]]:
    """Groups for AdamW: decayed or not, times ``noise_names`` (at ``schedule_learning_rate``) or the others.

    Each has "params", "weight_decay", "lr" and "base_lr", the rate before equation (2). Empty ones are left out.
    """
    own = optimizer.schedule_learning_rate
    noise_rate = optimizer.learning_rate if own is None else own
    groups: dict[tuple[bool, bool], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        noise, decayed = name in noise_names, name.rsplit(".", 1)[-1] != "bias"
        rate = noise_rate if noise else optimizer.learning_rate
        decay = optimizer.weight_decay if decayed else 0.0
        group = groups.setdefault((noise, decayed), {"params": [], "weight_decay": decay, "lr": rate, "base_lr": rate})
        group["params"].append(parameter)
    return list(groups.values())


def learning_rate_factor(step: int, optimizer: OptimizerConfig, steps: int) -> float:
    """eta_n / eta of equation (2) for step number ``step`` (from 0) of a run of ``steps``."""
    if step < optimizer.warmup:
        return step / optimizer.warmup
    if optimizer.decay == "none":
        return 1.0
    progress = min((step - optimizer.warmup) / max(steps - optimizer.warmup, 1), 1.0)
    return 1 - progress if optimizer.decay == "linear" else 0.5 * (1 + math.cos(math.pi * progress))


@torch.no_grad()
def update_ema(ema: list[Tensor], parameters: list[Tensor], decay: float) -> None:
    """Equation (3), in place."""
    torch._foreach_lerp_(ema, parameters, 1 - decay)
