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
from test_engine import make_engine, tiny_config
from test_packing import make_pair, make_row, of_tokens, plain_logits, ragged_groups
from test_sampler import TOKENIZER, sample, tokens_of
from transformers import AutoModelForCausalLM, AutoTokenizer

from src.config import ConfigError, LoraConfig
from src.engine.attention import ATTENTION_NAME, check_attention
from src.engine.lora import (
    FrozenBase,
    add_adapter,
    dropout_in_update,
    load_adapter_weights,
    merged_model,
    save_adapter,
)
from src.engine.plan import memory_plan
from src.engine.scoring import score
from src.train_grpo import run_training

LORA = LoraConfig(r=3, alpha=6.0)
SCALE = 2.0  # alpha / r
PREFIX = "base_model.model."
LINEAR = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
GROUPS = ragged_groups()
REVERSE = {"kl": "reverse"}


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


@pytest.fixture(scope="module")
def saved(tmp_path_factory, tiny_model_folder):
    """A trained adapter of the tiny model on the disk, and the model it was saved from."""
    model = adapted_tiny(tiny_model_folder)
    fill(model)
    folder = tmp_path_factory.mktemp("lora") / "adapter"
    save_adapter(model, AutoTokenizer.from_pretrained(tiny_model_folder), folder)
    return folder, model


def load_tiny(folder, **options):
    return AutoModelForCausalLM.from_pretrained(folder, attn_implementation=ATTENTION_NAME, **options).eval()


def adapted_tiny(folder, lora: LoraConfig = LORA, seed: int = 0):
    return add_adapter(load_tiny(folder), lora, seed)


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
    row = make_row()
    expected = score(packed, row, 1.0).logprobs
    model = add_adapter(packed, LORA, 0)
    assert torch.equal(score(model, row, 1.0).logprobs, expected)
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


def test_a_name_that_is_no_adaptable_layer_is_an_error_that_lists_those():
    packed, known = make_pair("qwen2")[0], "down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj"
    for wrong in ("q_prj", "lm_head", "embed_tokens", "proj", "mlp", "norm"):
        with pytest.raises(ConfigError, match=f"lora.target_modules: {wrong} .*: {known}$"):
            add_adapter(packed, LoraConfig(r=2, target_modules=["q_proj", wrong]), 0)


# policy and reference


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "granite"])
@pytest.mark.parametrize("checkpointing, chunk_tokens", [(False, None), (True, None), (True, 5)])
@pytest.mark.parametrize("direction", ["reverse", "forward"])
def test_scores_and_gradients_equal_those_of_two_plain_models(name, checkpointing, chunk_tokens, direction):
    model, base = make_adapted(name, checkpointing=checkpointing)
    assert not checkpointing or any(getattr(m, "gradient_checkpointing", False) and m.training for m in model.modules())
    policy, row = multiplied_out(base, model), make_row()
    mine, reference = (plain_logits(plain, GROUPS, 0.7).log_softmax(-1) for plain in (policy, base))
    reference, chosen = reference.detach(), of_tokens(mine, GROUPS)
    from_, to = (mine, reference) if direction == "reverse" else (reference, mine)
    kl = (from_.exp() * (from_ - to)).sum(-1)
    assert kl.min() > 1e-3, "the adapter must matter"
    ((chosen + 3 * kl) * row.batch.weights).sum().backward()

    elements = chunk_tokens and chunk_tokens * model.config.vocab_size
    scores = score(model, row, 0.7, FrozenBase(model), {"kl": direction}, elements)
    row.batch.mean(scores.logprobs + 3 * scores.distances["kl"]).backward()
    torch.testing.assert_close(scores.logprobs, chosen, atol=1e-4, rtol=0)
    torch.testing.assert_close(scores.distances["kl"], kl, atol=1e-4, rtol=0)
    torch.testing.assert_close(scores.anchor_logprobs, of_tokens(reference, GROUPS), atol=1e-4, rtol=0)
    for layer, (a, b) in adapter_parts(model).items():  # the chain rule through W + SCALE * B A
        slope = policy.get_submodule(layer).weight.grad
        for found, exact in ((a.grad, SCALE * b.detach().T @ slope), (b.grad, SCALE * slope @ a.detach().T)):
            assert (found - exact).norm() < 1e-4 * exact.norm(), layer
    assert all(x.grad is None for n, x in model.named_parameters() if "lora_" not in n)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("loaded", [False, True])
