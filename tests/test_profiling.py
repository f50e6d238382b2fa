"""--profile: exclusive times that add up, FLOPs and bytes against arithmetic, and steps that stay what they were."""

import json
import shutil
import time
from types import SimpleNamespace

import pytest
import torch
from test_engine import tiny_config
from test_packing import SHAPE, make_pair, make_row
from test_sampler import make_prompts, sample

from src import commands
from src.commands import run_profile
from src.config import ConfigError
from src.engine import MemoryEfficientAdamW, optim, optim_loop, profiling, scoring, wide_products
from src.engine.profiling import Profile, measured, phase, table, three_digits
from src.engine.scoring import score
from src.prepare import prepare
from src.train_grpo import train_step

CPU = torch.device("cpu")
ROLLOUT = {"prefill", "decode", "head and sampling", "reward"}
UPDATE = {"packing", "reference", "policy forward", "head", "loss", "backward", "optimizer", "other"}


@pytest.fixture
def clock(monkeypatch):
    """A clock that only moves when it is told to."""
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    def sleep(seconds: float) -> None:
        now[0] += seconds

    return sleep


def test_phases_are_exclusive_and_add_up_also_after_an_error(clock):
    @phase("inner")
    def inner(fails: bool) -> None:
        clock(4)
        if fails:
            raise ValueError

    def step() -> int:
        clock(1)
        with phase("outer"):
            clock(2)
            inner(False)
            clock(8)
            with pytest.raises(ValueError):
                inner(True)
            clock(16)
        clock(32)
        return 7

    profile, tokens = measured(step, CPU)
    assert profile.seconds == {"other": 33, "outer": 26, "inner": 8} and tokens == 7
    assert profile.stack == ["other"]


def test_without_a_profile_a_phase_looks_at_nothing(monkeypatch):
    def fails(profile):
        raise AssertionError

    monkeypatch.setattr(Profile, "border", fails)
    with phase("anything"):
        assert profiling.taken is None
    with pytest.raises(AssertionError):
        measured(lambda: 1, CPU)
    assert profiling.taken is None, "a step that fails ends the profile"


def counted(work) -> tuple[float, float]:
    """FLOPs and bytes of all phases."""

    def step() -> int:
        work()
        return 1

    profile, _ = measured(step, CPU, counting=True)
    return sum(profile.flops.values()), sum(profile.moved.values())


def test_bytes_are_those_that_a_kernel_must_move():
    left, right, table_of_rows = torch.ones(8, 16), torch.ones(16, 4), torch.ones(1000, 16)
    rows, moments, gradients = torch.tensor([5, 7]), [torch.zeros(3), torch.zeros(5)], [torch.ones(3), torch.ones(5)]
    cases = {  # fp32, rows of int64
        "product": (lambda: left @ right, 4 * (8 * 16 + 16 * 4 + 8 * 4)),
        "view": (lambda: left.view(16, 8).t()[2:].detach().expand(3, 6, 16), 0),
        "allocation": (lambda: torch.empty(100), 0),
        "filled": (lambda: torch.zeros(100), 4 * 100),
        "expanded": (lambda: torch.ones(16).expand(8, 16) + left, 4 * (16 + 16 + 8 * 16 + 8 * 16)),
        "in place": (lambda: left.add_(1), 4 * 2 * 8 * 16),
        "copied": (lambda: left[:, :4].copy_(torch.empty(8, 4)), 4 * 2 * 8 * 4),
        "rows read": (lambda: table_of_rows.index_select(0, rows), 8 * 2 + 4 * 2 * 2 * 16),
        "embedding": (lambda: torch.nn.functional.embedding(rows, table_of_rows), 8 * 2 + 4 * 2 * 2 * 16),
        "rows written": (lambda: table_of_rows.index_put_((rows,), left[:2]), 8 * 2 + 4 * 2 * 2 * 16),
        "lists": (lambda: torch._foreach_add_(moments, gradients), 4 * 3 * (3 + 5)),
    }
    for name, (work, expected) in cases.items():
        assert counted(work)[1] == expected, name
    with torch.inference_mode():  # where it arrives as one kernel that is none
        flops, moved = counted(lambda: torch.nn.functional.linear(left, right.t(), torch.ones(4)))
    assert flops == 2 * 8 * 16 * 4
    assert moved == 4 * (4 + 4 + 8 * 16 + 16 * 4 + 8 * 4), "the bias is filled, then read"


def linear_parameters(model) -> int:
    """Of the matrices of the decoder, which every token is multiplied with."""
    return sum(p.numel() for name, p in model.get_decoder().named_parameters() if name.endswith("proj.weight"))


