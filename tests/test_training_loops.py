"""The loops of C of an update against autograd in float64, and where they are used."""

import copy
import logging

import pytest
import torch
import torch.nn.functional as F
from test_decode_loops import ROUNDING, in_each, needs_loops, numbers
from test_packing import CONFIGS, make_pair, make_row, parts_of, scores_and_gradients
from transformers import AutoModelForCausalLM, GPTNeoXConfig
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

from src.config import LoraConfig
from src.engine import decode_loops, lighter, statistics, training_loops
from src.engine.decode_loops import shape_for
from src.engine.lighter import lighten, loop_mlp, loop_norm
from src.engine.scoring import score
from src.engine.training_loops import LoopGatedProduct, LoopNorm, LoopTurn

pytestmark = pytest.mark.usefixtures("capability")
WIDTH = 96  # whole vectors of any processor


def exact(function, *inputs):
    """Its result, and the gradients by the inputs that want one, in float64 and with this slope."""
    *tensors, slope = inputs
    tensors = [x.detach().double().requires_grad_(x.requires_grad) for x in tensors]
    result = function(*tensors)
    wanted = [x for x in tensors if x.requires_grad]
    return [result, *torch.autograd.grad(result, wanted, slope.double())]


def ours(function, *inputs):
    *tensors, slope = inputs
    result = function(*tensors)
    return [result, *torch.autograd.grad(result, [x for x in tensors if x.requires_grad], slope)]


def check(found, expected, dtype, factor=4.0):
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == dtype and one.shape == other.shape
        assert float((one.double() - other).detach().norm()) <= factor * ROUNDING[dtype] * float(other.detach().norm())


def wanting(*shape, dtype, scale=1.0):
    return (scale * numbers(*shape, dtype=dtype)).requires_grad_()


@in_each
@pytest.mark.parametrize("rows", [1, 5, 16, 41])
@pytest.mark.parametrize("scale", [1e-3, 1, 100])
def test_a_norm_and_its_gradient(rows, scale, dtype):
    hidden, weight = wanting(2, rows, WIDTH, dtype=dtype, scale=scale), wanting(WIDTH, dtype=dtype)
    slope = numbers(WIDTH, rows, 2, dtype=dtype).transpose(0, 2)  # strided

    def norm(x, w):
        return w * x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt()

    found = ours(lambda x, w: LoopNorm.apply(x, w, 1e-6), hidden, weight, slope)
    check(found, exact(norm, hidden, weight, slope), dtype)
    frozen = weight.detach()
    alone = ours(lambda x, w: LoopNorm.apply(x, w, 1e-6), hidden, frozen, slope)
    assert len(alone) == 2 and torch.equal(alone[1], found[1])


@in_each
@pytest.mark.parametrize("scale", [1e-3, 1, 50])
def test_a_gated_product_and_its_gradient(scale, dtype):
    gate, up = wanting(2, 7, WIDTH, dtype=dtype, scale=scale), wanting(7, 2, WIDTH, dtype=dtype).transpose(0, 1)
    weight, slope = wanting(5, WIDTH, dtype=dtype), numbers(2, 7, 5, dtype=dtype)

    def product(gate, up, weight):
        return F.linear(F.silu(gate) * up, weight)

    inputs = gate, up.detach().requires_grad_(), weight, slope
    found = ours(LoopGatedProduct.apply, *inputs)
    check(found, exact(product, *inputs), dtype, factor=8)
    assert len(ours(LoopGatedProduct.apply, *inputs[:2], weight.detach(), slope)) == 3


@in_each
@pytest.mark.parametrize("batches", [1, 2])
def test_positions_and_their_gradient(batches, dtype):
    query, slope = wanting(2, 3, 7, 32, dtype=dtype), numbers(2, 3, 7, 32, dtype=dtype, draw=1)  # [B, heads, T, D]
    angle = numbers(batches, 7, 16).repeat(1, 1, 2)  # [B or 1, T, D]
    cosine, sine = angle.cos().to(dtype), angle.sin().to(dtype)
    found = ours(lambda x: lighter.loop_turn(None, x, x.detach(), cosine, sine)[0], query, slope)
    check(found, exact(lambda x: apply_rotary_pos_emb(x, x, cosine.double(), sine.double())[0], query, slope), dtype)
    assert torch.equal(found[0], apply_rotary_pos_emb(query, query, cosine, sine)[0]) or dtype == torch.float32


