"""Fuzzing: a million completions through the rewards of countdown, gsm8k and math: no error, nothing slow, none fooled.

    uv run python -m benchmarks.fuzz_rewards                    # 1,000,000 cases, a quarter of an hour on 2 cores
    uv run python -m benchmarks.fuzz_rewards --cases 3000 --task gsm8k --seed 7

A case is an answer near the right one, in tags or a box, then often damaged: tags cut, repeated or nested, digits of
other scripts, extra numbers, floods of up to 100 kB, random bytes. What earns an answer of 1 is read again by an
evaluator of this file, which shares no code with src/tasks; what is right by construction must earn it. Cases have
generators of their own, so `make_case(task, seed, index)` repeats one. With --worker_cases only the first answers that
need math-verify go to its process, and the others count as not graded. The last line of stdout is one JSON document;
the exit code is 1 if anything failed.
"""

import argparse
import ast
import json
import math
import operator
import random
import re
import sys
import time
import unicodedata
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from fractions import Fraction
from multiprocessing import get_context
from unittest.mock import patch

from src.config import DataConfig
from src.records import Episode, Group, Problem
from src.rl_datasets import get_task
from src.tasks import Rewards, grader, mathematics

TASKS = ("countdown", "gsm8k", "math")
SLOWEST_MS = 50.0  # of this thread's processor time: other processes take none of it
SLOWEST_WORKER_MS = 1000 * grader.WORKER_SECONDS + 50  # of the worker's, which counts its own; 50 to notice the end
FLOOD_LENGTH = 100_000
GRADE_SAMPLE = 400  # cases that also go through Rewards.grade
SHOWN_FAILURES = 10

UNITS = ("dollars", "apples", "cm", "km/h", "square feet", "hours", "of them", "percent", "quarters", "students", "am",
         "ft^2", "cm²", "m^3", "square units")  # fmt: skip
