"""MemoryEfficientAdamW against torch's AdamW: exact where it must be, unbiased where it rounds, 7 bytes a parameter."""

import logging
import math
import shutil
from importlib.util import find_spec

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from src.engine import MemoryEfficientAdamW, kernels, optim, optim_loop
from src.engine.optim import build_optimizer
from src.engine.optim_chunks import CHUNK_ELEMENTS, coefficients
from src.engine.optim_codes import BLOCK, decode_8bit, decode_master, decoded, encode_8bit, encode_master, encoded

FORMATS = {f"{m}/{s}": dict(master_bits=m, state_bits=s) for m in (24, 32) for s in (8, 16, 32)}
every_format = pytest.mark.parametrize("bits", FORMATS.values(), ids=FORMATS)
SHAPES = [(7, 19), (300,), (), (64, 128), (1,)]


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(before)


def make_parameters(dtype=torch.bfloat16, shapes=SHAPES, scale=0.05):
    return [nn.Parameter((torch.randn(shape) * scale).to(dtype)) for shape in shapes]


def copies_of(parameters):
    return [nn.Parameter(parameter.detach().clone()) for parameter in parameters]


def set_gradients(parameters, generator, scale=1.0):
    for parameter in parameters:
        parameter.grad = (torch.randn(parameter.shape, generator=generator) * scale).to(parameter.dtype)


