"""Both layouts of the decode step's cache, and the captured step, against each other.

A captured step is tested without a GPU by a recording of its operations, which is replayed as a graph would be: on the
same tensors, without Python. What only a GPU can show is that torch accepts the capture, and how fast it is.
"""

import gc
import logging
import weakref
from functools import cache, partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_decode_loops import HAS_LOOPS
from test_packing import SHAPE, make_pair
from test_sampler import EOS, TOKENIZER, make_prompts, sample, settings, tokens_of
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from src.engine import cuda_decoding, decode_loops, room, sampler
from src.engine.cpu_layers import LoopAttention, LoopOperations
from src.engine.cpu_step import LoopStep
from src.engine.cuda_decoding import FlashAttention, PaddedAttention, StepRunner, flash_works, layout_for
from src.engine.decoding import GroupedAttention, JoinedAttention, MergedAttention
from src.engine.packing import pack
from src.engine.plan import Rooms
from src.engine.room import Kept, cache_bytes, fit_to_memory
from src.engine.sampler import SlotDecoder, rollout
from src.engine.scoring import score
from src.engine.upload import packed, unpacked, upload

# where the host waits for the device, or a shape depends on data: isin sorts when there are many, and lift_fresh is
# torch.tensor(...), which copies to the device
NOT_IN_A_GRAPH = ("_local_scalar_dense", "nonzero", "unique", "isin", "masked_select", "equal.default", "lift_fresh")
needs_loops = pytest.mark.skipif(not HAS_LOOPS, reason="there is no AVX2 or no C compiler")
MODES = ["captured", "captured, flash", "joined for the last", "merged", pytest.param("loops", marks=needs_loops)]


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


def flash_stand_in(query, keys, values, offsets, queries, used, longest, scaling):
    """What the operator of a GPU computes, as its documentation has it, when every row has the same number of queries.

    Its own way with several heads that read the same keys costs copies; here there are as many of the one as the other.
    """
    assert {x.dtype for x in (*offsets, used)} == {torch.int32} and len(offsets[0]) == len(offsets[1]) == len(used) + 1
    assert query.shape[1:] == keys.shape[1:]
    rows = offsets[0][:-1, None] + torch.arange(queries, device=query.device)  # [n, queries]
    query = query[rows].flatten(1, 2)  # [n, queries * H, D]
    places = offsets[1][:-1, None] + torch.arange(longest, device=query.device)  # [n, longest]
    keys, values = (part[places].repeat(1, 1, queries, 1) for part in (keys, values))  # [n, longest, queries * H, D]
    scores = torch.einsum("nhd,nthd->nht", query, keys) * scaling
    hidden = torch.arange(longest, device=query.device) >= used[:, None]
    weights = scores.masked_fill(hidden[:, None], -torch.inf).softmax(-1)
    # what lies behind is not read: NaN there does not matter
    output = torch.einsum("nht,nthd->nhd", weights, values.masked_fill(hidden[:, :, None, None], 0))
    return output.unflatten(1, (queries, -1)).flatten(0, 1)


@pytest.fixture
def flash_on_cpu(monkeypatch):
    """Flash attention where the tests run, in fp32, by the stand-in. What was tried before is forgotten."""
    monkeypatch.setattr(cuda_decoding, "HALF", (torch.float32,))
    monkeypatch.setattr(cuda_decoding, "flash", flash_stand_in)
    flash_works.cache_clear()
    yield
    flash_works.cache_clear()


@pytest.fixture(params=MODES)
def mode(request, monkeypatch):
    """Another way to decode, and a function that goes back to the grouped layout."""
    monkeypatch.setattr(sampler, "FEW", 0)
    if request.param == "captured, flash":
        request.getfixturevalue("flash_on_cpu")

    def switch_on():
        if request.param == "joined for the last":
            monkeypatch.setattr(sampler, "FEW", 1000)
        elif request.param == "merged":  # of bf16 on a CPU, here in fp32
            monkeypatch.setattr(sampler, "layout_for", lambda model: MergedAttention)
        elif request.param == "loops":
            monkeypatch.setattr(decode_loops, "WORTH_COMPILING", 0)
            monkeypatch.setattr(
                torch.backends.cpu, "get_cpu_capability", lambda: "AVX2"
            )  # whose vectors the heads fill
        elif "captured" in request.param:
            monkeypatch.setattr(cuda_decoding, "GRAPHS_ON", ("cpu",))
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
}


