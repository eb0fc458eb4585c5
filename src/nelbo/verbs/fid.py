"""``nelbo fid``."""

import dataclasses
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from nelbo.verbs.shared import Drawing, Weights, set_threads

__all__ = ["Fid", "carry_out"]


@dataclass(frozen=True, kw_only=True)
class Fid(Drawing):
    """The Fréchet inception distance of a run's samples, or of images, from a data set, and their inception score;
    writes RUN/evaluations/fid-*.json. --method to --seed are of samples drawn from a run."""

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
    checkpoint: str = "best"
    """best, last or a step."""
    run_weights: Weights = "ema"
    """The moving average of the run's weights, or the raw ones."""
    batch: int | None = None
    """Images at once. By default those drawn as in `nelbo sample`, and 64 whose features are taken."""
    out: Path | None = None
    """The file to write. By default RUN/evaluations/fid-*.json, and none for images that belong to no run."""
    device: str | None = None
    """cpu, cuda, cuda:1, ... By default a GPU where there is one."""
    threads: int | None = None
    """CPU threads. By default what PyTorch takes."""


def carry_out(command: Fid) -> None:
    """Carry it out."""
    set_threads(command.threads)
    from nelbo import fid
    from nelbo.devices import choose_device
    from nelbo.group import join
    from nelbo.progress import Progress

    names = {f.name for f in dataclasses.fields(fid.Settings)}
    settings = fid.Settings(**{k: v for k, v in vars(command).items() if k in names})
    group = join(command.device)
    device = choose_device(command.device)
    say = print if group.main else lambda line: None
    with Progress(shown=group.main) as progress:
        found = fid.evaluate(
            command.source, settings, out=command.out, device=device, progress=progress.update, say=say
        )
    if group.main:
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
