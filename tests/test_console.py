"""What the terminal shows: facts at the start, the first completions, one line a step, warnings, and the result."""

import io
import logging
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from src.commands import run_check
from src.config import ConfigError, load_config
from src.records import Episode, Group, Problem
from src.run import console
from src.run.console import (
    RESULT,
    Console,
    Progress,
    Stalls,
    best_and_worst,
    clock,
    configure_console,
    configure_logging,
    fact,
    first_completions,
    quoted,
    shortened,
    step_line,
    summary,
    tokens_line,
    viewer,
    visible,
)
from src.run.reading import read_rows
from src.run.telemetry import Telemetry
from src.train_grpo import run_training

PROJECT = Path(__file__).parent.parent
CONFIG = PROJECT / "configs" / "configs_tiny" / "config_kl_beta0.04_tiny.yaml"
SMALL = ["training.max_steps=2", "training.batch_size=16", "training.num_questions_per_batch=4", "data.eval_size=4",
         "data.eval_samples=2", "data.train_size=16", "training.eval_interval=1"]  # fmt: skip
ESCAPE = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u200b-\u200f\u202a-\u202e\u2066-\u2069]")  # a line break is none
grpo = logging.getLogger("grpo")


@pytest.fixture(autouse=True)
def console_as_it_was():
    configure_console()
    yield
    configure_console()
    configure_logging()


def episode_of(reward: float, text: str = "text", advantage: float = 1.0, tokens: int = 2, finished=True, **parts):
    return Episode(tuple(range(tokens)), (0.0,) * tokens, finished, text, reward=reward,
                   reward_parts={"reward": reward, **parts}, advantages=(advantage,) * tokens)  # fmt: skip


def group_of(number: int, *rewards: float, teaches: bool = True) -> Group:
    problem = Problem(number, (1, 2, 3), f"prompt {number}", {})
    return Group(problem, tuple(episode_of(reward, advantage=float(teaches)) for reward in rewards))


def metrics_of(**changes: float) -> dict[str, float]:
    metrics = {
        "train/reward": 0.5, "reward/answer": 0.25, "rollout/length": 20.0, "rollout/tokens_per_second": 1000.0,
        "rollout/finished": 0.75, "train/groups_without_variance": 0.5, "time/rollout": 0.5, "time/update": 0.25,
        "memory/peak_gib": 1.5,
    }  # fmt: skip
    return metrics | {f"{'reward' if name == 'answer' else 'train'}/{name}": value for name, value in changes.items()}


# --- text of a model --------------------------------------------------------------------------------------------------

HOSTILE = "\x1b[2J\x1b]0;title\x07ok\r\x08\x7f\x9b31m\u202eevil\u2066\u200b\u2028\ttab\udc80\x00"


def test_nothing_that_a_terminal_would_obey_is_left_of_a_text_on_the_terminal_and_in_the_log(tmp_path, capsys):
    shown = visible(HOSTILE + "\nnext ± ↵ 数")
    assert not ESCAPE.search(shown) and "\u2028" not in shown and "\udc80" not in shown
    assert shown.startswith("\\x1b[2J\\x1b]0;title\\x07ok\\r") and shown.endswith("\nnext ± ↵ 数")
    assert visible(shown) == shown
    configure_logging(tmp_path / "training.log")
    grpo.warning(f"a reward raised: {HOSTILE}")
    for text in (capsys.readouterr().out, (tmp_path / "training.log").read_text(encoding="utf-8")):
        assert "warning: a reward raised: \\x1b[2J" in text and not ESCAPE.search(text)


