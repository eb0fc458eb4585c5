"""denoising-diffusion-pytorch: its U-Net, and the step of its Trainer: GaussianDiffusion's loss, backward, clipping to
1, Adam, its EMA at every step; the loss is read at every step."""

from typing import Any

import serve


def load() -> None:
    """What this side needs."""
    global torch, package, EMA, pictures
    pictures = serve.without_torchvision()
    import denoising_diffusion_pytorch as package
    import torch
    from ema_pytorch import EMA


def build(case: dict[str, Any]) -> tuple[serve.Runs, dict[str, Any]]:
    """A training step, a sampling step, and samples (DDIM) from noise to reals."""
    torch.manual_seed(0)
    batch, size = case["batch"], case["size"]
    diffusion = package.GaussianDiffusion(
        package.Unet(case["channels"], dim_mults=tuple(case["multipliers"])),
        image_size=size,
        timesteps=1000,
        sampling_timesteps=case["steps"],
        objective="pred_noise",
        beta_schedule="linear",
    )
    optimizer = torch.optim.Adam(diffusion.parameters(), lr=2e-4, betas=(0.9, 0.999))
    ema = EMA(diffusion, beta=0.9999, update_every=1)
    data = torch.randint(0, 256, (4 * batch, 3, size, size), dtype=torch.uint8)
    z = torch.randn(batch, 3, size, size)

    def autocast() -> Any:
        return torch.autocast("cpu", torch.bfloat16, enabled=case["bf16"])

    def step() -> float:
        x = data[torch.randperm(len(data))[:batch]] / 255
        with autocast():
            loss = diffusion(x)
        value = loss.item()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(diffusion.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        ema.update()
        return value

    def sampling_step() -> None:
        with autocast():
            diffusion.p_sample(z, 500)

    def sample() -> Any:
        with autocast():
            return diffusion.sample(batch)

    info = {
        "parameters": sum(p.numel() for p in diffusion.parameters()),
        "precision": "autocast to bfloat16" if case["bf16"] else "float32",
        "versions": {**serve.versions("torch", "denoising-diffusion-pytorch", "ema-pytorch"), "pictures": pictures},
        "threads": f"{torch.get_num_threads()} threads of torch",
    }
    return {"training step": step, "sampling step": sampling_step, "samples": sample}, info


if __name__ == "__main__":
    serve.serve(load, build)
