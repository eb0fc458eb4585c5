"""Run folders and checkpoints: safetensors and readable JSON, written aside and renamed, so nothing is half-written.

    RUN/run.json                          configuration, data, versions
    RUN/metrics.jsonl, tensorboard/       logs
    RUN/checkpoints/step-000001000/       weights.safetensors, ema.safetensors, optimizer.safetensors, meta.json
    RUN/samples/, RUN/evaluations/        pictures and figures

Where processes hold parts of the weights (sharding.py) each writes its own: ema-00000-of-00002.safetensors and so on.
A checkpoint is complete when its folder has its final name; meta.json holds the size and SHA-256 of every file.
Loading never executes code.
"""

import contextlib
import errno
import hashlib
import json
import math
import os
import secrets
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nelbo.errors import UserError

if TYPE_CHECKING:  # it loads torch
    from nelbo.group import Group

__all__ = [
    "Checkpoint",
    "cannot_write",
    "find_checkpoint",
    "load_model",
    "load_tensors",
    "locked",
    "make_folder",
    "read_checkpoint",
    "read_json",
    "read_run",
    "read_tensors",
    "save_checkpoint",
    "sync_folder",
    "to_json",
    "write_aside",
    "write_json",
    "write_together",
]

FORMAT = 1
WEIGHTS = {"raw": "weights.safetensors", "ema": "ema.safetensors"}
OPTIMIZER = "optimizer.safetensors"


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint on disk and the contents of its meta.json."""

    path: Path
    meta: dict[str, Any]

    @property
    def step(self) -> int:
        """Optimizer steps taken."""
        return int(self.meta["step"])


# Files ---------------------------------------------------------------------------------------------------------------


def cannot_write(error: OSError, where: Path) -> UserError:
    """A full disk, a folder without permission and the like, as the user's problem."""
    return UserError(f"cannot write {where}: {error.strerror or error}; what was complete before is kept")


