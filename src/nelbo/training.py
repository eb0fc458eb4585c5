"""Training: one loop. The same command continues a run, and ends bit-identical to one that was never interrupted.

Everything random in step n is a function of (seed, n) or of (seed, example): data order, augmentation, times, noise,
latents and dropout. A checkpoint therefore holds weights, their moving average, the optimizer's moments and the step,
and nothing else. Progress is counted in images.
"""

import copy
import json
import math
import os
import platform
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import nelbo
from nelbo import checkpoints, likelihood, pictures, pixels, samplers, times
from nelbo.compose import build_model, noise_parameters
from nelbo.config import Config, to_dict
from nelbo.data import Batches, Dataset, load
from nelbo.data.loader import Batch
from nelbo.draws import Draws
from nelbo.errors import UserError
from nelbo.model import DiffusionModel
from nelbo.objectives import Terms
from nelbo.optimizers import learning_rate_factor, parameter_groups, update_ema

__all__ = ["Stopped", "memory_estimate", "train", "versions"]

# Fields that may change when a run is continued: they do not alter the trajectory of the weights.
FREE = (
    "training.steps training.log_every training.evaluate_every training.evaluate_images training.evaluate_times "
    "training.sample_every training.save_every training.keep"
).split()
# The fields that say which architecture a checkpoint has.
TERMS = ("prior", "reconstruction", "diffusion", "latent", "valid_latent")


class Stopped(Exception):
    """The run was asked to stop by a signal, and saved."""

    def __init__(self, signal_number: int, step: int) -> None:
        super().__init__(f"stopped by {signal.Signals(signal_number).name} after step {step}, saved; "
                         "the same command continues")
        self.status = 128 + signal_number


def versions() -> dict[str, str]:
    """What a figure was made with."""
    return {
        "nelbo": nelbo.__version__,
        "torch": torch.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
    }


class Loss(nn.Module):
    """The bound's terms of a batch as one module call, so that data parallelism sees every parameter's use."""

    def __init__(self, model: DiffusionModel, config: Config) -> None:
        super().__init__()
        self.model, self.config = model, config

    def forward(self, batch: Batch, part: slice, step: int) -> Terms:
        config, device = self.config, self.model.device
        seed, size = config.training.seed, config.training.batch
        draws = Draws(seed, batch.index[part], 0, device)
        positions = torch.arange(size, device=device)[part]
        # Stratified times share one shift, that of the step; independent ones have their own.
        keys = [step] * len(positions) if config.objective.times == "stratified" else batch.index[part]
        u = Draws(seed, keys, 0, device).uniform("time")
        labels = None if batch.labels is None else torch.from_numpy(batch.labels[part]).to(device)
        return likelihood.draw_terms(
            self.model,
            torch.from_numpy(np.ascontiguousarray(batch.images[part])).to(device),
            times.TIMES[config.objective.times](u, positions, size),
            draws,
            labels=labels,
            flag=torch.from_numpy(batch.flag[part]).to(device),
            steps=config.objective.steps,
            step=step,
            variance=config.objective.minimise_variance,
        )


def memory_estimate(model: DiffusionModel, config: Config, labelled: bool) -> dict[str, int]:
    """Bytes that training holds at once: weights with gradients, two moments and average; activations of a part.

    Activations are counted, not guessed: one image goes forward and what the backward pass would keep is added up.
    """
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    held: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        held[storage.data_ptr()] = storage.nbytes()
        return tensor

    owned = {p.untyped_storage().data_ptr() for p in model.parameters()}
    batch = Batch(
        np.zeros((1, *model.shape), np.uint8), np.zeros(1, np.int64) if labelled else None,
        np.zeros(1, np.float32), np.zeros(1, np.int64),
    )  # fmt: skip
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = Loss(model, config)(batch, slice(0, 1), 0).total.sum()
    del loss
    activations = sum(size for pointer, size in held.items() if pointer not in owned)
    part = config.training.batch // config.training.accumulate
    return {"weights": 5 * weights, "activations": activations * part}


