"""Evaluation: accuracies, votes, rankings and reports, against numbers worked out by hand."""

import itertools
import json
import logging
import math
import random
from dataclasses import replace

import pytest

from src.records import Episode, Group, Problem
from src.run.report import accuracy_line, completions_table, headline, write_report
from src.tasks import answers_of, confidence, pass_at_k, ranking_metrics, summarize
from src.tasks.accuracy import majority_at_k, majority_is_correct


class Voting:
    """The answer is the text up to the colon; `-` is none."""

    def answer_of(self, text):
        answer = text.partition(":")[0]
        return None if answer == "-" else answer


def episode(text: str, right: float, length: int = 2, finished: bool = True, **parts: float) -> Episode:
    """The policy wrote `length` tokens, and another one was put there."""
    reward_parts = {"reward": right, "answer": float(right), **parts}
    written = (*(True,) * length, False)
    return Episode((5,) * (length + 1), (-0.5,) * length, finished, text, written, float(right), reward_parts)


def group(index: int, *episodes: Episode) -> Group:
    return Group(Problem(index, (1, 2, 3), f"prompt {index}", {}), episodes)


# --- pass@k, confidence -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("samples", range(1, 7))
def test_pass_at_k_is_the_share_of_draws_that_hold_a_correct_one(samples):
    for correct, k in itertools.product(range(samples + 1), range(1, samples + 1)):
        draws = list(itertools.combinations([True] * correct + [False] * (samples - correct), k))
        assert pass_at_k(correct, samples, k) == pytest.approx(sum(map(any, draws)) / len(draws))


def test_confidence_by_hand():
    assert confidence([1.0, 0.0, 0.0, 1.0]) == pytest.approx(1.96 * 0.5 / 2)
    assert confidence([0.25] * 9) == 0.0
    assert confidence([1.0, 2.0, 6.0]) == pytest.approx(1.96 * math.sqrt(14 / 3) / math.sqrt(3))
    assert math.isnan(confidence([]))


# --- Majority vote ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answers", "correct", "expected"),
    [
        (["7", "7", "8"], [1, 1, 0], 1.0), (["7", "8", "8"], [1, 0, 0], 0.0), (["7", "8"], [1, 0], 0.5),  # a tie
        (["7", "8", "9", "9", "8", "6"], [0, 1, 0, 0, 1, 0], 0.5),  # 8 and 9 are tied, 6 and 7 do not count
        (["7", "8", "9"], [0, 0, 1], 1 / 3), ([None, None, None, "7"], [0, 0, 0, 1], 1.0),  # no answer is no vote
        ([None, None, None, "7"], [0, 0, 0, 0], 0.0), ([None, None], [0, 0], 0.0), ([None, None], [1, 1], 0.0),
        (["7", "7", "7", "8"], [1, 1, 0, 1], 2 / 3),  # graded differently
        (["", "", "8"], [1, 1, 0], 1.0),  # an empty text is an answer
        ([], [], 0.0),
    ],
)  # fmt: skip
def test_majority_by_hand(answers, correct, expected):
    assert majority_is_correct(answers, [bool(right) for right in correct]) == pytest.approx(expected)


def test_a_tie_is_worth_what_a_random_choice_would_be():
    generator = random.Random(0)
    for _ in range(50):
        answers = [generator.choice(["a", "b", "c", None]) for _ in range(5)]
        right = {answer: generator.random() < 0.5 for answer in ("a", "b", "c")} | {None: False}
        counts = {answer: answers.count(answer) for answer in "abc" if answer in answers}
        tied = [answer for answer, count in counts.items() if count == max(counts.values())]
        expected = sum(right[answer] for answer in tied) / len(tied) if tied else 0.0
        assert majority_is_correct(answers, [right[answer] for answer in answers]) == pytest.approx(expected)


def test_majority_is_a_share_of_all_problems():
    groups = [
        group(0, episode("a:1", 1), episode("a:2", 1), episode("b", 0)),
        group(1, episode("a", 0), episode("-", 1), episode("-", 1)),
        group(2, episode("a", 1), episode("b", 0), episode("-", 0)),
    ]
    assert majority_at_k(groups, Voting(), 3) == pytest.approx(1.5 / 3)
    assert majority_at_k(groups, Voting(), 5) == pytest.approx(1.5 / 5), "two were left out by the sampler"


