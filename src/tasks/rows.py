"""Rows of a file, of a folder in the hub's layout, or of a data set on the hub.

Nothing local is cached, so nothing can be out of date, and every error names its line or row.
"""

import csv
import hashlib
import json
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path

from src.config import ConfigError

FILE_KINDS = (".parquet", ".jsonl", ".json", ".csv")


def raw_rows(file: str) -> Iterator[tuple[int, dict | str]]:
    """Rows with their numbers from 1; a row of JSON lines is the line's number and text."""
    if file.endswith(".parquet"):
        from pyarrow.parquet import ParquetFile

        with ParquetFile(file) as parquet:
            yield from enumerate((row for batch in parquet.iter_batches() for row in batch.to_pylist()), 1)
        return
    with open(file, encoding="utf-8-sig", newline="" if file.endswith(".csv") else None) as lines:
        if file.endswith(".csv"):
            for number, row in enumerate(csv.DictReader(lines, strict=True), 1):
                if None in row or None in row.values():
                    raise ValueError("the next row has not as many fields as the header")
                yield number, row
        elif file.endswith(".json") and lines.read(1000).lstrip().startswith("["):
            lines.seek(0)
            yield from enumerate(json.load(lines), 1)
        else:
            lines.seek(0)
            yield from ((number, line.strip()) for number, line in enumerate(lines, 1) if line.strip())


def read_file(file: str) -> Iterator[tuple[str, dict]]:
    """Rows of a file, each with its place for error messages. Nothing is cached, so nothing can be out of date."""
    unit, place = "line" if file.endswith(".jsonl") else "row", file
    try:
        for number, row in raw_rows(file):
            place = f"{file} {unit} {number}"
            row = json.loads(row) if isinstance(row, str) else row
            if not isinstance(row, dict):
                raise ValueError('a row must be an object such as {"question": "..."}')
            yield place, row
            place = f"{file} after {unit} {number}"
    except (OSError, ValueError, RecursionError, csv.Error) as error:
        problem = str(error).replace("line 1 column", "column")  # of a line, its first line says nothing
        raise ConfigError(f"{place}: cannot be read: {problem}") from error


def hub_rows(source: str, split: str, rows) -> Iterator[tuple[str, dict]]:
    """Rows of one split from the hub, each with its place for error messages."""
    for number, row in enumerate(rows.to_list(), 1):
        yield f"{source} {split} row {number}", row


def said_by(error: Exception) -> str:
    """A library's error as one sentence, without its example code."""
    return " ".join(str(error).split("Example of usage")[0].split()) or type(error).__name__


def folder_splits(folder: str, subset: str | None, required: bool) -> dict[str, list[str]]:
    """The files of each split of a folder in the hub's layout; `subset` is a config of its README or a subfolder."""
    from datasets import get_dataset_config_names, load_dataset_builder

    try:
        folder = os.path.abspath(folder)  # a relative `json` would be a kind of file
        named = get_dataset_config_names(folder)
        folders = sorted(entry.name for entry in Path(folder).iterdir() if entry.is_dir() and entry.name[0] != ".")
        if subset in folders and subset not in named:
            folder, subset = os.path.join(folder, subset), None
        elif subset not in named:
            if required and subset:
                known = ", ".join(sorted({*named, *folders} - {"default"})) or "none"
                raise ConfigError(f"{folder}: there is no subset {subset}; set data.subset to one there is: {known}")
            subset = None
        with tempfile.TemporaryDirectory() as cache:  # the builder makes its cache folders even if it caches nothing
            files = load_dataset_builder(folder, subset, cache_dir=cache).config.data_files
    except ConfigError:
        raise
    except Exception as error:  # of many kinds: no data files, a README that is not YAML, several subsets, ...
        raise ConfigError(f"{folder}: {said_by(error)}; check data.path and data.subset") from error
    return {str(split): list(of_split) for split, of_split in files.items()}


def hub_splits(source: str, subset: str | None, required: bool) -> dict:
    """Every split of a data set on the hub; without network that of an earlier run, at once in place of after 30 s."""
    import datasets
    from huggingface_hub import get_session

    offline = datasets.config.HF_HUB_OFFLINE
    try:
        get_session().head(datasets.config.HF_ENDPOINT, timeout=5)
    except Exception:  # of whichever HTTP library the hub's client uses
        datasets.config.HF_HUB_OFFLINE = True  # else it asks again and again
    try:
        try:
            return dict(datasets.load_dataset(source, subset))
        except ValueError:  # no such subset
            if required or subset is None:
                raise
            return dict(datasets.load_dataset(source))
    except Exception as error:  # of many kinds: no network, no such data set, gated, no such subset, disk full, ...
        raise ConfigError(
            f"{source}: cannot be loaded from the hub ({said_by(error)}); check the name, data.subset and the network, "
            f"or download it and name its folder in data.path or data.eval_path"
        ) from error
    finally:
        datasets.config.HF_HUB_OFFLINE = offline


def open_source(source: str, subset: str | None, required: bool) -> dict[str, Iterator[tuple[str, dict]]]:
    """The rows of each split with their places, to be read one by one. A single file is all `train`."""
    path = os.path.expanduser(source)
    if os.path.isdir(path):
        splits = folder_splits(path, subset, required)
    elif os.path.isfile(path):
        splits = {"train": [path]}
    elif source.endswith(FILE_KINDS) or not re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", source):
        raise ConfigError(f"{source}: there is no such file or folder; check data.path and data.eval_path")
    else:
        return {split: hub_rows(source, split, rows) for split, rows in hub_splits(source, subset, required).items()}
    for file in (file for files in splits.values() for file in files):
        if not file.endswith(FILE_KINDS):
            raise ConfigError(f"{file}: only {', '.join(FILE_KINDS)} files can be read; convert it to one of them")
    return {split: (pair for file in files for pair in read_file(file)) for split, files in splits.items()}


def keep_tenth(rows: list[dict], column: str | None, held_out: bool) -> list[dict]:
    """A tenth of the rows, at least one, or else all the others, by a hash: rows with the same prompt stay together."""
    texts = [json.dumps(row[column] if column else row, sort_keys=True, default=str) for row in rows]
    hashes = [hashlib.md5(text.encode(), usedforsecurity=False).hexdigest() for text in texts]
    limit = max("1999", min(hashes, default=""))  # 0x1999 of 0x10000 is a tenth
    return [row for row, digest in zip(rows, hashes, strict=True) if (digest <= limit) == held_out]
