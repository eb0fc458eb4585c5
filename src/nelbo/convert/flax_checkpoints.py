r"""Checkpoints of public MuLAN, i-DODE and VDM (``ckpt-N.flax``): their names and layouts, translated into nelbo's.

A file is a TrainState: step, params, ema_params and opt_state. Parameters lie in up to three parts: score_model (the
denoiser), gamma (the schedule, where it learns anything) and encoder_model (MuLAN's). Sizes follow from the shapes.

    (1)  kernel (H, W, in, out) -> weight (out, in, H, W);   (in, out) -> (out, in), or (out, in, 1, 1)
    (2)  entry (h W + w) C + c of a vector over an image's pixels and channels -> entry (c H + h) W + w
    (3)  i-DODE's velocity on the straight path, f = (eps - x)/sqrt 2 = conv_out(h) + z, is 1/sqrt 2 of ours:

             eps - x = (sqrt 2 conv_out)(h) + sqrt 2 z,     whose gradient in the weights is 1/sqrt 2 of f's

(3) is exact with network.skip = sqrt 2. optax's Adam has the moments of torch's: mu, nu and count are exp_avg,
exp_avg_sq and step. Every parameter has exactly one partner, or nothing is converted.
"""

import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nelbo.config import Config, EncoderConfig, LatentConfig, NetworkConfig, ScheduleConfig
from nelbo.convert import Converted, Images, known_images
from nelbo.convert.flax_msgpack import read
from nelbo.errors import UserError
from nelbo.paths import PATHS
from nelbo.schedules import default_gamma_0

__all__ = [
    "ATTENTION",
    "BLOCK",
    "FOURIER",
    "GROUPS",
    "channels_first",
    "flatten",
    "idode",
    "in_our_order",
    "layer_names",
    "mulan",
    "network_names",
    "schedule_names",
    "state_of",
    "unet_sizes",
    "unflatten",
    "vdm",
]

GROUPS, FOURIER = 32, (6.0, 7.0)  # of every GroupNorm, and of the Fourier features, where there are any
CNN_FEATURES = 16
PARTS = {"score_model": "network", "encoder_model": "encoder", "gamma": "schedule"}
LEAF = {"kernel": "weight", "scale": "weight", "bias": "bias"}
BLOCK = {
    "GroupNorm_0": "norm_1",
    "conv1": "conv_1",
    "cond_proj": "project",
    "GroupNorm_1": "norm_2",
    "conv2": "conv_2",
    "nin_shortcut": "shortcut",
}
ATTENTION = {"GroupNorm_0": "norm", "q": "q", "k": "k", "v": "v", "proj_out": "out"}
NETWORK = {
    "dense0": "trunk.dense_0",
    "dense1": "trunk.dense_1",
    "conv_in": "trunk.conv_in",
    "GroupNorm_0": "norm",
    "conv_out": "conv_out",
    "dense_layer_final": "heads.0",
    "dense_layer_final_mu": "heads.0",
    "dense_layer_final_sigma": "heads.1",
    "CONV1": "conv_1",
    "CONV2": "conv_2",
    "DENSE": "heads.0",
}
SCHEDULE = {
    "dense_1": "dense_1",
    "dense_2": "dense_2",
    "dense_out_a": "head_a",
    "dense_out_b": "head_b",
    "dense_out_c": "head_d",
    "l1": "l1",
    "l2": "l2",
    "l_int": "l_int",
    "l3": "l3",
}
Parameters = dict[str, Tensor]


# Names and layouts ---------------------------------------------------------------------------------------------------


def channels_first(a: Tensor) -> Tensor:
    """(*, H, W, C) -> (*, C, H, W)."""
    return a.movedim(-1, -3).contiguous()


def unflatten(a: Tensor, shape: tuple[int, int, int]) -> Tensor:
    """(*, H W C) -> (*, C, H, W) for images of ``shape`` (C, H, W)."""
    return channels_first(a.reshape(*a.shape[:-1], *shape[1:], shape[0]))


