"""benchmarks/peers.py without the peers: its baseline in plain PyTorch against the public code's numbers and against
nelbo, the arithmetic of ratios and tables, what it says of mistakes, and a tiny run."""

import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from nelbo import objectives, pixels
from nelbo.config import OptimizerConfig
from nelbo.errors import UserError
from nelbo.model import DiffusionModel
from nelbo.optimizers import parameter_groups, update_ema
from nelbo.parameterizations import PARAMETERIZATIONS
from nelbo.paths import VariancePreserving
from reference_cases import Case, build_network, build_schedule

ROOT = Path(__file__).resolve().parent.parent
CASES = ROOT / "tests" / "reference"
MODULES = ("peers", "training_step", "serve", "cases", "flat_torch")


@pytest.fixture(scope="module")
def modules():
    """The benchmark's modules by name; nothing of them is left behind."""
    paths = [str(ROOT / "benchmarks" / "peers"), str(ROOT / "benchmarks")]
    before, environment = list(sys.path), dict(os.environ)
    sys.path[:0] = paths
    try:
        yield {name: importlib.import_module(name) for name in ("peers", "serve", "cases", "flat_torch")}
    finally:
        sys.path[:] = before
        os.environ.clear()
        os.environ.update(environment)
        for name in MODULES:
            sys.modules.pop(name, None)


@pytest.fixture
def peers(modules):
    return modules["peers"]


# The baseline ---------------------------------------------------------------------------------------------------------


def test_plain_pytorch_gives_the_recorded_numbers(modules):
    rows = modules["flat_torch"].check(CASES)
    kinds = {what.split()[0] for what, _, _ in rows}
    assert kinds == {"score_unet_vdm_embd32", "vdm_loss", "vdm_ancestral_small", "optimizer"}
    assert sum("gradient of" in what for what, _, _ in rows) > 80
    assert [row for row in rows if not row[1] <= row[2]] == []


def test_another_network_is_found_out(modules, monkeypatch):
    monkeypatch.setattr(modules["flat_torch"], "GAMMA_MAX", 5.01)
    wrong = [what for what, difference, allowed in modules["flat_torch"].check(CASES) if not difference <= allowed]
    assert "vdm_loss eps_hat" in wrong and "vdm_ancestral_small z_s" in wrong


def test_a_folder_without_cases_is_no_check(modules, tmp_path):
    with pytest.raises(FileNotFoundError, match="has no case of vdm_loss"):
        modules["flat_torch"].check(tmp_path)


def test_plain_pytorch_trains_as_nelbo_does(modules):
    """The same weights, images and draws: terms, gradients, and three steps of optimizer and average."""
    plain = modules["flat_torch"]
    case = Case(CASES / "vdm_ancestral_small.npz")
    parameters = {k.removeprefix("params/"): v for k, v in case.arrays.items() if k.startswith("params/")}
    theirs, _ = plain.Checked().vdm(parameters, case.config)
    shape = (3, 8, 8)
    ours = DiffusionModel(
        build_network(case.under("params/score_model/"), case.config, False),
        build_schedule(case.under("params/gamma/"), case.config, shape),
        VariancePreserving(),
        PARAMETERIZATIONS["noise"](),
        shape,
        256,
        flag=True,
    )
    config = OptimizerConfig(warmup=0)
    adamw = torch.optim.AdamW(parameter_groups(ours, config, set()), betas=(0.9, 0.99), eps=1e-8)
    average = [p.detach().clone() for p in ours.parameters()]
    naive = plain.make_optimizer(theirs, 2e-4, 0.9, 0.99, 1e-8, 0.01)
    torch.manual_seed(0)
    for step in range(3):
        images = torch.randint(0, 256, (4, *shape), dtype=torch.uint8)
        eps_0, eps, shift = torch.randn(4, *shape), torch.randn(4, *shape), torch.rand(())
        found = theirs.loss(images, torch.zeros(4, 1), eps_0, shift, eps)
        t = (shift + torch.arange(4) / 4) % 1
        terms = objectives.elbo(ours, images, t=t, eps=eps, eps_0=eps_0, flag=torch.zeros(4))
        loss = pixels.bits_per_dim(terms.total.mean(), ours.dimensions)
        # 8e-7 of rounding in z are 1e-3 in the Fourier features: the two differ by what they round otherwise.
        allowed = {"rtol": 1e-5 if step == 0 else 1e-4, "atol": 1e-4}
        torch.testing.assert_close(terms.reconstruction, found["loss_recon"], **allowed)
        torch.testing.assert_close(terms.prior, found["loss_klz"], rtol=2e-4, atol=1e-4)
        torch.testing.assert_close(terms.diffusion, found["loss_diff"], **allowed)
        torch.testing.assert_close(loss, found["bpd"], **allowed)
        for optimizer, value in ((adamw, loss), (naive, found["bpd"])):
            optimizer.zero_grad()
            value.backward()
        norms = [
            torch.nn.utils.get_total_norm([p.grad for p in m.parameters() if p.grad is not None])
            for m in (ours, theirs)
        ]
        torch.testing.assert_close(*norms, rtol=1e-3, atol=0.0)
        adamw.step()
        naive.step()
        update_ema(average, list(ours.parameters()), 0.9999)
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in theirs.parameters())


