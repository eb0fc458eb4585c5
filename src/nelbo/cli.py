"""The command line: ``nelbo presets | train | evaluate | sample | fid | report | convert``.

A mistake of the user's gets one line on stderr and exit status 2. Heavy libraries load where a verb needs them.
"""

import dataclasses
import inspect
import json
import os
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

import nelbo
from nelbo import presets
from nelbo.arguments import parse
from nelbo.config import Config, to_dict
from nelbo.convert import CONVERTERS, DEFAULT_PRESETS
from nelbo.errors import UserError
from nelbo.process import choose_waiting, keep_memory
from nelbo.stopping import Stopped

__all__ = ["main"]


@dataclass(frozen=True)
class Train:
    """Train a preset, or continue a run: the same command again resumes."""

    config: Annotated[Config, tyro.conf.arg(name=""), tyro.conf.FlagConversionOff]
    out: Path | None = None
    """Folder of the run: new, empty, or a run to continue."""
    dry_run: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Print the resolved configuration and stop."""
    init_from: Path | None = None
    """A run, a checkpoint folder or a shared model (folder or hub id) from whose weights a new run starts."""
    init_optimizer: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """With --init-from: take over the optimizer's moments too."""
    threads: int | None = None
    """CPU threads. By default what PyTorch takes; use 1 beside other work."""


Run = Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
Weights = Literal["ema", "raw"]


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
    """Network rows at once; the figure does not depend on it. By default 256 (vlb) or 64 (ode)."""
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


@dataclass(frozen=True)
class Sample:
    """Draw images from a run: RUN/samples/NAME.npz and .png, and the denoising trajectory as a strip."""

    run: Run
    """A run folder; or a shared model or a diffusers pipeline of a DDPM, its folder or hub id."""
    count: int = 64
    """Images."""
    method: Literal["ancestral", "ddim", "ode"] = "ancestral"
    """ancestral: steps of p(z_s|z_t); ddim: larger strides along the same estimates, deterministic by default; ode: the
    probability flow, with as many evaluations as the tolerance needs."""
    steps: int | None = None
    """ancestral, ddim: steps. By default 256, or all there are between the noise levels of a table (DDPM)."""
    spacing: Literal["even", "quadratic"] = "even"
    """ancestral, ddim: times equal in t or in its root; with few steps quadratic keeps fine detail."""
    eta: float = 0.0
    """ddim: share of the noise, from 0, none, to 1, that of ancestral with fixed-small."""
    variance: Literal["fixed-small", "fixed-large", "learned"] | None = None
    """ancestral: variance of the steps (DDPM's beta~, beta, or the network's). By default the model's own."""
    clip: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """ancestral, ddim: keep x_hat within the grey levels at every step, even where the model does not."""
    rtol: float = 3e-4
    """ode: relative tolerance per pixel, in units of the noise there."""
    atol: float = 3e-4
    """ode: absolute tolerance per pixel, in units of the noise there."""
    decoding: Literal["argmax", "categorical"] = "argmax"
    """The most probable levels of p(v|z_0), or a draw of it."""
    shard: int | None = None
    """For many images: so many a file, in the folder NAME/, with a grid of each; killed, the same command goes on."""
    interpolate: tuple[str, ...] = ()
    """Instead of samples, a strip from one image to another: two image files, or numbers of the test split. ddim and
    ode: between their noise at t = 1, spherically; ancestral: between the two noised, as in DDPM."""
    points: int = 11
    """--interpolate: images in the strip, at even weights from 0 to 1."""
    time: float = 0.5
    """--interpolate by ancestral: the t that the two are noised to; the nearest step below it is taken."""
    shared_noise: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """--interpolate by ancestral: both get the same noise, so that mixtures are as noisy as the network expects."""
    checkpoint: str = "best"
    """best, last or a step."""
    weights: Weights = "ema"
    """The moving average of the weights, or the raw ones."""
    seed: int = 0
    """Seed; sample k does not depend on the count."""
    batch: int = 256
    """Images at once."""
    trajectory: int = 8
    """ancestral, ddim: images shown on their way from noise; 0 for no strip."""
    out: Path | None = None
    """Path of the files without suffix, with --shard the folder. By default RUN/samples/ (evaluations/NAME/samples/
    here for others' checkpoints) and a name made of the settings."""
    device: str | None = None
    """cpu, cuda, cuda:1, ... By default a GPU where there is one."""
    threads: int | None = None
    """CPU threads. By default what PyTorch takes."""


