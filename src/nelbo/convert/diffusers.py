r"""Pipelines of diffusers with one UNet2DModel and a scheduler of betas: read, made into a run, and written from one.

    FOLDER/model_index.json                                 the names of the parts (older ones lie side by side)
    FOLDER/unet/config.json, diffusion_pytorch_model.*      the network
    FOLDER/scheduler/scheduler_config.json                  betas, what is estimated, the variance, clipping

network.kind = ddpm is that network itself, so that names and layouts are its own. Its scheduler names

    (1)  linear           beta from a to b;             nelbo's linear where (a, b) = 1000/T (1e-4, 0.02)
    (2)  scaled_linear    sqrt beta from sqrt a to sqrt b;  quadratic, at the same ends
    (3)  squaredcos_cap_v2                              cosine

and trained_betas, which are written where none of these gives a run's betas exactly, in float64. diffusers' own
sigmoid is another than nelbo's. A pipeline holds no word of data, training, or decoder, which is DDPM's here.
"""

import math
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from nelbo import checkpoints
from nelbo.config import (
    Config,
    NetworkConfig,
    ReverseConfig,
    from_dict,
)
from nelbo.convert import Converted, Images, known_images
from nelbo.convert.torch_checkpoints import image_shape, of_noise_levels, schedule_of_betas, widened
from nelbo.errors import UserError
from nelbo.schedules import BETAS, gammas_of_betas

__all__ = ["Pipeline", "convert", "read", "save_diffusers"]

PREDICTIONS = {"epsilon": "noise", "sample": "data", "v_prediction": "velocity"}
VARIANCES: dict[str, Any] = {
    "fixed_small": "fixed-small", "fixed_small_log": "fixed-small", "fixed_large": "fixed-large",
    "fixed_large_log": "fixed-large", "learned_range": "learned",
}  # fmt: skip
# What a network of (image, timestep) must have, and what those of network.kind = ddpm have.
ASKED_ALONE: dict[str, Any] = {"time_embedding_type": "positional", "class_embed_type": None, "num_class_embeds": None}
AS_DDPM: dict[str, tuple[Any, ...]] = {
    "center_input_sample": (False,), "mid_block_type": ("UNetMidBlock2D",), "mid_block_scale_factor": (1,),
    "downsample_type": ("conv",), "upsample_type": ("conv",), "act_fn": ("silu", "swish"),
    "resnet_time_scale_shift": ("default",), "add_attention": (True,),
}  # fmt: skip
BETAS_SAY = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas")


@dataclass(frozen=True)
class Pipeline:
    """What a pipeline's files say: ``betas`` (T,) float64, what is estimated, the variance, whether x_hat is clipped;
    ``channels`` and ``size`` (H, W) of images, None where it is not said; ``folder`` of the network."""

    name: str
    folder: Path
    betas: np.ndarray
    parameterization: Any
    variance: Any
    clip: bool
    channels: int
    size: tuple[int, int] | None

    def network(self) -> Any:
        """The UNet2DModel, float32; weights only. UserError where they are damaged, or not this network's."""
        UNet2DModel = _part("UNet2DModel", self.name)
        try:
            unet, said = UNet2DModel.from_pretrained(str(self.folder), local_files_only=True, output_loading_info=True)
        except Exception as error:  # diffusers, safetensors, torch and pickle raise what they like
            reason = " ".join(str(error).split())[:300]
            raise UserError(f"{self.name}: the weights in {self.folder} cannot be read: {reason}") from None
        for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
            if said.get(what):
                raise UserError(
                    f"{self.name}: the weights in {self.folder} cannot be read: {len(said[what])} "
                    f"{what.replace('_', ' ')}, among them {sorted(map(str, said[what]))[0]}"
                )
        return unet.float()


def _part(which: str, name: str) -> Any:
    """A class of diffusers."""
    try:
        import diffusers
    except ImportError as error:
        raise UserError(f"{name} is a pipeline of diffusers: pip install 'nelbo[ddpm]' ({error})") from None
    return getattr(diffusers, which)


# Reading -------------------------------------------------------------------------------------------------------------


