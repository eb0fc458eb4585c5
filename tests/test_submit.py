"""nelbo submit: the script, by stand-ins for Slurm's programs that record what they are asked and run what they get."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from nelbo import cli
from nelbo.errors import UserError
from nelbo.stopping import TEMPORARY
from nelbo.verbs import submit
from nelbo.verbs.submit import Submit

STAND_INS = {
    "sbatch": 'cat > "$RECORD/script"; echo "$@" > "$RECORD/sbatch"; echo "17;cluster"',
    "scontrol": """if [ "$1 $2" = "show hostnames" ]; then echo node3; echo node4; exit; fi
        echo "$@" >> "$RECORD/scontrol" """,
    # The last of four processes, on the second node. Its status is that which the test asks for.
    "srun": """while [ "$1" != bash ]; do echo "$1" >> "$RECORD/srun"; shift; done
        SLURM_PROCID=3 SLURM_NTASKS=4 SLURM_LOCALID=1 "$@" || exit
        exit $STATUS""",
    "python": """printf "%s\\n" "$@" > "$RECORD/process"
        echo $RANK $WORLD_SIZE $LOCAL_RANK $MASTER_ADDR $MASTER_PORT $OMP_NUM_THREADS >> "$RECORD/process" """,
}


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """A folder where the stand-ins record."""
    for name, text in STAND_INS.items():
        program = tmp_path / "bin" / name
        program.parent.mkdir(exist_ok=True)
        program.write_text(f"#!/bin/bash\n{text}\n")
        program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setenv("RECORD", str(tmp_path))
    monkeypatch.setattr(sys, "executable", str(tmp_path / "bin" / "python"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(slurm, status, seconds=0):
    """Run the script that was submitted, as if the processes ended so many seconds after its start."""
    environment = {**os.environ, "STATUS": str(status), "SECONDS": str(seconds)}
    environment |= {"SLURM_JOB_ID": "30017", "SLURM_JOB_NODELIST": "node[3-4]"}
    return subprocess.run(["bash", slurm / "script"], env=environment, capture_output=True, text=True)


def test_a_job_is_submitted_with_what_was_asked_for(slurm, capsys):
    options = "--gpus 2 --nodes 2 --cpus 4 --time 1-12 --notice 300 --partition long --folder my/jobs"
    arguments = ["submit", *options.split(), "--sbatch", "account=a b", "exclusive", "--"]
    assert cli.main([*arguments, "train", "vdm-digits", "--out", "runs/it's"]) == 0
    assert capsys.readouterr().out == "job 17: output goes to my/jobs/17.log; `scancel 17` ends it\n"
    assert (slurm / "sbatch").read_text() == "--parsable\n" and (slurm / "my/jobs").is_dir()
    lines = [line[len("#SBATCH --") :] for line in (slurm / "script").read_text().splitlines() if "#SBATCH" in line]
    assert lines == [
        "job-name=nelbo-train", "nodes=2", "ntasks-per-node=2", "gpus-per-node=2", "cpus-per-task=4", "time=1-12",
        "partition=long", "signal=TERM@300", "output=my/jobs/%j.log", "open-mode=append", "requeue", "account='a b'",
        "exclusive",
    ]  # fmt: skip
    assert run(slurm, 0).returncode == 0
    assert (slurm / "process").read_text().splitlines() == [
        "-m", "nelbo.cli", "train", "vdm-digits", "--out", "runs/it's", "3 4 1 node3 15017 4"
    ]  # fmt: skip
    assert (slurm / "srun").read_text().splitlines() == ["--cpus-per-task=4", "--kill-on-bad-exit=0", "--wait=0"]


@pytest.mark.parametrize(
    ("status", "seconds", "requeued"),
    [
        (0, 900, False),  # done
        (1, 900, False),  # a fault of the program
        (2, 900, False),  # a user's mistake
        (130, 900, False),  # SIGINT
        (143, 0, True),  # stopped, and saved
        (TEMPORARY, 600, True),  # another process was lost
        (TEMPORARY, 590, False),  # soon after the start
        (137, 900, True),  # killed
        (137, 10, False),
    ],
)
def test_what_is_requeued(slurm, status, seconds, requeued):
    assert cli.main(["submit", "--gpus", "2", "--", "evaluate", "RUN"]) == 0
    done = run(slurm, status, seconds)
    assert done.returncode == status and not done.stderr
    assert (slurm / "scontrol").exists() == requeued
    if requeued:
        assert (slurm / "scontrol").read_text() == "requeue 30017\n"
        assert done.stdout.startswith(f"nelbo: status {status} after {seconds}")


def test_dry_run_prints_the_script_and_submits_nothing(slurm, capsys):
    assert cli.main("submit --processes 3 --cpus 1 --dry-run -- sample RUN --count 4".split()) == 0
    shown = capsys.readouterr().out
    assert not (slurm / "script").exists() and not (slurm / "slurm").exists()
    assert shown.startswith("#!/bin/bash\n#SBATCH --job-name=nelbo-sample\n")
    assert "--ntasks-per-node=3\n" in shown and "gpus" not in shown
    assert " -m nelbo.cli sample RUN --count 4\n" in shown
    assert cli.main("submit --processes 3 --cpus 1 -- sample RUN --count 4".split()) == 0
    assert (slurm / "script").read_text() == shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("train vdm-digits", "submit needs -- and a verb after its options: nelbo submit [OPTIONS] -- VERB ARGUMENTS"),
        ("--", "the verb after -- must be one of train, evaluate, sample, fid, got nothing"),
        ("-- trian x", "the verb after -- must be one of train, evaluate, sample, fid, got 'trian'"),
        ("-- report RUN", "the verb after -- must be one of train, evaluate, sample, fid, got 'report'"),
        ("-- train vdm-digit", "unknown preset 'vdm-digit'; the choices are vdm-digits"),
        ("-- train vdm-digits --outt x", "unknown option --outt; did you mean --out"),
        ("-- evaluate RUN --times x", "--times must be a whole number, got 'x'"),
        ("--gpu 1 -- evaluate RUN", "unknown option --gpu; did you mean --gpus"),
        ("--gpus 0 -- evaluate RUN", "--gpus must be at least 1, got 0"),
        ("--nodes 0 -- evaluate RUN", "--nodes must be at least 1, got 0"),
        ("--processes -1 -- evaluate RUN", "--processes must be at least 1, got -1"),
        ("--gpus 1 --processes 2 -- evaluate RUN", "--gpus or --processes, not both: a GPU has one process, got 1 and"),
        ("--time 1h -- evaluate RUN", "--time must be MINUTES, MINUTES:SECONDS, HH:MM:SS, DAYS-HH, DAYS-HH:MM or"),
        ("--time 2 -- evaluate RUN", "--time must be longer than --notice = 120 seconds, got '2'"),
        ("--partition=a\nb -- evaluate RUN", "--partition must be a name or names with commas between, got 'a\\nb'"),
        ("--sbatch=--account=x -- evaluate RUN", "--sbatch takes options without their dashes, such as account=NAME"),
    ],
)
def test_mistakes_are_told_before_anything_is_submitted(slurm, arguments, message, capsys):
    assert cli.main(["submit", *arguments.split(" ")]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"nelbo: {message}") and error.count("\n") == 1
    assert not (slurm / "script").exists()


def test_what_slurm_says_is_told(slurm, capsys, monkeypatch):
    refusing = 'echo "sbatch: error: invalid partition specified: x" >&2; echo "sbatch: error: no" >&2; exit 1'
    (slurm / "bin/sbatch").write_text(f"#!/bin/bash\n{refusing}\n")
    assert cli.main("submit -- evaluate RUN".split()) == 2
    expected = "nelbo: sbatch refused the job: sbatch: error: invalid partition specified: x; sbatch: error: no\n"
    assert capsys.readouterr().err == expected
    monkeypatch.setenv("PATH", str(slurm))
    assert cli.main("submit -- evaluate RUN".split()) == 2
    assert capsys.readouterr().err.startswith("nelbo: submit needs Slurm's sbatch on PATH, and there is none")


@pytest.mark.parametrize(
    ("time", "seconds"),
    [("3", 180), ("3:20", 200), ("1:00:05", 3605), ("2-1", 176_400), ("2-1:30", 178_200), ("0-0:0:7", 7)],
)
def test_times_are_slurm_s(time, seconds):
    assert submit.seconds(time) == seconds


@pytest.mark.parametrize("time", ["", "1h", "1:2:3:4", "-3", "1-", "1.5", "UNLIMITED", "3 "])
def test_other_times_are_refused(time):
    with pytest.raises(UserError, match="--time must be"):
        submit.script(Submit(time=time), ["evaluate", "RUN"])


def test_the_page_on_scale_submits(slurm, capsys):
    page = (Path(__file__).resolve().parent.parent / "docs" / "scale.md").read_text()
    lines = re.findall(r"^ {4}nelbo (submit .*)$", page, re.M) + re.findall(r"`nelbo (submit .* -- .*?)`", page)
    assert len(lines) >= 5
    for line in lines:
        assert cli.main(shlex.split(line)) == 0, line
    assert "#SBATCH --nodes=4\n" in (slurm / "script").read_text()  # the last, in the table


def test_the_status_of_a_lost_process_is_the_group_s():
    assert f"status == {TEMPORARY} ||" in submit.script(submit.Submit(), ["fid", "run"])
