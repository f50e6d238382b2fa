"""model.fp32_head: the logits of bf16 weights are those of a product that is not rounded, wherever a head is called."""

from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from test_engine import make_engine, make_problems
from test_packing import SHAPE, make_row
from transformers import AutoModelForCausalLM, Qwen2Config

from src.config import ConfigError
from src.engine import cpu_weights, wide_products
from src.engine.models import widen_head
from src.engine.plan import memory_plan
from src.engine.sampler import SlotDecoder
from src.engine.scoring import score
from src.engine.wide_products import LINEAR

NEEDS_BF16 = pytest.mark.skipif(not cpu_weights.has_products(), reason="this processor has no products in bf16")
BF16 = ["model.dtype=bfloat16", "model.device=cpu"]
WIDE = [*BF16, "model.fp32_head=true"]


def exact_logprobs(hidden: torch.Tensor, head, ids: torch.Tensor) -> torch.Tensor:
    """Of the tokens [N], from hidden [N, hidden] and the head's numbers as they are, in float64."""
    bias = None if head.bias is None else head.bias.detach().double()
    logits = F.linear(hidden.detach().double(), head.weight.detach().double(), bias)  # [N, vocab]
    return logits.log_softmax(-1).gather(1, ids[:, None])[:, 0]


@pytest.fixture
def untied_folder(tmp_path, tiny_model_folder):
    """A model whose head is not its embedding, with the tokenizer of the tiny one."""
    folder = tmp_path / "untied"
    torch.manual_seed(0)
    size = AutoModelForCausalLM.from_pretrained(tiny_model_folder).config.vocab_size
    config = Qwen2Config(**SHAPE | {"vocab_size": size})
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    for file in tiny_model_folder.glob("*token*"):
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


@pytest.mark.parametrize(
    "keys",
    [
        [],
        ["training.reference_offload=true"],
        ["lora.r=2"],
        ["model.gradient_checkpointing=true"],
        ["model.pretrained_model_path=UNTIED"],
    ],
    ids=str,
)
def test_policy_and_anchor_are_scored_as_exactly_as_their_hidden_states_allow(keys, untied_folder):
    keys = [key.replace("UNTIED", str(untied_folder)) for key in keys]
    errors = {}
    for options in (BF16, WIDE):
        engine, row = make_engine(*keys, *options), make_row(dtype=torch.bfloat16)
        for elements in (None, 4 * engine.model.config.vocab_size):
            scores = score(engine.model, row, 1.0, engine.anchor, {"kl": "reverse"}, elements)
            head = engine.model.get_output_embeddings()
            ids = row.batch.token_ids
            for hidden, found in ((scores.hidden, scores.logprobs), (scores.anchor_hidden, scores.anchor_logprobs)):
                assert hidden.dtype == head.weight.dtype == torch.bfloat16
                error = (found.double() - exact_logprobs(hidden, head, ids)).abs().max()
                errors[tuple(options)] = max(error, errors.get(tuple(options), torch.zeros(())))
    assert errors[tuple(BF16)] > 1e-3 and errors[tuple(WIDE)] < 1e-5


@pytest.mark.parametrize("reordered", [pytest.param(True, marks=NEEDS_BF16), False])
@pytest.mark.parametrize("untied", [True, False])
def test_the_sampler_draws_from_the_same_logits(reordered, untied, untied_folder):
    """With weights in the order of the processor, and as they are."""
    engine = make_engine(*WIDE, *([f"model.pretrained_model_path={untied_folder}"] if untied else []))
    head, errors, copied, choose = engine.model.get_output_embeddings(), [], [], SlotDecoder.choose
    with torch.no_grad():  # another weight than the file's, as after an update
        head.weight.mul_(-0.7)

    def noted(self, hidden, slots):
        episodes, columns = self.episodes[slots].clone(), self.lengths[slots].clone()
        running = ~self.ended[slots]
        choose(self, hidden, slots)
        copied.append("forward" in vars(head))
        expected = exact_logprobs(hidden, head, self.tokens[episodes, columns])
        errors.append((self.logprobs[episodes, columns].double() - expected)[running].abs())

    with patch.object(SlotDecoder, "choose", noted), patch.object(cpu_weights, "applies", lambda *_: reordered):
        groups = engine.sample(make_problems(), 4, stream=1)
    assert len(torch.cat(errors)) > 50 and float(torch.cat(errors).max()) < 1e-5
    assert all(copied) if reordered else not any(copied), "in fp32 once, and not for each token"
    mismatch = [
        abs(a - b) for g in engine.score(groups) for e in g.episodes
        for a, b in zip(e.logprobs, e.old_logprobs, strict=True)
    ]  # fmt: skip
    assert sum(mismatch) / len(mismatch) < 0.02


