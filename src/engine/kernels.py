"""Whether what is faster on a GPU works there: it is tried beside what it replaces, and a line tells where it fails."""

import logging
from collections.abc import Callable
from functools import cache

import torch
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from src.engine.memory import out_of_memory
from src.engine.token_choice import SamplingSettings, choose_tokens, episode_key

logger = logging.getLogger("grpo")
KERNELS_ON = ("cuda",)


def wanted(device: torch.device) -> bool:
    """Whether to try Triton's kernels there; not where operations are looked at (--profile), or not even computed."""
    return device.type in KERNELS_ON and not is_in_torch_dispatch_mode()


def works(without: str, trial: Callable[[], None]) -> bool:
    """Whether the trial ends well; otherwise it is told once what is done without."""
    try:
        trial()
        return True
    except Exception as error:  # of a missing package, of a compiler, of a driver, of a comparison
        if out_of_memory(error):  # which is no reason against it
            raise
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        logger.warning(f"{without}, which is slower: its trial failed ({reason})")
        return False


def token_chooser(device: torch.device, settings: SamplingSettings) -> Callable:
    """choose_tokens for logits on this device."""
    if settings.temperature == 0 or not wanted(device) or not chooser_works(device):
        return choose_tokens
    from src.engine.token_kernel import choose_tokens as fused  # here, because only torch's CUDA build brings triton

    return fused


@cache
def chooser_works(device: torch.device) -> bool:
    """Whether the kernels choose the tokens that token_choice.py chooses."""

    def trial() -> None:
        from src.engine.token_kernel import choose_tokens as fused

        check_chooser(fused, device, torch.bfloat16, 0.9)

    return works("sampling without Triton's kernels", trial)


def check_chooser(fused: Callable, device: torch.device, dtype: torch.dtype, temperature: float) -> None:
    """AssertionError where it chooses other tokens than token_choice.py."""
    settings = SamplingSettings(1, temperature, 64, (), seed=0)
    logits = 3 * torch.randn(64, 5000, generator=torch.Generator().manual_seed(0))  # [64, 5000]
    keys = torch.tensor([episode_key(0, 0, 0, sample) for sample in range(64)], device=device)
    positions, logits = torch.arange(64, device=device), logits.to(device, dtype)
    tokens, logprobs = fused(logits, settings, keys, positions)
    expected, expected_logprobs = choose_tokens(logits.clone(), settings, keys, positions)
    same = tokens == expected  # but where a number lies at the border of two
    agreement = same.float().mean()
    torch.testing.assert_close(agreement, torch.ones_like(agreement), atol=0.05, rtol=0.0)
    logprobs = torch.where(same, logprobs, expected_logprobs)
    torch.testing.assert_close(logprobs, expected_logprobs, atol=1e-4, rtol=1e-4)
