"""What goes wrong in the middle of a run, in memory, gradients, locks or by signals: nothing is lost by it."""

import errno
import fcntl
import hashlib
import json
import os
import select
import shutil
import signal
import time
import traceback
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from benchmarks.kill_storm import differences, metrics_of
from src import train_grpo
from src.commands import run_evaluation
from src.config import ConfigError, RunError, Stopped, load_config
from src.engine import engine as engine_module
from src.engine import models, plan
from src.engine.memory import memory_of
from src.engine.packing import apart, pack
from src.engine.plan import FEWEST_LOGITS, Limit, in_parts_that_fit, limit_of, memory_plan, of_update
from src.engine.room import Kept
from src.engine.scoring import CHUNK_ELEMENTS
from src.prepare import prepare
from src.records import Episode, Group, Problem
from src.run import run as run_module
from src.run import run_folder as run_folder_of
from src.run.checkpoint import newest_checkpoint
from src.run.console import configure_logging
from src.run.stop import StopSignal
from src.run.storage import RunLock, StorageError, set_aside
from src.tasks import given_groups
from src.train_grpo import next_problems, objective, run_training, wanted, with_advantages, with_loss_weights

CONFIG = Path(__file__).parent.parent / "configs" / "configs_tiny" / "config_kl_beta0.04_tiny.yaml"
SMALL = [
    "training.batch_size=16", "training.num_questions_per_batch=4", "training.max_gen_len=24", "data.eval_size=4",
    "data.train_size=16", "data.eval_samples=1", "training.max_steps=3", "training.eval_interval=0",
]  # fmt: skip


@pytest.fixture(autouse=True, scope="module")
def no_waiting_for_the_disk():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


def config_with(*overrides: str):
    return load_config(CONFIG, [*SMALL, *overrides])


def run_folder(work: Path) -> Path:
    (folder,) = (work / "runs").iterdir()
    return folder


def weights_of(work: Path) -> dict:
    return load_file(run_folder(work) / "final" / "model.safetensors")


def saved_in(work: Path) -> str | None:
    newest = newest_checkpoint(run_folder(work) / "checkpoints")
    return newest and newest.name


def rollout(run) -> list:
    """The graded groups of step 1."""
    run.engine.begin(1)
    return with_advantages(
        run.sample(next_problems(run, 6), 4, stream=1),
        run.config.training,
        run.task,
    )


def backward(run, groups):
    """The gradient of an update with all groups, and what was measured."""
    training = run.config.training
    groups = with_loss_weights(groups, training)
    measured = run.engine.forward_backward(groups, partial(objective, training), **wanted(training, anchor=True))
    return [parameter.grad.clone() for parameter in run.engine.model.parameters()], measured.means()


# --- memory -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def memory_for(monkeypatch):
    """Scoring more tokens than given runs out of memory; returns the sizes of the passes that were tried."""
    from src.engine import engine as module

    real = module.score

    def limit(tokens: int, error=torch.OutOfMemoryError, reason="CUDA out of memory. Tried to allocate 20.00 MiB"):
        tried = []

        def score(model, row, *rest, **want):
            tried.append(row.input_ids.shape[1])
            if tried[-1] > tokens:
                raise error(f"{reason}\nmore lines")
            return real(model, row, *rest, **want)

        monkeypatch.setattr(module, "score", score)
        return tried

    return limit


@pytest.mark.parametrize(
    ("size", "error"),
    [
        ("micro_batch_size=16", torch.OutOfMemoryError),
        ("max_tokens_per_microbatch=10000", RuntimeError),
        ("micro_batch_size=16", MemoryError),
    ],
)
def test_what_runs_out_of_memory_is_done_again_in_smaller_parts(memory_for, size, error):
    """An update, and the scores before one."""
    run = prepare(config_with(f"training.{size}", "training.entropy_coef=0.1"), "countdown")
    groups = rollout(run)
    whole, measured = backward(run, groups)
    scored = run.engine.score(groups)
    for compute in (backward, lambda run, groups: run.engine.score(groups)):
        run.engine.limit = prepare_limit(run)
        tried = memory_for(60, error)
        found = compute(run, groups)
        assert tried[0] > 60 and max(tried[-2:]) <= 60, "it was too much at first and then fitted"
        if compute is backward:
            for one, parts in zip(whole, found[0], strict=True):
                torch.testing.assert_close(one, parts, atol=2e-6, rtol=1e-4)
            assert found[1] == {name: pytest.approx(value, rel=1e-3, abs=1e-6) for name, value in measured.items()}
        else:
            for before, after in zip(scored, found, strict=True):
                for a, b in zip(before.episodes, after.episodes, strict=True):
                    assert a.old_logprobs == pytest.approx(b.old_logprobs, abs=1e-5)


