r"""Feature extractors: from uint8 images to the features of ``nelbo.metrics``, and to class probabilities where known.

Every extractor is given images of 0 .. 255, whatever their number of levels L, ties to even as in a picture file:

    (1)  v' = round(255 v/(L - 1))

    inception   the InceptionV3 of the field's figures, ported from TensorFlow by torch-fidelity: 2048 pooled features,
                and the probabilities softmax(W f) of its 1008 logits without their bias; grey images become three
                equal channels; the network itself scales them to 299x299 as TensorFlow 1 did
    small       x = v'/127.5 - 1;  a 3x3 convolution and ReLU for every stage, pooling 2x2 before all but the first;
                features: the means over space of the last stage; probabilities: softmax(head features), if there is one
    random      ``small`` with weights N(0, 2/(9 channels in)) drawn from a seed, no head: a poor man's features, of
                use where nothing better fits the images and only models of the same data are compared

Figures of different extractors do not compare. ``identity`` says which one made a figure: the name and a digest of the
weights. Any callable is one too, see ``as_extractor``.
"""

import hashlib
import io
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nelbo.devices import full_float32
from nelbo.draws import generator
from nelbo.errors import UserError

__all__ = ["EXTRACTORS", "Extractor", "SmallNet", "as_extractor", "load_extractor", "spread"]

RANDOM = (16, 32, 64)  # channels of the stages of ``random``

Features = Callable[[Tensor], Any]


def spread(images: np.ndarray, levels: int) -> np.ndarray:
    """Equation (1): values 0 .. levels - 1 over 0 .. 255, uint8."""
    if images.size and images.max() >= levels:
        raise ValueError(f"images must lie below levels = {levels}, got {images.max()}")
    return np.round(np.arange(levels) * 255 / (levels - 1)).astype(np.uint8)[images]


@dataclass(frozen=True, eq=False)
class Extractor:
    """``function`` takes a uint8 tensor (n, C, H, W) on ``device`` to features (n, d), or to (features, probabilities
    (n, K)); ``identity`` is None where nothing tells it from another, and then no statistics are kept."""

    name: str
    function: Features
    identity: str | None = None
    device: Any = "cpu"
    note: str = ""
    versions: dict[str, str] = field(default_factory=dict)

    def __call__(self, images: np.ndarray, levels: int = 256) -> tuple[np.ndarray, np.ndarray | None]:
        """Features (n, d) and probabilities (n, K) or None of uint8 images (n, C, H, W)."""
        given = torch.from_numpy(spread(images, levels)).to(self.device)
        with torch.no_grad(), full_float32():
            found = self.function(given)
        features, probabilities = found if isinstance(found, tuple) else (found, None)
        features = _array(features)
        if features.ndim != 2 or len(features) != len(images):
            raise UserError(
                f"the extractor {self.name} must give features (n, d), got {features.shape} for {len(images)} images"
            )
        if not np.isfinite(features).all():
            raise UserError(f"the extractor {self.name} gave features that are not finite")
        return features, None if probabilities is None else _array(probabilities)


def _array(values: Any) -> np.ndarray:
    return values.detach().cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)


def as_extractor(function: Extractor | Features, name: str | None = None, identity: str | None = None) -> Extractor:
    """An Extractor of any callable: uint8 tensor (n, C, H, W) of 0 .. 255 -> features (n, d), or a tuple of them and
    probabilities (n, K). Without an ``identity``, which must change with the function, no statistics are kept."""
    if isinstance(function, Extractor):
        return function
    return Extractor(name or str(getattr(function, "__name__", type(function).__name__)), function, identity)


def load_extractor(
    name: str, *, weights: Path | str | None = None, seed: int = 0, channels: int = 3, device: Any = "cpu"
) -> Extractor:
    """One of ``EXTRACTORS`` for images of that many channels. ``weights``: a file, for ``inception`` .pth or
    .safetensors (fetched without one), for ``small`` .safetensors; ``seed`` is that of ``random``."""
    if name not in EXTRACTORS:
        raise UserError(f"--extractor must be one of {', '.join(EXTRACTORS)}, got {name!r}")
    return EXTRACTORS[name](None if weights is None else Path(weights), seed, channels, device)


