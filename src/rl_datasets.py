"""Tasks: where prompts come from, what the model is asked, and what an answer is worth.

A task is a class with three methods; TASKS names those of this file, `data.task_file` may hold more:

    load(split) -> list of rows (dicts)      messages(row) -> the chat that asks, [{"role": ..., "content": ...}, ...]
    reward(completion_text, row) -> {"reward": what is trained on, "answer": 1 if right else 0, any other part: number}

Optional: `__init__(self, data)`, which gets the DataConfig (afterwards every task has it as `self.data`); attributes
`system_prompt` and `response_prefix`; `answer_of(text) -> str | None`, the final answer as votes are counted;
`offline = True` where a group is not sampled but is row["completions"]. `class Mine(Task)` has all but `reward`.
`reply(text, row, turn) -> str | None` makes episodes of several turns: what the policy is told after its `turn`th, or
None, and the episode is over. Then `text`, here and in `reward`, is a Transcript: `text.turns` are the policy's own.
Nothing heavy is imported here before it is needed, so that `main.py --help` stays instant.
"""

import inspect
import json
import random
import sys
from dataclasses import dataclass
from typing import ClassVar

from src.config import ConfigError, DataConfig, suggest
from src.tasks import (
    GENERATED_EVAL_SIZE,
    GYM_PREFIX,
    MAX_DIGITS,
    SPLITS,
    ExpressionError,
    ReasoningGym,
    Task,
    check_chat,
    expression_is_correct,
    final_answer,
    graded,
    gsm8k_reference,
    in_user_code,
    is_text,
    last_answer,
    math_is_correct,
    math_reference,
    number_is_correct,
    own_tasks,
    parse_number,
    plain_expression,
    split_of_text,
    text_of,
)

MAX_ATTEMPTS = 20_000


# ---------------------------------------------------------------------------------------------------------------------
# Countdown: combine all the numbers, each once, to make the target
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Expression:
    """A random expression over some numbers: its value, its text, and each step as `left operator right = value`."""

    value: int
    text: str
    steps: tuple[str, ...]


