"""``nelbo evaluate --method ode``, ``nelbo sample --method ode`` and the report of both, as a user runs them."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nelbo import checkpoints, cli, evaluation, likelihood, samplers
from nelbo.data import load
from nelbo.errors import UserError
from nelbo.group import ALONE
from nelbo.report.runs import read_runs
from tiny import flags, tiny

LOOSE = ("--rtol", "0.03", "--atol", "0.03", "--least-steps", "20")


def call(*arguments: object) -> int:
    return cli.main([str(a) for a in arguments])


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("runs")
    for name in ("vdm-digits", "mulan-paper-digits", "mulan-label-digits"):
        made = tiny(name, training__steps=12, training__evaluate_every=0)
        assert call("train", name, "--out", place / name, *flags(made)) == 0
    return place


def record(run: Path, pattern: str = "*-ode-*.json") -> dict[str, Any]:
    (file,) = (run / "evaluations").glob(pattern)
    return json.loads(file.read_text())


def test_evaluate_says_what_the_library_says(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = shutil.copytree(runs / "vdm-digits", tmp_path / "run")
    assert call("evaluate", run, "--method", "ode", "--images", 10, "--samples", 2, "--batch", 7, *LOOSE) == 0
    out, found = capsys.readouterr().out, record(run)
    images = load("digits").images["test"][:10]
    expected = likelihood.ode(
        checkpoints.load_model(run), images, samples=2, rtol=0.03, atol=0.03, least_steps=20, batch=7
    )
    assert found["bits_per_dim"]["mean"] == pytest.approx(expected.mean, abs=1e-6)
    assert found["bits_per_dim"]["standard_error"] == pytest.approx(expected.standard_error, rel=1e-4)
    assert found["draws_error"] == pytest.approx(expected.draws_error, rel=1e-4)
    assert found["cost"]["evaluations_per_solve"] == expected.cost["evaluations_per_solve"]
    assert (found["is_bound"], found["settings"]["samples"], found["images"]) == (False, 2, 10)
    assert sum(t["mean"] for t in found["terms"].values()) == pytest.approx(expected.mean, abs=1e-6)
    assert "estimate (ODE, truncated-normal, K = 2)" in out and f"{expected.mean:.4f}" in out
    assert "evaluations a solve" in out and "seconds an image" in out and "the tolerance's" in out
    assert not list((run / "evaluations").glob(".*ode*"))


def test_the_exact_trace_is_called_a_bound(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = shutil.copytree(runs / "vdm-digits", tmp_path / "run")
    coarse = ("--rtol", 0.5, "--atol", 0.5, "--least-steps", 2)
    assert call("evaluate", run, "--method", "ode", "--images", 1, "--trace", "exact", *coarse) == 0
    assert record(run)["is_bound"] and "bound (ODE" in capsys.readouterr().out


def test_the_tolerance_s_cost_is_the_figure_less_that_of_a_tighter_solve(runs: Path, tmp_path: Path) -> None:
    run = shutil.copytree(runs / "vdm-digits", tmp_path / "run")
    assert call("evaluate", run, "--method", "ode", "--images", 3, *LOOSE) == 0
    images, model = load("digits").images["test"][:3], checkpoints.load_model(run)
    loose = likelihood.ode(model, images, rtol=0.03, atol=0.03, least_steps=20, replicates=1)
    tight = likelihood.ode(model, images, rtol=0.003, atol=0.003, least_steps=448, replicates=1, double=True)
    assert record(run)["tolerance"]["mean"] == pytest.approx(
        float((loose.per_image - tight.per_image).mean()), abs=1e-6
    )


def test_the_paper_s_latent_gets_two_figures(runs: Path, tmp_path: Path) -> None:
    run = shutil.copytree(runs / "mulan-paper-digits", tmp_path / "run")
    assert call("evaluate", run, "--method", "ode", "--images", 4, *LOOSE) == 0
    found = record(run)
    images, model = load("digits").images["test"][:4], checkpoints.load_model(run)
    x = torch.as_tensor(2 * (images + 0.5) / 17 - 1, dtype=torch.float32)
    with torch.no_grad():
        (theta,) = model.encode(x)
    q = torch.softmax(theta.double(), 1)
    categorical = float((q * (q * theta.shape[1]).log()).sum(1).mean())
    valid = float(np.log(45))  # 2 of 10
    gap = (valid - categorical) / (64 * np.log(2))
    assert found["bits_per_dim"]["mean"] - found["as_published"]["mean"] == pytest.approx(gap, abs=1e-5)


def test_labels_are_paid_for(runs: Path, tmp_path: Path) -> None:
    run = shutil.copytree(runs / "mulan-label-digits", tmp_path / "run")
    assert call("evaluate", run, "--method", "ode", "--images", 2, *LOOSE) == 0
    assert record(run)["terms"]["latent"]["mean"] == pytest.approx(np.log(10) / np.log(2) / 64, abs=1e-6)


def test_killed_half_way_the_same_command_goes_on(runs: Path, tmp_path: Path) -> None:
    """SIGKILL once some batches are kept: the rest is solved, and the figures are those of an uninterrupted run."""
    run = shutil.copytree(runs / "vdm-digits", tmp_path / "run")
    whole = shutil.copytree(runs / "vdm-digits", tmp_path / "whole")
    options = ["--method", "ode", "--images", "40", "--batch", "4", *LOOSE]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-m", "nelbo.cli", "evaluate", str(run), *options], env=environment, stderr=subprocess.PIPE
    )
    kept = None
    until = time.monotonic() + 120
    while kept is None and time.monotonic() < until:
        time.sleep(0.01)
        for file in (run / "evaluations").glob(".*ode*.npz"):
            with np.load(file) as arrays:
                if np.isfinite(arrays["prior"]).sum() >= 8:
                    kept = arrays["seconds"].copy()
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert kept is not None
    solved = int(np.isfinite(kept).sum())
    assert 8 <= solved < 80
    calls = []
    original = likelihood._solve_draws

    def counting(model: Any, images: torch.Tensor, *rest: Any, **options: Any) -> Any:
        calls.append(len(images))
        return original(model, images, *rest, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(likelihood, "_solve_draws", counting)
        assert call("evaluate", run, *options) == 0
    assert sum(calls) == 80 - solved + 16  # and the tolerance's two solves of 8 images
    assert call("evaluate", whole, *options) == 0
    a, b = record(run), record(whole)
    assert a["bits_per_dim"]["mean"] == pytest.approx(b["bits_per_dim"]["mean"], abs=1e-6)
    assert a["draws_error"] == pytest.approx(b["draws_error"], rel=1e-4)
    assert not list((run / "evaluations").glob(".*ode*"))


@pytest.mark.parametrize("spoilt", ["other settings", "not an archive"])
def test_what_is_kept_of_another_evaluation_is_not_taken(runs: Path, tmp_path: Path, spoilt: str) -> None:
    run = shutil.copytree(runs / "vdm-digits", tmp_path / "run")
    settings = evaluation.Settings(method="ode", images=2, rtol=0.03, atol=0.03, least_steps=20)
    path = run / "evaluations" / ".x.npz"
    path.parent.mkdir(exist_ok=True)
    if spoilt == "not an archive":
        path.write_bytes(b"PK\x03\x04 and no more")
    else:
        evaluation.Unfinished(path, {"seed": 1}, ALONE).write(likelihood.ode_table(2, 2, 1))
    assert evaluation.Unfinished(path, {"seed": 0}, ALONE).read() is None
    assert evaluation.evaluate(run, settings).record["images"] == 2


def test_a_solve_that_fails_is_one_line(runs: Path, tmp_path: Path) -> None:
    run = shutil.copytree(runs / "vdm-digits", tmp_path / "run")

    def fail(*_: Any, **__: Any) -> Any:
        raise likelihood.SolverError("2 of 4 examples stopped early")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(likelihood, "_solve_draws", fail)
        with pytest.raises(UserError, match="2 of 4 examples stopped early"):
            evaluation.evaluate(run, evaluation.Settings(method="ode", images=4))


def test_compare_is_paired(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = shutil.copytree(runs / "vdm-digits", tmp_path / "run")
    other = runs / "mulan-label-digits"
    assert call("evaluate", run, "--method", "ode", "--images", 4, "--compare", other, *LOOSE) == 0
    found = record(run)["comparison"]
    dataset, model = load("digits"), checkpoints.load_model(other)
    images, labels = dataset.images["test"][:4], dataset.labels["test"][:4]  # type: ignore[index]
    expected = likelihood.ode(model, images, labels=labels, rtol=0.03, atol=0.03, least_steps=20)
    assert found["bits_per_dim"]["mean"] == pytest.approx(expected.mean, abs=1e-6)
    assert record(run)["bits_per_dim"]["mean"] - expected.mean == pytest.approx(found["difference"]["mean"], abs=1e-6)


def test_sample_by_ode(runs: Path, tmp_path: Path) -> None:
    run = shutil.copytree(runs / "vdm-digits", tmp_path / "run")
    assert call("sample", run, "--method", "ode", "--count", 5, "--batch", 2, *LOOSE[:4]) == 0
    (file,) = (run / "samples").glob("*ode*.npz")
    expected, _ = samplers.sample_ode(checkpoints.load_model(run), 5, rtol=0.03, atol=0.03)
    images = np.load(file)["images"]
    # Grey levels on the edge of rounding may fall to either side with the batch.
    assert (images == expected.numpy()).mean() > 0.99
    assert file.with_suffix(".png").exists()


def test_the_report_shows_the_ode_s_figure_beside_the_bound(runs: Path, tmp_path: Path) -> None:
    run = shutil.copytree(runs / "vdm-digits", tmp_path / "run")
    assert call("evaluate", run, "--method", "ode", "--images", 3, *LOOSE) == 0
    assert call("report", run) == 0  # by ODE alone: no four terms to show
    assert call("evaluate", run, "--images", 3, "--times", 1) == 0
    assert call("report", run) == 0
    (read,) = read_runs([run])
    assert read.headline is not None and read.headline.method == "vlb"
    assert read.flow is not None and read.flow.value.mean == record(run)["bits_per_dim"]["mean"]
    page = (run / "report.html").read_text()
    assert f"{read.flow.value.mean:.4f}" in page and f"{read.headline.value.mean:.4f}" in page
    assert "run, by ODE" in page and "estimate (probability-flow ODE, truncated-normal dequantization" in page