def layer_names(parameters: Iterable[str], table: dict[str, str]) -> dict[str, str]:
    """flax name -> nelbo name of a layer's parameters; KeyError for a name that is not in the table."""
    found = {}
    for name in parameters:
        layer, leaf = name.split("/")
        found[name] = f"{table[layer]}.{LEAF[leaf]}"
    return found


def network_names(parameters: Iterable[str]) -> dict[str, str]:
    """flax name -> nelbo name of a denoiser's or an encoder's parameters; KeyError, ValueError for other names."""
    names = {}
    for name in parameters:
        first, *rest = name.split("/")
        if level := re.fullmatch(r"(down|mid|up)\.(block|attn)_(\d+)", first):
            part, kind, number = level[1], level[2], int(level[3])
            # mid.attn_1 stands between mid.block_1 and mid.block_2: it is the attention of our first level.
            place = {"down": f"trunk.down.{number}", "mid": f"trunk.middle.{number - 1}", "up": f"up.{number}"}[part]
            prefix, table = ("block", BLOCK) if kind == "block" else ("attention", ATTENTION)
            own = next(iter(layer_names(["/".join(rest)], table).values()))
            names[name] = f"{place}.{prefix}.{own}"
        else:
            names |= layer_names([name], NETWORK)
    return names


def schedule_names(parameters: Iterable[str]) -> dict[str, str]:
    """flax name -> nelbo name of a schedule's parameters; KeyError, ValueError for other names."""
    scalar = {"w": "slope", "b": "start"}
    return {
        name: scalar.get(name) or f"interior.{next(iter(layer_names([name], SCHEDULE).values()))}"
        for name in parameters
    }


def model_names(parameters: Iterable[str]) -> dict[str, str]:
    """flax name -> nelbo name of a whole model's parameters, without those that have no partner."""
    found = {}
    for name in parameters:
        part, _, rest = name.partition("/")
        try:
            names = (schedule_names if part == "gamma" else network_names)([rest])
            found[name] = f"{PARTS[part]}.{names[rest]}"
        except (KeyError, ValueError):
            pass
    return found


def in_our_order(parameters: Parameters, shape: tuple[int, int, int]) -> Parameters:
    """Equation (2) for what speaks of pixels: the schedule's outputs, and what the CNN encoder's last layer reads."""
    found, size = {}, math.prod(shape)
    for name, array in parameters.items():
        if re.match(r"(gamma/)?(dense_out_[abc]|l3)/", name) and array.shape[-1:] == (size,):
            array = unflatten(array, shape).flatten(-3)
        elif re.fullmatch(r"(encoder_model/)?DENSE/kernel", name) and len(array) == CNN_FEATURES * shape[1] * shape[2]:
            array = unflatten(array.T, (CNN_FEATURES, *shape[1:])).flatten(1).T
        found[name] = array
    return found


def state_of(parameters: Parameters, names: dict[str, str], shapes: dict[str, tuple[int, ...]]) -> Parameters:
    """Equation (1): nelbo names -> tensors of ``shapes``, which must be those of all the names there are.

    ValueError that names what is left over, missing or of another shape.
    """
    ours = list(names.values())
    left = [name for name in parameters if names.get(name) not in shapes or ours.count(names[name]) > 1]
    missing = sorted(shapes.keys() - ours)
    if left or missing:
        said = ((left, "of its parameters have no place"), (missing, "of the network's are missing"))
        lists = [f"{len(n)} {what} ({', '.join(n[:3])}{', ...' if n[3:] else ''})" for n, what in said if n]
        raise ValueError("; ".join(lists))
    state = {}
    for theirs, array in parameters.items():
        wanted = shapes[names[theirs]]
        if array.ndim == 4:
            array = array.permute(3, 2, 0, 1)
        elif array.ndim == 2:
            array = array.T
        if array.shape != wanted and not (array.ndim == 2 and wanted == (*array.shape, 1, 1)):
            raise ValueError(f"{theirs} has shape {tuple(parameters[theirs].shape)}, for which there is no place")
        state[names[theirs]] = array.reshape(wanted).contiguous()
    return state


