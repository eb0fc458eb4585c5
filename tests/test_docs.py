"""What README and docs show runs: Python snippets are executed, commands are parsed."""

import re
import shlex
from pathlib import Path

import pytest

from nelbo import cli, presets

ROOT = Path(__file__).resolve().parent.parent


def snippets(page: str) -> str:
    """The Python blocks of a page as one program: later ones use what earlier ones defined."""
    return "\n".join(re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.S))


@pytest.mark.parametrize("page", ["README.md", "docs/mathematics.md"])
def test_snippets_run(page, capsys):
    names: dict = {}
    exec(compile(snippets(page), page, "exec"), names)
    shown = float(capsys.readouterr().out.split(" ±")[0].split()[-1])
    # An untrained network predicts no better than z itself; a uniform guess over 17 levels costs log2 17 = 4.09.
    assert 4.09 < shown < 12


def test_readme_example_is_ten_lines():
    block = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    assert block is not None
    assert len([line for line in block[1].splitlines() if line.strip()]) == 10


def test_readme_commands_parse(monkeypatch):
    called = []
    for verb in cli.VERBS:
        monkeypatch.setitem(cli.VERBS, verb, (cli.VERBS[verb][0], called.append))
    monkeypatch.setattr(cli, "_train", lambda command, name: called.append(command))
    lines = re.findall(r"^ {4}(nelbo .*?)(?:  +.*)?$", (ROOT / "README.md").read_text(), re.M)
    assert len(lines) >= 5
    for line in lines:
        cli.run(shlex.split(line)[1:])
    assert len(called) == len(lines) - 1  # `nelbo presets` prints and is done


def test_pages_that_readme_names_exist():
    for link in re.findall(r"\]\(((?!http)[^)]+)\)", (ROOT / "README.md").read_text()):
        assert (ROOT / link).exists(), link


def test_makefile_demo_uses_a_preset():
    used = re.findall(r"nelbo train (\S+)", (ROOT / "Makefile").read_text())
    assert used and all(name in presets.PRESETS for name in used)