def test_without_answer_of_the_final_answer_votes_and_what_is_no_text_is_compared_as_one():
    texts = ["so <answer>7</answer>", "\\boxed{8} no, <answer> 7 </answer>", "7"]
    assert answers_of(object(), texts) == ["7", "7", None]
    numbers = type("Numbers", (), {"answer_of": lambda self, text: {"a": 7, "b": [7], "c": None}[text]})
    assert answers_of(numbers(), ["a", "b", "c"]) == ["7", "[7]", None]


def test_an_answer_of_that_raises_is_a_warning_and_no_answer(caplog, monkeypatch):
    class Broken:
        def answer_of(self, text):
            return text[3]

    monkeypatch.setattr(logging.getLogger("grpo"), "propagate", True)
    assert answers_of(Broken(), ["abcd", "ab", ""]) == ["d", None, None]
    (message,) = {record.getMessage() for record in caplog.records}  # a set: several handlers may listen
    assert message.startswith("Broken.answer_of: IndexError: string index out of range (2 of 3 completions")


# --- summarize --------------------------------------------------------------------------------------------------------


def test_an_evaluation_by_hand():
    greedy = [group(0, episode("a", 1)), group(1, episode("b", 0)), group(2, episode("c", 1))]
    sampled = [
        group(0, *[episode("a", 1, 4, style=1.0)] * 3, episode("b", 0, 2, style=0.0)),
        group(1, episode("c", 1, 6, style=1.0), *[episode("d", 0, 2, False, style=0.0)] * 3),
        group(2, *[episode("e", 0, 3, style=0.5)] * 4),
    ]
    metrics = summarize(4, greedy, sampled, 4, Voting())  # one problem of four was left out
    expected = {
        "eval/greedy": 2 / 4, "eval/greedy_ci95": 1.96 * 0.5 / 2, "eval/pass@1": (3 / 4 + 1 / 4) / 4,
        "eval/pass@1_ci95": 1.96 * math.sqrt((0.75**2 + 0.25**2) / 4 - 0.25**2) / 2,
        "eval/pass@2": (1 + 1 / 2 + 0 + 0) / 4,  # 3 of 4 right: any two; 1 of 4: half of the pairs
        "eval/pass@4": 2 / 4, "eval/majority@4": 1 / 4, "eval/reward/style": (3 + 0 + 1 + 0 + 2) / 12,
        "eval/length": (12 + 2 + 6 + 6 + 12) / 12, "eval/finished": 9 / 12,
    }  # fmt: skip
    assert metrics == pytest.approx(expected)
    assert list(metrics) == list(expected), "the order of the headline"


@pytest.mark.parametrize(
    ("samples", "passes", "majority"),
    [(1, ["1"], []), (2, ["1", "2"], []), (3, ["1", "2", "3"], ["3"]), (8, ["1", "2", "4", "8"], ["8"])]
    + [(12, ["1", "2", "4", "8", "12"], ["12"])],
)
def test_which_k_are_reported(samples, passes, majority):
    groups = [group(0, *[episode("a", 1)] * samples)]
    names = [name for name in summarize(1, groups, groups, samples, Voting()) if not name.endswith("_ci95")]
    assert [name[10:] for name in names if name.startswith("eval/pass@")] == passes
    assert [name[14:] for name in names if name.startswith("eval/majority@")] == majority


def test_an_answer_counts_as_right_above_one_half_in_every_measure():
    for worth, expected in ((0.5, 0.0), (0.51, 1.0)):
        groups = [group(0, *[episode("a", worth)] * 4)]
        metrics = summarize(1, groups, groups, 4, Voting())
        assert {metrics[f"eval/{name}"] for name in ("greedy", "pass@1", "pass@4", "majority@4")} == {expected}


