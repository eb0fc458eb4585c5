"""Writes the fixtures of this folder with denoising-diffusion-pytorch 2.3.4 itself; README.md says what they hold.

    python -m venv VENV; VENV/bin/pip install torch==2.13.0 denoising-diffusion-pytorch==2.3.4
    VENV/bin/python tests/ddp/make.py

torchvision is imported there for data sets and pictures only: where it does not import, empty modules stand for it.
"""

import contextlib
import sys
import types
from pathlib import Path

import numpy as np
import torch

try:
    import torchvision  # noqa: F401
except Exception:
    names = ("torchvision", "torchvision.transforms", "torchvision.utils")
    empty = {name: types.ModuleType(name) for name in names}
    empty["torchvision"].transforms, empty["torchvision"].utils = empty[names[1]], empty[names[2]]
    sys.modules.update(empty)

import denoising_diffusion_pytorch.denoising_diffusion_pytorch as package
from denoising_diffusion_pytorch import GaussianDiffusion, Unet
from denoising_diffusion_pytorch.learned_gaussian_diffusion import (
    NAT,
    LearnedGaussianDiffusion,
    discretized_gaussian_log_likelihood,
    meanflat,
    normal_kl,
)
from ema_pytorch import EMA

HERE = Path(__file__).resolve().parent
T, SIZE, N = 100, 8, 4


def unet(**more):
    torch.manual_seed(0)
    net = Unet(8, dim_mults=(1, 2), channels=1, attn_heads=2, attn_dim_head=8, **more)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return net.eval()


def draws(seed=1):
    g = torch.Generator().manual_seed(seed)
    v = torch.randint(0, 256, (N, 1, SIZE, SIZE), generator=g)
    return v, torch.tensor([0, 1, 40, 99]), torch.randn(N, 1, SIZE, SIZE, generator=g)


@contextlib.contextmanager
def recorded_noise(values):
    """torch.randn and randn_like give these, one after the other."""
    left = list(values)
    kept = torch.randn, torch.randn_like
    torch.randn = torch.randn_like = lambda *_, **__: left.pop(0).clone()
    try:
        yield
    finally:
        torch.randn, torch.randn_like = kept
    assert not left


