"""Episodes of several turns: the sampler goes on from its cache, and the update has only what the policy wrote."""

import copy
import pickle
from dataclasses import replace

import pytest
import torch
from test_decoding import flash_on_cpu, mode  # noqa: F401  fixtures
from test_packing import SHAPE, make_pair
from test_sampler import EOS, TOKENIZER, make_prompts, sample

from src.engine import sampler
from src.engine.packing import pack
from src.engine.scoring import score
from src.engine.token_choice import choose_tokens, episode_key
from src.records import Batch, Episode, Group, Told, Transcript

TURNS, TOLD = 4, 30


def told_after(turns: int, last_token: int) -> tuple[int, ...]:
    """Up to 7 tokens, end tokens among them, none at times."""
    return tuple(
        2 + (last_token * 7 + turns * 5 + place) % (SHAPE["vocab_size"] - 2) for place in range(last_token % 8)
    )


def reply(problem, transcript: Transcript, last_token: int) -> Told | None:
    turns = len(transcript.turns)
    assert last_token in EOS and len(transcript.told) == turns - 1
    if (problem.index + last_token + turns) % 7 == 0:
        return None
    return Told(told_after(turns, last_token), f"<{turns}>")


def converse(model, samples=8, **options) -> list[Group]:
    return sample(model, samples, **({"reply": reply, "max_turns": TURNS, "told": TOLD} | options))


def turns_of(episode: Episode) -> list[tuple[int, int]]:
    """First column, and last + 1, of each run of written tokens; turns with nothing told in between are one."""
    assert episode.written is not None
    edges = [0, *(i for i in range(1, len(episode.written)) if episode.written[i] != episode.written[i - 1])]
    ends = [*edges[1:], len(episode.written)]
    return [(a, b) for a, b in zip(edges, ends, strict=True) if episode.written[a]]


def check_sampled(plain, groups: list[Group], seed=7) -> None:
    """Every written token is what transformers' logits and the token's own random number give, with its log-prob."""
    options = type("Settings", (), {"temperature": 1.0})
    for group in groups:
        prompt = group.problem.prompt_ids
        for number, episode in enumerate(group.episodes):
            ids = episode.token_ids
            with torch.no_grad():
                logits = plain(torch.tensor([prompt + ids]), use_cache=False).logits[0, len(prompt) - 1 : -1].float()
            columns = torch.tensor([place for place, own in enumerate(episode.written) if own])
            keys = torch.full((len(columns),), episode_key(seed, 0, group.problem.index, number))
            tokens, logprobs = choose_tokens(logits[columns].clone(), options, keys, columns)
            assert tokens.tolist() == [ids[column] for column in columns]
            assert (logprobs - torch.tensor(episode.logprobs)).abs().max() < 1e-4


def check_against_plain(plain, groups: list[Group], new=24) -> None:
    """As above, and every other token is what was told."""
    check_sampled(plain, groups)
    for group in groups:
        for episode in group.episodes:
            ids, written = episode.token_ids, episode.written
            turn = 0
            place = 0
            while place < len(ids):  # read it as a reader would
                end = next((p for p in range(place, len(ids)) if ids[p] in EOS and written[p]), len(ids) - 1)
                assert all(written[place : end + 1])
                turn += 1
                expected = told_after(turn, ids[end]) if end + 1 < len(ids) else ()
                assert ids[end + 1 : end + 1 + len(expected)] == expected
                assert not any(written[end + 1 : end + 1 + len(expected)])
                place = end + 1 + len(expected)
            assert turn == len(episode.text.turns) <= TURNS
            assert sum(written) == episode.length == len(episode.logprobs) <= new
            assert "".join(f"<{n}>" for n in range(1, turn)) == "".join(episode.text.told)


@pytest.mark.parametrize("name", ["llama", "qwen3"])
@pytest.mark.parametrize("slots", [64, 5, 1])
def test_all_turns_are_sampled_as_transformers_would_from_the_transcript(name, slots):
    packed, plain = make_pair(name)
    groups = converse(packed, slots=slots)
    check_against_plain(plain, groups)
    episodes = [episode for group in groups for episode in group.episodes]
    assert {len(episode.text.turns) for episode in episodes} == {1, 2, 3, 4}
    assert {episode.finished for episode in episodes} == {True, False}
    assert any(len(turns_of(episode)) > 2 for episode in episodes)


