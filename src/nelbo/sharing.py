"""Trained models to share: a folder, the same on disk and on the hub, written whole or not at all and read as data.

    FOLDER/config.json          configuration, data, step, versions; size and SHA-256 of the weights
    FOLDER/model.safetensors    one set of weights, byte for byte the checkpoint's
    FOLDER/README.md            the model card: front matter for the hub, figures with their errors, how to load
    FOLDER/samples.png          samples of these weights, where the run has some

A figure on the card was measured on these weights (its file in RUN/evaluations names their step and kind), or is not
there. Reading takes JSON and safetensors of these names, and executes nothing.
"""

import contextlib
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nelbo
from nelbo import checkpoints
from nelbo.errors import UserError

__all__ = ["Shared", "is_shared", "push_to_hub", "read", "save_pretrained"]

FORMAT = 1
LIBRARY = "nelbo"
CONFIG, WEIGHTS, CARD, PICTURE = "config.json", "model.safetensors", "README.md", "samples.png"
FILES = (CONFIG, WEIGHTS, CARD, PICTURE)
SHOWN = 64
TAGS = ["diffusion", "likelihood", "density-estimation", "bits-per-dim"]
TASK = "unconditional-image-generation"


# Reading -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shared:
    """A shared model: the folder that its files are in, the name that the user gave, and its config.json."""

    folder: Path
    name: str
    record: dict[str, Any]

    @property
    def step(self) -> int:
        """Optimizer steps that the weights took."""
        return int(self.record["step"])

    @property
    def weights(self) -> str:
        """Which of the run's weights they are: ema or raw."""
        return str(self.record["weights"])

    @property
    def sha256(self) -> str:
        """SHA-256 of the weights' file."""
        return str(self.record["files"][WEIGHTS]["sha256"])

    def tensors(self) -> dict[str, Any]:
        """The weights, after size and SHA-256 were checked; UserError where they are not those that were shared."""
        expected = self.record["files"][WEIGHTS]
        why = f"of the checksum in {CONFIG}; fetch or share it again"
        return checkpoints.read_tensors(self.folder / WEIGHTS, expected, f"{WEIGHTS} of {self.name}", why)

    def model(self, device: Any = "cpu") -> Any:
        """The DiffusionModel, in evaluation mode; every tensor's name and shape must be the configuration's."""
        from nelbo.compose import build_model
        from nelbo.config import from_dict

        tensors, data = self.tensors(), self.record["data"]
        try:
            config = from_dict(self.record["config"])
            model = build_model(config, tuple(data["shape"]), data["levels"], data.get("classes"))
        except UserError as error:
            raise UserError(f"{CONFIG} of {self.name}, {self.record.get('shared_by')}: {error}") from None
        checkpoints.load_weights(model, tensors, Path(self.name))
        return model.to(device).eval()


def is_shared(folder: Path) -> bool:
    """Whether a folder holds a shared model: its config.json says so, or, unreadable, lies beside such weights."""
    try:
        record = json.loads((folder / CONFIG).read_bytes())
    except OSError:
        return False
    except ValueError:
        return (folder / WEIGHTS).is_file()
    return isinstance(record, dict) and record.get("library") == LIBRARY


def read(folder: Path, name: str | None = None) -> Shared:
    """The shared model in a folder; UserError where config.json is not one that this version reads."""
    name = str(folder) if name is None else name
    where, record = f"{CONFIG} of {name}", checkpoints.read_json(folder / CONFIG)
    if not isinstance(record, dict) or record.get("library") != LIBRARY:
        raise UserError(f"{where} is not of a model that nelbo shared: its library must be {LIBRARY!r}")
    version = _entry(record, "format", int, where)
    if version > FORMAT:
        raise UserError(
            f"{name} has format {version}, and this version of nelbo ({nelbo.__version__}) reads formats up to "
            f"{FORMAT}: update nelbo"
        )
    for key, kind in (
        ("config.data.source", str), ("config.objective.steps", int), ("data.name", str), ("data.version", str),
        ("data.shape", list), ("data.levels", int), ("step", int), ("weights", str), ("versions", dict),
    ):  # fmt: skip
        _entry(record, key, kind, where)
    entry = _entry(record, "files", dict, where).get(WEIGHTS)
    for key, kind in (("bytes", int), ("sha256", str)):
        _entry(entry, key, kind, f"{where}, files")
    shape = record["data"]["shape"]
    if len(shape) != 3 or not all(type(n) is int and n > 0 for n in shape):
        raise UserError(f"{where}: data.shape must be channels, height and width, got {shape!r}")
    return Shared(folder, name, record)