def steps(optimizer, parameters, count, seed=1, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        set_gradients(parameters, generator, scale)
        optimizer.step()


def bits_of(tensor):
    return tensor.detach().reshape(-1).view(torch.uint8)


def same_bits(left, right):
    return all(torch.equal(bits_of(a), bits_of(b)) for a, b in zip(left, right, strict=True))


def tensors_in(optimizer):
    return [value for state in optimizer.state_dict()["state"].values() for value in state.values()]


# --- the same mathematics as torch --------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk_elements", [None, 3 * BLOCK])
def test_32_32_is_bit_identical_to_fp32_adamw_for_1000_steps(chunk_elements):
    parameters = make_parameters()
    references = [nn.Parameter(parameter.detach().float()) for parameter in parameters]
    options = dict(lr=3e-3, betas=(0.9, 0.99), weight_decay=0.1)
    ours = MemoryEfficientAdamW(parameters, **options, master_bits=32, state_bits=32)
    ours.chunk_elements = chunk_elements
    theirs = torch.optim.AdamW(references, **options, fused=True)
    generator = torch.Generator().manual_seed(1)
    for step in range(1000):
        set_gradients(parameters, generator, scale=0.1 + step % 7)
        for parameter, reference in zip(parameters, references, strict=True):
            reference.grad = parameter.grad.float()
        ours.step()
        theirs.step()
        if step % 100 == 99:
            assert same_bits(ours.master_weights(), references)
    assert not torch.equal(references[0], make_parameters()[0].float())
    for parameter, reference in zip(parameters, references, strict=True):  # the bf16 weight is the nearest to it
        nearest = reference.to(torch.bfloat16)
        tie = (reference.view(torch.int32) & 0xFFFF) == 0x8000
        assert torch.equal(parameter[~tie], nearest[~tie])


@pytest.mark.parametrize("offload", [False, True])
def test_fp32_parameters_equal_torch_fused_to_the_bit_also_where_one_has_no_gradient(offload):
    ours = make_parameters(torch.float32)
    theirs = copies_of(ours)
    for parameters, make in (
        (ours, lambda p: MemoryEfficientAdamW(p, state_bits=32, weight_decay=0.01, offload=offload)),
        (theirs, lambda p: torch.optim.AdamW(p, weight_decay=0.01, fused=True)),
    ):
        optimizer, generator = make(parameters), torch.Generator().manual_seed(1)
        for step in range(300):
            set_gradients(parameters, generator)
            if step < 30:
                parameters[step % 5].grad = None
            optimizer.step()
    assert same_bits(ours, theirs)


@every_format
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_first_step_with_a_gradient_as_small_as_eps(dtype, bits):
    """|g| = 1e-7: the step is lr * g / (|g| + eps) = 0.909 lr; eps before the bias correction would make it 0.24 lr."""
    parameters = [nn.Parameter(torch.zeros(1000, dtype=dtype))]
    parameters[0].grad = torch.full_like(parameters[0], 1e-7)
    optimizer = MemoryEfficientAdamW(parameters, lr=1e-3, **bits)
    optimizer.step()
    gradient = parameters[0].grad[0].item()
    expected = -1e-3 * gradient / (gradient + 1e-8)
    assert optimizer.master_weights()[0].mean().item() == pytest.approx(expected, rel=1e-4)


@every_format
def test_results_do_not_depend_on_how_the_flat_states_are_cut_or_staged(bits):
    """Staged is what `offload` does on CUDA, here without streams: the states pass through two small buffers."""
    results = []
    for chunk_elements, staged in ((BLOCK, False), (5 * BLOCK, False), (5 * BLOCK, True), (None, False)):
        torch.manual_seed(0)
        parameters = make_parameters() + make_parameters(torch.float32)
        optimizer = MemoryEfficientAdamW(parameters, lr=1e-2, offload=staged, **bits)
        optimizer.chunk_elements = chunk_elements
        for shard in optimizer.shards[0]:
            assert not shard.staged  # on a CPU the option is a no-op ...
            shard.staged = staged  # ... unless forced
        steps(optimizer, parameters, 20)
        results.append(parameters + [value for p in parameters for value in optimizer.state[p].values()])
    assert all(same_bits(result, results[0]) for result in results[1:])


# --- the master weight's encoding ---------------------------------------------------------------------------------


def encode(bits, correction_dtype, dither=0):
    """fp32 bits -> (bf16 bits as int32, correction)."""
    bits, correction = bits.clone(), torch.empty(bits.shape, dtype=correction_dtype)
    encode_master(correction, bits, torch.full_like(bits, dither))
    return bits.to(torch.int16).to(torch.int32), correction


PATTERNS = st.one_of(
    st.integers(-(2**31), 2**31 - 1),
    st.builds(
        lambda sign, exponent, mantissa: (sign << 31 | exponent << 23 | mantissa) - (sign << 32),
        st.integers(0, 1),
        st.sampled_from([0, 1, 127, 253, 254]),
        st.sampled_from([0, 1, 0x7F, 0x80, 0x7FFF, 0x8000, 0x8001, 0x18000, 0x7F8000, 0x7FFFFF]),
    ),
)


@given(st.lists(PATTERNS, min_size=1, max_size=64))
@settings(max_examples=200, deadline=None)
def test_16_extra_bits_restore_every_finite_fp32_and_infinity(patterns):
    bits = torch.tensor(patterns, dtype=torch.int32)
    values = bits.view(torch.float32)
    bits = bits[~values.isnan()]
    values = values[~values.isnan()]
    upper, correction = encode(bits, torch.int16)
    weight = upper.to(torch.int16).view(torch.bfloat16)
    nearest, tie = values.to(torch.bfloat16), (bits & 0xFFFF) == 0x8000
    assert torch.equal(bits_of(weight[~tie]), bits_of(nearest[~tie]))
    decode_master(correction, upper)
    assert torch.equal(upper, bits)


@given(st.lists(PATTERNS, min_size=1, max_size=64), st.integers(0, 255))
@settings(max_examples=200, deadline=None)
def test_8_extra_bits_restore_a_24_bit_master_and_round_within_one_unit(patterns, dither):
    bits = torch.tensor(patterns, dtype=torch.int32)
    bits = bits[~bits.view(torch.float32).isnan()]
    upper, correction = encode(bits, torch.int8, dither)
    decode_master(correction, upper)
    error = upper.long() - bits.long()
    assert ((error >= dither - 255) & (error <= dither)).all()
    again, correction = encode(upper, torch.int8, dither)  # a 24-bit value is a fixed point, whatever the dither
    decode_master(correction, again)
    assert torch.equal(again, upper)


def test_every_bf16_pattern_is_its_own_24_and_32_bit_master():
    patterns = torch.arange(-(2**15), 2**15, dtype=torch.int32) << 16
    patterns = patterns[~patterns.view(torch.float32).isnan()]
    for dtype in (torch.int16, torch.int8):
        upper, correction = encode(patterns, dtype, dither=255)
        assert torch.equal(upper << 16, patterns) and not correction.any()


@pytest.mark.parametrize("dtype", [torch.int16, torch.int8])
def test_a_nan_master_is_a_nan_weight(dtype):
    """0x7fffffff is the NaN that CUDA's arithmetic makes; rounding it up would give -0, a silent wrong weight."""
    patterns = [0x7FFFFFFF, 0x7FC00000, 0x7F800001 | 0x8000, 0xFFC00000 - 2**32]
    upper, _ = encode(torch.tensor(patterns, dtype=torch.int32), dtype, dither=255)
    assert upper.to(torch.int16).view(torch.bfloat16).isnan().all()


def test_the_24_bit_rounding_is_unbiased_over_256_dithers():
    bits = torch.randint(2**20, 2**30, (1000,), dtype=torch.int32)
    total = torch.zeros(1000, dtype=torch.int64)
    for dither in range(256):
        upper, correction = encode(bits, torch.int8, dither)
        decode_master(correction, upper)
        total += upper.long() - bits.long()
    assert not total.any()


# --- small states learn the same ----------------------------------------------------------------------------------


TEXT = "the quick brown fox jumps over the lazy dog while five boxing wizards pack my liquor jugs quickly. " * 40


def final_loss(make_optimizer, dtype, count=400):
    """Mean loss of the last quarter of a short training on noisy text: a character from the eight before it."""
    torch.manual_seed(0)
    alphabet = sorted(set(TEXT))
    ids = torch.tensor([alphabet.index(character) for character in TEXT])
    ids = torch.where(torch.rand(ids.shape) < 0.15, torch.randint(len(alphabet), ids.shape), ids)  # so loss stays > 0
    windows = ids.unfold(0, 9, 1)  # [positions, 9]
    layers = nn.Embedding(len(alphabet), 16), nn.Flatten(), nn.Linear(128, 96), nn.Tanh(), nn.Linear(96, len(alphabet))
    model = nn.Sequential(*layers).to(torch.bfloat16).to(dtype)
    optimizer = make_optimizer(model.parameters())
    generator, losses = torch.Generator().manual_seed(2), []
    for _ in range(count):
        batch = windows[torch.randint(len(windows), (64,), generator=generator)]
        loss = nn.functional.cross_entropy(model(batch[:, :8]).float(), batch[:, 8])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return sum(losses[-count // 4 :]) / (count // 4)


def test_24_8_reaches_the_loss_of_fp32_within_1_percent():
    options = dict(lr=3e-3, betas=(0.9, 0.999), weight_decay=0.01)

    def ours(dtype, bits="24/8"):
        return final_loss(lambda p: MemoryEfficientAdamW(p, **options, **FORMATS[bits]), dtype)

    exact = final_loss(lambda p: torch.optim.AdamW(p, **options, fused=True), torch.float32)
    assert exact < 2.0 and ours(torch.float32) == pytest.approx(exact, rel=0.01)
    exact_in_bf16 = ours(torch.bfloat16, "32/32")
    for bits in ("24/8", "24/16"):
        assert ours(torch.bfloat16, bits) == pytest.approx(exact_in_bf16, rel=0.01)


@every_format
def test_at_lr_1e_6_the_masters_move_as_in_fp32_where_plain_bf16_stands_still(bits):
    start = torch.randn(20000) * 0.02
    bf16 = nn.Parameter(start.to(torch.bfloat16))
    plain, exact = nn.Parameter(bf16.detach().clone()), nn.Parameter(bf16.detach().float())
    origin = exact.detach().clone()
    ours = MemoryEfficientAdamW([bf16], lr=1e-6, **bits)
    others = torch.optim.AdamW([plain], lr=1e-6, weight_decay=0), torch.optim.AdamW([exact], lr=1e-6, weight_decay=0)
    drift = torch.randn(20000)
    generator = torch.Generator().manual_seed(1)
    for _ in range(10):
        bf16.grad = (drift + torch.randn(20000, generator=generator)).to(torch.bfloat16)
        plain.grad, exact.grad = bf16.grad.clone(), bf16.grad.float()
        for optimizer in (ours, *others):
            optimizer.step()
    moved = (ours.master_weights()[0] - origin).abs().mean()
    expected = (exact.detach() - origin).abs().mean()
    assert moved.item() == pytest.approx(expected.item(), rel=0.03)
    assert (plain.detach().float() != origin).float().mean() < 0.05


@pytest.mark.parametrize("state_bits, tolerance", [(8, 0.05), (16, 0.02), (32, 1e-3)])
def test_the_second_moment_decays_without_gradients(state_bits, tolerance):
    """At beta2 = 0.999 a bf16 v rounded to nearest stands still: 0.1% is less than half of its unit."""
    parameters = [nn.Parameter(torch.zeros(2000, dtype=torch.bfloat16))]
    optimizer = MemoryEfficientAdamW(parameters, lr=0.0, state_bits=state_bits)
    parameters[0].grad = torch.rand(2000).add(0.5).to(torch.bfloat16)
    for _ in range(20):
        optimizer.step()
    before = decoded_variance(optimizer, parameters[0])
    parameters[0].grad = torch.zeros_like(parameters[0])
    parameters[0].grad[::BLOCK] = 1.0  # an active element in every block: not only the scale must shrink
    for _ in range(1000):
        optimizer.step()
    quiet = torch.arange(2000) % BLOCK != 0
    ratio = (decoded_variance(optimizer, parameters[0]) / before)[quiet]
    assert ratio.mean().item() == pytest.approx(0.999**1000, rel=tolerance)


def decoded_variance(optimizer, parameter):
    state = optimizer.state[parameter]
    if "variance_scale" not in state:
        return state["variance"].to(torch.float32, copy=True)
    scale = state["variance_scale"].repeat_interleave(BLOCK)[: parameter.numel()]
    return (state["variance"].float() * scale) ** 4


@pytest.mark.parametrize("state_bits", [8, 16])
def test_moments_are_unbiased_over_a_long_stationary_run(state_bits):
    """Elements of one block over three decades of gradient scale: sqrt(v) agrees on average, and so does m."""
    scale = torch.logspace(-3, 0, BLOCK).repeat(16)  # [n]
    small, exact = [nn.Parameter(torch.zeros(16 * BLOCK)) for _ in range(2)]
    ours = MemoryEfficientAdamW([small], lr=1e-3, betas=(0.9, 0.99), state_bits=state_bits)
    theirs = torch.optim.AdamW([exact], lr=1e-3, betas=(0.9, 0.99), weight_decay=0)
    generator, sums = torch.Generator().manual_seed(3), torch.zeros(2, 16 * BLOCK)
    for step in range(1500):
        small.grad = torch.randn(16 * BLOCK, generator=generator) * scale + 0.5 * scale
        exact.grad = small.grad.clone()
        ours.step()
        theirs.step()
        if step >= 500:
            sums += torch.stack([decoded_variance(ours, small).sqrt(), theirs.state[exact]["exp_avg_sq"].sqrt()])
    ratio = (sums[0] / sums[1]).view(16, 8, BLOCK // 8).mean(dim=(0, 2))  # [8] by gradient scale
    assert ratio[2:].sub(1).abs().max() < 0.03 and ratio.sub(1).abs().max() < 0.2
    distance = (small.sum() / exact.sum()).item()
    assert distance == pytest.approx(1, rel=0.02)


def test_an_element_that_falls_silent_stops_moving():
    """Its v shrinks to the last code beside a loud neighbour; an m stored on its own would then take huge steps."""
    small, exact = [nn.Parameter(torch.zeros(BLOCK)) for _ in range(2)]
    ours = MemoryEfficientAdamW([small], lr=1e-3)
    theirs = torch.optim.AdamW([exact], lr=1e-3, weight_decay=0)
    generator = torch.Generator().manual_seed(3)
    for step in range(600):
        small.grad = torch.randn(BLOCK, generator=generator) * (1e-4 if step < 100 else 0.0)
        small.grad[0] = 1e3 * torch.randn((), generator=generator)
        exact.grad = small.grad.clone()
        ours.step()
        theirs.step()
    assert (small - exact)[1:].abs().max() < 0.1  # 100 loud steps moved them by up to 0.03
    at_rest = small.detach().clone()
    for _ in range(100):
        ours.step()
    assert (small - at_rest)[1:].abs().max() < 1e-3


def test_the_first_moment_of_a_silent_element_decays_to_zero():
    """Rounded to nearest, 0.9 * 4 would be 4 again: the element would drift for ever."""
    parameter = nn.Parameter(torch.zeros(16 * BLOCK))
    optimizer = MemoryEfficientAdamW([parameter], lr=1e-3)
    loud = torch.arange(16 * BLOCK) % BLOCK == 0
    for step in range(200):
        parameter.grad = torch.where(loud | torch.tensor(step < 20), torch.ones(()), torch.zeros(()))
        optimizer.step()
    codes = optimizer.state[parameter]["momentum"].abs()
    assert codes[loud].min() > 100 and codes[~loud].float().mean() < 0.05


def test_the_unused_end_of_a_block_does_not_hold_up_its_scale():
    parameter = nn.Parameter(torch.zeros(5))
    optimizer = MemoryEfficientAdamW([parameter], lr=1e-3, betas=(0.9, 0.5))
    for step in range(150):
        parameter.grad = torch.full((5,), 1.0 if step < 10 else 1e-9)
        optimizer.step()
    deviation = decoded_variance(optimizer, parameter).sqrt()
    assert deviation.tolist() == pytest.approx([1e-9] * 5, rel=0.05)


@pytest.mark.parametrize("dither", [0.0, 0.5, 65535 / 65536])
def test_8_bit_codes_err_by_less_than_one_and_never_wrap(dither):
    momentum, deviation = torch.randn(2000 * BLOCK), torch.rand(2000 * BLOCK).add(0.01)
    codes = {
        "momentum": torch.empty(momentum.shape, dtype=torch.int8),
        "momentum_scale": torch.empty(2000),
        "variance": torch.empty(momentum.shape, dtype=torch.uint8),
        "variance_scale": torch.empty(2000),
    }
    dithers = torch.full_like(momentum, dither), torch.full_like(momentum, dither)
    scratch = torch.empty_like(momentum), torch.empty_like(momentum)
    encode_8bit(codes, momentum.clone(), deviation.square(), scratch, dithers, ratio_limit=1e3)
    decoded_momentum, decoded = torch.empty_like(momentum), torch.empty_like(momentum)
    decode_8bit(codes, decoded_momentum, decoded)
    unit = codes["variance_scale"].repeat_interleave(BLOCK)
    assert ((decoded.sqrt().sqrt() - deviation.sqrt()).abs() / unit).max() < 1.001
    unit = codes["momentum_scale"].repeat_interleave(BLOCK) * decoded.sqrt()
    assert ((decoded_momentum - momentum).abs() / unit).max() < 1.001


# --- bytes --------------------------------------------------------------------------------------------------------


def test_24_8_takes_7_bytes_a_parameter_and_one_scale_a_block_for_each_moment():
    parameters = make_parameters(shapes=[(256, 512), (1024,)])
    optimizer = MemoryEfficientAdamW(parameters)
    steps(optimizer, parameters, 1)
    count = sum(parameter.numel() for parameter in parameters)
    scales = sum(state[name].nbytes for state in optimizer.state.values() for name in state if name.endswith("_scale"))
    states = sum(value.nbytes for state in optimizer.state.values() for name, value in state.items() if name != "step")
    weights = sum(parameter.nbytes + parameter.grad.nbytes for parameter in parameters)
    assert states == optimizer.state_bytes()["device"]
    assert (weights + states - scales) / count == 7
    assert scales / count == 8 / BLOCK
    for shard in optimizer.shards[0]:
        shard.staged = True  # accounting of offload: what remains on the device is the weight and its gradient
    assert optimizer.state_bytes() == {"device": 0, "host": states} and weights / count <= 5


@pytest.mark.parametrize("bits, expected", [("32/32", 10), ("24/16", 5), ("32/16", 6), ("24/32", 9)])
def test_bytes_of_the_other_formats(bits, expected):
    parameter = nn.Parameter(torch.zeros(128, 128, dtype=torch.bfloat16))
    optimizer = MemoryEfficientAdamW([parameter], **FORMATS[bits])
    assert optimizer.state_bytes()["device"] == expected * parameter.numel()


# --- a torch.optim.Optimizer --------------------------------------------------------------------------------------


@every_format
def test_a_saved_and_loaded_optimizer_continues_bit_for_bit(tmp_path, bits):
    def build(parameters):
        groups = [{"params": parameters[:2], "weight_decay": 0.1}, {"params": parameters[2:], "lr": 1e-2}]
        return MemoryEfficientAdamW(groups, lr=1e-3, **bits)

    parameters = make_parameters() + make_parameters(torch.float32)
    optimizer = build(parameters)
    steps(optimizer, parameters, 7)
    copies = copies_of(parameters)
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    restored = build(copies)
    restored.param_groups[0]["lr"] = 99.0  # the saved hyperparameters win
    restored.load_state_dict(torch.load(tmp_path / "optimizer.pt", weights_only=True))
    steps(optimizer, parameters, 7, seed=5)
    steps(restored, copies, 7, seed=5)
    assert same_bits(parameters, copies) and same_bits(tensors_in(optimizer), tensors_in(restored))


def test_a_state_of_another_format_is_refused_and_nothing_is_changed():
    parameters = make_parameters()
    ours, other = MemoryEfficientAdamW(parameters), MemoryEfficientAdamW(parameters, state_bits=16)
    steps(other, parameters, 2)
    before = [value.clone() for value in tensors_in(ours)]
    with pytest.raises(ValueError, match="state_bits"):
        ours.load_state_dict(other.state_dict())
    assert same_bits(before, tensors_in(ours))
    with pytest.raises(ValueError, match="groups"):
        ours.load_state_dict(MemoryEfficientAdamW(parameters[:2]).state_dict())


@every_format
def test_a_parameter_without_gradient_keeps_weight_moments_and_step(bits):
    parameters = make_parameters()
    optimizer = MemoryEfficientAdamW(parameters, weight_decay=0.1, **bits)
    steps(optimizer, parameters, 3)
    kept = [parameters[1], *optimizer.state[parameters[1]].values()]
    before, moved = [value.detach().clone() for value in kept], parameters[3].detach().clone()
    generator = torch.Generator().manual_seed(4)
    for _ in range(3):
        set_gradients(parameters, generator)
        parameters[1].grad = None
        optimizer.step()
    assert same_bits(kept, before) and not torch.equal(parameters[3], moved)
    assert [optimizer.state[parameter]["step"].item() for parameter in parameters] == [6, 3, 6, 6, 6]
    set_gradients(parameters, generator)
    optimizer.step()  # and it comes back with its own step count
    assert optimizer.state[parameters[1]]["step"].item() == 4


def test_groups_schedulers_closures_and_later_groups_as_in_torch():
    def train(make, parameters):
        optimizer = make([{"params": parameters[:2], "lr": 1e-2}, {"params": parameters[2:4], "weight_decay": 0.3}])
        optimizer.add_param_group({"params": parameters[4:], "betas": (0.5, 0.9)})
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))

        def closure():
            optimizer.zero_grad()
            loss = sum(((parameter - 1) ** 2).sum() for parameter in parameters)
            loss.backward()
            return loss

        losses = []
        for _ in range(20):
            losses.append(optimizer.step(closure).item())
            scheduler.step()
        return losses

    ours = make_parameters(torch.float32)
    theirs = copies_of(ours)
    our_losses = train(lambda g: MemoryEfficientAdamW(g, weight_decay=0.01, state_bits=32), ours)
    assert our_losses == train(lambda g: torch.optim.AdamW(g, weight_decay=0.01, fused=True), theirs)
    assert our_losses[-1] < our_losses[0] and same_bits(ours, theirs)


def test_a_parameter_whose_data_is_replaced_is_still_trained_and_a_nan_gradient_is_seen_in_it():
    parameters = make_parameters(shapes=[(300,)])
    optimizer = MemoryEfficientAdamW(parameters, lr=0.1)
    steps(optimizer, parameters, 2)
    parameters[0].data = parameters[0].data.clone()
    before = parameters[0].detach().clone()
    steps(optimizer, parameters, 1)
    assert not torch.equal(parameters[0], before)
    parameters[0].grad[5] = math.nan
    optimizer.step()
    assert parameters[0].isnan().nonzero().tolist() == [[5]]


def test_gradients_may_be_strided():
    results = []
    for strided in (False, True):
        torch.manual_seed(0)
        parameters = make_parameters(shapes=[(40, 30)]) + make_parameters(torch.float32, shapes=[(30, 20)])
        optimizer = MemoryEfficientAdamW(parameters)
        set_gradients(parameters, torch.Generator().manual_seed(1))
        for parameter in parameters if strided else ():
            parameter.grad = parameter.grad.t().contiguous().t()
        optimizer.step()
        results.append(parameters)
    assert same_bits(*results)


@every_format
@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e30])
def test_zero_tiny_and_huge_gradients_leave_everything_finite(scale, bits):
    parameters = make_parameters() + make_parameters(torch.float32)
    optimizer = MemoryEfficientAdamW(parameters, lr=1e-3, **bits)
    steps(optimizer, parameters, 3)
    origin = optimizer.master_weights()
    steps(optimizer, parameters, 5, scale=scale)
    steps(optimizer, parameters, 20)
    for before, after in zip(origin, optimizer.master_weights(), strict=True):
        assert after.isfinite().all() and (after - before).abs().max() < 0.1  # at most about 4 lr a step


