"""Countdown's arithmetic: an equation is parsed by a small grammar, exactly and bounded, never by `eval`."""

import re
from fractions import Fraction
from itertools import accumulate

MAX_EXPRESSION_LENGTH = 200
MAX_EXPRESSION_DEPTH = 20
MAX_DIGITS = 6
EXPRESSION_TOKEN = re.compile(r"[0-9]+|\\(?:[A-Za-z]+|.)|.", re.DOTALL)
# how models write them; what only lays out, and blanks, are no tokens; nothing else is known
SPELLINGS = {
    "+": ("+",),
    "-": ("-", "\u2212", "\u2013"),
    "*": ("*", "x", "X", "\u00d7", "\u00b7", "\u2219", "\u22c5", r"\times", r"\cdot"),
    "/": ("/", "\u00f7", r"\div"),
    r"\frac": (r"\frac", r"\dfrac", r"\tfrac", r"\cfrac"),
    r"\boxed": (r"\boxed", r"\fbox"),
    **{token: (token,) for token in ("(", ")", "[", "]", "{", "}", r"\{", r"\}", "=", ".")},
    "": (" ", "\n", "\t", "$", "`", r"\(", r"\)", r"\[", r"\]", r"\left", r"\right"),
}
TOKENS = {spelling: token for token, spellings in SPELLINGS.items() for spelling in spellings}
CLOSING = {"(": ")", "[": "]", "{": "}", r"\{": r"\}"}


class ExpressionError(ValueError):
    """The text is not an equation of this grammar, or has no value."""


def tokenize_expression(text: str) -> list[str]:
    """Split into numbers, operators and brackets, each in one spelling, or raise ExpressionError."""
    text = text.strip(" \n\t")
    if not text or len(text) > MAX_EXPRESSION_LENGTH:
        raise ExpressionError(f"an expression has 1 to {MAX_EXPRESSION_LENGTH} characters")
    tokens = []
    for found in EXPRESSION_TOKEN.findall(text):
        token = found if found[0] in "0123456789" else TOKENS.get(found)
        if token is None:
            raise ExpressionError(f"unexpected {found!r}")
        if token:
            tokens.append(token)
    return tokens


def without_box(tokens: list[str]) -> list[str]:
    """Contents of the box that is all there is."""
    depths = list(accumulate((token == "{") - (token == "}") for token in tokens))
    is_box = tokens[:2] == [r"\boxed", "{"] and depths[-1] == 0 and 0 not in depths[1:-1]
    return tokens[2:-1] if is_box else tokens


def is_number(tokens: list[str]) -> bool:
    """A number alone, or with a sign."""
    return bool(tokens) and tokens[-1].isdigit() and tokens[:-1] in ([], ["-"])


def read_equation(text: str) -> tuple[list[str], list[int]]:
    """The tokens of the expression, and the numbers that the text says it is equal to: `1 + 2 = 3` or `3 = 1 + 2`.

    One side of an equation is an expression, every other one is a number, which may have a sign.
    """
    tokens = tokenize_expression(text)
    tokens = without_box(tokens[:-1] if tokens[-1:] == ["."] else tokens)
    marks = [position for position, token in enumerate(tokens) if token == "="]
    sides = [
        without_box(tokens[begin + 1 : end]) for begin, end in zip([-1, *marks], [*marks, len(tokens)], strict=True)
    ]
    if len(sides) == 1:
        return sides[0], []
    expressions = [side for side in sides if not is_number(side)]
    if len(expressions) != 1:
        raise ExpressionError("an equation has an expression on one side, and only a number on any other")
    return expressions[0], [int("".join(side)) for side in sides if is_number(side)]


def evaluate_expression(text: str) -> tuple[Fraction, list[int]]:
    r"""Exact value of `text` and the numbers it uses, in order; what it says it is equal to is no such number.

    Grammar: + - * / \frac{}{}, brackets, and at most one sign - before each number or bracket.
    """
    tokens, stated = read_equation(text)
    numbers: list[int] = []
    position = 0

    def peek() -> str:
        return tokens[position] if position < len(tokens) else ""

    def take() -> str:
        nonlocal position
        position += 1
        return tokens[position - 1] if position <= len(tokens) else ""

    def bracket(opening: str, depth: int) -> Fraction:
        if opening not in CLOSING:
            raise ExpressionError(f"expected a number, found {opening!r}")
        if depth >= MAX_EXPRESSION_DEPTH:
            raise ExpressionError(f"brackets nest at most {MAX_EXPRESSION_DEPTH} deep")
        value = total(depth + 1)
        if take() != CLOSING[opening]:
            raise ExpressionError("a bracket is not closed")
        return value

    def quotient(top: Fraction, bottom: Fraction) -> Fraction:
        if bottom == 0:
            raise ExpressionError("division by zero")
        return top / bottom

    def factor(depth: int) -> Fraction:
        sign = -1 if peek() == "-" and take() else 1
        token = take()
        if token == r"\frac":
            if peek() != "{":
                raise ExpressionError(r"\frac needs braces")
            top = bracket(take(), depth)
            if peek() != "{":
                raise ExpressionError(r"\frac needs two pairs of braces")
            return sign * quotient(top, bracket(take(), depth))
        if not token.isdigit():
            return sign * bracket(token, depth)
        if len(token) > MAX_DIGITS:
            raise ExpressionError(f"a number has at most {MAX_DIGITS} digits")
        numbers.append(int(token))
        return Fraction(sign * int(token))

    def product(depth: int) -> Fraction:
        value = factor(depth)
        while peek() in ("*", "/"):
            value = value * factor(depth) if take() == "*" else quotient(value, factor(depth))
        return value

    def total(depth: int) -> Fraction:
        value = product(depth)
        while peek() in ("+", "-"):
            value = value + product(depth) if take() == "+" else value - product(depth)
        return value

    value = total(0)
    if position != len(tokens):
        raise ExpressionError(f"unexpected {tokens[position]!r}")
    if any(number != value for number in stated):
        raise ExpressionError(f"it is {value}, not {stated}")
    return value, numbers


def expression_is_correct(text: str, numbers: list[int], target: int) -> bool:
    """Whether it uses each of the numbers exactly once and has this value."""
    try:
        value, used = evaluate_expression(text)
    except ExpressionError:
        return False
    return sorted(used) == sorted(numbers) and value == target


def plain_expression(text: str) -> str:
    """The expression of an equation in one spelling, without blanks: two texts of one expression are the same."""
    evaluate_expression(text)  # what says something false is no such text
    return "".join(read_equation(text)[0])
