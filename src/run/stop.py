"""Ctrl-C and kill: the first one leaves the step in progress and saves, the second one ends the process."""

import logging
import os
import signal
import sys
import threading
import time

from src.config import Stopped

logger = logging.getLogger("grpo")


class StopSignal:
    """The first SIGINT or SIGTERM sets `number`; another one ends the process at once.

    A thread counts them, so that the second one works in the middle of a long call of torch; saving is atomic, so
    nothing is lost by it. Use it as a context manager, or call close() when done.
    """

    NUMBERS = (signal.SIGINT, signal.SIGTERM)
    ONE = 0.1  # seconds: `timeout` and terminals send some signals twice, which is meant as one

    def __init__(self):
        self.number = 0
        self.before = {number: signal.signal(number, self.handle) for number in self.NUMBERS}
        self.writer: int | None
        self.reader, self.writer = os.pipe()
        os.set_blocking(self.writer, False)
        signal.set_wakeup_fd(self.writer, warn_on_full_buffer=False)
        os.register_at_fork(after_in_child=self.close)  # a child's signals are not ours, and it dies of them
        threading.Thread(target=self.count, daemon=True).start()

    def handle(self, number: int, frame) -> None:
        """Only a note: a handler runs between any two instructions, also within a write to the log."""
        self.number = self.number or number

    def count(self) -> None:
        """The thread: every signal arrives here as a byte, also while the main thread is busy."""
        first = None
        while numbers := os.read(self.reader, 1):
            if numbers[0] not in self.NUMBERS:
                continue
            if first is None:
                first = time.monotonic()
                logger.info("stopping and saving; once more to stop at once")
            elif time.monotonic() - first > self.ONE:
                os._exit(128 + numbers[0])
        os.close(self.reader)

    def check(self) -> None:
        """Raise Stopped if a signal has come. For the places of a step where leaving it loses nothing."""
        if self.number:
            raise Stopped(128 + self.number)

    def close(self) -> None:
        """Signals do again what they did before."""
        if self.writer is not None:
            for number, handler in self.before.items():
                signal.signal(number, handler)
            signal.set_wakeup_fd(-1)
            os.close(self.writer)
            self.writer = None

    def __enter__(self):
        return self

    def __exit__(self, *_) -> None:
        self.close()


def leave(code: int) -> None:
    """sys.exit; one of several processes leaves out the end of the interpreter, in which threads of gloo can abort."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)
