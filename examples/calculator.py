"""A tool: the policy may write <tool>12 * 34</tool>, and reads what it is before it answers.

python main.py --config examples/calculator.yaml --dataset_name calculator
"""

import random
import re

from src.rl_datasets import split_of
from src.tasks import SPLITS, ExpressionError, Task, evaluate_expression, final_answer, number_is_correct

CALL = re.compile(r"<tool>([^<>]*)</tool>\s*\Z")


class Calculator(Task):
    """Products and sums of two-digit numbers, too many to know by heart. No numbers are in two splits."""

    system_prompt = response_prefix = ""
    user_prompt = (
        "What is {question}? To calculate, end with <tool>an expression</tool> and read its value. "
        "Give the result in <answer> </answer>."
    )
    eval_is_generated = True
    reply_role = "tool"

    def load(self, split):
        """data.train_size or data.eval_size rows, a function of data.seed."""
        size = self.data.train_size if split == self.data.train_split else self.data.eval_size or 256
        generator = random.Random(f"calculator {split} {self.data.seed}")
        rows = []
        while len(rows) < size * (split in SPLITS):
            numbers = [generator.randint(2, 99) for _ in range(3)]
            if split_of(numbers) == split:
                a, b, c = numbers
                rows.append({"question": f"{a} * {b} + {c}", "answer": str(a * b + c)})
        return rows

    def reward(self, text, row):
        """1 for the right number in the last turn."""
        answer = final_answer(text.turns[-1])
        return float(answer is not None and number_is_correct(answer, row["answer"]))

    def reply(self, text, row, turn):
        """The value of a call, by the grammar of Countdown: nothing is executed. None where there is no call."""
        call = CALL.search(text.turns[-1])
        if call is None:
            return None
        try:
            return str(evaluate_expression(call[1])[0])
        except ExpressionError as error:
            return f"error: {error}"
