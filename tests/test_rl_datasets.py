"""Countdown: the arithmetic against another evaluator, rewards worked by hand, hostile text, splits, prompts."""

import ast
import copy
import itertools
import logging
import random
import re
import string
import time
import warnings
from collections import Counter
from fractions import Fraction

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from src.config import ConfigError, DataConfig
from src.rl_datasets import TASKS, Countdown, get_task, random_expression, split_of
from src.tasks import (
    MAX_DIGITS,
    ExpressionError,
    evaluate_expression,
    has_think_answer_format,
    last_answer,
    make_problems,
)
from src.tasks.answers import MAX_GRADED_LENGTH
from src.tasks.expressions import MAX_EXPRESSION_DEPTH, MAX_EXPRESSION_LENGTH
from src.tasks.task import SYSTEM_PROMPT

quick = settings(max_examples=300, deadline=None)


# --- the evaluator against one built on Python's own parser -----------------------------------------------------------


def independent_evaluation(text: str) -> tuple[Fraction, list[int]]:
    """Value and numbers by Python's parser and a walk over its tree; ValueError for what the grammar leaves out."""
    text = text.strip(" \n\t")
    if not re.fullmatch(r"[0-9+\-*/() \n\t]{1,200}", text) or re.search("[0-9]{7}", text):
        raise ValueError("characters, length or digits")
    depth = list(itertools.accumulate({"(": 1, ")": -1}.get(character, 0) for character in text))
    if max(depth) > 20:
        raise ValueError("depth")
    text = re.sub("[0-9]+", lambda number: str(int(number[0])), re.sub(r"\s", " ", text))  # Python refuses 007
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(text, mode="eval").body
    except SyntaxError as error:
        raise ValueError("syntax") from error
    numbers = []

    def value(node) -> Fraction:
        if isinstance(node, ast.Constant):
            numbers.append(node.value)
            return Fraction(node.value)
        if (
            isinstance(node, ast.UnaryOp)
            and isinstance(node.op, ast.USub)
            and not isinstance(node.operand, ast.UnaryOp)
        ):
            return -value(node.operand)
        if not isinstance(node, ast.BinOp) or not isinstance(node.op, ast.Add | ast.Sub | ast.Mult | ast.Div):
            raise ValueError("grammar")
        left, right = value(node.left), value(node.right)
        if isinstance(node.op, ast.Div) and right == 0:
            raise ValueError("division by zero")
        return {"Add": left + right, "Sub": left - right, "Mult": left * right, "Div": left / (right or 1)}[
            type(node.op).__name__
        ]

    return value(tree), numbers


def outcome(evaluator, text: str):
    """What an evaluator says about a text: value and numbers, or None for a refusal."""
    try:
        return evaluator(text)
    except ValueError:  # an ExpressionError is one too
        return None


blanks = st.sampled_from(["", " ", "\n", "\t", "  "])
expressions = st.recursive(
    st.integers(0, 120).map(str) | st.sampled_from(["007", "0", "999999", "1000000"]),
    lambda inner: (
        st.tuples(inner, blanks, st.sampled_from("+-*/"), blanks, inner).map("".join)
        | st.tuples(blanks, inner, blanks).map(lambda parts: "(" + "".join(parts) + ")")
    ),
    max_leaves=12,
)


@quick
@given(expressions)
def test_expressions_have_the_value_another_evaluator_finds(text):
    assert outcome(evaluate_expression, text) == outcome(independent_evaluation, text)


@settings(max_examples=1000, deadline=None)
@given(st.text(alphabet="0123456789+-*/()() \n\t12", max_size=14))
def test_near_expressions_are_judged_alike(text):
    assert outcome(evaluate_expression, text) == outcome(independent_evaluation, text)


OTHER_SPELLINGS = set("=.$`[]{}xX\\×·∙⋅÷−–")  # verdicts on these are written by hand in tests/test_grading.py


@quick
@given(
    st.text(alphabet=st.sampled_from(string.printable + "٣３＋²½_\x00\u2028\ud800"), max_size=20) | st.text(max_size=40)
)
def test_garbage_is_judged_alike(text):
    assume(not OTHER_SPELLINGS & set(text))
    assert outcome(evaluate_expression, text) == outcome(independent_evaluation, text)


