"""Benchmarks: `python -m benchmarks.NAME`."""

import src  # noqa: F401  before torch: how its threads wait