def _entry(values: Any, key: str, kind: type, where: str) -> Any:
    """The entry at a dotted key, which must be of that type."""
    for part in key.split("."):
        values = values.get(part) if isinstance(values, dict) else None
    if not isinstance(values, kind) or isinstance(values, bool):
        raise UserError(f"{where}: {key} must be of type {kind.__name__}, got {values!r}; it was changed")
    return values


# Writing -------------------------------------------------------------------------------------------------------------


def save_pretrained(
    run: Path | str,
    folder: Path | str,
    checkpoint: str | int = "best",
    weights: str = "ema",
    *,
    license: str | None = None,
    repo: str | None = None,
    draw: int = 0,
    say: Callable[[str], None] = lambda line: None,
) -> Path:
    """A trained run as a folder to share; returns the folder. The same call replaces the folder that it wrote before.

    ``license``: the hub's identifier, such as mit; ``repo``: the hub id that the card tells to load; ``draw``: so many
    samples drawn now, as ``nelbo sample`` does, where the run has none; ``say`` gets lines for people. UserError where
    ``folder`` holds anything else, or another run's model.
    """
    run, out = Path(run), Path(os.path.realpath(folder))
    if license is not None and not re.fullmatch(r"[\w.-]+", license):
        raise UserError(f"license must be an identifier of the hub's, such as mit or apache-2.0, got {license!r}")
    if repo is not None:
        _check_repo(repo)
    if draw < 0:
        raise UserError(f"draw must be 0 samples or more, got {draw}")
    from safetensors.torch import save

    if weights not in checkpoints.WEIGHTS:
        raise UserError(f"weights must be one of {', '.join(checkpoints.WEIGHTS)}, got {weights!r}")
    record, found = checkpoints.read_run(run), checkpoints.read_checkpoint(run, checkpoint)
    _bring_back(out)
    _refuse(out, str(folder), record)
    model = checkpoints.load_model(run, found.step, weights)  # what does not load is not shared
    if draw and _samples(run, found.step, weights, record["data"]) is None:
        _draw(model, run, found.step, weights, draw)
    samples = _samples(run, found.step, weights, record["data"])
    content = save(checkpoints.load_tensors(found, checkpoints.WEIGHTS[weights]))
    described = _description(record, found, weights, content, samples)
    figures, distances = _figures(run, described), _distances(run, found.step, weights)
    card = model_card(described, figures, distances, repo, out.name, license).encode()
    described["files"][CARD] = _sum(card)
    with _aside(out) as aside:
        checkpoints.write_aside(aside / WEIGHTS, content)
        checkpoints.write_json(aside / CONFIG, described)
        checkpoints.write_aside(aside / CARD, card)
        if samples is not None:
            checkpoints.write_aside(aside / PICTURE, samples.png)
    say(f"written: {folder}: step {found.step}, {weights} weights, {len(content)} bytes")
    measure = f"nelbo evaluate {run} --checkpoint {found.step}" + (" --weights raw" if weights == "raw" else "")
    if not figures:
        say(f"the card has no figures: no evaluation of these weights is in {run}; `{measure}`, and share again")
    if samples is None:
        say("the card has no picture: no samples of these weights are there; --draw 64 draws some")
    return Path(folder)


def _description(
    record: dict[str, Any], found: checkpoints.Checkpoint, weights: str, content: bytes, samples: "Samples | None"
) -> dict[str, Any]:
    """config.json. Paths of this machine are cut to names."""
    config = json.loads(json.dumps(record["config"]))
    for group, name in (("data", "source"), ("training", "fid_weights")):
        if config.get(group, {}).get(name):
            config[group][name] = _without_folder(config[group][name])
    return {
        "library": LIBRARY,
        "format": FORMAT,
        "preset": record.get("preset", ""),
        "config": config,
        "data": record["data"],
        "step": found.step,
        "images": found.meta.get("images"),
        "weights": weights,
        "parameters": record.get("parameters"),
        "samples": None if samples is None else {"shown": samples.shown, "drawn": samples.name},
        "files": {WEIGHTS: _sum(content)},
        "versions": found.meta.get("versions", {}),
        "converted": (record.get("converted") or {}).get("program"),
        "shared_by": f"nelbo {nelbo.__version__}",
        "created": record.get("created"),
    }


