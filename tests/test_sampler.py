"""The sampler against the trainer, against transformers' generate, and against the softmax it claims to sample."""

import pytest
import torch
from scipy.stats import chisquare, kstest
from test_packing import SHAPE, make_pair

from src.make_tiny_model import build_tokenizer
from src.packing import pack
from src.rl_datasets import Problem
from src.sampler import GOLDEN, WORD, SamplingSettings, choose_tokens, episode_key, mix64, rollout, uniforms
from src.scoring import score

TOKENIZER = build_tokenizer()
EOS = (1, 5, 9)


def make_prompts(lengths=(5, 9, 1, 6, 6, 14)) -> list[Problem]:
    generator = torch.Generator().manual_seed(11)
    return [
        Problem(i, tuple(torch.randint(2, SHAPE["vocab_size"], (n,), generator=generator).tolist()), "", {})
        for i, n in enumerate(lengths)
    ]


def settings(slots=64, temperature=1.0, seed=7, stream=0, new=24, eos=EOS) -> SamplingSettings:
    return SamplingSettings(new, temperature, slots, eos, seed, stream)


def tokens_of(groups) -> list[tuple[int, ...]]:
    return [episode.token_ids for group in groups for episode in group.episodes]


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("slots", [64, 5])
def test_greedy_equals_generate_token_for_token(name, slots):
    packed, plain = make_pair(name)
    problems = make_prompts()
    for group in rollout(packed, TOKENIZER, problems, 1, settings(slots, temperature=0.0)):
        prompt = torch.tensor([group.problem.prompt_ids])
        expected = plain.generate(prompt, do_sample=False, max_new_tokens=24, eos_token_id=list(EOS), pad_token_id=0)
        assert group.episodes[0].token_ids == tuple(expected[0, prompt.shape[1] :].tolist())


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("slots", [64, 5])
def test_logprobs_equal_the_trainers(name, slots):
    packed, _ = make_pair(name)
    groups = rollout(packed, TOKENIZER, make_prompts(), 4, settings(slots, temperature=0.8))
    assert len({len(ids) for ids in tokens_of(groups)}) > 3, "lengths must be ragged for this to mean anything"
    batch = pack(groups, "cpu", torch.float32)
    with torch.no_grad():
        scores = score(packed, batch, 0.8)
    torch.testing.assert_close(batch.sampled_logprobs, scores.logprobs, atol=1e-4, rtol=0)


def test_same_seed_same_tokens_for_any_number_of_slots():
    packed, _ = make_pair("llama")
    reference = tokens_of(rollout(packed, TOKENIZER, make_prompts(), 4, settings(64)))
    for slots in (1, 7):
        assert tokens_of(rollout(packed, TOKENIZER, make_prompts(), 4, settings(slots))) == reference
    assert tokens_of(rollout(packed, TOKENIZER, make_prompts(), 4, settings(stream=1))) != reference
    assert tokens_of(rollout(packed, TOKENIZER, make_prompts(), 4, settings(seed=8))) != reference
    alone = rollout(packed, TOKENIZER, make_prompts()[2:3], 4, settings(64))  # a neighbour changes nothing
    assert tokens_of(alone) == reference[8:12]


def test_end_tokens_belong_to_the_completion_and_nothing_follows_them():
    packed, _ = make_pair("llama")
    groups = rollout(packed, TOKENIZER, make_prompts(), 16, settings(13))
    episodes = [episode for group in groups for episode in group.episodes]
    for episode in episodes:
        assert len(episode.logprobs) == len(episode.token_ids)
        assert episode.finished == (episode.token_ids[-1] in EOS)
        assert episode.finished or len(episode.token_ids) == 24
        assert not set(episode.token_ids[:-1]) & set(EOS)
    assert {episode.finished for episode in episodes} == {True, False}


