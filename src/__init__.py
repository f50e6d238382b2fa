"""GRPO for language models. This file only sets, before torch is imported, how its CPU threads wait."""

import os

# By default they spin for long. On a machine that is busy with something else the spinning threads take the cores from
# those that have work: steps of the tiny model took up to 53 s that way. A short spin is as fast where the machine is
# idle, and where it is not costs no more than sleeping at once (benchmarks/RESULTS.md).
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "3000")