def _sum(content: bytes) -> dict[str, Any]:
    return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def _without_folder(source: str) -> str:
    """A data set's name as it is; of a path, the last part."""
    path = Path(source).expanduser()
    return path.resolve().name if path.exists() or path.is_absolute() or source[0] in "./\\~" else source


def _refuse(out: Path, said: str, record: dict[str, Any]) -> None:
    """UserError where a folder holds anything but an earlier model of this run."""
    if not out.exists():
        return
    if not out.is_dir():
        raise UserError(f"a shared model needs a folder, and {said} is a file")
    entries = sorted(p.name for p in out.iterdir())
    strangers = [name for name in entries if name not in FILES]
    if entries and (strangers or not is_shared(out)):
        raise UserError(
            f"{said} holds something else ({(strangers or entries)[0]}): give a new or empty folder, or one that a "
            "model of this run was shared in before"
        )
    if not entries:
        return
    there = read(out, said).record
    if there.get("created") != record.get("created"):
        raise UserError(f"{said} holds another run's model: give a new folder, or remove that one")
    if (out / CARD).is_file() and _sum((out / CARD).read_bytes()) != there["files"].get(CARD):
        raise UserError(
            f"{said}/{CARD} was edited since it was written, and would be lost: give a new folder, or remove that file "
            "(nelbo.push_to_hub uploads the folder as it is)"
        )


def _beside(out: Path, kind: str) -> Path:
    return out.with_name(f".{out.name}.{kind}")


def _bring_back(out: Path) -> None:
    """Undo a replacement that was killed between its two renames."""
    with contextlib.suppress(OSError):
        if not out.exists():
            os.replace(_beside(out, "old"), out)


@contextlib.contextmanager
def _aside(out: Path) -> Iterator[Path]:
    """An empty folder beside ``out`` that takes its place when the block ends, and goes when it fails."""
    aside, old = _beside(out, "tmp"), _beside(out, "old")
    checkpoints.make_folder(aside)
    with checkpoints.locked(aside, "writing"):
        try:
            for left in aside.iterdir():  # by one that was killed
                left.unlink()
            yield aside
            shutil.rmtree(old, ignore_errors=True)
            if out.exists():
                os.replace(out, old)
            os.replace(aside, out)
        except BaseException as error:
            shutil.rmtree(aside, ignore_errors=True)
            _bring_back(out)
            if isinstance(error, OSError):
                raise checkpoints.cannot_write(error, out) from error
            raise
    shutil.rmtree(old, ignore_errors=True)


# Samples -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Samples:
    """A grid as a PNG file, the images in it, and the file of the run's samples that they are from."""

    name: str
    shown: int
    png: bytes


def _samples(run: Path, step: int, weights: str, data: dict[str, Any]) -> Samples | None:
    """The newest samples of these weights in the run, by the names that training and ``nelbo sample`` give."""
    import zipfile

    import numpy as np

    from nelbo import pictures

    files = [p for p in (run / "samples").glob("step-*.npz") if _is_of(p.stem, step, weights)]
    for path in sorted(files, key=lambda p: (p.stat().st_mtime, p.name), reverse=True)[:1]:
        try:
            with np.load(path, allow_pickle=False) as arrays:
                images = arrays["images"][:SHOWN]
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            raise UserError(f"{path} cannot be read as samples: {error}; remove it, or draw them again") from None
        if images.dtype != np.uint8 or list(images.shape[1:]) != data["shape"] or not len(images):
            raise UserError(f"{path}: images must be uint8 (N, {', '.join(map(str, data['shape']))})")
        return Samples(path.stem, len(images), pictures.png(pictures.grid(images, data["levels"])))
    return None


def _is_of(stem: str, step: int, weights: str) -> bool:
    """Whether samples of that name are of these weights; strips between two images are no samples."""
    if stem == checkpoints.checkpoint_name(step):
        return weights == "ema"
    raw = stem.endswith("-raw")
    return stem.startswith(f"step-{step}-") and "-between-" not in stem and raw == (weights == "raw")