@needs_loops
def test_positions_of_other_shapes_are_left_to_the_model():
    query, cosine, long = numbers(2, 3, 7, 32), numbers(2, 7, 32), numbers(1, 1, 2, 320)
    for given in ((cosine[..., :16],) * 2, (cosine[:, :6],) * 2, (cosine, cosine[:1]), (cosine, cosine, 2)):
        assert lighter.loop_turn(lambda *a: "plain", query, query, *given) == "plain"
    assert lighter.loop_turn(lambda *a: "plain", long, long, numbers(1, 2, 320), numbers(1, 2, 320)) == "plain"
    assert lighter.loop_turn(None, query, query, cosine, cosine)[0].shape == query.shape


def entropy_and_chosen(logits, target):
    logprobs = logits.log_softmax(-1)
    return logprobs.gather(-1, target)[:, 0], -(logprobs.exp() * logprobs).sum(-1)


@in_each
@pytest.mark.parametrize("vocabulary", [1, 7, 16, 33, 129, 3000])
@pytest.mark.parametrize("scale", [1, 30])
def test_statistics_of_logits_and_their_gradient(vocabulary, scale, dtype):
    logits = (scale * numbers(9, vocabulary) + 20).to(dtype)
    target = torch.arange(9)[:, None] * 7919 % vocabulary
    target[0] = vocabulary - 1
    of_chosen, of_entropy = numbers(9), numbers(9).flip(0)
    chosen, entropy, normalizer = training_loops.statistics(logits, target)
    exact_logits = logits.double().requires_grad_()
    expected = entropy_and_chosen(exact_logits, target)
    torch.testing.assert_close(chosen.double(), expected[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(entropy.double(), expected[1], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(normalizer.double(), exact_logits.logsumexp(-1, keepdim=True), rtol=1e-6, atol=1e-6)
    for slopes in ((of_chosen, of_entropy), (of_chosen, None), (None, of_entropy)):
        found = training_loops.statistics_gradient(logits, target, normalizer, entropy, *slopes)
        outputs, given = zip(*((a, b) for a, b in zip(expected, slopes, strict=True) if b is not None), strict=True)
        (gradient,) = torch.autograd.grad(outputs, exact_logits, [x.double() for x in given], retain_graph=True)
        assert found.dtype == dtype
        torch.testing.assert_close(found.double(), gradient, rtol=ROUNDING[dtype], atol=2e-5)


@in_each
def test_many_small_weights_beside_a_large_one_are_not_lost(dtype):
    logits = torch.zeros(1, 151936, dtype=dtype)
    logits[0, 0] = 17.25  # the others have half a percent together, 4e-8 each
    target = torch.zeros(1, 1, dtype=torch.long)
    chosen, entropy, _ = training_loops.statistics(logits, target)
    expected = entropy_and_chosen(logits.double(), target)
    torch.testing.assert_close(chosen.double(), expected[0], rtol=5e-3, atol=0)
    torch.testing.assert_close(entropy.double(), expected[1], rtol=5e-3, atol=0)


@in_each
def test_what_is_not_finite_stays_in_its_row(dtype):
    logits, target = numbers(6, 40, dtype=dtype), torch.arange(6)[:, None]
    before = training_loops.statistics(logits, target)
    logits[1, 39], logits[3, 0], logits[4, 7] = torch.nan, torch.inf, -torch.inf
    after = training_loops.statistics(logits, target)
    for one, other in zip(before[:2], after[:2], strict=True):
        assert torch.equal(one[[0, 2, 5]], other[[0, 2, 5]]) and not bool(other[[1, 3]].isfinite().any())
    assert bool(after[0][4].isfinite())  # another token may be impossible: of the log-prob there is a gradient
    gradient = training_loops.statistics_gradient(logits, target, after[2], after[1], torch.ones(6), None)
    assert bool(gradient[[0, 2, 4, 5]].isfinite().all()) and not bool(gradient[1].isfinite().any())
    hidden, weight = wanting(3, WIDTH, dtype=dtype), wanting(WIDTH, dtype=dtype)
    with torch.no_grad():
        hidden[1, 95] = torch.nan
    found, of_hidden, _ = ours(lambda x, w: LoopNorm.apply(x, w, 1e-6), hidden, weight, numbers(3, WIDTH, dtype=dtype))
    for result in (found, of_hidden):
        assert result.isnan().any(1).tolist() == [False, True, False] and bool(result[1].isnan().all())


@in_each
def test_no_bit_depends_on_the_number_of_threads(dtype):
    def everything():
        hidden, weight = wanting(300, WIDTH, dtype=dtype), wanting(WIDTH, dtype=dtype)
        found = ours(lambda x, w: LoopNorm.apply(x, w, 1e-6), hidden, weight, numbers(300, WIDTH, dtype=dtype).flip(0))
        logits, target = numbers(50, 700, dtype=dtype), torch.arange(50)[:, None]
        return found + list(training_loops.statistics(logits, target))

    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = everything()
        torch.set_num_threads(3)
        assert all(torch.equal(a, b) for a, b in zip(alone, everything(), strict=True))
    finally:
        torch.set_num_threads(threads)


@in_each
@pytest.mark.parametrize("name", list(CONFIGS))
def test_a_model_in_loops_gives_the_same_scores_and_gradients(name, dtype):
    plain, lighter_one = (make_pair(name)[0].to(dtype) for _ in range(2))
    norms, gated = parts_of(lighter_one, "Norm"), parts_of(lighter_one, "MLP")
    lighten(lighter_one, in_loops=True)
    whole = [norm for norm in norms if len(norm.weight) % shape_for(dtype).lanes == 0]
    assert all(type(norm).forward is loop_norm for norm in whole) and whole
    assert all(type(mlp).forward is loop_mlp for mlp in gated) and gated
    assert {hasattr(type(part), "plain") for part in parts_of(lighter_one, "Attention")} == {True}
    rounding = 1e-5 if dtype == torch.float32 else 0.05
    for theirs, found in zip(*(scores_and_gradients(model, dtype) for model in (plain, lighter_one)), strict=True):
        assert (found - theirs).norm() <= rounding * theirs.norm()
    assert copy.deepcopy(lighter_one).state_dict().keys() == plain.state_dict().keys()
    assert lighten(lighter_one, in_loops=True) == 0


@in_each
@pytest.mark.parametrize("target", [-1, 60, -100])
def test_a_target_that_is_no_token_is_refused(target, dtype):
    targets = torch.tensor([3, target, 59])
    with pytest.raises(IndexError, match="no token of a vocabulary of 60"):
        training_loops.statistics(numbers(3, 60, dtype=dtype), targets[:, None])


@needs_loops
@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("kind", ["Norm", "MLP", "Attention"])
@pytest.mark.parametrize("which", [0, -1])
def test_a_loop_that_is_wrong_is_not_taken(direction, kind, which, monkeypatch):
    owner = {"Norm": LoopNorm, "MLP": LoopGatedProduct, "Attention": LoopTurn}[kind]
    plain = getattr(owner, direction)

    def scaled(*arguments):
        found = plain(*arguments)
        if not isinstance(found, tuple):
            return 1.01 * found
        last = max(index for index, one in enumerate(found) if one is not None)
        wrong = last if which else 0  # a gradient by the weight, or by what goes in
        return tuple(1.01 * one if index == wrong else one for index, one in enumerate(found))

    model = make_pair("qwen3")[0]
    monkeypatch.setattr(owner, direction, staticmethod(scaled))
    lighten(model, in_loops=True)
    for word in ("Norm", "MLP", "Attention"):
        assert all(hasattr(type(part), "plain") == (word != kind) for part in parts_of(model, word))


@needs_loops
@pytest.mark.parametrize("checkpointing", [False, True])
def test_adapters_in_loops_have_the_same_gradients(checkpointing):
    from src.engine.lora import add_adapter  # here, because only a LoRA run needs peft

    found = []
    for in_loops in (False, True):
        model = make_pair("qwen3")[0]
        if in_loops:
            assert lighten(model, in_loops=True)
        torch.manual_seed(1)
        adapted = add_adapter(model, LoraConfig(r=2, target_modules=["q_proj", "up_proj", "down_proj"]), 0)
        if checkpointing:
            adapted.gradient_checkpointing_enable({"use_reentrant": False})
            adapted.train()
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter.data, 0.0, 0.1)
        score(adapted, make_row(), 1.0).logprobs.sum().backward()
        found.append([parameter.grad for parameter in adapted.parameters() if parameter.requires_grad])
    assert len(found[0]) > 6
    for theirs, ours_ in zip(*found, strict=True):
        assert float((ours_ - theirs).norm()) <= 1e-4 * float(theirs.norm())


@needs_loops
def test_attentions_that_turn_in_another_way_stay_as_they_are():
    neox = AutoModelForCausalLM.from_config(GPTNeoXConfig(vocab_size=60, hidden_size=64, intermediate_size=64,
        num_hidden_layers=1, num_attention_heads=2), dtype=torch.float32)  # fmt: skip
    assert not hasattr(neox.gpt_neox.layers[0].attention, "head_dim")
    lighten(neox, in_loops=True)
    assert not hasattr(type(neox.gpt_neox.layers[0].attention), "plain")
    calls = []

    def plain(*given, **named):
        calls.append((len(given), tuple(named)))
        return "plain"

    x, angle = numbers(1, 2, 5, 32), numbers(1, 5, 32)
    assert lighter.loop_turn(plain, x, x, angle, angle, unsqueeze_dim=1) == "plain"
    assert lighter.loop_turn(plain, x, cosine=angle, sine=angle) == "plain"
    assert lighter.loop_turn(plain, x, angle, angle) == "plain"
    assert calls == [(4, ("unsqueeze_dim",)), (1, ("cosine", "sine")), (3, ())]


@needs_loops
def test_a_rollout_multiplies_in_its_own_way_behind_a_gated_product():
    model = make_pair("llama")[0]
    mlp, hidden = parts_of(model, "MLP")[0], numbers(3, 32)
    lighten(model, in_loops=True)
    with torch.no_grad():
        expected = mlp(hidden)
        vars(mlp.down_proj)["forward"] = lambda x: 2 * F.linear(x, mlp.down_proj.weight)
        torch.testing.assert_close(mlp(hidden), 2 * expected)


@needs_loops
def test_statistics_that_are_wrong_are_not_taken(monkeypatch, caplog):
    logits = numbers(3, 100)
    monkeypatch.setattr(statistics, "FEWEST", 0)
    measured, gradient = training_loops.statistics, training_loops.statistics_gradient
    for name, wrong in (
        ("statistics", lambda *given: (1.01 * measured(*given)[0], *measured(*given)[1:])),
        ("statistics_gradient", lambda *given: 1.01 * gradient(*given)),
    ):
        with monkeypatch.context() as patch, caplog.at_level(logging.WARNING, "grpo"):
            patch.setattr(training_loops, name, wrong)
            statistics.loops_agree.cache_clear()
            assert not statistics.loops_work(logits, None)
    statistics.loops_agree.cache_clear()
    assert len(caplog.records) == 2 and "statistics of logits without loops in C, which is slower" in caplog.text
    assert statistics.loops_work(logits, None) and not statistics.loops_work(logits, logits.double())


@needs_loops
def test_where_operations_are_looked_at_or_sizes_are_odd_torch_computes(monkeypatch):
    model = make_pair("llama")[0]
    lighten(model, in_loops=True)
    monkeypatch.setattr(training_loops, "loops", lambda dtype: 1 / 0)
    with torch.utils.flop_counter.FlopCounterMode(display=False), torch.no_grad():
        score(model, make_row(), 1.0)
    with pytest.raises(ZeroDivisionError):
        score(model, make_row(), 1.0)
    norm = LlamaRMSNorm(90)
    assert torch.equal(loop_norm(norm, numbers(3, 90)), norm(numbers(3, 90)))
    assert decode_loops.apply_to(numbers(3, 90), whole=False) and not decode_loops.apply_to(numbers(3, 90))
    assert not decode_loops.apply_to(numbers(3, 96).double()) and not decode_loops.apply_to(
        numbers(3, 96), numbers(3, 96).bfloat16()
    )


@needs_loops
def test_statistics_are_in_loops_where_there_are_many_logits_and_no_kl(monkeypatch):
    assert statistics.loops_agree(torch.float32)  # its trial calls too
    calls, plain = [], training_loops.statistics
    monkeypatch.setattr(training_loops, "statistics", lambda *a: (calls.append(len(a[0])), plain(*a))[1])
    model = make_pair("llama")[0]
    row = make_row()
    few = score(model, row, 1.0, model)
    assert not calls
    monkeypatch.setattr(statistics, "FEWEST", 0)
    many = score(model, row, 1.0, model)
    assert len(calls) == 2  # policy and anchor
    for one, other in (
        (few.logprobs, many.logprobs),
        (few.entropy, many.entropy),
        (few.anchor_logprobs, many.anchor_logprobs),
    ):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    gradients = [torch.autograd.grad((x.logprobs + x.entropy).sum(), list(model.parameters())) for x in (few, many)]
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    score(model, row, 1.0, model, {"kl": "reverse"})
    assert len(calls) == 2
