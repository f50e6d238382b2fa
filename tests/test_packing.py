"""Packed, prefix-shared forward passes against the plain Hugging Face forward, one sequence at a time."""

import copy
from dataclasses import replace
from functools import partial
from unittest.mock import patch

import numpy as np
import pytest
import torch
from transformers import (
    AttentionInterface,
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GraniteConfig,
    Lfm2Config,
    LlamaConfig,
    Qwen2Config,
    Qwen3Config,
)

from benchmarks.update import scoring_memory
from src import scoring
from src.config import Config, ConfigError, ModelConfig
from src.models import check_compiler, compile_layers, decoder_layers, load_model
from src.packing import (
    ATTENTION_NAME,
    Episode,
    Group,
    PackedAttention,
    check_attention,
    fill_microbatches,
    grpo_packed_attention,
    pack,
    split_into_microbatches,
)
from src.rl_datasets import Problem
from src.scoring import TokenStatistics, score

SHAPE = dict(
    vocab_size=61,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    intermediate_size=48,
    max_position_embeddings=128,
    initializer_range=0.3,
    bos_token_id=None,
    eos_token_id=1,
    pad_token_id=0,
)
CONFIGS = {
    "llama": LlamaConfig(**SHAPE, tie_word_embeddings=True),
    "qwen2": Qwen2Config(**SHAPE),
    "qwen3": Qwen3Config(**SHAPE, head_dim=16),
    "granite": GraniteConfig(**SHAPE, logits_scaling=3.0),
}


def make_pair(name: str):
    """The same random weights twice: with the packed attention, and as transformers ships the model."""
    torch.manual_seed(0)
    config = CONFIGS[name]
    plain = AutoModelForCausalLM.from_config(copy.deepcopy(config), attn_implementation="eager").eval()
    packed = AutoModelForCausalLM.from_config(copy.deepcopy(config), attn_implementation=ATTENTION_NAME).eval()
    packed.load_state_dict(plain.state_dict())
    return packed, plain


def make_groups(generator: torch.Generator, shapes: list[tuple[int, list[int]]]) -> list[Group]:
    """Groups with prompts and completions of the given lengths and random tokens, rewards and advantages."""

    def ids(length: int) -> tuple[int, ...]:
        return tuple(torch.randint(2, SHAPE["vocab_size"], (length,), generator=generator).tolist())

    groups = []
    for index, (prompt_length, completion_lengths) in enumerate(shapes):
        episodes = []
        for length in completion_lengths:
            advantage, weight = torch.randn(2, generator=generator).tolist()
            logprobs = tuple((-3 * torch.rand(length, generator=generator)).tolist())
            episodes.append(Episode(ids(length), logprobs, True, "", advantage=advantage, token_weight=weight))
        groups.append(Group(Problem(index, ids(prompt_length), "", {}), tuple(episodes)))
    return groups


# ragged prompts, ragged completions within a group, a one-token completion, a one-token prompt
RAGGED = [(5, [7, 1, 12, 3]), (9, [2, 2]), (1, [4, 30, 1])]


def plain_logprobs(plain, group: Group, episode: Episode, temperature: float = 1.0) -> torch.Tensor:
    """Log-probs of an episode's tokens from an ordinary forward over prompt + completion."""
    prompt = group.problem.prompt_ids
    logits = plain(torch.tensor([prompt + episode.token_ids]), use_cache=False).logits[0] / temperature
    rows = torch.arange(len(prompt) - 1, len(prompt) + len(episode.token_ids) - 1)
    return logits.log_softmax(-1)[rows, torch.tensor(episode.token_ids)]


@pytest.mark.parametrize("name", list(CONFIGS))
@pytest.mark.parametrize("chunk_tokens", [None, 5])
def test_packed_logprobs_and_gradients_equal_the_plain_forward(name, chunk_tokens):
    packed, plain = make_pair(name)
    groups = make_groups(torch.Generator().manual_seed(1), RAGGED)
    batch = pack(groups, "cpu", torch.float32)
    scores = score(packed, batch, 0.7, chunk_tokens=chunk_tokens)
    expected = torch.cat([plain_logprobs(plain, group, e, 0.7) for group in groups for e in group.episodes])
    torch.testing.assert_close(scores.logprobs, expected, atol=1e-4, rtol=0)
    weights = batch.token_weight[batch.episode_index]
    (scores.logprobs * weights).sum().backward()
    (expected * weights).sum().backward()
    for (parameter_name, a), b in zip(packed.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, atol=1e-4, rtol=1e-4, msg=parameter_name)


