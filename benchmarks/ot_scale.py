"""KL against OT: how many nats a token is a policy from its reference where the penalty `ot` reads 0.005, or 0.05?

    python -m benchmarks.ot_scale                    # the embedded model, 4 minutes on a core
    python -m benchmarks.ot_scale --model FOLDER     # an instruct model in Hugging Face format
    python -m benchmarks.ot_scale --quick            # seconds: only shows that it runs

A policy leaves the reference in two ways. `noise`: Gaussian, in each tensor that many times its root mean square.
`steps`: it is trained on Countdown without a penalty. At each distance the policy answers held-out problems, and on
these answers it is measured: exact reverse KL, mean over tokens; OT as the penalty computes it, mean over completions;
the share of completions beyond the target that the configs ship; and the raw cost, <P, 1 - cos> of the undebiased plan
without taper, which is what GRPO-mini's target was for. The first row of a table is the reference itself. The last line
of stdout is one JSON document.
"""

import argparse
import json
import math
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path

import src  # noqa: F401  before torch: how its threads wait

# isort: split
import torch
from torch import Tensor

from benchmarks.rollout import machine
from src.config import load_config
from src.penalties import OT_ITERATIONS, PENALTIES
from src.prepare import prepare
from src.records import Batch, Scores
from src.sinkhorn import transport_plan
from src.train_grpo import train_step

PROJECT = Path(__file__).resolve().parent.parent
EMBEDDED = str(PROJECT / "models" / "countdown-tiny")
CONFIG = PROJECT / "configs" / "configs_tiny" / "config_none_tiny.yaml"
WINDOWS, EPS = (8, 16), 0.1
SHIPPED, ORIGINAL = 0.005, 0.05  # ot_target of configs/configs_*_ot, and of GRPO-mini
SCALES, STEPS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2), (1, 2, 5, 10, 20, 50, 100)
EXAMPLES = """You solve number puzzles in this form. Puzzle: numbers [4, 7], target 11. Solution: <think> 4 + 7 = 11 \
</think> <answer> 4 + 7 </answer> Puzzle: numbers [9, 2, 3], target 14. Solution: <think> 9 + 2 + 3 = 14 </think> \
<answer> 9 + 2 + 3 </answer>"""
# an instruct model that was not made for the task: easier problems with examples of the form, few of them, and bf16
INSTRUCT_SCALES, INSTRUCT_STEPS = (0.02, 0.05, 0.1), (2, 4, 8)
INSTRUCT = [
    "model.dtype=bfloat16", "training.memory_efficient_adamw=true",
    "data.num_numbers=[2, 3]", "data.number_max=10", "data.target_max=50", "data.response_prefix=<think>",
    f"data.system_prompt={json.dumps(EXAMPLES)}", "data.eval_size=6", "training.stop_strings=[</answer>]",
    "training.max_prompt_len=260", "training.max_gen_len=40", "training.batch_size=16", "training.minibatches=1",
    "training.num_questions_per_batch=4", "training.max_tokens_per_microbatch=4096", "training.learning_rate=3e-5",
    "training.warmup_steps=0",
]  # fmt: skip
QUICK = ["data.eval_size=8", "data.train_size=16", "training.batch_size=16", "training.num_questions_per_batch=8",
         "training.max_gen_len=24"]  # fmt: skip


def raw_cost(scores: Scores, batch: Batch) -> Tensor:
    """What transport itself costs [E]: not zero at equality, for entropy spreads a token over its neighbours."""
    costs = []
    paths = (path.split(batch.lengths.tolist()) for path in (scores.hidden, scores.anchor_hidden))
    for policy, anchor in zip(*paths, strict=True):  # [tokens, hidden] each
        plan = transport_plan(policy, anchor, window=WINDOWS[0], eps=EPS, iterations=OT_ITERATIONS)  # [tokens, tokens]
        cosine = torch.nn.functional.normalize(policy, dim=1) @ torch.nn.functional.normalize(anchor, dim=1).T
        costs.append((plan * (1 - cosine)).sum())
    return torch.stack(costs)