@cache
def reference(case: str, slots: int):
    """In the grouped layout, whatever the mode of the test that asks first."""
    return sample(make_pair("llama")[0], slots=slots, **CASES[case])


def test_in_bf16_a_cpu_merges_two_parts_with_a_smaller_error():
    assert layout_for(make_pair("llama")[0]) is GroupedAttention
    assert layout_for(make_pair("llama")[0].bfloat16()) is MergedAttention
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(shape, generator=generator).bfloat16()

    prompt_lengths, rows, lengths = np.array([120, 117]), np.repeat([0, 1], 8), np.arange(44, 60)
    prompt, own = [draw(1, 2, 3, 120, 64) for _ in range(2)], [draw(16, 3, 64, 64) for _ in range(2)]
    query, new = draw(16, 9, 1, 64), [draw(16, 3, 1, 64) for _ in range(2)]
    found = {}
    for layout in (GroupedAttention, MergedAttention):
        attention = layout((*prompt, prompt_lengths), 16, 64)
        attention.keys[0].copy_(own[0]), attention.values[0].copy_(own[1])
        attention.arrange(rows, lengths, np.zeros(16, dtype=bool))
        attention.begin_step(torch.from_numpy(lengths), torch.from_numpy(lengths + prompt_lengths[rows]))
        found[layout] = attention.attend(0, query, *new, 0.125)[:, 0].double()
    errors = {layout: [] for layout in found}
    for slot, (row, length) in enumerate(zip(rows, lengths, strict=True)):
        keys, values = (
            torch.cat([of_prompts[0, row, :, : prompt_lengths[row]], of_slot[slot, :, :length], last[slot]], 1).double()
            for of_prompts, of_slot, last in zip(prompt, own, new, strict=True)
        )  # [Hkv, tokens, D]
        weights = (query[slot].view(3, 3, 64).double() @ keys.transpose(-1, -2) * 0.125).softmax(-1)
        for layout, output in found.items():
            errors[layout].append(output[slot] - (weights @ values).view(9, 64))
    grouped, merged = (float(torch.stack(errors[layout]).square().mean().sqrt()) for layout in found)
    assert merged < 0.9 * grouped < 0.002


@pytest.mark.parametrize("case, slots", [("ragged", 1), ("ragged", 64), *((case, 7) for case in CASES)])
def test_every_way_to_decode_gives_the_same_completions(mode, case, slots):
    expected = reference(case, slots)
    mode()
    assert_same(sample(make_pair("llama")[0], slots=slots, **CASES[case]), expected)


@pytest.mark.parametrize("slots", [5, 64])
def test_episodes_that_fail_are_left_out_and_harm_no_other(monkeypatch, mode, slots):
    monkeypatch.setattr(sampler, "ATTEMPTS", 2)
    packed, _ = make_pair("llama")
    problems = make_prompts((4, 7, 5) * 6)
    with torch.no_grad():
        embedding = packed.get_input_embeddings().weight
        packed.get_output_embeddings().weight = torch.nn.Parameter(embedding.clone())  # the head stays whole
        embedding[17] = torch.nan
    expected = sample(packed, 2, problems, slots)
    assert 5 < len(expected) < 18
    mode()
    assert_same(sample(packed, 2, problems, slots), expected)