def test_gradients_are_those_of_the_exact_logits():
    engine, row = make_engine(*WIDE), make_row(dtype=torch.bfloat16)
    head = engine.model.get_output_embeddings()
    chunk = 4 * engine.model.config.vocab_size
    for elements, tolerance in ((None, 4e-3), (chunk, 1e-2)):  # gradients of chunks are added up in bf16
        hidden = score(engine.model, row, 1.0).hidden.detach().requires_grad_()
        with patch("src.engine.scoring.hidden_states", return_value=hidden):
            engine.model.zero_grad()
            score(engine.model, row, 1.0, elements=elements).logprobs.sum().backward()
        weight, exact = head.weight.detach().double().requires_grad_(), hidden.detach().double().requires_grad_()
        logits = F.linear(exact, weight)  # [N, vocab]
        logits.log_softmax(-1).gather(1, row.batch.token_ids[:, None]).sum().backward()
        for found, expected in ((head.weight.grad, weight.grad), (hidden.grad, exact.grad)):
            assert found.dtype == torch.bfloat16
            assert (found.double() - expected).norm() < tolerance * expected.norm()


@pytest.mark.parametrize("keys", [[], ["lora.r=2"], ["lora.r=2", "lora.merge_on_save=true"]], ids=str)
@pytest.mark.parametrize("finished", [False, True])
def test_what_is_saved_does_not_know_of_it(keys, finished, tmp_path):
    for name, options in (("plain", BF16), ("wide", WIDE)):
        make_engine(*keys, *options).state(finished).write(tmp_path / name)
    files = [{file.name: file.read_bytes() for file in (tmp_path / name).iterdir()} for name in ("plain", "wide")]
    assert files[0].keys() == files[1].keys()
    assert [name for name in files[0] if files[0][name] != files[1][name] and not name.endswith(".pt")] == []
    if not keys:
        weights = load_file(tmp_path / "wide" / "model.safetensors")
        assert {weight.dtype for weight in weights.values()} == {torch.bfloat16}
        engine = make_engine(*WIDE)
        if not finished:
            engine.load(tmp_path / "plain")


def test_in_fp32_and_by_default_the_head_stays_what_it_was_and_another_kind_is_refused():
    for options in (BF16, ["model.fp32_head=true"]):
        engine = make_engine(*options)
        assert type(engine.model.get_output_embeddings()) in LINEAR
        assert type(engine.anchor.get_output_embeddings()) in LINEAR
    engine.model.set_output_embeddings(torch.nn.Sequential())
    with pytest.raises(
        ConfigError, match=r"model.fp32_head is not possible .* a Sequential and not a linear layer; remove"
    ):
        widen_head(engine.model)


def test_the_plan_counts_the_head_in_fp32_and_its_gradient(monkeypatch):
    """Asked for, or because this processor multiplies so faster."""
    plans = []
    for options, faster in ((BF16, False), (WIDE, False), (BF16, True)):
        monkeypatch.setattr(wide_products, "are_faster", lambda faster=faster: faster)
        engine = make_engine(*options)
        plans.append(memory_plan(engine.config, engine.model, engine.anchor))
    weight = engine.model.get_output_embeddings().weight
    assert plans[1]["update"] - plans[0]["update"] == 2 * 4 * weight.numel() == plans[2]["update"] - plans[0]["update"]
    assert {name: plans[1][name] for name in plans[0] if name != "update"} == {
        name: size for name, size in plans[0].items() if name != "update"
    }
