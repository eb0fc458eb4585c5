"""Long runs: logs of millions of steps, and the script that watches growth."""

import contextlib
import importlib.util
import json
import os
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nelbo.logs import Log
from nelbo.report.runs import MOST_BINS, MOST_MARKS, Thinned, read_runs
from nelbo.training import train
from tiny import log_line, tiny

quiet: dict[str, Any] = {"say": lambda line: None}
ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}
GROWS = {"open", "write", "flush", "close", "fsync", "mkdir", "replace"}  # what a full disk refuses


# Logs of millions of steps -------------------------------------------------------------------------------------------

LINES = 120_000
TRAIN = (
    b'{"kind": "train", "step": %d, "images": %d, "seconds": %d.5, "images_per_second": 305.12, '
    b'"learning_rate": 0.0002, "bits_per_dim": %.4f, "terms": {"prior": 0.0018216401345443, '
    b'"reconstruction": 0.0101234567890123, "diffusion": 2.5012345678901234, "latent": 0.0134567890123456, '
    b'"valid_latent": 0.01345678901}, "gradient_norm": 0.08123456789}\n'
)
EVALUATION = (
    b'{"kind": "evaluation", "step": %d, "images": %d, "seconds": %d.5, "bits_per_dim": {"mean": %.4f, '
    b'"standard_error": 0.01}}\n'
)


@contextlib.contextmanager
def taking() -> Iterator[list[int]]:
    """By how many bytes the resident set grows inside, at most."""

    def peak() -> int:
        found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
        assert found is not None
        return int(found[1]) * 1024

    taken = [0]
    Path("/proc/self/clear_refs").write_text("5")  # the largest so far is that of now
    before = peak()
    yield taken
    taken[0] = peak() - before


def figures() -> np.ndarray:
    """bits/dim of every line: falling, with the largest and the least in one line each."""
    i = np.arange(LINES)
    bits = 2.6 + 3 / (1 + i / 50) + 0.05 * np.sin(12.9898 * i)
    bits[70_001], bits[90_003] = 9.8765, 1.2345
    return bits.round(4)