# Inception -----------------------------------------------------------------------------------------------------------


def _inception(weights: Path | None, seed: int, channels: int, device: Any) -> Extractor:
    if channels not in (1, 3):
        raise UserError(f"--extractor inception sees images of 1 or 3 channels, got {channels}")
    module, version = _import_inception()
    tensors = _fetch(module.URL_INCEPTION_V3) if weights is None else _read_tensors(weights)
    again = io.BytesIO()  # the library unpickles what it is given: it is given what was read without
    torch.save(tensors, again)
    again.seek(0)
    try:
        with torch.random.fork_rng(devices=[]):
            net = module.FeatureExtractorInceptionV3(
                "inception", ["2048", "logits_unbiased"], feature_extractor_weights_path=again
            )
    except (RuntimeError, TypeError, AttributeError) as error:
        raise UserError(
            f"{weights or 'what was fetched'} must hold the weights of torch-fidelity's InceptionV3 ({_line(error)})"
        ) from None
    net = net.to(device)

    def function(images: Tensor) -> tuple[Tensor, Tensor]:
        features, logits = net(images.expand(-1, 3, -1, -1).contiguous())
        return features, logits.double().softmax(1)

    return Extractor(
        "inception",
        function,
        f"inception {_digest(net.state_dict())}",
        device,
        "InceptionV3 of torch-fidelity (weights of TensorFlow), 2048 features, logits without bias",
        {"torch-fidelity": version},
    )


def _import_inception() -> tuple[Any, str]:
    """torch-fidelity's module and version; what is missing, as a UserError."""
    try:
        import torch_fidelity
        from torch_fidelity import feature_extractor_inceptionv3
    except Exception as error:  # a torchvision of another torch build fails in many ways
        missing = error.name if isinstance(error, ModuleNotFoundError) else None
        if missing == "torch_fidelity":
            raise UserError(
                "--extractor inception needs torch-fidelity: pip install 'nelbo[fid]'; small and random need nothing"
            ) from None
        raise UserError(
            f"--extractor inception: torch-fidelity needs a torchvision made for torch {torch.__version__}, "
            f"which {'is not installed' if missing == 'torchvision' else f'cannot be imported ({_line(error)})'}: "
            "install the one of the index that torch came from; small and random need none"
        ) from None
    return feature_extractor_inceptionv3, torch_fidelity.__version__


def _fetch(address: str) -> Mapping[str, Tensor]:
    """The weights at torch-fidelity's address, from the folder that torch.hub keeps, where the file lies there."""
    place = Path(torch.hub.get_dir()) / "checkpoints" / address.rsplit("/", 1)[-1]
    if place.is_file():
        return _read_tensors(place)
    try:
        return torch.hub.load_state_dict_from_url(
            address, map_location="cpu", progress=False, check_hash=True, weights_only=True
        )
    except Exception as error:  # no network, an address that is gone, a wrong checksum
        raise UserError(
            f"the weights of --extractor inception cannot be fetched from {address} ({_line(error)}): give the file "
            f"with --weights PATH, or put it at {place}"
        ) from None


# Small ---------------------------------------------------------------------------------------------------------------


class SmallNet(nn.Module):
    """The network of ``small``: ``channels`` of the images and of every stage; ``classes`` of the head, 0 for none.

    Its state_dict, written by ``safetensors.torch.save_file``, is what --weights takes: stages.I.weight, stages.I.bias,
    head.weight and head.bias.
    """

    def __init__(self, channels: tuple[int, ...], classes: int = 0) -> None:
        super().__init__()
        self.channels = channels
        self.stages = nn.ModuleList(nn.Conv2d(a, b, 3, padding=1) for a, b in pairwise(channels))
        self.head = nn.Linear(channels[-1], classes) if classes else None

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Features (n, d) and logits (n, classes) or None of uint8 images (n, C, H, W); one grey channel is repeated
        where the network was made for more."""
        x = images.float() / 127.5 - 1
        x = x.expand(-1, self.channels[0], -1, -1) if x.shape[1] == 1 else x
        for i, stage in enumerate(self.stages):
            if i and min(x.shape[2:]) > 1:
                x = F.avg_pool2d(x, 2, ceil_mode=True, count_include_pad=False)
            x = stage(x).relu()
        features = x.mean((2, 3))
        return features, None if self.head is None else self.head(features)

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> "SmallNet":
        """The network whose state_dict this is; ValueError where it is none's."""
        count = sum(name.startswith("stages.") and name.endswith(".weight") for name in tensors)
        weights = [tensors[f"stages.{i}.weight"] for i in range(count) if f"stages.{i}.weight" in tensors]
        if not weights or any(weight.ndim != 4 for weight in weights):
            raise ValueError("there must be stages.0.weight, stages.1.weight, ... (out, in, 3, 3)")
        head = tensors.get("head.weight")
        with torch.random.fork_rng(devices=[]):
            net = cls((weights[0].shape[1], *(w.shape[0] for w in weights)), 0 if head is None else head.shape[0])
        net.load_state_dict(dict(tensors))
        return net.eval().requires_grad_(False)


