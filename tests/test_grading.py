"""Verdicts on answers: hand-written cases, hostile texts, and the process that runs math-verify.

The arithmetic of Countdown is tested in test_rl_datasets.py.
"""

import os
import signal
import subprocess
import sys
import threading
import time
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from src import grading
from src.config import ConfigError
from src.grading import (
    final_answer,
    gsm8k_reference,
    math_is_correct,
    math_reference,
    number_is_correct,
    parse_number,
)

PROJECT = Path(__file__).parent.parent
EVERY_NUMBER = " ".join(str(number) for number in range(1, 101))
linux = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc, or needs a limit that only Linux keeps")
NEW_WORKER = 60.0  # seconds: under load a process may take long to start; no limit under test


# ---------------------------------------------------------------------------------------------------------------------
# Which part of a completion is the answer
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("completion", "answer"),
    [
        ("<answer>18</answer>", "18"),
        ("<think>a</think>\n<answer> 18\n</answer>", "18"),
        ("so \\boxed{18}.", "18"),
        ("\\fbox{18}", "18"),
        ("\\boxed {18}", "18"),
        ("\\boxed{\\frac{1}{2}}", "\\frac{1}{2}"),
        ("\\boxed{\\{1, 2\\}}", "\\{1, 2\\}"),
        ("\\boxed{ \\} }", "\\}"),
        ("<answer>\\boxed{18}</answer>", "18"),
        ("<answer>$\\boxed{18}$ dollars</answer>", "18"),
        ("<answer>\\boxed{1} or \\boxed{2}</answer>", "2"),
        # the one that ends last
        ("<answer>1</answer> <answer>2</answer>", "2"),
        ("\\boxed{1} \\boxed{2}", "2"),
        ("<answer>1</answer> \\boxed{2}", "2"),
        ("\\boxed{1} <answer>2</answer>", "2"),
        ("<think>\\boxed{1}</think> <answer>2</answer>", "2"),
        ("<think>\\boxed{1}</think> it is 2", "1"),
        ("<think><answer>1</answer></think><answer>2</answer> bye", "2"),
        # nested
        ("\\boxed{\\boxed{5}}", "5"),
        ("\\boxed{1 \\boxed{2} \\fbox{3} 4}", "3"),
        ("<answer>1<answer>2</answer></answer>", "2"),
        ("<answer>\\boxed{\\boxed{7}}</answer>", "7"),
        # not complete
        ("<answer>1</answer> <answer>2", "1"),
        ("\\boxed{1} \\boxed{2", "1"),
        ("\\boxed{1 \\boxed{2}", "2"),
        ("\\boxed{\\frac{1}{2}", None),
        ("<answer>18", None),
        ("18</answer>", None),
        ("\\boxed{18", None),
        ("\\boxed{18\\}", None),
        ("boxed{18}", None),
        ("\\unboxed{18}", None),
        ("\\boxedx{18}", None),
        ("\\boxed 18", None),
        ("18", None),
        ("", None),
        ("{\\boxed{18}", "18"),
        ("}\\boxed{18}", "18"),
        # injected
        ("<answer>\\boxed{1</answer>", "\\boxed{1"),
        ("<answer>1}</answer>", "1}"),
        ("<answer>\\boxed{1</answer>}", "1</answer>"),
        ("\\boxed{<answer>1</answer>}", "<answer>1</answer>"),
        ("<answer></answer>", ""),
        ("\\boxed{}", ""),
        ("<ANSWER>18</ANSWER>", None),
        ("< answer>18</answer>", None),
        ("y" * 100_000 + "\\boxed{18}", "18"),
        ("<answer>18</answer>" + "y" * 90_000, "18"),
        ("<answer>18</answer>" + "y" * 100_000, None),
    ],
)
def test_the_answer_is_the_block_or_box_that_ends_last(completion, answer):
    assert final_answer(completion) == answer