def test_attention_is_counted(modules):
    q = torch.randn(1, 2, 16, 8, requires_grad=True)

    def step():
        torch.nn.functional.scaled_dot_product_attention(q, q, q).sum().backward()

    forward = 4 * 2 * 16 * 16 * 8
    # Backward: q k^T once more, and two products for each of the two of the forward pass.
    assert modules["serve"].flops(step) == forward + forward * 5 // 2


# Figures --------------------------------------------------------------------------------------------------------------


def entry(training, others, flops=2e9):
    """A side's values in two turns."""
    rest = dict.fromkeys(("sampling step", "samples", "start-up"), others)
    return {"training step": training, **rest, "memory": [v * 2**20 for v in others], "cores": [1.5, 2.0],
            "flops": flops, "parameters": 3_000_000}  # fmt: skip


def test_ratios_are_of_the_same_turn(peers):
    sides = {"nelbo": entry([1.0, 2.0, 4.0], [1.0]), "torch": entry([3.0, 3.0, 2.0], [5.0], None)}
    assert peers.ratios(sides, "torch", "training step") == [3.0, 1.5, 0.5]
    assert peers.ratios(sides, "torch", "memory") == [5.0]
    with pytest.raises(ValueError):
        peers.ratios({"nelbo": entry([1.0], [1.0]), "torch": entry([1.0, 2.0], [1.0])}, "torch", "training step")


def test_tables(peers):
    sides = {"nelbo": entry([0.1, 0.2, 0.4], [1.0]), "torch": entry([0.3, 0.3, 0.2], [5.0], None)}
    found = {"float32": {"sides": sides, "gemm": 100.0}}
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in peers.show_peer("torch", found).splitlines()]
    assert lines[0] == ["", "torch, float32", "nelbo", "torch / nelbo"]
    rows = {line[0]: line[1:] for line in lines[2:]}
    assert rows["training step, ms"] == ["300 (200..300)", "200 (100..400)", "1.50 (0.50..3.00)"]
    assert rows["memory, MiB"] == ["5 (5..5)", "1 (1..1)", "5.00 (5.00..5.00)"]
    assert rows["start-up, s"] == ["5.0 (5.0..5.0)", "1.0 (1.0..1.0)", "5.00 (5.00..5.00)"]
    assert rows["GFLOP a step"] == ["not counted", "2.0", ""]
    assert rows["M parameters"] == ["3.00", "3.00", ""]
    summary = [cell.strip() for cell in peers.show_summary({"torch": found}).splitlines()[2].split("|")[1:-1]]
    assert summary[:4] == ["torch", "flat", "float32", "1.50 (0.50..3.00)"]


# The command ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--only nothing", "--only nothing: no such peer; the choices are jax, torch, diffusers, azula, azula-adm, "),
        ("--python jax", "--python must be NAME=PATH, got 'jax'"),
        ("--python flax=/bin/sh", "--python flax: no such peer; the choices are jax,"),
        ("--python jax=/nothing", "--python jax: /nothing is no program that can be run"),
        ("--python jax=/", "--python jax: / is no program that can be run"),
        ("--channels 32", "--channels must be a multiple of 32 above 32 (32 groups), got 32"),
        ("--only denoising-diffusion-pytorch --channels 48", "--channels must be a multiple of 32, got 48"),
        ("--size 12", "--size must be at least 8 and halve 3 times, got 12"),
        ("--repeats 0", "--repeats must be at least 1, got 0"),
        ("--dropout 1", "--dropout must lie in [0, 1), got 1.0"),
        ("--multipliers 1", "--multipliers must be at least 2 whole numbers above 0, got (1,)"),
        ("--steps 1000", "--steps must be below 1000, the noise levels of DDPM, got 1000"),
        ("--threads 0", "--threads must lie in 1 .. "),
        ("--out /nothing/x.json", "--out /nothing/x.json: there is no folder /nothing"),
        ("--reference /nothing", "--reference /nothing: there is no such folder"),
        ("--precision fp8", "--precision must be one of float32, bf16, got 'fp8'; see `python benchmarks/peers.py"),
        ("--batches 3", "unknown option --batches; did you mean --batch"),
        ("--check --only azula", "--check is about jax and torch, got --only azula"),
    ],
)
def test_mistakes(peers, arguments, message):
    with pytest.raises(UserError, match=f"^{re.escape(message)}"):
        peers.main(peers.parse(peers.Case, arguments.split(), "benchmarks/peers.py", program="python"))


