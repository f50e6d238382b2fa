"""The layers of a decode step written out, plain and in Triton's kernels, against transformers' own forward pass."""

import logging
from functools import partial

import numpy as np
import pytest
import torch
from test_decoding import flash_stand_in
from transformers import (
    AutoModelForCausalLM,
    GemmaConfig,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)

from src.engine import cuda_decoding, operations
from src.engine import kernels as engine_kernels
from src.engine.attention import ATTENTION_NAME
from src.engine.cuda_decoding import FlashAttention, PaddedAttention
from src.engine.decoding import JoinedAttention
from src.engine.layers import check_fused, layers_for, own_layers, written_layers
from src.engine.operations import Operations, put_side_by_side, side_by_side

KERNELS = "cuda" if torch.cuda.is_available() else "cpu"  # where Triton's kernels run: on a CPU it interprets them
SHAPE = dict(
    vocab_size=60, hidden_size=96, intermediate_size=80, num_hidden_layers=2, num_attention_heads=6,
    num_key_value_heads=2, head_dim=16, attn_implementation=ATTENTION_NAME,
)  # fmt: skip
FAMILIES = [LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config]


@pytest.fixture
def kernels(monkeypatch):
    """Triton's, and what goes with them: a cache as on a GPU."""
    monkeypatch.setattr(cuda_decoding, "GRAPHS_ON", ("cpu", "cuda"))
    monkeypatch.setattr(cuda_decoding, "HALF", ())  # on a CPU there is no flash attention
    monkeypatch.setattr(engine_kernels, "KERNELS_ON", ("cpu", "cuda"))
    return pytest.importorskip("src.engine.layer_kernels", reason="triton comes with torch's CUDA build")


