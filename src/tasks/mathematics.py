"""Whether two answers are the same mathematics; what is not plain is asked of math-verify, in a process of its own."""

import re
from itertools import accumulate

from src.config import ConfigError
from src.tasks.answers import innermost_box
from src.tasks.grader import Grader
from src.tasks.numbers import (
    INTEGER,
    LATEX_WORDS,
    MAX_ANSWER_LENGTH,
    NUMBER,
    TEXT_COMMAND,
    VALUE_WORDS,
    clean_latex,
    simple_fractions,
    value_of,
)

UNBRACED_BOX = re.compile(r"\\(?:boxed|fbox)\s++([0-9A-Za-z.,/+-]++)(?=[\s$]|\Z)")
# what may reach math-verify: known signs, and numbers that stand alone (`0.0.0` would be 0, `1 2 3` would be 6)
MATH_TEXT = re.compile(TEXT_COMMAND + r"([A-Za-z .,/()~-]*)\}")
MATH_ALPHABET = re.compile(
    rf"(?:(?:{INTEGER}(?:\.[0-9]++)?|\.[0-9]++)(?! ?[.0-9])|_[0-9]++|\\[A-Za-z]++|\\[{{}}|%\\]"
    r"|[-A-Za-z {}()\[\]+*/^_=<>!,;:|&%≤≥≠∪∩∅])*+"
)
UNCLEAR_MATH = re.compile(
    r"""answer|\\\Z|[A-Za-z]{16}                       # what it would look for in the text, or take for many factors
    |\\(?:[a-z]*space|q?quad|hfil|v(?:rule|center|box|skip)|phantom|boxed|fbox|ldots|displaystyle|approx|(?:not)?in(?![a-z])
    |text[a-z]*|mbox|math(?:rm|bf|it)|operatorname)  # not seen, or text that is more than a unit or `and`
    |(?<![\\_A-Za-z])(?!(?:and|or)\b)[A-Za-z]+[ {]*[0-9.]  # `x2` is neither 2x nor x^2
    # braces that show nothing: 2{3} is no product
    |(?<![_0-9])[0-9]+\ ?\{|\)\ ?\{|(?<![]}\\A-Za-z^_ ])\ ?\{[^{}]*\}\ ?[0-9]|\}\ ?\{[^{}]*\}\ ?\{
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
PLAIN_COMMAND = re.compile(r"(?<![\\A-Za-z])(pi(?![0-9A-Za-z])|sqrt(?= ?[({]))")  # no backslash before it
ROOT_OR_BRACKET = re.compile(r"\\sqrt ?\(|[()]")
MEMBER = re.compile(r"\A([A-Za-z]|\\theta) ?\\in(?![A-Za-z]) ?(?=[(\[\\])")  # x \in [0,1)
PERCENT = re.compile(r" ?(?:\\?%|(?<![A-Za-z])percent(?![A-Za-z]))", re.IGNORECASE)
PERCENT_AT_END = re.compile(PERCENT.pattern + r"\Z", re.IGNORECASE)
LAST_NAME = re.compile(r"(?<=[0-9}) ])([cdghlmost]|ab|bc|rd)\Z")  # names that math-verify takes for units
MATH = Grader(
    "src.tasks.math_verdict",
    "math answers need the package math-verify, which does not start here: {}; install it",
)


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


def with_commands(text: str) -> str:
    """LaTeX for `sqrt(2)` and `2*pi`."""
    pieces: list[str] = []
    opened: list[str] = []  # what closes each bracket
    text, position = PLAIN_COMMAND.sub(r"\\\1", text), 0
    for match in ROOT_OR_BRACKET.finditer(text):
        pieces.append(text[position : match.start()])
        position = match.end()
        if match[0] == ")":
            pieces.append(opened.pop() if opened else ")")
        else:
            opened.append(")" if match[0] == "(" else "}")
            pieces.append("(" if match[0] == "(" else r"\sqrt{")
    return "".join(pieces) + text[position:]


def brackets_around(text: str) -> str:
    """The bracket that opens a list of at least two and closes at its end: `(`, `[` or `{`; or nothing."""
    text = re.sub(r"\\(?:left|right)(?![A-Za-z])|\\(?=[{}])| ", "", text)
    depths = list(accumulate((character in "([{") - (character in ")]}") for character in text))
    is_list = text[:1] in tuple("([{") and 0 not in depths[:-1] and depths[-1] == 0
    return text[0] if is_list and any(d == 1 and c == "," for d, c in zip(depths, text, strict=True)) else ""


def same_numbers(answer: str, reference: str) -> bool | None:
    """Whether two plain numbers are the same; None if they are not plain.

    3% is 0.03 and not 3. But where the reference is in percent, the answer may leave the sign to the question.
    """
    numbers = [NUMBER.fullmatch(simple_fractions(PERCENT_AT_END.sub("", text))) for text in (answer, reference)]
    percent, right_percent = (PERCENT.search(text) is not None for text in (answer, reference))
    if not (numbers[0] and numbers[1]):
        return False if percent and not right_percent else None
    value, right = value_of(numbers[0]), value_of(numbers[1])
    if value is None or right is None:
        return False
    if percent == right_percent:
        return value == right
    return value == 100 * right if percent else value in (right, right / 100)


def ask_worker(answer: str, reference: str, seconds: float) -> bool:
    """math-verify's verdict."""
    return MATH.ask([answer, reference], seconds)


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
    member, right_member = MEMBER.match(answer), MEMBER.match(reference)
    if member and right_member and member[1] != right_member[1]:
        return False
    answer, reference = MEMBER.sub("", answer), MEMBER.sub("", reference)
    if LAYOUT.sub("", answer) == LAYOUT.sub("", reference):
        return True
    if is_words(reference):
        return words_of(answer) == words_of(reference)
    answer, reference = with_commands(unwrapped(answer)), with_commands(unwrapped(reference))
    verdict = same_numbers(answer, reference)
    if verdict is not None:
        return verdict
    bases, right_bases = (SUBSCRIPT.findall(text) for text in (answer, reference))
    if (bases and bases != right_bases) or not is_clear_math(answer):  # it reads `11_3` and `11_2` as 11
        return False
    # a name that the reference has not is multiplied, and any times 0 is 0; and it takes 1,2 for (1,2)
    stated = MATH_TEXT.sub("", answer.rpartition("=")[2])
    unit = NUMBER_WITH_UNIT.fullmatch(simple_fractions(stated)) is not None and not has_value_words(stated)
    known = {"", *("ei" if reference != "0" else ""), *NAMES.findall(reference.lower())}
    if not unit and not set(NAMES.findall(stated.lower())) <= known:
        return False
    kinds = {brackets_around(stated), brackets_around(reference)} - {""}
    if len(kinds) == 2:  # (1,2) is no set
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