BAD_OPTIONS = {"master_bits": 16, "state_bits": 4, "betas": (0.9, 1.0), "lr": -1.0}


@pytest.mark.parametrize("name", BAD_OPTIONS)
def test_bad_options_and_parameters_are_refused_by_name(name):
    with pytest.raises(ValueError, match=name):
        MemoryEfficientAdamW(make_parameters(), **{name: BAD_OPTIONS[name]})
    for parameter in (nn.Parameter(torch.zeros(4, dtype=torch.float16)), nn.Parameter(torch.zeros(4, 3).t())):
        with pytest.raises(ValueError, match="contiguous bfloat16 or float32"):
            MemoryEfficientAdamW([parameter])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("memory_efficient", [False, True])
@pytest.mark.parametrize("grouped", [False, True])
def test_build_optimizer(dtype, memory_efficient, grouped):
    parameters = make_parameters(dtype)
    params = [{"params": parameters[:2]}, {"params": parameters[2:], "lr": 0.5}] if grouped else iter(parameters)
    options = dict(learning_rate=0.25, betas=[0.8, 0.9], weight_decay=0.1, offload=False, state_bits=8)
    optimizer = build_optimizer(params, memory_efficient=memory_efficient, **options)
    if dtype == torch.float32 and not memory_efficient:
        assert type(optimizer) is torch.optim.AdamW
    else:
        bits = (24, 8) if memory_efficient else (32, 32)
        assert (optimizer.master_bits, optimizer.state_bits) == bits
    assert [group["lr"] for group in optimizer.param_groups] == ([0.25, 0.5] if grouped else [0.25])
    assert optimizer.param_groups[0]["betas"] == (0.8, 0.9) and optimizer.param_groups[0]["weight_decay"] == 0.1
    steps(optimizer, parameters, 2)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@every_format
