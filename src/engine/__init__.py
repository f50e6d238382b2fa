"""The engine behind four verbs; you need not enter. Everything that other packages may use of it is named here."""

from src.engine.distributed import AloneError, from_main, on_main, session, together, world
from src.engine.engine import Engine, EngineState
from src.engine.optim import MemoryEfficientAdamW

__all__ = ["AloneError", "Engine", "EngineState", "MemoryEfficientAdamW", "from_main", "on_main", "session", "together",
           "world"]  # fmt: skip