HOSTILE = (
    *("<answer>", "</answer>", "<think>", "</think>", "<answer", "/answer>", "</answer><answer>", "< answer >"),
    *("\\boxed{", "\\fbox{", "\\boxed", "\\boxed {", "\\frac{", "\\frac12", "}{", "{", "}", "\\{", "\\}", "\\", "$"),
    *("\\text{", "\\text{or }", "\\%", "\\cdot ", "\\times ", "^2", "^", "_3", "_{3}", "\\sqrt{", "\\sqrt2", "\\pm "),
    *("１８", "١٨", "²", "½", "万", "五", "Ⅷ", "①", "𝟙", "％", "＄", "，", "．", "＝", "￥", "−", "–", "×", "÷"),
    *("\u200b", "\u202e", "\x00", "\ud800", "\u0338", "\u00a0", "\U0001f600", "\r\n", "\n", "\t", " ", "  ", "\x1c"),
    *("∞", "π", "|", "#", "!", " tens"),
    *("e5", "E-3", "e", "k", "K", "M", "x", "i", "%", " million", " dozen", " half", "hundred", " thousandths"),
    *(" or ", " and ", " is ", " answer ", "minus ", "negative ", "twice ", "triple ", " squared", "sqrt ", "####"),
    *("+", "-", "*", "/", "**", "//", "(", ")", "()", "+0", "*1", "-0", "=", "==", "!=", ">=", "≈", "~", "<", ">"),
    *(",", ",000", "000", ".0", ".5", ".", "..", "0", "1", "9", "99", "1/2", " 1/2", "/1", "/0", ":", ";", "'", '"'),
)  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One completion to grade."""

    text: str
    row: dict
    truth: object  # what the evaluator compares with: the row, a Fraction or LaTeX
    right: bool  # by construction: it must be rewarded


# ---------------------------------------------------------------------------------------------------------------------
# Completions around an answer
# ---------------------------------------------------------------------------------------------------------------------


def wrap(generator: random.Random, answer: str, other: str, boxes: bool) -> tuple[str, bool]:
    """A completion that gives `answer` (True), or one whose answer may be another or none (False)."""
    block = f"<answer>{answer}</answer>"
    keeping = [
        f"<think>so {other}</think>\n<answer> {answer} </answer>",
        f"{other}</think> <answer>{answer}</answer>\n",
        f"<answer>{other}</answer> no: {block}",
        f"<answer>{other}<answer>{answer}</answer>",
        f"<think><answer>{other}</answer></think>{block} </answer>",
        f"{block} <answer>{other}",
    ]
    losing = [
        f"{block} <answer>{other}</answer>",
        f"<answer>{answer}",
        f"{answer}</answer>",
        f"<answer>{answer}</answe>",
        f"<answer>{answer[: len(answer) // 2]}</answer><answer>{answer[len(answer) // 2 :]}</answer>",
        f"<answer><think>{answer}</think></answer>",
        f"<ANSWER>{answer}</ANSWER>",
        answer,
    ]
    if boxes:
        box = f"\\boxed{{{answer}}}"
        keeping += [
            f"so ${box}$.",
            f"\\boxed{{{other}}} then \\fbox{{{answer}}} \\boxed{{{other}",
            f"<answer>{other}</answer> {box}",
            f"\\boxed{{{other}}} <answer>{box}</answer>",
            f"\\boxed {{\\fbox{{{answer}}}}}",
        ]
        losing += [f"{box} \\boxed{{{other}}}", f"\\boxed{{{answer}", f"\\boxed {answer}", f"{block} \\fbox{{{other}}}"]
    keeps = generator.random() < 0.8
    return generator.choice(keeping if keeps else losing), keeps


def damage(generator: random.Random, text: str) -> str:
    """One small random change: cut, insert, double, replace or move."""
    begin = generator.randrange(len(text) + 1)
    end = min(len(text), begin + generator.choice((0, 0, 1, 1, 2, 3, 8)))
    piece = text[begin:end]
    new = generator.choice(("", piece * 2, piece[::-1], generator.choice(HOSTILE), generator.choice(HOSTILE)))
    return text[:begin] + new + text[end:]


def flood(generator: random.Random, text: str) -> str:
    """The text with something repeated to up to 100 kB in the middle of it."""
    token = generator.choice((*HOSTILE, "<answer>1</answer>", "1+", "((1)", "\\boxed{1}", "1,", "1 ", "a "))
    begin = generator.randrange(len(text) + 1)
    return text[:begin] + token * (generator.randint(100, FLOOD_LENGTH) // len(token)) + text[begin:]


def random_text(generator: random.Random) -> str:
    """Bytes read as text, with half surrogates where a tokenizer of bytes would have them."""
    data = generator.randbytes(generator.randint(0, 60))
    return data.decode(generator.choice(("utf-8", "latin-1", "utf-16-le")), generator.choice(("replace", "ignore")))


def make_case(task: str, seed: int, index: int) -> Case:
    """The case of that number."""
    generator = random.Random(f"fuzz {task} {seed} {index}")
    answer, other, right, row, truth = ANSWERS[task](generator)
    kind = generator.random()
    if right and kind > 0.6:  # a right answer, damaged before it is wrapped: the tags stay whole
        for _ in range(generator.choice((1, 1, 2, 3))):
            answer, right = damage(generator, answer), False
    text, keeps = wrap(generator, answer, other, task != "countdown")
    right = right and keeps
    if kind < 0.3:
        for _ in range(generator.choice((1, 1, 2, 4))):
            text, right = damage(generator, text), False
    elif kind < 0.301:
        text, right = flood(generator, text), False
    elif kind < 0.32:
        text, right = f"<answer>{random_text(generator)}</answer>{random_text(generator)}", False
    return Case(text, row, truth, right)


# ---------------------------------------------------------------------------------------------------------------------
# Answers: (answer, another one, whether the answer is right, row, truth)
# ---------------------------------------------------------------------------------------------------------------------


SPELLED = {"*": ("*", "x", " X ", "×", "·", "∙", "⋅", "\\times ", "\\cdot "), "/": ("/", "÷", "\\div "), "-": "-−–"}
EQUATIONS = ("{0} = {1}", "{1} = {0}", "${0}$", "$ {0} = {1} $.", "\\boxed{{{0}}}", "$\\boxed{{{0} = {1}}}$", "`{0}`",
             "{0}.", "\\({0}={1}\\)", "\\[{0}\\]", "{0} = \\boxed{{{1}}}", "\\left({0}\\right)", "[{0}] = {1}",
             "{{{0}}}", "\\{{{0}\\}}", "{1}={0}={1}")  # fmt: skip
FALSE_EQUATIONS = ("{0} = {2}", "{2} = {0}", "{0} = {1} = {2}", "{0} = {0}", "{1} = {1}", "{0} == {1}", "{0} = {1} + 0",
                   "{0} = 1{1}", "{0} \\approx {1}", "x = {0}", "--{0}", "- -{0}", "+{0}", "{0}:1", "1 x {0}", "({0}]",
                   "\\frac{{{0}}}{{1}}", "{0}\\frac12", "{1} \\boxed{{{0}}}", "{0} or {1}", "{0}..",
                   "{0}, {1}")  # fmt: skip


def countdown_answer(generator: random.Random) -> tuple:
    """An expression in full parentheses that makes the target, as models may write it, or one that is nearly so."""
    largest = generator.choice((9, 99, 99, 9999))
    numbers = [generator.randint(0, largest) for _ in range(generator.randint(2, 6))]
    spelled = generator.random() < 0.5
    terms = [(Fraction(number), str(number)) for number in numbers]
    while len(terms) > 1:
        generator.shuffle(terms)
        (a, left), (b, right) = terms.pop(), terms.pop()
        symbol = generator.choice("+-*/" if b else "+-*")
        value = {"+": a + b, "-": a - b, "*": a * b, "/": a / (b or 1)}[symbol]
        gap = generator.choice(("", " ", "", "\n", "\t "))
        if spelled and symbol == "/" and generator.random() < 0.5:
            terms.append((value, f"\\{generator.choice(('', 'd'))}frac{{{left}}}{gap}{{{right}}}"))
            continue
        if spelled and generator.random() < 0.2:  # a sign changes neither product nor what is subtracted
            left, right, symbol = {"*": (f"-{left}", f"-{right}", "*"), "+": (left, f"-{right}", "-")}.get(
                symbol, (left, right, symbol)
            )
        symbol = generator.choice(SPELLED.get(symbol, symbol)) if spelled else symbol
        terms.append((value, f"({left}{gap}{symbol}{gap}{right})"))
    value, text = terms[0]
    target, right = int(value), value.denominator == 1
    if right and generator.random() < 0.3:
        near = (text.replace("(", "").replace(")", ""), text.replace("*", "+", 1), text.replace("-", "+", 1),
                str(target), f"-{text}", f"{text}+0", f"{text}*1", f"{text}**1", text.replace("/", "//"),
                text.translate(str.maketrans("0123456789", "０１２３４５６７８９")),
                *(form.format(text, target, target + 1) for form in FALSE_EQUATIONS))  # fmt: skip
        text, right = generator.choice(near), False
    elif right and spelled:
        text = generator.choice(("{0}", *EQUATIONS)).format(text, target)
    elif right:
        inside = text[1:-1] if text[0] == "(" else text
        text = generator.choice((text, inside, f"({text})", re.sub("([0-9]+)", r"0\1", text)))
    row = {"nums": numbers, "target": target + generator.choice((0, 0, 0, 0, 1, -1))}
    right = right and row["target"] == target and len(text) <= 200  # no longer one is read
    return text, f"{numbers[0]}+{numbers[-1]}", right, row, row


def random_number(generator: random.Random, kinds: tuple[str, ...] = ()) -> tuple[Fraction, str]:
    """A number and one way to write it; `kinds` are further ways."""
    size = 10 ** generator.randint(1, 7)
    value = Fraction(generator.randint(-size // 10, size))
    kind = generator.choice(("whole", "whole", "commas", "zeros", "braces", "decimal", "fraction", "mixed", "power",
                             *kinds))  # fmt: skip
    if kind == "decimal":
        value += Fraction(generator.randrange(100), 100)
        return value, f"{float(value):.2f}"
    if kind == "fraction":
        bottom = generator.randint(2, 99)
        value, top = value / bottom, abs(value.numerator)
        forms = (
            f"{top}/{bottom}",
            f"{top} / {bottom}",
            f"\\frac{{{top}}}{{{bottom}}}",
            f"\\dfrac{{{top}}}{{{bottom}}}",
        )
        if top < 10 > bottom:
            forms += (f"\\frac{top}{bottom}", f"\\frac {top}{bottom}")
        return value, "-" * (value < 0) + generator.choice(forms)
    if kind == "mixed" and value > 0:
        bottom = generator.randint(2, 99)
        top = generator.randint(1, bottom - 1)
        return value + Fraction(top, bottom), f"{value} {top}/{bottom}"
    if kind == "vulgar" and value > 0:
        part = generator.choice("½⅓⅔¼¾⅛")
        return value + Fraction(unicodedata.normalize("NFKC", part).replace("⁄", "/")), f"{value}{part}"
    if kind == "blanks" and abs(value) >= 1000:
        return value, f"{value.numerator:,}".replace(",", generator.choice((" ", " ", "\\,", "\u202f")))
    if kind == "power":
        return value * 1000, f"{value}e3"
    if abs(value) < 1000 and kind in ("commas", "braces"):
        return value, f"{value}"
    return value, {"commas": f"{value.numerator:,}", "zeros": f"{value}.00",
                   "braces": f"{value.numerator:,}".replace(",", "{,}")}.get(kind, f"{value}")  # fmt: skip


def gsm8k_answer(generator: random.Random) -> tuple:
    """The right number or another, with the words, signs and marks that models put around it."""
    value, text = random_number(generator, ("vulgar", "blanks"))
    right = generator.random() < 0.6
    shown = text if right else random_number(generator, ("vulgar", "blanks"))[1]
    unit = generator.choice(UNITS)
    around = generator.choice(("{}", " {} ", "{}.", "${}$", "x = {}", "{} " + unit, "The answer is {}.", "{}%", "{}\\%",
                               "3 * 6 = {}", "**{}**", "{} \\text{{ " + unit + "}}", "\\({}\\)", "{} (" + unit + ")",
                               "Answer: {}", "\\boxed{{{}}}", "{}^\\circ", "{} is the answer, the answer is {}",
                               "\\text{{{}}}", "= {}", "`{}`", "about {}"))  # fmt: skip
    if not shown.startswith("-") and generator.random() < 0.2:
        shown = generator.choice(("$", "\\$", "€", "+", "¥ ", "+ ")) + shown
    if generator.random() < 0.1:
        around, right = generator.choice(("{} or 3", "3 and {}", "{}, 4", "{} dozen", "-{}", "{} + 1", "{}{}", "{} {}",
                                          "1{}", "{}0", "{}/2", "2 {}", "{},000", "{} million", "half {}",
                                          "{}²", "٣{}", "{}万", "{} = 5", "not >= {}", "{}\\times 2", "{}k",
                                          "{} thousandths", "{} tenths", "sqrt {}", "0x{}")), False  # fmt: skip
    if "frac" in shown and "text{{{}" in around:  # no command is read in a text
        around = "{}"
    other = str(random_number(generator)[0].numerator)
    whole = value.denominator == 1 and generator.random() < 0.8
    written = f"{value.numerator:,}" if whole else text.replace("{,}", ",")
    row = {"answer": generator.choice((f"It is 3 + 4 = 7.\n#### {written}", written))}
    return around.format(shown, shown), other, right, row, value


def random_formula(generator: random.Random) -> tuple[str, str]:
    """A formula in x, and another way to write it that needs mathematics to see it."""
    a, b, c = (generator.choice((2, 3, 5, 6, 7, 8, 10, 11, 12)) for _ in range(3))  # their roots are no numbers
    return generator.choice((
        (f"{a}x+{b}", f"{b} + {a}x"), (f"{a}\\sqrt{{{b}}}", f"\\sqrt{{{b}}} \\cdot {a}"),
        (f"\\frac{{x}}{{{a}}}", f"\\frac{{{b}x}}{{{a * b}}}"), (f"x^2-{a * a}", f"(x-{a})(x+{a})"),
        (f"\\frac{{\\sqrt{{{a}}}}}{{{b}}}", f"\\frac{{{c}\\sqrt{{{a}}}}}{{{b * c}}}"), (f"{a}\\pi", f"\\pi \\cdot {a}"),
        (f"({a},{b})", f"\\left( {a}, {b} \\right)"), (f"{a}\\sqrt{{{b}}}", f"{a}*sqrt({b})"), (f"{a}\\pi", f"{a}*pi"),
        (f"[{a},{a + b})", f"x \\in [{a}, {a + b})"), (f"[{a},{a + b})", f"\\left[{a},{a + b}\\right)"),
        (f"({a},{b}\\sqrt{{{c}}})", f"x \\in ({a}, sqrt({c}) * {b})"), (f"\\{{{a},{a + b}\\}}", f"{a + b}, {a}"),
        (f"\\{{{a},{a + b}\\}}", f"\\left\\{{{a + b}, {a}\\right\\}}"),
        (f"{a}^{{{b % 4 + 2}}}", f"{a} \\cdot {a}^{{{b % 4 + 1}}}"),
    ))  # fmt: skip


def math_answer(generator: random.Random) -> tuple:
    """A number, words or a formula; right answers are written in another way than the reference."""
    kind = generator.random()
    if kind < 0.6:
        truth, text = random_number(generator)
        reference = f"\\frac{{{truth.numerator}}}{{{truth.denominator}}}" if truth.denominator > 1 else str(truth)
        wrong = generator.choice((random_number(generator)[1], random_number(generator)[1], f"{text}%", f"{text}\\%"))
    elif kind < 0.75:
        word = generator.choice(("east", "Sunday", "even", "(A)", "B", "both", "no solution"))
        reference = truth = f"\\text{{{word}}}"
        forms = (reference, f"\\textbf{{{word}}}", word.upper() if len(word) > 3 else reference)
        text, wrong = (
            generator.choice(forms),
            generator.choice(("\\text{seat}", "\\text{C}", "odd", "A, B", "\\text{}")),
        )
    else:
        reference, equal = random_formula(generator)
        truth, text, wrong = reference, generator.choice((reference, equal)), random_formula(generator)[0]
        brackets = str.maketrans("[)(", generator.choice(("(])", "[]]", "()[")))
        near = (equal.translate(brackets), f"({equal})".replace("\\{", "").replace("\\}", ""), f"{equal}\\%")
        wrong = generator.choice((wrong, *near))
    right = generator.random() < 0.6
    around = generator.choice(("{}", " {} ", "{}.", "${}$", "\\[{}\\]", "The answer is {}.", "\\boxed{{{}}}", "{}\\,"))
    row = {"answer": reference} if generator.random() < 0.5 else {"solution": f"Thus \\boxed{{{reference}}}."}
    return around.format(text if right else wrong), wrong, right, row, truth


ANSWERS = {"countdown": countdown_answer, "gsm8k": gsm8k_answer, "math": math_answer}


# ---------------------------------------------------------------------------------------------------------------------
# The evaluators: whether a completion is right, read by other means than src/tasks
# ---------------------------------------------------------------------------------------------------------------------

CALCULATE = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}
ARGUMENT = r"\s*(?:\{([^{}]*)\}|([0-9a-z]))"  # TeX takes one character where there are no braces
POINTS = ((Fraction(7, 3), 1.7320), (Fraction(-5, 11), 0.61803))  # x, y


def last_block(text: str) -> tuple[int, str] | None:
    """Where the last <answer> block ends, and its contents."""
    end = len(text)
    while (close := text.rfind("</answer>", 0, end)) >= 0:
        begin, earlier = text.rfind("<answer>", 0, close), text.rfind("</answer>", 0, close)
        if begin > earlier:
            return close + 9, text[begin + 8 : close]
        end = close
    return None


def last_box(text: str) -> tuple[int, str] | None:
    """Where the last closed box ends, and the contents of the one that begins last of all closed ones."""
    stack, closed, position = [], [], 0
    while position < len(text):
        if text[position] == "\\":
            name = re.compile(r"boxed\s*\{|fbox\s*\{|").match(text, position + 1)[0]
            stack += [position + 1 + len(name)] if name else []
            position += 1 + (len(name) or 1)
            continue
        if text[position] == "{":
            stack.append(-1)
        elif text[position] == "}" and stack and (begin := stack.pop()) >= 0:
            closed.append((begin, position))
        position += 1
    if not closed:
        return None
    begin, end = sorted(closed)[-1]
    return closed[-1][1], text[begin:end]


def stated_answer(text: str) -> str | None:
    """The answer of a completion of gsm8k or math."""
    text = text[-FLOOD_LENGTH:]
    block, box = last_block(text), last_box(text)
    if block and (not box or block[0] > box[0]):
        inner = last_box(block[1])
        return inner[1] if inner else block[1]
    return box[1] if box else None


def calculate(node: ast.AST, names: dict) -> object:
    """Value of a parsed formula; ValueError for all that is no arithmetic.

    Without names it is that of Countdown: no powers, one sign before a number, and brackets of all kinds.
    """
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        return Fraction(repr(node.value))
    if isinstance(node, ast.Name) and node.id in names:
        return names[node.id]
    if isinstance(node, ast.BinOp) and type(node.op) in CALCULATE:
        return CALCULATE[type(node.op)](calculate(node.left, names), calculate(node.right, names))
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Pow) and names:
        base, power = calculate(node.left, names), calculate(node.right, names)
        if abs(power) <= 20 and abs(base) < 1e6:
            return base**power
    if not names and isinstance(node, ast.List | ast.Set) and len(node.elts) == 1:
        return calculate(node.elts[0], names)  # brackets
    signs = (ast.USub, ast.UAdd) if names else (ast.USub,)
    if (
        isinstance(node, ast.UnaryOp)
        and isinstance(node.op, signs)
        and (names or not isinstance(node.operand, ast.UnaryOp))
    ):
        return calculate(node.operand, names) * (-1 if isinstance(node.op, ast.USub) else 1)
    raise ValueError(f"{type(node).__name__} is no arithmetic")


PYTHON = (
    (r"\\[dtc]?frac(?![A-Za-z])", "@"), (r"\\(?:fbox|boxed)(?![A-Za-z])", "#"), (r"\\div(?![A-Za-z])|÷", "/"),
    (r"\\(?:left|right)(?![A-Za-z])|\\[()\[\]]|[$`\n\t]", " "), (r"\\(?:times|cdot)(?![A-Za-z])|[xX×·∙⋅]", "*"),
    ("[−–]", "-"), (r"\\\{", "["), (r"\\\}", "]"), ("(?<![0-9])0+(?=[0-9])", ""),
)  # fmt: skip


def closing(text: str, begin: int) -> int:
    """Where the brace closes that opens there; ValueError if it does not or none opens."""
    depth = 0
    for position in range(begin, len(text)):
        depth += (text[position] == "{") - (text[position] == "}")
        if depth == 0 and text[begin] == "{":
            return position
    raise ValueError


def unboxed(text: str) -> str:
    """The contents of a box that is all there is."""
    text = text.strip(" ")
    box = re.match(r"#\s*(?=\{)", text)
    return text[box.end() + 1 : -1].strip(" ") if box and closing(text, box.end()) == len(text) - 1 else text


def with_slashes(text: str) -> str:
    """({1}/{2}) for a fraction; Python's parser takes the braces for those of a set."""
    while "@" in text:
        before, _, after = text.rpartition("@")
        top = after[: closing(after.lstrip(), 0) + 1 + len(after) - len(after.lstrip())]
        bottom = after[len(top) :].lstrip()
        end = closing(bottom, 0) + 1
        text = f"{before}({top.strip()}/{bottom[:end]}){bottom[end:]}"
    return text


