"""Writes configs/README.md (every key of src/config.py) and benchmarks/MEMORY.md (the plan of src/engine/plan.py)."""

import copy
from dataclasses import MISSING, Field, fields
from pathlib import Path
from types import SimpleNamespace, UnionType
from typing import Any, cast, get_args, get_origin
from unittest.mock import patch

import torch
from transformers import AutoModelForCausalLM

from benchmarks.rollout import SHAPES
from src.config import SECTIONS, SEED_FORMAT_KEYS, Config, known_penalties, load_config
from src.engine import lighter
from src.engine.plan import memory_plan, peak_of

PROJECT = Path(__file__).resolve().parent.parent
BOUNDS = {"minimum": "at least", "above": "above", "maximum": "at most", "below": "below"}
SHIPPED = (("0.5b", "qwen2.5-0.5b", "0.5b"), ("1.5b", "1.5b", "3b"), ("3b", "3b", "3b"), ("7b", "7b", "7b"))
COLUMNS = {  # of the table, and what the plan calls them
    "weights": "weights", "optimizer states": "optimizer", "gradients": "gradients", "reference": "reference",
    "rollout cache": "rollout", "activations": "update",
}  # fmt: skip

GRPO_MINI = {
    "model": "pretrained_model_path device dtype",
    "training": "random_seed max_prompt_len max_gen_len batch_size num_questions_per_batch micro_batch_size "
    "max_grad_norm learning_rate weight_decay betas inference_batch_size skip_unfinished_episodes ckpt_save_interval "
    "eval_interval memory_efficient_adamw loss_type beta kl_target ot_target ot_window",
}

CONFIG_PAGE = """# Config files

Made by `python -m benchmarks.tables` from `src/config.py`; change it there.

A file has the sections below, each with `key: value` lines in YAML; what it does not give has its default.
`--set training.learning_rate=1e-4 training.beta=0` overrides keys for one run and may be repeated. The config as
resolved is saved in the run's folder, and is a config file itself. An unknown key (with a suggestion), a wrong type and
a value out of range are errors, before a model is loaded. So is a key that nothing reads with this `loss_type`: a
setting without an effect is usually a mistake.

Files of GRPO-mini load unmodified. Its keys:

{seed_format}

All of its files carry {seed_keys}, so these are no error where nothing reads them.

A file may name another as its `base`, beside it or by a path from it: then it gives only in what it differs. What a
base says for all may be unread in one of them; a base has no base. `recipes/` holds one file for each published method,
whose first line names the paper; all name `grpo.yaml`. They train the embedded model; for another give, beside its
path, what depends on it, for Qwen2.5-0.5B for instance `--set model.pretrained_model_path=Qwen/Qwen2.5-0.5B-Instruct
model.dtype=bfloat16 training.max_prompt_len=256 training.max_gen_len=1024 training.batch_size=256
training.num_questions_per_batch=16 training.minibatches=1 training.learning_rate=1e-6 training.betas=[0.9,0.999]
data.number_max=99 data.num_numbers=[3,4]`. The clip of `gspo.yaml` and the buffer of `dapo.yaml` go with the length.

| folder | for |
|---|---|
| `recipes` | one published method a file, on the embedded model |
| `configs_tiny`, `configs_lora` | the embedded model, one file a loss type, otherwise the same; with adapters |
| `configs_gym` | a small pretrained model on a family of reasoning-gym, on a CPU |
| `configs_0.5b`, `configs_3b`, `configs_7b` | Qwen2.5-Instruct of that size on a CUDA GPU |
| `configs_0.5b_ot`, `configs_3b_ot`, `configs_7b_ot` | the same with Sinkhorn OT in several windows |

The GPU configs parse, and are tested for that; they have not been run on a GPU yet.

{sections}"""

MEMORY_PAGE = """# Memory

Made by `python -m benchmarks.tables`. Full fine-tuning in bf16 with the shipped settings and `loss_type: kl`, GiB on
one GPU. **Computed, not measured**: the plan of `src/engine/plan.py`, which `--check` prints too, for the shapes of
Qwen2.5.

{table}

The rollout cache is alive without gradients and activations, and the reverse, so the last column is less than the sum.
Activations are those of a micro-batch, with the largest chunk of logits. The optimizer states are those of
`memory_efficient_adamw` (24-bit masters, 8-bit moments). There is no config for 1.5b: it is computed with that of 3b.
`configs_0.5b` keeps all activations; the larger ones have `gradient_checkpointing: true`. What the allocator itself
loses is not in the plan. Less of it: `reference_offload: true` keeps the reference in host memory and brings its layers
to the GPU one by one, `offload: true` keeps the optimizer's states there.
"""


