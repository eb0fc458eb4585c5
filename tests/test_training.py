"""Training: what a run leaves behind does not depend on interruptions, and every step is the step it says it is."""

import dataclasses
import errno
import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from nelbo import checkpoints, likelihood, objectives
from nelbo.compose import build_model, noise_parameters
from nelbo.config import FREE, Config, refuse_changes, to_dict
from nelbo.data import load
from nelbo.data.loader import permutation
from nelbo.draws import Draws, generator
from nelbo.errors import UserError
from nelbo.logs import Log
from nelbo.memory import memory_estimate
from nelbo.optimizers import learning_rate_factor, parameter_groups
from nelbo.presets import PRESETS, preset
from nelbo.stopping import Stopped
from nelbo.training import Loss, Trainer, train
from tiny import change, entries, files, flags, metrics, outcome, tiny

HERE = Path(__file__).parent
ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
quiet: dict[str, Any] = {"say": lambda line: None}

# Each source of randomness: latents of four kinds, dropout, augmentation, times of both kinds; and parts of a batch.
VARIED = {
    "vdm": tiny("vdm-digits", network__dropout=0.2, data__augment="flip", training__accumulate=2),
    "mulan": tiny("mulan-digits", network__dropout=0.2, objective__times="uniform", optimizer__clip=0.5),
    "paper": tiny("mulan-paper-digits", encoder__kind="cnn"),
    "one-hot": tiny("mulan-one-hot-digits", objective__steps=7),
    "label": tiny("mulan-label-digits"),
    "variance": tiny("vdm-digits", schedule__kind="monotone", objective__minimise_variance=True, optimizer__clip=0.0),
    "bf16": tiny("vdm-digits", training__precision="bf16", network__checkpointing=True, network__dropout=0.2),
}


def tensors(run: Path, step: int, kind: str = "weights") -> dict[str, torch.Tensor]:
    return load_file(run / "checkpoints" / checkpoints.checkpoint_name(step) / f"{kind}.safetensors")


def steps_kept(run: Path) -> list[int]:
    return [int(path.name[5:]) for path in checkpoints.list_checkpoints(run)]


def same(run: dict[str, Any], other: dict[str, Any]) -> bool:
    """Equal outcomes; says where they differ."""
    assert sorted(run) == sorted(other)
    assert [name for name in run if run[name] != other[name]] == []
    return True


# Continuing ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", VARIED)
def test_a_run_continued_after_7_steps_equals_an_uninterrupted_one_bit_for_bit(kind: str, tmp_path: Path) -> None:
    config = VARIED[kind]
    train(config, tmp_path / "whole", **quiet)
    train(change(config, {"training.steps": 7}), tmp_path / "parts", **quiet)
    assert json.loads((tmp_path / "parts" / "run.json").read_text())["config"]["training"]["steps"] == 7
    train(config, tmp_path / "parts", **quiet)
    whole, parts = files(tmp_path / "whole"), files(tmp_path / "parts")
    last = [f"checkpoints/step-000000012/{name}.safetensors" for name in ("weights", "ema", "optimizer")]
    for name in last:
        assert whole[name] == parts[name], name
    assert json.loads(parts["run.json"])["config"] == to_dict(config)
    start = tensors(tmp_path / "whole", 12)
    moved = build_model(config, (1, 8, 8), 17, 10).state_dict()
    assert sum(not torch.equal(start[name], moved[name]) for name in start) > 10  # it did train


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_after_the_step_and_the_same_command_goes_on(number: int, tmp_path: Path) -> None:
    config, handlers = VARIED["mulan"], [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]

    def stop(step: int, bits: float, rate: float) -> None:
        if step == 6:
            os.kill(os.getpid(), number)

    with pytest.raises(Stopped, match=f"{signal.Signals(number).name} after step 7, saved") as stopped:
        train(config, tmp_path / "stopped", show=stop, **quiet)
    assert stopped.value.status == 128 + number
    assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert steps_kept(tmp_path / "stopped")[-1] == 7  # no step at which one is saved otherwise
    train(config, tmp_path / "stopped", **quiet)
    train(config, tmp_path / "whole", **quiet)
    left, whole = outcome(tmp_path / "stopped"), outcome(tmp_path / "whole")
    assert left["metrics.jsonl"] == whole["metrics.jsonl"]  # also the line that the stop fell into
    for name in ("weights", "ema", "optimizer"):
        assert (
            left[f"checkpoints/step-000000012/{name}.safetensors"]
            == (whole[f"checkpoints/step-000000012/{name}.safetensors"])
        )


def test_a_second_signal_is_not_held_back(tmp_path: Path) -> None:
    def stop(step: int, bits: float, rate: float) -> None:
        if step == 3:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)

    # A shell may have started this process with SIGINT ignored, as it does with jobs in the background.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            train(tiny(), tmp_path / "run", show=stop, **quiet)
    finally:
        signal.signal(signal.SIGINT, before)


# What test_killed_* train: every file of a run is written often, and every source of randomness is on.
KILLED = tiny(
    "mulan-digits", network__dropout=0.1, network__flag=True, network__channels=4, data__augment="flip",
    objective__steps=5, training__accumulate=2, training__steps=48, training__save_every=8, training__log_every=3,
    training__evaluate_every=40, training__sample_every=160,
)  # fmt: skip