def countdown_is_right(text: str, row: dict) -> bool:
    """Python's own parser reads the expression; what else is said to be equal must be the target."""
    found = last_block(text[-FLOOD_LENGTH:])
    equation = found[1] if found else ""
    if set(equation) & set("@#"):
        return False
    for pattern, python in PYTHON:
        equation = re.sub(pattern, python, equation)
    try:
        sides = [unboxed(side) for side in unboxed(re.sub(r"\. *$", "", equation.strip(" "))).split("=")]
        stated = [side for side in sides if len(sides) > 1 and re.fullmatch(r"-?\s*[0-9]+", side)]
        (expression,) = [side for side in sides if side not in stated]
        expression = with_slashes(expression)
        if not set(expression) <= set("0123456789+-*/()[]{} "):
            return False
        tree = ast.parse(expression.strip(" "), mode="eval").body
        numbers = [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)]
        right = sorted(numbers) == sorted(row["nums"]) and calculate(tree, {}) == row["target"]
        return right and all(int(side.replace(" ", "")) == row["target"] for side in stated)
    except (SyntaxError, ValueError, ZeroDivisionError):
        return False


def without_latex(text: str) -> str:
    """Plain text: no delimiters, spacing, text commands or `The answer is`."""
    text = re.sub(r"\{\s*,\s*\}", ",", re.sub(r"\\{1,2}(left|right)", "", text.replace("−", "-")))
    text = re.sub(r"\\([$%])", r"\1", text.replace("\\!", ""))
    text = re.sub(r"\\[(),\[\];: ]|\\q?quad|\\displaystyle|\$", " ", text)
    text = re.sub(r"\\[dtc]?frac\s*(\d)\s*(\d)", r"\\frac{\1}{\2}", text)
    text = re.sub(r"\\(?:text|mathrm|textbf|mbox)\s*\{([^{}]*)\}", r" \1 ", text)
    text = " ".join(re.sub(r"\^\s*\{?\s*\\circ\s*\}?", " degrees ", text).split())
    return re.sub(r"^(the )?((final|correct) )?answer( is)?\s*:?", "", text, flags=re.IGNORECASE).strip()


