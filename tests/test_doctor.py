"""The doctor: every fault on rows written by hand, just beyond its threshold and just below, and on real runs."""

import json
import math

import pytest
from test_main import PROBE, run_main

import src.run.doctor as doctor
from benchmarks import doctor as benchmark
from src.config import ConfigError
from src.run.doctor import diagnosis, examine_folder, log_diagnosis
from src.run.faults import DETECTORS

STEPS = 20


def wave(step: int) -> float:
    """Noise that is the same every time: differences of neighbours of 0.02, and no trend."""
    return 0.01 * (-1) ** step


HEALTHY = {  # metric -> its value at a step
    "train/reward": lambda step: 0.3 + 0.02 * step + wave(step),
    "reward/answer": lambda step: 0.2 + 0.02 * step + wave(step),
    "reward/format": lambda step: 1.0,
    "train/groups_without_variance": lambda step: 0.4,
    "train/entropy": lambda step: 0.5 - 0.01 * step,
    "train/kl_k1": lambda step: 0.01 * step,
    "train/kl_k3": lambda step: 0.01 * step,
    "train/clip_fraction": lambda step: 0.01,
    "train/grad_norm": lambda step: 0.5,
    "train/skipped_updates": lambda step: 0,
    "train/weights_moved": lambda step: 0.9,
    "rollout/mismatch": lambda step: 0.004,
    "rollout/finished": lambda step: 0.9,
    "rollout/length": lambda step: 20.0,
    "time/rollout": lambda step: 1.0,
    "time/update": lambda step: 1.0,
}
ACCURACY = (0.2, 0.05), (0.6, 0.05)  # of the evaluations before and after, with the halves of their intervals
STUCK = (0.2, 0.05), (0.26, 0.05)  # a difference of 0.06 with an interval of 0.05 x sqrt(2) = 0.0707


def flat(value: float, noise: float = 1.0):
    return lambda step: value + noise * wave(step)


def write(folder, changes=None, accuracy=ACCURACY, steps=STEPS, tail=""):
    """A run folder whose curves are healthy but for the changes; a change to None is a metric that is not there."""
    curves = {tag: curve for tag, curve in (HEALTHY | (changes or {})).items() if curve is not None}
    lines = [{"step": step} | {tag: curve(step) for tag, curve in curves.items()} for step in range(1, steps + 1)]
    for step, (value, width) in zip((0, steps), accuracy, strict=True):
        lines.append({"step": step, "eval/pass@1": value, "eval/pass@1_ci95": width, "time/evaluate": 9.0})
    folder.mkdir(exist_ok=True)
    (folder / "config.yaml").write_text("training: {max_gen_len: 40, learning_rate: 2.0e-4}")
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + tail)
    return folder


def found(folder) -> dict[str, str]:
    return examine_folder(folder).faults


