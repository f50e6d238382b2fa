"""What a task replies: rendered and tokenized once, guarded as rewards are, and refused where no template shows it."""

import logging

import pytest
from test_sampler import TOKENIZER

from examples.calculator import Calculator
from examples.higher_lower import HigherLower
from examples.make_model import TEMPLATE, WORDS
from examples.second_attempt import SecondAttempt
from src.config import ConfigError, DataConfig
from src.make_tiny_model import build_tokenizer
from src.records import Episode, Group, Transcript
from src.tasks import Conversation, Rewards, Task, answers_of, make_problems

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# as that of Qwen3: what was thought before the last question is gone
FORGETS = CHATML.replace("{{ m.content }}", "{{ m.content.split('</think>')[-1] if not loop.last else m.content }}")
NO_TOOLS = "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}{% endfor %}x"


class Echo(Task):
    """Replies what the test says."""

    system_prompt = response_prefix = ""
    said: object = "more"

    def load(self, split):
        return [{"prompt": "3 4"}]

    def reply(self, text, row, turn):
        row["prompt"] = "spoilt"  # it has a copy
        if isinstance(self.said, BaseException):
            raise self.said
        while self.said == "hang":
            pass
        return self.said

    def reward(self, text, row):
        assert row["prompt"] != "spoilt"
        return float(len(text.turns))


def conversation(template: str | None = CHATML, said: object = "more", **options):
    """A conversation of Echo, and its problem."""
    tokenizer = build_tokenizer(["<|im_start|>"], template)
    tokenizer.chat_template = template
    task = Echo(DataConfig(**options))
    task.said = said
    (problem,) = make_problems(task, task.load("train"), tokenizer, 1000)
    return Conversation(task, tokenizer), problem


END, OTHER = TOKENIZER.eos_token_id, TOKENIZER.convert_tokens_to_ids("7")


@pytest.mark.parametrize(
    "template, last, prefix, told",
    [
        (CHATML, END, "", "\n<|im_start|>user\nmore<|end|>\n<|im_start|>assistant\n"),
        (CHATML, OTHER, "", "<|end|>\n<|im_start|>user\nmore<|end|>\n<|im_start|>assistant\n"),  # by a stop string
        (CHATML, END, "<think>", "\n<|im_start|>user\nmore<|end|>\n<|im_start|>assistant\n<think>"),
        (FORGETS, END, "", "\n<|im_start|>user\nmore<|end|>\n<|im_start|>assistant\n"),
        (TEMPLATE, END, "", "<|user|>more<|assistant|>"),
        (None, END, "<think>", "\n\nmore\n<think>"),
    ],
)
def test_a_reply_is_what_the_template_writes_after_the_turn(template, last, prefix, told):
    talk, problem = conversation(template, response_prefix=prefix)
    talk.check(problem)
    found = talk(problem, Transcript(["8"]), last)
    assert (found.text, found.broken) == (told, "")
    assert list(found.token_ids) == talk.tokenizer(told, add_special_tokens=False).input_ids


def test_the_role_of_a_reply_is_the_tasks():
    talk, problem = conversation(TEMPLATE)
    talk.task.reply_role = "tool"
    assert talk(problem, Transcript(["8"]), END).text == "<|tool|>more<|assistant|>"


def test_none_ends_the_episode():
    talk, problem = conversation(said=None)
    assert talk(problem, Transcript(["8"]), END) is None


@pytest.mark.parametrize(
    "said, words",
    [
        (ValueError("no such thing"), "Echo.reply: ValueError: no such thing"),
        (SystemExit(3), "Echo.reply: SystemExit: 3"),
        ("hang", "Echo.reply: took longer than 0.2 s"),
        (5, "Echo.reply returned 5, not a text or None"),
        ("\ud800", "Echo.reply returned '\\ud800', not a text or None"),
    ],
)
def test_a_reply_that_is_no_text_raises_or_hangs_is_a_counted_fault_with_reward_0(
    said, words, monkeypatch, caplog, tmp_path
):
    monkeypatch.setattr("src.tasks.guard.REWARD_SECONDS", 0.2)
    talk, problem = conversation(said=said)
    told = talk(problem, Transcript(["8"]), END)
    assert told.broken == words and told.token_ids == ()
    rewards = Rewards(talk.task, talk.task.data)
    good, bad = (
        Episode((4,), (-1.0,), True, Transcript(["8"])),
        Episode((4,), (-1.0,), False, Transcript(["8"]), broken=told.broken),
    )
    with caplog.at_level(logging.WARNING, "grpo"):
        (group,) = rewards.grade([Group(problem, (good, bad, bad))])
    assert [episode.reward for episode in group.episodes] == [1.0, 0.0, 0.0]
    assert [episode.reward_errors for episode in group.episodes] == [0, 1, 1] and rewards.errors == 2
    assert words in caplog.text and "reward 0 for 2 of 3 completions" in caplog.text
    (tmp_path / "more.py").write_text("def kind(completions):\n    return [0.7 for _ in completions]\n")
    with_function = Rewards(talk.task, DataConfig(reward_functions=[f"{tmp_path / 'more.py'}:kind"]))
    (group,) = with_function.grade([Group(problem, (good, bad))])
    assert [episode.reward for episode in group.episodes] == [1.7, 0.0], "text that breaks a reply earns nothing else"
    talk.task.data.on_reward_error = "stop"
    with pytest.raises(ConfigError, match="on_reward_error: zero"):
        rewards.grade([Group(problem, (bad,))])


