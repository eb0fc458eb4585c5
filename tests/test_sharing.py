"""Shared models: the folder, its card, the hub by a stand-in, and what is refused."""

import errno
import hashlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

import nelbo
from hub import OWNER, TOKEN, Repository, environment, stand_in
from nelbo import checkpoints, cli, evaluation, fid, pictures, sharing
from nelbo.errors import UserError
from nelbo.resolve import resolve
from nelbo.training import train
from nelbo.verbs import share
from test_cli import documented, words
from test_docs import ROOT, snippets
from tiny import entries, files, tiny

# huggingface_hub 2 uploads by a spelling of httpx2's that warns.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=")
SETTINGS = evaluation.Settings(images=6, times=2)
ODE = evaluation.Settings(method="ode", images=2, least_steps=8, rtol=0.05, atol=0.05)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A MuLAN with the paper's posterior, whose figures come twice; evaluated three ways, and sampled from."""
    run = tmp_path_factory.mktemp("trained") / "run"
    train(tiny("mulan-digits", latent__posterior="paper"), run, preset="mulan-digits", say=lambda line: None)
    evaluation.evaluate(run, SETTINGS)
    evaluation.evaluate(run, replace(SETTINGS, weights="raw"))
    evaluation.evaluate(run, ODE)
    assert cli.main(["sample", str(run), "--count", "5", "--steps", "3", "--trajectory", "0"]) == 0
    return run


@pytest.fixture
def run(trained, tmp_path):
    return shutil.copytree(trained, tmp_path / "run")


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A stand-in that huggingface_hub talks to in this process, with an empty cache and a login."""
    import huggingface_hub
    from huggingface_hub import constants

    with stand_in() as hub:
        for name, value in environment(hub, tmp_path / "home").items():
            monkeypatch.setenv(name, value)
        for name, now in {
            "ENDPOINT": hub.url, "HUGGINGFACE_CO_URL_TEMPLATE": hub.url + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HUB_CACHE": str(tmp_path / "home/hub"), "HF_HUB_DISABLE_XET": True,
        }.items():  # fmt: skip
            monkeypatch.setattr(constants, name, now)
        huggingface_hub.close_session()  # the next one heeds NO_PROXY
        yield hub


def call(*arguments):
    return cli.main([str(a) for a in arguments])


def card(folder):
    from huggingface_hub import ModelCard

    return ModelCard.load(folder / "README.md")


def change(path, **fields):
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def same_weights(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# The folder ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", ["ema", "raw"])
def test_the_weights_are_the_checkpoints_bit_for_bit(trained, tmp_path, weights):
    folder = nelbo.save_pretrained(trained, tmp_path / "shared", weights=weights)
    assert sorted(files(folder)) == sorted(sharing.FILES) if weights == "ema" else "samples.png" not in files(folder)
    checkpoint = checkpoints.read_checkpoint(trained, "best")
    content = (folder / "model.safetensors").read_bytes()
    assert content == (checkpoint.path / checkpoints.WEIGHTS[weights]).read_bytes()
    said = json.loads((folder / "config.json").read_text())
    assert said["files"]["model.safetensors"]["sha256"] == hashlib.sha256(content).hexdigest()
    assert (said["step"], said["weights"], said["images"]) == (checkpoint.step, weights, checkpoint.step * 8)
    assert said["data"] == checkpoints.read_run(trained)["data"] and said["versions"] == checkpoint.meta["versions"]
    own = nelbo.load(trained, weights=weights)
    other = nelbo.load(trained, weights="raw" if weights == "ema" else "ema")
    for model in (nelbo.load(folder), nelbo.from_pretrained(folder), nelbo.load(folder, weights=weights)):
        assert same_weights(model, own) and not same_weights(model, other) and not model.training
    assert said["config"] == checkpoints.read_run(trained)["config"]


def evaluated(run, kind):
    """The run's own evaluation of its averaged weights, as its file has it."""
    (path,) = (p for p in (run / "evaluations").glob(f"test-best-ema-{kind}*.json") if "old" not in p.name)
    return json.loads(path.read_text())