# Sizes ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class UNetSizes:
    """What the shapes of a denoiser or an encoder say; ``columns`` of the first dense layer: time and conditioning."""

    channels: int
    levels: int
    everywhere: bool
    fourier: int
    columns: int


def unet_sizes(parameters: Parameters, image_channels: int) -> UNetSizes:
    """The sizes of a U-Net (flax names); ``fourier`` is the number of exponents."""
    inputs, channels = _shape(parameters, "conv_in/kernel", 4)[2:]
    if inputs % image_channels or inputs // image_channels % 2 == 0:
        raise ValueError(f"conv_in/kernel reads {inputs} channels, which are no Fourier features of {image_channels}")
    return UNetSizes(
        channels=channels,
        levels=len({name.split("/")[0] for name in parameters if name.startswith("down.block_")}),
        everywhere=any(re.match(r"(down|up)\.attn_", name) for name in parameters),
        fourier=(inputs // image_channels - 1) // 2,
        columns=_shape(parameters, "dense0/kernel", 2)[0],
    )


def _shape(parameters: Parameters, name: str, axes: int) -> tuple[int, ...]:
    """The shape of a parameter that must be there and hold something."""
    if name not in parameters or parameters[name].ndim != axes or not parameters[name].numel():
        raise ValueError(f"it has no {name} of {axes} axes")
    return tuple(parameters[name].shape)


@dataclass
class Reading:
    """A checkpoint's parameters, and what was read off them so far: names of fields -> values."""

    parameters: Parameters
    base: Config
    inferred: dict[str, Any] = field(default_factory=dict)
    areas: dict[str, int] = field(default_factory=dict)

    def under(self, part: str) -> Parameters:
        return {n.removeprefix(f"{part}/"): a for n, a in self.parameters.items() if n.startswith(f"{part}/")}

    def say(self, group: str, **values: Any) -> dict[str, Any]:
        self.inferred |= {f"{group}.{name}": value for name, value in values.items()}
        return values


def _encoder(reading: Reading, channels: int) -> tuple[LatentConfig, EncoderConfig, UNetSizes | None]:
    """The latent and its encoder, where there is one."""
    base, parameters = reading.base, reading.under("encoder_model")
    if "CONV1/kernel" in parameters:
        rows, size = _shape(parameters, "DENSE/kernel", 2)
        reading.areas["encoder_model/DENSE"] = rows // CNN_FEATURES
        sizes, heads, encoder = None, 1, replace(base.encoder, **reading.say("encoder", kind="cnn"))
    else:
        heads = len([name for name in parameters if re.fullmatch(r"dense_layer_final\w*/kernel", name)])
        last = "dense_layer_final/kernel" if heads == 1 else "dense_layer_final_mu/kernel"
        rows, size = _shape(parameters, last, 2)
        reading.areas[f"encoder_model/{last}"] = rows
        sizes = unet_sizes(parameters, channels)
        own = _shape(parameters, "conv_in/kernel", 4)[3]
        values = reading.say("encoder", kind="unet", levels=sizes.levels, channels=own)
        encoder = replace(base.encoder, **values)
    kinds = ("k-hot", "one-hot") if heads == 1 else ("gaussian",)
    kind = base.latent.kind if base.latent.kind in kinds else kinds[0]
    if len(kinds) > 1 and base.latent.kind not in kinds:
        raise UserError(
            f"latent.kind cannot be read from the file, whose encoder is one of a k-hot or a one-hot latent: give "
            f"--latent.kind k-hot or one-hot, got {base.latent.kind}"
        )
    values = reading.say("latent", size=size) | ({} if len(kinds) > 1 else reading.say("latent", kind=kind))
    return replace(base.latent, **{"kind": kind, **values}), encoder, sizes


def _schedule(reading: Reading, channels: int, size: int) -> ScheduleConfig:
    """The schedule; ``size`` of the latent, 0 without."""
    base, parameters = reading.base.schedule, reading.under("gamma")
    kind, ends, width, condition, outputs = "linear", "fixed", base.width, size, 0
    if "dense_out_a/kernel" in parameters:
        condition, width = _shape(parameters, "dense_1/kernel", 2)
        outputs = _shape(parameters, "dense_out_a/kernel", 2)[1]
        kind = "polynomial" if outputs > 1 else "scalar-polynomial"
    elif "l_int/kernel" in parameters:
        inputs, width = _shape(parameters, "l2/kernel", 2)
        condition, outputs, kind, ends = inputs - 1, _shape(parameters, "l3/kernel", 2)[1], "pixel-monotone", "free"
    elif "l2/kernel" in parameters:
        width, kind, ends = _shape(parameters, "l2/kernel", 2)[1], "monotone", "free"
    elif parameters:
        ends = "learned"
    if condition and not size:
        raise UserError(
            f"latent.kind cannot be read from the file: gamma is given {condition} numbers, and there is no encoder; "
            f"give --latent.kind label --latent.size {condition} for class labels"
        )
    if condition != size:
        raise ValueError(f"gamma reads {condition} entries of a latent, and the encoder puts out {size}")
    if outputs > 1:
        if outputs % channels:
            raise ValueError(f"gamma has {outputs} outputs, no whole number of pixels of {channels} channels")
        reading.areas["gamma"] = outputs // channels
    values = reading.say("schedule", kind=kind, ends=ends)
    if kind != "linear":
        values |= reading.say("schedule", width=width)
    return replace(base, **values)


def _network(reading: Reading, channels: int, size: int) -> tuple[NetworkConfig, UNetSizes, bool]:
    """The denoiser, its sizes, and whether it sees the latent of ``size``."""
    sizes = unet_sizes(reading.under("score_model"), channels)
    # Conditioning is the latent, or one column: public code has the one or the other, and for all pixels or for each.
    layouts = {"flat": sizes.channels, "pixel-noise": channels * sizes.channels}
    for kind in sorted(layouts, key=lambda kind: kind != reading.base.network.kind):
        columns = sizes.columns - layouts[kind]
        if columns in (0, 1) or (size and columns in (size, size + 1)):
            break
    else:
        raise ValueError(
            f"score_model/dense0 reads {sizes.columns} numbers, which are no time of {sizes.channels} features with "
            f"a latent of {size} or a flag"
        )
    sees = size > 0 and columns >= size
    flag = columns == (size + 1 if sees else 1)
    values = reading.say(
        "network", kind=kind, channels=sizes.channels, levels=sizes.levels, groups=GROUPS, flag=flag,
        attention="everywhere" if sizes.everywhere else "middle",
    )  # fmt: skip
    return replace(reading.base.network, **values), sizes, sees


def _fourier(reading: Reading, sizes: list[UNetSizes]) -> tuple[float, ...]:
    """The exponents of the Fourier features, which denoiser and encoder must share, as they must share attention."""
    if len({(s.fourier, s.everywhere) for s in sizes}) > 1:
        raise UserError(
            "denoiser and encoder differ in their Fourier features or in where attention acts, which no configuration "
            "of nelbo can express"
        )
    number, given = sizes[0].fourier, reading.base.network.fourier
    if given is not None and len(given) == number:
        return given
    if number not in (0, len(FOURIER)):
        raise UserError(f"network.fourier must be given: the file has {number} exponents and does not say which")
    found = FOURIER[:number]
    reading.say("network", fourier=found)
    return found


def _images(reading: Reading, channels: int, images: Images) -> tuple[tuple[int, int, int], int]:
    """(C, H, W) and grey levels: what the user says, what the shapes allow, what the preset's data set has."""
    areas, known = set(reading.areas.values()), known_images(reading.base)
    if len(areas) > 1:
        raise ValueError(f"its parts are of images of {' and '.join(map(str, sorted(areas)))} pixels")
    area = next(iter(areas), None)
    fits = known is not None and known[0][0] == channels and area in (None, known[0][1] * known[0][2])
    source = reading.base.data.source
    if images.size is not None:
        height, width = images.size
        if height < 1 or width < 1 or (area is not None and height * width != area):
            wanted = "above 0" if area is None else f"of {area} pixels, as the file's images are"
            raise UserError(f"--size must be a height and a width {wanted}, got {height} {width}")
    elif known is not None and fits:
        height, width = known[0][1:]
    elif area is not None and math.isqrt(area) ** 2 == area:
        height = width = math.isqrt(area)
    else:
        has = "no size of images that is known here" if known is None else "images of {}x{}x{}".format(*known[0])
        wanted = f"{channels} channels" if area is None else f"{channels} channels and {area} pixels"
        raise UserError(f"give --size HEIGHT WIDTH: the file's images have {wanted}, and data.source = {source} {has}")
    if area is not None:
        reading.inferred["images"] = f"{channels}x{height}x{width}"
    shape = (channels, height, width)
    return shape, images.levels or (known[1] if known is not None and known[0] == shape else 256)


# Files ---------------------------------------------------------------------------------------------------------------


def find(source: Path) -> Path:
    """The file itself, or the ckpt-N.flax of a folder with the largest N."""
    if not source.is_dir():
        return source
    found = [(int(m[1]), p) for p in source.iterdir() if (m := re.fullmatch(r"ckpt-(\d+)\.flax", p.name))]
    if not found:
        raise UserError(f"a folder must hold ckpt-N.flax, and {source} holds none; give the file itself")
    return max(found)[1]


def flatten(tree: Any, where: str = "") -> Parameters:
    """The arrays of a tree by their paths, float32; empty maps hold none. ValueError for anything else."""
    found: Parameters = {}
    if not isinstance(tree, dict):
        raise ValueError(f"a map of names is {type(tree).__name__}")
    for name, value in tree.items():
        if isinstance(value, dict):
            found |= flatten(value, f"{where}{name}/")
        elif isinstance(value, np.ndarray) and value.dtype.kind == "f":
            found[where + name] = torch.tensor(value, dtype=torch.float32)
        else:
            raise ValueError(f"{where}{name} is not an array of real numbers")
    return found


def _moments(tree: Any) -> Iterator[dict[str, Any]]:
    """Every state of Adam within a chain of transformations, masked or not."""
    if isinstance(tree, dict):
        if {"count", "mu", "nu"} <= tree.keys():
            yield tree
        else:
            for value in tree.values():
                yield from _moments(value)


def _optimizer(tree: Any, parameters: Parameters) -> dict[str, tuple[Tensor, Tensor, float]]:
    """flax name -> first and second moment and steps of each parameter; ValueError where they are not complete."""
    found: dict[str, tuple[Tensor, Tensor, float]] = {}
    for state in _moments(tree):
        first, second, count = flatten(state["mu"]), flatten(state["nu"]), _whole(state["count"], "count")
        for name in first | second:
            if name in found or name not in first or name not in second or name not in parameters:
                raise ValueError(f"those of {name} do not fit")
            if not first[name].shape == second[name].shape == parameters[name].shape:
                raise ValueError(f"those of {name} have another shape")
            found[name] = first[name], second[name], float(count)
    if missing := sorted(parameters.keys() - found.keys()):
        raise ValueError(f"there are none of {missing[0]}" if found else "there are none")
    return found


def _whole(value: Any, name: str) -> int:
    if isinstance(value, np.ndarray) and value.size == 1 and value.dtype.kind in "iu":
        value = value.item()
    if isinstance(value, np.integer):
        value = int(value)
    if type(value) is not int or value < 0:
        raise ValueError(f"its {name} is not a whole number")
    return value


def _convert(kind: str, source: Path, base: Config, images: Images) -> Converted:
    path = find(Path(source))
    tree = read(path)
    try:
        return _converted(kind, path, tree, base, images)
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"{path} does not fit --from {kind}: {error}") from None


