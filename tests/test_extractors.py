"""What makes features of images: levels, the small network, any callable, and torch-fidelity's inception."""

import io
import json
import math
import sys
import types
from collections.abc import Iterator
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from nelbo import cli, feature_sums, metrics
from nelbo.data import load
from nelbo.errors import UserError
from nelbo.extractors import SmallNet, as_extractor, load_extractor, spread


def call(*arguments: object) -> int:
    return cli.main([str(a) for a in arguments])


def digits(split: str = "train") -> np.ndarray:
    return load("digits").images[split]


# Extractors ----------------------------------------------------------------------------------------------------------


def test_levels_are_spread_exactly() -> None:
    """By whole numbers: 255 v/(L - 1) to the nearest, ties to even."""
    for levels in range(2, 257):
        found = spread(np.arange(levels, dtype=np.uint8), levels)
        for v, f in enumerate(found.tolist()):
            whole, rest = divmod(2 * 255 * v, 2 * (levels - 1))
            assert f == whole + (rest > levels - 1 or (rest == levels - 1 and whole % 2 == 1))
        assert (found[0], found[-1]) == (0, 255)


def test_values_beyond_the_levels_are_no_images() -> None:
    with pytest.raises(ValueError, match="images must lie below levels = 17, got 17"):
        spread(np.full((1, 1, 2, 2), 17, np.uint8), 17)


def test_the_small_network_is_what_its_formula_says() -> None:
    """Two stages on images of odd size, by convolution and averaging written out."""
    generator = torch.Generator().manual_seed(0)
    net = SmallNet((3, 4, 5), 6)
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, generator=generator)
    images = torch.randint(0, 256, (2, 3, 5, 7), generator=generator, dtype=torch.uint8)
    x = np.pad(images.double().numpy() / 127.5 - 1, ((0, 0), (0, 0), (1, 1), (1, 1)))
    weights = [stage.weight.detach().double().numpy() for stage in net.stages]
    biases = [stage.bias.detach().double().numpy() for stage in net.stages]
    windows = np.lib.stride_tricks.sliding_window_view(x, (3, 3), (2, 3))
    x = np.maximum(np.einsum("nchwij,ocij->nohw", windows, weights[0]) + biases[0][:, None, None], 0)
    blocks = [[x[:, :, i : i + 2, j : j + 2].mean((2, 3)) for j in range(0, 7, 2)] for i in range(0, 5, 2)]
    x = np.pad(np.stack([np.stack(row, -1) for row in blocks], -2), ((0, 0), (0, 0), (1, 1), (1, 1)))
    windows = np.lib.stride_tricks.sliding_window_view(x, (3, 3), (2, 3))
    x = np.maximum(np.einsum("nchwij,ocij->nohw", windows, weights[1]) + biases[1][:, None, None], 0)
    features, logits = net(images)
    assert np.allclose(features.detach().numpy(), x.mean((2, 3)), rtol=1e-4, atol=1e-4)
    head = net.head.weight.detach().numpy(), net.head.bias.detach().numpy()
    assert np.allclose(logits.detach().numpy(), x.mean((2, 3)) @ head[0].T + head[1], rtol=1e-4, atol=1e-3)


def test_weights_of_a_file_make_the_small_network_again(tmp_path: Path) -> None:
    net = SmallNet((3, 8, 16), 4)
    save_file(net.state_dict(), tmp_path / "w.safetensors")
    extractor = load_extractor("small", weights=tmp_path / "w.safetensors", channels=3)
    images = np.random.default_rng(0).integers(0, 256, (5, 3, 8, 8), dtype=np.uint8)
    features, probabilities = extractor(images)
    expected, logits = net(torch.from_numpy(images))
    assert np.array_equal(features, expected.detach().numpy())
    assert np.allclose(probabilities, logits.detach().double().softmax(1), rtol=1e-12)
    grey = images[:, :1]
    assert np.array_equal(extractor(grey)[0], extractor(np.repeat(grey, 3, 1))[0])
    net.head.bias.data[0] += 1
    save_file(net.state_dict(), tmp_path / "v.safetensors")
    other = load_extractor("small", weights=tmp_path / "v.safetensors", channels=3)
    assert other.identity != extractor.identity


