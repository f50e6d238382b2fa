"""What model.fp32_head is worth and costs: log-probs of sampler and trainer with and without it, and seconds, in turn.

    uv run python -m benchmarks.fp32_head --model PATH    # bf16; 135M parameters on a busy CPU: half an hour
    uv run python -m benchmarks.fp32_head --quick         # seconds, the embedded model: only shows that it runs

Each contestant samples completions of Countdown prompts, scores its own, and computes the gradient of the exact KL to
the reference and of the policy loss (random advantages) for the first --update_prompts groups. Numbers of tokens
differ, so times are compared as seconds for 1000 tokens that the policy wrote. `step` is rollout and update: with
several updates a rollout there is a scoring too. On a machine that others use take --processor with OMP_NUM_THREADS=1:
seconds of the processor, which waiting does not lengthen. A ratio is trainer / sampler probability of a token;
`outside` is the share of those out of 0.8 to 1.2. The last line of stdout is one JSON document.
"""

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import src  # noqa: F401  before torch: how its threads wait

# isort: split
import torch

from benchmarks.rollout import machine
from src.config import load_config
from src.prepare import prepare
from src.records import Group
from src.run import Run
from src.train_grpo import objective, wanted, with_loss_weights

PROJECT = Path(__file__).resolve().parent.parent
CONFIG = PROJECT / "configs" / "configs_tiny" / "config_kl_beta0.04_tiny.yaml"
VERBS = ("rollout", "score", "forward_backward")


def make_run(options, fp32_head: bool) -> Run:
    """What prepare makes of the config, with the model in bf16."""
    overrides = {
        "model.pretrained_model_path": options.model,
        "model.dtype": "bfloat16",
        "model.fp32_head": str(fp32_head).lower(),
        "training.batch_size": options.prompts * options.samples,
        "training.num_questions_per_batch": options.prompts,
        "training.max_prompt_len": 512,
        "training.max_gen_len": options.new_tokens,
        "training.inference_batch_size": options.slots,
        "training.minibatches": 1,
        "training.micro_batch_size": options.samples,
        "data.train_size": 64,
        "data.eval_size": 1,
    }
    return prepare(load_config(CONFIG, [f"{name}={value}" for name, value in overrides.items()]), "countdown")


def with_random_advantages(groups: list[Group]) -> list[Group]:
    """As a reward would make them, that a model which solves nothing does not get."""
    generator = random.Random(0)
    return [
        replace(g, episodes=tuple(replace(e, advantages=(generator.gauss(0, 1),) * e.length) for e in g.episodes))
        for g in groups
    ]


def step_of(run: Run, options, stream: int) -> tuple[list[Group], dict[str, float]]:
    """Scored groups, and for each verb the seconds for 1000 tokens."""
    engine, training, seconds = run.engine, run.config.training, {}
    clock = time.process_time if options.processor else time.perf_counter
    engine.begin(stream)

    def timed(verb: str, function: Callable[[], Any], groups: list[Group] | None = None) -> Any:
        started = clock()
        result = function()
        elapsed = clock() - started
        tokens = sum(e.length for group in groups or result for e in group.episodes)
        seconds[verb] = 1000 * elapsed / tokens
        return result

    problems = run.train_problems[: options.prompts]
    groups = timed("rollout", lambda: engine.sample(problems, options.samples, stream=stream))
    groups = timed("score", lambda: engine.score(groups))
    part = with_loss_weights(with_random_advantages(groups[: options.update_prompts]), training)
    want = wanted(training, anchor=True)
    timed("forward_backward", lambda: engine.forward_backward(part, partial(objective, training), **want), part)
    engine.model.zero_grad(set_to_none=True)
    return groups, seconds


def mismatch(groups: list[Group]) -> dict[str, float]:
    """How far the trainer's log-probs are from those that were sampled with."""
    episodes = [episode for group in groups for episode in group.episodes]
    sampled = torch.tensor([value for e in episodes for value in e.logprobs], dtype=torch.float64)  # [N]
    trainer = torch.tensor([value for e in episodes for value in e.old_logprobs or ()], dtype=torch.float64)  # [N]
    difference = trainer - sampled  # [N]
    outside = (difference.exp() - 1).abs() > 0.2  # [N]
    return {
        "tokens": len(difference),
        "mean": float(difference.abs().mean()),
        "max": float(difference.abs().max()),
        "outside": float(outside.double().mean()),
    }


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="models/countdown-tiny", help="a folder in Hugging Face format")
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--new_tokens", type=int, default=128)
    parser.add_argument("--slots", type=int, default=32)
    parser.add_argument("--update_prompts", type=int, default=4)
    parser.add_argument("--repetitions", type=int, default=2)
    parser.add_argument("--processor", action="store_true", help="seconds of the processor, not of the clock")
    parser.add_argument("--quick", action="store_true", help="the embedded model and small sizes")
    options = parser.parse_args()
    if options.quick:
        small = {"model": "models/countdown-tiny", "prompts": 2, "samples": 4, "new_tokens": 16, "slots": 8,
                 "update_prompts": 1, "repetitions": 1}  # fmt: skip
        vars(options).update(small)
    return options


def main() -> None:
    options = parse_arguments()
    runs = {"bf16": make_run(options, False), "fp32_head": make_run(options, True)}
    groups: dict[str, list[Group]] = {name: [] for name in runs}
    seconds: dict[str, list[dict[str, float]]] = {name: [] for name in runs}
    small = argparse.Namespace(prompts=1, samples=2, update_prompts=1, processor=False)
    for run in runs.values():  # the first call touches memory
        step_of(run, small, 0)
    for repetition in range(options.repetitions):
        for name, run in runs.items():
            found, times = step_of(run, options, 1 + repetition)
            groups[name] += found
            seconds[name].append(times | {"step": times["rollout"] + times["forward_backward"]})
            print(
                f"  {name:9} " + "  ".join(f"{verb} {value:.2f}" for verb, value in seconds[name][-1].items()),
                flush=True,
            )
    medians = {
        name: {verb: statistics.median(times[verb] for times in rows) for verb in (*VERBS, "step")}
        for name, rows in seconds.items()
    }
    measured = {name: mismatch(found) for name, found in groups.items()}
    cost = {verb: medians["fp32_head"][verb] / medians["bf16"][verb] - 1 for verb in (*VERBS, "step")}
    print("| head | mean | max | outside 0.8..1.2 | " + " | ".join((*VERBS, "step")) + " |\n" + "|---" * 8 + "|")
    for name, found in measured.items():
        times = " | ".join(f"{medians[name][verb]:.2f}" for verb in (*VERBS, "step"))
        print(f"| {name} | {found['mean']:.4f} | {found['max']:.2f} | {found['outside']:.2%} | {times} |")
    result = {"options": vars(options), **machine(), "mismatch": measured, "seconds": seconds, "median": medians}
    print(json.dumps(result | {"cost": cost}))


if __name__ == "__main__":
    main()
