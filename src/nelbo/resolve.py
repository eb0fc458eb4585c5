"""What a verb's argument names: a run, a shared model, somebody else's checkpoint; on disk or on the hub.

A foreign checkpoint is read as data: configurations as JSON, weights as safetensors or by torch's weights-only loader.
It brings a network and a schedule, not a data set, and no training to go on with.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nelbo import checkpoints, sharing
from nelbo.errors import UserError

__all__ = ["Source", "find_folder", "find_shared", "is_hub_id", "resolve"]


@dataclass(frozen=True)
class Source:
    """A model that can be evaluated and sampled from.

    ``name`` as the user gave it; ``kind``, of which program; ``folder``, where figures and samples of it go; ``shape``
    (C, H, W), None for a size that is not known; ``levels``, or None where any will do (a foreign network saw reals
    from -1 to 1); ``data``, the data set that it was trained on, where known; ``step``; ``steps``, the T of its own
    bound; ``identity``, what distinguishes these weights from others; ``load(levels, device, shape)``, the
    DiffusionModel in evaluation mode, for images of that shape where its own is not known.
    """

    name: str
    kind: str
    folder: Path
    shape: tuple[int, int | None, int | None]
    levels: int | None
    data: str | None
    step: int | None
    steps: int
    identity: Any
    load: Callable[..., Any]


def resolve(
    argument: Path | str,
    checkpoint: str | int = "best",
    weights: str | None = "ema",
    out: Path | None = None,
    parameterization: str | None = None,
    revision: str | None = None,
) -> Source:
    """The source that an argument names; UserError where it names none.

    ``checkpoint`` and ``weights`` (ema, raw; None: ema, or what a shared model has) of a run; ``out``: another folder
    for what is written; ``parameterization``: what a foreign network estimates, where its file does not say;
    ``revision`` of a hub id: a branch, tag or commit.
    """
    path, folder = Path(argument), find_folder(argument, revision)
    if (path / "run.json").is_file():
        return _run(path, checkpoint, weights or "ema", out)
    if sharing.is_shared(folder):
        return _shared(sharing.read(folder, str(argument)), checkpoint, weights, out)
    if folder != path or any((path / name).is_file() for name in INDEX):
        return _pipeline(str(argument), folder, out)
    if path.suffix == ".pt" and path.is_file():
        return _trainer(path, weights or "ema", out, parameterization)
    checkpoints.read_run(path)  # says what is wrong
    raise AssertionError(path)


def is_hub_id(argument: Path | str) -> bool:
    """Whether an argument is OWNER/NAME, and nothing on disk."""
    path = Path(argument)
    return not path.exists() and not path.parent.is_dir() and bool(re.fullmatch(r"[\w.-]+/[\w.-]+", str(argument)))


def find_shared(argument: Path | str, revision: str | None = None) -> sharing.Shared | None:
    """The shared model that an argument names, on disk or on the hub; None where it names something else."""
    folder = find_folder(argument, revision)
    return sharing.read(folder, str(argument)) if sharing.is_shared(folder) else None


def find_folder(argument: Path | str, revision: str | None = None) -> Path:
    """The folder or file that an argument names; of a hub id, in the hub's own cache."""
    if is_hub_id(argument):
        return _from_hub(str(argument), revision)
    if revision is not None:
        raise UserError(f"revision = {revision!r} belongs to a hub id OWNER/NAME, and {argument} is none")
    return Path(argument)


def _shared(shared: sharing.Shared, checkpoint: str | int, weights: str | None, out: Path | None) -> Source:
    """A shared model has one step and one set of weights: it is its best and its last."""
    record, name = shared.record, shared.name
    if weights not in (None, shared.weights):
        raise UserError(f"{name} is a shared model of {shared.weights} weights alone: give those, not {weights}")
    if str(checkpoint) not in ("best", "last", str(shared.step)):
        raise UserError(f"{name} is a shared model of step {shared.step} alone, and has no checkpoint {checkpoint}")
    data, config = record["data"], record["config"]

    def load(levels: int, device: Any, shape: tuple[int, ...] | None = None) -> Any:
        return shared.model(device)

    return Source(
        name=name, kind="nelbo", folder=out or Path("evaluations") / Path(name).resolve().name,
        shape=tuple(data["shape"]), levels=data["levels"], data=config["data"]["source"], step=shared.step,
        steps=config["objective"]["steps"], identity=[shared.sha256], load=load,
    )  # fmt: skip


