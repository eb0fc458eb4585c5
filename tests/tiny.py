"""Trainings of a second: presets scaled down, what a run's folder holds, and what of it two runs must share."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from nelbo.config import Config
from nelbo.presets import preset

SMALL = {
    "schedule.width": 8,
    "latent.size": 10,
    "latent.k": 2,
    "encoder.levels": 1,
    "network.channels": 8,
    "network.levels": 1,
    "network.groups": 2,
    "optimizer.warmup": 2,
    "optimizer.decay": "none",
    "optimizer.ema": 0.9,
    "training.steps": 12,
    "training.batch": 8,
    "training.log_every": 5,
    "training.evaluate_every": 32,
    "training.evaluate_images": 6,
    "training.evaluate_times": 1,
    "training.sample_every": 0,
    "training.save_every": 24,
}


def change(config: Config, fields: dict[str, Any]) -> Config:
    """The configuration with fields replaced: {"training.steps": 3}; all at once, as flags are."""
    groups: dict[str, Any] = {}
    for path, value in fields.items():
        if "." in path:
            group, name = path.split(".")
            groups[group] = replace(groups.get(group, getattr(config, group)), **{name: value})
        else:
            groups[path] = value
    return replace(config, **groups)


def tiny(name: str = "vdm-digits", **fields: Any) -> Config:
    """A preset at 8 channels and one level, a dozen steps of 8 images; ``training__steps=3`` replaces a field."""
    return change(preset(name), SMALL | {path.replace("__", "."): value for path, value in fields.items()})


def flags(config: Config) -> list[str]:
    """The command-line options that make this configuration out of any preset."""
    from nelbo.config import to_dict

    found = []
    for group, values in to_dict(config).items():
        for name, value in values.items() if isinstance(values, dict) else (("", values),):
            option = "--" + (f"{group}.{name}" if name else group).replace("_", "-")
            found += [option, *map(str, value if isinstance(value, list) else [value])]
    return found


def files(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, by its path in it."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def entries(folder: Path) -> dict[str, bytes | None]:
    """Every file and folder below a folder: what a mistake must leave alone."""
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in sorted(folder.rglob("*"))}


def log_line(step: int) -> dict[str, Any]:
    """A line of metrics.jsonl of that step."""
    return {"kind": "train", "step": step, "bits_per_dim": 2.0 + 1 / step, "terms": {"latent": 0.5}}


TIMES = ("seconds", "images_per_second")


def metrics(run: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without what the clock measured."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in TIMES} for line in lines]


def outcome(run: Path) -> dict[str, Any]:
    """All of a run that must not depend on interruptions: tensors and samples byte for byte, figures exactly."""
    found: dict[str, Any] = {}
    for path, content in files(run).items():
        if path.startswith("tensorboard") or path == "metrics.jsonl":
            continue
        if path.endswith("meta.json"):
            meta = json.loads(content)
            meta["window"].pop("seconds")
            found[path] = {k: v for k, v in meta.items() if k != "seconds"}
        elif path == "run.json":
            found[path] = {k: v for k, v in json.loads(content).items() if k != "created"}
        else:
            found[path] = content
    return found | {"metrics.jsonl": metrics(run)}
