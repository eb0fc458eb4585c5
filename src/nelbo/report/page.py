"""The report's page: reads runs, draws figures and fills page.html. One file, no script, nothing from elsewhere."""

import math
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from nelbo import checkpoints
from nelbo.errors import UserError
from nelbo.report import tables
from nelbo.report.runs import Run, read_runs
from nelbo.report.tables import Cell, Group, Row, Table

__all__ = ["write_report"]

SHOWN = 64
STRAIGHT = 1e-4


@dataclass(frozen=True)
class Figure:
    """A figure of the page: inline SVG or the data URI of a PNG, a text for those who cannot see it, a caption."""

    caption: str
    svg: str = ""
    uri: str = ""
    alt: str = ""
    kind: str = ""
    ticks: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class HeatRow:
    """A row of heat maps: a title, (data URI, alt, caption) of each, and the colour bar with its ends, if shared."""

    title: str
    cells: list[tuple[str, str, str]]
    bar: str = ""
    low: str = ""
    high: str = ""


@dataclass
class Block:
    """What one run, or one group of runs, has to show in a section."""

    title: str
    number: int = -1
    figures: list[Figure] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    sentences: list[str] = field(default_factory=list)
    missing: list[tuple[str, str]] = field(default_factory=list)
    """(what is missing, the command that makes it)."""
    heats: list[HeatRow] = field(default_factory=list)
    times: list[str] = field(default_factory=list)
    """Column heads of the heat maps."""


def write_report(runs: list[Path], out: Path, checkpoint: str = "best") -> Path:
    """Write the page about run folders to ``out``; ``checkpoint`` (best, last or a step): whose schedules are shown.

    A folder that is no run, or a file in it that cannot be read, raises UserError.
    """
    if checkpoint not in ("best", "last") and not checkpoint.isdecimal():
        raise UserError(f"the checkpoint must be best, last or a step, got {checkpoint!r}")
    loaded, out = read_runs([Path(run) for run in runs], checkpoint), Path(out)
    if out.is_dir():
        raise UserError(f"the page must be a file, got the folder {out}")
    checkpoints.write_aside(out, _render(loaded))
    return out


def _render(runs: list[Run]) -> str:
    import jinja2

    from nelbo.report.figures import RUN_COLOURS

    here = Path(__file__).parent
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(here),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    groups = tables.group_runs(runs)
    sources = _Sources()
    models = [_load_model(run) for run in runs]
    page = environment.get_template("page.html").render(
        title=runs[0].name if len(runs) == 1 else f"{len(runs)} runs",
        css=(here / "page.css").read_text(encoding="utf-8"),
        runs=runs,
        colours=len(RUN_COLOURS),
        lead=_lead(groups[0]) if len(runs) == 1 else None,
        figures=[_figures(group) for group in groups],
        training=[_training(group) for group in groups],
        terms=[_terms(group) for group in groups],
        by_time=[_by_time(group) for group in groups],
        rate=[_rate(group) for group in groups],
        samples=_samples(runs, sources),
        schedules=_schedules(runs, models, sources),
        settings=_settings(runs),
    )
    return page.lstrip()


class _Sources:
    """Test images and labels of the runs' data, loaded once each; or the reason why there are none."""

    def __init__(self) -> None:
        self.found: dict[str, Any] = {}

    def test_images(self, run: Run) -> tuple[np.ndarray | None, np.ndarray | None, str]:
        """(images, labels, reason)."""
        from nelbo.data import load

        source = run.info["config"]["data"]["source"]
        if source not in self.found:
            try:
                self.found[source] = load(source)
            except (UserError, ImportError, OSError) as error:
                self.found[source] = error
        data = self.found[source]
        if isinstance(data, Exception):
            return None, None, f"The test images could not be loaded: {data}."
        trained = ", version ".join(run.data_name)
        if (data.name, data.version) != run.data_name:
            now = f"{source} is now {data.name}, version {data.version}"
            return None, None, f"The test images are not shown: {now}; {run.name} was trained on {trained}."
        return data.images["test"], None if data.labels is None else data.labels["test"], ""


