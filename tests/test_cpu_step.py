"""A decode step in one call is to the bit what its loops give one by one, and is taken where layers are made for it."""

import gc
from weakref import ref

import numpy as np
import pytest
import torch
from test_decode_loops import in_each, make, needs_loops, numbers
from test_packing import make_pair
from test_sampler import sample, tokens_of
from transformers import LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

from src.engine import cpu_step, decode_loops, layers
from src.engine.cpu_layers import LoopAttention, LoopOperations
from src.engine.cpu_step import LoopStep, one_shape, step_for
from src.engine.cpu_weights import PRODUCTS, in_order_of_the_processor
from src.engine.layers import layers_for

FAMILIES = [LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config]
PROMPTS = np.array([7, 40])
pytestmark = pytest.mark.usefixtures("capability")


@pytest.fixture(autouse=True)
def small_ones_too(monkeypatch):
    monkeypatch.setattr(decode_loops, "WORTH_COMPILING", 0)


def caches_of(model, rows: int, draw: int = 1) -> LoopAttention:
    keys, values = (numbers(2, 2, 2, 40, 16, dtype=model.dtype, draw=draw + k) for k in (0, 1))
    return LoopAttention((keys, values, PROMPTS), rows, 30)


def decoded(model, attention: LoopAttention, rows: int, in_one: bool, begin: int = 0) -> list[torch.Tensor]:
    """Hidden states of some steps, among which rows end and the rest move; and what the caches hold then."""
    operations, found = LoopOperations(), []
    if not in_one:
        operations.at_once = lambda *_: None
    of_row, lengths = np.arange(rows) % 2, torch.arange(rows) % 5 + begin
    for step in range(4):
        if step == 2 and rows > 2:
            keep = torch.arange(rows)[torch.arange(rows) % 3 != 1]
            attention.move(keep)
            of_row, lengths = of_row[keep.numpy()], lengths[keep]
        attention.arrange(of_row, lengths.numpy(), np.zeros(len(of_row), dtype=bool))
        positions = lengths + torch.from_numpy(PROMPTS[of_row])
        attention.begin_step(lengths, positions)
        ids = (torch.arange(len(of_row)) * 7 + step) % 60
        found.append(layers.written_layers(operations, model, ids, positions, attention))
        lengths = lengths + 1
    return [*found, *attention.keys, *attention.values]


@in_each
@pytest.mark.parametrize("kind", FAMILIES)
@pytest.mark.parametrize(("rows", "inner"), [(1, 80), (3, 80), (34, 80), (34, 400)])
@torch.inference_mode()
def test_it_gives_what_the_loops_give_one_by_one(kind, rows, inner, dtype, monkeypatch):
    """The room between products is as large as the heads want it, or as the MLP does."""
    model, calls, whole = make(kind, dtype, intermediate_size=inner), [], LoopStep.__call__
    monkeypatch.setattr(LoopStep, "__call__", lambda *given: (calls.append(1), whole(*given))[1])
    assert type(layers_for(model).args[0]) is LoopOperations
    results = []
    for in_one in (True, False):
        attention = caches_of(model, rows)
        with in_order_of_the_processor(model, rows, 1e12):
            first = decoded(model, attention, rows, in_one)
        torch.nn.init.normal_(model.model.layers[1].mlp.down_proj.weight, 0.0, 0.3, torch.Generator().manual_seed(2))
        attention.renew((*(numbers(2, 2, 2, 40, 16, dtype=dtype, draw=k) for k in (5, 6)), PROMPTS[::-1].copy()))
        with in_order_of_the_processor(model, rows, 1e12):  # other prompts and weights in the same places
            second = decoded(model, attention, rows, in_one, begin=3)
        assert not torch.equal(first[0], second[0]) and all(bool(x.isfinite().all()) for x in second)
        results.append(first + second)
        torch.nn.init.normal_(model.model.layers[1].mlp.down_proj.weight, 0.0, 0.3, torch.Generator().manual_seed(3))
        if in_one:
            sizes = [part.shape[1] for part in attention.step[1].scratch]
            assert sizes == [max(160, 2 * inner), max(192, inner), 96] and len(calls) == 8
            model = make(kind, dtype, intermediate_size=inner)
    assert len(calls) == 8 and all(torch.equal(one, other) for one, other in zip(*results, strict=True))