@dataclass(frozen=True)
class Fid:
    """The Fréchet inception distance of a run's samples, or of images, from a data set, and their inception score;
    writes RUN/evaluations/fid-*.json."""

    source: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN|FOLDER|NPZ")]
    """A run or a shared model, of which samples are drawn now; or images: a folder of image files, or a .npz or .npy
    file or folder of shards such as `nelbo sample` writes."""
    reference: str = "train"
    """train, validation or test, a split of the data set; a file or folder of images; or a file of --statistics.
    Published figures are against the training split."""
    data: str | None = None
    """The data set: a name, a .npy or .npz file or a folder. By default the run's."""
    statistics: Path | None = None
    """File to keep the reference's statistics in, and to take them from. By default in RUN/evaluations/."""
    count: int | None = None
    """Images: drawn from a run, by default 10000; or the first so many of a file or folder, by default all."""
    levels: int | None = None
    """Grey levels of images that do not say it. By default 256."""
    extractor: Literal["inception", "small", "random"] = "inception"
    """inception: what published figures use; small: a small network of your own --weights; random: the same with
    weights drawn from a seed, for comparisons among models of the same data only."""
    weights: Path | None = None
    """The extractor's weights: .safetensors, or for inception .pth, which torch-fidelity's address gives otherwise."""
    feature_seed: int = 0
    """random: seed of the extractor's weights."""
    splits: int = 10
    """Parts of the samples: of the inception score, and of the jackknife for bias and error, which takes as many
    distances; 1 for none."""
    method: Literal["ancestral", "ddim", "ode"] = "ancestral"
    """Of a run's samples; the options of each as in `nelbo sample`."""
    steps: int | None = None
    """ancestral, ddim: steps. By default 256, or all there are between the noise levels of a table (DDPM)."""
    spacing: Literal["even", "quadratic"] = "even"
    """ancestral, ddim: times equally far apart, or their roots."""
    eta: float = 0.0
    """ddim: 0 is deterministic, 1 ancestral."""
    variance: Literal["fixed-small", "fixed-large", "learned"] | None = None
    """ancestral: variance of the steps. By default the model's own."""
    clip: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """ancestral, ddim: keep x_hat within the grey levels at every step, even where the model does not."""
    rtol: float = 3e-4
    """ode: relative tolerance per pixel, in units of the noise there."""
    atol: float = 3e-4
    """ode: absolute tolerance per pixel, in units of the noise there."""
    checkpoint: str = "best"
    """best, last or a step."""
    run_weights: Weights = "ema"
    """The moving average of the run's weights, or the raw ones."""
    seed: int = 0
    """Seed of the samples; sample k does not depend on the count."""
    batch: int = 64
    """Images at once."""
    out: Path | None = None
    """The file to write. By default RUN/evaluations/fid-*.json, and none for images that belong to no run."""
    device: str | None = None
    """cpu, cuda, cuda:1, ... By default a GPU where there is one."""
    threads: int | None = None
    """CPU threads. By default what PyTorch takes."""


@dataclass(frozen=True)
class Report:
    """One self-contained HTML page about one run or several."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Run folders."""
    out: Path | None = None
    """The page. By default report.html in the first run."""
    checkpoint: str = "best"
    """best, last or a step."""


@dataclass(frozen=True)
class Share:
    """A run's model as a folder to share, with a model card of its evaluations and samples; with --push also on the
    hub. `nelbo.load`, and every verb that takes a RUN, takes the folder or the hub id."""

    run: Run
    """A run folder."""
    out: Path | None = None
    """The folder: new, empty, or one that a model of this run was shared in before."""
    checkpoint: str = "best"
    """best, last or a step."""
    weights: Weights = "ema"
    """The moving average of the weights, or the raw ones."""
    license: str | None = None
    """The hub's identifier of a license, such as mit; none by default."""
    draw: int = 0
    """Samples to draw for the picture, where the run has none of these weights."""
    push: str | None = None
    """Upload the folder to the hub as OWNER/NAME, with the login of `hf auth login` or HF_TOKEN."""
    private: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """--push: make the repository private."""


