"""Training: one loop. The same command continues a run, and ends bit-identical to one that was never interrupted.

Everything random in step n is a function of (seed, n) or of (seed, example): data order, augmentation, times, noise,
latents and dropout. A checkpoint therefore holds weights, their moving average, the optimizer's moments and the step,
and the sums of the line that the log is in the middle of. Progress is counted in images.

Several processes (group.py) each take their part of a batch, of an evaluation and of samples; the first of them writes.
"""

import contextlib
import copy
import math
import shutil
import signal
import time
from collections import deque
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from nelbo import checkpoints, likelihood, pictures, pixels, samplers, times
from nelbo.compose import build_model, noise_parameters, parameters_by_part
from nelbo.config import Config, refuse_changes, to_dict
from nelbo.data import Batches, Dataset, load
from nelbo.data.loader import Batch
from nelbo.devices import choose_device, full_float32, versions
from nelbo.draws import Draws
from nelbo.errors import UserError
from nelbo.group import join
from nelbo.logs import Log
from nelbo.memory import memory_estimate
from nelbo.model import DiffusionModel
from nelbo.networks.layers import key_dropout
from nelbo.objectives import Terms, Weighting
from nelbo.optimizers import learning_rate_factor, parameter_groups, update_ema
from nelbo.resolve import find_shared, is_hub_id
from nelbo.sharding import is_part, place_like, rows, shard, whole
from nelbo.stopping import Stopped, listen

__all__ = ["train"]

TERMS = ("prior", "reconstruction", "diffusion", "latent", "valid_latent")
# What the loss holds beside the bound, where objective.second_order is above 0; what it is, where it is not the bound.
ADDED = ("second_order", "error")


class Loss(nn.Module):
    """The bound's terms of a batch as one module call, so that data parallelism sees every parameter's use."""

    def __init__(self, model: DiffusionModel, config: Config) -> None:
        super().__init__()
        self.model, self.config = model, config
        o = config.objective
        self.weighted = o.loss != "bound" or model.reverse.decoder == "gaussian"
        self.weighting = None
        if o.loss != "bound":
            hybrid = o.hybrid if o.loss == "hybrid" else 0.0
            self.weighting = Weighting(o.norm, o.weight, o.min_snr, o.p2_k, o.p2_gamma, hybrid)
        self.prepared: dict[tuple[int, int, int], tuple[Draws, Draws]] = {}  # by step and part
        self.asked: tuple[list[Any], list[Any]] = [], []  # of the last part

    def draws(self, index: np.ndarray, step: int) -> tuple[Draws, Draws]:
        """Random numbers of the examples ``index`` of a step: those of the images, and those of the times."""
        config, device = self.config, self.model.device
        # Stratified times share one shift, that of the step; independent ones have their own.
        keys = index if config.objective.times == "uniform" else [step] * len(index)
        seed = config.training.seed
        return Draws(seed, index, 0, device), Draws(seed, keys, 0, device)

    def prepare(self, index: np.ndarray, part: slice, step: int) -> None:
        """Draw ahead what a part of a step will ask for, which is what the last part did."""
        drawn = self.draws(index, step)
        for draws, asked in zip(drawn, self.asked, strict=True):
            draws.prepare(asked)
        self.prepared[step, part.start, part.stop] = drawn

    def forward(self, batch: Batch, part: slice, step: int) -> Terms:
        """Terms of ``batch``, which is that part of the whole batch of this step."""
        config, device = self.config, self.model.device
        size = config.training.batch
        key = step, part.start, part.stop
        draws, of_times = self.prepared.pop(key) if key in self.prepared else self.draws(batch.index, step)
        self.asked = draws.asked, of_times.asked
        key_dropout(self.model, draws)
        positions = torch.arange(size, device=device)[part]
        u = of_times.uniform("time")
        labels = None if batch.labels is None else torch.from_numpy(batch.labels).to(device)
        flag = torch.from_numpy(batch.flag).to(device)
        images = torch.from_numpy(np.ascontiguousarray(batch.images)).to(device)
        t = times.TIMES[config.objective.times](u, positions, size)
        steps = config.objective.steps
        if self.weighted:
            return likelihood.draw_weighted(
                self.model, images, self.weighting, t, draws, labels=labels, flag=flag, steps=steps, step=step
            )
        return likelihood.draw_terms(
            self.model,
            images,
            t,
            draws,
            labels=labels,
            flag=flag,
            steps=steps,
            step=step,
            variance=config.objective.minimise_variance,
            importance=config.objective.times == "importance",
            second_order=config.objective.second_order,
        )


