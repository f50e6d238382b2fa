"""What a model's text is worth: parsing and grading of answers. A text can not hang, crash or execute anything here.

Arithmetic is parsed by a small grammar and numbers by a regular expression: exact, bounded, never `eval`. Mathematics
is compared by math-verify in a process of its own, which is killed when it takes too long.
"""

import contextlib
import json
import mmap
import os
import re
import select
import signal
import subprocess
import sys
import threading
import time
import unicodedata
from fractions import Fraction
from pathlib import Path
from typing import IO

from src.config import ConfigError

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

MAX_ANSWER_LENGTH = 1000
MAX_NUMBER_LENGTH = 40
WORKER_MEMORY = 2 << 30  # bytes of address space
WORKER_START_SECONDS = 120

BOX_OR_BRACE = re.compile(r"\\(?:boxed|fbox)\s*+\{|\\.|[{}]", re.DOTALL)
UNBRACED_BOX = re.compile(r"\\(?:boxed|fbox)\s++([0-9A-Za-z.,/+-]++)(?=[\s$]|\Z)")

# symbols that models write in place of LaTeX
LATEX_OF = str.maketrans({"−": "-", "×": r"\times ", "π": r"\pi ", "∞": r"\infty ", "°": r"^\circ "})
LATEX_SPACE = re.compile(r"(?<!\\)\\(?:[$()\[\],;: ]|(?:q?quad|displaystyle|pounds|euro)(?![A-Za-z]))|\$")
TEXT_COMMAND = r"\\(?:text|textbf|textrm|textit|textnormal|mbox|mathrm|mathbf|mathit|operatorname)\s*\{"
LATEX_WORDS = re.compile(TEXT_COMMAND + r"([^{}]*)\}")
LATEX_DEGREES = re.compile(r"\^ ?\{? ?\\circ ?\}?|\\degrees?(?![A-Za-z])")
SHORT_FRACTION = re.compile(r"\\[dtc]?frac\s*([0-9])\s*([0-9])")  # \frac12
LATEX_FRACTION = re.compile(r"\\[dtc]?frac ?\{ ?(-?[0-9,]+) ?\} ?\{ ?([0-9,]+) ?\}")
LEAD_IN = re.compile(r"^(?:the )?(?:(?:final|correct) )?answer(?: is)?\s*:?\s*", re.IGNORECASE)
FULL_STOP = re.compile(r"(?<!\\right)[. ]+\Z")

INTEGER = r"(?:[1-9][0-9]{0,2}(?:,[0-9]{3})++|[0-9]++)"
NUMBER = re.compile(
    r"(?:(?P<sign>[-+]) ?)?(?:[€£¥₹] ?)?"
    rf"(?:(?:(?P<whole>{INTEGER}) )?(?P<top>{INTEGER}) ?/ ?(?P<bottom>{INTEGER})"
    rf"|(?P<decimal>(?:{INTEGER}(?:\.[0-9]++)?|(?<![.0-9])\.[0-9]++)(?:[eE][-+]?[0-9]{{1,2}}(?![0-9]))?))"
)
NUMBER_OR_WORD = re.compile(
    NUMBER.pattern + r"|(?P<word>[^\W\d_]+)"
    r"|(?P<skip>[\s.,;:!?'\"()\[\]“”‘’。：%#*_`€£¥₹¢]|/(?= ?[A-Za-z])|(?<=[^\W_])-(?=[^\W\d_]))|(?P<bad>.)",
    re.DOTALL,
)
# beside a number these change its value; other words are units
VALUE_WORDS = re.compile(
    "minus|negative|squared|cubed|twice|thrice|double|triple|half|root|sqrt|pi|dozens?|tens|plus|times|divided"
    "|or|not|never|except|less|than|log|ln|exp|sin|cos|tan|factorial|opposite|inverse|reciprocal"
    "|crores?|lakhs?|percentage|zero|one|two|three|four|five|six|seven|eight|nine|eleven|twelve"
    "|(?:thir|four|fif|six|seven|eigh|nine)teen|(?:twen|thir|for|fif|six|seven|eigh|nine)ty"
    "|hal(?:f|ves)|thirds?|fifths?|(?:six|seven|eigh|nin|hundred|thousand)ths?"
    "|(?:hundred|thousand|million|billion|trillion)s?|(?:ten|hundred|thousand|million|billion|trillion)ths?",
    re.IGNORECASE,
)
VALUE_LETTERS = frozenset("kKMBeExXyni")

