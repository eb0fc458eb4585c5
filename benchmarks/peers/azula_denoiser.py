"""azula: its KarrasDenoiser, VPSchedule and DDPMSampler around one of two U-Nets that it has.

``azula`` is what its README and its CIFAR-10 tutorial train: its own nn.UNet with 3 blocks at each resolution, told the
time by SineEncoding. It has no attention; with the channels of DDPM's it has 17 % more weights and 15 % fewer
operations. ``azula-adm`` is the U-Net that it carries for ADM's checkpoints, in DDPM's shape, with exactly as many
weights as diffusers'. It always recomputes activations in the backward pass, which takes time and saves memory.

The step is the tutorial's: loss, backward, Adam at 1e-4, torch's AveragedModel at 0.999. The loss is read at every
step.
"""

from typing import Any

import serve


def load() -> None:
    """What this side needs."""
    global torch, KarrasDenoiser, SineEncoding, UNet, VPSchedule, DDPMSampler, adm, pictures
    pictures = serve.without_torchvision()
    import torch
    from azula.denoise import KarrasDenoiser
    from azula.nn.layers import SineEncoding
    from azula.nn.unet import UNet
    from azula.noise import VPSchedule
    from azula.plugins import adm
    from azula.sample import DDPMSampler


def build(case: dict[str, Any]) -> tuple[serve.Runs, dict[str, Any]]:
    """A training step, a sampling step, and samples from noise to reals."""
    torch.manual_seed(0)
    batch, shape = case["batch"], (case["batch"], 3, case["size"], case["size"])
    channels, multipliers = case["channels"], tuple(case["multipliers"])

    class Own(torch.nn.Module):
        """nn.UNet, told the time."""

        def __init__(self) -> None:
            super().__init__()
            features = 4 * channels
            self.encoding = SineEncoding(features)
            self.unet = UNet(
                3, 3, mod_features=features, hid_channels=[channels * m for m in multipliers],
                hid_blocks=[3] * len(multipliers),
            )  # fmt: skip

        def forward(self, x: Any, t: Any) -> Any:
            return self.unet(x, self.encoding(t))

    class Ablated(torch.nn.Module):
        """ADM's, for one time or one for each image."""

        def __init__(self) -> None:
            super().__init__()
            self.unet = adm.make_model(
                learn_var=False,
                image_size=case["size"],
                attention_resolutions=(case["size"] // 2,),
                channel_mult=multipliers,
                num_channels=channels,
                num_res_blocks=2,
            ).backbone

        def forward(self, x: Any, t: Any) -> Any:
            return self.unet(x, t.expand(len(x)))

    backbone = Ablated() if case["peer"] == "azula-adm" else Own()
    denoiser = KarrasDenoiser(backbone, VPSchedule())
    optimizer = torch.optim.Adam(denoiser.parameters(), lr=1e-4)
    average = torch.optim.swa_utils.AveragedModel(
        denoiser, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.999)
    )
    data = torch.randint(0, 256, (4 * batch, *shape[1:]), dtype=torch.uint8)
    sampler = DDPMSampler(denoiser, steps=case["steps"])
    z = torch.randn(shape)
    t, s = sampler.timesteps[len(sampler.timesteps) // 2 - 1 :][:2]

    def autocast() -> Any:
        return torch.autocast("cpu", torch.bfloat16, enabled=case["bf16"])

    def step() -> float:
        denoiser.train()
        x = data[torch.randperm(len(data))[:batch]] / 127.5 - 1
        with autocast():
            loss = denoiser.loss(x, torch.rand(batch))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        average.update_parameters(denoiser)
        return loss.item()

    @torch.no_grad()
    def sampling_step() -> None:
        denoiser.eval()
        with autocast():
            sampler.step(z, t, s)

    def sample() -> Any:
        denoiser.eval()
        with autocast():
            return sampler(sampler.init(shape)).clip(-1, 1)

    info = {
        "parameters": sum(p.numel() for p in denoiser.parameters()),
        "precision": "autocast to bfloat16" if case["bf16"] else "float32",
        "versions": {**serve.versions("torch", "azula"), "pictures": pictures},
        "threads": f"{torch.get_num_threads()} threads of torch",
    }
    return {"training step": step, "sampling step": sampling_step, "samples": sample}, info


if __name__ == "__main__":
    serve.serve(load, build)