def test_an_error_does_not_obey_a_text_either(tmp_path):
    (tmp_path / "bad.yaml").write_text('training:\n  "beta\\e[2J": 1\n')
    command = [sys.executable, PROJECT / "main.py", "--config", tmp_path / "bad.yaml", "--dataset_name", "countdown"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 2 and "beta\\x1b[2J is not a key" in result.stderr and "\x1b" not in result.stderr


def test_the_first_line_comes_before_torch_is_imported():
    program = f"""
import os, runpy, sys
class Watch:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            print("torch is imported", flush=True)
            os._exit(7)
sys.meta_path.insert(0, Watch())
sys.argv = ["main.py", "--config", {str(CONFIG)!r}, "--dataset_name", "countdown"]
runpy.run_path("main.py", run_name="__main__")
"""
    result = subprocess.run([sys.executable, "-c", program], cwd=PROJECT, capture_output=True, text=True)
    assert result.stdout.splitlines() == ["loading models/countdown-tiny", "torch is imported"], result.stderr
    assert result.returncode == 7


def test_a_terminal_of_few_letters_gets_every_line(monkeypatch):
    """A letter it does not know must not be taken for a terminal that is gone."""
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", stream)
    grpo.warning("数 ±")
    grpo.warning("next")
    assert stream.buffer.getvalue() == b"warning: \\u6570 \\xb1\nwarning: next\n"


def test_a_long_text_loses_its_middle_and_every_line_of_a_quoted_one_is_behind_a_bar():
    """So that a completion cannot write a line that looks like one of the log, or fill the screen."""
    assert shortened("x" * 10, 10) == "x" * 10
    assert shortened("a" * 500 + "b" * 2000 + "c" * 500, 1000) == "a" * 500 + " [... 2,000 characters ...] " + "c" * 500
    lines = quoted("prompt", "first\nstep 9/9  reward 1.000\n" + "y" * 250).split("\n")
    assert lines[0] == "prompt      | first" and lines[1] == " " * 12 + "| step 9/9  reward 1.000"
    assert [line[12:14] for line in lines] == ["| "] * 5 and max(map(len, lines)) <= 100
    assert "".join(line[14:] for line in lines[2:]) == "y" * 250
    assert len(quoted("", "\n" * 500).split("\n")) < 25


# --- the start --------------------------------------------------------------------------------------------------------


def test_the_start_says_what_will_run(tmp_path, capsys):
    run_check(load_config(CONFIG, [*SMALL, "training.minibatches=2"]), "countdown", tmp_path)
    out = capsys.readouterr().out
    assert "model       models/countdown-tiny: 656,384 of 656,384 parameters are trained, float32 on cpu" in out
    assert "data        countdown: 16 training problems, 4 for the evaluation" in out
    assert "step        4 prompts x 4 completions of at most 40 tokens, 2 updates; 2 steps" in out
    assert "loss        kl x 0.04, learning rate 0.0002" in out
    memory = r"memory estimated weights 2\.5, .* at most .* at once, with 8,192 tokens a pass; .* GiB are free"
    assert re.search(memory, " ".join(out.split()))
    (prompt,) = re.findall(r"\| (<\|user\|>.*<\|assistant\|>)", out)
    (tokens,) = re.findall(r"prompt +the first one, (\d+) tokens: (.*?)\n +\|", out, re.DOTALL)
    assert tokens[1].endswith("4 '<|assistant|>'") and len(re.findall(r"\d+ '", tokens[1])) == int(tokens[0])
    assert "".join(re.findall(r"\d+ '([^']*)'", tokens[1])) == prompt
    assert all(len(line) <= 100 for line in out.splitlines() if not line.startswith("folder "))
    assert not (tmp_path / "runs").exists()


def test_the_start_says_how_many_prompts_were_too_long(tmp_path, capsys):
    override = ["data.num_numbers=[2,3]", "training.max_prompt_len=8", "data.train_size=40", "data.eval_size=40"]
    run_check(load_config(CONFIG, [*SMALL, *override]), "countdown", tmp_path)  # three numbers make nine tokens
    out = " ".join(capsys.readouterr().out.split())
    train, evaluation = (int(n) for n in re.findall(r"warning: (\d+) of 40 \w+ prompts are longer", out))
    assert 0 < train < 40 and 0 < evaluation < 40 and train != evaluation
    assert (
        f"countdown: {40 - train} training problems ({train} too long, left out), {40 - evaluation} for the "
        f"evaluation ({evaluation} too long, left out)"
    ) in out


def test_a_long_prompt_is_told_by_its_ends():
    shown = tokens_line(SimpleNamespace(decode=lambda ids: f"t {ids[0]}"), tuple(range(50)))
    assert shown.replace("\0", " ") == (
        "50 tokens: 0 't 0', 1 't 1', 2 't 2', ..., 44 't 44', 45 't 45', 46 't 46', 47 't 47', 48 't 48', 49 't 49'"
    )
    assert shown.count("t\0") == 9, "no line breaks within a token"
    for line in fact("prompt", shown).split("\n"):
        assert line.count("'") % 2 == 0, "no token is broken over two lines"


# --- the first completions --------------------------------------------------------------------------------------------


def test_best_and_worst_are_of_different_groups_where_there_are_such():
    def numbers(*groups):
        return [(group.problem.index, episode.reward) for group, episode in best_and_worst(list(groups))]

    assert numbers(group_of(0, 0.5, 1.0), group_of(1, 0.0, 0.5)) == [(0, 1.0), (1, 0.0)]
    assert numbers(group_of(0, 1.0, 0.0), group_of(1, 0.0, 0.5)) == [(0, 1.0), (1, 0.0)]
    assert numbers(group_of(0, 1.0, 0.0), group_of(1, 1.0, 0.5)) == [(1, 1.0), (0, 0.0)]
    assert numbers(group_of(0, 1.0, 0.0), group_of(1, 0.5, 0.5)) == [(0, 1.0), (0, 0.0)]
    assert numbers(group_of(0, 0.0, 0.0), group_of(1, 0.0, 0.0)) == [(0, 0.0), (1, 0.0)]
    flat, teaching = group_of(0, 0.0, 0.0, teaches=False), group_of(1, 0.0, 0.5)
    assert numbers(flat, teaching, group_of(2, 0.5, 1.0)) == [(2, 1.0), (1, 0.0)], "a group that teaches comes first"
    assert numbers(group_of(0, 0.5)) == [(0, 0.5)]


def test_first_completions_show_every_part_of_the_reward():
    best = episode_of(1.1, HOSTILE, 1.5, tokens=3, answer=1.0, short=-0.5)
    worst = episode_of(0.0, "z" * 5000, -0.5, tokens=1, finished=False, answer=0.0, short=0.25)
    problems = [Problem(number, (1,), f"prompt {number}", {}) for number in range(2)]
    shown = first_completions(1, [Group(problems[0], (worst,)), Group(problems[1], (best,))])
    first, second = shown.split("the worst of the 2 completions of step 1")
    assert first.startswith("the best of the 2 completions of step 1\nprompt      | prompt 1\n")
    assert "1.100 (reward 1.100, answer 1.000, short -0.500), advantage +1.50, 3 tokens, finished" in first
    assert "completion  | \\x1b[2J" in first and not ESCAPE.search(shown)
    assert "prompt      | prompt 0" in second and "4,200 characters" in second.replace("\n            | ", "")
    assert re.search(r"0\.000 \(.*short 0\.250\), advantage -0\.50, 1 tokens, cut off by\s+max_gen_len", second)
    assert max(map(len, shown.splitlines())) <= 100


# --- steps ------------------------------------------------------------------------------------------------------------


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("log_every", "quiet", "stream", "expected"),
    [
        (None, False, io.StringIO, "1234567"),
        (3, False, io.StringIO, "367"),
        (100, False, io.StringIO, "7"),
        (None, True, io.StringIO, ""),
        (None, False, Terminal, ""),
        (3, False, Terminal, "367"),
        (None, True, Terminal, ""),
    ],
)
def test_which_steps_have_a_line(tmp_path, monkeypatch, log_every, quiet, stream, expected):
    """The log has them all; a terminal has a bar, unless it is to be quiet."""
    configure_console(log_every, quiet)
    stream = stream()
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", stream)
        telemetry = Telemetry(tmp_path, 0, 7)
        for step in range(1, 8):
            telemetry.write_step(step, metrics_of())
        telemetry.close()
    log = (tmp_path / "training.log").read_text(encoding="utf-8")
    shown = stream.getvalue().replace("\r", "\n")  # a bar goes back to the start of its line
    steps = ["".join(re.findall(r"^(?:\S+ \S+ )?step (\d+)/", text, re.MULTILINE)) for text in (shown, log)]
    assert steps == [expected, "1234567"]
    assert ("7/7 [" in stream.getvalue()) == (isinstance(stream, Terminal) and not quiet), "the bar"