@pytest.mark.parametrize(
    "flood",
    [
        "\\boxed{",
        "\\boxed",
        "\\boxed ",
        "{",
        "}",
        "{}",
        "\\",
        "\\{",
        "<answer>",
        "</answer>",
        "<answer>\\boxed{",
        "<answer></answer>",
        "\\boxed{1}",
        "\\boxed{\\boxed{1} ",
        "$",
        " ",
        ". ",
        "9",
        "1,",
        "\\frac{1}",
        "-",
    ],
)
def test_a_flood_is_graded_in_linear_time(flood):
    # a quadratic scan of 100 kB takes minutes; every one of these takes milliseconds
    begin = time.monotonic()
    for text in (flood * (100_000 // len(flood)), "\\boxed" + " " * 100_000, "\\boxed{" * 9000 + "1" + "}" * 9000):
        final_answer(text)
        final_answer("<answer>" + text + "</answer>")
        assert not number_is_correct(text, "18")
        assert not math_is_correct(text, "18")
        final = flood * (1000 // len(flood))  # the longest answer that is looked at
        parse_number(final)
        grading.clean_latex(final)
    assert time.monotonic() - begin < 4


# ---------------------------------------------------------------------------------------------------------------------
# Numbers
# ---------------------------------------------------------------------------------------------------------------------

NUMBERS = [
    ("18", "18"),
    (" 18\n", "18"),
    ("018", "18"),
    ("18.", "18"),
    ("18.0", "18"),
    ("18.00", "18"),
    ("+18", "18"),
    ("-18", "-18"),
    ("- 18", "-18"),
    ("−18", "-18"),
    ("-0", "0"),
    ("18!", "18"),
    ("(18)", "18"),
    ("18 dollars", "18"),
    ("18dollars", "18"),
    ("18 km/h", "18"),
    ("18/hour", "18"),
    ("18-year-old", "18"),
    ("$18", "18"),
    ("$ 18", "18"),
    ("18$", "18"),
    ("\\$18", "18"),
    ("$\\$18$", "18"),
    ("-$18", "-18"),
    ("$-18", "-18"),
    ("€18", "18"),
    ("18 €", "18"),
    ("£18.50", "18.5"),
    ("-£18.50", "-18.5"),
    ("$18$", "18"),
    ("$$18$$", "18"),
    ("\\(18\\)", "18"),
    ("\\[ 18 \\]", "18"),
    ("\\boxed{18}", "18"),
    ("**18**", "18"),
    ("`18`", "18"),
    ("#### 18", "18"),
    ("x = 18", "18"),
    ("x=-18", "-18"),
    ("5 + 13 = 18", "18"),
    ("5 × 3 = 3 × 5 = 15", "15"),
    ("The answer is 18.", "18"),
    ("The final answer is: $18$.", "18"),
    ("Answer: -5", "-5"),
    ("She makes 18 dollars every day.", "18"),
    ("it is 18. The answer is 18", "18"),
    ("1,234", "1234"),
    ("1234", "1,234"),
    ("$1,234,567.89", "1234567.89"),
    ("1{,}234", "1234"),
    ("10,\\!080", "10080"),
    ("0.5", "1/2"),
    (".5", "1/2"),
    ("total: .5", "1/2"),
    ("...18", "18"),
    ("3/4", "0.75"),
    ("3 / 4", "0.75"),
    ("-3/4", "-0.75"),
    ("6/8", "3/4"),
    ("1 1/2", "1.5"),
    ("-1 1/2", "-1.5"),
    ("\\frac{3}{4}", "0.75"),
    ("-\\frac{3}{4}", "-0.75"),
    ("\\frac{-3}{4}", "-0.75"),
    ("\\dfrac{3}{4}", "0.75"),
    ("\\frac34", "0.75"),
    ("1\\frac{1}{2}", "1.5"),
    ("1 \\frac12 cups", "1.5"),
    ("\\text{18}", "18"),
    ("18 \\text{ dollars}", "18"),
    ("18\\,\\mathrm{cm}", "18"),
    ("1e3", "1000"),
    ("1.5E+2", "150"),
    ("5e-1", "0.5"),
    ("50%", "50"),
    ("50\\%", "50"),
    ("50 percent", "50"),
    ("90°", "90"),
    ("90^\\circ", "90"),
    ("90^{\\circ}", "90"),
    ("18 яблок", "18"),
    ("18元。", "18"),
    ("9" * 40, "9" * 40),
]
NOT_THE_NUMBER = [
    ("17", "18"),
    ("-18", "18"),
    ("−18", "18"),
    ("18", "-18"),
    ("1.8", "18"),
    ("180", "18"),
    ("118", "18"),
    ("18.01", "18"),
    ("18.0000000001", "18"),
    ("17.9999999999", "18"),
    ("0.333333", "1/3"),
    ("0.33", "1/3"),
    ("0.5", "50"),
    ("50%", "0.5"),
    ("18/1.5", "12"),
    ("", "18"),
    (" ", "18"),
    (".", "18"),
    ("$", "18"),
    ("-", "0"),
    ("nothing", "0"),
    ("eighteen", "18"),
    ("NaN", "18"),
    ("nan", "0"),
    ("inf", "18"),
    ("-Infinity", "0"),
    ("\\infty", "0"),
    # several numbers
    ("18 or 20", "18"),
    ("18 or 20", "20"),
    ("18, 20", "18"),
    ("18\n20", "20"),
    ("18 20", "1820"),
    ("1 8", "18"),
    ("18-20", "18"),
    ("17–18", "18"),
    (EVERY_NUMBER, "18"),
    (EVERY_NUMBER.replace(" ", ","), "18"),
    (EVERY_NUMBER.replace(" ", " = "), "18"),
    ("1,2", "12"),
    ("1,2", "1.2"),
    ("1,23", "1.23"),
    ("12,34,567", "1234567"),
    ("1234,567", "1234567"),
    ("0,018", "18"),
    ("5,5", "5"),
    ("1.2.3", "1.2"),
    ("3:30", "3"),
    ("3/4/5", "3/4"),
    ("1 3/2", "2.5"),
    ("0\n1/3", "1/3"),
    # operators and words that change the value
    ("9+9", "9"),
    ("9 + 9", "18"),
    ("9*9", "9"),
    ("9**9", "9"),
    ("3^2", "9"),
    ("18^2", "18"),
    ("18²", "18"),
    ("5 times 5", "5"),
    ("-(18)", "18"),
    ("--18", "18"),
    ("~18", "18"),
    ("≈18", "18"),
    ("<18", "18"),
    ("x <= 18", "18"),
    ("x != 18", "18"),
    ("x \\neq 18", "18"),
    ("\\pm 18", "18"),
    ("\\sqrt{18}", "18"),
    ("18x", "18"),
    ("x18", "18"),
    ("H18", "18"),
    ("COVID-19", "-19"),
    ("the .5.5 rule", "0.5"),
    ("1,8000", "18000"),
    ("1,0005", "1000"),
    ("1,2345", "1"),
    ("18\\pi", "18"),
    ("18π", "18"),
    ("18k", "18"),
    ("2 dozen", "2"),
    ("18 million", "18"),
    ("minus 18", "18"),
    ("negative 18", "18"),
    ("18 and a half", "18"),
    ("18 = x", "18"),
    ("18 =", "18"),
    ("9^{9^{9}}", "9"),
    ("9**9**9**9", "9"),
    ("1e999", "1"),
    ("5e555", "5"),
    ("1e18", "18"),
    ("1/0", "0"),
    ("\\frac{18}{0}", "18"),
    ("\\frac{1}{8}", "18"),
    ("9" * 41, "9" * 41),
    ("18" + " " * 999, "18"),
    # digits and signs that are no ASCII
    ("１８", "18"),
    ("1８", "1"),
    ("١٨", "18"),
    ("－18", "18"),
    ("－18", "-18"),
    ("–18", "18"),
    ("18½", "18"),
    ("①8", "8"),
    ("5．5", "5"),
    ("5，5", "5"),
    ("5\u200b5", "5"),
    ("5\u200b5", "55"),
    ("1\u0338" + "8", "18"),
    ("18\x00", "18"),
    # tags and code
    ("18</answer>", "18"),
    ("<answer>18", "18"),
    ("eval('9+9')", "18"),
    ("eval('9+9')", "9"),
    ("{18}", "18"),
    ("1_8", "18"),
    ("0x12", "18"),
    ("0b1", "1"),
]


@pytest.mark.parametrize(("answer", "reference"), NUMBERS)
def test_the_right_number(answer, reference):
    assert number_is_correct(answer, reference) is True


@pytest.mark.parametrize(("answer", "reference"), NOT_THE_NUMBER)
def test_not_the_right_number(answer, reference):
    assert number_is_correct(answer, reference) is False


def test_a_number_without_a_reference_is_wrong_and_not_none_equal_to_none():
    assert number_is_correct("nothing", "nothing") is False


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
        "{}",
        "{} dollars",
        "{}.",
        "The answer is {}",
        "x = {}",
        "1 + 2 = {} eggs",
        "\\boxed{{{}}}",
        "**{}**",
        "${}$",
        "{}%",
    ]
)


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
        "\\frac",
        "{",
        "}",
        "1",
        "12",
        "/",
        " ",
        "-",
        "=",
        "^",
        "\\text{",
        "\\boxed{",
        "<answer>",
        "</answer>",
        "$",
        "\\",
        ",",
    ]
)