def test_cuda_offload_equals_cuda_and_agrees_with_the_cpu(monkeypatch, bits):
    monkeypatch.setitem(CHUNK_ELEMENTS, "cuda", 8 * BLOCK)
    monkeypatch.setattr(optim, "STAGED_ELEMENTS", 8 * BLOCK)
    results = []
    for device, offload in (("cpu", False), ("cuda", False), ("cuda", True)):
        torch.manual_seed(0)
        parameters = [nn.Parameter(parameter.detach().to(device)) for parameter in make_parameters()]
        options = dict(lr=1e-2, **bits, offload=offload)
        optimizer = MemoryEfficientAdamW(parameters, **options)
        generator = torch.Generator().manual_seed(1)
        for _ in range(20):
            for parameter in parameters:
                parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter)
            optimizer.step()
        results.append([master.cpu() for master in optimizer.master_weights()])
    assert same_bits(results[1], results[2])
    for cpu, cuda in zip(results[0], results[1], strict=True):
        torch.testing.assert_close(cpu, cuda, rtol=0.02, atol=0.02)


def set_uneven_gradients(parameters, generator, step):
    """Loud and faint ones; all silent in step 3, and none for one parameter in step 2."""
    for index, parameter in enumerate(parameters):
        scale = 10.0 ** torch.randint(-9, 4, parameter.shape, generator=generator) * (step != 3)
        gradient = (torch.randn(parameter.shape, generator=generator) * scale).to(parameter)
        parameter.grad = None if (step, index) == (2, 1) else gradient


