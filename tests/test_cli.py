"""The command line: what it prints, writes and refuses."""

import csv
import json
import os
import pty
import re
import select
import shutil
import subprocess
import sys
import time
import typing
from collections.abc import Iterator
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import nelbo
from nelbo import checkpoints, cli, likelihood
from nelbo.config import from_dict
from nelbo.data import load
from nelbo.presets import PRESETS, preset
from nelbo.verbs import train as train_verb
from tiny import change, entries, flags, tiny

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "COLUMNS": "100"}


def nelbo_command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "nelbo.cli", *map(str, arguments)]


def call(*arguments: object) -> int:
    return cli.main([str(a) for a in arguments])


# What there is -------------------------------------------------------------------------------------------------------


def test_help_names_the_verbs(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in ((), ("--help",), ("-h",)):
        assert call(*arguments) == 0
        out = capsys.readouterr().out
        for verb in ("presets", "train", "evaluate", "sample", "fid", "report"):
            assert f"nelbo {verb}" in out
    assert call("--version") == 0
    assert capsys.readouterr().out == f"{nelbo.__version__}\n"


def documented(cls: type, where: str = "") -> Iterator[tuple[str, str]]:
    """Every field's option and docstring, from the source of the class and of those it inherits from."""
    import ast
    import inspect

    for base in cls.__bases__:
        if is_dataclass(base):
            yield from documented(base, where)
    hints = typing.get_type_hints(cls)
    body = ast.parse(inspect.getsource(cls)).body[0].body  # type: ignore[attr-defined]
    for statement, following in zip(body, [*body[1:], None], strict=True):
        if not isinstance(statement, ast.AnnAssign):
            continue
        name = statement.target.id  # type: ignore[union-attr]
        if is_dataclass(hints[name]):
            yield from documented(typing.cast(type, hints[name]), "" if name == "config" else f"{where}{name}.")
            continue
        assert isinstance(following, ast.Expr), f"{cls.__name__}.{name} has no docstring"
        yield f"--{where}{name}".replace("_", "-"), " ".join(ast.literal_eval(following.value).split())


def words(text: str) -> str:
    return " ".join(re.sub(r"[│╭╮╰╯─]", " ", text).split())


@pytest.mark.parametrize("verb", ["train", *cli.VERBS])
def test_help_explains_every_field(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    cls = train_verb.Train if verb == "train" else cli.VERBS[verb][0]
    with pytest.raises(SystemExit) as left:
        call(verb, *(["vdm-cifar10"] if verb == "train" else []), "--help")
    assert left.value.code == 0
    shown = words(capsys.readouterr().out)
    found = list(documented(cls))
    least = {"train": 58, "evaluate": 16, "sample": 12, "fid": 24, "report": 3, "data": 9, "share": 8, "export": 5}
    assert len(found) >= least[verb]
    for option, text in found:
        assert text in shown, option
        assert option in shown or option in ("--run", "--runs", "--source")
    if verb == "train":
        assert "Optimizer steps in all. (default: 10000000)" in shown  # the preset's defaults


def test_train_help_needs_no_preset(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        call("train", "--help")
    assert left.value.code == 0
    out = capsys.readouterr().out
    assert out.startswith("usage: nelbo train PRESET --out RUN") and "--optimizer.learning-rate FLOAT" in out


def test_presets_are_listed_a_line_each(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("presets") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(PRESETS)
    assert all(len(line.split()) > 3 and len(line) < 130 for line in lines)


@pytest.mark.parametrize("name", PRESETS)
def test_dry_run_prints_the_configuration(name: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    flag = preset(name).network.kind != "ddpm"  # which takes none
    changes = ("--training.steps", "7", "--network.fourier", "1", "2.5", "--network.flag", flag, "--path", "straight")
    assert call("train", name, "--out", tmp_path / "run", "--dry-run", *changes) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["preset"] == name
    expected = change(preset(name), {"training.steps": 7, "network.fourier": (1.0, 2.5), "network.flag": flag,
                                     "path": "straight"})  # fmt: skip
    assert from_dict(shown["config"]) == expected
    assert not (tmp_path / "run").exists()


def test_every_field_is_an_option_and_its_value_arrives(capsys: pytest.CaptureFixture[str]) -> None:
    wanted = tiny("mulan-gaussian-digits", network__fourier=(3.0, 4.0), schedule__gamma_min=-9.5, encoder__channels=12,
                  optimizer__schedule_learning_rate=1e-5, network__checkpointing=True)  # fmt: skip
    assert call("train", "vdm-cifar10", "--dry-run", *flags(wanted)) == 0
    assert from_dict(json.loads(capsys.readouterr().out)["config"]) == wanted


LIGHT = """
import sys
import nelbo
from nelbo.cli import main
heavy = {"torch", "matplotlib", "accelerate", "tensorboard", "sklearn", "scipy", "PIL", "jinja2", "safetensors"}
def check(what):
    loaded = heavy & set(sys.modules)
    assert not loaded, f"{what} loads {loaded}"
check("import nelbo")
for arguments in (["--help"], ["presets"], ["train", "mulan-digits", "--dry-run"], ["evaluate", "--help"],
                  ["fid", "--help"], ["train", "mulan-digits", "--help"], ["train", "mulan-digit"],
                  ["train", "mulan-digits", "--x"]):
    try:
        main(arguments)
    except SystemExit:
        pass
    check(" ".join(arguments))
"""


def test_help_presets_and_dry_run_load_nothing_heavy() -> None:
    done = subprocess.run([sys.executable, "-c", LIGHT], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_help_answers_within_a_second() -> None:
    """About 0.15 s on an idle core; the best of three, on a machine that may be busy."""
    taken = []
    for _ in range(3):
        begun = time.perf_counter()
        subprocess.run(nelbo_command("--help"), capture_output=True, check=True)
        taken.append(time.perf_counter() - begun)
    assert min(taken) < 1, taken


def test_a_reader_that_leaves_is_no_error() -> None:
    command = " ".join(nelbo_command("presets")) + " | true"
    done = subprocess.run(
        ["bash", "-c", f"{command}; echo ${{PIPESTATUS[0]}}"], capture_output=True, text=True, check=True
    )
    assert done.stderr == "" and done.stdout.strip() in ("0", "1")


# Mistakes ------------------------------------------------------------------------------------------------------------

SHORT = flags(tiny(training__steps=6, training__log_every=2, training__evaluate_images=4))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with runs, whole and spoilt, and data, good and bad."""
    place = tmp_path_factory.mktemp("place")
    assert call("train", "vdm-digits", "--out", place / "run", *SHORT) == 0
    rng = np.random.default_rng(0)
    np.savez(place / "six.npz", images=rng.integers(0, 256, (30, 1, 6, 6), dtype=np.uint8))
    np.savez(place / "plain.npz", images=rng.integers(0, 17, (30, 1, 8, 8), dtype=np.uint8), levels=17)
    assert call("train", "vdm-digits", "--out", place / "six", *SHORT, "--data.source", place / "six.npz") == 0
    label = flags(tiny("mulan-label-digits", training__steps=1, training__evaluate_every=0))
    assert call("train", "mulan-label-digits", "--out", place / "label", *label) == 0
    image = flags(tiny("mulan-image-digits", training__steps=1, training__evaluate_every=0))
    assert call("train", "mulan-image-digits", "--out", place / "image", *image) == 0
    for name in ("truncated", "foreign", "corrupt", "early"):
        shutil.copytree(place / "run", place / name)
    last = Path("checkpoints", "step-000000006")
    os.truncate(place / "truncated" / last / "ema.safetensors", 500)
    (place / "foreign" / last / "meta.json").write_text('{"model": "gpt"}')
    (place / "corrupt" / "run.json").write_text('{"format": 1, "config": {"data"')
    shutil.rmtree(place / "early" / "checkpoints")
    (place / "something").mkdir()
    (place / "something" / "thesis.tex").write_text("x")
    (place / "file").write_text("x")
    np.save(place / "float.npy", rng.random((30, 1, 8, 8)))
    np.save(place / "pickled.npy", np.array([{}, {}], dtype=object), allow_pickle=True)
    (place / "broken").mkdir()
    Image.fromarray(rng.integers(0, 256, (8, 8), dtype=np.uint8)).save(place / "broken" / "a.png")
    content = (place / "broken" / "a.png").read_bytes()
    (place / "broken" / "b.png").write_bytes(content[: len(content) // 2])
    (place / "sizes").mkdir()
    for side in (6, 8):
        Image.fromarray(rng.integers(0, 256, (side, side), dtype=np.uint8)).save(place / "sizes" / f"{side}.png")
    (place / "empty").mkdir()
    return place


# Arguments, and a part of the line. {place} is the folder above.
WORDS = {"NEW": ["--out", "{place}/new"], "DIGITS": ["vdm-digits", "--out", "{place}/new"], "SHORT": SHORT}
MISTAKES = [
    ("trian", "unknown verb 'trian'; the choices are presets, train, convert, evaluate, sample, fid, report"),
    ("presets more", "presets takes no arguments, got 'more'"),
    # Flags
    ("train", "train needs a preset first; the choices are vdm-digits, mulan-digits"),
    ("train NEW", "train needs a preset first"),
    ("train mulan-digit NEW", "unknown preset 'mulan-digit'; the choices are vdm-digits, mulan-digits"),
    ("train vdm-digits", "train needs --out RUN, the folder of the run"),
    ("train vdm-digits --out", "--out needs a value"),
    ("train DIGITS --training.stepz 3", "unknown option --training.stepz; did you mean --training.steps"),
    ("train DIGITS --traning.steps=3", "unknown option --traning.steps; did you mean --training.steps"),
    ("train DIGITS more", "more values than the options take: more"),
    ("train DIGITS --training.steps", "--training.steps needs a value"),
    ("train DIGITS --training.steps many", "--training.steps must be a whole number, got 'many'"),
    ("train DIGITS --training.steps 2.5", "--training.steps must be a whole number, got '2.5'"),
    ("train DIGITS --optimizer.learning-rate fast", "--optimizer.learning-rate must be a number, got 'fast'"),
    ("train DIGITS --network.fourier 6 x", "--network.fourier must be numbers or None, got '6' 'x'"),
    ("train DIGITS --encoder.channels 6.5", "--encoder.channels must be a whole number or None, got '6.5'"),
    ("train DIGITS --network.flag maybe", "--network.flag must be one of True, False, got 'maybe'"),
    ("train DIGITS --path curved", "--path must be one of vp, straight, got 'curved'"),
    ("train DIGITS --threads 0", "--threads must be at least 1, got 0"),
    ("train DIGITS --init-optimizer", "--init-optimizer needs --init-from RUN_OR_CHECKPOINT"),
    # Fields
    ("train DIGITS --training.steps 0", "training.steps must be above 0, got 0"),
    ("train DIGITS --training.save-every=-1", "training.save_every must be 0 or more, got -1"),
    ("train DIGITS --network.dropout 1", "network.dropout must lie in [0, 1), got 1.0"),
    ("train DIGITS --optimizer.learning-rate nan", "optimizer.learning_rate must be finite, got nan"),
    ("train DIGITS --network.fourier inf", "network.fourier must be finite, got inf"),
    ("train DIGITS --training.seed 18446744073709551616", "training.seed must lie below 2^64"),
    ("train DIGITS --network.channels 7", "network.channels must be even and at least 4"),
    ("train DIGITS --encoder.channels 2", "encoder.channels must be even and at least 4"),
    ("train DIGITS --network.groups 3", "network.groups must divide network.channels = 32, got 3"),
    ("train DIGITS --network.groups 32", "network.groups must be fewer than network.channels"),
    ("train mulan-digits NEW --latent.k 50", "latent.k must be below latent.size = 50, got 50"),
    ("train DIGITS --training.accumulate 3", "training.accumulate must divide training.batch = 64, got 3"),
    ("train mulan-digits NEW --data.augment flip", "data.augment = flip needs network.flag = True"),
    ("train DIGITS --schedule.gamma-min 6", "schedule.gamma_min must lie below schedule.gamma_max = 5.0"),
    ("train DIGITS --schedule.gamma-max=-9", "schedule.gamma_max must lie above gamma at t = 0"),
    ("train DIGITS --schedule.rank 0", "schedule.rank must be above 0, got 0"),
    ("train mulan-digits NEW --schedule.rank 64", "schedule.rank must lie below schedule.width = 64, got 64"),
    ("train DIGITS --schedule.rank 4", "schedule.rank needs schedule.kind = polynomial and a latent, got schedule"),
    ("train DIGITS --schedule.ends free", "schedule.ends = free needs schedule.kind monotone or"),
    ("train DIGITS --objective.minimise-variance True", "needs schedule.kind = monotone with fixed or"),
    ("train DIGITS --latent.kind image", "latent.kind = image needs parameterization = data and"),
    ("train mulan-image-digits NEW --schedule.ends learned", "latent.kind = image needs schedule.ends = fixed"),
    ("train mulan-image-digits NEW --schedule.ends learned", "latent.kind = image needs schedule.ends = fixed"),
    ("train DIGITS --schedule.kind monotone --objective.minimise-variance True", "needs optimizer.clip = 0"),
    # Folders
    ("train vdm-digits --out {place}/something", "something holds something else and no run.json; --out needs a new"),
    ("train vdm-digits --out {place}/file", "--out needs a folder, and {place}/file is a file"),
    ("train vdm-digits --out {place}/file/new", "cannot write {place}/file/new: Not a directory"),
    ("train vdm-digits --out {place}/corrupt", "corrupt/run.json is not readable JSON"),
    ("train vdm-digits --out {place}/run", " when {place}/run began and is "),
    ("train vdm-digits --out {place}/run SHORT --optimizer.eps 1e-9", "optimizer.eps was 1e-08 when {place}/run began"),
    ("train vdm-digits --out {place}/run SHORT --data.source {place}/six.npz", "data.source: {place}/run was trained"),
    ("train vdm-digits --out {place}/truncated SHORT --training.steps 8", "weights"),
    ("train DIGITS --init-from {place}/something", "something is not a run of nelbo: it holds no run.json"),
    ("train DIGITS --init-from {place}/nowhere", "no such run: {place}/nowhere"),
    ("train DIGITS --init-from {place}/run", "another architecture"),
    ("train DIGITS SHORT --init-from {place}/foreign/checkpoints/step-000000006", "has format None"),
    # Data
    ("train vdm-imagenet32 NEW", "imagenet32-old needs train_32x32.tar and valid_32x32.tar; or downsampled_imagenet-"),
    ("train DIGITS --data.source {place}/nothing.npz", "nothing.npz' is not there"),
    ("train DIGITS --data.source {place}/float.npy", "must be of type uint8, got float64"),
    ("train DIGITS --data.source {place}/pickled.npy", "cannot read {place}/pickled.npy: it must hold plain"),
    ("train DIGITS --data.source {place}/broken", "b.png"),
    ("train DIGITS --data.source {place}/sizes", "8.png"),
    ("train DIGITS --data.source {place}/empty", "a folder must hold image files"),
    ("train mulan-label-digits NEW --data.source {place}/plain.npz", "latent.kind = label needs images with labels"),
    ("train mulan-label-digits NEW --latent.size 9", "latent.size must be at least the number of classes = 10"),
    # Evaluation
    ("evaluate", "RUN is missing"),
    ("evaluate {place}/nowhere", "no such run: {place}/nowhere; `nelbo train PRESET --out {place}/nowhere` makes one"),
    ("evaluate {place}/something", "something is not a run of nelbo: it holds no run.json"),
    ("evaluate {place}/file", "file is a file, not a run folder"),
    ("evaluate {place}/early", "early has no checkpoint yet"),
    ("evaluate {place}/truncated", "ema.safetensors is truncated or was changed: 500 bytes"),
    ("evaluate {place}/foreign", "step-000000006/meta.json has format None; this version of nelbo reads format 1"),
    ("evaluate {place}/corrupt", "corrupt/run.json is not readable JSON"),
    ("evaluate {place}/run --checkpoint newest", "--checkpoint must be best, last or a step, got 'newest'"),
    ("evaluate {place}/run --checkpoint 5", "has no checkpoint step-000000005; the choices are best, last, "),
    ("evaluate {place}/run --weights old", "--weights must be one of ema, raw, got 'old'"),
    ("evaluate {place}/run --method guess", "--method must be one of vlb, ode, got 'guess'"),
    ("evaluate {place}/run --method ode --times 4", "--times belongs to --method vlb, and the method is ode"),
    ("evaluate {place}/run --rtol 1e-4", "--rtol belongs to --method ode, and the method is vlb"),
    ("evaluate {place}/run --method ode --rtol 0", "--rtol must lie between 0 and 1, got 0"),
    ("evaluate {place}/run --method ode --least-steps 0", "--least-steps must be at least 1, got 0"),
    ("evaluate {place}/run --least-steps 9", "--least-steps belongs to --method ode, and the method is vlb"),
    ("evaluate {place}/run --method ode --samples 0", "--samples must be at least 1, got 0"),
    ("evaluate {place}/run --method ode --trace exact --probes 2", "the exact trace has none, got 2"),
    ("evaluate {place}/run --method ode --dequantization none", "--dequantization must be one of own, truncated-"),
    ("evaluate {place}/image --method ode", "{place}/image reads the image: it has no probability flow"),
    ("sample {place}/run --method ode --steps 20", "--steps belongs to --method ancestral or ddim, and"),
    ("sample {place}/run --rtol 1e-3", "--rtol belongs to --method ode, and the method is ancestral"),
    ("sample {place}/image --method ode", "{place}/image reads the image: it has no probability flow"),
    ("evaluate {place}/run --split dev", "--split must be one of train, validation, test, got 'dev'"),
    ("evaluate {place}/run --images 301", "--images must lie in 1 .. 300 for this split, got 301"),
    ("evaluate {place}/run --images 0", "--images must lie in 1 .. 300 for this split, got 0"),
    ("evaluate {place}/run --times 0", "--times must be at least 1, got 0"),
    ("evaluate {place}/run --shifts 0", "--shifts must be at least 1, got 0"),
    ("evaluate {place}/run --steps=-1", "--steps must be 0 or more, got -1"),
    ("evaluate {place}/run --seed=-1", "--seed must lie in 0 .. 2^64 - 1, got -1"),
    ("evaluate {place}/run --device abacus", "such as cpu or cuda, got 'abacus'"),
    ("evaluate {place}/run --per-image {place}/something", "--per-image needs a file, got the folder"),
    ("evaluate {place}/run --data {place}/six.npz", "1x8x8 with 17 levels; six.npz has 1x6x6 with 256"),
    ("evaluate {place}/run --data photos32", "photos32 has 3x32x32 with 256"),
    ("evaluate {place}/run --compare {place}/nowhere", "no such run: {place}/nowhere"),
    ("evaluate {place}/run --compare {place}/six", "1x6x6 with 256 levels; digits has 1x8x8 with 17"),
    ("evaluate {place}/label --data {place}/plain.npz", "label is conditioned on class labels, and plain.npz has none"),
    ("evaluate {place}/image --steps 0", "a schedule that reads the image has a bound at finite T only"),
    # Samples and report
    ("sample {place}/run --count 0", "--count must be at least 1, got 0"),
    ("sample {place}/run --count many", "--count must be a whole number, got 'many'"),
    ("sample {place}/run --trajectory=-1", "--trajectory be 0 or more"),
    ("sample {place}/run --decoding best", "--decoding must be one of argmax, categorical, got 'best'"),
    ("sample {place}/nowhere", "no such run: {place}/nowhere"),
    ("sample {place}/truncated", "ema.safetensors is truncated or was changed"),
    ("sample {place}/run --count 1 --steps 1 --out {place}/file/x", "cannot write {place}/file: File exists"),
    ("report", "report needs at least one run folder"),
    ("report {place}/nowhere", "no such run: {place}/nowhere"),
    ("report {place}/run {place}/something", "something is not a run of nelbo"),
]  # fmt: skip


@pytest.mark.parametrize(("line", "part"), MISTAKES, ids=[line for line, _ in MISTAKES])
def test_a_mistake_is_one_line_and_status_2(
    line: str, part: str, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if "truncated SHORT" in line:  # what a continuation reads first
        os.truncate(place / "truncated" / "checkpoints" / "step-000000006" / "weights.safetensors", 500)
    arguments = [a.format(place=place) for word in line.split() for a in WORDS.get(word, [word])]
    before = entries(place)
    assert call(*arguments) == 2
    shown = capsys.readouterr()
    assert len(shown.err.splitlines()) == 1 and shown.err.startswith("nelbo: ") and shown.err.endswith("\n")
    assert part.format(place=place) in shown.err
    assert "Traceback" not in shown.err + shown.out
    after = entries(place)
    assert sorted(after) == sorted(before)
    assert [name for name in before if after[name] != before[name]] == []


def test_as_a_process_a_mistake_is_the_same(tmp_path: Path) -> None:
    done = subprocess.run(nelbo_command("evaluate", tmp_path), capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"nelbo: {tmp_path} is not a run of nelbo: it holds no run.json\n"


def test_faults_that_are_not_the_users_keep_their_traceback_and_others_are_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    for error, status, part in (
        (KeyboardInterrupt(), 130, "nelbo: interrupted"),
        (PermissionError(13, "Permission denied", "/some/file"), 2, "nelbo: /some/file: Permission denied"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried 9 bytes."), 2, "training.accumulate"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nMore"), 2, "try a smaller batch"),
        (MemoryError(), 2, "out of memory"),
    ):

        def fail(arguments: list[str], error: BaseException = error) -> None:
            raise error

        monkeypatch.setattr(cli, "run", fail)
        assert call("presets") == status
        assert part in (err := capsys.readouterr().err) and len(err.splitlines()) == 1
    for error in (RuntimeError("shapes differ"), KeyError("x"), ValueError("x")):
        with pytest.raises(type(error)):
            monkeypatch.setattr(cli, "run", lambda arguments, error=error: (_ for _ in ()).throw(error))
            call("presets")


# From training to the report -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """MuLAN with the paper's latent, and VDM."""
    folder = tmp_path_factory.mktemp("runs")
    for name, run in (("mulan-paper-digits", "a"), ("vdm-digits", "b")):
        made = tiny(name, training__steps=30, training__evaluate_every=80, training__save_every=80, training__keep=9)
        assert call("train", name, "--out", folder / run, *flags(made)) == 0
    return folder / "a", folder / "b"


def written(run: Path, name: str) -> dict[str, Any]:
    return json.loads((run / "evaluations" / f"{name}.json").read_text())


def columns(path: Path) -> dict[str, np.ndarray]:
    with open(path) as file:
        rows = list(csv.DictReader(file))
    return {name: np.array([float(row[name]) for row in rows]) for name in rows[0]}


FEW = ("--images", 12, "--times", 2)


def test_train_evaluate_sample_report(
    runs: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, _ = runs
    assert call("evaluate", run, *FEW, "--per-image", tmp_path / "each.csv") == 0
    out = capsys.readouterr().out
    record = written(run, "test-best-ema-vlb-2x2-12")
    assert f"written: {run}/evaluations/test-best-ema-vlb-2x2-12.json, {tmp_path}/each.csv" in out

    # The record against the library's own figure.
    model = checkpoints.load_model(run, "best")
    expected = likelihood.vlb(model, load("digits").images["test"][:12], times_per_shift=2, shifts=2)
    assert record["bits_per_dim"] == {"mean": expected.mean, "standard_error": expected.standard_error}
    assert record["draws_error"] == expected.draws_error
    assert record["as_published"] == vars(expected.as_published)
    assert record["as_published"]["mean"] < record["bits_per_dim"]["mean"]  # the charge that makes it a bound is larger
    assert record["terms"] == {name: vars(value) for name, value in expected.terms.items()}
    assert set(record["terms"]) == {"prior", "reconstruction", "diffusion", "latent", "valid_latent"}
    total = sum(value["mean"] for name, value in record["terms"].items() if name != "latent")
    assert record["bits_per_dim"]["mean"] == pytest.approx(total, rel=1e-12)
    assert record["images"] == 12 and record["split"] == "test" and record["weights"] == "ema"
    assert record["data"] == {"name": "digits", "version": "1"}
    assert record["checkpoint"] == {"step": checkpoints.read_checkpoint(run, "best").step, "name": "best"}
    assert record["settings"] == {
        "method": "vlb", "times_per_shift": 2, "shifts": 2, "steps": 0, "seed": 0, "batch": 256,
        "decoder": "levels",
    }  # fmt: skip
    assert set(record["versions"]) == {"nelbo", "torch", "numpy", "python"}
    assert record["latent_use"]["draws"] > 1 and record["comparison"] is None and record["seconds"] > 0
    assert len(record["baselines"]) >= 4 and all(1 < b["bits_per_dim"] < 20 for b in record["baselines"])
    assert record["baselines"][0]["name"] == "pixel histogram"
    bins = record["by_time"]
    assert len(bins["t"]) == len(bins["mean"]) == len(bins["standard_error"]) > 5

    # The table shows them.
    def shown(label: str) -> list[str]:
        (line,) = (line for line in out.splitlines() if re.match(rf"│ *{re.escape(label)} *│", line))
        return re.findall(r"-?\d+\.\d{4}", line)

    figure = record["bits_per_dim"]
    assert shown("bound (VLB, continuous time)") == [f"{figure['mean']:.4f}", f"{figure['standard_error']:.4f}"]
    assert shown("of which the draws' own") == [f"{record['draws_error']:.4f}"]
    assert shown("as published (not a bound)")[0] == f"{record['as_published']['mean']:.4f}"
    labels = {"latent": "latent as charged there", "valid_latent": "latent"}
    for name, value in record["terms"].items():
        assert shown(labels.get(name, name)) == [f"{value['mean']:.4f}", f"{value['standard_error']:.4f}"]
    for baseline in record["baselines"]:
        assert shown(baseline["name"])[0] == f"{baseline['bits_per_dim']:.4f}"
    step = record["checkpoint"]["step"]
    assert out.splitlines()[0] == f"{run}, step {step}, ema weights: 12 of 300 test images of digits (version 1)"
    assert all(len(line) < 100 for line in out.splitlines()[1:-1])
    assert "were measured on all 300 images" in out

    # Image by image.
    table = columns(tmp_path / "each.csv")
    assert list(table) == ["index", "bits_per_dim", *record["terms"], "standard_error"]
    assert table["index"].tolist() == list(range(12))
    assert table["bits_per_dim"].mean() == pytest.approx(figure["mean"], abs=1e-8)
    assert table["bits_per_dim"].std(ddof=1) / 12**0.5 == pytest.approx(figure["standard_error"], abs=1e-8)
    assert (table["standard_error"] ** 2).sum() ** 0.5 / 12 == pytest.approx(record["draws_error"], abs=1e-8)
    for name, value in record["terms"].items():
        assert table[name].mean() == pytest.approx(value["mean"], abs=1e-8)
    arrays = np.load(run / "evaluations" / "test-best-ema-vlb-2x2-12.npz")
    assert arrays["bits_per_dim"] == pytest.approx(table["bits_per_dim"], abs=1e-8)

    assert call("sample", run, "--count", 6, "--steps", 4) == 0
    assert call("report", run, "--out", tmp_path / "page.html") == 0
    page = (tmp_path / "page.html").read_text()
    assert f"{figure['mean']:.3f}"[:4] in page and "<html" in page
    assert f"written: {tmp_path}/page.html" in capsys.readouterr().out
    assert call("report", *runs) == 0
    assert (run / "report.html").stat().st_size > 10_000


def test_a_comparison_is_paired(runs: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, other = runs
    assert call("evaluate", run, *FEW, "--compare", run) == 0
    record = written(run, "test-best-ema-vlb-2x2-12")
    assert record["comparison"]["difference"] == {"mean": 0.0, "standard_error": 0.0}
    capsys.readouterr()
    assert call("evaluate", run, *FEW, "--compare", other, "--per-image", tmp_path / "a.csv") == 0
    out = capsys.readouterr().out
    record = written(run, "test-best-ema-vlb-2x2-12")
    assert call("evaluate", other, *FEW, "--per-image", tmp_path / "b.csv") == 0
    a, b = (columns(tmp_path / f"{name}.csv")["bits_per_dim"] for name in "ab")
    difference = record["comparison"]["difference"]
    assert difference["mean"] == pytest.approx((a - b).mean(), abs=1e-8)
    assert difference["standard_error"] == pytest.approx((a - b).std(ddof=1) / 12**0.5, abs=1e-8)
    assert record["comparison"]["bits_per_dim"]["mean"] == pytest.approx(b.mean(), abs=1e-8)
    assert record["comparison"]["run"] == str(other)
    line = next(line for line in out.splitlines() if "difference, paired" in line)
    assert f"{difference['mean']:.4f}" in line and f"{difference['standard_error']:.4f}" in line


def test_the_figure_does_not_depend_on_the_batch(runs: tuple[Path, Path]) -> None:
    figures = []
    for batch in (1, 7, 256):
        assert call("evaluate", runs[0], "--images", 9, "--times", 3, "--shifts", 3, "--batch", batch) == 0
        figures.append(np.load(runs[0] / "evaluations" / "test-best-ema-vlb-3x3-9.npz")["bits_per_dim"])
    for values in figures[1:]:
        assert np.abs(values - figures[0]).max() < 1e-6 * 10  # per image; images differ by about 1
        assert abs(values.mean() - figures[0].mean()) < 1e-6


def test_every_option_of_evaluate_does_what_it_says(runs: tuple[Path, Path], tmp_path: Path) -> None:
    run = runs[1]
    first = checkpoints.list_checkpoints(run)[0]
    data = load("digits")

    def bound(name: str, *options: object) -> dict[str, Any]:
        assert call("evaluate", run, "--images", 8, "--times", 2, *options) == 0
        return written(run, name)

    def expected(which: str | int = "best", kind: str = "ema", split: str = "test", **settings: Any) -> float:
        model = checkpoints.load_model(run, which, kind)
        return likelihood.vlb(model, data.images[split][:8], **{"times_per_shift": 2, "shifts": 2, **settings}).mean

    step = int(first.name[5:])
    cases = {
        "test-best-ema-vlb-2x2-8": ((), expected()),
        f"test-{step}-ema-vlb-2x2-8": (("--checkpoint", step), expected(step)),
        "test-last-raw-vlb-2x2-8": (("--checkpoint", "last", "--weights", "raw"), expected("last", "raw")),
        "validation-best-ema-vlb-2x2-8": (("--split", "validation"), expected(split="validation")),
        "train-best-ema-vlb-2x2-8": (("--split", "train"), expected(split="train")),
        "test-best-ema-vlb-5x2-8": (("--times", 5), expected(times_per_shift=5)),
        "test-best-ema-vlb-2x1-8": (("--shifts", 1), expected(shifts=1)),
        "test-best-ema-vlb-2x2-T10-8": (("--steps", 10), expected(steps=10)),
        "test-best-ema-vlb-2x2-seed3-8": (("--seed", 3), expected(seed=3)),
    }
    for name, (options, value) in cases.items():
        record = bound(name, *options)
        assert record["bits_per_dim"]["mean"] == value, name
        assert (record["draws_error"] is None) == (record["settings"]["shifts"] == 1)
    assert len({value for _, value in cases.values()}) == len(cases)
    assert written(run, f"test-{step}-ema-vlb-2x2-8")["checkpoint"] == {"step": step, "name": str(step)}

    # Other images of the same shape: the first eight of the test split of a file.
    np.savez(tmp_path / "mine.npz", train=data.images["train"][:20], validation=data.images["validation"][:4],
             test=data.images["test"][:8], levels=17)  # fmt: skip
    version = load(str(tmp_path / "mine.npz")).version
    record = bound(f"test-best-ema-vlb-2x2-8-mine.npz-{version}", "--data", tmp_path / "mine.npz")
    assert record["bits_per_dim"]["mean"] == cases["test-best-ema-vlb-2x2-8"][1]
    assert record["data"] == {"name": "mine.npz", "version": version}


def test_one_image_and_few_images_have_no_error_bar_and_no_traceback(
    runs: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    np.savez(tmp_path / "three.npz", images=load("digits").images["test"][:3], levels=17)
    for run in runs:
        assert call("evaluate", run, "--data", tmp_path / "three.npz", "--times", 1, "--shifts", 1) == 0
        out = capsys.readouterr().out
        assert "needs --shifts 2" in out and "nan" not in out
        (path,) = (run / "evaluations").glob("*three.npz*.json")
        assert json.loads(path.read_text())["bits_per_dim"]["standard_error"] is None


def test_a_label_latent_is_evaluated_with_the_labels(place: Path) -> None:
    assert call("evaluate", place / "label", "--images", 5, "--times", 1) == 0
    data, model = load("digits"), checkpoints.load_model(place / "label")
    assert data.labels is not None
    expected = likelihood.vlb(
        model, data.images["test"][:5], labels=data.labels["test"][:5], times_per_shift=1, shifts=2
    )
    record = written(place / "label", "test-best-ema-vlb-1x2-5")
    assert record["bits_per_dim"]["mean"] == expected.mean
    assert record["terms"]["latent"]["mean"] == pytest.approx(np.log2(10) / 64, rel=1e-6)


# Samples -------------------------------------------------------------------------------------------------------------


def test_samples_are_files_that_repeat(
    runs: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = runs[0]
    assert call("sample", run, "--count", 5, "--steps", 6, "--trajectory", 3) == 0
    step = checkpoints.read_checkpoint(run, "best").step
    stem = run / "samples" / f"step-{step}-ancestral-6-seed0-5"
    paths = [Path(f"{stem}{end}") for end in (".npz", ".png", "-trajectory.png")]
    assert capsys.readouterr().out == "written: " + ", ".join(map(str, paths)) + "\n"
    arrays = np.load(paths[0])
    assert arrays["images"].shape == (5, 1, 8, 8) and arrays["images"].dtype == np.uint8
    assert arrays["images"].max() <= 16 and arrays["levels"] == 17
    assert arrays["trajectory"].shape == (6, 3, 1, 8, 8)
    assert arrays["trajectory_t"] == pytest.approx([5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6, 0])
    # The pictures show the arrays: levels 0 .. 16 as grey 0 .. 255, in a grid with lines between.
    picture, strip = (np.array(Image.open(path)) for path in paths[1:])
    scale = 8
    assert picture.shape == ((2 * 9 + 1) * scale, (3 * 9 + 1) * scale)
    for i, image in enumerate(arrays["images"][:, 0]):
        top, left = (1 + i // 3 * 9) * scale, (1 + i % 3 * 9) * scale
        shown = picture[top : top + 8 * scale : scale, left : left + 8 * scale : scale]
        assert (shown == np.round(image.astype(float) * 255 / 16)).all()
    assert strip.shape == ((3 * 9 + 1) * scale, (6 * 9 + 1) * scale)
    corner = strip[(1 + 2 * 9) * scale :: scale, (1 + 5 * 9) * scale :: scale][:8, :8]
    assert (corner == np.round(arrays["trajectory"][5, 2, 0].astype(float) * 255 / 16)).all()

    before = {path: path.read_bytes() for path in paths}
    again = np.load(paths[0])["images"]
    assert call("sample", run, "--count", 5, "--steps", 6, "--trajectory", 3) == 0
    assert {path: path.read_bytes() for path in paths} == before

    def images(*options: object) -> np.ndarray:
        assert call("sample", run, "--steps", 6, "--out", tmp_path / "x", *options) == 0
        return np.load(tmp_path / "x.npz")["images"]

    assert (images("--count", 5) == again).all()  # and in the library:
    assert (nelbo.sample(nelbo.load(run), 5, steps=6).numpy() == again).all()
    assert (images("--count", 2) == again[:2]).all()  # sample k depends neither on the count nor on the batch
    assert (images("--count", 9, "--batch", 2)[:5] == again).all()
    assert not (tmp_path / "x-trajectory.png").read_bytes() == before[paths[2]]
    for options in (("--seed", 1), ("--steps", 7), ("--weights", "raw"), ("--clip",), ("--decoding", "categorical")):
        assert (images("--count", 5, *options) != again).any(), options
    assert (images("--count", 5, "--decoding", "categorical", "--seed", 2) ==
            nelbo.sample(nelbo.load(run), 5, steps=6, categorical=True, seed=2).numpy()).all()  # fmt: skip


def test_names_of_samples_say_what_differs(runs: tuple[Path, Path]) -> None:
    for options in (("--clip",), ("--decoding", "categorical"), ("--weights", "raw"), ("--seed", 4), ("--steps", 3)):
        before = set((runs[1] / "samples").glob("*"))
        assert call("sample", runs[1], "--count", 2, "--steps", 2, "--trajectory", 0, *options) == 0
        new = {path.suffix for path in set((runs[1] / "samples").glob("*")) - before}
        assert new == {".npz", ".png"}, options


# People --------------------------------------------------------------------------------------------------------------


def test_progress_off_a_terminal_is_a_few_plain_lines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = tiny(training__steps=8, training__evaluate_every=0)
    assert call("train", "vdm-digits", "--out", tmp_path / "run", *flags(made)) == 0
    shown = capsys.readouterr()
    assert re.fullmatch(r"training 8/8: \d\.\d{3} bits/dim, [\d,]+ images/s\n", shown.err)
    assert "\x1b" not in shown.out + shown.err
    assert shown.out.splitlines()[-1] == f"starting; everything goes to {tmp_path / 'run'}/"


def test_long_jobs_say_how_far_they_are(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from nelbo import progress

    now = 0.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    with progress.Progress(every=10) as bar:
        for done in (100, 120, 140, 300, 400):
            bar.update("runs/a", done, 400, f"{done / 100:.2f} bits/dim" if done > 100 else "")
            now += 8
        bar.update("sampling", 0, 3)
        bar.update("sampling", 3, 3, rate=1200.4)
    assert capsys.readouterr().err.splitlines() == [
        "runs/a 140/400: 1.40 bits/dim, 2.5 images/s, 0:01:44 left",
        "runs/a 400/400: 4.00 bits/dim, 9.4 images/s",
        "sampling 3/3: 1,200 images/s",
    ]


def terminal(command: list[str], until: str = "") -> tuple[str, int]:
    """What a command shows in a terminal of 100 columns, and its status; Ctrl-C once ``until`` was shown."""
    child, screen = pty.fork()
    if not child:
        os.execve(command[0], command, {**ENVIRONMENT, "TERM": "xterm-256color"})
    shown, pressed, begun = b"", not until, time.monotonic()
    while time.monotonic() - begun < 120:
        if not select.select([screen], [], [], 0.1)[0]:
            continue
        try:
            more = os.read(screen, 65536)
        except OSError:  # Linux: the other side is closed
            break
        if not more:
            break
        shown += more
        if not pressed and re.search(until, plain(shown.decode(errors="replace"))):
            os.write(screen, b"\x03")
            pressed = True
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    os.close(screen)
    return shown.decode(errors="replace"), status


def plain(shown: str) -> str:
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", shown)


def test_in_a_terminal_training_shows_a_bar_and_ctrl_c_saves(tmp_path: Path) -> None:
    made = tiny(training__steps=3000, training__evaluate_every=80)
    command = nelbo_command("train", "vdm-digits", "--out", tmp_path / "run", *flags(made))
    shown, status = terminal(command, until=r" 3\d/3000 ")
    assert status == 130
    bar = r"training [━╸╺]+ +3\d/3000 \d\.\d{3} bits/dim, [\d,]+ images/s \d:\d\d:\d\d \d:\d\d:\d\d left"
    assert re.search(bar, plain(shown)), plain(shown)[-2000:]
    assert re.search(r"step 10: \d\.\d{4} ± \d\.\d{4} bits/dim on validation, the best so far\r\n", plain(shown))
    last = [line for line in plain(shown).splitlines() if line.strip()][-1]
    assert re.search(r"nelbo: stopped by SIGINT after step \d+, saved; the same command continues", last)
    assert shown.count("\x1b[?25l") == shown.count("\x1b[?25h")  # the cursor is back
    assert checkpoints.read_checkpoint(tmp_path / "run").step >= 30
