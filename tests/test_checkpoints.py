"""Checkpoints: what is changed, cut off, foreign or missing is refused by name, and nothing loaded is executed."""

import json
import os
import pickle
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import nelbo
from nelbo import checkpoints
from nelbo.errors import UserError
from nelbo.training import train
from tiny import change, entries, files, tiny

LAST = "checkpoints/step-000000012"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("trained") / "run"
    train(tiny(training__keep=9), run, say=lambda line: None)
    return run


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """A run of 12 steps, to be spoilt."""
    return Path(shutil.copytree(trained, tmp_path / "run"))


def test_a_model_comes_back_as_it_was_saved(run: Path) -> None:
    for kind in ("ema", "raw"):
        model = nelbo.load(run, "last", kind)
        saved = load_file(run / LAST / checkpoints.WEIGHTS[kind])
        assert model.state_dict().keys() == saved.keys()
        assert all(torch.equal(value, saved[name]) for name, value in model.state_dict().items())
        assert not model.training and model.shape == (1, 8, 8) and model.levels == 17
    raw = nelbo.load(run, "last", "raw").state_dict()
    assert any(not torch.equal(value, raw[name]) for name, value in nelbo.load(run, "last").state_dict().items())


def test_meta_is_readable_and_says_what_is_there(run: Path) -> None:
    meta = json.loads((run / LAST / "meta.json").read_text())
    assert (meta["format"], meta["step"], meta["images"]) == (1, 12, 96)
    assert set(meta["files"]) == {"weights.safetensors", "ema.safetensors", "optimizer.safetensors"}
    for name, entry in meta["files"].items():
        assert (run / LAST / name).stat().st_size == entry["bytes"]
    assert meta["seconds"] > 0 and meta["versions"]["torch"] == torch.__version__


def test_checkpoints_are_named_by_best_last_or_step(run: Path) -> None:
    meta = run / LAST / "meta.json"
    changed = json.loads(meta.read_text()) | {"best": {"step": 8, "bits_per_dim": 5.0}}
    meta.write_text(json.dumps(changed))
    assert checkpoints.read_checkpoint(run, "best").step == 8
    assert checkpoints.read_checkpoint(run, "last").step == 12
    assert checkpoints.read_checkpoint(run, 3).step == checkpoints.read_checkpoint(run, "3").step == 3
    meta.write_text(json.dumps(changed | {"best": None}))  # never evaluated
    assert checkpoints.read_checkpoint(run, "best").step == 12
    for which, message in (
        (5, "has no checkpoint step-000000005; the choices are best, last, 3, 4, 6, 8, 9, 12"),
        ("newest", "--checkpoint must be best, last or a step, got 'newest'"),
    ):
        with pytest.raises(UserError, match=message):
            checkpoints.read_checkpoint(run, which)
    with pytest.raises(UserError, match="weights must be one of raw, ema, got 'average'"):
        checkpoints.load_model(run, weights="average")


def test_only_whole_checkpoints_count(run: Path) -> None:
    (run / "checkpoints" / "step-notes").mkdir()
    (run / "checkpoints" / ".tmp-step-000000015").mkdir()
    (run / "checkpoints" / "step-000000099").write_text("a file")
    assert checkpoints.read_checkpoint(run, "last").step == 12
    shutil.rmtree(run / "checkpoints")
    with pytest.raises(UserError, match="run has no checkpoint yet"):
        checkpoints.read_checkpoint(run)


class Boom:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.folder),)


def foreign(run: Path) -> None:
    """Another program's weights, with a meta.json that vouches for them."""
    vouch(run, "ema.safetensors", lambda path: save_file({"conv1.weight": torch.zeros(3)}, path))