def _load_model(run: Run) -> Any:
    """The run's model, or the UserError that says why there is none."""
    try:
        return checkpoints.load_model(run.path, run.checkpoint, "ema")
    except UserError as error:
        return error


def _lead(group: Group) -> dict[str, Any] | None:
    """The one figure of a page about one run, in large."""
    (run,) = group.runs
    e = run.headline
    if e is None:
        return None
    lead: dict[str, Any] = {"value": tables.figure(e.value), "provenance": tables.provenance(e), "lines": []}
    if not math.isnan(e.draws_error):
        own = tables.number(e.draws_error)
        lead["lines"].append(f"± is one standard error over the images; the draws' own part of it is {own}.")
    if e.published is not None:
        lead["lines"].append(f"As published: {tables.figure(e.published)} bits/dim, {tables.NOT_A_BOUND}.")
    if group.baselines:
        name, best = min(group.baselines, key=lambda pair: pair[1].value.mean)
        gap = best.value.mean - e.value.mean
        side = "below" if gap > 0 else "above"
        lead["lines"].append(f"{tables.number(abs(gap))} bits/dim {side} the best classical baseline ({name}, "
                             f"{tables.number(best.value.mean)}).")  # fmt: skip
    return lead


def _missing_evaluations(block: Block, group: Group) -> None:
    for run in group.runs:
        if run.headline is None:
            block.missing.append((f"{run.name} has no evaluation yet.", run.command("evaluate")))


def _figures(group: Group) -> Block:
    from nelbo.report import figures

    block = Block(group.title)
    rows: list[figures.Row] = []
    for run in group.evaluated:
        assert run.headline is not None
        rows.append((run.name, run.headline.value, run.number, True))
        if run.headline.published is not None:
            rows.append((f"{run.name}{tables.PUBLISHED}", run.headline.published, run.number, False))
    if rows:
        listed = "; ".join(f"{name} {value.mean:.4f}" for name, value, *_ in rows)
        classical = "; ".join(f"{name} {b.value.mean:.4f}" for name, b in group.baselines)
        svg = figures.dots(rows, group.baselines, f"Dot plot of bits/dim. {listed}. Baselines: {classical or 'none'}.")
        hollow = " Hollow: as published, not a bound." if any(not bound for *_, bound in rows) else ""
        block.figures.append(Figure(f"Runs and classical baselines (grey squares, dashed lines).{hollow}", svg))
        if len(rows) > 1 and group.baselines:
            svg = figures.dots(rows, [], f"The same figures without baselines. {listed}.")
            block.figures.append(Figure("The runs alone, enlarged. Bars: 95 % intervals, 1.96 standard errors.", svg))
    block.tables.append(tables.figures_table(group))
    block.tables += [t for t in (tables.differences_table(group), tables.evaluations_table(group)) if t is not None]
    _missing_evaluations(block, group)
    return block


def _training(group: Group) -> Block:
    from nelbo.report import figures

    block = Block(group.title)
    trained = [run for run in group.runs if len(run.curves.train) or len(run.curves.validation)]
    for run in group.runs:
        if run not in trained:
            command = f"nelbo train {run.info['preset'] or 'PRESET'} --out {shlex.quote(str(run.path))}"
            block.missing.append((f"{run.name} has no lines in metrics.jsonl yet.", command))
    if not trained:
        return block
    ends = []
    for run in trained:
        last = f"validation {run.curves.validation[-1, 2]:.4f}" if len(run.curves.validation) else "no validation"
        ends.append(f"{run.name} ends at step {run.curves.step} with {last}")
    label = "; ".join(ends)
    if any(not len(run.curves.validation) for run in trained):
        block.sentences.append("Runs without marks have had no validation yet.")
    block.sentences += tables.thinning_sentences(trained, figures.ceiling(trained))
    captions = {"step": "Against optimizer steps", "seconds": "Against wall clock, all resumptions added up"}
    for against, caption in captions.items():
        svg = figures.training(trained, against, f"Training curves: bits/dim, {caption.lower()}. {label}.")
        block.figures.append(Figure(f"{caption}.", svg))
    latent = [run for run in trained if run.info["config"].get("latent", {}).get("kind") not in ("none", "image", None)]
    latent = [run for run in latent if len(run.curves.train)]
    if latent:
        last = "; ".join(f"{run.name} {run.curves.train[-1, 3] * run.dimensions:.3g}" for run in latent)
        svg = figures.latent_cost(latent, f"Latent term in bits per image over steps, at the end: {last}.")
        caption = "What the latent is charged over training; for the paper's k-hot, as published."
        block.figures.append(Figure(caption, svg))
    return block