class Trainer:
    """The state of a run between steps, and what is done with it."""

    def __init__(self, config: Config, run: Path, data: Dataset) -> None:
        from accelerate import Accelerator

        self.config, self.run, self.data = config, run, data
        self.group = join()
        device = choose_device()
        # The model chooses its own precision.
        self.accelerator = Accelerator(mixed_precision="no", cpu=device.type == "cpu")
        self.processes = self.group.count
        training, o = config.training, config.optimizer
        if training.sharding == "full" and config.objective.second_order:
            raise UserError(
                "training.sharding full gathers weights for one pass forward and one back, and objective.second_order "
                f"{config.objective.second_order} takes more: use none"
            )
        self.parts = training.accumulate * self.processes
        if training.batch % self.parts:
            raise UserError(
                f"training.accumulate times the number of processes must divide training.batch = {training.batch}, "
                f"got {training.accumulate} and {self.processes}"
            )
        self.model = self.new_model()
        if training.precision == "bf16":
            self.model.autocast = torch.bfloat16
        self.ema = copy.deepcopy(self.model).eval().requires_grad_(False)
        self.ema.autocast = None
        loss: Any = Loss(self.model, config)
        self.sharded = training.sharding == "full" and self.processes > 1
        self.compile(device)
        if self.sharded:
            for whole_module, model in ((loss, self.model), (self.ema, self.ema)):
                assert isinstance(model.network, nn.Module)
                shard(whole_module, model.network, device)
        self.parameters: list[Tensor] = list(self.model.parameters())
        self.averages: list[Tensor] = list(self.ema.parameters())
        groups = parameter_groups(self.model, o, noise_parameters(self.model))
        optimizer = torch.optim.AdamW(groups, lr=o.learning_rate, betas=(o.beta_1, o.beta_2), eps=o.eps, fused=True)
        self.prepare = loss.prepare
        self.ahead = device.type != "cpu"  # numbers of the next step are drawn while the device is at work
        self.loss: Any = loss
        self.optimizer: Any = optimizer
        if not self.sharded:
            self.loss, self.optimizer = self.accelerator.prepare(loss, optimizer)
        self.batches = Batches(
            data.images["train"], None if data.labels is None else data.labels["train"],
            training.batch, training.seed, config.data.augment,
        )  # fmt: skip
        objective = config.objective
        self.added = [name for name, wanted in zip(
            ADDED, (objective.second_order > 0, objective.loss != "bound"), strict=True
        ) if wanted]  # fmt: skip
        self.extractor: Any = None
        if training.fid_every:
            from nelbo.extractors import load_extractor

            with self.group.first():  # which may have to fetch the weights
                self.extractor = load_extractor(
                    training.fid_extractor, weights=training.fid_weights, channels=data.shape[0],
                    device=self.accelerator.device,
                )  # fmt: skip
        self.step, self.seconds = 0, 0.0
        self.best: dict[str, float] | None = None
        self.window = self.empty_window()

    def new_model(self) -> DiffusionModel:
        """A model as training begins with."""
        config, data = self.config, self.data
        return build_model(config, data.shape, data.levels, data.classes or None).to(self.accelerator.device)

    def compile(self, device: torch.device) -> None:
        """Compile the denoiser where that is wanted, before anything is built on its parameters."""
        config, wanted = self.config, self.config.training.compile
        against = {
            "training.sharding full": self.sharded,
            "objective.second_order above 0": config.objective.second_order > 0,
        }
        if wanted == "off" or (wanted == "auto" and (device.type != "cuda" or any(against.values()))):
            return
        for what, there in against.items():
            if there:
                raise UserError(f"training.compile on does not go with {what}: use off")
        if device.type == "cpu" and not any(map(shutil.which, ("g++", "c++", "clang++"))):
            raise UserError(
                "training.compile on needs a C++ compiler on a CPU: g++, c++ or clang++ on PATH; or use off"
            )
        for model in (self.model, self.ema):
            for layer in model.modules():
                if isinstance(layer, nn.Conv2d):
                    layer.weight.data = layer.weight.data.contiguous(memory_format=torch.channels_last)
        assert isinstance(self.model.network, nn.Module)
        # Without being told so, inductor leaves some layers' images as they are, and cuDNN copies them.
        options: dict[str, Any] = {"force_layout_optimization": True} if device.type == "cuda" else {}
        self.model.network.compile(dynamic=False, options=options)

    def averaged(self) -> DiffusionModel:
        """The model with averaged weights, whole in every process. All of them must ask."""
        if not self.sharded:
            return self.ema
        model = self.new_model().eval().requires_grad_(False)
        model.load_state_dict({name: whole(value) for name, value in self.ema.state_dict().items()})
        return model

    @staticmethod
    def empty_window() -> dict[str, float]:
        """Sums over the steps since the last line of the log."""
        return dict.fromkeys(("steps", "seconds", *TERMS, *ADDED, "gradient_norm"), 0.0)

    # State -----------------------------------------------------------------------------------------------------------

    def save(self) -> None:
        """Write a checkpoint of this step: the main process, or all where each holds a part."""
        if not (self.group.main or self.sharded):
            return
        moments = {}
        for name, parameter in self.model.named_parameters():
            for key, value in self.optimizer.state[parameter].items():
                moments[f"{key}.{name}"] = value
        tensors = {
            checkpoints.WEIGHTS["raw"]: self.model.state_dict(),
            checkpoints.WEIGHTS["ema"]: self.ema.state_dict(),
            checkpoints.OPTIMIZER: moments,
        }
        for entries in tensors.values():
            for name, value in list(entries.items()):
                if is_part(value):
                    entries[name] = rows(value)
                elif not self.group.main:
                    del entries[name]  # whole in every process, kept once
        meta = {
            "step": self.step,
            "images": self.step * self.config.training.batch,
            "seconds": self.seconds,
            "best": self.best,
            "window": self.window,
            "versions": versions(),
        }
        group = self.group if self.sharded else None
        checkpoints.save_checkpoint(self.run, tensors, meta, self.config.training.keep, group)

    def restore(self, checkpoint: checkpoints.Checkpoint, optimizer: bool = True, progress: bool = True) -> None:
        """Load a checkpoint: always weights and average; the optimizer's moments and the progress on request."""
        for model, kind in ((self.model, "raw"), (self.ema, "ema")):
            tensors = checkpoints.load_tensors(checkpoint, checkpoints.WEIGHTS[kind])
            self.load(model, tensors, checkpoint.path)
        if optimizer:
            moments = checkpoints.load_tensors(checkpoint, checkpoints.OPTIMIZER)
            for name, parameter in self.model.named_parameters():
                keys = ("step", "exp_avg", "exp_avg_sq")
                if f"step.{name}" in moments:
                    values = {key: moments[f"{key}.{name}"] for key in keys}
                    self.optimizer.state[parameter] = {
                        key: value.to(parameter.device) if key == "step" else place_like(value, parameter)
                        for key, value in values.items()
                    }
        if progress:
            self.step, self.seconds = checkpoint.step, float(checkpoint.meta["seconds"])
            self.best = checkpoint.meta["best"]
            self.window |= checkpoint.meta.get("window", {})

    @staticmethod
    def load(model: DiffusionModel, tensors: dict[str, Tensor], where: Path) -> None:
        """Whole tensors into a model, of which this process may hold a part."""
        own = model.state_dict()
        tensors = {name: place_like(value, own[name]) if name in own else value for name, value in tensors.items()}
        checkpoints.load_weights(model, tensors, where)

    def begin_from(self, source: Path | str, optimizer: bool) -> None:
        """The weights of a run, a checkpoint folder or a shared model; on request the moments of the first two."""
        shared = find_shared(source)
        if shared is None:
            self.restore(checkpoints.find_checkpoint(source), optimizer=optimizer, progress=False)
            return
        if optimizer:
            raise UserError(
                f"--init-optimizer needs a run or a checkpoint folder: {source} is a shared model of weights"
            )
        tensors = shared.tensors()
        for model in (self.model, self.ema):
            self.load(model, tensors, Path(shared.name))

    def description(self) -> dict[str, Any]:
        """What run.json says of the data and the model."""
        data, parts = self.data, parameters_by_part(self.model)
        return {
            "data": {
                "name": data.name,
                "version": data.version,
                "shape": list(data.shape),
                "levels": data.levels,
                "classes": data.classes or None,
                "description": data.description,
            },
            "parameters": sum(parts.values()),
            "parameters_by_part": parts,
        }

    def memory(self) -> dict[str, int]:
        """Bytes of weights and activations in this process; of weights alone where it holds a part."""
        if self.sharded:
            held = sum(rows(p).numel() * p.element_size() for p in self.parameters)
            return {"weights": 4 * held}
        loss, part = Loss(self.model, self.config), self.config.training.batch // self.parts

        def forward(images: int) -> Tensor:
            some = slice(0, images)
            return loss(self.batches.batch_at(0, some), some, 0).loss.sum()

        with self.attention(), torch.compiler.set_stance("force_eager"):
            return memory_estimate(self.model, forward, part)

    def attention(self) -> contextlib.AbstractContextManager[None]:
        """Inside, attention has a second derivative where the loss takes one; activations recomputed there too."""
        return sdpa_kernel(SDPBackend.MATH) if self.config.objective.second_order else contextlib.nullcontext()

    # Steps -----------------------------------------------------------------------------------------------------------

    def exchanging(self, now: bool) -> contextlib.AbstractContextManager[None]:
        """Inside, gradients are averaged over processes, or summed up in each until they are."""
        if self.sharded:
            self.loss.set_requires_gradient_sync(now)
            return contextlib.nullcontext()
        return contextlib.nullcontext() if now else self.accelerator.no_sync(self.loss)

    def take_step(self) -> float:
        """One optimizer step; adds its figures to the window and returns its bits/dim (valid latent charge)."""
        begun, config, training = time.perf_counter(), self.config, self.config.training
        first = self.group.rank
        if not self.model.training:
            self.model.train()
        factor = learning_rate_factor(self.step, config.optimizer, training.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = group["base_lr"] * factor
        self.optimizer.zero_grad(set_to_none=True)
        size = training.batch // self.parts
        names = (*TERMS, *self.added)
        sums = torch.zeros(len(names), device=self.accelerator.device)
        starts = [(part * self.processes + first) * size for part in range(training.accumulate)]
        own = [slice(start, start + size) for start in starts]
        for mine in own:
            last = mine == own[-1]  # where processes exchange their gradients
            with self.attention(), self.exchanging(last):
                terms = self.loss(self.batches.batch_at(self.step, mine), mine, self.step)
                loss = terms.loss + (config.objective.latent_weight - 1) * terms.latent
                mean = loss.sum() * self.processes / training.batch  # gradients are averaged over processes
                self.accelerator.backward(pixels.bits_per_dim(mean, self.model.dimensions))
            sums += torch.stack([getattr(terms, name).detach().sum() for name in names])
        sums = self.accelerator.reduce(sums, "sum") / training.batch
        norm = whole(torch.nn.utils.get_total_norm([p.grad for p in self.parameters if p.grad is not None]))
        if self.ahead:
            for mine in own:
                self.prepare(self.batches.index_at(self.step + 1, mine), mine, self.step + 1)
        values = torch.cat((sums, norm.reshape(1).to(sums.dtype))).tolist()  # the only wait for the device in a step
        figures = dict(zip((*names, "gradient_norm"), values, strict=True))
        for name in names:
            if name != "error":  # a mean over entries already
                figures[name] = pixels.bits_per_dim(figures[name], self.model.dimensions)
        self.check_finite(figures)
        if config.optimizer.clip and figures["gradient_norm"] > config.optimizer.clip:
            torch.nn.utils.clip_grads_with_norm_(self.parameters, config.optimizer.clip, norm)
        self.optimizer.step()
        update_ema(self.averages, self.parameters, config.optimizer.ema)
        self.step += 1
        for name, value in {"steps": 1, "seconds": time.perf_counter() - begun, **figures}.items():
            self.window[name] += value
        return sum(figures[name] for name in TERMS if name != "latent")

    def check_finite(self, figures: dict[str, float]) -> None:
        """Stop before a step that would spoil the weights."""
        bad = [name for name, value in figures.items() if not math.isfinite(value)]
        if not bad:
            return
        kept = checkpoints.list_checkpoints(self.run)
        raise UserError(
            f"not finite at step {self.step + 1}: {', '.join(bad)}; try a lower optimizer.learning_rate, a longer "
            "optimizer.warmup or optimizer.clip 1"
            + (", or training.precision float32" if self.config.training.precision != "float32" else "")
            + (f"; the last good checkpoint is {kept[-1]}" if kept else "; no checkpoint was written yet")
        )

    def any_process(self, flag: bool) -> bool:
        """Whether any process says so: all leave at the same step."""
        if self.processes == 1:
            return flag
        return bool(self.accelerator.reduce(torch.tensor(float(flag), device=self.accelerator.device), "sum") > 0)

    def log_line(self) -> dict[str, Any]:
        """The figures since the last line, and a new window."""
        steps, seconds = self.window["steps"], self.window["seconds"]
        terms = {name: self.window[name] / steps for name in TERMS}
        line = {
            "kind": "train",
            "step": self.step,
            "images": self.step * self.config.training.batch,
            "seconds": round(self.seconds, 3),
            "images_per_second": round(steps * self.config.training.batch / seconds, 2),
            "learning_rate": self.optimizer.param_groups[0]["lr"],
            "bits_per_dim": sum(terms.values()) - terms["latent"],
            "terms": terms,
            "gradient_norm": self.window["gradient_norm"] / steps,
        }
        line |= {name: self.window[name] / steps for name in self.added}
        self.window = self.empty_window()
        return line

    def evaluate(self) -> dict[str, Any]:
        """The bound of the averaged weights on validation images; remembers the best step."""
        training, images = self.config.training, self.data.images["validation"][: self.config.training.evaluate_images]
        labels = None if self.data.labels is None else self.data.labels["validation"][: len(images)]
        with full_float32():
            result = likelihood.vlb(
                self.averaged(), images, labels=labels, times_per_shift=training.evaluate_times, shifts=2,
                steps=self.config.objective.steps, batch=training.batch // self.parts, group=self.group,
            )  # fmt: skip
        # Figures of other images or other draws are not compared: where these changed, the best starts anew.
        measured = {"images": len(images), "times": training.evaluate_times}
        best = self.best if self.best is not None and self.best.items() >= measured.items() else None
        if math.isfinite(result.mean) and (best is None or result.mean < best["bits_per_dim"]):
            self.best = {"step": self.step, "bits_per_dim": result.mean, **measured}
        return {
            "kind": "evaluation",
            "split": "validation",
            "step": self.step,
            "images": self.step * training.batch,
            "seconds": round(self.seconds, 3),
            "bits_per_dim": {"mean": result.mean, "standard_error": result.standard_error},
            "terms": {k: {"mean": v.mean, "standard_error": v.standard_error} for k, v in result.terms.items()},
        }

    def fid(self, say: Callable[[str], None]) -> dict[str, Any]:
        """FID and inception score of samples of the averaged weights against the training images."""
        from nelbo import fid

        training = self.config.training
        assert self.extractor is not None
        found = fid.during_training(
            self.averaged(), self.data, self.run, self.extractor, count=training.fid_samples, say=say,
            group=self.group, method="ddim", steps=training.fid_steps, batch=training.batch,
        )  # fmt: skip
        images, seconds = self.step * training.batch, round(self.seconds, 3)
        return {"kind": "fid", "step": self.step, "images": images, "seconds": seconds, **found}

    def sample(self) -> None:
        """A grid of samples of the averaged weights."""
        model = self.averaged()
        if not self.group.main:
            return
        drawn = samplers.sample(model, 64, steps=self.config.objective.steps or 100)
        pictures.save_samples(self.run / "samples" / checkpoints.checkpoint_name(self.step), drawn, self.data.levels)


def _origin(source: Path | str) -> str:
    """What --init-from names, whatever the working directory."""
    return str(source) if is_hub_id(source) else str(Path(source).resolve())


def _check_same(config: Config, data: Dataset, init: dict[str, Any] | None, run: Path, record: dict[str, Any]) -> None:
    """Refuse, by name, a change that would alter the trajectory of a run that is continued."""
    refuse_changes(record["config"], config, str(run))
    was, now = (record["data"]["name"], record["data"]["version"]), (data.name, data.version)
    if was != now:
        raise UserError(
            f"data.source: {run} was trained on {' version '.join(was)}, and {config.data.source} is "
            f"{' version '.join(now)}: other images need a new run (--out)"
        )
    began = record.get("init")
    if init != began and (init is not None or not checkpoints.list_checkpoints(run)):
        how = f"with --init-from {began['from']}" if began else "without --init-from"
        raise UserError(f"{run} began {how}; give the same again, or a new folder as --out")


def _read_folder(run: Path) -> dict[str, Any] | None:
    """run.json of the run to continue; None where a new run may begin."""
    if run.exists() and not run.is_dir():
        raise UserError(f"--out needs a folder, and {run} is a file")
    if (run / "run.json").exists():
        return checkpoints.read_run(run)
    if run.exists() and any(p.name[0] != "." for p in run.iterdir()):
        raise UserError(f"{run} holds something else and no run.json; --out needs a new or empty folder, or a run")
    return None


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

    ``init_from``: a run, a checkpoint folder or a shared model (its folder or hub id) whose weights a new run starts
    from, with ``init_optimizer`` the moments of the first two. ``say`` gets lines for people; ``show(step, bits/dim,
    images/s)`` is called at the start and after every step, with means over the last ones. Raises ``Stopped`` where a
    signal asked for it.
    """
    run, training = Path(run), config.training
    group = join()
    with group.first():  # which may have to prepare the images
        data = load(config.data.source)
    # What the main process sees: a folder may look different from another machine for a while.
    found = None
    if group.main:
        kept = checkpoints.list_checkpoints(run)
        found = _read_folder(run), kept, checkpoints.find_checkpoint(kept[-1]).step if kept else 0
    record, kept, step = group.tell(found)
    init = None if init_from is None else {"from": _origin(init_from), "optimizer": init_optimizer}
    if record is not None:
        _check_same(config, data, init, run, record)
    say = say if group.main else lambda line: None
    if kept and step >= training.steps:
        say(f"{run} is complete: {step} of {training.steps} steps")
        return run
    trainer = Trainer(config, run, data)
    if init_from is not None and not kept:
        trainer.begin_from(init_from, init_optimizer)
    group.wait()  # all have read the folder before it changes
    if record is None:
        record = {
            "format": checkpoints.FORMAT,
            "preset": preset,
            "config": None,
            **trainer.description(),
            "init": init,
            "versions": versions(),
            "threads": torch.get_num_threads(),
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        if group.main:
            checkpoints.make_folder(run)
    with contextlib.ExitStack() as stack:
        log = None
        if group.main:
            stack.enter_context(checkpoints.locked(run))
            kept = checkpoints.list_checkpoints(run)
        if kept := group.tell(kept):
            trainer.restore(checkpoints.find_checkpoint(kept[-1]))
        if group.main:
            checkpoints.clean_up(run)
            if record["config"] != to_dict(config):
                checkpoints.write_json(run / "run.json", {**record, "config": to_dict(config)})
            log = stack.enter_context(contextlib.closing(Log(run, trainer.step)))
        stack.enter_context(torch.random.fork_rng(devices=[]))
        _announce(trainer, record, say)
        _loop(trainer, log, stack.enter_context(listen()), say, show)
    return run


def _announce(trainer: Trainer, record: dict[str, Any], say: Callable[[str], None]) -> None:
    memory = trainer.memory()
    say(trainer.data.description)
    parts = ", ".join(f"{name} {count:,}" for name, count in record["parameters_by_part"].items())
    say(f"{record['parameters']:,} parameters ({parts})")
    threads, processes = torch.get_num_threads(), trainer.processes
    held = f"{memory['weights'] / 2**20:,.0f} weights, moments and average"
    if trainer.sharded:
        held += " in each process, beside activations and gradients"
    else:
        held += f", {memory['activations'] / 2**20:,.0f} activations and gradients"
    say(
        f"about {sum(memory.values()) / 2**20:,.0f} MiB for training: {held}; "
        f"{trainer.accelerator.device}, {threads} thread{'s' * (threads > 1)}"
        + (f", {processes} processes" if processes > 1 else "")
    )
    if trainer.step and threads != record["threads"]:
        say(f"begun with {record['threads']} threads: with {threads}, sums may round differently")
    say(f"{f'continuing after step {trainer.step}' if trainer.step else 'starting'}; everything goes to {trainer.run}/")


def _loop(
    trainer: Trainer,
    log: Log | None,
    caught: list[int],
    say: Callable[[str], None],
    show: Callable[[int, float, float], None] | None,
) -> None:
    """Step until the end or a signal; ``log`` is None in the processes that write nothing."""
    training = trainer.config.training
    begun = time.perf_counter() - trainer.seconds
    recent: deque[tuple[float, float]] = deque(maxlen=20)  # bits/dim and seconds of the last steps
    if log is not None and show is not None:
        show(trainer.step, math.nan, math.nan)

    def due(every: int) -> bool:
        """Whether a multiple of ``every`` images was reached in this step."""
        images = trainer.step * training.batch
        return every > 0 and images // every > (images - training.batch) // every

    def tell(figures: dict[str, Any], line: str) -> None:
        if log is not None:
            log.write(figures)
        say(line)

    while trainer.step < training.steps:
        before = time.perf_counter()
        bits = trainer.take_step()
        recent.append((bits, time.perf_counter() - before))
        trainer.seconds = time.perf_counter() - begun
        stop, last, improved = trainer.any_process(bool(caught)), trainer.step == training.steps, False
        if log is not None:
            if trainer.step % training.log_every == 0 or last:
                log.write(trainer.log_line())
            if show is not None:
                mean, rate = (sum(column) / len(recent) for column in zip(*recent, strict=True))
                show(trainer.step, mean, training.batch / rate)
        if due(training.evaluate_every) or (last and training.evaluate_every):
            figures = trainer.evaluate()
            improved = trainer.best is not None and trainer.best["step"] == trainer.step
            value = likelihood.Estimate(**figures["bits_per_dim"])
            tell(figures, f"step {trainer.step}: {value} bits/dim on validation{', the best so far' * improved}")
        if due(training.sample_every):
            trainer.sample()
        if due(training.fid_every):
            figures = trainer.fid(say)
            name = "FID" if training.fid_extractor == "inception" else f"distance ({training.fid_extractor})"
            tell(figures, f"step {trainer.step}: {name} {figures['fid']:.3f}, {figures['samples']} samples")
        if stop or last or improved or due(training.save_every):
            if log is not None:
                log.sync()
            trainer.save()
        if stop and not last:
            trainer.group.wait()  # none may end, and with it the others, before all is saved
            raise Stopped(caught[0] if caught else signal.SIGTERM, trainer.step)
