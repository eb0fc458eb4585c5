"""benchmarks/training_step.py at a tiny size: what it counts is checked by hand and against torch's own counter."""

import importlib.util
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

SCRIPT = Path(__file__).resolve().parent.parent / "benchmarks" / "training_step.py"


@pytest.fixture(scope="module")
def benchmark():
    spec = importlib.util.spec_from_file_location("training_step", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["training_step"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["training_step"]


@pytest.fixture
def case(benchmark):
    return benchmark.Case(channels=16, levels=2, batch=2, size=8, repeats=1, threads=1)


def flat_unet_flops(channels: int, levels: int, batch: int, size: int, image_channels: int = 3) -> dict[str, int]:
    """Operations of a step of vdm-cifar10's network, layer by layer: two Fourier exponents, one conditioning column."""
    pixels, c, width = batch * size * size, channels, 4 * channels
    conv_3x3 = [(5 * image_channels, c), (c, image_channels)]
    conv_3x3 += 2 * (levels + 2) * [(c, c)]  # down and middle
    conv_3x3 += (levels + 1) * [(2 * c, c), (c, c)]  # up
    weights = 9 * sum(a * b for a, b in conv_3x3)
    shortcuts = pixels * (levels + 1) * 2 * c * c  # 1x1, matrix products
    blocks = 2 * levels + 3
    condition = batch * ((c + 1) * width + width * width + blocks * width * c)
    counts = {
        "convolution": 2 * pixels * weights,
        "dense": 2 * (condition + pixels * 4 * c * c + shortcuts),
        "attention": 4 * pixels * size * size * c,
    }
    return {kind: 3 * n for kind, n in counts.items()}


def test_report(benchmark, case, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(benchmark, "GEMM_SIZES", {"cpu": (32, 64), "cuda": (32, 64)})
    benchmark.main(replace(case, out=tmp_path / "step.json"))
    report = json.loads((tmp_path / "step.json").read_text())
    shown = capsys.readouterr().out
    expected = flat_unet_flops(16, 2, 2, 8)
    for precision in ("float32", "bf16"):
        result = report["results"][precision]
        assert result["flops_per_step"] == expected | {"total": sum(expected.values())}
        seconds = result["seconds_per_step"]
        assert 0 < seconds["min"] <= seconds["median"] <= seconds["max"]
        assert result["gflops"]["median"] == pytest.approx(sum(expected.values()) / seconds["median"] / 1e9)
        assert result["images_per_second"]["median"] == pytest.approx(2 / seconds["median"])
        # Every convolution is there as often as it occurs, with the step's own operations.
        assert sum(c["count"] for c in result["convolutions"]) == 2 + 2 * 4 + 2 * 3
        assert sum(c["count"] * c["flops"] for c in result["convolutions"]) == expected["convolution"]
        # With one repeat the ratio of the medians is the median of the ratios.
        ratio = result["gflops"]["median"] / result["convolutions_3x3_gflops"]["median"]
        assert result["step_over_convolutions_3x3"]["median"] == pytest.approx(ratio)
        assert precision in shown
    assert report["machine"]["torch"] == torch.__version__
    assert report["machine"]["threads"] == 1 and len(report["machine"]["load"]) == 3


@pytest.mark.parametrize("preset", ["vdm-cifar10", "mulan-digits"])
def test_convolutions_agree_with_torch_counter(benchmark, case, preset):
    trainer = benchmark.make_trainer(replace(case, preset=preset), "float32")
    with benchmark.Recorder() as recorder:
        trainer.take_step()
    with FlopCounterMode(display=False) as counter:
        trainer.take_step()
    counts = counter.get_flop_counts()["Global"]
    aten = torch.ops.aten
    assert recorder.flops()["convolution"] == counts[aten.convolution] + counts[aten.convolution_backward]


def test_checkpointing_changes_no_count(benchmark, case):
    counts = []
    for checkpointing in (False, True):
        trainer = benchmark.make_trainer(replace(case, checkpointing=checkpointing), "bf16")
        with benchmark.Recorder() as recorder:
            trainer.take_step()
        counts.append(recorder.flops())
    assert counts[0] == counts[1]


def test_precision_and_format_are_the_step_s(benchmark, case):
    trainer = benchmark.make_trainer(case, "bf16")
    with benchmark.Recorder() as recorder:
        trainer.take_step()
    assert {c.dtype for c in recorder.convolutions} == {torch.bfloat16}
    assert all(c.is_3x3 or c.weight.shape[2:] == (1, 1) for c in recorder.convolutions)
    for convolution in recorder.convolutions:
        convolution.runner("cpu")()


@pytest.mark.slow
def test_sweep_as_a_command(tmp_path):
    out = tmp_path / "sweep.json"
    options = "--channels 16 --levels 1 --batch 2 --size 8 --repeats 1 --threads 1 --precision float32 --sweep --out"
    subprocess.run([sys.executable, SCRIPT, *options.split(), out], check=True, timeout=300)
    rows = json.loads(out.read_text())["sweep"]["float32"]
    assert [(r["what"], r["value"]) for r in rows] == [
        ("base", 0), ("levels", 2), ("channels", 8), ("channels", 32), ("pixels", 16), ("pixels", 256),
        ("batch", 1), ("batch", 4),
    ]  # fmt: skip
    for row in rows:
        for kind in ("plain", "checkpointing"):
            assert row[kind]["peak_bytes"] > 0 and row[kind]["seconds_per_step"]["median"] > 0
    assert rows[-1]["plain"]["flops_per_step"] == 2 * rows[0]["plain"]["flops_per_step"]
