"""How many rows fit: counted, not guessed."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch

from nelbo import checkpoints, evaluation, memory, sampling
from nelbo.memory import free_memory, most_rows
from nelbo.training import train
from tiny import tiny

KIB = 1024


def work(rows: int) -> torch.Tensor:
    """64 KiB once, and 4 + 8 KiB a row at the peak."""
    constant = torch.zeros(16 * KIB)
    a = torch.zeros(rows, KIB)
    b = torch.zeros(rows, 2 * KIB)
    del a
    c = torch.zeros(rows, KIB // 2)  # in the place of a
    return constant.sum() + b.sum() + c.sum()


@pytest.mark.parametrize(
    ("free", "most", "rows"),
    [
        (2 * (64 + 12 * 100) * KIB + 1000, 4096, 64),  # 100 rows fit
        (2 * (64 + 12 * 128) * KIB + 1000, 4096, 128),
        (2 * (64 + 12 * 127) * KIB + 1000, 4096, 64),
        (2 * (64 + 12 * 100) * KIB, 32, 32),
        (1000, 4096, 1),  # too little: one is tried
    ],
)
def test_the_largest_power_of_two_that_fits_into_half_of_what_is_free(
    monkeypatch: pytest.MonkeyPatch, free: int, most: int, rows: int
) -> None:
    monkeypatch.setattr(memory, "free_memory", lambda device: free)
    assert most_rows(work, "cpu", most) == rows


def test_processes_of_a_machine_share_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    alone = free_memory("cpu")
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert 2**26 < alone <= total
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert free_memory("cpu") == pytest.approx(alone / 4, rel=0.5)


def test_a_container_s_limit_is_the_limit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "most").write_text(f"{2**28}\n")
    (tmp_path / "now").write_text(f"{2**27}\n")
    (tmp_path / "parts").write_text("anon 5\ninactive_file 4096\n")
    names = (*(str(tmp_path / name) for name in ("most", "now", "parts")), "inactive_file")
    monkeypatch.setattr(memory, "CGROUP", (names,))
    assert free_memory("cpu") == 2**27 + 4096
    (tmp_path / "most").write_text("max\n")
    assert free_memory("cpu") != 2**27 + 4096


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tiny("vdm-digits", training__evaluate_every=0), tmp_path_factory.mktemp("one") / "run", say=str)


@pytest.mark.parametrize("method", ["vlb", "ode"])
def test_evaluation_takes_what_fits_and_says_it(
    method: str, run: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    loose = {"solver": "bosh3", "rtol": 0.1, "atol": 0.1} if method == "ode" else {"times": 2}
    settings = evaluation.Settings(method, images=3, **loose)  # type: ignore[arg-type]
    found = evaluation.evaluate(run, settings, out=tmp_path / "plenty").record
    assert found["settings"]["batch"] == {"vlb": 256, "ode": 64}[method]
    monkeypatch.setattr(memory, "free_memory", lambda device: 1000)
    scarce = evaluation.evaluate(run, settings, out=tmp_path / "scarce").record
    assert scarce["settings"]["batch"] == 1
    assert scarce["bits_per_dim"]["mean"] == pytest.approx(found["bits_per_dim"]["mean"], rel=1e-5)


@pytest.mark.parametrize("method", ["ancestral", "ddim", "ode"])
def test_samples_take_what_fits(method: str, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = checkpoints.load_model(run)
    chosen = sampling.Settings(5, method)
    assert sampling.resolved(chosen, model, "it").batch == 256
    assert sampling.resolved(sampling.Settings(5, method, batch=3), model, "it").batch == 3
    monkeypatch.setattr(memory, "free_memory", lambda device: 1000)
    assert sampling.resolved(chosen, model, "it").batch == 1


def test_bf16_is_for_samples_and_leaves_the_model_as_it_was(run: Path) -> None:
    model = checkpoints.load_model(run)
    seen: list[torch.dtype] = []
    model.network.register_forward_hook(  # type: ignore[union-attr]
        lambda module, inputs, output: seen.append(torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu")
                                                   else output.dtype)
    )  # fmt: skip
    drawn = {}
    for precision in ("float32", "bf16"):
        settings = sampling.resolved(sampling.Settings(16, steps=8, precision=precision), model, "it")
        seen.clear()
        drawn[precision] = sampling.draw_all(model, settings).astype(int)
        assert set(seen) == {torch.bfloat16 if precision == "bf16" else torch.float32} and len(seen) >= 8
        assert model.autocast is None
    difference = np.abs(drawn["bf16"] - drawn["float32"])
    assert 0 < difference.mean() < 0.5  # grey levels, of 17
