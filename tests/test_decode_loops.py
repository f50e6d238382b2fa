"""The loops of C of a decode step against float64, and where they are not for a model."""

import logging
import shutil

import numpy as np
import pytest
import torch
from test_packing import make_pair
from test_sampler import sample, tokens_of
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3Config

from src.engine import compiler, cpu_layers, cpu_weights, decode_loops
from src.engine.attention import ATTENTION_NAME
from src.engine.cpu_layers import LoopAttention, LoopOperations
from src.engine.cuda_decoding import layout_for
from src.engine.decode_loops import shape_for
from src.engine.decoding import GroupedAttention
from src.engine.layers import layers_for, outcome_of_each
from src.engine.operations import Operations
from src.engine.sampler import SlotDecoder

HAS_LOOPS = shutil.which("cc") is not None and shape_for(torch.float32) is not None
needs_loops = pytest.mark.skipif(not HAS_LOOPS, reason="there is no AVX2 or no C compiler")
needs_halves = pytest.mark.skipif(not HAS_LOOPS or not shape_for(torch.bfloat16), reason="no loops in bf16 here")
in_each = pytest.mark.parametrize(
    "dtype",
    [
        pytest.param(torch.float32, marks=needs_loops, id="fp32"),
        pytest.param(torch.bfloat16, marks=needs_halves, id="bf16"),
    ],
)
ROUNDING = {torch.float32: 1e-5, torch.bfloat16: 2**-8}  # relative, of one result


@pytest.fixture
def small_ones_too(monkeypatch):
    monkeypatch.setattr(decode_loops, "WORTH_COMPILING", 0)


def numbers(*shape: int, dtype=torch.float32, draw=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(1000 * draw + sum(shape))).to(dtype)


def make(kind=LlamaConfig, dtype=torch.float32, **changes):
    """A random model whose norms change something."""
    shape = dict(vocab_size=60, hidden_size=96, intermediate_size=80, num_hidden_layers=2, num_attention_heads=6,
                 num_key_value_heads=2, head_dim=16, attn_implementation=ATTENTION_NAME)  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(kind(**shape | changes), dtype=dtype).eval()
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter.data, 1.0 if "norm" in name else 0.0, 0.3)
    return model


def check_products(dtype, rows, inputs, outputs):
    x, weights = numbers(rows, inputs, dtype=dtype), numbers(outputs, inputs, dtype=dtype)
    for bias in (None, numbers(outputs, dtype=dtype)):
        panels = decode_loops.side_by_side(weights)
        found = decode_loops.product(x, panels, bias, outputs)
        exact = torch.nn.functional.linear(x.double(), weights.double(), None if bias is None else bias.double())
        torch.testing.assert_close(found.double(), exact, rtol=ROUNDING[dtype], atol=1e-6 * inputs)
        for row in range(rows):
            assert torch.equal(decode_loops.product(x[row], panels, bias, outputs), found[row])


@needs_loops
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 8, 15, 33])
@pytest.mark.parametrize("inputs", [1, 7, 96, 1024, 1025, 2500])
@pytest.mark.parametrize("outputs", [1, 23, 24, 25, 100])
def test_a_product_is_that_of_float64_and_a_row_does_not_depend_on_its_neighbours(rows, inputs, outputs):
    check_products(torch.float32, rows, inputs, outputs)


@needs_halves
@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("rows", [1, 7, 8, 15, 16, 17, 32, 33, 70])
@pytest.mark.parametrize("inputs", [32, 96, 2528])
@pytest.mark.parametrize("outputs", [1, 31, 32, 33, 100])
def test_so_is_one_in_bf16(rows, inputs, outputs):
    check_products(torch.bfloat16, rows, inputs, outputs)