@pytest.mark.parametrize(("kind", "settings"), [("vlb", SETTINGS), ("ode", ODE)])
def test_figures_of_a_shared_model_are_the_runs_to_the_last_digit(trained, tmp_path, monkeypatch, kind, settings):
    monkeypatch.chdir(tmp_path)
    nelbo.save_pretrained(trained, "shared")
    evaluation.evaluate("shared", settings)
    (path,) = (tmp_path / "evaluations/shared/evaluations").glob("test*.json")
    own, theirs = evaluated(trained, kind), json.loads(path.read_text())
    for key in own.keys() - {"seconds", "cost"}:
        assert theirs[key] == own[key], key
    with (
        np.load(path.with_suffix(".npz")) as found,
        np.load(trained / "evaluations" / path.with_suffix(".npz").name) as wanted,
    ):
        np.testing.assert_array_equal(found["bits_per_dim"], wanted["bits_per_dim"])
    assert sorted(p.name for p in (tmp_path / "shared").iterdir()) == sorted(sharing.FILES)


def test_the_card_has_the_figures_of_the_evaluations_and_no_others(run, tmp_path):
    for name in ("test-best-ema-vlb-2x2-6", "test-best-raw-vlb-2x2-6"):  # one of an older step, which is left out
        record = json.loads((run / f"evaluations/{name}.json").read_text())
        record["checkpoint"]["step"] -= 1
        (run / f"evaluations/{name}-old.json").write_text(json.dumps(record))
    folder = nelbo.save_pretrained(run, tmp_path / "shared")
    vlb, ode = evaluated(run, "vlb"), evaluated(run, "ode")
    shown = card(folder)
    found = [(r.metric_type, r.metric_value, r.metric_args["standard_error"]) for r in shown.data.eval_results]
    assert found == [
        (name, record[key]["mean"], record[key]["standard_error"])
        for record in (vlb, ode)
        for name, key in (("bits_per_dim", "bits_per_dim"), ("bits_per_dim_as_published", "as_published"))
    ]
    assert [r.metric_args["is_bound"] for r in shown.data.eval_results] == [True, False, False, False]
    first = shown.data.eval_results[0]
    assert (first.dataset_type, first.dataset_revision, first.dataset_split) == ("digits", "1", "test")
    assert first.metric_args["images"] == 6 and first.metric_args["images_in_split"] == 300
    assert first.metric_args["settings"] == vlb["settings"]
    rows = [line.split(" | ") for line in shown.text.splitlines() if " of test | " in line]
    assert [(row[0], row[1][:12].rstrip(","), row[2]) for row in rows] == [
        (f"| {e['mean']:.4f} ± {e['standard_error']:.4f}", kind, f"{n} of 300 of test")
        for record, own, n in ((vlb, "upper bound", 6), (ode, "estimate", 2))
        for e, kind in ((record["bits_per_dim"], own), (record["as_published"], "as published"))
    ]
    assert "2 times × 2 shifts" in rows[0][3] and "digits version 1" in rows[0][3] and "not a bound" in rows[1][1]
    references = {b["name"]: f"{b['bits_per_dim']:.4f}" for b in vlb["baselines"]}
    assert all(f"| {name} | {value}" in shown.text for name, value in references.items())


def test_without_evaluations_the_card_says_so_and_how_to_get_them(run, tmp_path, capsys):
    for path in (run / "evaluations").glob("test-best-ema*"):
        path.unlink()
    assert call("share", run, "--out", tmp_path / "shared") == 0
    said = capsys.readouterr().out
    assert f"`nelbo evaluate {run} --checkpoint 12`" in said and "step 12, ema weights" in said
    shown = card(tmp_path / "shared")
    assert shown.data.eval_results is None and "No evaluation of these weights" in shown.text
    assert not re.search(r"\d ± ", shown.text)


def test_the_front_matter_is_what_the_hub_reads(trained, tmp_path):
    folder = nelbo.save_pretrained(trained, tmp_path / "shared", license="MIT", repo="someone/tiny")
    data = card(folder).data
    assert data.datasets is None
    assert (data.library_name, data.pipeline_tag, data.license) == ("nelbo", "unconditional-image-generation", "mit")
    assert data.model_name == "tiny" and "mulan" in data.tags
    (entry,) = data.to_dict()["model-index"]
    assert entry["name"] == "tiny"
    for result in entry["results"]:
        assert result["task"] == {"type": "unconditional-image-generation"}
        assert {"type", "name", "split", "revision"} <= result["dataset"].keys()
        assert all({"type", "name", "value"} <= metric.keys() for metric in result["metrics"])
    assert 'nelbo.load("someone/tiny")' in card(folder).text
    nelbo.save_pretrained(trained, tmp_path / "other")
    assert card(tmp_path / "other").data.license is None and card(tmp_path / "other").data.model_name == "other"


