"""Tables and sentences of the report: what every figure is, where it comes from, and how figures compare."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from nelbo.report.runs import Baseline, Estimate, Evaluation, Run

__all__ = [
    "NOT_A_BOUND",
    "PUBLISHED",
    "Cell",
    "Group",
    "Row",
    "Table",
    "difference",
    "differences_table",
    "duration",
    "evaluations_table",
    "figure",
    "figures_table",
    "flatten",
    "group_runs",
    "latent_sentences",
    "machine_table",
    "number",
    "plain",
    "provenance",
    "settings_table",
    "terms_table",
    "thinning_sentences",
]

PUBLISHED = ", as published"
BY_ODE = ", by ODE"
NOT_A_BOUND = (
    "not a bound: as its authors compute it, the k-hot latent charged the KL of one categorical draw, which is not the "
    "KL of the subset"
)


@dataclass(frozen=True)
class Cell:
    """A value and, beside it, its error."""

    value: str
    error: str = ""


@dataclass(frozen=True)
class Row:
    """A row: its name, a line of detail below the name, the run's number for its colour (-1: none), and the cells."""

    name: str
    cells: list[Cell]
    detail: str = ""
    number: int = -1
    kind: str = "run"


@dataclass(frozen=True)
class Table:
    """A table with a caption, a head and notes below."""

    caption: str
    head: list[str]
    rows: list[Row]
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Group:
    """Runs on the same data, whose figures may be compared, and the classical baselines on those images."""

    title: str
    runs: list[Run]
    baselines: list[tuple[str, Baseline]]

    @property
    def evaluated(self) -> list[Run]:
        """Those that have a figure."""
        return [run for run in self.runs if run.headline is not None]

    @property
    def bounded(self) -> list[tuple[Run, Evaluation]]:
        """Those whose figure is a variational bound, which has the four terms."""
        return [(run, run.headline) for run in self.runs if run.headline and run.headline.method == "vlb"]


def group_runs(runs: Sequence[Run]) -> list[Group]:
    """By data set and version of the headline evaluation, or of training where there is none."""
    keys: dict[tuple[str, str], list[Run]] = {}
    for run in runs:
        keys.setdefault(run.headline.data if run.headline else run.data_name, []).append(run)
    groups = []
    for (name, version), members in keys.items():
        found: dict[tuple[str, str, int], Baseline] = {}
        for run in members:
            for baseline in run.headline.baselines if run.headline else []:
                found.setdefault((baseline.name, run.headline.split, run.headline.split_images), baseline)  # type: ignore[union-attr]
        several = len({(split, images) for _, split, images in found}) > 1
        labels = [
            (f"{name} ({split}, {images} images)" if several else name, baseline)
            for (name, split, images), baseline in found.items()
        ]
        groups.append(Group(f"{name}, version {version}", members, labels))
    return groups


def number(value: float, sign: bool = False, digits: int = 4) -> str:
    """Fixed decimals with a true minus sign; a dash for what is not known."""
    if not math.isfinite(value):
        return "–"
    return f"{value:{'+' if sign else ''}.{digits}f}".replace("-", "−")


def _thousands(value: Any) -> str:
    """12 345; what is no whole number plainly."""
    return f"{value:,}".replace(",", " ") if isinstance(value, int) else plain(value)


def figure(value: Estimate) -> str:
    """A mean and its error."""
    return f"{number(value.mean)} ± {number(value.error)}" if math.isfinite(value.error) else number(value.mean)


def _cell(value: Estimate, sign: bool = False) -> Cell:
    return Cell(number(value.mean, sign), "" if math.isnan(value.error) else f"± {number(value.error)}")


def duration(seconds: float) -> str:
    """Wall clock in the units that a person would use."""
    if not math.isfinite(seconds):
        return "–"
    whole = round(seconds)
    if seconds < 60:
        return f"{seconds:.1f} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    if whole < 48 * 3600:
        return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    return f"{whole // 86400} days {whole % 86400 // 3600} h"