def test_a_completion_that_ends_at_once_is_one_token_long():
    packed, _ = make_pair("llama")
    everything = tuple(range(SHAPE["vocab_size"]))
    groups = rollout(packed, TOKENIZER, make_prompts(), 3, settings(2, eos=everything))
    assert all(len(ids) == 1 for ids in tokens_of(groups))
    assert len(tokens_of(groups)) == 18


def test_one_new_token_only():
    packed, _ = make_pair("llama")
    groups = rollout(packed, TOKENIZER, make_prompts(), 3, settings(4, new=1))
    assert all(len(ids) == 1 for ids in tokens_of(groups))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
def test_the_distribution_is_the_models_softmax(temperature):
    """Chi-square of 20,000 first and second tokens against probabilities from the plain forward."""
    packed, plain = make_pair("llama")
    with torch.no_grad():
        for model in (packed, plain):
            model.get_output_embeddings().weight.mul_(0.3)  # flatter, so that every token is expected often enough
    problem = make_prompts((6,))[0]
    groups = rollout(packed, TOKENIZER, [problem], 20_000, settings(512, temperature, new=2, eos=(0,)))
    with torch.no_grad():
        first = (plain(torch.tensor([problem.prompt_ids])).logits[0, -1] / temperature).softmax(-1).double()
    assert chi_square_p([ids[0] for ids in tokens_of(groups)], first) > 1e-3
    favourite = int(first.argmax())
    with torch.no_grad():
        second = plain(torch.tensor([(*problem.prompt_ids, favourite)])).logits[0, -1] / temperature
    following = [ids[1] for ids in tokens_of(groups) if len(ids) == 2 and ids[0] == favourite]
    assert chi_square_p(following, second.softmax(-1).double()) > 1e-3


def chi_square_p(tokens: list[int], probabilities: torch.Tensor) -> float:
    """p-value of observed tokens under the given probabilities; rare tokens are one class."""
    counts = torch.bincount(torch.tensor(tokens), minlength=len(probabilities)).double()
    expected = probabilities * len(tokens)
    often = expected >= 5
    assert often.sum() > 3, "the distribution must not be concentrated on a few tokens"
    observed = torch.cat([counts[often], counts[~often].sum()[None]])
    expected = torch.cat([expected[often], expected[~often].sum()[None]]).clamp(min=1e-9)
    return chisquare(observed.numpy(), (expected * observed.sum() / expected.sum()).numpy()).pvalue


def test_the_random_stream_is_uniform_and_reproducible():
    keys = torch.tensor([episode_key(1, 2, problem, sample) for problem in range(40) for sample in range(25)])
    values = torch.stack([uniforms(keys, torch.full_like(keys, position)) for position in range(50)])
    assert values.min() >= 0 and values.max() < 1
    assert len(values.unique()) == values.numel()
    assert kstest(values.flatten().numpy(), "uniform").pvalue > 1e-3
    assert kstest(values[:, 0].numpy(), "uniform").pvalue > 1e-3
    correlation = torch.corrcoef(torch.stack([values[:-1].flatten(), values[1:].flatten()]))[0, 1]
    assert correlation.abs() < 0.02
    # by Python's unbounded integers: int64 must wrap, and shift without the sign, just so
    for key, position in ((12345, 6), (-98765432109876, 0), (episode_key(1337, 3, 5, 7), 1000)):
        expected = (mix64((key + (position + 1) * GOLDEN) & WORD) >> 11) * 2.0**-53
        assert float(uniforms(torch.tensor([key]), torch.tensor([position]))) == expected


def test_a_token_of_probability_zero_is_never_chosen():
    logits = torch.full((4000, 6), -torch.inf)
    logits[:, 1] = logits[:, 4] = 0.0
    tokens, logprobs = choose_tokens(logits, 1.0, torch.arange(4000), torch.zeros(4000, dtype=torch.long))
    assert set(tokens.tolist()) == {1, 4}
    torch.testing.assert_close(logprobs, torch.full((4000,), 0.5).log())
