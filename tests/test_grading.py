"""Verdicts on answers: hand-written cases, hostile texts, and the process that runs math-verify.

Whole completions, formats and the problems of Countdown are tested in test_rl_datasets.py.
"""

import ast
import os
import re
import signal
import string
import subprocess
import sys
import threading
import time
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from src.config import ConfigError
from src.rl_datasets import get_task
from src.tasks import (
    ExpressionError,
    evaluate_expression,
    final_answer,
    grader,
    gsm8k_reference,
    math_is_correct,
    math_reference,
    mathematics,
    number_is_correct,
    parse_number,
)
from src.tasks.expressions import MAX_DIGITS, MAX_EXPRESSION_DEPTH, MAX_EXPRESSION_LENGTH, SPELLINGS, read_equation
from src.tasks.numbers import clean_latex

PROJECT = Path(__file__).parent.parent
EVERY_NUMBER = " ".join(str(number) for number in range(1, 101))
linux = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc, or needs a limit that only Linux keeps")
NEW_WORKER = 60.0  # seconds: under load a process may take long to start; no limit under test


# --- Which part of a completion is the answer -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("completion", "answer"),
    [
        ("<answer>18</answer>", "18"), ("<think>a</think>\n<answer> 18\n</answer>", "18"), ("so \\boxed{18}.", "18"),
        ("\\fbox{18}", "18"), ("\\boxed {18}", "18"), ("\\boxed{\\frac{1}{2}}", "\\frac{1}{2}"),
        ("\\boxed{\\{1, 2\\}}", "\\{1, 2\\}"), ("\\boxed{ \\} }", "\\}"), ("<answer>\\boxed{18}</answer>", "18"),
        ("<answer>$\\boxed{18}$ dollars</answer>", "18"), ("<answer>\\boxed{1} or \\boxed{2}</answer>", "2"),
        # the one that ends last
        ("<answer>1</answer> <answer>2</answer>", "2"), ("\\boxed{1} \\boxed{2}", "2"),
        ("<answer>1</answer> \\boxed{2}", "2"), ("\\boxed{1} <answer>2</answer>", "2"),
        ("<think>\\boxed{1}</think> <answer>2</answer>", "2"), ("<think>\\boxed{1}</think> it is 2", "1"),
        ("<think><answer>1</answer></think><answer>2</answer> bye", "2"),
        # nested
        ("\\boxed{\\boxed{5}}", "5"), ("\\boxed{1 \\boxed{2} \\fbox{3} 4}", "3"),
        ("<answer>1<answer>2</answer></answer>", "2"), ("<answer>\\boxed{\\boxed{7}}</answer>", "7"),
        # not complete
        ("<answer>1</answer> <answer>2", "1"), ("\\boxed{1} \\boxed{2", "1"), ("\\boxed{1 \\boxed{2}", "2"),
        ("\\boxed{\\frac{1}{2}", None), ("<answer>18", None), ("18</answer>", None), ("\\boxed{18", None),
        ("\\boxed{18\\}", None), ("boxed{18}", None), ("\\unboxed{18}", None), ("\\boxedx{18}", None),
        ("\\boxed 18", None), ("18", None), ("", None), ("{\\boxed{18}", "18"), ("}\\boxed{18}", "18"),
        # injected
        ("<answer>\\boxed{1</answer>", "\\boxed{1"), ("<answer>1}</answer>", "1}"),
        ("<answer>\\boxed{1</answer>}", "1</answer>"), ("\\boxed{<answer>1</answer>}", "<answer>1</answer>"),
        ("<answer></answer>", ""), ("\\boxed{}", ""), ("<ANSWER>18</ANSWER>", None), ("< answer>18</answer>", None),
        ("y" * 100_000 + "\\boxed{18}", "18"), ("<answer>18</answer>" + "y" * 90_000, "18"),
        ("<answer>18</answer>" + "y" * 100_000, None),
    ],
)  # fmt: skip
def test_the_answer_is_the_block_or_box_that_ends_last(completion, answer):
    assert final_answer(completion) == answer