def make_folder(folder: Path) -> None:
    """Make a folder and those above it, where they are missing."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise cannot_write(error, folder) from error


def write_aside(path: Path, content: bytes | str) -> None:
    """Write a file under a temporary name, flush it to disk and rename it into place."""
    write_together({path: content})


def write_together(files: dict[Path, bytes | str]) -> None:
    """``write_aside`` of one file or more that belong together: renamed into place when all are written, in the order
    given, so that where the last is new all are."""
    asides = {path: path.with_name(f".{path.name}.tmp-{os.getpid()}") for path in files}
    path = next(iter(files))
    try:
        try:
            for folder in {path.parent for path in files}:
                folder.mkdir(parents=True, exist_ok=True)
            for path, content in files.items():
                _write(asides[path], content.encode() if isinstance(content, str) else content)
            for path, aside in asides.items():
                os.replace(aside, path)
                sync_folder(path.parent)
        except BaseException:
            for aside in asides.values():
                with contextlib.suppress(OSError):  # the first error is the one to tell
                    aside.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise cannot_write(error, path) from error


def _write(path: Path, content: bytes) -> None:
    with open(path, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Bring the names in a folder to the disk. Some network file systems cannot be asked to; they do it themselves."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EBADF, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def to_json(value: Any, indent: int | None = None) -> str:
    """JSON; numbers that are not finite become null."""

    def clean(v: Any) -> Any:
        if isinstance(v, dict):
            return {str(k): clean(w) for k, w in v.items()}
        if isinstance(v, (list, tuple)):
            return [clean(w) for w in v]
        return None if isinstance(v, float) and not math.isfinite(v) else v

    return json.dumps(clean(value), indent=indent, allow_nan=False)


def write_json(path: Path, value: Any) -> None:
    """A JSON file with an indent, written aside."""
    write_aside(path, to_json(value, indent=2) + "\n")


def read_json(path: Path) -> Any:
    """The contents of a JSON file; UserError that names the file where it cannot be read."""
    try:
        return json.loads(path.read_bytes())
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except ValueError as error:
        raise UserError(f"{path} is not readable JSON ({error}); it was changed or cut off") from None


def _check(value: Any, shape: dict[str, Any], path: Path, where: str = "") -> None:
    """Refuse a table without the entries of ``shape``: a person may have edited it, or another program written it."""
    for key, kind in shape.items():
        entry = value.get(key) if isinstance(value, dict) else None
        if isinstance(kind, dict):
            _check(entry, kind, path, f"{where}{key}.")
        elif not isinstance(entry, kind) or (isinstance(entry, bool) and kind is int):
            raise UserError(
                f"{path}: {where}{key} must be of type {kind.__name__}, got {entry!r}; it was changed or is another "
                "program's"
            )


# Runs ----------------------------------------------------------------------------------------------------------------


def read_run(run: Path | str) -> dict[str, Any]:
    """run.json of a run folder."""
    run = Path(run)
    path = run / "run.json"
    if not run.exists():
        raise UserError(f"no such run: {run}; `nelbo train PRESET --out {run}` makes one")
    if not run.is_dir():
        raise UserError(f"{run} is a file, not a run folder")
    if not path.is_file():
        raise UserError(f"{run} is not a run of nelbo: it holds no run.json")
    record = read_json(path)
    _check_format(record, path)
    data = {"name": str, "version": str, "shape": list, "levels": int}
    _check(record, {"config": dict, "data": data}, path)
    shape = record["data"]["shape"]
    if len(shape) != 3 or not all(type(n) is int and n > 0 for n in shape):
        raise UserError(f"{path}: data.shape must be channels, height and width, got {shape!r}")
    return record


def _check_format(record: Any, path: Path) -> None:
    found = record.get("format") if isinstance(record, dict) else type(record).__name__
    if found != FORMAT:
        raise UserError(f"{path} has format {found!r}; this version of nelbo reads format {FORMAT}")


@contextlib.contextmanager
def locked(folder: Path, doing: str = "training") -> Iterator[None]:
    """Only one process at a time may write to a folder, as a training does to its run. The lock ends with the process,
    however that ends."""
    import fcntl

    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise cannot_write(error, folder) from error
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another process is {doing} {folder}; wait for it, or stop it") from None
        except OSError:
            pass  # a file system without locks
        yield
    finally:
        os.close(descriptor)


def clean_up(run: Path) -> None:
    """Remove what a killed save, write or removal left behind."""
    for path in (*run.glob("checkpoints/.tmp-*"), *run.glob("checkpoints/.old-*")):
        shutil.rmtree(path, ignore_errors=True)
    for path in (*run.glob(".*.tmp-*"), *run.glob("samples/.*.tmp-*")):
        with contextlib.suppress(OSError):
            path.unlink()


# Checkpoints ---------------------------------------------------------------------------------------------------------


def checkpoint_name(step: int) -> str:
    """step-000001000 for step 1000."""
    return f"step-{step:09d}"


def list_checkpoints(run: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    return sorted(p for p in (run / "checkpoints").glob("step-*") if p.is_dir() and p.name[5:].isdigit())


def read_checkpoint(run: Path | str, which: str | int = "last") -> Checkpoint:
    """The checkpoint of a run named by "best", "last" or a step."""
    run = Path(run)
    paths = list_checkpoints(run)
    if not paths:
        raise UserError(f"{run} has no checkpoint yet; `nelbo train` writes them every training.save_every images")
    if which in ("best", "last"):
        path = paths[-1]
        if which == "best":
            best = _read_meta(path).get("best")
            path = run / "checkpoints" / checkpoint_name(best["step"]) if best else path
    else:
        try:
            path = run / "checkpoints" / checkpoint_name(int(which))
        except ValueError:
            raise UserError(f"--checkpoint must be best, last or a step, got {which!r}") from None
    if path not in paths:
        steps = ", ".join(str(int(p.name.removeprefix("step-"))) for p in paths)
        raise UserError(f"{run} has no checkpoint {path.name}; the choices are best, last, {steps}")
    return Checkpoint(path, _read_meta(path))


def find_checkpoint(source: Path | str) -> Checkpoint:
    """A run's best checkpoint, or the checkpoint whose folder is given."""
    source = Path(source)
    if (source / "meta.json").is_file():
        return Checkpoint(source, _read_meta(source))
    read_run(source)
    return read_checkpoint(source, "best")


def _read_meta(path: Path) -> dict[str, Any]:
    meta = read_json(path / "meta.json")
    _check_format(meta, path / "meta.json")
    _check(meta, {"step": int, "files": dict}, path / "meta.json")
    for name, entry in meta["files"].items():
        _check(entry, {"bytes": int, "sha256": str}, path / "meta.json", f"files.{name}.")
    if meta.get("best") is not None:
        _check(meta["best"], {"step": int, "bits_per_dim": float}, path / "meta.json", "best.")
    return meta


def load_tensors(checkpoint: Checkpoint, name: str) -> dict[str, Any]:
    """The tensors of a checkpoint's file of that name, whole where processes wrote their own rows of them; after sizes
    and SHA-256 were checked."""
    import torch

    pieces: dict[str, list[Any]] = {}
    for piece in _pieces(name, checkpoint.meta.get("pieces", 1)):
        path, expected = checkpoint.path / piece, checkpoint.meta["files"].get(piece)
        if expected is None:
            raise UserError(f"{checkpoint.path} has no {piece}; it holds {', '.join(checkpoint.meta['files'])}")
        advice = "use another checkpoint, or remove that folder to go on from the one before"
        found = read_tensors(path, expected, str(path), f"that were written with its checksum; {advice}")
        for key, rows in found.items():
            pieces.setdefault(key, []).append(rows)
    return {key: rows[0] if len(rows) == 1 else torch.cat(rows) for key, rows in pieces.items()}


def _pieces(name: str, count: int) -> list[str]:
    """The files that a checkpoint's file is in where ``count`` processes wrote it."""
    stem, _, suffix = name.rpartition(".")
    return [name] if count == 1 else [f"{stem}-{i:05d}-of-{count:05d}.{suffix}" for i in range(count)]


