"""The room of a rollout: what its caches take, and a decoder that is kept in place for the next one.

A CUDA graph repeats its kernels on the addresses of its capture. So where a GPU has the memory for rollout and update
at once, the decoder of one rollout serves the next, and no step is captured again.
"""

import logging
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from src.config import ConfigError
from src.engine.cuda_decoding import HALF, PaddedAttention, uses_graphs
from src.engine.decoding import cache_shape
from src.engine.layers import has_hooks, made_of, own_layers
from src.engine.memory import free_memory, give_back
from src.engine.token_choice import SamplingSettings
from src.records import Problem

logger = logging.getLogger("grpo")

WAVE = 4  # prompts are prefilled for up to this many completions a slot at a time; the end of a wave decodes few
MEMORY_SHARE = 0.8  # of the free memory, for the caches; the rest is for activations


def cache_bytes(model, prompt: int, new_tokens: int) -> tuple[int, int]:
    """Bytes of a slot, with its logits, and of a prompt: its keys, and where slots do not hold them the live copy."""
    per_token = 2 * math.prod(cache_shape(model)) * model.dtype.itemsize
    logits = 8 * model.config.get_text_config().vocab_size
    if uses_graphs(model.device):  # graphs have memory of their own for what a step computes
        step = 1 if model.dtype in HALF else PaddedAttention.width_step
        return per_token * (-(-(prompt + new_tokens) // step) * step) + 2 * logits, per_token * prompt
    return per_token * new_tokens + logits, 2 * per_token * prompt


def fit_to_memory(model, problems: Sequence[Problem], samples: int, settings: SamplingSettings) -> tuple[int, int]:
    """Slots to decode in and prompts to prefill at a time, so that the caches fit into the free memory."""
    give_back(model.device)
    wanted = min(settings.slots, len(problems) * samples)
    longest = max(len(problem.prompt_ids) for problem in problems)
    slot, prompt = cache_bytes(model, longest, settings.width)
    free = free_memory(model.device)
    room = MEMORY_SHARE * free - prompt  # one prompt must fit in any case
    slots = min(wanted, int(room // (slot + prompt / samples)))  # with a slot comes its share of a prompt
    need = (prompt + slot) / 2**30
    if slots < 1:
        raise ConfigError(
            f"the key-value cache of one completion needs {need:.2f} GiB, but only {free / 2**30:.2f} GiB are free; "
            f"lower training.max_gen_len or training.max_prompt_len, or take a smaller model"
        )
    if slots < wanted:
        logger.warning(
            f"decoding {slots} completions at once in place of {wanted}: a slot of the key-value cache takes "
            f"{slot / 2**30:.2f} GiB and {free / 2**30:.2f} GiB are free"
        )
    prompts = min(int(1 + (room - slots * slot) // prompt), max(1, WAVE * slots // samples), len(problems))
    return slots, prompts


def captured(model) -> tuple:
    """What a graph has of a model: addresses, and what was called. Numbers that a forward pass reads are not seen."""
    places = (tensor.data_ptr() for tensors in (model.parameters(), model.buffers()) for tensor in tensors)
    return (*places, *made_of(model))


class Kept:
    """The decoder of the last rollout, where it may stay."""

    def __init__(self) -> None:
        self.may_stay = False  # whether there is memory for it beside an update
        self.decoder: Any = None
        self.captured: tuple = ()

    def put(self, decoder) -> None:
        """Keep it, if it has captured steps of layers that are written out, and was not for an evaluation.

        Those are rare, may have more slots than planned, and are no part of what a resumed run does again.
        """
        is_ours = decoder.layers is not own_layers and not has_hooks(decoder.model.modules())
        has_graphs = any(graph is not None for graph in decoder.runner.graphs.values())
        if self.may_stay and is_ours and has_graphs and decoder.settings.stream >= 0:
            decoder.rest()
            self.decoder, self.captured = decoder, captured(decoder.model)

    def serves(self, model, problems: Sequence[Problem], samples: int, settings: SamplingSettings) -> bool:
        """Whether the graphs of the decoder that is kept are those of this rollout."""
        return (
            self.decoder is not None
            and settings.stream >= 0
            and self.decoder.model is model
            and not has_hooks(model.modules())  # what a hook does is in a graph as it was
            and self.decoder.serves(problems, samples, settings)
            and not is_in_torch_dispatch_mode()  # --profile looks at operations, of which a graph has none
            and self.captured == captured(model)
        )

    def room(self, problems: Sequence[Problem], samples: int) -> tuple[int, int]:
        """Its slots, and prompts at a time, for as many as these."""
        return min(self.decoder.slots, len(problems) * samples), min(len(self.decoder.prompt_lengths), len(problems))

    def take(self, model, problems: Sequence[Problem], samples: int, settings: SamplingSettings, slots: int) -> Any:
        """The decoder, if it serves and has no more slots; it goes, so that of a rollout that fails nothing stays."""
        served = self.serves(model, problems, samples, settings) and self.room(problems, samples)[0] <= slots
        decoder = self.decoder if served else None
        if served:
            self.decoder = None
        else:
            self.drop(model.device)
        return decoder

    def drop(self, device: torch.device) -> bool:
        """Give its memory back; whether there was any."""
        had, self.decoder = self.decoder is not None, None
        if had:
            give_back(device)
        return had
