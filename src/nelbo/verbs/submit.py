"""``nelbo submit``: a verb as a job of Slurm that requeues itself and resumes.

The job is one readable bash script: ``srun`` starts a process for each GPU with the variables that torch.distributed
reads, and the script looks at the status that comes back. Slurm's own requeueing (a preempted job, a lost node) is
asked for besides. What each way of ending does:

    the time limit is near   SIGTERM to the processes, which save: status 143, requeued
    a process is lost        the others stop, status 75 (nelbo.group): requeued, unless that was soon after the start
    status 0, 1, 2, 130      done; a fault of the program; a user's mistake; SIGINT: not requeued
    scancel                  ends the script itself: not requeued
"""

import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from nelbo.errors import UserError
from nelbo.stopping import TEMPORARY

__all__ = ["Submit", "carry_out", "split"]

SOON = 600  # seconds; a job that loses a process sooner would only lose it again

SCRIPT = """\
#!/bin/bash
{options}

# A process for each {place}. They find each other by these variables of torch.distributed.
export MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MASTER_PORT=$((15000 + SLURM_JOB_ID % 15000))
export OMP_NUM_THREADS={cpus}

# A process that ends early must not end the others, which may be saving.
srun --cpus-per-task={cpus} --kill-on-bad-exit=0 --wait=0 bash -c '
export RANK=$SLURM_PROCID WORLD_SIZE=$SLURM_NTASKS LOCAL_RANK=$SLURM_LOCALID
export LOCAL_WORLD_SIZE={processes}
exec "$@"' process \\
    {command}
status=$?

# 143: stopped by SIGTERM, and saved. {lost}, or a signal's number and 128: a process was lost; 130 is SIGINT. What ends
# soon after the start would only end again.
lost=$((status == {lost} || status > 128 && status != 130))
if ((status == 143 || lost && SECONDS >= {soon})); then
    echo "nelbo: status $status after $SECONDS s, requeued"
    scontrol requeue "$SLURM_JOB_ID"
fi
exit $status
"""


@dataclass(frozen=True)
class Submit:
    """Run a verb as a job of Slurm: nelbo submit [OPTIONS] -- VERB ARGUMENTS. At its time limit, preempted or bereft of
    a process or a node, the job is requeued and the same command continues."""

    gpus: int | None = None
    """GPUs of each node, with a process for each. By default 1, without --processes."""
    processes: int | None = None
    """In place of --gpus: processes on each node, which compute on the CPU."""
    nodes: int = 1
    """Nodes."""
    cpus: int = 8
    """CPU cores, and threads, of each process."""
    time: str = "24:00:00"
    """Time limit, as Slurm writes it: MINUTES, HH:MM:SS or DAYS-HH:MM:SS, or a part of these. The job may be requeued
    as often as it takes."""
    notice: int = 120
    """Seconds before the time limit at which the processes are told to save: more than the longest of a step, an
    evaluation in training and a save."""
    partition: str | None = None
    """Partition of the cluster. By default the cluster's own."""
    sbatch: tuple[str, ...] = ()
    """More options of sbatch without their dashes, such as account=NAME mem=64G."""
    folder: Path = Path("slurm")
    """Where the job's output goes, as JOB.log."""
    dry_run: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Print the script and stop; `sbatch FILE` takes it."""


def split(arguments: Sequence[str], verbs: Sequence[str]) -> tuple[list[str], list[str]]:
    """Options of submit, and the command line after ``--``, whose verb must be one of ``verbs``."""
    if {"-h", "--help"} & set(arguments) and "--" not in arguments:
        return ["--help"], []
    usage = "nelbo submit [OPTIONS] -- VERB ARGUMENTS"
    if "--" not in arguments:
        raise UserError(f"submit needs -- and a verb after its options: {usage}")
    at = list(arguments).index("--")
    options, command = list(arguments[:at]), list(arguments[at + 1 :])
    if not command or command[0] not in verbs:
        given = repr(command[0]) if command else "nothing"
        raise UserError(f"the verb after -- must be one of {', '.join(verbs)}, got {given}: {usage}")
    return options, command


TIME = re.compile(
    r"(?:(?P<days>\d+)-(?P<hours>\d+)(?::(?P<minutes>\d+)(?::(?P<seconds>\d+))?)?"
    r"|(?P<h>\d+):(?P<m>\d+):(?P<s>\d+)|(?P<min>\d+)(?::(?P<sec>\d+))?)"
)


def seconds(time: str) -> int:
    """A time limit of Slurm's in seconds; UserError where it is none."""
    found = TIME.fullmatch(time)
    if not found:
        raise UserError(
            f"--time must be MINUTES, MINUTES:SECONDS, HH:MM:SS, DAYS-HH, DAYS-HH:MM or DAYS-HH:MM:SS, got {time!r}"
        )
    part = {name: int(value or 0) for name, value in found.groupdict().items()}
    hours = 24 * part["days"] + part["hours"] + part["h"]
    return 60 * (60 * hours + part["minutes"] + part["m"] + part["min"]) + part["seconds"] + part["s"] + part["sec"]


