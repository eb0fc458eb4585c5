"""How this process uses the machine's cores and memory: set once, before torch is loaded (docs/performance.md).

A thread of OpenMP that spins is ready at once and takes a core from whoever else wants it; one that sleeps costs a
system call and a wake-up each time. On an idle machine sleeping can cost half the speed of a small model; beside other
work, threads that spin without bound can make a step tens of times slower.

glibc gives large blocks back to the system as soon as they are freed, so that every step of training pays again for the
first touch of each of their pages: up to a quarter of a step. Kept, they cost nothing that the largest step had not
taken before.
"""

import os
import sys

__all__ = ["choose_waiting", "keep_memory"]

BUSY = 0.7  # processes waiting for a core, per core
SPINS = "10000"  # tens of microseconds
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of glibc's malloc.h


def choose_waiting() -> None:
    """Spin briefly where the machine is idle now, sleep at once where it is busy; what the user has set stays."""
    if {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"} & set(os.environ):
        return
    busy = hasattr(os, "getloadavg") and os.getloadavg()[0] > BUSY * (os.cpu_count() or 1)
    if busy:
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
    else:
        os.environ["GOMP_SPINCOUNT"] = SPINS


def keep_memory() -> bool:
    """Let glibc keep what is freed for the next step; says whether it does. What the user has set stays."""
    if sys.platform != "linux" or any(k.startswith("MALLOC_") or k == "GLIBC_TUNABLES" for k in os.environ):
        return False
    import ctypes

    set_option = getattr(ctypes.CDLL(None), "mallopt", None)  # another C library has none
    return set_option is not None and bool(set_option(M_MMAP_MAX, 0) and set_option(M_TRIM_THRESHOLD, -1))
