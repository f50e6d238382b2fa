"""math-verify in a process of its own, which the kernel ends when it takes too long or too much.

The first half runs here and asks, the second half, `serve`, is the process that answers.
"""

import contextlib
import gc
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
from pathlib import Path
from typing import IO

from src.config import ConfigError

PROJECT_FOLDER = Path(__file__).resolve().parents[2]
WORKER_SECONDS = 0.45  # of processor time for an answer: 3 times what the slowest of 82 typical right ones needs
WORKER_MEMORY = 2 << 30  # bytes of address space
WORKER_START_SECONDS = 120
TIRED = 3  # exit code of a child that another one should follow

# a worker grades these first: only then is it as fast as it will be
WARM_UP = [
    (r"\frac{1}{2}+x", "x+0.5"), (r"(1,\frac{\pi}{2})", r"(1, 0.5 \pi)"), (r"2\sqrt{3}", r"\sqrt{12}"), ("2+i", "i+2"),
    (r"(-\infty,0)\cup[1,2]", r"(-\infty, 0) \cup [1, 2]"), ("(x+2)(x-5)", "x^2-3x-10"), ("y=-2x+1", "y = 1 - 2x"),
    (r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", r"\begin{pmatrix} 1 & 2 \\ 3 & 8/2 \end{pmatrix}"), ("1,2,3", "3,2,1"),
    (r"\frac{x^2-1}{x-1}", "x+1"), (r"\frac{1}{x}+\frac{1}{y}", r"\frac{x+y}{xy}"), (r"x \le 3", r"3 \ge x"),
]  # fmt: skip


class Worker(subprocess.Popen):
    """A process with both pipes, always."""

    stdin: IO[bytes]
    stdout: IO[bytes]


def start_worker() -> Worker:
    """A process that runs `serve`, ready to grade. It never sees this process's main module, torch or terminal."""
    code = "import sys; sys.path.insert(0, sys.argv[1]); from src.tasks.math_worker import serve; serve()"
    worker = Worker(
        [sys.executable, "-P", "-c", code, str(PROJECT_FOLDER)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        bufsize=0,
        start_new_session=True,  # a Ctrl-C in the terminal is not for it
        env=os.environ | {"PYTHONHASHSEED": "0"},  # sympy orders by hash: the same answer, the same verdict
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
        raise ConfigError(
            f"math answers need the package math-verify, which does not start here: {greeting}; install it"
        )
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


def ask_worker(answer: str, reference: str, seconds: float) -> bool:
    """The verdict of the worker process, which is started if there is none and killed if it is late."""
    global WORKER
    request = json.dumps([answer, reference]).encode() + b"\n"  # short: fits into the pipe, cannot block
    with WORKER_LOCK:
        for _ in range(2):  # a worker that somebody else killed must not cost a right answer its reward
            worker, WORKER = WORKER or start_worker(), None
            try:
                worker.stdin.write(request)
                verdict = read_line(worker, seconds)
                WORKER = worker
                return verdict.startswith("right")
            except TimeoutError:
                return False
            except (EOFError, BrokenPipeError):
                continue
            finally:  # also after Ctrl-C: a worker that still owes an answer would give it to the next question
                if WORKER is None:
                    stop_worker(worker)
    return False


def forget_worker() -> None:
    """In a forked child: two processes must not read from one worker."""
    global WORKER, WORKER_LOCK
    if WORKER is not None:
        WORKER.stdin.close()
        WORKER.stdout.close()
    WORKER, WORKER_LOCK = None, threading.Lock()


WORKER: Worker | None = None
WORKER_LOCK = threading.Lock()
os.register_at_fork(after_in_child=forget_worker)


def serve() -> None:
    """The worker: reads [answer, reference] as lines of JSON, writes `right 0.012`: the verdict and processor seconds.

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
        wrong = [pair for pair in WARM_UP if not math_verify_says(*pair)]
        greeting = f"it finds {wrong[0]} different" if wrong else "ready"
    except ImportError as error:  # anything else ends the process
        greeting = " ".join(str(error).split())
    os.write(replies, f"{greeting}\n".encode())
    gc.freeze()  # nothing of this is garbage, and looking through it takes 50 ms
    parent, ended = os.getpid(), TIRED
    while ended in (TIRED, -signal.SIGPROF):
        child = os.fork()
        if child == 0:
            try:
                os._exit(grade_questions(replies, parent))
            finally:
                os._exit(1)
        ended = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if ended == -signal.SIGPROF:
            os.write(replies, f"wrong {WORKER_SECONDS}\n".encode())


def grade_questions(replies: int, parent: int) -> int:
    """The worker's child. Returns 0 at the end of the input, TIRED when an answer has left much in memory."""
    for line in sys.stdin:
        if os.getppid() != parent:  # the worker was killed: a new one will answer
            return 0
        signal.setitimer(signal.ITIMER_PROF, WORKER_SECONDS)
        begin = time.process_time()
        verdict = "right" if math_verify_says(*json.loads(line)) else "wrong"
        signal.setitimer(signal.ITIMER_PROF, 0)
        os.write(replies, f"{verdict} {time.process_time() - begin:.4f}\n".encode())
        try:
            mmap.mmap(-1, WORKER_MEMORY // 2).close()
        except OSError:
            return TIRED
    return 0


def math_verify_says(answer: str, reference: str) -> bool:
    """math-verify's verdict, without any limit of time. An error is a wrong answer."""
    from math_verify import LatexExtractionConfig, parse, verify
    from sympy import Basic, Pow
    from sympy.core.cache import clear_cache

    clear_cache()  # it made verdicts on infinity depend on the answers before
    try:
        # between dollar signs, of which clean_latex left none: the whole text is the answer, no part of it
        gold, target = (
            parse(f"${text}$", [LatexExtractionConfig()], parsing_timeout=None) for text in (reference, answer)
        )
        powers = {power for value in target if isinstance(value, Basic) for power in value.atoms(Pow)}
        if any(p.exp.is_negative and p.base.is_number and abs(p.base.evalf()) < 1e-12 for p in powers):
            return False  # 0/0.0 would be 0
        return bool(verify(gold, target, float_rounding=12, timeout_seconds=None))
    except Exception:
        return False
