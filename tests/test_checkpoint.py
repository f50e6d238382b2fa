"""Models in, checkpoints out: round trips, half-written folders, and what is refused."""

import copy
import json
import math
import shutil
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from src.checkpoint import (
    end_token_ids,
    list_checkpoints,
    load_checkpoint,
    load_model,
    load_tokenizer,
    resolve_device,
    resolve_model_path,
    save_checkpoint,
    save_model,
)
from src.config import Config, ConfigError
from src.maxent import Controllers
from src.optim import build_optimizer
from src.packing import Episode, Group, pack
from src.rl_datasets import Problem
from src.scoring import score

CPU = torch.device("cpu")


def config_for(folder, dtype: str = "float32") -> Config:
    config = Config()
    config.model.pretrained_model_path, config.model.dtype, config.model.device = str(folder), dtype, "cpu"
    return config


def make_optimizer(model, memory_efficient: bool):
    return build_optimizer(
        list(model.parameters()),
        learning_rate=1e-2,
        betas=(0.9, 0.99),
        weight_decay=0.1,
        memory_efficient=memory_efficient,
        master_bits=24,
        state_bits=8,
        offload=False,
    )


def train(model, optimizer, seeds) -> None:
    """Optimizer steps with random gradients, one a seed."""
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        for parameter in model.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
        optimizer.step()


def same(left, right) -> bool:
    """Whether two nested states hold the same bits."""
    if isinstance(left, torch.Tensor):
        return left.dtype == right.dtype and torch.equal(left, right)
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(left[name], right[name]) for name in left)
    if isinstance(left, list | tuple):
        return len(left) == len(right) and all(same(a, b) for a, b in zip(left, right, strict=True))
    return left == right


# --- checkpoints ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("memory_efficient", [False, True])
def test_a_loaded_checkpoint_goes_on_as_if_nothing_had_happened(tmp_path, tiny_model_folder, dtype, memory_efficient):
    config = config_for(tiny_model_folder, dtype)
    tokenizer = load_tokenizer(config)
    model = load_model(config, CPU)
    optimizer = make_optimizer(model, memory_efficient)
    train(model, optimizer, (1, 2))
    torch.manual_seed(5)
    extra = {"first_evaluation": {"eval/greedy": 0.25}}
    save_checkpoint(tmp_path, 2, model, tokenizer, optimizer, Controllers(math.inf, 0.07), extra, keep=2)
    drawn = torch.rand(3)
    train(model, optimizer, (3, 4))

    resumed = load_model(config, CPU)
    resumed_optimizer = make_optimizer(resumed, memory_efficient)
    torch.manual_seed(99)
    controllers = Controllers(0.1, 0.04)
    state = load_checkpoint(list_checkpoints(tmp_path)[-1], resumed, resumed_optimizer, controllers)
    assert state["step"] == 2
    assert (controllers.tau, controllers.beta) == (math.inf, 0.07)
    assert {name: state[name] for name in extra} == extra
    assert torch.equal(torch.rand(3), drawn), "the random generator goes on where it was"
    assert not same(resumed.state_dict(), model.state_dict())
    train(resumed, resumed_optimizer, (3, 4))
    assert same(resumed.state_dict(), model.state_dict())
    assert same(resumed_optimizer.state_dict(), optimizer.state_dict())


def save_steps(folder, config, steps, keep: int) -> None:
    model, tokenizer = load_model(config, CPU), load_tokenizer(config)
    optimizer = make_optimizer(model, False)
    for step in steps:
        save_checkpoint(folder, step, model, tokenizer, optimizer, Controllers(0.1, 0.04), {}, keep)


def test_only_the_newest_are_kept(tmp_path, tiny_model_folder):
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    save_steps(folder, config_for(tiny_model_folder), (8, 9, 10, 11), keep=2)
    assert [path.name for path in list_checkpoints(folder)] == ["step_000010", "step_000011"]
    assert sorted(path.name for path in folder.iterdir()) == ["step_000010", "step_000011"], "no .partial is left"