# what math-verify would read in the writer's favour: `1 2 3` as 6, `5 \text{ or 6}` as 5
UNCLEAR_MATH = re.compile(
    rf"(?<!_)[0-9][ '\"][0-9]|{TEXT_COMMAND}[^{{}}]*(?:[0-9]|\bor\b)|boxed|fbox|answer|\\\Z", re.IGNORECASE
)
LETTERS = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{2,}")
NUMBER_BASE = re.compile(r"[0-9]_\{?([0-9]+)")


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
# The answer of a completion
# ---------------------------------------------------------------------------------------------------------------------


def boxes(text: str) -> list[tuple[int, int]]:
    """Start and end of the contents of every complete \\boxed{...} or \\fbox{...}, in the order in which they close."""
    complete: list[tuple[int, int]] = []
    opened: list[int | None] = []  # where the contents begin; None for a brace that is no box
    for match in BOX_OR_BRACE.finditer(text):
        if match[0] == "}":
            begin = opened.pop() if opened else None
            if begin is not None:
                complete.append((begin, match.start()))
        elif match[0][-1] == "{" and match[0] != r"\{":
            opened.append(None if match[0] == "{" else match.end())
    return complete


def innermost_box(text: str) -> str | None:
    """Contents of the last complete box, and of the last box inside that one, if any."""
    complete = boxes(text)
    return text[slice(*max(complete))] if complete else None  # complete boxes nest: the last to begin is the innermost


def final_answer(completion_text: str) -> str | None:
    """What a completion gives as its answer, or None: the last <answer> block or box, whichever ends last.

    Only complete ones count, and in a block the contents of its box. Never give it the prompt, which shows examples.
    """
    text = completion_text[-MAX_GRADED_LENGTH:]
    blocks, complete = list(ANSWER_BLOCK.finditer(text)), boxes(text)
    if blocks and (not complete or blocks[-1].end() > complete[-1][1]):
        answer = blocks[-1][1]
        box = innermost_box(answer)
        return (answer if box is None else box).strip()
    return text[slice(*max(complete))].strip() if complete else None


# ---------------------------------------------------------------------------------------------------------------------
# Numbers (gsm8k)
# ---------------------------------------------------------------------------------------------------------------------


def clean_latex(text: str) -> str:
    """On one line, without the box, math delimiters, dollar signs, spacing, `The answer is` and a full stop."""
    box = innermost_box(text)
    text = (text if box is None else box).translate(LATEX_OF).replace("{,}", ",").replace(r"\!", "")
    text = SHORT_FRACTION.sub(r"\\frac{\1}{\2}", LATEX_SPACE.sub(" ", text))
    return FULL_STOP.sub("", LEAD_IN.sub("", " ".join(text.split())))


def simple_fractions(text: str) -> str:
    """Write \\frac{3}{4} as 3/4, which NUMBER reads."""
    return " ".join(LATEX_FRACTION.sub(r" \1/\2 ", text).split())


def has_foreign_digits(text: str) -> bool:
    """Digits beyond 0-9: full-width, Arabic, superscript, one half, ten thousand. They are never read as a number."""
    return any(character > "\x7f" and unicodedata.numeric(character, None) is not None for character in text)


def value_of(match: re.Match) -> Fraction | None:
    """The value of a NUMBER; None for `1/0`, for `1 3/2` or `0 1/2`, and beyond MAX_NUMBER_LENGTH characters."""
    if match.end() - match.start() > MAX_NUMBER_LENGTH:
        return None
    parts = {name: part.replace(",", "") for name, part in match.groupdict().items() if part}
    if "decimal" in parts:
        value = Fraction(parts["decimal"])
    else:
        whole, top, bottom = (int(parts.get(name, 0)) for name in ("whole", "top", "bottom"))
        if bottom == 0 or ("whole" in parts and not (whole and top < bottom)):
            return None
        value = whole + Fraction(top, bottom)
    return -value if parts.get("sign") == "-" else value


def parse_number(text: str) -> Fraction | None:
    """The one number that an answer states, exactly, or None: `$1,234.50`, `x = 18`, `1 1/2 cups`, `The answer is 18.`

    After an equals sign only what follows the last one counts. A unit is ignored, and a percent sign is one: 50% is 50.
    Two different numbers, other operators, `2 dozen` or anything that is not understood have no value.
    """
    if len(text) > MAX_ANSWER_LENGTH:
        return None
    text = LATEX_WORDS.sub(r" \1 ", clean_latex(text).replace(r"\%", "%"))
    text = simple_fractions(LATEX_DEGREES.sub(" degrees ", text))
    before, _, text = text.rpartition("=")
    if before.endswith(("<", ">", "!", "~")) or has_foreign_digits(text):
        return None
    value, previous = None, ""
    expected = True  # a second number is not, unless `is` or `answer` announces that the first one is said again
    for match in NUMBER_OR_WORD.finditer(text):
        kind = match.lastgroup if match.lastgroup in ("word", "skip", "bad") else "number"
        if kind == "bad" or (kind == "word" and (match[0] in VALUE_LETTERS or VALUE_WORDS.fullmatch(match[0]))):
            return None
        if kind == "word":
            expected = expected or match[0].lower() in ("is", "answer")
        elif kind == "number":
            number = value_of(match)
            if number is None or previous == "word" or not expected or value not in (None, number):
                return None
            value, expected = number, False
        previous = kind
    return value