# --- the kernel ---------------------------------------------------------------------------------------------------

needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="triton comes with torch's CUDA build")
KERNELS = "cuda" if torch.cuda.is_available() else "cpu"  # where it runs: on a CPU, interpreted
FEW = [(7, 19), (300,), (), (12, 128), (1,)]  # that takes long


@pytest.fixture
def triton_everywhere(monkeypatch):
    """Its kernel also on a CPU, in place of the loop in C."""
    kernel = optim.kernel
    monkeypatch.setattr(optim, "kernel", lambda device: kernel(torch.device("cuda")))


def step_by_step(weights, gradients, momenta, variances, _, counts, *, lr, beta1, beta2, weight_decay, eps, **options):
    """torch's fused AdamW with every operation rounded by itself, and correctly."""
    for weight, gradient, m, v, count in zip(weights, gradients, momenta, variances, counts, strict=True):
        size, root = coefficients({"betas": (beta1, beta2), "lr": lr}, count[None])[0]
        weight.sub_(weight * (lr * weight_decay))
        m.add_((gradient - m) * (1 - beta1))
        v.copy_(v * beta2 + gradient * (1 - beta2) * gradient)
        weight.sub_(size * m / (v.double().sqrt().float() / root + eps))


@pytest.mark.gpu
@needs_triton
@pytest.mark.usefixtures("triton_everywhere")
@every_format
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_kernel_steps_as_the_plain_path_to_the_bit(dtype, bits, monkeypatch):
    """Also where pieces are cut, staged, without a gradient, silent or loud, and from one way to the other and back."""
    monkeypatch.setattr(torch, "_fused_adamw_", step_by_step)
    monkeypatch.setattr(torch.Tensor, "sqrt_", lambda x: x.copy_(x.double().sqrt()))  # MKL's is not that of a GPU
    results = []
    for way, staged, chunk_elements in (("plain", False, None), ("kernel", False, None), ("both", True, 5 * BLOCK)):
        torch.manual_seed(0)
        parameters = [nn.Parameter(one.detach().to(KERNELS)) for one in make_parameters(dtype, FEW)]
        optimizer = MemoryEfficientAdamW(parameters, lr=1e-2, weight_decay=0.1, betas=(0.8, 0.95), **bits)
        optimizer.chunk_elements = chunk_elements
        optimizer.shards[0][0].staged = staged
        generator = torch.Generator().manual_seed(1)
        for step in range(6):
            optimizer.has_kernel = way == "kernel" or (way == "both" and step % 3 > 0)
            set_uneven_gradients(parameters, generator, step)
            optimizer.step()
        results.append(parameters + [value for p in parameters for value in optimizer.state[p].values()])
    for result in results[1:]:
        assert same_bits(result, results[0])
    assert not same_bits(parameters, [one.to(KERNELS) for one in make_parameters(dtype, FEW)])


