"""Products of bf16 in fp32: against float64, where they are faster, and in a whole model."""

import copy

import pytest
import torch
import torch.nn.functional as F
from test_decode_loops import make, needs_halves, numbers
from test_packing import CONFIGS, make_pair, make_row, parts_of, scores_and_gradients
from test_sampler import sample
from torch import nn

from src.config import Config, LoraConfig, ModelConfig
from src.engine import build, cpu_weights, decode_loops, wide_products
from src.engine.lighter import lighten
from src.engine.models import Float32Head, widen_head
from src.engine.packing import pack
from src.engine.profiling import measured
from src.engine.scoring import score
from src.engine.wide_products import WideLinear, WideProduct, widen

HALF = torch.bfloat16


@pytest.fixture
def faster(monkeypatch):
    monkeypatch.setattr(wide_products, "are_faster", lambda: True)


def layers_of(model) -> list[nn.Linear]:
    return [module for module in model.modules() if isinstance(module, nn.Linear)]


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("largest", [2**24, 40])  # the second: three rows at a time
@pytest.mark.parametrize("shape", [(7, 33), (2, 5, 600), (33,)])
def test_a_layer_and_its_gradients_are_those_of_float64_rounded_once(shape, largest, with_bias, monkeypatch):
    monkeypatch.setattr(wide_products, "LARGEST", largest)
    x, weight = (
        numbers(*shape, dtype=HALF).requires_grad_(),
        numbers(11, shape[-1], dtype=HALF, draw=1).requires_grad_(),
    )
    bias = numbers(11, dtype=HALF).requires_grad_() if with_bias else None
    given = [one for one in (x, weight, bias) if one is not None]
    slope = numbers(*shape[:-1], 11, dtype=HALF, draw=2)
    found = WideProduct.apply(x, weight, bias)
    exact = [one.detach().double().requires_grad_() for one in given]
    expected = F.linear(*exact)
    outcomes = [found, *torch.autograd.grad(found, given, slope)]
    for ours, theirs in zip(outcomes, [expected, *torch.autograd.grad(expected, exact, slope.double())], strict=True):
        assert ours.dtype == HALF
        torch.testing.assert_close(ours.double(), theirs, rtol=2**-8, atol=1e-4)
    frozen = WideProduct.apply(x, weight.detach(), None if bias is None else bias.detach())
    assert torch.equal(torch.autograd.grad(frozen, x, slope)[0], outcomes[1])
    fixed = WideProduct.apply(x.detach(), weight, bias)
    assert torch.equal(torch.autograd.grad(fixed, weight, slope)[0], outcomes[2])
    assert WideProduct.apply(x.detach()[None][:0], weight, bias).shape == (0, *shape[:-1], 11)


@pytest.mark.usefixtures("faster")
def test_a_layer_becomes_one_by_its_class_alone():
    model = make(dtype=HALF)
    names, layers = list(model.state_dict()), layers_of(model)
    widen_head(model)
    widen(model)
    assert {type(layer) for layer in layers} == {WideLinear, Float32Head} and list(model.state_dict()) == names
    assert all(type(layer) is nn.Linear for layer in layers_of(make()))  # fp32
    copied = copy.deepcopy(model)
    widen(copied)
    assert [type(layer) for layer in layers_of(copied)] == [type(layer) for layer in layers]
    with pytest.raises(RuntimeError, match="dtype"):
        layers[0](numbers(3, 96))


@pytest.mark.parametrize(
    ("x86", "capability", "tiles", "dots", "name", "wide"),
    [
        (True, "AVX512", True, True, "Intel Xeon", False),
        (True, "AVX512", False, True, "Intel Xeon", True),
        (True, "AVX512", False, True, "AMD EPYC", False),
        (True, "AVX512", False, False, "Intel Core", True),
        (True, "AVX2", False, False, "AMD EPYC", True),
        (True, "AVX2", False, True, "AMD EPYC", True),  # told to torch by ATEN_CPU_CAPABILITY
        (False, "DEFAULT", False, False, "Apple M2", False),
    ],
)
def test_which_processors_multiply_so(x86, capability, tiles, dots, name, wide, monkeypatch):
    monkeypatch.setattr(wide_products, "X86", x86)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: dots)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"cpu_name": name})
    monkeypatch.setattr(wide_products, "has_tiles", lambda: tiles)
    wide_products.faster_with.cache_clear()
    shape = decode_loops.shape_for(HALF)
    assert wide_products.are_faster() == wide and (shape is None or shape.dots != wide)
    layer = nn.Linear(8, 8).to(HALF)
    widen(layer)
    wide_products.faster_with.cache_clear()
    assert (type(layer) is WideLinear) == wide


