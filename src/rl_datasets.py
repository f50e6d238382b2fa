"""Tasks: where prompts come from, what the model is asked, and what an answer is worth.

A task is a class with three methods, `load`, `messages` and `reward`; TASKS names them for the command line.
Nothing heavy is imported here before it is needed, so that `main.py --help` stays instant.
"""

import hashlib
import random
import re
from dataclasses import dataclass
from fractions import Fraction

from src.config import ConfigError, DataConfig, suggest


@dataclass(frozen=True)
class Problem:
    """One prompt, tokenized, and what the reward function needs to grade an answer to it."""

    index: int  # position in its split: the sampler's random stream is keyed by it
    prompt_ids: tuple[int, ...]
    prompt_text: str
    reference: dict


# ---------------------------------------------------------------------------------------------------------------------
# Arithmetic on a model's text: parsed by a small grammar, exact, bounded in length, depth and digits; never `eval`
# ---------------------------------------------------------------------------------------------------------------------

MAX_EXPRESSION_LENGTH = 200
MAX_EXPRESSION_DEPTH = 20
MAX_DIGITS = 6
ANSWER_BLOCK = re.compile(r"<answer>((?:(?!<answer>|</answer>).)*)</answer>", re.DOTALL)
# possessive (`*+`), because a pattern that backtracks needs minutes for 100 kB of blanks
COMPLETION_FORMAT = re.compile(
    r"\s*+(?:<think>)?+(?:(?!</?think>|</?answer>).)*+</think>"
    r"\s*+<answer>(?:(?!</?think>|</?answer>).)*+</answer>\s*+",
    re.DOTALL,
)
EXPRESSION_TOKEN = re.compile(r"[ \n\t]*([0-9]+|[-+*/()])")
MAX_GRADED_LENGTH = 100_000
MAX_ATTEMPTS = 20_000


class ExpressionError(ValueError):
    """The text is not an arithmetic expression of this grammar, or has no value."""


def tokenize_expression(text: str) -> list[str]:
    """Split into numbers, operators and parentheses, or raise ExpressionError."""
    text = text.strip(" \n\t")
    if not text or len(text) > MAX_EXPRESSION_LENGTH:
        raise ExpressionError(f"an expression has 1 to {MAX_EXPRESSION_LENGTH} characters")
    tokens, position = [], 0
    while position < len(text):
        match = EXPRESSION_TOKEN.match(text, position)
        if match is None:
            raise ExpressionError(f"unexpected character {text[position]!r}")
        if len(match[1]) > MAX_DIGITS:
            raise ExpressionError(f"a number has at most {MAX_DIGITS} digits")
        tokens.append(match[1])
        position = match.end()
    return tokens


def evaluate_expression(text: str) -> tuple[Fraction, list[int]]:
    """Exact value of `text` and the numbers it uses, in order. Grammar: + - * / and parentheses, no unary signs."""
    tokens = tokenize_expression(text)
    numbers: list[int] = []
    position = 0

    def peek() -> str:
        return tokens[position] if position < len(tokens) else ""

    def take() -> str:
        nonlocal position
        position += 1
        return tokens[position - 1] if position <= len(tokens) else ""

    def factor(depth: int) -> Fraction:
        token = take()
        if token == "(":
            if depth >= MAX_EXPRESSION_DEPTH:
                raise ExpressionError(f"parentheses nest at most {MAX_EXPRESSION_DEPTH} deep")
            value = total(depth + 1)
            if take() != ")":
                raise ExpressionError("a parenthesis is not closed")
            return value
        if not token.isdigit():
            raise ExpressionError(f"expected a number, found {token!r}")
        numbers.append(int(token))
        return Fraction(int(token))

    def product(depth: int) -> Fraction:
        value = factor(depth)
        while peek() in ("*", "/"):
            operator, right = take(), factor(depth)
            if operator == "/" and right == 0:
                raise ExpressionError("division by zero")
            value = value * right if operator == "*" else value / right
        return value

    def total(depth: int) -> Fraction:
        value = product(depth)
        while peek() in ("+", "-"):
            operator, right = take(), product(depth)
            value = value + right if operator == "+" else value - right
        return value

    value = total(0)
    if position != len(tokens):
        raise ExpressionError(f"unexpected {tokens[position]!r}")
    return value, numbers


def last_answer(completion_text: str) -> str | None:
    """Contents of the last complete <answer> block, or None."""
    blocks = ANSWER_BLOCK.findall(completion_text[-MAX_GRADED_LENGTH:])
    return blocks[-1] if blocks else None