@pytest.mark.parametrize(
    ("text", "value", "numbers"),
    [
        ("7", 7, [7]), ("2 + 3 * 4", 14, [2, 3, 4]), ("(2 + 3) * 4", 20, [2, 3, 4]), ("2 - 3 - 4", -5, [2, 3, 4]),
        ("24 / 4 / 2", 3, [24, 4, 2]), ("8 / (3 - 8 / 3)", 24, [8, 3, 8, 3]), ("1 / 3", Fraction(1, 3), [1, 3]),
        (" \n((9))\t", 9, [9]), ("007", 7, [7]), ("0 / 5", 0, [0, 5]),
    ],
)  # fmt: skip
def test_values_worked_by_hand(text, value, numbers):
    assert evaluate_expression(text) == (value, numbers)


@pytest.mark.parametrize(
    "text",
    [
        "", " ", "\n", "()", "(", ")", "(1", "1)", "1 +", "+ 1", "--1", "1 - - -1", "1 2", "(1)(2)", "2(3)",
        "1 ++ 1", "1 // 2", "2 ** 3", "99**98**97", "1_0", "1.5", ".5", "1e3", "1j", "1,2", "1 = 1",
        "1 == 1", "x", "1 % 2", "1 / 0", "1 / (2 - 2)", "0 / 0", "1 & 1", "~1", "1 < 2", "[1)", "'1'", "1;2", "1#2",
        "\u0663 + 1", "\uff13 + 1", "3 \uff0b 1", "2\u00b2", "\u00bd",
        "\u2460", "3\u00a0+ 1", "3\u200b+1", "1\r+1", "1\x00", "__import__('os').system('true')", "\ud800",
    ],
)  # fmt: skip
def test_refused(text):
    with pytest.raises(ExpressionError):
        evaluate_expression(text)


