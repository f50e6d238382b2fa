"""Writes the README's tables of keys (from src/config.py) and of memory (from src/memory.py) again."""

import copy
import re
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace, UnionType
from typing import get_args, get_origin

import torch
from transformers import AutoModelForCausalLM

from benchmarks.rollout import SHAPES
from src.config import POLICY_KEYS, SECTIONS, load_config
from src.memory import memory_plan, peak_of

PROJECT = Path(__file__).resolve().parent.parent
README = PROJECT / "README.md"
BOUNDS = {"minimum": "at least", "above": "above", "maximum": "at most", "below": "below"}
SHIPPED = (("0.5b", "qwen2.5-0.5b", "0.5b"), ("1.5b", "1.5b", "3b"), ("3b", "3b", "3b"), ("7b", "7b", "7b"))
COLUMNS = {  # of the table, and what the plan calls them
    "weights": "weights", "optimizer states": "optimizer", "gradients": "gradients", "reference": "reference",
    "rollout cache": "rollout", "activations": "update",
}  # fmt: skip


def values_of(item) -> str:
    """What a key may be: its choices, or its type and range."""
    if "choices" in item.metadata:
        return ", ".join(f"`{choice}`" for choice in item.metadata["choices"])
    wanted = get_args(item.type)[0] if isinstance(item.type, UnionType) else item.type
    name = f"list of {get_args(wanted)[0].__name__}" if get_origin(wanted) is list else wanted.__name__
    bounds = [f"{word} {item.metadata[rule]}" for rule, word in BOUNDS.items() if rule in item.metadata]
    return ", ".join([name, *bounds])


def readers_of(item) -> str:
    """The loss types that read a key, where it says so; of maxent perhaps only its clipped form."""
    clipped = " (clipped)" if item.name in POLICY_KEYS else ""
    names = [f"`{name}`" + clipped * (name == "maxent") for name in item.metadata.get("read_by", ())]
    return ", ".join(names)


def keys_table(section: str) -> str:
    """One section of src/config.py."""
    columns = {
        "key": lambda item: f"`{item.name}`",
        "default": lambda item: f"`{default_of(section, item.name)}`".replace("`None`", "(empty)"),
        "values": values_of,
        "meaning": lambda item: item.metadata["doc"],
    }
    items = fields(SECTIONS[section])
    if any("read_by" in item.metadata for item in items):
        columns["only for loss type"] = readers_of
    return markdown([list(columns)] + [[column(item) for column in columns.values()] for item in items])


def markdown(rows: list[list[str]]) -> str:
    """A table; the first row is its head."""
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    return "\n".join([lines[0], "|---" * len(rows[0]) + "|", *lines[1:]])


def default_of(section: str, name: str) -> str:
    """As it is written in YAML."""
    value = getattr(SECTIONS[section](), name)
    return str(value).lower() if isinstance(value, bool) else str(value)


def plan_of(shape: str, folder: str) -> dict[str, int]:
    """The memory plan of src/memory.py for a shape of weights that are never allocated, with a shipped config."""
    (file,) = (PROJECT / "configs" / f"configs_{folder}").glob("config_kl_*.yaml")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(copy.deepcopy(SHAPES[shape]), dtype=torch.bfloat16)
    on_cuda = SimpleNamespace(
        parameters=model.parameters, config=model.config, dtype=model.dtype, device=torch.device("cuda")
    )
    return memory_plan(SimpleNamespace(config=load_config(file), model=on_cuda, anchor=model))


def memory_table() -> str:
    """GiB by purpose and size of model."""
    rows = [["model", "config", *COLUMNS, "at most at once"]]
    for name, shape, folder in SHIPPED:
        plan = plan_of(shape, folder)
        sizes = [f"{size / 2**30:.1f}" for size in (*(plan[purpose] for purpose in COLUMNS.values()), peak_of(plan))]
        rows.append([name, f"`configs_{folder}`", *sizes])
    return markdown(rows)


def rewritten(text: str) -> str:
    """The README's text with what stands between the markers made again."""
    tables = {f"keys {section}": keys_table(section) for section in SECTIONS} | {"memory": memory_table()}
    for name, table in tables.items():
        start, end = f"<!-- {name}: python -m benchmarks.tables -->", f"<!-- end of {name} -->"
        assert text.count(start) == text.count(end) == 1, f"README.md must have `{start}` and `{end}` once each"
        text = re.sub(f"{start}.*?{end}", lambda _: f"{start}\n\n{table}\n\n{end}", text, flags=re.DOTALL)  # noqa: B023
    return text


def main() -> None:
    README.write_text(rewritten(README.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