WORTH = frozenset(
    re.findall(
        "[A-Za-z]+",
        "minus negative squared cubed twice thrice double triple half sqrt root pi dozen dozens hundred thousand "
        "million billion trillion hundreds thousands millions billions trillions tens tenth tenths "
        "hundredths thousandths k K M B e E x X y n i",
    )
)
DIGITS = r"((?:[\d,]*\d(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d+)?)"
LENGTHS = (
    "(?:[cdkm]|centi|deci|kilo|milli)?m(?:et(?:er|re)s?)?|ft|feet|foot|in|inch|inches|y(?:ar)?ds?|mi(?:les?)?|units?"
)
ATOM = re.compile(rf"([-+]?){DIGITS}(?:/{DIGITS})?([^\d+^<>~|&@\\{{}}=]*)", re.ASCII)


def exact(digits: str) -> Fraction | None:
    """The value of 1,234.5; None if the commas are not where thousands are, and for more than any reference has."""
    whole = re.split("[.eE]", digits)[0]
    if len(digits) > 30 or ("," in whole and not re.fullmatch(r"[1-9]\d{0,2}(,\d{3})+", whole, re.ASCII)):
        return None
    return Fraction(digits.replace(",", "")) if abs(int(re.split("[eE]", digits + "e0")[1])) < 50 else None


