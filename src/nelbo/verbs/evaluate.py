"""``nelbo evaluate``."""

import dataclasses
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from nelbo.errors import UserError
from nelbo.verbs.shared import Run, Weights, set_threads

__all__ = ["Evaluate", "carry_out"]


@dataclass(frozen=True)
class Evaluate:
    """The bound of a run, or its likelihood by ODE, in bits per dimension; writes RUN/evaluations/*.json."""

    run: Run
    """A run folder; or a shared model, its folder or hub id; or, with --data, a diffusers pipeline of a DDPM, its
    folder or hub id, or a trainer's .pt file of denoising-diffusion-pytorch."""
    method: Literal["vlb", "ode"] = "vlb"
    """vlb: the variational bound; ode: the likelihood by the probability flow (killed, the same command goes on)."""
    checkpoint: str = "best"
    """best, last or a step."""
    weights: Weights = "ema"
    """The moving average of the weights, or the raw ones."""
    split: str = "test"
    """train, validation or test."""
    data: str | None = None
    """Other images, their --split: a data set's name, a .npy or .npz file or a folder. By default the run's."""
    images: int | None = None
    """Only the first so many images of the split."""
    seed: int = 0
    """Seed of times, noise, latents and probes, which are keyed by image."""
    batch: int | None = None
    """Network rows at once; the figure does not depend on it. By default as many as half of the free memory holds, on a
    CPU 256 (vlb) or 64 (ode) at most."""
    times: int = 16
    """vlb: stratified times per image and shift; 1 is the sparse, 128 the dense bound of the papers."""
    shifts: int = 2
    """vlb: independent shifts of the time grid; 2 or more give the draws' own error."""
    steps: int | None = None
    """vlb: T of the discrete bound, 0 for continuous time. By default the T of training."""
    variance: Literal["own", "fixed-small", "fixed-large", "learned"] = "own"
    """vlb: variance of the steps at finite T: the model's own, DDPM's beta~ or beta, or an output of the network."""
    clip: Literal["own", "on", "off"] = "own"
    """Whether x_hat is kept within the grey levels, at finite T and in a gaussian decoder; own: as the model does."""
    dequantization: Literal["own", "truncated-normal", "uniform", "variational"] = "own"
    """ode: noise that makes reals of grey levels; variational: Gaussian, with the model's decoder. own:
    truncated-normal, and variational where the decoder is the network's own Gaussian (DDPM)."""
    samples: int = 1
    """ode: importance samples K of noise and latent per image and replicate (20 in MuLAN's and i-DODE's papers)."""
    replicates: int = 2
    """ode: independent repetitions R, each with a probe of its own; 2 or more give the draws' own error."""
    trace: Literal["rademacher", "gaussian", "exact"] = "rademacher"
    """ode: Hutchinson probes, whose figure is an estimate, or the exact trace, a bound; C H W times the work."""
    probes: int = 1
    """ode: probes averaged in every solve."""
    rtol: float = 1e-3
    """ode: relative tolerance per pixel, in units of the noise there, and of the log-density per dimension."""
    atol: float = 1e-3
    """ode: absolute tolerance per pixel, in units of the noise there, and of the log-density in nats per dimension."""
    solver: Literal["adams4", "bosh3", "dopri5"] = "adams4"
    """ode: Adams' method with 4 evaluations remembered; the Runge-Kutta pairs Bogacki-Shampine 3(2), Dormand-Prince
    5(4)."""
    least_steps: int | None = None
    """ode: steps from t = 0 to 1 at least; by default 224 for adams4, more than the network's embedding of time has
    waves, and as many as the tolerance asks for with the others."""
    state: Literal["float32", "float64"] = "float32"
    """ode: precision of the state; the network's is float32."""
    compare: Path | None = None
    """Another run: the paired difference per image, same draws, with its error."""
    parameterization: Literal["noise", "data", "velocity"] | None = None
    """What the network of somebody else's checkpoint estimates, where its file does not say."""
    out: Path | None = None
    """Folder whose evaluations/ the figures go to. By default that of the run, or evaluations/NAME here for others'
    checkpoints."""
    per_image: Path | None = None
    """Write index, bits/dim, terms and error of every image to this CSV file."""
    device: str | None = None
    """cpu, cuda, cuda:1, ... By default a GPU where there is one."""
    threads: int | None = None
    """CPU threads. By default what PyTorch takes."""