def _small(weights: Path | None, seed: int, channels: int, device: Any) -> Extractor:
    if weights is None:
        raise UserError("--extractor small needs --weights FILE.safetensors; random takes weights of a seed instead")
    tensors = _read_tensors(weights)
    try:
        net = SmallNet.of(tensors)
    except (ValueError, RuntimeError) as error:
        raise UserError(f"{weights} must hold the state_dict of a SmallNet ({_line(error)})") from None
    if channels not in (1, net.channels[0]):
        raise UserError(f"{weights} is for images of {net.channels[0]} channels, got {channels}")
    return _of_small(net, f"small {_digest(net.state_dict())}", device, f"small network, weights of {weights.name}")


def _random(weights: Path | None, seed: int, channels: int, device: Any) -> Extractor:
    if weights is not None:
        raise UserError("--weights belongs to --extractor inception and small: random draws its own")
    with torch.random.fork_rng(devices=[]):
        net = SmallNet((channels, *RANDOM)).eval().requires_grad_(False)
    for i, (name, parameter) in enumerate(net.named_parameters()):
        shape = tuple(parameter.shape)
        drawn = generator(seed, i, 0, "data").standard_normal(shape) if name.endswith("weight") else np.zeros(shape)
        parameter.copy_(torch.from_numpy(drawn * math.sqrt(2 / max(1, math.prod(shape[1:])))))
    note = f"random features of seed {seed}: a figure compares only with others of the same extractor"
    return _of_small(net, f"random {_digest(net.state_dict())}", device, note)


def _of_small(net: SmallNet, identity: str, device: Any, note: str) -> Extractor:
    net = net.to(device)

    def function(images: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        features, logits = net(images)
        return features if logits is None else (features, logits.double().softmax(1))

    return Extractor(identity.split()[0], function, identity, device, note)


# Files ---------------------------------------------------------------------------------------------------------------


def _read_tensors(path: Path) -> Mapping[str, Tensor]:
    """The tensors of a .safetensors file or of one that torch.save wrote; nothing in it is executed."""
    if not path.is_file():
        raise UserError(f"--weights must be a file, and {path} is not there")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load

            return load(path.read_bytes())
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # safetensors, zipfile and pickle each raise their own
        raise UserError(
            f"cannot read {path}: it must be a .safetensors file, or tensors by name as torch.save writes them "
            f"({_line(error)})"
        ) from None
    if not isinstance(tensors, Mapping) or not all(isinstance(value, Tensor) for value in tensors.values()):
        raise UserError(f"{path} must hold tensors by name (a state_dict), got {type(tensors).__name__}")
    return tensors


def _digest(tensors: Mapping[str, Tensor]) -> str:
    """Of names, types, shapes and values, whatever file they came from."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        if not name.endswith("num_batches_tracked"):  # files of old may lack them
            array = tensors[name].detach().cpu().contiguous().numpy()
            digest.update(f"{name} {array.dtype} {array.shape};".encode())
            digest.update(array.tobytes())
    return digest.hexdigest()[:16]


def _line(error: Exception) -> str:
    """The first line of what an exception says."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)[:200]


# name -> f(weights, seed, channels of the images, device)
EXTRACTORS: dict[str, Callable[[Path | None, int, int, Any], Extractor]] = {
    "inception": _inception,
    "small": _small,
    "random": _random,
}
