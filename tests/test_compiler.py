"""What is compiled of C is kept beside Python's compiled code, and is another one when anything of it changes."""

import logging
import shutil
import sys
from pathlib import Path

import pytest

from src.engine import compiler

pytestmark = pytest.mark.skipif(shutil.which("cc") is None, reason="there is no C compiler")


@pytest.fixture
def source(tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    (tmp_path / "number.h").write_text("#define NUMBER 3\n")
    (tmp_path / "number.c").write_text('#include "number.h"\nint number(void) { return NUMBER * TIMES; }\n')
    return tmp_path / "number.c"


@pytest.fixture
def compiled(monkeypatch) -> list[str]:
    """What has been compiled since, and not only asked for."""
    found, ran = [], compiler.ran

    def recorded(*words: str) -> str:
        if "-c" in words:
            found.append(words[-1])
        return ran(*words)

    monkeypatch.setattr(compiler, "ran", recorded)
    return found


def number(source: Path, times: int = 2) -> int:
    """As a new process would find it."""
    compiler.loops_of.cache_clear()
    found = compiler.loops_of(source, "without", (f"-DTIMES={times}",))
    compiler.loops_of.cache_clear()
    assert found is not None
    return found.number()


def test_it_is_compiled_once_and_anew_when_a_source_or_a_flag_changes(source, compiled, monkeypatch):
    assert [number(source), number(source)] == [6, 6] and len(compiled) == 1
    assert [number(source, 4), number(source, 4)] == [12, 12] and len(compiled) == 2
    source.with_suffix(".h").write_text("#define NUMBER 5\n")
    assert [number(source), number(source)] == [10, 10] and len(compiled) == 3
    monkeypatch.setattr(compiler, "FLAGS", ["-O0", *compiler.FLAGS[1:]])
    assert number(source) == 10 and len(compiled) == 4
    monkeypatch.setattr(compiler, "__file__", str(source.with_suffix(".h")))  # as if it had changed itself
    assert number(source) == 10 and len(compiled) == 5
    names = {file.name for file in (source.parent / "__pycache__").iterdir()}
    assert len(names) == 5 and all(name.startswith("number-") and name.endswith(".so") for name in names)


def test_another_processor_or_compiler_has_its_own(source, compiled, monkeypatch):
    """Both stand in what the compiler says that it would do."""
    number(source)
    said = compiler.ran
    for before, after in (("-march=", "-march=other"), ("version", "another version")):
        monkeypatch.setattr(compiler, "ran", lambda *words, b=before, a=after: said(*words).replace(b, a))
        number(source)
    assert len(compiled) == 3 and len(list((source.parent / "__pycache__").iterdir())) == 3


def test_one_that_is_damaged_is_made_anew(source, compiled):
    number(source)
    (file,) = (source.parent / "__pycache__").iterdir()
    data = file.read_bytes()
    for damaged in (b"", data[:100], data[: len(data) // 2], data[:3000] + bytes(len(data) - 3000), b"no library"):
        file.unlink()  # the one above is still in use
        file.write_bytes(damaged)
        assert number(source) == 6
    assert len(compiled) == 6 and file.stat().st_size > 1000


def test_where_nothing_can_or_may_be_kept_it_is_compiled_all_the_same(source, compiled, monkeypatch, caplog):
    place = source.parent / "__pycache__"
    place.write_text("a file, in which no file can be made")
    with caplog.at_level(logging.WARNING, "grpo"):
        assert [number(source), number(source)] == [6, 6] and len(compiled) == 2
    place.unlink()
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    assert number(source) == 6 and len(compiled) == 3 and not place.exists() and not caplog.records


def test_a_disk_that_is_full_leaves_no_part_of_one(source, compiled, monkeypatch):
    def half(made: Path, partial: Path) -> None:
        partial.write_bytes(made.read_bytes()[:100])
        raise OSError("No space left on device")

    monkeypatch.setattr(compiler.shutil, "copyfile", half)
    assert number(source) == 6 and list((source.parent / "__pycache__").iterdir()) == []