@pytest.mark.parametrize("mode", ["grouped", *MODES], indirect=True)
@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "granite"])
@pytest.mark.parametrize("slots", [5, pytest.param(64, marks=pytest.mark.slow)])
def test_logprobs_equal_the_trainers_and_greedy_equals_generate(mode, name, slots):
    packed, plain = make_pair(name)
    mode()
    groups = sample(packed, slots=slots, temperature=0.8)
    assert len({len(ids) for ids in tokens_of(groups)}) > 3, "lengths must be ragged for this to mean anything"
    row = pack(groups, "cpu", torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(row.batch.sampled_logprobs, score(packed, row, 0.8).logprobs, atol=1e-4, rtol=0)
    for group in sample(packed, 1, slots=slots, temperature=0.0):
        prompt = torch.tensor([group.problem.prompt_ids])
        expected = plain.generate(prompt, do_sample=False, max_new_tokens=24, eos_token_id=list(EOS), pad_token_id=0)
        assert group.episodes[0].token_ids == tuple(expected[0, prompt.shape[1] :].tolist())


def test_the_modes_above_do_what_they_are_called(mode, monkeypatch):
    packed, _ = make_pair("llama")
    joins, steps = count_calls(monkeypatch, sampler, "join"), count_calls(monkeypatch, SlotDecoder, "step")
    replays = count_calls(monkeypatch, Recording, "replay")
    flash = count_calls(monkeypatch, FlashAttention, "arrange")
    loops = count_calls(monkeypatch, LoopOperations, "feed_forward"), count_calls(monkeypatch, LoopAttention, "read")
    in_one = count_calls(monkeypatch, LoopStep, "__call__")
    products = count_calls(monkeypatch, decode_loops, "product")
    sample(packed, slots=7)
    assert not joins and not replays and not any(loops) and not products
    steps.clear()
    mode()
    sample(packed, slots=7)
    assert all(loops) == bool(products) == bool(in_one) == (mode.name == "loops")
    assert len(joins) == (mode.name == "joined for the last") and ("flash" in mode.name) == (len(flash) > 1)
    assert len(replays) > len(steps) if "captured" in mode.name else not replays  # a shape's first step, and capture


@pytest.mark.parametrize("mode", ["grouped", *MODES], indirect=True)
def test_weights_are_used_in_place(monkeypatch, mode):
    """After an update the next rollout is that of the new weights, also where steps were captured."""
    packed, _ = make_pair("llama")
    mode()
    before = sample(packed, 2)
    with torch.no_grad():
        for parameter in packed.parameters():
            parameter.mul_(1.2)
    after = sample(packed, 2)
    assert tokens_of(after) != tokens_of(before)
    monkeypatch.undo()
    fresh = make_pair("llama")[0]
    fresh.load_state_dict(packed.state_dict())
    assert_same(sample(fresh, 2), after)


@pytest.mark.parametrize("mode", ["captured", "captured, flash"], indirect=True)
def test_a_decoder_that_is_kept_gives_what_a_new_one_gives_and_captures_nothing_again(monkeypatch, mode):
    """Other prompts, fewer of them, another step and other weights; then something that it cannot serve."""
    packed, _ = make_pair("llama")
    mode()
    kept, captures, moved = Kept(), count_calls(monkeypatch, StepRunner, "capture"), []
    kept.may_stay = True

    def both(problems, samples=3, slots=6, **options):
        before = len(captures)
        found = rollout(packed, TOKENIZER, problems, samples, settings(slots, **options), kept=kept)
        moved.append((len(captures) - before, kept.decoder))
        assert_same(found, rollout(packed, TOKENIZER, problems, samples, settings(slots, **options)))

    first = make_prompts((14, 9, 1, 6, 6))
    both(first)
    both(make_prompts((3, 7, 14, 2, 5)), stream=4)
    with torch.no_grad():
        for parameter in packed.parameters():
            parameter.mul_(1.1)
    both(make_prompts((5, 9, 3)), stream=5)
    decoder = kept.decoder
    assert moved[0][0] > 2 and all(one is decoder for _, one in moved)
    assert sum(count for count, _ in moved) == len(decoder.runner.graphs), "no size is captured twice"
    assert sum(count for count, _ in moved[1:]) < len(captures) // 3
    assert decoder.attention.capacity % decoder.attention.width_step == 0, (
        "not that of its first prompts, to round alike"
    )
    for change in (
        {"problems": make_prompts((40, 2))},
        {"temperature": 0.5},
        {"new": 20},
        {"samples": 2},
        {"problems": make_prompts((15, 2))},
    ):
        both(**({"problems": first} | change))
        assert kept.decoder is not decoder
        decoder = kept.decoder
    mlp, scaled = packed.model.layers[0].mlp, []

    def swap():
        mlp.up_proj.weight.data = mlp.up_proj.weight.data.clone()

    def change():  # also where the layers are the model's own already
        factor, plain = 1 + len(scaled), type(mlp).forward
        mlp.forward = lambda x: plain(mlp, x) * factor
        scaled.append(1)

    def listen():
        packed.get_output_embeddings().register_forward_hook(lambda *_: -_[2])

    for meddle in (swap, change, change, listen, listen):
        meddle()
        both(make_prompts((15, 2)))
        assert kept.decoder is not decoder or decoder is None
        decoder = kept.decoder
    assert decoder is None, "what a hook does is not in a graph"


def test_an_evaluation_keeps_nothing_for_the_training_after_it(monkeypatch):
    """Else a resumed run, which does not evaluate again, would have other slots, and round otherwise."""
    packed, _ = make_pair("llama")
    monkeypatch.setattr(cuda_decoding, "GRAPHS_ON", ("cpu",))
    monkeypatch.setattr(StepRunner, "capture", record)
    rooms, problems = Rooms(), make_prompts()
    rooms.kept.may_stay = True

    def go(stream, slots, prompts=None):
        if prompts:
            monkeypatch.setattr("src.engine.plan.fit_to_memory", lambda *_: (slots, prompts))
        sample = partial(rollout, packed, TOKENIZER, problems, 3, settings(slots, stream=stream))
        rooms.rollout(packed, problems, 3, settings(slots, stream=stream), sample)
        return rooms.kept.decoder

    assert go(-1, 7, 6) is None and rooms.sizes == {"6 x 3": (7, 6)}
    rooms.sizes.clear()
    first = go(1, 12, 6)
    assert first.slots == 12 and rooms.sizes == {"6 x 3": (12, 6)}
    assert go(-1, 12) is None
    waves = go(2, 12, 2)  # two prompts at a time
    assert len(waves.prompt_lengths) == 2 and go(3, 12) is waves and rooms.sizes == {"6 x 3": (12, 2)}

    again, calls = SlotDecoder.again, []

    def no_memory(self, *arguments):
        calls.append(arguments)
        if len(calls) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")
        again(self, *arguments)

    monkeypatch.setattr(SlotDecoder, "again", no_memory)
    assert go(4, 12) is not waves and rooms.sizes == {"6 x 3": (12, 2)}, (
        "without what was kept there is as much as before"
    )


def test_a_rollout_that_fails_keeps_nothing_and_neither_does_one_without_graphs(monkeypatch):
    packed, _ = make_pair("llama")
    kept = Kept()
    kept.may_stay = True
    rollout(packed, TOKENIZER, make_prompts(), 3, settings(6), kept=kept)
    assert kept.decoder is None  # on a CPU there is nothing to save
    monkeypatch.setattr(cuda_decoding, "GRAPHS_ON", ("cpu",))
    monkeypatch.setattr(StepRunner, "capture", record)
    rollout(packed, TOKENIZER, make_prompts(), 3, settings(6), kept=kept)
    assert kept.decoder is not None and not hasattr(kept.decoder, "prompt_hidden")
    assert kept.decoder.attention.prompt_keys is None  # of the prompts nothing is kept
    alive = weakref.ref(kept.decoder)

    def stop(share):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        rollout(packed, TOKENIZER, make_prompts(), 3, settings(6), stop, kept=kept)
    gc.collect()
    assert kept.decoder is None and alive() is None


def test_there_are_few_sizes_of_captured_steps(monkeypatch):
    eager = StepRunner(torch.device("cpu"))
    assert [eager.rows(live, 64) for live in (64, 57, 56, 1)] == [64, 64, 56, 1]
    monkeypatch.setattr(cuda_decoding, "GRAPHS_ON", ("cpu",))
    runner = StepRunner(torch.device("cpu"))
    assert sorted({runner.rows(live, 50) for live in range(1, 51)}) == [1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 50]
    for live in range(1, 301):
        assert live <= runner.rows(live, 512) <= 1.5 * live


def test_a_capture_that_runs_out_of_memory_does_not_end_all_captures(monkeypatch):
    """The error of the capture's end says nothing of it; what it came from does."""
    runner = StepRunner(torch.device("cpu"))
    runner.pool = (0, 0)
    monkeypatch.setattr(StepRunner, "works", True)

    class Graph:
        def __init__(self):
            try:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
            except torch.OutOfMemoryError as error:
                raise RuntimeError("operation failed due to a previous error during capture") from error

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    with pytest.raises(RuntimeError, match="previous error"):
        runner.capture(lambda: None)
    assert StepRunner.works


def test_a_capture_that_fails_says_why_and_not_only_that(monkeypatch, caplog):
    runner = StepRunner(torch.device("cpu"))
    runner.pool = (0, 0)
    monkeypatch.setattr(StepRunner, "works", True)

    def graph():
        try:
            raise RuntimeError("a copy from the host")
        finally:
            raise RuntimeError("operation failed due to a previous error during capture")

    monkeypatch.setattr(torch.cuda, "CUDAGraph", graph)
    with caplog.at_level(logging.WARNING, "grpo"):
        assert runner.capture(lambda: None) is None
    assert "(a copy from the host)" in caplog.text and not StepRunner.works


def test_a_capture_that_fails_leaves_no_cache_alive(monkeypatch):
    """A traceback that is kept would keep the step, and with it the decoder: memory of the next update."""
    runner = StepRunner(torch.device("cpu"))
    runner.pool = (0, 0)
    monkeypatch.setattr(StepRunner, "works", True)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: (_ for _ in ()).throw(RuntimeError("no")))

    class Cache:
        def step(self):
            pass

    cache = Cache()
    alive = weakref.ref(cache)
    gc.disable()
    try:
        runner.capture(cache.step)
        del cache
        assert alive() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("version", ["2.11", "2.12", "2.13"])