@settings(max_examples=200, deadline=None)
@given(st.one_of(st.text(), st.lists(LATEX_PIECES, max_size=25).map("".join)))
def test_no_text_raises(text):
    assert isinstance(final_answer(text), str | None)
    assert isinstance(parse_number(text), Fraction | None)
    assert number_is_correct(text, "-77777") is False
    assert isinstance(grading.is_words(grading.clean_latex(text)), bool)


# ---------------------------------------------------------------------------------------------------------------------
# Mathematics
# ---------------------------------------------------------------------------------------------------------------------

EQUAL = [
    ("5", "5"),
    ("5.", "5"),
    ("$5$", "5"),
    ("\\(5\\)", "5"),
    ("\\boxed{5}", "5"),
    ("\\text{5}", "5"),
    ("The answer is 5", "5"),
    ("\\frac12", "0.5"),
    ("0.5", "\\frac{1}{2}"),
    ("1/2", "\\dfrac{1}{2}"),
    ("\\tfrac{2}{4}", "\\frac{1}{2}"),
    ("1\\frac12", "\\frac{3}{2}"),
    ("1 1/2", "\\frac{3}{2}"),
    ("−5", "-5"),
    ("10080", "10,\\!080"),
    ("10,080", "10080"),
    ("18.90", "\\$18.9"),
    ("x=5", "5"),
    ("5", "x=5"),
    ("x = \\frac{1}{2}", "0.5"),
    ("2x+1", "1 + 2x"),
    ("y=2x+1", "2x+1"),
    ("x^2+2x+1", "(x+1)^2"),
    ("2\\sqrt{2}", "\\sqrt{8}"),
    ("\\frac{\\sqrt{2}}{2}", "\\frac{1}{\\sqrt{2}}"),
    ("2^{10}", "1024"),
    ("2^{100}", "2^{100}"),
    ("\\pi/2", "\\frac{\\pi}{2}"),
    ("2π", "2\\pi"),
    ("1+2i", "2i+1"),
    ("2,1", "1,2"),
    ("1 \\text{ and } 2", "1,2"),
    ("1, 2", "\\{1,2\\}"),
    ("\\pm 2", "2,-2"),
    ("(1, 2)", "(1,2)"),
    ("\\left(1,2\\right)", "(1,2)"),
    ("(\\frac{1}{2}, 3)", "\\left(0.5,3\\right)"),
    ("(-\\infty, 2]", "(-\\infty,2]"),
    ("(-∞,2]", "(-\\infty,2]"),
    ("[1,2) \\cup (3,4]", "(3,4] \\cup [1,2)"),
    ("\\begin{pmatrix} 1 \\\\ 2 \\end{pmatrix}", "\\begin{pmatrix}1\\\\2\\end{pmatrix}"),
    ("90^\\circ", "90"),
    ("90°", "90^\\circ"),
    ("5 \\text{ cm}", "5"),
    ("50\\%", "50"),
    ("(A)", "\\text{(A)}"),
    ("A", "\\text{(A)}"),
    ("\\text{(A)}", "A"),
    ("\\textbf{(A)}", "\\text{(A)}"),
    ("Monday", "\\text{Monday}"),
    ("\\text{even}", "even"),
    ("Even", "even"),
    ("2 > x", "x < 2"),
    ("11_2", "11_2"),
    ("11_{2}", "11_2"),
    ("\\emptyset", "\\{\\}"),
    ("4!", "24"),
    ("\\log_2 8", "3"),
]
NOT_EQUAL = [
    ("6", "5"),
    ("-5", "5"),
    ("5.0000001", "5"),
    ("0.333333", "\\frac{1}{3}"),
    ("0.33", "\\frac{1}{3}"),
    ("3.14", "\\pi"),
    ("3.141593", "\\pi"),
    ("", "5"),
    ("$", "5"),
    ("\\boxed{}", "5"),
    ("\\text{}", "5"),
    ("5", ""),
    ("", ""),
    ("NaN", "5"),
    ("\\infty", "5"),
    ("-\\infty", "\\infty"),
    ("\\frac{0}{0}", "0"),
    ("\\frac{5}{0}", "\\infty"),
    ("\\infty-\\infty", "0"),
    ("5x", "5"),
    ("5\\pi", "5"),
    ("x", "5"),
    ("x=5", "y=5"),
    ("x=5", "6"),
    ("2x+2", "2x+1"),
    ("x", "y"),
    ("\\sqrt{2}", "2"),
    ("1,2", "1"),
    ("1,2", "1,2,3"),
    ("1,2", "1,3"),
    ("(2,1)", "(1,2)"),
    ("(1,2)", "[1,2]"),
    ("(5,-2)", "(3,-1)"),
    ("(1,2,4)", "(1,2,3)"),
    ("5 or 6", "5"),
    ("5 \\text{ or } 6", "6"),
    ("x = 5 \\text{ or } x = 6", "5"),
    ("5 \\text{ or maybe 6}", "5"),
    ("5 \\text{(6)}", "5"),
    ("5. Or 6", "6"),
    ("1 2 3", "6"),
    ("5 1", "6"),
    ("5 1", "51"),
    ("1 1 \\frac{1}{2}", "2.5"),
    ("5\\quad 1", "6"),
    ("$5$ $6$", "5"),
    ("$5$$6$", "56"),
    (EVERY_NUMBER, "18"),
    (EVERY_NUMBER, "5050"),
    (EVERY_NUMBER.replace(" ", ", "), "18"),
    ("answer: $5$, answer: $6$", "6"),
    ("the answer \\frac{1}{2} + 7", "\\frac{1}{2}"),
    ("so the answer \\frac{1}{2} + 7", "\\frac{1}{2}"),
    ("answer \\frac{1}{2}, answer \\frac{1}{3}", "\\frac{1}{3}"),
    ("1/2 \\", "\\frac{1}{2}"),
    ("\\frac{1}{2} \\mid \\frac{1}{3}", "\\frac{1}{3}"),
    ("11_3", "11_2"),
    ("B", "\\text{(A)}"),
    ("\\text{(A) (B)}", "\\text{(A)}"),
    ("seat", "east"),
    ("on", "\\text{no}"),
    ("odd", "even"),
    ("even number", "even"),
    ("x>2", "x<2"),
    ("\\neq 5", "5"),
    ("１８", "18"),
    ("x=１８", "18"),
    ("18²", "324"),
    ("5²", "25"),
    ("\\boxed{5", "5"),
    ("5}", "5"),
    ("{5", "5"),
    ("</answer>5", "5"),
    ("\\begin{matrix}", "5"),
    ("\\", "5"),
    ("^", "5"),
    ("__import__('os').system('true')", "5"),
    ("5" + " " * 1000, "5"),
    ("5" * 1001, "5" * 1001),
]