def numbers_of(text: str) -> list[Fraction] | None:
    """The numbers that a text states after its last equals sign; None if it says anything that changes them."""
    text = re.sub(  # 1 000 000
        r"(?<![\d.,/A-Za-z])([1-9]\d?\d?)((?:(?:[ \u00a0\u2009\u202f]|\\[, ])\d\d\d)+)(?![\d/]| /)",
        lambda match: "".join(filter(str.isdigit, match[0])), text, flags=re.ASCII)  # fmt: skip
    parts = [(sign, unicodedata.decomposition(sign)) for sign in set(text) if not sign.isascii()]
    for sign, code in parts:
        if code.startswith("<fraction>"):
            part = "".join(chr(int(number, 16)) for number in code.split()[1:]).replace("\u2044", "/")
            text = text.replace(sign, f" {part} ")
    text = re.sub(r"\\[dtc]?frac\s*\{\s*(-?[\d,]+)\s*\}\s*\{\s*([\d,]+)\s*\}", r" \1/\2 ", without_latex(text))
    text = re.sub(rf"(?<![A-Za-z\\])({LENGTHS})\s*(?:\^\s*(?:[23](?!\d)|\{{\s*[23]\s*\}})|[²³])", r"\1", text)
    text = text[text.rfind("=") + 1 :]
    if any(character > "\x7f" and unicodedata.numeric(character, None) is not None for character in text):
        return None
    text = re.sub(r"[€£¥₹¢$:;!?%\"'`()\[\]“”‘’。：#_]|\.{2,}|(?<!\d)(,|\*+|\.(?!\d))|(,|\*+)(?!\d)", " ", text)
    text = re.sub(r"([-+])\s+(?=[\d.])", r"\1", re.sub(r"(?<=\d)\s*/\s*(?=\d)", "/", text))
    numbers, whole, announced = [], None, True
    for atom in text.split():
        match = ATOM.fullmatch(atom)
        words = re.findall("[A-Za-z]+", match[4] if match else atom)
        if any(word in WORTH or (len(word) > 1 and word.lower() in WORTH) for word in words):
            return None
        announced |= "is" in words or "answer" in [word.lower() for word in words]
        if match is None:
            if re.search(r"[\d+^<>~|&@\\{}=]|^-", atom, re.ASCII):
                return None
            whole = None
            continue
        value, bottom = exact(match[2]), exact(match[3] or "1")
        if value is None or not bottom:
            return None
        value = value / bottom * (-1 if match[1] == "-" else 1)
        if match[3] and whole is not None and not match[1] and 0 < value < 1:  # 1 3/4
            value, announced = numbers.pop() + (value if whole[0] != "-" else -value), True
        if not announced:
            return None
        numbers.append(value)
        whole, announced = (atom if atom.lstrip("+-").isdigit() else None), bool({"is", "answer"} & set(words))
    return numbers