@dataclass(frozen=True)
class Convert:
    """Somebody else's checkpoint as a run. Sizes are read off its shapes; what it does not say comes from a preset, and
    from flags that override single fields of it."""

    source: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="SOURCE")]
    """The file; for mulan, idode and vdm also a folder, whose ckpt-N.flax with the largest N is taken."""
    config: Annotated[Config, tyro.conf.arg(name=""), tyro.conf.FlagConversionOff]
    program: Annotated[str, tyro.conf.arg(name="from", metavar="|".join(CONVERTERS))]
    """The program that wrote it."""
    preset: str = ""
    """The preset that says what the checkpoint does not: path, parameterization, objective, ends of gamma, data ..."""
    out: Path | None = None
    """Folder of the run: new, or empty."""
    size: tuple[int, int] | None = None
    """Height and width of the images, where neither the checkpoint nor the preset's data set tells them."""
    levels: int | None = None
    """Grey levels of the images. By default those of the preset's data set where its images fit, otherwise 256."""


def _set_threads(threads: int | None) -> None:
    if threads is None:
        return
    if threads < 1:
        raise UserError(f"--threads must be at least 1, got {threads}")
    import torch

    torch.set_num_threads(threads)


def _train(command: Train, name: str) -> None:
    if command.dry_run:
        print(json.dumps({"preset": name, "config": to_dict(command.config)}, indent=2))
        return
    if command.out is None:
        raise UserError("train needs --out RUN, the folder of the run")
    if command.init_optimizer and command.init_from is None:
        raise UserError("--init-optimizer needs --init-from RUN_OR_CHECKPOINT")
    _set_threads(command.threads)
    from nelbo import training
    from nelbo.progress import Progress

    total = command.config.training.steps
    with Progress() as progress:

        def show(step: int, bits: float, rate: float) -> None:
            progress.update("training", step, total, "" if bits != bits else f"{bits:.3f} bits/dim", rate)

        training.train(
            command.config,
            command.out,
            preset=name,
            init_from=command.init_from,
            init_optimizer=command.init_optimizer,
            show=show,
        )


def _evaluate(command: Evaluate) -> None:
    if command.per_image is not None and command.per_image.is_dir():
        raise UserError(f"--per-image needs a file, got the folder {command.per_image}")
    _set_threads(command.threads)
    from nelbo import evaluation
    from nelbo.checkpoints import write_aside
    from nelbo.devices import choose_device
    from nelbo.progress import Progress

    names = {f.name for f in dataclasses.fields(evaluation.Settings)}
    chosen = {k: v for k, v in vars(command).items() if k in names}
    chosen |= {name: None for name in ("variance", "dequantization") if chosen[name] == "own"}
    chosen["clip"] = {"own": None, "on": True, "off": False}[command.clip]
    settings = evaluation.Settings(**chosen)
    device = choose_device(command.device)
    with Progress() as progress:

        def seen(run: str, done: int, images: int, bits: float) -> None:
            progress.update(run, done, images, f"{bits:.4f} bits/dim" if done else "")

        found = evaluation.evaluate(
            command.run, settings, compare=command.compare, out=command.out, device=device, progress=seen
        )
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


def _sample(command: Sample) -> None:
    _set_threads(command.threads)
    from nelbo import checkpoints, sampling
    from nelbo.devices import choose_device
    from nelbo.progress import Progress
    from nelbo.resolve import resolve

    settings = sampling.Settings(**{f.name: getattr(command, f.name) for f in dataclasses.fields(sampling.Settings)})
    between = _between(command)
    sampling.check(settings, between)
    source = resolve(command.run, command.checkpoint, command.weights)
    model = source.load(source.levels or 256, choose_device(command.device))
    settings = sampling.resolved(settings, model, source.name)
    stem = command.out or source.folder / "samples" / sampling.name_of(settings, source, command.weights, between)
    checkpoints.make_folder(stem.parent)
    if between is not None:
        paths = sampling.interpolate_to_files(model, stem, settings, between, source)
    else:
        with Progress() as progress:

            def seen(done: int) -> None:
                progress.update("sampling", done, settings.count)

            if settings.shard is None:
                paths = sampling.sample_to_files(model, stem, settings, seen)
            else:
                sampling.sample_to_shards(model, stem, settings, sampling.identity(source, command.weights), seen)
                paths = [stem]
    print("written: " + ", ".join(map(str, paths)))


