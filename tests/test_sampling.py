"""``nelbo sample``: DDIM, strips between images, and shards that survive a kill."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import typing
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import nelbo
from nelbo import checkpoints, cli, pictures, samplers, sampling
from nelbo.data import load
from nelbo.draws import Draws
from nelbo.errors import UserError
from nelbo.sampling import Settings, read_shards, sample_to_shards
from nelbo.shards import Shards
from nelbo.verbs import sample
from tiny import entries, files, flags, tiny

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
BETAS = tuple(np.linspace(0.005, 0.4, 20))


def call(*arguments: object) -> int:
    return cli.main([str(a) for a in arguments])


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Trainings of a dozen steps: a VDM, a MuLAN, one conditioned on labels, one whose schedule reads the image."""
    place = tmp_path_factory.mktemp("runs")
    made = {name: tiny(f"{name}-digits", training__evaluate_every=0) for name in ("vdm", "mulan", "mulan-label")}
    made["mulan-image"] = tiny("mulan-image-digits", training__evaluate_every=0, schedule__width=8, objective__steps=10)
    for name, config in made.items():
        assert call("train", f"{name}-digits", "--out", place / name, *flags(config)) == 0
    return place


@pytest.fixture(scope="module")
def ddpm(runs: Path) -> Path:
    """A DDPM of 20 noise levels, with its own Gaussian as the decoder and the large variance."""
    pytest.importorskip("diffusers")
    small = tiny(
        "ddpm-digits", network__multipliers=(1, 1), network__blocks=1, network__groups=4, network__attention_at=(),
        schedule__timesteps=20, schedule__betas=BETAS, objective__steps=19, training__evaluate_every=0,
    )  # fmt: skip
    assert call("train", "ddpm-digits", "--out", runs / "ddpm", *flags(small)) == 0
    return runs / "ddpm"


def arrays(path: Path) -> dict[str, np.ndarray]:
    with np.load(path) as loaded:
        return dict(loaded)


def only(folder: Path, pattern: str) -> Path:
    (path,) = folder.glob(pattern)
    return path


# Methods -------------------------------------------------------------------------------------------------------------


def test_ddim_is_the_library_s_and_its_name_says_how(runs: Path, tmp_path: Path) -> None:
    run = shutil.copytree(runs / "vdm", tmp_path / "run")
    options = ("--method", "ddim", "--steps", 6, "--eta", 0.3, "--spacing", "quadratic", "--clip", "--count", 5)
    assert call("sample", run, *options) == 0
    found = arrays(run / "samples" / "step-12-ddim-6-seed0-5-quadratic-eta0.3-clip.npz")
    expected = nelbo.sample(nelbo.load(run), 5, method="ddim", steps=6, eta=0.3, spacing="quadratic", clip=True)
    assert (found["images"] == expected.numpy()).all()
    assert found["trajectory"].shape == (6, 5, 1, 8, 8)
    assert found["trajectory_t"] == pytest.approx([(i / 6) ** 2 for i in (5, 4, 3, 2, 1, 0)])
    for other in ({"eta": 0.0}, {"spacing": "even"}, {"clip": False}):
        chain: dict[str, Any] = {
            "method": "ddim",
            "steps": 6,
            "eta": 0.3,
            "spacing": "quadratic",
            "clip": True,
            **other,
        }
        assert (nelbo.sample(nelbo.load(run), 5, **chain) != expected).any(), other


