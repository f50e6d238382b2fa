"""The offline setting: completions and their scores come from a file in place of the sampler.

Everything after that is the same. The policy that wrote them is not known: with one update a batch the ratio is 1.
"""

import logging

from src.config import ConfigError
from src.packing import Episode, Group
from src.prepare import Run
from src.rl_datasets import Problem

logger = logging.getLogger("grpo")


def given_groups(run: Run, problems: list[Problem]) -> list[Group]:
    """The completions and scores of a file in place of sampled ones; one that is too long is left out."""
    training = run.config.training
    limit = training.max_seq_length or training.max_prompt_len + training.max_gen_len
    end = run.tokenizer.eos_token_id if run.tokenizer.eos_token_id is not None else run.eos_ids[0]
    groups, left_out = [], 0
    for problem in problems:
        given = problem.reference["completions"]
        room = min(training.max_gen_len, limit - len(problem.prompt_ids))
        rows = run.tokenizer([item["text"] for item in given], add_special_tokens=False).input_ids
        best = max(item["score"] for item in given)
        episodes = [
            Episode((*row, end), (0.0,) * (len(row) + 1), True, item["text"], float(item["score"]),
                    {"reward": float(item["score"]), "answer": float(item["score"] == best)})
            for row, item in zip(rows, given, strict=True)
            if len(row) < room
        ]  # fmt: skip
        left_out += len(given) - len(episodes)
        if episodes:
            groups.append(Group(problem, tuple(episodes)))
    if not groups:
        raise ConfigError("every completion of this step is longer than max_gen_len or max_seq_length; raise them")
    if left_out:
        logger.warning(f"{left_out} completions are longer than max_gen_len or max_seq_length: left out")
    return groups