@in_each
def test_a_product_takes_any_strides_and_keeps_nan_in_its_row_and_its_output(dtype):
    x, weights = numbers(2, 64, 6, dtype=dtype).transpose(1, 2), numbers(50, 64, dtype=dtype)  # [2, 6, 64] strided
    panels, exact = decode_loops.side_by_side(weights), x.double() @ weights.double().T
    found = decode_loops.product(x, panels, None, 50)
    torch.testing.assert_close(found.double(), exact, rtol=ROUNDING[dtype], atol=1e-5)
    x = x.clone()
    x[1, 2, 39] = torch.nan
    weights[49, 0] = torch.inf
    found = decode_loops.product(x, decode_loops.side_by_side(weights), None, 50)
    broken = torch.zeros(2, 6, 50, dtype=torch.bool)
    broken[1, 2], broken[:, :, 49] = True, True
    assert torch.equal(~found.isfinite(), broken) and bool(found[1, 2].isnan().all())


def exact_attention(query, prompt, own, prompt_lengths, rows, places, scaling):
    """query [n, H, D] in float64, one row and head after the other."""
    output = torch.zeros_like(query, dtype=torch.float64)
    repeats = query.shape[1] // own[0].shape[1]
    for slot, (row, place) in enumerate(zip(rows, places, strict=True)):
        for head in range(query.shape[1]):
            keys, values = (
                torch.cat(
                    [a[row, head // repeats, : prompt_lengths[row]], b[slot, head // repeats, : place + 1]]
                ).double()
                for a, b in zip(prompt, own, strict=True)
            )
            output[slot, head] = (keys @ query[slot, head].double() * scaling).softmax(0) @ values
    return output


@in_each
@pytest.mark.parametrize("repeats", [1, 2, 3, 4, 7, 9])
@pytest.mark.parametrize("vectors", [1, 4, "all"])
def test_attention_is_that_of_float64_and_reads_nothing_behind(repeats, vectors, dtype):
    dim = 256 if vectors == "all" else vectors * shape_for(dtype).lanes
    prompt_lengths, rows, lengths = np.array([1, 64, 150]), np.array([2, 0, 1, 2, 0]), np.array([0, 5, 63, 64, 199])
    prompt = [numbers(1, 3, 2, 150, dim, dtype=dtype, draw=draw) for draw in (1, 2)]
    own = [numbers(5, 2, 200, dim, dtype=dtype, draw=draw) for draw in (1, 2)]
    query = 3 * numbers(5, 2 * repeats, 1, dim, dtype=dtype)
    new = [numbers(5, 2, 1, dim, dtype=dtype, draw=draw) for draw in (1, 2)]
    attention = LoopAttention((*prompt, prompt_lengths), 5, 200)
    for part, values in zip((attention.keys, attention.values), own, strict=True):
        part[0].copy_(values)
        for slot, length in enumerate(lengths):
            part[0][slot, :, length:] = torch.nan
    for part in prompt:
        for row, length in enumerate(prompt_lengths):
            part[0, row, :, length:] = torch.nan
    attention.arrange(rows, lengths, np.zeros(5, dtype=bool))
    attention.begin_step(torch.from_numpy(lengths), torch.from_numpy(lengths + prompt_lengths[rows]))
    found = attention.attend(0, query, *new, dim**-0.5)[:, 0]
    for part, one in zip(own, new, strict=True):
        part[torch.arange(5), :, lengths] = one[:, :, 0]
    exact = exact_attention(query[:, :, 0], [x[0] for x in prompt], own, prompt_lengths, rows, lengths, dim**-0.5)
    torch.testing.assert_close(found.double(), exact, rtol=ROUNDING[dtype], atol=2e-5)
    query[3], keys = torch.nan, attention.keys[0]
    keys[1, 0, 2] = torch.nan
    again = attention.read(0, query[:, :, 0], dim**-0.5)[:, 0]
    assert bool(again[3].isnan().all()) and bool(again[1, :repeats].isnan().all())
    whole = [0, 2, 4]
    assert torch.equal(again[whole], found[whole]) and torch.equal(again[1, repeats:], found[1, repeats:])


@in_each
@pytest.mark.usefixtures("small_ones_too")
@pytest.mark.parametrize("kind", [LlamaConfig, Qwen3Config])
@pytest.mark.parametrize("large", [1, 50])
def test_what_lies_between_is_that_of_torch(kind, large, dtype):
    model = make(kind, dtype)
    layer, plain, loops = model.model.layers[1], Operations(), LoopOperations()
    assert type(layers_for(model).args[0]) is LoopOperations  # positions and norms of heads are tried there
    hidden, update = large * numbers(7, 96, dtype=dtype), large * numbers(7, 96, dtype=dtype).flip(0)
    with torch.inference_mode():
        for given in (None, update):
            found = loops.add_norm(hidden.clone(), given, layer.input_layernorm)
            expected = plain.add_norm(hidden, given, layer.input_layernorm)
            torch.testing.assert_close(found, expected, rtol=ROUNDING[dtype], atol=1e-5)
        found, expected = loops.feed_forward(hidden, layer.mlp), plain.feed_forward(hidden, layer.mlp)
        assert float((found - expected).norm() / expected.norm()) < ROUNDING[dtype] / 10
    small = torch.linspace(-100, 100, 2400).view(30, 80).to(dtype)  # of silu, where e^x leaves the range of a float
    out, ones = torch.empty(30, 80, dtype=dtype), torch.ones(30, 80, dtype=dtype)
    decode_loops.loops(dtype).gated(small.data_ptr(), ones.data_ptr(), out.data_ptr(), 30, 80, 80, 80)
    expected = torch.nn.functional.silu(small.double())
    torch.testing.assert_close(out.double(), expected, rtol=ROUNDING[dtype] / 10 if dtype == torch.float32 else 2**-8,
                               atol=1e-35)  # fmt: skip


@in_each
@pytest.mark.usefixtures("small_ones_too")
@pytest.mark.parametrize("kind", [LlamaConfig, Qwen3Config])
@torch.inference_mode()
def test_each_layers_operations_round_as_torchs(kind, dtype):
    model = make(kind, dtype)
    found, expected = (outcome_of_each(model, operations) for operations in (LoopOperations(), Operations()))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=ROUNDING[dtype], atol=ROUNDING[dtype])
        if dtype == torch.bfloat16:  # they round at the same places: nearly all numbers are the same
            assert float((one != other).float().mean()) < 0.05


@needs_loops
def test_a_row_that_has_ended_stays_within_its_slot_and_other_prompts_find_all_slots():
    prompt = numbers(1, 1, 2, 3, 8), numbers(1, 1, 2, 3, 8), np.array([3])
    attention = LoopAttention(prompt, 4, 5)
    attention.move(torch.tensor([3, 1]))
    attention.arrange(np.zeros(2, dtype=np.int64), np.array([7, 2]), np.array([True, False]))
    attention.begin_step(torch.tensor([7, 2]), torch.tensor([10, 5]))
    assert attention.places.tolist() == [4, 2] and attention.slots.tolist() == [3, 1]
    attention.renew(prompt)
    assert attention.slots.tolist() == [0, 1, 2, 3]


@needs_loops
@pytest.mark.usefixtures("small_ones_too")
@pytest.mark.parametrize("stop_strings", [(), ("zzz",)])
def test_only_live_rows_are_decoded_and_texts_are_read_every_fourth_step(stop_strings, monkeypatch):
    rows, looks, step, stopped = [], [], SlotDecoder.step, SlotDecoder.stopped
    monkeypatch.setattr(SlotDecoder, "step", lambda self: (rows.append(self.rows), step(self)))
    monkeypatch.setattr(SlotDecoder, "stopped", lambda *a: (looks.append(len(rows)), stopped(*a))[1])
    groups = sample(make_pair("qwen3")[0], slots=64, stop_strings=stop_strings)
    lengths = [len(ids) for ids in tokens_of(groups)]
    assert len(set(lengths)) > 3
    needed = sum(length - 1 for length in lengths)  # the first token comes from the prompt
    if stop_strings:
        assert sum(rows) > needed and set(np.diff(sorted(set(looks)))) == {4}
    else:
        assert sum(rows) == needed and not looks


@in_each
def test_nan_stays_whatever_its_bits(dtype):
    bits = torch.tensor([0x7FC00000, 0x7FC00001, 0x7F810001, 0x7FFFFFFF, -1, -0x400000, -0x7EFFFF, -0x7EFFAB]).int()
    lanes = shape_for(dtype).lanes
    nan = bits.view(torch.float32) if dtype == torch.float32 else (bits >> 16).short().view(torch.bfloat16)
    nan = nan.repeat(lanes // 8)  # [lanes]
    ones, out = torch.ones(lanes, dtype=dtype), torch.empty(lanes, dtype=dtype)
    assert bool(nan.isnan().all())
    decode_loops.loops(dtype).gated(nan.data_ptr(), ones.data_ptr(), out.data_ptr(), 1, lanes, lanes, lanes)
    assert bool(out.isnan().all())
    prompt = (*(numbers(1, lanes, 1, 3, lanes, dtype=dtype) for _ in range(2)), np.full(lanes, 3))
    attention, none = LoopAttention(prompt, lanes, 4), torch.zeros(lanes, dtype=torch.long)
    attention.arrange(np.arange(lanes), none.numpy(), np.zeros(lanes, dtype=bool))
    attention.begin_step(none, none + 3)
    query = nan[:, None, None].expand(lanes, 1, lanes).contiguous()
    assert bool(attention.read(0, query, 1.0).isnan().all())


@needs_halves
@pytest.mark.usefixtures("small_ones_too")
def test_in_bf16_a_completion_does_not_depend_on_the_slots():
    model = make_pair("qwen3")[0].bfloat16()
    assert layout_for(model) is LoopAttention and type(layers_for(model).args[0]) is LoopOperations
    few, many = sample(model, slots=3), sample(model, slots=64)
    assert tokens_of(few) == tokens_of(many)
    assert [x.logprobs for g in few for x in g.episodes] == [x.logprobs for g in many for x in g.episodes]


@needs_loops
@pytest.mark.usefixtures("small_ones_too")
def test_they_are_for_this_processor_and_where_nobody_looks(monkeypatch):
    model = make()
    chosen = layers_for(model)
    assert type(chosen.args[0]) is LoopOperations and layout_for(model) is LoopAttention
    assert layout_for(make(head_dim=12)) is GroupedAttention is layout_for(make(head_dim=272))
    assert type(layers_for(make(head_dim=12)).args[0]) is Operations
    assert type(layers_for(model.bfloat16()).args[0]) is LoopOperations and layout_for(model) is LoopAttention
    model.float()
    assert not decode_loops.applies(make(dtype=torch.float64)) and not decode_loops.applies(make(dtype=torch.float16))
    with torch.utils.flop_counter.FlopCounterMode(display=False):
        assert layout_for(model) is GroupedAttention and type(layers_for(model).args[0]) is Operations
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
    assert not cpu_layers.applies(model) and layout_for(model) is GroupedAttention
    monkeypatch.undo()
    assert not decode_loops.applies(model), "a small one is not worth a compiler's second"
    monkeypatch.setattr(decode_loops, "WORTH_COMPILING", 0)
    assert decode_loops.applies(model)
    model.model.norm.bfloat16()
    assert not decode_loops.applies(model), "all of it is read as fp32"


@needs_loops
@pytest.mark.usefixtures("small_ones_too")
@pytest.mark.parametrize("changes", [{"hidden_size": 90}, {"intermediate_size": 77}])
def test_odd_sizes_are_left_to_torch(changes, monkeypatch):
    model = make(**changes)
    assert type(layers_for(model).args[0]) is LoopOperations  # which were tried beside the plain operations
    layer, hidden = model.model.layers[0], numbers(3, model.config.hidden_size)
    monkeypatch.setattr(cpu_layers, "loops", lambda dtype: 1 / 0)  # a loop would read and write behind the end
    with torch.inference_mode():
        if "hidden_size" in changes:
            found, expected = (
                one.add_norm(hidden, hidden, layer.input_layernorm) for one in (LoopOperations(), Operations())
            )
        else:
            found, expected = (one.feed_forward(hidden, layer.mlp) for one in (LoopOperations(), Operations()))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@needs_loops
@pytest.mark.usefixtures("small_ones_too")
@pytest.mark.parametrize("wrong", ["add_norm", "attend", "feed_forward", "activation", "activation of small numbers"])
def test_the_trial_sees_a_wrong_loop(wrong, monkeypatch, caplog):
    model = make()
    if "activation" in wrong:
        model.model.layers[1].mlp.act_fn = torch.nn.GELU()  # the loop knows silu alone
        if wrong != "activation":
            model.model.layers[1].mlp.gate_proj.weight.data *= 1e-5
    else:
        plain = getattr(LoopOperations, wrong)

        def scaled(*arguments):
            found = plain(*arguments)
            return (found[0], 1.001 * found[1]) if wrong == "add_norm" else 1.001 * found

        monkeypatch.setattr(LoopOperations, wrong, scaled)
    with caplog.at_level(logging.WARNING, "grpo"):
        assert type(layers_for(model).args[0]) is Operations
    assert "decoding without the layers' loops in C, which is slower: its trial failed (they give" in caplog.text


@needs_loops
@pytest.mark.usefixtures("small_ones_too")
def test_the_trial_sees_a_layer_whose_forward_is_another():
    model = make()
    plain = model.model.layers[1].mlp.forward
    model.model.layers[1].mlp.forward = lambda hidden: 1.5 * plain(hidden)
    assert type(layers_for(model).args[0]) is Operations


@needs_loops
@pytest.mark.usefixtures("small_ones_too")
@pytest.mark.parametrize("wrong", ["attention", "product"])
def test_attention_and_products_are_tried_too(wrong, monkeypatch, caplog):
    owner, name, trial = {
        "attention": (LoopAttention, "read", cpu_layers.attention_works),
        "product": (decode_loops, "product", decode_loops.product_works),
    }[wrong]
    plain = getattr(owner, name)
    monkeypatch.setattr(owner, name, lambda *arguments: 1.01 * plain(*arguments))
    trial.cache_clear()
    with caplog.at_level(logging.WARNING, "grpo"):
        assert layout_for(make()) is GroupedAttention is layout_for(make())
    trial.cache_clear()
    (record,) = caplog.records
    assert record.message.startswith(f"{wrong}") and "without loops in C, which is slower" in record.message


@pytest.mark.usefixtures("small_ones_too")
@pytest.mark.parametrize("fault", ["no compiler", "that fails", "no temporary folder"])
def test_without_a_compiler_torch_decodes(fault, monkeypatch, caplog, tmp_path):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    monkeypatch.setenv("PATH", str(tmp_path))
    if fault == "that fails":
        (tmp_path / "cc").write_text("#!/bin/sh\necho it is out of order >&2\nexit 1\n")
        (tmp_path / "cc").chmod(0o755)
    if fault == "no temporary folder":
        (tmp_path / "cc").symlink_to("/bin/true")
        monkeypatch.setattr(compiler.tempfile, "tempdir", str(tmp_path / "none"))
    cached = compiler.loops_of, decode_loops.functions, decode_loops.product_works
    for one in cached:
        one.cache_clear()
    model = make()
    with caplog.at_level(logging.WARNING, "grpo"):
        assert layout_for(model) is GroupedAttention is layout_for(model)
        assert type(layers_for(model).args[0]) is Operations
    for one in cached:
        one.cache_clear()
    assert len(caplog.records) == (fault != "no compiler")
    assert all(
        one.message.startswith("decoding and training without loops in C, which is slower: ") for one in caplog.records
    )
    assert ("it is out of order" in caplog.text) == (fault == "that fails")


@needs_loops
@pytest.mark.usefixtures("small_ones_too")
def test_weights_of_a_rollout_are_copied_for_the_loops_and_not_where_memory_is_short():
    model = make()
    layers = [module for module in model.modules() if isinstance(module, torch.nn.Linear)]
    x = numbers(3, 96)
    expected = model.lm_head(x)
    with torch.inference_mode(), cpu_weights.in_order_of_the_processor(model, 3, 1e12):
        assert all("forward" in vars(layer) for layer in layers)
        torch.testing.assert_close(model.lm_head(x), expected, rtol=1e-5, atol=1e-5)
    with cpu_weights.in_order_of_the_processor(model, 3, 2 * sum(one.nbytes for one in model.parameters())):
        assert not any("forward" in vars(layer) for layer in layers)