def values_of(item: Field) -> str:
    """What a key may be: its choices, or its type and range."""
    if "choices" in item.metadata:
        return ", ".join(f"`{choice}`" for choice in item.metadata["choices"])
    if item.name == "loss_type":
        return ", ".join(f"`{name}`" for name in known_penalties()) + ", or a mapping of these to weights"
    wanted = cast(Any, get_args(item.type)[0] if isinstance(item.type, UnionType) else item.type)
    origin = get_origin(wanted)
    name = f"list of {get_args(wanted)[0].__name__}" if origin is list else (origin or wanted).__name__
    bounds = [f"{word} {item.metadata[rule]}" for rule, word in BOUNDS.items() if rule in item.metadata]
    return ", ".join([name, *bounds])


def readers_of(item: Field) -> str:
    """The loss types that read a key, where only some do."""
    known = known_penalties()
    readers = [f"`{name}`" for name, declared in known.items() if item.name in declared.reads]
    with_policy_term = [f"`{name}`" for name, declared in known.items() if not declared.objective]
    if item.metadata.get("policy"):
        readers = [*with_policy_term, "`maxent` (clipped)"]
    elif item.metadata.get("advantages"):
        readers = with_policy_term
    return ", ".join(readers)


def default_of(item: Field) -> str:
    """As it is written in YAML."""
    value = item.default_factory() if item.default_factory is not MISSING else item.default
    return "(empty)" if value is None else f"`{str(value).lower() if isinstance(value, bool) else value}`"


def keys_table(section: str) -> str:
    """One section of src/config.py."""
    columns = {
        "key": lambda item: f"`{item.name}`",
        "default": default_of,
        "values": values_of,
        "meaning": lambda item: item.metadata["doc"],
        "only for loss type": readers_of,
    }
    items = fields(SECTIONS[section])
    if not any(map(readers_of, items)):
        del columns["only for loss type"]
    return markdown([list(columns)] + [[column(item) for column in columns.values()] for item in items])


def markdown(rows: list[list[str]]) -> str:
    """A table; the first row is its head."""
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    return "\n".join([lines[0], "|---" * len(rows[0]) + "|", *lines[1:]])


def config_page() -> str:
    """configs/README.md."""
    sections = [
        f"## `{name}`\n\n{' '.join((keys.__doc__ or '').split())}\n\n{keys_table(name)}\n"
        for name, keys in SECTIONS.items()
    ]
    seed_format = [f"- `{name}`: " + ", ".join(f"`{key}`" for key in keys.split()) for name, keys in GRPO_MINI.items()]
    return CONFIG_PAGE.format(
        seed_format="\n".join(seed_format),
        seed_keys=", ".join(f"`{name}`" for name in sorted(SEED_FORMAT_KEYS)),
        sections="\n".join(sections),
    )


def plan_of(shape: str, folder: str) -> dict[str, int]:
    """The memory plan for a shape of weights that are never allocated, with a shipped config."""
    (file,) = (PROJECT / "configs" / f"configs_{folder}").glob("config_kl_*.yaml")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(copy.deepcopy(SHAPES[shape]), dtype=torch.bfloat16)
    with patch.object(lighter, "gives_the_same", lambda *_: True):  # as on a GPU; without weights nothing can be tried
        lighter.lighten(model)
    on_cuda = SimpleNamespace(
        parameters=model.parameters, modules=model.modules, config=model.config, dtype=model.dtype,
        device=torch.device("cuda"),
    )  # fmt: skip
    config: Config = load_config(file)
    return memory_plan(config, on_cuda, model)


def memory_page() -> str:
    """benchmarks/MEMORY.md: GiB by purpose and size of model."""
    rows = [["model", "config", *COLUMNS, "at most at once"]]
    for name, shape, folder in SHIPPED:
        plan = plan_of(shape, folder)
        sizes = [f"{size / 2**30:.1f}" for size in (*(plan[purpose] for purpose in COLUMNS.values()), peak_of(plan))]
        rows.append([name, f"`configs_{folder}`", *sizes])
    return MEMORY_PAGE.format(table=markdown(rows))


PAGES = {"configs/README.md": config_page, "benchmarks/MEMORY.md": memory_page}


def main(folder: Path = PROJECT) -> None:
    for name, page in PAGES.items():
        (folder / name).write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()