def read(folder: Path, name: str | None = None) -> Pipeline:
    """The pipeline of a folder, which the user calls ``name``; UserError where it is of another kind or damaged."""
    name = name or str(folder)
    if (folder / "model_index.json").is_file():
        index = _table(folder / "model_index.json")
        parts = {key for key, value in index.items() if isinstance(value, list) and value[:1] != [None]}
        kind = index.get("_class_name")
        if parts != {"unet", "scheduler"} or index["unet"] != ["diffusers", "UNet2DModel"]:
            raise UserError(
                f"{name} is a {kind} of {', '.join(sorted(parts))}: only pipelines of pixels with one UNet2DModel and "
                "a scheduler can be read (no latent ones, none given text or classes)"
            )
    unet, scheduler = (folder / p if (folder / p).is_dir() else folder for p in ("unet", "scheduler"))
    settings, said = _table(unet / "config.json"), _table(scheduler / "scheduler_config.json")
    for key, wanted in ASKED_ALONE.items():
        if settings.get(key, wanted) != wanted:
            raise UserError(f"{name}: {key} = {settings[key]!r}; only {wanted!r} is a network of (image, timestep)")
    for key in ("thresholding", "rescale_betas_zero_snr"):
        if said.get(key):
            raise UserError(f"{name}: its scheduler has {key}, for which there is no likelihood")
    clip, within = bool(said.get("clip_sample", True)), said.get("clip_sample_range", 1.0)
    if clip and within != 1.0:
        raise UserError(f"{name}: clip_sample_range must be 1.0, the range of the images, got {within!r}")
    prediction, variance = said.get("prediction_type", "epsilon"), said.get("variance_type", "fixed_small")
    for value, table, what in ((prediction, PREDICTIONS, "prediction_type"), (variance, VARIANCES, "variance_type")):
        if value not in table:
            raise UserError(f"{name}: {what} must be one of {', '.join(table)}, got {value!r}")
    channels, outputs = (settings.get(f"{side}_channels", 3) for side in ("in", "out"))
    size = settings.get("sample_size")
    wanted = channels * (2 if VARIANCES[variance] == "learned" else 1)
    if outputs != wanted:
        raise UserError(
            f"{name}: out_channels must be {wanted}, for in_channels = {channels} and variance_type = {variance}, got "
            f"{outputs}"
        )
    if type(size) is int:
        size = [size, size]
    if size is not None and not (isinstance(size, list) and len(size) == 2 and all(type(n) is int for n in size)):
        raise UserError(f"{name}: sample_size must be a height and a width, got {size!r}")
    return Pipeline(
        name=name, folder=unet, betas=_betas(name, said), parameterization=PREDICTIONS[prediction],
        variance=VARIANCES[variance], clip=clip, channels=channels, size=None if size is None else (size[0], size[1]),
    )  # fmt: skip


def _table(path: Path) -> dict[str, Any]:
    found = checkpoints.read_json(path)
    if not isinstance(found, dict):
        raise UserError(f"{path} must be a table of settings, got {type(found).__name__}")
    return found


def _betas(name: str, settings: dict[str, Any]) -> np.ndarray:
    """A scheduler's betas in float64; those of a form of nelbo's as they are there."""
    given = settings.get("trained_betas")
    try:
        if given is None:
            scheduler = _part("DDPMScheduler", name)
            given = scheduler(**{key: settings[key] for key in BETAS_SAY if key in settings}).betas
        betas = widened(np.asarray(given, dtype=np.float64))
        steps = settings.get("num_train_timesteps", 1000)
        if len(betas) != steps:
            raise ValueError(f"they are {len(betas)}, and num_train_timesteps is {steps}")
        gammas_of_betas(betas)
    except (ValueError, TypeError, NotImplementedError) as error:
        raise UserError(f"{name}: its scheduler's betas cannot be used: {error}") from None
    return betas


# Into a run ----------------------------------------------------------------------------------------------------------