@pytest.mark.gpu
@needs_triton
@pytest.mark.usefixtures("triton_everywhere")
@every_format
def test_with_torchs_own_arithmetic_only_the_last_bits_of_a_master_may_differ(bits):
    ours = []
    for has_kernel in (False, True):
        torch.manual_seed(0)
        parameters = [nn.Parameter(one.detach().to(KERNELS)) for one in make_parameters(scale=1.0)]
        optimizer = MemoryEfficientAdamW(parameters, lr=1e-2, weight_decay=0.1, **bits)
        optimizer.has_kernel = has_kernel
        generator = torch.Generator().manual_seed(1)
        for _ in range(3):
            for parameter in parameters:
                parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter)
            optimizer.step()
        ours.append(optimizer.master_weights())
    unit = 2.0**-14 if bits["master_bits"] == 24 else 2.0**-21  # of a master, and its rounding with it
    for plain, fused in zip(*ours, strict=True):
        torch.testing.assert_close(fused, plain, rtol=unit, atol=2e-4 if bits["state_bits"] < 32 else 1e-7)


@pytest.mark.gpu
@needs_triton
@pytest.mark.usefixtures("triton_everywhere")
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of NumPy
@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e30, math.nan])
def test_the_kernel_keeps_what_is_finite_and_shows_what_is_not(scale):
    parameter = nn.Parameter(torch.ones(3, 100, dtype=torch.bfloat16, device=KERNELS))
    optimizer = MemoryEfficientAdamW([parameter], lr=1e-3)
    optimizer.has_kernel = True
    for _ in range(3):
        parameter.grad = torch.randn_like(parameter) * scale
        optimizer.step()
    assert bool(parameter.isnan().all()) if math.isnan(scale) else bool(parameter.isfinite().all())