def test_a_half_written_checkpoint_is_none(tmp_path, tiny_model_folder, monkeypatch):
    config = config_for(tiny_model_folder)
    save_steps(tmp_path, config, (1, 2), keep=2)

    def die(state, path):
        path.write_bytes(b"PK")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", die)
        with pytest.raises(KeyboardInterrupt):
            save_steps(tmp_path, config, (3,), keep=1)
    assert (tmp_path / "step_000003.partial" / "model.safetensors").exists(), (
        "this test must leave a half-written folder"
    )
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step_000001", "step_000002"], (
        "nothing was dropped yet"
    )
    save_steps(tmp_path, config, (3,), keep=2)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step_000002", "step_000003"]
    assert not list(tmp_path.glob("*.partial"))


def test_other_files_are_no_checkpoints(tmp_path):
    assert list_checkpoints(tmp_path / "missing") == []
    (tmp_path / "step_000007.partial").mkdir()
    (tmp_path / "step_000008").write_text("a file")
    (tmp_path / "notes").mkdir()
    assert list_checkpoints(tmp_path) == []


def test_a_checkpoint_is_loaded_without_unpickling(tmp_path, tiny_model_folder):
    config = config_for(tiny_model_folder)
    save_steps(tmp_path, config, (1,), keep=1)
    checkpoint = list_checkpoints(tmp_path)[0]
    torch.save({"step": 1, "optimizer": SimpleNamespace()}, checkpoint / "training_state.pt")
    with pytest.raises(Exception, match=r"[Ww]eights.only"):
        load_checkpoint(checkpoint, load_model(config, CPU), None, None)


# --- final/ -----------------------------------------------------------------------------------------------------------


def test_final_model_is_the_trained_one_for_anybody(tmp_path, tiny_model_folder):
    """Plain transformers, with its own attention, finds the log-probs that the trainer finds."""
    config = config_for(tiny_model_folder)
    model, tokenizer = load_model(config, CPU), load_tokenizer(config)
    problem = Problem(0, (3, 20, 21, 22, 4), "", {})
    episodes = tuple(Episode(ids, (0.0,) * len(ids), True, "") for ids in ((5, 30, 31, 6), (40, 1), (9,)))
    batch = pack([Group(problem, episodes)], CPU, torch.float32)
    untrained = score(model, batch, 1.0).logprobs.detach()
    train(model, make_optimizer(model, False), range(3))
    trained = score(model, batch, 1.0).logprobs.detach()
    assert (trained - untrained).abs().max() > 0.1, "the training must have changed something"

    save_model(model, tokenizer, tmp_path / "final")
    save_model(model, tokenizer, tmp_path / "final")  # over the first
    assert [path.name for path in tmp_path.iterdir()] == ["final"]
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "final")
    assert plain.config._attn_implementation == "sdpa" and plain.dtype == torch.float32
    expected = []
    for episode in episodes:
        ids = torch.tensor([problem.prompt_ids + episode.token_ids])
        logprobs = plain(ids).logits[0].log_softmax(-1)[len(problem.prompt_ids) - 1 : -1]
        expected.append(logprobs.gather(1, torch.tensor(episode.token_ids)[:, None])[:, 0])
    torch.testing.assert_close(trained, torch.cat(expected), atol=1e-4, rtol=1e-4)

    again = AutoTokenizer.from_pretrained(tmp_path / "final")
    assert again.chat_template == tokenizer.chat_template
    assert again("3 * 5 + 7").input_ids == tokenizer("3 * 5 + 7").input_ids
    assert again.eos_token == tokenizer.eos_token


