"""Attention of a packed row in loops of C against a dense mask in float64, with its gradients, and where it is used."""

import logging
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_decode_loops import in_each, needs_halves, needs_loops, numbers
from test_packing import make_pair, make_row, ragged_groups, with_head
from torch.nn.functional import scaled_dot_product_attention

from src.engine import attention_loops
from src.engine.attention_loops import LoopPackedAttention, groups_of
from src.engine.decode_loops import shape_for
from src.engine.scoring import score

pytestmark = pytest.mark.usefixtures("capability")


def segments_of(seed: int, head: int, longest: int) -> np.ndarray:
    """Random ones [S, 4]: starts, lengths, prefix starts and lengths."""
    random = np.random.default_rng(seed)
    segments, row = [(0, head, 0, 0)] * bool(head), head
    for _ in range(random.integers(1, 4)):
        prompt = (row, int(random.integers(1, longest)))
        segments.append((*prompt, prompt[0], 0))
        row += prompt[1]
        for length in random.integers(1, longest, random.integers(0, 5)).tolist():
            segments.append((row, length, *prompt))
            row += length
    return np.array(segments)


def dense(segments: np.ndarray, head: int):
    """Attention of [T, heads, D] by a mask over the whole row."""
    row = int(segments[:, 1].sum())
    visible = torch.zeros(row, row, dtype=torch.bool)
    visible[head:, :head] = True
    for start, length, prefix_start, prefix_length in segments.tolist():
        visible[start : start + length, prefix_start : prefix_start + prefix_length] = True
        visible[start : start + length, start : start + length] = torch.ones(length, length).tril().bool()

    def attention(query, key, value):
        query, key, value = (x.transpose(0, 1)[None] for x in (query, key, value))
        out = scaled_dot_product_attention(query, key, value, visible, scale=0.2, enable_gqa=True)
        return out[0].transpose(0, 1)

    return attention


def outcome(attention, inputs, slope):
    out = attention(*inputs)
    return [out.detach(), *torch.autograd.grad(out, inputs, slope)]


def drawn(tokens: int, heads: int, kv_heads: int, dim: int, dtype):
    """Queries, keys, values, and a slope that lies in another order."""
    shapes = [(tokens, count, dim) for count in (heads, kv_heads, kv_heads)]
    inputs = [numbers(*shape, dtype=dtype, draw=i).requires_grad_() for i, shape in enumerate(shapes)]
    return inputs, numbers(heads, tokens, dim, dtype=dtype, draw=3).transpose(0, 1)


@in_each
@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "head", "longest"),
    [
        (4, 4, 32, 0, 30),
        (4, 2, 32, 21, 30),
        (6, 2, 16, 5, 9),
        (2, 1, 64, 16, 170),
        (3, 1, 80, 0, 70),
        (2, 2, 256, 70, 40),
    ],
)
@pytest.mark.parametrize("seed", range(4))
def test_attention_of_a_packed_row_and_its_gradients(seed, heads, kv_heads, dim, head, longest, dtype):
    segments = segments_of(seed, head, longest)
    inputs, slope = drawn(int(segments[:, 1].sum()), heads, kv_heads, dim, dtype)
    groups = groups_of(*segments.T, head)
    found = outcome(lambda *x: LoopPackedAttention.apply(*x, groups, 0.2), inputs, slope)
    exact = [x.detach().double().requires_grad_() for x in inputs]
    expected = outcome(dense(segments, head), exact, slope.double())
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == dtype and ours.shape == theirs.shape
        error = float((ours.double() - theirs).norm() / theirs.norm())
        assert error < (3e-6 if dtype == torch.float32 else 5e-3)
        worst = float((ours.double() - theirs).abs().max() / theirs.abs().max())
        assert worst < (1e-5 if dtype == torch.float32 else 1e-2)