def test_nothing_sampled_is_nothing_solved():
    metrics = summarize(3, [], [], 4, Voting())
    assert metrics["eval/greedy"] == metrics["eval/pass@1"] == metrics["eval/pass@4"] == metrics["eval/majority@4"] == 0
    assert math.isnan(metrics["eval/length"]) and math.isnan(metrics["eval/finished"])
    assert "greedy 0.0%" in accuracy_line(metrics)


def test_the_headline():
    metrics = {"eval/greedy": 0.5, "eval/greedy_ci95": 0.1, "eval/pass@1": 0.25, "eval/pass@1_ci95": 0.05}
    metrics |= {"eval/pass@2": 0.4, "eval/pass@4": 0.75, "eval/majority@4": 0.3, "eval/length": 12.34}
    assert accuracy_line(metrics) == "greedy 50.0% (+-10.0%), pass@1 25.0% (+-5.0%), pass@4 75.0%, length 12.3"
    assert headline(metrics) == 0.25
    ranking = ranking_metrics([[1.0, 0.0]], [[math.log(0.75), math.log(0.25)]])
    line = "pair accuracy 100.0% (+-0.0%), expected score 0.750 (+-0.000), best completion 75.0% (+-0.0%)"
    assert (accuracy_line(ranking), headline(ranking)) == (line, 1.0)


# --- Ranking ----------------------------------------------------------------------------------------------------------


def test_ranking_by_hand():
    # group 1: 1 > 0 is ordered rightly; group 2: 2 > 1 is, 2 > 0 is a tie, 1 > 0 is ordered wrongly
    metrics = ranking_metrics([[1.0, 0.0], [2.0, 1.0, 0.0]], [[math.log(0.8), math.log(0.2)], [-1.0, -2.0, -1.0]])
    assert metrics["eval/pair_accuracy"] == pytest.approx(2.5 / 4)
    residuals = (1 - 0.625 * 1, 1.5 - 0.625 * 3)
    assert metrics["eval/pair_accuracy_ci95"] == pytest.approx(1.96 * math.hypot(*residuals) / 4)
    total = 2 * math.exp(-1) + math.exp(-2)
    second = (2 * math.exp(-1) + math.exp(-2)) / total  # = 1
    assert metrics["eval/expected_score"] == pytest.approx((0.8 + second) / 2)
    assert metrics["eval/expected_score_ci95"] == pytest.approx(1.96 * 0.1 / math.sqrt(2))
    best = math.exp(-1) / total
    assert metrics["eval/best_probability"] == pytest.approx((0.8 + best) / 2)
    assert metrics["eval/best_probability_ci95"] == pytest.approx(1.96 * abs(0.8 - best) / 2 / math.sqrt(2))


def test_pairs_against_counting_them_one_by_one():
    generator = random.Random(1)
    scores = [[float(generator.randint(0, 2)) for _ in range(generator.randint(2, 6))] for _ in range(20)]
    logprobs = [[-generator.randint(1, 4) / 2 for _ in row] for row in scores]
    right = pairs = 0.0
    for row, logs in zip(scores, logprobs, strict=True):
        for i, j in itertools.combinations(range(len(row)), 2):
            if row[i] != row[j]:
                pairs += 1
                right += 0.5 if logs[i] == logs[j] else (row[i] > row[j]) == (logs[i] > logs[j])
    assert ranking_metrics(scores, logprobs)["eval/pair_accuracy"] == pytest.approx(right / pairs)


def test_groups_of_one_size_have_the_interval_of_their_mean():
    """With equally many pairs everywhere the ratio of sums is the mean of the groups' shares."""
    logprobs = [[-1.0, -2.0, -3.0], [-2.0, -1.0, -3.0], [-3.0, -2.0, -1.0]]
    metrics = ranking_metrics([[3.0, 2.0, 1.0]] * 3, logprobs)
    assert metrics["eval/pair_accuracy"] == pytest.approx((3 + 2 + 0) / 9)
    assert metrics["eval/pair_accuracy_ci95"] == pytest.approx(confidence([1.0, 2 / 3, 0.0]))


def test_several_best_completions_add_up_and_huge_logprobs_do_not_overflow():
    metrics = ranking_metrics([[1.0, 1.0, 0.0]], [[-5000.0, -5000.0, -5000.0]])
    assert metrics["eval/best_probability"] == pytest.approx(2 / 3)
    assert metrics["eval/pair_accuracy"] == pytest.approx(0.5)


