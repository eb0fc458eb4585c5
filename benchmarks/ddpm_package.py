r"""A DDPM in nelbo beside the common PyTorch package, denoising-diffusion-pytorch: a training step, and sampling.

The same U-Net (64 channels, multipliers 1, 2, 4, 8 unless said), the same images, batch and T = 1000, in turns, each in
a process of its own that sets itself up as its users' does. The package's step is its Trainer's: GaussianDiffusion's
loss, backward, clipping to 1, Adam, its EMA at every step. nelbo's is ``Trainer.take_step`` of nelbo.training itself,
network.kind = attention, with the simple loss and clipping, as the ``nelbo`` command runs it: it keeps the memory that
a step frees (nelbo.process). A third process runs the package with memory kept too, which tells that part from the
rest. Both take the same optimizer settings; both read the loss at every step. bf16 is torch's autocast for both. How
threads wait is the same for all.

Sampling: one step of ancestral sampling (clipped), one evaluation of the network and the arithmetic around it, and one
of DDIM, of as many images as the batch. The figure is the package's time over nelbo's within the same turn: median, and
least to most over the turns. The machine's best matrix product in each precision stands beside them.

    pip install denoising-diffusion-pytorch==2.3.4
    python benchmarks/ddpm_package.py --threads 2 --out ddpm.json

torchvision is imported there for data sets and pictures only: where it does not import, empty modules stand for it.
"""

import json
import os
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from multiprocessing import Pipe, get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent / "peers")]
from nelbo.process import choose_waiting, keep_memory

choose_waiting()  # before torch is loaded; the processes started below inherit it

import torch
import training_step as shared
import tyro
from serve import without_torchvision

from nelbo import samplers
from nelbo.data import Dataset
from nelbo.presets import preset
from nelbo.training import Trainer

SIDES = ("package", "package, memory kept", "nelbo")
WARM = 2  # turns that are not counted


@dataclass(frozen=True)
class Case:
    """What is timed."""

    channels: int = 64
    """Channels of the first level."""
    multipliers: tuple[int, ...] = (1, 2, 4, 8)
    """Of the channels, at each halving."""
    size: int = 32
    """Height and width."""
    batch: int = 16
    """Images in a step."""
    repeats: int = 7
    """Turns."""
    threads: int | None = None
    """CPU threads."""
    out: Path | None = None
    """JSON file."""


def load_package() -> Any:
    """denoising_diffusion_pytorch and EMA, or one line on what is missing."""
    without_torchvision()
    try:
        import denoising_diffusion_pytorch as package
        from ema_pytorch import EMA
    except ImportError as error:
        raise SystemExit(f"this benchmark needs pip install denoising-diffusion-pytorch==2.3.4 ({error})") from None
    return package, EMA