def test_the_reference_leaves_the_policy_as_it_was_between_forward_and_backward(checkpointing, loaded):
    model, _ = make_adapted(checkpointing=checkpointing)
    anchor, row = FrozenBase(model, loaded), make_row()
    fill(model, seed=6)  # away from what was loaded
    trained = [x for pair in adapter_parts(model).values() for x in pair]
    score(model, row, 1.0).logprobs.sum().backward()
    once = [x.grad.clone() for x in trained]
    addresses = [x.grad.data_ptr() for x in trained]

    loss = score(model, row, 1.0).logprobs.sum()
    for reference in (score(anchor, row, 1.0), score(anchor, row, 1.0, anchor, REVERSE)):
        assert not reference.logprobs.requires_grad
    assert all(x.requires_grad for x in trained) and [x.grad.data_ptr() for x in trained] == addresses
    loss.backward()
    assert all(torch.equal(x.grad, 2 * y) for x, y in zip(trained, once, strict=True))


def test_the_reference_is_the_base_bit_for_bit_and_the_policy_is_back_after_it_even_when_it_fails():
    model, base = make_adapted()
    base.set_attn_implementation(ATTENTION_NAME)
    row, anchor = make_row(), FrozenBase(model)
    before = score(model, row, 1.0).logprobs
    assert torch.equal(score(anchor, row, 1.0).logprobs, score(base, row, 1.0).logprobs)
    with pytest.raises(ValueError, match="attention_plan"):
        anchor.get_decoder()(input_ids=row.input_ids)
    assert torch.equal(score(model, row, 1.0).logprobs, before)
    assert not torch.equal(before, score(base, row, 1.0).logprobs)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_reference_of_a_loaded_adapter_is_the_base_with_it_however_the_policy_moves(checkpointing):
    model, base = make_adapted(checkpointing=checkpointing)
    start, anchor, row = multiplied_out(base, model), FrozenBase(model, loaded=True), make_row()
    loaded = copy.deepcopy(model.state_dict())
    for seed in (6, 7):  # not only after the first update
        fill(model, seed)
        policy, before = multiplied_out(base, model), score(model, row, 0.7).logprobs
        mine, reference = (plain_logits(plain, GROUPS, 0.7).log_softmax(-1).detach() for plain in (policy, start))
        scores = score(model, row, 0.7, anchor, REVERSE)
        torch.testing.assert_close(scores.anchor_logprobs, of_tokens(reference, GROUPS), atol=1e-4, rtol=0)
        torch.testing.assert_close(scores.distances["kl"], (mine.exp() * (mine - reference)).sum(-1), atol=1e-4, rtol=0)
        assert scores.distances["kl"].mean() > 1e-2
        with pytest.raises(ValueError, match="attention_plan"):
            anchor.get_decoder()(input_ids=row.input_ids)
        assert torch.equal(score(model, row, 0.7).logprobs, before), "the policy is back, also after an error"
    model.load_state_dict(loaded)
    scores = score(model, row, 0.7, anchor, REVERSE)
    assert torch.equal(scores.anchor_logprobs, scores.logprobs)


def test_the_reference_of_a_loaded_adapter_has_no_dropout_and_draws_nothing():
    model, _ = make_adapted(lora=LoraConfig(r=3, alpha=6.0, dropout=0.5))
    anchor, row = FrozenBase(model, loaded=True), make_row()
    expected = score(model, row, 1.0).logprobs.detach()
    with dropout_in_update(model, 3):
        alone = score(model, row, 1.0).logprobs
    with dropout_in_update(model, 3):
        assert torch.equal(score(anchor, row, 1.0).logprobs, expected)
        scores = score(model, row, 1.0, anchor)
    assert torch.equal(scores.anchor_logprobs, expected)
    assert torch.equal(scores.logprobs, alone) and not torch.equal(alone, expected)


def test_a_run_from_a_saved_adapter_begins_at_no_distance_and_goes_on_bit_for_bit(saved, tiny_model_folder, tmp_path):
    def train(name: str, last: int) -> tuple[dict[str, torch.Tensor], list[float]]:
        keys = [f"lora.path={saved[0]}", f"model.pretrained_model_path={tiny_model_folder}", "training.beta=1",
                "training.entropy_coef=1", "training.learning_rate=0.01", "training.ckpt_save_interval=1",
                "training.eval_first=false", "training.eval_interval=0",
                "training.batch_size=4", "training.num_questions_per_batch=2", "training.max_gen_len=8",
                "training.minibatches=1", "data.eval_size=1", f"training.max_steps={last}"]  # fmt: skip
        run_training(tiny_config(*keys), "countdown", tmp_path / name)
        (run,) = (tmp_path / name / "runs").iterdir()
        rows = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
        kls = [row["train/kl"] for row in rows if "train/kl" in row]
        return load_file(run / "final" / "adapter_model.safetensors"), kls

    whole, kls = train("whole", 2)
    train("parts", 1)
    parts, kls_of_parts = train("parts", 2)
    assert len(kls) == 2 and kls[0] == 0 and kls[1] > 1e-4
    assert kls_of_parts == kls, "the reference of the second start is not what the checkpoint holds"
    assert all(torch.equal(weight, parts[name]) for name, weight in whole.items())


