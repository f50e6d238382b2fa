"""The sampler against the trainer, against transformers' generate, and against the softmax it claims to sample."""

import ctypes
import json
import logging
import math
import os
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.stats import chisquare, kstest
from test_packing import SHAPE, make_pair

import benchmarks.rollout
from src.config import ConfigError
from src.engine import prefill, room, sampler
from src.engine.attention import PackedAttention
from src.engine.memory import free_in_group, free_memory, kept_by_malloc
from src.engine.room import fit_to_memory
from src.engine.sampler import rollout
from src.engine.token_choice import GOLDEN, WORD, SamplingSettings, choose_tokens, episode_key, mix64, uniforms
from src.make_tiny_model import build_tokenizer
from src.records import Group, Problem

TOKENIZER = build_tokenizer()
EOS = (1, 5, 9)


def make_prompts(lengths=(5, 9, 1, 6, 6, 14)) -> list[Problem]:
    generator = torch.Generator().manual_seed(11)
    return [
        Problem(i, tuple(torch.randint(2, SHAPE["vocab_size"], (n,), generator=generator).tolist()), "", {})
        for i, n in enumerate(lengths)
    ]


def settings(slots=64, temperature=1.0, seed=7, stream=0, new=24, eos=EOS, **options) -> SamplingSettings:
    return SamplingSettings(new, temperature, slots, eos, seed, stream, **options)


def tokens_of(groups) -> list[tuple[int, ...]]:
    return [episode.token_ids for group in groups for episode in group.episodes]


def sample(model, samples=4, problems=None, slots=64, **options) -> list[Group]:
    """A rollout; options as of `settings`."""
    return rollout(model, TOKENIZER, problems or make_prompts(), samples, settings(slots, **options))


def test_same_seed_same_tokens_for_any_number_of_slots():
    packed, _ = make_pair("llama")
    reference = tokens_of(sample(packed))
    for slots in (1, 7):
        assert tokens_of(sample(packed, slots=slots)) == reference
    assert tokens_of(sample(packed, stream=1)) != reference != tokens_of(sample(packed, seed=8))
    assert len({len(ids) for ids in reference}) > 5, "with 7 slots, refills must leave the slots at different lengths"
    assert tokens_of(sample(packed, problems=make_prompts()[2:3])) == reference[8:12]  # a neighbour changes nothing


@pytest.mark.parametrize("slots, eos, new", [(13, EOS, 24), (2, tuple(range(SHAPE["vocab_size"])), 24), (4, EOS, 1)])
def test_end_tokens_belong_to_the_completion_and_nothing_follows_them(slots, eos, new):
    groups = sample(make_pair("llama")[0], 16, slots=slots, eos=eos, new=new)
    episodes = [episode for group in groups for episode in group.episodes]
    assert len(episodes) == 6 * 16
    for episode in episodes:
        assert len(episode.logprobs) == len(episode.token_ids)
        assert episode.finished == (episode.token_ids[-1] in eos)
        assert episode.finished or len(episode.token_ids) == new
        assert not set(episode.token_ids[:-1]) & set(eos)
    assert {episode.finished for episode in episodes} == ({True, False} if eos == EOS else {True})


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
def test_the_distribution_is_the_models_softmax(temperature):
    """Chi-square of 20,000 first and second tokens against probabilities from the plain forward."""
    packed, plain = make_pair("llama")
    with torch.no_grad():
        for model in (packed, plain):
            model.get_output_embeddings().weight.mul_(0.3)  # flatter, so that every token is expected often enough
    problem = make_prompts((6,))[0]
    groups = sample(packed, 20_000, [problem], 512, temperature=temperature, new=2, eos=(0,))
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
    tokens, logprobs = choose_tokens(logits, settings(), torch.arange(4000), torch.zeros(4000, dtype=torch.long))
    assert set(tokens.tolist()) == {1, 4}
    torch.testing.assert_close(logprobs, torch.full((4000,), 0.5).log())