@pytest.mark.parametrize("chunk_tokens", [None, 10])
def test_an_update_is_two_flops_a_parameter_and_token_forward_and_four_backward(chunk_tokens):
    model, _ = make_pair("llama")
    row = make_row()

    def step() -> int:
        elements = chunk_tokens and chunk_tokens * SHAPE["vocab_size"]
        scores = score(model, row, 1.0, anchor=make_pair("llama")[0], elements=elements)
        with phase("backward"):
            (scores.logprobs.sum() + scores.entropy.sum()).backward()
        return 1

    flops = measured(step, CPU, counting=True)[0].flops
    completion = row.predictor_index.numel()
    forward = 2 * linear_parameters(model) * row.input_ids.numel()
    pairs = sum(tile.mask.numel() for tile, _ in row.attention_plan.tiles)  # of queries and keys, padding included
    attention = SHAPE["num_hidden_layers"] * 2 * 2 * pairs * SHAPE["hidden_size"]
    head = 2 * completion * SHAPE["vocab_size"] * SHAPE["hidden_size"]
    assert flops["policy forward"] == flops["reference"] == forward + attention
    again = 1 if chunk_tokens else 0  # more than one chunk is computed again in the backward pass, with the anchor's
    assert flops["head"] == 2 * head * (1 + again)
    # the kernel's backward computes the scores again: five products in place of two
    assert flops["backward"] == 2 * forward + 2.5 * attention + 2 * head
    assert flops["other"] == flops["loss"] == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_rollout_is_two_flops_a_parameter_and_token(dtype):
    """In bf16 on a CPU the weights are in the order of the processor, where torch's registry knows no product."""
    model = make_pair("llama")[0].to(dtype)
    prompts, new = make_prompts(lengths=(9,) * 4), 12

    def step() -> int:
        groups = sample(model, 8, prompts, new=new, eos=(10**6,))  # none ends before the limit
        return sum(len(episode.token_ids) for group in groups for episode in group.episodes)

    profile, tokens = measured(step, CPU, counting=True)
    assert tokens == 4 * 8 * new
    flops, layers, width = profile.flops, SHAPE["num_hidden_layers"], SHAPE["hidden_size"]
    assert flops["prefill"] == 2 * linear_parameters(model) * 36 + layers * 4 * 4 * 9 * 9 * width
    steps = 12  # the first token comes from the prompt, and steps come in blocks of SYNC_EVERY
    attention = sum(layers * 4 * 32 * (9 + own) * width for own in [*range(1, new), new])
    assert flops["decode"] == 2 * linear_parameters(model) * 32 * steps + attention
    assert flops["head and sampling"] == 2 * 32 * (1 + steps) * SHAPE["vocab_size"] * width


def phases_of(output: str) -> dict[str, list[str]]:
    """The cells of each line of the table."""
    lines = output.splitlines()
    start = next(index for index, line in enumerate(lines) if line.startswith("phase "))
    end = next(index for index, line in enumerate(lines) if line.startswith("step  ") and index > start)
    return {line[:18].strip(): line[18:].split() for line in lines[start : end + 1]}


@pytest.fixture(autouse=True)
def quick_ceilings(monkeypatch):
    monkeypatch.setattr(profiling, "SIDE", {"cpu": 64})
    monkeypatch.setattr(profiling, "COPIED", 2**16)