def killed(run: Path, kills: int, seed: int, config: Config) -> dict[str, int]:
    done = subprocess.run(
        [sys.executable, "-W", "error", str(HERE / "killing.py"), str(run), str(kills), str(seed)],
        input=json.dumps(to_dict(config)), capture_output=True, text=True, env=ONE_THREAD, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_killed_at_random_moments_the_same_command_ends_bit_identical(tmp_path: Path) -> None:
    assert killed(tmp_path / "whole", 0, 0, KILLED) == {"kills": 0, "torn": 0}
    counts = killed(tmp_path / "killed", 16, 1, KILLED)
    assert counts["kills"] >= 10 and counts["torn"] >= 3, counts
    assert same(outcome(tmp_path / "killed"), outcome(tmp_path / "whole"))
    assert not [path for path in entries(tmp_path / "killed") if "/." in f"/{path}"]  # nothing left over


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_killed_two_hundred_times_the_same_command_ends_bit_identical(tmp_path: Path) -> None:
    config = change(KILLED, {"training.steps": 600})
    killed(tmp_path / "whole", 0, 0, config)
    counts = killed(tmp_path / "killed", 200, 2, config)
    assert counts["kills"] == 200 and counts["torn"] >= 30, counts
    assert same(outcome(tmp_path / "killed"), outcome(tmp_path / "whole"))


def cli(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "nelbo.cli", *map(str, arguments)]


def test_the_command_stopped_by_sigint_sigterm_and_sigkill_ends_bit_identical(tmp_path: Path) -> None:
    # Large enough that there is time to stop it in the middle: a step takes some 10 ms.
    config = tiny("vdm-digits", network__dropout=0.1, training__batch=32, training__steps=60, training__log_every=3,
                  training__save_every=320, training__evaluate_every=0)  # fmt: skip
    run, status = tmp_path / "run", []
    command = cli("train", "vdm-digits", "--out", run, *flags(config))
    plan = ((signal.SIGINT, 3), (signal.SIGKILL, 6), (signal.SIGTERM, 9), (signal.SIGKILL, 14), (None, None))
    for number, until in plan:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ONE_THREAD)
        while until is not None and process.poll() is None:
            if (run / "metrics.jsonl").exists() and len((run / "metrics.jsonl").read_bytes().splitlines()) >= until:
                process.send_signal(number)
                break
            time.sleep(0.01)
        out, err = process.communicate(timeout=100)
        status.append(process.returncode)
        if number in (signal.SIGINT, signal.SIGTERM):
            line, name = err.rstrip("\n").splitlines()[-1], signal.Signals(number).name
            step = re.fullmatch(rf"nelbo: stopped by {name} after step (\d+), saved; the same command continues", line)
            assert step, err
            assert "Traceback" not in err
            assert steps_kept(run)[-1] == int(step[1])
    assert status == [130, -signal.SIGKILL, 143, -signal.SIGKILL, 0]
    assert "continuing after step" in out
    train(config, tmp_path / "whole", **quiet)
    stopped, whole = outcome(run), outcome(tmp_path / "whole")
    assert stopped["metrics.jsonl"] == whole["metrics.jsonl"]
    assert stopped["run.json"]["config"] == whole["run.json"]["config"]
    last = [name for name in whole if name.startswith("checkpoints/step-000000060")]
    assert len(last) == 4
    for name in last:
        assert stopped[name] == whole[name], name


@pytest.mark.slow
def test_two_processes_train_what_one_does(tmp_path: Path) -> None:
    """Under accelerate, each process takes its part of every batch; figures agree to rounding, also after a stop."""
    config = tiny("mulan-digits", training__log_every=1, training__accumulate=2)
    train(config, tmp_path / "one", **quiet)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    for steps in (7, 12):
        fields = flags(change(config, {"training.steps": steps}))
        done = subprocess.run(
            [*launch, "-m", "nelbo.cli", "train", "mulan-digits", "--out", tmp_path / "two", *fields],
            capture_output=True, text=True, env={**ONE_THREAD, "ACCELERATE_USE_CPU": "true"}, check=False, timeout=120,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("2 processes") == 1
    one, two = ([line for line in metrics(tmp_path / n) if line["kind"] == "train"] for n in ("one", "two"))
    assert len(one) == len(two) == 12
    for a, b in zip(one, two, strict=True):
        assert b["bits_per_dim"] == pytest.approx(a["bits_per_dim"], rel=1e-5)
        assert b["gradient_norm"] == pytest.approx(a["gradient_norm"], rel=1e-4)
    for name, value in tensors(tmp_path / "one", 12).items():
        assert torch.allclose(value, tensors(tmp_path / "two", 12)[name], rtol=1e-3, atol=1e-4), name


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # torch's own, while it compiles
@pytest.mark.skipif(shutil.which("g++") is None, reason="compiling needs a compiler")
@pytest.mark.parametrize("name", ["vdm-digits", "mulan-digits", "ddpm-digits"])
def test_a_compiled_network_trains_the_same(name: str, tmp_path: Path) -> None:
    """Losses of six steps and what follows a stop in between, dropout included; channels last."""
    config = tiny(name, training__steps=6, training__log_every=1, network__dropout=0.2, training__evaluate_every=0)
    train(config, tmp_path / "eager", **quiet)
    compiled = change(config, {"training.compile": "on"})
    train(change(compiled, {"training.steps": 3}), tmp_path / "compiled", **quiet)
    train(compiled, tmp_path / "compiled", **quiet)
    eager, found = (metrics(tmp_path / folder) for folder in ("eager", "compiled"))
    assert len(eager) == len(found) == 6
    for a, b in zip(eager, found, strict=True):
        assert b["bits_per_dim"] == pytest.approx(a["bits_per_dim"], rel=1e-5)
        assert b["gradient_norm"] == pytest.approx(a["gradient_norm"], rel=1e-3)


@pytest.mark.parametrize("kind", ["vdm", "mulan", "one-hot"])
def test_what_is_drawn_ahead_is_what_a_step_would_draw(kind: str, tmp_path: Path) -> None:
    """As on a GPU; parts of a batch, latents, dropout and both kinds of times."""
    made, steps = Draws._make, []
    for ahead in (False, True):
        trainer = Trainer(VARIED[kind], tmp_path, load("digits"))
        trainer.ahead = ahead
        drawn: list[int] = []

        def make(self: Draws, *request: Any, drawn: list[int] = drawn, step: Trainer = trainer) -> Any:
            drawn.append(step.step)
            return made(self, *request)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Draws, "_make", make)
            bits = [trainer.take_step() for _ in range(3)]
        steps.append((bits, [p.detach().clone() for p in trainer.model.parameters()], Counter(drawn)))
    (bits, weights, drawn_late), (bits_ahead, weights_ahead, drawn_ahead) = steps
    assert bits == bits_ahead and all(map(torch.equal, weights, weights_ahead))
    requests = drawn_late[0]
    assert drawn_late == {0: requests, 1: requests, 2: requests}
    assert drawn_ahead == {0: 2 * requests, 1: requests, 2: requests}  # in step 0 also those of step 1, and so on