def test_bounds_are_sharp():
    longest = "1" + "+1" * (MAX_EXPRESSION_LENGTH // 2 - 1) + " "
    assert evaluate_expression(longest + "  \n")[0] == MAX_EXPRESSION_LENGTH // 2, "blanks around it do not count"
    assert evaluate_expression("1 " + longest[1:-1])[0] == MAX_EXPRESSION_LENGTH // 2
    deepest = "(" * MAX_EXPRESSION_DEPTH + "1" + ")" * MAX_EXPRESSION_DEPTH
    assert evaluate_expression(deepest)[0] == 1
    assert evaluate_expression("9" * MAX_DIGITS)[0] == 10**MAX_DIGITS - 1
    for text in (longest + "+1", "1  " + longest[1:-1], f"({deepest})", "9" * (MAX_DIGITS + 1), "0" * MAX_DIGITS + "1"):
        with pytest.raises(ExpressionError):
            evaluate_expression(text)


# --- rewards worked by hand -------------------------------------------------------------------------------------------

TASK = Countdown(DataConfig())
REFERENCE = {"nums": [3, 5, 7], "target": 22}


def think(answer: str) -> str:
    return f"<think>3 * 5 = 15, 15 + 7 = 22</think>\n<answer>{answer}</answer>"


@pytest.mark.parametrize(
    ("answer", "correct"),
    [
        ("3 * 5 + 7", 1), ("7+5*3", 1), ("(5 * 3) + 7", 1), (" \n3 * 5 + 7\n ", 1), ("((3) * (5) + 7)", 1),
        ("15 + 7", 0),  # 15 is none of the numbers
        ("3 * 5", 0), ("22", 0), ("", 0), (" ", 0),  # numbers are missing
        ("3 * 5 + 7 + 3 - 3", 0), ("3 * 5 + 7 * 5 / 5", 0), ("3 * 5 + 7 + 0", 0), ("3 * 5 + 7 * 1", 0),  # too many
        ("3 + 5 + 7", 0), ("7 * 5 - 3", 0), ("3 * 7 + 5", 0), ("3 - 5 * 7", 0),  # another value
        ("3 * 5 + 7 = 22", 1), ("22 = 3 * 5 + 7", 1), ("3 * 5 + 7.", 1), ("$3 * 5 + 7$", 1), ("3 x 5 + 7", 1),
        ("3 * 5 + 7 = 23", 0), ("22", 0), ("22 = 22", 0), ("- 3 * -5 + 7", 1),
        ("3 * 5 + 7 / 0", 0), ("3 * 5 + 7 ** 1", 0), ("\uff13 * 5 + 7", 0),
        ("3 * 5 \uff0b 7", 0), ("1" * 300, 0), ("(" * 300 + "1" + ")" * 300, 0), ("1+" * 49_000 + "1", 0),
        ("3 * 5 + 7" + " " * 90_000, 1),
    ],
)  # fmt: skip
def test_answer(answer, correct):
    assert TASK.reward(think(answer), REFERENCE) == {"reward": correct + 0.1, "answer": correct, "format": 1.0}


@pytest.mark.parametrize(
    ("nums", "target", "answer", "correct"),
    [
        ([3, 3, 8, 8], 24, "8 / (3 - 8 / 3)", 1),  # only exact with fractions
        ([1, 3, 3], 1, "1 / 3 * 3", 1), ([1, 2], 12, "12", 0),  # digits are not glued together
        ([5, 5, 1], 11, "5 + 5 + 1", 1),  # a repeated number is used as often as it is given
        ([5, 5, 1], 6, "5 + 1", 0), ([5, 1], 11, "5 + 5 + 1", 0), ([4, 6], 10, "6 + 4", 1),
        ([1, 7], 0, "7 - 7 * 1", 0), ([7, 3], 2, "7 / 3", 0),  # 2.33 is not rounded
        ([1000000, 1], 1000001, "1000000 + 1", 0),  # beyond the bound on digits
    ],
)  # fmt: skip
def test_answer_with_other_numbers(nums, target, answer, correct):
    assert TASK.reward(think(answer), {"nums": nums, "target": target})["answer"] == correct


RIGHT, WRONG = "<answer>3 * 5 + 7</answer>", "<answer>3 + 5 + 7</answer>"


@pytest.mark.parametrize(
    ("text", "correct", "well_formed"),
    [
        (f"<think>so</think>\n{RIGHT}", 1, 1), (f"<think>so</think>\n{WRONG}", 0, 1),
        (f" so</think>\n{RIGHT}", 1, 1),  # the prompt may have opened <think>
        (f"</think>{RIGHT}", 1, 1), (f"\n <think></think>\n\n{RIGHT}\n ", 1, 1),
        (f"<think>\n\na < b > c\n</think> {RIGHT}", 1, 1), ("<think>so</think><answer></answer>", 0, 1), ("", 0, 0),
        ("3 * 5 + 7", 0, 0), (" " * 1000, 0, 0), (RIGHT, 1, 0),  # no thought
        (f"<think>so\n{RIGHT}", 1, 0), (f"so</think>\n{RIGHT[:-9]}", 0, 0), (f"so</think>\n{RIGHT[8:]}", 0, 0),
        (f"<think>so</think> therefore {RIGHT}", 1, 0), (f"<think>so</think>{RIGHT}.", 1, 0),
        (f"{RIGHT}</think>", 1, 0), (f"hm <think>so</think>{RIGHT}", 1, 0),
        (f"<think>so</think>{RIGHT}<think>", 1, 0), (f"<think>a</think><think>b</think>{RIGHT}", 1, 0),
        (f"<think><think>a</think></think>{RIGHT}", 1, 0), (f"<think>{RIGHT}</think>", 1, 0),
        # the last complete answer block counts
        (f"<think>so</think>{RIGHT}{WRONG}", 0, 0), (f"<think>so</think>{WRONG}{RIGHT}", 1, 0),
        (f"<think>{WRONG}</think>{RIGHT}", 1, 0), (f"<think>{RIGHT}</think>{WRONG}", 0, 0),
        (f"{RIGHT} in the middle of a text", 1, 0), (f"{RIGHT}<answer>1", 1, 0), (f"{RIGHT}</answer>", 1, 0),
        # nested, crossed and made-up tags
        (f"<think>so</think><answer>{RIGHT}</answer>", 1, 0), ("<answer><answer>3 * 5 + 7</answer>1</answer>", 1, 0),
        ("<answer>3 * 5<answer> + 7</answer></answer>", 0, 0), ("</answer>3 * 5 + 7<answer>", 0, 0),
        ("<answer>3 * 5 + 7<answer>", 0, 0), ("<answer>3 *</answer> 5 + 7</answer>", 0, 0),
        ("<ANSWER>3 * 5 + 7</ANSWER>", 0, 0), ("< answer>3 * 5 + 7</ answer>", 0, 0),
        ("<answer >3 * 5 + 7</answer>", 0, 0), ("\uff1canswer\uff1e3 * 5 + 7\uff1c/answer\uff1e", 0, 0),
        ("<answer/>3 * 5 + 7</answer>", 0, 0), ("<think>so</think><answer>3 * 5 + 7</think></answer>", 0, 0),
        ("<think>so</think><answer><think>3 * 5 + 7</answer>", 0, 0),
        # a long text: its end is graded, its format is not
        ("x" * 200_000 + f"</think>{RIGHT}", 1, 0), (RIGHT + "x" * 200_000, 0, 0),
    ],
)  # fmt: skip
def test_completion(text, correct, well_formed):
    expected = {"reward": correct + 0.1 * well_formed, "answer": correct, "format": well_formed}
    assert TASK.reward(text, REFERENCE) == expected


def test_rewards_are_plain_numbers():
    assert [type(value) for value in TASK.reward(think("1"), REFERENCE).values()] == [float] * 3
    assert last_answer(f"{RIGHT}{WRONG}") == "3 + 5 + 7" and last_answer("<answer>1") is None


# --- hostile text -----------------------------------------------------------------------------------------------------

TAGS = [
    "<think>", "</think>", "<answer>", "</answer>", "\n", " ", "3 * 5 + 7", "3", "*", "(", "<", "</", "x", "\x00",
    "\u0663",
]  # fmt: skip


@quick
@given(st.lists(st.sampled_from(TAGS) | st.text(max_size=5), max_size=12).map("".join))
def test_no_text_raises_or_earns_without_a_right_answer(text):
    parts = TASK.reward(text, REFERENCE)
    blocks = [block.split("<answer>")[-1] for block in text.split("</answer>")[:-1] if "<answer>" in block]
    graded = outcome(independent_evaluation, blocks[-1]) if blocks else None
    assert parts["answer"] == (graded is not None and graded[0] == 22 and sorted(graded[1]) == [3, 5, 7])
    tags = re.findall("</?(?:think|answer)>", text)
    if parts["format"]:
        assert tags in (["<think>", "</think>", "<answer>", "</answer>"], ["</think>", "<answer>", "</answer>"])


MILLION = 1_000_000
FLOODS = {
    "letters": "a", "blanks": " ", "lines": "\n", "mixed blanks": " \n\t", "less-than": "<", "thinks": "<think>",
    "closed thinks": "</think>", "answers": "<answer>", "closed answers": "</answer>", "blocks": RIGHT,
    "open blocks": "<answer>3 * 5 + 7 ", "half tags": "<answer", "both": "<answer></answer><answer>",
    "parentheses": "(", "digits": "9", "powers": "9**", "minus": "-", "think blocks": "<think>a</think>",
    "nul": "\x00", "astral": "\U0001f600",
}  # fmt: skip
FRAMES = [
    "{}", "{}</think>" + RIGHT + "x", "</think>{}", "</think>{}x", "</think>" + RIGHT + "{}x", "<answer>{}</answer>",
    "x</think><answer>{}", "<think>{}</think><answer>{}</answer>",
]  # fmt: skip


@pytest.mark.parametrize("flood", FLOODS)
def test_time_grows_with_length_and_not_with_its_square(flood):
    """A regular expression that backtracks takes minutes here: 10^6 characters, and the most a format is read of."""
    for length in (MAX_GRADED_LENGTH, MILLION):
        for frame in FRAMES:
            room = (length - len(frame)) // (len(FLOODS[flood]) * frame.count("{}"))
            text = frame.replace("{}", FLOODS[flood] * room)
            assert 0.99 * length - 100 < len(text) <= length
            started = time.process_time()
            TASK.reward(text, REFERENCE)
            has_think_answer_format(text)
            last_answer(text)
            assert time.process_time() - started < 5


# --- the generator ----------------------------------------------------------------------------------------------------


def reachable(numbers: list[Fraction]) -> set[Fraction]:
    """Every value that an expression over all the numbers can take, by joining every pair in every way."""
    if len(numbers) == 1:
        return set(numbers)
    found = set()
    for i, j in itertools.permutations(range(len(numbers)), 2):
        a, b = numbers[i], numbers[j]
        rest = [number for k, number in enumerate(numbers) if k not in (i, j)]
        for value in [a + b, a - b, a * b] + ([a / b] if b else []):
            found |= reachable([*rest, value])
    return found


@pytest.mark.parametrize(
    ("split", "count", "largest", "size"),
    [("train", 3, 20, 60), ("validation", 3, 20, 60), ("test", 3, 20, 60), ("train", 4, 12, 3)],
)
def test_every_problem_is_solvable_and_in_range(split, count, largest, size):
    data = DataConfig(num_numbers=[count], number_max=largest, target_max=50, train_size=size, eval_size=size)
    rows = Countdown(data).load(split)
    assert len(rows) == size
    for row in rows:
        assert set(row) == {"nums", "target"} and len(row["nums"]) == count
        assert all(1 <= number <= largest for number in row["nums"]) and 1 <= row["target"] <= 50
        assert row["target"] in reachable([Fraction(number) for number in row["nums"]])


def test_ranges_are_used_in_full():
    rows = Countdown(DataConfig(num_numbers=[2, 4], number_max=9, target_max=30, train_size=3000)).load("train")
    assert Counter(len(row["nums"]) for row in rows).keys() == {2, 4}
    assert {number for row in rows for number in row["nums"]} == set(range(1, 10))
    assert {row["target"] for row in rows} == set(range(1, 31))


def test_splits_share_no_multiset_of_numbers():
    task = Countdown(DataConfig(num_numbers=[3], number_max=10, train_size=1500, eval_size=500))  # 220 multisets
    seen = {
        split: {tuple(sorted(row["nums"])) for row in task.load(split)} for split in ("train", "validation", "test")
    }
    assert all(len(multisets) > 10 for multisets in seen.values())
    for left, right in itertools.combinations(seen, 2):
        assert not seen[left] & seen[right]
    assert split_of([7, 1, 7]) == split_of([7, 7, 1])
    assert sum(map(len, seen.values())) > 200, "no multiset is lost"


def test_the_same_seed_gives_the_same_problems_and_another_seed_others():
    def load(split: str, seed: int, size: int = 50) -> list[dict]:
        random.seed(size)  # the global generator has no say
        return Countdown(DataConfig(seed=seed, train_size=size, eval_size=size)).load(split)

    assert load("train", 0) == load("train", 0)
    assert load("train", 0, 80)[:50] == load("train", 0)
    assert load("train", 0) != load("train", 1)
    assert load("test", 0) != load("test", 1) and load("test", 0) != load("validation", 0)


def test_the_held_out_problems_are_these_for_ever():
    """Published numbers are on these problems: a change of the generator must be noticed."""
    rows = Countdown(DataConfig(num_numbers=[3], number_max=20, eval_size=3)).load("test")
    assert rows == [
        {"nums": [4, 8, 5], "target": 27},
        {"nums": [6, 20, 10], "target": 36},
        {"nums": [11, 19, 9], "target": 17},
    ]


@pytest.mark.parametrize("target_max", [99, 1])
def test_an_impossible_generator_says_so(target_max):
    data = DataConfig(num_numbers=[2], number_max=2, target_max=target_max)  # three multisets, none a test problem
    with pytest.raises(ConfigError, match="no test problem of these num_numbers, number_max and target_max; raise"):
        Countdown(data).load("test")


@quick
@given(st.lists(st.integers(1, 30), min_size=2, max_size=5), st.integers(0, 10**9), st.booleans())
def test_random_expression_says_what_it_is(numbers, seed, in_order):
    expression = random_expression(random.Random(seed), numbers, 100, in_order)
    value, used = independent_evaluation(expression.text)
    assert value == expression.value and 0 <= value <= 100
    assert used == numbers if in_order else sorted(used) == sorted(numbers)
    assert len(expression.steps) == len(numbers) - 1
    for step in expression.steps:
        left, right = step.split(" = ")
        assert independent_evaluation(left)[0] == int(right) and 0 <= int(right) <= 100
    assert int(expression.steps[-1].split(" = ")[1]) == expression.value


# --- tasks and prompts ------------------------------------------------------------------------------------------------


def test_get_task():
    assert all(isinstance(get_task(name), TASKS[name]) for name in TASKS)
    assert get_task("countdown", DataConfig(seed=3)).data.seed == 3


@pytest.fixture(scope="module")
def tokenizer():
    from src.make_tiny_model import build_tokenizer

    return build_tokenizer()


def with_begin_token(tokenizer):
    """The same tokenizer, but it begins every text with <|user|> when it adds special tokens."""
    from tokenizers.processors import TemplateProcessing

    tokenizer = copy.deepcopy(tokenizer)
    begin = tokenizer.convert_tokens_to_ids("<|user|>")
    template = TemplateProcessing(single="<|user|> $A", special_tokens=[("<|user|>", begin)])
    tokenizer.backend_tokenizer.post_processor = template
    return tokenizer, begin


ROWS = [{"nums": [3, 5, 7], "target": 22}, {"nums": [3, 5, 7, 11, 13], "target": 9}, {"nums": [2, 2], "target": 4}]


def test_prompts_with_a_chat_template(tokenizer):
    beginning, begin = with_begin_token(tokenizer)
    problems = make_problems(Countdown(DataConfig(response_prefix="")), ROWS, beginning, 100)
    texts = ["3 5 7 = 22", "3 5 7 11 13 = 9", "2 2 = 4"]
    assert [problem.prompt_text for problem in problems] == [f"<|user|>{text}<|assistant|>" for text in texts]
    assert [problem.row for problem in problems] == ROWS
    assert [problem.index for problem in problems] == [0, 1, 2]
    for problem in problems:
        assert isinstance(problem.prompt_ids, tuple) and tokenizer.decode(problem.prompt_ids) == problem.prompt_text
        assert problem.prompt_ids.count(begin) == 1, "the template has it already"


def test_a_template_that_knows_no_system_message_is_one_sentence(tokenizer):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}x"
    )
    task = get_task("countdown")
    rows = [{"nums": [1, 2, 3], "target": 6}]
    with pytest.raises(ConfigError, match=r"System role not supported.*set data.system_prompt"):
        make_problems(task, rows, tokenizer, 1000)
    task.data.system_prompt = ""
    assert make_problems(task, rows, tokenizer, 1000)