def test_sides_that_share_a_python(peers):
    given = ("azula=/bin/sh", "denoising-diffusion-pytorch=/bin/true")
    found = peers.interpreters(peers.Case(python=given))
    own = {name: path for name, path in found.items() if path != sys.executable}
    kept = {"denoising-diffusion-pytorch": "/bin/true", "denoising-diffusion-pytorch-kept": "/bin/true"}
    assert own == {"azula": "/bin/sh", "azula-adm": "/bin/sh", **kept}


def test_a_side_gets_its_environment_and_no_other(peers, tmp_path, monkeypatch):
    names = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_MAX_")
    script = tmp_path / "echo.py"
    script.write_text(f"import json, os\nprint(json.dumps({{n: os.environ.get(n) for n in {names}}}), flush=True)\n")
    said = []
    for name in ("denoising-diffusion-pytorch", "denoising-diffusion-pytorch-kept"):
        monkeypatch.setitem(peers.PEERS, name, peers.PEERS[name]._replace(script=str(script)))
        with peers.started(name, "attention", sys.executable, None) as side:
            answer = side.hear()
            said.append([answer[n] for n in names])
    assert said == [[None, None], ["-1", "0"]]


def test_a_mistake_is_one_line_and_status_2():
    script = ROOT / "benchmarks" / "peers.py"
    found = subprocess.run([sys.executable, script, "--channels", "48"], capture_output=True, text=True, timeout=120)
    assert found.returncode == 2
    assert found.stderr == "error: --channels must be a multiple of 32 above 32 (32 groups), got 48\n"


def test_the_check_as_a_command_and_a_side_that_breaks(peers, capsys, monkeypatch):
    case = peers.Case(check=True, only=("torch",))
    peers.main(case)
    assert re.match(
        r"torch: \d+ comparisons with the reference cases hold; the nearest to its", capsys.readouterr().out
    )
    monkeypatch.setitem(peers.PEERS, "torch", peers.Peer("flat", "nothing.py"))
    with pytest.raises(peers.Failed, match=r"^torch: ended with status 2: .*nothing\.py"):
        peers.main(case)


def test_a_tiny_run(peers, tmp_path, monkeypatch, capsys):
    """nelbo beside plain PyTorch, and a peer that is not installed."""
    (tmp_path / "diffusers").mkdir()
    (tmp_path / "diffusers" / "__init__.py").write_text("raise ImportError('not for this test')")
    monkeypatch.setitem(peers.ENVIRONMENT, "PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(peers, "compare_with_reference", lambda case, names, pythons: {name: [] for name in names})
    monkeypatch.setattr(peers.shared, "GEMM_SIZES", {"cpu": (32,), "cuda": (32,)})
    monkeypatch.setattr(peers.shared.torch, "set_num_threads", lambda threads: None)
    cores = os.sched_getaffinity(0)
    case = peers.Case(
        only=("torch", "diffusers"), precision=("float32",), channels=64, levels=1, size=8, batch=2, steps=2,
        repeats=2, fresh=1, threads=1, out=tmp_path / "peers.json",
    )  # fmt: skip
    peers.main(case)
    assert os.sched_getaffinity(0) == cores
    shown = capsys.readouterr().out
    assert re.search(r"^diffusers: left out, not installed in .* \(ImportError: not for this test\)$", shown, re.M)
    report = json.loads((tmp_path / "peers.json").read_text())
    sides = report["results"]["flat, float32"]["sides"]
    assert report["results"]["ddpm, float32"]["sides"] == {}
    assert sides["torch"]["parameters"] == sides["nelbo"]["parameters"] > 600_000
    # nelbo counts its dropout's bits for nothing, as the other does; the two take the same products.
    assert sides["nelbo"]["flops"] == pytest.approx(sides["torch"]["flops"], rel=0.05)
    for what in ("training step", "sampling step", "samples", "start-up", "memory"):
        values = [sides[name][what] for name in ("torch", "nelbo")]
        assert [len(v) for v in values] == 2 * [1 if what in ("start-up", "memory") else 2]
        assert all(v > 0 for side in values for v in side)
        assert sides["torch"]["ratios"][what] == [a / b for a, b in zip(*values, strict=True)]
    assert sides["nelbo"]["start-up"][0] > sides["nelbo"]["training step"][0]
    assert all(0 < cores < 1.2 for cores in sides["torch"]["cores"])
    assert "torch, beside composition flat" in shown and "1 threads of torch" in shown


def test_no_page_claims_what_was_not_measured():
    for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        assert not re.search(r"faster than (MuLAN|VDM|i-DODE)", page.read_text(), re.I), page