def test_random_features_are_those_of_their_seed() -> None:
    images = digits()[:4]
    a, again, b = (load_extractor("random", seed=s, channels=1) for s in (0, 0, 1))
    assert a(images, 17)[0].shape == (4, 64) and a(images, 17)[1] is None
    assert np.array_equal(a(images, 17)[0], again(images, 17)[0]) and a.identity == again.identity
    assert not np.array_equal(a(images, 17)[0], b(images, 17)[0]) and a.identity != b.identity
    assert "compares only with others of the same extractor" in a.note


def test_making_an_extractor_draws_no_global_random_numbers(tmp_path: Path) -> None:
    save_file(SmallNet((1, 2), 2).state_dict(), tmp_path / "small.safetensors")
    state = torch.random.get_rng_state()
    load_extractor("random", channels=3)
    load_extractor("small", weights=tmp_path / "small.safetensors", channels=1)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_any_callable_is_an_extractor() -> None:
    images = digits()[:10]

    def halves(given: Tensor) -> tuple[np.ndarray, np.ndarray]:
        assert given.dtype == torch.uint8 and given.max() == 255
        return given.numpy().reshape(len(given), -1)[:, :5], np.full((len(given), 2), 0.5)

    (moments,), scores = feature_sums.measure(images, 17, halves)
    expected = spread(images, 17).reshape(10, -1)[:, :5]
    assert np.allclose(moments.covariance, np.cov(expected, rowvar=False), rtol=1e-12)
    assert scores is not None and metrics.score_parts(scores) == (1, 0)
    for wrong, message in (
        (lambda x: x, r"halves must give features \(n, d\), got \(10, 1, 8, 8\) for 10 images"),
        (lambda x: x.flatten(1)[:3], r"got \(3, 64\) for 10 images"),
        (lambda x: x.flatten(1) / 0.0, "gave features that are not finite"),
    ):
        with pytest.raises(UserError, match=message):
            feature_sums.measure(images, 17, as_extractor(wrong, "halves"))


# Inception -----------------------------------------------------------------------------------------------------------