def _between(command: Sample) -> Any:
    """The interpolation that was asked for, or None."""
    from nelbo import sampling

    if command.interpolate:
        return sampling.Between(command.interpolate, command.points, command.time, command.shared_noise)
    for name in ("points", "time", "shared_noise"):
        if getattr(command, name) != getattr(Sample, name):
            raise UserError(f"--{name.replace('_', '-')} belongs to --interpolate A B, and there is none")
    return None


def _fid(command: Fid) -> None:
    _set_threads(command.threads)
    from nelbo import fid
    from nelbo.devices import choose_device
    from nelbo.progress import Progress

    names = {f.name for f in dataclasses.fields(fid.Settings)}
    settings = fid.Settings(**{k: v for k, v in vars(command).items() if k in names})
    device = choose_device(command.device)
    with Progress() as progress:
        found = fid.evaluate(command.source, settings, out=command.out, device=device, progress=progress.update)
    _print_fid(found)


def _print_fid(found: Any) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    record, frechet = found.record, found.frechet
    reference, extractor = record["reference"], record["extractor"]
    training = "" if reference["name"] == "train" else "; published figures are against training images"
    print(f"{record['samples']['what']}, against {reference['what']}{training}")
    name = "FID" if extractor["name"] == "inception" else "Fréchet distance"
    table = Table("", "value", "standard error")
    for column in table.columns[1:]:
        column.justify = "right"

    def row(name: str, value: float, error: float, style: str | None = None) -> None:
        shown = ["" if v != v else f"{v:.4f}" for v in (value, error)]
        table.add_row(escape(name), *shown, style=style)

    nan, title = float("nan"), f"{name} ({extractor['name']}, {extractor['features']} features)"
    row(title, frechet.value, frechet.standard_error, "bold")
    if frechet.bias == frechet.bias:
        row("  of which for want of samples (jackknife)", frechet.bias, nan)
        row("  of infinitely many samples, about", frechet.limit, nan)
    row("  of as many samples of a perfect model, about", found.floor, nan)
    if found.inception_score is not None:
        mean, deviation = found.inception_score
        parts = record["inception_score"]["splits"]
        table.add_row(f"inception score, {parts} splits", f"{mean:.4f}", f"{deviation:.4f} (std of a split)")
    Console(width=None if sys.stdout.isatty() else 98).print(table)
    for line in (extractor["note"], record["warning"] and f"warning: {record['warning']}"):
        if line:
            print(line)
    if found.path is not None:
        print(f"written: {found.path}")


def _report(command: Report) -> None:
    from nelbo.report import write_report

    if not command.runs:
        raise UserError("report needs at least one run folder")
    page = write_report(list(command.runs), command.out or command.runs[0] / "report.html", command.checkpoint)
    from rich.console import Console
    from rich.table import Table

    from nelbo.report.runs import read_runs
    from nelbo.report.tables import figures_table, group_runs

    for group in group_runs(read_runs(list(command.runs), command.checkpoint)):
        figures = figures_table(group)
        table = Table(*figures.head, title=figures.caption)
        for row in figures.rows:
            table.add_row(row.name, *(f"{cell.value} {cell.error}".strip() for cell in row.cells))
        Console(width=None if sys.stdout.isatty() else 110).print(table)
    print(f"written: {page}")


def _share(command: Share) -> None:
    from nelbo import sharing

    if command.out is None:
        raise UserError("share needs --out FOLDER, where the model is written")
    if command.private and command.push is None:
        raise UserError("--private belongs to --push OWNER/NAME, and there is none")
    sharing.save_pretrained(
        command.run,
        command.out,
        command.checkpoint,
        command.weights,
        license=command.license,
        repo=command.push,
        draw=command.draw,
        say=print,
    )
    if command.push is not None:
        print(f"pushed: {sharing.push_to_hub(command.out, command.push, command.private)}")


