"""The command line: verbs, each in a module of nelbo.verbs that holds its options and carries it out.

A mistake of the user's gets one line on stderr and exit status 2. Heavy libraries load where a verb needs them.
"""

import os
import re
import sys
from collections.abc import Callable
from typing import Any

import nelbo
from nelbo import presets
from nelbo.arguments import parse
from nelbo.errors import UserError
from nelbo.process import choose_waiting, keep_memory
from nelbo.stopping import Stopped
from nelbo.verbs import convert, data, evaluate, fid, report, sample, share, train

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


VERBS: dict[str, tuple[type, Callable[[Any], None]]] = {
    "evaluate": (evaluate.Evaluate, evaluate.carry_out),
    "sample": (sample.Sample, sample.carry_out),
    "fid": (fid.Fid, fid.carry_out),
    "report": (report.Report, report.carry_out),
    "data": (data.Data, data.carry_out),
    "share": (share.Share, share.carry_out),
    "export": (convert.Export, convert.export),
}


def run(arguments: list[str]) -> None:
    """Carry out a command line; UserError for a user's mistake."""
    verb, *rest = arguments or ["--help"]
    if verb in ("-h", "--help"):
        print(_help())
    elif verb == "--version":
        print(nelbo.__version__)
    elif verb == "presets":
        if rest and rest[0] not in ("-h", "--help"):
            raise UserError(f"presets takes no arguments, got {rest[0]!r}")
        _presets()
    elif verb == "train":
        if rest and rest[0] in ("-h", "--help"):
            print("usage: nelbo train PRESET --out RUN [--dry-run] [--field value]\n")
            rest = ["mulan-digits", "--help"]
        if not rest or rest[0].startswith("-"):
            raise UserError(f"train needs a preset first; the choices are {', '.join(presets.PRESETS)}")
        name, *rest = rest
        default = train.Train(config=presets.preset(name))
        train.carry_out(parse(train.Train, rest, f"train {name}", default), name)
    elif verb == "convert":
        convert.carry_out(convert.convert_arguments(rest))
    elif verb in VERBS:
        cls, carry_out = VERBS[verb]
        carry_out(parse(cls, rest, verb))
    else:
        raise UserError(f"unknown verb {verb!r}; the choices are presets, train, convert, {', '.join(VERBS)}")


def main(arguments: list[str] | None = None) -> int:
    """The ``nelbo`` command: 0; 2 with one line on stderr for a mistake; 128 + its number where a signal stopped it."""
    choose_waiting()
    keep_memory()
    try:
        run(sys.argv[1:] if arguments is None else arguments)
        return 0
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (UserError, Stopped) as error:
        message, status = str(error), error.status if isinstance(error, Stopped) else 2
    except KeyboardInterrupt:
        message, status = "interrupted", 130
    except OSError as error:
        message, status = f"{error.filename or 'the system'}: {error.strerror or error}", 2
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not re.search("out of memory|allocate", str(error)):
            raise
        lines = str(error).splitlines() or ["out of memory"]
        message, status = f"{lines[0]}: out of memory; try a smaller batch, or training.accumulate above 1", 2
    print(f"nelbo: {' '.join(message.split())}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
