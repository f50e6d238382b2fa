"""A reference in host memory against one that is resident: the same numbers, and little of it on the device."""

import gc
import weakref
from dataclasses import replace
from unittest.mock import patch

import pytest
import torch
from test_decode_loops import needs_loops
from test_engine import tiny_config
from test_packing import CONFIGS, SHAPE, make_pair, make_row, moved
from transformers import AutoModelForCausalLM, LlamaConfig

from src.config import ConfigError
from src.engine import Engine, build, decode_loops
from src.engine.lighter import loop_norm, one_kernel_norm
from src.engine.models import decoder_layers
from src.engine.plan import memory_plan
from src.engine.reference import StreamedReference
from src.engine.scoring import score
from src.records import Scores
from src.train_grpo import run_training

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def deep_model(monkeypatch):
    config = LlamaConfig(**SHAPE | {"num_hidden_layers": 5}, tie_word_embeddings=True)
    monkeypatch.setitem(CONFIGS, "deep", config)


def make_anchor(name: str):
    """A model that is not the policy."""
    anchor = make_pair(name)[0].requires_grad_(False)
    moved(anchor)
    return anchor


def scored(anchor, name: str, chunk_tokens=None, device="cpu") -> tuple[Scores, list[torch.Tensor]]:
    """Scores of a row, and the policy's gradients of log-probs and KL."""
    policy = make_pair(name)[0].to(device)
    elements = chunk_tokens and chunk_tokens * policy.config.vocab_size
    scores = score(policy, make_row(device=device), 0.7, anchor, {"kl": "reverse"}, elements)
    (scores.logprobs + 3 * scores.distances["kl"]).sum().backward()
    return scores, [weight.grad for weight in policy.parameters()]


def assert_nothing_left(anchor: StreamedReference, before: list[int]) -> None:
    assert addresses(anchor.model) == before
    gc.collect()
    assert not anchor.copies and not anchor.fetched and not anchor.at_home


def addresses(model) -> list[int]:
    return [weight.data_ptr() for weight in model.parameters()]


@pytest.mark.parametrize("name", ["deep", "qwen2"])  # with tied embeddings, and with a head of its own
@pytest.mark.parametrize("chunk_tokens", [None, 4])
def test_scores_and_gradients_are_those_of_a_resident_reference_bit_for_bit(name, chunk_tokens):
    expected, gradients = scored(make_anchor(name), name, chunk_tokens)
    assert expected.distances["kl"].mean() > 0.01
    model = make_anchor(name)
    before = addresses(model)
    anchor = StreamedReference(model, CPU)
    for _ in range(2):
        scores, found = scored(anchor, name, chunk_tokens)
        for field in ("logprobs", "anchor_logprobs", "anchor_hidden"):
            assert torch.equal(getattr(scores, field), getattr(expected, field)), field
        assert torch.equal(scores.distances["kl"], expected.distances["kl"])
        assert all(map(torch.equal, found, gradients))
        assert_nothing_left(anchor, before)


def test_at_most_two_layers_are_there_at_once_and_every_weight_is_copied_once_a_pass():
    model = make_anchor("deep")
    anchor, layers = StreamedReference(model, CPU), list(decoder_layers(model))
    home, copies, counts, away = set(addresses(model)), [], [], []
    empty_like = torch.empty_like

    def noted(*arguments, **options):
        copies.append(weakref.ref(copy := empty_like(*arguments, **options)))
        return copy

    def look(*_):  # in the middle of a layer
        counts.append(sum(copy() is not None for copy in copies))
        away.append(len(home - set(addresses(model))))

    for layer in layers:
        layer.mlp.register_forward_pre_hook(look)
    with patch.object(torch, "empty_like", noted):
        scored(anchor, "deep", chunk_tokens=4)
    each, rest = len(list(layers[0].parameters())), 2  # the embedding, which is the head, and the norm
    assert len(copies) == len(home) == len(layers) * each + rest
    assert max(counts) == 2 * each + 1 and len(counts) == len(layers)
    assert away == [each] * len(layers)


def test_a_layer_that_fails_leaves_nothing_behind():
    model = make_anchor("deep")
    before = addresses(model)
    anchor = StreamedReference(model, CPU)
    with pytest.raises(ValueError, match="attention_plan"):
        anchor.get_decoder()(input_ids=torch.tensor([[1, 2]]))
    assert_nothing_left(anchor, before)
    ours, theirs = (scored(each, "deep")[0].anchor_logprobs for each in (anchor, make_anchor("deep")))
    assert torch.equal(ours, theirs)