def test_entropy_and_exact_kl_equal_the_textbook_formulas():
    packed, plain = make_pair("llama")
    anchor, plain_anchor = make_pair("llama")
    for parameter, other in zip(anchor.parameters(), plain_anchor.parameters(), strict=True):
        with torch.no_grad():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(5)))
            other.copy_(parameter)
    groups = make_groups(torch.Generator().manual_seed(2), [(4, [6, 3])])
    batch = pack(groups, "cpu", torch.float32)
    rows = []
    for episode in groups[0].episodes:
        ids = torch.tensor([groups[0].problem.prompt_ids + episode.token_ids])
        rows.append([model(ids).logits[0, 3:-1].log_softmax(-1) for model in (plain, plain_anchor)])
    policy, reference = (torch.cat(column) for column in zip(*rows, strict=True))
    for direction, p, q in (("reverse", policy, reference), ("forward", reference, policy)):
        scores = score(packed, batch, 1.0, anchor, direction, chunk_tokens=4)
        torch.testing.assert_close(scores.kl, (p.exp() * (p - q)).sum(-1), atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(scores.entropy, -(policy.exp() * policy).sum(-1), atol=1e-5, rtol=1e-4)
    chosen = reference.gather(1, batch.target_ids[:, None])[:, 0]
    torch.testing.assert_close(scores.anchor_logprobs, chosen, atol=1e-4, rtol=0)


def test_a_sibling_and_a_neighbour_group_do_not_leak():
    packed, _ = make_pair("qwen2")
    groups = make_groups(torch.Generator().manual_seed(3), RAGGED)
    alone = score(packed, pack([replace(groups[0], episodes=groups[0].episodes[2:3])], "cpu", torch.float32), 1.0)
    together = score(packed, pack(groups, "cpu", torch.float32), 1.0)
    torch.testing.assert_close(together.logprobs[8:20], alone.logprobs, atol=1e-5, rtol=0)


@pytest.mark.parametrize("direction", [None, "reverse", "forward"])
def test_the_written_out_gradients_of_the_head_are_those_of_autograd(direction):
    generator = torch.Generator().manual_seed(4)
    logits, anchor = (torch.randn(7, 13, generator=generator, dtype=torch.float64) for _ in range(2))
    ids = torch.randint(13, (7,), generator=generator)
    given = anchor if direction else None

    def wanted(logits):
        results = TokenStatistics.apply(logits, ids, given, direction)
        return tuple(x for x in results if x is not None and x.requires_grad)

    logits.requires_grad_()
    assert len(wanted(logits)) == (3 if direction else 2)  # log-prob, entropy, and KL where it is asked for
    assert torch.autograd.gradcheck(wanted, logits)
    chosen, entropy = TokenStatistics.apply(logits, ids, given, direction)[:2]
    alone = [torch.autograd.grad(x.sum(), logits, retain_graph=True)[0] for x in (chosen, entropy)]
    torch.testing.assert_close(torch.autograd.grad((chosen + entropy).sum(), logits)[0], sum(alone))


def test_the_memory_of_scoring_does_not_grow_with_the_vocabulary():
    with patch.dict(scoring.CHUNK_ELEMENTS, cpu=2**18):
        small, large = (scoring_memory(vocabulary, 512) for vocabulary in (2048, 32768))
    assert large["logits_in_fp32"] == 16 * small["logits_in_fp32"] == 2**26
    own = [each["peak"] - each["of_it_gradients"] for each in (small, large)]
    assert own[0] > 2**20  # it does see a chunk's logits
    one_more = large["of_it_gradients"]  # a chunk's gradient of the head, before it is added to the others'
    assert own[1] - one_more < 1.3 * own[0]


def head_outcome(direction, tokens=7):
    """Results of TokenStatistics on random logits, and the gradient of a mixture of them."""
    generator = torch.Generator().manual_seed(tokens)
    logits, anchor = torch.randn(2, tokens, 301, generator=generator)
    ids = torch.randint(301, (tokens,), generator=generator)
    logits.requires_grad_()
    results = TokenStatistics.apply(logits, ids, None if direction is None else anchor, direction)
    chosen, entropy, _, kl = results
    objective = (chosen * chosen.detach()).sum() + 0.3 * (entropy * entropy.detach()).sum()
    objective = objective if kl is None else objective + (kl * kl.detach()).sum()
    return [x for x in (*results, *torch.autograd.grad(objective, logits)) if x is not None]


@pytest.fixture
def on_the_cpu_too(monkeypatch):
    """What runs compiled on CUDA runs compiled here, from a clean start."""
    torch.compiler.reset()
    scoring.compiled.cache_clear()
    monkeypatch.setattr(scoring, "FUSED_ON", ("cpu", "cuda"))
    monkeypatch.setattr(scoring, "verdicts", {})
    yield
    scoring.compiled.cache_clear()


def said(caplog) -> list[str]:
    """What the program has logged; torch logs for itself."""
    return [record.getMessage() for record in caplog.records if record.name == "grpo"]


def check_fused(caplog, *directions: str | None) -> None:
    """Whatever is asked for, the compiled head says what the plain one says."""
    for direction in directions:
        for tokens in (7, 20):
            found = head_outcome(direction, tokens)
            with patch.object(scoring, "FUSED_ON", ()):
                expected = head_outcome(direction, tokens)
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert list(scoring.verdicts.values()) == [True] * len(directions) and not said(caplog)


def test_the_compiled_head_says_what_the_plain_one_says(monkeypatch, on_the_cpu_too, caplog):
    backend = Backend()
    compile_with(monkeypatch, backend)
    check_fused(caplog, None, "reverse", "forward")
    assert backend.calls >= 3 * (2 + 2 * 2)  # forward and backward, in the trial and for two batches


@pytest.mark.slow
def test_the_head_compiled_by_inductor_says_what_the_plain_one_says(on_the_cpu_too, caplog):
    check_fused(caplog, "reverse")


def raises(graph, inputs):
    raise RuntimeError("no g++\nand a long trace")


def lies(graph, inputs):
    def run(*arguments):
        return [1.01 * x if torch.is_tensor(x) else x for x in graph(*arguments)]

    return run


@pytest.mark.parametrize("backend", [raises, lies])
def test_without_a_compiler_that_agrees_the_head_is_plain_and_says_so_once(
    monkeypatch, on_the_cpu_too, caplog, backend
):
    compile_with(monkeypatch, backend)
    for direction in ("reverse", None, "forward"):
        found = head_outcome(direction)
        with patch.object(scoring, "FUSED_ON", ()):
            assert all(map(torch.equal, found, head_outcome(direction)))
    (message,) = said(caplog)
    assert "without torch.compile" in message and "\n" not in message


def test_a_trial_that_runs_out_of_memory_is_made_again(monkeypatch, on_the_cpu_too, caplog):
    def full(*_):
        raise torch.OutOfMemoryError("out of memory")

    compile_with(monkeypatch, "eager")
    with patch.object(scoring, "try_fused", full), pytest.raises(torch.OutOfMemoryError):
        head_outcome("reverse")
    head_outcome("reverse")
    assert scoring.verdicts == {(False, "reverse"): True} and not said(caplog)


@pytest.mark.parametrize("seed", range(5))
def test_tiles_show_each_token_its_prompt_and_its_own_past_only(seed):
    """Attention by tiles against a dense mask over the whole row, random segments."""
    random = np.random.default_rng(seed)
    segments, row = [], 0
    for _ in range(random.integers(1, 5)):
        prompt = (row, int(random.integers(1, 9)))
        segments.append((*prompt, prompt[0], 0))
        row += prompt[1]
        for _ in range(random.integers(1, 6)):
            length = int(random.integers(1, 14))
            segments.append((row, length, *prompt))
            row += length
    plan = PackedAttention(*np.array(segments).T, "cpu", torch.float32)
    visible = torch.zeros(row, row, dtype=torch.bool)
    for start, length, prefix_start, prefix_length in segments:
        visible[start : start + length, prefix_start : prefix_start + prefix_length] = True
        visible[start : start + length, start : start + length] = torch.ones(length, length).tril().bool()
    query, key, value = torch.randn(1, 4, row, 8), torch.randn(1, 2, row, 8), torch.randn(1, 2, row, 8)
    expected = torch.nn.functional.scaled_dot_product_attention(query, key, value, visible, scale=0.3, enable_gqa=True)
    torch.testing.assert_close(plan.attend(0, query, key, value, 0.3), expected.transpose(1, 2), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("size", [1, 2, 3, 5, 100])
@pytest.mark.parametrize("max_tokens", [None, 1, 20, 45])
def test_microbatches_hold_every_episode_once_in_order_and_keep_to_the_budget(size, max_tokens):
    groups = make_groups(torch.Generator().manual_seed(4), RAGGED)
    parts = list(split_into_microbatches(groups, size, max_tokens))
    cut = [(piece.problem.index, e) for part in parts for piece in part for e in piece.episodes]
    assert cut == [(g.problem.index, e) for g in groups for e in g.episodes]
    for part in parts:
        episodes = [e for piece in part for e in piece.episodes]
        tokens = sum(len(piece.problem.prompt_ids) for piece in part) + sum(len(e.token_ids) for e in episodes)
        assert len(episodes) == 1 or (tokens <= max_tokens if max_tokens else len(episodes) <= size)
    fullest = list(fill_microbatches(groups, max_tokens or size, max_tokens is not None, False))
    assert len(parts) == len(fullest)
    whole = list(split_into_microbatches(groups, size, max_tokens, whole_groups=True))
    assert [piece for part in whole for piece in part] == groups


def test_microbatches_are_of_about_equal_size():
    groups = make_groups(torch.Generator().manual_seed(4), [(5, [10] * 4), (5, [10] * 4), (5, [10] * 2)])
    sizes = [sum(group.tokens() for group in part) for part in split_into_microbatches(groups, 8, 100)]
    assert sizes == [60, 60]  # filled to the brim they would have 90 and 25
    assert [sum(len(g.episodes) for g in part) for part in split_into_microbatches(groups, 8)] == [5, 5]


def test_what_the_attention_cannot_do_is_refused_by_name():
    packed, _ = make_pair("llama")
    with pytest.raises(ValueError, match="attention_plan"):
        packed(torch.tensor([[1, 2, 3]]))
    config = Gemma3TextConfig(**SHAPE, head_dim=8, sliding_window=4, layer_types=["sliding_attention"] * 2)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=ATTENTION_NAME).eval()
    with pytest.raises(NotImplementedError, match="attends to 4 tokens"):
        score(model, pack(make_groups(torch.Generator().manual_seed(1), RAGGED), "cpu", torch.float32), 1.0)


def score_and_saved(model, groups):
    """Scores, and how many elements autograd keeps for the backward pass."""
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: (sizes.append(x.numel()), x)[1], lambda x: x):
        scores = score(model, pack(groups, "cpu", torch.float32), 1.0)
    return scores, sum(sizes)