@pytest.mark.parametrize("gib, tokens", [(0.01, 256), (0.1, 1024), (0.2, 2048), (1000, 8192)])
def test_a_pass_is_as_large_as_its_plan_leaves_room_for_in_the_memory_of_the_machine(gib, tokens, monkeypatch):
    monkeypatch.setattr(plan, "memory_of", lambda device: gib * 2**30)
    run = prepare(config_with("training.batch_size=4096", "training.max_gen_len=512"), "countdown")
    engine = run.engine
    assert engine.limit == Limit(1, tokens, CHUNK_ELEMENTS["cpu"])
    if 256 < tokens < 8192:
        needs = [of_update(memory_plan(run.config, engine.model, engine.anchor, n)) for n in (tokens, 2 * tokens)]
        assert needs[0] <= gib * 2**29 < needs[1]
    assert f"with {tokens:,} tokens a pass" in engine.facts()["memory"]


def test_a_number_goes_before_completions_and_these_before_what_fits():
    for keys, expected in (
        (["max_tokens_per_microbatch=300", "micro_batch_size=3"], (3, 300)),
        (["micro_batch_size=3"], (3, None)),
        (["max_tokens_per_microbatch=null"], (1, 8192)),
    ):
        limit = prepare(config_with(*[f"training.{key}" for key in keys]), "countdown").engine.limit
        assert (limit.completions, limit.tokens) == expected
    with pytest.raises(ConfigError, match="must be a whole number or auto, not 'large'"):
        config_with("training.max_tokens_per_microbatch=large")
    with pytest.raises(ConfigError, match="must be at least 1, not 0"):
        config_with("training.max_tokens_per_microbatch=0")
    for other in ("model.dtype", "training.loss_agg"):
        with pytest.raises(ConfigError, match=f"{other}: 'auto' is not known"):
            config_with(f"{other}=auto")
    with pytest.raises(ConfigError, match="micro_batch_size must be a whole number, not 'auto'"):
        config_with("training.micro_batch_size=auto")


def test_the_memory_of_a_machine_is_that_of_its_control_group(tmp_path):
    whole = memory_of(torch.device("cpu"), tmp_path)  # no control group
    assert 2**30 < whole == memory_of(torch.device("cpu"), tmp_path / "none")
    for text, expected in (("max\n", whole), ("1073741824\n", 2**30), (f"{2**60}\n", whole)):
        (tmp_path / "memory.max").write_text(text)
        assert memory_of(torch.device("cpu"), tmp_path) == expected


def prepare_limit(run):
    """The passes that the config allows, as before anything has run out of memory."""
    return limit_of(run.config, run.engine.model, run.engine.anchor)


def test_the_longest_pass_is_tried_before_the_first_step_and_cut_smaller_if_it_does_not_fit(memory_for, tmp_path):
    config = config_with("training.max_tokens_per_microbatch=400", "training.max_prompt_len=60", "training.max_steps=1")
    tried = memory_for(250)
    run_training(config, "countdown", tmp_path)
    # 4 completions of 24 tokens after a prompt of 60, twice: the budget is 400, but two passes hold all four groups
    assert tried[0] == 2 * (60 + 4 * 24) and tried[1] <= tried[0] // 2
    assert max(tried[1:]) <= 250
    log = (run_folder(tmp_path) / "training.log").read_text(encoding="utf-8")
    order = [
        "trying the longest micro-batch: 312",
        "done again with",
        "the update needs about",
        "evaluating 4 problems",
    ]
    places = [log.index(part) for part in order]
    assert places == sorted(places)


