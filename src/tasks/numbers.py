"""The number that an answer states, exactly: a regular expression and fractions, no tolerance."""

import re
import unicodedata
from fractions import Fraction

from src.config import ConfigError
from src.tasks.answers import innermost_box

MAX_ANSWER_LENGTH = 1000
MAX_NUMBER_LENGTH = 40

# symbols that models write in place of LaTeX; a blank keeps them from a backslash before them
LATEX_OF = str.maketrans({"−": "-", "×": r" \times ", "π": r" \pi ", "∞": r" \infty ", "°": r"^\circ ", "∈": r" \in "})
LATEX_SPACE = re.compile(r"(?<!\\)\\(?:[$()\[\],;: ]|(?:q?quad|displaystyle|pounds|euro)(?![A-Za-z]))|\$")
TEXT_COMMAND = r"\\(?:text|textbf|textrm|textit|textnormal|mbox|mathrm|mathbf|mathit|operatorname)\s*\{"
LATEX_WORDS = re.compile(TEXT_COMMAND + r"([^{}]*)\}")
LATEX_DEGREES = re.compile(r"\^ ?\{? ?\\circ ?\}?|\\degrees?(?![A-Za-z])")
SHORT_FRACTION = re.compile(r"\\[dtc]?frac\s*([0-9])\s*([0-9])")  # \frac12
LATEX_FRACTION = re.compile(r"\\[dtc]?frac ?\{ ?(-?[0-9,]+) ?\} ?\{ ?([0-9,]+) ?\}")
PARTS = "½⅓⅔¼¾⅕⅖⅗⅘⅙⅚⅛⅜⅝⅞"  # each a digit, a slash that is not ASCII, and a digit
PLAIN_PARTS = str.maketrans({part: "{0}/{2} ".format(*unicodedata.normalize("NFKC", part)) for part in PARTS})
WHOLE_AND_PART = re.compile(f"(?<=[0-9])(?=[{PARTS}])")
BLANK_THOUSANDS = re.compile(  # 1 000 000, but not 1 100/200, which is a mixed number
    r"(?<![0-9.,/A-Za-z])[1-9][0-9]{0,2}(?:(?:[ \u00a0\u2009\u202f]|\\[, ])[0-9]{3})++(?![0-9]| ?/)"
)
POWER_OF_UNIT = re.compile(
    r"(?<![A-Za-z\\])((?:[cdkm]|centi|deci|kilo|milli)?m(?:et(?:er|re)s?)?|ft|feet|foot|in|inch(?:es)?|y(?:ar)?ds?"
    r"|mi(?:les?)?|units?)(?: ?\^ ?(?:[23]|\{ ?[23] ?\})(?![0-9])|[²³])"
)
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
    """The value of a NUMBER; None for `1/0`, `1 3/2`, `1 0/2` and `0 1/2`, and beyond MAX_NUMBER_LENGTH characters."""
    if match.end() - match.start() > MAX_NUMBER_LENGTH:
        return None
    parts = {name: part.replace(",", "") for name, part in match.groupdict().items() if part}
    if "decimal" in parts:
        value = Fraction(parts["decimal"])
    else:
        whole, top, bottom = (int(parts.get(name, 0)) for name in ("whole", "top", "bottom"))
        if bottom == 0 or ("whole" in parts and not (whole and 0 < top < bottom)):
            return None
        value = whole + Fraction(top, bottom)
    return -value if parts.get("sign") == "-" else value


def parse_number(text: str) -> Fraction | None:
    """The one number that an answer states, exactly, or None: `$1,234.50`, `1 000`, `x = 18`, `1½ cups`, `It is 18.`

    After an equals sign only what follows the last one counts. A unit is ignored, with the 2 of `ft^2`, and a percent
    sign is one: 50% is 50.
    Two different numbers, other operators, `2 dozen` or anything that is not understood have no value.
    """
    if len(text) > MAX_ANSWER_LENGTH:
        return None
    text = BLANK_THOUSANDS.sub(lambda number: re.sub("[^0-9]", "", number[0]), text)
    text = WHOLE_AND_PART.sub(" ", text).translate(PLAIN_PARTS)
    text = LATEX_WORDS.sub(r" \1 ", clean_latex(text).replace(r"\%", "%"))
    text = POWER_OF_UNIT.sub(r"\1", simple_fractions(LATEX_DEGREES.sub(" degrees ", text)))
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