def has_think_answer_format(completion_text: str) -> bool:
    """Exactly one think block, then one answer block, then nothing. The prompt may already have opened <think>."""
    return len(completion_text) <= MAX_GRADED_LENGTH and COMPLETION_FORMAT.fullmatch(completion_text) is not None


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


def split_of(numbers: list[int]) -> str:
    """Split a problem belongs to, by a hash of its multiset of numbers: no multiset is in two splits."""
    digest = hashlib.md5(" ".join(map(str, sorted(numbers))).encode(), usedforsecurity=False).digest()
    return {0: "test", 1: "validation"}.get(digest[0] % 10, "train")


class Countdown:
    """Numbers game with a seeded built-in generator; `test` and `validation` never share a multiset with `train`."""

    system_prompt = (
        "You are a helpful assistant. You first think about the reasoning process in your mind "
        "and then provide the user with the answer."
    )
    user_prompt = (
        "Using the numbers {nums}, create an equation that equals {target}. "
        "You can use basic arithmetic operations (+, -, *, /) and each number can only be used once. "
        "Show your work in <think> </think> tags. And return the final answer in <answer> </answer> tags, "
        "for example <answer> (1 + 2) / 3 </answer>."
    )
    response_prefix = "Let me solve this step by step.\n<think>"

    def __init__(self, data):
        self.data = data

    def load(self, split: str) -> list[dict]:
        """Rows {"nums": [...], "target": int} of `train`, `validation` or `test`; the same ones for the same seed."""
        data = self.data
        size = data.train_size if split == "train" else data.eval_size
        generator = random.Random(f"countdown {split} {data.seed}")
        limit = max(100, 2 * data.number_max)
        rows, attempts = [], 0
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

    def messages(self, row: dict) -> list[dict]:
        """The chat that asks for a solution."""
        user = self.user_prompt.format(nums=row["nums"], target=row["target"])
        system = self.system_prompt if self.data.system_prompt is None else self.data.system_prompt
        return [{"role": "system", "content": system}] * bool(system) + [{"role": "user", "content": user}]

    def reward(self, completion_text: str, reference: dict) -> dict[str, float]:
        """1 for an expression that uses each number exactly once and equals the target, plus 0.1 for the format."""
        correct = False
        answer = last_answer(completion_text)
        if answer is not None:
            try:
                value, numbers = evaluate_expression(answer)
                correct = sorted(numbers) == sorted(reference["nums"]) and value == reference["target"]
            except ExpressionError:
                pass
        well_formed = has_think_answer_format(completion_text)
        return {"reward": correct + 0.1 * well_formed, "answer": float(correct), "format": float(well_formed)}


TASKS = {"countdown": Countdown}


def get_task(name: str, data=None):
    """The task called `name`, with its data settings (defaults if not given)."""
    if name not in TASKS:
        raise ConfigError(f"{name} is not a dataset{suggest(name, list(TASKS))}")
    return TASKS[name](DataConfig() if data is None else data)


def make_problems(task, rows: list[dict], tokenizer, max_prompt_len: int) -> list[Problem]:
    """Render and tokenize every row's prompt; prompts that are too long are left out (the caller logs how many).

    A chat template also receives the row as `problem`. Without a chat template the messages are joined by blank lines.
    """
    from jinja2 import TemplateError  # here: --help must stay instant

    prefix = task.response_prefix if task.data.response_prefix is None else task.data.response_prefix
    texts = []
    for row in rows:
        messages = task.messages(row)
        if tokenizer.chat_template is None:
            text = "\n\n".join(message["content"] for message in messages) + "\n"
        else:
            # date_string: some templates (Llama 3.2) write today's date, and tomorrow's run would have other prompts
            try:
                text = tokenizer.apply_chat_template(
                    messages, tokenize=False, add_generation_prompt=True, problem=row, date_string="26 Jul 2024"
                )
            except TemplateError as error:
                raise ConfigError(
                    f"the model's chat template refuses the prompt ({error}); if it knows no system message, set "
                    f'data.system_prompt: ""'
                ) from error
        texts.append(text + prefix)
    all_ids = tokenizer(texts, add_special_tokens=tokenizer.chat_template is None).input_ids
    return [
        Problem(index, tuple(ids), text, row)
        for index, (ids, text, row) in enumerate(zip(all_ids, texts, rows, strict=True))
        if 0 < len(ids) <= max_prompt_len
    ]