def _terms(group: Group) -> Block:
    from nelbo.report import figures

    block = Block(group.title)
    rows = []
    for run, e in group.bounded:
        terms = {name: e.terms[name].mean for name in figures.TERM_COLOURS}
        rows.append((run.name, {**terms, "latent": e.terms.get("valid_latent", e.terms["latent"]).mean}))
        if e.published is not None:
            rows.append((f"{run.name}{tables.PUBLISHED}", terms))
    if rows:
        words = "; ".join(f"{name}: " + ", ".join(f"{k} {v:.4f}" for k, v in terms.items()) for name, terms in rows)
        svg = figures.stacked_terms(rows, (), f"Stacked bars of the four terms in bits/dim. {words}.")
        block.figures.append(Figure("The terms, end to end.", svg))
        svg = figures.stacked_terms(rows, ("diffusion",), "The same bars without the diffusion term.")
        block.figures.append(Figure("The three small ones alone, enlarged.", svg))
        block.tables.append(tables.terms_table(group))
    _missing_evaluations(block, group)
    return block


def _by_time(group: Group) -> Block:
    from nelbo.report import figures

    block = Block(group.title)
    timed = [run for run in group.evaluated if run.headline is not None and run.headline.by_time is not None]
    if timed:
        svg = figures.by_time(timed, "The diffusion term by time t for " + ", ".join(run.name for run in timed) + ".")
        block.figures.append(Figure("Bands: 95 % intervals over all draws.", svg))
    for run in group.evaluated:
        if run not in timed:
            block.missing.append((f"The evaluation of {run.name} holds no loss by time.", run.command("evaluate")))
    _missing_evaluations(block, group)
    return block


def _rate(group: Group) -> Block:
    from nelbo.report import figures

    block = Block(group.title)
    known = [run for run, e in group.bounded if e.progressive is not None]
    if known:
        svg = figures.progressive(known, "Bits received against the error of x̂ for " + ", ".join(r.name for r in known))
        block.figures.append(Figure("From pure noise, on the left, to z₀; images on average.", svg))
        block.tables.append(tables.rate_table(group))
    _missing_evaluations(block, group)
    return block