def test_the_trial_before_the_first_step_leaves_no_trace_and_the_largest_groups_come_first(memory_for):
    settings = ["training.loss_type=listwise_kl", "training.entropy_coef=0.1", "training.max_tokens_per_microbatch=1"]
    run = prepare(config_with(*settings), "countdown")
    model, training = run.engine.model, run.config.training
    before = {name: value.clone() for name, value in model.state_dict().items()}
    random, tried = torch.get_rng_state(), memory_for(10**9)
    longest = apart(run.engine.longest_groups() * 2)
    tokens = pack(longest, "cpu", torch.float32).input_ids.numel()
    assert tokens == sum(group.tokens() for group in longest), "prompts that begin alike would be fewer"
    run.rehearse(partial(objective, training), **wanted(training, anchor=True))
    assert tried == [training.max_prompt_len + 4 * 24], "listwise_kl needs a group whole"
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(random, torch.get_rng_state()) and not run.engine.optimizer.state
    groups = sorted(rollout(run), key=lambda group: group.tokens())  # the wrong way round
    sizes = [group.tokens() for group in groups]
    assert sizes[0] < sizes[-1]
    tried.clear()
    backward(run, groups)
    assert tried == sorted(sizes, reverse=True)


def scored_config(folder: Path, rows, *overrides: str):
    (folder / "scored.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return config_with(f"data.path={folder / 'scored.jsonl'}", "training.old_logprobs=trainer", *overrides)


def test_a_file_of_scores_is_tried_with_its_longest_groups(memory_for, tmp_path):
    answers = [[{"text": "1" * n, "score": 1}, {"text": "2", "score": 0}] for n in range(1, 17)]
    rows = [{"prompt": f"{n}", "nums": [n, 2], "target": n, "completions": answers[n - 1]} for n in range(1, 17)]
    run = prepare(scored_config(tmp_path, rows, "training.max_tokens_per_microbatch=5000"), "scored")
    everything = given_groups(run.train_problems, run.engine.tokenizer, run.engine.eos_ids, run.config.training)
    sizes = sorted((group.tokens() for group in everything), reverse=True)
    tried = memory_for(10**9)
    run.rehearse(partial(objective, run.config.training), **wanted(run.config.training, anchor=True))
    assert tried == [sum(sizes[:4])] and sizes[0] > sizes[-1]


def test_an_evaluation_that_runs_out_of_memory_is_done_again_in_smaller_parts(memory_for, tmp_path):
    """--eval_only on a file of scores: a run without an optimizer scores the completions too."""
    completions = [{"text": "7 + 8 - " * count + "1", "score": count} for count in (1, 2, 3)]
    rows = [{"prompt": f"{n}", "nums": [n, 2], "target": n, "completions": completions} for n in range(1, 31)]
    run = prepare(scored_config(tmp_path, rows), "scored", for_training=False)
    whole = train_grpo.evaluate(run, 1)
    tried = memory_for(60)
    assert train_grpo.evaluate(run, 1) == pytest.approx(whole, rel=1e-4, abs=1e-6)
    assert tried[0] > 60 and tried[-1] <= 60, "it was too much at first and then fitted"


def test_memory_that_does_not_suffice_for_one_completion_and_errors_of_another_kind(memory_for):
    run = prepare(config_with(), "countdown")
    groups = rollout(run)
    for reason in ("shapes do not match", "CUDA error: an illegal memory access was encountered"):
        memory_for(0, RuntimeError, reason)
        with pytest.raises(RuntimeError, match=reason):
            backward(run, groups)
    tried = memory_for(0)
    with pytest.raises(ConfigError, match=r"a single completion .CUDA out of memory.*lower training.max_gen_len"):
        backward(run, groups)
    assert len(tried) <= 7, "halved each time"


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, MemoryError])
def test_a_rollout_that_runs_out_of_memory_is_done_again_with_fewer_slots_and_then_stays_there(
    error, monkeypatch, caplog
):
    run = prepare(config_with(), "countdown")
    problems = run.train_problems[:4]
    whole = run.engine.sample(problems, 4, stream=1)
    real, tried = engine_module.rollout, []

    def rollout_in(*arguments, room, kept):
        tried.append(room)
        if room[0] > 4:
            raise error("CUDA out of memory. Tried to allocate 20.00 MiB")
        return real(*arguments, room=room, kept=kept)

    monkeypatch.setattr(engine_module, "rollout", rollout_in)
    run.engine.drawn.clear()
    found = run.engine.sample(problems, 4, stream=1)
    assert [room[0] for room in tried] == [16, 8, 4] and "with 4 completions at once" in caplog.text
    for one, other in zip(whole, found, strict=True):
        assert [e.token_ids for e in one.episodes] == [e.token_ids for e in other.episodes]
    run.engine.sample(problems, 4, stream=2)
    assert [room[0] for room in tried[3:]] == [4], "what did not fit once is not tried again"
    monkeypatch.setattr(engine_module, "rollout", lambda *_, room, kept: (_ for _ in ()).throw(error("out of memory")))
    with pytest.raises(ConfigError, match=r"to decode a single completion .*lower training.max_gen_len"):
        run.engine.sample(problems, 4, stream=3)
    monkeypatch.setattr(engine_module, "rollout", lambda *_, room, kept: (_ for _ in ()).throw(RuntimeError("shapes")))
    with pytest.raises(RuntimeError, match="shapes"):
        run.engine.sample(problems, 4, stream=4)


