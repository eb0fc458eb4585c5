"""``nelbo data``: prepare a data set, check it, and say what it is."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from nelbo.errors import UserError

__all__ = ["Data", "carry_out"]


@dataclass(frozen=True)
class Data:
    """Prepare a data set, check it, and say what it is: counts, shape, levels, version, checksums."""

    source: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="NAME|PATH")]
    """digits, photos32, cifar10, fashion-mnist, imagenet32-old, imagenet32-new, imagenet64; hub:OWNER/NAME[:CONFIG]; a
    folder of image files, a .npy or .npz file, or a prepared folder."""
    out: Path | None = None
    """Folder of the prepared set. By default that of the name, in NELBO_DATA or ~/.cache/nelbo; files and folders are
    prepared only where it is given."""
    files: Path | None = None
    """Folder with the official files of a named set. By default they are looked for, or fetched."""
    unofficial: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Take files with other checksums or counts than the published ones; the set is then called NAME-unofficial."""
    size: int | None = None
    """Image files: scale the shorter side to so many pixels, and take the square in the middle."""
    crop: int | None = None
    """Image files: first take the middle square of so many pixels."""
    filter: Literal["box", "lanczos", "bicubic", "bilinear"] = "box"
    """Image files: pillow's filter for --size; box is the mean over the pixels that become one."""
    workers: int | None = None
    """Processes that read. By default one a core."""
    verify: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Read every file of the prepared set again, and compare checksums."""


def carry_out(command: Data) -> None:
    """Prepare what is not there yet, and say what it is."""
    from nelbo.data.prepared import is_prepared
    from nelbo.data.sources import SOURCES, load, named_folder

    for name in ("size", "crop", "workers"):
        if getattr(command, name) is not None and getattr(command, name) < 1:
            raise UserError(f"--{name} must be at least 1, got {getattr(command, name)}")
    source = command.source
    if is_prepared(Path(source)):
        _refuse_options(command)
        lines = _describe(Path(source), source, command.verify)
    elif source in SOURCES or (command.out is None and named_folder(source) is None):
        _refuse_options(command)
        found = load(source)
        lines = [found.description, f"version {found.version}"]
        if source not in SOURCES:
            lines.append(f"read into memory as it is; nelbo data {source} --out FOLDER prepares it: mapped, not read")
        lines.append(f"use: --data.source {source}")
    else:
        folder = _prepare(command)
        lines = _describe(folder, source if named_folder(source) == folder else str(folder), command.verify)
    print("\n".join(lines))


def _refuse_options(command: Data) -> None:
    given = [name for name in ("out", "files", "unofficial", "size", "crop", "workers") if getattr(command, name)]
    if given:
        raise UserError(
            f"--{given[0]} is for what is prepared from other files, and {command.source} needs no preparing"
        )


def _prepare(command: Data) -> Path:
    """The prepared folder of a source, made where it is not there."""
    from nelbo.data.files import Resize
    from nelbo.data.official import OFFICIAL, data_home
    from nelbo.data.prepared import is_prepared, prepare
    from nelbo.data.sources import named_folder, plan
    from nelbo.progress import Progress

    source = command.source
    unofficial = data_home() / f"{source}-unofficial" if command.unofficial and source in OFFICIAL else None
    folder = command.out or unofficial or named_folder(source)
    assert folder is not None
    resize = None
    if command.size is not None or command.crop is not None:
        resize = Resize(command.size, command.crop, command.filter)
    if is_prepared(folder):
        return folder
    with Progress() as progress:

        def fetching(file: str, done: int, total: int) -> None:
            progress.update(f"fetching {file}", done >> 20, total >> 20, unit="MiB")

        def preparing(done: int, total: int) -> None:
            progress.update(f"preparing {source}", done, total, unit="pieces")

        return prepare(
            plan(source, command.files, command.unofficial, resize, fetching), folder, command.workers, preparing
        )


def _describe(folder: Path, name: str, check: bool) -> list[str]:
    """What a prepared folder is, read again on request, and how it is named."""
    from nelbo.data.prepared import read_record, verify

    record = verify(folder) if check else read_record(folder)
    lines = [record["description"], f"version {record['version']}, prepared {record.get('prepared')} in {folder}"]
    for file, said in record.get("origin", {}).get("files", {}).items():
        checksum = said.get("checksum")
        known = f"{checksum}, as published" if checksum else "no checksum is published"
        if "unofficial" in record["name"]:
            known = f"{checksum or 'no checksum'}, taken as it is"
        lines.append(f"from {file}: {said['bytes']:,} bytes, {known}")
    if check:
        lines.append("every file is as it was written (SHA-256), and the version is that of the images")
    return [*lines, f"use: --data.source {name}"]
