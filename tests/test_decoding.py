"""Both layouts of the decode step's cache, and the captured step, against each other.

A captured step is tested without a GPU by a recording of its operations, which is replayed as a graph would be: on the
same tensors, without Python. What only a GPU can show is that torch accepts the capture, and how fast it is.
"""

import gc
import logging
import weakref

import numpy as np
import pytest
import torch
from test_packing import SHAPE, make_pair
from test_sampler import EOS, TOKENIZER, make_prompts, settings, tokens_of
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import src.cuda_decoding
import src.sampler
from src.cuda_decoding import FlashAttention, PaddedAttention, StepRunner, flash_works, layout_for
from src.decoding import GroupedAttention, JoinedAttention
from src.packing import pack
from src.sampler import SlotDecoder, cache_bytes, fit_to_memory, rollout
from src.scoring import score

# where the host waits for the device, or a shape depends on data; the last: torch.tensor(...), which copies to it
NOT_IN_A_GRAPH = (
    "_local_scalar_dense",
    "nonzero",
    "unique",
    "isin",  # by sorting, when there are many
    "masked_select",
    "equal.default",
    "lift_fresh",
)


class Recording(TorchDispatchMode):
    """The operations of a step, and their replay."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert not any(name in str(function) for name in NOT_IN_A_GRAPH), function
        if "index" in str(function):
            indices = [leaf for leaf in tree_leaves(args[1]) if isinstance(leaf, torch.Tensor)]
            assert all(index.dtype != torch.bool for index in indices), "a mask as an index has a shape of its own"
        outputs = function(*args, **(kwargs or {}))
        self.calls.append((function, args, kwargs or {}, outputs))
        return outputs

    def replay(self):
        for function, args, kwargs, outputs in self.calls:
            for old, new in zip(tree_leaves(outputs), tree_leaves(function(*args, **kwargs)), strict=True):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():  # not a view, nor in place
                    old.copy_(new)


def record(runner: StepRunner, step) -> Recording:
    """In place of StepRunner.capture: like a capture it changes nothing that the next step does not write again."""
    decoder = step.__self__
    states = (decoder.lengths, decoder.current, decoder.ended)
    before = [state.clone() for state in states]
    with Recording() as recording:
        step()
    for state, old in zip(states, before, strict=True):
        state.copy_(old)
    return recording


def flash_stand_in(query, keys, values, offsets, used, longest, scaling):
    """What the operator of a GPU computes, as its documentation has it."""
    assert {x.dtype for x in (*offsets, used)} == {torch.int32} and len(offsets[0]) == len(offsets[1]) == len(used) + 1
    query = query[offsets[0][:-1]]
    places = offsets[1][:-1, None] + torch.arange(longest)  # [n, longest]
    repeat = query.shape[1] // keys.shape[1]
    keys, values = (part[places].repeat_interleave(repeat, 2) for part in (keys, values))  # [n, longest, H, D]
    scores = torch.einsum("nhd,nthd->nht", query, keys) * scaling
    hidden = torch.arange(longest) >= used[:, None]
    weights = scores.masked_fill(hidden[:, None], -torch.inf).softmax(-1)
    # what lies behind is not read: NaN there does not matter
    return torch.einsum("nht,nthd->nhd", weights, values.masked_fill(hidden[:, :, None, None], 0))


@pytest.fixture
def flash_on_cpu(monkeypatch):
    """Flash attention where the tests run, in fp32, by the stand-in. What was tried before is forgotten."""
    monkeypatch.setattr(src.cuda_decoding, "HALF", (torch.float32,))
    monkeypatch.setattr(src.cuda_decoding, "flash", flash_stand_in)
    flash_works.cache_clear()
    yield
    flash_works.cache_clear()


@pytest.fixture(params=["captured", "captured, flash", "joined for the last"])
def mode(request, monkeypatch):
    """Another way to decode, and a function that goes back to the grouped layout."""
    monkeypatch.setattr(src.sampler, "FEW", 0)
    if request.param == "captured, flash":
        request.getfixturevalue("flash_on_cpu")

    def switch_on():
        if request.param == "joined for the last":
            monkeypatch.setattr(src.sampler, "FEW", 1000)
        else:
            monkeypatch.setattr(src.cuda_decoding, "GRAPHS_ON", ("cpu",))
            monkeypatch.setattr(PaddedAttention, "width_step", 8)
            monkeypatch.setattr(StepRunner, "capture", record)

    switch_on.name = request.param
    return switch_on


def count_calls(monkeypatch, owner, name: str) -> list:
    calls, original = [], getattr(owner, name)
    monkeypatch.setattr(owner, name, lambda *arguments: (calls.append(arguments), original(*arguments))[1])
    return calls


def assert_same(groups, reference):
    assert [group.problem.index for group in groups] == [group.problem.index for group in reference]
    assert tokens_of(groups) == tokens_of(reference)
    ours, theirs = (
        torch.tensor([logprob for group in some for episode in group.episodes for logprob in episode.logprobs])
        for some in (groups, reference)
    )
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


CASES = {
    "ragged": {},
    "greedy": {"temperature": 0.0},
    "stop strings": {"stop_strings": ("1", "+", "a")},
    "many end tokens": {"eos": tuple(range(1, 20))},
    "all end tokens": {"eos": tuple(range(SHAPE["vocab_size"]))},
    "no end token": {"eos": ()},
    "one token": {"new": 1},
    "cut": {"top_k": 9, "top_p": 0.9, "min_p": 0.01},
}


@pytest.mark.parametrize("slots", [1, 7, 64])
@pytest.mark.parametrize("case", CASES)
def test_every_way_to_decode_gives_the_same_completions(mode, case, slots):
    packed, _ = make_pair("llama")
    options = settings(slots, **CASES[case])
    reference = rollout(packed, TOKENIZER, make_prompts(), 4, options)
    mode()
    assert_same(rollout(packed, TOKENIZER, make_prompts(), 4, options), reference)


@pytest.mark.parametrize("slots", [5, 64])
def test_episodes_that_fail_are_left_out_and_harm_no_other(mode, slots):
    packed, _ = make_pair("llama")
    problems = make_prompts((4, 7, 5) * 10)
    with torch.no_grad():
        embedding = packed.get_input_embeddings().weight
        packed.get_output_embeddings().weight = torch.nn.Parameter(embedding.clone())  # the head stays whole
        embedding[17] = torch.nan
    reference = rollout(packed, TOKENIZER, problems, 2, settings(slots, max_retry_rounds=1))
    assert 10 < len(reference) < 30
    mode()
    assert_same(rollout(packed, TOKENIZER, problems, 2, settings(slots, max_retry_rounds=1)), reference)


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "granite"])
@pytest.mark.parametrize("slots", [5, 64])
def test_logprobs_equal_the_trainers_and_greedy_equals_generate(mode, name, slots):
    packed, plain = make_pair(name)
    mode()
    batch = pack(rollout(packed, TOKENIZER, make_prompts(), 4, settings(slots, 0.8)), "cpu", torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(batch.sampled_logprobs, score(packed, batch, 0.8).logprobs, atol=1e-4, rtol=0)
    for group in rollout(packed, TOKENIZER, make_prompts(), 1, settings(slots, temperature=0.0)):
        prompt = torch.tensor([group.problem.prompt_ids])
        expected = plain.generate(prompt, do_sample=False, max_new_tokens=24, eos_token_id=list(EOS), pad_token_id=0)
        assert group.episodes[0].token_ids == tuple(expected[0, prompt.shape[1] :].tolist())


def test_the_modes_above_do_what_they_are_called(mode, monkeypatch):
    packed, _ = make_pair("llama")
    joins, steps = count_calls(monkeypatch, src.sampler, "join"), count_calls(monkeypatch, SlotDecoder, "step")
    replays = count_calls(monkeypatch, Recording, "replay")
    layouts = {kind: count_calls(monkeypatch, kind, "arrange") for kind in (PaddedAttention, FlashAttention)}
    rollout(packed, TOKENIZER, make_prompts(), 4, settings(7))
    assert not joins and not replays
    steps.clear()
    mode()
    rollout(packed, TOKENIZER, make_prompts(), 4, settings(7))
    if mode.name == "joined for the last":
        assert len(joins) == 1 and not replays
    else:
        assert not joins and len(replays) > len(steps)  # a shape's first step, and its capture
        assert len(layouts[FlashAttention]) > 1 if "flash" in mode.name else not layouts[FlashAttention]


def test_a_captured_step_sees_new_weights(monkeypatch, mode):
    packed, _ = make_pair("llama")
    mode()
    before = rollout(packed, TOKENIZER, make_prompts(), 2, settings())
    with torch.no_grad():
        for parameter in packed.parameters():
            parameter.mul_(1.2)
    after = rollout(packed, TOKENIZER, make_prompts(), 2, settings())
    assert tokens_of(after) != tokens_of(before)
    monkeypatch.undo()
    assert_same(rollout(packed, TOKENIZER, make_prompts(), 2, settings()), after)


def test_there_are_few_sizes_of_captured_steps(monkeypatch):
    eager = StepRunner(torch.device("cpu"))
    assert [eager.rows(live, 64) for live in (64, 57, 56, 1)] == [64, 64, 56, 1]
    monkeypatch.setattr(src.cuda_decoding, "GRAPHS_ON", ("cpu",))
    runner = StepRunner(torch.device("cpu"))
    assert sorted({runner.rows(live, 50) for live in range(1, 51)}) == [1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 50]
    for live in range(1, 301):
        assert live <= runner.rows(live, 512) <= 1.5 * live


def test_a_capture_that_fails_is_told_once_and_the_steps_run(monkeypatch, caplog):
    """torch without CUDA cannot make a graph, which is a RuntimeError as any other."""
    monkeypatch.setattr(src.cuda_decoding, "GRAPHS_ON", ("cpu",))
    monkeypatch.setattr(StepRunner, "works", True)
    steps = []
    for _ in range(2):
        runner = StepRunner(torch.device("cpu"))
        runner.pool = (0, 0)
        with caplog.at_level(logging.WARNING, "grpo"):
            runner.run(lambda: steps.append(1), (3, 8), 4)
            runner.run(lambda: steps.append(1), (2, 8), 4)
    assert len(steps) == 16
    assert [record.message.split(",")[0] for record in caplog.records] == ["decoding without CUDA graphs"]


@pytest.mark.parametrize(
    "broken", ["", "a key short", "NaN", "an error", "another signature"], ids=lambda broken: broken or "works"
)
def test_flash_attention_decodes_where_its_trial_succeeds(monkeypatch, flash_on_cpu, caplog, broken):
    packed, _ = make_pair("qwen2")

    def flash(query, keys, values, offsets, used, longest, scaling):
        if broken == "an error":
            raise RuntimeError("no kernel for this device\nin many lines")
        if broken == "another signature":
            raise TypeError("unexpected keyword")
        used = used - 1 if broken == "a key short" else used
        output = flash_stand_in(query, keys, values, offsets, used, longest, scaling)
        return output * torch.nan if broken == "NaN" else output

    monkeypatch.setattr(src.cuda_decoding, "flash", flash)
    assert layout_for(packed) is GroupedAttention
    monkeypatch.setattr(src.cuda_decoding, "GRAPHS_ON", ("cpu",))
    with caplog.at_level(logging.WARNING, "grpo"):
        layouts = {layout_for(packed) for _ in range(3)}
    assert layouts == {PaddedAttention if broken else FlashAttention}
    assert len(caplog.records) == bool(broken) and "many lines" not in caplog.text
    monkeypatch.setattr(src.cuda_decoding, "HALF", (torch.bfloat16,))
    assert layout_for(packed) is PaddedAttention  # the kernel has no fp32: that is not worth a warning
    assert len(caplog.records) == bool(broken)


def test_without_a_gpu_the_trial_of_the_real_operator_fails_and_says_so(caplog):
    flash_works.cache_clear()
    with caplog.at_level(logging.WARNING, "grpo"):
        assert not flash_works(torch.device("cpu"), torch.bfloat16, 4, 2, 16)
    assert "decoding without flash attention" in caplog.text
    flash_works.cache_clear()


@pytest.mark.parametrize("layout", [GroupedAttention, JoinedAttention, PaddedAttention, FlashAttention])
def test_nan_of_a_slot_that_ended_does_not_reach_the_one_that_moves_there(flash_on_cpu, layout):
    """It may lie further back than the others are, and come into sight of the newcomer many steps later."""
    generator = torch.Generator().manual_seed(1)
    prompt = torch.randn(1, 1, 1, 3, 4, generator=generator)
    attention = layout((prompt, prompt, np.array([3])), 4, 24)
    attention.start(torch.arange(4), torch.zeros(4, dtype=torch.long))
    lengths, ended = np.array([12, 2, 0, 5]), np.array([False, False, False, False])

    def step(broken: int | None = None):
        rows = len(lengths)
        query = torch.randn(rows, 1, 1, 4, generator=generator)
        if broken is not None:
            query[broken] = torch.nan
        attention.begin_block(1)
        attention.begin_step(torch.from_numpy(lengths), torch.from_numpy(lengths) + 3)
        return attention.attend(0, query, query, query, 0.5)

    def arrange():
        attention.arrange(np.zeros(len(lengths), dtype=np.int64), lengths, ended)

    arrange()
    step(broken=0)
    lengths, ended = lengths + 1, np.array([True, False, False, False])
    arrange()
    for _ in range(2):  # the slot is not given up yet, and goes on
        assert step(broken=0)[1:].isfinite().all()
        lengths = lengths + 1
    attention.move(torch.tensor([2, 3]))  # the first of them is the shorter one, and masks what the other has
    lengths, ended = lengths[2:], ended[2:]
    arrange()
    for _ in range(12):
        assert step().isfinite().all()
        lengths = lengths + 1


@pytest.mark.parametrize("graphs", [(), ("cpu",)])
def test_the_caches_take_what_was_reckoned_and_are_freed_at_once(monkeypatch, graphs):
    packed, _ = make_pair("llama")
    monkeypatch.setattr(src.cuda_decoding, "GRAPHS_ON", graphs)
    problems = make_prompts((9, 14, 3))
    slot, prompt = cache_bytes(packed, 14, 24)
    with torch.inference_mode():
        decoder = SlotDecoder(packed, TOKENIZER, problems, 4, 12, settings(), 0)
        decoder.run()
    attention = decoder.attention
    if graphs:
        logits = 2 * 8 * SHAPE["vocab_size"]
        assert sum(part.nbytes for part in attention.keys + attention.values) == 12 * (slot - logits)
        assert attention.prompt_keys.nbytes + attention.prompt_values.nbytes == 3 * prompt
    monkeypatch.setattr(src.sampler, "free_memory", lambda device: (5 * slot + 2 * prompt) / src.sampler.MEMORY_SHARE)
    assert fit_to_memory(packed, problems, 4, settings())[0] in (4, 5)
    freed = weakref.ref(decoder.attention)
    gc.disable()
    try:
        del decoder, attention
        assert freed() is None, "a cycle would keep the cache until the next one is allocated"
    finally:
        gc.enable()


def test_joining_takes_no_more_memory_than_there_was(monkeypatch):
    packed, _ = make_pair("llama")
    monkeypatch.setattr(src.sampler, "FEW", 1000)
    original, sizes = src.sampler.join, []

    def join(grouped, *rest):
        before = sum(part.nbytes for part in grouped.keys + grouped.values)
        joined = original(grouped, *rest)
        sizes.append((sum(part.nbytes for part in joined.keys + joined.values), before))
        assert not any(part.numel() for part in grouped.keys + grouped.values)
        return joined

    monkeypatch.setattr(src.sampler, "join", join)
    rollout(packed, TOKENIZER, make_prompts(), 4, settings(24))
    rollout(packed, TOKENIZER, make_prompts((40, 3)), 1, settings(2))  # too long a prompt for it
    assert len(sizes) == 1 and sizes[0][0] <= sizes[0][1]
