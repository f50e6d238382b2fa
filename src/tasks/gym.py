"""The families of reasoning-gym as tasks: `--dataset_name rg:chain_sum`, or a mixture `rg:chain_sum+gcd`.

The package is no dependency of ours, and is imported where such a task is made. Its scorers are not trusted: how each
family is graded is in gym_families.py.
"""

import json
import logging
import re
from collections import Counter
from dataclasses import fields
from importlib import import_module

from src.config import ConfigError, DataConfig, suggest
from src.tasks.answers import final_answer, graded
from src.tasks.expressions import ExpressionError, expression_is_correct, plain_expression
from src.tasks.grader import Grader
from src.tasks.gym_families import CASELESS, EXPRESSION, FAMILIES, NUMBER, REFUSED, SCORER, VERSION
from src.tasks.gym_items import entry_of
from src.tasks.numbers import parse_number
from src.tasks.task import GENERATED_EVAL_SIZE, SPLITS, Task, split_of_text

logger = logging.getLogger("grpo")
GYM_PREFIX = "rg:"
INSTALL = f"run it as `uv run --with reasoning-gym=={VERSION} main.py ...`"
GYM = Grader(
    "src.tasks.gym_items", "rg: tasks need the package reasoning-gym, which does not start in a process of its own: {}"
)
SECONDS = 10.0  # by the clock, with making the item again; the worker limits its own time
SEEDS_APART = 1_000_000  # from one data.seed to the next, so that they share no items
AT_LEAST, ITEMS_EACH = 1000, 50  # problems looked at for each one wanted, before it is said that there are no more
PATIENCE = 20  # problems in a row that a family cannot make: then it is its parameters
NOT_PARAMETERS = ("seed", "size")
NO_BLANK_BESIDE = re.compile(r" ?([,()\[\]{}]) ?")


def known_families() -> dict[str, tuple[type, type]]:
    """Each family of the installed package with its classes of data set and config; a mixture is none."""
    try:
        import_module("reasoning_gym")
        found = import_module("reasoning_gym.factory").DATASETS
    except ImportError as error:
        raise ConfigError(f"rg: tasks need the package reasoning-gym ({error}); {INSTALL}") from error
    return {name: classes for name, classes in found.items() if name != "composite"}


def check_family(family: str, known: dict) -> None:
    """ConfigError unless it is a family of the package that is graded."""
    if family not in known:
        raise ConfigError(
            f"{GYM_PREFIX}{family}: {family!r} is no family of reasoning-gym{suggest(family, list(known))}"
        )
    if family not in FAMILIES:
        raise ConfigError(
            f"{GYM_PREFIX}{family}: it is not of reasoning-gym {VERSION}, whose scorers were audited; {INSTALL}, or "
            f"give it a line in src/tasks/gym_families.py and run benchmarks.audit_reasoning_gym"
        )
    if FAMILIES[family].how == REFUSED:
        raise ConfigError(f"{GYM_PREFIX}{family}: not to be graded safely: {FAMILIES[family].why}; take another family")


def parameters_of(families: list[str], known: dict, given: dict | None) -> dict[str, str]:
    """data.rg as the JSON of each family's parameters; of a mixture it has a mapping for each."""
    of_family = {families[0]: given or {}} if len(families) == 1 else given or {}
    for family, parameters in of_family.items():
        if family not in families or not isinstance(parameters, dict):
            raise ConfigError(
                f"data.rg: of a mixture it gives each family's parameters, as {{{families[0]}: {{...}}}}, not "
                f"{family}: {parameters!r:.80}"
            )
        names = [field.name for field in fields(known[family][1]) if field.name not in NOT_PARAMETERS]
        for name in parameters:
            if name not in names:
                raise ConfigError(f"data.rg: {name!r} is no parameter of {family}{suggest(str(name), names)}")
    return {family: json.dumps(of_family.get(family, {}), default=str) for family in families}


def spelling(how: str, answer: str) -> str:
    """An answer in the form in which two that say the same are the same text."""
    text = NO_BLANK_BESIDE.sub(r"\1", " ".join(answer.split()))
    if how == NUMBER:
        value = parse_number(answer)
        return text if value is None else str(value)
    if how == EXPRESSION:
        try:
            return plain_expression(answer)
        except ExpressionError:
            return text
    return text.casefold() if how == CASELESS else text


