"""GRPO for language models. This file only sets, before torch is imported, how CPU threads wait and memory is kept."""

import ctypes
import os

# By default they spin for long. On a machine that is busy with something else the spinning threads take the cores from
# those that have work: steps of the tiny model took up to 53 s that way. A short spin is as fast where the machine is
# idle, and where it is not costs no more than sleeping at once (benchmarks/RESULTS.md).
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "3000")

# glibc returns every large block to the system when it is freed. A step frees and takes the same blocks thousands of
# times, and each time the system clears their pages again: a quarter of an update's time (benchmarks/RESULTS.md).
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of malloc.h
if not any(name.startswith("MALLOC_") for name in os.environ):
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if mallopt and mallopt(M_MMAP_THRESHOLD, 2**30):  # an old glibc refuses so much; the next alone would be slower
        mallopt(M_TRIM_THRESHOLD, -1)