def test_scores_without_a_difference_have_no_pair_accuracy_and_lists_have_to_fit():
    metrics = ranking_metrics([[1.0, 1.0]], [[-1.0, -2.0]])
    assert math.isnan(metrics["eval/pair_accuracy"]) and math.isnan(metrics["eval/pair_accuracy_ci95"])
    assert metrics["eval/expected_score"] == pytest.approx(1.0)
    assert "pair accuracy nan%" in accuracy_line(metrics)
    for logprobs in ([[-1.0, -2.0]], [[-1.0, -2.0], [-1.0]]):
        with pytest.raises(ValueError):
            ranking_metrics([[1.0, 0.0], [1.0, 0.0]], logprobs)


# --- Reports ----------------------------------------------------------------------------------------------------------


def test_a_report_holds_every_completion_and_the_metrics(tmp_path):
    greedy = [group(3, episode("a\u2028\ud800\n", 1, style=0.5))]
    given = replace(episode("d", 1), old_logprobs=(-1.0, -2.0))  # of the offline task
    sampled = [group(3, episode("b", 0, 7, False), episode("c", 1), given)]
    about = {"model": "tiny", "config": {"path": tmp_path}}
    folder = tmp_path / "new" / "eval"
    write_report(folder, about, {"eval/greedy": 1.0, "eval/length": math.nan}, greedy, sampled)
    assert sorted(path.name for path in folder.iterdir()) == ["completions.jsonl", "report.json"]
    report = json.loads((folder / "report.json").read_text(encoding="utf-8"), parse_constant=pytest.fail)
    assert report["metrics"] == {"eval/greedy": 1.0, "eval/length": None}
    assert report["about"].pop("date").endswith("+00:00")
    assert report["about"] == {"model": "tiny", "config": {"path": str(tmp_path)}}
    rows = [json.loads(line) for line in (folder / "completions.jsonl").read_text(encoding="utf-8").splitlines()]
    kinds = [("greedy", "a\u2028\ud800\n"), ("sampled", "b"), ("sampled", "c"), ("given", "d")]
    assert [(row["kind"], row["text"]) for row in rows] == kinds and rows[3]["mean_logprob"] == -1.5
    assert rows[1] == {
        "problem": 3, "kind": "sampled", "prompt": "prompt 3", "text": "b", "reward": 0.0, "tokens": 7,
        "parts": {"reward": 0, "answer": 0.0}, "finished": False,
    }  # fmt: skip
    write_report(tmp_path, {"date": "2020"}, {}, [], [])
    assert json.loads((tmp_path / "report.json").read_text())["about"] == {"date": "2020"}, "one that is given stays"


def test_a_report_is_written_beside_its_place_and_one_that_cannot_be_leaves_the_old(tmp_path, monkeypatch):
    """When a file gets its name it is whole, and report.json, which says that all is there, gets it last."""
    renamed = []

    def rename(beside, path):
        renamed.append((beside.name, path.name, beside.read_text().endswith("}\n"), path.exists()))
        beside.rename(path)

    monkeypatch.setattr("src.run.storage.os.replace", rename)
    good = [group(0, episode("a", 1))]
    write_report(tmp_path, {"number": 1}, {}, good, good)
    names = ("completions.jsonl", "report.json")
    assert renamed == [(f"{name}.partial", name, True, False) for name in names]
    before = {path.name: path.read_text() for path in tmp_path.iterdir()}
    broken = [group(0, replace(good[0].episodes[0], reward_parts={"answer": object()}))]
    with pytest.raises(TypeError):
        write_report(tmp_path, {"number": 2}, {}, good, broken)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == before


def test_the_table_shows_the_first_completion_of_the_first_groups():
    groups = [group(index, episode(f"text {index}", index / 4), episode("hidden", 9)) for index in range(10)]
    table = completions_table(groups)
    assert table.count("\n") == 1 + 8 and "hidden" not in table
    assert "`prompt 7` | `text 7` | `1.75`" in table and "text 8" not in table
