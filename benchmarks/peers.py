r"""nelbo beside what users would otherwise pick: a training step, sampling, memory and start-up, in one run.

Each peer stands beside nelbo's composition of the same network, in the same size, on the same images and machine:

    composition    peers beside it
    ------------   ------------------------------------------------------------------------------------------------
    flat           jax: VDM's flat U-Net and training step in flax and optax, jitted, with the public shapes;
                   torch: the same in plain PyTorch, eager, as one would write it at first
    ddpm           diffusers: the loop of its example of unconditional training, DDPM's UNet2DModel
                   azula: its tutorial's step with its own nn.UNet of nearly that size
                   azula-adm: the same with the U-Net of ADM, DDPM's in this shape, which recomputes activations
    attention      denoising-diffusion-pytorch: its U-Net and its Trainer's step
                   denoising-diffusion-pytorch-kept: the same, with one thing of nelbo's: memory kept from step to step

The two of the flat U-Net are transcriptions written here (benchmarks/peers/), not anybody's published program. They are
held against the reference cases of the public code first: the same weights and inputs must give the recorded network
outputs, losses, gradients, sampling steps and optimizer steps, or nothing is timed. ``--check`` does only that.

Every side runs in a process of its own, in the environment of its own, as its users would run it: threads, memory and
waiting as its libraries choose. nelbo's does what the ``nelbo`` command does (nelbo.process), and takes
``Trainer.take_step``. The sides of a composition take turns:

- **start-up**: seconds from the start of the process until the loss of its first training step is read: imports,
  building, what is compiled. Random images are in memory; no files are read.
- **memory**: the largest resident set (VmHWM) of a fresh process after three training steps, less its resident set
  between the imports and building. Compiling counts.
- **training step**: batch, noise, forward, backward, clipping where the peer clips, optimizer, average, loss read.
- **sampling step**: one evaluation of the network and the arithmetic around it, for as many images as the batch;
  **samples**: that many images from noise, in so many steps, by the side's own sampler.

bf16 is torch's autocast, as each offers it; in jax, flax's ``dtype``. The figure is the peer's value over nelbo's
within the same turn: median (least..most). The machine's best matrix product in each precision stands beside them.
A training step's operations are counted (matrix products, convolutions, attention; what is computed again counts).

The peers are no dependencies of nelbo. diffusers comes with nelbo[ddpm]; the others, each without disturbing it:

    python -m venv jax && jax/bin/pip install jax==0.10.2 flax==0.12.8 optax==0.2.8
    python -m venv peers && peers/bin/pip install torch==2.13.0 numpy einops tqdm pillow accelerate scipy gdown \
        && peers/bin/pip install --no-deps azula==0.11.1 denoising-diffusion-pytorch==2.3.4 ema-pytorch==0.8.3
    python benchmarks/peers.py --python jax=jax/bin/python azula=peers/bin/python \
        denoising-diffusion-pytorch=peers/bin/python --out peers.json

    python benchmarks/peers.py --only denoising-diffusion-pytorch denoising-diffusion-pytorch-kept --size 128 \
        --multipliers 1 2 4 8 --batch 2 --python denoising-diffusion-pytorch=peers/bin/python

(``--no-deps`` leaves torchvision out, which does not import beside a torch of another index; the two use it for data
sets and pictures only, and where it does not import, empty modules stand for it.) A peer that cannot be imported is
left out, and said.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

ENVIRONMENT = dict(os.environ)  # before nelbo chooses how threads wait: what the peers get
HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

import training_step as shared
import tyro

from nelbo.arguments import parse
from nelbo.errors import UserError


class Peer(NamedTuple):
    """The composition that a peer stands beside, its script, whose Python it shares, and what is set for it."""

    composition: str
    script: str
    python: str | None = None
    environment: tuple[tuple[str, str], ...] = ()


KEPT = (("MALLOC_TRIM_THRESHOLD_", "-1"), ("MALLOC_MMAP_MAX_", "0"))  # what nelbo.process.keep_memory asks of glibc
PEERS = {
    "jax": Peer("flat", "flat_flax.py"),
    "torch": Peer("flat", "flat_torch.py"),
    "diffusers": Peer("ddpm", "diffusers_example.py"),
    "azula": Peer("ddpm", "azula_denoiser.py"),
    "azula-adm": Peer("ddpm", "azula_denoiser.py", "azula"),
    "denoising-diffusion-pytorch": Peer("attention", "package.py"),
    "denoising-diffusion-pytorch-kept": Peer("attention", "package.py", "denoising-diffusion-pytorch", KEPT),
}
CHECKED = ("jax", "torch")
TIMED = {"training step": 2, "sampling step": 2, "samples": 1}  # runs, and turns that are not counted
OURS = "nelbo"


@dataclass(frozen=True)
class Case:
    """What is measured."""

    python: tuple[str, ...] = ()
    """NAME=PATH: the Python in which a peer is installed. azula's is azula-adm's too, and denoising-diffusion-pytorch's
    that of -kept. By default the one that runs this."""
    only: tuple[str, ...] = ()
    """Peers to measure. By default all."""
    precision: tuple[Literal["float32", "bf16"], ...] = ("float32", "bf16")
    """Precisions, one after the other."""
    channels: int = 64
    """Channels of the networks, at the first resolution: a multiple of 32, above 32 but for attention."""
    levels: int = 8
    """flat: residual blocks on the way down."""
    multipliers: tuple[int, ...] = (1, 2, 2, 2)
    """ddpm, attention: channels at each halving of the resolution, as multiples of channels."""
    size: int = 32
    """Height and width of the images."""
    batch: int = 8
    """Images in a step."""
    dropout: float = 0.1
    """flat: dropout, publicly 0.1. The others have none, as in the peers' own examples."""
    steps: int = 5
    """Steps in which samples are drawn."""
    repeats: int = 7
    """Turns that are counted."""
    fresh: int = 3
    """Fresh processes of each side, in turns, for start-up and memory."""
    threads: int | None = None
    """Cores that every side may use, and threads of torch. By default all cores, and each library's own choice."""
    check: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Only hold the transcriptions of the flat U-Net against the reference cases."""
    reference: Path = HERE.parent / "tests" / "reference"
    """Folder of the reference cases."""
    out: Path | None = None
    """A JSON file for all figures."""


class Failed(Exception):
    """A side broke; the message says how."""


class Missing(Exception):
    """A peer's libraries are not installed in its Python."""