@pytest.mark.parametrize("lora", [[], ["lora.r=2"]])
def test_a_profile_shows_every_phase_and_writes_nothing(lora, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = tiny_config("training.learning_rate=0.1", *lora)
    sampled = []

    def recorded_step(run, step):
        metrics, groups = train_step(run, step)
        sampled.append([episode.token_ids for group in groups for episode in group.episodes])
        return metrics, groups

    monkeypatch.setattr(commands, "train_step", recorded_step)
    run_profile(config, "countdown")
    rows = phases_of(capsys.readouterr().out)
    assert set(rows) == ROLLOUT | UPDATE | {"phase", "step"}
    shares = [float(cells[1].rstrip("%")) for phase_name, cells in rows.items() if phase_name not in ("phase", "step")]
    assert sum(shares) == pytest.approx(100, abs=0.1 * len(shares))
    assert rows["phase"] == ["seconds", "share", "tokens/s", "TFLOP/s", "%", "GB/s", "%"]
    assert rows["reward"][3] == "-" and rows["decode"][3] != "-" and rows["optimizer"][5] != "-"
    assert len(sampled) == 4 and all(tokens == sampled[0] for tokens in sampled), "each step has the same work"
    assert not list(tmp_path.iterdir())


def test_completions_of_a_file_have_no_rollout(capsys, tmp_path):
    file = tmp_path / "scored.jsonl"
    texts = [{"text": "5", "score": 1.0}, {"text": "6 7", "score": 0.0}]
    row = {"prompt": "?", "nums": [1, 2, 3], "completions": texts}
    file.write_text("".join(json.dumps(row | {"prompt": f"{i}?", "target": i}) + "\n" for i in range(40)))
    overrides = [f"data.path={file}", "training.old_logprobs=trainer", "training.inner_epochs=2"]
    run_profile(tiny_config(*overrides), "scored")
    assert set(phases_of(capsys.readouterr().out)) == UPDATE | {"phase", "step"}


def test_the_step_that_is_counted_is_the_step_that_is_not(monkeypatch):
    monkeypatch.setitem(scoring.CHUNK_ELEMENTS, "cpu", 2**8)  # so that the head is computed again
    metrics = []
    for counting in (None, False, True):
        run = prepare(tiny_config(), "countdown")

        def step(run=run) -> int:
            run.engine.begin(1)
            metrics.append(train_step(run, 1)[0])
            return 1

        step() if counting is None else measured(step, CPU, counting)
    plain, timed, counted = metrics
    assert timed == plain
    assert counted == pytest.approx(plain, rel=1e-4, abs=1e-6)


@pytest.mark.skipif(shutil.which("cc") is None, reason="there is no C compiler")
def test_what_the_optimizers_loop_in_c_moves_is_counted_though_torch_does_not_see_it_and_its_trial_is_not(monkeypatch):
    monkeypatch.setattr(optim_loop, "WORTH_COMPILING", 0)
    optim.kernel_works.cache_clear()
    for counting in (False, True):
        weight = torch.nn.Parameter(torch.randn(2048, 1024, dtype=torch.bfloat16))
        weight.grad = torch.randn_like(weight)
        optimizer = MemoryEfficientAdamW([weight])
        step = phase("optimizer")(lambda optimizer=optimizer: optimizer.step() or 1)
        moved = measured(step, CPU, counting)[0].moved["optimizer"]
        optim.kernel_works.cache_clear()
    states = sum(state.nbytes for name, state in optimizer.state[weight].items() if name != "step")
    once = 3 * weight.nbytes + 2 * states  # all is read and written, but the gradient is only read
    assert counting and once <= moved < 1.05 * once
    assert [has_scratch for _, has_scratch in optimizer.workspaces] == [False]


def test_the_table_is_arithmetic():
    step, once = Profile(CPU), Profile(CPU)
    step.seconds |= {"decode": 2.0, "other": 6.0}
    once.flops |= {"decode": 3e12}
    once.moved |= {"decode": 4e9, "other": 6e9}
    half = Profile(CPU)
    half.seconds |= {"decode": 1.0, "other": 7.0}  # the means are 1.5 and 6.5
    rows = phases_of(table(once, [step, half], 300, (4e12, 40e9)))
    assert rows["decode"] == ["1.5000", "18.8%", "200", "2.00", "50.0", "2.67", "6.7"]
    assert rows["other"] == ["6.5000", "81.2%", "46", "-", "0.0", "0.923", "2.3"]
    assert rows["step"] == ["8.0000", "100.0%", "38", "0.375", "9.4", "1.25", "3.1"]
    assert [three_digits(x) for x in (0, 0.01234, 1.234, 43.21, 4321.4)] == ["-", "0.0123", "1.23", "43.2", "4,321"]


@pytest.mark.parametrize("wide", [True, False])
def test_the_ceiling_is_that_of_products_as_they_are_computed(wide, monkeypatch):
    monkeypatch.setattr(wide_products, "are_faster", lambda: wide)
    made, plain = [], torch.mm
    monkeypatch.setattr(torch, "mm", lambda *a, **k: (made.append(a[0].dtype), plain(*a, **k))[1])
    limits = profiling.ceilings(CPU, torch.bfloat16)
    assert set(made) == {torch.float32 if wide else torch.bfloat16} and all(limit > 0 for limit in limits)
    model = SimpleNamespace(device=CPU, dtype=torch.bfloat16)
    assert (" in a float32 product" in profiling.caption(model, 1, limits)) == wide


def test_several_processes_are_refused(monkeypatch):
    monkeypatch.setattr(commands, "world", lambda: 2)
    with pytest.raises(ConfigError, match="start it without torchrun"):
        run_profile(tiny_config(), "countdown")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_each_phase_has_its_peak_of_memory_and_its_wait(capsys, monkeypatch):
    monkeypatch.setattr(profiling, "SIDE", {"cuda": 1024})
    run_profile(tiny_config("model.device=cuda", "model.dtype=bfloat16"), "countdown")
    rows = phases_of(capsys.readouterr().out)
    assert rows["phase"][-2:] == ["peak", "GiB"]
    assert float(rows["backward"][-1]) > 0 and rows["backward"][3] != "-" and rows["policy forward"][3] != "-"
