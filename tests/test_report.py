"""The report: right numbers, one self-contained file of bounded size, clear errors, and whether a latent is used."""

import base64
import io
import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from nelbo import evaluation, latents, training
from nelbo.checkpoints import load_model
from nelbo.data import Baseline
from nelbo.errors import UserError
from nelbo.latent_use import latent_use
from nelbo.model import DiffusionModel
from nelbo.parameterizations import PARAMETERIZATIONS
from nelbo.paths import PATHS
from nelbo.report import images, tables, write_report
from nelbo.report.runs import Estimate, Thinned, read_runs
from nelbo.report.schedules import schedule_view
from nelbo.sampling import Settings, sample_to_files
from nelbo.schedules import Interior, Linear, Schedule
from tiny import tiny

CLASSICAL = [
    Baseline("pixel histogram", 2.4321, 0.0111, "independent pixels: exact"),
    Baseline("Gaussian mixture", 2.6543, 0.0222, "8 components: an upper bound"),
    Baseline("PNG per image", 14.1414, 0.0333, "a file an image: a code length"),
    Baseline("WebP sheet", 3.1313, None, "12 images tiled in one file: a code length"),
]


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """A MuLAN really trained for a few steps, evaluated and sampled; baselines that cost no time."""
    run = tmp_path_factory.mktemp("runs") / "real"
    training.train(tiny("mulan-digits"), run, preset="mulan-digits", say=lambda line: None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluation, "baselines", lambda *_: CLASSICAL)
        evaluation.evaluate(run, evaluation.Settings(images=12, times=2))
    sample_to_files(load_model(run), run / "samples" / "some", Settings(count=9, steps=4))
    return run


@pytest.fixture
def run(real, tmp_path):
    """A copy to change."""
    return Path(shutil.copytree(real, tmp_path / "copy"))


def edit(run, **changes):
    """The run's evaluation with entries replaced; its path."""
    (path,) = (p for p in (run / "evaluations").glob("*.json") if not p.name.startswith("."))
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return path


def page_of(*runs, **options):
    """The text of the page about runs."""
    return write_report(list(runs), runs[0].parent / "page.html", **options).read_text(encoding="utf-8")


def rows(page, caption):
    """The rows of a table as lists of texts."""
    (table,) = re.findall(rf"<caption>{caption}.*?</table>", page, re.DOTALL)
    found = re.findall(r"<tr.*?</tr>", table, re.DOTALL)
    cells = [re.findall(r"<t[hd].*?</t[hd]>", row, re.DOTALL) for row in found]
    return [[re.sub(r"<.*?>", "", cell) for cell in row] for row in cells]


# The page ------------------------------------------------------------------------------------------------------------


def test_the_page_carries_the_figures_of_the_run(real):
    page = page_of(real)
    record = json.loads(next(p for p in (real / "evaluations").glob("[!.]*.json")).read_text())
    mean, error = record["bits_per_dim"]["mean"], record["bits_per_dim"]["standard_error"]
    table = {row[0]: row[1:] for row in rows(page, "Bits per dimension on digits, version 1")}
    assert table["real"] == [f"{mean:.4f} ± {error:.4f}", f"{record['draws_error']:.4f}"]
    assert f"<b>{mean:.4f} ± {error:.4f}</b>" in page
    assert table["pixel histogram"] == ["2.4321 ± 0.0111", ""] and table["WebP sheet"] == ["3.1313", ""]
    assert all(baseline.note in page for baseline in CLASSICAL)
    terms = {row[0]: row[1:] for row in rows(page, "The four terms")}
    order = ("latent", "diffusion", "reconstruction", "prior")
    assert [cell.split()[0] for cell in terms["real"][1:]] == [f"{record['terms'][n]['mean']:.4f}" for n in order]
    assert [terms[b.name][0][:7].strip() for b in CLASSICAL] == ["2.4321", "2.6543", "14.1414", "3.1313"]
    for fact in (
        "upper bound (VLB, continuous time)",
        "test split, 12 images",
        "averaged (EMA) weights of step 12 (best)",
        "2 times × 2 shifts an image · seed 0",
    ):
        assert fact in page
    assert "as published" not in page.split("<main>")[0] and "Make it with" not in page
    assert page.count("data:image/png;base64,") > 15 and page.count("<svg") == 10
    assert "9 real test images of digits" in page and "9 of 9 samples" in page
    assert f"{record['terms']['latent']['mean'] * 64:.3g}"[:4] in page  # bits an image
    assert "use the latent" in page