def test_where_a_single_completion_is_too_much_fewer_logits_at_a_time_can_do(monkeypatch, caplog):
    run = prepare(config_with(), "countdown")
    groups = rollout(run)
    whole, _ = backward(run, groups)
    real, tried = engine_module.score, []

    def score(*arguments, elements, **want):
        tried.append(elements)
        if elements > FEWEST_LOGITS:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(*arguments, elements=elements, **want)

    monkeypatch.setattr(engine_module, "score", score)
    run.engine.limit = Limit(1, None, CHUNK_ELEMENTS["cpu"])
    found, _ = backward(run, groups)
    assert (
        list(dict.fromkeys(tried)) == [2**26, 2**25, 2**24, 2**23, 2**22]
        and f"{2**22:,} logits at a time" in caplog.text
    )
    for one, other in zip(whole, found, strict=True):
        torch.testing.assert_close(one, other, atol=2e-6, rtol=1e-4)


def test_a_run_that_goes_on_takes_no_larger_passes_than_fitted_before(tmp_path):
    run = prepare(config_with(), "countdown")
    run.engine.limit = Limit(3, 100, 2**23)
    run.engine.begin(1)
    run.engine.state().write(tmp_path / "saved")
    again = prepare(config_with("training.max_tokens_per_microbatch=50", "training.micro_batch_size=8"), "countdown")
    again.engine.load(tmp_path / "saved")
    assert again.engine.limit == Limit(3, 50, 2**23)


def test_a_run_in_which_memory_has_sufficed_takes_the_passes_that_the_config_now_allows(tmp_path):
    run = prepare(config_with("training.micro_batch_size=2"), "countdown")
    run.engine.begin(1)
    run.engine.state().write(tmp_path / "saved")
    again = prepare(config_with("training.micro_batch_size=16"), "countdown")
    again.engine.load(tmp_path / "saved")
    assert again.engine.limit == again.engine.configured and again.engine.limit.completions == 16


def test_the_folder_of_a_mixture_of_many_families_has_a_name_that_a_file_system_takes(tmp_path):
    config = config_with()
    names = [
        run_folder_of(config, "rg:" + "+".join(f"family{n}" for n in range(count)), tmp_path) for count in (40, 41)
    ]
    assert len({name.name for name in names}) == 2
    for name in names:
        name.mkdir(parents=True)
    assert run_folder_of(config, "rg:chain_sum", tmp_path).name.endswith("_rg_chain_sum")


# --- gradients and errors ---------------------------------------------------------------------------------------------


def poison(monkeypatch, steps: set[int]) -> None:
    """The loss of these steps is not a number."""
    real, real_step, step_now = train_grpo.objective, train_grpo.train_step, []

    def remembering(run, step):
        step_now[:] = [step]
        return real_step(run, step)

    def poisoned(*arguments):
        loss, *rest = real(*arguments)
        return (loss * float("nan") if steps & set(step_now) else loss, *rest)

    monkeypatch.setattr(train_grpo, "train_step", remembering)
    monkeypatch.setattr(train_grpo, "objective", poisoned)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, MemoryError])
def test_when_memory_runs_out_in_the_update_what_is_kept_of_the_rollout_goes_first(error):
    model, limit, kept, tried = torch.nn.Linear(2, 2), Limit(4, None, 2**24), Kept(), []
    model.device, kept.decoder, kept.may_stay = torch.device("cpu"), object(), True

    def compute():
        tried.append((limit.completions, limit.head, kept.decoder is None))
        if len(tried) < 3:
            raise error("CUDA out of memory. Tried to allocate 20.00 MiB")
        return "done"

    groups = [Group(Problem(0, (1,), "", {}), (Episode((1,), (0.0,), True, ""),) * 4)]
    assert in_parts_that_fit(model, limit, kept, groups, False, compute) == "done"
    assert tried == [(4, 2**24, False), (4, 2**24, True), (2, 2**23, True)] and not kept.may_stay