def test_a_data_set_of_the_hub_is_named_as_the_hub_knows_it(run, tmp_path):
    name = "hub:someone/pictures:small"
    for path in (run / "run.json", *(run / "evaluations").glob("test-best-ema*.json")):
        change(path, data=json.loads(path.read_text())["data"] | {"name": name})
    data = card(nelbo.save_pretrained(run, tmp_path / "shared")).data
    assert data.datasets == ["someone/pictures"]
    assert {(r.dataset_type, r.dataset_name) for r in data.eval_results} == {("someone/pictures", name)}


def test_paths_of_this_machine_are_not_shared(tmp_path):
    source = tmp_path / "cats.npz"
    np.savez(source, images=np.random.default_rng(0).integers(0, 17, (40, 8, 8), np.uint8), levels=17)
    run = tmp_path / "run"
    train(tiny(data__source=str(source), training__steps=2, training__evaluate_every=0), run, say=lambda line: None)
    evaluation.evaluate(run, replace(SETTINGS, images=3))
    folder = nelbo.save_pretrained(run, tmp_path / "shared")
    for name, content in files(folder).items():
        assert str(tmp_path).encode() not in content, name
    assert resolve(folder).data == "cats.npz"
    with pytest.raises(UserError, match=r"cats\.npz"):
        evaluation.evaluate(folder, SETTINGS, out=tmp_path / "figures")
    found = evaluation.evaluate(folder, replace(SETTINGS, images=3, data=str(source)), out=tmp_path / "figures")
    own = json.loads(next((run / "evaluations").glob("test*.json")).read_text())
    assert found.record["bits_per_dim"] == own["bits_per_dim"]


def test_the_picture_is_the_newest_samples_of_these_weights(run, tmp_path):
    folder = nelbo.save_pretrained(run, tmp_path / "shared")
    with np.load(run / "samples/step-12-ancestral-3-seed0-5.npz") as arrays:
        drawn = arrays["images"]
    assert np.array_equal(np.asarray(Image.open(folder / "samples.png")), np.asarray(pictures.grid(drawn, 17)))
    assert "5 samples of these weights (`step-12-ancestral-3-seed0-5`)" in card(folder).text
    # Of other weights, of another step, between two images: not of this model, or no samples.
    for path in (run / "samples").iterdir():
        path.unlink()
    for stem in ("step-12-ancestral-3-seed0-5-raw", "step-000000011", "step-120-ancestral-3-seed0-5", "mine",
                 "step-12-ddim-3-seed0-between-1-2-5"):  # fmt: skip
        np.savez(run / "samples" / f"{stem}.npz", images=drawn, levels=17)
    nelbo.save_pretrained(run, folder)
    assert not (folder / "samples.png").exists() and "samples.png" not in card(folder).text
    nelbo.save_pretrained(run, tmp_path / "raw", weights="raw")
    assert "seed0-5-raw" in card(tmp_path / "raw").text
    np.savez(run / "samples/step-000000012.npz", images=drawn[::-1], levels=17)  # as training writes
    nelbo.save_pretrained(run, folder)
    wanted = pictures.grid(drawn[::-1], 17)
    assert np.array_equal(np.asarray(Image.open(folder / "samples.png")), np.asarray(wanted))


def test_samples_are_drawn_on_request_as_nelbo_sample_draws_them(run, tmp_path):
    shutil.rmtree(run / "samples")
    folder = nelbo.save_pretrained(run, tmp_path / "shared", draw=2)
    model = nelbo.load(run)
    wanted = nelbo.sample(model, 2, steps=256).numpy()
    assert np.array_equal(np.asarray(Image.open(folder / "samples.png")), np.asarray(pictures.grid(wanted, 17)))


# Writing -------------------------------------------------------------------------------------------------------------


