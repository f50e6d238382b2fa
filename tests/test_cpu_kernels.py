"""What only a CPU runs: in bf16 attention by matrix products, and weights in the order of the processor."""

from unittest.mock import patch

import pytest
import torch
from test_packing import make_pair
from test_sampler import sample, tokens_of
from torch.nn.functional import scaled_dot_product_attention

from src.config import LoraConfig
from src.engine import cpu_attention, cpu_weights
from src.engine.cpu_weights import gathered, in_order_of_the_processor
from src.engine.packing import pack
from src.engine.scoring import score


def make_attention(segments=5, heads=6, kv_heads=2, width=11, prefix=7, head_dim=16):
    """Query, key and value in bf16, laid out as the packed row gives them, and the mask of a ragged tile."""
    generator = torch.Generator().manual_seed(2)

    def states(count: int, length: int):
        flat = torch.randn(segments, length, count, head_dim, generator=generator)
        return flat.bfloat16().transpose(1, 2).requires_grad_()  # [S, heads, length, D], not contiguous

    visible = torch.ones(segments, 1, width, prefix + width, dtype=torch.bool).tril(prefix)
    for segment in range(segments):
        visible[segment, :, :, segment:prefix] = False  # prompts of other lengths
    mask = torch.zeros(visible.shape).masked_fill_(~visible, -torch.inf)
    return states(heads, width), states(kv_heads, prefix + width), states(kv_heads, prefix + width), mask


@pytest.mark.parametrize("largest", [2**25, 6 * 11 * 18 * 2])
def test_attention_and_its_gradients_are_as_near_to_float64_as_torchs_own(largest):
    query, key, value, mask = make_attention()
    of_output = torch.randn(query.shape, generator=torch.Generator().manual_seed(3)).bfloat16()

    def outcome(function, *inputs):
        output = function(*inputs)
        return [output, *torch.autograd.grad(output, inputs, of_output.to(output.dtype))]

    def reference(query, key, value):
        return scaled_dot_product_attention(
            query, key, value, attn_mask=mask.to(query.dtype), scale=0.3, enable_gqa=True
        )

    exact = outcome(reference, *(x.detach().double().requires_grad_() for x in (query, key, value)))
    theirs = outcome(reference, query, key, value)
    with patch.object(cpu_attention, "LARGEST", largest):  # the second cuts the segments into calls of two
        ours = outcome(lambda *inputs: cpu_attention.attend(*inputs, mask, 0.3), query, key, value)
    for a, b, expected in zip(ours, theirs, exact, strict=True):
        error, their_error = ((x.double() - expected).norm() / expected.norm() for x in (a, b))
        assert error < 0.004 and error < 1.5 * their_error


def test_products_of_bf16_numbers_are_not_rounded_and_the_setting_is_put_back():
    left, right = torch.randn(2, 9, 64).bfloat16(), torch.randn(2, 64, 33).bfloat16()
    before = torch.backends.mkldnn.matmul.fp32_precision
    product = cpu_attention.product(left, right)
    assert torch.backends.mkldnn.matmul.fp32_precision == before
    expected = left.double() @ right.double()
    assert product.dtype == torch.float32 and float((product - expected).abs().max()) < 1e-4
    assert float((left @ right - expected).abs().max()) > 1e-2  # what rounding would do


def test_long_segments_and_other_precisions_are_left_to_torch():
    query, key, _, _ = make_attention()
    assert cpu_attention.applies(query, key)
    assert not cpu_attention.applies(query.float(), key.float())
    with patch.object(cpu_attention, "LARGEST", 6 * 11 * 18 - 1):
        assert not cpu_attention.applies(query, key)


@pytest.fixture(params=["llama", "qwen2", "granite"])
def bf16_model(request):
    return make_pair(request.param)[0].to(torch.bfloat16)


@pytest.fixture
def small_ones_too(monkeypatch):
    monkeypatch.setitem(cpu_weights.SMALLEST, torch.float32, 0)


def has(dtype: torch.dtype):
    """A test that needs weights in the order of the processor."""
    reason = f"this processor has no products in {dtype}"
    return pytest.param(dtype, marks=pytest.mark.skipif(not cpu_weights.has_products(dtype), reason=reason))


every_dtype = pytest.mark.parametrize("dtype", [has(torch.bfloat16), has(torch.float32)])