@pytest.mark.parametrize(("answer", "reference"), EQUAL)
def test_mathematically_equal(answer, reference):
    assert math_is_correct(answer, reference, NEW_WORKER) is True


@pytest.mark.parametrize(("answer", "reference"), NOT_EQUAL)
def test_not_mathematically_equal(answer, reference):
    assert math_is_correct(answer, reference, NEW_WORKER) is False


def test_there_are_enough_cases_by_hand():
    assert len(NUMBERS) + len(NOT_THE_NUMBER) >= 150
    assert len(EQUAL) + len(NOT_EQUAL) >= 120


@pytest.mark.parametrize(
    ("answer", "reference", "verdict"),
    [
        ("x + 1", "x  +\n1", True),
        ("$\\frac{x}{2}$.", "\\frac{x}{2}", True),
        ("1/2", "0.5", True),
        ("1/3", "0.5", False),
        ("Tuesday", "\\text{Monday}", False),
        ("1 2 3", "x", False),
        ("x" * 1001, "x" * 1001, False),
        ("１", "x", False),
        ("x", "x" + "+x" * 600, False),
    ],
)
def test_simple_cases_need_no_worker(monkeypatch, answer, reference, verdict):
    def refuse(*_):
        raise AssertionError("asked the worker")

    monkeypatch.setattr(grading, "ask_worker", refuse)
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


