"""C for this processor, where there is a C compiler: compiled when it is first asked for, once a process."""

import ctypes
import logging
import platform
import shutil
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

logger = logging.getLogger("grpo")
X86 = platform.machine() in ("x86_64", "AMD64")
FLAGS = ["-O3", "-march=native" if X86 else "-mcpu=native", "-fPIC", "-fno-math-errno", "-fno-trapping-math"]
THREADS = [] if sys.platform == "darwin" else ["-fopenmp"]  # the compiler of a Mac knows no OpenMP


@cache
def loops_of(source: Path, without: str, flags: tuple[str, ...] = ()) -> ctypes.CDLL | None:
    """The functions of a file, in a second. None where that fails: a line says what is done without, more slowly."""
    compiler = shutil.which("cc")
    if compiler is None:
        return None
    try:
        with tempfile.TemporaryDirectory() as folder:
            made, target = f"{folder}/loop.o", f"{folder}/loop.so"
            # linked without -fopenmp, which would bring threads beside torch's
            for words in ([*FLAGS, *flags, *THREADS, "-c", str(source), "-o", made], ["-shared", made, "-o", target]):
                subprocess.run([compiler, *words], check=True, capture_output=True, timeout=60)
            return ctypes.CDLL(target)
    except (OSError, subprocess.SubprocessError) as error:
        said = (getattr(error, "stderr", None) or b"").decode(errors="replace").strip() or str(error)
        logger.warning(f"{without}, which is slower: {said.splitlines()[0]}")
        return None
