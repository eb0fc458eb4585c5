"""Checkpoints of MuLAN, i-DODE and VDM: flax's own bytes read back, and runs that reproduce the recorded numbers.

``write`` packs trees as flax does, byte for byte (tests/flax); states for it are made of the reference cases.
"""

import lzma
import math
import random
import re
import subprocess
import sys
from pathlib import Path

import msgpack
import numpy as np
import pytest
import torch
from torch import nn

import nelbo
import reference_odes
import test_reference
from nelbo import checkpoints, convert, objectives, pixels
from nelbo.cli import main
from nelbo.config import Config, DataConfig
from nelbo.convert import flax_msgpack
from nelbo.convert.flax_checkpoints import channels_first, unflatten
from nelbo.errors import UserError
from nelbo.presets import PRESETS, preset
from nelbo.resolve import resolve
from reference_cases import Case, Comparison, VelocityFromEpsilon, build_schedule

HERE, CASES = Path(__file__).parent / "flax", Path(__file__).parent / "reference"
GAMMA = {"learnable_scalar": ("w", "b"), "learnable_nnet": ("l1/", "l2/", "l3/"), "fixed": ()}


class Brain:
    """A bfloat16 array."""

    def __init__(self, values):
        self.values = torch.as_tensor(values).bfloat16()


def write(tree, limit=2**30):
    """flax.serialization's bytes; arrays of more than ``limit`` bytes in pieces."""

    def array(a):
        if isinstance(a, Brain):
            return msgpack.packb((tuple(a.values.shape), "bfloat16", a.values.view(torch.int16).numpy().tobytes()))
        return msgpack.packb((a.shape, a.dtype.name, a.tobytes()))

    def numbered(values):
        return {str(i): v for i, v in enumerate(values)}

    def leaf(a):
        if isinstance(a, complex):
            return msgpack.ExtType(2, msgpack.packb((a.real, a.imag)))
        return msgpack.ExtType(3 if isinstance(a, np.generic) else 1, array(np.asarray(a) if a is None else a))

    def pieces(value):
        if isinstance(value, dict):
            return {key: pieces(v) for key, v in value.items()}
        size = value.values.numel() * 2 if isinstance(value, Brain) else getattr(value, "nbytes", 0)
        if size <= limit:
            return value
        brain = isinstance(value, Brain)
        flat, length = (value.values if brain else value).reshape(-1), limit // (2 if brain else value.itemsize)
        parts = [flat[i : i + length] for i in range(0, len(flat), length)]
        shape = (value.values if brain else value).shape
        made = numbered(Brain(p) if brain else p for p in parts)
        return {"__msgpack_chunked_array__": True, "shape": numbered(shape), "chunks": made}

    return msgpack.packb(pieces(tree), default=leaf, strict_types=True)


def nested(flat):
    """a/b -> values as a tree."""
    tree = {}
    for name, value in flat.items():
        *path, last = name.split("/")
        node = tree
        for part in path:
            node = node.setdefault(part, {})
        node[last] = value
    return tree


def flat(tree, where=""):
    found = {}
    for name, value in tree.items():
        found |= flat(value, f"{where}{name}/") if isinstance(value, dict) else {where + name: value}
    return found


def parameters(case, gamma=None, swap=None):
    """A case's parameters by their flax paths; of several schedules the one named."""
    found = {n.removeprefix("params/"): a for n, a in case.arrays.items() if n.startswith("params/")}
    if gamma is not None:
        own = tuple(f"gamma/{n}" for n in GAMMA[gamma])
        found = {n: a for n, a in found.items() if not n.startswith("gamma/") or (own and n.startswith(own))}
    return found


def adam(mu, nu, count=2):
    """The state of optax.adamw."""
    return {"0": {"count": np.array(count, np.int32), "mu": mu, "nu": nu}, "1": {"inner_state": {}}, "2": {}}


def state(values, **more):
    """A TrainState's tree: raw weights, averages twice as large."""
    ema = {name: 2 * a for name, a in values.items()}
    return {"step": 7, "params": nested(values), "ema_params": nested(ema), "opt_state": {}} | more


def converted(tmp_path, kind, tree, *flags, name="run", limit=2**30):
    """The run that the verb makes of a tree."""
    file = tmp_path / f"{name}.flax"
    file.write_bytes(write(tree, limit))
    assert main(["convert", str(file), "--from", kind, "--out", str(tmp_path / name), *map(str, flags)]) == 0
    return tmp_path / name


def tensors(run, name):
    return checkpoints.load_tensors(checkpoints.read_checkpoint(run), name)


def raw(run):
    return nelbo.load(run, weights="raw")


SMALL = ("--size", 8, 12)
VELOCITY = ("--preset", "mulan-velocity-cifar10", *SMALL, "--latent.k", 6)


@pytest.fixture(scope="module")
def stored():
    """flax's own file of a MuLAN TrainState, after two steps of its masked AdamWs."""
    return lzma.decompress((HERE / "mulan_velocity_loss_small.flax.xz").read_bytes())