def gsm8k_reference(solution: str) -> str:
    """The number after the last #### of a GSM8K solution."""
    _, mark, answer = solution.rpartition("####")
    if not mark or parse_number(answer) is None:
        raise ConfigError(f"{solution[-80:]!r} does not end in #### and a number; choose another data.answer_column")
    return answer.strip()


def number_is_correct(answer: str, reference: str) -> bool:
    """The answer states exactly the number that the reference states; there is no tolerance."""
    value = parse_number(answer)
    return value is not None and value == parse_number(reference)


# ---------------------------------------------------------------------------------------------------------------------
# Mathematics: math-verify, in a process of its own
# ---------------------------------------------------------------------------------------------------------------------


def math_reference(solution: str) -> str:
    """The last box of a MATH solution (also `\\boxed 5`); a short text without any box is the answer itself."""
    box = innermost_box(solution)
    if box is None:
        unbraced = UNBRACED_BOX.findall(solution)
        box = unbraced[-1] if unbraced else solution if "boxed" not in solution else ""
    if not 0 < len(box.strip()) <= MAX_ANSWER_LENGTH:
        raise ConfigError(f"{solution[-80:]!r} has no answer in \\boxed{{}}; choose another data.answer_column")
    return box.strip()


def unwrapped(text: str) -> str:
    """Contents of \\text{...} where that is all there is."""
    wrapped = LATEX_WORDS.fullmatch(text)
    return wrapped[1] if wrapped else text


def words_of(text: str) -> str:
    """Text to compare by its letters: `\\text{(A)}`, `(A)` and `a` are the same."""
    return " ".join(unwrapped(text).casefold().strip(" .()").split())


def is_words(text: str) -> bool:
    """Words and no mathematics. The letters of `east` are no product, else `seat` would be equal to it."""
    if LATEX_WORDS.fullmatch(text):
        return not re.search("[0-9]", text)
    return re.search("[A-Za-z]{4}", text) is not None and re.fullmatch("[A-Za-z .,'()-]+", text) is not None


def math_is_correct(answer: str, reference: str, seconds: float = 5.0) -> bool:
    """Whether the answer is mathematically what the reference is. More than `seconds` of work make it wrong.

    The same text is correct, words are compared as words and plain numbers exactly; math-verify does the rest.
    """
    if len(answer) > MAX_ANSWER_LENGTH:
        return False
    answer, reference = clean_latex(answer), clean_latex(reference)
    if not answer or not reference or len(reference) > MAX_ANSWER_LENGTH:
        return False
    if answer == reference:
        return True
    if is_words(reference):
        return words_of(answer) == words_of(reference)
    answer, reference = unwrapped(answer), unwrapped(reference)
    plain, plain_reference = (NUMBER.fullmatch(simple_fractions(text)) for text in (answer, reference))
    if plain and plain_reference:
        value = value_of(plain)
        return value is not None and value == value_of(plain_reference)
    # what math-verify would read in the writer's favour: `1 2 3` as 6, `5 \text{ or 6}` as 5, `11_3` and `11_2` as 11
    if has_foreign_digits(answer) or UNCLEAR_MATH.search(answer):
        return False
    bases, right_bases = (NUMBER_BASE.findall(text) for text in (answer, reference))
    if bases and bases != right_bases:
        return False
    if reference.strip("$ ") == "0" and LETTERS.search(answer):  # it reads words as a product, and any times 0 is 0
        return False
    return ask_worker(answer, reference, seconds)


class Worker(subprocess.Popen):
    """A process with both pipes, always."""

    stdin: IO[bytes]
    stdout: IO[bytes]