def test_the_same_call_replaces_its_folder_and_nothing_else(run, tmp_path):
    folder = tmp_path / "shared"
    folder.mkdir()  # an empty one is taken
    nelbo.save_pretrained(run, folder)
    before = files(folder)
    nelbo.save_pretrained(run, folder)
    assert files(folder) == before
    nelbo.save_pretrained(run, folder, weights="raw")
    assert (
        json.loads((folder / "config.json").read_text())["weights"] == "raw" and not (folder / "samples.png").exists()
    )
    assert [p.name for p in tmp_path.iterdir() if p.name not in ("run", "shared")] == []
    (folder / "notes.txt").write_text("mine")
    kept = entries(folder)
    with pytest.raises(UserError, match=r"holds something else \(notes.txt\)"):
        nelbo.save_pretrained(run, folder)
    assert entries(folder) == kept
    (folder / "notes.txt").unlink()
    (folder / "README.md").write_text(written := (folder / "README.md").read_text() + "Mine.")
    with pytest.raises(UserError, match=r"README.md was edited since"):
        nelbo.save_pretrained(run, folder)
    assert (folder / "README.md").read_text() == written
    change(run / "run.json", created="2020-01-01T00:00:00+00:00")
    with pytest.raises(UserError, match="another run's model"):
        nelbo.save_pretrained(run, folder)
    with pytest.raises(UserError, match="holds something else"):
        nelbo.save_pretrained(run, run)
    with pytest.raises(UserError, match="is a file"):
        nelbo.save_pretrained(run, run / "run.json")


@pytest.mark.parametrize("name", ["model.safetensors", "README.md"])
def test_a_write_that_fails_leaves_what_was_there(run, tmp_path, monkeypatch, name):
    folder, write = tmp_path / "shared", checkpoints._write

    def full(path, content):
        if name in path.name:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(path, content)

    for earlier in ({}, None):
        if earlier is None:
            nelbo.save_pretrained(run, folder, weights="raw")
            earlier = files(folder)
        with monkeypatch.context() as broken:
            broken.setattr(checkpoints, "_write", full)
            with pytest.raises(UserError, match="No space left on device"):
                nelbo.save_pretrained(run, folder)
        assert (files(folder) if folder.exists() else {}) == earlier
        assert {p.name for p in tmp_path.iterdir()} <= {"run", "shared"}