def provenance(e: Evaluation) -> str:
    """What a figure is and where it comes from, in one line."""
    steps, s = e.settings.get("steps", 0), e.settings
    if e.method == "ode":
        kind = "upper bound" if e.is_bound else "estimate"
        trace = "exact trace" if e.is_bound else f"{s.get('probes')} {s.get('trace')} probe(s)"
        solver = f"{s.get('solver')} at {s.get('rtol'):g}, {s.get('least_steps', 1)} steps at least"
        parts = [
            f"{kind} (probability-flow ODE, {s.get('dequantization')} dequantization, K = {s.get('samples')} × "
            f"{s.get('replicates')} replicates, {trace}, {solver})"
        ]
    else:
        parts = [f"upper bound (VLB, {f'T = {steps}' if steps else 'continuous time'})"]
    if s.get("decoder"):
        parts.append({"gaussian": "decoder: the network's Gaussian over the bin"}.get(s["decoder"], "decoder: softmax"))
    if "variance" in s:
        parts.append(f"variance {s['variance']}{', x̂ clipped' if s.get('clip') else ''}")
    parts.append(f"{e.data[0]} version {e.data[1]}, {e.split} split, {e.images} images")
    weights = {"ema": "averaged (EMA) weights", "raw": "raw weights"}.get(e.weights, e.weights)
    parts.append(f"{weights} of step {e.step:,} ({e.checkpoint})".replace(",", " "))
    if "times_per_shift" in e.settings:
        parts.append(f"{e.settings['times_per_shift']} times × {e.settings.get('shifts', 1)} shifts an image")
    if e.tolerance is not None:
        parts.append(f"the tolerance costs {figure(e.tolerance)} on a few images")
    if "seed" in e.settings:
        parts.append(f"seed {e.settings['seed']}")
    return " · ".join(parts)


def _baseline_rows(group: Group, blanks: int, notes: bool = False) -> list[Row]:
    """The classical baselines as rows: their figure and blank cells; ``notes``, how each was measured."""
    return [
        Row(label, [_cell(b.value)] + [Cell("")] * blanks, b.note if notes else "", kind="baseline")
        for label, b in group.baselines
    ]


def _figure_rows(run: Run, e: Evaluation, name: str) -> list[Row]:
    rows = [Row(name, [_cell(e.value), Cell(number(e.draws_error))], provenance(e), run.number)]
    if e.published is not None:
        rows.append(Row(f"{name}{PUBLISHED}", [_cell(e.published), Cell("")], NOT_A_BOUND, run.number, "published"))
    return rows


def figures_table(group: Group) -> Table:
    """One figure a run, both for the paper's k-hot, and the baselines."""
    rows = []
    for run in group.runs:
        if run.headline is None:
            rows.append(Row(run.name, [Cell("–"), Cell("–")], "no evaluation yet", run.number))
        else:
            rows += _figure_rows(run, run.headline, run.name)
            if run.flow is not None and run.flow is not run.headline:
                rows += _figure_rows(run, run.flow, f"{run.name}{BY_ODE}")
    notes = ["± is one standard error over the images. It already contains the draws' own error, given beside it."]
    if len({(r.headline.split, r.headline.images) for r in group.evaluated if r.headline}) > 1:
        notes.append("These figures are not all of the same images: see the line below each name.")
    if any(r.headline.images < r.headline.split_images for r in group.evaluated if r.headline):
        notes.append("The baselines are of the whole split, of which a run here saw only a part.")
    if not group.baselines:
        notes.append("No evaluation carries the classical baselines; nelbo evaluate measures them.")
    head = ["", "bits/dim", "draws' own error"]
    rows += _baseline_rows(group, 1, notes=True)
    return Table(f"Bits per dimension on {group.title}: lower is better", head, rows, notes)


