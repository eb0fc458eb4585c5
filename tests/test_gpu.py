"""On a GPU: the same numbers as on the CPU, the public code's numbers, and what is only there: compiled bf16 training,
memory that batches are fitted to, NCCL. `pytest -m gpu`."""

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from group_work import work
from nelbo import checkpoints, cli, evaluation, fid, sampling
from nelbo.config import Config
from nelbo.devices import full_float32
from nelbo.memory import SHARE, Live, free_memory, most_rows
from nelbo.networks.layers import Dropout
from nelbo.training import Trainer, train
from test_group import HERE, Started, finish, start, the_same_work  # noqa: F401
from test_reference import FILES
from test_reference import test_case as public_case
from tiny import change, flags, metrics, tiny

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU"),
    pytest.mark.filterwarnings("ignore"),  # torch's own, while it compiles
]
FULL = {"training__compile": "off", "training__log_every": 1}
quiet: dict[str, Any] = {"say": lambda message: None}


@contextlib.contextmanager
def on_the_gpu() -> Iterator[None]:
    """Fails where nothing inside took the GPU's memory."""
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    yield
    assert torch.cuda.max_memory_allocated() > before


def train_on_cpu(config: Config, run: Path) -> None:
    """In a process that sees no GPU."""
    command = [sys.executable, "-m", "nelbo.cli", "train", "vdm-digits", "--out", str(run), *flags(config)]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short training on the GPU, in float32."""
    config = tiny("mulan-digits", **FULL, training__evaluate_every=0)
    return train(config, tmp_path_factory.mktemp("gpu") / "run", **quiet)


# The same numbers ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
@pytest.mark.timeout(1800)
def test_the_public_codes_numbers(path: Path) -> None:
    with on_the_gpu(), torch.device("cuda"), full_float32():
        public_case(path)  # asserts every number of the case


def test_dropout_drops_the_same_entries() -> None:
    layer = Dropout(0.3)
    keys = torch.tensor([3, -(2**40) + 7, 2**62], dtype=torch.int64)
    x = torch.randn(3, 5, 7, 9)
    layer.keys = keys
    expected = layer(x)
    layer.keys = keys.cuda()
    assert torch.equal(layer(x.cuda()).cpu(), expected)
    assert 0.6 < expected.ne(0).float().mean() < 0.8


@pytest.mark.parametrize("name", ["vdm-digits", "mulan-digits", "mulan-velocity-digits", "ddpm-digits"])
def test_training_in_float32_is_the_cpus(name: str, tmp_path: Path) -> None:
    """Losses of twenty steps, dropout included; then a run begun on the one goes on on the other."""
    config = tiny(name, **FULL, training__steps=20, network__dropout=0.2, training__evaluate_every=0)
    half = change(config, {"training.steps": 10})
    with full_float32():
        train(config, tmp_path / "gpu", **quiet)
        train(half, tmp_path / "there", **quiet)
    for asked, folder in ((config, "cpu"), (config, "there"), (half, "back")):
        train_on_cpu(asked, tmp_path / folder)
    with full_float32():
        train(config, tmp_path / "back", **quiet)
    expected = metrics(tmp_path / "cpu")
    assert len(expected) == 20
    for other in ("gpu", "there", "back"):
        for a, b in zip(expected, metrics(tmp_path / other), strict=True):
            assert b["bits_per_dim"] == pytest.approx(a["bits_per_dim"], rel=2e-5), (other, a["step"])
            assert b["gradient_norm"] == pytest.approx(a["gradient_norm"], rel=2e-3), (other, a["step"])


@pytest.mark.parametrize("name", ["vdm-digits", "mulan-digits", "ddpm-digits"])
def test_training_compiled_is_training(name: str, tmp_path: Path) -> None:
    """What a GPU does by default, channels last, in float32; in bf16, losses a per cent apart; a stop in between."""
    config = tiny(name, training__log_every=1, network__dropout=0.2, training__evaluate_every=0)
    eager = change(config, {"training.compile": "off"})
    with full_float32():
        train(eager, tmp_path / "eager", **quiet)
        train(change(config, {"training.steps": 5}), tmp_path / "compiled", **quiet)
        train(config, tmp_path / "compiled", **quiet)
    train(change(config, {"training.precision": "bf16"}), tmp_path / "bf16", **quiet)
    expected = metrics(tmp_path / "eager")
    assert len(expected) == 12
    for other, relative in (("compiled", 2e-5), ("bf16", 0.02)):
        for a, b in zip(expected, metrics(tmp_path / other), strict=True):
            assert b["bits_per_dim"] == pytest.approx(a["bits_per_dim"], rel=relative), (other, a["step"])


def test_the_trainer_compiles_and_lies_channels_last(tmp_path: Path) -> None:
    from nelbo.data import load

    config = tiny("vdm-digits", training__precision="bf16")
    trainer = Trainer(config, tmp_path, load("digits"))
    assert trainer.accelerator.device.type == "cuda"
    assert trainer.model.network._compiled_call_impl is not None
    kernels = [p for p in trainer.model.network.parameters() if p.ndim == 4 and p.shape[2] > 1 < p.shape[1]]
    assert kernels and all(p.is_contiguous(memory_format=torch.channels_last) for p in kernels)
    before = trainer.take_step()
    assert np.isfinite(before) and np.isfinite(trainer.take_step())


# Figures -------------------------------------------------------------------------------------------------------------


def figures(run: Path, device: str, out: Path, **settings: Any) -> evaluation.Evaluation:
    out.mkdir(parents=True, exist_ok=True)
    return evaluation.evaluate(run, evaluation.Settings(**settings), out=out, device=device)


@pytest.mark.parametrize(
    ("settings", "allowed"),
    [
        ({"images": 19, "times": 3}, 1e-5),
        ({"method": "ode", "images": 8}, 2e-4),
        ({"method": "ode", "images": 2, "solver": "bosh3", "rtol": 0.03, "atol": 0.03, "trace": "exact"}, 1e-3),
    ],
    ids=["bound", "ode", "exact-trace"],
)
def test_figures_are_the_cpus_and_repeat_exactly(
    run: Path, settings: dict[str, Any], allowed: float, tmp_path: Path
) -> None:
    cpu = figures(run, "cpu", tmp_path / "cpu", batch=8, **settings).result
    first, again = (figures(run, "cuda", tmp_path / where, batch=8, **settings).result for where in ("1", "2"))
    assert np.abs(first.per_image - cpu.per_image).max() < allowed
    assert first.mean == again.mean and np.array_equal(first.per_image, again.per_image)


def test_samples_are_the_cpus(run: Path, tmp_path: Path) -> None:
    drawn = {}
    for device in ("cpu", "cuda"):
        model = checkpoints.load_model(run, device=device)
        for method in ("ancestral", "ddim", "ode"):
            settings = sampling.Settings(count=8, method=method, steps=None if method == "ode" else 20)
            sampling.sample_to_files(model, tmp_path / device / method, settings)
            with np.load(tmp_path / device / f"{method}.npz") as arrays:
                drawn[device, method] = arrays["images"].astype(int)
    for method in ("ancestral", "ddim", "ode"):
        a, b = drawn["cpu", method], drawn["cuda", method]
        assert a.std() > 0 and (a != b).mean() < 0.01, method


def test_distances_are_the_cpus(run: Path) -> None:
    settings = fid.Settings(extractor="random", count=40, steps=3, splits=2, batch=8)
    cpu, gpu = (fid.evaluate(run, settings, device=device, **quiet) for device in ("cpu", "cuda"))
    assert gpu.frechet.value == pytest.approx(cpu.frechet.value, rel=1e-3)


# Memory --------------------------------------------------------------------------------------------------------------


def test_batches_fit_into_the_gpus_memory() -> None:
    """Rows of 2^28 bytes: half the free memory, which the allocator's own reserve is part of."""

    def work(rows: int) -> None:
        torch.empty(rows, 2**28, dtype=torch.uint8, device="cuda")

    torch.cuda.empty_cache()
    free = torch.cuda.mem_get_info()[0]
    rows = most_rows(work, "cuda")
    assert rows == 1 << (free // 2 // 2**28).bit_length() - 1
    kept = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    with_reserve = free_memory("cuda")
    del kept  # to the allocator, not to the driver
    assert free_memory("cuda") - with_reserve >= 2**30


def test_what_is_counted_leaves_room_for_what_the_gpu_holds(tmp_path: Path) -> None:
    """Live does not see what libraries need inside an operation; half of the memory is left for that."""
    from nelbo.data import load

    config = tiny("vdm-digits", **FULL, network__channels=64, network__levels=4, network__groups=16, training__batch=64)
    trainer = Trainer(config, tmp_path, load("digits"))
    for _ in range(2):
        trainer.take_step()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    with Live() as live:
        trainer.take_step()
    held = torch.cuda.max_memory_allocated() - before
    assert 0.95 * live.most < held < live.most / SHARE


def test_too_large_a_batch_is_one_line(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    free = torch.cuda.mem_get_info()[0]
    hog = torch.empty(free - 2**28, dtype=torch.uint8, device="cuda")
    try:
        status = cli.main(["evaluate", str(run), "--batch", "400000", "--times", "512", "--device", "cuda"])
    finally:
        del hog
        torch.cuda.empty_cache()
    error = capsys.readouterr().err
    assert status == 2 and "try a smaller batch" in error and "Traceback" not in error, error


# Several processes ---------------------------------------------------------------------------------------------------


def test_a_group_of_one_trains_by_nccl(tmp_path: Path) -> None:
    """As torchrun starts it; averaged gradients, reduced sums and barriers go through NCCL where there are two."""
    code = (
        "import torch, torch.distributed as dist\n"
        "from nelbo.devices import choose_device\n"
        "device = choose_device()\n"
        "dist.init_process_group('cpu:gloo,cuda:nccl', init_method='env://', rank=0, world_size=1)\n"
        "x = torch.full((3,), 2.0, device=device); dist.all_reduce(x)\n"
        "y = torch.full((3,), 2.0); dist.all_reduce(y)\n"
        "assert x.tolist() == y.tolist() == [2, 2, 2]; print(device)\n"
        "dist.destroy_process_group()\n"
    )
    environment = os.environ | {"LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29577"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stdout.strip() == "cuda:0", done.stderr


def test_figures_of_two_processes_on_one_gpu_are_exactly_those_of_one(
    run: Path,
    start: Started,  # noqa: F811
    tmp_path: Path,
) -> None:
    """Both on cuda:0. Every verb but train: nothing of theirs goes through NCCL."""
    (tmp_path / "one").mkdir()
    expected = work(run, tmp_path / "one", "cuda:0")
    command = [sys.executable, HERE / "group_work.py", run, tmp_path / "two", "cuda:0"]
    ended = finish(start(command, 2, CUDA_VISIBLE_DEVICES="0"))
    assert [status for status, _, _ in ended] == [0, 0], ended
    the_same_work(expected, tmp_path / "one", tmp_path / "two", 2)


def test_a_gpu_that_is_not_there_is_one_line(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["evaluate", str(run), "--device", "cuda:77"]) == 2
    assert "--device must name a device of this machine" in capsys.readouterr().err


def test_the_command_uses_the_gpu_by_default(run: Path, tmp_path: Path) -> None:
    with on_the_gpu():
        assert cli.main(["evaluate", str(run), "--images", "4", "--out", str(tmp_path)]) == 0