def _convert(command: Convert) -> None:
    from nelbo import checkpoints, convert

    if command.out is None:
        raise UserError("convert needs --out RUN, the folder of the run")
    read = convert.converter(command.program)
    said = convert.Images(command.size, command.levels)
    if "images" in inspect.signature(read).parameters:
        found = read(command.source, command.config, images=said)  # type: ignore[call-arg]
    elif said != convert.Images():
        raise UserError(f"--size and --levels do not go with --from {command.program}, whose files say them")
    else:
        found = read(command.source, command.config)
    run = convert.write_run(found, command.out, command.preset)
    print(f"preset {command.preset}")
    for note in found.notes:
        print(note)
    record = checkpoints.read_run(run)
    counts = ", ".join(f"{name} {count:,}" for name, count in record["parameters_by_part"].items())
    print(f"{record['parameters']:,} parameters ({counts}), step {found.step}")
    print(f"written: {run}")
    moments = " --init-optimizer" * (found.optimizer is not None)
    changed = " ".join(_changes(presets.preset(command.preset), found.config))
    print(f"to train on: nelbo train {command.preset} --init-from {run}{moments} --out ... {changed}".rstrip())


def _changes(base: Config, config: Config) -> list[str]:
    """The flags that turn one configuration into another."""
    before, after = to_dict(base), to_dict(config)
    found: list[str] = []
    for group, values in after.items():
        for name, value in values.items() if isinstance(values, dict) else (("", values),):
            if value != (before[group][name] if name else before[group]):
                flag = "--" + (f"{group}.{name}" if name else group).replace("_", "-")
                found += [flag, *map(str, value if isinstance(value, list) else [value])]
    return found


def _convert_arguments(arguments: list[str]) -> Convert:
    """The arguments of ``convert``; the preset that they name is the default of every field."""
    import argparse

    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    early.add_argument("--from", dest="program")
    early.add_argument("--preset")
    try:
        given, rest = early.parse_known_args(arguments)
    except argparse.ArgumentError as error:
        raise UserError(f"{error}; see `nelbo convert --help`") from None
    if {"-h", "--help"} & set(arguments):
        print("usage: nelbo convert SOURCE --from KIND --out RUN [--preset NAME] [--field value]\n")
        given.preset = given.preset or "vdm-cifar10"
    elif given.program not in CONVERTERS:
        raise UserError(f"--from must be one of {', '.join(CONVERTERS)}, got {given.program or 'nothing'}")
    name = given.preset or DEFAULT_PRESETS.get(given.program)
    if name is None:
        raise UserError(
            f"--preset is needed for --from {given.program}, whose checkpoints do not say what the network estimates; "
            f"the choices are {', '.join(n for n in presets.PRESETS if n.startswith(given.program))}"
        )
    program = given.program or tyro.MISSING
    default = Convert(source=tyro.MISSING, config=presets.preset(name), program=program, preset=name)
    return parse(Convert, rest, "convert", default)


def _presets() -> None:
    width = max(map(len, presets.PRESETS))
    for name, function in presets.PRESETS.items():
        print(f"{name:<{width}}  {(function.__doc__ or '').strip()}")


def _help() -> str:
    return "\n".join(
        [
            "usage: nelbo VERB ...",
            "",
            "Train diffusion models for likelihood, and measure them in bits per dimension with an error bar.",
            "",
            "  nelbo presets                              what there is, one line each",
            "  nelbo train PRESET --out RUN [--field value]  train; the same command again resumes; --dry-run prints",
            "  nelbo evaluate RUN [--method vlb|ode]      bits/dim with error bars; writes RUN/evaluations/*.json",
            "  nelbo sample RUN --count N                 images: .npz and a .png grid; in shards; --interpolate A B",
            "  nelbo fid RUN|FOLDER|NPZ                   Fréchet inception distance and inception score of samples",
            "  nelbo report RUN [RUN ...]                 one self-contained HTML page",
            "  nelbo convert SOURCE --from KIND --out RUN  somebody else's checkpoint as a run",
            "  nelbo share RUN --out FOLDER [--push ID]   a model to share: weights, configuration, card; on the hub",
            "",
            "`nelbo VERB --help` explains every option; `nelbo train PRESET --help` every field with its default.",
        ]
    )