def carry_out(command: Evaluate) -> None:
    """Carry it out."""
    if command.per_image is not None and command.per_image.is_dir():
        raise UserError(f"--per-image needs a file, got the folder {command.per_image}")
    set_threads(command.threads)
    from nelbo import evaluation
    from nelbo.checkpoints import write_aside
    from nelbo.devices import choose_device
    from nelbo.group import join
    from nelbo.progress import Progress

    names = {f.name for f in dataclasses.fields(evaluation.Settings)}
    chosen = {k: v for k, v in vars(command).items() if k in names}
    chosen |= {name: None for name in ("variance", "dequantization") if chosen[name] == "own"}
    chosen["clip"] = {"own": None, "on": True, "off": False}[command.clip]
    settings = evaluation.Settings(**chosen)
    group = join(command.device)
    device = choose_device(command.device)
    with Progress(shown=group.main) as progress:

        def seen(run: str, done: int, images: int, bits: float) -> None:
            progress.update(run, done, images, f"{bits:.4f} bits/dim" if done else "")

        found = evaluation.evaluate(
            command.run, settings, compare=command.compare, out=command.out, device=device, progress=seen
        )
    if not group.main:
        return
    if command.per_image is not None:
        write_aside(command.per_image, evaluation.per_image_csv(found.result))
    _print_evaluation(command, found)


def _print_evaluation(command: Evaluate, found: Any) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    record, result = found.record, found.result
    data, seen, whole = record["data"], record["images"], record["images_in_split"]
    step, kind = record["checkpoint"]["step"], record["source"]
    print(
        f"{command.run}"
        + (f", from {kind}" if kind != "nelbo" else "")
        + (f", step {step}" if step is not None else "")
        + (f", {record['weights']} weights: " if kind == "nelbo" else ": ")
        + f"{'' if seen == whole else f'{seen} of '}{whole} {record['split']} images of {data['name']} "
        f"(version {data['version']})"
    )
    table = Table("", "bits/dim", "standard error")
    for column in table.columns[1:]:
        column.justify = "right"

    def row(name: str, mean: float, error: float | None, style: str | None = None) -> None:
        shown = "" if error is None or error != error else f"{error:.4f}"
        table.add_row(escape(name), f"{mean:.4f}", shown, style=style)

    settings, own, published = result.settings, result.draws_error, result.as_published
    if settings["method"] == "vlb":
        kind = f"VLB, T = {settings['steps']}" if settings["steps"] else "VLB, continuous time"
    else:
        kind = f"ODE, {settings['dequantization']}, K = {settings['samples']}"
    row(f"{'bound' if result.is_bound else 'estimate'} ({kind})", result.mean, result.standard_error, "bold")
    again = "needs --shifts 2" if settings["method"] == "vlb" else "needs --replicates 2"
    table.add_row("  of which the draws' own", "", f"{own:.4f}" if own == own else again)
    if record["tolerance"] is not None:
        row("  the tolerance's, on few images", record["tolerance"]["mean"], record["tolerance"]["standard_error"])
    elif settings["method"] == "ode":
        table.add_row("  the tolerance's, on few images", "", "the tighter solve failed")
    for name, value in result.terms.items():
        if published is None or name != "latent":
            row(f"  {name.removeprefix('valid_')}", value.mean, value.standard_error)
    if published is not None:
        row("as published (not a bound)", published.mean, published.standard_error)
        row("  latent as charged there", result.terms["latent"].mean, result.terms["latent"].standard_error)
    if found.difference is not None:
        table.add_section()
        row(str(command.compare), found.compared.mean, found.compared.standard_error)
        row("  difference, paired", found.difference.mean, found.difference.standard_error)
    table.add_section()
    for b in record["baselines"]:
        row(b["name"], b["bits_per_dim"], b["standard_error"], "dim")
    Console(width=None if sys.stdout.isatty() else 98).print(table)
    print(_conditions(settings))
    if seen < whole and record["baselines"]:
        print(f"the references at the foot were measured on all {whole} images")
    if cost := record["cost"]:
        print(
            f"{cost['evaluations_per_solve']:.1f} evaluations a solve (at most {cost['most_evaluations']:.0f}; "
            f"{cost['rejected_per_solve']:.1f} steps rejected), {cost['seconds_per_image']:.2f} seconds an image"
        )
    print(f"written: {found.path}" + (f", {command.per_image}" if command.per_image else ""))


def _conditions(settings: dict[str, Any]) -> str:
    """What a figure is not comparable without: decoder, variance, clipping."""
    decoders = {
        "levels": "softmax over levels around z_0",
        "gaussian": "the network's Gaussian, integrated over the bin",
        None: "none (z_0 lies in its bin)",
    }
    found = f"decoder: {decoders[settings['decoder']]}"
    found += f"; variance of p(z_s|z_t): {settings['variance']}" if "variance" in settings else ""
    return found + ("" if "clip" not in settings else "; x_hat clipped" if settings["clip"] else "; x_hat not clipped")