@pytest.fixture(scope="module")
def small():
    return Case(CASES / "mulan_velocity_loss_small.npz")


# The reader ----------------------------------------------------------------------------------------------------------


def leaves():
    """What tests/flax/make.py wrote as pieces.flax."""
    numbers = np.arange(60).reshape(3, 4, 5)
    tree = {name: numbers.astype(name) for name in ("float16", "float32", "float64", "int8", "int64", "uint8")}
    tree |= {"bfloat16": Brain(numbers / 7), "bool": numbers % 2 == 0, "small": np.float32([1.5, -2])}
    tree |= {"empty": np.zeros((0, 3), np.float32), "scalar": np.float32(0.1), "none": None}
    tree |= {"complex64": (numbers + 1j * numbers[::-1]).astype(np.complex64), "complex": 1.5 - 2j}
    deep = {"list": {"0": 1, "1": {"x": np.int32([7])}}, "tuple": {}, "text": "ä", "true": True, "number": 2**40}
    order = ("float16 float32 float64 int8 int64 uint8 bfloat16 bool small empty scalar complex64 complex none").split()
    return {name: tree[name] for name in order} | {"deep": deep}


def test_every_kind_of_leaf_is_read_as_it_was_written():
    found, wanted = flat(flax_msgpack.read(HERE / "pieces.flax")), flat(leaves())
    assert list(found) == list(wanted)
    for name, value in wanted.items():
        value = value.values.float().numpy() if isinstance(value, Brain) else value
        if isinstance(value, np.ndarray):
            assert found[name].dtype == value.dtype, name
        np.testing.assert_array_equal(found[name], value, err_msg=name)


def test_the_writer_here_writes_flaxs_bytes(stored):
    assert write(leaves(), 64) == (HERE / "pieces.flax").read_bytes()
    assert write(flax_msgpack.unpack(stored)) == stored


def spoil(content, draws):
    """A mutated copy: bits, bytes, a piece taken out, doubled or cut off."""
    content = bytearray(content)
    for _ in range(draws.choice((1, 1, 2, 8))):
        place = draws.randrange(len(content))
        match draws.randrange(5):
            case 0:
                content[place] ^= 1 << draws.randrange(8)
            case 1:
                content[place] = draws.choice((0x00, 0x80, 0x90, 0xC1, 0xC7, 0xC9, 0xD4, 0xDD, 0xDF, 0xFF))
            case 2:
                del content[place : place + draws.randrange(1, 9)]
            case 3:
                content[place:place] = content[place : place + draws.randrange(1, 40)]
            case _:
                del content[place:]
        if not content:
            break
    return bytes(content)


def test_two_thousand_spoilt_files_are_a_tree_or_a_mistake_of_one_line(tmp_path):
    draws, file, read = random.Random(5), tmp_path / "x.flax", 0
    tiny = write(state({"score_model/conv_in/kernel": np.ones((1, 1, 2, 2), np.float32)}))
    originals = ((HERE / "pieces.flax").read_bytes(), write(leaves()), tiny)
    for i in range(2000):
        file.write_bytes(spoil(originals[i % 3], draws))
        try:
            assert isinstance(flax_msgpack.read(file), dict)
            read += 1
        except UserError as error:
            assert "x.flax is not a checkpoint of flax" in str(error) and "\n" not in str(error)
    assert 100 < read < 1500  # mutations of numbers are harmless, most others are not


BOMBS = {
    "list": b"\x81\xa1a\xdd\xff\xff\xff\xff",
    "map": b"\xdf\xff\xff\xff\xff",
    "text": b"\x81\xdb\xff\xff\xff\xff",
    "bytes": b"\x81\xa1a\xc6\xff\xff\xff\xff",
    "extension": b"\x81\xa1a\xc9\xff\xff\xff\xff\x01",
    "depth": b"\x81\xa1a" * 100_000,
    "nothing": b"",
    "number": b"\x01",
    "two messages": b"\x80\x80",
    "name of bytes": b"\x81\xc4\x01a\x01",
    "name twice": b"\x82\xa1a\x01\xa1a\x02",
    "time": b"\x81\xa1a\xd6\xff\x00\x00\x00\x00",
    "foreign extension": b"\x81\xa1a\xd4\x07\x00",
}


@pytest.mark.parametrize("name", BOMBS)
def test_files_that_claim_too_much_or_are_none(tmp_path, name):
    (tmp_path / "x").write_bytes(BOMBS[name])
    with pytest.raises(UserError, match="is not a checkpoint of flax, or is damaged or cut off"):
        flax_msgpack.read(tmp_path / "x")


def extension(*parts, code=1):
    return msgpack.packb({"a": msgpack.ExtType(code, msgpack.packb(parts))})


