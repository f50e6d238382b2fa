"""The CUDA paths on fake CUDA tensors: a tensor left on the host, a wait for the device or a copy from it fails here.

Not the backward pass: torch's engine asks the driver. Nothing is computed, so nothing is said about results.
"""

from contextlib import ExitStack
from types import SimpleNamespace
from unittest.mock import patch

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, Qwen2Config

from src.config import TrainingConfig
from src.engine import cuda_decoding, sampler, statistics
from src.engine.attention import ATTENTION_NAME
from src.engine.build import optimizer_of
from src.engine.lighter import lean_mlp, one_kernel_norm, with_forward
from src.engine.packing import pack
from src.engine.scoring import score
from src.engine.token_choice import SamplingSettings
from src.records import Episode, Group, Problem, Told
from src.train_grpo import objective

CUDA = torch.device("cuda", 0)
SIZES = {"vocab_size": 1024, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}


class Crossings(TorchDispatchMode):
    """Notes operators with tensors on host and device (0-dim ones aside); one that must read contents raises itself."""

    def __init__(self):
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        leaves = tree_leaves((args, kwargs, result))
        places = {leaf.device.type for leaf in leaves if isinstance(leaf, torch.Tensor) and leaf.dim()}
        if len(places) > 1:
            self.found.append(str(function))
        return result


@pytest.fixture
def model():
    idle = SimpleNamespace(wait_stream=lambda _: None)
    with FakeTensorMode(allow_non_fake_inputs=True), ExitStack() as stack:
        for name, stub in {"Stream": idle, "current_stream": idle, "graph_pool_handle": (0, 0)}.items():
            stack.enter_context(patch.object(torch.cuda, name, lambda *_, stub=stub: stub))
        stack.enter_context(patch.object(torch.Tensor, "data_ptr", lambda tensor: id(tensor)))
        stack.enter_context(patch.object(torch.Tensor, "pin_memory", lambda tensor: tensor))
        stack.enter_context(patch.object(statistics, "FUSED_ON", ()))
        config = Qwen2Config(**SIZES, num_attention_heads=4, num_key_value_heads=2, dtype="bfloat16")
        model = AutoModelForCausalLM.from_config(config, attn_implementation=ATTENTION_NAME)
        for module in model.modules():  # Module.to cannot swap fake parameters
            for name, one in [*module._parameters.items(), *module._buffers.items()]:
                kind = torch.nn.Parameter if name in module._parameters else torch.Tensor.detach
                setattr(module, name, None if one is None else kind(torch.empty_like(one, device=CUDA)))
            if hasattr(module, "variance_epsilon"):  # as load_model does, where it can try it
                module.__class__ = with_forward(type(module), one_kernel_norm)
            if hasattr(module, "gate_proj"):
                module.__class__ = with_forward(type(module), lean_mlp)
        yield model


@pytest.mark.parametrize("layout", [cuda_decoding.FlashAttention, cuda_decoding.PaddedAttention])
@pytest.mark.parametrize("temperature", [1.0, 0.7, 0.0])
@pytest.mark.parametrize("reply", [None, lambda *_: Told((3,))])
def test_a_decode_step_and_a_refill_stay_on_the_device(model, layout, temperature, reply):
    problems = [Problem(index, (1, 2, 3), "", {}) for index in range(3)]
    settings = SamplingSettings(8, temperature, 6, (5, 7), 0, reply=reply, max_turns=2, told=4)
    with torch.inference_mode(), patch.object(sampler, "layout_for", lambda _: layout), Crossings() as crossings:
        decoder = sampler.SlotDecoder(model, None, problems, 2, 6, settings)
        slots = torch.arange(6, device=CUDA)
        with patch.object(decoder, "turns", None):  # it keeps the books of real episodes, on the host
            crossings.found.clear()
            decoder.start(slots)
            assert crossings.found == []
        decoder.attention.arrange(np.arange(6) // 2, np.zeros(6, int), np.zeros(6, bool))
        decoder.attention.begin_block(4)
        crossings.found.clear()
        decoder.step()
    assert crossings.found == [] and decoder.tokens.device == CUDA


def test_scores_loss_and_optimizer_wait_for_nothing(model):
    training = TrainingConfig(loss_type="kl", beta=0.1, kl_target=0.1, memory_efficient_adamw=True)
    optimizer = optimizer_of(model, training)
    episode = Episode((1, 2), (-1.0,) * 2, True, "", advantages=(1.0,) * 2)
    groups = [Group(Problem(0, (4, 5), "", {}), (episode,) * 2)]
    with patch.object(torch.Tensor, "repeat_interleave", lambda x, _: x.new_zeros(4)):  # by numbers that are not there
        row = pack(groups, CUDA, torch.bfloat16)
    assert row.input_ids.device == row.batch.weights.device == CUDA
    with Crossings() as crossings:
        scores = score(model, row, 1.0, anchor=model, distances={"kl": "reverse"}, elements=2048)  # several chunks
        loss, _ = objective(training, scores, row.batch)
        assert loss.device == CUDA and crossings.found == []
        for _ in range(2):  # the first step makes its scratch on the host
            crossings.found.clear()
            for parameter in model.parameters():
                parameter.grad = torch.empty_like(parameter)
            optimizer.step()
    assert crossings.found == []


@pytest.mark.parametrize("fault", ["a table on the host", "a look at the device", "a number on the host"])
def test_what_this_file_looks_for_is_found(model, fault, monkeypatch):
    """Faults that are planted in a decode step."""
    original = sampler.SlotDecoder.choose

    def choose(self, hidden, slots):
        if fault == "a look at the device":
            bool(self.ended.all())
        if fault == "a table on the host":
            hidden = hidden + torch.zeros(hidden.shape).to(CUDA)
        if fault == "a number on the host":
            self.lengths[slots] = torch.zeros(6, dtype=torch.long).to(CUDA)
        original(self, hidden, slots)

    monkeypatch.setattr(sampler.SlotDecoder, "choose", choose)
    with pytest.raises((AssertionError, RuntimeError)):
        test_a_decode_step_and_a_refill_stay_on_the_device(model, cuda_decoding.PaddedAttention, 1.0, None)