def check_mismatch(model, temperature: float) -> None:
    """What is sampled has the trainer's log-probs."""
    row = pack(sample(model, 8, slots=5, temperature=temperature), "cpu", model.dtype)
    with torch.no_grad():
        mismatch = (row.batch.sampled_logprobs - score(model, row, temperature).logprobs).abs()
    most, mean = (0.5, 0.03) if model.dtype == torch.bfloat16 else (1e-4, 1e-5)
    assert float(mismatch.mean()) < mean and float(mismatch.max()) < most
    assert not any("forward" in vars(module) for module in model.modules())  # the copies are taken away


def test_what_is_sampled_has_the_trainers_logprobs(bf16_model):
    with patch.object(cpu_weights, "applies", lambda *_: False):
        check_mismatch(bf16_model, 0.9)


@every_dtype
@pytest.mark.usefixtures("small_ones_too")
def test_what_is_sampled_by_reordered_weights_has_the_trainers_logprobs_also_after_an_update(bf16_model, dtype):
    model = bf16_model.to(dtype)
    assert cpu_weights.applies(model, 1e12)
    check_mismatch(model, 0.9)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(-0.7)
    check_mismatch(model, 1.0)


@every_dtype
@pytest.mark.usefixtures("small_ones_too")
def test_siblings_are_multiplied_once_and_every_linear_layer_is_replaced(bf16_model, dtype):
    bf16_model.to(dtype)
    layers = [module for module in bf16_model.modules() if isinstance(module, torch.nn.Linear)]
    assert {id(layer) for group in gathered(bf16_model) for layer in group} == {id(layer) for layer in layers}
    calls = []
    operator = torch.ops.mkldnn._linear_pointwise
    original = operator.default
    hidden = torch.randn(3, 1, 32).to(dtype)
    attention = bf16_model.get_decoder().layers[0].self_attn
    siblings = [attention.q_proj, attention.k_proj, attention.v_proj]
    with (
        torch.inference_mode(),
        patch.object(operator, "default", lambda *a: (calls.append(1), original(*a))[1]),
        in_order_of_the_processor(bf16_model, 4, 1e12),
    ):
        assert all("forward" in vars(layer) for layer in layers)
        together = [layer(hidden) for layer in siblings]
        attention.q_proj(hidden)
        other = attention.k_proj(hidden + 1)  # another tensor: not the part of the first
    with torch.no_grad():
        assert len(calls) == 3
        for layer, part in zip(siblings, together, strict=True):
            torch.testing.assert_close(part, layer(hidden), atol=0.01, rtol=0.01)
        torch.testing.assert_close(other, attention.k_proj(hidden + 1), atol=0.01, rtol=0.01)


@every_dtype
@pytest.mark.usefixtures("small_ones_too")
def test_reordering_is_left_out_where_memory_is_short_and_an_error_takes_the_copies_away(bf16_model, dtype):
    bf16_model.to(dtype)
    with pytest.raises(ZeroDivisionError), in_order_of_the_processor(bf16_model, 4, 1e12):
        assert any("forward" in vars(module) for module in bf16_model.modules())
        1 / 0  # noqa: B018
    assert not any("forward" in vars(module) for module in bf16_model.modules())
    assert cpu_weights.applies(bf16_model, 1e12)
    assert not cpu_weights.applies(bf16_model, 3 * sum(p.nbytes for p in bf16_model.parameters()))
    assert not cpu_weights.applies(bf16_model.double(), 1e12)
    cpu_weights.SMALLEST[torch.float32] = 2**25
    assert not cpu_weights.applies(bf16_model.float(), 1e12), "one that a cache holds"


@every_dtype
@pytest.mark.usefixtures("small_ones_too")
def test_an_adapters_base_layers_are_reordered_one_by_one(dtype):
    from src.engine.lora import add_adapter  # here, because it imports peft

    model = add_adapter(make_pair("llama")[0].to(dtype), LoraConfig(r=2), 0)
    groups = gathered(model)
    assert all(len(group) == 1 for group in groups) and len(groups) > 14
    with torch.inference_mode(), in_order_of_the_processor(model, 4, 1e12):
        assert sum("forward" in vars(module) for module in model.modules()) == len(groups)
    assert len(tokens_of(sample(model, 2))) == 12


def test_a_processor_without_bf16_arithmetic_samples_all_the_same(bf16_model, monkeypatch):
    monkeypatch.setattr(cpu_weights, "has_products", lambda *_: False)
    assert not cpu_weights.applies(bf16_model, 1e12)
    check_mismatch(bf16_model, 1.0)