def _draw(model: Any, run: Path, step: int, weights: str, count: int) -> None:
    """Samples in the run's folder, as ``nelbo sample`` draws and names them."""
    from nelbo import sampling
    from nelbo.resolve import resolve

    settings = sampling.Settings(count=count, trajectory=0)
    sampling.check(settings)
    settings, source = sampling.resolved(settings, model, str(run)), resolve(run, step, weights)
    sampling.sample_to_files(model, source.folder / "samples" / sampling.name_of(settings, source, weights), settings)


# Figures -------------------------------------------------------------------------------------------------------------


def _figures(run: Path, record: dict[str, Any]) -> list[Any]:
    """The evaluations (report.runs.Evaluation) of these weights: own data and test images first, bounds first."""
    from nelbo.report.runs import read_runs

    own = record["data"]["name"], record["data"]["version"]
    found = [e for e in read_runs([run])[0].evaluations if (e.step, e.weights) == (record["step"], record["weights"])]
    return sorted(found, key=lambda e: (e.data != own, e.split != "test", e.method != "vlb", -e.images, e.stem))


def _distances(run: Path, step: int, weights: str) -> list[dict[str, Any]]:
    """The records of ``nelbo fid`` on samples of these weights."""
    found = []
    for path in sorted((run / "evaluations").glob("fid-*.json")):
        record = checkpoints.read_json(path)
        for key, kind in (("samples", dict), ("settings", dict), ("reference", dict), ("extractor", dict)):
            _entry(record, key, kind, str(path))
        checkpoint = record.get("checkpoint") or {}
        if record["samples"].get("drawn") and checkpoint.get("step") == step:
            if record["settings"].get("run_weights") == weights:
                found.append(record)
    return found


def _finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and value - value == 0


# The card ------------------------------------------------------------------------------------------------------------


def model_card(
    record: dict[str, Any],
    figures: list[Any],
    distances: list[dict[str, Any]],
    repo: str | None,
    name: str,
    license: str | None,
) -> str:
    """README.md: the front matter that the hub reads, and the page for people."""
    name = repo.split("/")[1] if repo else name
    front = _front_matter(record, figures, distances, name, license)
    sections = [
        f"---\n{front}\n---",
        f"# {name}",
        _summary(record),
        *_picture(record),
        _how_to_load(record, repo or "FOLDER_OR_HUB_ID"),
        f"## Data\n\n{record['data'].get('description') or record['data']['name']}"
        f" (version `{record['data']['version']}`)",
        _likelihood(figures, repo or "FOLDER_OR_HUB_ID"),
        *_references(figures),
        *_fid(distances),
        f"## Made with\n\n{', '.join(f'{k} {v}' for k, v in record['versions'].items())}. `{CONFIG}` holds the whole "
        f"configuration and the SHA-256 of the weights, which is checked whenever they are loaded; `{WEIGHTS}` holds "
        "tensors alone, and loading it executes no code.",
    ]
    return "\n\n".join(sections) + "\n"


def _front_matter(
    record: dict[str, Any], figures: list[Any], distances: list[dict[str, Any]], name: str, license: str | None
) -> str:
    from huggingface_hub import ModelCardData

    own = record["data"]["name"]
    results = [*(r for e in figures for r in _results(e)), *(r for d in distances for r in _distance_results(d, own))]
    family = record["preset"].split("-")[0]
    data = ModelCardData(
        library_name=LIBRARY,
        pipeline_tag=TASK,
        license=license.lower() if license else None,
        tags=TAGS + ([family] if family else []),
        datasets=[_dataset(own)] if own.startswith("hub:") else None,
        model_name=name,
        eval_results=results or None,
    )
    return str(data.to_yaml()).strip()


def _dataset(name: str) -> str:
    """A data set as the hub knows it, OWNER/NAME of hub:OWNER/NAME:CONFIG; others by their name."""
    return name.removeprefix("hub:").split(":")[0] if name.startswith("hub:") else name