def _run(run: Path, checkpoint: str | int, weights: str, out: Path | None) -> Source:
    record, found = checkpoints.read_run(run), checkpoints.read_checkpoint(run, checkpoint)
    data = record["data"]

    def load(levels: int, device: Any, shape: tuple[int, ...] | None = None) -> Any:
        return checkpoints.load_model(run, checkpoint, weights, device)

    return Source(
        name=str(run), kind="nelbo", folder=out or run, shape=tuple(data["shape"]), levels=data["levels"],
        data=record["config"]["data"]["source"], step=found.step, steps=record["config"]["objective"]["steps"],
        identity=[found.step, found.meta["versions"], record["created"]], load=load,
    )  # fmt: skip


# diffusers -----------------------------------------------------------------------------------------------------------

INDEX = ("model_index.json", "scheduler_config.json")


def _from_hub(name: str, revision: str | None = None) -> Path:
    """The files of a hub repository that a model needs, in the hub's own cache."""
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise UserError(f"no such run: {name}; to fetch it from the hub: pip install 'nelbo[ddpm]'") from None
    try:
        patterns = ["*.json", "*.safetensors", "*.bin"]
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
    except Exception as error:  # that library's errors share no base but this
        lost = "the hub cannot be reached, and its files are not in the cache"
        reason = lost if type(error).__name__ == "LocalEntryNotFoundError" else " ".join(str(error).split())[:200]
        raise UserError(
            f"no such run: {name}; nor could it be had from the hub: {reason}; give a run, a shared model or a "
            "pipeline, its folder or the id of one that can be fetched"
        ) from None


def _pipeline(name: str, folder: Path, out: Path | None) -> Source:
    """A pipeline of diffusers with one UNet2DModel and a scheduler of betas."""
    from nelbo.convert.diffusers import read
    from nelbo.schedules import gammas_of_betas

    pipeline = read(folder, name)
    channels, size = pipeline.channels, pipeline.size or (None, None)

    def load(levels: int, device: Any, shape: tuple[int, int, int] | None = None) -> Any:
        from nelbo.compose import table_model
        from nelbo.model import Reverse
        from nelbo.networks import DiffusersUNet

        own = (channels, *pipeline.size) if pipeline.size is not None else shape
        if own is None:
            raise UserError(f"{name} does not say how large its images are: give --data, whose size is taken")
        reverse = Reverse(pipeline.variance, pipeline.clip, "gaussian")
        gammas, kind = gammas_of_betas(pipeline.betas), pipeline.parameterization
        return table_model(DiffusersUNet(pipeline.network()), gammas, own, levels, kind, reverse).to(device).eval()

    weights = sorted(p for p in pipeline.folder.glob("diffusion_pytorch_model*") if p.is_file())
    return Source(
        name=name, kind="diffusers", folder=out or Path("evaluations") / Path(name).name, shape=(channels, *size),
        levels=None, data=None, step=None, steps=len(pipeline.betas) - 1,
        identity=[[p.name, p.stat().st_size, p.stat().st_mtime_ns] for p in weights], load=load,
    )  # fmt: skip


# denoising-diffusion-pytorch -----------------------------------------------------------------------------------------


def _trainer(path: Path, weights: str, out: Path | None, parameterization: str | None) -> Source:
    """A trainer's file; the package samples with the posterior's variance, or its learned one, and clips x_hat."""
    from nelbo.convert.denoising_diffusion_pytorch import read
    from nelbo.schedules import gammas_of_betas

    trained = read(path, parameterization)
    if weights not in trained.weights:
        raise UserError(f"{path} has no {weights} weights; it holds {', '.join(trained.weights)}")
    try:
        gammas = gammas_of_betas(trained.betas)
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None

    def load(levels: int, device: Any, shape: tuple[int, int, int] | None = None) -> Any:
        from nelbo.compose import table_model
        from nelbo.model import Reverse
        from nelbo.networks import AttentionUNet

        if shape is None:
            raise UserError(
                f"{path} does not say how large its images are: nelbo evaluate and nelbo fid take the size of --data"
            )
        smallest = 2 ** (len(trained.network["multipliers"]) - 1)
        if shape[1] % smallest or shape[2] % smallest:
            raise UserError(
                f"{path}: height and width must be multiples of {smallest}, because its network halves images, "
                f"got {shape[1]}x{shape[2]}"
            )
        network = AttentionUNet(trained.channels, **trained.network)
        checkpoints.load_weights(network, trained.weights[weights], path)
        reverse = Reverse("learned" if trained.learned else "fixed-small", True, "gaussian")
        conditioned = trained.network["self_condition"]
        kind = trained.parameterization
        return table_model(network, gammas, shape, levels, kind, reverse, conditioned).to(device).eval()

    stat = path.stat()
    return Source(
        name=str(path), kind="denoising-diffusion-pytorch", folder=out or Path("evaluations") / path.stem,
        shape=(trained.channels, None, None), levels=None, data=None, step=trained.step, steps=len(gammas) - 1,
        identity=[path.name, stat.st_size, stat.st_mtime_ns, weights], load=load,
    )  # fmt: skip