def test_a_replacement_that_is_killed_between_its_renames_is_undone(run, tmp_path, monkeypatch):
    folder, replace_file = nelbo.save_pretrained(run, tmp_path / "shared"), os.replace
    before = files(folder)

    def killed(source, target):
        if str(target) == str(folder):
            raise KeyboardInterrupt
        replace_file(source, target)

    with monkeypatch.context() as broken:
        broken.setattr(os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            nelbo.save_pretrained(run, folder, weights="raw")
    assert not folder.exists()  # as after SIGKILL; the next call brings it back before it looks
    with pytest.raises(UserError, match="hub id must be OWNER/NAME"):
        nelbo.save_pretrained(run, folder, repo="tiny")
    with pytest.raises(UserError, match="no checkpoint"):
        nelbo.save_pretrained(run, folder, checkpoint=7)
    sharing._bring_back(folder)
    assert files(folder) == before and {p.name for p in tmp_path.iterdir()} == {"run", "shared"}


@pytest.mark.parametrize(("arguments", "wanted"), [
    ((), "share needs --out"), (("--out", "s", "--private"), "--private belongs to --push"),
    (("--out", "s", "--push", "tiny"), "a hub id must be OWNER/NAME, got 'tiny'"),
    (("--out", "s", "--license", "do what you like"), "license must be an identifier"),
    (("--out", "s", "--draw", "-1"), "draw must be 0 samples or more, got -1"),
    (("--out", "s", "--checkpoint", "7"), "the choices are best, last"),
])  # fmt: skip
def test_mistakes_are_said_in_one_line_and_write_nothing(run, monkeypatch, capsys, arguments, wanted):
    monkeypatch.chdir(run.parent)
    before = entries(run.parent)
    assert call("share", "run", *arguments) == 2
    said = capsys.readouterr().err.strip()
    assert said.startswith("nelbo: ") and wanted in said and "\n" not in said, said
    assert entries(run.parent) == before


# Reading -------------------------------------------------------------------------------------------------------------


def resigned(folder, content):
    """Other weights, with a checksum that fits."""
    (folder / "model.safetensors").write_bytes(content)
    entry = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    change(folder / "config.json", files={"model.safetensors": entry})


def renamed(folder):
    from safetensors.torch import load_file, save

    tensors = load_file(folder / "model.safetensors")
    name = next(iter(tensors))
    resigned(folder, save({n if n != name else "other": t for n, t in tensors.items()}))


def reconfigured(folder, group, **fields):
    config = json.loads((folder / "config.json").read_text())["config"]
    change(folder / "config.json", config=config | {group: config[group] | fields})


def cut(path, count):
    path.write_bytes(path.read_bytes()[:count])


def flip(path):
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(bytes(content))


SPOILED = {
    "truncated": (lambda p: cut(p / "model.safetensors", 1000), "truncated or was changed: 1000 bytes"),
    "changed": (lambda p: flip(p / "model.safetensors"), "truncated or was changed"),
    "missing": (lambda p: (p / "model.safetensors").unlink(), "cannot read model.safetensors of shared"),
    "pickle": (lambda p: resigned(p, b"\x80\x04N."), "is not a safetensors file"),
    "names": (renamed, "another architecture"),
    "shape": (lambda p: reconfigured(p, "network", channels=12), "another architecture"),
    "field": (lambda p: reconfigured(p, "network", wings=2), "config.json of shared, nelbo 0.1.0: unknown field"),
    "choice": (lambda p: reconfigured(p, "latent", kind="cat"), "latent.kind must be one of"),
    "newer": (lambda p: change(p / "config.json", format=2), "format 2, and this version of nelbo"),
    "no format": (lambda p: change(p / "config.json", format=None), "format must be of type int, got None"),
    "config": (lambda p: cut(p / "config.json", 200), "not readable JSON"),
    "data": (lambda p: change(p / "config.json", data={"name": "digits"}), "data.version must be of type str"),
    "size": (lambda p: change(p / "config.json", data={
        "name": "digits", "version": "1", "levels": 17, "shape": [8, 8]}), "must be channels, height and width"),
    "foreign": (lambda p: change(p / "config.json", library="timm"), "is not a run of nelbo"),
}  # fmt: skip


@pytest.mark.parametrize("name", SPOILED)
def test_a_folder_that_is_not_what_was_shared_is_refused_in_one_line(trained, tmp_path, monkeypatch, capsys, name):
    monkeypatch.chdir(tmp_path)
    nelbo.save_pretrained(trained, "shared")
    spoil, wanted = SPOILED[name]
    spoil(tmp_path / "shared")
    assert call("evaluate", "shared", "--images", "2") == 2
    said = capsys.readouterr().err.strip()
    assert said.startswith("nelbo: ") and wanted in said and "\n" not in said, said
    with pytest.raises(UserError, match="no model that nelbo shared" if name == "foreign" else re.escape(wanted)):
        nelbo.from_pretrained("shared")


def test_a_shared_model_has_one_step_and_one_set_of_weights(trained, tmp_path, capsys):
    ema, raw = (nelbo.save_pretrained(trained, tmp_path / w, weights=w) for w in ("ema", "raw"))
    for checkpoint in ("best", "last", "12", 12):
        assert same_weights(nelbo.load(ema, checkpoint), nelbo.load(trained))
    with pytest.raises(UserError, match="of step 12 alone, and has no checkpoint 6"):
        nelbo.load(ema, 6)
    with pytest.raises(UserError, match="of ema weights alone"):
        nelbo.load(ema, weights="raw")
    assert call("sample", raw, "--count", 2, "--steps", 2, "--out", tmp_path / "x") == 2
    assert "of raw weights alone: give those, not ema" in capsys.readouterr().err
    assert call("sample", raw, "--count", 2, "--steps", 2, "--weights", "raw", "--out", tmp_path / "x") == 0
    with np.load(tmp_path / "x.npz") as arrays:
        wanted = nelbo.sample(nelbo.load(trained, weights="raw"), 2, steps=2).numpy()
        assert np.array_equal(arrays["images"], wanted)
    with pytest.raises(UserError, match="revision = 'main' belongs to a hub id"):
        nelbo.load(ema, revision="main")


def test_the_distance_of_samples_is_measured_of_a_shared_model_and_stands_on_the_card(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where the reference's statistics of a shared model go
    folder = nelbo.save_pretrained(run, tmp_path / "shared")
    settings = fid.Settings(extractor="random", count=20, splits=4, method="ddim", steps=3, reference="test")
    own = fid.evaluate(run, settings, say=lambda line: None)
    theirs = fid.evaluate(folder, settings, out=tmp_path / "fid.json", say=lambda line: None)
    assert theirs.record["fid"] == own.record["fid"] and theirs.record["samples"]["drawn"]
    fid.evaluate(run, replace(settings, run_weights="raw", seed=1), out=run / "evaluations/fid-raw.json",
                 say=lambda line: None)  # fmt: skip
    nelbo.save_pretrained(run, folder)
    (entry,) = [r for r in card(folder).data.eval_results if r.metric_type == "frechet_distance"]
    assert entry.metric_value == own.record["fid"] and "standard_error" not in entry.metric_args
    assert entry.dataset_type == "digits" and entry.metric_args["against"] == own.record["reference"]["what"]
    assert f"| {own.record['fid']:.4f} (error not known) | 20 samples (ddim, 3 steps) |" in card(folder).text
    assert own.record["warning"] in card(folder).text
    change(own.path, standard_error=0.0123456)  # as of many samples
    nelbo.save_pretrained(run, folder)
    (entry,) = [r for r in card(folder).data.eval_results if r.metric_type == "frechet_distance"]
    assert entry.metric_args["standard_error"] == 0.0123456
    assert f"| {own.record['fid']:.4f} ± 0.0123 | 20 samples" in card(folder).text


def test_a_training_starts_from_a_shared_model(trained, tmp_path):
    config = tiny("mulan-digits", latent__posterior="paper", training__steps=1, training__evaluate_every=0)
    folder = nelbo.save_pretrained(trained, tmp_path / "shared", weights="raw")
    for name, source in (("a", trained), ("b", folder)):
        train(config, tmp_path / name, init_from=source, say=lambda line: None)
    after = nelbo.load(tmp_path / "b", "last", "raw")
    assert same_weights(after, nelbo.load(tmp_path / "a", "last", "raw"))
    before, average = nelbo.load(folder).state_dict(), nelbo.load(tmp_path / "b", "last").state_dict()
    for name, value in after.named_parameters():
        torch.testing.assert_close(average[name], 0.9 * before[name] + 0.1 * value.detach(), rtol=1e-5, atol=1e-7)
    with pytest.raises(UserError, match=r"--init-optimizer needs a run or a checkpoint folder"):
        train(config, tmp_path / "c", init_from=folder, init_optimizer=True, say=lambda line: None)
    with pytest.raises(UserError, match="another architecture"):
        train(tiny("mulan-digits", network__channels=4), tmp_path / "d", init_from=folder, say=lambda line: None)


# The hub -------------------------------------------------------------------------------------------------------------


def test_what_is_pushed_is_what_is_loaded(trained, tmp_path, hub, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = nelbo.save_pretrained(trained, tmp_path / "shared", repo="someone/tiny")
    with (folder / "README.md").open("a") as text:
        text.write("\nA line by hand.\n")
    assert nelbo.push_to_hub(folder, "someone/tiny") == f"{hub.url}/someone/tiny"
    there = hub.files("someone/tiny")
    assert {name: there[name] for name in sharing.FILES} == files(folder)
    assert len(hub.repositories["someone/tiny"].commits) == 2  # the hub's own, and one for all files
    assert not hub.repositories["someone/tiny"].private
    own = nelbo.load(trained)
    assert same_weights(nelbo.load("someone/tiny"), own) and same_weights(nelbo.from_pretrained("someone/tiny"), own)
    wanted, found = evaluated(trained, "vlb"), evaluation.evaluate("someone/tiny", SETTINGS)
    assert found.record["bits_per_dim"] == wanted["bits_per_dim"] and found.record["terms"] == wanted["terms"]
    assert (tmp_path / "evaluations/tiny/evaluations").is_dir()
    assert not [asked for asked in hub.asked if "README" in asked or "samples.png" in asked]  # only what a model needs


def test_a_revision_is_loaded_and_files_that_went_are_removed(trained, tmp_path, hub):
    folder = nelbo.save_pretrained(trained, tmp_path / "shared")
    nelbo.push_to_hub(folder, "someone/tiny")
    first = hub.repositories["someone/tiny"].commits[-1][0]
    nelbo.save_pretrained(trained, folder, weights="raw")
    nelbo.push_to_hub(folder, "someone/tiny")
    assert "samples.png" not in hub.files("someone/tiny")  # the raw weights have no samples
    ema, raw = nelbo.load(trained), nelbo.load(trained, weights="raw")
    assert same_weights(nelbo.load("someone/tiny"), raw)
    for load in (nelbo.load, nelbo.from_pretrained):
        assert same_weights(load("someone/tiny", revision=first), ema)
        assert same_weights(load("someone/tiny", revision="main"), raw)
    with pytest.raises(UserError, match="Revision Not Found"):
        nelbo.load("someone/tiny", revision="v2")


def test_what_was_fetched_loads_without_a_network(trained, tmp_path, hub, monkeypatch, capsys):
    nelbo.push_to_hub(nelbo.save_pretrained(trained, tmp_path / "shared"), "someone/tiny")
    first = nelbo.load("someone/tiny")
    config = tiny("mulan-digits", latent__posterior="paper", training__steps=2, training__evaluate_every=0)
    train(config, tmp_path / "tuned", init_from="someone/tiny", say=lambda line: None)
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", "http://127.0.0.1:9/{repo_id}/resolve/{revision}/{filename}"
    )
    asked = len(hub.asked)
    assert same_weights(nelbo.load("someone/tiny"), first)
    lines = []
    longer = tiny("mulan-digits", latent__posterior="paper", training__steps=3, training__evaluate_every=0)
    train(longer, tmp_path / "tuned", init_from="someone/tiny", say=lines.append)
    assert any("continuing after step 2" in line for line in lines)
    capsys.readouterr()  # progress of the fetching
    assert call("evaluate", "someone/else") == 2
    said = capsys.readouterr().err.strip()
    assert "the hub cannot be reached, and its files are not in the cache" in said and "\n" not in said
    assert call("share", trained, "--out", tmp_path / "shared", "--push", "someone/tiny") == 2
    said = capsys.readouterr().err.strip()
    assert said == (
        f"nelbo: cannot push to someone/tiny: the hub cannot be reached; {tmp_path / 'shared'} is kept, and the same "
        "command tries again"
    )
    assert same_weights(nelbo.load(tmp_path / "shared"), first) and len(hub.asked) == asked


REFUSED = {
    "no login": ({}, "someone/tiny", "the hub knows no such login: `hf auth login`"),
    "wrong login": ({"HF_TOKEN": "hf_other"}, "someone/tiny", "the hub knows no such login"),
    "no right": ({"HF_TOKEN": TOKEN}, "another/tiny", "this login has no right to write there"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_an_upload_that_is_refused_is_said_and_leaves_the_folder(trained, tmp_path, hub, monkeypatch, capsys, name):
    login, repo, wanted = REFUSED[name]
    monkeypatch.delenv("HF_TOKEN")
    for key, value in login.items():
        monkeypatch.setenv(key, value)
    assert call("share", trained, "--out", tmp_path / "shared", "--push", repo) == 2
    said = capsys.readouterr().err.strip()
    assert wanted in said and "is kept" in said and "\n" not in said, said
    assert sorted(files(tmp_path / "shared")) == sorted(sharing.FILES) and not hub.repositories
    assert same_weights(nelbo.load(tmp_path / "shared"), nelbo.load(trained))


@pytest.mark.parametrize("broken", ["commit", "preupload"])
def test_a_hub_that_fails_on_the_way_takes_nothing(trained, tmp_path, hub, monkeypatch, broken):
    import time

    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    folder = nelbo.save_pretrained(trained, tmp_path / "shared")
    before, hub.broken = files(folder), broken
    with pytest.raises(UserError, match=r"cannot push to someone/tiny: .*500") as caught:
        nelbo.push_to_hub(folder, "someone/tiny")
    assert "\n" not in str(caught.value) and files(folder) == before
    assert sorted(hub.files("someone/tiny")) == [".gitattributes"]
    hub.broken = None
    nelbo.push_to_hub(folder, "someone/tiny")  # the same again
    assert same_weights(nelbo.load("someone/tiny"), nelbo.load(trained))


def test_changed_weights_are_not_pushed(trained, tmp_path, hub):
    folder = nelbo.save_pretrained(trained, tmp_path / "shared")
    flip(folder / "model.safetensors")
    with pytest.raises(UserError, match="was changed"):
        nelbo.push_to_hub(folder, "someone/tiny")
    assert hub.asked == []


def test_private_is_private_and_a_public_repository_is_not_written_to(trained, tmp_path, hub, monkeypatch):
    folder = nelbo.save_pretrained(trained, tmp_path / "shared")
    nelbo.push_to_hub(folder, "someone/secret", private=True)
    assert hub.repositories["someone/secret"].private
    nelbo.push_to_hub(folder, "someone/secret", private=True)  # again
    assert same_weights(nelbo.load("someone/secret"), nelbo.load(trained))
    nelbo.push_to_hub(folder, "someone/open")
    commits = len(hub.repositories["someone/open"].commits)
    with pytest.raises(UserError, match="--private: someone/open is there already, and public"):
        nelbo.push_to_hub(folder, "someone/open", private=True)
    assert len(hub.repositories["someone/open"].commits) == commits
    monkeypatch.delenv("HF_TOKEN")
    shutil.rmtree(tmp_path / "home")
    with pytest.raises(UserError, match="no such run: someone/secret"):
        nelbo.load("someone/secret")


@pytest.mark.parametrize("there", [
    {"model_index.json": b"{}"}, {"config.json": b'{"model_type": "bert"}'}, {"config.json": b"{"},
])  # fmt: skip
def test_a_repository_of_another_program_is_not_written_to(trained, tmp_path, hub, there):
    folder = nelbo.save_pretrained(trained, tmp_path / "shared")
    hub.repositories[f"{OWNER}/theirs"] = Repository()
    hub.repositories[f"{OWNER}/theirs"].commit(there)
    with pytest.raises(UserError, match="holds another program's model"):
        nelbo.push_to_hub(folder, f"{OWNER}/theirs")
    assert hub.files(f"{OWNER}/theirs") == there


def test_a_pipeline_on_the_hub_is_still_a_pipeline(tmp_path, hub):
    from test_resolve import pipeline

    folder, unet, _ = pipeline(tmp_path / "p")
    hub.repositories["google/ddpm"] = Repository()
    hub.repositories["google/ddpm"].commit(files(folder))
    source = resolve("google/ddpm")
    assert source.kind == "diffusers" and source.steps == 49
    loaded = source.load(256, "cpu")
    mine, theirs = list(loaded.network.parameters()), list(unet.parameters())
    assert len(mine) == len(theirs) and all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))
    with pytest.raises(UserError, match="google/ddpm is no model that nelbo shared"):
        nelbo.from_pretrained("google/ddpm")
    with pytest.raises(UserError, match="no such run: google/nothing"):
        nelbo.load("google/nothing")


def test_the_commands_work_with_the_hubs_own_variables(trained, tmp_path, hub):
    """As a user sets them, in processes of their own: share and push, then evaluate by the id."""
    variables = {**os.environ, **environment(hub, tmp_path / "theirs"), "OMP_NUM_THREADS": "1"}
    for arguments in (
        ("share", trained, "--out", "shared", "--license", "mit", "--push", "someone/tiny"),
        ("evaluate", "someone/tiny", "--images", 6, "--times", 2),
    ):
        done = subprocess.run(
            [sys.executable, "-m", "nelbo.cli", *map(str, arguments)],
            env=variables, cwd=tmp_path, capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
    own = json.loads((trained / "evaluations/test-best-ema-vlb-2x2-6.json").read_text())
    theirs = json.loads((tmp_path / "evaluations/tiny/evaluations/test-best-ema-vlb-2x2-6.json").read_text())
    assert theirs["bits_per_dim"] == own["bits_per_dim"] and theirs["terms"] == own["terms"]
    assert "HEAD /someone/tiny/resolve" in " ".join(hub.asked)


# Help and docs -------------------------------------------------------------------------------------------------------


def test_help_explains_every_field(capsys):
    with pytest.raises(SystemExit) as left:
        call("share", "--help")
    assert left.value.code == 0
    shown = words(capsys.readouterr().out)
    for option, text in documented(share.Share):
        assert text in shown and (option in shown or option == "--run"), option


def test_sharing_loads_nothing_heavy_before_it_is_used():
    code = (
        "import sys, nelbo, nelbo.sharing\nfrom nelbo.cli import main\n"
        "try:\n    main(['share', '--help'])\nexcept SystemExit:\n    pass\n"
        "print('loaded:', *sorted({'torch', 'huggingface_hub', 'yaml', 'matplotlib'} & set(sys.modules)))"
    )
    said = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert said.splitlines()[-1] == "loaded:"


def test_the_page_runs(trained, tmp_path, hub, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(trained, tmp_path / "runs/demo")
    names = {}
    exec(compile(snippets("docs/sharing.md"), "docs/sharing.md", "exec"), names)
    assert re.search(r"\d\.\d{4} ± \d\.\d{4} bits/dim", capsys.readouterr().out)
    assert same_weights(names["model"], nelbo.load(trained)) and names["url"] == f"{hub.url}/someone/demo"
    called = []
    for verb in cli.VERBS:
        monkeypatch.setitem(cli.VERBS, verb, (cli.VERBS[verb][0], called.append))
    monkeypatch.setattr(cli.train, "carry_out", lambda command, name: called.append(command))
    monkeypatch.setattr(cli.convert, "carry_out", called.append)
    lines = re.findall(r"^ {4}(nelbo .*?)(?:  +.*)?$", (ROOT / "docs/sharing.md").read_text(), re.M)
    for line in lines:
        cli.run(shlex.split(line)[1:])
    assert len(called) == len(lines) == 8
