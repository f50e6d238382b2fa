"""Triton's kernels that choose tokens, against the plain code; and how it is decided whether kernels are used."""

import logging
from functools import partial

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from src.engine import kernels, token_choice
from src.engine.kernels import chooser_works, token_chooser, wanted
from src.engine.token_choice import SamplingSettings, episode_key

token_kernel = pytest.importorskip("src.engine.token_kernel", reason="triton comes with torch's CUDA build")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")  # on a CPU Triton interprets its kernels
pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore::RuntimeWarning")]  # of NumPy


def settings(temperature: float = 1.0) -> SamplingSettings:
    return SamplingSettings(9, temperature, 4, (), seed=1)


def numbers(rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and positions [rows]."""
    keys = torch.tensor([episode_key(3, 1, row, 0) for row in range(rows)], device=DEVICE)
    return keys, torch.arange(rows, device=DEVICE) % 7


@pytest.mark.parametrize(("temperature", "dtype"), [(1.0, torch.float32), (0.6, torch.bfloat16)])
@pytest.mark.parametrize("vocabulary", [2, 61, 256, 257, 5000])
def test_they_choose_what_the_plain_code_chooses(vocabulary, temperature, dtype):
    generator = torch.Generator().manual_seed(vocabulary)
    wide = 3 * torch.randn(48, vocabulary + 5, generator=generator).to(DEVICE, dtype)
    logits = wide[:, :vocabulary]  # rows that do not follow each other
    before = logits.clone()
    tokens, logprobs = token_kernel.choose_tokens(logits, settings(temperature), *numbers(48))
    expected, _ = token_choice.choose_tokens(logits.clone(), settings(temperature), *numbers(48))
    assert torch.equal(logits, before)
    assert (tokens == expected).float().mean() > 0.97  # a number may lie at the border of two tokens
    exact = (logits.double() / temperature).log_softmax(-1).gather(1, tokens[:, None])[:, 0].float()
    torch.testing.assert_close(logprobs, exact, atol=1e-5, rtol=0)


def test_a_token_of_probability_zero_is_never_chosen():
    logits = torch.full((40, 600), -torch.inf, device=DEVICE)
    logits[:, 1] = logits[:, 599] = 0.0
    tokens, logprobs = token_kernel.choose_tokens(logits, settings(), *numbers(40))
    assert set(tokens.tolist()) == {1, 599}
    torch.testing.assert_close(logprobs.cpu(), torch.full((40,), 0.5).log())


def test_they_mark_logits_that_are_not_finite_and_only_those():
    logits = torch.zeros(8, 700, device=DEVICE)
    for row, column in enumerate((7, 256, 511, 699)):  # in any block: a sum that ends before it is finite
        logits[row, column] = torch.nan
    logits[4, 299], logits[5] = torch.inf, -torch.inf
    for temperature in (0.7, 1.0):
        tokens, logprobs = token_kernel.choose_tokens(logits, settings(temperature), *numbers(8))
        assert logprobs.isfinite().tolist() == [False] * 6 + [True] * 2
        assert int(tokens.min()) >= 0 and int(tokens.max()) < 700


@pytest.mark.parametrize("fault", [None, "no compiler", "another token"])
def test_they_are_taken_where_their_trial_succeeds(fault, monkeypatch, caplog):
    plain = token_kernel.choose_tokens

    def broken(logits, *rest):
        if fault == "no compiler":
            raise RuntimeError("failed to find a C compiler\nin many lines")
        return plain(logits.flip(-1), *rest)

    monkeypatch.setattr(kernels, "KERNELS_ON", (DEVICE.type,))
    if fault:
        monkeypatch.setattr(token_kernel, "choose_tokens", broken)
    chooser_works.cache_clear()
    with caplog.at_level(logging.WARNING, "grpo"):
        chosen = {token_chooser(DEVICE, settings(temperature)) for temperature in (1.0, 0.6)}
    chooser_works.cache_clear()
    assert chosen == {token_choice.choose_tokens if fault else plain}
    assert token_chooser(DEVICE, settings(0.0)) is token_choice.choose_tokens
    assert len(caplog.records) == bool(fault) and "many lines" not in caplog.text
    assert not fault or "sampling without Triton's kernels, which is slower" in caplog.text


def test_kernels_are_for_a_gpu_on_which_operations_are_computed():
    assert not wanted(torch.device("cpu")) and wanted(torch.device("cuda"))
    with FakeTensorMode():
        assert not wanted(torch.device("cuda"))
    assert kernels.works("never told", partial(int, "1"))