def _converted(kind: str, path: Path, tree: dict[str, Any], base: Config, images: Images) -> Converted:
    from nelbo.compose import build_model

    if base.network.kind not in ("flat", "pixel-noise") or base.data.encoding != "centres":
        raise UserError(
            f"--preset must be of the family of {kind}, with data.encoding = centres and network.kind = flat or "
            f"pixel-noise, got {base.data.encoding} and {base.network.kind}"
        )
    trees = {ours: tree[theirs] for ours, theirs in (("raw", "params"), ("ema", "ema_params")) if theirs in tree}
    if not trees or not all(isinstance(t, dict) for t in trees.values()):
        raise ValueError("it holds no params and no ema_params")
    weights = {name: flatten(t) for name, t in trees.items()}
    reading = Reading(next(iter(weights.values())), base)
    config, shape, levels = _configuration(kind, reading, images)
    classes = config.latent.size if config.latent.kind == "label" else None
    with torch.device("meta"):  # only names and shapes are wanted
        model = build_model(config, shape, levels, classes)
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    scale = math.sqrt(2) if config.network.skip != 1 else 1.0

    def ours(parameters: Parameters, factor: float) -> Parameters:
        arranged = in_our_order(parameters, shape)
        for name in ("score_model/conv_out/kernel", "score_model/conv_out/bias"):
            if factor != 1 and name in arranged:
                arranged[name] = arranged[name] * factor
        return state_of(arranged, model_names(arranged), shapes)

    found = {name: ours(parameters, scale) for name, parameters in weights.items()}
    optimizer, note = None, ""
    try:
        moments = _optimizer(tree.get("opt_state"), reading.parameters)
        first = ours({name: m[0] for name, m in moments.items()}, 1 / scale)
        second = ours({name: m[1] for name, m in moments.items()}, 1 / scale**2)
        steps = {name: torch.tensor(moments[theirs][2]) for theirs, name in model_names(moments).items()}
        optimizer = {
            f"{key}.{name}": value
            for key, group in (("exp_avg", first), ("exp_avg_sq", second), ("step", steps))
            for name, value in group.items()
        }
    except ValueError as error:
        note = f"the optimizer's moments were left out: {error}"
    step = _whole(tree.get("step"), "step")
    notes = [*_notes(kind, reading, config, shape, levels, weights), *([note] if note else [])]
    origin = {
        "program": PROGRAMS[kind], "source": str(path), "inferred": reading.inferred, "weights": list(found),
        "optimizer": optimizer is not None,
    }  # fmt: skip
    return Converted(config, shape, levels, found, step, origin, classes, optimizer, tuple(notes))