@pytest.mark.parametrize("vocabulary", [61, 256, 1000, 49152])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_two_levels_choose_what_one_float64_cumulative_sum_chooses(vocabulary, temperature):
    rows = 64 if vocabulary > 1000 else 1024
    logits = 3 * torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(vocabulary))
    keys, positions = torch.arange(rows) * 7919, torch.arange(rows) % 50
    tempered = (logits / temperature).double().log_softmax(-1)  # [rows, vocabulary]
    cumulative = tempered.exp().cumsum(-1)
    below = uniforms(keys, positions)[:, None] * cumulative[:, -1:]
    tokens, logprobs = choose_tokens(logits, settings(temperature=temperature), keys, positions)
    torch.testing.assert_close(logprobs, tempered.gather(1, tokens[:, None])[:, 0].float(), atol=3e-6, rtol=0)
    # a number within rounding of the border between two tokens may fall on either side
    upper = cumulative.gather(1, tokens[:, None]) + 1e-6
    lower = cumulative.gather(1, tokens[:, None]) - tempered.exp().gather(1, tokens[:, None]) - 1e-6
    assert ((lower <= below) & (below <= upper)).all()
    assert (tokens == torch.searchsorted(cumulative, below, right=True)[:, 0]).float().mean() > 0.98


def test_choose_tokens_marks_logits_that_are_not_finite_and_only_those():
    logits = torch.zeros(5, 300)
    logits[0, 7], logits[1, 299], logits[2] = torch.nan, torch.inf, -torch.inf
    for temperature in (0.0, 0.7, 1.0):
        keys, positions = torch.arange(5), torch.zeros(5, dtype=torch.long)
        tokens, logprobs = choose_tokens(logits.clone(), settings(temperature=temperature), keys, positions)
        assert logprobs.isfinite().tolist() == [False, False, False, True, True]
        assert int(tokens.min()) >= 0 and int(tokens.max()) < 300


@pytest.mark.parametrize("slots", [64, 5])
def test_a_stop_string_ends_a_completion_at_the_token_that_completes_it(slots):
    packed, _ = make_pair("llama")
    free = [e for g in sample(packed, 16, slots=slots) for e in g.episodes]
    texts = [episode.text for episode in free]
    pairs = {text[i : i + 2] for text in texts for i in range(len(text) - 1)}
    stops = tuple(sorted(pairs, key=lambda pair: -sum(pair in text for text in texts))[:3])
    groups = sample(packed, 16, slots=slots, stop_strings=stops)
    cut = 0
    for before, after in zip(free, (e for g in groups for e in g.episodes), strict=True):
        counts = range(1, len(before.token_ids) + 1)
        text = [TOKENIZER.decode(list(before.token_ids[:count]), skip_special_tokens=True) for count in counts]
        hits = [count for count in counts if any(stop in text[count - 1] for stop in stops)]
        count = hits[0] if hits else len(before.token_ids)
        assert after.token_ids == before.token_ids[:count]
        torch.testing.assert_close(after.logprobs, before.logprobs[:count], atol=1e-4, rtol=0)
        assert after.text == text[count - 1]
        assert after.finished == (bool(hits) or before.finished)
        cut += bool(hits) and count < len(before.token_ids)
    assert cut > 10


def test_stop_strings_free_their_slots_early(monkeypatch):
    """The completions are cut in any case; what the look in the loop is for is not to decode on."""
    packed, _ = make_pair("llama")
    steps, original = [], sampler.SlotDecoder.step
    monkeypatch.setattr(sampler.SlotDecoder, "step", lambda self: (steps.append(1), original(self)))
    everything = tuple(TOKENIZER.decode([token]) for token in range(2, SHAPE["vocab_size"]))
    sample(packed, slots=24, eos=(), stop_strings=everything)
    assert len(steps) <= sampler.SYNC_EVERY