def test_a_tokenizer_that_does_not_know_the_prompts_is_a_warning(tokenizer, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("grpo"), "propagate", True)  # another test may have configured it
    task = Countdown(DataConfig(response_prefix=""))
    make_problems(task, ROWS, tokenizer, 10_000)
    assert not caplog.records
    task.data.prompt_format, task.data.system_prompt = "raw", "Ein völlig fremder Satz in Worten"
    make_problems(task, ROWS, tokenizer, 10_000)
    message = caplog.records[-1].getMessage()
    assert re.search(r"does not know \d\d% of the prompts' tokens; take another model", message)


def test_prompts_without_a_chat_template(tokenizer):
    beginning, begin = with_begin_token(tokenizer)
    beginning.chat_template = None
    task = Countdown(DataConfig())
    problem = make_problems(task, ROWS, beginning, 10_000)[0]
    system, user = (message["content"] for message in task.messages(ROWS[0]))
    assert problem.prompt_text == f"{system}\n\n{user}\nLet me solve this step by step.\n<think>"
    assert "[3, 5, 7]" in user and "equals 22." in user
    assert problem.prompt_ids[0] == begin, "nothing else would add it"
    assert problem.prompt_ids[1:] == tuple(tokenizer(problem.prompt_text, add_special_tokens=False).input_ids)