def script(submit: Submit, command: Sequence[str]) -> str:
    """The job: a bash script for sbatch. UserError where an option is wrong."""
    for name, value in (
        ("gpus", submit.gpus), ("processes", submit.processes), ("nodes", submit.nodes), ("cpus", submit.cpus),
        ("notice", submit.notice),
    ):  # fmt: skip
        if value is not None and value < 1:
            raise UserError(f"--{name} must be at least 1, got {value}")
    if submit.gpus is not None and submit.processes is not None:
        raise UserError(
            f"--gpus or --processes, not both: a GPU has one process, got {submit.gpus} and {submit.processes}"
        )
    if seconds(submit.time) <= submit.notice:
        raise UserError(f"--time must be longer than --notice = {submit.notice} seconds, got {submit.time!r}")
    if submit.partition is not None and not re.fullmatch(r"[\w.,-]+", submit.partition):
        raise UserError(f"--partition must be a name or names with commas between, got {submit.partition!r}")
    gpus = None if submit.processes else submit.gpus or 1
    options: dict[str, object] = {
        "job-name": f"nelbo-{command[0]}",
        "nodes": submit.nodes,
        "ntasks-per-node": gpus or submit.processes,
        "gpus-per-node": gpus,
        "cpus-per-task": submit.cpus,
        "time": submit.time,
        "partition": submit.partition,
        "signal": f"TERM@{submit.notice}",  # to the processes, not to the script
        "output": shlex.quote(str(submit.folder / "%j.log")),
        "open-mode": "append",
        "requeue": "",
    }
    for option in submit.sbatch:
        if not re.fullmatch(r"[a-z][a-z-]*(=[^\n]+)?", option):
            raise UserError(f"--sbatch takes options without their dashes, such as account=NAME, got {option!r}")
        key, _, text = option.partition("=")
        options[key] = shlex.quote(text) if text else ""
    given = {name: value for name, value in options.items() if value is not None}
    return SCRIPT.format(
        options="\n".join(f"#SBATCH --{name}{'=' * (value != '')}{value}" for name, value in given.items()),
        place="GPU" if gpus else "share of the cores",
        cpus=submit.cpus,
        processes=gpus or submit.processes,
        command=shlex.join([sys.executable, "-m", "nelbo.cli", *command]),
        lost=TEMPORARY,
        soon=SOON,
    )


def carry_out(submit: Submit, command: Sequence[str]) -> None:
    """Submit the job, or print its script."""
    text = script(submit, command)
    if submit.dry_run:
        print(text, end="")
        return
    if shutil.which("sbatch") is None:
        raise UserError(
            "submit needs Slurm's sbatch on PATH, and there is none: run it where jobs are submitted, or see "
            "docs/scale.md for other ways to start several processes"
        )
    submit.folder.mkdir(parents=True, exist_ok=True)
    done = subprocess.run(["sbatch", "--parsable"], input=text, capture_output=True, text=True)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"status {done.returncode}"]
        raise UserError(f"sbatch refused the job: {'; '.join(lines)}")
    job = done.stdout.strip().split(";")[0]
    print(f"job {job}: output goes to {submit.folder / f'{job}.log'}; `scancel {job}` ends it")