def gsm8k_is_right(text: str, truth: Fraction) -> bool:
    """All the numbers that its answer states are the right one."""
    return set(numbers_of(stated_answer(text) or "") or ()) == {truth}


def formula_values(text: str) -> list | None:
    """Values of a LaTeX formula at POINTS by Python's parser, or None if it cannot be read."""
    if "\\pm" in text:  # one value only if both are the same
        plus, minus = (formula_values(text.replace("\\pm", sign)) for sign in "+-")
        return plus if plus == minus else None
    # a second backslash is what JSON makes of one
    text = without_latex(text).replace("\\\\", "\\").rpartition("=")[2].rstrip(" .")
    text = re.sub(
        r"\{\s*\{([^{}]*)\}\s*\}", r"{\1}", re.sub(r"(?<=\d)\{(\d+)\}", r"\1", text)
    )  # braces that show nothing
    text = re.sub(
        r"\\?sqrt\s*(?:\(([^()]*)\)|\{([^{}]*)\})",
        r"\\sqrt{\1\2}",
        re.sub(r"(?<![A-Za-z\\])pi(?![A-Za-z\d])", "p", text),
    )
    text = re.sub(r"\\sqrt\s*(\d)", r"\\sqrt{\1}", re.sub(r"(?<=\d),(?=\d{3})", "", text))
    text = re.sub(r"(?<![\d.])(\d)\s?!", lambda match: str(math.factorial(int(match[1]))), text, flags=re.ASCII)
    for _ in range(5):  # from the inside out
        text = re.sub(rf"\\[dtc]?frac{ARGUMENT}{ARGUMENT}", r"((\1\2)/(\3\4))", text)
        text = re.sub(r"\^\s*\{([^{}]*)\}", r"**(\1)", re.sub(r"\\sqrt\s*\{([^{}]*)\}", r"((\1)**0.5)", text))
    for old, new in (("\\cdot", "*"), ("\\times", "*"), ("\\×", "*"), ("×", "*"), ("\\pi", "p"), ("π", "p"),
                     ("^", "**"), (":", "/")):  # fmt: skip
        text = text.replace(old, new)
    text = re.sub(
        r"(?<=[\dxyp)])\s*(?=[xyp(])|(?<=[xyp)])\s*(?=\d)", "*", text.translate(str.maketrans("{[]}", "(())"))
    )
    text = re.sub(r"(?<![\d.])0+(?=\d)", "", text).strip()
    if not set(re.sub(r"(?<=\d)[eE](?=[-+]?\d)", "", text)) <= set("0123456789.xyp+-*/() "):
        return None
    try:
        tree = ast.parse(text, mode="eval").body
        return [calculate(tree, {"x": x, "y": y, "p": 3.141592653589793}) for x, y in POINTS]
    except (SyntaxError, ValueError, ArithmeticError, MemoryError, RecursionError):
        return None