def test_other_ways_to_decode_give_the_same_episodes(mode):  # noqa: F811
    packed, plain = make_pair("llama")
    reference = converse(packed, slots=7)
    mode()
    groups = converse(packed, slots=7)
    assert [[replace(e, logprobs=()) for e in g.episodes] for g in groups] == [
        [replace(e, logprobs=()) for e in g.episodes] for g in reference
    ]
    check_against_plain(plain, groups)


def test_the_first_turn_is_that_of_a_rollout_without_reply():
    packed, _ = make_pair("llama")
    alone = [episode for group in sample(packed, 8) for episode in group.episodes]
    episodes = [episode for group in converse(packed) for episode in group.episodes]
    for one, several in zip(alone, episodes, strict=True):
        first = several.text.turns[0]
        assert several.token_ids[: len(one.token_ids)] == one.token_ids and first == one.text
        assert several.logprobs[: len(one.logprobs)] == pytest.approx(one.logprobs, abs=1e-6)
    single = [episode for group in converse(packed, max_turns=1) for episode in group.episodes]
    assert [(e.token_ids, e.finished, e.text) for e in single] == [(e.token_ids, e.finished, e.text) for e in alone]


def test_what_was_read_is_not_read_again(monkeypatch):
    """Of the prompts one prefill; after it each step has one token a slot, told ones too."""
    packed, _ = make_pair("llama")
    prefills, steps, original = [], [], sampler.SlotDecoder.step
    prefill = sampler.prefill
    monkeypatch.setattr(sampler, "prefill", lambda *a: (prefills.append(1), prefill(*a))[1])
    monkeypatch.setattr(sampler.SlotDecoder, "step", lambda self: (steps.append(self.rows), original(self))[1])
    problems = make_prompts((40,))
    (group,) = converse(packed, 1, problems=problems, slots=1)
    tokens = len(group.episodes[0].token_ids)
    assert len(group.episodes[0].text.turns) > 1 and len(prefills) == 1
    # a look comes every few steps: what is decoded in vain is at most that for each turn
    assert tokens - 1 <= sum(steps) <= tokens + (sampler.SYNC_EVERY - 1) * len(group.episodes[0].text.turns)


def test_limits_end_an_episode_as_unfinished():
    packed, _ = make_pair("llama")
    always = {"reply": lambda problem, transcript, last: Told((3, 4, 6, 7, 8), " told "), "max_turns": 9}

    def episodes_of(**options):
        return [e for g in converse(packed, **(always | options)) for e in g.episodes]

    assert all(len(episode.token_ids) <= 34 for episode in episodes_of(told=10))
    assert any(len(e.token_ids) < 34 and e.length < 24 and not e.finished for e in episodes_of(told=10))
    assert all(e.finished or e.length == 24 for e in episodes_of(told=40, max_turns=2))
    packed.config.max_position_embeddings = 30  # the longest prompt has 14
    for group in converse(packed, **always, told=40):
        room = 30 - len(group.problem.prompt_ids)
        assert all(len(episode.token_ids) <= room for episode in group.episodes)
        assert any(not episode.finished for episode in group.episodes)


@pytest.mark.parametrize("prompt", [30, 31, 200])
def test_a_prompt_that_leaves_no_room_has_one_token_as_its_episode(prompt):
    """It was sampled; nothing that was not is in it."""
    packed, plain = make_pair("llama")
    packed.config.max_position_embeddings = 30
    (group,) = converse(packed, problems=make_prompts((prompt,)))
    check_against_plain(plain, [group])
    assert {len(episode.token_ids) for episode in group.episodes} == {1}


def test_a_reply_that_is_broken_ends_the_episode():
    packed, _ = make_pair("llama")
    groups = converse(packed, reply=lambda *_: Told(broken="it raised"))
    for episode in (e for g in groups for e in g.episodes):
        assert episode.broken == ("it raised" if episode.token_ids[-1] in EOS else "")
        assert len(episode.text.turns) == 1 and not (episode.finished and episode.broken)