@needs_loops
def test_a_rollout_of_it_has_the_completions_of_layers_one_by_one(monkeypatch):
    model, calls, whole = make_pair("qwen3")[0], [], LoopStep.__call__
    monkeypatch.setattr(LoopStep, "__call__", lambda *given: (calls.append(len(given[1])), whole(*given))[1])
    in_one = sample(model, slots=5)
    assert calls and min(calls) < max(calls) == 5
    monkeypatch.setattr(LoopOperations, "at_once", lambda *_: None)
    one_by_one, count = sample(model, slots=5), len(calls)
    assert len(calls) == count and tokens_of(in_one) == tokens_of(one_by_one)
    assert [x.logprobs for g in in_one for x in g.episodes] == [x.logprobs for g in one_by_one for x in g.episodes]
    assert PRODUCTS not in vars(model.get_decoder())


@needs_loops
def test_the_copies_of_the_weights_and_the_caches_end_with_the_rollout(monkeypatch):
    """Without waiting for Python to look for cycles."""
    model, made, whole = make_pair("qwen3")[0], [], LoopStep.__call__

    def noted(step, *given):
        panels = next(iter(step.kept[0].values())).panels
        made.extend(map(ref, (step, panels, given[-1].keys[0])))
        return whole(step, *given)

    monkeypatch.setattr(LoopStep, "__call__", noted)
    gc.disable()
    try:
        sample(model, slots=5)
        assert made and not any(one() is not None for one in made)
    finally:
        gc.enable()


def other_epsilon(model) -> None:
    model.model.layers[1].post_attention_layernorm.variance_epsilon *= 2


def other_scaling(model) -> None:
    model.model.layers[1].self_attn.scaling *= 2


def a_layer_around(model) -> None:
    """As of an adapter."""

    class Around(torch.nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return 2 * self.inner(x)

    part = model.model.layers[1].self_attn
    part.o_proj = Around(part.o_proj)


def a_bias_of_one(model) -> None:
    for layer in model.model.layers:
        project = layer.self_attn.k_proj
        project.bias = torch.nn.Parameter(torch.ones(len(project.weight)))


def a_forward_of_its_own(model) -> None:
    """That somebody gave to one layer, to try something."""
    project = model.model.layers[1].self_attn.k_proj
    project.forward = lambda x: 2 * torch.nn.functional.linear(x, project.weight)


OTHERS = {
    "own forward": ({}, a_forward_of_its_own),
    "hidden": ({"hidden_size": 90}, None),
    "intermediate": ({"intermediate_size": 77}, None),
    "epsilon": ({}, other_epsilon),
    "scaling": ({}, other_scaling),
    "around": ({}, a_layer_around),
    "bias": ({}, a_bias_of_one),
}


@needs_loops
@pytest.mark.parametrize("name", OTHERS)
@torch.inference_mode()
def test_other_layers_are_decoded_one_by_one(name):
    changes, change = OTHERS[name]
    model = make(**changes)
    if change:
        change(model)
    assert type(layers_for(model).args[0]) is LoopOperations
    found = []
    for in_one in (True, False):
        attention = caches_of(model, 3)
        with in_order_of_the_processor(model, 3, 1e12):
            assert (
                one_shape(model.model, vars(model.model)[PRODUCTS]) is None and step_for(model.model, attention) is None
            )
            found.append(decoded(model, attention, 3, in_one))
    assert name != "own forward" or "forward" in vars(model.model.layers[1].self_attn.k_proj)
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


@needs_loops
@torch.inference_mode()
def test_without_copies_of_the_weights_there_is_none_and_a_new_cache_has_its_own(monkeypatch):
    model = make()
    attention = caches_of(model, 3)
    with in_order_of_the_processor(model, 3, 1.0):  # no memory for copies
        assert step_for(model.model, attention) is None
    with in_order_of_the_processor(model, 3, 1e12):
        made = step_for(model.model, attention)
        assert made is not None and made is step_for(model.model, attention) is not step_for(
            model.model, caches_of(model, 3)
        )
    assert step_for(model.model, attention) is None
    with in_order_of_the_processor(model, 3, 1e12):
        assert step_for(model.model, attention) is not made, "the copies are new"
        monkeypatch.setattr(cpu_step, "loops", lambda dtype: type("NoMemory", (), {"step": staticmethod(lambda _: 1)}))
        with pytest.raises(MemoryError, match=r"lower training\.inference_batch_size"):
            decoded(model, attention, 3, True)
