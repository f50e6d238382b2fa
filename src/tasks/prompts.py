"""Rows as prompts of token ids."""

import json
import logging
from typing import TYPE_CHECKING

from src.config import ConfigError
from src.tasks.task import in_user_code, is_text

if TYPE_CHECKING:  # it imports torch, which this package does without
    from src.records import Problem

logger = logging.getLogger("grpo")


def check_chat(messages, what: str) -> None:
    """ConfigError unless it is a list of messages with a role and a content that are texts."""
    good = isinstance(messages, list) and all(
        isinstance(message, dict) and isinstance(message.get("role"), str) and is_text(message.get("content"))
        for message in messages
    )
    if not good or not any(message["content"].strip() for message in messages):
        raise ConfigError(f'{what} must be a chat such as [{{"role": "user", "content": "..."}}], not {messages!r:.80}')


def chat_of(task, row: dict) -> list[dict]:
    """What the task asks, with the system message of the config or, if it has none itself, of the task's attribute."""
    messages = task.messages(row)
    check_chat(messages, f"{type(task).__name__}.messages")
    has_system = messages[0]["role"] == "system"
    system = task.data.system_prompt
    if system is None:
        system = messages[0]["content"] if has_system else getattr(task, "system_prompt", "")
    return [{"role": "system", "content": system}] * bool(system) + messages[has_system:]


class Renderer:
    """A chat as the text that the model continues: by its chat template, or raw, joined by blank lines.

    A chat template also receives the row as `problem`.
    """

    def __init__(self, task, tokenizer):
        data, self.tokenizer = task.data, tokenizer
        if data.prompt_format == "chat" and tokenizer.chat_template is None:
            raise ConfigError("data.prompt_format is chat, but the tokenizer has no chat template; set it to raw")
        self.raw = data.prompt_format == "raw" or tokenizer.chat_template is None
        self.reads_row = "problem" in str(tokenizer.chat_template)  # else do not copy it for every prompt
        self.prefix = getattr(task, "response_prefix", "") if data.response_prefix is None else data.response_prefix

    def __call__(self, messages: list[dict], row: dict) -> str:
        from jinja2 import TemplateError  # here: --help must stay instant

        if self.raw:
            return "\n\n".join(message["content"] for message in messages) + "\n" + self.prefix
        try:
            # date_string: some templates (Llama 3.2) write today's date, and tomorrow's run would have other prompts
            text = self.tokenizer.apply_chat_template(
                messages,
                tokenize=False,
                add_generation_prompt=True,
                problem=row if self.reads_row else None,
                date_string="26 Jul 2024",
            )
        except TemplateError as error:
            roles = " and ".join(dict.fromkeys(message["role"] for message in messages))
            raise ConfigError(
                f"the model's chat template refuses a chat of {roles} ({error}); if it knows no system message, set "
                f'data.system_prompt: ""'
            ) from error
        return text + self.prefix


def make_problems(task, rows: list[dict], tokenizer, max_prompt_len: int) -> list["Problem"]:
    """Render and tokenize every row's prompt; prompts that are too long are left out (the caller logs how many)."""
    from src.records import Problem

    rendered, texts = Renderer(task, tokenizer), []
    for row in rows:
        with in_user_code(type(task).__module__, f"{type(task).__name__}.messages"):
            messages = chat_of(task, row)
        texts.append(rendered(messages, row))
    if len(set(texts)) == 1 < len({json.dumps(row, sort_keys=True, default=str) for row in rows[:100]}):
        raise ConfigError(
            "the model's chat template renders every prompt of this task alike, as that of models/countdown-tiny does "
            "for all tasks but countdown; take another model, or set data.prompt_format: raw"
        )
    all_ids = tokenizer(texts, add_special_tokens=rendered.raw, return_attention_mask=False).input_ids
    unknown = sum(ids.count(getattr(tokenizer, "unk_token_id", None)) for ids in all_ids)
    unknown /= max(1, sum(map(len, all_ids)))
    if unknown > 0.1:
        logger.warning(f"the model's tokenizer does not know {unknown:.0%} of the prompts' tokens; take another model")
    return [
        Problem(index, tuple(ids), text, row)
        for index, (ids, text, row) in enumerate(zip(all_ids, texts, rows, strict=True))
        if 0 < len(ids) <= max_prompt_len
    ]