def vouch(run: Path, name: str, write: Callable[[Path], object]) -> None:
    """Write a file and make meta.json agree with it."""
    import hashlib

    write(run / LAST / name)
    content = (run / LAST / name).read_bytes()
    meta = json.loads((run / LAST / "meta.json").read_text())
    meta["files"][name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (run / LAST / "meta.json").write_text(json.dumps(meta))


def flip(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def edit(path: Path, changes: dict[str, Any]) -> None:
    values = json.loads(path.read_text())
    for key, value in changes.items():
        where, *rest = key.split(".")
        target = values
        while rest:
            target, (where, *rest) = target[where], rest
        if value is ...:
            del target[where]
        else:
            target[where] = value
    path.write_text(json.dumps(values))


def narrower(run: Path) -> None:
    tensors = load_file(run / LAST / "ema.safetensors")
    name = "network.conv_out.weight"
    vouch(run, "ema.safetensors", lambda path: save_file(tensors | {name: tensors[name][:, :4].contiguous()}, path))


EMA = LAST + "/ema.safetensors"
# What is done to a run, and what loading its last checkpoint then says.
DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "cut off": (lambda run: os.truncate(run / EMA, 1000), "ema.safetensors is truncated or was changed: 1000 bytes"),
    "empty": (lambda run: os.truncate(run / EMA, 0), "ema.safetensors is truncated or was changed: 0 bytes"),
    "a flipped bit in the middle": (lambda run: flip(run / EMA, -1000), "ema.safetensors is truncated or was changed"),
    "a flipped bit in the header": (lambda run: flip(run / EMA, 3), "ema.safetensors is truncated or was changed"),
    "foreign safetensors": (
        lambda run: save_file({"x": torch.zeros(3)}, run / EMA), "ema.safetensors is truncated or was changed"),
    "foreign safetensors, vouched for": (foreign, r"012 lacks \d+ tensors, among them .*another architecture"),
    "another width": (narrower, r"conv_out.weight has shape \(1, 4, 3, 3\), the model \(1, 8, 3, 3\): another arch"),
    "a tensor too many": (
        lambda run: vouch(run, "ema.safetensors", lambda p: save_file(load_file(p) | {"x": torch.zeros(1)}, p)),
        "has unknown 1 tensors, among them x: another architecture"),
    "no weights": (lambda run: (run / EMA).unlink(), "cannot read .*ema.safetensors: No such file"),
    "weights not listed": (
        lambda run: edit(run / LAST / "meta.json", {"files": {}}), "step-000000012 has no ema.safetensors; it holds"),
    "no meta.json": (lambda run: (run / LAST / "meta.json").unlink(), "cannot read .*meta.json: No such file"),
    "meta.json cut off": (lambda run: os.truncate(run / LAST / "meta.json", 50), "meta.json is not readable JSON"),
    "meta.json in bytes": (
        lambda run: (run / LAST / "meta.json").write_bytes(b"\xff\xfe\x00"), "meta.json is not readable JSON"),
    "meta.json a list": (lambda run: (run / LAST / "meta.json").write_text("[1]"), "meta.json has format 'list'"),
    "meta.json of the future": (
        lambda run: edit(run / LAST / "meta.json", {"format": 2}), "has format 2; this version of nelbo reads"),
    "meta.json without a step": (
        lambda run: edit(run / LAST / "meta.json", {"step": ...}), "step must be of type int, got None"),
    "meta.json with a strange file": (
        lambda run: edit(run / LAST / "meta.json", {"files": {"ema.safetensors": 3}}),
        r"files.ema.safetensors.bytes must be of type int"),
    "best of another type": (lambda run: edit(run / LAST / "meta.json", {"best": 7}), "best.step must be of type int"),
    "no run.json": (lambda run: (run / "run.json").unlink(), "is not a run of nelbo: it holds no run.json"),
    "run.json cut off": (lambda run: os.truncate(run / "run.json", 100), r"run.json is not readable JSON .*cut off"),
    "run.json of another program": (
        lambda run: (run / "run.json").write_text('{"epochs": 3}'), "run.json has format None; this version of nelbo"),
    "run.json without a configuration": (
        lambda run: edit(run / "run.json", {"config": ...}), "run.json: config must be of type dict, got None"),
    "run.json with an unknown field": (
        lambda run: edit(run / "run.json", {"config.latent.flavour": 3}),
        "run.json: unknown field latent.flavour; the choices are kind, size"),
    "run.json with a wrong choice": (
        lambda run: edit(run / "run.json", {"config.path": "curved"}),
        "run.json: path must be one of vp, straight, got 'curved'"),
    "run.json with a wrong type": (
        lambda run: edit(run / "run.json", {"config.training.batch": "8"}),
        "run.json: training.batch must be of type int, got '8'"),
    "run.json without a shape": (
        lambda run: edit(run / "run.json", {"data.shape": ...}), "data.shape must be of type list, got None"),
    "run.json with a strange shape": (
        lambda run: edit(run / "run.json", {"data.shape": [1, 8]}), "data.shape must be channels, height and width"),
    "run.json of another network": (
        lambda run: edit(run / "run.json", {"config.network.levels": 2}), "tensors, among them .*another arch"),
    "a pickle": (
        lambda run: (run / EMA).write_bytes(pickle.dumps(Boom(run / "boom"))), "is truncated or was changed"),
    "a pickle, vouched for": (
        lambda run: vouch(run, "ema.safetensors", lambda path: path.write_bytes(pickle.dumps(Boom(run / "boom")))),
        "ema.safetensors is not a safetensors file"),
    "torch.save, vouched for": (
        lambda run: vouch(run, "ema.safetensors", lambda path: torch.save(Boom(run / "boom"), path)),
        "ema.safetensors is not a safetensors file"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_named_and_changes_nothing(damage: str, run: Path) -> None:
    do, message = DAMAGE[damage]
    do(run)
    before = entries(run)
    with pytest.raises(UserError, match=message) as error:
        nelbo.load(run, "last")
    assert "\n" not in str(error.value)
    assert entries(run) == before and not (run / "boom").exists()


@pytest.mark.parametrize("kind", ["optimizer", "weights", "ema"])
def test_a_damaged_last_checkpoint_stops_a_continuation_and_the_one_before_serves(kind: str, run: Path) -> None:
    flip(run / LAST / f"{kind}.safetensors", -100)
    longer, before = change(tiny(training__keep=9), {"training.steps": 15}), entries(run)
    with pytest.raises(
        UserError, match=rf"{kind}.safetensors is truncated .*or remove that folder to go on from the one"
    ):
        train(longer, run, say=lambda line: None)
    assert entries(run) == before
    shutil.rmtree(run / LAST)
    train(longer, run, say=lambda line: None)
    assert checkpoints.read_checkpoint(run).step == 15


def test_a_run_must_be_there(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "folder").mkdir()
    for name, message in (
        ("nowhere", "no such run: .*nowhere; `nelbo train PRESET --out .*nowhere` makes one"),
        ("file", "file is a file, not a run folder"),
        ("folder", "folder is not a run of nelbo: it holds no run.json"),
    ):
        with pytest.raises(UserError, match=message):
            nelbo.load(tmp_path / name)


# Writing -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fails", ["fsync", "replace", "open"])
def test_a_file_is_replaced_as_a_whole_or_not_at_all(
    fails: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "deep" / "file.json"
    checkpoints.write_aside(path, "old")
    seen: list[bytes] = []

    def fail(*arguments: Any, **keywords: Any) -> Any:
        seen.append(path.read_bytes())
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("builtins.open" if fails == "open" else f"os.{fails}", fail)
        with pytest.raises(UserError, match=r"cannot write .*file.json: No space left on device"):
            checkpoints.write_aside(path, "new")
    assert files(tmp_path) == {"deep/file.json": b"old"} and len(seen) < 2
    checkpoints.write_aside(path, b"new")
    assert files(tmp_path) == {"deep/file.json": b"new"}


def test_a_folder_where_a_file_should_be_and_a_file_where_a_folder_should_be(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match=r"cannot write .*folder: Is a directory"):
        checkpoints.write_aside(tmp_path / "folder", "x")
    with pytest.raises(UserError, match=r"cannot write .*file/x: (Not a directory|File exists)"):
        checkpoints.write_aside(tmp_path / "file" / "x", "x")
    assert entries(tmp_path) == {"folder": None, "file": b"x"}


def test_json_keeps_every_digit_and_has_no_nan(tmp_path: Path) -> None:
    values = {"a": 0.1 + 0.2, "b": [float("nan"), float("inf"), 1], "c": (1e-300,), 3: None}
    checkpoints.write_json(tmp_path / "x.json", values)
    assert checkpoints.read_json(tmp_path / "x.json") == {
        "a": 0.1 + 0.2,
        "b": [None, None, 1],
        "c": [1e-300],
        "3": None,
    }


def small(step: int, best: int | None, run: Path, keep: int) -> None:
    best_entry = None if best is None else {"step": best, "bits_per_dim": 1.0}
    checkpoints.save_checkpoint(
        run, {"a.safetensors": {"x": torch.full((2,), step)}}, {"step": step, "best": best_entry}, keep
    )


def test_the_last_few_and_the_best_are_kept(tmp_path: Path) -> None:
    for step, best in ((1, None), (2, 2), (3, 2), (4, 2), (5, 5), (6, 5), (7, 5)):
        small(step, best, tmp_path, keep=2)
        kept = [int(p.name[5:]) for p in checkpoints.list_checkpoints(tmp_path)]
        assert kept == sorted({*range(max(1, step - 1), step + 1), *([best] if best else [])}), step
    tensors = checkpoints.load_tensors(checkpoints.read_checkpoint(tmp_path, "best"), "a.safetensors")
    assert tensors["x"].tolist() == [5, 5]
    assert not [name for name in entries(tmp_path) if "/." in name]


def test_what_a_killed_save_leaves_is_cleaned_up_and_nothing_else(tmp_path: Path) -> None:
    small(1, None, tmp_path, keep=2)
    before = entries(tmp_path)
    for name in (".tmp-step-000000002", ".old-step-000000000"):
        (tmp_path / "checkpoints" / name).mkdir()
        (tmp_path / "checkpoints" / name / "weights.safetensors").write_bytes(b"half")
    (tmp_path / ".run.json.tmp-123").write_text("half")
    (tmp_path / ".mine").write_text("kept")
    checkpoints.clean_up(tmp_path)
    assert entries(tmp_path) == before | {".mine": b"kept"}


def test_arrays_with_pickles_are_not_unpickled(tmp_path: Path) -> None:
    array = np.array([Boom(tmp_path / "boom")], dtype=object)
    np.save(tmp_path / "images.npy", array, allow_pickle=True)
    with pytest.raises(UserError, match=re.escape("images.npy")):
        train(tiny(data__source=str(tmp_path / "images.npy")), tmp_path / "run", say=lambda line: None)
    assert not (tmp_path / "boom").exists() and not (tmp_path / "run").exists()