@pytest.fixture(scope="module")
def long(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose log says that it took 12 million steps, with an evaluation every 100 lines."""
    run = tmp_path_factory.mktemp("long") / "run"
    train(tiny(training__steps=1), run, preset="vdm-digits", **quiet)
    with open(run / "metrics.jsonl", "wb") as file:
        for i, bits in enumerate(figures().tolist(), 1):
            file.write(TRAIN % (100 * i, 800 * i, i, bits))
            if i % 100 == 0:
                file.write(EVALUATION % (100 * i, 800 * i, i, bits + 0.01))
    return run


def test_opening_a_long_log_reads_its_end_only(long: Path, tmp_path: Path) -> None:
    content = (long / "metrics.jsonl").read_bytes()
    path = tmp_path / "metrics.jsonl"
    assert len(content) > 40e6
    for torn, step, most in ((b'{"kind": "tr', 100 * LINES, 0.2), (b"", 100 * LINES - 5000, 0.2), (b"", 50, 20.0)):
        path.write_bytes(content + torn)
        inode, begun = path.stat().st_ino, time.process_time()
        with taking() as taken:
            Log(tmp_path, step).close()
        assert time.process_time() - begun < most and taken[0] < 12e6
        kept = path.read_bytes()
        assert content.startswith(kept) and path.stat().st_ino == inode  # cut in place
        assert kept.count(b"\n") == {100 * LINES: 121_200, 100 * LINES - 5000: 121_149, 50: 0}[step]
    path.write_bytes(content)
    Log(tmp_path, 100 * LINES).close()
    assert path.read_bytes() == content


@pytest.mark.parametrize("block", [1, 7, 64, 4096])
def test_a_log_is_cut_at_the_same_place_however_it_is_read(
    block: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nelbo.logs.BLOCK", block)
    lines = [json.dumps(log_line(step)).encode() + b"\n" for step in (1, 1, 2, 5, 5, 5, 9)]
    path = tmp_path / "metrics.jsonl"
    for tail in (b"", b"\n", b"\0" * 100, b'{"step": 2}', b"[1]\n", b'{"kind": "train"}\n', lines[-1][:20]):
        for step, kept in ((0, 0), (1, 2), (4, 3), (5, 6), (8, 6), (9, 7), (99, 7)):
            path.write_bytes(b"".join(lines) + tail)
            Log(tmp_path, step).close()
            assert path.read_bytes() == b"".join(lines[:kept])
    path.unlink()
    Log(tmp_path, 3).close()
    assert path.read_bytes() == b""


def test_the_report_of_a_long_log_is_small_quick_and_keeps_what_matters(long: Path, tmp_path: Path) -> None:
    from nelbo.report import write_report

    bits, begun = figures(), time.process_time()
    with taking() as taken:
        (run,) = read_runs([long])
    assert taken[0] < 20e6 and time.process_time() - begun < 20  # it takes one or two
    curves = run.curves
    assert (curves.step, curves.train_count, curves.train_bin) == (100 * LINES, LINES, 256)
    assert len(curves.train) == 469 <= MOST_BINS and len(curves.lines) <= 2 * MOST_BINS + 2
    means = bits[: 468 * 256].reshape(468, 256).mean(1)
    assert np.allclose(curves.train[:-1, 2], means, atol=1e-9)
    assert curves.train[-1, 2] == pytest.approx(bits[468 * 256 :].mean(), abs=1e-9)
    by_step = {row[0]: row for row in curves.lines.tolist()}
    for i in (0, 70_001, 90_003, LINES - 1):
        assert by_step[100 * (i + 1)] == [100 * (i + 1), i + 1.5, bits[i], 0.0134567890123456]
    assert all(bits[round(step / 100) - 1] == row[2] for step, row in by_step.items())
    assert (curves.lines[0, 0], curves.lines[-1, 0]) == (100, 100 * LINES)
    every = bits[99::100] + 0.01
    assert (curves.validation_count, curves.validation_bin) == (1200, 8)
    assert len(curves.validation) <= 2 * MOST_MARKS + 2
    assert curves.validation[-1].tolist() == [100 * LINES, LINES + 0.5, pytest.approx(every[-1]), 0.01]
    assert curves.validation[0, 0] == 10_000
    assert curves.validation[:, 2].max() == pytest.approx(every.max())
    assert curves.validation[:, 2].min() == pytest.approx(every.min())
    page = write_report([long], tmp_path / "page.html").read_text()
    assert len(page) < 1_000_000
    assert "run has 120 000 lines of training. The strong line goes through means of 256; the pale one through" in page
    assert "the pale line of run goes above the axis, up to 9.8765 bits/dim at step 7 000 200." in page
    assert "run was validated 1 200 times. Shown are the first, the last and, of every 8, the least" in page


def test_what_is_not_thinned_is_not_said_to_be(tmp_path: Path) -> None:
    from nelbo.report import write_report

    train(tiny(training__steps=2), tmp_path / "run", **quiet)
    page = write_report([tmp_path / "run"], tmp_path / "page.html").read_text()
    assert "lines of training" not in page and "was validated" not in page


@pytest.mark.parametrize("count", [0, 1, 2, 9, 10, 11, 1003])
def test_a_thinned_series_keeps_its_ends_and_extremes(count: int) -> None:
    values = np.random.default_rng(count).normal(size=count)
    series = Thinned(2, limit=10, value=1)
    for i, value in enumerate(values.tolist()):
        series.add((i, value))
    points, rows = series.points(), series.rows()
    assert len(rows) <= 10 and len(points) <= 22 and series.count == count
    if count < 10:
        assert points.tolist() == rows.tolist() == [[i, v] for i, v in enumerate(values.tolist())]
    else:
        assert points[0].tolist() == [0, values[0]] and points[-1].tolist() == [count - 1, values[-1]]
        assert (points[:, 1].min(), points[:, 1].max()) == (values.min(), values.max())
        for start in range(0, count, series.width):
            part = values[start : start + series.width]
            found = points[(start <= points[:, 0]) & (points[:, 0] < start + series.width)]
            assert (found[:, 1].min(), found[:, 1].max()) == (part.min(), part.max())


def test_figures_that_are_not_numbers_hide_no_extremes() -> None:
    series = Thinned(2, limit=4, value=1)
    for i, value in enumerate([np.nan, 3.0, 1.0, np.nan, np.nan, np.nan, 7.0, np.nan]):
        series.add((i, value))
    assert series.width == 4
    points = {int(i): value for i, value in series.points().tolist()}
    assert points[1] == 3 and points[2] == 1 and points[6] == 7


# Growth --------------------------------------------------------------------------------------------------------------


def test_the_script_that_watches_a_long_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    script = Path(__file__).resolve().parent.parent / "benchmarks" / "long_run.py"
    spec = importlib.util.spec_from_file_location("long_run", script)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "long_run", module)
        patch.setenv("GOMP_SPINCOUNT", "1")
        spec.loader.exec_module(module)
        small = {"steps": 40, "window": 2, "sample_every": 40, "channels": 4}
        module.main(module.Case(**small, run=tmp_path / "run", out=tmp_path / "out.json"))
    out = json.loads((tmp_path / "out.json").read_text())
    assert out["readings"]["step"] == list(range(2, 41, 2)) and min(out["readings"]["seconds"]) > 0
    assert len(set(out["readings"]["threads"])) == len(set(out["readings"]["tensors"][5:])) == 1
    assert (tmp_path / "run" / "samples" / "step-000000040.npz").exists()
    shown = capsys.readouterr().out
    assert "| resident set, KiB |" in shown and "CPU seconds a window, last tenth / second tenth: " in shown
    step = np.arange(100.0)
    growth, error = module.slope(step, 3 * step + 5)
    assert growth == pytest.approx(3) and error == pytest.approx(0, abs=1e-12)
    growth, error = module.slope(step, np.random.default_rng(0).normal(size=100))
    assert error == pytest.approx(np.sqrt(0.1 / (10 * 825)), rel=0.4) and abs(growth) < 3 * error