ARRAYS = {
    "negative": extension((-2, -2), "int8", b"abcd"),
    "short": extension((2, 3), "float32", b"abcd"),
    "objects": extension((1,), "object", b"abcdefgh"),
    "void": extension((1,), "V8", b"abcdefgh"),
    "axes": extension((1,) * 33, "int8", b"a"),
    "scalar": extension((1,), "int8", b"a", code=3),
    "complex": extension(1, 2, code=2),
    "parts": extension((1,), "int8"),
    "pieces": write({"a": {"__msgpack_chunked_array__": True, "shape": {"0": 3}, "chunks": {"0": np.ones(2)}}}),
    "no pieces": write({"a": {"__msgpack_chunked_array__": True}}),
    "types": write(
        {"a": {"__msgpack_chunked_array__": True, "shape": {"0": 2},
               "chunks": {"0": np.ones(1), "1": np.ones(1, np.float32)}}}
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ARRAYS)
def test_arrays_that_contradict_themselves_are_refused(name):
    with pytest.raises(ValueError, match=r"array|scalar|complex|numbered|list"):
        flax_msgpack.unpack(ARRAYS[name])


# Parity --------------------------------------------------------------------------------------------------------------


def check(monkeypatch, case, models, kind):
    """The recorded comparison of a case with converted models in place of its own; ``models(settings, v)``."""
    monkeypatch.setattr(test_reference, "build_model", lambda _, settings, shape, v: models(settings, v))
    monkeypatch.setattr(reference_odes, "build", lambda _, settings, shape, v: models(settings, v))
    compare = Comparison(case)
    test_reference.KINDS[kind](case, compare)
    compare.finish(complete=True)
    assert len(compare.rows) > 3


@pytest.mark.parametrize("limit", (2**30, 1000))
def test_vdms_losses_follow_from_its_checkpoints(tmp_path, monkeypatch, limit):
    case = Case(CASES / "vdm_loss.npz")
    runs = {g: converted(tmp_path, "vdm", state(parameters(case, g)), name=g, limit=limit) for g in GAMMA}
    kinds = {"learnable_scalar": "learned", "learnable_nnet": "free", "fixed": "fixed"}
    for gamma, ends in kinds.items():
        config = checkpoints.read_run(runs[gamma])["config"]
        assert (config["schedule"]["ends"], config["network"]["channels"], config["network"]["levels"]) == (ends, 64, 2)
    check(monkeypatch, case, lambda settings, v: raw(runs[settings["gamma_type"]]), "vdm_loss")


def test_a_step_of_vdms_sampler_follows_from_its_checkpoint(tmp_path, monkeypatch):
    case = Case(CASES / "vdm_ancestral_small.npz")
    run = converted(tmp_path, "vdm", state(parameters(case)), *SMALL)
    check(monkeypatch, case, lambda settings, v: raw(run), "vdm_ancestral")


def test_mulans_losses_follow_from_its_checkpoint(tmp_path, monkeypatch):
    case = Case(CASES / "mulan_epsilon_loss.npz")
    run = converted(tmp_path, "mulan", state(parameters(case)), "--preset", "mulan-cifar10")
    record = checkpoints.read_run(run)
    assert record["data"]["shape"] == [3, 32, 32] and record["config"]["schedule"]["width"] == 16
    check(monkeypatch, case, lambda settings, v: raw(run), "mulan_epsilon_loss")


def test_mulans_velocity_follows_from_flaxs_own_file(tmp_path, monkeypatch, stored, small):
    """Both ways to use its network: as a velocity, and as the noise that a velocity is made of."""
    (tmp_path / "ckpt-3.flax").write_bytes(b"older")
    (tmp_path / "ckpt-20.flax").write_bytes(stored)
    (tmp_path / "ckpt-4.flax").write_bytes(b"older")
    for name, more in (("velocity", ()), ("noise", ("--parameterization", "noise"))):
        line = ["convert", tmp_path, "--from", "mulan", "--out", tmp_path / name, *VELOCITY, *more]
        assert main(list(map(str, line))) == 0

    def model(settings, v):
        found = raw(tmp_path / ("noise" if settings["velocity_from_epsilon"] else "velocity"))
        if settings["velocity_from_epsilon"]:
            found.network = VelocityFromEpsilon(found.network)
            found.parameterization = test_reference.PARAMETERIZATIONS["velocity"]()
        return found

    check(monkeypatch, small, model, "mulan_velocity_loss")
    # The bound of the run of noise itself is the recorded one too.
    v, found = "velocity_from_epsilon/", raw(tmp_path / "noise")
    images = channels_first(small["in/images"])
    x, t = pixels.encode(images, 256), test_reference.draw_times(small, v, len(images))
    eps, eps_0 = (channels_first(small[f"draw/{v}{n}"]) for n in ("eps", "eps_0"))
    latent = found.infer(x, test_reference.latent_noise(small, v, found))
    terms = objectives.elbo(found, images, t=t, eps=eps, eps_0=eps_0, latent=latent)
    torch.testing.assert_close(terms.diffusion, small[f"out/{v}loss_diff"], rtol=3e-4, atol=0)


class AsPublished(nn.Module):
    """A converted straight velocity in i-DODE's units, and the gradients in its weights."""

    def __init__(self, network):
        super().__init__()
        self.network, self.channels = network, network.channels
        for parameter in network.conv_out.parameters():
            parameter.register_hook(lambda g: math.sqrt(2) * g)

    def forward(self, *inputs):
        return self.network(*inputs) / math.sqrt(2)

    def named_parameters(self, *args, **kwargs):
        return self.network.named_parameters(*args, **kwargs)


IDODE = {
    kind: ("--preset", f"idode-{path}-cifar10", "--parameterization", what, *more)
    for kind, path, what, more in (
        ("vp", "vp", "velocity", ()),
        ("sp", "sp", "velocity", ()),
        ("vp_noise", "vp", "noise", ("--objective.times", "stratified")),
        ("sp_noise", "sp", "noise", ("--objective.times", "stratified")),
    )
}


def idode_runs(tmp_path, case, *flags):
    tree = state(parameters(case))
    return {kind: converted(tmp_path, "idode", tree, *more, *flags, name=kind) for kind, more in IDODE.items()}


def test_idodes_losses_follow_from_its_checkpoint(tmp_path, monkeypatch):
    case = Case(CASES / "idode_loss_small.npz")
    runs = idode_runs(tmp_path, case, *SMALL)

    def model(settings, v):
        kind = v[:2] + "_noise" * v.endswith("noise")
        found = raw(runs[kind])
        if kind == "sp":
            found.network = reference_odes.Scaled(AsPublished(found.network), math.sqrt(2))
        return found

    check(monkeypatch, case, model, "idode_loss")


def test_idodes_drift_follows_from_its_checkpoint(tmp_path, monkeypatch):
    case = Case(CASES / "idode_ode_drift.npz")
    runs = idode_runs(tmp_path, case)
    check(monkeypatch, case, lambda settings, v: raw(runs[v]), "idode_ode_drift")


@pytest.mark.slow
def test_mulans_likelihood_by_ode_follows_from_its_checkpoint(tmp_path, monkeypatch):
    case = Case(CASES / "mulan_ode_likelihood.npz")
    kinds = ("velocity", "noise")
    runs = {
        k: converted(tmp_path, "mulan", state(parameters(case)), "--preset", "mulan-cifar10", "--parameterization", k,
                     name=k)
        for k in kinds
    }  # fmt: skip
    check(monkeypatch, case, lambda settings, v: raw(runs["noise" if v == "epsilon" else "velocity"]),
          "mulan_ode_likelihood")  # fmt: skip


def test_the_ablations_networks_and_schedules(tmp_path):
    """Per-pixel denoiser, CNN and Gaussian encoders, per-pixel monotone and no schedule network, a flag, labels."""
    case = Case(CASES / "score_unet_per_pixel_small.npz")
    score = {f"score_model/{n}": a for n, a in parameters(case).items()}
    cnn, gaussian = (Case(CASES / f"encoder_{n}_small.npz") for n in ("cnn", "unet_gaussian"))
    encoders = [{f"encoder_model/{n}": a for n, a in parameters(c).items()} for c in (cnn, gaussian)]
    draws = np.random.default_rng(3)
    monotone = {"l1/kernel": (1, 1), "l1/bias": (1,), "l2/kernel": (21, 6), "l2/bias": (6,), "l_int/kernel": (6, 6),
                "l_int/bias": (6,), "l3/kernel": (6, 288)}  # fmt: skip
    gamma = {n: draws.normal(size=s).astype(np.float32) for n, s in monotone.items()}
    tree = state(score | encoders[0] | {f"gamma/{n}": a for n, a in gamma.items()})
    one_hot = ("--preset", "mulan-one-hot-digits", "--schedule.gamma-min", "-13.3", *SMALL)
    m = raw(converted(tmp_path, "mulan", tree, *one_hot))
    torch.testing.assert_close(
        m.network(channels_first(case["in/z"]), channels_first(case["in/g_t"]), case["in/conditioning"]),
        channels_first(case["out/eps_hat"]), rtol=0, atol=5e-4,
    )  # fmt: skip
    torch.testing.assert_close(m.encoder(m.reals(channels_first(cnn["in/images"])))[0], cnn["out/logits"],
                               rtol=0, atol=3e-4)  # fmt: skip
    c = torch.eye(20)[:2]
    own = {n: torch.from_numpy(a) for n, a in gamma.items()}
    theirs = build_schedule(own, {"gamma_min": -13.3, "gamma_max": 5.0}, (3, 8, 12))
    by_hand = public_monotone(own, c, torch.tensor([0.3, 0.8]))
    for curve in (m.schedule, theirs):
        torch.testing.assert_close(curve(torch.tensor([0.3, 0.8]), c)[0], by_hand, rtol=1e-5, atol=1e-5)

    tree = state(score | encoders[1])
    gauss = ("--preset", "mulan-gaussian-digits", "--schedule.gamma-min", "-13.3", *SMALL)
    m = raw(converted(tmp_path, "mulan", tree, *gauss, name="gaussian"))
    mu, var = m.encoder(m.reals(channels_first(gaussian["in/images"])))
    torch.testing.assert_close(mu, gaussian["out/mu"], rtol=0, atol=3e-4)
    torch.testing.assert_close(nn.functional.softplus(var), gaussian["out/var"], rtol=0, atol=3e-4)
    assert m.schedule(torch.tensor([0.5]))[0].flatten().tolist() == pytest.approx([-4.15])

    # z_conditioning = False: the network's one column is our flag.
    narrow = {n: a[: 192 + 1] if n == "score_model/dense0/kernel" else a for n, a in score.items()}
    m = raw(converted(tmp_path, "mulan", state(narrow | encoders[0]), *one_hot, name="flag"))
    assert m.flag and not m.network_sees_latent
    # c is the class label: no encoder.
    gamma["l2/kernel"] = gamma["l2/kernel"][:11]
    tree = state(narrow | {f"gamma/{n}": a for n, a in gamma.items()})
    m = raw(converted(tmp_path, "mulan", tree, "--preset", "mulan-label-digits", *SMALL, name="label"))
    assert m.encoder is None and m.latent.size == 10


def public_monotone(p, c, t):
    """MuLAN's per-pixel monotone network, written as in its code on (B, features), then put into our layout."""
    p = {n: a.abs() if n.endswith("kernel") else a for n, a in p.items()}
    u = torch.cat([c, t[:, None]], 1)
    h = 2 * (torch.sigmoid(2 * (u - 0.5) @ p["l2/kernel"] + p["l2/bias"]) - 0.5)
    h = 2 * (torch.sigmoid(h @ p["l_int/kernel"] + p["l_int/bias"]) - 0.5)
    return unflatten(t[:, None] @ p["l1/kernel"] + p["l1/bias"] + h @ p["l3/kernel"] / len(h[0]), (3, 8, 12))


# Averages and moments ------------------------------------------------------------------------------------------------


def test_averages_and_moments_are_those_of_flaxs_own_file(tmp_path, stored, small):
    (tmp_path / "a.flax").write_bytes(stored)
    assert main(["convert", str(tmp_path / "a.flax"), "--from", "mulan", "--out", str(tmp_path / "a"),
                 *map(str, VELOCITY)]) == 0  # fmt: skip
    values = parameters(small)
    ema = {n: -a if a.ndim < 2 or "/conv_out/" in n else a for n, a in values.items()}  # as make.py says
    gradient = {n: np.where(np.arange(a.size).reshape(a.shape) % 16 == 0, a + 0.25, 0) for n, a in values.items()}
    mu = {n: ((1 - 0.9**2) * g).astype(np.float32) for n, g in gradient.items()}
    nu = {n: ((1 - 0.99**2) * g**2).astype(np.float32) for n, g in gradient.items()}
    # Moments lie as weights do: the same values converted as weights say where each must be.
    for file, prefix, wanted in (
        ("weights.safetensors", "", values), ("ema.safetensors", "", ema),
        ("optimizer.safetensors", "exp_avg.", mu), ("optimizer.safetensors", "exp_avg_sq.", nu),
    ):  # fmt: skip
        found = tensors(tmp_path / "a", file)
        expected = tensors(converted(tmp_path, "mulan", state(wanted), *VELOCITY, name=f"b{prefix}{file}"),
                           "weights.safetensors")  # fmt: skip
        for name, value in expected.items():
            torch.testing.assert_close(found[prefix + name], value, rtol=1e-6, atol=1e-12)
    steps = {n: v for n, v in tensors(tmp_path / "a", "optimizer.safetensors").items() if n.startswith("step.")}
    assert len(steps) == len(values) and all(v == 2 and v.dtype == torch.float32 for v in steps.values())
    assert checkpoints.read_checkpoint(tmp_path / "a").step == 1234


def test_a_straight_velocitys_moments_are_of_the_gradients_of_its_scaled_weights(tmp_path):
    values = parameters(Case(CASES / "idode_loss_small.npz"))
    square = {n: a**2 for n, a in values.items()}
    many = {"mini_step": np.array(1, np.int32), "inner_opt_state": {"0": {}, "1": adam(nested(values), nested(square))}}
    run = converted(tmp_path, "idode", state(values, opt_state=many), *IDODE["sp"], *SMALL)
    plain = converted(tmp_path, "idode", state(values), *IDODE["vp"], *SMALL, name="vp")
    found, weights = (tensors(run, f"{name}.safetensors") for name in ("optimizer", "weights"))
    published = tensors(plain, "weights.safetensors")
    for name, value in published.items():
        scale = math.sqrt(2) if "conv_out" in name else 1
        torch.testing.assert_close(weights[name], scale * value)
        torch.testing.assert_close(found[f"exp_avg.{name}"], value / scale)
        torch.testing.assert_close(found[f"exp_avg_sq.{name}"], value**2 / scale**2)
    assert "optimizer.safetensors" not in checkpoints.read_checkpoint(plain).meta["files"]


def test_one_set_of_weights_serves_as_both(tmp_path, small):
    tree = state(parameters(small))
    del tree["params"]
    run = converted(tmp_path, "mulan", tree, *VELOCITY)
    assert raw(run).network.conv_out.weight.equal(nelbo.load(run).network.conv_out.weight)


def test_a_converted_run_is_evaluated_sampled_reported_and_trained_on(tmp_path, capsys, monkeypatch, stored):
    monkeypatch.chdir(tmp_path)
    images = np.random.default_rng(1).integers(0, 256, (40, 3, 8, 12), dtype=np.uint8)
    np.savez("images.npz", images=images)
    Path("x.flax").write_bytes(stored)
    preset_flags = ("--preset", "mulan-velocity-cifar10", "--latent.k", "6", "--data.source", "images.npz")
    # The size of the images is that of the data set, which is a file here.
    assert main(["convert", "x.flax", "--from", "mulan", "--out", "run", *preset_flags]) == 0
    said = capsys.readouterr().out
    for wanted in (
        "preset mulan-velocity-cifar10", "network.channels = 64", "latent.size = 20", "images = 3x8x12",
        "parameterization = velocity", "schedule.gamma_min = -13.3", "weights: raw and ema",
        "738,712 parameters (network 431,619, schedule 15,296, encoder 291,797), step 1234", "written: run",
    ):  # fmt: skip
        assert wanted in said
    record = checkpoints.read_run("run")
    assert record["converted"]["program"] == "s-sahoo/MuLAN" and record["preset"] == "mulan-velocity-cifar10"
    assert main(["evaluate", "run", "--images", "2", "--times", "1"]) == 0
    assert "run, step 1234, ema weights: 2 of 4 test images of images.npz" in capsys.readouterr().out
    assert main(["sample", "run", "--count", "2", "--steps", "2"]) == 0
    assert main(["report", "run"]) == 0
    assert Path("run/report.html").is_file()
    capsys.readouterr()

    # The command that it names trains on, with the moments.
    line = said[said.index("to train on: nelbo ") :].splitlines()[0].removeprefix("to train on: nelbo ")
    more = ["--training.steps", "1", "--training.batch", "4", "--training.evaluate-every", "0",
            "--optimizer.warmup", "0", "--network.dropout", "0"]  # fmt: skip
    for out, without in (("with", ""), ("without", "--init-optimizer")):
        assert main([*line.replace("...", out).replace(without or "\0", "").split(), *more]) == 0
    before, after, fresh = (tensors(r, "optimizer.safetensors") for r in ("run", "with", "without"))
    weights = [tensors(r, "weights.safetensors") for r in ("run", "with", "without")]
    for name in weights[0]:
        # A fresh average holds a tenth of the one step's gradient; ours holds that and nine tenths of what it was.
        expected = 0.9 * before[f"exp_avg.{name}"] + fresh[f"exp_avg.{name}"]
        torch.testing.assert_close(after[f"exp_avg.{name}"], expected, rtol=1e-4, atol=1e-7)
        expected = 0.99 * before[f"exp_avg_sq.{name}"] + fresh[f"exp_avg_sq.{name}"]
        torch.testing.assert_close(after[f"exp_avg_sq.{name}"], expected, rtol=1e-4, atol=1e-10)
        assert after[f"step.{name}"] == 3 and fresh[f"step.{name}"] == 1
    moved = [(w["network.conv_out.weight"] - weights[0]["network.conv_out.weight"]).abs().max() for w in weights[1:]]
    assert 0 < moved[0] < 0.002 and 0 < moved[1] < 0.002


# Mistakes ------------------------------------------------------------------------------------------------------------

MORE = {
    "left over": (lambda p: p | {"score_model/down.block_9/extra/kernel": p["score_model/conv_in/kernel"]},
                  r"1 of its parameters have no place \(score_model/down.block_9/extra/kernel\)"),
    "missing": (lambda p: {n: a for n, a in p.items() if n != "encoder_model/mid.attn_1/q/bias"},
                r"1 of the network's are missing \(encoder.trunk.middle.0.attention.q.bias\)"),
    "both": (lambda p: {n.replace("mid.attn_1/q/bias", "mid.attn_1/q/offset"): a for n, a in p.items()},
             "2 of its parameters have no place .*; 2 of the network's are missing"),
    "two for one": (
        lambda p: p | {"encoder_model/dense_layer_final_mu/bias": np.zeros(20, np.float32)},
        "2 of its parameters have no place"),
    "empty": (lambda p: p | {"score_model/conv_out/kernel": np.zeros((3, 3, 64, 0), np.float32)}, "has no conv_out/"),
    "an axis more": (lambda p: p | {"gamma/dense_out_a/bias": np.zeros((1, 288), np.float32)}, r"shape \(1, 288\)"),
    "part": (lambda p: p | {"encdec/w": np.zeros(1, np.float32)}, "it has the part encdec; the known ones are"),
    "shape": (lambda p: p | {"score_model/conv_out/bias": np.zeros(4, np.float32)}, r"conv_out/bias has shape \(4,\)"),
    "transposed": (lambda p: p | {"score_model/mid.attn_1/q/kernel": np.zeros((32, 128), np.float32)},
                   r"q/kernel has shape \(32, 128\)"),
    "no network": (lambda p: {n: a for n, a in p.items() if not n.startswith("score_model")}, "it has no conv_out/ker"),
    "whole numbers": (lambda p: p | {"score_model/conv_out/bias": np.zeros(3, np.int32)}, "not an array of real numb"),
    "channels": (lambda p: p | {"score_model/conv_in/kernel": np.zeros((3, 3, 14, 64), np.float32)},
                 "reads 14 channels, which are no Fourier features of 3"),
    "exponents": (lambda p: p | {"score_model/conv_in/kernel": np.zeros((3, 3, 9, 64), np.float32)},
                  "denoiser and encoder differ"),
    "columns": (lambda p: p | {"score_model/dense0/kernel": np.zeros((70, 256), np.float32)}, "dense0 reads 70 numb"),
    "latent": (lambda p: p | {"gamma/dense_1/kernel": np.zeros((19, 16), np.float32)}, "gamma reads 19 entries of a"),
    "no encoder": (lambda p: {n: a for n, a in p.items() if not n.startswith("encoder")}, "give --latent.kind label"),
    "pixels": (lambda p: p | {"encoder_model/dense_layer_final/kernel": np.zeros((64, 20), np.float32)},
               "its parts are of images of 64 and 96 pixels"),
    "as many groups as channels": (
        lambda p: {n: a[..., :32] if n == "score_model/conv_in/kernel" else a for n, a in p.items()},
        "score_model/dense0 reads 84"),
}  # fmt: skip


@pytest.mark.parametrize("name", MORE)
def test_parameters_that_do_not_fit_are_named(tmp_path, capsys, small, name):
    change, wanted = MORE[name]
    (tmp_path / "x.flax").write_bytes(write(state(change(parameters(small)))))
    flags = list(map(str, VELOCITY))
    assert main(["convert", str(tmp_path / "x.flax"), "--from", "mulan", "--out", str(tmp_path / "run"), *flags]) == 2
    said = capsys.readouterr().err
    assert len(said.splitlines()) == 1 and not (tmp_path / "run").exists()
    assert re.search(wanted, said), said


LINES = {
    "no kind": (["x.flax", "--out", "run"], "--from must be one of mulan, idode, vdm"),
    "kind": (["x.flax", "--out", "run", "--from", "flax"], "got flax"),
    "preset": (["x.flax", "--out", "run", "--from", "mulan"], "--preset is needed for --from mulan"),
    "unknown preset": (["x.flax", "--out", "run", "--from", "vdm", "--preset", "vdm"], "unknown preset 'vdm'"),
    "family": (["x.flax", "--out", "run", "--from", "mulan", "--preset", "ddpm-cifar10"], "got ends and ddpm"),
    "out": (["x.flax", "--from", "mulan", *VELOCITY], "convert needs --out RUN"),
    "source": (["--out", "run", "--from", "mulan", *VELOCITY], "SOURCE is missing"),
    "nothing": (["nothing.flax", "--out", "run", "--from", "vdm"], "cannot read nothing.flax: No such file"),
    "folder": ([".", "--out", "run", "--from", "vdm"], "must hold ckpt-N.flax, and . holds none"),
    "size": (["x.flax", "--out", "run", "--from", "mulan", "--preset", "mulan-velocity-cifar10"],
             "give --size HEIGHT WIDTH: the file's images have 3 channels and 96 pixels"),
    "wrong size": (["x.flax", "--out", "run", "--from", "mulan", *VELOCITY, "--size", "8", "8"],
                   "--size must be a height and a width of 96 pixels, as the file's images are, got 8 8"),
    "levels": (["x.flax", "--out", "run", "--from", "mulan", *VELOCITY, "--levels", "300"], "2 .. 256, got 300"),
    "another program's": (["x.flax", "--out", "run", "--from", "vdm"], "it has an encoder_model, as MuLAN's have"),
    "data": (["x.flax", "--out", "run", "--from", "mulan", *VELOCITY, "--parameterization", "data"],
             "--parameterization must be noise or velocity"),
    "kind of latent": (["x.flax", "--out", "run", "--from", "mulan", "--preset", "vdm-cifar10", *SMALL],
                       "give --latent.kind k-hot or one-hot, got none"),
    "unknown": (["x.flax", "--out", "run", "--from", "vdm", "--network.chanels", "3"],
                "did you mean --network.channels"),
    "full": (["x.flax", "--out", "full", "--from", "mulan", *VELOCITY], "--out needs a new or empty folder"),
    "cut off": (["cut.flax", "--out", "run", "--from", "vdm"], "is not a checkpoint of flax, or is damaged or cut off"),
    "foreign": (["images.npz", "--out", "run", "--from", "vdm"], "is not a checkpoint of flax"),
    "other tree": (["other.flax", "--out", "run", "--from", "vdm"], "it holds no params and no ema_params"),
    "step": (["step.flax", "--out", "run", "--from", "mulan", *VELOCITY], "its step is not a whole number"),
}  # fmt: skip


@pytest.mark.parametrize("name", LINES)
def test_mistakes_get_one_line(tmp_path, monkeypatch, capsys, stored, small, name):
    monkeypatch.chdir(tmp_path)
    if "x.flax" in LINES[name][0]:
        Path("x.flax").write_bytes(stored)
    Path("cut.flax").write_bytes(stored[:100_000])
    Path("other.flax").write_bytes(write({"weights": {"w": np.ones(3, np.float32)}}))
    if name == "step":
        Path("step.flax").write_bytes(write(state(parameters(small), step="seven")))
    np.savez("images.npz", images=np.zeros((4, 8, 8), np.uint8))
    Path("full").mkdir()
    Path("full/x").touch()
    assert main(["convert", *map(str, LINES[name][0])]) == 2
    said = capsys.readouterr().err
    assert LINES[name][1] in said and len(said.splitlines()) == 1
    assert not Path("run").exists()


NOTES = {
    "none": ({}, "there are none"),
    "sgd": ({"0": {"trace": {}}}, "there are none"),
    "number": ({"0": {"count": 1, "mu": 2, "nu": 3}}, "is int"),
    "half": (lambda p: adam(nested({n: a for n, a in p.items() if "gamma" not in n}), nested(p)), "of gamma/"),
    "missing": (lambda p: adam(*2 * [nested({n: a for n, a in p.items() if "gamma" not in n})]), "none of gamma/"),
    "twice": (lambda p: {"0": adam(nested(p), nested(p)), "1": adam(nested(p), nested(p))}, "do not fit"),
    "shape": (lambda p: adam(*2 * [nested({n: a[:1] for n, a in p.items()})]), "have another shape"),
}


@pytest.mark.parametrize("name", NOTES)
def test_moments_of_another_form_are_left_out_and_it_is_said(tmp_path, capsys, small, name):
    moments, wanted = NOTES[name]
    tree = state(parameters(small), opt_state=moments(parameters(small)) if callable(moments) else moments)
    run = converted(tmp_path, "mulan", tree, *VELOCITY)
    said = capsys.readouterr().out
    assert "the optimizer's moments were left out: " in said and wanted in said and "--init-optimizer" not in said
    assert set(checkpoints.read_checkpoint(run).meta["files"]) == {"weights.safetensors", "ema.safetensors"}


def test_what_is_known_of_the_presets_data_sets_is_so():
    sources = {preset(name).data.source for name in PRESETS}
    sizes = {"digits": ((1, 8, 8), 17), "photos32": ((3, 32, 32), 256), "fashion-mnist": ((1, 28, 28), 256)}
    sizes |= {name: ((3, 32, 32), 256) for name in ("cifar10", "imagenet32-old", "imagenet32-new")}
    sizes |= {"imagenet64": ((3, 64, 64), 256)}
    assert sources <= sizes.keys()
    for name, size in sizes.items():
        assert convert.known_images(Config(data=DataConfig(name))) == size


def test_images_of_another_data_set_are_not_taken_for_the_presets(tmp_path):
    """A CIFAR-10 network with a digits preset: 32x32 by the shapes, and 256 levels, not 17."""
    case = Case(CASES / "mulan_epsilon_loss.npz")
    flags = ("--preset", "mulan-digits", "--schedule.gamma-min", "-9")
    run = converted(tmp_path, "mulan", state(parameters(case)), *flags)
    coarse = raw(converted(tmp_path, "mulan", state(parameters(case)), *flags, "--levels", 64, name="coarse"))
    assert coarse.levels == 64 and coarse.network.trunk.fourier == coarse.encoder.trunk.fourier == (6.0, 7.0)
    found = resolve(run)
    assert (found.shape, found.levels) == ((3, 32, 32), 256)
    assert raw(run).network.trunk.fourier == (6.0, 7.0) and raw(run).schedule.gamma_0 == -9


def test_help_and_mistakes_need_no_torch():
    program = (
        "import sys; from nelbo.cli import main\n"
        "assert main(['convert', 'x', '--from', 'vdm', '--network.levels', 'no']) == 2\n"
        "try: main(['convert', '--help'])\n"
        "except SystemExit as e: assert not e.code\n"
        "assert 'torch' not in sys.modules and 'numpy' not in sys.modules, 'slow'\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "nelbo convert SOURCE --from KIND --out RUN [--preset NAME]" in done.stdout and "--size" in done.stdout