def test_the_page_stands_alone(real):
    page = page_of(real, real)
    assert "http:" not in page and "https:" not in page and "<script" not in page and "@import" not in page
    assert "url(" not in re.sub(r"url\(#\w+\)", "", page)
    assert all(source.startswith("data:image/png;base64,") for source in re.findall(r'\ssrc="([^"]*)', page))
    assert all(target.startswith("#") for target in re.findall(r'href="([^"]*)', page))
    assert all(label for label in re.findall(r'<img[^>]*alt="([^"]*)', page))
    assert page.count("<img") == len(re.findall(r'<img[^>]*alt="', page))
    assert page.count("<svg") == page.count('role="img" aria-label="')


def test_a_run_of_digits_makes_a_small_page(real):
    assert len(page_of(real).encode()) < 600_000


@pytest.mark.parametrize("published", [None, {"mean": 3.4567, "standard_error": 0.0123}])
def test_both_figures_of_the_papers_latent(run, published):
    record = json.loads(edit(run).read_text())
    terms = record["terms"] | ({"valid_latent": {"mean": 0.6411, "standard_error": 0.0}} if published else {})
    edit(run, as_published=published, terms=terms, bits_per_dim={"mean": 4.0978, "standard_error": 0.0456})
    page = page_of(run)
    table = {row[0]: row[1:] for row in rows(page, "Bits per dimension on")}
    assert table["copy"][0] == "4.0978 ± 0.0456"
    assert ("copy, as published" in table) == (published is not None) == (tables.NOT_A_BOUND in page)
    if published:
        assert table["copy, as published"][0] == "3.4567 ± 0.0123"
        terms = {row[0]: row[1:] for row in rows(page, "The four terms")}
        assert terms["copy"][:2] == ["4.0978 ± 0.0456", "0.6411 ± 0.0000"]
        assert terms["copy, as published"][0] == "3.4567 ± 0.0123"
        assert terms["copy, as published"][1].startswith(f"{record['terms']['latent']['mean']:.4f}")
        assert "As published: 3.4567 ± 0.0123 bits/dim" in page and "Hollow" in page


def test_names_and_settings_are_escaped_and_kept(run):
    info = json.loads((run / "run.json").read_text())
    info["preset"] = "<script>alert(1)</script>"
    (run / "run.json").write_text(json.dumps(info))
    odd = run.rename(run.with_name('_a$b$ <i> & "c" 数'))
    page = page_of(odd)
    assert "<script" not in page and "<i>" not in page and "&lt;script&gt;alert(1)" in page
    assert re.search(r"<text[^>]*> _a\$b\$ &lt;i&gt;", page)  # in the figures dollars are no mathematics


def test_what_is_missing_is_said_with_its_command(run):
    for name in ("evaluations", "samples", "checkpoints"):
        shutil.rmtree(run / name)
    (run / "metrics.jsonl").unlink()
    page = page_of(run)
    for command in (f"nelbo evaluate {run}", f"nelbo sample {run} --count 64", f"nelbo train mulan-digits --out {run}"):
        assert f"<code>{command}</code>" in page
    assert "has no checkpoint yet" in page and "no evaluation yet" in page


def test_other_images_of_the_same_name_are_not_shown(run):
    info = json.loads((run / "run.json").read_text())
    info["data"]["version"] = "0"
    (run / "run.json").write_text(json.dumps(info))
    page = page_of(run)
    assert "The test images are not shown: digits is now digits, version 1" in page
    assert "real test images of" not in page