@pytest.mark.parametrize("slots", [64, 3])
def test_stop_strings_end_a_turn_and_those_that_were_told_do_not(slots):
    """The text that is told has the stop string in it, as a user's message may."""
    packed, plain = make_pair("llama")
    free = [e for g in sample(packed, 8, eos=(0,)) for e in g.episodes]
    stop = max({t for e in free for t in e.token_ids}, key=lambda t: sum(t in e.token_ids[3:] for e in free))
    text = TOKENIZER.decode([stop])
    lasts = []

    def answer(problem, transcript, last):
        lasts.append(last)
        return Told((stop, 3, stop), text + "x" + text)

    groups = converse(packed, reply=answer, eos=(0,), stop_strings=(text,), slots=slots, max_turns=3)
    check_sampled(plain, groups)
    for episode in (e for g in groups for e in g.episodes):
        for (begin, end), turn in zip(turns_of(episode)[:-1], episode.text.turns, strict=False):
            assert turn == TOKENIZER.decode(episode.token_ids[begin:end], skip_special_tokens=True)
            stopped = text in turn and text not in TOKENIZER.decode(episode.token_ids[begin : end - 1])
            assert stopped or (text not in turn and episode.token_ids[end - 1] == 0)
        assert len(episode.text.turns) <= 3
    assert stop in lasts and max(len(e.text.turns) for g in groups for e in g.episodes) == 3


def test_what_an_ended_slot_left_behind_its_turn_is_not_read(monkeypatch):
    packed, plain = make_pair("llama")
    resumed, original = [], sampler.SlotDecoder.replied
    monkeypatch.setattr(sampler, "FEW", 0)  # the grouped layout, where a slot has its own places alone

    def with_junk(self, ended, turns):
        before = self.ended[: self.rows].clone()
        result = original(self, ended, turns)
        for slot in (before & ~self.ended[: self.rows]).nonzero()[:, 0].tolist():
            resumed.append(slot)
            for part in (*self.attention.keys, *self.attention.values):
                part[slot, :, int(self.lengths[slot]) :] = 7.0
        return result

    monkeypatch.setattr(sampler.SlotDecoder, "replied", with_junk)
    check_against_plain(plain, converse(packed, slots=6))
    assert len(resumed) > 20


def objective(batch: Batch, logprobs: torch.Tensor) -> torch.Tensor:
    return -(batch.weights * batch.advantages * logprobs).sum()


def test_loss_and_gradient_are_those_of_a_plain_forward_over_the_transcript_with_a_mask():
    packed, plain = make_pair("llama")
    groups = converse(packed)
    weighed = []
    for group in groups:
        episodes = [
            replace(e, advantages=(0.5 + n - 1.2 * group.problem.index,) * e.length, token_weight=0.01 * (n + 1))
            for n, e in enumerate(group.episodes)
        ]
        weighed.append(replace(group, episodes=tuple(episodes)))
    row = pack(weighed, "cpu", torch.float32)
    scores = score(packed, row, 1.0)
    told = [t for g in groups for e in g.episodes for t, own in zip(e.token_ids, e.written, strict=True) if not own]
    own = [t for g in groups for e in g.episodes for t, own in zip(e.token_ids, e.written, strict=True) if own]
    assert len(told) > 50 and row.batch.token_ids.tolist() == own
    assert (scores.logprobs - row.batch.sampled_logprobs).abs().max() < 1e-4
    loss = objective(row.batch, scores.logprobs)
    loss.backward()
    total = torch.zeros(())
    for group in weighed:
        for episode in group.episodes:
            prompt = group.problem.prompt_ids
            logits = plain(torch.tensor([prompt + episode.token_ids]), use_cache=False).logits[0, len(prompt) - 1 : -1]
            logprobs = logits.log_softmax(-1).gather(1, torch.tensor(episode.token_ids)[:, None])[:, 0]
            mask = torch.tensor(episode.written)
            total = total - episode.token_weight * (logprobs[mask] * torch.tensor(episode.advantages)).sum()
    total.backward()
    assert loss.item() == pytest.approx(total.item(), rel=1e-5)
    for (name, one), other in zip(packed.named_parameters(), plain.parameters(), strict=True):
        assert torch.allclose(one.grad, other.grad, atol=1e-5 * float(other.grad.abs().max()) + 1e-8), name


def test_a_transcript_is_one_text_that_survives_a_copy():
    text = Transcript(["one", "two", "three"], [" a ", " b "])
    assert text == "one a two b three" and text.turns == ("one", "two", "three")
    for other in (copy.deepcopy(text), pickle.loads(pickle.dumps(text))):
        assert other == text and type(other) is Transcript and other.turns == text.turns and other.told == text.told
