"""Packed, prefix-shared forward passes against the plain Hugging Face forward, one sequence at a time."""

import copy
import math
from dataclasses import replace
from functools import partial
from unittest.mock import patch

import numpy as np
import pytest
import torch
import transformers
from transformers import AttentionInterface, AutoModelForCausalLM, LlamaConfig

from benchmarks.update import scoring_memory
from src.config import Config, ConfigError, LoraConfig, ModelConfig
from src.engine import attention, scoring, statistics
from src.engine.attention import ATTENTION_NAME, PackedAttention, check_attention, grpo_packed_attention
from src.engine.lighter import kept_of_layer, lean_mlp, lighten, one_kernel_norm, with_forward
from src.engine.models import check_compiler, compile_layers, decoder_layers, load_model
from src.engine.packing import Pass, fill_microbatches, pack, shared_head, split_into_microbatches
from src.engine.scoring import score
from src.engine.statistics import TokenStatistics
from src.records import Episode, Group, Problem

SHAPE = dict(vocab_size=61, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
             intermediate_size=48, max_position_embeddings=128, initializer_range=0.3, bos_token_id=None,
             eos_token_id=1, pad_token_id=0)  # fmt: skip
CONFIGS = {
    "llama": LlamaConfig(**SHAPE, tie_word_embeddings=True),
    "qwen2": transformers.Qwen2Config(**SHAPE),
    "qwen3": transformers.Qwen3Config(**SHAPE, head_dim=16),
    "granite": transformers.GraniteConfig(**SHAPE, logits_scaling=3.0),
}
# ragged prompts, ragged completions within a group, a one-token completion, a one-token prompt
RAGGED = [(5, [7, 1, 12, 3]), (9, [2, 2]), (1, [4, 30, 1])]


def packed_model(config):
    return AutoModelForCausalLM.from_config(copy.deepcopy(config), attn_implementation=ATTENTION_NAME).eval()


def make_pair(name: str):
    """The same random weights twice: with the packed attention, and as transformers ships the model."""
    torch.manual_seed(0)
    plain = AutoModelForCausalLM.from_config(copy.deepcopy(CONFIGS[name]), attn_implementation="eager").eval()
    packed = packed_model(CONFIGS[name])
    packed.load_state_dict(plain.state_dict())
    return packed, plain


def make_groups(generator: torch.Generator, shapes: list[tuple[int, list[int]]]) -> list[Group]:
    """Groups with prompts and completions of the given lengths and random tokens, weights and advantages."""

    def ids(length: int) -> tuple[int, ...]:
        return tuple(torch.randint(2, SHAPE["vocab_size"], (length,), generator=generator).tolist())

    groups = []
    for index, (prompt_length, completion_lengths) in enumerate(shapes):
        episodes = []
        for length in completion_lengths:
            advantage, weight = torch.randn(2, generator=generator).tolist()
            logprobs = tuple((-3 * torch.rand(length, generator=generator)).tolist())
            advantages = (advantage,) * length
            episodes.append(Episode(ids(length), logprobs, True, "", advantages=advantages, token_weight=weight))
        groups.append(Group(Problem(index, ids(prompt_length), "", {}), tuple(episodes)))
    return groups


def ragged_groups() -> list[Group]:
    return make_groups(torch.Generator().manual_seed(1), RAGGED)


def with_head(groups: list[Group], length: int = 20) -> list[Group]:
    """The same, with a beginning that is the same for all prompts."""
    head = tuple(range(2, 2 + length))
    prompts = [replace(group.problem, prompt_ids=head + group.problem.prompt_ids) for group in groups]
    return [replace(group, problem=problem) for group, problem in zip(groups, prompts, strict=True)]


def with_feedback(group: Group) -> Group:
    """The same tokens, of which the policy has not written some: the first ones, and others in between."""

    def masked(episode: Episode) -> Episode:
        written = tuple(place % 5 not in (0, 3) for place in range(len(episode.token_ids)))
        written = written if any(written) else (True,)
        keep = sum(written)
        return replace(episode, written=written, logprobs=episode.logprobs[:keep], advantages=episode.advantages[:keep])

    return replace(group, episodes=tuple(map(masked, group.episodes)))


