"""The command line: verbs, each in a module of nelbo.verbs that holds its options and carries it out.

A mistake of the user's gets one line on stderr and exit status 2. Heavy libraries load where a verb needs them.

Of several processes launched together (group.py) all carry out train, evaluate, sample and fid, and the first alone the
other verbs; it prints for all.
"""

import os
import re
import signal
import sys
import threading
from collections.abc import Callable
from typing import Any

import nelbo
from nelbo import presets
from nelbo.arguments import parse
from nelbo.errors import UserError
from nelbo.process import choose_waiting, keep_memory
from nelbo.stopping import RESUME, TEMPORARY, Stopped
from nelbo.verbs import convert, data, evaluate, fid, report, sample, share, submit, train

__all__ = ["main"]


def _help() -> str:
    return "\n".join(
        [
            "usage: nelbo VERB ...",
            "",
            "Train diffusion models for likelihood, and measure them in bits per dimension with an error bar.",
            "",
            "  nelbo presets                              what there is, one line each",
            "  nelbo train PRESET --out RUN [--field value]  train; the same command again resumes; --dry-run prints",
            "  nelbo evaluate RUN [--method vlb|ode]      bits/dim with error bars; writes RUN/evaluations/*.json",
            "  nelbo sample RUN --count N                 images: .npz and a .png grid; in shards; --interpolate A B",
            "  nelbo fid RUN|FOLDER|NPZ                   Fréchet inception distance and inception score of samples",
            "  nelbo report RUN [RUN ...]                 one self-contained HTML page",
            "  nelbo convert SOURCE --from KIND --out RUN  somebody else's checkpoint as a run",
            "  nelbo data NAME|PATH                       prepare a data set, check it, and say what it is",
            "  nelbo submit [OPTIONS] -- VERB ...         a verb as a job of Slurm that requeues itself and resumes",
            "  nelbo export RUN --to diffusers --out FOLDER  a run as another program's checkpoint",
            "  nelbo share RUN --out FOLDER [--push ID]   a model to share: weights, configuration, card; on the hub",
            "",
            "`nelbo VERB --help` explains every option; `nelbo train PRESET --help` every field with its default.",
        ]
    )


def _presets() -> None:
    width = max(map(len, presets.PRESETS))
    for name, function in presets.PRESETS.items():
        print(f"{name:<{width}}  {(function.__doc__ or '').strip()}")


SHARED = ("train", "evaluate", "sample", "fid")  # by all processes

VERBS: dict[str, tuple[type, Callable[[Any], None]]] = {
    "evaluate": (evaluate.Evaluate, evaluate.carry_out),
    "sample": (sample.Sample, sample.carry_out),
    "fid": (fid.Fid, fid.carry_out),
    "report": (report.Report, report.carry_out),
    "data": (data.Data, data.carry_out),
    "share": (share.Share, share.carry_out),
    "export": (convert.Export, convert.export),
}


def _train(arguments: list[str]) -> tuple[train.Train, str]:
    """What follows ``train``, and the preset's name."""
    if arguments and arguments[0] in ("-h", "--help"):
        print("usage: nelbo train PRESET --out RUN [--dry-run] [--field value]\n")
        arguments = ["mulan-digits", "--help"]
    if not arguments or arguments[0].startswith("-"):
        raise UserError(f"train needs a preset first; the choices are {', '.join(presets.PRESETS)}")
    name, *rest = arguments
    return parse(train.Train, rest, f"train {name}", train.Train(config=presets.preset(name))), name


def run(arguments: list[str]) -> None:
    """Carry out a command line; UserError for a user's mistake."""
    verb, *rest = arguments or ["--help"]
    alone = verb not in SHARED or not {"-h", "--help", "--dry-run"}.isdisjoint(rest)
    if alone and os.environ.get("RANK", "0") != "0":
        return
    if verb in ("-h", "--help"):
        print(_help())
    elif verb == "--version":
        print(nelbo.__version__)
    elif verb == "presets":
        if rest and rest[0] not in ("-h", "--help"):
            raise UserError(f"presets takes no arguments, got {rest[0]!r}")
        _presets()
    elif verb == "train":
        train.carry_out(*_train(rest))
    elif verb == "submit":
        options, command = submit.split(rest, SHARED)
        job = parse(submit.Submit, options, verb)
        name, *its = command  # whose mistakes are told now, and not when the job begins
        _train(its) if name == "train" else parse(VERBS[name][0], its, name)
        submit.carry_out(job, command)
    elif verb == "convert":
        convert.carry_out(convert.convert_arguments(rest))
    elif verb in VERBS:
        cls, carry_out = VERBS[verb]
        carry_out(parse(cls, rest, verb))
    else:
        raise UserError(f"unknown verb {verb!r}; the choices are presets, train, convert, {', '.join(VERBS)}, submit")


def _interrupt(number: int, _: Any) -> None:
    raise KeyboardInterrupt(number)


def _group() -> Any:
    """The group of processes that a verb has joined; None before."""
    module = sys.modules.get("nelbo.group")
    return None if module is None or module.joined() is module.ALONE else module.joined()


def main(arguments: list[str] | None = None) -> int:
    """The ``nelbo`` command: 0; 2 with one line on stderr for a mistake; 128 + its number where a signal stopped it; 75
    where another process was lost, and the same command may succeed."""
    choose_waiting()
    keep_memory()
    if threading.current_thread() is not threading.main_thread():
        return _main(arguments)
    before = signal.signal(signal.SIGTERM, _interrupt)
    try:
        return _main(arguments)
    finally:
        signal.signal(signal.SIGTERM, before)


def _main(arguments: list[str] | None) -> int:
    try:
        run(sys.argv[1:] if arguments is None else arguments)
        if group := _group():
            group.close()
        return 0
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if group := _group():
            group.fail("its output was closed", 1)
        return 1
    except (UserError, Stopped) as error:
        message, status = str(error), error.status if isinstance(error, Stopped) else 2
    except KeyboardInterrupt as error:
        number = error.args[0] if error.args else signal.SIGINT
        message = "interrupted" if number == signal.SIGINT else f"stopped by {signal.Signals(number).name}"
        if _group() and number == signal.SIGTERM:
            message += f", which a launcher sends to all processes when one is lost; {RESUME}"
        status = 128 + number
    except OSError as error:
        message, status = f"{error.filename or 'the system'}: {error.strerror or error}", 2
    except (MemoryError, RuntimeError) as error:
        lines, memory = str(error).splitlines() or ["out of memory"], "out of memory|allocate"
        if isinstance(error, MemoryError) or re.search(memory, str(error)):
            message, status = f"{lines[0]}: out of memory; try a smaller batch, or training.accumulate above 1", 2
        elif _group() and re.search("gloo|NCCL|[Cc]onnection|[Ss]ocket|peer", str(error)):
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the line comes first
            _group().cut_off()  # ends this process where the reason is known
            reason = re.sub(r"^\[[^]]*\] |\. .*", "", lines[0])
            message, status = f"another process is lost ({reason}); {RESUME}", TEMPORARY
        else:
            _report(error)
            raise
    except Exception as error:
        _report(error)
        raise
    group, line = _group(), " ".join(message.split())
    speaks = group.fail(line, status) if group else os.environ.get("RANK", "0") == "0"
    if speaks:
        print(f"nelbo: {line}", file=sys.stderr)
    return status


def _report(error: Exception) -> None:
    """Tell the other processes that this one ends with an error whose traceback follows."""
    if group := _group():
        group.fail(f"{type(error).__name__}: {error}", 1)


if __name__ == "__main__":
    sys.exit(main())
