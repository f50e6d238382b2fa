"""A run's folder and what happens to it: steps, checkpoints, logs, TensorBoard, console, hub, reading runs back."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from src.run.checkpoint import check_same_experiment
    from src.run.console import configure_logging, progress
    from src.run.hub import check_hub, check_hub_keys
    from src.run.run import Run, run_folder

HOMES = {
    "Run": "run", "run_folder": "run", "check_same_experiment": "checkpoint", "check_hub": "hub",
    "check_hub_keys": "hub", "configure_logging": "console", "progress": "console",
}  # fmt: skip


def __getattr__(name: str) -> Any:
    """Imported when asked for: what the command line needs of the console must not wait for torch."""
    if name not in HOMES:
        raise AttributeError(f"module {__name__} has no {name}")
    return getattr(import_module(f"{__name__}.{HOMES[name]}"), name)


__all__ = ["Run", "check_hub", "check_hub_keys", "check_same_experiment", "configure_logging", "progress",
           "run_folder"]  # fmt: skip
