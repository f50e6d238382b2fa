"""The offline setting: completions and their scores come from a file in place of the sampler.

Everything after that is the same. The policy that wrote them is not known: with one update a batch the ratio is 1.
"""

from src.config import TrainingConfig
from src.packing import Episode, Group
from src.rl_datasets import Problem


def given_groups(problems: list[Problem], tokenizer, eos_ids: tuple[int, ...], training: TrainingConfig) -> list[Group]:
    """The completions of a file as if they had been sampled; those that are too long are left out."""
    limit = training.max_seq_length or training.max_prompt_len + training.max_gen_len
    end = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else eos_ids[0]
    groups = []
    for problem in problems:
        given = problem.reference["completions"]
        room = min(training.max_gen_len, limit - len(problem.prompt_ids))
        rows = tokenizer([item["text"] for item in given], add_special_tokens=False).input_ids
        best = max(item["score"] for item in given)
        episodes = [
            Episode((*row, end), (0.0,) * (len(row) + 1), True, item["text"], float(item["score"]),
                    {"reward": float(item["score"]), "answer": float(item["score"] == best)})
            for row, item in zip(rows, given, strict=True)
            if len(row) < room
        ]  # fmt: skip
        groups.append(Group(problem, tuple(episodes)))
    return groups