def same_values(left: list | None, right: list | None) -> bool:
    """Both could be read and are equal, but for rounding."""
    return (
        left is not None
        and right is not None
        and all(abs(a - b) <= 1e-9 * (1 + abs(b)) for a, b in zip(left, right, strict=True))
    )


def math_is_right(text: str, truth: Fraction | str) -> bool:
    """The same text, words or number, or a formula with the same values."""
    answer = without_latex(stated_answer(text) or "").rstrip(" .")
    if "%" in answer or "percent" in answer.lower():
        return isinstance(truth, Fraction) and numbers_of(answer) == [100 * truth]
    if isinstance(truth, Fraction):  # several values are right if all are the same
        stated = [formula_values(part) for part in re.split(r"\bor\b|\band\b|, | ,", answer)]
        return numbers_of(answer) == [truth] or all(same_values(values, [truth] * len(POINTS)) for values in stated)
    expected = without_latex(truth)
    if "\\text" in truth:
        letters = [re.sub(r"[\s().]", "", words).casefold() for words in (answer, expected)]
        return letters[0] == letters[1]
    answer = re.sub(r"^[A-Za-z]\s*\\in(?![a-z])\s*", "", answer)
    answer, expected = (re.sub(r"\s*([()\[\],;]|\\[{}])\s*", r"\1", words) for words in (answer, expected))
    if expected.startswith("\\{"):
        members = [
            re.split(r"[,;]\s*(?:and|or)\b|[,;]|\band\b|\bor\b", re.sub(r"^\\?\{|\\?\}$", "", words))
            for words in (answer, expected)
        ]
        values = [[formula_values(member) for member in side] for side in members]
        return answer.startswith(("\\{", "{")) == answer.endswith("}") and all(
            any(same_values(value, other) for other in values[1 - side]) for side in (0, 1) for value in values[side]
        )
    # a second pair of brackets around the first says nothing
    once = re.sub(r"^[(\[]([(\[][^()\[\]]*[)\]])[)\]]$", r"\1", answer)
    pairs = [re.fullmatch(r"([(\[])(.*),(.*)([)\]])", words) for words in (once, expected)]
    if pairs[1]:
        return bool(pairs[0] and pairs[0][1] == pairs[1][1] and pairs[0][4] == pairs[1][4]) and all(
            same_values(formula_values(pairs[0][side]), formula_values(pairs[1][side])) for side in (2, 3)
        )
    same_text = "".join(answer.split()) == "".join(expected.split())
    return same_text or same_values(formula_values(answer), formula_values(expected))


def format_is_right(text: str) -> bool:
    """One think block, of which the prompt may have written the start, one answer block, and blanks around them."""
    pieces = re.split("(</?(?:think|answer)>)", text)
    tags, between = pieces[1::2], pieces[::2]
    if tags[:1] == ["<think>"] and not between[0].strip():
        tags, between = tags[1:], between[1:]
    if len(text) > FLOOD_LENGTH or tags != ["</think>", "<answer>", "</answer>"]:
        return False
    return not between[1].strip() and not between[3].strip()


IS_RIGHT = {"countdown": countdown_is_right, "gsm8k": gsm8k_is_right, "math": math_is_right}


# ---------------------------------------------------------------------------------------------------------------------
# The run
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class Gate:
    """Stands before the process of math-verify, counts its time, and lets only so many answers through."""

    left: int
    asked: int = 0
    refused: int = 0
    slow: int = 0
    spent_ms: float = 0.0  # of the worker's processor time, by the last answer
    slowest_ms: float = 0.0
    slowest_wall_ms: float = 0.0  # with waiting for the processor, and for a new worker
    ask: object = field(default_factory=lambda: mathematics.ask_worker)
    read: object = field(default_factory=lambda: grader.read_line)

    def __call__(self, answer: str, reference: str, seconds: float) -> bool:
        if self.left <= 0:
            self.refused += 1
            return False
        begin, self.left, self.asked = time.perf_counter(), self.left - 1, self.asked + 1
        self.spent_ms = 1000 * seconds  # unless it answers
        verdict = self.ask(answer, reference, seconds)
        self.slow += self.spent_ms > SLOWEST_MS
        self.slowest_ms = max(self.slowest_ms, self.spent_ms)
        self.slowest_wall_ms = max(self.slowest_wall_ms, 1000 * (time.perf_counter() - begin))
        return verdict

    def read_line(self, worker: object, seconds: float) -> str:
        """What the worker says, of which the processor time is noted."""
        line = self.read(worker, seconds)
        if line.startswith(("right", "wrong")):
            self.spent_ms = 1000 * float(line.split()[1])
        return line


