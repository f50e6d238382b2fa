"""What math-verify says of an answer. Only the worker process of mathematics.py imports it."""

from collections.abc import Callable
from functools import partial

# a worker grades these first: only then is it as fast as it will be
WARM_UP = [
    (r"\frac{1}{2}+x", "x+0.5"), (r"(1,\frac{\pi}{2})", r"(1, 0.5 \pi)"), (r"2\sqrt{3}", r"\sqrt{12}"), ("2+i", "i+2"),
    (r"(-\infty,0)\cup[1,2]", r"(-\infty, 0) \cup [1, 2]"), ("(x+2)(x-5)", "x^2-3x-10"), ("y=-2x+1", "y = 1 - 2x"),
    (r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", r"\begin{pmatrix} 1 & 2 \\ 3 & 8/2 \end{pmatrix}"), ("1,2,3", "3,2,1"),
    (r"\frac{x^2-1}{x-1}", "x+1"), (r"\frac{1}{x}+\frac{1}{y}", r"\frac{x+y}{xy}"), (r"x \le 3", r"3 \ge x"),
]  # fmt: skip


def start() -> str:
    """`ready`, or what is wrong."""
    wrong = [pair for pair in WARM_UP if not math_verify_says(*pair)]
    return f"it finds {wrong[0]} different" if wrong else "ready"


def grading(answer: str, reference: str) -> Callable[[], bool]:
    """A call that gives the verdict."""
    return partial(math_verify_says, answer, reference)


def math_verify_says(answer: str, reference: str) -> bool:
    """math-verify's verdict, without any limit of time. An error is a wrong answer."""
    from math_verify import LatexExtractionConfig, parse, verify
    from sympy import Basic, Pow
    from sympy.core.cache import clear_cache

    clear_cache()  # it made verdicts on infinity depend on the answers before
    try:
        # between dollar signs, of which clean_latex left none: the whole text is the answer, no part of it
        gold, target = (
            parse(f"${text}$", [LatexExtractionConfig()], parsing_timeout=None) for text in (reference, answer)
        )
        powers = {power for value in target if isinstance(value, Basic) for power in value.atoms(Pow)}
        if any(p.exp.is_negative and p.base.is_number and abs(p.base.evalf()) < 1e-12 for p in powers):
            return False  # 0/0.0 would be 0
        return bool(verify(gold, target, float_rounding=12, timeout_seconds=None))
    except Exception:
        return False
