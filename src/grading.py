"""What a model's text is worth: parsing and grading of answers. A text can not hang, crash or execute anything here.

Arithmetic is parsed by a small grammar and numbers by a regular expression: exact, bounded, never `eval`. Mathematics
is compared by math-verify in a process of its own, which the kernel ends when it takes too long.
"""

import contextlib
import gc
import json
import mmap
import os
import re
import resource
import select
import signal
import subprocess
import sys
import threading
import time
import unicodedata
from fractions import Fraction
from itertools import accumulate
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
WORKER_SECONDS = 0.45  # of processor time for an answer: 3 times what the slowest of 82 typical right ones needs
WORKER_MEMORY = 2 << 30  # bytes of address space
WORKER_START_SECONDS = 120
TIRED = 3  # exit code of a child that another one should follow

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

# what may reach math-verify: known signs, and numbers that stand alone (`0.0.0` would be 0, `1 2 3` would be 6)
MATH_TEXT = re.compile(TEXT_COMMAND + r"([A-Za-z .,/()~-]*)\}")
MATH_ALPHABET = re.compile(
    rf"(?:(?:{INTEGER}(?:\.[0-9]++)?|\.[0-9]++)(?! ?[.0-9])|_[0-9]++|\\[A-Za-z]++|\\[{{}}|%\\]"
    r"|[-A-Za-z {}()\[\]+*/^_=<>!,;:|&%≤≥≠∪∩∅])*+"
)
UNCLEAR_MATH = re.compile(
    r"""answer|\\\Z|[A-Za-z]{16}                       # what it would look for in the text, or take for many factors
    |\\(?:[a-z]*space|q?quad|hfil|v(?:rule|center|box|skip)|phantom|boxed|fbox|ldots|displaystyle|approx
    |text[a-z]*|mbox|math(?:rm|bf|it)|operatorname)  # not seen, or text that is more than a unit or `and`
    |(?<![\\_A-Za-z])(?!(?:and|or)\b)[A-Za-z]+[ {]*[0-9.]  # `x2` is neither 2x nor x^2
    # braces that show nothing: 2{3} is no product
    |(?<![_0-9])[0-9]+\ ?\{|\)\ ?\{|(?<![]}\\A-Za-z^_ ])\ ?\{[^{}]*\}\ ?[0-9]
    |\^[ {]*-?[0-9]{5}|\^\ ?(?:[0-9.]+|\{[^{}]*[0-9])\ ?[!^]|[0-9]{4}\ ?!|!\ ?[!^]  # giants
    |%\ ?[0-9A-Za-z.({\\]|[(\[][^)\]]*(?<![A-Za-z])(?:and|or)(?![A-Za-z])  # 8% 00 is no product, (5, or 4) no pair
    # infinity alone or at the end of an interval: anything may be equal to its multiples
    |[0-9A-Za-z)\]}!%.^]\ ?(?:\\infty|inf)|\\[a-z]+\ (?:\\infty|inf)|(?:\\infty|inf(?:inity)?)\ ?[^] )},<>=\\;a-z]
    """,
    re.IGNORECASE | re.VERBOSE,
)
FIRST_OF_FRACTION = re.compile(r"(\\[dtc]?frac) ?([0-9A-Za-z])(?= ?[{0-9A-Za-z])")  # \frac1{2}
BRACE = re.compile(r"\\.|([{}])")
MAX_NESTING = 12  # braces
NAMES = re.compile(
    r"\\(?:begin|end)\{[a-z]*\}|\\[A-Za-z]+|(?<![A-Za-z])(?:and|or|inf(?:inity)?)(?![A-Za-z])|([A-Za-z])"
)
NUMBER_WITH_UNIT = re.compile(NUMBER.pattern + r"[A-Za-z ]*")
BRACKETS = re.compile(r"[(\[][^()\[\]]*[)\]]")
UNIT_LETTERS = frozenset("mghsLNJWVACF")
SUBSCRIPT = re.compile(r"(?<![A-Za-z ]) ?_\W*(\w*)", re.ASCII)  # of anything but a name: the base of a number
LAYOUT = re.compile(
    r"\\(?:left|right)(?![A-Za-z])|(?<=\\)[dt](?=frac)|(?<![0-9A-Za-z\\]) (?![0-9]{3})|(?<!\\) (?![0-9A-Za-z])"
)
LAST_NAME = re.compile(r"(?<=[0-9}) ])([cdghlmost]|ab|bc|rd)\Z")  # names that math-verify takes for units