def random_expression(generator: random.Random, numbers: list[int], limit: int, in_order: bool = False) -> Expression:
    """Join two random terms with a random operator until one is left; every step is an integer in 0..limit.

    `in_order` joins the first two terms each time: ((a . b) . c), the numbers in the order given.
    """
    while True:
        terms = [(number, str(number), "") for number in numbers]  # value, text, outermost operator
        steps: list[str] = []
        while len(terms) > 1:
            left, right = (0, 1) if in_order else generator.sample(range(len(terms)), 2)
            (a, text_a, operator_a), (b, text_b, operator_b) = terms[left], terms[right]
            operator = generator.choice("+-*/")
            if operator == "/" and (b == 0 or a % b):
                break
            value = {"+": a + b, "-": a - b, "*": a * b, "/": a // b if b else 0}[operator]
            if not 0 <= value <= limit:
                break
            if operator in "*/" and operator_a and operator_a in "+-":
                text_a = f"({text_a})"
            if (operator in "*/" and operator_b) or (operator == "-" and operator_b and operator_b in "+-"):
                text_b = f"({text_b})"
            steps.append(f"{a} {operator} {b} = {value}")
            rest = [term for position, term in enumerate(terms) if position not in (left, right)]
            terms = [(value, f"{text_a} {operator} {text_b}", operator), *rest]
        else:
            return Expression(terms[0][0], terms[0][1], tuple(steps))


def whole_number(value) -> int:
    """The number as an int, or a ValueError, TypeError or OverflowError."""
    if isinstance(value, bool) or float(value) != int(value):
        raise ValueError
    return int(value)


def split_of(numbers: list[int]) -> str:
    """Split a problem belongs to, by a hash of its multiset of numbers: no multiset is in two splits."""
    return split_of_text(" ".join(map(str, sorted(numbers))))


class Countdown(Task):
    """Numbers game: data.path (columns nums, target) or a seeded generator; no two splits share a multiset."""

    columns: ClassVar = {"prompt_column": ("nums",), "answer_column": ("target",)}
    user_prompt = (
        "Using the numbers {nums}, create an equation that equals {target}. "
        "You can use basic arithmetic operations (+, -, *, /) and each number can only be used once. "
        "Show your work in <think> </think> tags. And return the final answer in <answer> </answer> tags, "
        "for example <answer> (1 + 2) / 3 </answer>."
    )

    def side_of(self, row: dict) -> str:
        """Split of a row of a source that has only `train`, as Jiayi-Pan/Countdown-Tasks-3to4."""
        return split_of(row["nums"])

    def prepare(self, row: dict) -> dict:
        """The row with nums and target as whole numbers (in CSV a list is a text)."""
        try:
            nums = json.loads(row["nums"]) if isinstance(row["nums"], str) else row["nums"]
            nums, (target,) = [whole_number(number) for number in nums], [whole_number(row["target"])]
        except (TypeError, ValueError, OverflowError):
            nums, target = [], 0
        if len(nums) < 2 or not all(0 <= number < 10**MAX_DIGITS for number in nums):
            raise ConfigError(
                f"a problem has at least two whole numbers (nums) and a whole target, not {row['nums']!r:.80} and "
                f"{row['target']!r:.80}"
            )
        return {**row, "nums": nums, "target": target}

    @property
    def eval_is_generated(self) -> bool:
        """Whether evaluation problems are made to order, so that there is no split to take a part of."""
        return not self.data.path and not self.data.eval_path

    def load(self, split: str) -> list[dict]:
        """Rows {"nums": [...], "target": int} of a split; generated ones are the same for the same seed."""
        data = self.data
        if data.path or (data.eval_path and split != data.train_split):
            return super().load(split)
        if split not in SPLITS:
            raise ConfigError(
                f"data: countdown generates the splits {', '.join(SPLITS)}, not {split}; set data.train_split or "
                f"data.eval_split"
            )
        size = data.train_size if split == "train" else data.eval_size or GENERATED_EVAL_SIZE
        generator = random.Random(f"countdown {split} {data.seed}")
        limit = max(100, 2 * data.number_max)
        rows: list[dict] = []
        attempts = 0
        while len(rows) < size:
            attempts += 1
            if attempts > MAX_ATTEMPTS:  # since the last one found
                raise ConfigError(
                    f"data: {MAX_ATTEMPTS} attempts found no {split} problem of these num_numbers, "
                    f"number_max and target_max; raise number_max or target_max"
                )
            numbers = [generator.randint(1, data.number_max) for _ in range(generator.choice(data.num_numbers))]
            if split_of(numbers) != split:
                continue
            target = random_expression(generator, numbers, limit).value
            if 1 <= target <= data.target_max:
                rows.append({"nums": numbers, "target": target})
                attempts = 0
        return rows

    def reward(self, completion_text: str, reference: dict) -> dict[str, float]:
        """1 for an expression that uses each number exactly once and equals the target, plus 0.1 for the format.

        It may be one side of an equation, `1 + 2 = 3`, if what the other side says is true.
        """
        answer = last_answer(completion_text)
        correct = answer is not None and expression_is_correct(answer, reference["nums"], reference["target"])
        return graded(correct, completion_text)

    def answer_of(self, completion_text: str) -> str | None:
        """The expression in one spelling; an answer that is none stands for itself, without blanks."""
        answer = last_answer(completion_text)
        if answer is None:
            return None
        try:
            return plain_expression(answer)
        except ExpressionError:
            return "".join(answer.split())


# ---------------------------------------------------------------------------------------------------------------------
# GSM8K and MATH
# ---------------------------------------------------------------------------------------------------------------------


class GSM8K(Task):
    """Word problems whose answer is a number; `answer` is a solution that ends in `#### number`, or the number."""

    hub_id, hub_subset = "openai/gsm8k", "main"
    columns: ClassVar = {"prompt_column": ("question",), "answer_column": ("answer",)}
    user_prompt = (
        "{question}\n\nWork it out in <think> </think> tags. Then write the final answer, which is a single number, in "
        "<answer> </answer> tags, for example <answer> 42 </answer>."
    )

    def prepare(self, row: dict) -> dict:
        """The row, if its answer is a number."""
        row = {**row, "question": text_of(row, "question"), "answer": text_of(row, "answer")}
        if parse_number(self.reference(row)) is None:
            raise ConfigError(f"the answer must be a number or end in #### and a number, not {row['answer']!r:.80}")
        return row

    def reference(self, row: dict) -> str:
        """The number that is right."""
        return gsm8k_reference(row["answer"]) if "####" in row["answer"] else row["answer"]

    def reward(self, completion_text: str, row: dict) -> dict[str, float]:
        """1 for a final answer that is the same number, plus 0.1 for the format."""
        answer = final_answer(completion_text)
        return graded(answer is not None and number_is_correct(answer, self.reference(row)), completion_text)

    def answer_of(self, completion_text: str) -> str | None:
        """The number, however it is written; a final answer that is no number stands for itself."""
        answer = final_answer(completion_text)
        number = None if answer is None else parse_number(answer)
        return answer if number is None else str(number)


class Math(Task):
    """Competition problems whose answer is a formula; evaluated on MATH-500 unless data.path or eval_path is given."""

    hub_id, eval_hub_id = "DigitalLearningGmbH/MATH-lighteval", "HuggingFaceH4/MATH-500"
    columns: ClassVar = {"prompt_column": ("problem",), "answer_column": ("answer", "solution")}
    user_prompt = (
        "{problem}\n\nWork it out in <think> </think> tags. Then write only the final answer, in LaTeX where it needs "
        "it, in <answer> </answer> tags, for example <answer> \\frac{{3}}{{4}} </answer>."
    )

    def load(self, split: str) -> list[dict]:
        """The rows of a split; for training those of data.math_levels."""
        math_is_correct("x + 1", "1 + x")  # starts the grader now, where a broken one stops the run before it begins
        rows, levels = super().load(split), self.data.math_levels
        if split != self.data.train_split or not levels:
            return rows
        if "level" not in rows[0]:
            raise ConfigError(f"data.math_levels: there is no column level, only {', '.join(rows[0])}; remove the key")
        rows = [row for row in rows if str(row.get("level")).removeprefix("Level ") in map(str, levels)]
        if not rows:
            raise ConfigError(f"data.math_levels: no problem of split {split} is of the levels {levels}")
        return rows

    def prepare(self, row: dict) -> dict:
        """The row, with the final answer of its solution as `answer`."""
        return {**row, "problem": text_of(row, "problem"), "answer": math_reference(text_of(row, "answer"))}

    def reward(self, completion_text: str, row: dict) -> dict[str, float]:
        """1 for a final answer that is mathematically the same, plus 0.1 for the format."""
        answer = final_answer(completion_text)
        reference = row["answer"] if "answer" in row else math_reference(row["solution"])
        return graded(answer is not None and math_is_correct(answer, reference), completion_text)

    def answer_of(self, completion_text: str) -> str | None:
        """The final answer without blanks."""
        answer = final_answer(completion_text)
        return None if answer is None else "".join(answer.split())


# ---------------------------------------------------------------------------------------------------------------------
# Scored: completions and their scores come from a file, nothing is sampled
# ---------------------------------------------------------------------------------------------------------------------


class Scored(Task):
    """Rows {"prompt": text or chat, "completions": [{"text": ..., "score": ...}, ...]} of data.path."""

    offline = True
    columns: ClassVar = {"prompt_column": ("prompt",), "answer_column": ("completions",)}
    system_prompt = response_prefix = ""

    def prepare(self, row: dict) -> dict:
        """The row, if its prompt is a prompt and its completions are texts with finite scores."""
        completions = row["completions"]
        check_chat(self.messages(row), "prompt")
        if not isinstance(completions, list) or len(completions) < 2:
            raise ConfigError("completions must be a list of at least 2, or there is nothing to prefer")
        for number, completion in enumerate(completions, 1):
            text, score = map(completion.get, ("text", "score")) if isinstance(completion, dict) else (None, None)
            if not is_text(text):
                raise ConfigError(f'completion {number} must be such as {{"text": "...", "score": 1.0}}')
            if isinstance(score, bool) or not isinstance(score, int | float) or not abs(score) <= sys.float_info.max:
                raise ConfigError(f"completion {number} must have a score that is a finite number, not {score!r:.80}")
        return row

    def messages(self, row: dict) -> list[dict]:
        """The prompt as a chat."""
        return super().messages(row) if isinstance(row["prompt"], str) else row["prompt"]

    def reward(self, completion_text: str, row: dict) -> dict[str, float]:
        """The file's score; training reads row["completions"], and a completion that is not in it has no score."""
        scores = {completion["text"]: float(completion["score"]) for completion in row["completions"]}
        if completion_text not in scores:
            raise ValueError("a completion that is not in the file has no score")
        return {"reward": scores[completion_text], "answer": float(scores[completion_text] == max(scores.values()))}


# ---------------------------------------------------------------------------------------------------------------------
# Tasks by name, and tasks of the user's own
# ---------------------------------------------------------------------------------------------------------------------

TASKS = {"countdown": Countdown, "gsm8k": GSM8K, "math": Math, "scored": Scored}


def get_task(name: str, data: DataConfig | None = None):
    """The task called `name`: a class of data.task_file (case and underscores do not count), or else one of TASKS.

    `rg:` and the names of families, joined by +, are of reasoning-gym.
    """
    data = DataConfig() if data is None else data
    if name.startswith(GYM_PREFIX):
        return ReasoningGym(name, data)
    own = own_tasks(data.task_file) if data.task_file else {}
    found = [own[key] for key in own if key.replace("_", "").lower() == name.replace("_", "").lower()]
    found = list(dict.fromkeys(found)) or ([TASKS[name]] if name in TASKS else [])
    if len(found) != 1:
        near = suggest(name, [*TASKS, *own]).partition("; known are")[0]
        problem = f"is not a dataset{near or ';'}" if not found else "is the name of two classes;"
        raise ConfigError(f"{name} {problem} known are: {', '.join([*TASKS, *own])}, {GYM_PREFIX}FAMILY")
    missing = [method for method in ("load", "messages", "reward") if not callable(getattr(found[0], method, None))]
    if missing:
        raise ConfigError(
            f"{data.task_file}: class {found[0].__name__} lacks {', '.join(missing)}; it needs load, messages, reward"
        )
    with in_user_code(found[0].__module__, f"{found[0].__name__} cannot be made"):
        task = found[0](data) if inspect.signature(found[0]).parameters else found[0]()
    if not isinstance(getattr(task, "data", data), DataConfig):
        raise ConfigError(f"{data.task_file}: {found[0].__name__}.data is the DataConfig; use another name")
    task.data = data
    return task