def test_a_ddpm_by_default_goes_through_all_its_levels(ddpm: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = nelbo.load(ddpm)
    assert call("sample", ddpm, "--count", 5, "--trajectory", 0) == 0
    images = arrays(ddpm / "samples" / "step-12-ancestral-19-seed0-5.npz")["images"]
    assert (images == nelbo.sample(model, 5, steps=19).numpy()).all()
    assert call("sample", ddpm, "--count", 5, "--trajectory", 0, "--variance", "fixed-small") == 0
    small = arrays(ddpm / "samples" / "step-12-ancestral-19-seed0-5-fixed-small.npz")["images"]
    assert (small == nelbo.sample(model, 5, steps=19, variance="fixed-small").numpy()).all() and (small != images).any()
    assert call("sample", ddpm, "--count", 3, "--method", "ode", "--rtol", 0.03, "--atol", 0.03) == 0
    capsys.readouterr()
    for options, part in (
        (("--steps", 20), "--steps must be at most 19, the steps between the 20 noise levels of"),
        (("--variance", "learned"), "has no output for it; it has fixed-large"),
        (("--decoding", "categorical"), "is gaussian, and its samples are its mean"),
    ):
        assert call("sample", ddpm, *options) == 2
        assert part in capsys.readouterr().err


MISTAKES = [
    ("--method ddim --eta 2", "--eta must lie in [0, 1], got 2.0"),
    ("--eta 0.5", "--eta belongs to --method ddim, and the method is ancestral"),
    ("--method ode --clip", "--clip belongs to --method ancestral or ddim, and the method is ode"),
    ("--method ddim --variance fixed-large", "--variance belongs to --method ancestral, and the method is ddim"),
    ("--method ddim --rtol 0.1", "--rtol belongs to --method ode, and the method is ddim"),
    ("--method ode --spacing quadratic", "--spacing belongs to --method ancestral or ddim, and the method is ode"),
    ("--steps 0", "--steps must be at least 1, got 0"),
    ("--shard 0", "--shard must be at least 1, got 0"),
    ("--shard 2 --trajectory 3", "--trajectory is of samples in one file: it does not go with --shard"),
    ("--time 0.2", "--time belongs to --interpolate A B, and there is none"),
    ("--shared-noise", "--shared-noise belongs to --interpolate A B, and there is none"),
    ("--interpolate 3", "--interpolate needs two images, A B, got 1: 3"),
    ("--interpolate 3 4 5", "--interpolate needs two images, A B, got 3: 3 4 5"),
    ("--interpolate 3 300", "--interpolate must lie in 0 .. 299, the numbers of the test split, got 300"),
    ("--interpolate 3 {place}/no.png", "cannot take the image {place}/no.png"),
    ("--interpolate 3 {place}/large.png", "the model's images are 1x8x8 (channels, height, width), got 1x9x8"),
    ("--interpolate 3 {place}/red.png", "the model's images are 1x8x8 (channels, height, width), got 3x8x8"),
    ("--interpolate 3 4 --count 5", "--count is of samples: it does not go with --interpolate"),
    ("--interpolate 3 4 --shard 5", "--shard is of samples: it does not go with --interpolate"),
    ("--interpolate 3 4 --points 1", "--points must be at least 2, got 1"),
    ("--interpolate 3 4 --time 0", "--time must lie in (0, 1], got 0.0"),
    ("--interpolate 3 4 --steps 5 --time 0.1", "time must be at least the chain's first, 0.2, got 0.1"),
    ("--interpolate 3 4 --method ode --time 0.2", "--time belongs to --method ancestral: by ode both go up to t = 1"),
    ("--interpolate 3 4 --method ddim --clip", "--clip belongs to --method ancestral: what is clipped does not come"),
]


@pytest.mark.parametrize(("line", "part"), MISTAKES, ids=[line for line, _ in MISTAKES])
def test_a_mistake_is_one_line(
    line: str, part: str, runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.fromarray(np.zeros((9, 8), np.uint8)).save(tmp_path / "large.png")
    Image.fromarray(np.full((8, 8, 3), (200, 0, 0), np.uint8)).save(tmp_path / "red.png")
    before = entries(tmp_path)
    assert call("sample", runs / "vdm", "--out", tmp_path / "x", *line.format(place=tmp_path).split()) == 2
    err = capsys.readouterr().err
    assert part.format(place=tmp_path) in err and err.startswith("nelbo: ") and err.count("\n") == 1
    assert entries(tmp_path) == before


@pytest.mark.parametrize(
    ("options", "part"),
    [
        (("--method", "ddim"), "reads the image: it has no DDIM"),
        (("--method", "ode"), "reads the image: it has no probability flow"),
        (("--variance", "fixed-large"), "reads the image: it has no other variance"),
        (("--interpolate", 3, 4), "noises two images differently"),
    ],
)
def test_what_a_schedule_that_reads_the_image_has_not(
    options: tuple[object, ...], part: str, runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call("sample", runs / "mulan-image", *options) == 2
    assert part in capsys.readouterr().err


def test_the_command_line_names_the_library_s_choices() -> None:
    choices = {name: typing.get_args(hint) for name, hint in typing.get_type_hints(sample.Sample).items()}
    assert choices["method"] == (*samplers.METHODS, "ode") and choices["spacing"] == tuple(samplers.SPACINGS)
    fields = {f.name: f.default for f in dataclasses.fields(Settings)}
    assert {name: getattr(sample.Sample, name) for name in fields} == fields


# Between two images --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["ancestral", "ddim", "ode"])
def test_a_strip_between_two_test_images(runs: Path, tmp_path: Path, method: str) -> None:
    """The library's interpolation, both ends beside it; as a row of pictures; the same again."""
    run = shutil.copytree(runs / "vdm", tmp_path / "run")
    options = {"ancestral": ("--steps", 8, "--seed", 2, "--time", 0.4), "ddim": ("--steps", 8), "ode": ()}[method]
    command = ("sample", run, "--interpolate", 3, 7, "--points", 4, "--method", method, *options)
    assert call(*command) == 0
    path = only(run / "samples", "*between-3-7-4*.npz")
    found, images = arrays(path), load("digits").images["test"][[3, 7]]
    assert (found["ends"] == images).all() and found["levels"] == 17
    assert found["weights"] == pytest.approx([0, 1 / 3, 2 / 3, 1])
    pair, weights, model = torch.as_tensor(images), torch.linspace(0, 1, 4), nelbo.load(run)
    if method == "ancestral":
        expected = samplers.interpolate(model, pair, weights, time=0.4, steps=8, seed=2)
        assert path.stem == "step-12-ancestral-8-seed2-between-3-7-4-t0.4"
    elif method == "ddim":
        expected = samplers.interpolate_latents(model, pair, weights, steps=8)
    else:
        expected = samplers.interpolate_latents(model, pair, weights, rtol=3e-4, atol=3e-4)
        assert (found["images"][[0, -1]] == images).mean() > 0.95  # there and back, within the tolerance
    assert (found["images"] == expected.numpy()).all()
    row = np.array(Image.open(path.with_suffix(".png")))
    assert row.shape == (10 * 8, (6 * 9 + 1) * 8)  # one row of A, four images and B
    for i, image in enumerate((images[0], *found["images"], images[1])):
        shown = row[8 : 9 * 8 : 8, (1 + 9 * i) * 8 : (9 + 9 * i) * 8 : 8]
        assert (shown == np.round(image[0] * (255 / 16))).all()
    before = files(run)
    assert call(*command) == 0 and files(run) == before


def test_the_two_may_be_files(runs: Path, tmp_path: Path) -> None:
    """A grey file's 256 values are rounded to the model's levels: what nelbo drew itself comes back exactly."""
    images = load("digits").images["test"][[3, 7]]
    for name, image in zip("ab", images, strict=True):
        grey = np.round(image[0] * (255 / 16)).astype(np.uint8)
        Image.fromarray(grey).save(tmp_path / f"{name}.png")
    options = ("--steps", 5, "--points", 3)
    for stem, ends in (("files", (tmp_path / "a.png", tmp_path / "b.png")), ("numbers", (3, 7))):
        assert call("sample", runs / "vdm", "--out", tmp_path / stem, "--interpolate", *ends, *options) == 0
    left, right = arrays(tmp_path / "files.npz"), arrays(tmp_path / "numbers.npz")
    assert (left["ends"] == images).all() and all((left[key] == right[key]).all() for key in left)


def test_latents_of_the_two_are_those_that_the_encoder_gives(runs: Path, tmp_path: Path) -> None:
    images = torch.as_tensor(load("digits").images["test"][[3, 7]])
    model, weights = nelbo.load(runs / "mulan"), torch.linspace(0, 1, 3)
    c = model.infer(model.reals(images), model.latent.noise(Draws(0, [0, 1]))).c.detach()
    expected = samplers.interpolate(model, images, weights, steps=6, c=c)
    out = ("--interpolate", 3, 7, "--steps", 6, "--points", 3, "--out", tmp_path / "x")
    assert call("sample", runs / "mulan", *out) == 0
    assert (arrays(tmp_path / "x.npz")["images"] == expected.numpy()).all()


def test_labels_belong_to_test_images(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, place = runs / "mulan-label", tmp_path / "x"
    assert call("sample", run, "--interpolate", 3, 7, "--steps", 4, "--points", 2, "--out", place) == 0
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(tmp_path / "a.png")
    assert call("sample", run, "--interpolate", 3, tmp_path / "a.png", "--out", place) == 2
    assert "conditioned on class labels, and image files have none" in capsys.readouterr().err


# Shards --------------------------------------------------------------------------------------------------------------


SEVEN = ("--count", 7, "--steps", 4, "--trajectory", 8)


def shards_of(run: Path, out: Path, *options: object) -> int:
    return call("sample", run, *SEVEN, "--shard", 3, "--out", out, *options)


def counted(patch: pytest.MonkeyPatch) -> list[range]:
    """The samples that are drawn from now on."""
    drawn: list[range] = []
    original = sampling.draw

    def draw(model: Any, settings: Settings, numbers: range, *rest: Any) -> np.ndarray:
        drawn.append(numbers)
        return original(model, settings, numbers, *rest)

    patch.setattr(sampling, "draw", draw)
    return drawn


def test_shards_hold_the_samples_of_one_file(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Seven in threes: as one file has them, whatever the shard and the batch; nothing is drawn a second time."""
    run, out = runs / "vdm", tmp_path / "shards"
    assert call("sample", run, *SEVEN, "--out", tmp_path / "whole") == 0
    whole = arrays(tmp_path / "whole.npz")["images"]
    drawn = counted(monkeypatch)
    capsys.readouterr()
    assert shards_of(run, out, "--batch", 2) == 0
    assert capsys.readouterr().out == f"written: {out}\n"
    assert drawn == [range(0, 2), range(2, 3), range(3, 5), range(5, 6), range(6, 7)]
    names = [f"shard-0000{i}{suffix}" for i in range(3) for suffix in (".json", ".npz", ".png")]
    assert list(files(out)) == ["meta.json", *names]
    assert [len(images) for images in read_shards(out)] == [3, 3, 1]
    assert (np.concatenate(list(read_shards(out))) == whole).all()
    assert arrays(out / "shard-00001.npz")["levels"] == 17
    assert (out / "shard-00001.png").read_bytes() == pictures.png(pictures.grid(whole[3:6], 17))
    meta = json.loads((out / "meta.json").read_text())
    assert (meta["count"], meta["shard"], meta["levels"], meta["shape"]) == (7, 3, 17, [1, 8, 8])
    assert meta["settings"]["steps"] == 4 and meta["settings"]["step"] == 12
    before = files(out)
    assert shards_of(run, out) == 0 and len(drawn) == 5 and files(out) == before  # the batch is no setting of samples
    other = tmp_path / "other"
    assert call("sample", run, *SEVEN, "--shard", 5, "--out", other) == 0
    assert (np.concatenate(list(read_shards(other))) == whole).all()


def test_by_default_shards_lie_in_the_run(runs: Path, tmp_path: Path) -> None:
    run = shutil.copytree(runs / "vdm", tmp_path / "run")
    assert call("sample", run, *SEVEN, "--shard", 4) == 0
    assert len(list(read_shards(run / "samples" / "step-12-ancestral-4-seed0-7"))) == 2


@pytest.mark.parametrize("spoilt", ["cut short", "changed", "not JSON", "another's JSON", "npz gone", "json gone"])
def test_a_shard_that_is_not_what_was_written_is_drawn_again(
    spoilt: str, runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, out = runs / "vdm", tmp_path / "shards"
    assert shards_of(run, out) == 0
    before, shard, said = files(out), out / "shard-00001.npz", out / "shard-00001.json"
    content = shard.read_bytes()
    if spoilt == "cut short":
        shard.write_bytes(content[:-20])
    elif spoilt == "changed":
        shard.write_bytes(content[:100] + bytes([content[100] ^ 1]) + content[101:])
    elif spoilt == "not JSON":
        said.write_text('{"bytes"')
    elif spoilt == "another's JSON":
        said.write_text("[1]\n")
    else:
        (shard if spoilt == "npz gone" else said).unlink()
    with pytest.raises(UserError, match=r"cut short or was changed|1 of 3 shards are missing, the first shard-00001"):
        list(read_shards(out))
    drawn = counted(monkeypatch)
    assert shards_of(run, out) == 0
    assert drawn == [range(3, 6)] and files(out) == before


def test_a_grid_that_is_missing_is_drawn_from_its_shard(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "shards"
    assert shards_of(runs / "vdm", out) == 0
    before, drawn = files(out), counted(monkeypatch)
    (out / "shard-00002.png").unlink()
    assert shards_of(runs / "vdm", out) == 0
    assert files(out) == before and drawn == []


CHANGES = {
    "steps was 4": ("--steps", 5), "seed was 0": ("--seed", 1), "spacing was even": ("--spacing", "quadratic"),
    "variance was None": ("--variance", "fixed-large"), "clip was False": ("--clip",),
    "decoding was argmax": ("--decoding", "categorical"), "method was ancestral": ("--method", "ddim"),
    "weights was ema": ("--weights", "raw"), "count was 7": ("--count", 9), "shard was 3": ("--shard", 4),
}  # fmt: skip


@pytest.mark.parametrize("part", CHANGES)
def test_shards_of_other_settings_are_refused_by_name(
    part: str, runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "shards"
    assert shards_of(runs / "vdm", out) == 0
    before = entries(out)
    capsys.readouterr()
    assert shards_of(runs / "vdm", out, *CHANGES[part]) == 2
    err = capsys.readouterr().err
    assert f"{part} when {out} began and is " in err and err.count("\n") == 1 and entries(out) == before


def test_shards_of_other_weights_are_refused(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Another training, of the same images and steps."""
    other = tiny("vdm-digits", training__evaluate_every=0, training__seed=1)
    assert call("train", "vdm-digits", "--out", tmp_path / "run", *flags(other)) == 0
    assert shards_of(runs / "vdm", tmp_path / "shards") == 0
    assert shards_of(tmp_path / "run", tmp_path / "shards") == 2
    assert "model was " in capsys.readouterr().err


def test_a_folder_of_something_else_is_left_alone(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "thesis.tex").write_text("x")
    assert shards_of(runs / "vdm", tmp_path) == 2
    assert "holds something else and no meta.json" in capsys.readouterr().err
    checkpoint = checkpoints.read_checkpoint(runs / "vdm").path  # it has a meta.json too
    before = entries(checkpoint)
    assert shards_of(runs / "vdm", checkpoint) == 2
    assert "count is missing or not of type int" in capsys.readouterr().err and entries(checkpoint) == before
    assert shards_of(runs / "vdm", tmp_path / "thesis.tex") == 2
    assert "cannot write" in capsys.readouterr().err
    with pytest.raises(UserError, match="holds no shards of samples"):
        read_shards(tmp_path)


def test_one_process_at_a_time(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "shards").mkdir()
    with checkpoints.locked(tmp_path / "shards"):
        assert shards_of(runs / "vdm", tmp_path / "shards") == 2
    assert "another process is sampling into" in capsys.readouterr().err


def noise(model: Any, settings: Settings, numbers: range, seen: Any = None) -> np.ndarray:
    """Images of the same keys as samples, without a network."""
    drawn = Draws(settings.seed, numbers).uniform("decode", model.shape)
    return (drawn * model.levels).to(torch.uint8).numpy()


class Model:
    """What shards ask of a model."""

    def __init__(self) -> None:
        self.shape, self.levels, self.schedule_reads_image = (1, 8, 8), 17, False
        self.schedule = self.reverse = self
        self.timesteps, self.decoder = 0, "levels"


def test_one_shard_is_in_memory_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """200 images in shards of 20 and batches of 5: never are more than 40 of them alive, drawn and joined."""
    alive: list[weakref.ref[np.ndarray]] = []
    most = 0

    def draw(*arguments: Any) -> np.ndarray:
        nonlocal most
        images = noise(*arguments)
        alive.append(weakref.ref(images))
        most = max(most, sum(len(a) for r in alive if (a := r()) is not None))
        return images

    monkeypatch.setattr(sampling, "draw", draw)
    sample_to_shards(Model(), tmp_path, Settings(count=200, batch=5, shard=20), {})  # type: ignore[arg-type]
    assert most <= 40 and len(alive) == 40
    reader = read_shards(tmp_path)
    kept = [weakref.ref(next(reader)) for _ in range(10)]
    assert sum(r() is not None for r in kept) <= 1


KILLED = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
import torch
torch.set_num_threads(1)
from nelbo import sampling
from test_sampling import Model, noise

sampling.draw = noise
place, operation = Path({place!r}), 0

def live(folder, last):
    left = [last]
    def count(event, arguments):
        if event in ("open", "os.mkdir", "os.rename", "os.remove") and str(arguments[0]).startswith(str(folder)):
            left[0] -= 1
            if not left[0]:
                os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(count)
    sampling.sample_to_shards(Model(), folder, sampling.Settings(count=5, batch=2, shard=3), {{}})
    os._exit(0)

def life(folder, last):
    child = os.fork()
    if not child:
        try:
            live(folder, last)
        finally:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

status, torn = -signal.SIGKILL, 0
while status:
    operation += 1
    folder = place / str(operation)
    status = life(folder, operation)
    assert status in (0, -signal.SIGKILL), status
    torn += any(folder.glob(".*.tmp-*"))
    assert life(folder, 0) == 0
print(operation - 1, torn)
"""


def test_killed_at_every_file_operation_the_same_shards_come_out(tmp_path: Path) -> None:
    """SIGKILL at the n-th opening, renaming or making of a file, for every n; then once more, to the end: the files are
    those of a life without kills, and nothing half-written is left."""
    script = KILLED.format(tests=str(Path(__file__).parent), place=str(tmp_path))
    done = subprocess.run([sys.executable, "-c", script], env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    kills, torn = map(int, done.stdout.split())
    assert kills > 20 and torn >= 7  # seven files, each opened aside and renamed
    whole = files(tmp_path / str(kills + 1))
    for n in range(1, kills + 1):
        assert files(tmp_path / str(n)) == whole
    images = noise(Model(), Settings(), range(5))
    assert (np.concatenate(list(read_shards(tmp_path / "1"))) == images).all()


def test_killed_half_way_the_same_command_goes_on(runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SIGKILL once some shards are complete: those stay as they are, the others are those of a life without kills."""
    command = ["--count", "120", "--steps", "20", "--shard", "4"]
    out, whole = tmp_path / "shards", tmp_path / "whole"
    process = subprocess.Popen(
        [sys.executable, "-m", "nelbo.cli", "sample", str(runs / "vdm"), *command, "--out", str(out)],
        env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    until = time.monotonic() + 120
    while len(list(out.glob("*.json"))) < 4 and process.poll() is None and time.monotonic() < until:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    complete = [i for i in range(30) if Shards.read(out).complete(i)]
    assert 3 <= len(complete) < 30
    kept = {path: path.stat().st_mtime_ns for i in complete for path in out.glob(f"shard-{i:05d}.*")}
    drawn = counted(monkeypatch)
    assert call("sample", runs / "vdm", *command, "--out", out) == 0
    assert len(drawn) == 30 - len(complete) and {path: path.stat().st_mtime_ns for path in kept} == kept
    assert call("sample", runs / "vdm", *command, "--out", whole) == 0
    assert files(out) == files(whole)