# ---------------------------------------------------------------------------------------------------------------------
# The worker process
# ---------------------------------------------------------------------------------------------------------------------


def stop_current_worker() -> None:
    if grading.WORKER is not None:
        grading.stop_worker(grading.WORKER)
        grading.WORKER = None


@pytest.fixture(scope="module", autouse=True)
def no_worker_is_left():
    yield
    stop_current_worker()


def running_worker() -> subprocess.Popen:
    """The real worker, after it has given a right verdict."""
    assert math_is_correct("x+1", "1+x", NEW_WORKER)
    return grading.WORKER


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
    replies, read_line = [], grading.read_line
    monkeypatch.setattr(grading, "read_line", lambda *given: replies.append(read_line(*given)) or replies[-1])
    assert grading.ask_worker(tower, "5-x", NEW_WORKER) is False
    assert replies == [f"wrong {grading.WORKER_SECONDS}"]  # of processor time, also in the depths of C
    assert running_worker() is worker
    assert not grading.is_clear_math(tower)  # it would not even be asked


def test_one_worker_serves_many_answers():
    first = running_worker()
    assert running_worker() is first


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
        patch.setattr(grading, "read_line", interrupted)
        with pytest.raises(KeyboardInterrupt):
            math_is_correct("x+1", "1+x")
    assert grading.WORKER is None
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
    assert grading.WORKER is worker


