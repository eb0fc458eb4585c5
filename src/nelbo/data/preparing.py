"""``nelbo data``: prepare a data set, check it, and say what it is."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nelbo.data.files import Resize
from nelbo.data.official import OFFICIAL, data_home
from nelbo.data.prepared import is_prepared, prepare, read_record, verify
from nelbo.data.sources import SOURCES, load, named_folder, plan
from nelbo.errors import UserError

__all__ = ["Wanted", "prepare_source"]


@dataclass(frozen=True)
class Wanted:
    """What to prepare, from where, to where."""

    source: str
    out: Path | None = None
    files: Path | None = None
    unofficial: bool = False
    resize: Resize | None = None
    workers: int | None = None
    check: bool = False


def prepare_source(wanted: Wanted, progress: Any) -> list[str]:
    """Prepare what is not there yet; returns lines that say what it is and how it is named afterwards."""
    source, out = wanted.source, wanted.out
    if source in SOURCES or (out is None and named_folder(source) is None and not is_prepared(Path(source))):
        _refuse_options(wanted)
        found = load(source)
        lines = [found.description, f"version {found.version}"]
        if source not in SOURCES:
            lines.append(f"read into memory as it is; nelbo data {source} --out FOLDER prepares it: mapped, not read")
        return [*lines, f"use: --data.source {source}"]
    if is_prepared(Path(source)):
        _refuse_options(wanted)
        folder = Path(source)
    else:
        name = f"{source}-unofficial" if wanted.unofficial else source
        folder = out or (data_home() / name if source in OFFICIAL else named_folder(source)) or Path()
        if not is_prepared(folder):

            def fetching(file: str, done: int, total: int) -> None:
                progress.update(f"fetching {file}", done >> 20, total >> 20, unit="MiB")

            def preparing(done: int, total: int) -> None:
                progress.update(f"preparing {source}", done, total, unit="pieces")

            made = plan(source, wanted.files, wanted.unofficial, wanted.resize, fetching)
            prepare(made, folder, wanted.workers, preparing)
    return _describe(source, folder, verify(folder) if wanted.check else read_record(folder), wanted.check)


def _refuse_options(wanted: Wanted) -> None:
    given = [name for name in ("out", "files", "unofficial", "resize", "workers") if getattr(wanted, name)]
    if given:
        name = "size" if given[0] == "resize" else given[0]
        raise UserError(f"--{name} is for what is prepared from other files, and {wanted.source} needs no preparing")


def _describe(source: str, folder: Path, record: dict[str, Any], checked: bool) -> list[str]:
    lines = [record["description"], f"version {record['version']}, prepared {record.get('prepared')} in {folder}"]
    files = record.get("origin", {}).get("files", {})
    for name, said in files.items():
        checksum = said.get("checksum")
        known = f"{checksum}, as published" if checksum else "no checksum is published"
        if "unofficial" in record["name"]:
            known = f"{checksum or 'no checksum'}, taken as it is"
        lines.append(f"from {name}: {said['bytes']:,} bytes, {known}")
    if checked:
        lines.append("every file is as it was written (SHA-256), and the version is that of the images")
    return [*lines, f"use: --data.source {source if named_folder(source) == folder else folder}"]
