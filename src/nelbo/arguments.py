"""From command-line arguments to a verb's dataclass, by tyro; a mistake becomes a UserError of one line."""

import contextlib
import dataclasses
import difflib
import io
import os
import re
import typing
from typing import Any

import tyro

from nelbo.config import Config
from nelbo.errors import UserError

__all__ = ["parse"]


def parse(cls: type, arguments: list[str], verb: str, default: Any = None, program: str = "nelbo") -> Any:
    """The arguments of a verb as an instance of ``cls``; UserError in one line where they are wrong."""
    command = f"{program} {verb}"
    if {"-h", "--help"} & set(arguments):
        tyro.cli(cls, args=["--help"], prog=command, default=default)
    caught, width = io.StringIO(), os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = "10000"  # so that tyro does not break lines
    try:
        with contextlib.redirect_stderr(caught), contextlib.redirect_stdout(caught):
            return tyro.cli(cls, args=arguments, prog=command, default=default)
    except SystemExit:
        message = _one_line(caught.getvalue(), arguments, _options(cls))
        raise UserError(f"{message}; see `{command} --help`") from None
    finally:
        os.environ.pop("COLUMNS")
        if width is not None:
            os.environ["COLUMNS"] = width


# tyro's words and ours: the rule, then the value that was given.
WORDS = (
    (r"Error parsing (\S+): invalid literal for int\(\) with base 10: (.*)", r"\1 must be a whole number, got \2"),
    (r"Error parsing (\S+): could not convert string to float: (.*)", r"\1 must be a number, got \2"),
    (r"Missing value for argument '(.*?)'.*", r"\1 needs a value"),
    (r"Missing from [^:]*: (\S+).*", r"\1 is missing"),
)


def _one_line(message: str, arguments: list[str], options: list[str]) -> str:
    """tyro's boxed message as one line: the rule, the value given, the choices."""
    lines = [line.strip(" │|") for line in re.sub(r"\x1b\[[0-9;]*m", "", message).splitlines()]
    body = " ".join(line for line in lines[1:] if line and not set(line) <= set("-─╭╮╰╯━"))
    text = body.split(" Argument helptext:")[0].split(" For full helptext")[0].rstrip(". ")
    if text.startswith("Unrecognized options"):
        given = [a.split("=")[0] for a in arguments if a.startswith("--")]
        unknown = [a for a in given if a.replace("_", "-") not in options]
        if not unknown:
            return text.replace("Unrecognized options", "more values than the options take")
        near = difflib.get_close_matches(unknown[0], sorted(options), 3, 0.5)
        return f"unknown option {unknown[0]}" + (f"; did you mean {' or '.join(near)}" if near else "")
    if choice := re.match(r"invalid choice '(.*?)' for argument '(.*?)'. Expected one of \((.*?),?\)", text):
        given_value, option, choices = choice.groups()
        return f"{option} must be one of {choices.replace(chr(39), '')}, got {given_value!r}"
    if union := re.match(r"Error parsing (\S+): no type matching (.*?) could be instantiated from \[(.*?)\]", text):
        option, kinds, given_value = union.groups()
        kind = "numbers" if "..." in kinds else "a whole number" if "INT" in kinds else "a number"
        return f"{option} must be {kind} or None, got {given_value.replace(',', '')}"
    for theirs, ours in WORDS:
        text = re.sub(theirs, ours, text)
    return text


def _options(cls: type, where: str = "--") -> list[str]:
    """Every option of a verb as it is spelled on the command line."""
    names = []
    for name, hint in typing.get_type_hints(cls).items():
        if dataclasses.is_dataclass(hint):
            names += _options(typing.cast(type, hint), "--" if hint is Config else f"{where}{name}.")
        else:
            names.append(where + name.replace("_", "-"))
    return names