def _samples(runs: Sequence[Run], sources: _Sources) -> list[Block]:
    from nelbo.report import images

    blocks, real = [], set()
    for run in runs:
        block = Block(run.name, run.number)
        s, levels = run.samples, run.data["levels"]
        count = min(len(s.images), SHOWN) if s else SHOWN
        if s is None:
            block.missing.append((f"{run.name} has no samples yet.", run.command("sample", "--count 64")))
        else:
            uri = images.grid(s.images, levels)
            caption = f"{min(count, len(s.images))} of {s.count} samples, {s.file}"
            block.figures.append(Figure(caption, uri=uri, alt=f"Grid of samples of {run.name}", kind="pixels"))
        source = run.info["config"]["data"]["source"]
        if (source, run.data_name) not in real:
            real.add((source, run.data_name))
            test, _, reason = sources.test_images(run)
            if test is None:
                block.sentences.append(reason)
            else:
                uri = images.grid(test[:count], levels)
                caption = f"{min(count, len(test))} real test images of {' version '.join(run.data_name)}"
                block.figures.append(Figure(caption, uri=uri, alt="Grid of real test images", kind="pixels"))
        if s is not None and s.trajectory is not None:
            keep = np.unique(np.linspace(0, len(s.trajectory) - 1, min(12, len(s.trajectory))).astype(int))
            ticks = [] if s.times is None else [f"{abs(t):.2g}" for t in s.times[keep]]
            rows = 8 if run.data["shape"][1] <= 16 else 4
            uri = images.strip(s.trajectory[keep][:, :rows], levels)
            caption = "From noise (left) to image (right): the denoised x̂ at moments t" if ticks else (
                "From noise (left) to image (right): the denoised x̂")  # fmt: skip
            alt = f"Trajectories of samples of {run.name}, one a row"
            kind = "strip wide" if len(block.figures) == 2 else "strip"
            block.figures.append(Figure(caption, uri=uri, alt=alt, kind=kind, ticks=ticks))
        elif s is not None:
            command = run.command("sample", "--count 64")
            block.missing.append((f"{s.file} records no trajectory from noise to image.", command))
        blocks.append(block)
    return blocks


def _schedules(runs: Sequence[Run], models: Sequence[Any], sources: _Sources) -> list[Block]:
    from nelbo.latent_use import latent_use
    from nelbo.report import figures
    from nelbo.report.schedules import schedule_view

    blocks, compared = [], []
    for run, model in zip(runs, models, strict=True):
        block = Block(run.name, run.number)
        blocks.append(block)
        use = run.headline.latent_use if run.headline else None
        if isinstance(model, UserError):
            block.sentences += tables.latent_sentences(run, use)
            block.missing.append((f"The schedules cannot be drawn: {model}", ""))
            continue
        test, labels, reason = None, None, ""
        if model.schedule_reads_image or (use is None and model.latent is not None):
            test, labels, reason = sources.test_images(run)
            if test is not None and use is None:
                use = latent_use(model, test, labels)
            elif reason:
                block.sentences.append(f"Whether the latent is used was not measured here. {reason}")
        block.sentences += tables.latent_sentences(run, use)
        view = schedule_view(model, test)
        if view is None:
            continue
        compared.append((run, view.t, -view.mean_change))
        _schedule_figures(block, run, view, image=model.schedule_reads_image)
    if len(compared) > 1:
        label = "Mean log SNR minus the linear schedule over t for " + ", ".join(run.name for run, *_ in compared) + "."
        svg = figures.schedule_comparison(compared, label)
        caption = "The runs' schedules: mean over pixels and draws of c, minus the straight line between the ends."
        blocks.insert(0, Block("Side by side", figures=[Figure(caption, svg)]))
    return blocks