def evaluations_table(group: Group) -> Table | None:
    """Every evaluation, where a run has more than its headline."""
    if all(len(run.evaluations) < 2 for run in group.runs):
        return None
    rows = [row for run in group.runs for e in run.evaluations for row in _figure_rows(run, e, f"{run.name}: {e.stem}")]
    return Table("Every evaluation", ["", "bits/dim", "draws' own error"], rows + _baseline_rows(group, 1))


def difference(a: Run, b: Run) -> tuple[Estimate, bool]:
    """a - b of the headline figures, and whether it is paired per image (of the same data and split)."""
    e, f = a.headline, b.headline
    assert e is not None and f is not None
    if (e.data, e.split) == (f.data, f.split) and e.per_image is not None and f.per_image is not None:
        _, left, right = np.intersect1d(e.per_image[0], f.per_image[0], return_indices=True)
        gap = e.per_image[1][left] - f.per_image[1][right]
        if len(gap) > 1:
            return Estimate(float(gap.mean()), float(gap.std(ddof=1) / math.sqrt(len(gap)))), True
    return Estimate(e.value.mean - f.value.mean, math.hypot(e.value.error, f.value.error)), False


def differences_table(group: Group) -> Table | None:
    """Row minus column in bits/dim, with its error: runs against runs, baselines against runs."""
    columns = group.evaluated
    if len(columns) < 2:
        return None
    rows, unpaired, unlike = [], False, False
    for run in columns:
        cells = []
        for other in columns:
            if other is run:
                cells.append(Cell("–"))
                continue
            value, paired = difference(run, other)
            unpaired |= not paired
            unlike |= _draws(run) != _draws(other)
            cells.append(Cell(number(value.mean, True), f"± {number(value.error)}" + ("" if paired else " *")))
        rows.append(Row(run.name, cells, number=run.number))
    for label, baseline in group.baselines:
        cells = []
        for run in columns:
            assert run.headline is not None
            error = math.hypot(baseline.value.error, run.headline.value.error)
            value = Estimate(baseline.value.mean - run.headline.value.mean, error)
            shown = _cell(value, True)
            cells.append(Cell(shown.value, f"{shown.error} *" if shown.error else ""))
        rows.append(Row(label, cells, kind="baseline"))
    notes = [
        "Row minus column: below zero, the row is better. Valid bounds only. ± is one standard error; between runs it "
        "is that of the paired differences, image by image, unless marked *."
    ]
    if unpaired or group.baselines:
        notes.append("* not paired: the two errors are combined as if independent, which overstates the error.")
    if unlike:
        notes.append("Some runs were evaluated with other times, T or seeds: their draws are not the same.")
    return Table("Differences in bits per dimension", ["", *(run.name for run in columns)], rows, notes)


def _draws(run: Run) -> list[Any]:
    assert run.headline is not None
    return [run.headline.settings.get(key) for key in ("method", "times_per_shift", "shifts", "steps", "seed")]


def terms_table(group: Group) -> Table:
    """The four terms and their sum."""
    rows = []
    for run, e in group.bounded:
        common = [_cell(e.terms[name]) for name in ("diffusion", "reconstruction", "prior")]
        valid = e.terms.get("valid_latent", e.terms["latent"])
        rows.append(Row(run.name, [_cell(e.value), _cell(valid), *common], number=run.number))
        if e.published is not None:
            cells = [_cell(e.published), _cell(e.terms["latent"]), *common]
            rows.append(Row(f"{run.name}{PUBLISHED}", cells, "not a bound", run.number, "published"))
    head = ["", "sum", "latent", "diffusion", "reconstruction", "prior"]
    notes = ["The classical baselines have no such terms; their figures stand under the sum."]
    rows += _baseline_rows(group, 4)
    return Table("The four terms of the bound, bits/dim", head, rows, notes if group.baselines else [])


SHARES = (0.0, 0.1, 0.25, 0.5, 0.75, 1.0)


