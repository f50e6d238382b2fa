"""The update against the same update without prefix sharing and packing, and the memory of scoring at two vocabularies.

    uv run python -m benchmarks.update --shape smollm2-135m     # on a CPU: about 5 minutes
    uv run python -m benchmarks.update --shape tiny --quick     # seconds: only shows that it runs

Both contestants are src.train_grpo.update on the same groups, with the same micro-batches, head, loss and optimizer.
The forward pass of `padded` is that of transformers: a row for each completion with its prompt before it, padded to
the longest, and torch's attention. Advantages are random, every completion has --new_tokens. benchmarks/step.py
compares with TRL. The last line of stdout is one JSON document.
"""

import copy
import json
import random
import statistics
import tempfile
import time
from pathlib import Path
from unittest.mock import patch

import src  # noqa: F401  before torch: how its threads wait

# isort: split
import torch
import transformers
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM, LlamaConfig

from benchmarks.rollout import machine
from benchmarks.step import make_model, make_run, parse_arguments, synchronize
from src import train_grpo
from src.engine import engine, scoring
from src.engine.attention import ATTENTION_NAME
from src.engine.packing import Pass, pack
from src.records import Episode, Group, Problem
from src.run import Run

SCORED_TOKENS, VOCABULARIES = 2048, (16384, 131072)


def make_groups(run: Run, options) -> list[Group]:
    """Completions of random tokens with random advantages."""
    generator = random.Random(0)
    vocabulary = run.engine.model.config.vocab_size

    def episode() -> Episode:
        ids = tuple(generator.randrange(1, vocabulary) for _ in range(options.new_tokens))
        return Episode(ids, (0.0,) * len(ids), True, "", advantages=(generator.gauss(0, 1),) * len(ids))

    problems = run.train_problems[: options.prompts]
    return [Group(problem, tuple(episode() for _ in range(options.samples))) for problem in problems]


class Padded:
    """Stands in for src.engine.scoring.hidden_states and remembers what was packed last."""

    def pack(self, pieces: list[Group], *arguments) -> Pass:
        self.rows = [piece.problem.prompt_ids + e.token_ids for piece in pieces for e in piece.episodes]
        self.prompts = [len(piece.problem.prompt_ids) for piece in pieces for _ in piece.episodes]
        return pack(pieces, *arguments)

    def hidden_states(self, model, row: Pass) -> Tensor:
        """Hidden states [N, hidden] from which the completion tokens are predicted."""
        width = max(map(len, self.rows))
        ids = torch.tensor([row + (0,) * (width - len(row)) for row in self.rows], device=model.device)  # [E, width]
        mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in self.rows], device=model.device)
        hidden = model.get_decoder()(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
        pairs = zip(hidden, self.rows, self.prompts, strict=True)
        return torch.cat([states[prompt - 1 : len(row) - 1] for states, row, prompt in pairs])


def time_updates(folder: Path, options) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Seconds of each update, contestants in turn, and their gradient norms at the first."""
    contestants = {"ours": make_run(folder, options), "padded": make_run(folder, options)}
    contestants["padded"].engine.model.set_attn_implementation("sdpa")
    groups = make_groups(contestants["ours"], options)
    padded = Padded()
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    norms: dict[str, float] = {}
    for repetition in range(options.repetitions + 1):  # the first one warms up
        for name, run in contestants.items():
            replaced = padded if name == "padded" else None
            with patch.object(engine, "pack", replaced.pack if replaced else pack), patch.object(
                scoring, "hidden_states", replaced.hidden_states if replaced else scoring.hidden_states
            ):  # fmt: skip
                synchronize(options.device)
                started = time.perf_counter()
                metrics = train_grpo.update(run, groups, 1)
                synchronize(options.device)
            if repetition:
                seconds[name].append(time.perf_counter() - started)
            else:
                norms[name] = metrics["train/grad_norm"]
            print(f"  {name:9} {time.perf_counter() - started:7.2f} s", flush=True)
    return seconds, norms


def peak_allocated(function) -> int:
    """Bytes that function() has allocated on the CPU beyond what there was, at most at a time."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        function()
    current = peak = 0
    for event in recorded.profiler.kineto_results.events():
        if event.name() == "[memory]":
            current += event.nbytes()
            peak = max(peak, current)
    return peak


def scoring_memory(vocabulary: int, tokens: int) -> dict[str, int]:
    """Peak of scoring `tokens` tokens, forward and backward, with a one-layer model of this vocabulary."""
    config = LlamaConfig(vocab_size=vocabulary, hidden_size=64, intermediate_size=64, num_hidden_layers=1,
                         num_attention_heads=1, num_key_value_heads=1)  # fmt: skip
    model = AutoModelForCausalLM.from_config(copy.deepcopy(config), attn_implementation=ATTENTION_NAME)
    episode = Episode((1,) * (tokens // 8), (0.0,) * (tokens // 8), True, "")
    row = pack([Group(Problem(0, (1,), "", {}), (episode,) * 8)], "cpu", torch.float32)
    peak = peak_allocated(lambda: scoring.score(model, row, 1.0).logprobs.sum().backward())
    gradients = sum(parameter.nbytes for parameter in model.parameters())
    return {"peak": peak, "of_it_gradients": gradients, "logits_in_fp32": 4 * tokens * vocabulary}


def main() -> None:
    options = parse_arguments(__doc__.splitlines()[0])
    transformers.logging.set_verbosity_error()
    result: dict = {"options": vars(options), **machine()}
    with tempfile.TemporaryDirectory() as folder:
        make_model(Path(folder), options)
        result["seconds"], result["grad_norm"] = time_updates(Path(folder), options)
    medians = {name: statistics.median(values) for name, values in result["seconds"].items()}
    result |= {"median": medians, "ours_over_padded": medians["ours"] / medians["padded"]}
    tokens = SCORED_TOKENS // 8 if options.quick else SCORED_TOKENS
    result["scoring_bytes"] = {size: scoring_memory(size, tokens) for size in VOCABULARIES}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