@pytest.mark.usefixtures("faster")
@pytest.mark.parametrize("name", list(CONFIGS))
def test_a_model_gives_what_it_gave_but_for_rounding(name):
    plain, wide = (make_pair(name)[0].to(HALF) for _ in range(2))
    widen(wide)
    exact = scores_and_gradients(make_pair(name)[0].to(HALF).double(), torch.float64)
    ours, theirs = scores_and_gradients(wide, HALF), scores_and_gradients(plain, HALF)
    errors = [
        [
            float((one.detach().double() - other.detach()).norm() / other.detach().norm())
            for one, other in zip(found, exact, strict=True)
        ]
        for found in (ours, theirs)
    ]
    assert sum(errors[0]) < 1.1 * sum(errors[1])  # sums are fp32 in both
    assert max(errors[0]) < 1.2 * max(errors[1])


@needs_halves
@pytest.mark.usefixtures("faster", "capability")
def test_its_parts_are_in_loops_and_its_siblings_are_multiplied_at_once(monkeypatch):
    monkeypatch.setattr(decode_loops, "WORTH_COMPILING", 0)
    model = make_pair("qwen3")[0].to(HALF)
    groups = [len(group) for group in cpu_weights.gathered(model)]
    widen(model)
    assert [len(group) for group in cpu_weights.gathered(model)] == groups and 3 in groups and 2 in groups
    before = scores_and_gradients(copy.deepcopy(model), HALF)
    assert lighten(model, in_loops=True)
    assert all(hasattr(type(part), "plain") for part in parts_of(model, "MLP"))
    for one, other in zip(scores_and_gradients(model, HALF), before, strict=True):
        assert float((one - other).detach().norm()) <= 0.05 * float(other.detach().norm())


@needs_halves
def test_what_is_sampled_has_the_trainers_logprobs(way, monkeypatch):
    """However bf16 is multiplied."""
    monkeypatch.setattr(decode_loops, "WORTH_COMPILING", 0)
    model = make(dtype=HALF)
    widen(model)
    assert (type(model.lm_head) is WideLinear) == way.startswith("wide")
    lighten(model, in_loops=True)
    row = pack(sample(model, 8, slots=5), "cpu", HALF)
    with torch.no_grad():
        mismatch = (row.batch.sampled_logprobs - score(model, row, 1.0).logprobs).abs()
    assert float(mismatch.mean()) < 0.03 and float(mismatch.max()) < 0.3


@pytest.mark.usefixtures("faster")
def test_adapters_stand_on_layers_that_multiply_so():
    peft = pytest.importorskip("peft")
    from src.engine.lora import add_adapter  # here, because only a LoRA run needs peft

    model = make(dtype=HALF)
    widen(model)
    adapted = add_adapter(model, LoraConfig(r=2), 0)
    bases = [module.base_layer for module in adapted.modules() if isinstance(module, peft.tuners.lora.Linear)]
    assert bases and all(type(base) is WideLinear for base in bases)
    score(adapted, make_row(dtype=HALF), 1.0).logprobs.sum().backward()
    assert any(parameter.grad is not None for parameter in adapted.parameters())


@pytest.mark.parametrize("compiled", [True, False])
def test_a_line_says_what_is_faster_where_a_model_is_compiled(compiled, faster, caplog):
    config = Config(ModelConfig(device="cpu", dtype="bfloat16", compile=compiled))
    build.check_machine(config, for_training=False)
    assert ("set model.dtype: float32, or model.compile: false" in caplog.text) == compiled
    config.model.dtype = "float32"
    caplog.clear()
    build.check_machine(config, for_training=False)
    assert not caplog.text


def test_its_products_are_counted_by_a_profile():
    x, weight = (numbers(*shape, dtype=HALF).requires_grad_() for shape in ((4, 8), (16, 8)))
    counted = measured(lambda: WideProduct.apply(x, weight, None).sum().backward() or 1, torch.device("cpu"), True)[0]
    assert sum(counted.flops.values()) == 3 * 2 * 4 * 8 * 16