def _configuration(kind: str, reading: Reading, images: Images) -> tuple[Config, tuple[int, int, int], int]:
    """The configuration, and (C, H, W) and grey levels of the images."""
    base = reading.base
    if unknown := sorted({name.split("/")[0] for name in reading.parameters} - PARTS.keys()):
        raise ValueError(f"it has the part {unknown[0]}; the known ones are {', '.join(PARTS)}")
    channels = _shape(reading.under("score_model"), "conv_out/kernel", 4)[3]
    latent, encoder, of_encoder = LatentConfig(), base.encoder, None
    if reading.under("encoder_model"):
        if kind != "mulan":
            raise ValueError("it has an encoder_model, as MuLAN's have: --from mulan")
        latent, encoder, of_encoder = _encoder(reading, channels)
    elif kind == "mulan" and base.latent.kind == "label":
        latent = base.latent
    elif base.latent.kind != "none":
        reading.say("latent", kind="none")
    size = 0 if latent.kind == "none" else latent.size
    schedule = _schedule(reading, channels, size)
    network, of_network, sees = _network(reading, channels, size)
    fourier = _fourier(reading, [of_network, *([of_encoder] if of_encoder else [])])
    if size:
        latent = replace(latent, **reading.say("latent", network=sees))
    if encoder.channels == network.channels:
        encoder = replace(encoder, channels=None)
    path, parameterization = base.path, base.parameterization
    if kind != "idode":
        path = reading.inferred["path"] = "vp"
    if kind == "vdm":
        parameterization = reading.inferred["parameterization"] = "noise"
    elif parameterization == "data":
        raise UserError(f"--parameterization must be noise or velocity for --from {kind}, got data")
    skip = math.sqrt(2) if path == "straight" and parameterization == "velocity" else 1.0
    network = replace(network, skip=skip, fourier=fourier, norm_eps=1e-6, head_features=None)
    shape, levels = _images(reading, channels, images)
    if network.fourier == FOURIER and levels == 256 and base.network.fourier is None:
        network = replace(network, fourier=None)  # its default
    config = replace(
        base, schedule=schedule, path=path, parameterization=parameterization, latent=latent, encoder=encoder,
        network=network,
    )  # fmt: skip
    return config, shape, levels