def make_row(groups: list[Group] | None = None, dtype=torch.float32, device="cpu") -> Pass:
    return pack(ragged_groups() if groups is None else groups, device, dtype)


def plain_logits(plain, groups: list[Group], temperature: float = 1.0) -> torch.Tensor:
    """[N, vocab] from which each written token is predicted, by ordinary forwards over prompt + completion."""
    rows = []
    for group in groups:
        prompt = group.problem.prompt_ids
        for episode in group.episodes:
            logits = plain(torch.tensor([prompt + episode.token_ids]), use_cache=False).logits[0, len(prompt) - 1 : -1]
            loss_mask = torch.tensor(episode.written or (True,) * len(episode.token_ids))
            rows.append(logits[loss_mask] / temperature)
    return torch.cat(rows)


def of_tokens(logprobs: torch.Tensor, groups: list[Group]) -> torch.Tensor:
    """Log-probs [N, vocab] -> [N], of the written tokens."""
    episodes = [episode for group in groups for episode in group.episodes]
    mask = [written for e in episodes for written in e.written or (True,) * len(e.token_ids)]
    ids = torch.tensor([token for e in episodes for token in e.token_ids])[torch.tensor(mask)]
    return logprobs.gather(1, ids[:, None])[:, 0]


def moved(*models) -> None:
    """Away from where they were, all in the same way."""
    for model in models:
        generator = torch.Generator().manual_seed(5)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))


@pytest.mark.parametrize("name", list(CONFIGS))
@pytest.mark.parametrize(
    "chunk_tokens, feedback, head", [(None, False, 0), (5, False, 0), (5, True, 0), (None, False, 20), (5, True, 20)]
)  # 5: computed again
def test_packed_logprobs_and_gradients_equal_the_plain_forward(name, chunk_tokens, feedback, head):
    """With feedback that the policy did not write: as a loss mask over the plain forward of the whole transcript.

    What all prompts begin with is in the row once.
    """
    packed, plain = make_pair(name)
    groups = [with_feedback(group) for group in ragged_groups()] if feedback else ragged_groups()
    groups = with_head(groups, head) if head else groups
    episodes = [episode for group in groups for episode in group.episodes]
    row = make_row(groups)
    assert row.input_ids.numel() == sum(group.tokens() for group in groups) - head * (len(groups) - 1)
    elements = chunk_tokens and chunk_tokens * packed.config.vocab_size
    scores = score(packed, row, 0.7, elements=elements)
    expected = of_tokens(plain_logits(plain, groups, 0.7).log_softmax(-1), groups)
    torch.testing.assert_close(scores.logprobs, expected, atol=1e-4, rtol=0)
    lengths = [len(episode.logprobs) for episode in episodes]
    assert row.batch.lengths.tolist() == lengths == [e.length for e in episodes]
    assert row.batch.sampled_logprobs.tolist() == pytest.approx([x for e in episodes for x in e.logprobs])
    assert row.batch.advantages.tolist() == pytest.approx([x for e in episodes for x in e.advantages])
    weights = torch.tensor([e.token_weight for e in episodes]).repeat_interleave(torch.tensor(lengths))
    row.batch.mean(scores.logprobs).backward()
    (expected * weights).sum().backward()
    for (parameter_name, a), b in zip(packed.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, atol=1e-4, rtol=1e-4, msg=parameter_name)


def parts_of(model, word: str) -> list:
    return [module for module in model.modules() if word in type(module).__name__]


def scores_and_gradients(model, dtype) -> list[torch.Tensor]:
    logprobs = score(model, make_row(dtype=dtype), 1.0).logprobs
    logprobs.sum().backward()
    return [logprobs, *(parameter.grad for parameter in model.parameters())]