# fault: what makes it, what is just not it, what its evidence says
BY_HAND = {
    "updates skipped": (
        {"train/skipped_updates": lambda step: step in (3, 9)},
        {"train/skipped_updates": lambda step: step == 3},
        ("2 of 20 steps", "first is step 3", "learning_rate"),
    ),
    "completions cut off": (
        {"rollout/finished": lambda step: 0.49},
        {"rollout/finished": lambda step: 0.51},
        ("51% of the completions of the first steps", "max_gen_len (40 tokens)"),
    ),
    "sampler mismatch": (
        {"rollout/mismatch": lambda step: 0.06},
        {"rollout/mismatch": lambda step: 0.04},
        ("0.060 nats a token on average", "model.dtype: float32"),
    ),
    "no reward": (
        {"reward/answer": lambda step: 0.0},
        {"reward/answer": lambda step: 0.001 * (step == 20)},
        ("not one right answer in 20 steps", "data.prompt_format"),
    ),
    "all answers right": (
        {"train/groups_without_variance": lambda step: 0.81, "reward/answer": flat(0.9)},
        {"train/groups_without_variance": lambda step: 0.79, "reward/answer": flat(0.9)},
        ("in 81% of the groups", "90% of the answers are right", "harder problems"),
    ),
    "all answers wrong": (
        {"train/groups_without_variance": lambda step: 0.81, "reward/answer": flat(0.1)},
        {"train/groups_without_variance": lambda step: 0.5 if step < 4 else 1.0, "reward/answer": flat(0.1)},
        ("in 81% of the groups", "10% of the answers are right", "easier problems"),
    ),
    "all rewards equal": (
        {"train/groups_without_variance": lambda step: 1.0, "reward/answer": None},
        {"train/groups_without_variance": lambda step: 0.5, "reward/answer": None},
        ("in 100% of the groups", "training.temperature"),
    ),
    "no gradient": (
        {"train/grad_norm": lambda step: 0.5 * (step > 11)},
        {"train/grad_norm": lambda step: 0.5 * (step > 10)},
        ("zero in 11 of 20 steps", "training.epsilon"),
    ),
    "weights do not move": (
        {"train/weights_moved": lambda step: 0.00009},
        {"train/weights_moved": lambda step: 0.0021 * (step == 7)},  # 0.000105 on average
        ("9.0e-05 of the weights", "a learning rate of 0.0002"),
    ),
    "length drifting": (
        {"rollout/length": lambda step: 20.0 if step < 4 else 31.0},
        {"rollout/length": lambda step: 20.0 if step < 4 else 29.0},
        ("20.0 tokens long at first and are 31.0 at last (limit 40)", "20.0% ± 5.0% at step 0"),
    ),
    "reward hacking": (
        {"train/reward": HEALTHY["train/reward"], "reward/long": lambda step: 0.02 * step},
        {"train/reward": lambda step: 0.3 + 0.002 * step + 3 * wave(step)},  # 0.03 by 0.03 of noise a step
        ("from 0.337 to 0.662 (reward/long too)", "26.0% ± 5.0% at step 20", "data.reward_weights"),
    ),
    "clip fraction high": (
        {"train/clip_fraction": lambda step: 0.22 if step == 5 else 0.1},
        {"train/clip_fraction": lambda step: 0.09},
        ("11% of the tokens on average, 22% at step 5", "inner_epochs"),
    ),
    "entropy collapsed": (
        {"train/entropy": lambda step: 0.5 if step < 4 else 0.09},
        {"train/entropy": lambda step: 0.5 if step < 4 else 0.11},
        ("0.500 nats a token in the first steps and is 0.0900", "entropy_coef"),
    ),
    "entropy exploded": (
        {"train/entropy": lambda step: 0.1 if step < 8 else 0.31},
        {"train/entropy": lambda step: 0.01 if step < 8 else 0.2},  # 20 times, but still nearly sure
        ("above 0.30 since step 8", "learning_rate"),
    ),
    "KL running away": (
        {"train/kl_k1": lambda step: 1.1 if step > 16 else 0.1},
        {"train/kl_k1": lambda step: 0.9, "train/kl_k3": lambda step: 40.0},  # k3 jumps
        ("1.10 nats a token", "beyond 1 by step 17", "training.beta"),
    ),
    "endings lost": (
        {"rollout/finished": lambda step: 0.9 if step < 10 else 0.4},
        {"rollout/finished": lambda step: 0.9 if step < 10 else 0.6},
        ("90% of the completions ended by themselves at first and 40% at last",),
    ),
    "evaluation takes the time": (
        {"time/evaluate": lambda step: 2.2 * (step < 20)},  # 19 x 2.2 = 41.8 s against 40 s
        {"time/evaluate": lambda step: 2.0 * (step < 20)},
        ("took 42 s, 51% of the time", "sampling and updates took 40 s", "eval_interval"),
    ),
}
NO_GAIN = ("length drifting", "reward hacking")  # which are faults only where accuracy does not rise


def test_every_fault_is_tested_by_hand_and_advises_keys_that_exist():
    from test_house import KEYS

    assert [one.fault for one in DETECTORS] == list(BY_HAND)
    names = {f"{section}.{name}" for section, name in KEYS}
    for one in DETECTORS:
        given = {
            word.strip(".,:;()") for word in one.advice.split() if word.startswith(("training.", "data.", "model."))
        }
        assert given - {"training.log"} <= names, one.fault


@pytest.mark.parametrize("fault", BY_HAND)
def test_a_fault_is_found_and_what_is_nearly_one_is_not(tmp_path, fault):
    faulty, nearly, evidence = BY_HAND[fault]
    stuck = {"reward/answer": flat(0.2)} if fault in NO_GAIN else {}
    accuracy = STUCK if fault in NO_GAIN else ACCURACY
    told = found(write(tmp_path, stuck | faulty, accuracy))
    assert fault in told and all(words in told[fault] for words in evidence), told
    assert fault == next(iter(told)) or fault == "all rewards equal"
    assert fault not in found(write(tmp_path, stuck | nearly, accuracy))