def make(kind, dtype=torch.float32, device="cpu"):
    """A random model whose norms and biases are not those that change nothing."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(kind(**SHAPE), dtype=dtype).eval()
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter.data, 1.0 if "norm" in name else 0.0, 0.3)
    return model.to(device)


def decode(model, forward, layout=JoinedAttention, rows=3, tokens=3):
    """Hidden states [tokens, rows, hidden] of tokens written one after the other behind prompts of two lengths."""
    config, device = model.config, model.device
    generator = torch.Generator().manual_seed(0)
    shape = (2, config.num_hidden_layers, 2, config.num_key_value_heads, 4, config.head_dim)
    keys, values = torch.randn(shape, generator=generator).to(device, model.dtype)
    prompts, lengths = np.array([4, 2]), np.zeros(rows, dtype=np.int64)
    of_slots = np.arange(rows) % 2
    attention = layout((keys, values, prompts), rows, tokens)
    attention.start(torch.arange(rows, device=device), torch.from_numpy(of_slots).to(device))
    attention.arrange(of_slots, lengths, np.zeros(rows, dtype=bool))
    attention.begin_block(tokens)
    found = []
    for _ in range(tokens):
        positions = torch.from_numpy(prompts[of_slots] + lengths).to(device)
        attention.begin_step(torch.from_numpy(lengths).to(device), positions)
        ids = torch.randint(config.vocab_size, (rows,), generator=generator).to(device)
        found.append(forward(model, ids, positions, attention))
        lengths += 1
    return torch.stack(found)


@torch.inference_mode()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", FAMILIES)
def test_written_out_every_bit_is_as_in_transformers(kind, dtype):
    model = make(kind, dtype)
    chosen = layers_for(model)
    assert chosen is not own_layers and layers_for(model) is chosen
    for layout in (JoinedAttention, PaddedAttention):
        assert torch.equal(decode(model, chosen, layout), decode(model, own_layers, layout))


@pytest.mark.gpu
@torch.inference_mode()
@pytest.mark.parametrize(("dtype", "layout", "joined"), [  # Triton's interpreter rounds to bf16 towards zero
    (torch.float32, PaddedAttention, False),
    (torch.float16, FlashAttention, True),
    pytest.param(torch.float16, PaddedAttention, False, marks=pytest.mark.slow),
    pytest.param(torch.float32, FlashAttention, True, marks=pytest.mark.slow),
])  # fmt: skip
@pytest.mark.parametrize("kind", [*FAMILIES[:1], *FAMILIES[2:]])
def test_the_kernels_are_no_further_from_exact_numbers(kind, dtype, joined, layout, kernels, monkeypatch):
    if KERNELS == "cpu" or dtype == torch.float32:
        monkeypatch.setattr(cuda_decoding, "flash", flash_stand_in)
    model = make(kind, dtype, KERNELS)
    if joined:
        put_side_by_side(model)
        assert all(weights_together(layer) for layer in model.model.layers)
    fused = decode(model, partial(written_layers, kernels.FusedOperations()), layout)
    plain = decode(model, own_layers, layout)
    check_fused(model)
    if dtype == torch.float32:
        torch.testing.assert_close(fused, plain, rtol=1e-4, atol=1e-5)
        return
    exact = decode(make(kind, dtype, KERNELS).float(), own_layers, layout)
    errors = [float((x.float() - exact).norm() / exact.norm()) for x in (fused, plain)]
    assert errors[0] < 1.3 * errors[1] < 0.01, errors


def weights_together(layer) -> bool:
    """Whether q, k and v, and gate and up, can be multiplied at once."""
    part, mlp = layer.self_attn, layer.mlp
    groups = [(part.q_proj, part.k_proj, part.v_proj), (mlp.gate_proj, mlp.up_proj)]
    return all(side_by_side([one.weight for one in group]) is not None for group in groups)


@pytest.mark.gpu
@torch.inference_mode()
def test_a_long_row_is_normed_by_torch(kernels, monkeypatch):
    monkeypatch.setattr(kernels, "LONGEST", 16)
    model = make(LlamaConfig, device=KERNELS)
    check_fused(model)


def test_other_models_are_decoded_by_their_own_forward_pass(caplog):
    with caplog.at_level(logging.WARNING, "grpo"):
        assert layers_for(make(GemmaConfig)) is own_layers  # its embeddings are scaled
        model = make(LlamaConfig)
        handle = model.model.layers[1].mlp.register_forward_hook(lambda *_: None)
        assert layers_for(model) is own_layers
        handle.remove()
        model.model.embed_tokens.register_forward_hook(lambda *_: None)  # of peft; the embedding is called
        assert layers_for(model) is not own_layers
    assert not caplog.records


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("when", ["before the first rollout", "later"])
def test_a_researchers_own_forward_pass_is_taken(when, dtype, caplog):
    """Also where it changes little: else sampler and trainer would be two policies."""
    model = make(LlamaConfig, dtype)
    if when == "later":
        assert layers_for(model) is not own_layers
    plain = model.model.layers[0].forward
    model.model.layers[0].forward = lambda *arguments, **options: 1.01 * plain(*arguments, **options)
    with caplog.at_level(logging.WARNING, "grpo"):
        assert layers_for(model) is own_layers is layers_for(model)
    assert "its trial failed (it gives something else)" in caplog.text and len(caplog.records) == 1
    model.model.layers[0].forward = plain
    assert layers_for(model) is not own_layers


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("wrong", ["turned", "attend", "feed_forward", "add_norm"])
def test_the_trial_sees_a_wrong_operation(wrong, dtype, monkeypatch):
    model = make(Qwen3Config, dtype)
    if wrong == "turned":
        monkeypatch.setattr(operations, "turned", lambda x, *_: x)
    else:
        plain = getattr(Operations, wrong)
        scaled = {"add_norm": lambda *a: (plain(*a)[0], 1.02 * plain(*a)[1])}.get(wrong, lambda *a: 1.02 * plain(*a))
        monkeypatch.setattr(Operations, wrong, scaled)
    assert layers_for(model) is own_layers


@pytest.mark.parametrize("wrong", ["attend", "feed_forward", "add_norm", "activation"])
def test_the_trial_sees_a_wrong_kernel(wrong, kernels, monkeypatch, caplog):
    model = make(LlamaConfig, device=KERNELS)
    if wrong == "activation":
        for layer in model.model.layers:
            layer.mlp.act_fn = torch.nn.GELU()  # the kernel knows silu alone
    else:
        plain = getattr(kernels.FusedOperations, wrong)
        scaled = {"add_norm": lambda *a: (plain(*a)[0], 1.02 * plain(*a)[1])}.get(wrong, lambda *a: 1.02 * plain(*a))
        monkeypatch.setattr(kernels.FusedOperations, wrong, scaled)
    with caplog.at_level(logging.WARNING, "grpo"):
        assert type(layers_for(model).args[0]) is Operations
    assert "decoding without Triton's kernels, which is slower: its trial failed (they give something" in caplog.text


def test_a_lack_of_memory_is_no_reason_against_a_kernel(monkeypatch):
    def no_memory(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(Operations, "attend", no_memory)
    model = make(LlamaConfig)
    with pytest.raises(torch.OutOfMemoryError):
        layers_for(model)
    monkeypatch.undo()
    assert layers_for(model) is not own_layers


def test_where_a_kernel_fails_the_plain_operations_are_taken(kernels, monkeypatch, caplog):

    def no_kernel(*_):
        raise RuntimeError("PTX was compiled for another device\nin many lines")

    monkeypatch.setattr(kernels.FusedOperations, "add_norm", no_kernel)
    with caplog.at_level(logging.WARNING, "grpo"):
        chosen = layers_for(make(LlamaConfig))
    assert type(chosen.args[0]) is Operations
    assert "decoding without Triton's kernels" in caplog.text and "many lines" not in caplog.text


@pytest.mark.parametrize("kind", FAMILIES)
def test_side_by_side_the_weights_are_what_they_were_and_can_be_saved(kind, tmp_path):
    before, model = make(kind), make(kind)
    model.model.layers[1].self_attn.k_proj.weight.requires_grad_(False)
    put_side_by_side(model)
    assert not model.model.layers[1].self_attn.k_proj.weight.requires_grad
    for (name, one), other in zip(model.named_parameters(), before.parameters(), strict=True):
        assert torch.equal(one, other) and one.requires_grad == ("1.self_attn.k_proj.weight" not in name)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), before.parameters(), strict=True))
    # a step of training changes the one and not its neighbour
    part = model.model.layers[0].self_attn
    with torch.no_grad():
        part.k_proj.weight += 1
    assert torch.equal(part.q_proj.weight, before.model.layers[0].self_attn.q_proj.weight)
    assert torch.equal(part.v_proj.weight, before.model.layers[0].self_attn.v_proj.weight)


def test_tensors_lie_side_by_side_only_in_one_piece_of_memory():
    whole = torch.arange(24.0).view(6, 4)
    assert torch.equal(side_by_side([whole[:1], whole[1:4], whole[4:]]), whole)
    assert side_by_side([whole[:2], whole[3:]]) is None  # a gap
    assert side_by_side([whole[3:], whole[:3]]) is None  # the other way around
    assert side_by_side([whole[:3], whole[3:].clone()]) is None
    assert side_by_side([whole.T[:2], whole.T[2:]]) is None
    assert torch.equal(side_by_side([whole[0], whole[1]]), whole[:2].flatten())
    memory = bytearray(96)
    neighbours = [torch.frombuffer(memory, dtype=torch.float32, count=12, offset=offset) for offset in (0, 48)]
    assert side_by_side(neighbours) is None
