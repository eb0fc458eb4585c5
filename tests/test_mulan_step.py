"""benchmarks/mulan_step.py at a tiny size: ratios of the same turn, and operations by hand."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parent.parent / "benchmarks" / "mulan_step.py"


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))  # the script adds its folder
    spec = importlib.util.spec_from_file_location("mulan_step", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "mulan_step", module)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "WARM", 1)
    yield module
    sys.modules.pop("training_step", None)


def test_report(benchmark, tmp_path, capsys):
    presets = ("vdm-cifar10", "mulan-small-schedule-cifar10", "mulan-factored-schedule-cifar10")
    case = benchmark.Comparison(
        presets, channels=16, levels=1, batch=2, size=8, precision=("float32",), threads=1, repeats=3,
        out=tmp_path / "mulan.json",
    )  # fmt: skip
    benchmark.main(case)
    results = json.loads((tmp_path / "mulan.json").read_text())["results"]["float32"]
    shown = capsys.readouterr().out
    assert list(results) == list(presets) and all(name in shown for name in presets)
    first, narrow, factored = results.values()
    # The narrow and the factored one differ in the schedule's kernels alone, used once an image: 3 (2 rows in out).
    pixels, kernels = 3 * 8 * 8, []
    for width, rank in ((256, None), (3072, 64)):
        wide = [(width, width), *[(width, pixels)] * 3]
        kernels.append(50 * width + sum(a * b if rank is None else a * rank + rank * b for a, b in wide))
    difference = narrow["flops_per_step"]["total"] - factored["flops_per_step"]["total"]
    assert difference == 3 * 2 * case.batch * (kernels[0] - kernels[1])
    assert narrow["parameters"]["schedule"] == kernels[0] + 2 * 256 + 3 * pixels
    assert set(first["parameters"]) == {"network", "schedule"} and first["parameters"]["schedule"] == 2
    assert first["operation_ratio"] == 1 and first["excess"] == {"median": 1, "min": 1, "max": 1}
    for r in (narrow, factored):
        ratios = sorted(a / b for a, b in zip(r["samples"], first["samples"], strict=True))
        operations = r["flops_per_step"]["total"] / first["flops_per_step"]["total"]
        assert len(ratios) == 3 and r["time_ratio"]["median"] == ratios[1]
        assert r["operation_ratio"] == operations > 1
        assert r["excess"]["max"] == pytest.approx(ratios[2] / operations)
        assert r["excess_of_shortest"] == pytest.approx(min(r["samples"]) / min(first["samples"]) / operations)
