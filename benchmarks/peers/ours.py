"""nelbo's own side: ``Trainer.take_step`` of the composition that stands beside a peer, and its samplers, in a process
that sets itself up as the ``nelbo`` command does: how threads wait, memory that is kept."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import serve

from nelbo.process import choose_waiting, keep_memory

choose_waiting()  # before torch is loaded
keep_memory()

import numpy as np
import torch

from nelbo import samplers
from nelbo.config import Config
from nelbo.data import Dataset
from nelbo.presets import preset
from nelbo.training import Trainer

METHODS = {"flat": "ancestral", "ddpm": "ancestral", "attention": "ddim"}  # of the whole sampling


def configuration(case: dict[str, Any]) -> Config:
    """flat: vdm-cifar10, made small; ddpm and attention: ddpm-cifar10 with diffusers' U-Net or that of
    denoising-diffusion-pytorch."""
    kind = case["composition"]
    config = preset("vdm-cifar10" if kind == "flat" else "ddpm-cifar10")
    network = replace(config.network, kind=kind, channels=case["channels"], groups=case["groups"])
    if kind == "flat":
        network = replace(network, levels=case["levels"], dropout=case["dropout"])
    else:
        network = replace(
            network, multipliers=tuple(case["multipliers"]), attention_at=(case["size"] // 2,), dropout=0.0
        )
    return replace(
        config,
        network=network,
        data=replace(config.data, augment="none"),
        training=replace(
            config.training, batch=case["batch"], precision="bf16" if case["bf16"] else "float32"
        ),
    )  # fmt: skip


def build(case: dict[str, Any]) -> tuple[serve.Runs, dict[str, Any]]:
    """A training step, a sampling step, and samples from noise to grey levels."""
    batch, shape = case["batch"], (3, case["size"], case["size"])
    images = np.random.default_rng(0).integers(0, 256, (4 * batch, *shape), dtype=np.uint8)
    data = Dataset(
        "random", "0", {"train": images, "validation": images[:1], "test": images[:1]}, None, 256, "random images"
    )
    trainer = Trainer(configuration(case), Path("unused"), data)
    model = trainer.model
    z = torch.randn(batch, *shape)
    s, t = (torch.full((batch,), v, dtype=torch.float64) / 999 for v in (499, 500))
    if not model.schedule.timesteps:
        s, t = s.float(), t.float()
    method = METHODS[case["composition"]]

    @torch.no_grad()
    def sampling_step() -> None:
        model.eval()
        mean, std, _ = samplers.reverse_step(model)(z, s, t)
        mean + std * torch.randn_like(z)

    def sample() -> torch.Tensor:
        return samplers.sample(model, batch, method=method, steps=case["steps"])

    info = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "precision": "bf16 (autocast)" if case["bf16"] else "float32",
        "versions": serve.versions("torch"),
        "threads": f"{torch.get_num_threads()} threads of torch",
    }
    return {"training step": trainer.take_step, "sampling step": sampling_step, "samples": sample}, info


if __name__ == "__main__":
    serve.serve(lambda: None, build)