def timed(reward, case: Case) -> tuple[dict, float]:
    """What the reward gives, and the milliseconds of this thread that it took."""
    begin = time.thread_time()
    parts = reward(case.text, case.row)
    return parts, 1000 * (time.thread_time() - begin)


def wrong_with(task: str, case: Case, parts: dict, milliseconds: float, worker_ms: float, graded: bool) -> str | None:
    """What is wrong with a reward, or None."""
    if milliseconds > SLOWEST_MS:
        return f"took {milliseconds:.0f} ms"
    if worker_ms > SLOWEST_WORKER_MS:
        return f"took {worker_ms:.0f} ms of the worker"
    if set(parts) != {"reward", "answer", "format"} or parts["answer"] not in (0, 1):
        return f"odd parts {parts}"
    if parts["format"] != format_is_right(case.text) or parts["reward"] != parts["answer"] + 0.1 * parts["format"]:
        return f"wrong format or sum: {parts}"
    if parts["answer"] and not IS_RIGHT[task](case.text, case.truth):
        return "a reward for a wrong answer"
    return "no reward for a right answer" if case.right and graded and not parts["answer"] else None


def grade_sample(task, cases: list[Case]) -> list[str]:
    """Rewards.grade around the same rewards: equal, and 0 for what was cut off. An error in it raises."""
    rewards = Rewards(task, DataConfig(on_reward_error="stop"))
    groups = [
        Group(Problem(index, (1,), "", case.row), (Episode((1,), (0.0,), index % 2 == 0, case.text),))
        for index, case in enumerate(cases)
    ]
    graded = rewards.grade(groups, zero_truncated=True)
    wrong = []
    for index, (case, group) in enumerate(zip(cases, graded, strict=True)):
        parts, episode = task.reward(case.text, case.row), group.episodes[0]
        if episode.reward_parts != parts or episode.reward != (parts["reward"] if episode.finished else 0):
            wrong.append(f"grade: case {index} earns {episode.reward} and {episode.reward_parts}, not {parts}")
    return wrong


def run_task(name: str, seed: int, cases: int, worker_cases: int | None) -> dict:
    """Counts of one task, and the first failures. Without a number all answers may go to the worker."""
    gate, task = Gate(2 * cases if worker_cases is None else worker_cases), get_task(name)
    right = rewarded = formatted = 0
    slowest, failures = 0.0, []
    with patch.object(mathematics, "ask_worker", gate), patch.object(grader, "read_line", gate.read_line):
        for index in range(cases):
            case, refused, gate.spent_ms = make_case(name, seed, index), gate.refused, 0.0
            try:
                parts, milliseconds = timed(task.reward, case)
                if milliseconds > SLOWEST_MS:  # once more: a page fault is not the reward's fault
                    milliseconds = min(milliseconds, timed(task.reward, case)[1])
                problem = wrong_with(name, case, parts, milliseconds, gate.spent_ms, gate.refused == refused)
            except Exception as error:
                parts, milliseconds, problem = {}, 0.0, f"raised {type(error).__name__}: {error}"
            right, rewarded = right + case.right, rewarded + (parts.get("answer") == 1)
            formatted, slowest = formatted + (parts.get("format") == 1), max(slowest, milliseconds)
            if problem:
                failures.append(f"{name} case {index}: {problem}: {case.text[:300]!a} for {case.row}")
        refused, gate.left = gate.refused, 0  # the sample compares, and grades nothing again
        failures += grade_sample(task, [make_case(name, seed, index) for index in range(min(cases, GRADE_SAMPLE))])
    return {"cases": cases, "right_by_construction": right, "rewarded": rewarded, "well_formed": formatted,
            "slowest_ms": round(slowest, 2), "to_math_verify": gate.asked, "not_graded": refused,
            "math_verify_over_50_ms": gate.slow, "slowest_math_verify_ms": round(gate.slowest_ms, 1),
            "slowest_math_verify_wall_ms": round(gate.slowest_wall_ms, 1),
            "failures": len(failures), "first_failures": failures[:SHOWN_FAILURES]}  # fmt: skip


def fuzz(names: list[str], seed: int, cases: int, worker_cases: int | None) -> dict:
    """All tasks, each in a process of its own if there are several."""
    begin = time.monotonic()
    shares = [cases // len(names) + (position < cases % len(names)) for position in range(len(names))]
    calls = [(name, seed, share, worker_cases) for name, share in zip(names, shares, strict=True)]
    if len(names) == 1:
        tasks = [run_task(*calls[0])]
    else:
        with ProcessPoolExecutor(len(names), get_context("spawn")) as pool:
            tasks = list(pool.map(run_task, *zip(*calls, strict=True)))
    return {"benchmark": "fuzz_rewards", "seed": seed, "cases": cases,
            "seconds": round(time.monotonic() - begin, 1), "failures": sum(task["failures"] for task in tasks),
            "tasks": dict(zip(names, tasks, strict=True))}  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=1_000_000, help="in total")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--task", choices=TASKS, help="only this one")
    parser.add_argument("--worker_cases", type=int, help="math answers that math-verify may see; default: all")
    arguments = parser.parse_args()
    names = [arguments.task] if arguments.task else list(TASKS)
    result = fuzz(names, arguments.seed, arguments.cases, arguments.worker_cases)
    for task in result["tasks"].values():
        print(*task["first_failures"], sep="\n", end="\n" if task["first_failures"] else "")
    print(json.dumps(result))
    return 1 if result["failures"] else 0


if __name__ == "__main__":
    sys.exit(main())
