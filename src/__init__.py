"""GRPO for language models. This file only sets, before torch is imported, how its CPU threads wait."""

import os

# By default they spin. On a machine that is busy with something else the spinning threads take the cores from those
# that have work: a step of the tiny model took 53 s that way and 2.7 s with waiting (2 cores, load 5).
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