def test_quiet_shows_warnings_and_results_only_and_a_later_choice_takes_the_place_of_an_earlier_one(capsys):
    configure_console(3)
    configure_console(quiet=True)
    configure_logging()
    (handler,) = [handler for handler in grpo.handlers if isinstance(handler, Console)]
    assert handler.log_every is None
    for level in (logging.INFO, RESULT, logging.WARNING, logging.ERROR):
        grpo.log(level, f"level {level}")
    assert capsys.readouterr().out.splitlines() == ["level 25", "warning: level 30", "error: level 40"]


def test_the_time_that_is_left_is_the_mean_of_this_process_times_the_steps_to_come(tmp_path, monkeypatch, capsys):
    now = [1000.0]
    monkeypatch.setattr("src.run.telemetry.time.perf_counter", lambda: now[0])
    (tmp_path / "resumed").mkdir()
    telemetry = Telemetry(tmp_path / "resumed", 5, 104)  # resumed after step 4
    for step, seconds in ((5, 3.0), (6, 1.0)):
        now[0] += seconds
        telemetry.write_step(step, metrics_of())
    telemetry.close()
    telemetry = Telemetry(tmp_path, 0, 11)
    now[0] += 600  # the evaluation before the first step does not count as one
    telemetry.write_evaluation(0, {"eval/greedy": 0.5, "time/evaluate": 600.0})
    now[0] += 2
    telemetry.write_step(1, metrics_of())
    telemetry.close()
    ends = [line.partition("tokens/s  ")[2] for line in capsys.readouterr().out.splitlines()]
    assert ends == ["0.75 s  4:57 left", "0.75 s  3:16 left", "0.75 s  0:20 left"]