@pytest.mark.parametrize("fault", NO_GAIN)
def test_with_a_gain_in_accuracy_it_is_none(tmp_path, fault):
    """Held-out accuracy alone is enough, and so is that of training."""
    faulty, _, _ = BY_HAND[fault]
    assert fault not in found(write(tmp_path, faulty | {"reward/answer": flat(0.2)}, ACCURACY))
    assert fault not in found(write(tmp_path, faulty, STUCK))


def test_a_cause_is_named_before_its_effects(tmp_path):
    """A limit on the length that no answer fits in: no reward, no variance, no gradient, weights that stay."""
    zero = dict.fromkeys(
        ("rollout/finished", "train/reward", "reward/answer", "train/grad_norm", "train/weights_moved"),
        lambda step: 0.0,
    )
    told = found(write(tmp_path, zero | {"train/groups_without_variance": lambda step: 1.0}, ((0.0, 0.0), (0.0, 0.0))))
    assert list(told) == ["completions cut off", "no reward", "all answers wrong"]


def test_plain_numbers_below_1_that_rise_are_a_reward(tmp_path):
    """No answer ever counts as right, but there is something to learn, and it is learnt."""
    changes = {"reward/answer": lambda step: 0.0, "reward/format": None}
    assert "no reward" not in found(write(tmp_path, changes))
    assert "no reward" in found(write(tmp_path, changes | {"train/reward": flat(0.3)}))


def test_kl_is_that_of_k3_where_there_is_no_k1_and_a_single_jump_is_none(tmp_path):
    jump = {"train/kl_k1": None, "train/kl_k3": lambda step: 40.0 if step == 20 else 0.1}
    assert found(write(tmp_path, jump)) == {}
    told = found(write(tmp_path, jump | {"train/kl_k3": lambda step: 2.0}))
    assert "2.00 nats a token from its anchor (train/kl_k3)" in told["KL running away"]


# --- what a run's folder can be like ----------------------------------------------------------------------------------


def test_a_healthy_run_is_one_line(tmp_path):
    assert diagnosis(write(tmp_path)) == ["nothing wrong was found in 20 steps"]


@pytest.mark.parametrize("steps", [0, 3, 9])
def test_too_few_steps_are_one_line(tmp_path, steps):
    changes = {"reward/answer": lambda step: 0.0}
    folder = write(tmp_path, changes, steps=steps)
    assert diagnosis(folder) == [f"{steps} steps are too few to judge a run by; 10 are enough for a first look"]
    (folder / "metrics.jsonl").write_text("")
    assert diagnosis(folder)[0].startswith("0 steps are too few")


def test_a_run_that_ended_for_want_of_a_gradient_says_so_however_short_it_was(tmp_path):
    bad = {"train/skipped_updates": lambda step: 4, "train/grad_norm": lambda step: math.nan}
    skipped, few = diagnosis(write(tmp_path, bad, steps=5))
    assert skipped.startswith("updates skipped: 5 of 5 steps") and few.startswith("5 steps are too few")


def test_an_offline_or_old_run_is_judged_by_what_it_has(tmp_path):
    kept = {"train/reward", "train/entropy", "rollout/length", "train/grad_norm", "train/skipped_updates"}
    lines = diagnosis(write(tmp_path, dict.fromkeys(HEALTHY.keys() - kept)))
    assert lines[0] == "nothing wrong was found in 20 steps"
    start = "not judged, as their metrics are not there: completions cut off, sampler mismatch, no reward, "
    assert lines[1].startswith(start) and len(lines) == 2
    (tmp_path / "config.yaml").unlink()
    assert diagnosis(tmp_path) == lines


@pytest.mark.filterwarnings("error")
def test_broken_lines_and_values_that_are_none_hide_nothing(tmp_path):
    tail = '{"step": 21, "train/rew\n\x00\n[1]\nnull\n{"step": null}\n{"step": Infinity}\n{"reward": 1}\n'
    tail += json.dumps({"step": "20", "train/entropy": "high", "reward/answer": None, "train/kl_k1": math.nan}) + "\n"
    assert diagnosis(write(tmp_path, tail=tail)) == ["nothing wrong was found in 20 steps"]
    told = found(write(tmp_path, {"train/kl_k1": lambda step: math.nan if step % 2 else 3.0}, tail=tail))
    assert list(told) == ["KL running away"]
    for tag in HEALTHY:  # and whatever is missing, everywhere or but once
        for curve in (None, lambda step: math.nan, lambda step: 0.5 if step == 3 else math.nan, lambda step: 0.0):
            diagnosis(write(tmp_path, {tag: curve}))


