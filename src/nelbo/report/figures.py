"""Figures as inline SVG that follows the page's light or dark colours: every colour becomes a CSS variable.

Bars and bands are 95 % intervals, 1.96 standard errors to each side. Nothing here uses pyplot or global state.
"""

import io
import re
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from markupsafe import Markup, escape

from nelbo.report.runs import Baseline, Estimate, Run
from nelbo.report.tables import PUBLISHED

__all__ = [
    "RUN_COLOURS",
    "TERM_COLOURS",
    "Row",
    "by_time",
    "ceiling",
    "dots",
    "latent_cost",
    "progressive",
    "schedule_change",
    "schedule_comparison",
    "schedule_lines",
    "schedule_spread",
    "short",
    "stacked_terms",
    "training",
]

INTERVAL = 1.96
INK, MUTED, LINE = "#23262d", "#6a707c", "#dfe2e8"
RUN_COLOURS = ("#2f6fb7", "#c8553d", "#3c8d5a", "#8a5fb0", "#b5892e", "#2b97a3", "#b8487f", "#66707f")
TERM_COLOURS = {"prior": "#9aa7b8", "reconstruction": "#d9a441", "diffusion": "#4b7fb5", "latent": "#c4605a"}
DRAW_COLOURS = ("#1b8f7e", "#d9730d", "#7a5cc0")
VARIABLES = {INK: "ink", MUTED: "muted", LINE: "line"}
VARIABLES |= {colour: f"run-{i}" for i, colour in enumerate(RUN_COLOURS)}
VARIABLES |= {colour: f"term-{name}" for name, colour in TERM_COLOURS.items()}
VARIABLES |= {colour: f"draw-{i}" for i, colour in enumerate(DRAW_COLOURS)}
STYLE: dict[Any, Any] = {
    "font.size": 9,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.labelsize": 9,
    "axes.edgecolor": MUTED,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": LINE,
    "grid.linewidth": 0.6,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "legend.handlelength": 1.4,
    "lines.linewidth": 1.4,
    "svg.fonttype": "none",
    "text.parse_math": False,
    "path.simplify": True,
}


def short(name: str, most: int = 22) -> str:
    """A name cut to fit an axis, on a line of its own where it is published, not valid.

    matplotlib hides labels that start with an underscore, so a space goes before it.
    """
    head, published, _ = name.partition(PUBLISHED)
    head = head if len(head) <= most else head[: most - 1] + "…"
    head = f" {head}" if head.startswith("_") else head
    return f"{head}\n(as published)" if published else head


def _colour(number: int) -> str:
    return RUN_COLOURS[number % len(RUN_COLOURS)]


