"""Grading in a process of its own, which the kernel ends when an answer takes too long or too much.

The first half runs here and asks. The second half, `serve`, is the process that answers, by a module that has
`start() -> "ready"` or what is wrong, and `grading(*request) -> a call that gives the verdict`, which alone is timed.
"""

import contextlib
import gc
import importlib
import json
import mmap
import os
import resource
import select
import signal
import subprocess
import sys
import threading
import time
import weakref
from pathlib import Path
from types import ModuleType
from typing import IO

from src.config import ConfigError

PROJECT_FOLDER = Path(__file__).resolve().parents[2]
WORKER_SECONDS = 0.45  # of processor time for an answer: 3 times what the slowest of 82 typical right ones needs
WORKER_MEMORY = 2 << 30  # bytes of address space
WORKER_START_SECONDS = 120
LONGEST_REQUEST = 60_000  # bytes: it fits into the pipe, so that writing it cannot block
# sympy orders by hash: the same answer, the same verdict. OpenBLAS reserves 40 MB a processor, which counts as memory
ENVIRONMENT = {"PYTHONHASHSEED": "0"} | {f"{name}_NUM_THREADS": "1" for name in ("OPENBLAS", "OMP", "MKL")}
TIRED = 3  # exit code of a child that another one should follow


class Worker(subprocess.Popen):
    """A process with both pipes, always."""

    stdin: IO[bytes]
    stdout: IO[bytes]


def start_worker(module: str, missing: str) -> Worker:
    """A process that runs `serve`, ready to grade. It never sees this process's main module, torch or terminal."""
    code = "import sys; sys.path.insert(0, sys.argv[1]); from src.tasks.grader import serve; serve(sys.argv[2])"
    worker = Worker(
        [sys.executable, "-P", "-c", code, str(PROJECT_FOLDER), module],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        bufsize=0,
        start_new_session=True,  # a Ctrl-C in the terminal is not for it
        env=os.environ | ENVIRONMENT,
    )
    try:
        greeting = read_line(worker, WORKER_START_SECONDS)
    except (EOFError, TimeoutError) as error:
        greeting = type(error).__name__
    except BaseException:
        stop_worker(worker)
        raise
    if greeting != "ready":
        stop_worker(worker)
        raise ConfigError(missing.format(greeting))
    return worker


def stop_worker(worker: Worker) -> None:
    """Kill it with its child and leave nothing of it behind."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(worker.pid, signal.SIGKILL)
    worker.wait()
    worker.stdin.close()
    worker.stdout.close()


def read_line(worker: Worker, seconds: float) -> str:
    """Its next line; TimeoutError after so many seconds, EOFError if it is dead."""
    poll = select.poll()  # select.select knows only the first 1024 files of a process
    poll.register(worker.stdout, select.POLLIN)
    deadline = time.monotonic() + seconds
    line = b""
    while not line.endswith(b"\n"):
        if not poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
            raise TimeoutError
        piece = os.read(worker.stdout.fileno(), 4096)
        if not piece:
            raise EOFError
        line += piece
    return line.decode().strip()


class Grader:
    """Asks one module's worker. `missing` is the sentence where it does not start, with {} for the reason."""

    def __init__(self, module: str, missing: str):
        self.module, self.missing = module, missing
        self.worker: Worker | None = None
        self.lock = threading.Lock()
        GRADERS.add(self)

    def ask(self, request: list, seconds: float) -> bool:
        """The verdict of the worker process, which is started if there is none and killed if it is late."""
        line = json.dumps(request).encode() + b"\n"
        if len(line) > LONGEST_REQUEST:
            return False
        with self.lock:
            for _ in range(2):  # a worker that somebody else killed must not cost a right answer its reward
                worker, self.worker = self.worker or start_worker(self.module, self.missing), None
                try:
                    worker.stdin.write(line)
                    verdict = read_line(worker, seconds)
                    self.worker = worker
                    return verdict.startswith("right")
                except TimeoutError:
                    return False
                except (EOFError, BrokenPipeError):
                    continue
                finally:  # also after Ctrl-C: a worker that still owes an answer would give it to the next question
                    if self.worker is None:
                        stop_worker(worker)
        return False

    def forget(self) -> None:
        """In a forked child: two processes must not read from one worker."""
        if self.worker is not None:
            self.worker.stdin.close()
            self.worker.stdout.close()
        self.worker, self.lock = None, threading.Lock()


def forget_workers() -> None:
    for grader in GRADERS:
        grader.forget()


GRADERS: weakref.WeakSet[Grader] = weakref.WeakSet()
os.register_at_fork(after_in_child=forget_workers)


def serve(module: str) -> None:
    """The worker: reads requests as lines of JSON, writes `right 0.012`: the verdict and processor seconds.

    A child grades, until an answer is too much for it: then the kernel ends it, whatever it is doing, with nothing
    left half done, and the next child begins as the first one did. The worker ends with its input.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    replies = os.dup(1)
    os.dup2(2, 1)  # what a library prints is no reply
    for limit, size in ((resource.RLIMIT_AS, WORKER_MEMORY), (resource.RLIMIT_CORE, 0)):
        with contextlib.suppress(ValueError, OSError):  # macOS has no such limit; a lower one may already be set
            resource.setrlimit(limit, (size, size))
    try:  # the imports and the first answers take long, and are on no completion's account
        grader = importlib.import_module(module)
        greeting = grader.start()
    except ImportError as error:  # anything else ends the process
        greeting = " ".join(str(error).split())
    os.write(replies, f"{greeting}\n".encode())
    gc.freeze()  # nothing of this is garbage, and looking through it takes 50 ms
    parent, ended = os.getpid(), TIRED
    while ended in (TIRED, -signal.SIGPROF):
        child = os.fork()
        if child == 0:
            try:
                os._exit(grade_questions(grader, replies, parent))
            finally:
                os._exit(1)
        ended = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if ended == -signal.SIGPROF:
            os.write(replies, f"wrong {WORKER_SECONDS}\n".encode())


def grade_questions(grader: ModuleType, replies: int, parent: int) -> int:
    """The worker's child. Returns 0 at the end of the input, TIRED when an answer has left much in memory."""
    for line in sys.stdin:
        if os.getppid() != parent:  # the worker was killed: a new one will answer
            return 0
        grade = grader.grading(*json.loads(line))
        signal.setitimer(signal.ITIMER_PROF, WORKER_SECONDS)
        begin = time.process_time()
        verdict = "right" if grade() else "wrong"
        signal.setitimer(signal.ITIMER_PROF, 0)
        os.write(replies, f"{verdict} {time.process_time() - begin:.4f}\n".encode())
        try:
            mmap.mmap(-1, WORKER_MEMORY // 2).close()
        except OSError:
            return TIRED
    return 0