def forget(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let torch_fidelity and torchvision be imported anew, and be forgotten again after the test."""
    for name in [n for n in sys.modules if n.split(".")[0] in ("torch_fidelity", "torchvision")]:
        monkeypatch.delitem(sys.modules, name)


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """torch-fidelity, beside a stand-in for torchvision, which it imports and inception does not use."""
    if find_spec("torch_fidelity") is None:
        pytest.skip("torch-fidelity is not installed: pip install --no-deps torch-fidelity")
    forget(monkeypatch)
    loaded = set(sys.modules)
    for name in ("torchvision", "torchvision.datasets", "torchvision.transforms", "torchvision.transforms.functional"):
        module = types.ModuleType(name)
        module.__spec__ = ModuleSpec(name, None)
        module.__path__ = []
        monkeypatch.setitem(sys.modules, name, module)
        if "." in name:
            above, last = name.rsplit(".", 1)
            setattr(sys.modules[above], last, module)
    for name in ("CIFAR10", "CIFAR100", "STL10"):
        monkeypatch.setattr(sys.modules["torchvision.datasets"], name, type(name, (), {}), raising=False)
    import torch_fidelity

    yield torch_fidelity
    for name in set(sys.modules) - loaded:
        if name.startswith("torch_fidelity"):
            del sys.modules[name]


def inception(library: Any) -> Any:
    """The library's network with random weights that keep the size of what passes; running means are not 0."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    class Bare(FeatureExtractorInceptionV3):
        def load_state_dict(self, *_: Any, **__: Any) -> None:  # type: ignore[override]
            """What was constructed stays."""

    nothing = io.BytesIO()
    torch.save({}, nothing)
    nothing.seek(0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = Bare("bare", ["2048", "logits_unbiased"], feature_extractor_weights_path=nothing)
        for name, value in net.state_dict().items():
            if name.endswith("conv.weight"):
                value.mul_(math.sqrt(6))
            elif name.endswith("running_mean"):
                value.normal_(0, 0.1)
            elif name.endswith("num_batches_tracked"):
                value.fill_(7)
    return net


def test_inception_features_are_those_of_the_library_s_network(library: Any, tmp_path: Path) -> None:
    net = inception(library)
    torch.save(net.state_dict(), tmp_path / "w.pth")
    state = torch.random.get_rng_state()
    extractor = load_extractor("inception", weights=tmp_path / "w.pth", channels=1)
    assert torch.equal(torch.random.get_rng_state(), state)
    images = digits()[:3]
    features, probabilities = extractor(images, 17)
    with torch.no_grad():
        expected, logits = net(torch.from_numpy(np.repeat(spread(images, 17), 3, 1)))
    assert features.shape == (3, 2048) and 0.01 < features.std() < 100
    assert np.array_equal(features, expected.numpy())
    assert np.allclose(probabilities, logits.double().softmax(1).numpy(), rtol=1e-12)
    assert np.allclose(logits.numpy(), expected.numpy() @ net.fc.weight.numpy().T, rtol=1e-4, atol=1e-3)
    tensors = {k: v for k, v in net.state_dict().items() if not k.endswith("num_batches_tracked")}
    save_file(tensors, tmp_path / "w.safetensors")
    again = load_extractor("inception", weights=tmp_path / "w.safetensors", channels=3)
    assert again.identity == extractor.identity and again.versions == {"torch-fidelity": library.__version__}
    colours = np.random.default_rng(0).integers(0, 256, (2, 3, 16, 16), dtype=np.uint8)
    with torch.no_grad():
        assert np.array_equal(again(colours)[0], net(torch.from_numpy(colours))[0].numpy())


def test_the_verb_with_inception(library: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """4 images against 5, by the 9 feature vectors themselves."""
    net, images = inception(library), digits()[:9]
    torch.save(net.state_dict(), tmp_path / "w.pth")
    np.savez(tmp_path / "a.npz", images=images[:4], levels=17)
    np.savez(tmp_path / "b.npz", images=images[4:], levels=17)
    options = ("--weights", tmp_path / "w.pth", "--splits", 1, "--out", tmp_path / "found.json")
    assert call("fid", tmp_path / "a.npz", "--reference", tmp_path / "b.npz", *options) == 0
    found, out = json.loads((tmp_path / "found.json").read_text()), capsys.readouterr().out
    with torch.no_grad():
        features, logits = net(torch.from_numpy(np.repeat(spread(images, 17), 3, 1)))
    f = features.double().numpy()
    a, b = f[:4] - f[:4].mean(0), f[4:] - f[4:].mean(0)
    shared = np.linalg.svd(a @ b.T, compute_uv=False).sum() / math.sqrt(3 * 4)
    means = ((f[:4].mean(0) - f[4:].mean(0)) ** 2).sum()
    assert found["fid"] == pytest.approx(means + (a**2).sum() / 3 + (b**2).sum() / 4 - 2 * shared, rel=1e-4)
    p = logits[:4].double().softmax(1).numpy()
    score = math.exp((p * np.log(p / p.mean(0))).sum(1).mean())
    assert found["inception_score"] == {"mean": pytest.approx(score, rel=1e-4), "std": 0, "splits": 1}
    assert "FID (inception, 2048 features)" in out and "cannot be estimated below 2 samples for each of 2048" in out
    assert found["versions"]["torch-fidelity"] == library.__version__


def test_metrics_agree_with_the_library_s(library: Any) -> None:
    from torch_fidelity import metric_fid, metric_isc

    generator = np.random.default_rng(0)
    a, b = generator.standard_normal((200, 20)), 1.5 * generator.standard_normal((300, 20)) + 0.2
    theirs = metric_fid.fid_statistics_to_metric(
        *(metric_fid.fid_features_to_statistics(torch.from_numpy(x)) for x in (a, b)), verbose=False
    )
    ours = metrics.frechet(metrics.Moments.of(a), metrics.Moments.of(b))
    assert ours == pytest.approx(theirs[metric_fid.KEY_METRIC_FID], rel=1e-9)
    logits = torch.from_numpy(3 * generator.standard_normal((203, 7)))
    found = metric_isc.isc_features_to_metric(logits, splits=10, shuffle=False)
    expected = found[metric_isc.KEY_METRIC_ISC_MEAN], found[metric_isc.KEY_METRIC_ISC_STD]
    assert metrics.inception_score(logits.softmax(1).numpy()) == pytest.approx(expected, rel=1e-9)


def test_weights_that_cannot_be_fetched_are_asked_for(
    library: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from torch_fidelity import feature_extractor_inceptionv3 as module

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    name = module.URL_INCEPTION_V3.rsplit("/", 1)[-1]
    monkeypatch.setattr(module, "URL_INCEPTION_V3", f"http://127.0.0.1:9/{name}")  # nothing listens there
    np.savez(tmp_path / "a.npz", images=digits("test"), levels=17)
    assert call("fid", tmp_path / "a.npz", "--data", "digits") == 2
    err = capsys.readouterr().err.splitlines()
    place = tmp_path / "hub" / "checkpoints" / name
    assert err[-1].startswith(
        f"nelbo: the weights of --extractor inception cannot be fetched from http://127.0.0.1:9/{name}"
    )
    assert err[-1].endswith(f"give the file with --weights PATH, or put it at {place}")
    place.parent.mkdir(parents=True, exist_ok=True)
    torch.save(inception(library).state_dict(), place)
    assert load_extractor("inception", channels=1).name == "inception"


class Trap:
    """Unpickled, it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def test_weights_are_read_without_executing_them(library: Any, tmp_path: Path) -> None:
    torch.save({"a": Trap(tmp_path / "sprung")}, tmp_path / "trap.pth")
    torch.save({"fc.weight": torch.zeros(3)}, tmp_path / "other.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    (tmp_path / "cut.pth").write_bytes((tmp_path / "other.pth").read_bytes()[:200])
    for name, message in (
        ("trap.pth", "cannot read"),
        ("cut.pth", "cannot read"),
        ("other.pth", "must hold the weights of torch-fidelity's InceptionV3"),
        ("list.pth", r"must hold tensors by name \(a state_dict\), got list"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            load_extractor("inception", weights=tmp_path / name, channels=3)
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "sprung").exists()


def test_inception_needs_the_extra(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    forget(monkeypatch)
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    with pytest.raises(UserError, match=r"needs torch-fidelity: pip install 'nelbo\[fid\]'"):
        load_extractor("inception", channels=3)


def test_inception_needs_a_torchvision_of_this_torch(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    if find_spec("torch_fidelity") is None:
        pytest.skip("torch-fidelity is not installed")
    forget(monkeypatch)
    with monkeypatch.context() as missing:
        missing.setitem(sys.modules, "torchvision", None)
        with pytest.raises(UserError, match=rf"a torchvision made for torch {torch.__version__.replace('+', '.')}, "
                                            "which is not installed"):  # fmt: skip
            load_extractor("inception", channels=3)
    forget(monkeypatch)
    (tmp_path / "torchvision.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')")
    monkeypatch.syspath_prepend(tmp_path)
    for _ in range(2):
        with pytest.raises(
            UserError, match=r"cannot be imported \(operator torchvision::nms does not exist\): install"
        ):
            load_extractor("inception", channels=3)
    forget(monkeypatch)


def test_inception_sees_grey_and_colour_only() -> None:
    with pytest.raises(UserError, match="--extractor inception sees images of 1 or 3 channels, got 2"):
        load_extractor("inception", channels=2)
