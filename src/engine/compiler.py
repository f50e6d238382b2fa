"""C for this processor, where there is a C compiler: compiled when first asked for, kept where Python keeps its own."""

import ctypes
import hashlib
import logging
import platform
import shutil
import subprocess
import sys
import tempfile
from contextlib import suppress
from functools import cache
from importlib.util import cache_from_source
from pathlib import Path

logger = logging.getLogger("grpo")
X86 = platform.machine() in ("x86_64", "AMD64")
FLAGS = ["-O3", "-march=native" if X86 else "-mcpu=native", "-fPIC", "-fno-math-errno", "-fno-trapping-math"]
THREADS = [] if sys.platform == "darwin" else ["-fopenmp"]  # the compiler of a Mac knows no OpenMP


def ran(*words: str) -> str:
    """What a command says on stderr."""
    done = subprocess.run(words, check=True, capture_output=True, timeout=60)
    return done.stderr.decode(errors="replace")


def kept(source: Path, words: list[str]) -> Path:
    """Where it is kept: in __pycache__, by all that it is made of, also by what "native" means to the compiler."""
    made_of = ran(*words, "-###", "-S", str(source), "-o", "loop.s").encode()
    for file in (Path(__file__), *sorted(source.parent.glob("*.[ch]"))):
        made_of += file.read_bytes()
    name = f"{source.stem}-{hashlib.sha256(made_of).hexdigest()[:16]}.so"
    return Path(cache_from_source(str(source))).with_name(name)


def keep(made: Path, place: Path) -> None:
    """Whole or not at all, also when several processes do; with its hash behind it, which a linker does not read."""
    place.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=place.parent, delete=False) as file:
        partial = Path(file.name)
    try:
        shutil.copyfile(made, partial)
        with partial.open("ab") as file:
            file.write(hashlib.sha256(made.read_bytes()).digest())
        partial.replace(place)
    finally:
        partial.unlink(missing_ok=True)


def is_whole(place: Path) -> bool:
    """Whether it is what was kept: one that a crash has cut would end the process."""
    data = place.read_bytes()
    return hashlib.sha256(data[:-32]).digest() == data[-32:]


@cache
def loops_of(source: Path, without: str, flags: tuple[str, ...] = ()) -> ctypes.CDLL | None:
    """The functions of a file, in seconds. None where that fails: a line says what is done without, more slowly."""
    compiler = shutil.which("cc")
    if compiler is None:
        return None
    words = [compiler, *FLAGS, *flags, *THREADS]
    try:
        place = None if sys.dont_write_bytecode else kept(source, words)
        if place:
            with suppress(OSError):  # not there
                if is_whole(place):
                    return ctypes.CDLL(str(place))
        with tempfile.TemporaryDirectory() as folder:
            made, target = f"{folder}/loop.o", f"{folder}/loop.so"
            # linked without -fopenmp, which would bring threads beside torch's
            ran(*words, "-c", str(source), "-o", made)
            ran(compiler, "-shared", made, "-o", target)
            if place:
                with suppress(OSError):  # a folder that is only read, or full
                    keep(Path(target), place)
            return ctypes.CDLL(target)
    except (OSError, subprocess.SubprocessError) as error:
        said = (getattr(error, "stderr", None) or b"").decode(errors="replace").strip() or str(error)
        logger.warning(f"{without}, which is slower: {said.splitlines()[0]}")
        return None