class Trainer:
    """The state of a run between steps, and what is done with it."""

    def __init__(self, config: Config, run: Path, data: Dataset, say: Callable[[str], None]) -> None:
        from accelerate import Accelerator

        self.config, self.run, self.data, self.say = config, run, data, say
        self.accelerator = Accelerator()
        device = self.accelerator.device
        self.model = build_model(config, data.shape, data.levels, data.classes or None).to(device)
        if config.training.precision == "bf16":
            self.model.autocast = torch.bfloat16
        self.ema = copy.deepcopy(self.model).eval().requires_grad_(False)
        self.ema.autocast = None
        groups = parameter_groups(self.model, config.optimizer, noise_parameters(self.model))
        o = config.optimizer
        optimizer = torch.optim.AdamW(groups, lr=o.learning_rate, betas=(o.beta_1, o.beta_2), eps=o.eps, fused=True)
        self.loss, self.optimizer = self.accelerator.prepare(Loss(self.model, config), optimizer)
        self.batches = Batches(
            data.images["train"], None if data.labels is None else data.labels["train"],
            config.training.batch, config.training.seed, config.data.augment,
        )  # fmt: skip
        self.step, self.seconds = 0, 0.0
        self.best: dict[str, float] | None = None

    # State ---------------------------------------------------------------------------------------------------------

    def names(self) -> dict[str, Tensor]:
        """The trained parameters by name."""
        return dict(self.model.named_parameters())

    def save(self) -> checkpoints.Checkpoint:
        """Write a checkpoint of this step."""
        moments = {}
        for name, parameter in self.names().items():
            for key, value in self.optimizer.state[parameter].items():
                moments[f"{key}.{name}"] = value
        tensors = {
            checkpoints.WEIGHTS["raw"]: self.model.state_dict(),
            checkpoints.WEIGHTS["ema"]: self.ema.state_dict(),
            "optimizer.safetensors": moments,
        }
        meta = {
            "step": self.step,
            "images": self.step * self.config.training.batch,
            "seconds": self.seconds,
            "best": self.best,
            "versions": versions(),
        }
        return checkpoints.save_checkpoint(self.run, tensors, meta, self.config.training.keep)

    def restore(self, checkpoint: checkpoints.Checkpoint, optimizer: bool = True, progress: bool = True) -> None:
        """Load a checkpoint: always weights and average; the optimizer's moments and the step on request."""
        for model, kind in ((self.model, "raw"), (self.ema, "ema")):
            tensors = checkpoints.load_tensors(checkpoint, checkpoints.WEIGHTS[kind])
            checkpoints.load_weights(model, tensors, checkpoint.path)
        if optimizer:
            moments = checkpoints.load_tensors(checkpoint, "optimizer.safetensors")
            for name, parameter in self.names().items():
                keys = ("step", "exp_avg", "exp_avg_sq")
                if f"step.{name}" in moments:
                    self.optimizer.state[parameter] = {k: moments[f"{k}.{name}"].to(parameter.device) for k in keys}
        if progress:
            self.step, self.seconds = checkpoint.step, float(checkpoint.meta["seconds"])
            self.best = checkpoint.meta.get("best")

    # Steps ---------------------------------------------------------------------------------------------------------

    def take_step(self) -> tuple[Tensor, Tensor]:
        """One optimizer step: the means of the terms (5,) in bits/dim, and the gradient's norm."""
        config, training = self.config, self.config.training
        torch.manual_seed(training.seed * 1_000_003 + self.step)  # dropout
        self.model.train()
        factor = learning_rate_factor(self.step, config.optimizer, training.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = group["base_lr"] * factor
        self.optimizer.zero_grad(set_to_none=True)
        batch, size = self.batches.batch_at(self.step), training.batch // training.accumulate
        sums = torch.zeros(len(TERMS), device=self.accelerator.device)
        for start in range(0, training.batch, size):
            terms = self.loss(batch, slice(start, start + size), self.step)
            self.accelerator.backward(pixels.bits_per_dim(terms.total.sum() / training.batch, self.model.dimensions))
            sums += torch.stack([getattr(terms, name).detach().sum() for name in TERMS])
        parameters = list(self.model.parameters())
        largest = config.optimizer.clip or math.inf
        norm = torch.nn.utils.clip_grad_norm_(parameters, largest)
        self.optimizer.step()
        update_ema(list(self.ema.parameters()), parameters, config.optimizer.ema)
        self.step += 1
        return pixels.bits_per_dim(sums / training.batch, self.model.dimensions), norm

    def evaluate(self) -> dict[str, Any]:
        """The bound of the averaged weights on validation images; remembers the best step."""
        training, images = self.config.training, self.data.images["validation"][: self.config.training.evaluate_images]
        labels = None if self.data.labels is None else self.data.labels["validation"][: len(images)]
        result = likelihood.vlb(
            self.ema, images, labels=labels, times_per_shift=training.evaluate_times, shifts=2,
            steps=self.config.objective.steps,
        )  # fmt: skip
        if self.best is None or result.mean < self.best["bits_per_dim"]:
            self.best = {"step": self.step, "bits_per_dim": result.mean}
        return {
            "bits_per_dim": {"mean": result.mean, "standard_error": result.standard_error},
            "terms": {k: {"mean": v.mean, "standard_error": v.standard_error} for k, v in result.terms.items()},
        }


def _due(every: int, images: int, batch: int) -> bool:
    """Whether a multiple of ``every`` images was reached in the step that ended at ``images``."""
    return every > 0 and images // every > (images - batch) // every


@contextmanager
def _signals() -> Iterator[list[int]]:
    """The signals that asked to stop, as they come; only the main thread may listen."""
    caught: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield caught
        return
    before = {s: signal.signal(s, lambda number, _: caught.append(number)) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Log:
    """metrics.jsonl and TensorBoard, cut back to the step that a run continues from."""

    def __init__(self, run: Path, step: int) -> None:
        self.path = run / "metrics.jsonl"
        if self.path.exists():
            kept = []
            for line in self.path.read_text().splitlines():
                try:
                    if json.loads(line)["step"] <= step:
                        kept.append(line)
                except (ValueError, KeyError):
                    break  # a killed run may leave its last line cut off
            checkpoints.write_aside(self.path, "".join(line + "\n" for line in kept))
        self.purge = step + 1
        self.writer: Any = None

    def write(self, record: dict[str, Any]) -> None:
        """Append one line, and the same numbers to TensorBoard."""
        if self.writer is None:
            from torch.utils.tensorboard import SummaryWriter

            self.writer = SummaryWriter(str(self.path.parent / "tensorboard"), purge_step=self.purge)
        try:
            with open(self.path, "a") as file:
                file.write(json.dumps(record) + "\n")
        except OSError as error:
            raise checkpoints.no_space(error, self.path) from error
        kind, step = record["kind"], record["step"]
        bits = record["bits_per_dim"]
        self.writer.add_scalar(f"{kind}/bits_per_dim", bits["mean"] if isinstance(bits, dict) else bits, step)
        for name, value in record["terms"].items():
            self.writer.add_scalar(f"{kind}/{name}", value["mean"] if isinstance(value, dict) else value, step)
        for name in ("learning_rate", "images_per_second", "gradient_norm"):
            if name in record:
                self.writer.add_scalar(f"{kind}/{name}", record[name], step)

    def close(self) -> None:
        """Flush what TensorBoard holds."""
        if self.writer is not None:
            self.writer.close()


def _flatten(values: dict[str, Any], where: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= _flatten(value, f"{where}{name}.") if isinstance(value, dict) else {where + name: value}
    return flat


def _check_same(config: Config, data: Dataset, record: dict[str, Any], run: Path) -> None:
    """Refuse, by name, a change that would alter the trajectory of a run that is continued."""
    old, new = _flatten(record["config"]), _flatten(json.loads(json.dumps(to_dict(config))))
    for name in old | new:
        if old.get(name) == new.get(name):
            continue
        if name in FREE and not (name == "training.steps" and config.optimizer.decay != "none"):
            continue
        why = "; with a decaying learning rate the number of steps is fixed" if name == "training.steps" else ""
        raise UserError(
            f"{name} was {old.get(name)!r} when {run} began and is {new.get(name)!r} now{why}: a change that alters the "
            f"trajectory needs a new run (--out) or the old value; free to change are {', '.join(FREE)}"
        )
    if (data.name, data.version) != (record["data"]["name"], record["data"]["version"]):
        raise UserError(
            f"{run} was trained on {record['data']['name']} {record['data']['version']}, and the data are now "
            f"{data.name} {data.version}"
        )


def _begin(config: Config, run: Path, preset: str, trainer: Trainer, data: Dataset) -> None:
    """Write run.json of a new run."""
    parts: dict[str, int] = {}
    for name, parameter in trainer.names().items():
        part = name.split(".")[0]
        parts[part] = parts.get(part, 0) + parameter.numel()
    checkpoints.write_json(
        run / "run.json",
        {
            "format": checkpoints.FORMAT,
            "preset": preset,
            "config": to_dict(config),
            "data": {
                "name": data.name,
                "version": data.version,
                "shape": list(data.shape),
                "levels": data.levels,
                "classes": data.classes or None,
                "description": data.description,
            },
            "versions": versions(),
            "threads": torch.get_num_threads(),
            "parameters": sum(parts.values()),
            "parameters_by_part": parts,
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
        },
    )


def train(
    config: Config,
    run: Path | str,
    *,
    preset: str = "",
    init_from: Path | str | None = None,
    init_optimizer: bool = False,
    say: Callable[[str], None] = print,
    show: Callable[[int, float, float], None] | None = None,
) -> Path:
    """Train, or continue, the run in folder ``run`` until training.steps; returns the folder.

    ``init_from``: a run or a checkpoint folder whose weights a new run starts from, with ``init_optimizer`` its moments
    too. ``say`` gets lines for people; ``show(step, bits/dim, images/s)`` is called after every logged step.
    """
    with torch.random.fork_rng(devices=[]):
        return _train(config, Path(run), preset, init_from, init_optimizer, say, show)


def _train(
    config: Config,
    run: Path,
    preset: str,
    init_from: Path | str | None,
    init_optimizer: bool,
    say: Callable[[str], None],
    show: Callable[[int, float, float], None] | None,
) -> Path:
    training = config.training
    continued = (run / "run.json").exists()
    if run.exists() and not run.is_dir():
        raise UserError(f"{run} is a file; --out needs a folder")
    if not continued and run.exists() and any(p.name[0] != "." for p in run.iterdir()):
        raise UserError(f"{run} holds something else and no run.json; --out needs a new or empty folder, or a run")
    record = checkpoints.read_run(run) if continued else None
    data = load(config.data.source)
    if record is not None:
        _check_same(config, data, record, run)
    trainer = Trainer(config, run, data, say)
    checkpoints.clean_up(run)
    if checkpoints.list_checkpoints(run):
        trainer.restore(checkpoints.read_checkpoint(run, "last"))
    elif init_from is not None:
        trainer.restore(_find_checkpoint(Path(init_from)), optimizer=init_optimizer, progress=False)
    main = trainer.accelerator.is_main_process
    if record is None and main:
        _begin(config, run, preset, trainer, data)
    if trainer.step >= training.steps:
        say(f"{run} is complete: {trainer.step} of {training.steps} steps")
        return run
    count = sum(p.numel() for p in trainer.names().values())
    memory = memory_estimate(trainer.model, config, data.labels is not None)
    say(f"{data.description}")
    say(
        f"{count:,} parameters; about {sum(memory.values()) / 2**20:,.0f} MiB in training "
        f"({memory['weights'] / 2**20:,.0f} weights and optimizer, {memory['activations'] / 2**20:,.0f} activations); "
        f"device {trainer.accelerator.device}, {torch.get_num_threads()} threads"
    )
    say(f"{'continuing at step ' + str(trainer.step) if trainer.step else 'starting'}; everything goes to {run}/")
    log = Log(run, trainer.step)
    try:
        with _signals() as caught:
            _loop(trainer, log, caught, show)
    finally:
        log.close()
    return run


def _loop(trainer: Trainer, log: Log, caught: list[int], show: Callable[[int, float, float], None] | None) -> None:
    training = trainer.config.training
    window: list[tuple[Tensor, Tensor]] = []
    begun, before, seconds_before = time.perf_counter(), trainer.step, trainer.seconds
    window_begun = begun
    while trainer.step < training.steps:
        window.append(trainer.take_step())
        images = trainer.step * training.batch
        trainer.seconds = seconds_before + time.perf_counter() - begun
        last = trainer.step == training.steps
        evaluate = _due(training.evaluate_every, images, training.batch) or (last and training.evaluate_every > 0)
        save = last or bool(caught) or _due(training.save_every, images, training.batch)
        if trainer.accelerator.device.type == "cpu" or trainer.step % training.log_every == 0 or save or evaluate:
            _check_finite(trainer, window)
        if trainer.step % training.log_every == 0 or last:
            now = time.perf_counter()
            terms = torch.stack([t for t, _ in window]).double().mean(0).tolist()
            bits = sum(terms) - terms[TERMS.index("latent")]
            rate = len(window) * training.batch / (now - window_begun)
            log.write(
                {
                    "kind": "train",
                    "step": trainer.step,
                    "images": images,
                    "seconds": round(trainer.seconds, 3),
                    "images_per_second": round(rate, 2),
                    "learning_rate": trainer.optimizer.param_groups[0]["lr"],
                    "bits_per_dim": bits,
                    "terms": dict(zip(TERMS, terms, strict=True)),
                    "gradient_norm": float(torch.stack([n for _, n in window]).mean()),
                }
            )
            if show is not None:
                show(trainer.step, bits, rate)
            window, window_begun = [], now
        if evaluate:
            figures = trainer.evaluate()
            improved = trainer.best is not None and trainer.best["step"] == trainer.step
            log.write({"kind": "evaluation", "split": "validation", "step": trainer.step, "images": images,
                       "seconds": round(trainer.seconds, 3), **figures})  # fmt: skip
            trainer.say(
                f"step {trainer.step}: {figures['bits_per_dim']['mean']:.4f} ± "
                f"{figures['bits_per_dim']['standard_error']:.4f} bits/dim on validation"
                + (", the best so far" if improved else "")
            )
            save = save or improved
        if _due(training.sample_every, images, training.batch):
            drawn = samplers.sample(trainer.ema, 64, steps=trainer.config.objective.steps or 100)
            pictures.save_samples(trainer.run / "samples" / f"{checkpoints.checkpoint_name(trainer.step)}", drawn,
                                  trainer.data.levels)  # fmt: skip
        if save:
            trainer.save()
        if evaluate or save:
            window_begun = time.perf_counter() if not window else window_begun
        if caught and not last:
            raise Stopped(caught[0], trainer.step)


def _check_finite(trainer: Trainer, window: list[tuple[Tensor, Tensor]]) -> None:
    """Stop, before anything is saved, at the first step whose loss is not finite."""
    for offset, (terms, _) in enumerate(window):
        if bool(torch.isfinite(terms).all()):
            continue
        step = trainer.step - len(window) + offset + 1
        bad = [name for name, value in zip(TERMS, terms.tolist(), strict=True) if not math.isfinite(value)]
        kept = checkpoints.list_checkpoints(trainer.run)
        raise UserError(
            f"the loss is not finite at step {step}: {', '.join(bad)}; try a lower optimizer.learning_rate, "
            "optimizer.clip 1.0 or training.precision float32; "
            + (f"the last good checkpoint is {kept[-1].name}" if kept else "no checkpoint was written yet")
        )


def _find_checkpoint(source: Path) -> checkpoints.Checkpoint:
    """A run's best checkpoint, or the checkpoint whose folder is given."""
    if (source / "meta.json").is_file():
        return checkpoints.Checkpoint(source, checkpoints._read_meta(source))
    checkpoints.read_run(source)
    return checkpoints.read_checkpoint(source, "best")
