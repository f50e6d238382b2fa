"""Countdown with a second attempt: whoever is wrong hears why, and tries again.

python main.py --config examples/second_attempt.yaml --dataset_name second_attempt
"""

from src.rl_datasets import Countdown
from src.tasks import ExpressionError, evaluate_expression, last_answer


class SecondAttempt(Countdown):
    """The last attempt counts."""

    def reward(self, text, row):
        """The reward of the last turn, and whether the first was right."""
        attempts = [Countdown.reward(self, turn, row) for turn in text.turns]
        return attempts[-1] | {"first_attempt": attempts[0]["answer"]}

    def reply(self, text, row, turn):
        """What is wrong with the latest attempt; None when nothing is."""
        answer = last_answer(text.turns[-1])
        try:
            value, numbers = evaluate_expression(answer or "")
        except ExpressionError:
            return "That is no expression. Try again."
        if sorted(numbers) != sorted(row["nums"]):
            return f"Use each of {' '.join(map(str, row['nums']))} once. Try again."
        return None if value == row["target"] else f"{value} is not {row['target']}. Try again."