def test_flash_is_asked_without_splits_where_torch_takes_the_option(version, monkeypatch):
    """2.11 has no num_splits, 2.12 has it and refuses it, 2.13 takes it."""
    calls = []

    def operator(*arguments, **options):
        calls.append("num_splits" in options)
        if version == "2.12" and "num_splits" in options:
            raise RuntimeError("num_splits requires FA3. Register FA3 with ...")
        return ("output",)

    names = ["query", "seqused_k"] + ["num_splits"] * (version != "2.11")
    arguments = [SimpleNamespace(name=name) for name in names]
    operator.default = SimpleNamespace(_schema=SimpleNamespace(arguments=arguments))
    monkeypatch.setattr(torch.ops.aten, "_flash_attention_forward", operator, raising=False)
    monkeypatch.setitem(cuda_decoding.FLASH, "has_splits", True)
    for _ in range(2):
        assert cuda_decoding.flash(1, 2, 3, (4, 5), 6, 7, 8, 9.0) == "output"
    assert calls == {"2.11": [False, False], "2.12": [True, False, False], "2.13": [True, True]}[version]


def test_tensors_of_any_type_travel_as_one():
    tensors = [torch.arange(3), torch.tensor([[1.5, -2.0]]), torch.tensor(7, dtype=torch.int32), torch.zeros(0),
               torch.tensor([True, False, True]), torch.arange(12.0).view(3, 4).T]  # fmt: skip
    whole = packed(tensors)
    assert whole.dtype == torch.uint8 and len(whole) % 16 == 0
    for one, other in zip(tensors, unpacked(whole, tensors), strict=True):
        assert one.dtype == other.dtype and torch.equal(one, other)
    assert all(a is b for a, b in zip(tensors, upload(tensors, "cpu"), strict=True))