def read_tensors(path: Path, expected: dict[str, Any], name: str, why: str) -> dict[str, Any]:
    """The tensors of a safetensors file of the size and SHA-256 expected; ``name`` for people, ``why``: where they are
    from, and what to do where the file has others."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {name}: {error.strerror}") from None
    if len(content) != expected["bytes"] or hashlib.sha256(content).hexdigest() != expected["sha256"]:
        raise UserError(
            f"{name} is truncated or was changed: {len(content)} bytes, and not the {expected['bytes']} {why}"
        )
    try:
        return load(content)
    except (SafetensorError, ValueError, KeyError) as error:
        raise UserError(f"{name} is not a safetensors file ({error})") from None


def save_checkpoint(
    run: Path, tensors: dict[str, dict[str, Any]], meta: dict[str, Any], keep: int, group: "Group | None" = None
) -> Checkpoint:
    """Write a checkpoint aside and rename it; then drop older ones but the last ``keep`` and the best.

    ``tensors``: file name -> name -> tensor. ``meta`` must hold "step", and "best" ({"step", "bits_per_dim"} or None).
    ``group``: the processes (nelbo.group.Group) which each write their own rows of the tensors, all in a folder that
    they share; without it this process writes all.
    """
    from safetensors.torch import save

    main, rank, count = (group.main, group.rank, group.count) if group else (True, 0, 1)
    folder = run / "checkpoints"
    final = folder / checkpoint_name(meta["step"])
    aside = folder / f".tmp-{final.name}"
    files: dict[str, dict[str, Any]] = {}
    try:
        if main:
            if aside.exists():
                _remove(aside)
            aside.mkdir(parents=True)
        try:
            if group:
                group.wait()
            for name, entries in tensors.items():
                content = save({k: v.detach().cpu().contiguous() for k, v in entries.items()})
                name = _pieces(name, count)[rank]
                files[name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
                _write(aside / name, content)
            for theirs in group.ask(files) if group else ():
                files |= theirs
            meta = {"format": FORMAT, **meta, **({"pieces": count} if count > 1 else {}), "files": files}
            if main:
                _write(aside / "meta.json", (to_json(meta, indent=2) + "\n").encode())
                sync_folder(aside)
                if final.exists():
                    _remove(final)
                os.replace(aside, final)
        except BaseException:
            if main:
                shutil.rmtree(aside, ignore_errors=True)
            raise
        if main:
            sync_folder(folder)
            sync_folder(run)
    except OSError as error:
        raise cannot_write(error, final) from error
    best = meta.get("best")
    kept = {p.name for p in list_checkpoints(run)[-keep:]} | ({checkpoint_name(best["step"])} if best else set())
    for path in list_checkpoints(run) if main else ():
        if path.name not in kept:
            _remove(path)
    return Checkpoint(final, meta)


def _remove(path: Path) -> None:
    """Rename first, so that a killed removal never leaves a checkpoint with files missing.

    What cannot be removed costs room, and nothing else: a file that is open elsewhere stays in its folder on a network
    file system, as .nfs*. The next save tries again where the name is left, ``clean_up`` where the renamed folder is.
    """
    aside = path.with_name(f".old-{path.name.lstrip('.')}-{secrets.token_hex(4)}")
    with contextlib.suppress(OSError):
        os.replace(path, aside)
        shutil.rmtree(aside, ignore_errors=True)


def load_weights(model: Any, tensors: dict[str, Any], where: Path) -> None:
    """Copy tensors into a model; every name and shape must agree."""
    expected = model.state_dict()
    for kind, names in (("lacks", expected.keys() - tensors.keys()), ("has unknown", tensors.keys() - expected.keys())):
        if names:
            raise UserError(f"{where} {kind} {len(names)} tensors, among them {sorted(names)[0]}: another architecture")
    for name, tensor in expected.items():
        if tensor.shape != tensors[name].shape:
            raise UserError(
                f"{where}: {name} has shape {tuple(tensors[name].shape)}, the model {tuple(tensor.shape)}: "
                "another architecture"
            )
    model.load_state_dict(tensors)


def load_model(run: Path | str, checkpoint: str | int = "best", weights: str = "ema", device: Any = "cpu") -> Any:
    """The trained DiffusionModel of a run, in evaluation mode. ``weights``: "ema" or "raw"."""
    from nelbo.compose import build_model
    from nelbo.config import from_dict

    if weights not in WEIGHTS:
        raise UserError(f"weights must be one of {', '.join(WEIGHTS)}, got {weights!r}")
    record = read_run(run)
    found = read_checkpoint(run, checkpoint)
    data = record["data"]
    try:
        config = from_dict(record["config"])
    except UserError as error:
        raise UserError(f"{run}/run.json: {error}") from None
    model = build_model(config, tuple(data["shape"]), data["levels"], data.get("classes"))
    load_weights(model, load_tensors(found, WEIGHTS[weights]), found.path)
    return model.to(device).eval()
