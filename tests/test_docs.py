"""What README and docs show runs: Python snippets are executed, commands are parsed."""

import json
import re
import shlex
import tempfile
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


def test_the_likelihood_of_a_ddpm_takes_ten_lines(capsys):
    text = snippets("docs/ddpm.md")
    assert len([line for line in text.splitlines() if line.strip()]) == 10
    exec(compile(text, "docs/ddpm.md", "exec"), {})
    bound, flow = capsys.readouterr().out.splitlines()
    assert "bits/dim at most" in bound and "reconstruction" in bound and "an estimate" in flow
    # An untrained network of clipped estimates still costs less than a few guesses at random.
    assert 3 < float(bound.split(" ±")[0]) < 20


def test_the_page_on_data_runs(capsys):
    exec(compile(snippets("docs/data.md"), "docs/data.md", "exec"), {})
    assert capsys.readouterr().out.splitlines()[1] == "(1, 8, 8) 17 10 1"


def test_the_notebook_was_executed_and_runs(monkeypatch, tmp_path):
    """Every cell of code has its number and no error; with four steps of training all of it runs again."""
    cells = json.loads((ROOT / "docs/ddpm.ipynb").read_text())["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    assert not [out for cell in code for out in cell["outputs"] if out["output_type"] == "error"]
    monkeypatch.setenv("STEPS", "4")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr("matplotlib.pyplot.show", lambda: None)
    import matplotlib

    matplotlib.use("agg")
    exec(compile("\n".join("".join(cell["source"]) for cell in code), "docs/ddpm.ipynb", "exec"), {})


def test_readme_example_is_ten_lines():
    block = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    assert block is not None
    assert len([line for line in block[1].splitlines() if line.strip()]) == 10


@pytest.mark.parametrize(
    ("page", "least"), [("README.md", 13), ("docs/data.md", 6), ("docs/checkpoints.md", 9), ("docs/scale.md", 4)]
)
def test_commands_parse(page, least, monkeypatch):
    called = []
    for verb in cli.VERBS:
        monkeypatch.setitem(cli.VERBS, verb, (cli.VERBS[verb][0], called.append))
    monkeypatch.setattr(cli.train, "carry_out", lambda command, name: called.append(command))
    monkeypatch.setattr(cli.convert, "carry_out", called.append)
    monkeypatch.setattr(cli.submit, "carry_out", lambda job, command: called.append(job))
    lines = re.findall(r"^ {4}(nelbo .*?)(?:  +.*)?$", (ROOT / page).read_text(), re.M)
    lines = [line for line in lines if line != "nelbo presets"]  # prints and is done
    assert len(lines) >= least
    for line in lines:
        cli.run(shlex.split(line)[1:])
    assert len(called) == len(lines)


def test_pages_that_readme_names_exist():
    for link in re.findall(r"\]\(((?!http)[^)]+)\)", (ROOT / "README.md").read_text()):
        assert (ROOT / link).exists(), link


def test_makefile_demo_uses_a_preset():
    used = re.findall(r"nelbo train (\S+)", (ROOT / "Makefile").read_text())
    assert used and all(name in presets.PRESETS for name in used)
