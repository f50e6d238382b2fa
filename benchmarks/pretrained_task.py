"""The task of benchmarks/pretrained.py: sums of two numbers from 1 to 99, behind two that are solved."""

import random
import re

from src.rl_datasets import split_of
from src.tasks import Task

NUMBER = re.compile(r"-?\d+")


class Sums(Task):
    """All 9,801 of them; the same two numbers, in whatever order, are in one split."""

    system_prompt = "What is 3 + 14?\nAnswer: 17\n\nWhat is 47 + 38?\nAnswer: 85"
    user_prompt = "What is {question}?"
    eval_is_generated = True

    def load(self, split):
        """In an order that depends on the split alone."""
        numbers = [(a, b) for a in range(1, 100) for b in range(1, 100) if split_of([a, b]) == split]
        random.Random(f"sums {split}").shuffle(numbers)
        rows = [{"question": f"{a} + {b}", "answer": str(a + b)} for a, b in numbers]
        return rows if split == self.data.train_split else rows[: self.data.eval_size]

    def answer_of(self, text):
        """What is voted on: the last number."""
        return (NUMBER.findall(text.replace(",", "")) or [None])[-1]

    def reward(self, text, row):
        """1 for the number and nothing else; beside it, unrewarded: whether a number is all, and the last one right."""
        alone = NUMBER.fullmatch(text.strip()) is not None
        lenient = self.answer_of(text) == row["answer"]
        strict = float(alone and lenient)
        return {"reward": strict, "answer": strict, "lenient": float(lenient), "format": float(alone)}