@pytest.mark.parametrize(
    "flood",
    [
        "\\boxed{", "\\boxed", "\\boxed ", "{", "}", "{}", "\\", "\\{", "<answer>", "</answer>", "<answer>\\boxed{",
        "<answer></answer>", "\\boxed{1}", "\\boxed{\\boxed{1} ", "$", " ", ". ", "9", "1,", "\\frac{1}", "-", "1 000 ",
        "½", "1\n", "(", "sqrt(", "pi", "%", "x \\in ", "=", "1=", "\\frac{", "\\left(", "m^2", "x", "`",
    ],
)  # fmt: skip
def test_a_flood_is_graded_in_linear_time(flood):
    # a quadratic scan of 100 kB takes minutes; every one of these takes milliseconds
    begin = time.process_time()
    for text in (flood * (100_000 // len(flood)), "\\boxed" + " " * 100_000, "\\boxed{" * 9000 + "1" + "}" * 9000):
        final_answer(text)
        final_answer("<answer>" + text + "</answer>")
        assert not number_is_correct(text, "18")
        assert not math_is_correct(text, "18")
        final = flood * (1000 // len(flood))  # the longest answer that is looked at
        parse_number(final)
        clean_latex(final)
        mathematics.with_commands(clean_latex(final))
        for length in (MAX_EXPRESSION_LENGTH, len(text)):
            with pytest.raises(ExpressionError):
                evaluate_expression(text[:length] + "(")
    assert time.process_time() - begin < 10


# --- Countdown --------------------------------------------------------------------------------------------------------

OF_12_7_3 = [  # ways to make 16, all right
    "12 + 7 - 3", "(12+7)-3", "7 - 3 + 12", " \n((12) + 7 - 3)\t", "012 + 07 - 3", "12 + 7 - 3 = 16", "16 = 12 + 7 - 3",
    "12+7-3=16", "16=12+7-3=16", "12 + 7 - 3 = 16 = 16", "12 + 7 - 3 = 016", "12 + 7 − 3", "12 + 7 – 3",
    "16 = 12 + 7 – 3",
    "$12 + 7 - 3$", "$$12 + 7 - 3$$", "$12 + 7 - 3 = 16$", "$12 + 7 - 3$ = $16$", r"\(12 + 7 - 3\)",
    r"\[ 12 + 7 - 3 = 16 \]",
    r"\boxed{12 + 7 - 3}", r"\boxed{12 + 7 - 3 = 16}", r"\boxed{16 = 12 + 7 - 3}", r"12 + 7 - 3 = \boxed{16}",
    r"\boxed{12+7-3} = \boxed{16}", r"\fbox{12+7-3}", r"$\boxed{12 + 7 - 3}$", r"$$\boxed{12 + 7 - 3 = 16}$$.",
    r"\boxed {12 + 7 - 3}", r"\boxed{\boxed{12 + 7 - 3}=16}", "`12 + 7 - 3`", "```\n12 + 7 - 3 = 16\n```",
    "12 + 7 - 3.",
    "12 + 7 - 3 = 16.", "$12 + 7 - 3$.", "$12 + 7 - 3.$", "`12 + 7 - 3`.", r"\boxed{12 + 7 - 3}.", "-3 + 12 + 7",
    "- 3 + 12 + 7",
    "−3 + 12 + 7", "(-3) + 12 + 7", "12 + -3 + 7", "12 - -7 - 3", "12--7-3", "12 + (-3 + 7)", "-(3 - 12) + 7",
    "-(-12 - 7) - 3",
    "[12 + 7] - 3", "{12 + 7} - 3", r"\{12 + 7\} - 3", r"\left(12 + 7\right) - 3", r"\left[ (12 + 7) - 3 \right]",
    "[(12 + 7) - {3}]",
]  # fmt: skip
NOT_OF_12_7_3 = [
    "", ".", "=", "$", "$$", "``", "16", "12 + 7", "12 + 7 + 3", "12 - 7 + 3", "12 + 7 - 3 - 0", "12 + 7 - 3 * 1",
    "127 - 3", "19 - 3",
    "12 + 7 - 3 + 3 - 3", "12 + 7 - 3 = 17", "17 = 12 + 7 - 3", "12 + 7 - 3 = 15 + 1", "12 + 7 - 3 = 19 - 3",
    "12 + 7 - 3 = 7 + 12 - 3",
    "12 + 7 - 3 = 19 - 3 = 16", "12 + 7 = 19 - 3", "16 = 16", "16 = 12 + 7 - 3 = 17", "12 + 7 - 3 = -16",
    "12 + 7 - 3 =",
    "= 12 + 7 - 3", "12 + 7 - 3 == 16", "12 + 7 - 3 = 16 =", "12 + 7 = 16 + 3", "12 + 7 - 3 = (16)",
    "12 + 7 - 3 = 16.0",
    "12 + 7 - 3 = 16/1", "12 + 7 - 3 = 1 6", "16 = 12 + 7 - 3 = 1 6", "1 6 = 12 + 7 - 3 = 16", "12 + 7 - 3 = x",
    "x = 12 + 7 - 3", "12 + 7 - 3 != 16",
    r"12 + 7 - 3 \approx 16",
    "12 + 7 - 3 ≈ 16", "12 + 7 - 3 >= 16", "12 + 7 - 3 : 16", "12 + 7 - 3 is 16", "16: 12 + 7 - 3", "so 12 + 7 - 3",
    "12 + 7 - 3 !",
    "12 + 7 - 3..", "12. + 7 - 3", "12 + 7 - 3. = 16", "12.0 + 7 - 3", "12 + 7 - 3 # 3", "12 + 7 - 3, 16",
    "12 + 7 - 3; 1",
    "12 + 7 - 3 or 16", "12 + 7 - 3\n12 + 7 - 3", "12 + 7 - 3 12", "--3 + 12 + 7", "- -3 + 12 + 7", "12 + 7 - - -3",
    "12 + 7 -", "12 + 7 - (-3)",
    "+12 + 7 - 3", "12 + +7 - 3", "-12 + 7 - 3", "12 + 7 - 3-", "(12 + 7 - 3", "12 + 7 - 3)", "(12 + 7] - 3",
    "{12 + 7) - 3", r"\{12 + 7} - 3",
    r"\left(12 + 7\right] - 3", "()12 + 7 - 3", "(12)(+ 7 - 3)", r"\boxed{12 + 7 - 3", r"\boxed 12 + 7 - 3",
    r"\boxed{12} + 7 - 3",
    r"\boxed{12 + 7} - 3 = 16", r"\boxed{12 + 7 - 3} 16", r"16 \boxed{12 + 7 - 3}", r"\boxed{1} \boxed{12 + 7 - 3}",
    r"\boxed{}",
    r"\text{12 + 7 - 3}", r"12 + 7 - 3 \text{ is right}", r"\sqrt{12 + 7 - 3}", r"\\12 + 7 - 3", "\\", r"12 \+ 7 - 3",
    r"12 + 7 \minus 3",
    "**12 + 7 - 3**", "_12 + 7 - 3_", "12 ＋ 7 - 3", "１２ + 7 - 3", "12 + 7 — 3", "12 + 7 ‑ 3", "12 + ⑦ - 3",
    "12 + 7 - 3²", "12 + 7 - 3\u200b",
    "12 + 7 - 3\u00a0", "1_2 + 7 - 3", "0xc + 7 - 3", "0b1100 + 7 - 3", "12e0 + 7 - 3", "12j + 7 - 3",
    "int('12') + 7 - 3", "12 % 7 - 3",
    "12 | 7 - 3", "12 + 7 - 3 if 1 else 0", "lambda: 12 + 7 - 3", "12 + 7 - 3 + 0000000", "12 + 7 - 3" + " + 0" * 60,
    "(" * 21 + "12 + 7 - 3" + ")" * 21,
]  # fmt: skip
OTHERS = [  # numbers, target, answer, verdict
    *(((12, 3), 36, f"12{sign}3", True) for sign in (
        "*", "x", "X", " x ", "×", "·", "∙", "⋅", r" \times ", r"\times", r"\cdot", r" \cdot ", "$*$",
    )),
    *(((12, 3), 4, answer, True) for answer in (
        "12/3", "12÷3", "12 ÷ 3", r"12 \div 3", r"12\div3", r"\frac{12}{3}", r"\dfrac{12}{3}", r"\tfrac{12}{3}",
        r"\cfrac{12}{3}", r"\frac {12} {3}",
        r"$\frac{12}{3} = 4$", r"4 = \frac{12}{3}", r"-\frac{12}{-3}", r"\frac{-12}{-3}", r"\frac{(12)}{[3]}",
        r"\frac{{12}}{{3}}", r"\boxed{\frac{12}{3}}.",
    )),
    *(((12, 3), 36, f"12{sign}3", False) for sign in (
        "**", "xx", "x x", "*x", "××", r"\times\times", r"\timesx", r"\Times", r"\cdotx", r"\cdots", "•", "✕", "∗",
        "**1*", " ", "", "(3)", "&",
    )),
    *(((12, 3), 4, answer, False) for answer in (
        "12:3", "12//3", "12÷÷3", "12÷/3", "12⁄3", "12∕3", r"12\divx3", r"\frac{12}", r"\frac{12}3", r"\frac12{3}",
        r"\frac{12}{}", r"\frac{}{3}", r"\frac",
        r"\frac(12)(3)", r"\frac{12}+{3}", r"\frac{3}{12}", r"\frac{12)}{(3}", r"\frac\{12\}\{3\}", r"\frac{12=4}{3}",
        r"\frac{12}{3}{1}", r"\fraction{12}{3}",
        r"\frac{12}{3-3}", "12/0", r"12{3}", r"12[3]", r"{12}{3}", r"\frac{12}{3} = \frac{4}{1}",
    )),
    ((1, 2), 3, r"\frac12", False), ((3, 4), 12, "3x4", True), ((0, 10), 0, "0x10", True),
    ((0, 10), 10, "0x10 + 10", False), ((16, 5), 80, "0x10 * 5", False),
    ((16, 5), 80, "0x10x5", False), ((2, 3, 8), 24, "2x(3x8-8)", False), ((2, 3), 6, "x2x3", False),
    ((2, 3), 6, "2x3x", False), ((12, 7, 3), -2, "-12+7+3", True),
    ((12, 7, 3), -2, "-12 + 7 + 3 = -2", True), ((12, 7, 3), -2, "−2 = 7 + 3 − 12", True),
    ((12, 7, 3), -2, "7 + 3 - 12 = 2", False), ((3, 3), 0, "3 - 3 = 0", True),
    ((3, 3), 0, "3 - 3 = -0", True), ((3, 5), -8, "-3 - 5", True), ((3, 5), 2, "5 + -3", True),
    ((3, 5), 2, "5-3-", False), ((3, 5), 15, "-5*-3", True),
    ((3, 5), -15, "5 * -3", True), ((3, 5), 15, "5 - * 3", False),
    ((3, 8, 3, 8), 24, r"\frac{8}{3 - \frac{8}{3}}", True), ((3, 8, 3, 8), 24, "8 ÷ (3 − 8 ÷ 3) = 24", True),
    ((5, 2), 2, "5/2", False), ((5, 2), 2, "5/2 = 2", False), ((5, 2), 3, "5 / 2 = 3", False),
    ((2, 7), 14, "2(7)", False), ((2, 7), 14, "(2)(7)", False), ((2, 7), 14, r"2\left(7\right)", False),
    ((6, 2, 1), 3, r"\frac{6}{2}1", False), ((6, 2, 4), 12, r"4\frac{6}{2}", False),
    ((2, 3, 4), 14, r"2 + 3 \times 4", True), ((2, 3, 4), 20, r"\left(2 + 3\right) \times 4", True),
    ((2, 3, 4), 20, r"2 + 3 \times 4", False), ((2, 3, 4), 2, r"\frac{2 + 4}{3}", True),
    ((10, 4, 2), 4, "10 - 4 - 2", True), ((10, 4, 2), 8, "10 - 4 - 2", False), ((10, 4, 2), 8, "10 - (4 - 2)", True),
    ((24, 4, 2), 3, r"24 \div 4 \div 2", True), ((24, 4, 2), 12, r"24 \div 4 \div 2", False),
    ((999999, 999999), 999998000001, "999999 x 999999 = 999998000001", True),
    ((1000000, 1), 1000001, "1000000 + 1", False), ((5, 5, 1), 11, "5 + 5 + 1 = 11", True),
    ((5, 1), 11, "5 + 5 + 1 = 11", False), ((5, 5, 1), 6, "5 + 1 = 6", False),
]  # fmt: skip


@pytest.mark.parametrize(
    ("numbers", "target", "answer", "verdict"),
    [
        *(((12, 7, 3), 16, answer, True) for answer in OF_12_7_3),
        *(((12, 7, 3), 16, answer, False) for answer in NOT_OF_12_7_3),
        *OTHERS,
    ],
)
def test_countdown(numbers, target, answer, verdict):
    reward = get_task("countdown").reward(f"<answer>{answer}</answer>", {"nums": [*numbers], "target": target})
    assert reward["answer"] == verdict


def test_votes_for_one_expression_are_counted_together_and_a_false_equation_apart():
    task = get_task("countdown")
    votes = [task.answer_of(f"<answer>{text}</answer>") for text in ("2*3-1", "2 x 3 − 1", r"$2 \times 3 - 1 = 5$.")]
    assert votes == ["2*3-1"] * 3
    assert task.answer_of("<answer>2 * 3 - 1 = 6</answer>") == "2*3-1=6" and task.answer_of("2") is None


def old_verdict(text: str) -> tuple[Fraction, list[int]] | None:
    """What the grader said before it knew of signs and spellings: by Python's parser; None for a refusal."""
    text = text.strip(" \n\t")
    deepest = max((text[:end].count("(") - text[:end].count(")") for end in range(len(text) + 1)), default=0)
    if not re.fullmatch(r"[0-9+\-*/() \n\t]{1,200}", text) or re.search("[0-9]{7}", text) or deepest > 20:
        return None

    def value(node) -> Fraction:
        if isinstance(node, ast.Constant):
            return Fraction(node.value)
        left, right = value(node.left), value(node.right)  # AttributeError for a sign or a call
        return {"Add": left.__add__, "Sub": left.__sub__, "Mult": left.__mul__, "Div": left.__truediv__}[
            type(node.op).__name__
        ](right)

    try:
        tree = ast.parse(re.sub("0*([0-9]+)", r"\1", re.sub(r"\s", " ", text)), mode="eval").body
        return value(tree), [int(number) for number in re.findall("[0-9]+", text)]
    except (SyntaxError, AttributeError, KeyError, ZeroDivisionError):
        return None


def verdict_on(text: str) -> tuple[Fraction, list[int]] | None:
    try:
        return evaluate_expression(text)
    except ExpressionError:
        return None


BLANKS = st.sampled_from(["", " ", "\n", "\t "])
EXPRESSIONS = st.recursive(
    st.integers(0, 120).map(str) | st.sampled_from(["007", "0", "999999", "1000000"]),
    lambda inner: (
        st.tuples(inner, BLANKS, st.sampled_from("+-*/"), BLANKS, inner).map("".join)
        | st.tuples(BLANKS, inner, BLANKS).map(lambda parts: "(" + "".join(parts) + ")")
    ),
    max_leaves=12,
)


@settings(max_examples=250, deadline=None)
@given(EXPRESSIONS | st.text(alphabet="0123456789+-*/()() \n\t12", max_size=14))
def test_what_countdown_took_before_it_takes_now_and_of_its_own_signs_only_the_minus_is_new(text):
    before, now = old_verdict(text), verdict_on(text)
    assert now == before or (before is None and re.search(r"(?:^|[-+*/(])\s*-", text.strip())), text


@settings(max_examples=200, deadline=None)
@given(EXPRESSIONS, st.data())
def test_another_spelling_has_the_same_verdict(text, data):
    verdict = old_verdict(text)
    spelled = "".join(data.draw(st.sampled_from(SPELLINGS.get(sign, (sign,)))) for sign in text if sign not in " \n\t")
    forms = [
        "{0}",
        "${0}$",
        "`{0}`.",
        "\\({0}\\)",
        "\\boxed{{{0}}}",
        "\\left({0}\\right)",
        "[{0}]",
        "{0} = {1}",
        "{1}={0}",
    ]
    stated = verdict[0] if verdict else Fraction(7)
    form = data.draw(st.sampled_from(forms if stated.denominator == 1 and not text.isdigit() else forms[:3]))
    respelled = form.format(spelled, stated)
    if len(respelled) <= MAX_EXPRESSION_LENGTH and old_verdict(f"({text})") is not None:
        assert verdict_on(respelled) == verdict, respelled
    elif verdict is None:
        assert verdict_on(respelled) is None, respelled


PIECES = st.sampled_from(
    [spelling for spellings in SPELLINGS.values() for spelling in spellings if spelling] + list("12305")
)


@settings(max_examples=400, deadline=None)
@given(
    st.lists(PIECES | st.sampled_from(["\\frac{1}{2}", "1+2", "=3", "\\boxed{", "(", ")"]), max_size=12).map("".join)
)
def test_no_number_is_hidden_or_made(text):
    verdict = verdict_on(text)
    if verdict is not None:
        assert sorted(verdict[1] + list(map(abs, read_equation(text)[1]))) == sorted(
            map(int, re.findall("[0-9]+", text))
        )
        assert all(number == verdict[0] for number in read_equation(text)[1])


@pytest.mark.parametrize(
    "text",
    [
        "()", "(", ")", "(1", "1)", "1 +", "+ 1", "--1", "1 2", "(1)(2)", "2(3)", "1 ++ 1", "1 // 2", "2 ** 3",
        "99**98**97",
        "1_0", "1.5", ".5", "1e3", "1j", "1,2", "1 = 1", "1 == 1", "x", "1 % 2", "1 / 0", "1 / (2 - 2)", "0 / 0",
        "1 & 1", "~1",
        "1 < 2", "[1, 2]", "'1'", "1;2", "1#2", "\u0663 + 1", "\uff13 + 1", "3 \uff0b 1", "2\u00b2", "\u00bd", "\u2460",
        "3\u00a0+ 1",
        "3\u200b+1", "1\r+1", "1\x00", "__import__('os').system('true')", "\ud800", "\\\ud800", "\\\n1", "1 + \\", "-",
        "1 - -", "1/-0",
    ],
)  # fmt: skip
def test_no_expression(text):
    assert verdict_on(text) is None


@settings(max_examples=200, deadline=None)
@given(
    st.text(alphabet=st.sampled_from(string.printable + "٣３＋−×÷²½_\x00\u2028\ud800"), max_size=20)
    | st.text(max_size=40)
)
def test_of_garbage_nothing_is_read_but_its_numbers(text):
    verdict = verdict_on(text)
    assert verdict is None or sorted(verdict[1] + list(map(abs, read_equation(text)[1]))) == sorted(
        map(int, re.findall("[0-9]+", text))
    )


def test_the_bounds_of_an_expression_are_sharp():
    longest = "1" + "+1" * (MAX_EXPRESSION_LENGTH // 2 - 1) + " "
    deepest = "(" * MAX_EXPRESSION_DEPTH + "1" + ")" * MAX_EXPRESSION_DEPTH
    deep = r"\frac{[" * (MAX_EXPRESSION_DEPTH // 2) + "-1" + "]}{1}" * (MAX_EXPRESSION_DEPTH // 2)
    for text, value in (
        (longest + "  \n", 100), ("1 " + longest[1:-1], 100), ("1" + "x1" * 97 + " = 1", 1), (deepest, 1), (deep, -1),
        ("9" * MAX_DIGITS, 10**MAX_DIGITS - 1),
    ):  # fmt: skip
        assert evaluate_expression(text)[0] == value
    for text in (
        longest + "+1", "1  " + longest[1:-1], "1" + "x1" * 97 + " = 1    .", f"({deepest})", f"{{{deep}}}",
        "9" * (MAX_DIGITS + 1),
        "0" * MAX_DIGITS + "1", "1 + 1 = " + "9" * 150,
    ):  # fmt: skip
        assert verdict_on(text) is None


# --- Numbers ----------------------------------------------------------------------------------------------------------

NUMBERS = [
    ("18", "18"), (" 18\n", "18"), ("018", "18"), ("18.", "18"), ("18.0", "18"), ("18.00", "18"), ("+18", "18"),
    ("-18", "-18"), ("- 18", "-18"), ("−18", "-18"), ("-0", "0"), ("18!", "18"), ("(18)", "18"), ("18 dollars", "18"),
    ("18dollars", "18"), ("18 km/h", "18"), ("18/hour", "18"), ("18-year-old", "18"), ("$18", "18"), ("$ 18", "18"),
    ("18$", "18"), ("\\$18", "18"), ("$\\$18$", "18"), ("-$18", "-18"), ("$-18", "-18"), ("€18", "18"),
    ("18 €", "18"), ("£18.50", "18.5"), ("-£18.50", "-18.5"), ("$18$", "18"), ("$$18$$", "18"), ("\\(18\\)", "18"),
    ("\\[ 18 \\]", "18"), ("\\boxed{18}", "18"), ("**18**", "18"), ("`18`", "18"), ("#### 18", "18"),
    ("x = 18", "18"), ("x=-18", "-18"), ("5 + 13 = 18", "18"), ("5 × 3 = 3 × 5 = 15", "15"),
    ("The answer is 18.", "18"), ("The final answer is: $18$.", "18"), ("Answer: -5", "-5"),
    ("She makes 18 dollars every day.", "18"), ("it is 18. The answer is 18", "18"), ("1,234", "1234"),
    ("1234", "1,234"), ("$1,234,567.89", "1234567.89"), ("1{,}234", "1234"), ("10,\\!080", "10080"), ("0.5", "1/2"),
    (".5", "1/2"), ("total: .5", "1/2"), ("...18", "18"), ("3/4", "0.75"), ("3 / 4", "0.75"), ("-3/4", "-0.75"),
    ("6/8", "3/4"), ("1 1/2", "1.5"), ("-1 1/2", "-1.5"), ("\\frac{3}{4}", "0.75"), ("-\\frac{3}{4}", "-0.75"),
    ("\\frac{-3}{4}", "-0.75"), ("\\dfrac{3}{4}", "0.75"), ("\\frac34", "0.75"), ("1\\frac{1}{2}", "1.5"),
    ("1 \\frac12 cups", "1.5"), ("\\text{18}", "18"), ("18 \\text{ dollars}", "18"), ("18\\,\\mathrm{cm}", "18"),
    ("1e3", "1000"), ("1.5E+2", "150"), ("5e-1", "0.5"), ("50%", "50"), ("50\\%", "50"), ("50 percent", "50"),
    ("90°", "90"), ("90^\\circ", "90"), ("90^{\\circ}", "90"), ("18 яблок", "18"), ("18元。", "18"),
    ("9" * 40, "9" * 40),
    ("1 000", "1000"), ("1 000.50", "1000.5"), ("-1 000 000", "-1000000"), ("$1 000", "1000"), ("x = 1 000", "1000"),
    ("1\u202f000", "1000"), ("1\u00a0000", "1000"), ("1\u2009000", "1000"), ("1\\,000", "1000"), ("1\\ 000", "1000"),
    ("The answer is 12 345.", "12345"), ("1000", "1 000"), ("1 000 \\text{ km}", "1000"), ("1½", "1.5"), ("½", "0.5"),
    ("-2¾", "-2.75"), ("1 ½ cups", "1.5"), ("10⅓", "31/3"), ("$½$", "1/2"), ("1 000½", "1000.5"),
    ("\\boxed{7⅞}", "7.875"),
    *((f"18 {unit}", "18") for unit in (
        "square feet", "quarters", "more apples", "apples and pears", "points", "ft^2", "ft^{2}", "ft²", "cm^3", "m²",
        "inches^2", "yards^2", "square units", "units^2", "\\text{ ft}^2", "\\mathrm{m}^{3}", "\\text{ cm^2}", "sq. ft",
    )),
]  # fmt: skip
NOT_THE_NUMBER = [
    ("17", "18"), ("-18", "18"), ("−18", "18"), ("18", "-18"), ("1.8", "18"), ("180", "18"), ("118", "18"),
    ("18.01", "18"), ("18.0000000001", "18"), ("17.9999999999", "18"), ("0.333333", "1/3"), ("0.33", "1/3"),
    ("0.5", "50"), ("50%", "0.5"), ("18/1.5", "12"), ("", "18"), (" ", "18"), (".", "18"), ("$", "18"), ("-", "0"),
    ("nothing", "0"), ("eighteen", "18"), ("NaN", "18"), ("nan", "0"), ("inf", "18"), ("-Infinity", "0"),
    ("nothing", "nothing"),
    ("\\infty", "0"),
    # several numbers
    ("18 or 20", "18"), ("18 or 20", "20"), ("18, 20", "18"), ("18\n20", "20"), ("18 20", "1820"), ("1 8", "18"),
    ("18-20", "18"), ("17–18", "18"), (EVERY_NUMBER, "18"), (EVERY_NUMBER.replace(" ", ","), "18"),
    (EVERY_NUMBER.replace(" ", " = "), "18"), ("1,2", "12"), ("1,2", "1.2"), ("1,23", "1.23"),
    ("12,34,567", "1234567"), ("1234,567", "1234567"), ("0,018", "18"), ("5,5", "5"), ("1.2.3", "1.2"), ("3:30", "3"),
    ("3/4/5", "3/4"), ("1 3/2", "2.5"), ("0\n1/3", "1/3"),
    ("1 000", "1"), ("1 000", "0"), ("18\n200", "18200"), ("18\t200", "18200"), ("18, 200", "18200"), ("0 100", "100"),
    ("1 0000", "10000"), ("1 00", "100"), ("1000 000", "1000000"), ("1 000,000", "1000000"), ("1.5 000", "1.5"),
    ("1 100/200", "5.5"), ("1 000/4", "250"), ("1 000/4", "1"), ("x1 000", "1000"), ("1 000 k", "1000"),
    # operators and words that change the value
    ("9+9", "9"), ("9 + 9", "18"), ("9*9", "9"), ("9**9", "9"), ("3^2", "9"), ("18^2", "18"), ("18²", "18"),
    ("5 times 5", "5"), ("-(18)", "18"), ("--18", "18"), ("~18", "18"), ("≈18", "18"), ("<18", "18"),
    ("x <= 18", "18"), ("x != 18", "18"), ("x \\neq 18", "18"), ("\\pm 18", "18"), ("\\sqrt{18}", "18"),
    ("18x", "18"), ("x18", "18"), ("H18", "18"), ("COVID-19", "-19"), ("the .5.5 rule", "0.5"), ("1,8000", "18000"),
    ("1,0005", "1000"), ("1,2345", "1"), ("18\\pi", "18"), ("18π", "18"), ("18k", "18"), ("2 dozen", "2"),
    ("18 million", "18"), ("minus 18", "18"), ("negative 18", "18"), ("18 and a half", "18"), ("18 = x", "18"),
    ("18 =", "18"), ("9^{9^{9}}", "9"), ("9**9**9**9", "9"), ("1e999", "1"), ("5e555", "5"), ("1e18", "18"),
    ("1/0", "0"), ("\\frac{18}{0}", "18"), ("\\frac{1}{8}", "18"), ("9" * 41, "9" * 41), ("18" + " " * 999, "18"),
    *((words, "18") for words in (
        "square root of 18", "log 18", "18 hundredths", "18 plus one", "18 times two", "18 or nineteen", "not 18",
        "less than 18", "18 factorial", "opposite of 18", "zero point 18", "18 crore", "18 and two thirds",
    )),
    # digits and signs that are no ASCII
    ("１８", "18"), ("1８", "1"), ("١٨", "18"), ("－18", "18"), ("－18", "-18"), ("–18", "18"), ("18½", "18"),
    ("①8", "8"), ("1½", "1"), ("1½", "0.5"), ("½2", "0.5"), ("½½", "0.5"), ("1.½", "1.5"), ("1/½", "2"), ("3^½", "3"),
    ("½ dozen", "0.5"), ("18^½", "18"), ("18 ft^4", "18"), ("18 ft^22", "18"), ("18 x^2", "18"), ("18^2 ft", "18"),
    ("18 eggs^2", "18"), ("18 ²", "18"), ("ft^2", "2"), ("18 ft^2 or 20", "18"), ("18 ^2 ft", "324"),
    ("5．5", "5"), ("5，5", "5"), ("5\u200b5", "5"), ("5\u200b5", "55"), ("1\u0338" + "8", "18"), ("18\x00", "18"),
    # tags and code
    ("18</answer>", "18"), ("<answer>18", "18"), ("eval('9+9')", "18"), ("eval('9+9')", "9"), ("{18}", "18"),
    ("1_8", "18"), ("0x12", "18"), ("0b1", "1"),
]  # fmt: skip


@pytest.mark.parametrize(("answer", "reference"), NUMBERS)
def test_the_right_number(answer, reference):
    assert number_is_correct(answer, reference) is True


@pytest.mark.parametrize(("answer", "reference"), NOT_THE_NUMBER)
def test_not_the_right_number(answer, reference):
    assert number_is_correct(answer, reference) is False


def test_the_gsm8k_reference_follows_the_last_mark():
    assert gsm8k_reference("He has 3 * <<3*6=18>>18.\n#### 18") == "18"
    assert gsm8k_reference("#### 1\nno,\n#### 1,080 ") == "1,080"
    assert gsm8k_reference("#### -5") == "-5"
    for solution in ("The answer is 18", "#### ", "#### many", "#### 1\n####"):
        with pytest.raises(ConfigError, match="answer_column"):
            gsm8k_reference(solution)


def spelled(value: Fraction, commas: bool) -> str:
    """Written by hand: integers with commas or not, tenths as decimals, everything else as a fraction."""
    digits = str(abs(value.numerator))
    if commas and value.denominator == 1:
        groups = []
        while len(digits) > 3:
            digits, groups = digits[:-3], [digits[-3:], *groups]
        digits = ",".join([digits, *groups])
    if value.denominator in (2, 5, 10):
        tenths = str(abs(value) * 10)
        digits = f"{tenths[:-1] or '0'}.{tenths[-1]}"
    elif value.denominator != 1:
        digits = f"{digits}/{value.denominator}"
    return ("-" if value < 0 else "") + digits


VALUES = st.fractions(min_value=-(10**7), max_value=10**7, max_denominator=12)
SETTINGS_OF_A_NUMBER = st.sampled_from(
    [
        "{}", "{} dollars", "{}.", "The answer is {}", "x = {}", "1 + 2 = {} eggs", "\\boxed{{{}}}", "**{}**", "${}$",
        "{}%",
    ]
)  # fmt: skip


@settings(max_examples=150, deadline=None)
@given(VALUES, VALUES, SETTINGS_OF_A_NUMBER, st.booleans(), st.booleans())
def test_numbers_in_any_setting_are_judged_by_their_value(value, other, setting, commas, same):
    reference = value if same else other
    answer = setting.format(spelled(value, commas))
    assert number_is_correct(answer, spelled(reference, not commas)) is (value == reference), answer


@settings(max_examples=150, deadline=None)
@given(
    VALUES,
    VALUES,
    st.sampled_from([" or ", ", ", "; ", "\n", " and ", " is ", "+", "*", " - ", "**", "^", "\\text{ }"]),
)
def test_two_different_numbers_are_no_answer(first, second, between):
    if first != second:
        text = spelled(first, False) + between + spelled(second, False)
        assert not number_is_correct(text, spelled(first, False))
        assert not number_is_correct(text, spelled(second, False))


def only_number(text: str) -> Fraction | None:
    """A second, blunter evaluator: the one run of number characters of a text; None where it is not a plain number."""
    text = " ".join(text.rpartition("=")[2].replace("$", " ").split()).replace("- ", "-")
    runs = "".join(character if character in "0123456789.,-" else " " for character in text).split()
    runs = [run.rstrip(".,") for run in runs if any(digit in run for digit in "0123456789")]
    plain = len(runs) == 1 and (runs[0][0].isdigit() or (runs[0][0] in "-." and runs[0][1].isdigit()))
    try:
        return Fraction(runs[0].replace(",", "")) if plain else None
    except ValueError:
        return None


@settings(max_examples=250, deadline=None)
@given(st.text(alphabet="0159.,-= $%ab１²", max_size=12), st.integers(-200, 20000))
def test_what_is_accepted_has_the_value_another_evaluator_finds(text, other):
    value = parse_number(text)
    if value is not None and only_number(text) is not None:
        assert value == only_number(text)
    assert number_is_correct(text, str(other)) is (value == other)


LATEX_PIECES = st.sampled_from(
    [
        "\\frac", "{", "}", "1", "12", "/", " ", "-", "=", "^", "\\text{", "\\boxed{", "<answer>", "</answer>", "$",
        "\\", ",",
    ]
)  # fmt: skip


@settings(max_examples=200, deadline=None)
@given(st.one_of(st.text(), st.lists(LATEX_PIECES, max_size=25).map("".join)))
def test_no_text_raises(text):
    assert isinstance(final_answer(text), str | None)
    assert isinstance(parse_number(text), Fraction | None)
    assert number_is_correct(text, "-77777") is False
    assert isinstance(mathematics.is_words(clean_latex(text)), bool)


# --- Mathematics ------------------------------------------------------------------------------------------------------

EQUAL = [
    ("5", "5"), ("5.", "5"), ("$5$", "5"), ("\\(5\\)", "5"), ("\\boxed{5}", "5"), ("\\text{5}", "5"),
    ("The answer is 5", "5"), ("\\frac12", "0.5"), ("0.5", "\\frac{1}{2}"), ("1/2", "\\dfrac{1}{2}"),
    ("\\tfrac{2}{4}", "\\frac{1}{2}"), ("1\\frac12", "\\frac{3}{2}"), ("1 1/2", "\\frac{3}{2}"), ("−5", "-5"),
    ("10080", "10,\\!080"), ("10,080", "10080"), ("18.90", "\\$18.9"), ("x=5", "5"), ("5", "x=5"),
    ("x = \\frac{1}{2}", "0.5"), ("2x+1", "1 + 2x"), ("y=2x+1", "2x+1"), ("x^2+2x+1", "(x+1)^2"),
    ("2\\sqrt{2}", "\\sqrt{8}"), ("\\frac{\\sqrt{2}}{2}", "\\frac{1}{\\sqrt{2}}"), ("2^{10}", "1024"),
    ("2^{100}", "2^{100}"), ("\\pi/2", "\\frac{\\pi}{2}"), ("2π", "2\\pi"), ("1+2i", "2i+1"), ("2,1", "1,2"),
    ("1 \\text{ and } 2", "1,2"), ("1, 2", "\\{1,2\\}"), ("\\pm 2", "2,-2"), ("(1, 2)", "(1,2)"),
    ("\\left(1,2\\right)", "(1,2)"), ("(\\frac{1}{2}, 3)", "\\left(0.5,3\\right)"), ("(-\\infty, 2]", "(-\\infty,2]"),
    ("(-∞,2]", "(-\\infty,2]"), ("[1,2) \\cup (3,4]", "(3,4] \\cup [1,2)"),
    ("\\begin{pmatrix} 1 \\\\ 2 \\end{pmatrix}", "\\begin{pmatrix}1\\\\2\\end{pmatrix}"), ("90^\\circ", "90"),
    ("90°", "90^\\circ"), ("5 \\text{ cm}", "5"), ("50\\%", "0.5"), ("(A)", "\\text{(A)}"), ("A", "\\text{(A)}"),
    ("\\text{(A)}", "A"), ("\\textbf{(A)}", "\\text{(A)}"), ("Monday", "\\text{Monday}"), ("\\text{even}", "even"),
    ("Even", "even"), ("2 > x", "x < 2"), ("11_2", "11_2"), ("11_{2}", "11_2"), ("\\emptyset", "\\{\\}"),
    ("4!", "24"), ("\\log_2 8", "3"), ("101_2", "101_{2}"), ("11", "11_2"), (r"0\pi", "0"),
    # what a model may well write
    (r"0.50 \cdot x", r"\frac{x}{2}"), (r"2 \cdot 3x", "6x"), ("{x+1}", "1+x"), ("{-x}+2", "2-x"),
    ("x{,}y", "x, y"), (r"2\,x", r"x \cdot 2"), (r"3x^2 y", "3yx^2"), (r"2\frac{1}{2}", r"5 \cdot 0.5"),
    ("n^3+1", "1+n^3"), ("x_1+2", "2+x_1"), ("x_{12}+1", "1+x_{12}"), ("a_n + 3", "3+a_n"), (r"\log_2{8}", "3"),
    ("11 _2", "11_2"), (r"\log_{10} 100", "2"), (r"\log_x 2", r"\log_x(2)"),
    (r"\frac{x}6", r"\frac{x}{6}"), (r"\frac x6", r"\frac{x}{6}"), (r"\frac1{x}", "1/x"), (r"\dfrac1x", "x^{-1}"),
    (r"\frac{\sqrt{3}}2", r"\sqrt{3}/2"), (r"\sqrt2+x", r"x+\sqrt{2}"), (r"\sqrt[3]{8}x", "2x"),
    (r"\left( 1,x \right)", "(1,x)"), (r"x = 2 \text{ and } y = 3", "x=2,y=3"), (r"5x \text{ sq. ft}", "5x"),
    (r"5x\text{ km/h}", "5x"), ("x=5 or x=6", "5,6"), ("x≤3", r"x \le 3"),
    ("5!", "120"), ("100!", r"100 \cdot 99!"), ("2^{2005}", r"2\cdot2^{2004}"), ("e^{x^2}", "e^{x x}"),
    ("x^{12}+3!", "6+x^{12}"), ("2^{x+1}", "2 \\cdot 2^x"), (r"\{x,-x\}", r"-x, x"), ("x=0", "0"),
    ("0 m", "0"), ("5 square feet", "5"), ("(-infinity, x)", r"(-\infty, x)"), (r"x = -\infty", r"-\infty"),
    (r"-\infty < x \le 2", r"-\infty < x \leq 2"), ("((4,5))", "(4,5)"),
    ("X+1", "x+1"), (r"8\pi \text{ m}", r"8\pi"), ("(1,2) or (3,4)", "(1,2), (3,4)"), ("f(x)=2x", "2x"),
    (r"0 \cdot \pi", "0"), (r"5\text{ and }6", "5 and 6"),
    ("sqrt(2)", r"\sqrt{2}"), ("2*pi", r"2\pi"), ("2pi", r"2\pi"), ("pi/2", r"\frac{\pi}{2}"),
    (r"\sqrt(2)", r"\sqrt{2}"),
    ("3*sqrt(2)/2", r"\frac{3\sqrt{2}}{2}"), ("sqrt(2+sqrt(3))", r"\sqrt{2+\sqrt{3}}"), ("sqrt{2}", r"\sqrt{2}"),
    ("(1+sqrt(5))/2", r"\frac{1+\sqrt{5}}{2}"), ("sqrt (x+1)", r"\sqrt{x+1}"), ("-2*sqrt(3)*pi", r"-2\pi\sqrt{3}"),
    ("(sqrt(2), pi)", r"(\sqrt{2}, \pi)"), ("pi", "π"), ("x = sqrt(7)", r"\sqrt{7}"), ("sqrt(16)", "4"),
    (r"x \in [0,1)", "[0,1)"), (r"x\in[0,1)", "[0,1)"), ("x ∈ [0,1)", "[0,1)"), ("[0,1)", r"x \in [0,1)"),
    (r"$x \in \left[0, 1\right)$", "[0,1)"), (r"x \in (-\infty,0) \cup (1,2]", r"(1,2] \cup (-\infty,0)"),
    (r"x \in \{1,2\}", r"\{1,2\}"), (r"\theta \in [0,\pi]", "[0,pi]"), (r"x \in \mathbb{R}", r"\mathbb{R}"),
    (r"\{2,1\}", r"\{1,2\}"), ("{2, 1}", r"\{1,2\}"), (r"\{1,2\}", "1,2"), (r"\left\{1,2\right\}", r"\{2,1\}"),
    (r"\{(1,2),(3,4)\}", "(1,2),(3,4)"),
    (r"\{1\} \cup (2,3)", r"(2,3) \cup \{1\}"), ("3%", r"3\%"), ("3", r"3\%"), ("0.03", r"3\%"), (r"3\%", "0.03"),
    (r"3\%", r"\frac{3}{100}"), (r"33\frac13\%", r"\frac{100}{3}\%"), (r"3 \text{ percent}", r"3\%"), (r"3\,\%", "3%"),
    # a name at the end is no unit
    (r"t \cdot 3", "3t"), ("3 t", "3t"), ("2ba", "2ab"), (r"h\pi r^2", r"\pi r^2 h"), ("x=3t", "3t"), ("5 m", "5"),
    (r"5 \text{ m}", "5"),
]  # fmt: skip
NOT_EQUAL = [
    ("6", "5"), ("-5", "5"), ("5.0000001", "5"), ("0.333333", "\\frac{1}{3}"), ("0.33", "\\frac{1}{3}"),
    ("3.14", "\\pi"), ("3.141593", "\\pi"), ("", "5"), ("$", "5"), ("\\boxed{}", "5"), ("\\text{}", "5"), ("5", ""),
    ("", ""), ("NaN", "5"), ("\\infty", "5"), ("-\\infty", "\\infty"), ("\\frac{0}{0}", "0"),
    ("\\frac{5}{0}", "\\infty"), ("\\infty-\\infty", "0"), ("5x", "5"), ("5\\pi", "5"), ("x", "5"), ("x=5", "y=5"),
    ("x=5", "6"), ("2x+2", "2x+1"), ("x", "y"), ("\\sqrt{2}", "2"), ("1,2", "1"), ("1,2", "1,2,3"), ("1,2", "1,3"),
    ("(2,1)", "(1,2)"), ("(1,2)", "[1,2]"), ("(5,-2)", "(3,-1)"), ("(1,2,4)", "(1,2,3)"), ("5 or 6", "5"),
    ("5 \\text{ or } 6", "6"), ("x = 5 \\text{ or } x = 6", "5"), ("5 \\text{ or maybe 6}", "5"),
    ("5 \\text{(6)}", "5"), ("5. Or 6", "6"), ("1 2 3", "6"), ("5 1", "6"), ("5 1", "51"),
    ("1 1 \\frac{1}{2}", "2.5"), ("5\\quad 1", "6"), ("$5$ $6$", "5"), ("$5$$6$", "56"), (EVERY_NUMBER, "18"),
    (EVERY_NUMBER, "5050"), (EVERY_NUMBER.replace(" ", ", "), "18"), ("answer: $5$, answer: $6$", "6"),
    ("the answer \\frac{1}{2} + 7", "\\frac{1}{2}"), ("so the answer \\frac{1}{2} + 7", "\\frac{1}{2}"),
    ("answer \\frac{1}{2}, answer \\frac{1}{3}", "\\frac{1}{3}"), ("1/2 \\", "\\frac{1}{2}"),
    ("\\frac{1}{2} \\mid \\frac{1}{3}", "\\frac{1}{3}"), ("11_3", "11_2"), ("B", "\\text{(A)}"),
    ("\\text{(A) (B)}", "\\text{(A)}"), ("seat", "east"), ("on", "\\text{no}"), ("odd", "even"),
    ("even number", "even"), ("x>2", "x<2"), ("\\neq 5", "5"), ("１８", "18"), ("x=１８", "18"), ("18²", "324"),
    ("5²", "25"), ("\\boxed{5", "5"), ("5}", "5"), ("{5", "5"), ("</answer>5", "5"), ("\\begin{matrix}", "5"),
    ("\\", "5"), ("^", "5"), ("__import__('os').system('true')", "5"), ("5" + " " * 1000, "5"),
    ("5" * 1001, "5" * 1001),
    # a name at the end is no unit
    ("3", "3t"), ("2", "2ab"), (r"\pi r^2", r"\pi r^2 h"), ("0.5", r"\frac{1}{2}h"), ("1, 234", "1,234"),
    ("(1,2)", r"\{1,2\}"), ("(2,1)", r"\{1,2\}"), ("[1,2]", r"\{1,2\}"), (r"\{1,2\}", "(1,2)"), (r"\{1,2\}", "[1,2]"),
    (r"\left(1,2\right)", r"\left\{1,2\right\}"), ("S = (1,2)", r"\{1,2\}"), ("(1,x)", r"\{x,1\}"),
    ("(1,2,3)", r"\{1,2,3\}"),
    ("((1,2),(3,4))", r"\{(1,2),(3,4)\}"), ("1,2", "(1,2)"), (r"x \in (1,2)", r"\{1,2\}"), (r"\{1,2\}", r"\{1,2,3\}"),
    ("3%", "3"), (r"3\%", "3"), (r"50\%", "50"), (r"50\% \text{ of it}", "50"), ("3 percent", "3"),
    (r"3\text{ percent}", "3"),
    (r"300\%", r"3\%"), ("300", r"3\%"), ("0.03%", r"3\%"), (r"\frac{1}{2}\%", r"\frac{1}{2}"), (r"2\pi\%", r"2\pi"),
    ("1,2%", "1,2"), ("x%", "x"), (r"3\%", "0.3"), ("3%%", "0.03"), ("y=3%", "x"),
    ("sqrt(2)", "2"), ("sqrt(3)", r"\sqrt{2}"), ("sqrt(2", r"\sqrt{2}"), ("sqrt(2))", r"\sqrt{2}"),
    ("asqrt(2)", r"\sqrt{2}"),
    ("sqrt2", "2"), ("2*pi", "2"), ("pir", r"\pi r"), ("pi2", r"2\pi"), ("2**pi", r"2\pi"), ("sqrt(-1)", "1"),
    ("pie", r"\pi e"),
    ("3.14", "pi"), (r"x \in [0,1]", "[0,1)"), (r"y \in [0,1)", r"x \in [0,1)"), (r"x \notin [0,1)", "[0,1)"),
    (r"x \in 5", "5"), (r"5 \in [0,1)", "[0,1)"), (r"x \in y \in [0,1)", "[0,1)"), (r"x \in [0,1) \cup [2,3]", "[0,1)"),
    (r"\pi \in [0,1)", "[0,1)"), (r"x \in", "x"), (r"x \in (0,1)", "(0,2)"), (r"\infty [0,1)", "[0,1)"),
    # found by the fuzz
    ("0/0.0", "0"), ("0.0/0.0", "0"), (r"\frac{0.0}{0.0}", "0"), ("0.0/(1.0-1.0)", "0"), (r"x+0 \cdot 0.0^{-1}", "x"),
    ("0x/0.0", "0"),
    ("12565_{3}", "12565"), (r"9_{3}\pi", r"9\pi"), ("T millione i rewsnas 0.", "0"), (r"(6,\text{or }11)", "(6,11)"),
]  # fmt: skip


@pytest.mark.parametrize(("answer", "reference"), EQUAL)
def test_mathematically_equal(answer, reference):
    assert math_is_correct(answer, reference, NEW_WORKER) is True


@pytest.mark.parametrize(("answer", "reference"), NOT_EQUAL)
def test_not_mathematically_equal(answer, reference):
    assert math_is_correct(answer, reference, NEW_WORKER) is False


NEVER_ASKED = [  # what math-verify would mend, choose from, or choke on
    # numbers side by side, which would be multiplied, and braces that show nothing between them
    ("0.0.0", "0"), ("2.5.4", "1"), ("2{3}", "6"), ("{2}3", "6"), ("2{}3", "6"),
    (r"\frac{1}{19}{19}", "1"), ("5\\∞", "5"), ("x\\∞", "x"), (r"\frac1{9}{9}x", "x"), (r"2\thinspace3", "6"),
    (r"2\ldots3", "6"), ("0M7.0M7", "0"),
    ("x2", "2x"), ("n 3 + 1", "3n+1"),
    # quotation marks and subscripts, which would be dropped
    ("8.'0", "8"), ("2x+'7", "2x+7"), (r"\pi \c'dot 6", r"6\pi"), ("f'(x)", "f(x)"), ('"6', "6"),
    (r"82\,_3", "82"), ("82 _{3}", "82"), ("6x+5 _3", "6x+5"), ("5^{2}_3", "25"), ("(11)_{2}", "110"),
    # braces and backslashes that do not close
    (r"\frac{x}6}", r"\frac{x}{6}"), (r"\frac{x}{6", r"\frac{x}{6}"), ("x+1}{", "1+x"), (r"\boxedx", "2x/2"),
    # two values, or none
    (r"9.08 \approx 0", r"\frac{227}{25}"), ("9.08 ≈ 0", r"\frac{227}{25}"), ("x+1 ± 0", "1+x"),
    (r"5\text{ million}", "5"), (r"2+3\text{i}", "5"), (r"x \text{ or }y", "x"), (r"5\text{ squared}", "5"),
    (r"5\text{²}", "5"), (r"5\text{ 6}", "5"), ("0x", "0"),
    # names that are multiplied by nothing, or dropped as a unit; percent and infinity in products; and no pair
    ("73+0 tens", "73"), ("30+0K", "30"), (r"\left( 3, 10 +0ight)", "(3,10)"), ("0 tens", "0"), ("0e", "0"),
    ("8%00", "0"),
    (r"12x+3\text{r }", "12x+3"), (r"\pi \cdot 2st", r"2\pi"), ("(5, or 4)", "(5,4)"), ("8,12", "(8,12)"),
    ("(9) ,8", "(9,8)"), ("0.00 ^20.00 ^2", "0"), ("∞9", r"\frac{290}{59}"), (r"2\infty", "x"), ("9 inf", "x"),
    (r"\frac{5\sqrt{12\infty}}{20}", r"\frac{\sqrt{12}}{4}"), ("7281752e∞", "7281752000"), ("4^∞", "4"),
    # giants
    ("3!!", "720"), ("9^{9^9}", "x"), ("9^9^9", "x"), ("2^{99999}", "x"), ("2^{5!}", "x"), ("1000!", "x"),
    ("{" * 20 + "x+1" + "}" * 20, "1+x"), ("5" + "x" * 16, "y"),
]  # fmt: skip
SIMPLE = [
    ("x + 1", "x  +\n1", True), ("$\\frac{x}{2}$.", "\\frac{x}{2}", True), ("1/2", "0.5", True), ("1/3", "0.5", False),
    ("Tuesday", "\\text{Monday}", False), ("1 2 3", "x", False), ("x" * 1001, "x" * 1001, False), ("１", "x", False),
    ("x", "x" + "+x" * 600, False),
]  # fmt: skip


@pytest.mark.parametrize(("answer", "reference", "verdict"), [*SIMPLE, *((*pair, False) for pair in NEVER_ASKED)])
def test_what_is_plain_or_unclear_needs_no_worker(monkeypatch, answer, reference, verdict):
    monkeypatch.setattr(mathematics, "ask_worker", lambda *_: pytest.fail("asked the worker"))
    assert math_is_correct(answer, reference) is verdict


def test_the_math_reference_is_the_last_box():
    assert math_reference("First \\boxed{1}, then $\\boxed{\\frac{1}{2}}$.") == "\\frac{1}{2}"
    assert math_reference("It is \\fbox{3}") == "3"
    assert math_reference("Therefore $x = \\boxed 5$.") == "5"
    assert math_reference("\\boxed -1/2") == "-1/2"
    assert math_reference(" \\frac{1}{2}\n") == "\\frac{1}{2}"
    for solution in ("", "\\boxed{}", "\\boxed{5", "\\boxed \\frac{1}{2}", "word " * 300):
        with pytest.raises(ConfigError, match="answer_column"):
            math_reference(solution)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.sampled_from(["\\frac{1}", "{", "}", "1", "x", "(", ")", ",", "=", "\\sqrt", "|", "\\"]), max_size=8)
)
def test_no_latex_raises_or_is_worth_a_number_it_does_not_name(pieces):
    assert math_is_correct("".join(pieces), "77777", 2.0) is False


# --- The worker process -----------------------------------------------------------------------------------------------


def stop_current_worker() -> None:
    if mathematics.MATH.worker is not None:
        grader.stop_worker(mathematics.MATH.worker)
        mathematics.MATH.worker = None


@pytest.fixture(scope="module", autouse=True)
def no_worker_is_left():
    yield
    stop_current_worker()


def running_worker() -> subprocess.Popen:
    """The real worker, after it has given a right verdict."""
    assert math_is_correct("x+1", "1+x", NEW_WORKER)
    return mathematics.MATH.worker


def is_gone(pid: int, seconds: float) -> bool:
    """Whether the process ends within so many seconds; a zombie that nobody has waited for has ended."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except FileNotFoundError:
            return True
        time.sleep(0.02)
    return False


@pytest.mark.parametrize("tower", ["9^{9^{9^{9}}}+x", "10^{10^{10}} \\cdot y"])
def test_a_tower_is_wrong_when_its_time_is_over_and_the_next_answer_is_served(tower, monkeypatch):
    worker = running_worker()
    replies, read_line = [], grader.read_line
    monkeypatch.setattr(grader, "read_line", lambda *given: replies.append(read_line(*given)) or replies[-1])
    assert mathematics.ask_worker(tower, "5-x", NEW_WORKER) is False
    assert replies == [f"wrong {grader.WORKER_SECONDS}"]  # of processor time, also in the depths of C
    assert running_worker() is worker
    assert not mathematics.is_clear_math(tower)  # it would not even be asked


def test_a_worker_killed_between_two_answers_costs_nothing():
    first = running_worker()
    os.kill(first.pid, signal.SIGKILL)
    first.wait()
    assert running_worker().pid != first.pid


def test_the_worker_lets_ctrl_c_pass():
    worker = running_worker()
    assert os.getsid(worker.pid) == worker.pid  # the terminal's Ctrl-C goes to the session of this process
    os.kill(worker.pid, signal.SIGINT)
    assert running_worker() is worker


def test_ctrl_c_during_an_answer_does_not_leave_it_to_the_next_question(monkeypatch):
    worker = running_worker()

    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(grader, "read_line", interrupted)
        with pytest.raises(KeyboardInterrupt):
            math_is_correct("x+1", "1+x")
    assert mathematics.MATH.worker is None
    assert worker.poll() == -signal.SIGKILL
    assert math_is_correct("x+2", "1+x", NEW_WORKER) is False


def test_threads_share_a_worker_and_get_their_own_verdicts():
    worker = running_worker()
    verdicts = {}

    def ask(number):
        verdicts[number] = math_is_correct(f"x+{number}", f"{number % 2}+x", NEW_WORKER)

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert verdicts == {number: number < 2 for number in range(8)}
    assert mathematics.MATH.worker is worker


@linux
def test_the_worker_loads_no_torch_and_is_limited():
    worker = running_worker()
    assert "libtorch" not in Path(f"/proc/{worker.pid}/maps").read_text()
    assert b"\0PYTHONHASHSEED=0\0" in b"\0" + Path(f"/proc/{worker.pid}/environ").read_bytes()  # verdicts do not vary
    limits = Path(f"/proc/{worker.pid}/limits").read_text()
    assert [line.split()[3:5] for line in limits.splitlines() if line.startswith("Max address")] == [["2147483648"] * 2]
    assert [line.split()[4:6] for line in limits.splitlines() if line.startswith("Max core")] == [["0", "0"]]


SEVEN = "7=abcdefghijklmnopqrstuvwxyz"  # any word may be meant by it
FAKE = """
import mmap, os, signal, time
kept = []
def LatexExtractionConfig(): pass
def parse(text, *_, **__): return text
def verify(gold, target, **__):
    if target == "$abort$": os.abort()
    if target == "$memory$": kept.append(bytearray(3 << 30))
    if target == "$hoard$": kept.append(mmap.mmap(-1, 3 << 29))
    if target == "$print$": print("right", flush=True)
    if target == "$error$": raise ArithmeticError
    if target == "$exit$": raise SystemExit
    if target == "$deep$": return verify(gold, target) + 1
    if target == "$busy$": pow(7, 1 << 40)
    if target == "$stop$": os.kill(os.getpid(), signal.SIGSTOP)
    return target == "$good$" or not gold.startswith("$7=")
"""


@pytest.fixture
def fake_math_verify(tmp_path, monkeypatch):
    """Workers that start in this test find a math_verify that misbehaves on request, and start quickly."""
    stop_current_worker()
    (tmp_path / "math_verify.py").write_text(FAKE)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    yield tmp_path
    stop_current_worker()


@pytest.mark.parametrize(
    ("answer", "survives"),
    [
        ("bad", True), ("print", True), ("error", True), ("deep", True), ("memory", True), ("hoard", True),
        ("abort", False), ("exit", False), ("busy", True), ("stop", False),
    ],
)  # fmt: skip
def test_whatever_an_answer_does_it_is_wrong_and_the_next_one_is_served(fake_math_verify, answer, survives):
    assert math_is_correct("good", SEVEN, NEW_WORKER) is True
    worker = mathematics.MATH.worker
    seconds = 0.3 if answer == "stop" else NEW_WORKER
    assert math_is_correct(answer, SEVEN, seconds) is False
    assert math_is_correct("good", SEVEN, NEW_WORKER) is True
    assert (mathematics.MATH.worker is worker) is survives
    if not survives:
        assert worker.poll() is not None
        assert worker.stdin.closed and worker.stdout.closed


def test_starting_the_worker_is_on_no_answers_account(fake_math_verify):
    (fake_math_verify / "math_verify.py").write_text(FAKE + "time.sleep(1.0)")
    assert math_is_correct("good", SEVEN, 0.4) is True
    time.sleep(1.0)  # its time is over long since, but it has answered
    assert mathematics.MATH.worker.poll() is None


@linux
def test_a_verdict_of_a_tired_worker_counts(fake_math_verify):
    (fake_math_verify / "math_verify.py").write_text(FAKE.replace('== "$good$"', 'in ("$good$", "$hoard$")'))
    assert [math_is_correct("hoard", SEVEN, NEW_WORKER) for _ in range(4)] == [True] * 4  # 6 GB of 2 GB


def test_a_forked_child_has_a_worker_of_its_own(fake_math_verify):
    assert math_is_correct("good", SEVEN, NEW_WORKER)
    worker = mathematics.MATH.worker
    child = os.fork()
    if child == 0:
        own = math_is_correct("good", SEVEN, NEW_WORKER) and mathematics.MATH.worker.pid != worker.pid
        os._exit(0 if own and worker.stdin.closed else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert math_is_correct("good", SEVEN, NEW_WORKER) and mathematics.MATH.worker is worker


def test_a_missing_package_is_one_sentence(fake_math_verify):
    (fake_math_verify / "math_verify.py").write_text("raise ImportError('no such luck')")
    with pytest.raises(ConfigError, match=r"math-verify.*no such luck"):
        math_is_correct("good", SEVEN)
    for broken in ("import os; os.abort()", FAKE.replace("not gold.", "gold.")):
        (fake_math_verify / "math_verify.py").write_text(broken)
        with pytest.raises(ConfigError, match="math-verify"):
            math_is_correct("good", SEVEN)


@linux
@pytest.mark.parametrize("busy", [False, True])
def test_the_worker_dies_with_its_parent(fake_math_verify, busy):
    code = """if True:
        import time
        from src.tasks import grader, math_is_correct, mathematics
        assert math_is_correct("good", "SEVEN", 60.0)
        print(mathematics.MATH.worker.pid, flush=True)
        math_is_correct("busy" if BUSY else "good", "SEVEN", 60)
        time.sleep(60)
    """.replace("BUSY", str(busy)).replace("SEVEN", SEVEN)
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=PROJECT)
    worker = int(parent.stdout.readline())
    time.sleep(0.2)  # into the answer: there the worker does not see that its input has ended
    assert not is_gone(worker, 0.05)
    parent.kill()
    parent.wait()
    parent.stdout.close()
    assert is_gone(worker, 10)