def _schedule_figures(block: Block, run: Run, view: Any, image: bool) -> None:
    from nelbo.report import figures, images

    pixels, source = view.gamma.shape[2], "real images (c = x)" if image else "draws of c from its prior"
    what = f"{pixels} of {run.dimensions} entries" if pixels < run.dimensions else f"all {pixels} entries"
    if not view.per_pixel:
        what = "the same for every pixel"
    label = f"log SNR over t for {run.name}, falling from {-view.linear[0]:.2f} to {-view.linear[-1]:.2f}; {what}."
    lines = view.gamma[0] if view.per_pixel else view.gamma[0][:, :1]
    svg = figures.schedule_lines(view.t, lines, view.linear, run.number, label)
    block.figures.append(Figure(f"log SNR = −γ: {what}{', one draw of c' if view.draws > 1 else ''}.", svg))
    change = -(view.gamma - view.linear[:, None])
    largest = float(np.abs(change).max())
    if largest < STRAIGHT:
        block.sentences.append(f"γ is the straight line to within {STRAIGHT:g} nats.")
        return
    order = change[:, len(view.t) // 2].max(0).argsort()  # some pixels from the least to the most changed
    change = change[:, :, order[np.unique(np.linspace(0, len(order) - 1, 24).astype(int))] if view.per_pixel else [0]]
    label = f"log SNR minus the linear schedule for {run.name}; the largest difference is {largest:.3f} nats."
    caption = f"The same minus the straight line, for {change.shape[2]} of them; at most {largest:.3f} nats over all."
    if not view.per_pixel:
        caption = f"The same minus the straight line; at most {largest:.3f} nats."
    if view.draws > 1:
        caption += f" A colour for each of {len(change)} {source}: where they hide each other, c does not matter."
    block.figures.append(Figure(caption, figures.schedule_change(view.t, change, label)))
    if view.draws > 1:
        most = float(view.spread.max())
        label = f"Standard deviation of gamma over {view.draws} {source}, at most {most:.3g} nats."
        spread = view.spread if view.per_pixel else view.spread[:, :1]
        svg = figures.schedule_spread(view.t, spread, run.number, label)
        caption = f"Spread of γ over {view.draws} {source}, a line a pixel (MuLAN's Figure 3); at most {most:.3g} nats."
        block.figures.append(Figure(caption, svg))
    if not view.per_pixel:
        block.sentences.append("γ is the same for every pixel: there are no maps to show.")
        return
    block.times = [f"t = {t:g}" for t in view.maps_t]
    cells = []
    for t, chart in zip(view.maps_t, view.maps.mean(1), strict=True):
        words = f"{tables.number(float(chart.min()), digits=2)} to {tables.number(float(chart.max()), digits=2)}"
        cells.append((images.heat(chart, chart.min(), chart.max(), "viridis"), f"γ at t = {t:g}: {words}", words))
    over = "" if view.draws == 1 else f", mean over {view.draws} {source}"
    channels = view.maps.shape[1]
    mean = ", mean over channels" if channels > 1 else ""
    title = f"γ{over}{mean}; dark: less noise; each map from its least to its largest"
    block.heats.append(HeatRow(title, cells))
    top = float(np.abs(view.maps_change).max())
    for channel in range(channels) if 1 < channels <= 4 else [None]:
        maps = view.maps_change.mean(1) if channel is None else view.maps_change[:, channel]
        which = mean if channel is None else f", channel {channel + 1}"
        title = f"γ minus the straight line{which}; red: noisier"
        block.heats.append(_shared(title, maps, view.maps_t, -top, top, "RdBu_r"))
    if view.draws > 1:
        maps = view.maps_spread.mean(1)
        title = f"Standard deviation of γ over {view.draws} {source}{mean}"
        block.heats.append(_shared(title, maps, view.maps_t, 0.0, float(maps.max()), "magma"))


def _shared(title: str, maps: np.ndarray, times: np.ndarray, low: float, high: float, colours: str) -> HeatRow:
    """Maps (M, H, W) on one scale."""
    from nelbo.report import images

    cells = []
    for t, chart in zip(times, maps, strict=True):
        words = f"{chart.min():.2g} to {chart.max():.2g}".replace("-", "−")
        cells.append((images.heat(chart, low, high, colours), f"{title} at t = {t:g}: {words}", ""))
    ends = (f"{value:.2g} nats".replace("-", "−") for value in (low, high))
    return HeatRow(title, cells, images.colour_bar(colours), *ends)


def _settings(runs: Sequence[Run]) -> dict[str, Any]:
    """Differences first, then time, size and versions, then everything."""
    full = []
    for run in runs:
        rows = [Row(k, [Cell(tables.plain(v))], kind="setting") for k, v in tables.flatten(run.info["config"]).items()]
        full.append((run, Table(f"All settings of {run.name}", ["field", "value"], rows)))
    return {
        "differences": tables.settings_table(runs) if len(runs) > 1 else None,
        "machine": tables.machine_table(runs),
        "full": full,
    }