def main():
    arrays = {}
    v, t, noise = draws()
    x = v / 255.0
    arrays |= {"images": v.numpy().astype(np.uint8), "n": t.numpy(), "noise": noise.numpy()}
    for name in ("linear", "cosine", "sigmoid"):
        arrays[f"betas.{name}"] = getattr(package, f"{name}_beta_schedule")(1000).numpy()
    trainer = None
    for objective in ("pred_noise", "pred_x0", "pred_v"):
        for min_snr in (False, True):
            diffusion = GaussianDiffusion(
                unet(), image_size=SIZE, timesteps=T, objective=objective, beta_schedule="linear",
                min_snr_loss_weight=min_snr, auto_normalize=True,
            ).eval()  # fmt: skip
            key = f"{objective}{'.min_snr' if min_snr else ''}"
            with torch.no_grad():
                arrays[f"loss.{key}"] = diffusion.p_losses(x * 2 - 1, t, noise=noise, loss_reduction="none").numpy()
            arrays[f"loss_weight.{key}"] = diffusion.loss_weight.numpy()
            if min_snr:
                continue
            z = torch.randn(N, 1, SIZE, SIZE, generator=torch.Generator().manual_seed(2))
            steps = [torch.randn(z.shape, generator=torch.Generator().manual_seed(10 + i)) for i in range(5)]
            arrays |= {"z": z.numpy(), "steps": torch.stack(steps).numpy()}
            with recorded_noise(steps[:1]):
                mean, x_start = diffusion.p_sample(z, 40)
            arrays |= {f"step.{key}": mean.numpy(), f"x_hat.{key}": x_start.numpy()}
            for eta in (0.0, 0.5):
                ddim = GaussianDiffusion(
                    unet(), image_size=SIZE, timesteps=T, sampling_timesteps=4, objective=objective,
                    beta_schedule="linear", ddim_sampling_eta=eta,
                ).eval()  # fmt: skip
                with recorded_noise([z, *steps[:3]]):
                    arrays[f"ddim.{key}.{eta}"] = ddim.ddim_sample((N, 1, SIZE, SIZE)).numpy()
            if objective == "pred_v":
                trainer = diffusion
    torch.save({"step": 0, "model": {"betas": trainer.betas, **{
        f"model.{name}": value for name, value in unet().state_dict().items()
    }}}, HERE / "plain.pt")  # fmt: skip
    # The U-Net alone, with its own estimate and without, and its gradient.
    net = unet(self_condition=True)
    estimate = torch.randn(N, 1, SIZE, SIZE, generator=torch.Generator().manual_seed(3))
    z = torch.from_numpy(arrays["z"]).requires_grad_()
    out = net(z, t, estimate)
    (gradient,) = torch.autograd.grad((out * noise).sum(), z)
    arrays |= {"estimate": estimate.numpy(), "unet": out.detach().numpy(), "unet.gradient": gradient.numpy()}
    conditioned = GaussianDiffusion(net, image_size=SIZE, timesteps=T, objective="pred_noise", beta_schedule="cosine")
    torch.save({"step": 0, "model": conditioned.state_dict()}, HERE / "conditioned.pt")
    # Learned variance: simple loss, KL and decoder of each example.
    learned = LearnedGaussianDiffusion(
        unet(learned_variance=True), image_size=SIZE, timesteps=T, objective="pred_noise", beta_schedule="linear"
    ).eval()
    with torch.no_grad():
        x_0 = x * 2 - 1
        total = learned.p_losses(x_0, t, noise=noise, loss_reduction="none")
        x_t = learned.q_sample(x_start=x_0, t=t, noise=noise)
        out = learned.model(x_t, t)
        true_mean, _, true_log = learned.q_posterior(x_start=x_0, x_t=x_t, t=t)
        mean, _, log_variance, _ = learned.p_mean_variance(x=x_t, t=t, clip_denoised=False, model_output=out)
        kl = meanflat(normal_kl(true_mean, true_log, mean, log_variance)) * NAT
        nll = -meanflat(discretized_gaussian_log_likelihood(x_0, means=mean, log_scales=0.5 * log_variance)) * NAT
        with recorded_noise(steps[:1]):
            step, _ = learned.p_sample(z.detach(), 40)
    arrays |= {
        "learned.total": total.numpy(), "learned.kl": kl.numpy(), "learned.nll": nll.numpy(),
        "learned.decoder_mean": mean[:1].numpy(), "learned.decoder_log_variance": log_variance[:1].numpy(),
        "learned.step": step.numpy(),
    }  # fmt: skip
    torch.save({"step": 0, "model": learned.state_dict()}, HERE / "learned.pt")
    # A trainer's own file, after three steps.
    ema = EMA(trainer, beta=0.5, update_every=1, update_after_step=0)
    optimizer = torch.optim.Adam(trainer.parameters(), lr=1e-3, betas=(0.9, 0.99))
    for _ in range(3):
        optimizer.zero_grad()
        trainer.p_losses(x * 2 - 1, t, noise=noise).backward()
        optimizer.step()
        ema.update()
    torch.save(
        {"step": 3, "model": trainer.state_dict(), "opt": optimizer.state_dict(), "ema": ema.state_dict(),
         "scaler": None, "version": "2.3.4"},
        HERE / "model-1.pt",
    )  # fmt: skip
    with torch.no_grad():
        arrays["trained.raw"] = trainer.model(z, t).numpy()
        arrays["trained.ema"] = ema.ema_model.model(z, t).numpy()
    # One step more, from the moments in the file.
    optimizer.zero_grad()
    trainer.p_losses(x * 2 - 1, t, noise=noise).backward()
    optimizer.step()
    torch.save({"step": 4, "model": trainer.state_dict()}, HERE / "next.pt")
    np.savez_compressed(HERE / "cases.npz", **arrays)


if __name__ == "__main__":
    main()