def test_bad_steps_are_skipped_counted_and_kept_and_in_a_row_stop_the_run_with_a_good_checkpoint(tmp_path, monkeypatch):
    poison(monkeypatch, {2, 3, 4, 5})
    monkeypatch.setattr(run_module, "MAX_BAD_STEPS", 3)
    config = config_with("training.max_steps=6", "training.minibatches=1")
    with pytest.raises(RunError, match=r"3 steps in a row had no finite gradient.*saved as step 4.*learning_rate"):
        run_training(config, "countdown", tmp_path)
    monkeypatch.undo()
    folder = run_folder(tmp_path)
    assert saved_in(tmp_path) == "step_000004"
    kept = sorted((folder / "bad_steps").iterdir())
    assert [path.name for path in kept] == [f"step_00000{step}.jsonl" for step in (2, 3, 4)]
    episodes = [json.loads(line) for line in kept[0].read_text().splitlines()]
    assert len(episodes) == 16 and all(e["text"] is not None for e in episodes)
    assert all(len(e["token_ids"]) == len(e["logprobs"]) for e in episodes)
    run_training(config, "countdown", tmp_path)  # and goes on from it
    rows = metrics_of(folder)
    assert [row["step"] for row in rows] == list(range(7))
    assert [row.get("train/skipped_updates") for row in rows] == [None, 0, 1, 1, 1, 0, 0]
    assert all(tensor.isfinite().all() for tensor in weights_of(tmp_path).values())


def test_an_error_in_a_rollout_keeps_the_steps_before_it_and_its_advice_can_be_followed(tmp_path):
    file = tmp_path / "rewards.py"
    file.write_text(
        "calls = 0\n\n\ndef moody(completions, **columns):\n    global calls\n    calls += 1\n"
        "    if calls == 6:\n        raise ValueError('no mood')\n    return [0.0] * len(completions)\n"
    )
    overrides = ["training.ckpt_save_interval=0", "training.max_steps=4", f"data.reward_functions={file}:moody"]
    with pytest.raises(ConfigError, match=r"moody.*no mood.*on_reward_error: zero"):
        run_training(config_with(*overrides, "data.on_reward_error=stop"), "countdown", tmp_path)
    assert saved_in(tmp_path) == "step_000002", "one call in prepare, two in the first evaluation, two steps"
    run_training(config_with(*overrides, "data.on_reward_error=zero"), "countdown", tmp_path)
    assert [row["step"] for row in metrics_of(run_folder(tmp_path))] == list(range(5))


def test_a_second_evaluation_keeps_the_report_of_the_first(tmp_path):
    for _ in range(2):
        run_evaluation(config_with(), "countdown", tmp_path)
    reports = sorted(path.parent.name for path in tmp_path.glob("runs/*/report.json"))
    assert len(reports) == 2 and reports[1] == reports[0] + ".1"


def test_an_adapter_given_as_a_model_is_one_sentence(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"is a LoRA adapter; set lora.path to it"):
        prepare(config_with(f"model.pretrained_model_path={tmp_path}"), "countdown")


def test_a_model_of_the_hub_is_loaded_into_models_once_and_half_a_download_is_none(tmp_path, monkeypatch):
    calls = []

    def snapshot_download(path, local_dir, **options):
        calls.append(path)
        shutil.copytree(CONFIG.parent.parent.parent / "models" / "countdown-tiny", local_dir, dirs_exist_ok=True)
        if len(calls) == 1:
            raise ConnectionError("gone")

    monkeypatch.setattr(models, "PROJECT_FOLDER", tmp_path)
    monkeypatch.setattr(models, "snapshot_download", snapshot_download)
    monkeypatch.setattr(models.HfApi, "model_info", lambda self, path, timeout: None)
    config = config_with("model.pretrained_model_path=some/model")
    with pytest.raises(ConfigError, match="some/model cannot be loaded; check the name and the network"):
        prepare(config, "countdown")
    for _ in range(2):
        assert prepare(config, "countdown").train_problems
    assert calls == ["some/model"] * 2 and (tmp_path / "models" / "some" / "model" / "config.json").is_file()


# --- a run that is stopped --------------------------------------------------------------------------------------------

