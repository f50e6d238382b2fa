"""Folders that are whole or not there, and one process at a time in a run's.

A folder is written beside its final name, every file hashed into manifest.json, forced onto the disk and then renamed:
whatever kills the process, a whole folder with that name is there, and damage is found out before it is used.
"""

import fcntl
import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TextIO

from safetensors import SafetensorError

from src.config import ConfigError, RunError

logger = logging.getLogger("grpo")


class StorageError(RunError):
    """The disk is full, read-only or broken: what was being written, what is safe, and what to do, in one sentence."""

    def __init__(self, what: str, error: Exception, safe: str):
        super().__init__(
            f"{what} could not be written ({storage_problem(error)}); {safe}; "
            f"make room there or make it writable, then give the same command again"
        )

    def __reduce__(self):
        """To other processes it goes as its sentence."""
        return RunError, self.args


def storage_problem(error: BaseException | None) -> str | None:
    """What the operating system said, if it is the reason of an error; torch and safetensors wrap it."""
    if isinstance(error, OSError):
        return os.strerror(error.errno) if error.errno else " ".join(str(error).split())
    if isinstance(error, SafetensorError) and (found := re.search(r"\(os error (\d+)\)", str(error))):
        return os.strerror(int(found[1]))
    return storage_problem(error.__context__) if isinstance(error, RuntimeError) else None


def sync(path: Path) -> None:
    """Force a file, or the names in a folder, onto the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_file(path: Path, text: str) -> None:
    """Replace a small text file: a crash leaves the old one or the new one, never half of one."""
    beside = path.with_name(path.name + ".partial")
    try:
        beside.write_text(text, encoding="utf-8")
        sync(beside)
        os.replace(beside, path)
    except OSError as error:
        with suppress(OSError):
            beside.unlink()
        raise StorageError(str(path), error, "what was there before is safe") from error


def manifest_text(content: dict) -> str:
    """The manifest as written: its last entry is the hash of the others, so that damage to itself is seen too."""
    seal = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    return json.dumps({**content, "sha256": seal}, indent=1) + "\n"


def write_manifest(folder: Path, about: dict) -> None:
    """Name, size and SHA-256 of every file of a folder."""
    files = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        files[path.relative_to(folder).as_posix()] = {"bytes": path.stat().st_size, "sha256": digest}
    (folder / "manifest.json").write_text(manifest_text({**about, "files": files}), encoding="utf-8")


def read_manifest(folder: Path) -> dict | None:
    """The manifest of a folder; None if there is none or one byte of it is not as it was written."""
    try:
        text = (folder / "manifest.json").read_bytes().decode()
        content = json.loads(text)
        del content["sha256"]
        return content if manifest_text(content) == text else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def find_damage(folder: Path) -> str | None:
    """The first file of a folder that is not as its manifest says, and how; None when all are."""
    if not (folder / "manifest.json").exists():
        return "manifest.json is missing, as in a checkpoint of an older version"
    manifest = read_manifest(folder)
    if manifest is None:
        return "manifest.json is damaged"
    try:
        for name, wanted in manifest["files"].items():
            path = folder / name
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != wanted["bytes"]:
                return f"{name} has {path.stat().st_size:,} of {wanted['bytes']:,} bytes"
            with path.open("rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != wanted["sha256"]:
                    return f"{name} is damaged, its SHA-256 has changed"
    except OSError as error:
        return f"{name} cannot be read, {storage_problem(error)}"
    return None


def recover(final: Path) -> None:
    """Finish what a crash interrupted: a folder that was renamed aside gets its name back if nothing has taken it."""
    aside, partial = final.with_name(final.name + ".old"), final.with_name(final.name + ".partial")
    if aside.exists() and not final.exists():
        aside.rename(final)
    for leftover in (aside, partial):
        if leftover.exists():
            shutil.rmtree(leftover)


def recover_all(folder: Path) -> None:
    """The same for every checkpoint. No other process may be writing there, see RunLock."""
    for path in sorted(folder.glob("step_*")):
        if path.suffix in (".partial", ".old"):
            recover(path.with_suffix(""))


def write_folder(final: Path, about: dict, write: Callable[[Path], None]) -> None:
    """Let `write` fill a folder beside `final`, then give it that name; the old one goes last, not first."""
    aside, partial = final.with_name(final.name + ".old"), final.with_name(final.name + ".partial")
    recover(final)
    partial.mkdir(parents=True)
    write(partial)
    write_manifest(partial, about)
    for path in [*sorted(partial.rglob("*")), partial]:
        sync(path)
    if final.exists():
        final.rename(aside)
    partial.rename(final)
    sync(final.parent)
    shutil.rmtree(aside, ignore_errors=True)  # what is left of it is removed by the next recover


class RunLock:
    """One process at a time in a run folder: `with RunLock(folder):`. The system lets go of it however we end."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.file: TextIO | None = None

    def __enter__(self):
        path = self.folder / ".lock"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            while self.file is None:
                self.file = path.open("a+", encoding="utf-8")
                self.take(self.file)
                if not path.exists() or not os.path.samestat(os.fstat(self.file.fileno()), path.stat()):
                    self.__exit__()  # --fresh of another process has just moved the folder
                    self.folder.mkdir(parents=True, exist_ok=True)
            self.file.truncate(0)
            self.file.write(str(os.getpid()))  # for the message of another process
            self.file.flush()
        except OSError as error:
            self.__exit__()
            raise StorageError(str(self.folder), error, "nothing has been changed") from error
        return self

    def take(self, file: TextIO) -> None:
        """Lock the open file, or say who has it."""
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            owner = file.read().strip() or "unknown"
            self.__exit__()
            raise ConfigError(
                f"another process (pid {owner}) is using {self.folder}; wait for it, or name another run by --name"
            ) from error
        except OSError as error:
            logger.warning(
                f"{self.folder} is on a file system without locks ({storage_problem(error)}): "
                f"see to it yourself that no second process uses it"
            )

    def __exit__(self, *_) -> None:
        if self.file is not None:
            self.file.close()
            self.file = None


def set_aside(folder: Path) -> None:
    """--fresh: the old run keeps its files under folder.1, folder.2, ..."""
    number = 1
    while folder.with_name(f"{folder.name}.{number}").exists():
        number += 1
    folder.rename(folder.with_name(f"{folder.name}.{number}"))
    logger.info(f"the old run is now {folder.name}.{number}")