class NotFinite:
    """A head hook: logits are NaN for the given prompt, in the first `times` looks at it."""

    def __init__(self, model, prompt: Problem, times: int):
        with torch.no_grad():
            ids = torch.tensor([prompt.prompt_ids])
            plan = PackedAttention(*np.array([[0], [ids.shape[1]], [0], [0]]), "cpu", torch.float32)
            self.hidden = model.get_decoder()(input_ids=ids, use_cache=False, attention_plan=plan)[0][0, -1]
        self.left = times
        model.get_output_embeddings().register_forward_hook(self)

    def __call__(self, module, inputs, logits):
        bad = (inputs[0] - self.hidden).abs().amax(-1) < 1e-4
        if bad.any() and self.left > 0:
            self.left -= 1
            logits = logits.masked_fill(bad[:, None], torch.nan)
        return logits


@pytest.mark.parametrize("slots", [64, 4])
def test_a_prompt_without_finite_logits_is_left_out_and_harms_no_other(monkeypatch, slots, caplog):
    monkeypatch.setattr(sampler, "ATTEMPTS", 2)
    packed, _ = make_pair("llama")
    reference = sample(packed, slots=slots)
    NotFinite(packed, make_prompts()[1], times=1)
    groups = sample(packed, slots=slots)  # it fails once and is sampled again
    assert tokens_of(groups[:1] + groups[2:]) == tokens_of(reference[:1] + reference[2:])
    assert tokens_of(groups[1:2]) != tokens_of(reference[1:2]), "with other random numbers"
    assert all(math.isfinite(logprob) for episode in groups[1].episodes for logprob in episode.logprobs)
    NotFinite(packed, make_prompts()[1], times=10**6)
    with caplog.at_level(logging.WARNING, "grpo"):
        groups = sample(packed, slots=slots)
    assert tokens_of(groups) == tokens_of(reference[:1] + reference[2:])
    assert [group.problem.index for group in groups] == [0, 2, 3, 4, 5]
    assert "1 of 6 prompts are left out" in caplog.text and "2 attempts" in caplog.text
    with torch.no_grad():
        packed.get_input_embeddings().weight.fill_(torch.nan)
    with pytest.raises(ConfigError, match="no prompt has finite logits"):
        sample(packed)


def test_nan_in_the_cache_does_not_reach_the_next_episode_of_the_slot(monkeypatch):
    """A token with a NaN embedding leaves NaN keys in its slot's cache, where a mask alone would not stop them."""
    packed, _ = make_pair("llama")
    problems = make_prompts((4, 7, 5) * 10)
    reference = tokens_of(sample(packed, 1, problems, 5))
    inputs = [problem.prompt_ids + tokens[:-1] for problem, tokens in zip(problems, reference, strict=True)]
    token = next(token for token in range(2, 61) if 4 <= sum(token in row for row in inputs) <= 8)
    whole = [index for index, row in enumerate(inputs) if token not in row]
    with torch.no_grad():
        embedding = packed.get_input_embeddings().weight
        packed.get_output_embeddings().weight = torch.nn.Parameter(embedding.clone())  # the head stays whole
        embedding[token] = torch.nan
    monkeypatch.setattr(sampler, "ATTEMPTS", 1)
    groups = sample(packed, 1, problems, 5)
    assert [group.problem.index for group in groups] == whole
    assert tokens_of(groups) == [reference[index] for index in whole]


@pytest.mark.parametrize("head", [(), tuple(range(2, 40))], ids=["", "all prompts begin alike"])
def test_completions_do_not_depend_on_the_wave(head, monkeypatch):
    packed, _ = make_pair("llama")
    problems = make_prompts((5, 9, 1, 6, 6, 14, 3, 3, 8, 2))
    problems = [replace(problem, prompt_ids=head + problem.prompt_ids) for problem in problems]
    reference = [row for problem in problems for row in tokens_of(sample(packed, 2, [problem], 64))]  # each alone
    assert tokens_of(sample(packed, 2, problems, 64)) == reference
    prefilled = []
    original = sampler.prefill
    monkeypatch.setattr(sampler, "prefill", lambda m, wave: (prefilled.append(len(wave)), original(m, wave))[1])
    assert tokens_of(sample(packed, 2, problems, 2)) == reference
    assert prefilled == [4, 4, 2]
    prefilled.clear()
    monkeypatch.setattr(prefill, "PREFILL_TOKENS", 10)
    assert tokens_of(sample(packed, 2, problems, 64)) == reference
    assert prefilled == [10]