def test_a_model_with_sampling_defaults_of_its_own_can_be_saved(tmp_path, tiny_model_folder):
    """transformers refuses to save a generation config that asks for a temperature without sampling."""
    folder = tmp_path / "model"
    shutil.copytree(tiny_model_folder, folder)
    (folder / "generation_config.json").write_text(
        json.dumps({"temperature": 0.6, "top_p": 0.9, "eos_token_id": [1, 2]})
    )
    config = config_for(folder)
    model, tokenizer = load_model(config, CPU), load_tokenizer(config)
    save_model(model, tokenizer, tmp_path / "final")
    assert (tmp_path / "final" / "model.safetensors").exists()
    assert end_token_ids(model, tokenizer) == (1, 2)


# --- models in --------------------------------------------------------------------------------------------------------


def test_loaded_model_has_no_dropout_and_the_asked_precision(tmp_path, tiny_model_folder):
    folder = tmp_path / "model"
    shutil.copytree(tiny_model_folder, folder)
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | {"attention_dropout": 0.1}))
    model = load_model(config_for(folder, "bfloat16"), CPU)
    assert model.config.attention_dropout == 0.0 and not model.training
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("tokenizer_id", "generation_ids", "config_ids", "expected"),
    [
        (1, 1, 1, (1,)),
        (1, [7, 3], 3, (1, 3, 7)),
        (None, None, [4, 2], (2, 4)),
        (5, None, None, (5,)),
        (0, [0], None, (0,)),
    ],
)
def test_every_end_token_is_collected(tokenizer_id, generation_ids, config_ids, expected):
    config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(eos_token_id=config_ids))
    model = SimpleNamespace(generation_config=SimpleNamespace(eos_token_id=generation_ids), config=config)
    assert end_token_ids(model, SimpleNamespace(eos_token_id=tokenizer_id)) == expected


def test_a_model_that_can_not_end_is_refused():
    config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(eos_token_id=None))
    model = SimpleNamespace(generation_config=None, config=config)
    with pytest.raises(ConfigError, match="no end-of-sequence token"):
        end_token_ids(model, SimpleNamespace(eos_token_id=None))


def test_a_model_without_some_of_its_weights_is_refused(tmp_path, tiny_model_folder):
    """transformers would fill the gap with random numbers and go on."""
    folder = tmp_path / "model"
    shutil.copytree(tiny_model_folder, folder)
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        ConfigError, match=r"is incomplete; it has no weights for model\.layers\.1\.mlp\.up_proj\.weight"
    ):
        load_model(config_for(folder), CPU)


def test_tied_heads_are_not_missing_weights(tiny_model_folder):
    assert "lm_head.weight" not in load_file(tiny_model_folder / "model.safetensors")
    model = load_model(config_for(tiny_model_folder), CPU)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert copy.deepcopy(model).lm_head.weight.abs().sum() > 0


@pytest.mark.parametrize(
    ("name", "fragment"),
    [
        ("cuda:99", "model.device: cuda:99 is not there"),
        ("tpu", "'tpu' is not a device; use auto, cpu"),
        ("meta", "'meta' is not supported; use auto, cpu"),
        ("", "'' is not a device"),
        ("cpu:x", "'cpu:x' is not a device"),
    ],
)
def test_device_that_is_not_there(name, fragment):
    with pytest.raises(ConfigError) as refusal:
        resolve_device(name)
    assert fragment in str(refusal.value)


def test_device():
    assert resolve_device("cpu") == CPU
    assert resolve_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")


def test_model_folder_as_given_or_beside_main(tmp_path, tiny_model_folder, monkeypatch):
    assert resolve_model_path(str(tiny_model_folder)) == str(tiny_model_folder)
    monkeypatch.chdir(tiny_model_folder.parent)
    assert resolve_model_path("tiny") == "tiny"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("src.checkpoint.PROJECT_FOLDER", tiny_model_folder.parent)
    assert resolve_model_path("tiny") == str(tiny_model_folder)
    for missing in ("./tiny2", "/tiny2", "models/tiny2", "~/tiny2", "a/b/c"):
        with pytest.raises(ConfigError, match=f"there is no folder {missing}; give a folder or a hub id"):
            resolve_model_path(missing)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"empty has no config\.json, so it is not a model in Hugging Face format"):
        resolve_model_path("empty")