def convert(source: Path, base: Config, images: Images = Images()) -> Converted:  # noqa: B008, frozen
    """A pipeline's folder or hub id; ``base`` gives data, optimizer, training and loss.

    UserError where it is no such pipeline, is damaged, or has a setting that no configuration says.
    """
    from nelbo.resolve import find_folder

    pipeline = read(find_folder(source), str(source))
    unet = pipeline.network()
    shape, levels = _images(pipeline, base, images)
    reverse = ReverseConfig(pipeline.variance, pipeline.clip, "gaussian")
    # A preset of continuous time has no loss of noise levels: DDPM's.
    loss = base.objective.loss if base.schedule.kind == "betas" else "simple"
    learned = pipeline.variance == "learned"
    objective = of_noise_levels(replace(base.objective, loss=loss), len(pipeline.betas), learned)
    config = Config(
        data=replace(base.data, encoding="ends"), schedule=schedule_of_betas(pipeline.betas, base.schedule), path="vp",
        parameterization=pipeline.parameterization, latent=replace(base.latent, kind="none"),
        encoder=replace(base.encoder, channels=None),
        network=_network(pipeline.name, dict(unet.config), shape[1], base.network), reverse=reverse,
        objective=objective, optimizer=base.optimizer, training=base.training,
    )  # fmt: skip
    size = f"{'x'.join(map(str, shape))}, {levels} levels"
    noted = {
        "schedule": "the scheduler's own betas" if config.schedule.betas else f"betas, {config.schedule.form}",
        "parameterization": config.parameterization, "reverse.variance": reverse.variance, "reverse.clip": reverse.clip,
    }  # fmt: skip
    notes = (
        *(f"{name}: {value}" for name, value in noted.items()),
        f"images: {size}; the levels are not in the files",
        f"data, loss ({config.objective.loss}), optimizer and training are the preset's; the decoder is DDPM's",
        "weights: one set, raw and averaged alike; no moments of an optimizer, step 0",
    )
    return Converted(
        config=config, shape=shape, levels=levels, step=0, notes=notes,
        weights={"raw": {f"network.network.unet.{name}": value for name, value in unet.state_dict().items()}},
        origin={"program": "diffusers", "source": str(source), "inferred": noted | {"images": size}},
    )  # fmt: skip


def _images(pipeline: Pipeline, base: Config, images: Images) -> tuple[tuple[int, int, int], int]:
    """(C, H, W) and levels: of the pipeline, then of what the user says or the preset's data set has."""
    if pipeline.size is None:
        shape, levels = image_shape(Path(pipeline.name), pipeline.channels, base, images)
        return shape, levels or 256
    if images.size not in (None, pipeline.size):
        raise UserError(f"{pipeline.name} is of images of {pipeline.size}, which --size must be, got {images.size}")
    shape, known = (pipeline.channels, *pipeline.size), known_images(base)
    return shape, images.levels or (known[1] if known is not None and known[0] == shape else 256)