@dataclass(frozen=True)
class Data:
    """Prepare a data set, check it, and say what it is: counts, shape, levels, version, checksums."""

    source: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="NAME|PATH")]
    """digits, photos32, cifar10, fashion-mnist, imagenet32-old, imagenet32-new, imagenet64; hub:OWNER/NAME[:CONFIG]; a
    folder of image files, a .npy or .npz file, or a prepared folder."""
    out: Path | None = None
    """Folder of the prepared set. By default that of the name, in NELBO_DATA or ~/.cache/nelbo; files and folders are
    prepared only where it is given."""
    files: Path | None = None
    """Folder with the official files of a named set. By default they are looked for, or fetched."""
    unofficial: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Take files with other checksums or counts than the published ones; the set is then called NAME-unofficial."""
    size: int | None = None
    """Image files: scale the shorter side to so many pixels, and take the square in the middle."""
    crop: int | None = None
    """Image files: first take the middle square of so many pixels."""
    filter: Literal["box", "lanczos", "bicubic", "bilinear"] = "box"
    """Image files: pillow's filter for --size; box is the mean over the pixels that become one."""
    workers: int | None = None
    """Processes that read. By default one a core."""
    verify: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Read every file of the prepared set again, and compare checksums."""


def _data(command: Data) -> None:
    from nelbo.data.files import Resize
    from nelbo.data.preparing import Wanted, prepare_source
    from nelbo.progress import Progress

    for name in ("size", "crop", "workers"):
        if getattr(command, name) is not None and getattr(command, name) < 1:
            raise UserError(f"--{name} must be at least 1, got {getattr(command, name)}")
    resize = None
    if command.size is not None or command.crop is not None:
        resize = Resize(command.size, command.crop, command.filter)
    wanted = Wanted(
        command.source, command.out, command.files, command.unofficial, resize, command.workers, command.verify
    )
    with Progress() as progress:
        lines = prepare_source(wanted, progress)
    print("\n".join(lines))


VERBS: dict[str, tuple[type, Callable[[Any], None]]] = {
    "evaluate": (Evaluate, _evaluate),
    "sample": (Sample, _sample),
    "fid": (Fid, _fid),
    "report": (Report, _report),
    "data": (Data, _data),
    "share": (Share, _share),
}


def run(arguments: list[str]) -> None:
    """Carry out a command line; UserError for a user's mistake."""
    verb, *rest = arguments or ["--help"]
    if verb in ("-h", "--help"):
        print(_help())
    elif verb == "--version":
        print(nelbo.__version__)
    elif verb == "presets":
        if rest and rest[0] not in ("-h", "--help"):
            raise UserError(f"presets takes no arguments, got {rest[0]!r}")
        _presets()
    elif verb == "train":
        if rest and rest[0] in ("-h", "--help"):
            print("usage: nelbo train PRESET --out RUN [--dry-run] [--field value]\n")
            rest = ["mulan-digits", "--help"]
        if not rest or rest[0].startswith("-"):
            raise UserError(f"train needs a preset first; the choices are {', '.join(presets.PRESETS)}")
        name, *rest = rest
        default = Train(config=presets.preset(name))
        _train(parse(Train, rest, f"train {name}", default), name)
    elif verb == "convert":
        _convert(_convert_arguments(rest))
    elif verb in VERBS:
        cls, carry_out = VERBS[verb]
        carry_out(parse(cls, rest, verb))
    else:
        raise UserError(f"unknown verb {verb!r}; the choices are presets, train, convert, {', '.join(VERBS)}")


def main(arguments: list[str] | None = None) -> int:
    """The ``nelbo`` command: 0; 2 with one line on stderr for a mistake; 128 + its number where a signal stopped it."""
    choose_waiting()
    keep_memory()
    try:
        run(sys.argv[1:] if arguments is None else arguments)
        return 0
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (UserError, Stopped) as error:
        message, status = str(error), error.status if isinstance(error, Stopped) else 2
    except KeyboardInterrupt:
        message, status = "interrupted", 130
    except OSError as error:
        message, status = f"{error.filename or 'the system'}: {error.strerror or error}", 2
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not re.search("out of memory|allocate", str(error)):
            raise
        lines = str(error).splitlines() or ["out of memory"]
        message, status = f"{lines[0]}: out of memory; try a smaller batch, or training.accumulate above 1", 2
    print(f"nelbo: {' '.join(message.split())}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
