"""LoRA against two plain models: one with the weights W + alpha / r * B A, multiplied out here, and the base."""

import copy
import gc
import json
import warnings
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_packing import CONFIGS, RAGGED, make_groups, make_pair, plain_logprobs
from test_sampler import TOKENIZER, make_prompts, settings, tokens_of
from transformers import AutoModelForCausalLM, AutoTokenizer

from src.config import ConfigError, LoraConfig
from src.lora import FrozenBase, add_adapter, load_adapter_weights, merged_model, save_adapter
from src.packing import ATTENTION_NAME, check_attention, pack
from src.sampler import rollout
from src.scoring import score

LORA = LoraConfig(r=3, alpha=6.0)
SCALE = 2.0  # alpha / r
PREFIX = "base_model.model."
LINEAR = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
GROUPS = make_groups(torch.Generator().manual_seed(1), RAGGED)


@pytest.fixture(autouse=True)
def no_warnings():
    """peft warns when something is about to go wrong; none of these tests may cause that unseen."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message="`gradient_checkpointing_enable`")  # these tests call it
        yield


def adapter_parts(model) -> dict[str, tuple[torch.nn.Parameter, torch.nn.Parameter]]:
    """A [r, in] and B [out, r] of every adapted layer, by the layer's name in the plain model."""
    parameters = dict(model.named_parameters())
    names = [name for name in parameters if name.endswith("lora_A.default.weight")]
    return {
        name.removeprefix(PREFIX).removesuffix(".lora_A.default.weight"): (
            parameters[name],
            parameters[name.replace("lora_A", "lora_B")],
        )
        for name in names
    }


