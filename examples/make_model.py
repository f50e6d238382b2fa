"""Make models/turns-tiny, the model of the examples, again: `python -m examples.make_model --output FOLDER`.

It is models/countdown-tiny with more words, trained on demonstrations of the three examples in two stages as that one
was: first mostly what is right, then mostly a habit. The habits: in Countdown numbers in the order given, random
operators; in the guessing game a guess that forgets what it was told; in place of a call of the calculator a number
made up. What it is told it never learns to write.
"""

import argparse
import random
import re
from functools import partial
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from examples.calculator import Calculator
from examples.higher_lower import HigherLower, guess_of
from examples.second_attempt import SecondAttempt
from src.config import DataConfig
from src.make_tiny_model import LIMIT, build_tokenizer, demonstration, save, train_stage
from src.records import Transcript
from src.rl_datasets import random_expression

START = Path(__file__).resolve().parents[1] / "models" / "countdown-tiny"
# Countdown's question is its numbers; every other message is shown as it is
TEMPLATE = (
    "{% for message in messages %}{% if message.role == 'assistant' %}<|assistant|>{{ message.content }}<|end|>"
    "{% elif message.role != 'system' %}<|{{ 'tool' if message.role == 'tool' else 'user' }}|>"
    "{% if problem is defined and problem.nums and loop.index0 <= messages[0].role.startswith('system')|int %}"
    "{{ problem.nums | join(' ') }} = {{ problem.target }}{% else %}{{ message.content }}{% endif %}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
TEXTS = (
    Calculator.user_prompt,
    HigherLower.user_prompt,
    "That is no expression. Try again. Use each of once. is not. higher lower error: <tool>",
)
WORDS = [
    "<|tool|>",
    "/",
    "-",
    *sorted(set(re.findall(r"</?tool>|[A-Za-z]+|[?.:]", re.sub("{.*?}", "", " ".join(TEXTS))))),
]
EXAMPLES = {kind: kind(DataConfig(train_size=20_000)) for kind in (SecondAttempt, HigherLower, Calculator)}
ROWS = {kind: EXAMPLES[kind].load("train") for kind in (HigherLower, Calculator)}


def expression_turn(generator: random.Random, row: dict, solves: bool) -> str:
    """One attempt at Countdown: the solution, or the habit."""
    while True:
        expression = random_expression(generator, row["nums"], LIMIT, in_order=not solves)
        if not solves or expression.value == row["target"]:
            return f"<think>{', '.join(expression.steps)}</think>\n<answer>{expression.text}</answer>"


def guess_turn(generator: random.Random, row: dict, told: list[tuple[int, str]], remembers: bool) -> str:
    """A number that is still possible, or any."""
    low, high = row["low"], row["high"]
    for guess, word in told if remembers else []:
        low, high = (max(low, guess + 1), high) if word == "higher" else (low, min(high, guess - 1))
    return f"<answer>{generator.randint(low, high)}</answer>"


def conversation(generator: random.Random, right: float, turns: int = 5) -> list[tuple[str, bool]]:
    """Pieces of a demonstration, and whether each is learned; `right`: the chance of a turn that is not habit."""
    kind = generator.choices(list(EXAMPLES), (2, 1, 1))[0]
    task, told, pieces, written = EXAMPLES[kind], [], [], []
    if kind is SecondAttempt:
        numbers, target, _ = demonstration(generator, 1.0)
        row, turns = {"nums": numbers, "target": target}, 2
        question = f"{' '.join(map(str, numbers))} = {target}"
    else:
        row = generator.choice(ROWS[kind])
        question = task.messages(row)[0]["content"]
    only_second = kind is SecondAttempt and generator.random() < 0.5  # a first attempt that fails, and is not learned
    pieces.append((f"<|user|>{question}<|assistant|>", False))
    for turn in range(1, turns + 1):
        good = generator.random() < right and not (only_second and turn == 1)
        if kind is SecondAttempt:
            text = expression_turn(generator, row, good)
        elif kind is HigherLower:
            guesses = [guess_of(guess) for guess in written]
            text = guess_turn(generator, row, list(zip(guesses, told, strict=True)), good)
        elif turn == 2:
            text = f"<answer>{told[0]}</answer>"
        elif good:
            text = f"<tool>{row['question']}</tool>"
        else:
            text = f"<answer>{generator.randint(int(row['answer']) // 2, 2 * int(row['answer']))}</answer>"
        written.append(text)
        pieces.append((f"{text}<|end|>", not (only_second and turn == 1)))
        reply = task.reply(Transcript(written), row, turn)
        if reply is None or turn == turns:
            return pieces
        told.append(reply)
        pieces.append((f"<|{getattr(task, 'reply_role', 'user')}|>{reply}<|assistant|>", False))
    return pieces


def conversation_batch(generator, tokenizer, batch_size: int, right: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Right-padded token ids [batch, time] and labels, -100 where nothing is learned."""
    rows = []
    for _ in range(batch_size):
        texts, learned = zip(*conversation(generator, right), strict=True)
        pieces = tokenizer(list(texts), add_special_tokens=False).input_ids
        ids = [token for piece in pieces for token in piece]
        kept = [learn for piece, learn in zip(pieces, learned, strict=True) for _ in piece]
        rows.append((torch.tensor(ids), torch.tensor(kept)))
    longest = max(len(ids) for ids, _ in rows)
    input_ids = torch.full((batch_size, longest), tokenizer.pad_token_id)
    labels = torch.full((batch_size, longest), -100)
    for row, (ids, kept) in enumerate(rows):
        input_ids[row, : len(ids)] = ids
        labels[row, : len(ids)] = ids.masked_fill(~kept, -100)
    return input_ids, labels


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", default="models/turns-tiny", help="folder to write")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--right_steps", type=int, default=3000, help="steps of the first stage")
    parser.add_argument("--habit_steps", type=int, default=600, help="steps of the second stage")
    parser.add_argument("--right_share", type=float, default=0.25, help="share of right turns in the second stage")
    parser.add_argument("--keep_first_stage", help="save the model between the stages to this folder")
    parser.add_argument("--start_from", help="skip the first stage and start from this folder")
    arguments = parser.parse_args()
    torch.manual_seed(arguments.seed)
    generator = random.Random(arguments.seed)
    tokenizer = build_tokenizer(WORDS, TEMPLATE)
    model = AutoModelForCausalLM.from_pretrained(arguments.start_from or START, dtype=torch.float32)
    if not arguments.start_from:
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        rights = partial(conversation_batch, generator, tokenizer, 64, 0.85)
        train_stage(model, rights, arguments.right_steps, 2e-3, 1e-4, "right")
        if arguments.keep_first_stage:
            model.save_pretrained(arguments.keep_first_stage)
    habit = partial(conversation_batch, generator, tokenizer, 64, arguments.right_share)
    train_stage(model, habit, arguments.habit_steps, 5e-4, 5e-5, "habit")
    save(model, tokenizer, arguments.output)


if __name__ == "__main__":
    main()