def test_several_runs_are_grouped_by_their_data(real, run):
    record = json.loads(edit(run).read_text())
    assert page_of(real, run).count("<caption>Differences in bits per dimension</caption>") == 1
    edit(run, data={"name": "digits", "version": "2"})
    page = page_of(real, run)
    assert "on digits, version 1" in page and "on digits, version 2" in page and "Differences in bits" not in page
    edit(run, data=record["data"], bits_per_dim={"mean": 1.5, "standard_error": None}, draws_error=None)
    table = {row[0]: row[1:] for row in rows(page_of(run), "Bits per dimension on")}
    assert table["copy"] == ["1.5000", "–"]


def test_differences_are_paired_where_images_are_known(real, run):
    (arrays,) = (real / "evaluations").glob("*.npz")
    index, bits = (np.load(arrays)[name] for name in ("index", "bits_per_dim"))
    shift = np.linspace(-0.1, 0.3, len(bits))
    (changed,) = (run / "evaluations").glob("*.npz")
    np.savez(changed, index=index[::-1], bits_per_dim=(bits + shift)[::-1])  # in another order
    a, b = read_runs([run, real])
    value, paired = tables.difference(a, b)
    assert paired and value.mean == pytest.approx(shift.mean())
    assert value.error == pytest.approx(shift.std(ddof=1) / math.sqrt(len(shift)))
    table = {row[0]: row[1:] for row in rows(page_of(run, real), "Differences in bits")}
    assert table["copy"][1] == f"+{shift.mean():.4f} ± {value.error:.4f}" and table["pixel histogram"][0].endswith("*")
    changed.unlink()
    a, b = read_runs([run, real])
    value, paired = tables.difference(a, b)
    error = b.headline.value.error
    assert not paired and value == Estimate(0.0, pytest.approx(math.sqrt(2) * error))
    assert rows(page_of(run, real), "Differences in bits")[1][2].endswith("*")


def test_the_headline_is_the_runs_own_test_data(run):
    path = edit(run)
    record = json.loads(path.read_text())
    others = ({"split": "validation"}, {"weights": "raw"}, {"data": {"name": "x", "version": "1"}}, {"images": 5})
    for number, change in enumerate(others):
        path.with_name(f"zz-{number}.json").write_text(json.dumps(record | change))
    path.with_name(".baselines.json").write_text("{}")  # what nelbo evaluate keeps there
    (loaded,) = read_runs([run])
    assert len(loaded.evaluations) == 5 and loaded.headline.stem == path.stem
    listed = [row for row in rows(page_of(run), "Every evaluation") if len(row) > 1]
    assert len(listed) == 1 + 5 + len(CLASSICAL)


# Files ---------------------------------------------------------------------------------------------------------------


def test_a_long_series_is_averaged_in_bounded_bins():
    series = Thinned(2, limit=10)
    for i in range(1003):
        series.add((i, 2.0 * i))
        assert len(series.bins) <= 10
    found = series.rows()
    assert series.width == 128 and len(found) == 8
    assert np.allclose(found[:7, 0], 63.5 + 128 * np.arange(7)) and found[7, 0] == np.arange(896, 1003).mean()
    assert np.allclose(found[:, 1], 2 * found[:, 0])


def test_the_page_stays_small_however_long_the_training(run):
    short = len(page_of(run))
    line = {"kind": "train", "images_per_second": 1.0, "learning_rate": 1e-3, "gradient_norm": 1.0}
    line["terms"] = {"prior": 0, "reconstruction": 0, "diffusion": 2, "latent": 0.01, "valid_latent": 0.01}
    with (run / "metrics.jsonl").open("w") as file:
        for i in range(1, 20_001):
            line |= {"step": i, "images": i, "seconds": i / 10, "bits_per_dim": 2 + math.sin(i) / i}
            file.write(json.dumps(line) + "\n")
            value = {"bits_per_dim": {"mean": 2.0, "standard_error": 0.1}, "terms": {}, "split": "validation"}
            file.write(json.dumps(line | {"kind": "evaluation"} | value) + "\n")
    (loaded,) = read_runs([run])
    assert len(loaded.curves.train) <= 1000 and len(loaded.curves.validation) <= 800 and loaded.curves.step == 20_000
    assert len(page_of(run)) < short + 700_000


