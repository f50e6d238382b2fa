"""The engine by its verbs: what only the whole of it can show. What each part does is proven beside the part."""

from dataclasses import asdict, replace
from functools import cache
from pathlib import Path

import pytest
import torch
from test_packing import of_tokens, plain_logits, with_feedback
from transformers import AutoModelForCausalLM

from src.config import ConfigError, load_config
from src.engine import Engine, distributed
from src.engine import engine as engine_module
from src.engine.optim import build_optimizer
from src.engine.sampler import SlotDecoder
from src.records import Group, Problem

TINY = Path(__file__).parent.parent / "configs" / "configs_tiny"
SMALL = ["model.dtype=float32", "data.train_size=20", "data.eval_size=4", "data.eval_samples=1", "training.max_steps=2",
         "training.batch_size=16", "training.num_questions_per_batch=4", "training.minibatches=2",
         "training.max_gen_len=24", "training.inference_batch_size=16"]  # fmt: skip


def tiny_config(*overrides: str):
    return load_config(TINY / "config_kl_beta0.04_tiny.yaml", [*SMALL, *overrides])


def make_engine(*overrides: str) -> Engine:
    engine = Engine(tiny_config(*overrides))
    engine.load_model()
    return engine


@cache
def make_problems() -> tuple[Problem, ...]:
    return tuple(Problem(index, tuple(range(5, 9 + 3 * index)), "", {}) for index in range(3))


def texts(group: Group) -> list[tuple[int, ...]]:
    return [episode.token_ids for episode in group.episodes]


def test_the_same_prompt_twice_draws_others_and_the_first_of_them_is_as_if_it_were_alone():
    engine, (first, second, _) = make_engine(), make_problems()
    twice = engine.sample([first, second, first], 3, stream=5)
    assert [group.problem.index for group in twice] == [0, 1, 0]
    assert not set(texts(twice[0])) & set(texts(twice[2]))
    (again,) = engine.sample([first], 3, stream=5)  # in the same step: a third draw
    assert not set(texts(again)) & {*texts(twice[0]), *texts(twice[2])}
    for problems, expected in (([first], [twice[0]]), ([first, first], [twice[0], twice[2]])):
        engine.begin(5)
        assert list(map(texts, engine.sample(problems, 3, stream=5))) == list(map(texts, expected))
    evaluations = [texts(engine.sample([first], 3, stream=-1)[0]) for _ in range(2)]
    assert evaluations[0] == evaluations[1], "an evaluation always draws the same"


def weighed(groups: list[Group]) -> list[Group]:
    """Some weight for each token."""
    return [
        replace(g, episodes=tuple(replace(e, token_weight=0.1 + len(e.token_ids)) for e in g.episodes)) for g in groups
    ]


@pytest.mark.parametrize("tokens", ["null", "1000"])
def test_passes_shrink_when_memory_runs_out_and_the_config_stays_what_it_was(tokens, caplog):
    engine = make_engine(f"training.max_tokens_per_microbatch={tokens}", "training.micro_batch_size=12")
    config, groups = asdict(engine.config), weighed(engine.sample(make_problems(), 4, stream=1))
    room, sizes = [12], []

    def objective(scores, batch):
        sizes.append(len(batch.lengths))
        if sizes[-1] > room[0]:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate\nand a long list")
        return batch.mean(scores.logprobs), {"mean": scores.logprobs}

    results = []
    for room[0] in (12, 3):
        measured = engine.forward_backward(groups, objective).means()["mean"]
        gradient = torch.cat([parameter.grad.flatten() for parameter in engine.model.parameters()])
        results.append((measured, gradient))
    assert sizes[:2] == [12, 12] and max(sizes[-4:]) <= 3
    assert results[1][0] == pytest.approx(results[0][0])
    assert (results[1][1] - results[0][1]).norm() < 1e-4 * results[0][1].norm()
    assert asdict(engine.config) == config
    assert ("tokens a pass" if tokens == "1000" else "completions a pass") in caplog.text
    sizes.clear()
    engine.forward_backward(groups, objective)
    assert max(sizes) <= 3, "the next update begins with what has fitted"
    room[0] = 0
    with pytest.raises(ConfigError, match=r"memory does not suffice for the update of a single completion \(CUDA out"):
        engine.forward_backward(groups, objective)


def test_the_learning_rates_of_parameter_groups_keep_their_ratio(monkeypatch, tmp_path):
    def optimizer_of(model, training):
        first, *rest = model.parameters()
        base = training.learning_rate
        return build_optimizer([{"params": [first]}, {"params": rest, "lr": 10 * base}], learning_rate=base,
                               betas=(0.9, 0.99), weight_decay=0.0, memory_efficient=False, state_bits=8,
                               offload=False)  # fmt: skip

    monkeypatch.setattr(engine_module, "optimizer_of", optimizer_of)
    engine = make_engine("training.learning_rate=1e-3")
    for rate in (1e-3, 4e-4, 0.0):
        engine.optim_step(rate)
        assert [group["lr"] for group in engine.optimizer.param_groups] == pytest.approx([rate, 10 * rate])
    engine.state().write(tmp_path)
    again = make_engine("training.learning_rate=1e-3")
    again.load(tmp_path)
    again.optim_step(2e-4)
    assert [group["lr"] for group in again.optimizer.param_groups] == pytest.approx([2e-4, 2e-3])


