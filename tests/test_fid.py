"""``nelbo fid`` as a user runs it: figures in closed form, kept statistics, and what it refuses."""

import json
import math
import shutil
from pathlib import Path
from typing import Any, get_args, get_type_hints

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from scipy.linalg import sqrtm
from torch import Tensor

from nelbo import checkpoints, cli, extractors, feature_sums, fid, metrics, samplers
from nelbo.data import load
from nelbo.data.loader import permutation
from nelbo.errors import UserError
from nelbo.extractors import SmallNet, as_extractor, load_extractor, spread
from nelbo.shards import Shards
from nelbo.verbs import fid as fid_verb
from tiny import entries, flags, tiny

STEPS = ("--steps", 3)


def call(*arguments: object) -> int:
    return cli.main([str(a) for a in arguments])


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a dozen steps, the weights of a small extractor, and samples."""
    place = tmp_path_factory.mktemp("made")
    assert call("train", "vdm-digits", "--out", place / "run", *flags(tiny(training__evaluate_every=0))) == 0
    save_file(small().state_dict(), place / "small.safetensors")
    assert call("sample", place / "run", "--count", 60, *STEPS, "--out", place / "run" / "samples" / "x") == 0
    return place


@pytest.fixture
def run(made: Path, tmp_path: Path) -> Path:
    """A copy, with the extractor's weights beside it."""
    shutil.copy(made / "small.safetensors", tmp_path)
    return shutil.copytree(made / "run", tmp_path / "run")


def small() -> SmallNet:
    """One stage that knows the positive and the negative part of x: closed-form features; two classes by their head."""
    net = SmallNet((1, 2), 2)
    weight = torch.zeros(2, 1, 3, 3)
    weight[:, 0, 1, 1] = torch.tensor([1.0, -1.0])
    with torch.no_grad():
        net.stages[0].weight.copy_(weight)
        net.stages[0].bias.zero_()
        net.head.weight.copy_(torch.tensor([[5.0, 0.0], [0.0, 3.0]]))
        net.head.bias.copy_(torch.tensor([0.5, 0.0]))
    return net


def features_of(images: np.ndarray, levels: int = 17) -> np.ndarray:
    """What ``small`` gives, by numpy."""
    x = np.round(images * (255 / (levels - 1))) / 127.5 - 1
    return np.stack([np.maximum(x, 0).mean((1, 2, 3)), np.maximum(-x, 0).mean((1, 2, 3))], 1)