@pytest.mark.parametrize(
    "template, words",
    [
        ("{{ messages[0].content }}", "does not show what was written and what is told after it"),
        ("{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}", "does not show"),
        ("{% for m in messages %}{% if loop.index < 3 %}{{ m.content }}{% endif %}{% endfor %}", "does not show"),
    ],
)
def test_a_template_that_shows_no_second_turn_is_refused(template, words):
    talk, problem = conversation(template)
    with pytest.raises(ConfigError, match=words):
        talk.check(problem)


def test_a_template_that_refuses_the_role_says_which():
    talk, problem = conversation(NO_TOOLS)
    talk.task.reply_role = "tool"
    with pytest.raises(ConfigError, match="refuses a chat of user and assistant and tool"):
        talk.check(problem)


@pytest.mark.parametrize("template, changes", [(CHATML, False), (TEMPLATE, False), (None, False), (FORGETS, True)])
@pytest.mark.parametrize("prefix", ["", "Well.\n<think>"])
def test_a_template_that_changes_earlier_turns_is_told_of(template, changes, prefix, caplog):
    talk, problem = conversation(template, response_prefix=prefix)
    with caplog.at_level(logging.INFO, "grpo"):
        talk.check(problem)
    assert ("earlier turns otherwise" in caplog.text) == changes


# ---------------------------------------------------------------------------------------------------------------------
# The examples
# ---------------------------------------------------------------------------------------------------------------------


def attempt(expression: str) -> str:
    return f"<think>1</think>\n<answer>{expression}</answer>"


def test_second_attempt():
    task, row = SecondAttempt(DataConfig()), {"nums": [3, 4, 5], "target": 17}
    right, wrong = attempt("3 * 4 + 5"), attempt("3 + 4 + 5")
    assert task.reply(Transcript([right]), row, 1) is None
    assert task.reply(Transcript([wrong]), row, 1) == "12 is not 17. Try again."
    assert task.reply(Transcript([attempt("3 * 5 + 2")]), row, 1) == "Use each of 3 4 5 once. Try again."
    assert task.reply(Transcript(["17"]), row, 1) == "That is no expression. Try again."
    told = "12 is not 17. Try again."
    assert task.reward(Transcript([wrong, right], [told]), row) == {
        "reward": 1.1, "answer": 1.0, "format": 1.0, "first_attempt": 0.0
    }  # fmt: skip
    assert task.reward(Transcript([right, wrong], [told]), row)["answer"] == 0.0
    assert task.reward(Transcript([wrong], [right]), row)["answer"] == 0.0  # what was told is no answer
    assert task.reward(Transcript([right]), row)["first_attempt"] == 1.0


def test_votes_are_those_of_the_last_turn():
    texts = [Transcript([attempt("1 + 2"), attempt("2 + 1")], [attempt("3 + 0")]), Transcript([attempt("1 + 2"), "x"])]
    assert answers_of(SecondAttempt(DataConfig()), texts) == ["2+1", None]
    assert answers_of(Calculator(DataConfig()), [Transcript(["<answer>1</answer>", "<answer>2</answer>"])]) == ["2"]


def test_higher_lower():
    task = HigherLower(DataConfig(eval_size=50))
    train, held_out = task.load("train"), task.load("test")
    assert len(held_out) == 50 and len(train) > 1000 and train == HigherLower(DataConfig()).load("train")
    assert not {row["low"] for row in train} & {row["low"] for row in held_out}
    row = {"low": 1, "high": 31, "secret": 20}
    for guess, said in (("5", "higher"), ("30", "lower"), ("20", None), ("x", None), ("9" * 5000, None), ("²", None)):
        assert task.reply(Transcript([f"<answer>{guess}</answer>"]), row, 1) == said
    assert task.reward(Transcript(["<answer>5</answer>", "<answer> 20 </answer>"], ["higher"]), row) == 1.0
    assert task.reward(Transcript(["<answer>20</answer>", "<answer>5</answer>"], ["x"]), row) == 0.0


def test_calculator():
    task = Calculator(DataConfig(train_size=300, eval_size=100))
    train, held_out = task.load("train"), task.load("test")
    assert (
        len(train) == 300
        and len(held_out) == 100
        and not {r["question"] for r in train} & {r["question"] for r in held_out}
    )
    row = {"question": "12 * 34 + 5", "answer": "413"}
    for text, said in (
        ("<tool>12 * 34 + 5</tool>", "413"), ("so <tool>1 / 3</tool>\n", "1/3"), ("<answer>413</answer>", None),
        ("<tool>9 ** 9 ** 9</tool>", "error: expected a number, found '*'"), ("<tool>12</tool> or not", None),
        ("<tool>__import__('os')</tool>", "error: unexpected '_'"), ("<tool>1 / 0</tool>", "error: division by zero"),
    ):  # fmt: skip
        assert task.reply(Transcript([text]), row, 1) == said
    assert task.reward(Transcript(["<tool>1 + 1</tool>", "<answer>413</answer>"], ["2"]), row) == 1.0
    assert task.reward(Transcript(["<tool>413</tool>", "so"], ["<answer>413</answer>"]), row) == 0.0


def test_the_words_of_the_examples_are_known_to_their_tokenizer():
    tokenizer = build_tokenizer(WORDS, TEMPLATE)
    texts = ["12 is not 17. Try again.", "1/3 is not 17. Try again.", "Use each of 3 4 5 once. Try again.", "higher"]
    texts += ["That is no expression. Try again.", "lower", "-5", "<tool>12 * 34 + 5</tool>", "<answer>413</answer>"]
    for task in (Calculator(DataConfig(train_size=5)), HigherLower(DataConfig())):
        texts += [message["content"] for message in task.messages(task.load("train")[0])]
    for text in texts:
        ids = tokenizer(text, add_special_tokens=False).input_ids
        assert tokenizer.unk_token_id not in ids and tokenizer.decode(ids) == text