@pytest.mark.gpu
@needs_triton
@pytest.mark.usefixtures("triton_everywhere")
@pytest.mark.parametrize("fault", [None, "no compiler", "another rate"])
def test_the_kernel_is_taken_where_its_trial_succeeds(fault, monkeypatch, caplog):
    from src.engine import optim_kernel

    def broken(bits, factors, *rest):
        if fault == "no compiler":
            raise RuntimeError("failed to find a C compiler\nin many lines")
        optim_kernel.plain(bits, factors * 1.2, *rest)

    if fault:
        monkeypatch.setattr(optim_kernel, "plain", optim_kernel.step_chunk, raising=False)
        monkeypatch.setattr(optim_kernel, "step_chunk", broken)
    optim.kernel_works.cache_clear()
    monkeypatch.setattr(kernels, "KERNELS_ON", (KERNELS,))
    parameters = [nn.Parameter(one.detach().to(KERNELS)) for one in make_parameters()]
    optimizer = MemoryEfficientAdamW(parameters, lr=1e-2)
    with caplog.at_level(logging.WARNING, "grpo"):
        for _ in range(2):
            for parameter in parameters:
                parameter.grad = torch.ones_like(parameter)
            optimizer.step()
    optim.kernel_works.cache_clear()
    assert [has_scratch for _, has_scratch in optimizer.workspaces] == [bool(fault)]
    assert len(caplog.records) == bool(fault) and "many lines" not in caplog.text
    if fault:
        assert "the optimizer steps without Triton's kernel" in caplog.text


# --- the loop in C ------------------------------------------------------------------------------------------------

needs_compiler = pytest.mark.skipif(shutil.which("cc") is None, reason="there is no C compiler")
# torch's kernel rounds what is left of its vectors otherwise; so many that the dither begins anew within a block
EVEN = [(48, 5), (304,), (16,), (224, 128)]


@needs_compiler
@every_format
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_loop_steps_as_the_plain_path_to_the_bit(dtype, bits, monkeypatch):
    """With torch's own arithmetic; also where pieces are cut, silent, loud or without a gradient, back and forth."""
    monkeypatch.setattr(torch.Tensor, "sqrt_", lambda x: x.copy_(x.double().sqrt()))  # MKL's is not rounded correctly
    results = []
    for way, threads, chunk_elements, beta1 in (
        ("plain", 1, None, 0.8), ("loop", 1, None, 0.8), ("both", 2, 5 * BLOCK, 0.8),
        ("plain", 1, None, 0.3), ("loop", 2, None, 0.3),
    ):  # fmt: skip
        torch.set_num_threads(threads)
        torch.manual_seed(0)
        parameters = make_parameters(dtype, EVEN)
        optimizer = MemoryEfficientAdamW(parameters, lr=1e-2, weight_decay=0.1, betas=(beta1, 0.95), **bits)
        optimizer.chunk_elements = chunk_elements
        generator = torch.Generator().manual_seed(1)
        for step in range(30):
            optimizer.has_kernel = way == "loop" or (way == "both" and step % 3 > 0)
            set_uneven_gradients(parameters, generator, step)
            optimizer.step()
        results.append(parameters + [value for p in parameters for value in optimizer.state[p].values()])
    for loop, plain in ((1, 0), (2, 0), (4, 3)):
        assert same_bits(results[loop], results[plain])
    assert not same_bits(parameters, make_parameters(dtype, EVEN))