def distances(training, scores: Scores, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    """In place of an objective: nothing to differentiate, and what is to be averaged, [N] or [E]."""
    values = {"kl": scores.distances["kl"]}  # [N]
    for window in WINDOWS:
        options = replace(training, ot_window=window, ot_eps=EPS, ot_target=SHIPPED)
        found = PENALTIES["ot"](scores, batch, options)[1]  # [E] each
        values |= {f"ot_w{window}": found["train/ot"], f"beyond_w{window}": found["train/beyond_target/ot"]}
    return torch.zeros(()), values | {"raw_cost": raw_cost(scores, batch)}


def measure(run, samples: int) -> dict[str, float]:
    """The policy as it is against the reference, on its own answers to the held-out problems."""
    groups = run.sample(run.eval_problems, samples, stream=-1)
    measured = run.engine.forward_backward(  # idle: measured as in training, and without a gradient
        [], partial(distances, run.config.training), anchor=True, distances={"kl": "reverse"}, idle=groups
    )
    return measured.means()


@torch.no_grad()
def disturb(policy, reference, scale: float) -> None:
    """The reference's weights plus noise, always in the same direction."""
    generator = torch.Generator().manual_seed(0)
    for weight, start in zip(policy.parameters(), reference.parameters(), strict=True):
        noise = torch.randn(start.shape, generator=generator).to(start)
        weight.copy_(start + scale * start.square().mean().sqrt() * noise)


def disturbed(run, scales: tuple[float, ...]) -> Iterator[float]:
    for scale in (0.0, *scales):
        disturb(run.engine.model, run.engine.anchor, scale)
        yield scale


def trained(run, steps: tuple[int, ...]) -> Iterator[int]:
    disturb(run.engine.model, run.engine.anchor, 0.0)
    for step in range(max(steps) + 1):
        if step > 0:
            run.engine.begin(step)
            train_step(run, step)
        if step in (0, *steps):
            yield step


def kl_where(rows: list[dict], name: str, distance: float) -> float | None:
    """The KL at which a column first reaches a distance, between two rows on a line of logarithms; None: never."""
    rows = [row for row in rows if row["kl"] > 0 and row[name] > 0]
    for low, high in pairwise(rows):
        if low[name] <= distance <= high[name] and low[name] < high[name]:
            share = math.log(distance / low[name]) / math.log(high[name] / low[name])
            return low["kl"] * (high["kl"] / low["kl"]) ** share
    return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=EMBEDDED, help="a local folder; the embedded model if left out")
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    embedded = options.model == EMBEDDED
    (scales, steps), samples = (SCALES, STEPS) if embedded else (INSTRUCT_SCALES, INSTRUCT_STEPS), 4
    overrides = [f"model.pretrained_model_path={options.model}", "training.eval_interval=0"]
    overrides += ["data.eval_size=256"] if embedded else INSTRUCT
    if options.quick:
        scales, steps, samples, overrides = scales[-3::2], (1,), 2, overrides + QUICK
    run = prepare(load_config(CONFIG, overrides), "countdown", fresh=True)  # nothing is written
    result = {"model": Path(options.model).name, "machine": machine(), "temperature": run.config.training.temperature,
              "learning_rate": run.config.training.learning_rate, "rows": {}, "kl_where": {}}  # fmt: skip
    for way, places in (("steps", trained(run, steps)), ("noise", disturbed(run, scales))):
        rows = result["rows"][way] = []
        print(f"\n| {way} | KL, nats a token | OT, window 8 | beyond {SHIPPED} | OT, window 16 | beyond {SHIPPED} "
              "| raw cost, window 8 |\n|---|---|---|---|---|---|---|")  # fmt: skip
        for place in places:
            found = measure(run, samples)
            rows.append({way: place} | found)
            cells = [f"{found['kl']:.4f}", *(cell for window in WINDOWS for cell in
                     (f"{found[f'ot_w{window}']:.4f}", f"{found[f'beyond_w{window}']:.0%}"))]  # fmt: skip
            print(f"| {place} | {' | '.join(cells)} | {found['raw_cost']:.4f} |", flush=True)
        result["kl_where"][way] = {
            f"ot_w{window} {distance}": kl_where(rows, f"ot_w{window}", distance)
            for window in WINDOWS for distance in (SHIPPED, ORIGINAL)
        }  # fmt: skip
    print("\nKL at which OT reaches " + f"{SHIPPED} and {ORIGINAL} (None: not within the table):")
    for way, found in result["kl_where"].items():
        print(f"- {way}: " + ", ".join(f"{name}: {kl and round(kl, 4)}" for name, kl in found.items()))
    print(json.dumps(result))


if __name__ == "__main__":
    main()
