"""How the threads of OpenMP wait for each other: set before torch is loaded.

A thread that spins is ready at once and takes a core from whoever else wants it; one that sleeps costs a system call
and a wake-up each time. On an idle machine sleeping can cost half the speed of a small model; beside other work,
threads that spin without bound can make a step tens of times slower (docs/performance.md).
"""

import os

__all__ = ["choose_waiting"]

BUSY = 0.7  # processes waiting for a core, per core
SPINS = "10000"  # tens of microseconds


def choose_waiting() -> None:
    """Spin briefly where the machine is idle now, sleep at once where it is busy; what the user has set stays."""
    if {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"} & set(os.environ):
        return
    busy = hasattr(os, "getloadavg") and os.getloadavg()[0] > BUSY * (os.cpu_count() or 1)
    if busy:
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
    else:
        os.environ["GOMP_SPINCOUNT"] = SPINS
