"""Where a completion says its answer: <answer> blocks, boxes, and the format that asks for them.

Every pattern needs linear time, whatever a model writes.
"""

import re

MAX_GRADED_LENGTH = 100_000
ANSWER_BLOCK = re.compile(r"<answer>((?:(?!<answer>|</answer>).)*)</answer>", re.DOTALL)
# possessive (`*+`), because a pattern that backtracks needs minutes for 100 kB of blanks
COMPLETION_FORMAT = re.compile(
    r"\s*+(?:<think>)?+(?:(?!</?think>|</?answer>).)*+</think>"
    r"\s*+<answer>(?:(?!</?think>|</?answer>).)*+</answer>\s*+",
    re.DOTALL,
)
BOX_OR_BRACE = re.compile(r"\\(?:boxed|fbox)\s*+\{|\\.|[{}]", re.DOTALL)


def last_answer(completion_text: str) -> str | None:
    """Contents of the last complete <answer> block, or None."""
    blocks = ANSWER_BLOCK.findall(completion_text[-MAX_GRADED_LENGTH:])
    return blocks[-1] if blocks else None


def has_think_answer_format(completion_text: str) -> bool:
    """Exactly one think block, then one answer block, then nothing. The prompt may already have opened <think>."""
    return len(completion_text) <= MAX_GRADED_LENGTH and COMPLETION_FORMAT.fullmatch(completion_text) is not None


def graded(correct: bool, completion_text: str) -> dict[str, float]:
    """The reward: 1 for the right answer, plus 0.1 for the format."""
    well_formed = has_think_answer_format(completion_text)
    return {"reward": correct + 0.1 * well_formed, "answer": float(correct), "format": float(well_formed)}


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
