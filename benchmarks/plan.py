r"""A plan of runs at the papers' sizes: memory and time of presets on 1, 8 and 64 GPUs, from counted FLOPs and bytes.

Nothing is measured. The library's own model runs forward and backward on tensors that have shapes and no numbers
(torch's FakeTensorMode), in bf16; operations are counted as in training_step.py (its equations 1 and 2) and
bytes as in nelbo.memory. N parameters; F operations of a step and A bytes of activations, for each image, of which a
GPU has b at once: of a batch B on n GPUs, each b = B/(n a) in a parts (training.accumulate), a as small as memory
allows. A GPU does P operations and moves W bytes a second.

    (1)  memory      16 N (weights, average, two moments: float32) + what is held for any b (gradients, bf16 weights)
                     + A b + 4 N (gradients again, in the messages' buckets, where n > 1)
    (2)  part        max(F b/(share P) + 6 A b/W, launches): matrix products and convolutions at a share of the peak;
                     everything else moves bytes: what is kept is written, read by what follows, read again in the
                     backward pass, its gradient written and read, and once more for what is not kept. Python launches
                     each kernel, 10 us each, meanwhile; where it is the slower of the two, the GPU waits for it.
    (3)  messages    2 (n - 1)/n 4 N/(0.7 link): a ring adds up the gradients, in float32, beside the backward pass
                     (2/3) of the last part; what lasts longer is waited for. The link is NVLink up to 8 GPUs (a node),
                     then each GPU's own network adapter.
    (4)  step        a part + 40 N/W (AdamW and the average read and write 10 numbers a parameter)
                     + max(0, messages - 2/3 part)
    (5)  evaluation  in float32 without tensor cores: a forward pass F/3 at share_32 of that peak, and 4 A/W. The dense
                     bound takes 128 for each image; the likelihood by ODE 230 evaluations, each a forward pass and for
                     every probe a product with the network's Jacobian, another F/3 and 4 A/W; for each of R replicates.

    python benchmarks/plan.py                                the tables of docs/scale.md
    python benchmarks/plan.py --presets vdm-cifar10 --gpu a100 --gpus 4 --share 0.3
"""

import contextlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal
from unittest.mock import patch

import torch
import tyro
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from training_step import Case, Recorder, configure, table

from nelbo.compose import build_model, parameters_by_part
from nelbo.config import Config, ObjectiveConfig, from_dict, to_dict
from nelbo.memory import Live
from nelbo.model import DiffusionModel
from nelbo.networks import layers
from nelbo.presets import PRESETS, preset

PAPERS = tuple(name for name in PRESETS if "-cifar10" in name or "-imagenet" in name)
NODE = 8  # GPUs that NVLink connects
REACHED = 0.7  # of a link's bytes a second
FREE = 0.9  # of a GPU's memory that a plan may fill
SEVERAL = (16, 32)  # images at once: of one image the gradients of all parameters may outweigh the activations
TIMES, EVALUATIONS, IMAGES = 128, 230, 10_000


@dataclass(frozen=True)
class GPU:
    """Data sheet: dense bf16 and float32 operations, bytes of memory and bytes a second, of memory and links."""

    name: str
    bf16: float
    float32: float
    bandwidth: float
    nvlink: float
    network: float
    memory: float = 80e9


GPUS = {
    "h100": GPU("H100 SXM", 989e12, 67e12, 3.35e12, 450e9, 50e9),
    "a100": GPU("A100 SXM", 312e12, 19.5e12, 2.04e12, 300e9, 25e9),
}


# What the papers' own pages say they trained on; of DDPM its speed too (appendix B), on a TPU v3-8 of four chips.
THEIRS = {
    "mulan-cifar10": (4, "V100"),
    "mulan-imagenet32": (4, "A100"),
    "idode-vp-cifar10": (8, "A40"),
    "idode-vp-cifar10-aug": (64, "A800"),
    "idode-vp-imagenet32-old": (8, "A100"),
    "idode-vp-imagenet32-new": (8, "A40"),
}
DDPM_STEPS_A_SECOND, TPU_V3_8 = 21, 4 * 123e12