@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_gradient_checkpointing_changes_no_gradient_and_does_compute_again(name):
    groups = make_groups(torch.Generator().manual_seed(1), RAGGED)
    gradients, saved = [], []
    for checkpointing in (False, True):
        packed, _ = make_pair(name)
        if checkpointing:
            packed.gradient_checkpointing_enable({"use_reentrant": False})
            packed.train()
        scores, elements = score_and_saved(packed, groups)
        saved.append(elements)
        scores.logprobs.sum().backward()
        gradients.append([p.grad for p in packed.parameters()])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    assert saved[1] < 0.6 * saved[0]


def test_every_second_layer_can_be_computed_again_and_the_others_kept(tiny_model_folder):
    groups = make_groups(torch.Generator().manual_seed(1), RAGGED)
    kept, gradients = [], []
    for keys in ({}, {"gradient_checkpointing": True, "checkpoint_every": 2}, {"gradient_checkpointing": True}):
        config = Config(ModelConfig(pretrained_model_path=str(tiny_model_folder), dtype="float32", **keys))
        model = load_model(config, torch.device("cpu"))
        scores, elements = score_and_saved(model, groups)
        kept.append(elements)
        scores.logprobs.sum().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    assert kept[0] > 1.2 * kept[1] > 1.2 * 1.2 * kept[2]
    for a, b, c in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(a, c, atol=1e-5, rtol=1e-5)


