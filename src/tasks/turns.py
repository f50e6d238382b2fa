"""What a task replies between two turns, rendered by the chat template, and appended: nothing before it changes."""

import copy
import logging

from src.config import ConfigError
from src.tasks.guard import Fault, guarded
from src.tasks.prompts import Renderer, chat_of
from src.tasks.task import is_text

logger = logging.getLogger("grpo")
WRITTEN = "what-the-policy-wrote"  # stands in a rendered chat for a turn


class Conversation:
    """`task.reply(text, row, turn)` as the engine calls it: a problem, what there is so far, and its last token."""

    def __init__(self, task, tokenizer):
        self.task, self.tokenizer = task, tokenizer
        self.renderer = Renderer(task, tokenizer)

    def __call__(self, problem, transcript, last_token: int):
        """What is told, as records.Told; None where the episode is over."""
        from src.records import Told

        given = guarded(lambda: self.task.reply(transcript, copy.deepcopy(problem.row), len(transcript.turns)))
        if given is None:
            return None
        name = f"{type(self.task).__name__}.reply"
        if isinstance(given, Fault):
            return Told(broken=f"{name}: {given.text}")
        if not is_text(given):
            return Told(broken=f"{name} returned {given!r:.80}, not a text or None")
        # the policy has written the end of its turn by itself, unless a stop string ended it
        text = self.after_turn(problem.row, given).removeprefix(self.tokenizer.decode([last_token]))
        return Told(tuple(self.tokenizer(text, add_special_tokens=False).input_ids), text)

    def after_turn(self, row: dict, reply: str) -> str:
        """What the template writes after a turn, when this is replied and the policy is to go on."""
        return self.rendered(row, WRITTEN, reply).rpartition(WRITTEN)[2]

    def rendered(self, row: dict, written: str, reply: str) -> str:
        """A chat of two turns, up to where the second begins."""
        told = {"role": getattr(self.task, "reply_role", "user"), "content": reply}
        return self.renderer([*chat_of(self.task, row), {"role": "assistant", "content": written}, told], row)

    def check(self, problem) -> None:
        """ConfigError unless the template shows what was written and what is told after it."""
        thought, reply = f"a thought</think>{WRITTEN}", "what it is told"
        opened = "" if self.renderer.prefix else "<think>"
        text = self.rendered(problem.row, self.renderer.prefix + opened + thought, reply)
        _, found, after = text.rpartition(WRITTEN)
        if not found or reply not in after:
            raise ConfigError(
                "the model's chat template does not show what was written and what is told after it, which the reply "
                "of this task needs; take another model, or set data.prompt_format: raw"
            )
        if not self.renderer.raw and not text.startswith(problem.prompt_text + opened + thought):
            logger.info(
                "the model's chat template writes earlier turns otherwise once another follows (many drop the "
                "thinking); here an episode keeps every token of them, and what is told is appended"
            )