WHOLE = ["training.max_steps=4", "training.eval_interval=2", "training.minibatches=1",
         "training.max_tokens_per_microbatch=150"]  # fmt: skip


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A run that nobody disturbs."""
    folder = tmp_path_factory.mktemp("whole")
    run_training(config_with(*WHOLE, "training.ckpt_save_interval=1"), "countdown", folder)
    return folder


def record_calls(monkeypatch) -> list[tuple[str, int]]:
    """("step", its number) and ("evaluation", steps done) in the order in which they begin."""
    calls, real_step, real_evaluate = [], train_grpo.train_step, train_grpo.evaluate

    def train_step(run, step):
        calls.append(("step", step))
        return real_step(run, step)

    def evaluate(run, samples):
        calls.append(("evaluation", run.done))
        return real_evaluate(run, samples)

    monkeypatch.setattr(train_grpo, "train_step", train_step)
    monkeypatch.setattr(train_grpo, "evaluate", evaluate)
    return calls


@pytest.mark.parametrize(
    ("inside", "place", "number", "saved", "goes_on"),
    [
        (("step", 3), "sample", signal.SIGINT, "step_000002", ("step", 3)),
        (("step", 3), "forward_backward", signal.SIGTERM, "step_000002", ("step", 3)),
        (("evaluation", 0), "sample", signal.SIGTERM, None, ("evaluation", 0)),
        (("evaluation", 2), "sample", signal.SIGINT, "step_000002", ("evaluation", 2)),
        (("evaluation", 4), "sample", signal.SIGTERM, "step_000004", ("evaluation", 4)),
    ],
)
def test_a_signal_keeps_the_finished_steps_and_nothing_differs_afterwards(
    tmp_path, monkeypatch, whole, inside, place, number, saved, goes_on
):
    """In the middle of a rollout, of an update and of each evaluation; the one that was left is done first then."""
    interval = 1 if inside[0] == "evaluation" else 0  # in a step it is the stop alone that saves
    config = config_with(*WHOLE, f"training.ckpt_save_interval={interval}")
    calls, checks, real = record_calls(monkeypatch), [], StopSignal.check

    def check(self):
        if calls and calls[-1] == inside and place in {frame.name for frame in traceback.extract_stack()}:
            checks.append(1)
            if len(checks) == 2:
                signal.raise_signal(number)
        return real(self)

    monkeypatch.setattr(StopSignal, "check", check)
    with pytest.raises(Stopped) as stop:
        run_training(config, "countdown", tmp_path)
    assert stop.value.code == 128 + number and saved_in(tmp_path) == saved
    monkeypatch.undo()
    torch.manual_seed(number)  # whatever ran before in this process
    calls = record_calls(monkeypatch)
    run_training(config, "countdown", tmp_path)
    assert calls[0] == goes_on
    found = set(differences(run_folder(whole), run_folder(tmp_path)))
    if interval == 0:  # another number of checkpoints, which the config says
        found = {difference for difference in found if not difference.startswith(("config.yaml", "checkpoints"))}
    assert found == set()


def test_another_seed_gives_other_weights(tmp_path, whole):
    """The same seed gives the same ones, as the test above has shown."""
    run_training(config_with(*WHOLE, "training.random_seed=5"), "countdown", tmp_path)
    first, other = weights_of(whole), weights_of(tmp_path)
    assert not all(torch.equal(first[name], other[name]) for name in first)


def test_a_complete_run_is_pushed_when_the_hub_is_asked_for_afterwards(whole, monkeypatch):
    pushed = []
    monkeypatch.setattr(run_module, "push_final", lambda folder, *rest: pushed.append(folder.name) or "there")
    monkeypatch.setattr("src.prepare.check_hub", lambda hub: None)
    run_training(config_with(*WHOLE, "hub.push_to_hub=true", "hub.hub_model_id=a/b"), "countdown", whole)
    assert pushed == ["final"]


# --- one process at a time, and how it is stopped ---------------------------------------------------------------------


def child(action) -> tuple[int, int]:
    """A forked process that does `action(ready)`, ready now, and the pipe it said so on. Exit code 99: an error."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            action(lambda text=b"ready": os.write(writer, text))
        except SystemExit as error:
            os._exit(error.code)
        finally:
            os._exit(99)
    os.close(writer)
    assert select.select([reader], [], [], 10)[0], "the child did not get ready"
    assert os.read(reader, 5) == b"ready"
    return pid, reader