def rate_table(group: Group) -> Table:
    """Rate and distortion (DDPM section 4.3), and the error of x_hat after parts of the rate."""
    rows = []
    for run, e in group.bounded:
        if e.progressive is None:
            continue
        latent = e.terms.get("valid_latent", e.terms["latent"]).mean
        rate = e.terms["prior"].mean + e.terms["diffusion"].mean + latent
        _, received, rmse = e.progressive
        errors = [float(np.interp(share * rate, received, rmse)) for share in SHARES]
        cells = [Cell(number(rate)), _cell(e.terms["reconstruction"]), *(Cell(f"{v:.2f}") for v in errors)]
        rows.append(Row(run.name, cells, number=run.number))
    head = ["", "rate, bits/dim", "distortion, bits/dim", *(f"error at {share:.0%} of the rate" for share in SHARES)]
    notes = [
        "Rate: prior, diffusion and latent, the cost of receiving z₀. Distortion: the reconstruction, that of making "
        "the image of it. Errors: root mean square of x̂ − x in grey levels."
    ]
    return Table("Rate and distortion", head, rows, notes)


def flatten(values: dict[str, Any], where: str = "") -> dict[str, Any]:
    """A nested table with dotted names."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= flatten(value, f"{where}{name}.") if isinstance(value, dict) else {where + name: value}
    return flat


def plain(value: Any) -> str:
    """A setting as text."""
    if value is None:
        return "default"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(plain, value))
    return str(value)


def settings_table(runs: Sequence[Run]) -> Table:
    """The fields in which the configurations of two or more runs differ."""
    configs = [{"preset": run.info["preset"], **flatten(run.info["config"])} for run in runs]
    names = list(dict.fromkeys(name for config in configs for name in config))
    rows = []
    for name in names:
        values = [plain(config[name]) if name in config else "–" for config in configs]
        if len(set(values)) > 1:
            rows.append(Row(name, [Cell(value) for value in values], kind="setting"))
    notes = [] if rows else ["None: the configurations are the same."]
    return Table("Settings in which the runs differ", ["", *(run.name for run in runs)], rows, notes)


def machine_table(runs: Sequence[Run]) -> Table:
    """Time taken, parameters by part, versions."""

    def row(name: str, values: Sequence[str]) -> Row:
        return Row(name, [Cell(value) for value in values], kind="setting")

    def rate(run: Run) -> str:
        return f"{run.curves.images / run.curves.seconds:,.0f}".replace(",", " ") if run.curves.seconds > 0 else "–"

    rows = [
        row("started", [plain(run.info.get("created", "–")) for run in runs]),
        row("training, wall clock", [duration(run.curves.seconds) for run in runs]),
        row("training steps", [_thousands(run.curves.step) for run in runs]),
        row("images seen", [_thousands(run.curves.images) for run in runs]),
        row("images a second, overall", [rate(run) for run in runs]),
        row("evaluation, wall clock", [duration(r.headline.seconds) if r.headline else "–" for r in runs]),
        row("parameters", [_thousands(run.info["parameters"]) for run in runs]),
    ]
    for title, key in (("parameters of the ", "parameters_by_part"), ("", "versions")):
        for name in dict.fromkeys(name for run in runs for name in run.info[key]):
            rows.append(row(title + name, [_thousands(run.info[key].get(name, "–")) for run in runs]))
    return Table("Time taken, size and versions", ["", *(run.name for run in runs)], rows)


def thinning_sentences(runs: Sequence[Run], ceiling: float) -> list[str]:
    """What the training curves leave out of long logs; ``ceiling``: where the figure is cut above."""
    sentences = []
    for run in runs:
        curves = run.curves
        if curves.train_bin > 1:
            sentences.append(
                f"{run.name} has {_thousands(curves.train_count)} lines of training. The strong line goes through "
                f"means of {_thousands(curves.train_bin)}; the pale one through the first line, the last and, of every "
                f"{_thousands(curves.train_bin)}, the least and the largest."
            )
            late = curves.lines[curves.lines[:, 0] >= curves.train[len(curves.train) // 10, 0]]
            largest = late[np.nanargmax(late[:, 2])] if np.isfinite(late[:, 2]).any() else late[0]
            if largest[2] > ceiling:
                sentences.append(
                    f"After the first tenth the pale line of {run.name} goes above the axis, up to "
                    f"{number(largest[2])} bits/dim at step {_thousands(int(largest[0]))}."
                )
        if curves.validation_bin > 1:
            sentences.append(
                f"{run.name} was validated {_thousands(curves.validation_count)} times. Shown are the first, the last "
                f"and, of every {_thousands(curves.validation_bin)}, the least and the largest figure."
            )
    return sentences


def latent_sentences(run: Run, use: dict[str, Any] | None) -> list[str]:
    """What the latent costs and whether it is used; ``use`` as ``latent_use`` gives it."""
    latent = run.info["config"].get("latent", {})
    kind = latent.get("kind", "none")
    if kind == "none":
        return ["This model has no auxiliary latent: one schedule for every image."]
    sentences, e = [], run.headline
    if e is not None and kind != "image":
        valid = e.terms.get("valid_latent", e.terms["latent"])
        d = run.dimensions
        bits = [f"{_short(d * v.mean, digits=4)} bits an image, {_short(v.mean)} bits/dim"
                for v in (valid, e.terms["latent"])]  # fmt: skip
        where = f"{e.split} split, {e.images} images"
        if e.published is None:
            sentences.append(f"The latent ({kind}) costs {bits[0]} ({where}): c tells on average no more of an image.")
        else:
            sentences.append(f"The latent ({kind}) is charged {bits[0]} in the valid bound (log C(n, k), which bounds "
                             f"its KL); its authors charge {bits[1]} ({where}).")  # fmt: skip
    if use is None:
        return sentences
    spread, largest = use["gamma_spread"], use["largest_spread"]
    between = max(use["between_images"]["rms"])
    worst = spread["t"][spread["mean"].index(max(spread["mean"]))]
    source = "the image itself" if kind == "image" else f"c ~ q(c|x), {use['draws']} draws"
    if use["schedule_uses_latent"]:
        verdict = "The schedule uses the latent"
    elif largest >= use["spread_rule"]:
        verdict = "The schedule does not use the latent: γ moves with c, but c as good as ignores the image"
    else:
        verdict = "The schedule does not use the latent: γ hardly moves with c"
    sentences.append(
        f"{verdict}. Over {use['images']} test images and {source}, γ spreads by {_nats(largest)}, "
        f"{_short(100 * use['largest_spread_share'])} % of its range of {use['range']:.2f} (standard deviation, mean "
        f"over pixels, at t = {worst:g}, where it is largest; {_nats(max(spread['max']))} where it moves most). "
        f"Between images it spreads by {_nats(between)}; chance alone gives up to {_nats(use['chance'])} (rule: used "
        f"where γ spreads between images by {use['spread_rule']:g} nats at some t, and by more than chance)."
    )
    if use["denoiser_gain"] is not None:
        gain, change = use["denoiser_gain"], max(use["denoiser_change"]["mean"])
        verdict = "uses" if use["denoiser_uses_latent"] else "does not use"
        sentences.append(
            f"The denoiser {verdict} the latent (which also tells it the γ of each pixel). With the c of another image "
            f"its ε̂ changes by up to {_short(100 * change)} % of its error, and its squared error by "
            f"{_short(100 * gain['mean'], True)} ± {_short(100 * gain['standard_error'])} % (rule: used where this is "
            f"{100 * use['gain_rule']:g} % or more, and two standard errors)."
        )
    return sentences


def _short(value: float, sign: bool = False, digits: int = 2) -> str:
    """So many significant digits, all those before the point, no exponent."""
    if not math.isfinite(value):
        return "–"
    if 0 < abs(value) < 1e-6:
        return "less than 0.000001"
    digits = max(digits, len(str(int(abs(value)))))
    text = np.format_float_positional(value, digits, unique=False, fractional=False, trim="-", sign=sign)
    return text.replace("-", "−")


def _nats(value: float) -> str:
    return f"{_short(value)} nats"