def test_loading_replaces_the_weights_in_host_memory_also_while_an_old_head_is_kept():
    model = make_anchor("deep")
    anchor, before = StreamedReference(model, CPU), addresses(model)
    old_head = anchor.get_output_embeddings()
    policy = make_pair("deep")[0]
    anchor.load_state_dict(policy.state_dict())
    assert addresses(model) == before
    assert all(torch.equal(weight, policy.state_dict()[name]) for name, weight in anchor.state_dict().items())
    scores, _ = scored(anchor, "deep")
    assert torch.equal(scores.anchor_logprobs, scores.logprobs)
    assert not torch.equal(old_head(torch.eye(32)), anchor.get_output_embeddings()(torch.eye(32)))


def test_a_run_learns_the_same_and_goes_on_from_a_checkpoint_with_a_moving_reference(tmp_path):
    keys = ["training.reference_sync_steps=2", "training.ckpt_save_interval=1", "training.eval_first=false"]
    finals = []
    for name, steps in (("resident", [3]), ("offloaded", [2, 3])):
        for last in steps:
            own = [f"training.reference_offload={str(name == 'offloaded').lower()}", f"training.max_steps={last}"]
            run_training(tiny_config(*keys, *own), "countdown", tmp_path / name)
        (final,) = (tmp_path / name).glob("runs/*/final")
        finals.append(AutoModelForCausalLM.from_pretrained(final).state_dict())
    assert all(torch.equal(weight, finals[1][name]) for name, weight in finals[0].items())


@pytest.mark.parametrize("offload", ["true", "false"])
def test_norms_of_one_kernel_are_those_of_policy_and_reference_alike(offload, monkeypatch):
    monkeypatch.setattr(build, "LIGHT_ON", ("cpu",))
    engine = Engine(tiny_config(f"training.reference_offload={offload}", "model.dtype=bfloat16"))
    engine.load_model()
    norms = [module for module in engine.model.modules() if "Norm" in type(module).__name__]
    assert norms and all(type(norm).forward is one_kernel_norm for norm in norms)
    scores = score(engine.model, make_row(dtype=torch.bfloat16), 1.0, engine.anchor)
    assert torch.equal(scores.anchor_logprobs, scores.logprobs)  # in bf16 the two norms differ


@needs_loops
@pytest.mark.parametrize("offload", ["true", "false"])
@pytest.mark.parametrize("compiled", ["true", "false"])
def test_so_are_norms_in_loops_which_nothing_compiles(offload, compiled, monkeypatch):
    monkeypatch.setattr(decode_loops, "WORTH_COMPILING", 0)
    monkeypatch.setattr(build, "check_compiler", lambda device: None)
    monkeypatch.setattr(build, "compile_layers", lambda *model: None)
    engine = Engine(tiny_config(f"training.reference_offload={offload}", f"model.compile={compiled}"))
    engine.load_model()
    norms = [module for module in engine.model.modules() if "Norm" in type(module).__name__]
    assert norms and {type(norm).forward is loop_norm for norm in norms} == {compiled == "false"}
    scores = score(engine.model, make_row(), 1.0, engine.anchor)
    assert torch.equal(scores.anchor_logprobs, scores.logprobs)


def test_it_is_refused_where_the_reference_is_no_model_of_its_own(monkeypatch):
    offload = "training.reference_offload=true"
    with pytest.raises(ConfigError, match=r"reference_offload does nothing with lora.*remove the key"):
        Engine(tiny_config(offload, "lora.r=2"))
    monkeypatch.setattr(build, "world", lambda: 2)
    with pytest.raises(ConfigError, match=r"reference_offload is not possible with.*parallel: replicate"):
        Engine(tiny_config(offload))
    build.check_reference_offload(tiny_config(offload, "training.parallel=replicate"))


def test_the_plan_counts_two_layers_and_the_embedding():
    model, config, plans = make_pair("deep")[0], tiny_config(), []
    for offload in (False, True):
        config.training = replace(config.training, reference_offload=offload)
        plans.append(memory_plan(config, model, model))
    layer = 2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48 + 2 * 32  # queries and output, keys and values, MLP, norms
    rest = 61 * 32 + 32
    assert plans[0].pop("reference") == 4 * (5 * layer + rest)
    assert plans[1].pop("reference") == 4 * (2 * layer + rest)
    assert plans[0] == plans[1]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_the_copies_beside_the_compute_change_nothing():
    device = torch.device("cuda")
    expected, gradients = scored(make_anchor("deep").to(device), "deep", 4, device)
    anchor = StreamedReference(make_anchor("deep"), device)
    assert all(weight.is_pinned() for weight in anchor.model.parameters())
    for _ in range(20):
        scores, found = scored(anchor, "deep", 4, device)
        torch.testing.assert_close(scores.anchor_logprobs, expected.anchor_logprobs)
        torch.testing.assert_close(found, gradients)
    assert all(weight.device.type == "cpu" for weight in anchor.model.parameters())