@linux
def test_the_worker_loads_no_torch_and_is_limited():
    worker = running_worker()
    assert "libtorch" not in Path(f"/proc/{worker.pid}/maps").read_text()
    assert b"\0PYTHONHASHSEED=0\0" in b"\0" + Path(f"/proc/{worker.pid}/environ").read_bytes()  # verdicts do not vary
    limits = Path(f"/proc/{worker.pid}/limits").read_text()
    assert [line.split()[3:5] for line in limits.splitlines() if line.startswith("Max address")] == [["2147483648"] * 2]
    assert [line.split()[4:6] for line in limits.splitlines() if line.startswith("Max core")] == [["0", "0"]]


def test_importing_the_grader_loads_nothing_heavy():
    code = (
        "import sys, src.grading; print([m for m in ('torch', 'sympy', 'math_verify', 'datasets') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=PROJECT, check=True)
    assert done.stdout == "[]\n"


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
        ("bad", True),
        ("print", True),
        ("error", True),
        ("deep", True),
        ("memory", True),
        ("hoard", True),
        ("abort", False),
        ("exit", False),
        ("busy", True),
        ("stop", False),
    ],
)
def test_whatever_an_answer_does_it_is_wrong_and_the_next_one_is_served(fake_math_verify, answer, survives):
    assert math_is_correct("good", SEVEN, NEW_WORKER) is True
    worker = grading.WORKER
    seconds = 0.3 if answer == "stop" else NEW_WORKER
    assert math_is_correct(answer, SEVEN, seconds) is False
    assert math_is_correct("good", SEVEN, NEW_WORKER) is True
    assert (grading.WORKER is worker) is survives
    if not survives:
        assert worker.poll() is not None
        assert worker.stdin.closed and worker.stdout.closed


def test_starting_the_worker_is_on_no_answers_account(fake_math_verify):
    (fake_math_verify / "math_verify.py").write_text(FAKE + "time.sleep(1.0)")
    assert math_is_correct("good", SEVEN, 0.4) is True
    time.sleep(1.0)  # its time is over long since, but it has answered
    assert grading.WORKER.poll() is None


@linux
def test_a_verdict_of_a_tired_worker_counts(fake_math_verify):
    (fake_math_verify / "math_verify.py").write_text(FAKE.replace('== "$good$"', 'in ("$good$", "$hoard$")'))
    assert [math_is_correct("hoard", SEVEN, NEW_WORKER) for _ in range(4)] == [True] * 4  # 6 GB of 2 GB