def end_of(pid: int, seconds: float = 20) -> int | None:
    """Exit code of a child, minus the signal that killed it; None, and it is killed, if it still runs then."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return None


def test_a_second_process_is_refused_until_the_first_is_dead(tmp_path):
    folder = tmp_path / "runs" / "x"

    def hold(ready):
        with RunLock(folder):
            ready()
            signal.pause()

    pid, _ = child(hold)
    with pytest.raises(ConfigError) as refusal, RunLock(folder):
        pytest.fail("two at once")
    assert str(refusal.value) == (
        f"another process (pid {pid}) is using {folder}; wait for it, or name another run by --name"
    )
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    with RunLock(folder):
        assert [path.name for path in folder.iterdir()] == [".lock"]
        with pytest.raises(ConfigError, match=rf"\(pid {os.getpid()}\)"), RunLock(folder):
            pytest.fail("not even the same process")
        set_aside(folder)
        with RunLock(folder):  # a run that is set aside leaves its name to a new one
            assert sorted(path.name for path in folder.parent.iterdir()) == ["x", "x.1"]


def test_a_lock_in_a_folder_that_is_moved_meanwhile_is_none(tmp_path, monkeypatch):
    folder, calls, flock = tmp_path / "x", [], fcntl.flock

    def slow(file, how):
        calls.append(how)
        if len(calls) == 1:
            set_aside(folder)
        return flock(file, how)

    monkeypatch.setattr(fcntl, "flock", slow)
    with RunLock(folder), pytest.raises(ConfigError), RunLock(folder):
        pytest.fail("the new folder was not locked")
    assert len(calls) == 3


def test_where_there_are_no_locks_or_no_folder_can_be_made_it_is_said(tmp_path, monkeypatch, capsys):
    configure_logging()
    (tmp_path / "runs").write_text("a file")
    with (
        pytest.raises(StorageError, match=r"runs/x could not be written \(Not a directory\); nothing has"),
        RunLock(tmp_path / "runs" / "x"),
    ):
        pass

    def refuse(*_):
        raise OSError(errno.ENOLCK, "")

    monkeypatch.setattr("fcntl.flock", refuse)
    with RunLock(tmp_path):
        pass
    assert capsys.readouterr().out.count("file system without locks (No locks available)") == 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_is_noted_and_leaves_a_step_where_asked(number):
    before = signal.getsignal(number)
    with StopSignal() as stop:
        stop.check()
        os.kill(os.getpid(), number)
        assert stop.number == number
        with pytest.raises(Stopped) as stopped:
            stop.check()
        assert stopped.value.code == 128 + number
        assert not isinstance(stopped.value, Exception), "`except Exception` must not swallow it"
    assert signal.getsignal(number) == before and signal.set_wakeup_fd(-1) == -1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_second_signal_ends_the_process_even_in_a_long_call(number):
    def work(ready):
        StopSignal.ONE = 0.01  # in this child only: a busy machine may hold up the first signal
        stop = StopSignal()
        ready()
        hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)  # minutes without a return to the interpreter
        stop.check()

    pid, _ = child(work)
    os.kill(pid, number)
    time.sleep(0.4)
    assert os.waitpid(pid, os.WNOHANG) == (0, 0), "one signal lets it finish"
    os.kill(pid, number)
    assert end_of(pid) == 128 + number


def test_a_signal_that_comes_twice_at_once_is_one():
    """`timeout` sends it to the process and to its group."""

    def work(ready):
        StopSignal.ONE = 30  # in this child only: a busy machine may hold up the second signal
        stop = StopSignal()
        ready()
        while not stop.number:
            time.sleep(0.01)
        time.sleep(0.2)
        raise SystemExit(7)

    pid, _ = child(work)
    os.kill(pid, signal.SIGTERM)
    os.kill(pid, signal.SIGTERM)
    assert end_of(pid) == 7


def test_signals_of_a_forked_child_are_its_own():
    """A pool of a reward function: terminating its workers must end them, and must not stop the training."""

    def work(ready):
        stop = StopSignal()
        for _ in range(3):
            pid, _ = child(lambda ready: (ready(), signal.pause()))
            os.kill(pid, signal.SIGTERM)
            if end_of(pid) != -signal.SIGTERM:
                raise SystemExit(1)
            time.sleep(StopSignal.ONE * 1.5)
        ready()
        raise SystemExit(stop.number)

    pid, _ = child(work)
    assert end_of(pid) == 0