def test_a_step_in_one_line():
    metrics = metrics_of(kl_k3=0.01234, entropy=1.5)
    assert step_line(3, 10, metrics, 3725.0) == (
        "step 3/10  reward 0.500  answer 0.250  kl 0.0123  entropy 1.500  length 20.0  1,000 tokens/s  0.75 s  "
        "1:02:05 left"
    )
    assert step_line(10, 10, metrics_of(), 0.0).endswith("1,000 tokens/s  0.75 s")
    assert [clock(seconds) for seconds in (0, 59.6, 200, 3600)] == ["0:00", "1:00", "3:20", "1:00:00"]


# --- what goes on -----------------------------------------------------------------------------------------------------


def test_progress_is_a_share_and_an_estimate_at_the_end_of_a_bar(tmp_path, monkeypatch):
    now, stream, progress, shown = [0.0], Terminal(), Progress(), []
    progress.thread = SimpleNamespace()  # none is wanted here
    monkeypatch.setattr(console, "time", SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr("src.run.telemetry.progress", progress)
    monkeypatch.setattr(sys, "stdout", stream)
    telemetry = Telemetry(tmp_path, 0, 10)
    for at, doing, share in ((0, "rollout", 0.0), (0.25, "rollout", 0.9), (4, "rollout", 0.01), (40, "rollout", 0.4),
                             (44, "rollout", 0.1), (50, "rollout", 0.3), (51, "update", 0.7)):  # fmt: skip
        now[0] = at
        progress.report(doing, lambda share=share: share)
        shown.append(progress.text())
    assert shown == [
        "rollout: 0:00 so far",
        "rollout: 0:00 so far",  # it is not asked again so soon, as the answer may wait for a GPU
        "rollout: 0:04 so far",
        "rollout: 40%, about 1:00 left",
        "rollout: 10%, about 0:00 left",  # it has begun anew
        "rollout: 30%, about 0:14 left",
        "update: 0:00 so far",
    ]
    assert "rollout: 40%, about 1:00 left" in stream.getvalue() and "\n" not in stream.getvalue().strip()
    telemetry.close()
    assert not progress.doing and not progress.show


def test_progress_is_a_line_where_nothing_else_has_been_said_for_long(monkeypatch, capsys):
    monkeypatch.setattr(Progress, "SILENCE", 0.01)
    progress, out, deadline = Progress(), "", time.monotonic() + 120
    while "left" not in out and time.monotonic() < deadline:
        progress.report("rollout", lambda: 0.4)
        time.sleep(0.02)
        out += capsys.readouterr().out
    progress.rest()
    assert re.search(r"^rollout: 40%, about \d+:\d\d left$", out, re.MULTILINE), out


# --- steps that teach nothing -----------------------------------------------------------------------------------------


def warned_steps(capsys, rows) -> list[str]:
    stalls = Stalls()
    for step, changes in enumerate(rows, start=1):
        stalls.look(step, metrics_of(**changes))
    return [line.split(";")[0] for line in capsys.readouterr().out.splitlines()]


def test_no_right_completion_is_said_at_first_and_when_it_goes_on(capsys):
    rows = [{}, {"answer": 0.0}, {}] + [{"answer": 0.0}] * 120
    places = [line.split(":")[1] for line in warned_steps(capsys, rows)]
    assert places == [" step 2", " steps 4 to 13", " steps 4 to 103"]
    (line,) = warned_steps(capsys, [{"answer": 0.0, "reward": 0.1}])
    assert line == "warning: step 1: no completion was right, 75% of the last ended before max_gen_len"
    (line,) = warned_steps(capsys, [{"answer": 0.0, "groups_without_variance": 1.0}])
    assert "there is nothing to learn" in line


def test_a_hinge_that_stays_shut_is_said_once(capsys):
    shut = {"beyond_target/ot": 0.0, "ot": 0.0008}
    (line,) = warned_steps(capsys, [shut] * 19 + [shut | {"beyond_target/ot": 0.1}] + [shut] * 60)
    assert line.startswith("warning: in the last 20 steps no completion exceeded training.ot_target")
    assert "so ot did nothing: its mean is 0.0008" in line
    (line,) = warned_steps(capsys, [{"beyond_target/approx_kl": 0.0, "kl_k3": 0.01}] * 25)
    assert "training.kl_target" in line and "mean is 0.01" in line
    assert warned_steps(capsys, [shut | {"beyond_target/ot": 0.01}] * 60) == []


def test_groups_without_variance_are_said_at_first_and_when_they_go_on(capsys):
    flat = {"groups_without_variance": 1.0}
    rows = [flat, {}] * 30 + [flat] * 9 + [{}] + [flat] * 11
    assert warned_steps(capsys, rows) == [
        "warning: step 1: in every group all rewards are equal, so there is nothing to learn",
        "warning: steps 71 to 80: in every group all rewards are equal, so there is nothing to learn",
    ]
    Stalls().look(1, metrics_of(**flat))
    out = capsys.readouterr().out
    assert "more completions a prompt (batch_size / num_questions_per_batch), a higher temperature, or problems" in out

    assert warned_steps(capsys, [{"answer": 0.01, "groups_without_variance": 0.99}] * 20) == [], "it teaches"


@pytest.mark.parametrize(("sampled", "warnings"), [(True, 1), (False, 0)])
def test_given_completions_are_not_warned_of(tmp_path, capsys, sampled, warnings):
    telemetry = Telemetry(tmp_path, 1, 5, sampled)
    telemetry.write_step(1, metrics_of(groups_without_variance=1.0))
    telemetry.close()
    assert capsys.readouterr().out.count("warning: ") == warnings


# --- the end ----------------------------------------------------------------------------------------------------------


def test_the_summary_by_hand(monkeypatch):
    monkeypatch.delenv("UV", raising=False)
    evaluations = {"before": "greedy 10%", "after": "greedy 50%", "best": "pass@1 60% at step 3"}
    seconds = {"rollout": 2.0, "update": 5.0, "evaluate": 3.0}
    assert summary(evaluations, Path("my runs/a/final"), 4, 75.0, seconds, 1.25).split("\n") == [
        "before      greedy 10%",
        "after       greedy 50%",
        "best        pass@1 60% at step 3",
        "time        4 steps here in 1:15, 2.50 s a step (rollout 20%, update 50%, evaluate 30%)",
        "memory      1.2 GiB at its peak",
        "model       my runs/a/final",
        "curves      tensorboard --logdir 'my runs'",
    ]
    assert len(summary(evaluations, Path("runs/a/final"), 0, 75.0, {}, 1.25).split("\n")) == 5
    monkeypatch.setenv("UV", "somewhere/uv")
    assert viewer(Path("runs")) == "uv run tensorboard --logdir runs"


def test_a_run_shows_its_start_its_progress_its_first_completions_and_its_result(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(console.os, "environ", {name: value for name, value in os.environ.items() if name != "UV"})
    reported = []
    monkeypatch.setattr(Progress, "report", lambda self, doing, share=float: reported.append((doing, share())))
    configure_console(quiet=True)  # so the terminal has the result alone, and training.log everything
    last = run_training(load_config(CONFIG, SMALL), "countdown", tmp_path)
    shown = capsys.readouterr().out.splitlines()
    words = ["before", "after", "best", "time", "memory", "model", "curves", "doctor"]
    assert [line.split()[0] for line in shown] == words
    folder = tmp_path / "runs" / "config_kl_beta0.04_tiny_countdown"
    log = (folder / "training.log").read_text(encoding="utf-8").splitlines()
    lines = [line[len("2026-01-01 12:00:00 ") :] for line in log]
    assert lines[-len(shown) :] == shown
    order = ["model ", "prompt ", "folder ", "before training", "the best of the 16", "the worst of the 16",
             "step 1/2  ", "step 2/2  ", "before ", "after ", "best ", "time ", "memory ", "model ",
             "curves ", "doctor "]  # fmt: skip
    place = -1
    for begin in order:
        place = next(i for i, line in enumerate(lines) if i > place and line.startswith(begin))
    best = max(read_rows(folder / "metrics.jsonl"), key=lambda row: row["eval/pass@1"])
    assert f"best        pass@1 {best['eval/pass@1']:.1%} at step {best['step']}" in lines
    assert f"pass@1 {last['eval/pass@1']:.1%}" in next(line for line in lines if line.startswith("after "))
    assert lines[-3:-1] == [f"model       {folder / 'final'}", f"curves      tensorboard --logdir {folder.parent}"]
    assert lines[-1] == "doctor      2 steps are too few to judge a run by; 10 are enough for a first look"

    assert all(0 <= share <= 1 for _, share in reported) and max(share for _, share in reported) > 0.3
    verbs = [doing for i, (doing, _) in enumerate(reported) if i == 0 or doing != reported[i - 1][0]]
    # the trial before the first step, an evaluation, and two steps with one after each
    assert verbs == ["update", "evaluation", *["rollout", "update", "evaluation"] * 2, "saving"]

    other = load_config(CONFIG, [*SMALL, "training.temperature=0.5"])
    with pytest.raises(ConfigError, match=r"training.temperature = 1.0, this config says 0.5"):
        run_training(other, "countdown", tmp_path)
    configure_console()
    run_check(other, "countdown", tmp_path)  # says the same, and refuses nothing
    out = " ".join(capsys.readouterr().out.split())
    assert "was made with training.temperature = 1.0, this config says 0.5; use --name for another run" in out
    assert "everything is in order" in out