def _network(name: str, settings: dict[str, Any], height: int, base: NetworkConfig) -> NetworkConfig:
    """A UNet2DModel's settings as ours; UserError that names one for which there is no field."""
    sizes, groups = list(settings["block_out_channels"]), settings["norm_num_groups"]
    down, up = list(settings["down_block_types"]), list(settings["up_block_types"])
    own = {
        "time_embedding_dim": (None, 4 * sizes[0]), "attn_norm_num_groups": (None, groups),
        "downsample_padding": (0, 1),
    }  # fmt: skip
    for key, choices in (AS_DDPM | own).items():
        if settings[key] not in choices:
            raise UserError(
                f"{name}: {key} = {settings[key]!r}; network.kind = ddpm has {' or '.join(map(repr, choices))}"
            )
    if groups is None:
        raise UserError(f"{name}: norm_num_groups = None; network.kind = ddpm has a number of groups")
    kinds = {"DownBlock2D": "", "AttnDownBlock2D": "Attn"}
    if not set(down) <= kinds.keys() or up != [f"{kinds[kind]}UpBlock2D" for kind in reversed(down)]:
        raise UserError(
            f"{name}: down_block_types and up_block_types must be {', '.join(kinds)} and their mirror image, got "
            f"{', '.join(down)} and {', '.join(up)}"
        )
    channels = sizes[0] if all(size % sizes[0] == 0 for size in sizes) else math.gcd(*sizes)
    features = settings["attention_head_dim"]
    return replace(
        base, kind="ddpm", channels=channels, multipliers=tuple(size // channels for size in sizes),
        blocks=settings["layers_per_block"],
        attention_at=tuple(height // 2**i for i, kind in enumerate(down) if kinds[kind]),
        groups=groups, norm_eps=float(settings["norm_eps"]), dropout=float(settings["dropout"]),
        head_features=None if features is None else (features,), cosines_first=settings["flip_sin_to_cos"],
        frequency_shift=float(settings["freq_shift"]), downsample_padding=settings["downsample_padding"],
        self_condition=False, flag=False, heads=(4,),
    )  # fmt: skip


# Out of a run --------------------------------------------------------------------------------------------------------


def save_diffusers(run: Path, out: Path, weights: str = "ema", checkpoint: str | int = "best") -> Path:
    """A run with network.kind = ddpm as a folder that diffusers' DDPMPipeline.from_pretrained loads, whole or not.

    ``weights`` (ema, raw) of a ``checkpoint`` (best, last or a step); ``out``: new, or empty. UserError where the run
    is of a kind that a pipeline cannot be, or ``out`` holds something.
    """
    from safetensors import SafetensorError

    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"--out needs a new or empty folder, and {out} holds something")
    config = from_dict(checkpoints.read_run(run)["config"])
    for said in _unlike_a_pipeline(config):
        raise UserError(f"{run} cannot be a pipeline of diffusers: {said}")
    model = checkpoints.load_model(run, checkpoint, weights)
    scheduler = _part("DDPMScheduler", str(run))(**_scheduler(config))
    pipeline = _part("DDPMPipeline", str(run))(unet=model.network.network.unet, scheduler=scheduler)
    checkpoints.make_folder(out.parent)
    aside = out.with_name(f".{out.name}.tmp-{os.getpid()}")
    try:
        try:
            pipeline.save_pretrained(str(aside))
            os.replace(aside, out)
        except BaseException:
            shutil.rmtree(aside, ignore_errors=True)
            raise
    except OSError as error:
        raise checkpoints.cannot_write(error, out) from error
    except SafetensorError as error:
        raise UserError(f"cannot write {out}: {' '.join(str(error).split())}") from error
    return out


def _unlike_a_pipeline(config: Config) -> Iterator[str]:
    """What of a run a pipeline cannot say."""
    for name, value, wanted, why in (
        ("network.kind", config.network.kind, "ddpm", "the network of diffusers"),
        ("path", config.path, "vp", "the scheduler's"),
        ("latent.kind", config.latent.kind, "none", "its network is given an image and a timestep"),
        ("network.self_condition", config.network.self_condition, False, "its network gets no estimate"),
        ("data.encoding", config.data.encoding, "ends", "its images reach from -1 to 1"),
        ("objective.prior_scale", config.objective.prior_scale, 1.0, "sampling starts from N(0, 1)"),
    ):
        if value != wanted:
            yield f"{name} must be {wanted} ({why}), got {value}"


def _scheduler(config: Config) -> dict[str, Any]:
    """The arguments of a DDPMScheduler whose betas are read back as they are here."""
    own, form, steps = config.schedule.betas, config.schedule.form, config.schedule.timesteps
    betas = widened(np.asarray(own)) if own is not None else BETAS[form](steps)
    ends = {"beta_start": float(betas[0]), "beta_end": float(betas[-1])}
    choices: list[dict[str, Any]] = [
        {"beta_schedule": "linear"} | ends, {"beta_schedule": "scaled_linear"} | ends,
        {"beta_schedule": "squaredcos_cap_v2"}, {"trained_betas": betas.tolist()},
    ]  # fmt: skip
    common = {
        "num_train_timesteps": len(betas), "clip_sample": config.reverse.clip,
        "prediction_type": {ours: theirs for theirs, ours in PREDICTIONS.items()}[config.parameterization],
        "variance_type": next(theirs for theirs, ours in VARIANCES.items() if ours == config.reverse.variance),
    }  # fmt: skip
    found = ({**common, **choice} for choice in choices)
    return next(settings for settings in found if np.array_equal(_betas("the run", settings), betas))