@dataclass(frozen=True)
class Options:
    """What is planned, and on what assumptions."""

    presets: tuple[str, ...] = PAPERS
    """Presets."""
    gpu: Literal["h100", "a100"] = "h100"
    """Which GPU."""
    gpus: tuple[int, ...] = (1, 8, 64)
    """How many of them."""
    share: float = 0.4
    """Of the GPU's bf16 peak that convolutions and matrix products reach."""
    launch: float = 10
    """Microseconds that Python takes to launch a kernel."""
    share_32: float = 0.6
    """Of its float32 peak that they reach in evaluations."""
    out: Path | None = None
    """A Markdown file: what stands between <!-- plan --> and <!-- end plan --> is replaced."""
    measured: tuple[Path, ...] = ()
    """In place of all that: reports of `training_step.py --precision bf16` on such a GPU, beside their plans."""


# Counting -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Counts:
    """What a model's training step holds and does. Bytes; ``activations`` and ``flops`` (equation F) for an image."""

    parameters: dict[str, int]
    flops: int
    held: int
    activations: int
    launches: int


class Counter(Live):
    """Counts kernels too."""

    launches = 0

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Any:
        self.launches += function.namespace == "aten" and not function.is_view
        return super().__torch_dispatch__(function, types, arguments, keywords)


def fake_model(config: Config, size: int, mode: FakeTensorMode) -> DiffusionModel:
    """The model of a configuration for size x size images in colour, whose parameters have shapes and no numbers."""
    with torch.device("meta"):
        model = build_model(config, (3, size, size), 256, 10)
    with mode:
        for module in model.modules():
            for name, parameter in module.named_parameters(recurse=False):
                setattr(module, name, nn.Parameter(torch.empty_like(parameter, device="cpu")))
            for name, buffer in module.named_buffers(recurse=False):
                setattr(module, name, torch.empty_like(buffer, device="cpu"))
    model.autocast = torch.bfloat16
    return model


@contextlib.contextmanager
def as_on_gpus() -> Iterator[None]:
    """Inside, the CPU's operations keep what a GPU's do: attention is one kernel without a matrix of all pairs, and
    autocast has group normalisation in float32."""

    def group_norm(self: nn.GroupNorm, x: Tensor) -> Tensor:
        return F.group_norm(x.float(), self.num_groups, self.weight, self.bias, self.eps)

    attend = patch.object(layers, "attend", F.scaled_dot_product_attention)
    with attend, patch.object(nn.GroupNorm, "forward", group_norm):
        yield


