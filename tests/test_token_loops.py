"""The loop of C that chooses tokens, against the plain code and float64; and how it is decided whether it is used."""

import logging

import pytest
import torch
from test_decode_loops import in_each, make, needs_halves, needs_loops, numbers

from src.engine import decode_loops, token_choice, token_loops
from src.engine.models import widen_head
from src.engine.token_choice import SamplingSettings, episode_key, uniforms
from src.engine.token_loops import chooser_works, token_chooser

pytestmark = pytest.mark.usefixtures("capability")


def settings(temperature: float = 1.0) -> SamplingSettings:
    return SamplingSettings(9, temperature, 4, (), seed=1)


def streams(rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and positions [rows]."""
    return torch.tensor([episode_key(3, 1, row, 0) for row in range(rows)]), torch.arange(rows) % 7


def logits_of(rows: int, vocabulary: int, dtype: torch.dtype) -> torch.Tensor:
    """Rows that do not follow each other."""
    wide = 3 * torch.randn(rows, vocabulary + 5, generator=torch.Generator().manual_seed(vocabulary))
    return wide.to(dtype)[:, :vocabulary]


@in_each
@pytest.mark.parametrize("temperature", [1.0, 0.6, 0.0])
@pytest.mark.parametrize("vocabulary", [1, 2, 15, 16, 17, 61, 255, 256, 257, 5000])
def test_it_chooses_what_the_plain_code_chooses_whatever_the_rows_beside(vocabulary, temperature, dtype):
    logits, (keys, positions) = logits_of(48, vocabulary, dtype), streams(48)
    before = logits.clone()
    tokens, logprobs = token_loops.choose_tokens(logits, settings(temperature), keys, positions)
    expected, _ = token_choice.choose_tokens(logits.clone(), settings(temperature), keys, positions)
    assert torch.equal(logits, before) and (tokens == expected).float().mean() > 0.97
    exact = (logits.double() / (temperature or 1)).log_softmax(-1).gather(1, tokens[:, None])[:, 0]
    torch.testing.assert_close(logprobs.double(), exact, atol=2e-6, rtol=0)
    some = [5, 47, 0]
    again = token_loops.choose_tokens(logits[some], settings(temperature), keys[some], positions[some])
    assert torch.equal(again[0], tokens[some]) and torch.equal(again[1], logprobs[some])


@in_each
@pytest.mark.parametrize("vocabulary", [40, 700])
def test_a_token_is_where_the_exact_cumulative_probabilities_exceed_its_number(vocabulary, dtype):
    logits, (keys, positions) = logits_of(1, vocabulary, dtype).expand(4000, -1), streams(4000)
    tokens, _ = token_loops.choose_tokens(logits, settings(0.8), keys, positions)
    cumulative = (logits[:1].double() / 0.8).softmax(-1).cumsum(-1)
    number = uniforms(keys, positions)[:, None]
    exact = torch.searchsorted(cumulative.expand(4000, -1).contiguous(), number, right=True)[:, 0]
    near = (cumulative - number).abs().min(1).values < 1e-6  # at the border of two
    assert len(set(tokens.tolist())) > 10 and near.sum() < 30 and torch.equal(tokens[~near], exact[~near])


@in_each
def test_a_token_of_probability_zero_is_never_chosen_and_the_first_of_the_largest_is_greedy(dtype):
    logits = torch.full((400, 600), -torch.inf, dtype=dtype)
    logits[:, 1] = logits[:, 599] = 5.0
    logits[:, 300] = -95.0  # e^-100 of the others
    tokens, logprobs = token_loops.choose_tokens(logits, settings(), *streams(400))
    assert set(tokens.tolist()) == {1, 599} and 100 < (tokens == 1).sum() < 300
    torch.testing.assert_close(logprobs, torch.full((400,), 0.5).log())
    tokens, logprobs = token_loops.choose_tokens(logits[:2], settings(0.0), *streams(2))
    assert tokens.tolist() == [1, 1] and logprobs.exp().tolist() == pytest.approx([0.5, 0.5])
    logits[:, 1] = -torch.inf
    assert token_loops.choose_tokens(logits, settings(), *streams(400))[0].tolist() == [599] * 400


@in_each
@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
def test_it_marks_logits_that_are_not_finite_and_only_those(temperature, dtype):
    logits = torch.zeros(8, 700, dtype=dtype)
    for row, column in enumerate((7, 256, 511, 699)):
        logits[row, column] = torch.nan
    logits[4, 299], logits[5] = torch.inf, -torch.inf
    tokens, logprobs = token_loops.choose_tokens(logits, settings(temperature), *streams(8))
    assert logprobs.isfinite().tolist() == [False] * 6 + [True] * 2
    assert int(tokens.min()) >= 0 and int(tokens.max()) < 700


@needs_loops
def test_others_are_chosen_by_the_plain_code():
    keys, positions = streams(6)
    with torch.utils.flop_counter.FlopCounterMode(display=False):  # somebody looks at operations
        seen = token_loops.choose_tokens(logits_of(6, 30, torch.float32), settings(), keys, positions)
    for logits in (logits_of(6, 30, torch.float64), logits_of(6, 30, torch.float16), logits_of(30, 6, torch.float32).T):
        found = token_loops.choose_tokens(logits.clone(), settings(), keys, positions)
        expected = token_choice.choose_tokens(logits.clone(), settings(), keys, positions)
        assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])
    torch.testing.assert_close(
        seen, token_loops.choose_tokens(logits_of(6, 30, torch.float32), settings(), keys, positions)
    )


@needs_loops
@pytest.mark.parametrize("fault", [None, "another token", "another log-prob"])
def test_it_is_taken_for_models_that_are_worth_it_where_its_trial_succeeds(fault, monkeypatch, caplog):
    plain, model = token_loops.choose_tokens, make()

    def broken(logits, *rest):
        tokens, logprobs = plain(logits.flip(-1) if fault == "another token" else logits, *rest)
        return tokens, logprobs * (1.01 if fault == "another log-prob" else 1)

    monkeypatch.setattr(token_loops, "choose_tokens", broken)
    assert token_chooser(model, settings()) is token_choice.choose_tokens, (
        "a small one is not worth a compiler's second"
    )
    monkeypatch.setattr(decode_loops, "WORTH_COMPILING", 0)
    chooser_works.cache_clear()
    with caplog.at_level(logging.WARNING, "grpo"):
        chosen = {token_chooser(model, settings(temperature)) for temperature in (1.0, 0.0)}
    chooser_works.cache_clear()
    assert chosen == {token_choice.choose_tokens if fault else broken}
    assert [record.message.split(":")[0] for record in caplog.records] == (
        ["sampling without its loop in C, which is slower"] if fault else []
    )


@needs_halves
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_trial_has_the_type_of_the_logits(dtype, monkeypatch):
    model, tried = make(dtype=torch.bfloat16), []
    if dtype == torch.float32:
        widen_head(model)
    assert model.get_output_embeddings()(numbers(3, 96, dtype=torch.bfloat16)).dtype == dtype
    monkeypatch.setattr(decode_loops, "WORTH_COMPILING", 0)
    monkeypatch.setattr(token_loops, "chooser_works", lambda *given: tried.append(given) is None)
    assert token_chooser(model, settings()) is token_loops.choose_tokens
    assert tried == [(dtype, decode_loops.shape_for(dtype))]