def test_the_distance_to_a_loaded_adapter_is_zero_until_an_optimizer_step(saved, tiny_model_folder):
    keys = [
        f"lora.path={saved[0]}",
        f"model.pretrained_model_path={tiny_model_folder}",
        "training.max_tokens_per_microbatch=99",
    ]
    engine = make_engine(*keys)
    distances = []

    def objective(scores, batch):
        distances.append(scores.distances["kl"])
        return scores.logprobs.mean(), {}

    for _ in range(2):
        engine.forward_backward(GROUPS, objective, anchor=True, distances={"kl": "reverse"})
        engine.optim_step(0.1)
    half = len(distances) // 2
    before, after = torch.cat(distances[:half]), torch.cat(distances[half:])
    assert before.abs().max() == 0 and after.mean() > 1e-3
    # what was computed at the start is the adapter's doing, not the base's
    plain = score(saved[1], make_row(), 1.0, FrozenBase(saved[1]), REVERSE)
    assert plain.distances["kl"].mean() > 1e-2


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
    row = make_row(dtype=torch.bfloat16)
    scores = score(model, row, 1.0, FrozenBase(model), REVERSE)
    assert scores.hidden.dtype == scores.anchor_hidden.dtype == torch.bfloat16
    reference = score(exact, make_row(), 1.0, FrozenBase(exact), REVERSE)
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


@pytest.mark.parametrize("loaded", [False, True])
def test_policy_and_reference_are_one_model_in_memory(loaded):
    packed, plain = make_pair("llama")
    row = make_row()
    score(packed, row, 1.0)
    before = live_bytes()
    assert before > 2 * sum(4 * x.numel() for x in plain.parameters()), "the count must see a second model"
    model = add_adapter(packed, LORA, 0)
    anchor = FrozenBase(model, loaded)
    scores = score(model, row, 1.0, anchor, REVERSE)
    del scores
    adapter = sum(4 * x.numel() for pair in adapter_parts(model).values() for x in pair)
    assert live_bytes() - before == adapter * (1 + loaded), "of a loaded adapter there is a copy, of a new one none"
    config = tiny_config("lora.path=adapter" if loaded else "lora.r=3")
    assert memory_plan(config, model, anchor)["reference"] == adapter * loaded
    assert anchor.get_output_embeddings() is packed.get_output_embeddings()


# sampling


@pytest.mark.parametrize("name", ["llama", "qwen2"])
@pytest.mark.parametrize("temperature, checkpointing", [(0.0, False), (0.8, False), (0.8, True)])
def test_the_sampler_writes_what_the_merged_model_writes(name, temperature, checkpointing):
    model, base = make_adapted(name, checkpointing=checkpointing)
    base.set_attn_implementation(ATTENTION_NAME)
    check_attention(model, 64)
    groups = sample(model, slots=5, temperature=temperature)
    assert tokens_of(groups) == tokens_of(sample(multiplied_out(base, model), slots=5, temperature=temperature))
    assert tokens_of(groups) != tokens_of(sample(base, slots=5, temperature=temperature))
    if temperature:
        row = make_row(groups)
        found = score(model, row, temperature).logprobs
        torch.testing.assert_close(row.batch.sampled_logprobs, found, atol=1e-4, rtol=0)


# saving and loading


def test_a_saved_adapter_loads_in_plain_peft_from_any_folder_with_the_same_log_probs(
    saved, tiny_model_folder, tmp_path, monkeypatch
):
    monkeypatch.chdir(tiny_model_folder.parent)
    model = adapted_tiny(tiny_model_folder.name)  # a relative path, as in a config
    fill(model)
    folder = tmp_path / "adapter"
    save_adapter(model, AutoTokenizer.from_pretrained(tiny_model_folder), folder)
    names = [load_file(each / "adapter_model.safetensors").keys() for each in (folder, saved[0])]
    assert names[0] == names[1]
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
    expected = score(model, make_row(), 1.0).logprobs
    with torch.no_grad():
        found = of_tokens(plain_logits(plain, GROUPS).log_softmax(-1), GROUPS)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    assert all(x.requires_grad for pair in adapter_parts(model).values() for x in pair), "saving must not freeze it"