def test_a_restart_does_not_count_steps_twice(run):
    path = run / "metrics.jsonl"
    (before,) = read_runs([run])
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines + lines[-2:]) + '{"kind": "tra')  # killed while it wrote
    (after,) = read_runs([run])
    assert np.array_equal(after.curves.train, before.curves.train) and after.curves.step == 12
    assert np.array_equal(after.curves.validation, before.curves.validation)


LINE = '{"kind": "train", "step": 1, "images": 8, "seconds": 1, "bits_per_dim": 2, "terms": {"latent": 0}}\n'
BROKEN = {
    "run.json": [None, "{", "[1]", '{"format": 2}', '{"format": 1, "config": {}}'],
    "metrics.jsonl": ['{"kind": "tr\n' + LINE, '{"kind": "loss"}\n', '{"kind": "train", "step": 1}\n', "3\n"],
    "evaluations/bad.json": ["", '{"terms": {}}', '{"bits_per_dim": 3, "terms": {"prior": 1}}'],
    "evaluations/bad.npz": ["no archive"],
    "samples/bad.npz": ["no archive", ""],
}


@pytest.mark.parametrize(("name", "content"), [(name, content) for name, many in BROKEN.items() for content in many])
def test_a_broken_file_is_named_in_one_line(run, name, content):
    path = run / name
    if content is None:
        path.unlink()
    else:
        path.write_text(content)
    if name == "evaluations/bad.npz":
        shutil.copy(edit(run), path.with_suffix(".json"))
    with pytest.raises(UserError) as caught:
        page_of(run)
    assert path.name in str(caught.value) and "\n" not in str(caught.value)
    assert not (run.parent / "page.html").exists()


@pytest.mark.parametrize(
    "change",
    [
        {"images": np.zeros((2, 1, 8, 9), np.uint8)},
        {"images": np.zeros((2, 1, 8, 8))},
        {"other": np.zeros(2)},
        {"images": np.zeros((2, 1, 8, 8), np.uint8), "trajectory": np.zeros((3, 2, 1, 8, 9), np.uint8)},
    ],
)
def test_samples_of_another_shape_are_refused(run, change):
    np.savez(run / "samples" / "zz.npz", **change)
    with pytest.raises(UserError, match=r"zz\.npz: (images|trajectory) must be uint8"):
        page_of(run)


def test_mistakes_of_the_command(real, tmp_path):
    with pytest.raises(UserError, match="at least one run"):
        write_report([], tmp_path / "x.html")
    with pytest.raises(UserError, match="no such run"):
        write_report([tmp_path / "nothing"], tmp_path / "x.html")
    with pytest.raises(UserError, match="must be a file, got the folder"):
        write_report([real], tmp_path)
    with pytest.raises(UserError, match="best, last or a step, got 'first'"):
        write_report([real], tmp_path / "x.html", checkpoint="first")


def test_importing_the_report_is_cheap():
    code = "import sys, nelbo.report; print(sorted({'torch', 'matplotlib', 'jinja2'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout == "[]\n"


# Pictures ------------------------------------------------------------------------------------------------------------


def decoded(uri):
    """The pixels of a data URI."""
    return np.array(Image.open(io.BytesIO(base64.b64decode(uri.removeprefix("data:image/png;base64,")))))