def test_slots_and_waves_fit_into_the_free_memory(monkeypatch, caplog):
    packed, _ = make_pair("llama")
    problems, wanted = make_prompts((16,) * 20), settings(40, new=64)
    per_token = 2 * 2 * 2 * 8 * 4  # keys and values, layers, heads, head size, bytes
    slot, prompt = 64 * per_token + 8 * SHAPE["vocab_size"], 2 * 16 * per_token

    def with_room(size: float) -> tuple[int, int]:
        monkeypatch.setattr(room, "free_memory", lambda device: size / room.MEMORY_SHARE + 1)
        return fit_to_memory(packed, problems, 4, wanted)

    assert with_room(1e12) == (40, 20)
    assert not caplog.records
    slots, prompts = with_room(40 * slot + 11 * prompt)
    assert (slots, prompts) == (40, 11)  # fewer prompts at a time first
    assert not caplog.records
    for share in (0.9, 0.5, 0.1):
        size = share * (40 * slot + 11 * prompt)
        caplog.clear()
        with caplog.at_level(logging.WARNING, "grpo"):
            slots, prompts = with_room(size)
        assert 1 <= slots < 40 and slots * slot + prompts * prompt <= size < (slots + 1) * slot + (prompts + 1) * prompt
        (record,) = caplog.records
        assert record.message.startswith(f"decoding {slots} completions at once")
    with pytest.raises(ConfigError, match=r"only .* GiB are free"):
        with_room(0.5 * slot)
    monkeypatch.setattr(room, "free_memory", lambda device: 5 * (slot + prompt))
    few = rollout(packed, TOKENIZER, problems[:6], 2, wanted)
    monkeypatch.undo()
    assert tokens_of(few) == tokens_of(rollout(packed, TOKENIZER, problems[:6], 2, wanted))


def test_memory_that_malloc_keeps_is_free_too():
    """src/__init__.py lets malloc keep what is freed; the system then counts it as in use."""
    assert 2**26 < free_memory(torch.device("cpu")) < 2**50
    if not hasattr(ctypes.CDLL(None), "mallinfo2") or any(name.startswith("MALLOC_") for name in os.environ):
        pytest.skip("another C library, or settings of its own")
    blocks = [torch.ones(2**26 // 4) for _ in range(4)]  # 64 MiB each
    during = kept_by_malloc()
    del blocks
    assert kept_by_malloc() - during > 0.99 * 4 * 2**26  # some of it may serve what came since


def test_the_limit_of_a_container_is_the_limit(tmp_path):
    assert free_in_group(tmp_path) == math.inf  # no control groups here
    for name, text in (("max", "1000000\n"), ("current", "700000\n"), ("stat", "anon 600000\ninactive_file 50000\n")):
        (tmp_path / f"memory.{name}").write_text(text)
    assert free_in_group(tmp_path) == 350_000
    (tmp_path / "memory.max").write_text("max\n")
    assert free_in_group(tmp_path) == math.inf


def test_the_benchmark_runs_and_ends_with_one_json_line(monkeypatch, capsys):
    options = ["--shape", "tiny", "--quick", "--skip", "generate_batch", "--prompts", "2", "--dtype", "float32"]
    monkeypatch.setattr("sys.argv", ["rollout", *options])
    monkeypatch.setattr(benchmarks.rollout, "read_bandwidth", lambda device: 1e10)  # copies 2 GiB
    benchmarks.rollout.main()
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["long_tail"]["tokens"] < result["fixed"]["tokens"] == 16 * 12
    assert set(result["fixed"]["tokens_per_second"]) == {"ours", "generate"}
    assert result["mismatch"]["float32"]["max"] < 1e-4