# Sides ----------------------------------------------------------------------------------------------------------------


def interpreters(case: Case) -> dict[str, str]:
    """Each side's Python; UserError where --python is wrong."""
    given = {}
    for text in case.python:
        name, equals, path = text.partition("=")
        if not equals:
            raise UserError(f"--python must be NAME=PATH, got {text!r}")
        if name not in PEERS:
            raise UserError(f"--python {name}: no such peer; the choices are {', '.join(PEERS)}")
        if not os.access(path, os.X_OK) or Path(path).is_dir():
            raise UserError(f"--python {name}: {path} is no program that can be run")
        given[name] = path
    own = {name: given.get(name) or given.get(peer.python or "") for name, peer in PEERS.items()}
    return {OURS: sys.executable} | {name: path or sys.executable for name, path in own.items()}


def verify(case: Case) -> None:
    """UserError where the case makes no sense."""
    for name in case.only:
        if name not in PEERS:
            raise UserError(f"--only {name}: no such peer; the choices are {', '.join(PEERS)}")
    for name in ("levels", "batch", "steps", "repeats", "fresh"):
        if getattr(case, name) < 1:
            raise UserError(f"--{name} must be at least 1, got {getattr(case, name)}")
    groups = any(peer.composition != "attention" for name, peer in PEERS.items() if not case.only or name in case.only)
    if case.channels % 32 or case.channels < 32 * (1 + groups):
        raise UserError(
            f"--channels must be a multiple of 32{' above 32 (32 groups)' if groups else ''}, got {case.channels}"
        )
    if not 0 <= case.dropout < 1:
        raise UserError(f"--dropout must lie in [0, 1), got {case.dropout}")
    if len(case.multipliers) < 2 or min(case.multipliers) < 1:
        raise UserError(f"--multipliers must be at least 2 whole numbers above 0, got {case.multipliers}")
    if case.size < 8 or case.size % 2 ** (len(case.multipliers) - 1):
        raise UserError(
            f"--size must be at least 8 and halve {len(case.multipliers) - 1} times, got {case.size}"
        )  # fmt: skip
    if not case.precision:
        raise UserError("--precision needs float32, bf16 or both")
    if case.steps >= 1000:
        raise UserError(f"--steps must be below 1000, the noise levels of DDPM, got {case.steps}")
    cores = len(os.sched_getaffinity(0))
    if case.threads is not None and not 1 <= case.threads <= cores:
        raise UserError(f"--threads must lie in 1 .. {cores}, the cores there are, got {case.threads}")
    if case.out is not None and not case.out.parent.is_dir():
        raise UserError(f"--out {case.out}: there is no folder {case.out.parent}")
    if not case.reference.is_dir():
        raise UserError(f"--reference {case.reference}: there is no such folder")


