"""diffusers' example of unconditional training: the loop of its train_unconditional.py, on images in memory.

What the loop does is here: accelerate's preparation, backward pass and clipping, AdamW (0.95, 0.999, decay 1e-6), the
cosine learning rate with warm-up, DDPMScheduler's noise, EMAModel with warm-up, the loss read at every step, its
pipeline for samples. What it does beside the step is not: decoding and augmenting image files, logging, a progress bar
for training. The network is the UNet2DModel of google/ddpm-cifar10-32 in the size asked for; the example's own default
is a larger one for 64x64.
"""

from typing import Any

import serve


def load() -> None:
    """What this side needs."""
    global torch, F, Accelerator, DDPMPipeline, DDPMScheduler, UNet2DModel, get_scheduler, EMAModel
    import torch
    from accelerate import Accelerator
    from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
    from diffusers.optimization import get_scheduler
    from diffusers.training_utils import EMAModel
    from torch.nn import functional as F


def build(case: dict[str, Any]) -> tuple[serve.Runs, dict[str, Any]]:
    """A training step, a sampling step, and samples from noise to grey levels."""
    torch.manual_seed(0)
    batch, size = case["batch"], case["size"]
    accelerator = Accelerator(mixed_precision="bf16" if case["bf16"] else "no", cpu=True)
    kinds = ["Attn" if 2**i == 2 else "" for i in range(len(case["multipliers"]))]  # at half the height
    model = UNet2DModel(
        sample_size=size,
        in_channels=3,
        out_channels=3,
        center_input_sample=False,
        time_embedding_type="positional",
        freq_shift=1,
        flip_sin_to_cos=False,
        down_block_types=tuple(f"{kind}DownBlock2D" for kind in kinds),
        up_block_types=tuple(f"{kind}UpBlock2D" for kind in reversed(kinds)),
        block_out_channels=tuple(case["channels"] * m for m in case["multipliers"]),
        layers_per_block=2,
        mid_block_scale_factor=1,
        downsample_padding=0,
        act_fn="silu",
        attention_head_dim=None,
        norm_num_groups=case["groups"],
        norm_eps=1e-6,
    )
    average = EMAModel(
        model.parameters(),
        decay=0.9999,
        use_ema_warmup=True,
        inv_gamma=1.0,
        power=3 / 4,
        model_cls=UNet2DModel,
        model_config=model.config,
    )
    scheduler = DDPMScheduler(num_train_timesteps=1000, beta_schedule="linear")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.95, 0.999), weight_decay=1e-6, eps=1e-8)
    images = torch.randint(0, 256, (4 * batch, 3, size, size), dtype=torch.uint8)
    dataset = [{"input": image} for image in images / 127.5 - 1]
    loader = torch.utils.data.DataLoader(dataset, batch_size=batch, shuffle=True)
    rate = get_scheduler("cosine", optimizer=optimizer, num_warmup_steps=500, num_training_steps=100_000)
    model, optimizer, loader, rate = accelerator.prepare(model, optimizer, loader, rate)
    dtype = torch.bfloat16 if case["bf16"] else torch.float32

    def epochs() -> Any:
        while True:
            yield from loader

    batches = epochs()

    def step() -> float:
        model.train()
        clean = next(batches)["input"].to(dtype)
        noise = torch.randn(clean.shape, dtype=dtype)
        timesteps = torch.randint(0, scheduler.config.num_train_timesteps, (batch,))
        noisy = scheduler.add_noise(clean, noise, timesteps)
        with accelerator.accumulate(model):
            loss = F.mse_loss(model(noisy, timesteps).sample.float(), noise.float())
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            rate.step()
            optimizer.zero_grad()
        if accelerator.sync_gradients:
            average.step(model.parameters())
        return loss.detach().item()

    z = torch.randn(batch, 3, size, size)

    @torch.no_grad()
    def sampling_step() -> None:
        unet = accelerator.unwrap_model(model).eval()
        scheduler.step(unet(z, 500).sample, 500, z)

    def sample() -> Any:
        pipeline = DDPMPipeline(unet=accelerator.unwrap_model(model), scheduler=scheduler)
        found = pipeline(batch_size=batch, num_inference_steps=case["steps"], output_type="np").images
        return (found * 255).round().astype("uint8")

    info = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "precision": "mixed_precision bf16 of accelerate (autocast)" if case["bf16"] else "float32",
        "versions": serve.versions("torch", "diffusers", "accelerate"),
        "threads": f"{torch.get_num_threads()} threads of torch",
    }
    return {"training step": step, "sampling step": sampling_step, "samples": sample}, info


if __name__ == "__main__":
    serve.serve(load, build)