def _results(e: Any) -> Iterator[Any]:
    """The entries of the model-index that one evaluation makes: the figure, and where it differs, as published."""
    from huggingface_hub import EvalResult

    kind = "upper bound" if e.is_bound else "estimate"
    entries = [("bits_per_dim", f"bits/dim ({kind}, {_method(e)})", e.value, e.is_bound)]
    if e.published is not None:
        entries.append(("bits_per_dim_as_published", "bits/dim as published (not a bound)", e.published, False))
    for metric, title, value, is_bound in entries:
        if not _finite(value.mean):
            continue
        yield EvalResult(
            task_type=TASK,
            dataset_type=_dataset(e.data[0]),
            dataset_name=e.data[0],
            dataset_revision=e.data[1],
            dataset_split=e.split,
            metric_type=metric,
            metric_name=title,
            metric_value=value.mean,
            metric_args={
                "standard_error": value.error if _finite(value.error) else None,
                "is_bound": is_bound,
                "images": e.images,
                "images_in_split": e.split_images,
                "settings": e.settings,
            },
        )


def _distance_results(record: dict[str, Any], own: str) -> Iterator[Any]:
    from huggingface_hub import EvalResult

    if _finite(record.get("fid")):
        of, against = _compared(record)
        given = record["settings"].get("data")
        data = _without_folder(given) if given else own
        yield EvalResult(
            task_type=TASK,
            dataset_type=_dataset(data),
            dataset_name=data,
            metric_type="fid" if record["extractor"].get("name") == "inception" else "frechet_distance",
            metric_name=_distance_name(record),
            metric_value=record["fid"],
            metric_args={"standard_error": record.get("standard_error"), "of": of, "against": against},
        )


def _distance_name(record: dict[str, Any]) -> str:
    name = record["extractor"].get("name")
    return "FID" if name == "inception" else f"Fréchet distance ({name} features)"


def _compared(record: dict[str, Any]) -> tuple[str, str]:
    """What a distance is of and against, without the paths of this machine."""
    how, reference = record["settings"], record["reference"]
    steps = f", {how['steps']} steps" if how.get("steps") else ""
    own = reference.get("name") in ("train", "validation", "test")
    against = reference.get("what") if own else Path(str(reference.get("name"))).name
    return f"{record.get('images')} samples ({how.get('method')}{steps})", str(against)


def _method(e: Any) -> str:
    if e.method == "ode":
        return "probability-flow ODE"
    return f"VLB, T = {e.settings['steps']}" if e.settings.get("steps") else "VLB, continuous time"


def _summary(record: dict[str, Any]) -> str:
    data, preset = record["data"], record["preset"]
    shape = "x".join(map(str, data["shape"]))
    parameters = f" {record['parameters']:,} parameters;" if record["parameters"] else ""
    seen = f" ({record['images']:,} images)" if record["images"] else ""
    average = {"ema": "moving average of the weights", "raw": "raw weights"}[record["weights"]]
    origin = f"trained for likelihood with nelbo{f' (preset `{preset}`)' if preset else ''} on {data['name']}"
    if record["converted"]:
        origin = f"read by nelbo from a checkpoint of {record['converted']}"
    return (
        f"A diffusion model of images of {shape} (channels, height, width) with {data['levels']} levels, {origin}."
        f"{parameters} the {average} after step {record['step']:,}{seen}."
    )


def _picture(record: dict[str, Any]) -> list[str]:
    samples = record["samples"]
    if samples is None:
        return []
    return [f"![Samples]({PICTURE})", f"{samples['shown']} samples of these weights (`{samples['drawn']}`)."]


def _how_to_load(record: dict[str, Any], source: str) -> str:
    c, h, w = record["data"]["shape"]
    return f"""## How to load

```python
import nelbo

model = nelbo.load("{source}")
images = nelbo.sample(model, 16)  # uint8, (16, {c}, {h}, {w}), levels 0 to {record["data"]["levels"] - 1}
```

On the command line:

    nelbo evaluate {source}
    nelbo sample {source} --count 64"""


def _likelihood(figures: list[Any], source: str) -> str:
    if not figures:
        return (
            "## Likelihood\n\nNo evaluation of these weights was recorded when they were shared. "
            f"`nelbo evaluate {source}` measures their bits/dim."
        )
    from nelbo.report.tables import NOT_A_BOUND, figure, provenance

    rows = []
    for e in figures:
        kind, images = "upper bound" if e.is_bound else "estimate", f"{e.images} of {e.split_images} of {e.split}"
        rows.append(f"| {figure(e.value)} | {kind} | {images} | {provenance(e)} |")
        if e.published is not None:
            rows.append(f"| {figure(e.published)} | as published, {NOT_A_BOUND} | {images} | the same |")
    return "\n".join(
        [
            "## Likelihood",
            "",
            "Bits per dimension: lower is better. ± is one standard error over the images, and contains the noise of "
            "the draws.",
            "",
            "| bits/dim | which is | images | how it was measured |",
            "|---|---|---|---|",
            *rows,
        ]
    )


