"""How this process uses the machine's cores and memory: set once, before torch is loaded (docs/performance.md).

A thread of OpenMP that spins is ready at once and takes a core from whoever else wants it; one that sleeps costs a
system call and a wake-up each time. On an idle machine sleeping can cost half the speed of a small model; beside other
work, threads that spin without bound can make a step tens of times slower. Who else computes is counted when the
process starts. The mean load of the last minute would miss who has just started, and take the command before, which has
ended, for somebody. How threads wait cannot be changed later; their number could, and with it the last bits of results.

glibc gives large blocks back to the system as soon as they are freed, so that every step of training pays again for the
first touch of each of their pages: up to a quarter of a step. Kept, they cost nothing that the largest step had not
taken before.
"""

import os
import sys
import time
from pathlib import Path

__all__ = ["choose_waiting", "keep_memory", "others"]

BUSY = 0.25  # others that compute, per core
LOADAVG = Path("/proc/loadavg")  # its fourth field: how many threads run or wait for a core now / how many there are
LOOKS, PAUSE = 5, 0.004  # seconds
SPINS = "3000"
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of glibc's malloc.h


def others() -> float:
    """How many threads beside this one run or wait for a core: the mean of a few looks; of a minute off Linux."""
    looks = []
    for _ in range(LOOKS):
        try:
            looks.append(int(LOADAVG.read_text().split()[3].split("/")[0]) - 1)
        except (OSError, IndexError, ValueError):
            return os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
        time.sleep(PAUSE)
    return sum(looks) / len(looks)


def choose_waiting() -> None:
    """Spin briefly where nobody else computes now, sleep at once where somebody does; what the user has set stays."""
    if {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"} & set(os.environ):
        return
    if others() > BUSY * (os.cpu_count() or 1):
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