def start_worker() -> Worker:
    """A process that runs `serve`, ready to grade. It never sees this process's main module, torch or terminal."""
    code = "import sys; sys.path.insert(0, sys.argv[1]); from src.grading import serve; serve()"
    worker = Worker(
        [sys.executable, "-P", "-c", code, str(Path(__file__).resolve().parent.parent)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        bufsize=0,
        start_new_session=True,  # a Ctrl-C in the terminal is not for it
        env=os.environ | {"PYTHONHASHSEED": "0"},  # sympy orders by hash: the same answer, the same verdict
    )
    try:
        greeting = read_line(worker, WORKER_START_SECONDS)
    except (EOFError, TimeoutError) as error:
        greeting = type(error).__name__
    except BaseException:
        stop_worker(worker)
        raise
    if greeting != "ready":
        stop_worker(worker)
        raise ConfigError(
            f"math answers need the package math-verify, which does not start here: {greeting}; install it"
        )
    return worker


def stop_worker(worker: Worker) -> None:
    """Kill it and leave nothing of it behind."""
    worker.kill()
    worker.wait()
    worker.stdin.close()
    worker.stdout.close()


def read_line(worker: Worker, seconds: float) -> str:
    """Its next line; TimeoutError after so many seconds, EOFError if it is dead."""
    poll = select.poll()  # select.select knows only the first 1024 files of a process
    poll.register(worker.stdout, select.POLLIN)
    deadline = time.monotonic() + seconds
    line = b""
    while not line.endswith(b"\n"):
        if not poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
            raise TimeoutError
        piece = os.read(worker.stdout.fileno(), 4096)
        if not piece:
            raise EOFError
        line += piece
    return line.decode().strip()


def ask_worker(answer: str, reference: str, seconds: float) -> bool:
    """The verdict of the worker process, which is started if there is none and killed if it is late."""
    global WORKER
    request = json.dumps([answer, reference, seconds]).encode() + b"\n"  # short: fits into the pipe, cannot block
    with WORKER_LOCK:
        for _ in range(2):  # a worker that somebody else killed must not cost a right answer its reward
            worker, WORKER = WORKER or start_worker(), None
            try:
                worker.stdin.write(request)
                verdict = read_line(worker, seconds)
                if verdict in ("right", "wrong"):
                    WORKER = worker
                return verdict.startswith("right")
            except TimeoutError:
                return False
            except (EOFError, BrokenPipeError):
                continue
            finally:  # also after Ctrl-C: a worker that still owes an answer would give it to the next question
                if WORKER is None:
                    stop_worker(worker)
    return False


def forget_worker() -> None:
    """In a forked child: two processes must not read from one worker."""
    global WORKER, WORKER_LOCK
    if WORKER is not None:
        WORKER.stdin.close()
        WORKER.stdout.close()
    WORKER, WORKER_LOCK = None, threading.Lock()


WORKER: Worker | None = None
WORKER_LOCK = threading.Lock()
os.register_at_fork(after_in_child=forget_worker)


def serve() -> None:
    """The worker: reads [answer, reference, seconds] as a line of JSON, writes `right` or `wrong`, ends with its input.

    `right, tired` and `wrong, tired` say that an answer left so much in memory that a new worker should go on.
    """
    import resource

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints is no reply
    for limit, size in ((resource.RLIMIT_AS, WORKER_MEMORY), (resource.RLIMIT_CORE, 0)):
        with contextlib.suppress(ValueError, OSError):  # macOS has no such limit; a lower one may already be set
            resource.setrlimit(limit, (size, size))
    try:  # the imports and the first answer take long, and are on no completion's account
        greeting = "ready" if math_verify_says("1+x", "x+1") else "it finds x+1 and 1+x different"
    except ImportError as error:  # anything else ends the process
        greeting = " ".join(str(error).split())
    print(greeting, file=replies, flush=True)
    for line in sys.stdin:
        answer, reference, seconds = json.loads(line)
        signal.setitimer(signal.ITIMER_REAL, 2 * seconds)  # kills it, should the parent be dead by then
        verdict = "right" if math_verify_says(answer, reference) else "wrong"
        signal.setitimer(signal.ITIMER_REAL, 0)
        try:
            mmap.mmap(-1, WORKER_MEMORY // 2).close()
        except OSError:
            verdict += ", tired"
        print(verdict, file=replies, flush=True)


def math_verify_says(answer: str, reference: str) -> bool:
    """math-verify's verdict, without any limit of time. An error is a wrong answer."""
    from math_verify import LatexExtractionConfig, parse, verify

    try:
        # between dollar signs, of which clean_latex left none: the whole text is the answer, no part of it
        gold, target = (
            parse(f"${text}$", [LatexExtractionConfig()], parsing_timeout=None) for text in (reference, answer)
        )
        return bool(verify(gold, target, float_rounding=12, timeout_seconds=None))
    except Exception:
        return False