def distance_of(a: np.ndarray, b: np.ndarray) -> float:
    """As the field's scripts compute it, by scipy."""
    s_1, s_2 = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    return float(((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(s_1 + s_2) - 2 * np.trace(sqrtm(s_1 @ s_2)).real)


def score_of(features: np.ndarray, splits: int = 10) -> tuple[float, float]:
    """Of features in their order, by numpy."""
    logits = features @ np.array([[5.0, 0], [0, 3]]).T + [0.5, 0]
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    n = len(p)
    parts = [p[i * n // splits : (i + 1) * n // splits] for i in range(splits)]
    scores = [math.exp((q * np.log(q / q.mean(0))).sum(1).mean()) for q in parts]
    return float(np.mean(scores)), float(np.std(scores))


def record(run: Path, pattern: str = "fid-*.json") -> dict[str, Any]:
    (file,) = (run / "evaluations").glob(pattern)
    return json.loads(file.read_text())


def digits(split: str = "train") -> np.ndarray:
    return load("digits").images[split]


# The figures ---------------------------------------------------------------------------------------------------------


def test_a_run_s_samples_are_drawn_and_measured_against_training_images(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = run.parent / "small.safetensors"
    options = ("--extractor", "small", "--weights", weights, "--count", 60, *STEPS, "--batch", 7)
    assert call("fid", run, *options) == 0
    out, found = capsys.readouterr().out, record(run)
    images = samplers.sample(checkpoints.load_model(run), 60, steps=3).numpy()
    ours = features_of(images)
    assert found["fid"] == pytest.approx(distance_of(ours, features_of(digits())), rel=1e-5)
    score = score_of(ours[permutation(60, fid.ORDER_SEED)])
    assert (found["inception_score"]["mean"], found["inception_score"]["std"]) == pytest.approx(score, rel=1e-5)
    assert found["images"] == 60 and found["samples"]["levels"] == 17 and found["samples"]["drawn"]
    assert found["reference"]["name"] == "train" and found["reference"]["images"]["shape"] == [1297, 1, 8, 8]
    assert found["extractor"]["identity"].startswith("small ") and found["extractor"]["features"] == 2
    assert (found["settings"]["steps"], found["settings"]["run_weights"]) == (3, "ema")
    assert found["checkpoint"] == {"step": 12, "name": "best"} and found["versions"]["torch"] == torch.__version__
    assert f"60 samples of {run}, step 12, ema weights (ancestral, 3 steps)" in out
    assert "against 1297 training images of digits (version 1)" in out
    assert "Fréchet distance (small, 2 features)" in out and f"{found['fid']:.4f}" in out
    assert "inception score, 10 splits" in out and f"{score[0]:.4f}" in out
    assert f"written: {run}/evaluations/fid-train-step-12-ancestral-3-seed0-60-small-" in out


def test_the_error_the_bias_and_the_floor_are_those_of_the_metrics(run: Path) -> None:
    result = fid.evaluate(run / "samples" / "x.npz", fid.Settings(), extractor=known, say=print)
    ours = features_of(np.load(run / "samples" / "x.npz")["images"])[permutation(60, fid.ORDER_SEED)]
    reference = metrics.Moments.of(features_of(digits()))
    expected = metrics.jackknife([metrics.Moments.of(ours[p]) for p in metrics.consecutive(60, 10)], reference)
    assert result.frechet.bias == pytest.approx(expected.bias, rel=1e-4)
    assert result.frechet.standard_error == pytest.approx(expected.standard_error, rel=1e-4)
    assert result.floor == pytest.approx(metrics.floor(60, reference), rel=1e-4)
    assert (result.record["bias"], result.record["floor"]) == (result.frechet.bias, result.floor)


def known(images: Tensor) -> Tensor:
    """Features of images of 0 .. 255, as any callable may give them."""
    return torch.from_numpy(features_of(images.numpy(), 256))


def test_saved_samples_pictures_and_shards_of_them_give_the_figure_of_drawing(run: Path, tmp_path: Path) -> None:
    """17 levels, and the same images as PNG files of 256: one figure, whichever way."""
    weights = run.parent / "small.safetensors"
    images = np.load(run / "samples" / "x.npz")["images"]
    (tmp_path / "pictures").mkdir()
    for i, image in enumerate(spread(images, 17)):
        Image.fromarray(image[0]).save(tmp_path / "pictures" / f"{i:03d}.png")
    np.save(tmp_path / "plain.npy", images)
    shards = Shards.begin(tmp_path / "shards", {}, 60, 25, (1, 8, 8), 17)
    for i in range(3):
        shards.write(i, images[shards.numbers(i)])
    extractor = ("--extractor", "small", "--weights", weights)
    assert call("fid", run, *extractor, "--count", 60, *STEPS, "--out", tmp_path / "drawn.json") == 0
    assert call("fid", run / "samples" / "x.npz", *extractor, "--out", tmp_path / "saved.json") == 0
    for name, more in (("pictures", ()), ("plain.npy", ("--levels", 17)), ("shards", ())):
        to = ("--data", "digits", "--out", tmp_path / f"{name}.json")
        assert call("fid", tmp_path / name, *extractor, *to, *more) == 0
    found = [json.loads(file.read_text()) for file in tmp_path.glob("*.json")]
    assert len(found) == 5
    assert {f["fid"] for f in found} == {found[0]["fid"]}
    assert {f["inception_score"]["mean"] for f in found} == {found[0]["inception_score"]["mean"]}
    assert {f["images"] for f in found} == {60}


@pytest.mark.parametrize("split", ["validation", "test"])
def test_another_split_is_another_reference_and_said_so(
    run: Path, split: str, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = run.parent / "small.safetensors"
    options = ("--extractor", "small", "--weights", weights, "--reference", split)
    assert call("fid", run / "samples" / "x.npz", *options) == 0
    ours = features_of(np.load(run / "samples" / "x.npz")["images"])
    assert record(run)["fid"] == pytest.approx(distance_of(ours, features_of(digits(split))), rel=1e-5)
    assert "published figures are against training images" in capsys.readouterr().out


def test_a_folder_of_images_can_be_the_reference(run: Path, tmp_path: Path) -> None:
    (tmp_path / "others").mkdir()
    for i, image in enumerate(spread(digits("test")[:40], 17)):
        Image.fromarray(image[0]).save(tmp_path / "others" / f"{i:03d}.png")
    result = fid.evaluate(
        run / "samples" / "x.npz", fid.Settings(reference=str(tmp_path / "others")), extractor=known, say=print
    )
    ours = features_of(np.load(run / "samples" / "x.npz")["images"])
    assert result.frechet.value == pytest.approx(distance_of(ours, features_of(digits("test")[:40])), rel=1e-9)


def test_the_first_images_of_a_file_and_no_run_no_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.savez(tmp_path / "some.npz", images=digits("test"), levels=17)
    options = ("--data", "digits", "--extractor", "random", "--count", 50)
    assert call("fid", tmp_path / "some.npz", *options) == 0
    out = capsys.readouterr().out
    assert f"50 images of {tmp_path}/some.npz" in out and "written" not in out
    assert sorted(p.name for p in tmp_path.iterdir()) == ["some.npz"]


def test_figures_do_not_depend_on_the_batch(run: Path) -> None:
    values = []
    for batch in (3, 64):
        settings = fid.Settings(extractor="random", count=40, method="ddim", steps=4, batch=batch)
        values.append(fid.evaluate(run, settings).frechet.value)
    assert values[0] == pytest.approx(values[1], rel=1e-5)


def test_sums_of_more_images_than_a_block_are_those_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    images, done = digits()[:100], []
    (whole,), scores = feature_sums.measure(images, 17, known)
    monkeypatch.setattr(feature_sums, "BLOCK", 16)
    parts, _ = feature_sums.measure(images, 17, known, parts=3, batch=5, progress=done.append)
    assert scores is None
    assert [p.count for p in parts] == [33, 33, 34]
    assert np.allclose(metrics.merge(parts).covariance, np.cov(features_of(images), rowvar=False), rtol=1e-10)
    assert np.allclose(whole.covariance, metrics.merge(parts).covariance, rtol=1e-10)
    assert done == sorted(done) and done[0] == 0 and done[-1] == 100


def test_images_sorted_by_class_score_as_shuffled_ones_do() -> None:
    """The score of 10 parts in the files' order would be 1."""
    images = np.repeat(np.arange(10, dtype=np.uint8), 50)[:, None, None, None] * np.ones((1, 1, 4, 4), np.uint8)

    def by_level(given: Tensor) -> tuple[Tensor, Tensor]:
        classes = torch.nn.functional.one_hot((given[:, 0, 0, 0].double() * 9 / 255).round().long(), 10)
        return classes.double() + given[:, 0, 0, :1], classes.double()

    order = permutation(500, fid.ORDER_SEED)
    _, scores = feature_sums.measure(images[order], 10, by_level, parts=10)
    assert scores is not None and 8.5 < metrics.score_parts(scores)[0] < 10
    _, scores = feature_sums.measure(images, 10, by_level, parts=10)
    assert scores is not None and metrics.score_parts(scores)[0] == pytest.approx(1)


# Few samples ---------------------------------------------------------------------------------------------------------


def test_few_samples_are_warned_of_with_the_size_of_their_bias(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ("--extractor", "small", "--weights", run.parent / "small.safetensors")
    assert call("fid", run / "samples" / "x.npz", *options) == 0
    found, out = record(run), capsys.readouterr().out
    assert f"warning: {found['warning']}" in out
    for part in ("60 samples: the distance of so few is too high", f"would score about {found['floor']:.4g}",
                 f"bias is about {found['bias']:.4g}", f"{found['fid'] - found['bias']:.4g}", "50000"):  # fmt: skip
        assert part in found["warning"]
    assert "for want of samples (jackknife)" in out and "perfect model" in out
    assert call("fid", run / "samples" / "x.npz", "--extractor", "random") == 0  # 64 features
    assert "cannot be estimated below 2 samples for each of 64 features" in capsys.readouterr().out
    monkeypatch.setattr(fid, "FEW", 60)
    assert call("fid", run / "samples" / "x.npz", *options) == 0
    assert record(run, "fid-*small*.json")["warning"] is None and "warning" not in capsys.readouterr().out


# Kept statistics -----------------------------------------------------------------------------------------------------


def watched(run: Path, extractor: Any = None, **settings: Any) -> tuple[fid.Result, list[str], list[str]]:
    """A figure of the saved samples, what it took time for, and what it said."""
    took, said = [], []
    result = fid.evaluate(
        run / "samples" / "x.npz",
        fid.Settings(**{"extractor": "random", **settings}),
        extractor=extractor,
        progress=lambda name, done, total: took.append(name),
        say=said.append,
    )
    return result, sorted(set(took)), said


def kept(run: Path) -> Path:
    (file,) = (run / "evaluations").glob(".fid-*.npz")
    return file


def test_statistics_are_measured_once(run: Path) -> None:
    first, took, _ = watched(run)
    assert took == ["features", "reference"]
    before = kept(run).read_bytes()
    second, took, said = watched(run)
    assert (took, said) == (["features"], [])
    assert second.frechet == first.frechet and kept(run).read_bytes() == before
    moments, about = feature_sums.read_statistics(kept(run))
    assert moments.count == 1297 and about["what"] == "1297 training images of digits (version 1)"
    assert about["images"]["sha256"] == second.record["reference"]["images"]["sha256"]


def test_statistics_of_a_run_stand_beside_its_figures_and_out_of_the_report_s_way(run: Path) -> None:
    watched(run)
    assert call("report", run) == 0


@pytest.mark.parametrize("how", ["cut", "flipped", "changed", "emptied", "another file"])
def test_damaged_statistics_are_measured_again(run: Path, how: str) -> None:
    first, _, _ = watched(run)
    file = kept(run)
    whole = file.read_bytes()
    if how == "changed":  # a figure, by someone who writes the file as numpy does
        with np.load(file) as loaded:
            arrays = dict(loaded)
        arrays["first"][0] += 1e-9
        np.savez(file, **arrays)
    else:
        middle = len(whole) // 2
        content = {
            "cut": whole[:-100],
            "flipped": whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :],
            "emptied": b"",
            "another file": b"\x00" * 1000,
        }
        file.write_bytes(content[how])
    second, took, said = watched(run)
    assert took == ["features", "reference"] and second.frechet == first.frechet
    assert len(said) == 1 and said[0].endswith("measured again") and str(file) in said[0]
    assert file.read_bytes() == whole


def test_statistics_of_other_images_are_measured_again(run: Path, tmp_path: Path) -> None:
    """The same name and count, one pixel changed."""
    images = digits("test").copy()
    for value in (3, 4):
        images[0, 0, 0, 0] = value
        np.savez(tmp_path / "data.npz", train=images[:200], validation=images[:9], test=images[:9], levels=17)
        result, took, said = watched(run, data=str(tmp_path / "data.npz"))
        assert "reference" in took
    assert said == [f"{kept(run)} is of another set of images: measured again"]
    assert result.frechet == watched(run, data=str(tmp_path / "data.npz"))[0].frechet


def test_statistics_of_another_extractor_are_never_used(run: Path, tmp_path: Path) -> None:
    file = tmp_path / "statistics.npz"
    first, _, _ = watched(run, statistics=file)
    other, took, said = watched(run, statistics=file, feature_seed=1)
    assert "reference" in took and said == [f"{file} is of another extractor: measured again"]
    assert other.frechet == watched(run, feature_seed=1)[0].frechet != first.frechet
    watched(run)
    assert len(list((run / "evaluations").glob(".fid-*.npz"))) == 2  # one for each


def test_a_named_file_that_is_something_else_is_left_alone(run: Path, tmp_path: Path) -> None:
    np.savez(tmp_path / "mine.npz", images=digits("test"))
    (tmp_path / "broken.npz").write_bytes(b"PK\x03\x04 something")
    before = entries(tmp_path)
    for name, message in (
        ("mine.npz", "is not a file of statistics that nelbo wrote"),
        ("broken.npz", "cannot be read"),
    ):
        with pytest.raises(UserError, match=message):
            watched(run, statistics=tmp_path / name)
    assert entries(tmp_path) == before


def test_a_file_of_statistics_is_a_reference(run: Path, tmp_path: Path) -> None:
    file = tmp_path / "statistics.npz"
    first, _, _ = watched(run, statistics=file)
    second, took, _ = watched(run, reference=str(file))
    assert took == ["features"] and second.frechet == first.frechet
    assert second.record["reference"]["what"] == "1297 training images of digits (version 1)"
    with pytest.raises(UserError, match=r"holds statistics of the extractor random \w+, and this one is random \w+"):
        watched(run, reference=str(file), feature_seed=1)
    with pytest.raises(UserError, match="known, without an identity"):
        watched(run, extractor=known, reference=str(file))
    file.write_bytes(file.read_bytes()[:-50])
    with pytest.raises(UserError, match=r"statistics\.npz cannot be read: it was cut short"):
        watched(run, reference=str(file))


def test_a_callable_without_an_identity_keeps_nothing(run: Path) -> None:
    watched(run, extractor=known)
    assert not list((run / "evaluations").glob(".fid-*"))
    _, took, _ = watched(run, extractor=as_extractor(known, identity="known 1"))
    assert "reference" in took
    assert watched(run, extractor=as_extractor(known, identity="known 1"))[1] == ["features"]
    assert "reference" in watched(run, extractor=as_extractor(known, identity="known 2"))[1]


# In training ---------------------------------------------------------------------------------------------------------


def test_a_training_loop_gets_the_figures_of_the_verb(run: Path) -> None:
    model, extractor = checkpoints.load_model(run), load_extractor("random", channels=1)
    model.train()
    state = torch.random.get_rng_state()
    found = fid.during_training(model, load("digits"), run, extractor, count=60, steps=3)
    assert torch.equal(torch.random.get_rng_state(), state) and model.training
    before = kept(run).read_bytes()
    assert fid.during_training(model, load("digits"), run, extractor, count=60, steps=3) == found
    result, took, _ = watched(run)
    assert took == ["features"] and kept(run).read_bytes() == before
    assert found["fid"] == pytest.approx(result.frechet.value, rel=1e-12)
    assert (found["floor"], found["inception_score"]) == (result.floor, None)
    assert (found["samples"], found["split"], found["extractor"]) == (60, "train", "random")
    with pytest.raises(UserError, match="--splits must be at most 5"):
        fid.during_training(model, load("digits"), run, extractor, count=5)


# Mistakes ------------------------------------------------------------------------------------------------------------

MISTAKES = {
    "--reference nothing": "--reference must be one of train, validation, test or a path, and nothing is not there",
    "--extractor large": "--extractor must be one of inception, small, random, got 'large'",
    "--extractor small": "--extractor small needs --weights FILE.safetensors",
    "--extractor random --weights RUN/run.json": "--weights belongs to --extractor inception and small",
    "--extractor small --weights nothing": "--weights must be a file, and nothing is not there",
    "--extractor small --weights RUN/run.json": "run.json: it must be a .safetensors file, or tensors by name",
    "--extractor small --weights RUN/checkpoints/step-000000012/ema.safetensors": "must hold the state_dict of a Small",
    "--feature-seed 3": "--feature-seed belongs to --extractor random, and the extractor is inception",
    "--extractor random --splits 0": "--splits must be at least 1, got 0",
    "--extractor random --count 5": "--splits must be at most 5, the number of samples, got 10",
    "--extractor random --count 1": "--count must be at least 2, got 1",
    "--extractor random --batch 0": "--batch must be at least 1, got 0",
    "--extractor random --eta 0.5": "--eta belongs to --method ddim, and the method is ancestral",
    "--extractor random --method ode --steps 3": "--steps belongs to --method ancestral or ddim, and the method is ode",
    "--extractor random --variance learned": "--variance learned: the network of",
    "--extractor random --levels 17": "--levels is for images of a file or folder: a run knows its own",
    "--extractor random --data photos32": "has images of 1x8x8 (CxHxW), and the reference of 3x32x32",
    "--extractor random --checkpoint 7": "has no checkpoint step-000000007; the choices are best, last, 9, 12",
    "--extractor random --out RUN": "--out needs a file, got the folder",
}


@pytest.mark.parametrize("options", MISTAKES)
def test_a_mistake_with_a_run_is_a_line(run: Path, options: str, capsys: pytest.CaptureFixture[str]) -> None:
    before = entries(run)
    assert call("fid", run, *options.replace("RUN", str(run)).split()) == 2
    err = capsys.readouterr().err
    assert MISTAKES[options] in err and err.count("\n") == 1
    assert entries(run) == before


def test_a_mistake_with_images_is_a_line(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images = digits("test")
    np.save(tmp_path / "plain.npy", images)
    np.savez(tmp_path / "splits.npz", train=images, test=images, levels=17)
    np.savez(tmp_path / "levels.npz", images=images, levels=17)
    np.savez(tmp_path / "one.npz", images=images[:1], levels=17)
    np.savez(tmp_path / "means.npz", mu=np.zeros(3), sigma=np.eye(3))
    (tmp_path / "empty").mkdir()
    digits_, random = ("--data", "digits"), ("--extractor", "random")
    for name, options, message in (
        ("plain.npy", (), "--reference train needs --data NAME_OR_PATH, the data set"),
        ("plain.npy", digits_, "no value is above 16, and the reference has 17; give --levels 17 or --levels 256"),
        ("plain.npy", (*digits_, "--levels", 16), "--levels must be above every value, got 16 and a value of 16"),
        ("plain.npy", (*digits_, "--levels", 1), "--levels must lie in 2 .. 256, got 1"),
        ("levels.npz", (*digits_, "--levels", 256), "says that it has 17 levels, and --levels 256"),
        ("levels.npz", (*digits_, "--count", 301), "--count must be at most 300, the images of"),
        ("levels.npz", (*digits_, "--steps", 3), "--steps is for samples drawn from a run, and these are read"),
        ("levels.npz", (*digits_, "--run-weights", "raw"), "--run-weights is for samples drawn from a run"),
        ("levels.npz", ("--reference", tmp_path / "means.npz"), "unknown array mu"),
        ("levels.npz", ("--reference", tmp_path / "one.npz"), "a reference needs at least 2 images, got 1"),
        ("one.npz", digits_, "a distance needs at least 2 images, got 1"),
        ("splits.npz", digits_, "must hold images without splits, got train, test"),
        ("means.npz", digits_, "unknown array mu"),
        ("empty", digits_, "a folder must hold image files"),
        ("nothing.npz", digits_, "nothing.npz is not there"),
        ("nothing", digits_, "no such run"),
    ):
        assert call("fid", tmp_path / name, *random, *options) == 2
        err = capsys.readouterr().err
        assert message in err and err.count("\n") == 1, err


def test_choices_are_those_of_the_command_line() -> None:
    hints = {name: get_args(hint) for name, hint in get_type_hints(fid_verb.Fid).items()}
    assert hints["extractor"] == tuple(extractors.EXTRACTORS)
    assert hints["method"] == (*samplers.METHODS, "ode")
    assert hints["spacing"] == tuple(samplers.SPACINGS)
