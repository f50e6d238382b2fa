"""Where a completion ends: rows of tokens -> episodes without what was written after their end."""

from bisect import bisect_left

import torch
from torch import Tensor

from src.engine.token_choice import SamplingSettings
from src.records import Episode

PLAIN = {"skip_special_tokens": True}  # how tokens become the text that is graded


def cut_at_stop(tokenizer, token_ids: list[int], text: str, stops: tuple[str, ...]) -> tuple[list[int], str, bool]:
    """The tokens up to the one that completes a stop string, their text, and whether there was one."""

    def text_of(count: int) -> str:
        return tokenizer.decode(token_ids[:count], **PLAIN)

    if not any(stop in text for stop in stops):
        return token_ids, text, False
    counts = range(1, len(token_ids) + 1)
    count = 1 + bisect_left(counts, True, key=lambda count: any(stop in text_of(count) for stop in stops))
    return token_ids[:count], text_of(count), True


def cut_episodes(tokenizer, tokens: Tensor, logprobs: Tensor, settings: SamplingSettings) -> list[Episode]:
    """Rows of tokens and log-probs [episodes, max_new_tokens] -> episodes without what was written after their end."""
    is_end = torch.isin(tokens, torch.tensor(settings.eos_ids))
    finished = is_end.any(1)
    lengths = torch.where(finished, is_end.int().argmax(1) + 1, tokens.shape[1]).tolist()
    rows = [row[:length] for row, length in zip(tokens.tolist(), lengths, strict=True)]
    texts = tokenizer.batch_decode(rows, **PLAIN)
    episodes = []
    for row, text, scores, end in zip(rows, texts, logprobs.tolist(), finished.tolist(), strict=True):
        row, text, stopped = cut_at_stop(tokenizer, row, text, settings.stop_strings)
        episodes.append(Episode(tuple(row), tuple(scores[: len(row)]), end or stopped, text))
    return episodes