def _dash(number: int) -> str:
    return ("-", "--", ":", "-.")[number // len(RUN_COLOURS) % 4]


def _draw(paint: Callable[[Any], None], label: str, width: float = 4.4, height: float = 3.0) -> Markup:
    """The SVG of one axes, painted by ``paint``; ``label`` says what it shows to those who cannot see it."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context({**STYLE, "svg.hashsalt": label}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")  # a run's name: the reader's font has it
        figure = Figure(figsize=(width, height), layout="constrained")
        figure.patch.set_visible(False)
        axes = figure.subplots()
        axes.patch.set_visible(False)
        paint(axes)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return _inline(buffer.getvalue(), label)


def _inline(svg: str, label: str) -> Markup:
    """matplotlib's SVG made fit for a page: no prolog, metadata, fixed size or repeated ids; colours by name."""
    view = re.search(r'viewBox="[^"]*"', svg)
    assert view is not None
    svg = svg[svg.index(">", svg.index("<svg")) + 1 :]
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<[^>]*>", _tag, re.sub(r"\s+", " ", svg).replace("> <", "><"))
    return Markup(f'<svg class="plot" {view[0]} role="img" aria-label="{escape(label)}">{svg}')


def _tag(match: re.Match[str]) -> str:
    """One tag of the SVG: numbers to two decimals, no ids on groups, the reader's font, colours by name."""
    tag = re.sub(r"(\d\.\d\d)\d+", r"\1", match[0])
    tag = re.sub(r'<g id="[^"]*"', "<g", tag)
    tag = re.sub(r"'DejaVu Sans'[^;\"]*", "system-ui, sans-serif", tag)
    for colour, name in VARIABLES.items():
        tag = tag.replace(colour, f"var(--{name})")
    return tag


Row = tuple[str, Estimate, int, bool]
"""Label, value, the run's number, and whether the figure is a bound (a filled mark)."""


def dots(rows: Sequence[Row], baselines: Sequence[tuple[str, Baseline]], label: str) -> Markup:
    """Bits/dim with error bars, a row each; baselines are rows too, with a line through the whole plot."""

    def paint(axes: Any) -> None:
        names = [short(name) for name, *_ in rows] + [short(name) for name, _ in baselines]
        for y, (_, value, number, bound) in enumerate(rows):
            axes.errorbar(
                value.mean,
                y,
                xerr=None if np.isnan(value.error) else INTERVAL * value.error,
                fmt="o" if bound else "D",
                color=_colour(number),
                markersize=6,
                markerfacecolor=_colour(number) if bound else "none",
                capsize=3,
            )
        for y, (_, baseline) in enumerate(baselines, len(rows)):
            axes.axvline(baseline.value.mean, color=MUTED, linewidth=0.8, linestyle=(0, (4, 3)))
            axes.plot(baseline.value.mean, y, "s", color=MUTED, markersize=4.5)
        axes.set_yticks(range(len(names)), names)
        axes.set_ylim(len(names) - 0.4, -0.6)
        axes.grid(axis="y", visible=False)
        axes.margins(x=0.06)
        values = [value.mean for _, value, *_ in rows] + [b.value.mean for _, b in baselines]
        wide = min(values) > 0 and max(values) > 4 * min(values)
        if wide:
            axes.set_xscale("log", base=2)
            axes.xaxis.set_major_formatter("{x:g}")
        axes.set_xlabel("bits/dim, doubling (lower is better)" if wide else "bits/dim (lower is better)")

    return _draw(paint, label, height=0.75 + 0.29 * (len(rows) + len(baselines)))


def _duration_unit(seconds: float) -> tuple[float, str]:
    for size, name in ((86400.0, "days"), (3600.0, "hours"), (60.0, "minutes")):
        if seconds > 2 * size:
            return size, name
    return 1.0, "seconds"


def _legend(axes: Any) -> None:
    """A legend above the axes, where there is more than one thing to tell apart and not too many."""
    handles, labels = axes.get_legend_handles_labels()
    if 1 < len(labels) <= 2 * len(RUN_COLOURS):
        columns = 3 if max(map(len, labels)) < 13 else 2
        legend = axes.legend(handles, labels, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=columns)
        for line in legend.get_lines():
            line.set(alpha=1, linewidth=1.6)


def _smooth(values: np.ndarray) -> np.ndarray:
    """A centred moving average over about a thirtieth of the points, shorter at the ends."""
    window = np.ones(2 * (len(values) // 60) + 1)
    return np.convolve(values, window, "same") / np.convolve(np.ones(len(values)), window, "same")


def ceiling(runs: Sequence[Run]) -> float:
    """Where to cut the axis above: the first tenth of training lies so high that the rest would look flat."""
    late = [run.curves.train[len(run.curves.train) // 10 :, 2] for run in runs]
    late += [run.curves.validation[len(run.curves.validation) // 10 :, 2] for run in runs]
    values = np.concatenate(late)
    values = values[np.isfinite(values)]
    low, high = (values.min(), values.max()) if len(values) else (0.0, 1.0)
    return float(high + 0.1 * max(high - low, 0.01))


def training(runs: Sequence[Run], against: str, label: str) -> Markup:
    """Bits/dim of training (smoothed) and of validation (error bars), against "step" or "seconds"."""
    column = {"step": 0, "seconds": 1}[against]
    longest = max(run.curves.seconds for run in runs)
    scale, unit = (1.0, "steps") if against == "step" else _duration_unit(longest)

    def paint(axes: Any) -> None:
        for run in runs:
            train, validation, colour = run.curves.train, run.curves.validation, _colour(run.number)
            if len(train):
                lines = run.curves.lines
                axes.plot(lines[:, column] / scale, lines[:, 2], color=colour, linewidth=0.7, alpha=0.25)
                x, y = train[:, column] / scale, _smooth(train[:, 2])
                axes.plot(x, y, _dash(run.number), color=colour, label=short(run.name))
            if len(validation):
                axes.errorbar(
                    validation[:, column] / scale,
                    validation[:, 2],
                    INTERVAL * np.nan_to_num(validation[:, 3]),
                    fmt="o",
                    color=colour,
                    markersize=3.5,
                    linewidth=1,
                    capsize=2,
                )
        axes.set_ylim(top=ceiling(runs))
        axes.set_xlim(left=0)
        axes.set_xlabel(unit if against == "step" else f"{unit} of training")
        axes.set_ylabel("bits/dim")
        _legend(axes)

    return _draw(paint, label)


def latent_cost(runs: Sequence[Run], label: str) -> Markup:
    """The latent term as its authors charge it, in bits per image, over the training steps."""

    def paint(axes: Any) -> None:
        for run in runs:
            train = run.curves.train
            bits = _smooth(train[:, 3]) * run.dimensions
            axes.plot(train[:, 0], bits, _dash(run.number), color=_colour(run.number), label=short(run.name))
        axes.set_xlim(left=0)
        axes.set_ylim(bottom=0)
        axes.set_xlabel("steps")
        axes.set_ylabel("latent term, bits per image")
        _legend(axes)

    return _draw(paint, label)


def stacked_terms(rows: Sequence[tuple[str, dict[str, float]]], without: Sequence[str], label: str) -> Markup:
    """One bar a row, its terms end to end, leaving out those of ``without``."""

    def paint(axes: Any) -> None:
        left = np.zeros(len(rows))
        for name, colour in TERM_COLOURS.items():
            if name in without:
                continue
            widths = np.array([max(terms[name], 0.0) for _, terms in rows])
            axes.barh(range(len(rows)), widths, left=left, height=0.62, color=colour, label=name)
            left = left + widths
        axes.set_yticks(range(len(rows)), [short(name) for name, _ in rows])
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.grid(axis="y", visible=False)
        axes.set_xlabel("bits/dim")
        axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=4, columnspacing=1, handlelength=0.9)

    return _draw(paint, label, height=1.05 + 0.3 * len(rows))


def by_time(runs: Sequence[Run], label: str) -> Markup:
    """The diffusion term's integrand over t, with its error."""

    def paint(axes: Any) -> None:
        for run in runs:
            assert run.headline is not None and run.headline.by_time is not None
            t, mean, error = run.headline.by_time
            margin, colour = INTERVAL * np.nan_to_num(error), _colour(run.number)
            axes.fill_between(t, mean - margin, mean + margin, color=colour, alpha=0.18, linewidth=0)
            axes.plot(t, mean, _dash(run.number), marker="o", markersize=3, color=colour, label=short(run.name))
        axes.set_xlim(0, 1)
        axes.set_ylim(bottom=0)
        axes.set_xlabel("t  (0: image, 1: noise)")
        axes.set_ylabel("diffusion, bits/dim")
        _legend(axes)

    return _draw(paint, label)


def progressive(runs: Sequence[Run], label: str) -> Markup:
    """Bits received against what is then known of an image."""

    def paint(axes: Any) -> None:
        for run in runs:
            assert run.headline is not None and run.headline.progressive is not None
            _, rate, rmse = run.headline.progressive
            axes.plot(rate, rmse, _dash(run.number), color=_colour(run.number), label=short(run.name))
        axes.set_xlim(left=0)
        axes.set_ylim(bottom=0)
        axes.set_xlabel("bits/dim received")
        axes.set_ylabel("error of x̂, grey levels (rms)")
        _legend(axes)

    return _draw(paint, label)


def schedule_lines(t: np.ndarray, gamma: np.ndarray, linear: np.ndarray, number: int, label: str) -> Markup:
    """log SNR = -gamma over t, a line a pixel: t (S,), gamma (S, P); dashed, the straight line between the ends."""

    def paint(axes: Any) -> None:
        many = gamma.shape[1] > 1
        axes.plot(t, -gamma, color=_colour(number), linewidth=0.8 if many else 2, alpha=0.35 if many else 1)
        axes.plot(t, -linear, color=INK, linewidth=1, linestyle=(0, (4, 3)), label="linear")
        axes.set_xlim(0, 1)
        axes.set_xlabel("t  (0: image, 1: noise)")
        axes.set_ylabel("log SNR")
        axes.legend(loc="upper right")

    return _draw(paint, label)


def schedule_change(t: np.ndarray, change: np.ndarray, label: str) -> Markup:
    """log SNR minus the linear schedule's, a line a pixel and a colour a draw of c: t (S,), change (draws, S, P)."""

    def paint(axes: Any) -> None:
        axes.axhline(0, color=INK, linewidth=1, linestyle=(0, (4, 3)))
        for draw, lines in enumerate(change):
            alpha = 0.5 if lines.shape[1] > 1 else 1.0
            drawn = axes.plot(t, lines, color=DRAW_COLOURS[draw], linewidth=0.8, alpha=alpha)
            drawn[0].set_label(f"draw {draw + 1} of c")
        axes.set_xlim(0, 1)
        axes.set_xlabel("t  (0: image, 1: noise)")
        axes.set_ylabel("log SNR − linear")
        _legend(axes)

    return _draw(paint, label)


def schedule_spread(t: np.ndarray, spread: np.ndarray, number: int, label: str) -> Markup:
    """Standard deviation of gamma over draws of c, a line a pixel: t (S,), spread (S, P); the paper's Figure 3."""

    def paint(axes: Any) -> None:
        axes.plot(t, spread, color=_colour(number), linewidth=0.8, alpha=0.5 if spread.shape[1] > 1 else 1.0)
        axes.set_xlim(0, 1)
        axes.set_ylim(bottom=0)
        axes.set_xlabel("t  (0: image, 1: noise)")
        axes.set_ylabel("std of γ over c, nats")

    return _draw(paint, label)


def schedule_comparison(lines: Sequence[tuple[Run, np.ndarray, np.ndarray]], label: str) -> Markup:
    """Mean over pixels and draws of log SNR minus the linear schedule's, a line a run: (run, t, change)."""

    def paint(axes: Any) -> None:
        axes.axhline(0, color=INK, linewidth=1, linestyle=(0, (4, 3)))
        for run, t, change in lines:
            axes.plot(t, change, _dash(run.number), color=_colour(run.number), label=short(run.name))
        axes.set_xlim(0, 1)
        axes.set_xlabel("t  (0: image, 1: noise)")
        axes.set_ylabel("log SNR − linear, mean")
        _legend(axes)

    return _draw(paint, label)