def theirs(case: Case, images: torch.Tensor, bf16: bool) -> dict[str, Callable[[], object]]:
    """The package's step and sampling steps."""
    package, EMA = load_package()
    torch.manual_seed(0)
    net = package.Unet(case.channels, dim_mults=case.multipliers)
    diffusion = package.GaussianDiffusion(
        net, image_size=case.size, timesteps=1000, objective="pred_noise", beta_schedule="linear"
    )
    optimizer = torch.optim.Adam(diffusion.parameters(), lr=2e-4, betas=(0.9, 0.999))
    ema = EMA(diffusion, beta=0.9999, update_every=1)
    x = images.float() / 255
    z = torch.randn_like(x)

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = diffusion(x)
        loss.item()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(diffusion.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        ema.update()

    def ancestral() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            diffusion.p_sample(z, 500)

    @torch.inference_mode()
    def ddim() -> None:
        n = torch.full((case.batch,), 500)
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            eps_hat, x_hat = diffusion.model_predictions(z, n, None, clip_x_start=True, rederive_pred_noise=True)
        a = diffusion.alphas_cumprod[490]
        x_hat * a.sqrt() + (1 - a).sqrt() * eps_hat

    return {"training step": step, "ancestral step": ancestral, "DDIM step": ddim}


def ours(case: Case, images: torch.Tensor, bf16: bool, folder: Path) -> dict[str, Callable[[], object]]:
    """nelbo's."""
    config = preset("ddpm-cifar10")
    config = replace(
        config,
        data=replace(config.data, augment="none"),
        network=replace(
            config.network, kind="attention", channels=case.channels, multipliers=case.multipliers, dropout=0.0
        ),
        optimizer=replace(config.optimizer, warmup=0),
        training=replace(config.training, batch=case.batch, precision="bf16" if bf16 else "float32"),
    )
    parts = {split: images.numpy() for split in ("train", "validation", "test")}
    data = Dataset("random", "0", parts, None, 256, "random images")
    trainer = Trainer(config, folder, data)
    model = trainer.model
    z, s, t = (
        torch.randn(images.shape),
        torch.full((case.batch,), 499 / 999).double(),
        torch.full((case.batch,), 500 / 999),
    )

    def one(make: Callable[[], samplers.Step]) -> Callable[[], object]:
        @torch.inference_mode()
        def run() -> None:
            mean, std, _ = make()(z, s, t.double())
            mean + std * torch.randn_like(z)

        return run

    ancestral, ddim = (one(lambda f=f: f(model, clip=True)) for f in (samplers.reverse_step, samplers.ddim_step))
    return {"training step": trainer.take_step, "ancestral step": ancestral, "DDIM step": ddim}


def work(connection: Connection, side: str, case: Case, bf16: bool) -> None:
    """One side in a process of its own: runs what it is told to by name, and answers with the seconds it took, the
    pages of memory that it touched for the first time, and the most KiB that the process held."""
    try:
        if side != "package":
            keep_memory()
        if case.threads:
            torch.set_num_threads(case.threads)
        images = torch.randint(0, 256, (case.batch, 3, case.size, case.size), dtype=torch.uint8)
        runs = ours(case, images, bf16, Path("unused")) if side == "nelbo" else theirs(case, images, bf16)
        connection.send(list(runs))
        while name := connection.recv():
            faults, begun = resource.getrusage(resource.RUSAGE_SELF).ru_minflt, time.perf_counter()
            runs[name]()
            seconds, used = time.perf_counter() - begun, resource.getrusage(resource.RUSAGE_SELF)
            connection.send((seconds, used.ru_minflt - faults, used.ru_maxrss))
    except SystemExit as error:
        connection.send(str(error))


def main(case: Case) -> dict[str, Any]:
    """Times of all three, in turns; prints a table."""
    if case.threads:
        torch.set_num_threads(case.threads)
    load = os.getloadavg()[0]
    results: dict[str, Any] = {"case": {**asdict(case), "out": None}, "machine": shared.machine(), "load": load}
    rows: list[list[str]] = []
    memory: list[str] = []
    for precision, bf16 in (("float32", False), ("bf16", True)):
        ends = {}
        for side in SIDES:
            ends[side], other = Pipe()
            get_context("spawn").Process(target=work, args=(other, side, case, bf16), daemon=True).start()
        names = [end.recv() for end in ends.values()]
        if missing := next((found for found in names if isinstance(found, str)), None):
            raise SystemExit(missing)
        best = shared.gemms(torch.bfloat16 if bf16 else torch.float32, "cpu")
        peak = 0.0
        for name in names[0]:
            times: dict[str, list[float]] = {side: [] for side in SIDES}
            pages: dict[str, str] = {}
            for turn in range(case.repeats + WARM):
                for side, end in ends.items():
                    end.send(name)
                    seconds, faults, held = end.recv()
                    if turn >= WARM:
                        times[side].append(seconds)
                        pages[side] = f"{faults:,} fresh pages, at most {held / 2**20:.2f} GiB held"
                peak = max(peak, *(flops / shared.timed(run) / 1e9 for flops, run in best.values()))
            ratios = [
                [a / b for a, b in zip(times[side], times["nelbo"], strict=True)] for side in SIDES if side != "nelbo"
            ]
            results[f"{name}, {precision}"] = {**times, "ratios": ratios, "memory": pages}
            if name == "training step":
                memory += [f"{side}, {precision}: {what}" for side, what in pages.items()]
            rows.append([name, precision, *(shared.show(shared.spread(v), 1000) for v in times.values()),
                         *(shared.show(shared.spread(v), 1, 2) for v in ratios)])  # fmt: skip
        for end in ends.values():
            end.send("")
        results[f"gemm, {precision}"] = peak
        rows.append([f"best matrix product {peak:.0f} GFLOP/s", precision, *[""] * 5])
    times_of = [f"{side}, ms" for side in SIDES]
    print(shared.table(["", "precision", *times_of, "package / nelbo", "memory kept / nelbo"], rows))
    print("the last training step of each: " + "; ".join(memory))
    results["load_after"] = os.getloadavg()[0]
    print(f"load {load:.1f} before, {results['load_after']:.1f} after; medians (least..most) of {case.repeats} turns")
    if case.out is not None:
        case.out.write_text(json.dumps(results, indent=1) + "\n")
    return results


if __name__ == "__main__":
    main(tyro.cli(Case, description=__doc__))