def test_weights_round_trip_bit_for_bit_into_the_same_parameters(saved, tiny_model_folder):
    folder, source = saved
    model = adapted_tiny(tiny_model_folder, LORA, 9)
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
    model = adapted_tiny(tiny_model_folder, LoraConfig(r=r, alpha=alpha, target_modules=names, path=str(folder)), 4)
    row = make_row()
    expected = score(saved[1], row, 1.0).logprobs
    assert torch.equal(score(model.train(), row, 1.0).logprobs, expected)
    trained = {name for name, x in model.named_parameters() if x.requires_grad}
    assert trained == {name for name, _ in model.named_parameters() if "lora_" in name}


@pytest.mark.parametrize(
    "asked, sentence",
    [
        ({"r": 4}, "lora.r is 4, but the adapter in .* has 3; remove lora.r"),
        ({"alpha": 7.0}, "lora.alpha is 7.0, but the adapter in .* has 6.0"),
        ({"target_modules": ["q_proj"]}, "lora.target_modules is {'q_proj'}, but the adapter"),
    ],
)
def test_keys_that_contradict_the_saved_adapter_are_an_error(saved, tiny_model_folder, asked, sentence):
    with pytest.raises(ConfigError, match=sentence):
        adapted_tiny(tiny_model_folder, LoraConfig(**asked, path=str(saved[0])))


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
        adapted_tiny(tiny_model_folder, LoraConfig(path=str(folder)))
    assert str(folder) in str(error.value)


def test_a_folder_without_a_whole_adapter_is_one_sentence(saved, tiny_model_folder, tmp_path):
    def sentence(folder) -> str:
        with pytest.raises(ConfigError) as error:
            adapted_tiny(tiny_model_folder, LoraConfig(path=str(folder)))
        assert str(folder) in str(error.value)
        return str(error.value)

    assert "there is no adapter_config.json in" in sentence(tmp_path / "nowhere")
    assert "there is no adapter_config.json in" in sentence(tiny_model_folder)
    other = copy_of(saved, tmp_path / "other", base_model_name_or_path="someone/else")
    with pytest.warns(UserWarning, match="someone/else"):  # a base of another name is a warning
        adapted_tiny(tiny_model_folder, LoraConfig(path=str(other)))
    folder = copy_of(saved, tmp_path / "broken")
    weights = folder / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:500])
    assert "adapter_model.safetensors cannot be read" in sentence(folder)
    weights.unlink()
    assert "adapter_model.safetensors cannot be read" in sentence(folder)
    (folder / "adapter_config.json").write_text('{"peft_type": "LO')
    assert "adapter_config.json cannot be read" in sentence(folder)


def test_weights_that_do_not_fit_leave_the_adapter_untouched(saved, tiny_model_folder, tmp_path):
    weights = load_file(saved[0] / "adapter_model.safetensors")
    last = sorted(weights)[-1]
    model = adapted_tiny(tiny_model_folder, LORA, 9)
    before = {name: x.detach().clone() for name, x in model.named_parameters()}
    extra = weights | {last.replace("layers.1", "layers.7"): weights[last].clone()}
    short = {name: x for name, x in weights.items() if name != last}
    cut = weights | {last: weights[last][:-1].contiguous()}
    for state, found in (
        (extra, r"layers.7\S+ is \[\d+, 3\] there, missing here"),
        (short, r"layers.1\S+ is missing there, \[\d+, 3\] here"),
        (cut, r"layers.1\S+ is \[\d+, 3\] there, \[\d+, 3\] here"),
    ):
        save_file(state, tmp_path / "adapter_model.safetensors")
        with pytest.raises(ConfigError, match=f"made for another model: .*{found}"):
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
    parts, plain = adapter_parts(model), base.state_dict()
    assert all(x.requires_grad for pair in parts.values() for x in pair)
    storages = [{x.untyped_storage().data_ptr() for x in [*m.parameters(), *m.buffers()]} for m in (merged, model)]
    assert not storages[0] & storages[1] and merged.state_dict().keys() == plain.keys()
    for name, x in merged.state_dict().items():
        a, b = parts.get(name.removesuffix(".weight"), (None, None))
        exact = plain[name].float() + (0 if a is None else SCALE * (b @ a).detach())
        tolerance = 0 if dtype == torch.float32 else 8e-3
        assert x.dtype == dtype
        torch.testing.assert_close(x.float(), exact.to(dtype).float(), atol=1e-6, rtol=tolerance)
    merged.save_pretrained(tmp_path / "merged")
    again = load_tiny(tmp_path / "merged")
    assert again.get_output_embeddings().weight is again.get_input_embeddings().weight
    found, expected, live = (score(m, make_row(dtype=dtype), 1.0).logprobs for m in (again, merged, model))
    assert torch.equal(found, expected)
    if dtype == torch.float32:
        torch.testing.assert_close(found, live, atol=1e-4, rtol=0)
