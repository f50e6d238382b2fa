"""choose_tokens on a CPU with loops of C (token_loops.c), as token_kernel.py has it for a GPU."""

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

import src.engine.decode_loops as decode_loops
import src.engine.kernels as kernels
import src.engine.token_choice as token_choice
from src.engine.decode_loops import apply_to, loops
from src.engine.models import Float32Head
from src.engine.token_choice import SamplingSettings


def choose_tokens(logits: Tensor, settings: SamplingSettings, keys: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Token ids [S] and their log-probs [S], NaN where logits [S, V] are not finite."""
    if not apply_to(logits, whole=False) or logits.stride(1) != 1:
        return token_choice.choose_tokens(logits, settings, keys, positions)
    tokens, logprobs = torch.empty_like(positions), torch.empty(len(logits))
    inverse = 1 / settings.temperature if settings.temperature else 0.0
    keys, positions = keys.contiguous(), positions.contiguous()
    places = decode_loops.places(logits, keys, positions, tokens, logprobs)
    loops(logits.dtype).choose(*places, *logits.shape, logits.stride(0), inverse)
    return tokens, logprobs


def token_chooser(model, settings: SamplingSettings) -> Callable:
    """choose_tokens for this model's logits."""
    dtype = torch.float32 if isinstance(model.get_output_embeddings(), Float32Head) else model.dtype  # of the logits
    if decode_loops.applies(model) and chooser_works(dtype, decode_loops.shape_for(dtype)):
        return choose_tokens
    return kernels.token_chooser(model.device, settings)


@cache
def chooser_works(dtype: torch.dtype, shape: decode_loops.Shape) -> bool:
    """Whether the loop chooses the tokens that token_choice.py chooses."""

    def trial() -> None:
        for temperature in (0.9, 0.0):
            kernels.check_chooser(choose_tokens, torch.device("cpu"), dtype, temperature)

    return kernels.works("sampling without its loop in C", trial)