def count(config: Config, size: int) -> Counts:
    """A training step in bf16, forward and backward, of ``SEVERAL`` images: network, encoder and schedule. The noise
    and the loss, which are not layers, are left out."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    model = fake_model(config, size, mode)

    def step(images: int) -> None:
        x = torch.zeros(images, 3, size, size)
        c = None if model.latent is None else model.encode(x)[0]
        gamma, _ = model.curve(c)(torch.zeros(images))
        (model(x, gamma, c).sum() + gamma.sum()).backward()
        for parameter in model.parameters():
            parameter.grad = None

    most = []
    with mode, as_on_gpus():
        for images in SEVERAL:
            with Counter() as counter, Recorder() as recorder:
                step(images)
            most.append(counter.most)
    each = (most[1] - most[0]) // (SEVERAL[1] - SEVERAL[0])
    held = most[0] - SEVERAL[0] * each
    flops = recorder.flops()["total"] // SEVERAL[1]
    return Counts(parameters_by_part(model), flops, held, each, counter.launches)


@cache
def _counted(text: str, size: int) -> Counts:
    return count(from_dict(json.loads(text)), size)


def counts(config: Config, checkpointing: bool = False) -> Counts:
    """``count``, once for all configurations of the same networks."""
    size = 64 if config.data.source == "imagenet64" else 32
    model = Config(
        schedule=config.schedule,
        latent=config.latent,
        encoder=config.encoder,
        network=replace(config.network, checkpointing=checkpointing),
        reverse=config.reverse,
        objective=ObjectiveConfig(loss=config.objective.loss, steps=config.objective.steps),
    )
    return _counted(json.dumps(to_dict(model), sort_keys=True), size)


# Planning -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """A step on so many GPUs: parts; bytes on each; seconds of the step, of its computing and moving bytes, of its
    messages (waited for or not), and of its launches."""

    accumulate: int
    memory: float
    step: float
    work: float
    messages: float
    launches: float

    @property
    def limit(self) -> str:
        """What takes most of the step."""
        waited = self.step - max(self.work, self.launches)
        return max((self.work, "work"), (self.launches, "launches"), (waited, "messages"))[1]


def plan(c: Counts, batch: int, n: int, gpu: GPU, share: float, launch: float) -> Plan | None:
    """Equations (1) to (4), with as few parts as fit into memory; None where not one image does, or n does not divide
    the batch. ``launch`` in seconds."""
    if batch % n:
        return None
    parameters = sum(c.parameters.values())
    fixed = 16 * parameters + c.held + (4 * parameters if n > 1 else 0)
    for accumulate in range(1, batch // n + 1):
        b = batch // n // accumulate
        memory = fixed + c.activations * b
        if batch // n % accumulate == 0 and memory <= FREE * gpu.memory:
            break
    else:
        return None
    work, launches = c.flops * b / (share * gpu.bf16) + 6 * c.activations * b / gpu.bandwidth, c.launches * launch
    part = max(work, launches)
    messages = 2 * (n - 1) / n * 4 * parameters / (REACHED * (gpu.nvlink if n <= NODE else gpu.network))
    step = accumulate * part + 40 * parameters / gpu.bandwidth + max(0.0, messages - 2 / 3 * part)
    return Plan(accumulate, memory, step, accumulate * work, messages, accumulate * launches)


def forward_seconds(c: Counts, gpu: GPU, share_32: float) -> float:
    """Equation (5): a forward pass of one image in float32."""
    return c.flops / 3 / (share_32 * gpu.float32) + 4 * c.activations / gpu.bandwidth


# Report ---------------------------------------------------------------------------------------------------------------


def show_counts(names: Sequence[str]) -> str:
    """What was counted."""
    rows = []
    for name in names:
        config = preset(name)
        c, again = counts(config), None
        if config.network.kind in ("flat", "pixel-noise"):
            again = counts(config, checkpointing=True)
        parameters = sum(c.parameters.values())
        rows.append([
            name, f"{parameters / 1e6:.1f}", f"{c.flops / 1e9:.0f}", f"{20 * parameters / 1e9:.2f}",
            f"{c.activations / 1e6:.0f}", "-" if again is None else f"{again.activations / 1e6:.0f}",
            str(config.training.batch), f"{config.training.steps / 1e6:g}",
        ])  # fmt: skip
    header = ["preset", "M parameters", "GFLOP an image", "GB held", "MB an image", "checkpointing", "batch", "M steps"]
    return table(header, rows)


def show_plans(names: Sequence[str], numbers: Sequence[int], gpu: GPU, share: float, launch: float) -> str:
    """Memory, step and whole run on so many GPUs; and the run where launching costs nothing."""
    rows = []
    for name in names:
        config = preset(name)
        c, batch, steps = counts(config), config.training.batch, config.training.steps
        row = [name]
        for n in numbers:
            found, free = (plan(c, batch, n, gpu, share, seconds) for seconds in (launch, 0.0))
            if found is None or free is None:
                row += ["-"] * 3
                continue
            parts = f" in {found.accumulate} parts" if found.accumulate > 1 else ""
            row += [
                f"{found.memory / 1e9:.0f}{parts}",
                f"{1e3 * found.step:.0f}" + (f", {found.limit}" if found.limit != "work" else ""),
                f"{steps * found.step / 86400:.1f} ({steps * free.step / 86400:.1f})",
            ]
        rows.append(row)
    header = ["preset"]
    for n in numbers:
        header += [f"{n} GPU{'s' * (n > 1)}: GB each", "ms a step", "days"]
    return table(header, rows)


def show_messages(names: Sequence[str], numbers: Sequence[int], gpu: GPU, share: float) -> str:
    """Gradients on the way, beside the computing that hides them."""
    rows = []
    for name in names:
        config = preset(name)
        c = counts(config)
        row = [name, f"{4 * sum(c.parameters.values()) / 1e6:.0f}"]
        for n in numbers:
            found = plan(c, config.training.batch, n, gpu, share, 0.0)
            row += ["-", "-"] if found is None else [f"{1e3 * found.messages:.1f}", f"{1e3 * found.work:.1f}"]
        rows.append(row)
    header = ["preset", "MB of gradients"]
    for n in numbers:
        header += [f"{n} GPUs: ms of messages", "of work"]
    return table(header, rows)


def show_evaluations(names: Sequence[str], numbers: Sequence[int], gpu: GPU, share_32: float) -> str:
    """Hours of evaluations of 10 000 images."""
    rows = []
    for name in names:
        one = IMAGES * forward_seconds(counts(preset(name)), gpu, share_32) / 3600
        ode = [(EVALUATIONS * (1 + probes) * one) for probes in (1, 4)]
        hours = [whole / n for whole in (TIMES * one, *ode) for n in numbers]
        rows.append([name, *(f"{value:.0f}" if value > 99 else f"{value:.2g}" for value in hours)])
    header = ["preset"]
    for what in ("bound", "ODE, 1 probe", "ODE, 4 probes"):
        header += [f"{what}: {numbers[0]}", *map(str, numbers[1:])]
    return table(header, rows)


def show_theirs(share: float, launch: float) -> str:
    """What the papers used, beside plans for as many GPUs of today."""
    rows = []
    for name, (n, kind) in THEIRS.items():
        training = preset(name).training
        row = [name, f"{n} {kind}"]
        for gpu in GPUS.values():
            found = plan(counts(preset(name)), training.batch, n, gpu, share, launch)
            row.append("-" if found is None else f"{training.steps * found.step / 86400:.1f}")
        rows.append(row)
    return table(["preset", "theirs", *(f"days on as many {gpu.name}" for gpu in GPUS.values())], rows)


def show_measured(paths: Sequence[Path], gpu: GPU, share: float, launch: float) -> str:
    """Steps that were measured on one GPU, beside their plans."""
    rows = []
    for path in paths:
        found = json.loads(path.read_text())
        if "bf16" not in found.get("results", {}):
            raise SystemExit(f"{path} must be a report of training_step.py --precision bf16, of a step")
        case = Case(**{k: tuple(v) if isinstance(v, list) else v for k, v in found["case"].items()})
        c, real = counts(configure(case, "bf16")), found["results"]["bf16"]
        planned = plan(c, case.batch, 1, gpu, share, launch)
        seconds, peak = real["seconds_per_step"], real["peak_bytes"]
        rows.append([
            f"{case.preset}, {case.channels} channels, {case.levels} levels, batch {case.batch}", case.compile,
            found["machine"]["device"], "-" if planned is None else f"{1e3 * planned.step:.0f}",
            f"{1e3 * seconds['median']:.0f} ({1e3 * seconds['min']:.0f}..{1e3 * seconds['max']:.0f})",
            "-" if planned is None else f"{seconds['median'] / planned.step:.1f}",
            "-" if planned is None else f"{planned.memory / 1e9:.1f}", "-" if peak is None else f"{peak / 1e9:.1f}",
        ])  # fmt: skip
    header = ["step", "compile", "measured on", "ms planned", "ms measured", "ratio", "GB planned", "GB measured"]
    return table(header, rows)


def alike(names: Sequence[str]) -> list[str]:
    """The first of presets that cost the same."""
    costs = {}
    for name in names:
        training = preset(name).training
        costs.setdefault((str(counts(preset(name))), training.batch, training.steps), name)
    return list(costs.values())


def report(options: Options) -> str:
    """All tables, each with its assumptions."""
    gpu, numbers, share, launch = GPUS[options.gpu], options.gpus, options.share, 1e-6 * options.launch
    names, several = alike(options.presets), [n for n in numbers if n > 1]
    others = [name for name in options.presets if name not in names]
    parts = [
        "**Counted**, the same on every GPU: operations of a training step (a multiply-add is two) and bytes of "
        "activations in bf16, without and with `--network.checkpointing True`, for each image; held: weights, average, "
        "moments and gradients, 20 bytes a parameter."
        + (f" Not shown, because each costs what one of these does: {', '.join(others)}." if others else ""),
        show_counts(names),
        f"**Training** on {gpu.name}, planned. Dense bf16 peak {gpu.bf16 / 1e12:.0f} TFLOP/s, of which convolutions "
        f"and matrix products reach {100 * share:.0f} %; memory {gpu.memory / 1e9:.0f} GB at "
        f"{gpu.bandwidth / 1e12:g} TB/s, through which everything else goes; Python takes {options.launch:g} us to "
        "launch a kernel. `--training.precision bf16`, no checkpointing; as few parts (`--training.accumulate`) as fit "
        f"into {100 * FREE:.0f} % of the memory. Beside the milliseconds: what takes most of them, where that is not "
        "the GPU's work. In brackets: days where launching costs nothing (compiled, CUDA graphs). A dash: the number "
        "of GPUs does not divide the batch.",
        show_plans(names, numbers, gpu, share, launch),
    ]
    if several:
        parts += [
            f"**Messages**: all gradients in float32, once a step, around a ring at {100 * REACHED:.0f} % of NVLink, "
            f"{gpu.nvlink / 1e9:.0f} GB/s each way, up to {NODE} GPUs, and of {gpu.network / 1e9:.0f} GB/s for each "
            "GPU beyond. They travel beside the backward pass, and are waited for only where they last longer than "
            "two thirds of the last part.",
            show_messages(names, several, gpu, share),
        ]
    parts += [
        f"**Evaluation** of {IMAGES:,} images, hours on {', '.join(map(str, numbers))} {gpu.name}: float32 without "
        f"tensor cores, {gpu.float32 / 1e12:g} TFLOP/s, of which {100 * options.share_32:.0f} % are reached; no "
        f"messages. Bound: {TIMES} times an image (`--times {TIMES} --shifts 1`). ODE: {EVALUATIONS} evaluations an "
        "image, each a forward pass and for every probe a product with the Jacobian, for one replicate and K = 1: for "
        "R replicates and K samples R K times as much.",
        show_evaluations(names, numbers, gpu, options.share_32),
    ]
    if options.presets == PAPERS:
        theirs = DDPM_STEPS_A_SECOND * preset("ddpm-cifar10").training.batch * counts(preset("ddpm-cifar10")).flops
        c, batch = counts(preset("vdm-cifar10")), preset("vdm-cifar10").training.batch
        ours = plan(c, batch, 1, gpu, share, launch)
        assert ours is not None
        parts += [
            "**Theirs.** What MuLAN's and i-DODE's pages name, and as many GPUs of today, planned as above. Neither "
            f"says how long it took. DDPM does, {DDPM_STEPS_A_SECOND} steps a second on a TPU v3-8; by the count above "
            f"that is {theirs / 1e12:.0f} TFLOP/s, {100 * theirs / TPU_V3_8:.0f} % of its peak. The plan has "
            f"vdm-cifar10 on one {gpu.name} at {100 * c.flops * batch / ours.step / gpu.bf16:.0f} %.",
            show_theirs(share, launch),
        ]
    return "\n\n".join(parts)


def write(path: Path, text: str) -> None:
    """Put the text between the marks of a Markdown file."""
    before, begin, rest = path.read_text().partition("<!-- plan -->\n")
    _, end, after = rest.partition("<!-- end plan -->")
    if not begin or not end:
        raise SystemExit(f"{path} needs the lines <!-- plan --> and <!-- end plan -->")
    path.write_text(f"{before}{begin}{text}\n{end}{after}")


def main(options: Options) -> None:
    """Print the tables, and write them where it was asked for."""
    if options.measured:
        gpu, launch = GPUS[options.gpu], 1e-6 * options.launch
        print(show_measured(options.measured, gpu, options.share, launch))
        return
    text = report(options)
    print(text)
    if options.out is not None:
        write(options.out, text)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