def _notes(
    kind: str, reading: Reading, config: Config, shape: tuple[int, int, int], levels: int, weights: dict[str, Any]
) -> list[str]:
    """Lines on what was inferred, and what came from the preset and the flags."""
    said = ", ".join(f"{name} = {_plain(value)}" for name, value in reading.inferred.items())
    gamma_0, gamma_1 = config.schedule.gamma_min, config.schedule.gamma_max
    gamma_0 = default_gamma_0(levels) if gamma_0 is None else gamma_0
    taken = {
        "path": config.path, "parameterization": config.parameterization, "schedule.gamma_min": round(gamma_0, 4),
        "schedule.gamma_max": gamma_1, "objective.steps": config.objective.steps,
        "objective.prior_scale": config.objective.prior_scale, "data.source": config.data.source,
    }  # fmt: skip
    if config.latent.kind != "none":
        taken |= {f"latent.{name}": getattr(config.latent, name) for name in ("kind", "k", "posterior", "noise")}
    taken["images"] = "{}x{}x{}".format(*shape)
    rest = ", ".join(f"{name} = {value}" for name, value in taken.items() if name not in reading.inferred)
    notes = [
        f"from the file, of {PROGRAMS[kind]}: {said}",
        f"not in the file, from preset and flags: {rest}, {levels} grey levels",
        f"weights: {' and '.join(weights)}",
    ]
    if config.network.skip != 1:
        notes.append(
            "i-DODE's straight velocity is 1/sqrt 2 of this one: conv_out was multiplied by sqrt 2 and network.skip is "
            "sqrt 2, the same function to rounding"
        )
    if kind == "idode" and config.objective.prior_scale == 1:
        sigma = float(PATHS[config.path]().coefficients(torch.tensor(gamma_1, dtype=torch.float64))[1])
        notes.append(f"i-DODE's likelihood by ODE has the prior's scale sigma_1: --objective.prior-scale {sigma:.6f}")
    if kind == "mulan" and config.latent.kind == "k-hot" and config.latent.posterior == "exact":
        notes.append("public MuLAN was trained with the paper's posterior: --latent.posterior paper")
    if kind == "mulan" and config.parameterization == "velocity":
        notes.append("a network trained with velocity_from_epsilon = True puts out noise: --parameterization noise")
    return notes


def _plain(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)


PROGRAMS = {"mulan": "s-sahoo/MuLAN", "idode": "thu-ml/i-DODE", "vdm": "google-research/vdm"}


def mulan(source: Path, base: Config, images: Images | None = None) -> Converted:
    """A checkpoint of s-sahoo/MuLAN; ``base`` says what it cannot (``nelbo.convert``). UserError where it is none."""
    return _convert("mulan", source, base, images or Images())


def idode(source: Path, base: Config, images: Images | None = None) -> Converted:
    """A checkpoint of thu-ml/i-DODE, as ``mulan``."""
    return _convert("idode", source, base, images or Images())


def vdm(source: Path, base: Config, images: Images | None = None) -> Converted:
    """A checkpoint of google-research/vdm, as ``mulan``."""
    return _convert("vdm", source, base, images or Images())
