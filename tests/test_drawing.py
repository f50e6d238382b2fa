"""Which prompts a step draws: cursor, dynamic sampling, solved prompts, curriculum; on a rollout made by hand."""

from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from src.config import RunError, TrainingConfig, load_config
from src.prepare import prepare
from src.records import Episode, Group, Problem
from src.train_grpo import next_problems, rollout, train_step, with_running_accuracy

CONFIGS = Path(__file__).parent.parent / "configs" / "configs_tiny"


def made_run(count: int, right=lambda index, visit: (1, 0, 0, 1), **keys):
    """A run whose completions are graded as `right(problem index, how often it came)` says; `asked`: every prompt."""
    training = TrainingConfig(batch_size=16, num_questions_per_batch=4, **keys)
    problems = [Problem(index, (1,), "", {}) for index in range(count)]
    asked: list[list[int]] = []
    visits: Counter = Counter()

    def sample(wanted, samples, stream):
        assert samples == 4
        asked.append([problem.index for problem in wanted])
        visits.update(asked[-1])
        rows = [right(problem.index, visits[problem.index]) for problem in wanted]
        return [
            Group(p, tuple(Episode((2, 3), (), True, "", reward=float(r), reward_parts={"answer": r}) for r in row))
            for p, row in zip(wanted, rows, strict=True)
        ]

    config = SimpleNamespace(training=training)
    return SimpleNamespace(config=config, train_problems=problems, state={}, sample=sample, asked=asked, done=7)


def test_the_cursor_goes_on_where_it_stands_and_no_problem_is_left_out_at_the_end_of_an_epoch():
    run, other = made_run(10), made_run(10)
    drawn = [problem.index for _ in range(5) for problem in next_problems(run, 4)]
    assert sorted(drawn[:10]) == sorted(drawn[10:]) == list(range(10)) and run.state["cursor"] == 20
    other.state["cursor"] = 4
    assert [problem.index for problem in next_problems(other, 4)] == drawn[4:8]
    assert len({problem.index for problem in next_problems(other, 10)}) == 10, "never twice in one helping"


def test_groups_without_variance_make_room_for_those_of_further_prompts():
    """Even problems vary. The helpings are as large as what lacks, and stop when nothing does."""
    run = made_run(40, lambda index, _: (1, 0, 0, 1) if index % 2 == 0 else (1, 1, 1, 1), dynamic_sampling=9)
    groups, metrics = rollout(run, 1)
    assert len(groups) == 4 and all(group.problem.index % 2 == 0 for group in groups)
    lacking, expected = 4, []
    order = [index for helping in run.asked for index in helping]
    while lacking:
        expected.append(order[sum(map(len, expected)) :][:lacking])
        lacking -= sum(index % 2 == 0 for index in expected[-1])
    assert run.asked == expected and len(run.asked) > 1
    used = len(order)
    assert metrics == {
        "rollout/tokens": used * 4 * 2,
        "rollout/prompts": used,
        "rollout/useful_groups": 4 / used,
        "train/barren_steps": 0,
    }
    assert run.state["cursor"] == used
    rollout(run, 2)
    assert not set(order) & {index for helping in run.asked[len(expected) :] for index in helping}


def test_what_lacks_after_the_last_helping_is_filled_and_a_step_in_which_nothing_varies_is_counted():
    run = made_run(40, lambda index, _: (1, 0, 0, 1) if index == 5 else (0, 0, 0, 0), dynamic_sampling=2)
    run.state["cursor"] = 40  # of an epoch of which each step sees another part
    barren = 0
    for step in range(1, 11):
        groups, metrics = rollout(run, step)
        varies = [group.problem.index == 5 for group in groups]
        assert len(groups) == 4 and varies == sorted(varies, reverse=True)
        barren += not any(varies)
        assert metrics["train/barren_steps"] == barren
    assert barren > 5 and len(run.asked) == 30


def test_without_dynamic_sampling_the_groups_are_as_drawn():
    run = made_run(40, lambda index, _: (index % 2,) * 4)
    groups, metrics = rollout(run, 1)
    assert [[group.problem.index for group in groups]] == run.asked and metrics["rollout/useful_groups"] == 0
    assert "accuracy" not in run.state


def test_a_step_in_which_nothing_varies_moves_nothing_and_does_not_crash():
    small = ["training.batch_size=8", "training.num_questions_per_batch=4", "data.train_size=16", "data.eval_size=4"]
    config = load_config(CONFIGS / "config_none_tiny.yaml", [*small, "training.dynamic_sampling=1"])
    run = prepare(config, "countdown")
    run.task.reward = lambda text, row: {"reward": 0.0, "answer": 0.0}
    before = {name: weight.clone() for name, weight in run.engine.model.state_dict().items()}
    metrics, groups = train_step(run, 1)
    assert len(groups) == 4 and (metrics["train/grad_norm"], metrics["train/barren_steps"]) == (0, 1)
    assert all((before[name] == weight).all() for name, weight in run.engine.model.state_dict().items())


