"""A guessing game: find a number within data.max_turns guesses, each answered by higher or lower.

python main.py --config examples/higher_lower.yaml --dataset_name higher_lower
"""

import random

from src.rl_datasets import split_of
from src.tasks import Task, last_answer

NUMBERS = 31  # five guesses find one of so many


def guess_of(turn):
    """The number in a turn, or None."""
    answer = (last_answer(turn) or "").strip()
    return int(answer) if answer.isascii() and answer.isdecimal() and len(answer) < 9 else None


class HigherLower(Task):
    """No range of numbers is in two splits."""

    system_prompt = response_prefix = ""
    user_prompt = "I think of a number from {low} to {high}. Guess it, in <answer> </answer>."
    eval_is_generated = True

    def load(self, split):
        """All numbers of all ranges within 1 to 99, in an order that depends on data.seed alone."""
        of_split = [low for low in range(1, 101 - NUMBERS) if split_of([low]) == split]
        rows = [{"low": n, "high": n + NUMBERS - 1, "secret": n + more} for n in of_split for more in range(NUMBERS)]
        random.Random(self.data.seed).shuffle(rows)
        return rows if split == self.data.train_split else rows[: self.data.eval_size]

    def reward(self, text, row):
        """1 for the number."""
        return float(guess_of(text.turns[-1]) == row["secret"])

    def reply(self, text, row, turn):
        """Where the number is, seen from the guess; None when it was found, and where there was no guess."""
        guess = guess_of(text.turns[-1])
        if guess is None or guess == row["secret"]:
            return None
        return "higher" if guess < row["secret"] else "lower"