class Side:
    """A process at the other end of two pipes (peers/serve.py), stopped while it is the others' turn: threads of some
    libraries keep a core busy while they wait for work."""

    def __init__(self, name: str, composition: str, python: str, threads: int | None) -> None:
        self.name = name
        script = HERE / "peers" / (PEERS[name].script if name in PEERS else "ours.py")
        environment = ENVIRONMENT | dict(PEERS[name].environment) if name in PEERS else dict(os.environ)
        if threads:
            environment["OMP_NUM_THREADS"] = str(threads)
        self.composition, self.errors = composition, tempfile.TemporaryFile("w+")
        self.begun = time.perf_counter()
        self.process = subprocess.Popen(
            [python, str(script)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors, text=True,
            env=environment,
        )  # fmt: skip

    def tell(self, **what: Any) -> None:
        """One line to the other end."""
        assert self.process.stdin is not None
        self.process.send_signal(signal.SIGCONT)
        try:
            self.process.stdin.write(json.dumps(what) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass  # hear says what there was

    def hear(self) -> dict[str, Any]:
        """Its next line."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            self.process.wait()
            self.errors.seek(0)
            said = self.errors.read().strip().splitlines()
            raise Failed(f"{self.name}: ended with status {self.process.returncode}: {said[-1] if said else 'silent'}")
        answer = json.loads(line)
        if "failed" in answer:
            print(answer["failed"], file=sys.stderr)
            raise Failed(f"{self.name}: {answer['failed'].strip().splitlines()[-1]}")
        if "missing" in answer:
            raise Missing(answer["missing"])
        return answer

    def begin(self, case: Case, precision: str) -> dict[str, Any]:
        """Build, and take the first steps: what it says of itself, with start-up and memory."""
        sizes = ("channels", "levels", "multipliers", "size", "batch", "dropout", "steps")
        self.tell(
            case={name: getattr(case, name) for name in sizes}
            | {"composition": self.composition, "peer": self.name, "groups": 32, "bf16": precision == "bf16"}
        )
        self.hear()
        seconds = time.perf_counter() - self.begun
        answer = self.hear()
        self.process.send_signal(signal.SIGSTOP)
        return {"start-up": seconds, **answer}

    def run(self, name: str) -> tuple[float, float]:
        """Seconds, and how many cores were busy."""
        self.tell(run=name)
        answer = self.hear()
        self.process.send_signal(signal.SIGSTOP)
        return answer["seconds"], answer["cpu"] / answer["seconds"]

    def end(self) -> None:
        """Close the pipe, and wait."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.send_signal(signal.SIGCONT)
        try:
            self.process.stdin.close()
        except BrokenPipeError:
            pass
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process.stdout.close()
        self.errors.close()


@contextmanager
def on_cores(threads: int | None) -> Iterator[None]:
    """This process and all that it starts on the first so many cores."""
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(cores)[:threads])
    try:
        yield
    finally:
        os.sched_setaffinity(0, cores)


@contextmanager
def started(name: str, composition: str, python: str, threads: int | None) -> Iterator[Side]:
    """A side that is ended whatever happens."""
    side = Side(name, composition, python, threads)
    try:
        yield side
    except BaseException:
        side.process.kill()
        raise
    finally:
        side.end()


# Measuring ------------------------------------------------------------------------------------------------------------


def compare_with_reference(case: Case, names: list[str], pythons: dict[str, str]) -> dict[str, Any]:
    """Each transcription against the reference cases; Failed where it differs, and Missing ones are left out."""
    found = {}
    for name in names:
        with started(name, "flat", pythons[name], case.threads) as side:
            side.tell(check=str(case.reference.resolve()))
            try:
                rows = side.hear()["rows"]
            except Missing as error:
                print(f"{name}: left out, not installed in {pythons[name]} ({error})")
                continue
        wrong = [row for row in rows if not row[1] <= row[2]]
        for what, difference, allowed in wrong:
            print(f"{name}: {what} differs by {difference:.2e}, allowed is {allowed:.0e}")
        if wrong:
            raise Failed(f"{name} is not the public network: {len(wrong)} of {len(rows)} comparisons fail")
        what, difference, allowed = max(rows, key=lambda row: row[1] / (row[2] or 1.0))
        print(
            f"{name}: {len(rows)} comparisons with the reference cases hold; the nearest to its limit is {what}, "
            f"{difference:.1e} of {allowed:.0e}"
        )
        found[name] = rows
    return found


def measure(case: Case, composition: str, names: list[str], pythons: dict[str, str], precision: str) -> dict[str, Any]:
    """All values of nelbo and the peers of one composition in one precision: side -> measure -> a value a turn."""
    values: dict[str, dict[str, Any]] = {}
    with ExitStack() as stack:
        sides: dict[str, Side] = {}
        present = list(names)
        for turn in range(case.fresh):
            for name in (*present, OURS):
                if not present:  # nothing for nelbo to stand beside
                    break
                with ExitStack() as own:
                    side = own.enter_context(started(name, composition, pythons[name], case.threads))
                    try:
                        about = side.begin(case, precision)
                    except Missing as error:
                        print(f"{name}: left out, not installed in {pythons[name]} ({error})", flush=True)
                        present.remove(name)
                        continue
                    entry = values.setdefault(name, {"start-up": [], "memory": [], "cores": []})
                    entry["start-up"].append(about["start-up"])
                    entry["memory"].append(about["peak"])
                    entry.update({k: about[k] for k in ("parameters", "precision", "versions", "threads")})
                    if turn == case.fresh - 1:
                        sides[name] = side
                        stack.enter_context(own.pop_all())
        peak = 0.0
        if sides:
            products = shared.gemms(shared.DTYPES[precision], "cpu")
            for run, warm in TIMED.items():
                for turn in range(warm + case.repeats):
                    for name, side in sides.items():
                        seconds, cores = side.run(run)
                        if turn >= warm:
                            values[name].setdefault(run, []).append(seconds)
                            if run == "training step":
                                values[name]["cores"].append(cores)
                    peak = max(peak, *(flops / shared.timed(product) / 1e9 for flops, product in products.values()))
            for name, side in sides.items():
                side.tell(count=True)
                values[name]["flops"] = side.hear()["flops"]
    return {"sides": values, "gemm": peak}


def ratios(sides: dict[str, dict[str, Any]], name: str, what: str) -> list[float]:
    """A peer's value over nelbo's, turn by turn."""
    return [a / b for a, b in zip(sides[name][what], sides[OURS][what], strict=True)]


# Report ---------------------------------------------------------------------------------------------------------------

ROWS = (("training step", "ms", 1e3, 0), ("sampling step", "ms", 1e3, 0), ("samples", "ms", 1e3, 0),
        ("start-up", "s", 1.0, 1), ("memory", "MiB", 2.0**-20, 0))  # fmt: skip


def show_peer(name: str, found: dict[str, dict[str, Any]]) -> str:
    """A peer beside nelbo: a row a measure, three columns a precision."""
    rows = [[f"{what}, {unit}"] for what, unit, _, _ in ROWS] + [["cores busy"], ["GFLOP a step"], ["M parameters"]]
    header = [""]
    for precision, result in found.items():
        sides = result["sides"]
        header += [f"{name}, {precision}", OURS, f"{name} / {OURS}"]
        for row, (what, _, scale, digits) in zip(rows, ROWS, strict=False):
            for side in (name, OURS):
                row.append(shared.show(shared.spread(sides[side][what]), scale, digits))
            row.append(shared.show(shared.spread(ratios(sides, name, what)), 1, 2))
        cores, counted, weights = rows[len(ROWS) :]
        for side in (name, OURS):
            cores.append(shared.show(shared.spread(sides[side]["cores"]), 1, 1))
            flops = sides[side]["flops"]
            counted.append("not counted" if flops is None else f"{flops / 1e9:.1f}")
            weights.append(f"{sides[side]['parameters'] / 1e6:.2f}")
        for row in (cores, counted, weights):
            row.append("")
    return shared.table(header, rows)


def show_summary(found: dict[str, dict[str, dict[str, Any]]]) -> str:
    """Every peer over nelbo: a row a peer and precision."""
    rows = []
    for name, by_precision in found.items():
        for precision, result in by_precision.items():
            cells = [shared.show(shared.spread(ratios(result["sides"], name, what)), 1, 2) for what, *_ in ROWS]
            rows.append([name, PEERS[name].composition, precision, *cells])
    return shared.table([f"peer / {OURS}", "composition", "precision", *(what for what, *_ in ROWS)], rows)


def main(case: Case) -> dict[str, Any]:
    """Check, measure, print, and write what was asked for."""
    verify(case)
    pythons = interpreters(case)
    with on_cores(case.threads):
        return carry_out(case, pythons)


def carry_out(case: Case, pythons: dict[str, str]) -> dict[str, Any]:
    """``main`` of a case that makes sense."""
    wanted = [name for name in PEERS if not case.only or name in case.only]
    load = os.getloadavg()[0]
    transcriptions = [name for name in wanted if name in CHECKED]
    if case.check and not transcriptions:
        raise UserError(f"--check is about {' and '.join(CHECKED)}, got --only {' '.join(case.only)}")
    checked = compare_with_reference(case, transcriptions, pythons)
    if case.check:
        if len(checked) < len(transcriptions):
            raise Failed("not all could be checked")
        return {"checked": checked}
    wanted = [name for name in wanted if name not in CHECKED or name in checked]
    if case.threads:
        shared.torch.set_num_threads(case.threads)
    report: dict[str, Any] = {
        "case": {k: str(v) if isinstance(v, Path) else v for k, v in asdict(case).items()} | {"out": None},
        "machine": shared.machine(),
        "load": load,
        "checked": checked,
        "results": {},
    }
    print(
        f"{case.channels} channels, batch {case.batch} of 3x{case.size}x{case.size}; flat: {case.levels} levels, "
        f"dropout {case.dropout}; ddpm, attention: multipliers {', '.join(map(str, case.multipliers))}; samples in "
        f"{case.steps} steps; {report['machine']['cpu']} ({' '.join(report['machine']['flags'])}), load {load:.1f}",
        flush=True,
    )
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for composition in dict.fromkeys(PEERS[name].composition for name in wanted):
        names = [name for name in wanted if PEERS[name].composition == composition]
        for precision in case.precision:
            result = measure(case, composition, names, pythons, precision)
            report["results"][f"{composition}, {precision}"] = result
            names = [name for name in names if name in result["sides"]]
            for name in names:
                result["sides"][name]["ratios"] = {what: ratios(result["sides"], name, what) for what, *_ in ROWS}
                found.setdefault(name, {})[precision] = result
            if not names:
                break
        for name in names:
            print(f"\n{name}, beside composition {composition}\n\n{show_peer(name, found[name])}")
            for precision, result in found[name].items():
                for side in (name, OURS):
                    about = result["sides"][side]
                    packages = ", ".join(f"{k} {v}" for k, v in about["versions"].items())
                    print(f"{side}, {precision}: {about['precision']}; {about['threads']}; {packages}")
                print(f"best matrix product, {precision}: {result['gemm']:.0f} GFLOP/s", flush=True)
    if not found:
        raise Failed("no peer could be measured")
    report["load_after"] = os.getloadavg()[0]
    print(f"\n{show_summary(found)}")
    print(
        f"\nload {load:.1f} before, {report['load_after']:.1f} after; medians (least..most) of {case.repeats} turns, "
        f"start-up and memory of {case.fresh} fresh processes"
    )
    if case.out is not None:
        case.out.write_text(json.dumps(report, indent=1) + "\n")
    return report


if __name__ == "__main__":
    try:
        main(parse(Case, sys.argv[1:], "benchmarks/peers.py", program="python"))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except Failed as error:
        print(f"failed: {error}", file=sys.stderr)
        raise SystemExit(1) from None