# a worker grades these first: only then is it as fast as it will be
WARM_UP = [
    (r"\frac{1}{2}+x", "x+0.5"), (r"(1,\frac{\pi}{2})", r"(1, 0.5 \pi)"), (r"2\sqrt{3}", r"\sqrt{12}"), ("2+i", "i+2"),
    (r"(-\infty,0)\cup[1,2]", r"(-\infty, 0) \cup [1, 2]"), ("(x+2)(x-5)", "x^2-3x-10"), ("y=-2x+1", "y = 1 - 2x"),
    (r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", r"\begin{pmatrix} 1 & 2 \\ 3 & 8/2 \end{pmatrix}"), ("1,2,3", "3,2,1"),
    (r"\frac{x^2-1}{x-1}", "x+1"), (r"\frac{1}{x}+\frac{1}{y}", r"\frac{x+y}{xy}"), (r"x \le 3", r"3 \ge x"),
]  # fmt: skip


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


def has_value_words(text: str) -> bool:
    """Words that are no units, or letters that are none."""
    words = re.findall("[A-Za-z]+", text)
    return any(VALUE_WORDS.fullmatch(word) or (len(word) == 1 and word not in UNIT_LETTERS) for word in words)


def is_clear_math(text: str) -> bool:
    """Mathematics that says one thing, and no giant one. The rest math-verify would mend in the writer's favour."""
    if has_value_words(" ".join(MATH_TEXT.findall(text))):  # it would drop them as units
        return False
    text = MATH_TEXT.sub(",", FIRST_OF_FRACTION.sub(r"\1{\2}", text))  # text parts numbers
    depths = list(accumulate((brace == "{") - (brace == "}") for brace in BRACE.findall(text)))
    closed = not depths or (min(depths) == depths[-1] == 0 and max(depths) <= MAX_NESTING)
    return closed and MATH_ALPHABET.fullmatch(text) is not None and not UNCLEAR_MATH.search(text)


def math_is_correct(answer: str, reference: str, seconds: float = 5.0) -> bool:
    """Whether the answer is mathematically what the reference is. More than WORKER_SECONDS of work make it wrong.

    The same text is correct, words are compared as words and plain numbers exactly; math-verify does the rest.
    `seconds` by the clock are the last resort: they do not tell much work from a busy machine.
    """
    if len(answer) > MAX_ANSWER_LENGTH:
        return False
    answer, reference = clean_latex(answer), clean_latex(reference)
    if not answer or not reference or len(reference) > MAX_ANSWER_LENGTH:
        return False
    if LAYOUT.sub("", answer) == LAYOUT.sub("", reference):
        return True
    if is_words(reference):
        return words_of(answer) == words_of(reference)
    answer, reference = unwrapped(answer), unwrapped(reference)
    plain, plain_reference = (NUMBER.fullmatch(simple_fractions(text)) for text in (answer, reference))
    if plain and plain_reference:
        value = value_of(plain)
        return value is not None and value == value_of(plain_reference)
    bases, right_bases = (SUBSCRIPT.findall(text) for text in (answer, reference))
    if (bases and bases != right_bases) or not is_clear_math(answer):  # it reads `11_3` and `11_2` as 11
        return False
    # a name that the reference has not is multiplied, and any times 0 is 0; and it takes 1,2 for (1,2)
    stated = MATH_TEXT.sub("", answer.rpartition("=")[2])
    unit = NUMBER_WITH_UNIT.fullmatch(simple_fractions(stated)) is not None and not has_value_words(stated)
    known = {"", *("ei" if reference != "0" else ""), *NAMES.findall(reference.lower())}
    if not unit and not set(NAMES.findall(stated.lower())) <= known:
        return False
    if reference.startswith(("(", "[", r"\left")) and "=" not in answer:
        inside = [BRACKETS.sub("", BRACKETS.sub("", text)) for text in (answer, reference)]
        if "," in inside[0] and "," not in inside[1]:
            return False
    # it drops a unit at the end; in `3t` the t is a name, which braces protect
    name = LAST_NAME.search(reference)
    if name:
        answer, reference = (
            re.sub(rf"(?<![A-Za-z\\]){name[1]}\Z", f"{{{name[1]}}}", text) for text in (answer, reference)
        )
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
    """Kill it with its child and leave nothing of it behind."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(worker.pid, signal.SIGKILL)
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
    request = json.dumps([answer, reference]).encode() + b"\n"  # short: fits into the pipe, cannot block
    with WORKER_LOCK:
        for _ in range(2):  # a worker that somebody else killed must not cost a right answer its reward
            worker, WORKER = WORKER or start_worker(), None
            try:
                worker.stdin.write(request)
                verdict = read_line(worker, seconds)
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
    """The worker: reads [answer, reference] as lines of JSON, writes `right 0.012`: the verdict and processor seconds.

    A child grades, until an answer is too much for it: then the kernel ends it, whatever it is doing, with nothing
    left half done, and the next child begins as the first one did. The worker ends with its input.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    replies = os.dup(1)
    os.dup2(2, 1)  # what a library prints is no reply
    for limit, size in ((resource.RLIMIT_AS, WORKER_MEMORY), (resource.RLIMIT_CORE, 0)):
        with contextlib.suppress(ValueError, OSError):  # macOS has no such limit; a lower one may already be set
            resource.setrlimit(limit, (size, size))
    try:  # the imports and the first answers take long, and are on no completion's account
        wrong = [pair for pair in WARM_UP if not math_verify_says(*pair)]
        greeting = f"it finds {wrong[0]} different" if wrong else "ready"
    except ImportError as error:  # anything else ends the process
        greeting = " ".join(str(error).split())
    os.write(replies, f"{greeting}\n".encode())
    gc.freeze()  # nothing of this is garbage, and looking through it takes 50 ms
    parent, ended = os.getpid(), TIRED
    while ended in (TIRED, -signal.SIGPROF):
        child = os.fork()
        if child == 0:
            try:
                os._exit(grade_questions(replies, parent))
            finally:
                os._exit(1)
        ended = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if ended == -signal.SIGPROF:
            os.write(replies, f"wrong {WORKER_SECONDS}\n".encode())


def grade_questions(replies: int, parent: int) -> int:
    """The worker's child. Returns 0 at the end of the input, TIRED when an answer has left much in memory."""
    for line in sys.stdin:
        if os.getppid() != parent:  # the worker was killed: a new one will answer
            return 0
        signal.setitimer(signal.ITIMER_PROF, WORKER_SECONDS)
        begin = time.process_time()
        verdict = "right" if math_verify_says(*json.loads(line)) else "wrong"
        signal.setitimer(signal.ITIMER_PROF, 0)
        os.write(replies, f"{verdict} {time.process_time() - begin:.4f}\n".encode())
        try:
            mmap.mmap(-1, WORKER_MEMORY // 2).close()
        except OSError:
            return TIRED
    return 0


def math_verify_says(answer: str, reference: str) -> bool:
    """math-verify's verdict, without any limit of time. An error is a wrong answer."""
    from math_verify import LatexExtractionConfig, parse, verify
    from sympy.core.cache import clear_cache

    clear_cache()  # it made verdicts on infinity depend on the answers before
    try:
        # between dollar signs, of which clean_latex left none: the whole text is the answer, no part of it
        gold, target = (
            parse(f"${text}$", [LatexExtractionConfig()], parsing_timeout=None) for text in (reference, answer)
        )
        return bool(verify(gold, target, float_rounding=12, timeout_seconds=None))
    except Exception:
        return False
