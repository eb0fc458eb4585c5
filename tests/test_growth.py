"""benchmarks/growth.py and benchmarks/shared_machine.py at tiny sizes: exponents, rows and cells by hand."""

import json
import math
import re
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import linregress

from nelbo import likelihood

FOLDER = Path(__file__).resolve().parent.parent / "benchmarks"


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The folder can be imported from; what is imported is gone afterwards."""
    monkeypatch.setattr(sys, "path", [str(FOLDER), *sys.path])
    yield
    for name in ("growth", "shared_machine", "training_step"):
        sys.modules.pop(name, None)


@pytest.fixture
def growth(scripts: None) -> ModuleType:
    import growth

    return growth


@pytest.fixture
def shared_machine(scripts: None) -> ModuleType:
    import shared_machine

    return shared_machine


def test_exponents_are_those_of_least_squares(growth: ModuleType) -> None:
    x = [32, 64, 128, 256, 512]
    slope, error = growth.fit(x, [3 * v**1.5 for v in x])
    assert slope == pytest.approx(1.5) and error == pytest.approx(0, abs=1e-7)
    y = [1.0, 2.3, 3.7, 9.0, 15.0]
    known = linregress(np.log(x), np.log(y))
    assert growth.fit(x, y) == pytest.approx((known.slope, known.stderr))
    assert math.isnan(growth.fit(x[:2], y[:2])[1])


def point(seconds: float, mebibytes: float, parameters: float = 1e6, operations: float = 1e9) -> dict[str, Any]:
    found = {
        "seconds_per_step": {"median": seconds, "min": seconds, "max": seconds}, "peak_bytes": mebibytes * 2**20,
        "parameters": parameters, "flops_per_step": operations,
    }  # fmt: skip
    return {"plain": found, "checkpointing": found}


def test_a_sweep_becomes_exponents_a_reason_and_a_plot(growth: ModuleType, tmp_path: Path) -> None:
    """Time as the square of channels, memory as their number; the base stands between the halved and the doubled."""
    parts = {"convolutions": 0.75, "attention": 0.05, "dense": 0.1, "rest": 0.1}
    measured = {
        "base": {"channels": 64},
        "sweep": [
            {"what": "base", "value": 0, **point(4, 200)},
            {"what": "channels", "value": 32, **point(1, 100)},
            {"what": "channels", "value": 128, **point(16, 400, 4e6)},
        ],
        "shares": [
            {"what": "base", "value": 0, **parts},
            {"what": "channels", "value": 128, **parts, "convolutions": 0.65, "attention": 0.15},
        ],
    }
    assert growth.grown(measured)["channels"][0] == [32, 64, 128]
    shown = growth.show_training(measured, "float32")
    row = next(line for line in shown.splitlines() if line.startswith("| channels | 32, 64, 128"))
    assert [cell.strip() for cell in row.split("|")[3:-1]] == [
        "0.00 ± 0.00",
        *["2.00 ± 0.00"] * 2,
        *["1.00 ± 0.00"] * 2,
    ]
    assert "convolutions, 75 % of its time" in shown
    factors = "convolutions 3.5, attention 12.0, dense 4.0, rest 4.0"
    assert f"With channels 128 a step takes 4.0 times as long: {factors}." in shown
    # 20 bytes of a million parameters are 19.07 MiB: of 200, and four times that of 400.
    assert "are 10 % of the peak at the base (19 % at twice the channels)" in shown
    drawn = growth.draw({"case": {"threads": 2}, "training": {"float32": measured}}, tmp_path)
    assert [p.name for p in drawn] == ["growth-training.png"] and drawn[0].read_bytes().startswith(b"\x89PNG")


def test_likelihoods_are_timed_by_what_they_spend_it_on(growth: ModuleType) -> None:
    """The network's rows are images times draws, of the ODE the solver's evaluations of them; the figure is the one."""
    grad, one = torch.autograd.grad, {"images": 3, "times_per_shift": 2, "shifts": 2, "batch": 5}
    task = {"method": "vlb", "preset": "vdm-digits", "points": [one, one | {"images": 6}], "repeats": 2}
    few, more = growth.evaluate(task)["points"]
    assert (few["rows"], more["rows"]) == (12, 24)
    solve = {"images": 2, "samples": 2, "replicates": 1, "least_steps": 5, "batch": 4, **growth.LOOSE}
    found = growth.evaluate(task | {"method": "ode", "points": [solve]})["points"][0]
    assert found["rows"] % 4 == 0 and 4 * 5 <= found["rows"] <= 4 * 15
    for record, derived in ((few, False), (more, False), (found, True)):
        assert len(record["seconds"]) == len(record["own"]) == 2
        for total, own, network, derivatives in zip(
            *(record[k] for k in ("seconds", "own", "network", "derivatives")), strict=True
        ):
            assert 0 < network < network + derivatives + 1e-9 and network + derivatives < own < total
            assert (derivatives > 0) == derived
    assert torch.autograd.grad is grad and likelihood.vlb.__name__ == "vlb"
    assert math.isfinite(few["mean"]) and few["mean"] != more["mean"]


def test_processes_take_the_same_step_with_and_without_the_exchange(growth: ModuleType) -> None:
    case = {"preset": "vdm-digits", "channels": 8, "levels": 1, "batch": 4, "size": 8, "image_channels": 1}
    both = growth.run_group("take_steps", {"case": case, "repeats": 2}, 2, 1)
    assert len(both) == 2 and both[0]["parameters"] == both[1]["parameters"] > 1000
    for found in both:
        assert len(found["seconds"]) == len(found["without_exchange"]) == 2 and min(found["seconds"]) > 0
        assert found["peak_bytes"] > 0 and found["threads"] == 1
    names = list(growth.arrangements(2))
    one = {"seconds": [0.1, 0.1], "without_exchange": [], "peak_bytes": 2**20, "parameters": 2**18}
    two = {**one, "seconds": [0.1, 0.08], "without_exchange": [0.06, 0.06]}
    results = {"model": {names[0]: [one], names[1]: [{**one, "seconds": [0.05, 0.05]}], names[2]: [two, two],
                         "share": [{**one, "seconds": [0.03, 0.03]}]}}  # fmt: skip
    shown = growth.show_processes(results, 2)
    # Of 90 ms 60 remain without the exchange, and 30 are one thread's with nobody beside it.
    assert "of 90.0 ms of 2 processes, 1 thread each, 33 % are the exchange of 1.0 MiB of gradients" in shown
    assert "33 % what processes cost each other otherwise" in shown
    assert re.search(r"2 processes, 1 thread each \| 90.0 \(80.0..100.0\) +\| 0.56 +\| 1 \+ 1 ", shown)


def test_all_cells_of_a_shared_machine(shared_machine: ModuleType) -> None:
    case = shared_machine.Case(ways=("one thread", "nelbo's choice"), beside=(1, 2))
    assert [(way, str(others)) for way, others in shared_machine.cells(case)] == [
        *(("one thread", column) for column in ("alone", "beside 1", "beside 2")),
        *(("nelbo's choice", column) for column in
          ("alone", "beside 1", "beside 2", "1 starts later", "2 start later")),
    ]  # fmt: skip
    with pytest.raises(SystemExit, match=r"--ways must be among GNU OpenMP's default .* got two threads"):
        shared_machine.main(replace(case, ways=("two threads",)))


def test_a_cell_is_a_fresh_process_beside_one_that_starts_later(shared_machine: ModuleType) -> None:
    case = shared_machine.Case(threads=1, seconds=0.01)
    way = shared_machine.WAYS["GOMP_SPINCOUNT=3000"]
    found = shared_machine.measure(way, shared_machine.Others(0, 1), case)
    assert found["waiting"] == {"GOMP_SPINCOUNT": "3000"} and found["steps"] >= 1
    assert found["images_per_second"] > 0 and found["cpu_seconds_per_step"] > 0


def test_the_table_of_a_shared_machine(shared_machine: ModuleType, tmp_path: Path, capsys: Any) -> None:
    speeds = {
        "GOMP_SPINCOUNT=1000": {"alone": (200, 220, 240), "beside 1": (150, 155, 170)},
        "nelbo's choice": {"alone": (300, 310, 330), "beside 1": (100, 93, 96), "1 starts later": (60, 62, 70)},
    }
    chosen = {"alone": {"GOMP_SPINCOUNT": "10000"}, "beside 1": {"OMP_WAIT_POLICY": "PASSIVE"}}
    records = [
        {"way": way, "others": others, "turn": turn, "images_per_second": value, "steps": 5,
         "waiting": chosen.get(others, chosen["alone"])}
        for way, cells in speeds.items() for others, values in cells.items() for turn, value in enumerate(values)
    ]  # fmt: skip
    peak = {"product": "mm 1024", "gflops": {"median": 380, "min": 370, "max": 390}}
    report = {
        "case": {"preset": "mulan-digits", "threads": 2, "seconds": 2.0, "repeats": 3}, "records": records,
        "gemm": [peak, peak],
        "machine": {"cores": 2, "cpu": "processor", "flags": [], "torch": "2", "load": [0.1], "load_after": [1.5]},
    }  # fmt: skip
    (tmp_path / "threads.json").write_text(json.dumps(report))
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- threads -->\nold\n<!-- end threads -->\nafter\n")
    shared_machine.main(shared_machine.Case(source=tmp_path / "threads.json", write=page))
    text = page.read_text()
    assert text.startswith("before\n<!-- threads -->\n| images/s ") and text.endswith("\n<!-- end threads -->\nafter\n")
    assert "old" not in text and max(len(x) for x in text.splitlines() if x[0:1] != "|") <= 120
    assert " ".join(capsys.readouterr().out.split()) in " ".join(text.split())
    assert re.search(r"nelbo's choice +\| 310 \(300..330\) +\| 96 \(93..100\) +\| 62 \(60..70\) ", text)
    assert re.search(r"GOMP_SPINCOUNT=1000 \| 70 +\| +\|", text) and re.search(
        r"nelbo's choice +\| 31 +\| 20 +\|", text
    )
    assert re.search(r"beside 1 +\| OMP_WAIT_POLICY=PASSIVE \(3 of 3\) +\| GOMP_SPINCOUNT=1000 \| 62 ", text)
    assert re.search(r"1 starts later \| GOMP_SPINCOUNT=10000 \(3 of 3\) +\| GOMP_SPINCOUNT=1000 \| 40 ", text)
    page.write_text("<!-- threads -->")
    with pytest.raises(SystemExit, match="must have <!-- threads --> once and <!-- end threads --> once after it"):
        shared_machine.main(shared_machine.Case(source=tmp_path / "threads.json", write=page))
