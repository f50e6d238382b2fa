"""configs/README.md, benchmarks/MEMORY.md and benchmarks/FLEET.md say what code and arithmetic say."""

import re
from pathlib import Path

import pytest

from benchmarks import tables
from src.config import SECTIONS, SEED_FORMAT_KEYS

PROJECT = Path(__file__).resolve().parent.parent


def test_the_pages_of_keys_and_memory_are_what_the_code_says(tmp_path):
    for folder in ("configs", "benchmarks"):
        (tmp_path / folder).mkdir()
    tables.main(tmp_path)
    for page in tables.PAGES:
        new, old = ((folder / page).read_text(encoding="utf-8") for folder in (tmp_path, PROJECT))
        assert new == old, f"{page} is old; `python -m benchmarks.tables` writes it"


def test_every_key_has_a_row_with_its_default_and_choices():
    page = (PROJECT / "configs" / "README.md").read_text(encoding="utf-8")
    for section, keys in SECTIONS.items():
        table = page.split(f"\n## `{section}`\n")[1].split("\n## ")[0]
        rows = [line.split(" | ") for line in table.splitlines() if line.startswith("| `")]
        assert [row[0] for row in rows] == [f"| `{name}`" for name in keys.__dataclass_fields__]
        for row, default in zip(rows, vars(keys()).values(), strict=True):
            written = row[1].strip("`").lower()
            assert written == ("(empty)" if default is None else str(default).lower()), row
    for row in (
        "`max_gen_len` | `1024` | int, at least 1 | Longest completion in tokens. |  |",
        "`delta` | (empty) | float, above 1 | Upper bound of the ratio also where the advantage is negative (two-sided "
        "clip, INTELLECT-2); empty: none. | `none`, `kl`, `approx_kl`, `kl_in_reward`, `ot`, `maxent` (clipped) |",
    ):
        assert f"\n| {row}\n" in page
    assert set(SEED_FORMAT_KEYS) <= set(tables.GRPO_MINI["training"].split())
    for section, names in tables.GRPO_MINI.items():
        assert set(names.split()) <= set(SECTIONS[section].__dataclass_fields__)


def test_the_memory_table_against_arithmetic():
    """Weights, gradients, optimizer states and key-value cache of Qwen2.5, counted by hand from its shapes."""
    shapes = {  # vocabulary, hidden, MLP, layers, width of keys and values, tied head
        "0.5b": (151936, 896, 4864, 24, 2 * 64, True),
        "1.5b": (151936, 1536, 8960, 28, 2 * 128, True),
        "3b": (151936, 2048, 11008, 36, 2 * 128, True),
        "7b": (152064, 3584, 18944, 28, 4 * 128, False),
    }
    page = (PROJECT / "benchmarks" / "MEMORY.md").read_text(encoding="utf-8")
    rows = dict(line.strip("| ").split(" | ", 1) for line in page.splitlines() if "| `configs_" in line)
    assert set(rows) == set(shapes)
    for name, (vocabulary, hidden, mlp, layers, narrow, tied) in shapes.items():
        attention = 2 * hidden * hidden + hidden + 2 * (hidden * narrow + narrow)  # q, o, k, v; no bias in o
        layer = attention + 3 * hidden * mlp + 2 * hidden
        parameters = (1 if tied else 2) * vocabulary * hidden + layers * layer + hidden
        weights, optimizer, gradients, reference, rollout, update, total = map(float, rows[name].split(" | ")[1:])
        for cell, size in ((weights, 2), (gradients, 2), (reference, 2), (optimizer, 3)):
            assert cell == pytest.approx(size * parameters / 2**30, abs=0.051)
        slots = 128 if name == "7b" else 256
        # a slot holds its prompt and its completion, and each prompt is there once more; two sets of fp32 logits, twice
        cached = 2 * 2 * layers * narrow * (slots * (256 + 1024) + slots // 16 * 256)
        assert rollout == pytest.approx((cached + 16 * slots * vocabulary) / 2**30, abs=0.051)
        assert total == pytest.approx(weights + optimizer + reference + max(rollout, gradients + update), abs=0.3)
    assert tables.plan_of("3b", "3b")["weights"] == 2 * 3_085_938_688  # what the model card counts, in bf16


def test_the_arithmetic_of_the_plan_for_a_fleet():
    page = (PROJECT / "benchmarks" / "FLEET.md").read_text(encoding="utf-8")
    table = page.split("| 128 prompts x 16 completions x 4,096 tokens a step |")[1].split("\n\n")[0]
    cells = [row.split("|")[2:4] for row in table.splitlines()[2:]]
    tokens = 128 * 16 * 4096
    models = ((7.6e9, 8, 57e3, 1, 8), (70.6e9, 64, 328e3, 8, 8))  # parameters, GPUs, cache, GPUs a server, servers
    for column, (parameters, gpus, cache, wide, servers) in enumerate(models):
        read = 2 * parameters / (3.35e12 * wide)
        attend = 256 * 2048 * cache / (3.35e12 * wide)
        expected = [
            [2 * parameters / 1e9], [2 * parameters / 12.5e9, 2 * parameters / 0.125e9],
            [7 * parameters / 1e9], [8 * tokens / 1e9],
            [8 * parameters * tokens / (gpus * 400e12), gpus],
            [1e3 * read, wide], [1e3 * attend, wide],
            [tokens * (read + attend) / 256 / servers, wide * servers],
        ]  # fmt: skip
        for row, numbers in zip(cells, expected, strict=True):
            said = [float(number) for number in re.findall(r"[\d.]+(?= (?:GB|s|ms|GPU))", row[column])]
            assert said == pytest.approx(numbers, rel=0.05), row