@needs_compiler
@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e30, math.nan])
def test_the_loop_keeps_what_is_finite_and_shows_what_is_not_in_any_length(scale):
    """As the plain path does, but for the last bits of a master."""
    masters = []
    for has_kernel in (False, True):
        torch.manual_seed(0)
        parameters = make_parameters()
        optimizer = MemoryEfficientAdamW(parameters, lr=1e-3)
        optimizer.has_kernel = has_kernel
        steps(optimizer, parameters, 3, scale=scale)
        masters.append(optimizer.master_weights())
    for plain, loop in zip(*masters, strict=True):
        assert bool(loop.isnan().all()) if math.isnan(scale) else bool(loop.isfinite().all())
        torch.testing.assert_close(loop, plain, rtol=1e-4, atol=1e-5, equal_nan=True)


@pytest.fixture
def new_loop(monkeypatch):
    """It is compiled and tried anew, also for few parameters."""
    monkeypatch.setattr(optim_loop, "WORTH_COMPILING", 2**13)
    found = optim_loop.loops_of, optim.kernel_works
    for one in found:
        one.cache_clear()
    yield
    for one in found:
        one.cache_clear()


COMPILERS = {"that fails": "it is out of order", "without memory": "cc1: out of memory allocating 65536 bytes"}


@needs_compiler
@pytest.mark.usefixtures("new_loop")
@pytest.mark.parametrize(
    "fault", [None, "no compiler", *COMPILERS, "another rate", "odd", "small", "fp32", "another process"]
)
def test_the_loop_is_taken_for_large_parameters_where_it_can_be_compiled_and_its_trial_succeeds(
    fault, monkeypatch, caplog, tmp_path
):
    if fault in ("no compiler", *COMPILERS):
        monkeypatch.setenv("PATH", str(tmp_path))
    if fault in COMPILERS:
        (tmp_path / "cc").write_text(f"#!/bin/sh\necho {COMPILERS[fault]} >&2\nexit 1\n")
        (tmp_path / "cc").chmod(0o755)
    if fault == "another rate":
        plain = optim.step_in_c
        monkeypatch.setattr(optim, "step_in_c", lambda bits, factors, *rest: plain(bits, factors * 1.2, *rest))
    if fault == "small":
        monkeypatch.setattr(optim_loop, "WORTH_COMPILING", 2**15)
    if fault == "another process":  # whose slice does not fit: else one would wait for the trial of the other
        monkeypatch.setattr(optim, "gather", lambda mine: [mine, False])
        monkeypatch.setattr(optim, "kernel_works", lambda *_: 1 / 0)
    dtype, state_bits = (torch.float32, 32) if fault == "fp32" else (torch.bfloat16, 8)
    parameters = make_parameters(dtype, [*EVEN, (17,)] if fault == "odd" else EVEN)
    optimizer = MemoryEfficientAdamW(parameters, lr=1e-2, state_bits=state_bits)
    with caplog.at_level(logging.WARNING, "grpo"):
        steps(optimizer, parameters, 2)
    assert [has_scratch for _, has_scratch in optimizer.workspaces] == [bool(fault)]
    told = fault in (*COMPILERS, "another rate")
    assert len(caplog.records) == told and ("the optimizer steps without its loop in C" in caplog.text) == told
    assert COMPILERS.get(fault, "") in caplog.text


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float16, torch.float64, torch.float32])
def test_the_loop_takes_gradients_of_any_dtype(dtype):
    masters = []
    for has_kernel in (False, True):
        parameter = nn.Parameter(torch.linspace(-1, 1, 304).bfloat16())
        parameter.grad_dtype = dtype
        parameter.grad = torch.linspace(2, -3, 304).to(dtype)
        optimizer = MemoryEfficientAdamW([parameter], lr=1e-2, master_bits=32, state_bits=32)
        optimizer.has_kernel = has_kernel
        optimizer.step()
        masters += optimizer.master_weights()
    assert torch.equal(*masters)


# --- several processes --------------------------------------------------------------------------------------------


def test_8_bit_moments_survive_decoding_for_another_number_of_processes():
    parameter = torch.nn.Parameter(torch.randn(37, 11, dtype=torch.bfloat16))
    optimizer = MemoryEfficientAdamW([parameter], lr=1e-2)
    for _ in range(5):
        parameter.grad = torch.randn_like(parameter)
        optimizer.step()
    states = optimizer.state_dict()["state"][0]
    whole = decoded(states)
    assert whole["decoded_momentum"].shape == (407,) and float(whole["decoded_variance"].min()) > 0
    again = decoded(encoded(whole, (0.9, 0.999)))
    for name in ("decoded_momentum", "decoded_variance"):
        largest = float(whole[name].abs().max())
        torch.testing.assert_close(again[name], whole[name], rtol=0.05, atol=0.02 * largest)
    assert torch.equal(again["correction"], states["correction"])