def test_a_forked_child_has_a_worker_of_its_own(fake_math_verify):
    assert math_is_correct("good", SEVEN, NEW_WORKER)
    worker = grading.WORKER
    child = os.fork()
    if child == 0:
        own = math_is_correct("good", SEVEN, NEW_WORKER) and grading.WORKER.pid != worker.pid
        os._exit(0 if own and worker.stdin.closed else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert math_is_correct("good", SEVEN, NEW_WORKER) and grading.WORKER is worker


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
        from src import grading
        assert grading.math_is_correct("good", "SEVEN", 60.0)
        print(grading.WORKER.pid, flush=True)
        grading.math_is_correct("busy" if BUSY else "good", "SEVEN", 60)
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


@pytest.mark.parametrize(
    "answer",
    ["square root of 18", "log 18", "18 hundredths", "18 plus one", "18 times two", "18 or nineteen", "not 18",
     "less than 18", "18 factorial", "opposite of 18", "zero point 18", "18 crore", "18 and two thirds"],
)  # fmt: skip
def test_words_that_change_a_number_are_not_units(answer):
    assert not number_is_correct(answer, "18")


@pytest.mark.parametrize(
    "answer", ["18 square feet", "18 quarters", "18 more apples", "18 apples and pears", "18 points"]
)
def test_units_are_units(answer):
    assert number_is_correct(answer, "18")


@pytest.mark.parametrize(
    ("answer", "reference"),
    [("12565_{3}", "12565"), (r"9_{3}\pi", r"9\pi"), ("T millione i rewsnas 0.", "0"), (r"(6,\text{or }11)", "(6,11)")],
)
def test_what_fuzzing_found_math_verify_to_accept(answer, reference):
    assert not math_is_correct(answer, reference)


@pytest.mark.parametrize(("answer", "reference"), [("101_2", "101_{2}"), ("11", "11_2"), ("x=0", "0"), (r"0\pi", "0")])
def test_its_neighbours_are_right(answer, reference):
    assert math_is_correct(answer, reference)


@pytest.mark.parametrize(
    ("answer", "reference"),
    [
        # numbers side by side, which would be multiplied, and braces that show nothing between them
        ("0.0.0", "0"), ("2.5.4", "1"), ("2{3}", "6"), ("{2}3", "6"), ("2{}3", "6"),
        (r"2\thinspace3", "6"), (r"2\ldots3", "6"), ("0M7.0M7", "0"), ("x2", "2x"), ("n 3 + 1", "3n+1"),
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
    ],
)  # fmt: skip
def test_what_math_verify_would_mend_or_choke_on_is_wrong_before_it_is_asked(monkeypatch, answer, reference):
    def refuse(*_):
        raise AssertionError("asked the worker")

    monkeypatch.setattr(grading, "ask_worker", refuse)
    assert math_is_correct(answer, reference) is False


@pytest.mark.parametrize(
    ("answer", "reference"),
    [
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
        (r"-\infty < x \le 2", r"-\infty < x \leq 2"), (r"50\% \text{ of it}", "50"), ("((4,5))", "(4,5)"),
        ("X+1", "x+1"), (r"8\pi \text{ m}", r"8\pi"), ("(1,2) or (3,4)", "(1,2), (3,4)"), ("f(x)=2x", "2x"),
        (r"0 \cdot \pi", "0"), (r"5\text{ and }6", "5 and 6"),
    ],
)  # fmt: skip
def test_what_a_model_may_well_write_is_still_read(answer, reference):
    assert math_is_correct(answer, reference, NEW_WORKER) is True


@pytest.mark.parametrize(
    ("answer", "reference", "verdict"),
    [
        ("3", "3t", False), ("2", "2ab", False), (r"\pi r^2", r"\pi r^2 h", False), ("0.5", r"\frac{1}{2}h", False),
        (r"t \cdot 3", "3t", True), ("3 t", "3t", True), ("2ba", "2ab", True), (r"h\pi r^2", r"\pi r^2 h", True),
        ("x=3t", "3t", True), ("5 m", "5", True), (r"5 \text{ m}", "5", True), ("1, 234", "1,234", False),
        ("(1, 2)", "(1,2)", True),
    ],
)  # fmt: skip
def test_a_name_at_the_end_is_no_unit(answer, reference, verdict):
    assert math_is_correct(answer, reference, NEW_WORKER) is verdict