def test_a_capture_that_fails_is_told_once_and_the_steps_run(monkeypatch, caplog):
    """torch without CUDA cannot make a graph, which is a RuntimeError as any other."""
    monkeypatch.setattr(cuda_decoding, "GRAPHS_ON", ("cpu",))
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

    def flash(query, keys, values, offsets, queries, used, longest, scaling):
        if broken == "an error":
            raise RuntimeError("no kernel for this device\nin many lines")
        if broken == "another signature":
            raise TypeError("unexpected keyword")
        used = used - 1 if broken == "a key short" else used
        output = flash_stand_in(query, keys, values, offsets, queries, used, longest, scaling)
        return output * torch.nan if broken == "NaN" else output

    monkeypatch.setattr(cuda_decoding, "flash", flash)
    assert layout_for(packed) is GroupedAttention
    monkeypatch.setattr(cuda_decoding, "GRAPHS_ON", ("cpu",))
    with caplog.at_level(logging.WARNING, "grpo"):
        layouts = {layout_for(packed) for _ in range(3)}
    assert layouts == {PaddedAttention if broken else FlashAttention}
    assert len(caplog.records) == bool(broken) and "many lines" not in caplog.text
    monkeypatch.setattr(cuda_decoding, "HALF", (torch.bfloat16,))
    assert layout_for(packed) is PaddedAttention  # the kernel has no fp32: that is not worth a warning
    assert len(caplog.records) == bool(broken)