class Backend:
    """A backend of torch.compile that runs what it is given, and counts graphs and calls."""

    def __init__(self):
        self.graphs = self.calls = 0

    def __call__(self, graph, inputs):
        self.graphs += 1

        def run(*arguments):
            self.calls += 1
            return graph(*arguments)

        return run


def compile_with(monkeypatch, backend) -> None:
    """torch.compile with another backend than inductor, from a clean start."""
    torch.compiler.reset()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))


@pytest.fixture
def interface():
    """compile_layers registers the attention anew for the whole process."""
    yield
    AttentionInterface.register(ATTENTION_NAME, grpo_packed_attention)
    torch.compiler.reset()


def compiled_gradients(name: str, checkpointing: bool) -> tuple[list, list]:
    """Of three batches of different shapes: gradients of a plain model and of a compiled one."""
    outcomes = []
    for compiled in (False, True):
        packed, _ = make_pair(name)
        if checkpointing:
            packed.gradient_checkpointing_enable({"use_reentrant": False})
            packed.train()
        if compiled:
            compile_layers(packed)
        for shapes in (RAGGED, RAGGED[:2], [(3, [8, 2])]):
            batch = pack(make_groups(torch.Generator().manual_seed(1), shapes), "cpu", torch.float32)
            score(packed, batch, 0.7).logprobs.sum().backward()
        outcomes.append([weight.grad for weight in packed.parameters()])
    return outcomes[0], outcomes[1]