def fill(model, seed: int = 5) -> None:
    """An adapter that has been trained: B is not zero any more."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, b in adapter_parts(model).values():
            b.copy_(0.2 * torch.randn(b.shape, generator=generator))


def make_adapted(name: str = "llama", lora: LoraConfig = LORA, checkpointing: bool = False):
    """A model with a trained adapter, and the plain base with the same weights."""
    packed, plain = make_pair(name)
    if checkpointing:
        packed.gradient_checkpointing_enable({"use_reentrant": False})
        packed.train()
    model = add_adapter(packed, lora, 0)
    fill(model)
    return model, plain


def multiplied_out(base, model, scale: float = SCALE):
    """A copy of the base with scale * B A added to its weights."""
    merged = copy.deepcopy(base)
    with torch.no_grad():
        for name, (a, b) in adapter_parts(model).items():
            merged.get_submodule(name).weight += scale * (b @ a).to(base.dtype)
    return merged


def all_logprobs(plain, temperature: float = 1.0) -> torch.Tensor:
    """Log-probs [N, vocab] of the plain model at every completion token of GROUPS."""
    rows = []
    for group in GROUPS:
        for episode in group.episodes:
            prompt = group.problem.prompt_ids
            logits = plain(torch.tensor([prompt + episode.token_ids]), use_cache=False).logits[0] / temperature
            rows.append(logits[len(prompt) - 1 : -1].log_softmax(-1))
    return torch.cat(rows)


@pytest.fixture(scope="module")
def saved(tmp_path_factory, tiny_model_folder):
    """A trained adapter of the tiny model on the disk, and the model it was saved from."""
    model = add_adapter(load_tiny(tiny_model_folder), LORA, 0)
    fill(model)
    folder = tmp_path_factory.mktemp("lora") / "adapter"
    save_adapter(model, AutoTokenizer.from_pretrained(tiny_model_folder), folder)
    return folder, model


def load_tiny(folder, **options):
    return AutoModelForCausalLM.from_pretrained(folder, attn_implementation=ATTENTION_NAME, **options).eval()


def copy_of(saved, folder: Path, **changes) -> Path:
    """The saved adapter once more, with keys of its description changed."""
    source = saved[0]
    folder.mkdir()
    description = json.loads((source / "adapter_config.json").read_text()) | changes
    (folder / "adapter_config.json").write_text(json.dumps(description))
    (folder / "adapter_model.safetensors").write_bytes((source / "adapter_model.safetensors").read_bytes())
    return folder


# a new adapter


@pytest.mark.parametrize("name", ["llama", "qwen2"])  # the head is the embedding, or is not
def test_a_new_adapter_is_zero_and_sits_on_every_linear_layer_but_the_head(name):
    packed, plain = make_pair(name)
    batch = pack(GROUPS, "cpu", torch.float32)
    expected = score(packed, batch, 1.0).logprobs
    model = add_adapter(packed, LORA, 0)
    assert torch.equal(score(model, batch, 1.0).logprobs, expected)
    parts = adapter_parts(model)
    assert set(parts) == {n for n, m in plain.named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head"}
    assert len(parts) == 2 * len(LINEAR)
    for layer, (a, b) in parts.items():
        weight = plain.get_submodule(layer).weight
        assert (a.shape, b.shape) == ((3, weight.shape[1]), (weight.shape[0], 3))
        assert a.abs().min() > 0 and b.abs().max() == 0
        assert a.dtype == b.dtype == torch.float32
    trained = {id(x) for x in model.parameters() if x.requires_grad}
    assert trained == {id(x) for pair in parts.values() for x in pair}
    assert type(model.get_output_embeddings()) is torch.nn.Linear
    assert type(model.get_input_embeddings()) is torch.nn.Embedding
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == (name == "llama")
    assert not any(module.training for module in model.modules())


def test_the_embedded_model_with_its_tied_head_is_adapted_in_its_decoder_alone():
    folder = Path(__file__).parent.parent / "models" / "countdown-tiny"
    model = add_adapter(load_tiny(folder, dtype=torch.float32), LoraConfig(r=2), 0)
    assert len(adapter_parts(model)) == 3 * len(LINEAR)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert type(model.get_output_embeddings()) is torch.nn.Linear


def test_the_start_is_a_function_of_the_seed_and_draws_no_other_random_number():
    starts = []
    for seed, noise in ((3, 0), (3, 1), (4, 0)):
        packed, _ = make_pair("llama")
        torch.manual_seed(noise)
        before = torch.get_rng_state()
        starts.append([a.detach() for a, _ in adapter_parts(add_adapter(packed, LORA, seed)).values()])
        assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(x, y) for x, y in zip(starts[0], starts[1], strict=True))
    assert not any(torch.equal(x, y) for x, y in zip(starts[0], starts[2], strict=True))
    assert not torch.equal(starts[0][0], starts[0][1]), "every layer has numbers of its own"


@pytest.mark.parametrize(
    "names, layers", [(["q_proj", "down_proj"], 4), (["self_attn.v_proj"], 2), (["model.layers.1.mlp.up_proj"], 1)]
)
def test_named_layers_alone_are_adapted(names, layers):
    packed, _ = make_pair("qwen3")
    parts = adapter_parts(add_adapter(packed, LoraConfig(r=2, target_modules=names), 0))
    assert len(parts) == layers
    assert all(any(f".{layer}".endswith(f".{name}") for name in names) for layer in parts)


@pytest.mark.parametrize("wrong", ["q_prj", "lm_head", "embed_tokens", "proj", "mlp", "norm"])
def test_a_name_that_is_no_adaptable_layer_is_an_error_that_lists_those(wrong):
    packed, _ = make_pair("qwen2")
    with pytest.raises(ConfigError) as error:
        add_adapter(packed, LoraConfig(r=2, target_modules=["q_proj", wrong]), 0)
    assert f"lora.target_modules: {wrong} " in str(error.value)
    assert str(error.value).endswith("down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj")


# policy and reference


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "granite"])
@pytest.mark.parametrize("checkpointing, chunk_tokens", [(False, None), (True, None), (True, 5)])
@pytest.mark.parametrize("direction", ["reverse", "forward"])
def test_scores_and_gradients_equal_those_of_two_plain_models(name, checkpointing, chunk_tokens, direction):
    model, base = make_adapted(name, checkpointing=checkpointing)
    assert not checkpointing or any(getattr(m, "gradient_checkpointing", False) and m.training for m in model.modules())
    policy = multiplied_out(base, model)
    batch = pack(GROUPS, "cpu", torch.float32)
    weights = batch.token_weight[batch.episode_index]

    mine, reference = all_logprobs(policy, 0.7), all_logprobs(base, 0.7).detach()
    chosen = torch.cat([plain_logprobs(policy, g, e, 0.7) for g in GROUPS for e in g.episodes])
    from_, to = (mine, reference) if direction == "reverse" else (reference, mine)
    kl = (from_.exp() * (from_ - to)).sum(-1)
    assert kl.min() > 1e-3, "the adapter must matter"
    ((chosen + 3 * kl) * weights).sum().backward()

    scores = score(model, batch, 0.7, FrozenBase(model), direction, chunk_tokens)
    ((scores.logprobs + 3 * scores.kl) * weights).sum().backward()
    torch.testing.assert_close(scores.logprobs, chosen, atol=1e-4, rtol=0)
    torch.testing.assert_close(scores.kl, kl, atol=1e-4, rtol=0)
    expected = reference.gather(1, batch.target_ids[:, None])[:, 0]
    torch.testing.assert_close(scores.anchor_logprobs, expected, atol=1e-4, rtol=0)
    for layer, (a, b) in adapter_parts(model).items():  # the chain rule through W + SCALE * B A
        slope = policy.get_submodule(layer).weight.grad
        for found, exact in ((a.grad, SCALE * b.detach().T @ slope), (b.grad, SCALE * slope @ a.detach().T)):
            assert (found - exact).norm() < 1e-4 * exact.norm(), layer
    assert all(x.grad is None for n, x in model.named_parameters() if "lora_" not in n)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_reference_leaves_the_policy_as_it_was_between_forward_and_backward(checkpointing):
    model, _ = make_adapted(checkpointing=checkpointing)
    anchor, batch = FrozenBase(model), pack(GROUPS, "cpu", torch.float32)
    trained = [x for pair in adapter_parts(model).values() for x in pair]
    score(model, batch, 1.0).logprobs.sum().backward()
    once = [x.grad.clone() for x in trained]
    addresses = [x.grad.data_ptr() for x in trained]

    loss = score(model, batch, 1.0).logprobs.sum()
    for reference in (score(anchor, batch, 1.0), score(anchor, batch, 1.0, anchor, "reverse")):
        assert not reference.logprobs.requires_grad
    assert all(x.requires_grad for x in trained) and [x.grad.data_ptr() for x in trained] == addresses
    loss.backward()
    assert all(torch.equal(x.grad, 2 * y) for x, y in zip(trained, once, strict=True))


def test_the_reference_is_the_base_bit_for_bit_and_the_policy_is_back_after_it_even_when_it_fails():
    model, base = make_adapted()
    base.set_attn_implementation(ATTENTION_NAME)
    batch, anchor = pack(GROUPS, "cpu", torch.float32), FrozenBase(model)
    before = score(model, batch, 1.0).logprobs
    assert torch.equal(score(anchor, batch, 1.0).logprobs, score(base, batch, 1.0).logprobs)
    with pytest.raises(ValueError, match="attention_plan"):
        anchor.get_decoder()(input_ids=batch.input_ids)
    assert torch.equal(score(model, batch, 1.0).logprobs, before)
    assert not torch.equal(before, score(base, batch, 1.0).logprobs)


def test_a_bf16_base_keeps_its_precision_and_the_adapter_is_fp32():
    packed, _ = make_pair("llama")
    exact, _ = make_adapted()
    model = add_adapter(packed.bfloat16(), LORA, 0)
    with torch.no_grad():
        for (a, b), (exact_a, exact_b) in zip(
            adapter_parts(model).values(), adapter_parts(exact).values(), strict=True
        ):
            a.copy_(exact_a), b.copy_(exact_b)
    assert {x.dtype for pair in adapter_parts(model).values() for x in pair} == {torch.float32}
    assert model.dtype == torch.bfloat16
    batch = pack(GROUPS, "cpu", torch.bfloat16)
    scores = score(model, batch, 1.0, FrozenBase(model), "reverse")
    assert scores.hidden.dtype == scores.anchor_hidden.dtype == torch.bfloat16
    reference = score(exact, pack(GROUPS, "cpu", torch.float32), 1.0, FrozenBase(exact), "reverse")
    # what bf16 costs the base alone, twice over; the adapter itself moves log-probs by much more
    rounding = (scores.anchor_logprobs - reference.anchor_logprobs).abs().mean()
    assert (scores.logprobs - reference.logprobs).abs().mean() < 2 * rounding
    assert (reference.logprobs - reference.anchor_logprobs).abs().mean() > 10 * rounding
    for result in (scores, reference):
        result.logprobs.sum().backward()
    for (_, b), (_, exact_b) in zip(adapter_parts(model).values(), adapter_parts(exact).values(), strict=True):
        assert b.grad.dtype == torch.float32
        assert torch.cosine_similarity(b.grad.flatten(), exact_b.grad.flatten(), 0) > 0.98


def live_bytes() -> int:
    """Bytes of all tensors that Python holds, each storage once (gradients are held elsewhere)."""
    gc.collect()
    tensors = [x for x in gc.get_objects() if type(x) in (torch.Tensor, torch.nn.Parameter)]  # no fakes
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}
    return sum(storages.values())


def test_policy_and_reference_are_one_model_in_memory():
    packed, plain = make_pair("llama")
    batch = pack(GROUPS, "cpu", torch.float32)
    score(packed, batch, 1.0)
    before = live_bytes()
    assert before > 2 * sum(4 * x.numel() for x in plain.parameters()), "the count must see a second model"
    model = add_adapter(packed, LORA, 0)
    anchor = FrozenBase(model)
    scores = score(model, batch, 1.0, anchor, "reverse")
    del scores
    adapter = sum(4 * x.numel() for pair in adapter_parts(model).values() for x in pair)
    assert live_bytes() - before == adapter
    assert anchor.get_output_embeddings() is packed.get_output_embeddings()


def test_steps_of_policy_gradient_change_the_adapter_alone_and_not_the_reference():
    packed, base = make_pair("llama")
    model = add_adapter(packed, LORA, 0)
    anchor, batch = FrozenBase(model), pack(GROUPS, "cpu", torch.float32)
    start = {name: x.detach().clone() for name, x in model.named_parameters()}
    reference = score(anchor, batch, 1.0).logprobs
    optimizer = torch.optim.AdamW([x for x in model.parameters() if x.requires_grad], lr=0.02)
    objectives = []
    for _ in range(4):
        scores = score(model, batch, 1.0, anchor, "reverse")
        assert torch.equal(scores.anchor_logprobs, reference)
        ratio = (scores.logprobs - batch.sampled_logprobs.clamp(min=-5)).exp()
        objective = (ratio * batch.advantages[batch.episode_index] - 0.04 * scores.kl).mean()
        objectives.append(objective.item())
        (-objective).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    assert objectives == sorted(objectives) and objectives[-1] > objectives[0] + 0.01
    for name, x in model.named_parameters():
        assert torch.equal(x, start[name]) == ("lora_" not in name), name
    plain = base.state_dict()
    for name, x in model.get_base_model().state_dict().items():
        if "lora_" not in name:
            assert torch.equal(x, plain[name.replace(".base_layer", "")])


# sampling


@pytest.mark.parametrize("name", ["llama", "qwen2"])
@pytest.mark.parametrize("temperature, checkpointing", [(0.0, False), (0.8, False), (0.8, True)])
def test_the_sampler_writes_what_the_merged_model_writes(name, temperature, checkpointing):
    model, base = make_adapted(name, checkpointing=checkpointing)
    base.set_attn_implementation(ATTENTION_NAME)
    check_attention(model, 64)
    wanted = settings(5, temperature=temperature)
    groups = rollout(model, TOKENIZER, make_prompts(), 4, wanted)
    assert tokens_of(groups) == tokens_of(rollout(multiplied_out(base, model), TOKENIZER, make_prompts(), 4, wanted))
    assert tokens_of(groups) != tokens_of(rollout(base, TOKENIZER, make_prompts(), 4, wanted))
    if temperature:
        batch = pack(groups, "cpu", torch.float32)
        torch.testing.assert_close(batch.sampled_logprobs, score(model, batch, temperature).logprobs, atol=1e-4, rtol=0)


# saving and loading


def test_a_saved_adapter_loads_in_plain_peft_from_any_folder_with_the_same_log_probs(
    saved, tiny_model_folder, tmp_path, monkeypatch
):
    monkeypatch.chdir(tiny_model_folder.parent)
    model = add_adapter(load_tiny(tiny_model_folder.name), LORA, 0)  # a relative path, as in a config
    fill(model)
    folder = tmp_path / "adapter"
    save_adapter(model, AutoTokenizer.from_pretrained(tiny_model_folder), folder)
    assert (
        load_file(folder / "adapter_model.safetensors").keys()
        == load_file(saved[0] / "adapter_model.safetensors").keys()
    )
    monkeypatch.chdir(tmp_path)
    written = {path.name for path in folder.iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json"} <= written
    assert not written & {"README.md", "model.safetensors"}
    description = json.loads((folder / "adapter_config.json").read_text())
    assert description["base_model_name_or_path"] == str(tiny_model_folder.resolve())
    assert (description["r"], description["lora_alpha"], description["task_type"]) == (3, 6.0, "CAUSAL_LM")
    assert AutoTokenizer.from_pretrained(folder).eos_token_id == TOKENIZER.eos_token_id
    base = AutoModelForCausalLM.from_pretrained(description["base_model_name_or_path"], attn_implementation="eager")
    warnings.simplefilter("ignore", FutureWarning)  # peft asks transformers by an old name
    plain = peft.PeftModel.from_pretrained(base, folder).eval()
    expected = score(model, pack(GROUPS, "cpu", torch.float32), 1.0).logprobs
    with torch.no_grad():
        found = torch.cat([plain_logprobs(plain, g, e) for g in GROUPS for e in g.episodes])
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    assert all(x.requires_grad for pair in adapter_parts(model).values() for x in pair), "saving must not freeze it"


def test_weights_round_trip_bit_for_bit_into_the_same_parameters(saved, tiny_model_folder):
    folder, source = saved
    model = add_adapter(load_tiny(tiny_model_folder), LORA, 9)
    parameters = {name: (id(x), x.data_ptr()) for name, x in model.named_parameters()}
    load_adapter_weights(model, folder)
    assert {name: (id(x), x.data_ptr()) for name, x in model.named_parameters()} == parameters
    for name, (a, b) in adapter_parts(source).items():
        assert torch.equal(adapter_parts(model)[name][0], a) and torch.equal(adapter_parts(model)[name][1], b)
        assert a.requires_grad and b.requires_grad


@pytest.mark.parametrize("r, alpha, names", [(0, 32.0, None), (3, 6.0, ["k_proj", *sorted(LINEAR)])])
def test_a_saved_adapter_goes_on_with_its_own_rank_and_alpha_and_without_dropout(
    saved, tiny_model_folder, tmp_path, r, alpha, names
):
    folder = copy_of(saved, tmp_path / "dropout", lora_dropout=0.5, target_modules=sorted(LINEAR))
    model = add_adapter(
        load_tiny(tiny_model_folder), LoraConfig(r=r, alpha=alpha, target_modules=names, path=str(folder)), 4
    )
    batch = pack(GROUPS, "cpu", torch.float32)
    expected = score(saved[1], batch, 1.0).logprobs
    assert torch.equal(score(model.train(), batch, 1.0).logprobs, expected)
    trained = {name for name, x in model.named_parameters() if x.requires_grad}
    assert trained == {name for name, _ in model.named_parameters() if "lora_" in name}


@pytest.mark.parametrize(
    "asked, sentence",
    [
        (LoraConfig(r=4), "lora.r is 4, but the adapter in .* has 3; remove lora.r"),
        (LoraConfig(alpha=7.0), "lora.alpha is 7.0, but the adapter in .* has 6.0"),
        (LoraConfig(target_modules=["q_proj"]), "lora.target_modules is {'q_proj'}, but the adapter"),
    ],
)
def test_keys_that_contradict_the_saved_adapter_are_an_error(saved, tiny_model_folder, asked, sentence):
    asked.path = str(saved[0])
    with pytest.raises(ConfigError, match=sentence):
        add_adapter(load_tiny(tiny_model_folder), asked, 0)


@pytest.mark.parametrize(
    "changes, sentence",
    [
        ({"modules_to_save": ["lm_head"]}, "is not plain LoRA .see modules_to_save."),
        ({"bias": "all"}, "is not plain LoRA .see bias."),
        ({"use_dora": True}, "is not plain LoRA .see use_dora."),
        ({"init_lora_weights": "pissa", "bias": "all"}, "is not plain LoRA .see bias, init_lora_weights."),
        ({"trainable_token_indices": [1]}, "is not plain LoRA .see trainable_token_indices."),
        ({"layer_replication": [[0, 2]]}, "is not plain LoRA .see layer_replication."),
        ({"peft_type": "IA3"}, "is not plain LoRA"),
        ({"peft_type": "NONSENSE"}, "adapter_config.json cannot be read"),
        ({"target_modules": ["nothing"]}, "was made for another model"),
        ({"target_modules": ["q_proj"]}, r"another model: \S+down_proj.lora_A.weight is .* there, missing here"),
        ({"target_modules": ["q_proj", "lm_head"]}, "adapts the head or the embedding"),
        ({"target_modules": ["q_proj", "embed_tokens"]}, "adapts the head or the embedding"),
        ({"r": 2}, r"q?_?\S+lora_A.weight is \[3, \d+\] there, \[2, \d+\] here"),
    ],
)
@pytest.mark.filterwarnings("ignore")  # peft warns of a tied head and of keys it drops
def test_an_adapter_that_cannot_be_trained_here_is_one_sentence(saved, tiny_model_folder, tmp_path, changes, sentence):
    warnings.simplefilter("ignore")
    folder = copy_of(saved, tmp_path / "changed", **changes)
    with pytest.raises(ConfigError, match=sentence) as error:
        add_adapter(load_tiny(tiny_model_folder), LoraConfig(path=str(folder)), 0)
    assert str(folder) in str(error.value)


@pytest.mark.parametrize(
    "changes, found",
    [
        ({"intermediate_size": 64}, r"down_proj.lora_A.weight is \[3, 48\] there, \[3, 64\] here"),
        ({"num_hidden_layers": 3}, r"layers.2.mlp.down_proj.lora_A.weight is missing there, \[3, 48\] here"),
        ({"num_hidden_layers": 1}, r"layers.1.mlp.down_proj.lora_A.weight is \[3, 48\] there, missing here"),
    ],
)
def test_an_adapter_of_another_model_is_refused(saved, tmp_path, changes, found):
    warnings.simplefilter("ignore")  # peft says that the base has another name
    folder = copy_of(saved, tmp_path / "adapter", target_modules=sorted(LINEAR))
    config = copy.deepcopy(CONFIGS["llama"])
    for name, value in changes.items():
        setattr(config, name, value)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=ATTENTION_NAME)
    with pytest.raises(ConfigError, match=f"made for another model: .*{found}"):
        add_adapter(model, LoraConfig(path=str(folder)), 0)


def test_a_base_of_another_name_is_a_warning(saved, tmp_path, tiny_model_folder):
    folder = copy_of(saved, tmp_path / "other", base_model_name_or_path="someone/else")
    with pytest.warns(UserWarning, match="someone/else"):
        add_adapter(load_tiny(tiny_model_folder), LoraConfig(path=str(folder)), 0)


def test_a_folder_without_a_whole_adapter_is_one_sentence(saved, tiny_model_folder, tmp_path):
    def sentence(folder) -> str:
        with pytest.raises(ConfigError) as error:
            add_adapter(load_tiny(tiny_model_folder), LoraConfig(path=str(folder)), 0)
        assert str(folder) in str(error.value)
        return str(error.value)

    assert "there is no adapter_config.json in" in sentence(tmp_path / "nowhere")
    assert "there is no adapter_config.json in" in sentence(tiny_model_folder)
    folder = copy_of(saved, tmp_path / "broken")
    whole = (folder / "adapter_model.safetensors").read_bytes()
    (folder / "adapter_model.safetensors").write_bytes(whole[: len(whole) // 2])
    assert "adapter_model.safetensors cannot be read" in sentence(folder)
    (folder / "adapter_model.safetensors").unlink()
    assert "adapter_model.safetensors cannot be read" in sentence(folder)
    (folder / "adapter_config.json").write_text('{"peft_type": "LO')
    assert "adapter_config.json cannot be read" in sentence(folder)


def test_weights_that_do_not_fit_leave_the_adapter_untouched(saved, tiny_model_folder, tmp_path):
    weights = load_file(saved[0] / "adapter_model.safetensors")
    last = sorted(weights)[-1]
    model = add_adapter(load_tiny(tiny_model_folder), LORA, 9)
    before = {name: x.detach().clone() for name, x in model.named_parameters()}
    extra = weights | {last.replace("layers.1", "layers.7"): weights[last].clone()}
    short = {name: x for name, x in weights.items() if name != last}
    for state in (extra, short, weights | {last: weights[last][:-1].contiguous()}):
        save_file(state, tmp_path / "adapter_model.safetensors")
        with pytest.raises(ConfigError, match="made for another model"):
            load_adapter_weights(model, tmp_path)
        assert all(torch.equal(x, before[name]) for name, x in model.named_parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_merged_copy_is_the_sum_in_the_bases_precision_and_the_live_model_stays(tiny_model_folder, tmp_path, dtype):
    base = load_tiny(tiny_model_folder, dtype=dtype)
    model = add_adapter(load_tiny(tiny_model_folder, dtype=dtype), LORA, 0)
    fill(model)
    before = {name: x.clone() for name, x in model.state_dict().items()}
    merged = merged_model(model)
    assert type(merged) is type(base) and not any(x.requires_grad for x in merged.parameters())
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    assert all(x.requires_grad for pair in adapter_parts(model).values() for x in pair)
    own = {x.untyped_storage().data_ptr() for x in [*merged.parameters(), *merged.buffers()]}
    assert not own & {x.untyped_storage().data_ptr() for x in [*model.parameters(), *model.buffers()]}
    parts, plain = adapter_parts(model), base.state_dict()
    assert merged.state_dict().keys() == plain.keys()
    for name, x in merged.state_dict().items():
        layer = name.removesuffix(".weight")
        a, b = parts.get(layer, (torch.zeros(1, 1), torch.zeros(1, 1)))
        exact = (plain[name].float() + SCALE * (b @ a)).detach() if layer in parts else plain[name].float()
        assert x.dtype == dtype
        torch.testing.assert_close(
            x.float(), exact.to(dtype).float(), atol=1e-6, rtol=0 if dtype == torch.float32 else 8e-3
        )
    merged.save_pretrained(tmp_path / "merged")
    again = load_tiny(tmp_path / "merged")
    assert again.get_output_embeddings().weight is again.get_input_embeddings().weight
    batch = pack(GROUPS, "cpu", dtype)
    assert torch.equal(score(again, batch, 1.0).logprobs, score(merged, batch, 1.0).logprobs)
    if dtype == torch.float32:
        torch.testing.assert_close(
            score(again, batch, 1.0).logprobs, score(model, batch, 1.0).logprobs, atol=1e-4, rtol=0
        )
