"""benchmarks/plan.py: what it counts against closed forms and against real tensors, and what it makes of the counts."""

import contextlib
import importlib.util
import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from nelbo.compose import build_model
from nelbo.presets import PRESETS, preset

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def plan():
    path = ROOT / "benchmarks" / "plan.py"
    sys.path.insert(0, str(path.parent))  # it takes training_step's recorder
    spec = importlib.util.spec_from_file_location("plan", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["plan"] = module
    spec.loader.exec_module(module)
    yield module
    sys.path.remove(str(path.parent))
    del sys.modules["plan"], sys.modules["training_step"]


def small(name, channels=16, levels=2, checkpointing=False):
    config = preset(name)
    network = replace(config.network, channels=channels, levels=levels, groups=4, checkpointing=checkpointing)
    return replace(
        config, network=network, schedule=replace(config.schedule, width=8), encoder=replace(config.encoder, levels=1)
    )


def test_operations_of_the_flat_network_are_the_closed_form(plan):
    """A convolution has 2 H W K K C_in C_out operations an image forward, twice that backward, and once only where its
    input needs no gradient; a dense layer 2 in out; attention 4 (H W)^2 C."""
    c, levels, size = 16, 2, 8
    pixels, width, first = size * size, 4 * c, 9 * 15 * c  # two Fourier exponents: 3 channels become 15
    kernels = first + 9 * 3 * c  # conv_in and conv_out
    kernels += 9 * 2 * (levels + 2) * c * c  # down and middle
    kernels += (levels + 1) * (9 * (2 * c * c + c * c) + 2 * c * c)  # up, with its 1x1 shortcut
    dense = (c + 1) * width + width * width + (2 * levels + 3) * width * c + pixels * 4 * c * c
    forward = 2 * pixels * kernels + 2 * dense + 4 * pixels * pixels * c
    # Neither the image nor what time is embedded in has a gradient; a dense layer counts three times all the same.
    assert plan.count(small("vdm-cifar10", c, levels), size).flops == 3 * forward - 2 * pixels * first


def test_parameters_of_mulan_on_cifar10(plan):
    mode = plan.FakeTensorMode(allow_non_fake_inputs=True)
    parts = plan.parameters_by_part(plan.fake_model(preset("mulan-cifar10"), 32, mode))
    width, size = 3072, 3072
    assert parts["schedule"] == 50 * width + width + width * width + width + 3 * (width * size + size)
    assert parts == {"network": 30_603_267, "schedule": 37_917_696, "encoder": 2_632_883}


@pytest.mark.parametrize("name", ["vdm-cifar10", "mulan-cifar10"])
def test_tensors_without_numbers_count_as_real_ones_do(plan, name, monkeypatch):
    without = plan.count(small(name), 8)
    assert without.activations > 0 and without.launches > 100

    def real(config, size, mode):
        model = build_model(config, (3, size, size), 256, 10)
        model.autocast = torch.bfloat16
        return model

    monkeypatch.setattr(plan, "fake_model", real)
    monkeypatch.setattr(plan, "FakeTensorMode", lambda **_: contextlib.nullcontext())
    assert plan.count(small(name), 8) == without


def test_what_is_kept_for_the_backward_pass(plan):
    """Twice the levels: as many more tensors. With checkpointing a level keeps its input, 2 bytes a number or 4, and
    the peak is one level's."""
    one, two, four = (plan.count(small("vdm-cifar10", levels=levels), 8).activations for levels in (1, 2, 4))
    assert four - two == 2 * (two - one) > 0
    again = [plan.count(small("vdm-cifar10", levels=n, checkpointing=True), 8) for n in (2, 4)]
    tensor = 2 * 16 * 8 * 8
    # Down and up: the level's input, on the way up two tensors side by side.
    assert 2 * 3 * tensor <= again[1].activations - again[0].activations <= 2 * 2 * 4 * tensor < four - two
    assert again[0].flops == plan.count(small("vdm-cifar10"), 8).flops


def test_a_step_is_what_the_equations_say(plan):
    counts = plan.Counts({"network": 10**8}, flops=10**12, held=10**9, activations=10**8, launches=1000)
    gpu = plan.GPU("a GPU", bf16=1e15, float32=5e13, bandwidth=2e12, nvlink=4e11, network=1e10)
    one = plan.plan(counts, 128, 1, gpu, 0.5, 1e-5)
    assert (one.accumulate, one.memory) == (1, 1.6e9 + 1e9 + 1.28e10)
    work = 128 * (1e12 / 5e14 + 6e8 / 2e12)
    assert one.work == pytest.approx(work) and one.messages == 0
    assert one.step == pytest.approx(work + 4e9 / 2e12) and one.limit == "work"
    # Sixteen GPUs: 8 images each; the ring goes over the network and lasts longer than two thirds of the work.
    many = plan.plan(counts, 128, 16, gpu, 0.5, 1e-5)
    messages = 2 * 15 / 16 * 4e8 / 7e9
    assert many.memory == 1.6e9 + 1e9 + 8e8 + 4e8 and many.messages == pytest.approx(messages)
    assert many.step == pytest.approx(work / 16 + 2e-3 + messages - 2 / 3 * work / 16) and many.limit == "messages"
    # Eight: over NVLink, hidden. Launches that take longer than the work.
    eight = plan.plan(counts, 128, 8, gpu, 0.5, 1e-4)
    assert eight.messages == pytest.approx(2 * 7 / 8 * 4e8 / 2.8e11)
    assert eight.step == pytest.approx(0.1 + 2e-3) and eight.limit == "launches"
    # 1000 images do not fit: in two parts they do, 1001 in seven. What does not divide, or fit at all, has no plan.
    assert plan.plan(counts, 1000, 1, gpu, 0.5, 0.0).accumulate == 2
    assert plan.plan(counts, 1001, 1, gpu, 0.5, 0.0).accumulate == 7
    assert plan.plan(counts, 100, 8, gpu, 0.5, 0.0) is None
    assert plan.plan(replace(counts, held=10**11), 128, 1, gpu, 0.5, 0.0) is None
    assert plan.forward_seconds(counts, gpu, 0.5) == pytest.approx(1e12 / 3 / 2.5e13 + 4e8 / 2e12)


def test_the_page_holds_what_is_printed(plan, tmp_path):
    page = (ROOT / "docs" / "scale.md").read_text()
    shown = page.split("<!-- plan -->\n")[1].split("<!-- end plan -->")[0]
    papers = [name for name in PRESETS if name.endswith("-cifar10") or "-imagenet" in name]
    assert list(plan.PAPERS) == [n for n in PRESETS if n in papers or n.endswith("-cifar10-aug")]
    for name in plan.PAPERS:
        assert name in shown, f"{name}: python benchmarks/plan.py --out docs/scale.md"
    row = next(line for line in shown.splitlines() if line.startswith("| ddpm-cifar10"))
    fresh = plan.show_counts(["ddpm-cifar10"]).splitlines()[2]
    for column in (2, 3, 4):  # parameters, operations, bytes held
        assert row.split("|")[column].strip() == fresh.split("|")[column].strip()
    copy = tmp_path / "page.md"
    copy.write_text(page)
    plan.write(copy, "new")
    assert copy.read_text() == page.replace(shown, "new\n")
    copy.write_text("no marks")
    with pytest.raises(SystemExit, match="needs the lines"):
        plan.write(copy, "new")


def test_a_measured_step_stands_beside_its_plan(plan, tmp_path):
    case = {"preset": "vdm-cifar10", "channels": 64, "levels": 1, "batch": 4, "size": 32, "compile": "off",
            "precision": ["bf16"], "out": None}  # fmt: skip
    real = {"seconds_per_step": {"median": 0.2, "min": 0.1, "max": 0.34}, "peak_bytes": 2_460_000_000}
    found = {"case": case, "machine": {"device": "a GPU"}, "results": {"bf16": real}}
    path = tmp_path / "step.json"
    path.write_text(json.dumps(found))
    gpu = plan.GPUS["h100"]
    counts = plan.counts(plan.configure(plan.Case(channels=64, levels=1), "bf16"))
    expected = plan.plan(counts, 4, 1, gpu, 0.4, 1e-3)
    assert expected is not None and expected.limit == "launches"
    *_, row = plan.show_measured([path], gpu, 0.4, 1e-3).splitlines()
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells == [
        "vdm-cifar10, 64 channels, 1 levels, batch 4", "off", "a GPU", f"{1e3 * expected.step:.0f}", "200 (100..340)",
        f"{0.2 / expected.step:.1f}", f"{expected.memory / 1e9:.1f}", "2.5",
    ]  # fmt: skip
    path.write_text(json.dumps({"sweep": {}}))
    with pytest.raises(SystemExit, match=r"must be a report of training_step.py --precision bf16"):
        plan.show_measured([path], gpu, 0.4, 1e-3)
