"""What only a CUDA device can show; `python -m pytest -m gpu` runs these and those of other files."""

import copy
from unittest.mock import patch

import pytest
import torch
from test_packing import make_pair, ragged_groups, with_head
from test_sampler import sample, tokens_of

from src.engine import cuda_decoding, statistics
from src.engine.packing import pack
from src.engine.scoring import score

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("slots", [64, 5])
def test_captured_steps_sample_the_tokens_of_eager_ones(name, slots, caplog):
    model = make_pair(name)[0].cuda()
    results = []
    for on in ((), ("cuda",)):
        with patch.object(cuda_decoding, "GRAPHS_ON", on):
            groups = sample(model, 7, slots=slots, temperature=0.9)
        results.append((tokens_of(groups), [e.logprobs for group in groups for e in group.episodes]))
    assert cuda_decoding.StepRunner.works, caplog.text
    assert results[0][0] == results[1][0]
    for a, b in zip(results[0][1], results[1][1], strict=True):
        assert a == pytest.approx(b, abs=1e-4)


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("layout", [cuda_decoding.FlashAttention, cuda_decoding.PaddedAttention])
@pytest.mark.parametrize("slots", [64, 5])
def test_both_layouts_decode_in_bf16_and_the_trainer_agrees(name, layout, slots, caplog, monkeypatch):
    cuda_decoding.flash_works.cache_clear()
    model = make_pair(name)[0].to("cuda", torch.bfloat16)
    if layout is cuda_decoding.PaddedAttention:
        monkeypatch.setattr(cuda_decoding, "HALF", ())
    assert cuda_decoding.layout_for(model) is layout, caplog.text
    row = pack(sample(model, 7, slots=slots), model.device, model.dtype)
    assert cuda_decoding.StepRunner.works, caplog.text
    difference = (score(model, row, 1.0).logprobs - row.batch.sampled_logprobs).abs()
    assert difference.mean() < 0.02 and difference.max() < 0.3


@pytest.mark.parametrize("name", ["llama", "qwen2", "granite"])
@pytest.mark.parametrize("head", [0, 20])
def test_packed_scores_and_gradients_in_bf16_are_those_of_the_cpu_in_fp32(name, head):
    packed, _ = make_pair(name)
    results = []
    groups = with_head(ragged_groups(), head) if head else ragged_groups()
    for model in (packed.float(), copy.deepcopy(packed).to("cuda", torch.bfloat16)):
        row = pack(groups, model.device, model.dtype)
        scores = score(model, row, 0.7)
        row.batch.mean(scores.logprobs).backward()
        gradient = torch.cat([p.grad.float().cpu().flatten() for p in model.parameters()])
        results.append((scores.logprobs.detach().cpu(), gradient))
    assert row.attention_plan.use_varlen and False not in statistics.verdicts.values()
    torch.testing.assert_close(results[0][0], results[1][0], atol=0.2, rtol=0)
    assert torch.nn.functional.cosine_similarity(results[0][1], results[1][1], dim=0) > 0.99