def test_without_a_gpu_the_trial_of_the_real_operator_fails_and_says_so(caplog):
    flash_works.cache_clear()
    with caplog.at_level(logging.WARNING, "grpo"):
        assert not flash_works(torch.device("cpu"), torch.bfloat16, 4, 2, 16)
    assert "decoding without flash attention" in caplog.text
    flash_works.cache_clear()


@pytest.mark.parametrize(
    "layout",
    [
        GroupedAttention,
        JoinedAttention,
        PaddedAttention,
        FlashAttention,
        pytest.param(LoopAttention, marks=needs_loops),
    ],
)
def test_nan_of_a_slot_that_ended_does_not_reach_the_one_that_moves_there(flash_on_cpu, layout):
    """It may lie further back than the others are, and come into sight of the newcomer many steps later."""
    generator = torch.Generator().manual_seed(1)
    prompt = torch.randn(1, 1, 1, 3, 16, generator=generator)
    attention = layout((prompt, prompt, np.array([3])), 4, 24)
    attention.start(torch.arange(4), torch.zeros(4, dtype=torch.long))
    lengths, ended = np.array([12, 2, 0, 5]), np.array([False, False, False, False])

    def step(broken: int | None = None):
        rows = len(lengths)
        query = torch.randn(rows, 1, 1, 16, generator=generator)
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
    monkeypatch.setattr(cuda_decoding, "GRAPHS_ON", graphs)
    problems = make_prompts((9, 14, 3))
    slot, prompt = cache_bytes(packed, 14, 24)
    with torch.inference_mode():
        decoder = SlotDecoder(packed, TOKENIZER, problems, 4, 12, settings())
        decoder.run()
    attention = decoder.attention
    if graphs:
        logits = 2 * 8 * SHAPE["vocab_size"]
        assert sum(part.nbytes for part in attention.keys + attention.values) == 12 * (slot - logits)
        assert attention.prompt_keys.nbytes + attention.prompt_values.nbytes == 3 * prompt
    monkeypatch.setattr(room, "free_memory", lambda device: (5 * slot + 2 * prompt) / room.MEMORY_SHARE)
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
    monkeypatch.setattr(sampler, "FEW", 1000)
    original, sizes = sampler.join, []

    def join(grouped, *rest):
        before = sum(part.nbytes for part in grouped.keys + grouped.values)
        joined = original(grouped, *rest)
        sizes.append((sum(part.nbytes for part in joined.keys + joined.values), before))
        assert not any(part.numel() for part in grouped.keys + grouped.values)
        return joined

    monkeypatch.setattr(sampler, "join", join)
    sample(packed, slots=24)
    sample(packed, 1, make_prompts((40, 3)), 2)  # too long a prompt for it
    assert len(sizes) == 1 and sizes[0][0] <= sizes[0][1]