@pytest.mark.parametrize("name", list(CONFIGS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norms_of_one_kernel_change_nothing_but_rounding(name, dtype):
    packed, fused = make_pair(name)[0].to(dtype), make_pair(name)[0].to(dtype)
    norms, gated = parts_of(fused, "Norm"), parts_of(fused, "MLP")
    assert lighten(fused) == len(norms) + len(gated) and len(norms) >= 2 * SHAPE["num_hidden_layers"] + 1
    assert all(type(norm).forward is one_kernel_norm for norm in norms) and parts_of(fused, "Norm") == norms
    assert all(type(mlp).forward is lean_mlp for mlp in gated) and len(gated) == SHAPE["num_hidden_layers"]
    rounding = 1e-5 if dtype == torch.float32 else 0.05
    for theirs, ours in zip(*(scores_and_gradients(model, dtype) for model in (packed, fused)), strict=True):
        assert (ours - theirs).norm() <= rounding * theirs.norm()
    assert copy.deepcopy(fused).state_dict().keys() == packed.state_dict().keys()


def kept_widths(mlp, hidden) -> int:
    """Tensors as wide as the MLP that are kept for its backward pass, without its weights."""
    kept, weights = set(), {weight.data_ptr() for weight in mlp.parameters()}

    def keep(tensor):
        if SHAPE["intermediate_size"] in tensor.shape and tensor.data_ptr() not in weights:
            kept.add(tensor.data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        mlp(hidden).sum().backward()
    return len(kept)


@pytest.mark.parametrize("name", list(CONFIGS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_lean_mlps_keep_half_and_change_no_bit(name, dtype, checkpointing):
    plain, lean = (make_pair(name)[0].to(dtype) for _ in range(2))
    hidden = torch.randn(1, 7, SHAPE["hidden_size"], dtype=dtype)  # not small: what is kept must have addresses
    assert kept_widths(parts_of(plain, "MLP")[0], hidden) == 4
    for mlp in parts_of(lean, "MLP"):
        mlp.__class__ = with_forward(type(mlp), lean_mlp)
    assert kept_widths(parts_of(lean, "MLP")[0], hidden) == 2
    for model in (plain, lean):
        model.zero_grad(set_to_none=True)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            model.train()
    for theirs, ours in zip(*(scores_and_gradients(model, dtype) for model in (plain, lean)), strict=True):
        assert torch.equal(ours, theirs)
    with torch.inference_mode():
        assert torch.equal(parts_of(lean, "MLP")[0](hidden), parts_of(plain, "MLP")[0](hidden))
    for model in (plain, lean):  # in the layout of the weight: another would be copied into it
        mlp = parts_of(model, "MLP")[0]
        (gradient,) = torch.autograd.grad(mlp(hidden).sum(), mlp.down_proj.weight)
        assert gradient.stride() == mlp.down_proj.weight.stride()


def test_lean_mlps_can_be_compiled():
    plain, lean = (parts_of(make_pair("llama")[0], "MLP")[0] for _ in range(2))
    lean.__class__ = with_forward(type(lean), lean_mlp)
    hidden = torch.randn(1, 7, SHAPE["hidden_size"])
    for mlp in (plain, torch.compile(lean, backend="aot_eager", dynamic=True, fullgraph=True)):
        mlp(hidden).square().sum().backward()
    for theirs, ours in zip(plain.parameters(), lean.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)


def test_what_a_layer_keeps_is_counted_from_its_widths_and_without_a_lean_mlp_from_above():
    from src.engine.lora import add_adapter  # here, because test_gpu.py imports this file where there is no peft

    model = make_pair("qwen3")[0]
    hidden, wide, of_heads = SHAPE["hidden_size"], SHAPE["intermediate_size"], (4 + 2) * 16
    assert kept_of_layer(model) == 12 * hidden + 4 * wide
    count = lighten(model)
    assert count > 0 == lighten(model), "a second time there is nothing to do"
    assert kept_of_layer(model) == 4 * hidden + 3 * of_heads + 2 * wide
    model = make_pair("llama")[0]
    lighten(model)
    assert kept_of_layer(model) == 4 * hidden + 2 * (4 + 2) * 8 + 2 * wide
    assert kept_of_layer(add_adapter(model, LoraConfig(r=2), 0)) == 12 * hidden + 4 * wide


def test_mlps_with_another_function_or_an_adapter_compute_what_they_did():
    from src.engine.lora import add_adapter  # here, because test_gpu.py imports this file where there is no peft

    config = copy.deepcopy(CONFIGS["llama"])
    config.hidden_act = "gelu"
    torch.manual_seed(0)
    model = packed_model(config)
    assert lighten(model) == 2 * SHAPE["num_hidden_layers"] + 1  # norms alone

    pair = []
    for lighter in (False, True):
        model = make_pair("llama")[0]
        if lighter:
            lighten(model)
        torch.manual_seed(1)
        adapted = add_adapter(model, LoraConfig(r=2, target_modules=["down_proj"]), 0)
        pair.append([parts_of(adapted, "MLP")[0](torch.ones(1, 3, SHAPE["hidden_size"]))])
        pair[-1][0].sum().backward()
        pair[-1] += [weight.grad for weight in parts_of(adapted, "MLP")[0].parameters() if weight.grad is not None]
    assert len(pair[0]) == 3
    for theirs, ours in zip(*pair, strict=True):
        assert torch.equal(ours, theirs)


def test_norms_that_compute_something_else_stay_as_they_are(monkeypatch):
    model, layers = make_pair("llama")[0], SHAPE["num_hidden_layers"]
    kind = type(model.get_decoder().norm)
    whole = kind.forward
    monkeypatch.setattr(kind, "forward", lambda norm, hidden: whole(norm, hidden) + hidden)  # as where 1 is added
    assert lighten(model) == layers and type(model.get_decoder().norm) is kind  # the MLPs alone
    monkeypatch.undo()
    model = make_pair("llama")[0]
    model.get_decoder().norm.weight = torch.nn.Parameter(model.get_decoder().norm.weight.double())
    assert lighten(model) == 3 * layers


def test_an_mlp_that_clamps_what_is_large_stays_as_it_is(monkeypatch):
    model, layers = make_pair("llama")[0], SHAPE["num_hidden_layers"]
    mlp = parts_of(model, "MLP")[0]
    largest = float(mlp(torch.randn(1, 3, SHAPE["hidden_size"])).abs().max())
    whole = type(mlp).forward
    monkeypatch.setattr(type(mlp), "forward", lambda self, x: whole(self, x).clamp(-100 * largest, 100 * largest))
    assert lighten(model) == 2 * layers + 1 and type(mlp).forward is not lean_mlp  # the norms alone


def jensen_shannon(logits, anchor_logits):
    """A distance of whole distributions for which there is no written-out gradient."""
    p, q = logits.log_softmax(-1), anchor_logits.log_softmax(-1)
    middle = torch.logaddexp(p, q) - math.log(2)
    return 0.5 * (p.exp() * (p - middle) + q.exp() * (q - middle)).sum(-1)


@pytest.mark.parametrize("direction", ["reverse", "forward"])
@pytest.mark.parametrize("chunk_tokens", [None, 4])
def test_entropy_and_distances_and_their_gradients_are_those_of_float64_autograd(direction, chunk_tokens):
    """The exact KL by its own gradient and Jensen-Shannon by autograd of each chunk, beside each other."""
    (packed, plain), (anchor, plain_anchor) = make_pair("llama"), make_pair("llama")
    moved(anchor, plain_anchor)
    groups, distances = ragged_groups(), {"js": jensen_shannon, "kl": direction}
    elements = chunk_tokens and chunk_tokens * scoring.FUNCTIONS * packed.config.vocab_size
    scores = score(packed, make_row(groups), 0.7, anchor, distances, elements)
    with torch.no_grad():
        anchor_logits = plain_logits(plain_anchor.double(), groups, 0.7)
    logits = plain_logits(plain.double(), groups, 0.7)
    policy, reference = logits.log_softmax(-1), anchor_logits.log_softmax(-1)
    p, q = (policy, reference) if direction == "reverse" else (reference, policy)
    expected = {"js": jensen_shannon(logits, anchor_logits), "kl": (p.exp() * (p - q)).sum(-1)}
    expected["entropy"] = -(policy.exp() * policy).sum(-1)
    found = {**scores.distances, "entropy": scores.entropy}
    assert list(found) == list(expected) and expected["js"].min() > 1e-4
    for name in expected:
        torch.testing.assert_close(found[name], expected[name].float(), atol=1e-5, rtol=1e-4)
        for values in (found, expected):
            (values[name] * values[name].detach()).sum().backward(retain_graph=True)
        for a, b in zip(packed.parameters(), plain.parameters(), strict=True):
            assert (a.grad - b.grad).norm() < 1e-4 * b.grad.norm(), name
        packed.zero_grad(), plain.zero_grad()
    torch.testing.assert_close(scores.anchor_logprobs, of_tokens(reference, groups).float(), atol=1e-4, rtol=0)


def test_a_distance_without_a_gradient_is_refused():
    packed, anchor = make_pair("llama")[0], make_pair("llama")[0]
    with pytest.raises(ValueError, match="a KL has the direction reverse or forward, not 'sideways'"):
        score(packed, make_row(), 1.0, anchor, {"kl": "sideways"})
    with pytest.raises(ValueError, match="one exact KL at a time"):
        score(packed, make_row(), 1.0, anchor, {"kl": "reverse", "other": "forward"})


@pytest.mark.parametrize("direction", [None, "reverse", "forward"])
@pytest.mark.parametrize("rows", [1, 3, 7])
def test_the_written_out_gradients_of_the_head_are_those_of_autograd(direction, rows, monkeypatch):
    monkeypatch.setattr(statistics, "BLOCK", rows * 13)
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


@pytest.mark.parametrize("direction", [None, "reverse", "forward"])
def test_logits_in_bf16_are_what_they_are_in_fp32(direction, monkeypatch):
    """Nothing behind the logits is computed in bf16; only the gradient is rounded, as the logits were."""
    monkeypatch.setattr(statistics, "BLOCK", 3 * 40)
    generator = torch.Generator().manual_seed(4)
    logits, anchor = (4 * torch.randn(8, 40, generator=generator).bfloat16() for _ in range(2))
    ids, slopes = torch.randint(40, (8,), generator=generator), torch.linspace(-1, 1, 8)
    found = []
    for dtype in (torch.bfloat16, torch.float32):
        given = logits.detach().to(dtype, copy=True).requires_grad_()
        results = TokenStatistics.apply(given, ids, anchor.to(dtype), direction)
        sum((slopes * x).sum() for x in results if x is not None and x.requires_grad).backward()
        found.append([x for x in results if x is not None] + [given.grad.bfloat16()])
    torch.testing.assert_close(*found, rtol=0, atol=0)


@pytest.mark.parametrize("kept", [True, False])
def test_logits_are_kept_for_the_backward_pass_where_they_are_small(kept, monkeypatch):
    packed, _ = make_pair("llama")
    row, calls = make_row(ragged_groups()), []
    tokens, vocabulary = len(row.predictor_index), packed.config.vocab_size
    elements = tokens * vocabulary * 4 // scoring.KEPT - (0 if kept else 1)
    head_logits = scoring.head_logits
    monkeypatch.setattr(scoring, "head_logits", lambda *given: calls.append(len(given[1])) or head_logits(*given))
    score(packed, row, 1.0, elements=elements).logprobs.sum().backward()
    assert sum(calls) == (1 if kept else 2) * tokens and max(calls) <= elements // vocabulary < tokens


def test_the_memory_of_scoring_does_not_grow_with_the_vocabulary():
    with patch.dict(scoring.CHUNK_ELEMENTS, cpu=2**18):
        small, large = (scoring_memory(vocabulary, 512) for vocabulary in (2048, 32768))
    assert large["logits_in_fp32"] == 16 * small["logits_in_fp32"] == 2**26
    own = [each["peak"] - each["of_it_gradients"] for each in (small, large)]
    assert own[0] > 2**20  # it does see a chunk's logits
    one_more = large["of_it_gradients"]  # a chunk's gradient of the head, before it is added to the others'
    assert own[1] - one_more < 1.3 * own[0]


# the head, compiled


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


def head_outcome(direction, tokens=7):
    """Results of TokenStatistics on random logits, and the gradient of a mixture of them."""
    generator = torch.Generator().manual_seed(tokens)
    logits, anchor = torch.randn(2, tokens, 301, generator=generator)
    ids = torch.randint(301, (tokens,), generator=generator)
    logits.requires_grad_()
    results = TokenStatistics.apply(logits, ids, None if direction is None else anchor, direction)
    wanted = [x for x in results if x is not None and x.requires_grad]
    objective = sum(weight * (x * x.detach()).sum() for weight, x in zip((1, 0.3, 1), wanted, strict=False))
    return [x for x in (*results, *torch.autograd.grad(objective, logits)) if x is not None]


@pytest.fixture
def on_the_cpu_too(monkeypatch):
    """What runs compiled on CUDA runs compiled here, from a clean start."""
    torch.compiler.reset()
    statistics.compiled.cache_clear()
    monkeypatch.setattr(statistics, "FUSED_ON", ("cpu", "cuda"))
    monkeypatch.setattr(statistics, "verdicts", {})
    yield
    statistics.compiled.cache_clear()


def said(caplog) -> list[str]:
    """What the program has logged; torch logs for itself."""
    return [record.getMessage() for record in caplog.records if record.name == "grpo"]


@pytest.mark.parametrize("inductor", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_the_compiled_head_says_what_the_plain_one_says(monkeypatch, on_the_cpu_too, caplog, inductor):
    backend = Backend()
    if not inductor:
        compile_with(monkeypatch, backend)
    directions = ["reverse"] if inductor else [None, "reverse", "forward"]
    for direction in directions:
        for tokens in (7, 20):
            found = head_outcome(direction, tokens)
            with patch.object(statistics, "FUSED_ON", ()):
                expected = head_outcome(direction, tokens)
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert list(statistics.verdicts.values()) == [True] * len(directions) and not said(caplog)
    assert inductor or backend.calls >= 3 * (2 + 2 * 2)  # forward and backward, in the trial and for two batches


def raises(graph, inputs):
    raise RuntimeError("no g++\nand a long trace")


def lies(graph, inputs):
    return lambda *arguments: [1.01 * x if torch.is_tensor(x) else x for x in graph(*arguments)]


@pytest.mark.parametrize("backend", [raises, lies])
def test_without_a_compiler_that_agrees_the_head_is_plain_and_says_so_once(
    monkeypatch, on_the_cpu_too, caplog, backend
):
    compile_with(monkeypatch, backend)
    for direction in ("reverse", None, "forward"):
        found = head_outcome(direction)
        with patch.object(statistics, "FUSED_ON", ()):
            assert all(map(torch.equal, found, head_outcome(direction)))
    (message,) = said(caplog)
    assert "without torch.compile" in message and "\n" not in message


def test_a_trial_that_runs_out_of_memory_is_made_again(monkeypatch, on_the_cpu_too, caplog):
    compile_with(monkeypatch, "eager")
    full = patch.object(statistics, "try_fused", side_effect=torch.OutOfMemoryError("out of memory"))
    with full, pytest.raises(torch.OutOfMemoryError):
        head_outcome("reverse")
    head_outcome("reverse")
    assert statistics.verdicts == {(False, "reverse"): True} and not said(caplog)


# rows and passes


def test_a_head_is_what_all_prompts_share_and_never_a_whole_prompt():
    same = tuple(range(30))
    assert shared_head([(*same, 5), (*same, 7, 8), (*same, 5, 9)]) == 30
    assert shared_head([same, (*same, 7)]) == shared_head([same, same]) == 29  # each keeps a token that predicts
    assert shared_head([same]) == shared_head([same, same[:16]]) == shared_head([same[:15] + (99,), same]) == 0


def varlen_by_hand(query, key, value, query_ends, key_ends, longest_query, longest_key, scale, window_size, **_):
    """Segment by segment, causal aligned to the bottom right: query [T, H, D], key and value [keys, Hkv or H, D]."""
    outputs = []
    bounds = zip(*(zip(ends[:-1].tolist(), ends[1:].tolist(), strict=True) for ends in (query_ends, key_ends)),
                 strict=True)  # fmt: skip
    for (first, last), (first_key, last_key) in bounds:
        rows, columns = last - first, last_key - first_key
        assert rows <= longest_query and columns <= longest_key and window_size == (-1, 0)
        q, k, v = (x.transpose(0, 1)[None] for x in (query[first:last], *(y[first_key:last_key] for y in (key, value))))
        mask = torch.ones(rows, columns).tril(columns - rows).bool()
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, mask, scale=scale, enable_gqa=True)
        outputs.append(out[0].transpose(0, 1))
    return torch.cat(outputs)


@pytest.mark.parametrize("seed", range(6))
def test_tiles_show_each_token_its_prompt_and_its_own_past_only(seed, monkeypatch):
    """Attention by tiles against a dense mask over the whole row, random segments, behind a head or not."""
    random = np.random.default_rng(seed)
    head = int(random.integers(0, 7)) * (seed % 2)
    segments, row = [(0, head, 0, 0)] * bool(head), head
    for _ in range(random.integers(1, 5)):
        prompt = (row, int(random.integers(1, 9)))
        segments.append((*prompt, prompt[0], 0))
        row += prompt[1]
        for length in random.integers(1, 14, random.integers(1, 6)).tolist():
            segments.append((row, length, *prompt))
            row += length
    plan = PackedAttention(*np.array(segments).T, "cpu", torch.float32, head)
    visible = torch.zeros(row, row, dtype=torch.bool)
    visible[head:, :head] = True
    for start, length, prefix_start, prefix_length in segments:
        visible[start : start + length, prefix_start : prefix_start + prefix_length] = True
        visible[start : start + length, start : start + length] = torch.ones(length, length).tril().bool()
    query, key, value = torch.randn(1, 4, row, 8), torch.randn(1, 2, row, 8), torch.randn(1, 2, row, 8)
    expected = torch.nn.functional.scaled_dot_product_attention(query, key, value, visible, scale=0.3, enable_gqa=True)
    torch.testing.assert_close(plan.attend(0, query, key, value, 0.3), expected.transpose(1, 2), atol=1e-5, rtol=1e-5)
    # and by the kernel of a GPU, which is told where segments begin: done by hand, on this machine
    monkeypatch.setattr(attention, "upload", lambda tensors, device: tensors)
    monkeypatch.setattr(attention, "varlen_attn", varlen_by_hand)
    plan = PackedAttention(*np.array(segments).T, "cuda", torch.bfloat16, head)
    assert plan.use_varlen
    torch.testing.assert_close(plan.attend(0, query, key, value, 0.3), expected.transpose(1, 2), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("size", [1, 2, 3, 5, 100])
@pytest.mark.parametrize("max_tokens", [None, 1, 20, 45])
def test_microbatches_hold_every_episode_once_in_order_and_keep_to_the_budget(size, max_tokens):
    groups = ragged_groups()
    parts = split_into_microbatches(groups, size, max_tokens)
    cut = [(piece.problem.index, e) for part in parts for piece in part for e in piece.episodes]
    assert cut == [(g.problem.index, e) for g in groups for e in g.episodes]
    for part in parts:
        completions = sum(len(piece.episodes) for piece in part)
        tokens = sum(piece.tokens() for piece in part)
        assert completions == 1 or (tokens <= max_tokens if max_tokens else completions <= size)
    assert len(parts) == len(list(fill_microbatches(groups, max_tokens or size, max_tokens is not None, False)))
    whole = split_into_microbatches(groups, size, max_tokens, whole_groups=True)
    assert [piece for part in whole for piece in part] == groups


def test_microbatches_are_of_about_equal_size():
    groups = make_groups(torch.Generator().manual_seed(4), [(5, [10] * 4), (5, [10] * 4), (5, [10] * 2)])
    sizes = [sum(group.tokens() for group in part) for part in split_into_microbatches(groups, 8, 100)]
    assert sizes == [60, 60]  # filled to the brim they would have 90 and 25
    assert [sum(len(g.episodes) for g in part) for part in split_into_microbatches(groups, 8)] == [5, 5]


def test_gradient_checkpointing_changes_no_gradient_and_does_compute_again(tiny_model_folder):
    gradients, kept = [], []
    for again in (False, True):
        settings = ModelConfig(str(tiny_model_folder), dtype="float32", gradient_checkpointing=again)
        model, sizes = load_model(Config(settings), torch.device("cpu")), []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: (sizes.append(x.numel()), x)[1], lambda x: x):  # noqa: B023
            scores = score(model, make_row(), 1.0)
        kept.append(sum(sizes))
        scores.logprobs.sum().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    torch.testing.assert_close(*gradients, atol=1e-5, rtol=1e-5)
    assert kept[1] < 0.6 * kept[0]


# the layers, compiled


@pytest.fixture
def interface():
    """compile_layers registers the attention anew for the whole process."""
    torch.compiler.reset()
    yield
    AttentionInterface.register(ATTENTION_NAME, grpo_packed_attention)
    torch.compiler.reset()


@pytest.mark.parametrize("inductor", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name, checkpointing", [("llama", False), ("qwen3", True)])
def test_compiled_layers_have_the_gradients_of_plain_ones(monkeypatch, interface, name, checkpointing, inductor):
    """Of three batches of different shapes."""
    backend, outcomes = Backend(), []
    if inductor:
        check_compiler(torch.device("cpu"))
    else:
        compile_with(monkeypatch, backend)
    for compiled in (False, True):
        packed, _ = make_pair(name)
        if checkpointing:
            packed.gradient_checkpointing_enable({"use_reentrant": False})
            packed.train()
        if compiled:
            compile_layers(packed)
        for shapes in (RAGGED, RAGGED[:2], [(3, [8, 2])]):
            row = make_row(make_groups(torch.Generator().manual_seed(1), shapes))
            score(packed, row, 0.7).logprobs.sum().backward()
        outcomes.append([weight.grad for weight in packed.parameters()])
    torch.testing.assert_close(*outcomes, atol=1e-4, rtol=1e-4)
    # batches, layers, before and after the attention; again
    assert inductor or backend.calls >= 3 * 2 * 2 * (1 + checkpointing)


def test_layers_share_their_graphs_and_a_rollout_runs_none(monkeypatch, interface):
    backend = Backend()
    compile_with(monkeypatch, backend)
    monkeypatch.setitem(CONFIGS, "deep", LlamaConfig(**SHAPE | {"num_hidden_layers": 12}))
    packed, plain = make_pair("deep")
    compile_layers(packed)
    rows = [make_row(), make_row(make_groups(torch.Generator().manual_seed(1), [(3, [8, 2])]))]
    with torch.inference_mode():
        expected = [score(packed, row, 1.0).logprobs for row in rows]
    assert backend.calls == 0
    with torch.no_grad():
        found = [score(packed, row, 1.0).logprobs for row in rows]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert backend.graphs <= 4 and backend.calls >= 2 * 2 * len(decoder_layers(packed))
    assert packed.state_dict().keys() == plain.state_dict().keys()


def test_a_machine_without_a_compiler_gets_one_sentence(monkeypatch):
    compile_with(monkeypatch, raises)
    with pytest.raises(ConfigError, match=r"model.compile: torch.compile does not work.*set model.compile: false"):
        check_compiler(torch.device("cpu"))


def test_models_that_a_packed_row_would_leak_through_are_refused():
    packed = make_pair("llama")[0]
    check_attention(packed, 100)
    with pytest.raises(ValueError, match="attention_plan"):
        packed(torch.tensor([[1, 2, 3]]))
    layers = {"sliding_window": 4, "layer_types": ["sliding_attention"] * 2}
    sliding = transformers.Gemma3TextConfig(**SHAPE, head_dim=8, **layers)
    convolution = transformers.Lfm2Config(**SHAPE, layer_types=["conv", "full_attention"])
    for config, reason in (
        (convolution, "only 1 of their layers are attention"),
        (sliding, "attends to 4 tokens, but sequences have up to 100"),
        (transformers.Gemma2Config(**SHAPE, head_dim=8), "softcap"),
    ):
        with pytest.raises(ConfigError, match=reason):
            check_attention(packed_model(config), 100)
    with pytest.raises(NotImplementedError, match="attends to 4 tokens"):
        score(packed_model(sliding), make_row(), 1.0)
