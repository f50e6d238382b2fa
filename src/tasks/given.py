"""The offline setting: completions and their scores come from a file in place of the sampler.

Everything after that is the same. The policy that wrote them is not known: with one update a batch the ratio is 1.
"""

from typing import TYPE_CHECKING

from src.config import TrainingConfig

if TYPE_CHECKING:  # it imports torch, which this package does without
    from src.records import Group, Problem


def given_groups(
    problems: list["Problem"], tokenizer, eos_ids: tuple[int, ...], training: TrainingConfig
) -> list["Group"]:
    """The completions of a file as if they had been sampled; those that are too long are left out."""
    from src.records import Episode, Group

    limit = training.max_seq_length or training.max_prompt_len + training.max_gen_len
    end = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else eos_ids[0]
    groups = []
    for problem in problems:
        given = problem.row["completions"]
        room = min(training.max_gen_len, limit - len(problem.prompt_ids))
        rows = tokenizer([item["text"] for item in given], add_special_tokens=False).input_ids
        scores = [float(item["score"]) for item in given]
        episodes = tuple(
            Episode(
                token_ids=(*row, end),
                logprobs=(),  # no policy of ours sampled them
                finished=True,
                text=item["text"],
                reward=score,
                reward_parts={"reward": score, "answer": float(score == max(scores))},
            )
            for row, item, score in zip(rows, given, scores, strict=True)
            if len(row) < room
        )
        groups.append(Group(problem, episodes))
    return groups