def test_grids_and_strips_hold_every_pixel():
    shown = np.arange(5 * 2 * 2, dtype=np.uint8).reshape(5, 1, 2, 2) % 17
    found = decoded(images.grid(shown, 17, width=8))
    assert found.shape == (5, 8, 2)  # two rows of three images of two pixels, with gaps of one
    assert np.array_equal(found[:2, 3:5, 0], np.rint(shown[1, 0] * 15.9375))  # 16 becomes 255
    assert np.array_equal(found[3:5, 0:2, 0], np.rint(shown[3, 0] * 15.9375))
    assert (found[3:5, 6:, 1] == 0).all() and (found[:, 2, 1] == 0).all() and (found[:2, :2, 1] == 255).all()
    moments = np.arange(3 * 2 * 3, dtype=np.uint8).reshape(3, 2, 3, 1, 1)  # three moments of two coloured pixels
    found = decoded(images.strip(moments, 256, width=5))
    assert found.shape == (3, 5, 4)
    assert all(np.array_equal(found[2 * k, 2 * s, :3], moments[s, k, :, 0, 0]) for s in range(3) for k in range(2))
    small, large = (decoded(images.grid(shown, 17, width)) for width in (8, 24))
    assert np.array_equal(large, small.repeat(3, 0).repeat(3, 1))


# Schedules and latents -----------------------------------------------------------------------------------------------


class Tilted(Interior):
    """u = t + t (1 - t) w <c, v>: w per pixel, v picks an entry of c."""

    def __init__(self, w, entry=0):
        super().__init__()
        self.w, self.entry = w, entry

    def raw(self, c):
        tilt = self.w * (c[:, self.entry, None, None, None] if c is not None else 1.0)
        return lambda t: (t + t * (1 - t) * tilt, 1 + (1 - 2 * t) * tilt)


class Reader(nn.Module):
    """An encoder whose mean is the brightness of the image times ``scale``; its variance, softplus(raw)."""

    def __init__(self, scale, raw):
        super().__init__()
        self.scale, self.raw = scale, raw

    def forward(self, x):
        return self.scale * x.flatten(1)[:, :1], torch.full((len(x), 1), self.raw)


SPAN, W = 10.0, torch.tensor([[[0.0, 0.1], [0.2, 0.4]]])


def toy(latent, encoder=None, network=None, interior=None):
    """A model of 2x2 images of 4 levels with a known schedule; a denoiser only where one is given."""
    return DiffusionModel(
        network or nn.Identity(),
        Schedule(interior or Tilted(W, entry=0 if encoder else 1), -6.0, SPAN - 6.0),
        PATHS["vp"](),
        PARAMETERIZATIONS["noise"](),
        (1, 2, 2),
        4,
        latent=latent,
        encoder=encoder,
        network_sees_latent=network is not None,
    )