@needs_loops
def test_rows_that_lie_apart_and_heads_in_another_order_are_read_where_they_lie():
    segments = segments_of(1, 20, 30)
    tokens = int(segments[:, 1].sum())
    together = numbers(tokens, 8 * 32)  # as one product for queries, keys and values gives them
    query, key, value = (x.unflatten(-1, (-1, 32)) for x in together.split((128, 64, 64), -1))
    turned = numbers(4, tokens, 32).transpose(0, 1)
    groups = groups_of(*segments.T, 20)
    for first in (query, turned):
        found = LoopPackedAttention.apply(first, key, value, groups, 0.2)
        torch.testing.assert_close(found, dense(segments, 20)(first, key, value), rtol=1e-5, atol=1e-5)


@in_each
def test_neither_threads_nor_neighbours_change_a_group(dtype):
    """The last group alone, beside others, and by one thread: the same numbers, gradients too."""
    segments = segments_of(2, 0, 90)
    begin = int(np.flatnonzero(segments[:, 3] == 0)[-1])
    start = int(segments[begin, 0])
    assert start > 0
    inputs, slope = drawn(int(segments[:, 1].sum()), 4, 2, 32, dtype)
    alone = segments[begin:] - np.array([start, 0, start, 0])
    outcomes, threads = [], torch.get_num_threads()
    for rows, cut, count in ((segments, 0, threads), (segments, 0, 1), (alone, start, threads)):
        groups = groups_of(*rows.T, 0)
        parts = [x[cut:].detach().requires_grad_() for x in inputs]
        torch.set_num_threads(count)
        found = outcome(lambda *x, groups=groups: LoopPackedAttention.apply(*x, groups, 0.2), parts, slope[cut:])
        torch.set_num_threads(threads)
        outcomes.append([x[start - cut :] for x in found])
    for other in outcomes[1:]:
        assert all(torch.equal(*pair) for pair in zip(outcomes[0], other, strict=True))


@in_each
def test_what_is_not_finite_stays_in_its_group(dtype):
    segments = np.array([(0, 5, 0, 0), (5, 9, 0, 5), (14, 5, 14, 0), (19, 9, 14, 5), (28, 9, 14, 5)])
    inputs, slope = drawn(37, 2, 1, 32, dtype)
    with torch.no_grad():
        inputs[1][20] = torch.nan  # a key of the first completion of the second group
    groups = groups_of(*segments.T, 0)
    out, *gradients = outcome(lambda *x: LoopPackedAttention.apply(*x, groups, 0.2), inputs, slope)
    seen = out.isfinite().all(-1).all(-1)
    assert seen.tolist() == [not 20 <= token < 28 for token in range(37)]
    for gradient in gradients:
        assert gradient[:14].isfinite().all() and gradient[28:].isfinite().all()
    assert gradients[1][20:28].isnan().any()


def test_groups_share_keys_and_are_few_segments_of_one_prompt_after_another():
    prompts = [(0, 6, 0, 0), (6, 5, 6, 0), *((11 + 2 * i, 2, 6, 5) for i in range(9)), (29, 3, 29, 0), (32, 2, 29, 3)]
    found = groups_of(*np.array(prompts).T, 6)
    assert found.first_segments.tolist() == [0, 1, 2, 6, 10, 11, 12, 13]
    assert found.prompts.tolist()[2:] == [6, 6, 6, 29, 29] and found.prompt_lengths.tolist() == [0, 0, 5, 5, 5, 0, 3]
    assert (found.first, found.most, found.longest) == (6, 11, 13)
    prefill = groups_of(
        *np.array([(0, 6, 0, 0), (6, 5, 0, 0), (11, 4, 0, 0)]).T, 6
    )  # prompts alone, as prefill.py says it
    assert prefill.first_segments.tolist() == [0, 1, 2, 3]


@pytest.fixture
def calls(monkeypatch):
    """Which of the two, forward or backward, is called in loops, also for few tokens."""
    plain, found = attention_loops.call, []
    monkeypatch.setattr(attention_loops, "FEWEST", 0)
    monkeypatch.setattr(attention_loops, "call", lambda *a, backward: (found.append(backward), plain(*a, backward))[1])
    return found