def test_a_wrong_folder_is_one_line_that_says_what_to_do(tmp_path):
    with pytest.raises(ConfigError, match=r"--doctor .*none: there is no such folder; give that of a run, such as ru"):
        diagnosis(tmp_path / "none")
    with pytest.raises(ConfigError, match=r"there is no metrics.jsonl in it; give that of a run"):
        diagnosis(tmp_path)
    write(tmp_path / "kl_countdown")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(doctor, "read_rows", lambda path: open("/proc/none"))  # noqa: SIM115
        with pytest.raises(ConfigError, match=r"metrics.jsonl cannot be read \(No such file"):
            diagnosis(tmp_path / "kl_countdown")
    with pytest.raises(ConfigError, match=r"there is no metrics.jsonl in it; give one in it, such as .*/kl_countdown$"):
        diagnosis(tmp_path)


def test_the_command_line_answers_without_torch_and_without_a_config(tmp_path):
    write(tmp_path / "run", {"rollout/mismatch": lambda step: 0.5})
    result = run_main(tmp_path, "--doctor", "run", python=("-c", PROBE))
    line, imported = result.stdout.splitlines()
    assert (result.returncode, result.stderr, imported) == (0, "", "imported: numpy")
    assert line.startswith("sampler mismatch: log-probs of sampler and trainer differ by 0.500 nats")
    result = run_main(tmp_path, "--doctor", "runs", python=("-c", PROBE))
    assert result.returncode == 2 and result.stderr.count("\n") == 1
    assert result.stderr.startswith("error: --doctor runs: there is no such folder")


def test_a_fault_of_the_doctor_does_not_end_a_finished_run(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(doctor, "examine", lambda run: 1 / 0)
    log_diagnosis(write(tmp_path))
    assert "the doctor failed (ZeroDivisionError: division by zero)" in caplog.text


# --- real runs, shorter than those of benchmarks/doctor.py ------------------------------------------------------------

SHORTER = ["training.max_steps=12", "training.batch_size=32", "training.num_questions_per_batch=4", "data.eval_size=8",
           "data.eval_samples=2", "data.train_size=64", "training.eval_interval=0"]  # fmt: skip
REAL = {one.name: one for one in benchmark.FAILING + benchmark.HEALTHY}


@pytest.mark.parametrize("name", ["no-reward", "weights-do-not-move", "kl"])
def test_a_real_run_is_judged_rightly_and_says_so_at_its_end(tmp_path, monkeypatch, capsys, name):
    monkeypatch.setattr(benchmark, "SHORT", benchmark.SHORT + SHORTER)
    result = benchmark.judged(REAL[name], tmp_path)
    assert result["right"] and result["steps"] == 12, result
    (folder,) = (tmp_path / "runs").iterdir()
    shown = capsys.readouterr().out.splitlines()
    place = next(number for number, line in enumerate(shown) if line.startswith("doctor"))
    lines = diagnosis(folder)
    assert [line[12:] for line in shown[place : place + len(lines)]] == lines and shown[place - 1].startswith("curves")
    assert lines[0].startswith(REAL[name].fault or "nothing wrong was found in 12 steps")


def test_the_benchmark_takes_as_many_runs_of_either_kind_as_it_says_and_each_fault_once():
    faults = [one.fault for one in benchmark.FAILING]
    assert len(set(faults)) == len(faults) == 14 and set(faults) < {*BY_HAND} and len(benchmark.HEALTHY) == 12
    assert {*BY_HAND} - set(faults) == {"all rewards equal", "no gradient", "endings lost"}
    row = {"run": "a", "made": "x", "named": ["x", "y"], "evidence": "1 | 2; try: z"}
    assert benchmark.table([row]).splitlines()[2] == "| a | x | x, y | 1 \\| 2 |"


def test_gspo_clips_many_tokens_by_design(tmp_path):
    folder = write(tmp_path / "run", {"train/clip_fraction": flat(0.3)})
    assert diagnosis(folder)[0].startswith("clip fraction high: ")
    (folder / "config.yaml").write_text("training: {importance_sampling_level: sequence}")
    assert diagnosis(folder) == [f"nothing wrong was found in {STEPS} steps"]