class ReasoningGym(Task):
    """Problems of one family, or of several in turn; each is a function of data.seed and its number.

    Problems are numbered 0, 1, 2, ...; number i is the family's item i, which it makes from seed + i. The text of the
    question decides the split, so that no problem and no question is in two of them, whatever train_size and
    eval_size are. A split is its first problems in order; an evaluation has no question twice.
    """

    user_prompt = (
        "{question}\n\nWork it out in <think> </think> tags. "
        "Then write only the final answer, in the form the question asks for, in <answer> </answer> tags."
    )
    eval_is_generated = True

    def __init__(self, name: str, data: DataConfig):
        super().__init__(data)
        self.families, known = name.removeprefix(GYM_PREFIX).split("+"), known_families()
        for family in self.families:
            check_family(family, known)
        if len(set(self.families)) < len(self.families):
            raise ConfigError(f"{name}: a family is named twice; name each once")
        self.parameters = parameters_of(self.families, known, data.rg)
        self.seed = SEEDS_APART * data.seed
        self.rows: list[dict | None] = []  # all that were made so far, of every split
        self.failed: Counter[str] = Counter()  # problems in a row that a family could not make

    def make_row(self, item: int) -> dict | None:
        """Problem number `item`; `answers` are the right ones, where they can be listed.

        None where the right answer is empty, and where the package gives up, as on some mazes.
        """
        family = self.families[item % len(self.families)]
        try:
            entry = entry_of(family, self.parameters[family], self.seed, item)
        except Exception as error:  # whatever the package raises for these parameters
            self.failed[family] += 1
            if self.failed[family] < PATIENCE:
                return None
            text = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
            raise ConfigError(f"data.rg: {family} makes no problem ({text}); change its parameters") from error
        self.failed[family] = 0
        row, details = {"question": entry["question"], "family": family, "item": item}, entry["metadata"]
        if FAMILIES[family].how == EXPRESSION:
            return {**row, "numbers": details["numbers"], "target": details.get("target", 24)}
        if FAMILIES[family].how == SCORER:
            return row
        answers = details["valid_answers"] if family == "n_queens" else [entry["answer"]]
        return {**row, "answers": answers} if all(answer.strip() for answer in answers) else None

    def load(self, split: str) -> list[dict]:
        """The first rows of a split."""
        if split not in SPLITS:
            raise ConfigError(
                f"data: rg: tasks have the splits {', '.join(SPLITS)}, not {split}; set data.train_split or eval_split"
            )
        held_out = split != "train"
        size = self.data.eval_size or GENERATED_EVAL_SIZE if held_out else self.data.train_size
        found: list[dict] = []
        questions: set[str] = set()
        for item in range(max(AT_LEAST, ITEMS_EACH * size)):
            if item == len(self.rows):
                self.rows.append(self.make_row(item))
            row = self.rows[item]
            if row and split_of_text(row["question"]) == split and not (held_out and row["question"] in questions):
                questions.add(row["question"])
                found.append(row)
            if len(found) == size:
                break
        if not found:
            raise ConfigError(f"data.rg: none of {item + 1} questions is for {split}; take parameters that allow more")
        if len(found) < size:
            logger.warning(
                f"{split} has {len(found)} problems, not {size}: these families have no more questions for it"
            )
        if any(FAMILIES[family].how == SCORER for family in self.families):
            GYM.ask([*self.item_of(found[0]), ""], SECONDS)  # starts the grader now, where a broken one stops the run
        return found

    def item_of(self, row: dict) -> list:
        """What makes the row's item again."""
        return [row["family"], self.parameters[row["family"]], self.seed, row["item"]]

    def is_correct(self, answer: str, row: dict) -> bool:
        """Whether a final answer is right."""
        family = FAMILIES[row["family"]]
        if family.how == EXPRESSION:
            return expression_is_correct(answer, row["numbers"], row["target"])
        if family.how == SCORER:
            foreign_digits = any(character.isdecimal() and not character.isascii() for character in answer)
            of_shape = re.fullmatch(family.shape, answer) is not None
            return of_shape and not foreign_digits and GYM.ask([*self.item_of(row), answer], SECONDS)
        return spelling(family.how, answer) in [spelling(family.how, right) for right in row["answers"]]

    def reward(self, completion_text: str, row: dict) -> dict[str, float]:
        """1 for a final answer that is right, plus 0.1 for the format."""
        answer = final_answer(completion_text)
        return graded(bool(answer) and self.is_correct(answer or "", row), completion_text)

    def answer_of(self, completion_text: str) -> str | None:
        """The final answer in one spelling; in a mixture only white space is put right."""
        answer = final_answer(completion_text)
        hows = {FAMILIES[family].how for family in self.families}
        return None if answer is None else spelling(hows.pop() if len(hows) == 1 else "", answer)
