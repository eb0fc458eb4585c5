"""The far end of ``benchmarks/peers.py``: one side in a process of its own, which answers lines of JSON with others.

Nothing but the standard library is imported here, because every side brings an environment of its own. What the side's
libraries print goes to standard error. The first line holds the case, or what else is wanted:

    {"case": {...}}   the side is built and takes a step: {"first step": true} as soon as its loss is read. Two more
                      steps, and {"peak": bytes, ...what the side says of itself}: the largest resident set so far, less
                      the resident set between the imports and building
    {"run": NAME}     then, again and again: {"seconds": of the clock, "cpu": of all threads together}
    {"count": true}   {"flops": of a training step, or null}
    {"check": FOLDER} instead of a case: {"rows": [[what, difference, allowed], ...]} against the reference cases

A library that cannot be imported is {"missing": why}; any other failure {"failed": the traceback}.
"""

import importlib
import json
import os
import resource
import sys
import time
import traceback
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

Runs = dict[str, Callable[[], object]]


def resident(largest: bool = False) -> int:
    """Bytes of this process in memory now, or at the most so far."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields["VmHWM" if largest else "VmRSS"].split()[0]) * 1024


def spent() -> float:
    """CPU seconds of all threads of this process so far."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def versions(*names: str) -> dict[str, str]:
    """Installed versions of packages."""
    from importlib.metadata import version

    return {name: version(name) for name in names}


def without_torchvision() -> str:
    """Empty modules in place of torchvision where it does not import, for packages that use it for data sets and
    pictures only; says so, or what is installed."""
    try:
        return f"torchvision {importlib.import_module('torchvision').__version__}"
    except Exception:
        names = ("torchvision", "torchvision.transforms", "torchvision.utils")
        empty = {name: types.ModuleType(name) for name in names}
        for name in names[1:]:
            setattr(empty["torchvision"], name.rsplit(".", 1)[1], empty[name])
        sys.modules.update(empty)
        return "without torchvision"


def flops(step: Callable[[], object]) -> int:
    """Operations of matrix products, convolutions and attention in a step of torch's, by its own counter."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

    aten = torch.ops.aten
    attention: Any = {  # on a CPU, which the counter does not know; functions of shapes
        aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
        aten._scaled_dot_product_flash_attention_for_cpu_backward: (
            lambda of_out, q, k, v, *_, **__: sdpa_backward_flop_count(of_out, q, k, v)
        ),
    }
    with FlopCounterMode(display=False, custom_mapping=attention) as counter:
        step()
    return counter.get_total_flops()


def serve(
    load: Callable[[], None],
    build: Callable[[dict[str, Any]], tuple[Runs, dict[str, Any]]],
    count: Callable[[Callable[[], object]], int | None] = flops,
    check: Callable[[Path], list[tuple[str, float, float]]] | None = None,
) -> None:
    """Answer until the other end closes. ``load`` imports; ``build`` makes the runs, "training step" among them."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)

    def answer(**values: Any) -> None:
        answers.write(json.dumps(values) + "\n")

    try:
        wanted = json.loads(sys.stdin.readline())
        try:
            load()
        except ImportError as error:
            return answer(missing=f"{type(error).__name__}: {error}")
        if "check" in wanted:
            assert check is not None, "this side has no reference cases"
            return answer(rows=check(Path(wanted["check"])))
        before = resident()
        runs, info = build(wanted["case"])
        runs["training step"]()
        answer(**{"first step": True})
        for _ in range(2):
            runs["training step"]()
        answer(peak=resident(largest=True) - before, runs=list(runs), **info)
        for line in sys.stdin:
            told = json.loads(line)
            if "count" in told:
                answer(flops=count(runs["training step"]))
                continue
            begun, used = time.perf_counter(), spent()
            runs[told["run"]]()
            answer(seconds=time.perf_counter() - begun, cpu=spent() - used)
    except Exception:
        answer(failed=traceback.format_exc())