def test_solved_prompts_are_not_drawn_again_until_hardly_any_is_left():
    """Of 8 prompts 0 and 1 are always right; 2 is right at first, and its running accuracy falls below the limit."""

    def right(index, visit):
        return (1, 1, 1, 1) if index < 2 else (1, 1, 1, 1 - (visit > 0)) if index == 2 else (1, 0, 0, 1)

    run = made_run(8, right, retire_solved=0.9)
    for step in range(1, 13):
        rollout(run, step)
    counts = Counter(index for helping in run.asked for index in helping)
    assert counts[0] == counts[1] == 1 and min(counts[index] for index in range(2, 8)) >= 6
    run = made_run(8, lambda index, _: (1, 1, 1, 1), retire_solved=0.9)
    rollout(run, 1)
    rollout(run, 2)
    with pytest.raises(
        RunError, match=r"only 0 of 8 .*retire_solved \(0.9\), and 4 are wanted: raise it.* to 7,"
    ) as stop:
        rollout(run, 3)
    assert "\n" not in str(stop.value)


def test_no_problem_comes_twice_in_a_step_and_where_none_is_left_it_makes_do():
    run = made_run(10, lambda index, _: (1, 0, 0, 1) if index == 5 else (0, 0, 0, 0), dynamic_sampling=9)
    for step in range(1, 6):
        run.asked.clear()
        groups, metrics = rollout(run, step)
        asked = [index for helping in run.asked for index in helping]
        assert sorted(asked) == list(range(10)) and len(groups) == 4 and groups[0].problem.index == 5
        assert metrics["rollout/useful_groups"] == 0.1


def test_what_is_useful_is_decided_before_the_length_penalty():
    """All wrong answers of different lengths differ once the penalty is in; DAPO filters by what is right."""
    run = made_run(40, lambda index, _: (0, 0, 0, 0), dynamic_sampling=1, overlong_buffer=2, max_gen_len=3)
    sample = run.sample

    def longer(problems, samples, stream):
        groups = sample(problems, samples, stream)
        return [replace(g, episodes=(replace(g.episodes[0], token_ids=(2, 3, 4)), *g.episodes[1:])) for g in groups]

    run.sample = longer
    groups, metrics = rollout(run, 1)
    assert metrics["rollout/useful_groups"] == 0 and metrics["rollout/prompts"] == 8
    assert [e.reward for e in groups[0].episodes] == [-1.0, -0.5, -0.5, -0.5]


def test_the_curriculum_takes_prompts_by_how_near_their_accuracy_is_to_one_half():
    """a = 0.5: each turn; 0.8: 64% of its turns; 1 and 0: a tenth, the least."""
    run = made_run(40, curriculum=True)
    known = {0.5: range(10), 0.8: range(10, 20), 1.0: range(20, 30), 0.0: range(30, 40)}
    run.state["accuracy"] = {index: accuracy for accuracy, indices in known.items() for index in indices}
    counts = Counter(problem.index for _ in range(1000) for problem in next_problems(run, 4))
    turns = run.state["cursor"] / 40
    shares = {accuracy: sum(counts[index] for index in indices) / 10 / turns for accuracy, indices in known.items()}
    assert shares[0.5] == pytest.approx(1, abs=0.02) and shares[0.8] == pytest.approx(0.64, abs=0.03)
    assert shares[0.0] == pytest.approx(0.1, abs=0.02) and shares[1.0] == pytest.approx(0.1, abs=0.02)
    again = made_run(40, curriculum=True)
    again.state |= {"accuracy": run.state["accuracy"], "cursor": run.state["cursor"]}
    assert next_problems(again, 4) == next_problems(run, 4), "chance is a function of the cursor"


def test_running_accuracy_by_hand():
    def group(index: int, *right: int) -> Group:
        episode = Episode((1,), (), True, "")
        return Group(Problem(index, (1,), "", {}), tuple(replace(episode, reward_parts={"answer": r}) for r in right))

    first = with_running_accuracy({}, [group(3, 1, 0, 0, 0), group(4, 1, 1, 1, 1)])
    assert first == {3: 0.25, 4: 1.0}
    assert with_running_accuracy(first, [group(3, 1, 1, 1, 0), group(7, 0, 0, 0, 0)]) == {3: 0.5, 4: 1.0, 7: 0.0}