def constant_images(n):
    """Dark and bright in turn: x = -1/4 or 1/4."""
    return torch.tensor([1, 2]).repeat(n // 2)[:, None, None, None].expand(n, 1, 2, 2)


def test_spread_over_labels_in_closed_form():
    n, draws, times = 10, 3, (0.25, 0.5)
    labels = torch.tensor([0, 1] * 5)
    use = latent_use(toy(latents.Label(2)), constant_images(n), labels, draws=draws, times=times)
    scale = SPAN * np.array([t * (1 - t) for t in times])
    once = 0.5 * math.sqrt(n * draws / (n * draws - 1))  # standard deviation of as many zeros as ones
    assert np.allclose(use["gamma_spread"]["mean"], scale * once * W.mean().item(), rtol=1e-5)
    assert np.allclose(use["gamma_spread"]["max"], scale * once * 0.4, rtol=1e-5)
    rms = scale * 0.5 * math.sqrt(n / (n - 1)) * W.square().mean().sqrt().item()
    assert np.allclose(use["between_images"]["rms"], rms, rtol=1e-5)
    assert np.allclose(use["within_images"]["rms"], 0, atol=1e-5)
    assert use["largest_spread"] == max(use["gamma_spread"]["mean"])
    assert use["range"] == pytest.approx(SPAN)
    assert use["kl"] == {"mean": pytest.approx(math.log(2)), "standard_error": 0}
    assert use["schedule_uses_latent"] and use["denoiser_change"] is None and use["denoiser_uses_latent"] is None
    json.dumps(use, allow_nan=False)


@pytest.mark.parametrize(("scale", "used"), [(4.0, True), (0.0, False)])
def test_spread_of_a_gaussian_latent_within_and_between_images(scale, used):
    """c ~ N(+-scale/4, v): a c that ignores the image moves gamma all the same, and must not count as used."""
    v, n = math.log(1 + math.e**0.5), 64
    model = toy(latents.Gaussian(1), Reader(scale, 0.5))
    use = latent_use(model, constant_images(n), draws=32, times=(0.5,))
    unit = SPAN * 0.25 * W.square().mean().sqrt().item()
    assert use["within_images"]["rms"][0] == pytest.approx(unit * math.sqrt(v), rel=0.05)
    between = unit * scale / 4
    assert use["between_images"]["rms"][0] == pytest.approx(between, rel=0.1, abs=0.4 * unit * math.sqrt(v / 32))
    assert use["largest_spread"] > 0.1 and use["schedule_uses_latent"] == used
    assert used or use["between_images"]["rms"][0] <= use["chance"]
    assert use == latent_use(model, constant_images(n), draws=32, times=(0.5,), batch=5)


class Oracle(nn.Module):
    """eps_hat = eps + 1 where c is the image's brightness: (z - alpha c)/sigma + 1."""

    def forward(self, z, gamma, c):
        alpha, sigma = torch.sigmoid(-gamma).sqrt(), torch.sigmoid(gamma).sqrt()
        return (z - alpha * c[:, :1, None, None]) / sigma + 1


def test_what_another_latent_does_to_the_denoiser_in_closed_form():
    """The c' of the other kind of image is wrong by d = 1/2: eps_hat moves by +-d exp(-gamma/2), its error was 1."""
    model = toy(latents.Gaussian(1), Reader(1.0, -40.0), Oracle(), Linear())
    use = latent_use(model, constant_images(8), draws=2, times=(0.5,), denoised=8)
    moved = 0.5 * np.exp(-(np.array([0.25, 0.5, 0.75]) * SPAN - 6) / 2)
    assert np.allclose(use["denoiser_change"]["mean"], moved, rtol=1e-3)
    assert use["denoiser_gain"]["mean"] == pytest.approx((moved**2).mean(), rel=1e-3)
    assert use["denoiser_uses_latent"] and not use["schedule_uses_latent"] and use["largest_spread"] == 0


def test_a_model_without_a_latent_uses_none(real):
    assert latent_use(toy(None), constant_images(4)) is None
    with pytest.raises(ValueError, match="at least 2 images"):
        latent_use(load_model(real), np.zeros((1, 1, 8, 8), np.uint8))


def test_the_schedule_is_drawn_as_it_is():
    view = schedule_view(toy(None), points=5)  # no latent: tilt 1
    t = np.linspace(0, 1, 5)
    bend = SPAN * (t * (1 - t))[:, None] * W.flatten().numpy()
    assert np.allclose(view.gamma[0], -6 + SPAN * t[:, None] + bend, atol=1e-5) and view.draws == 1 and view.per_pixel
    assert np.allclose(view.linear, -6 + SPAN * t) and np.allclose(view.mean_change, bend.mean(1), atol=1e-5)
    at = SPAN * (view.maps_t * (1 - view.maps_t))[:, None, None, None]
    assert np.allclose(view.maps_change, at * W.numpy(), atol=1e-5) and not view.maps_spread.any()
    view = schedule_view(toy(latents.Label(2)), draws=400)
    assert np.allclose(view.maps_spread, at * 0.5 * W.numpy(), rtol=0.02)  # one entry of a fair c
    assert np.allclose(view.spread[20], SPAN * view.t[20] * (1 - view.t[20]) * 0.5 * W.flatten().numpy(), rtol=0.02)
    view = schedule_view(toy(None, interior=Linear()))
    assert not view.per_pixel and np.allclose(view.gamma[0], view.linear[:, None], atol=1e-5)