@needs_loops
@pytest.mark.parametrize("head", [0, 20])
def test_an_update_of_a_model_is_the_same_with_them(head, calls, monkeypatch):
    model, outcomes = make_pair("qwen3")[0], []
    row = make_row(with_head(ragged_groups(), head) if head else ragged_groups())
    for fewest in (0, 10**12):
        monkeypatch.setattr(attention_loops, "FEWEST", fewest)
        attention_loops.agrees(4, 2, 16, torch.float32, shape_for(torch.float32))  # its trial calls too
        calls.clear()
        scores = score(model, row, 1.0)
        outcomes.append([scores.logprobs, *torch.autograd.grad(scores.logprobs.sum(), list(model.parameters()))])
        assert calls == ([False] * 2 + [True] * 2 if fewest == 0 else [])
    for one, other in zip(*outcomes, strict=True):
        assert float((one - other).detach().norm()) <= 1e-5 * float(other.detach().norm())


@needs_loops
def test_loops_that_are_wrong_are_not_taken_and_one_line_tells(monkeypatch, caplog):
    plain, x = attention_loops.call, numbers(40, 2, 32)
    monkeypatch.setattr(attention_loops, "FEWEST", 0)
    for wrong, place in ((False, 5), (True, 5), (True, 6), (True, 7)):  # the result, and the three gradients

        def scaled(tensors, *others, backward, wrong=wrong, place=place):
            plain(tensors, *others, backward)
            if backward == wrong:
                tensors[place].mul_(1.001)

        with monkeypatch.context() as patch, caplog.at_level(logging.WARNING, "grpo"):
            patch.setattr(attention_loops, "call", scaled)
            attention_loops.agrees.cache_clear()
            assert not attention_loops.applies(x, x, x) and not attention_loops.applies(x, x, x)
    attention_loops.agrees.cache_clear()
    assert [record.message.split(":")[0] for record in caplog.records] == [
        "attention of an update without loops in C, which is slower"
    ] * 4
    assert attention_loops.applies(x, x, x)


@needs_loops
def test_where_they_are_not_used(calls, monkeypatch):
    x, odd = numbers(40, 2, 32), numbers(40, 2, 28)
    assert attention_loops.applies(x, x, x)
    assert not attention_loops.applies(odd, odd, odd)  # no whole vectors
    assert not attention_loops.applies(x, x, numbers(40, 2, 64))  # values of another size
    assert not attention_loops.applies(*[x.double()] * 3)
    monkeypatch.setattr(attention_loops, "FEWEST", x.numel() + 1)
    assert not attention_loops.applies(x, x, x)
    monkeypatch.setattr(attention_loops, "FEWEST", 0)
    calls.clear()
    with torch.utils.flop_counter.FlopCounterMode(display=False), torch.no_grad():  # as --profile
        score(make_pair("qwen3")[0], make_row(), 1.0)
    assert not calls


@needs_halves
def test_in_bf16_they_are_for_processors_without_tiles(way, monkeypatch):
    monkeypatch.setattr(attention_loops, "FEWEST", 0)
    x = numbers(40, 2, 32, dtype=torch.bfloat16)
    assert attention_loops.applies(x, x, x) == (way != "tiles")


@needs_loops
def test_memory_that_is_not_there_is_an_error_in_words(monkeypatch):
    """Told by the loop; really asking for too much would leave malloc's main arena for the rest of the process."""
    x = numbers(40, 2, 32)
    groups = groups_of(*np.array([[0], [40], [0], [0]]), 0)
    monkeypatch.setattr(attention_loops, "loops", lambda dtype: SimpleNamespace(packed_attention=lambda *_: 1))
    with pytest.raises(MemoryError, match="lower the tokens of a pass"):
        LoopPackedAttention.apply(x, x, x, groups, 0.2)