@pytest.mark.parametrize(
    ("prefix", "end"), [(None, "Let me solve this step by step.\n<think>"), ("", ""), ("\n", "\n")]
)
def test_response_prefix_is_part_of_the_prompt(tokenizer, prefix, end):
    problem = make_problems(Countdown(DataConfig(response_prefix=prefix)), ROWS, tokenizer, 100)[0]
    assert problem.prompt_text.endswith("<|assistant|>" + end)
    assert problem.prompt_ids == tuple(tokenizer(problem.prompt_text, add_special_tokens=False).input_ids)


@pytest.mark.parametrize(("given", "systems"), [(None, [SYSTEM_PROMPT]), ("Be brief.", ["Be brief."]), ("", [])])
def test_system_prompt(given, systems):
    *first, user = Countdown(DataConfig(system_prompt=given)).messages(ROWS[0])
    assert first == [{"role": "system", "content": text} for text in systems] and user["role"] == "user"


def test_a_template_that_renders_every_prompt_alike_is_one_sentence(tokenizer):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = "{{ problem.nothing }}x"
    with pytest.raises(ConfigError, match=r"renders every prompt of this task alike.*set data.prompt_format: raw"):
        make_problems(Countdown(DataConfig()), ROWS, tokenizer, 100)
    assert make_problems(Countdown(DataConfig()), ROWS[:1] * 2, tokenizer, 100), "the rows are alike"


def test_prompts_that_are_too_long_are_left_out(tokenizer):
    task = Countdown(DataConfig(response_prefix=""))
    lengths = [len(problem.prompt_ids) for problem in make_problems(task, ROWS, tokenizer, 100)]
    assert lengths[2] < lengths[0] < lengths[1]
    kept = make_problems(task, ROWS, tokenizer, lengths[0])
    assert [(problem.index, problem.row) for problem in kept] == [(0, ROWS[0]), (2, ROWS[2])], "at most, not less"
    assert make_problems(task, ROWS, tokenizer, lengths[2] - 1) == []