def _references(figures: list[Any]) -> list[str]:
    """The classical references that the first evaluation measured on the same split."""
    if not figures or not figures[0].baselines:
        return []
    from nelbo.report.tables import figure

    e = figures[0]
    rows = [f"| {b.name} | {figure(b.value)} |" for b in e.baselines]
    head = f"Classical references on all {e.split_images} {e.split} images of {e.data[0]}:"
    return ["\n".join([head, "", "| | bits/dim |", "|---|---|", *rows])]


def _fid(distances: list[dict[str, Any]]) -> list[str]:
    if not distances:
        return []
    rows = []
    for d in distances:
        error = f" ± {d['standard_error']:.4f}" if _finite(d.get("standard_error")) else " (error not known)"
        value = f"{d['fid']:.4f}{error}" if _finite(d.get("fid")) else "–"
        rows.append(f"| {_distance_name(d)} | {value} | {' | '.join(_compared(d))} |")
    warnings = dict.fromkeys(d["warning"] for d in distances if d.get("warning"))
    return ["\n".join(["## Samples", "", "| | value | of | against |", "|---|---|---|---|", *rows]), *warnings]


# The hub -------------------------------------------------------------------------------------------------------------


def _check_repo(repo: str) -> None:
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repo):
        raise UserError(f"a hub id must be OWNER/NAME, got {repo!r}")


def push_to_hub(folder: Path | str, repo: str, private: bool = False) -> str:
    """Upload a shared folder to the hub as OWNER/NAME, in one commit, with the login of huggingface_hub; its address.

    A repository that is there is written to if it is nelbo's or has no model. What fails is a UserError, and the folder
    stays as it is. ``private``: of a new repository; one that is public is refused.
    """
    _check_repo(repo)
    shared = read(Path(folder))
    shared.tensors()
    try:
        from huggingface_hub import HfApi
    except ImportError:
        raise UserError("to push to the hub: pip install huggingface_hub") from None
    api = HfApi(library_name=LIBRARY, library_version=nelbo.__version__)
    try:
        api.create_repo(repo, private=private or None, exist_ok=True)
        _refuse_repo(api, repo, private)
        api.upload_folder(
            repo_id=repo,
            folder_path=shared.folder,
            allow_patterns=list(FILES),
            delete_patterns=[name for name in FILES if not (shared.folder / name).is_file()],
            commit_message=f"nelbo {nelbo.__version__}: step {shared.step}, {shared.weights} weights",
        )
    except UserError:
        raise
    except Exception as error:  # that library's errors share no base but this
        raise UserError(
            f"cannot push to {repo}: {_reason(error)}; {folder} is kept, and the same command tries again"
        ) from None
    return f"{api.endpoint}/{repo}"


def _refuse_repo(api: Any, repo: str, private: bool) -> None:
    """UserError where a repository holds another program's model, or is public and was to be private."""
    if private and not api.model_info(repo).private:
        raise UserError(f"--private: {repo} is there already, and public; make it private on the hub, or name another")
    files = set(api.list_repo_files(repo))
    ours = CONFIG not in files or is_shared(Path(api.hf_hub_download(repo, CONFIG)).parent)
    if "model_index.json" in files or not ours:
        raise UserError(f"{repo} holds another program's model: give another OWNER/NAME")


LOST = {"ConnectError", "ConnectionError", "TimeoutException", "Timeout", "OfflineModeIsEnabled"}
STATUS = {
    401: "the hub knows no such login: `hf auth login`, or set HF_TOKEN",
    403: "this login has no right to write there",
}


def _reason(error: BaseException) -> str:
    """Why the hub did not take it, in a line; the first cause where the error is only that something failed."""
    causes = [error]
    while causes[-1].__cause__ is not None:
        causes.append(causes[-1].__cause__)
    for cause in causes:
        status = getattr(getattr(cause, "response", None), "status_code", None)
        if status in STATUS:
            return STATUS[status]
        if LOST & {cls.__name__ for cls in type(cause).__mro__}:
            return "the hub cannot be reached"
    said = error if getattr(error, "response", None) is not None else causes[-1]
    return " ".join(str(said).split())[:200] or type(said).__name__