@pytest.mark.parametrize("gradient, rate, expected", [(1.0, 1e-2, 1.0), (1.0, 1e-12, 0.0), (float("nan"), 1e-2, 0.0)])
@pytest.mark.parametrize(
    "overrides",
    [("model.dtype=bfloat16",), ("model.dtype=bfloat16", "training.memory_efficient_adamw=true"), ("lora.r=4",)],
)
def test_the_share_of_weights_that_a_step_has_moved(overrides, gradient, rate, expected):
    """Of what is trained: a base under an adapter never moves. A rate that bf16 rounds away moves nothing."""
    engine = make_engine(*overrides)
    for parameter in (one for one in engine.model.parameters() if one.requires_grad):
        parameter.data[parameter.data == 0] = 1.0  # an adapter's B, where any step would show
    engine.begin(1)
    for parameter in (one for one in engine.model.parameters() if one.requires_grad):
        parameter.grad = torch.full_like(parameter, gradient)
    engine.optim_step(rate)
    assert engine.weights_moved() == expected


def test_the_weights_that_are_looked_at_by_hand():
    engine = make_engine()
    engine.begin(1)
    sizes = [-(-parameter.numel() // 1009) for parameter in engine.model.parameters()]
    with torch.no_grad():
        next(engine.model.parameters()).add_(1)
        engine.model.model.norm.weight[1:] += 1  # all but the one that is looked at
    assert min(sizes) == 1 and engine.weights_moved() == pytest.approx(sizes[0] / sum(sizes))


@pytest.mark.parametrize("processes", [1, 2])
def test_scored_episodes_have_the_entropy_of_each_written_token(processes, monkeypatch):
    """-sum p log p over the vocabulary, of the tempered distribution, by transformers' own forward."""
    engine = make_engine("training.temperature=0.7", "training.micro_batch_size=3")
    sampled = engine.sample(make_problems(), 4, stream=1)
    groups = [with_feedback(sampled[0]), *sampled[1:]]
    assert all(episode.entropies is None for group in groups for episode in group.episodes)
    here, sent, results = [0], [], []

    def gather(mine: list) -> list:
        sent.append(mine)
        if len(sent) < processes:  # now the other process comes as far
            here[0] += 1
            results.append(engine.score(groups))
        return sent

    monkeypatch.setattr(distributed, "world", lambda: processes)
    monkeypatch.setattr(distributed, "rank", lambda: here[0])
    monkeypatch.setattr(distributed, "gather", gather)
    results.append(engine.score(groups))
    assert len(sent) == (processes if processes > 1 else 0) and results[0] == results[-1]

    plain = AutoModelForCausalLM.from_pretrained(engine.config.model.pretrained_model_path, dtype=torch.float32)
    with torch.no_grad():
        logprobs = plain_logits(plain, groups, 0.7).log_softmax(-1)  # [N, vocab]
    episodes = [episode for group in results[0] for episode in group.episodes]
    assert all(len(e.entropies) == len(e.old_logprobs) == e.length < 25 for e in episodes)
    assert any(e.length < len(e.token_ids) for e in episodes)
    for found, expected in (
        ([value for e in episodes for value in e.entropies], -(logprobs.exp() * logprobs).sum(-1)),
        ([value for e in episodes for value in e.old_logprobs], of_tokens(logprobs, groups)),
    ):
        torch.testing.assert_close(torch.tensor(found), expected, atol=1e-4, rtol=0)
    assert torch.tensor([value for e in episodes for value in e.entropies]).std() > 0.1


def test_a_resumed_run_decodes_in_as_many_slots_whatever_is_free(tmp_path, monkeypatch):
    """Rounding depends on the slots (in bf16 tokens do): memory that has become free must not change a run."""
    engine = make_engine()
    problems = [Problem(index, (5, 6, 7), "", {}) for index in range(4)]
    monkeypatch.setattr("src.engine.plan.fit_to_memory", lambda *arguments: (3, 2))
    engine.sample(problems, 2, stream=1)
    engine.state().write(tmp_path)
    monkeypatch.setattr("src.engine.plan.fit_to_memory", lambda *arguments: (8, 4))
    again, decoded = make_engine(), []
    again.load(tmp_path)
    decoder = SlotDecoder.__init__
    monkeypatch.setattr(
        SlotDecoder, "__init__", lambda self, *given: decoded.append((given[4], len(given[2]))) or decoder(self, *given)
    )
    again.sample(problems, 2, stream=2)
    assert decoded == [(3, 2), (3, 2)]
    again.sample(problems, 1, stream=2)
    assert decoded[2:] == [(8, 4)], "another size has room of its own"
