"""azula: its KarrasDenoiser, VPSchedule and DDPMSampler around the U-Net that it carries for ADM's checkpoints, which in
the shape asked for is DDPM's, weight for weight as many as diffusers'. (Its own nn.UNet is another network, without
attention.) The step is that of its README and its CIFAR-10 tutorial: loss, backward, Adam at 1e-4, torch's
AveragedModel at 0.999; the loss is read at every step.
"""

from typing import Any

import serve


def load() -> None:
    """What this side needs."""
    global torch, KarrasDenoiser, VPSchedule, DDPMSampler, adm, pictures
    pictures = serve.without_torchvision()
    import torch
    from azula.denoise import KarrasDenoiser
    from azula.noise import VPSchedule
    from azula.plugins import adm
    from azula.sample import DDPMSampler


def build(case: dict[str, Any]) -> tuple[serve.Runs, dict[str, Any]]:
    """A training step, a sampling step, and samples from noise to reals."""
    torch.manual_seed(0)
    batch, shape = case["batch"], (case["batch"], 3, case["size"], case["size"])
    unet = adm.make_model(
        learn_var=False,
        image_size=case["size"],
        attention_resolutions=(case["size"] // 2,),
        channel_mult=tuple(case["multipliers"]),
        num_channels=case["channels"],
        num_res_blocks=2,
    ).backbone

    class Backbone(torch.nn.Module):
        """The U-Net, for one time or one for each image."""

        def __init__(self) -> None:
            super().__init__()
            self.unet = unet

        def forward(self, x: Any, t: Any) -> Any:
            return self.unet(x, t.expand(len(x)))

    denoiser = KarrasDenoiser(Backbone(), VPSchedule())
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
