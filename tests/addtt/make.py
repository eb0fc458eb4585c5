"""Writes the fixtures of this folder with addtt/variational-diffusion-models itself; README.md says what they hold.

    git clone https://github.com/addtt/variational-diffusion-models CHECKOUT     (commit 4adba66 or later)
    python -m venv VENV; VENV/bin/pip install torch==2.13.0 accelerate==1.15.0 ema-pytorch==0.1.4 pyyaml tqdm
    VENV/bin/python tests/addtt/make.py CHECKOUT

torchvision and torchinfo are imported there for data sets, pictures and a summary only: where they do not import, empty
modules stand for them.
"""

import importlib
import shutil
import sys
import types
from pathlib import Path
from unittest import mock

import numpy as np
import torch

HERE = Path(__file__).resolve().parent
NAMES = {
    "torchvision": {}, "torchvision.transforms": {}, "torchvision.datasets": {"CIFAR10": None},
    "torchvision.utils": {"save_image": None}, "torchinfo": {},
}  # fmt: skip
N, SIZE = 4, 8

LEARNED = {
    "embedding_dim": 8, "n_blocks": 1, "n_attention_heads": 2, "dropout_prob": 0.0, "norm_groups": 2,
    "input_channels": 3, "use_fourier_features": True, "attention_everywhere": True, "batch_size": N,
    "noise_schedule": "learned_linear", "gamma_min": -13.3, "gamma_max": 5.0, "antithetic_time_sampling": True,
    "lr": 1e-3, "weight_decay": 0.0, "clip_grad_norm": True,
}  # fmt: skip
FIXED = LEARNED | {
    "n_blocks": 2, "n_attention_heads": 1, "dropout_prob": 0.1, "norm_groups": 4, "input_channels": 1,
    "use_fourier_features": False, "attention_everywhere": False, "noise_schedule": "fixed_linear", "gamma_min": -10.0,
    "gamma_max": 4.0, "antithetic_time_sampling": False, "weight_decay": 0.01, "clip_grad_norm": False,
}  # fmt: skip


def stand_in() -> None:
    """Empty modules for what does not import."""
    try:
        import torchinfo  # noqa: F401
        import torchvision  # noqa: F401
    except Exception:
        for name, members in NAMES.items():
            sys.modules[name] = types.ModuleType(name)
            for member, value in members.items():
                setattr(sys.modules[name], member, value)
        sys.modules["torchvision"].transforms = sys.modules["torchvision.transforms"]


def random(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def given(values):
    """torch.randn_like gives these, one after the other."""
    left = list(values)
    return mock.patch("torch.randn_like", lambda *_, **__: left.pop(0).clone())


def record(code, name: str, settings: dict) -> dict[str, np.ndarray]:
    """Three steps of the trainer, its file, and numbers of the networks in it."""
    train, unet, vdm, utils = code
    torch.manual_seed(0)
    np.random.seed(0)
    config = utils.TrainConfig(**settings)
    shape = (config.input_channels, SIZE, SIZE)
    model = vdm.VDM(unet.UNetVDM(config), config, image_shape=torch.Size(shape))
    with torch.no_grad():
        for parameter in model.model.parameters():  # those that begin as zero hide their layer
            parameter.add_(0.05 * torch.randn_like(parameter))
    images = torch.randint(0, 256, (N, *shape), generator=torch.Generator().manual_seed(1))
    pictures = [image / 255.0 for image in images]
    folder = HERE / name
    shutil.rmtree(folder, ignore_errors=True)
    accelerator = utils.Accelerator(split_batches=True, cpu=True)
    trainer = train.Trainer(
        model, pictures, pictures, accelerator, lambda parameters: torch.optim.AdamW(
            parameters, config.lr, betas=(0.9, 0.99), weight_decay=config.weight_decay, eps=1e-8
        ), config, train_num_steps=3, save_and_eval_every=10**9, results_path=folder, num_dataloader_workers=0,
    )  # fmt: skip
    trainer.ema.update_after_step = 0  # else the average is the network itself for a hundred steps
    trainer.train()
    trainer.save_checkpoint()
    arrays = {
        "images": images.numpy().astype(np.uint8), "t": torch.tensor([0.01, 0.3, 0.6, 0.99]).numpy(),
        "noise": random(N, *shape, seed=2).numpy(), "noise_0": random(N, *shape, seed=3).numpy(),
        "z": random(N, *shape, seed=4).numpy(), "step_noise": random(N, *shape, seed=5).numpy(),
    }  # fmt: skip
    t, z, noise, noise_0 = (torch.from_numpy(arrays[key]) for key in ("t", "z", "noise", "noise_0"))
    batch = torch.stack(pictures)

    def loss(network):
        with mock.patch.object(vdm.VDM, "sample_times", lambda self, size: t.clone()), given([noise_0]):
            return network(batch, noise=noise)

    for kind, network in (("raw", model.eval()), ("ema", trainer.ema.ema_model)):
        with torch.no_grad():
            gamma = network.gamma(t)
            arrays |= {f"{kind}.gamma": gamma.numpy(), f"{kind}.out": network.model(z, gamma).numpy()}
        found = loss(network)[1]
        for theirs, ours in (("diff_loss", "diffusion"), ("latent_loss", "prior"), ("loss_recon", "reconstruction")):
            arrays[f"{kind}.{ours}"] = found[theirs].detach().numpy()
    for clip in (False, True):
        with given([torch.from_numpy(arrays["step_noise"])]):
            step = model.sample_p_s_t(z, torch.tensor(0.5), torch.tensor(0.4), clip)
        arrays[f"step.{'clipped' if clip else 'free'}"] = step.numpy()
    # One step more, on the same images at the same times with the same noise.
    trainer.opt.zero_grad()
    loss(model)[0].backward()
    if config.clip_grad_norm:
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
    trainer.opt.step()
    torch.save({"step": 4, "model": model.state_dict()}, folder / "next.pt")
    return arrays


def main(checkout: str) -> None:
    stand_in()
    sys.path.insert(0, checkout)
    code = [importlib.import_module(name) for name in ("train", "vdm_unet", "vdm", "utils")]
    for name, settings in (("learned", LEARNED), ("fixed", FIXED)):
        np.savez_compressed(HERE / f"{name}.npz", **record(code, name, settings))


if __name__ == "__main__":
    main(*sys.argv[1:])