def test_what_is_compiled_is_said_where_it_cannot_be(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    config = tiny("idode-vp-digits", training__compile="on", objective__second_order=0.1)
    with pytest.raises(UserError, match=r"training.compile on does not go with objective.second_order above 0"):
        train(config, tmp_path / "run", **quiet)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(UserError, match=r"training.compile on needs a C\+\+ compiler on a CPU"):
        train(tiny(training__compile="on"), tmp_path / "run", **quiet)


def test_a_complete_run_is_left_alone(tmp_path: Path) -> None:
    said: list[str] = []
    train(tiny(), tmp_path / "run", **quiet)
    before = entries(tmp_path)
    train(tiny(), tmp_path / "run", say=said.append)
    assert said == [f"{tmp_path / 'run'} is complete: 12 of 12 steps"]
    assert entries(tmp_path) == before


def test_only_one_process_trains_a_run(tmp_path: Path) -> None:
    train(tiny(training__steps=2), tmp_path / "run", **quiet)
    before = entries(tmp_path)
    with (
        checkpoints.locked(tmp_path / "run"),
        pytest.raises(UserError, match=r"another process is training .*run; wait for it, or stop it"),
    ):
        train(tiny(), tmp_path / "run", **quiet)
    assert entries(tmp_path) == before
    train(tiny(), tmp_path / "run", **quiet)
    assert steps_kept(tmp_path / "run")[-1] == 12


# What may change -----------------------------------------------------------------------------------------------------


def other(value: Any, hint: str) -> Any:
    """Another valid value of a field; none is checked here."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return value + 1
    if isinstance(value, float):
        return value / 2 + 0.1
    return f"other {hint}" if value is None or isinstance(value, str) else [*value, 1.0]


def test_every_field_is_free_or_refused_by_name() -> None:
    config = tiny()
    changed = 0
    for group, values in to_dict(config).items():
        for name, value in values.items() if isinstance(values, dict) else (("", values),):
            path = f"{group}.{name}".rstrip(".")
            old = to_dict(config)
            if name:
                old[group][name] = other(value, path)
            else:
                old[group] = other(value, path)
            changed += 1
            if path in FREE:
                refuse_changes(old, config, "runs/a")
                continue
            with pytest.raises(UserError, match=f"^{re.escape(path)} was .* when runs/a began and is .* now"):
                refuse_changes(old, config, "runs/a")
    assert changed > 45


def test_a_decaying_learning_rate_fixes_the_number_of_steps() -> None:
    config = tiny(optimizer__decay="cosine")
    with pytest.raises(UserError, match=r"training.steps was 12 .* 24 now; with a decaying learning rate .* is fixed"):
        refuse_changes(to_dict(config), change(config, {"training.steps": 24}), "runs/a")


def test_a_refused_change_leaves_the_run_alone_and_free_fields_do_not_alter_the_weights(tmp_path: Path) -> None:
    train(tiny(), tmp_path / "whole", **quiet)
    train(tiny(training__steps=6), tmp_path / "run", **quiet)
    before = entries(tmp_path)
    for fields, named in (
        ({"optimizer.learning_rate": 1e-3}, "optimizer.learning_rate was"),
        ({"network.channels": 16}, "network.channels was 8"),
        ({"training.seed": 1}, "training.seed was 0"),
        ({"data.source": "photos32"}, "data.source: .* was trained on digits version 1, and photos32 is photos32"),
    ):
        with pytest.raises(UserError, match=named):
            train(change(tiny(), fields), tmp_path / "run", **quiet)
    with pytest.raises(UserError, match="began without --init-from"):
        train(tiny(), tmp_path / "run", init_from=tmp_path / "whole", **quiet)
    assert entries(tmp_path) == before
    free = tiny(
        training__log_every=1, training__evaluate_every=8, training__evaluate_images=3, training__evaluate_times=2,
        training__sample_every=48, training__save_every=8, training__keep=5, objective__steps=0,
    )  # fmt: skip
    train(free, tmp_path / "run", **quiet)
    for kind in ("weights", "ema", "optimizer"):
        name = f"checkpoints/step-000000012/{kind}.safetensors"
        assert files(tmp_path / "run")[name] == files(tmp_path / "whole")[name]
    assert json.loads((tmp_path / "run" / "run.json").read_text())["config"] == to_dict(free)
    assert (tmp_path / "run" / "samples" / "step-000000012.npz").exists()


def test_data_are_known_by_their_content_and_not_by_their_place(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (30, 1, 6, 6), dtype=np.uint8)
    for folder in ("here", "there"):
        (tmp_path / folder).mkdir()
        np.save(tmp_path / folder / "images.npy", images)
    config = tiny(data__source=str(tmp_path / "here" / "images.npy"), training__evaluate_every=0)
    train(change(config, {"training.steps": 2}), tmp_path / "run", **quiet)
    moved = change(config, {"data.source": str(tmp_path / "there" / "images.npy"), "training.steps": 4})
    train(moved, tmp_path / "run", **quiet)
    assert steps_kept(tmp_path / "run")[-1] == 4
    images[3, 0, 2, 2] ^= 1
    np.save(tmp_path / "there" / "images.npy", images)
    with pytest.raises(UserError, match=r"data.source: .* was trained on images.npy version .*other images need a new"):
        train(change(moved, {"training.steps": 6}), tmp_path / "run", **quiet)


# Steps ---------------------------------------------------------------------------------------------------------------


def test_parts_of_a_batch_add_up_to_the_batch(tmp_path: Path) -> None:
    config = tiny("mulan-digits", training__steps=3, training__log_every=1, training__evaluate_every=0)
    for parts in (1, 2, 8):
        train(change(config, {"training.accumulate": parts}), tmp_path / str(parts), **quiet)
    whole = metrics(tmp_path / "1")
    for parts in (2, 8):
        for line, expected in zip(metrics(tmp_path / str(parts)), whole, strict=True):
            assert line["bits_per_dim"] == pytest.approx(expected["bits_per_dim"], rel=1e-5)
            assert line["terms"] == pytest.approx(expected["terms"], rel=1e-4, abs=1e-7)
            assert line["gradient_norm"] == pytest.approx(expected["gradient_norm"], rel=1e-4)


@pytest.mark.parametrize("name", ["mulan-paper-digits", "mulan-label-digits"])
def test_the_first_step_is_the_mean_of_the_bound_over_the_batch(name: str, tmp_path: Path) -> None:
    """The line of step 1 against the bound of the untrained model at the step's own times and draws."""
    config = tiny(name, training__steps=1, training__log_every=1, training__evaluate_every=0)
    train(config, tmp_path / "run", **quiet)
    model, data = build_model(config, (1, 8, 8), 17, 10), load("digits")
    assert data.labels is not None
    shift = generator(0, 0, 0, "time").random(dtype=np.float32)  # seed 0, step 0
    t = torch.remainder(torch.tensor(shift) + torch.arange(8) / 8, 1.0)
    chosen = permutation(len(data.images["train"]), 0)[:8]
    images, labels = (torch.from_numpy(values["train"][chosen]) for values in (data.images, data.labels))
    terms = likelihood.draw_terms(model, images, t, Draws(0, range(8)), labels=labels)
    (line,) = metrics(tmp_path / "run")
    bits = {name: value.mean() / (64 * math.log(2)) for name, value in vars(terms).items() if name != "squared_error"}
    assert line["terms"] == pytest.approx({name: value.item() for name, value in bits.items()}, rel=1e-5, abs=1e-9)
    # What is shown charges a latent what makes the sum a bound; what is minimised charges what its authors charge.
    assert line["bits_per_dim"] == pytest.approx(sum(v.item() for k, v in bits.items() if k != "latent"), rel=1e-6)
    assert bits["valid_latent"].item() > 0.05
    sum(value for name, value in bits.items() if name != "valid_latent").backward()
    norm = math.sqrt(sum(p.grad.square().sum().item() for p in model.parameters() if p.grad is not None))
    assert line["gradient_norm"] == pytest.approx(norm, rel=1e-5)


def test_every_step_has_its_own_images_and_its_own_dropout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    dropped: list[torch.Tensor] = []
    forward = Loss.forward

    def spy(self: Loss, batch: Any, part: slice, step: int) -> objectives.Terms:
        layer = next(m for m in self.model.network.modules() if isinstance(m, torch.nn.Dropout))
        hook = layer.register_forward_hook(lambda module, inputs, out: dropped.append((out == 0).float()))
        seen.extend(batch.index.tolist())  # a part of the batch already
        try:
            return forward(self, batch, part, step)
        finally:
            hook.remove()

    config = tiny(network__dropout=0.5, training__steps=4, training__accumulate=2, training__evaluate_every=0)
    for seed in (0, 1):
        trainer = Trainer(change(config, {"training.seed": seed}), tmp_path / "none", load("digits"))
        with monkeypatch.context() as patched:
            patched.setattr(Loss, "forward", spy)
            for _ in range(4):
                trainer.take_step()
    assert seen == [*range(32), *range(32)]
    assert len(dropped) == 16
    for i, a in enumerate(dropped):
        assert 0.4 < a.mean() < 0.6
        for b in dropped[:i]:
            assert 0.4 < (a != b).float().mean() < 0.6  # independent


@pytest.mark.parametrize("decay", ["none", "linear", "cosine"])
def test_the_learning_rate_warms_up_and_decays(decay: str, tmp_path: Path) -> None:
    config = tiny(optimizer__decay=decay, optimizer__warmup=4, optimizer__learning_rate=0.1, training__log_every=1,
                  optimizer__weight_decay=0.0, training__evaluate_every=0)  # fmt: skip
    train(config, tmp_path / "run", **quiet)
    after = {
        "none": [1.0] * 8,
        "linear": [1 - n / 8 for n in range(8)],
        "cosine": [(1 + math.cos(math.pi * n / 8)) / 2 for n in range(8)],
    }[decay]
    expected = [0.0, 0.25, 0.5, 0.75, *after]
    assert [line["learning_rate"] / 0.1 for line in metrics(tmp_path / "run")] == pytest.approx(expected, abs=1e-12)
    assert learning_rate_factor(10**6, config.optimizer, 12) == pytest.approx(1.0 if decay == "none" else 0.0, abs=1e-9)


def test_the_schedule_can_have_its_own_learning_rate(tmp_path: Path) -> None:
    config = tiny("mulan-digits", optimizer__schedule_learning_rate=1e-30, optimizer__warmup=0, training__steps=3,
                  training__evaluate_every=0)  # fmt: skip
    train(config, tmp_path / "run", **quiet)
    before, after = build_model(config, (1, 8, 8), 17, 10).state_dict(), tensors(tmp_path / "run", 3)
    noise = noise_parameters(build_model(config, (1, 8, 8), 17, 10))
    assert {name.split(".")[0] for name in noise} == {"schedule", "encoder"}
    for name, value in after.items():
        assert (value - before[name]).abs().max() < 1e-20 or name not in noise, name
    assert sum(not torch.equal(after[name], before[name]) for name in after if name not in noise) > 10


def test_all_but_biases_are_decayed(tmp_path: Path) -> None:
    config = tiny("mulan-digits", optimizer__weight_decay=0.5)
    model = build_model(config, (1, 8, 8), 17, 10)
    names = {id(p): name for name, p in model.named_parameters()}
    groups = parameter_groups(model, config.optimizer, noise_parameters(model))
    decayed = {names[id(p)] for group in groups for p in group["params"] if group["weight_decay"] == 0.5}
    spared = {names[id(p)] for group in groups for p in group["params"] if group["weight_decay"] == 0.0}
    assert decayed | spared == set(names.values()) and not decayed & spared
    assert spared == {name for name in names.values() if name.endswith("bias")}
    assert {"network.norm.weight", "network.conv_out.weight"} <= decayed and "network.conv_out.bias" in spared
    # And a step does it: a parameter whose gradient is 0 shrinks by the rate times the decay. (The schedule's own
    # optimizer test is in test_reference.py.)
    weight = torch.nn.Parameter(torch.tensor([2.0]))
    weight.grad = torch.zeros(1)
    torch.optim.AdamW([weight], lr=0.1, weight_decay=0.5).step()
    assert float(weight.detach()) == pytest.approx(2.0 * (1 - 0.1 * 0.5))


def test_the_moving_average_is_the_moving_average(tmp_path: Path) -> None:
    config = tiny(training__steps=4, training__save_every=8, training__keep=9, training__evaluate_every=0,
                  optimizer__ema=0.7, optimizer__warmup=1)  # fmt: skip
    train(config, tmp_path / "run", **quiet)
    average = {name: p.double() for name, p in build_model(config, (1, 8, 8), 17, 10).state_dict().items()}
    for step in range(1, 5):
        weights = tensors(tmp_path / "run", step)
        average = {name: 0.7 * value + 0.3 * weights[name].double() for name, value in average.items()}
        for name, value in tensors(tmp_path / "run", step, "ema").items():
            assert torch.allclose(value.double(), average[name], rtol=1e-6, atol=1e-7), (step, name)
    assert not torch.equal(weights["network.norm.weight"].double(), average["network.norm.weight"])


def test_clipping_bounds_the_step_and_the_log_shows_the_gradient_before_it(tmp_path: Path) -> None:
    seen: list[float] = []
    for clip in (0.0, 1e-3):
        config = tiny(optimizer__clip=clip, training__steps=1, training__log_every=1, training__evaluate_every=0)
        trainer = Trainer(config, tmp_path / "none", load("digits"))
        trainer.take_step()
        gradients = [p.grad for p in trainer.model.parameters() if p.grad is not None]
        seen.append(float(torch.nn.utils.get_total_norm(gradients)))
        assert trainer.window["gradient_norm"] == pytest.approx(seen[0], rel=1e-6)
    assert seen[0] > 1 and seen[1] == pytest.approx(1e-3, rel=1e-3)


def test_bf16_is_for_the_network_and_losses_are_float32(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kinds: set[tuple[str, torch.dtype]] = set()
    forward = Loss.forward

    def spy(self: Loss, *arguments: Any) -> objectives.Terms:
        hooks = [
            module.register_forward_hook(lambda m, i, out: kinds.add(("conv", out.dtype)))
            for module in self.model.network.modules()
            if isinstance(module, torch.nn.Conv2d)
        ]
        terms = forward(self, *arguments)
        for hook in hooks:
            hook.remove()
        for field in dataclasses.fields(terms):
            kinds.add(("term", getattr(terms, field.name).dtype))
        return terms

    config = tiny("mulan-digits", training__log_every=1, training__evaluate_every=48)
    train(config, tmp_path / "float32", **quiet)
    monkeypatch.setattr(Loss, "forward", spy)
    train(change(config, {"training.precision": "bf16"}), tmp_path / "bf16", **quiet)
    assert kinds == {("conv", torch.bfloat16), ("term", torch.float32)}
    assert {value.dtype for value in tensors(tmp_path / "bf16", 12).values()} == {torch.float32}
    one, two = metrics(tmp_path / "float32"), metrics(tmp_path / "bf16")
    assert one != two
    for a, b in zip(one, two, strict=True):
        x, y = ((v["mean"] if isinstance(v, dict) else v) for v in (a["bits_per_dim"], b["bits_per_dim"]))
        assert y == pytest.approx(x, rel=0.02)


# Starting from old weights -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 12 steps with checkpoints at 3, 6, 9 and 12, and where an evaluation was the best so far."""
    run = tmp_path_factory.mktemp("source") / "run"
    train(tiny(training__keep=9), run, **quiet)
    return run


@pytest.mark.parametrize("optimizer", [False, True])
@pytest.mark.parametrize("place", ["run", "checkpoint"])
def test_a_new_run_starts_from_old_weights(place: str, optimizer: bool, source: Path, tmp_path: Path) -> None:
    step = checkpoints.read_checkpoint(source, "best").step if place == "run" else 6
    start = source if place == "run" else source / "checkpoints" / "step-000000006"
    # The first step of a warm-up moves nothing, so the weights after it are those it started from.
    config = tiny(training__steps=1, training__seed=5, training__evaluate_every=0)
    train(config, tmp_path / "run", init_from=start, init_optimizer=optimizer, **quiet)
    for kind in ("weights", "ema"):
        old, new = tensors(source, step, kind), tensors(tmp_path / "run", 1, kind)
        weights = tensors(source, step)
        for name, value in new.items():
            expected = old[name] if kind == "weights" else old[name] + 0.1 * (weights[name] - old[name])
            assert torch.allclose(value, expected, rtol=1e-6, atol=1e-8), name
    counts = {float(v) for k, v in tensors(tmp_path / "run", 1, "optimizer").items() if k.startswith("step.")}
    assert counts == ({step + 1.0} if optimizer else {1.0})
    assert json.loads((tmp_path / "run" / "run.json").read_text())["init"] == {
        "from": str(start.resolve()),
        "optimizer": optimizer,
    }


def test_a_run_that_began_from_weights_goes_on_without_them(source: Path, tmp_path: Path) -> None:
    config, run = tiny(training__seed=5, training__evaluate_every=0), tmp_path / "run"
    train(config, tmp_path / "whole", init_from=source, **quiet)
    train(change(config, {"training.steps": 5}), run, init_from=source, **quiet)
    with pytest.raises(UserError, match=r"began with --init-from .*; give the same again"):
        train(config, run, init_from=source, init_optimizer=True, **quiet)
    train(config, run, **quiet)
    name = "checkpoints/step-000000012/weights.safetensors"
    assert files(run)[name] == files(tmp_path / "whole")[name]
    for path in checkpoints.list_checkpoints(run):  # killed before the first checkpoint
        checkpoints._remove(path)
    with pytest.raises(UserError, match="began with --init-from"):
        train(config, run, **quiet)
    train(config, run, init_from=source, **quiet)
    assert files(run)[name] == files(tmp_path / "whole")[name]


# Faults --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("term", ["reconstruction", "diffusion"])
def test_a_loss_that_is_not_finite_stops_before_it_does_harm(
    term: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = Loss.forward

    def spoil(self: Loss, batch: Any, part: slice, step: int) -> objectives.Terms:
        terms = forward(self, batch, part, step)
        if step != 7:
            return terms
        return dataclasses.replace(terms, **{term: getattr(terms, term) * torch.tensor([math.nan] + [1.0] * 7)})

    config, run = tiny(training__precision="bf16", training__evaluate_every=0), tmp_path / "run"
    with monkeypatch.context() as patched:
        patched.setattr(Loss, "forward", spoil)
        with pytest.raises(UserError) as error:
            train(config, run, **quiet)
    message = str(error.value)
    assert message.startswith(f"not finite at step 8: {term}, gradient_norm; try a lower optimizer.learning_rate")
    assert "optimizer.clip" in message and "training.precision float32" in message
    assert message.endswith(f"the last good checkpoint is {run / 'checkpoints' / 'step-000000006'}")
    assert steps_kept(run)[-1] == 6
    assert all(value.isfinite().all() for value in tensors(run, 6).values())
    train(config, run, **quiet)
    train(config, tmp_path / "whole", **quiet)
    assert same(outcome(run), outcome(tmp_path / "whole"))


def test_a_gradient_that_is_not_finite_stops_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    forward = Loss.forward

    def spoil(self: Loss, batch: Any, part: slice, step: int) -> objectives.Terms:
        terms = forward(self, batch, part, step)
        if step == 5:  # sqrt has no derivative at 0
            terms = dataclasses.replace(terms, prior=terms.prior + torch.sqrt(self.model.network.norm.bias.sum() * 0.0))
        return terms

    monkeypatch.setattr(Loss, "forward", spoil)
    with pytest.raises(UserError, match=r"not finite at step 6: gradient_norm; .*last good checkpoint is .*000003$"):
        train(tiny(training__evaluate_every=0), tmp_path / "run", **quiet)


def test_an_absurd_learning_rate_says_what_to_try(tmp_path: Path) -> None:
    config = tiny(optimizer__learning_rate=1e30, optimizer__warmup=0)
    with pytest.raises(UserError, match=r"not finite at step \d: .*try a lower .*; no checkpoint was written yet"):
        train(config, tmp_path / "run", **quiet)


@pytest.mark.parametrize("call", [1, 2, 5, 9])
def test_a_full_disk_while_saving_leaves_what_was_complete(
    call: int, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, run, fsync, calls = tiny(training__keep=9), tmp_path / "run", os.fsync, 0
    train(change(config, {"training.steps": 6}), run, **quiet)
    before = files(run)

    def full(descriptor: int) -> None:
        nonlocal calls
        calls += 1
        if calls >= call + 3:  # the run's own run.json and log come first
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=r"cannot write .*: No space left on device; what was complete before is kept"):
        train(config, run, **quiet)
    monkeypatch.undo()
    after = files(run)
    assert not [name for name in entries(run) if "/." in f"/{name}" or ".tmp" in name]
    for name, content in before.items():
        if name.startswith("checkpoints"):
            assert after[name] == content
    train(config, run, **quiet)
    assert steps_kept(run) == steps_kept(source)
    for step in steps_kept(run):
        name = f"checkpoints/{checkpoints.checkpoint_name(step)}/weights.safetensors"
        assert files(run)[name] == files(source)[name]


LIMITED = """
import resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))
from nelbo.cli import main
sys.exit(main(sys.argv[1:]))
"""


def test_no_room_for_a_file_is_one_line_and_status_2(tmp_path: Path) -> None:
    """The system's own limit on the size of a file, smaller than a checkpoint's largest."""
    config, run = tiny(training__evaluate_every=0), tmp_path / "run"
    train(change(config, {"training.steps": 6}), run, **quiet)
    before = entries(run)
    largest = max(len(content) for content in files(run).values())
    done = subprocess.run(
        [sys.executable, "-c", LIMITED.format(limit=largest - 1), "train", "vdm-digits", "--out", run, *flags(config)],
        capture_output=True, text=True, env=ONE_THREAD, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    line = f"nelbo: cannot write {run}/checkpoints/step-000000009: File too large; what was complete before is kept"
    assert done.stderr.splitlines() == [line]
    after = entries(run)
    kept = [name for name in before if name.startswith("checkpoints")]
    assert {name: before[name] for name in kept} == {n: c for n, c in after.items() if n.startswith("checkpoints")}


def test_a_disk_that_is_really_full(tmp_path: Path) -> None:
    """On a file system of 600 KiB, where the user may mount one: room for the first checkpoint and half the second."""
    small = tmp_path / "small"
    small.mkdir()
    mount = f"mount -t tmpfs -o size=600k none {small}"
    if not shutil.which("unshare") or subprocess.run(["unshare", "-m", "sh", "-c", mount], check=False).returncode:
        pytest.skip("needs the right to mount")
    command = shlex.join(cli("train", "vdm-digits", "--out", small / "run", *flags(tiny(training__keep=9))))
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", f"{mount} && {command}; echo $?; cp -r {small}/run {tmp_path}"],
        capture_output=True, text=True, env=ONE_THREAD, check=False,
    )  # fmt: skip
    assert done.stdout.splitlines()[-1] == "2"
    assert [re.sub(r"step-\d+", "STEP", line) for line in done.stderr.splitlines()] == [
        f"nelbo: cannot write {small}/run/checkpoints/STEP: No space left on device; what was complete before is kept"
    ]
    assert not [name for name in entries(tmp_path / "run") if "/." in f"/{name}"]
    checkpoints.load_model(tmp_path / "run", "last")


# Files ---------------------------------------------------------------------------------------------------------------


def test_the_last_few_checkpoints_and_the_best_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures = iter([5.0, 4.0, 4.5, 4.2, 4.1, math.nan])
    evaluate = Trainer.evaluate

    def scripted(self: Trainer) -> dict[str, Any]:
        best, found = self.best, evaluate(self)
        value = next(figures)
        self.best = {"step": self.step, "bits_per_dim": value} if best is None or value < best["bits_per_dim"] else best
        return found

    monkeypatch.setattr(Trainer, "evaluate", scripted)
    train(tiny(training__evaluate_every=16, training__save_every=16, training__keep=2), tmp_path / "run", **quiet)
    assert steps_kept(tmp_path / "run") == [4, 10, 12]
    assert checkpoints.read_checkpoint(tmp_path / "run", "best").meta["best"] == {"step": 4, "bits_per_dim": 4.0}
    assert checkpoints.read_checkpoint(tmp_path / "run", "last").step == 12


def test_the_best_is_the_best_of_figures_of_the_same_images_and_draws(tmp_path: Path) -> None:
    run, config = tmp_path / "run", tiny(training__keep=9)
    for steps, images, times in ((8, 6, 1), (12, 6, 1), (16, 3, 1), (20, 3, 2)):
        changes = {"training.steps": steps, "training.evaluate_images": images, "training.evaluate_times": times}
        train(change(config, changes), run, **quiet)
        best = checkpoints.read_checkpoint(run, "last").meta["best"]
        assert (best["images"], best["times"]) == (images, times)
        shown = [m for m in metrics(run) if m["kind"] == "evaluation" and m["step"] == best["step"]]
        assert best["bits_per_dim"] == shown[0]["bits_per_dim"]["mean"]


def test_interim_figures_come_from_validation_images_and_averaged_weights(tmp_path: Path) -> None:
    config = tiny("mulan-digits", training__evaluate_every=96, training__evaluate_images=5, training__evaluate_times=3)
    train(config, tmp_path / "run", **quiet)
    line = next(line for line in metrics(tmp_path / "run") if line["kind"] == "evaluation")
    model = checkpoints.load_model(tmp_path / "run", "last", "ema")
    expected = likelihood.vlb(model, load("digits").images["validation"][:5], times_per_shift=3, shifts=2)
    # Not to the last bit: torch's kernels differ with requires_grad.
    assert line["bits_per_dim"] == pytest.approx(vars(expected.value), rel=1e-6)
    assert line["split"] == "validation" and line["images"] == 96
    raw = checkpoints.load_model(tmp_path / "run", "last", "raw")
    assert (
        likelihood.vlb(raw, load("digits").images["validation"][:5], times_per_shift=3, shifts=2).mean != expected.mean
    )


def test_the_log_counts_images_and_averages_over_the_steps_since_the_last_line(tmp_path: Path) -> None:
    config = tiny(training__evaluate_every=32, training__log_every=1)
    train(config, tmp_path / "each", **quiet)
    train(change(config, {"training.log_every": 5}), tmp_path / "fifth", **quiet)
    lines = [json.loads(line) for line in (tmp_path / "fifth" / "metrics.jsonl").read_text().splitlines()]
    assert [(line["kind"], line["step"], line["images"]) for line in lines] == [
        ("evaluation", 4, 32), ("train", 5, 40), ("evaluation", 8, 64), ("train", 10, 80), ("train", 12, 96),
        ("evaluation", 12, 96),
    ]  # fmt: skip
    each = [line["bits_per_dim"] for line in metrics(tmp_path / "each") if line["kind"] == "train"]
    means = [line["bits_per_dim"] for line in lines if line["kind"] == "train"]
    assert means == pytest.approx([np.mean(each[:5]), np.mean(each[5:10]), np.mean(each[10:])], rel=1e-12)
    for line in lines:
        if line["kind"] == "train":
            assert 1 < line["images_per_second"] < 1e6 and line["seconds"] > 0
            assert line["bits_per_dim"] == pytest.approx(
                sum(v for k, v in line["terms"].items() if k != "latent"), rel=1e-12
            )


def test_what_a_killed_run_logged_too_much_is_cut_off(tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(tiny(training__steps=5), run, **quiet)
    good = (run / "metrics.jsonl").read_bytes()
    later = good.splitlines(keepends=True)[-1].replace(b'"step": 5', b'"step": 6')
    for torn in (later, later + later[:40], good[:30], b'{"step": 3}', b'{"kind": "train"}\n' + later, b"[1]\n"):
        (run / "metrics.jsonl").write_bytes(good + torn)
        Log(run, 5).close()
        assert (run / "metrics.jsonl").read_bytes() == good
    (run / "metrics.jsonl").write_bytes(good + later[:40])
    train(tiny(), run, **quiet)
    train(tiny(), tmp_path / "whole", **quiet)
    steps = [line["step"] for line in metrics(run) if line["kind"] == "train"]
    assert steps == [line["step"] for line in metrics(tmp_path / "whole") if line["kind"] == "train"] == [5, 10, 12]


def test_tensorboard_shows_the_same_figures(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = tiny(training__steps=6)
    train(config, tmp_path / "run", **quiet)
    (tmp_path / "run" / "checkpoints" / "step-000000006").rename(tmp_path / "gone")  # as if killed while saving
    train(tiny(), tmp_path / "run", **quiet)
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    for kind in ("train", "evaluation"):
        lines = [line for line in metrics(tmp_path / "run") if line["kind"] == kind]
        for tag, value in (
            (f"{kind}/bits_per_dim", lambda line: line["bits_per_dim"]),
            (f"{kind}/diffusion", lambda line: line["terms"]["diffusion"]),
        ):
            shown = [(e.step, e.value) for e in events.Scalars(tag)]
            figures = [(line["step"], v["mean"] if isinstance(v := value(line), dict) else v) for line in lines]
            assert [step for step, _ in shown] == [step for step, _ in figures]
            assert [v for _, v in shown] == pytest.approx([v for _, v in figures], rel=1e-6)
    assert {"train/learning_rate", "train/images_per_second", "train/gradient_norm"} <= set(events.Tags()["scalars"])


def test_before_it_starts_it_says_what_it_will_do(tmp_path: Path) -> None:
    said: list[str] = []
    train(tiny("mulan-digits", training__steps=1), tmp_path / "run", say=said.append)
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    count = sum(v.numel() for v in tensors(tmp_path / "run", 1).values())
    assert record["parameters"] == sum(record["parameters_by_part"].values()) == count
    assert set(record["parameters_by_part"]) == {"network", "schedule", "encoder"}
    assert said[0].startswith("digits: 1797")
    assert said[1].startswith(f"{count:,} parameters (network")
    assert re.match(
        r"about \d+ MiB for training: \d+ weights, moments and average, \d+ activations and gradients; cpu, 1 thread$",
        said[2],
    )
    assert said[3] == f"starting; everything goes to {tmp_path / 'run'}/"


def test_the_estimate_of_memory_counts_what_is_alive() -> None:
    """x W with x (n, 1000): x, x W and its square at the end of the forward pass, their sum, and the gradient of W."""
    model = torch.nn.Linear(1000, 1000, bias=False)
    found = memory_estimate(model, lambda n: model(torch.ones(n, 1000)).square().sum(), 100)
    assert found["weights"] == 4 * 4_000_000
    assert found["activations"] == 4_000_000 + 3 * 400_000 + 4
    assert model.weight.grad is None


MEASURED = """
import json, os, resource, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from nelbo.config import from_dict
from nelbo.data import load
from nelbo.training import Trainer

def used():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

def step(config):
    trainer = Trainer(config, Path("none"), data)
    trainer.take_step()
    return trainer

small, *others = map(from_dict, json.load(sys.stdin))
data = load(small.data.source)
for config in others:
    if not os.fork():
        step(small)  # what libraries take
        before = used()
        trainer = step(config)
        print(json.dumps({"used": used() - before, "estimated": sum(trainer.memory().values())}), flush=True)
        os._exit(0)
    os.wait()
"""


def test_the_estimate_of_memory_is_near_what_is_used() -> None:
    small = tiny("vdm-photos32", training__batch=1, network__channels=8)
    fields = {"training.batch": 32, "network.channels": 64, "network.levels": 3, "network.groups": 8}
    large = change(small, fields)
    others = [large, change(large, {"network.checkpointing": True}), change(large, {"training.accumulate": 4})]
    done = subprocess.run(
        [sys.executable, "-c", MEASURED], input=json.dumps([to_dict(config) for config in (small, *others)]),
        capture_output=True, text=True, env=ONE_THREAD, check=True,
    )  # fmt: skip
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(found) == 3
    for figures in found:  # the library's own buffers come on top: some 300 MiB here, whatever the batch
        assert figures["estimated"] < 1.1 * figures["used"], found
        assert figures["used"] < 1.25 * figures["estimated"] + 400 * 2**20, found
    whole, recomputed, parts = (figures["estimated"] for figures in found)
    assert recomputed < 0.9 * whole and parts < 0.35 * whole
    assert found[1]["used"] < found[0]["used"] > found[2]["used"]


# Presets -------------------------------------------------------------------------------------------------------------


def scaled(name: str, folder: Path) -> Config:
    """A preset that takes a step in a second: those of the papers on random images of their shape, narrow and flat."""
    config = change(preset(name), {"training.steps": 1, "training.evaluate_every": 0, "training.save_every": 0})
    source = config.data.source
    if source in ("digits", "photos32"):
        return config
    side = 64 if source == "imagenet64" else 32
    images = np.random.default_rng(0).integers(0, 256, (12, 3, side, side), dtype=np.uint8)
    np.savez(folder / f"{source}.npz", images=images)
    return change(config, {
        "data.source": str(folder / f"{source}.npz"), "network.channels": 8, "network.levels": 2, "network.groups": 2,
        "schedule.width": 16, "schedule.rank": config.schedule.rank and 4, "training.batch": 2,
    })  # fmt: skip


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_takes_a_step(name: str, tmp_path: Path) -> None:
    config = scaled(name, tmp_path)
    train(change(config, {"optimizer.warmup": 0}), tmp_path / "run", **quiet)
    (line,) = metrics(tmp_path / "run")
    assert 0 < line["bits_per_dim"] < 50 and 0 < line["gradient_norm"] < 1e4
    before = build_model(
        config, tuple(load(config.data.source).shape), load(config.data.source).levels, 10
    ).state_dict()
    after = tensors(tmp_path / "run", 1)
    assert before.keys() == after.keys()
    assert any(not torch.equal(before[name], after[name]) for name in before)


def parameters(name: str, levels: int, shape: tuple[int, int, int]) -> dict[str, int]:
    with torch.device("meta"):
        model = build_model(preset(name), shape, levels)
    counts: dict[str, int] = {}
    for path, parameter in model.named_parameters():
        assert parameter.is_meta
        counts[path.split(".")[0]] = counts.get(path.split(".")[0], 0) + parameter.numel()
    return counts


def test_the_presets_of_the_papers_have_the_papers_sizes() -> None:
    """By hand, from the layers: residual blocks of C channels on a condition of 4 C, attention, and what joins them."""

    def block(inputs: int, c: int) -> int:
        shortcut = inputs * c + c if inputs != c else 0
        return 2 * inputs + 9 * inputs * c + c + 4 * c * c + 2 * c + 9 * c * c + c + shortcut

    def unet(c: int, levels: int, columns: int, everywhere: bool = False) -> int:
        attention = 2 * c + 4 * (c * c + c)
        embed = (c + columns) * 4 * c + 4 * c + 16 * c * c + 4 * c
        down = levels * (block(c, c) + everywhere * attention) + 2 * block(c, c) + attention
        up = (levels + 1) * (block(2 * c, c) + everywhere * attention)
        return embed + 15 * 9 * c + c + down + up + 2 * c + 9 * c * 3 + 3

    vdm = parameters("vdm-cifar10", 256, (3, 32, 32))
    assert vdm == {"network": unet(128, 32, 1), "schedule": 2}
    assert vdm["network"] == pytest.approx(31e6, rel=0.02)
    mulan = parameters("mulan-cifar10", 256, (3, 32, 32))
    assert mulan["network"] == unet(128, 32, 50)
    width = 3072
    assert mulan["schedule"] == 50 * width + width + width * width + width + 3 * (width * width + width)
    assert mulan["schedule"] == pytest.approx(37.9e6, rel=0.002)
    augmented = parameters("vdm-cifar10-aug", 256, (3, 32, 32))
    assert augmented["network"] == unet(256, 32, 1, everywhere=True)
    assert parameters("vdm-imagenet64", 256, (3, 64, 64))["network"] == unet(256, 64, 1)
    for path in ("vp", "sp"):
        assert parameters(f"idode-{path}-cifar10", 256, (3, 32, 32)) == {"network": unet(128, 32, 1)}
        assert parameters(f"idode-{path}-cifar10-aug", 256, (3, 32, 32)) == {"network": unet(256, 32, 1, True)}
        for version, batch in (("old", 512), ("new", 128)):
            config = preset(f"idode-{path}-imagenet32-{version}")
            assert parameters(f"idode-{path}-imagenet32-{version}", 256, (3, 32, 32)) == {"network": unet(256, 32, 1)}
            assert (config.data.source, config.training.batch) == (f"imagenet32-{version}", batch)
            assert (config.training.steps, config.network.dropout) == (2_000_000, 0.1)


@pytest.mark.parametrize("name", [name for name in PRESETS if name.startswith("idode")])
def test_the_presets_of_i_dode_are_i_dode(name: str) -> None:
    config = preset(name)
    assert (config.schedule.kind, config.schedule.ends, config.latent.kind) == ("linear", "fixed", "none")
    assert (config.parameterization, config.objective.times, config.network.flag) == ("velocity", "importance", True)
    assert config.path == ("vp" if "-vp-" in name else "straight")
    assert config.objective.second_order == 0  # for fine-tuning
    # Its public configuration has no channel swaps.
    assert config.data.augment == ("turn" if name.endswith("-aug") else "none")