@pytest.mark.parametrize("name", ["llama", "qwen3"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_compiled_layers_have_the_gradients_of_plain_ones(monkeypatch, interface, name, checkpointing):
    backend = Backend()
    compile_with(monkeypatch, backend)
    plain, compiled = compiled_gradients(name, checkpointing)
    torch.testing.assert_close(compiled, plain, atol=1e-4, rtol=1e-4)
    assert backend.calls >= 3 * 2 * 2 * (1 + checkpointing)  # batches, layers, before and after the attention; again


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
def test_layers_compiled_by_inductor_have_the_gradients_of_plain_ones(interface, checkpointing):
    torch.compiler.reset()
    check_compiler(torch.device("cpu"))
    plain, compiled = compiled_gradients("llama", checkpointing)
    torch.testing.assert_close(compiled, plain, atol=1e-4, rtol=1e-4)


def test_layers_share_their_graphs_and_a_rollout_runs_none(monkeypatch, interface):
    backend = Backend()
    compile_with(monkeypatch, backend)
    monkeypatch.setitem(CONFIGS, "deep", LlamaConfig(**SHAPE | {"num_hidden_layers": 12}))
    packed, plain = make_pair("deep")
    compile_layers(packed)
    batches = [
        pack(make_groups(torch.Generator().manual_seed(1), shapes), "cpu", torch.float32)
        for shapes in (RAGGED, [(3, [8, 2])])
    ]
    with torch.inference_mode():
        expected = [score(packed, batch, 1.0).logprobs for batch in batches]
    assert backend.calls == 0
    with torch.no_grad():
        found = [score(packed, batch, 1.0).logprobs for batch in batches]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert backend.graphs <= 4 and backend.calls >= 2 * 2 * len(decoder_layers(packed))
    assert packed.state_dict().keys() == plain.state_dict().keys()


def test_a_machine_without_a_compiler_gets_one_sentence(monkeypatch):
    def broken(graph, inputs):
        raise RuntimeError("no g++\nand a long trace")

    compile_with(monkeypatch, broken)
    with pytest.raises(ConfigError, match=r"model.compile: torch.compile does not work.*set model.compile: false"):
        check_compiler(torch.device("cpu"))


def test_models_that_a_packed_row_would_leak_through_are_refused():
    check_attention(make_pair("llama")[0], 100)
    config = Lfm2Config(**SHAPE, layer_types=["conv", "full_attention"])
    with pytest.raises(ConfigError, match="only 1 of their layers are attention"):
        check_attention(AutoModelForCausalLM.from_config(config, attn_implementation=ATTENTION_NAME).eval(), 100)
    config = Gemma3TextConfig(**SHAPE, head_dim=8, sliding_window=4, layer_types=["sliding_attention"] * 2)
    with pytest.raises(ConfigError, match="attends to 4 tokens, but sequences have up to 100"):
        check_attention(AutoModelForCausalLM.from_config(config, attn_implementation=ATTENTION_NAME).eval(), 100)
    config = Gemma2Config(**SHAPE, head_dim=8)
    with pytest.raises(ConfigError, match="softcap"):
        check_attention(AutoModelForCausalLM.from_config(config, attn_implementation=ATTENTION_NAME).eval(), 100)
