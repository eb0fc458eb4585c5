"""The command line: ``nelbo presets | train | evaluate | sample | report``.

A mistake of the user's gets one line on stderr and exit status 2. Heavy libraries load where a verb needs them.
"""

import dataclasses
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
from nelbo.errors import UserError
from nelbo.stopping import Stopped
from nelbo.waiting import choose_waiting

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
    """A run or a checkpoint folder from whose weights a new run starts."""
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
    """A run folder; or a diffusers pipeline of a DDPM, its folder or hub id, with --data."""
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
    variance: Literal["fixed-small", "fixed-large", "learned"] | None = None
    """vlb: variance of the steps at finite T (DDPM's beta~, beta, or the network's). By default the model's own."""
    clip: Literal["on", "off"] | None = None
    """Whether x_hat is kept within the grey levels, at finite T and in a gaussian decoder. By default as the model
    does."""
    dequantization: Literal["truncated-normal", "uniform", "variational"] | None = None
    """ode: noise that makes reals of grey levels; variational: Gaussian, with the model's decoder. By default
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
    """A run folder."""
    count: int = 64
    """Images."""
    method: Literal["ancestral", "ode"] = "ancestral"
    """ancestral: T steps of p(z_s|z_t); ode: the probability flow, with as many evaluations as the tolerance needs."""
    steps: int = 256
    """ancestral: T."""
    clip: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """ancestral: keep x_hat within the grey levels at every step."""
    rtol: float = 3e-4
    """ode: relative tolerance per pixel, in units of the noise there."""
    atol: float = 3e-4
    """ode: absolute tolerance per pixel, in units of the noise there."""
    decoding: Literal["argmax", "categorical"] = "argmax"
    """The most probable levels of p(v|z_0), or a draw of it."""
    checkpoint: str = "best"
    """best, last or a step."""
    weights: Weights = "ema"
    """The moving average of the weights, or the raw ones."""
    seed: int = 0
    """Seed; sample k does not depend on the count."""
    batch: int = 256
    """Images at once."""
    trajectory: int = 8
    """ancestral: images shown on their way from noise; 0 for no strip."""
    out: Path | None = None
    """Path of the files without suffix. By default RUN/samples/ and a name made of the settings."""
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
    chosen["clip"] = None if command.clip is None else command.clip == "on"
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
        f"{command.run}, {f'step {step}' if step is not None else f'from {kind}'}"
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
    for name in ("count", "steps", "batch"):
        if getattr(command, name) < 1:
            raise UserError(f"--{name} must be at least 1, got {getattr(command, name)}")
    if not 0 <= command.seed < 2**64 or command.trajectory < 0:
        raise UserError(
            "--seed must lie in 0 .. 2^64 - 1 and --trajectory be 0 or more, "
            f"got {command.seed} and {command.trajectory}"
        )
    given = {"ancestral": command.steps, "ode": f"{command.rtol:g}"}[command.method]
    if command.method == "ode" and (command.steps, command.clip) != (Sample.steps, Sample.clip):
        raise UserError("--steps and --clip belong to --method ancestral, and the method is ode")
    if command.method == "ancestral" and (command.rtol, command.atol) != (Sample.rtol, Sample.atol):
        raise UserError("--rtol and --atol belong to --method ode, and the method is ancestral")
    for name in ("rtol", "atol"):
        if not 0 < getattr(command, name) < 1:
            raise UserError(f"--{name} must lie between 0 and 1, got {getattr(command, name)}")
    _set_threads(command.threads)
    from nelbo import checkpoints, sampling
    from nelbo.devices import choose_device
    from nelbo.progress import Progress

    checkpoints.read_run(command.run)
    step = checkpoints.read_checkpoint(command.run, command.checkpoint).step
    device = choose_device(command.device)
    model = checkpoints.load_model(command.run, command.checkpoint, command.weights, device)
    if command.method == "ode" and model.schedule_reads_image:
        raise UserError(f"the schedule of {command.run} reads the image: it has no probability flow; use ancestral")
    name = f"step-{step}-{command.method}-{given}-seed{command.seed}-{command.count}"
    for word, chosen in (("clip", command.clip), (command.decoding, command.decoding != "argmax"),
                         (command.weights, command.weights != "ema")):  # fmt: skip
        name += f"-{word}" if chosen else ""
    stem = command.out or command.run / "samples" / name
    checkpoints.make_folder(stem.parent)
    with Progress() as progress:
        paths = sampling.sample_to_files(
            model,
            stem,
            count=command.count,
            method=command.method,
            steps=command.steps,
            clip=command.clip,
            rtol=command.rtol,
            atol=command.atol,
            categorical=command.decoding == "categorical",
            seed=command.seed,
            batch=command.batch,
            shown=command.trajectory,
            progress=lambda done: progress.update("sampling", done, command.count),
        )
    print("written: " + ", ".join(map(str, paths)))


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
            "  nelbo sample RUN --count N                 images: .npz and a .png grid",
            "  nelbo report RUN [RUN ...]                 one self-contained HTML page",
            "",
            "`nelbo VERB --help` explains every option; `nelbo train PRESET --help` every field with its default.",
        ]
    )


VERBS: dict[str, tuple[type, Callable[[Any], None]]] = {
    "evaluate": (Evaluate, _evaluate),
    "sample": (Sample, _sample),
    "report": (Report, _report),
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
    elif verb in VERBS:
        cls, carry_out = VERBS[verb]
        carry_out(parse(cls, rest, verb))
    else:
        raise UserError(f"unknown verb {verb!r}; the choices are presets, train, {', '.join(VERBS)}")


def main(arguments: list[str] | None = None) -> int:
    """The ``nelbo`` command: 0; 2 with one line on stderr for a mistake; 128 + its number where a signal stopped it."""
    choose_waiting()
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
