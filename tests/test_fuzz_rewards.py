"""The short form of benchmarks/fuzz_rewards.py, and that it notices what it is there to notice."""

import json
import re
import time
from fractions import Fraction

import pytest

from benchmarks import fuzz_rewards
from benchmarks.fuzz_rewards import countdown_is_right, gsm8k_is_right, math_is_right, run_task
from src import rl_datasets
from src.tasks import Rewards, answers, expressions, grader, math_is_correct, mathematics, number_is_correct, numbers


@pytest.mark.parametrize("task", fuzz_rewards.TASKS)
def test_no_completion_breaks_or_fools_a_reward(task):
    result = run_task(task, seed=1, cases=3000, worker_cases=25)
    assert result["failures"] == 0, "\n".join(result["first_failures"])
    # it rewards what is right by construction, and some of what was damaged; most completions earn nothing
    assert 100 < result["right_by_construction"] < result["rewarded"] < 1200
    assert result["well_formed"] > 100 and 0 < result["slowest_ms"] < fuzz_rewards.SLOWEST_MS
    assert result["to_math_verify"] == (25 if task == "math" else 0)


@pytest.mark.parametrize("task", fuzz_rewards.TASKS)
@pytest.mark.parametrize("answer", [0.0, 1.0])
def test_a_reward_that_is_always_the_same_fails(monkeypatch, task, answer):
    monkeypatch.setattr(
        rl_datasets, "graded", lambda correct, text: {"reward": answer, "answer": answer, "format": 0.0}
    )
    monkeypatch.setattr(fuzz_rewards, "format_is_right", lambda text: False)
    monkeypatch.setattr(fuzz_rewards, "GRADE_SAMPLE", 0)
    reason = "a reward for a wrong answer" if answer else "no reward for a right answer"
    result = run_task(task, seed=0, cases=60, worker_cases=0)
    assert result["failures"] > 0 and all(reason in failure for failure in result["first_failures"])


def test_an_exception_and_a_slow_call_are_failures(monkeypatch):
    def wait(text):
        end = time.thread_time() + 0.06
        while time.thread_time() < end:
            pass

    monkeypatch.setattr(fuzz_rewards, "GRADE_SAMPLE", 0)
    monkeypatch.setattr(rl_datasets, "last_answer", wait)
    slow = run_task("countdown", seed=0, cases=2, worker_cases=0)
    assert slow["failures"] == 2 and slow["slowest_ms"] > 50 and "took 6" in slow["first_failures"][0]
    monkeypatch.setattr(rl_datasets, "last_answer", lambda text: 1 / 0)
    raised = run_task("countdown", seed=0, cases=2, worker_cases=0)
    assert raised["failures"] == 2 and "raised ZeroDivisionError" in raised["first_failures"][0]


def test_a_worker_that_is_slow_is_a_failure_and_all_answers_may_go_to_it(monkeypatch):
    spent = f"wrong {(fuzz_rewards.SLOWEST_WORKER_MS + 1) / 1000}"
    monkeypatch.setattr(fuzz_rewards, "GRADE_SAMPLE", 0)
    monkeypatch.setattr(grader, "read_line", lambda worker, seconds: spent)
    monkeypatch.setattr(mathematics, "ask_worker", lambda *given: grader.read_line(None, 1.0) == "right")
    result = run_task("math", seed=0, cases=200, worker_cases=None)
    assert result["to_math_verify"] == result["math_verify_over_50_ms"] > 10 and result["not_graded"] == 0
    assert result["slowest_math_verify_ms"] > 400 and "ms of the worker" in result["first_failures"][0]
    assert run_task("math", seed=0, cases=200, worker_cases=0)["not_graded"] > 10


def test_a_format_reward_for_another_format_and_a_wrong_sum_are_failures(monkeypatch):
    monkeypatch.setattr(fuzz_rewards, "GRADE_SAMPLE", 0)
    monkeypatch.setattr(answers, "has_think_answer_format", lambda text: "</answer>" in text)
    assert "wrong format" in run_task("gsm8k", 0, 30, 0)["first_failures"][0]
    monkeypatch.undo()
    monkeypatch.setattr(fuzz_rewards, "GRADE_SAMPLE", 0)
    monkeypatch.setattr(rl_datasets, "graded", lambda correct, text: {"reward": 0.5, "answer": 0.0, "format": 0.0})
    assert "wrong format or sum" in run_task("gsm8k", 0, 3, 0)["first_failures"][0]


def test_rewards_that_change_in_grade_are_failures(monkeypatch):
    honest = Rewards.grade
    monkeypatch.setattr(Rewards, "grade", lambda self, groups, zero_truncated: honest(self, groups))
    assert any("grade: case" in failure for failure in run_task("countdown", 0, 100, 0)["first_failures"])


@pytest.mark.parametrize(
    ("module", "name", "hole", "task"),
    [
        (numbers, "VALUE_WORDS", re.compile("(?!)"), "gsm8k"),
        (numbers, "has_foreign_digits", lambda text: False, "gsm8k"),
        (numbers, "value_of", lambda match: Fraction(match["top"] or match["decimal"].replace(",", "")), "gsm8k"),
        (mathematics, "words_of", lambda text: text[:6], "math"),
        (numbers, "POWER_OF_UNIT", re.compile(r"\^[0-9]"), "gsm8k"),
        (numbers, "PLAIN_PARTS", str.maketrans("½⅓⅔¼¾⅛", " " * 6), "gsm8k"),
        (mathematics, "PERCENT", re.compile("(?!)"), "math"),
        (expressions, "TOKENS", expressions.TOKENS | {",": "", ".": "", "#": ""}, "countdown"),
        (expressions, "TOKENS", expressions.TOKENS | {r"\approx": "="}, "countdown"),
        (expressions, "TOKENS", expressions.TOKENS | {"]": ")"}, "countdown"),
        (
            expressions,
            "without_box",
            lambda tokens: tokens[: tokens.index("=")] if "=" in tokens else tokens,
            "countdown",
        ),
    ],
)
def test_a_hole_in_the_grader_is_found(monkeypatch, module, name, hole, task):
    monkeypatch.setattr(fuzz_rewards, "GRADE_SAMPLE", 0)
    monkeypatch.setattr(module, name, hole)
    assert run_task(task, seed=0, cases=2000, worker_cases=0)["failures"] > 0


@pytest.mark.parametrize(
    ("expression", "right"),
    [("(4 - 1) * 5", True), ("05*(4-1)", True), ("5*4-5*1", False), ("5*(1-4)", False), ("5*(4-1)*1", False),
     ("-5*(1-4)", True), ("5(4-1)", False), ("15", False), ("5*(4-1)=15", True), ("5*(4-1)#", False),
     ("5**(4-1)", False), ("5//(4-1)", False), ("15 = 5x(4−1) = 15.", True), ("5*(4-1)=16", False),
     ("5*(4-1)=5*3=15", False), ("15=15", False), (r"$\boxed{5 \cdot \left[4-1\right]}$", True), ("5 x x (4-1)", False),
     (r"5\boxed{*(4-1)}", False), ("--5*(4-1)", False), ("-5*-{4-1}", True), ("5*(4-1]", False), ("5:(4-1)", False),
     (r"\frac{5}{1}*4 = 20", False), (r"\frac{5*{4-1}}{1}", False), ("5*(4-1)..", False), ("5*(4-1) = 1 5", False)],
)  # fmt: skip
def test_the_countdown_evaluator_by_hand(expression, right):
    assert (
        countdown_is_right(f"<answer>3</answer><answer>{expression}</answer>", {"nums": [1, 4, 5], "target": 15})
        is right
    )


@pytest.mark.parametrize(
    ("answer", "value"),
    [("1,234", 1234), ("$-1.50$ dollars", -1.5), ("x = 18", 18), ("3/4", 0.75), ("1 \\frac{3}{4} cups", 1.75),
     ("The answer is .5", 0.5), ("1e3", 1000), ("1 234", 1234), ("1½", None), ("1¾", 1.75), ("18 ft^2", 18),
     ("18^2", None),
     ("18 cm²", 18), ("18 of^2", None), ("1 234/2", None), ("½3", None), ("18\n123", None), ("18, 18", None),
     ("3 and 18", None), ("1,23", None),
     ("18 dozen", None), ("18 thousandths", None), ("18万", None), ("１８", None), ("18²", None), ("3 * 6", None),
     ("18*18", None), ("1/0", None), ("", None)],
)  # fmt: skip
def test_the_gsm8k_evaluator_by_hand(answer, value):
    values = [Fraction(number) for number in (-1.5, 0, 0.5, 0.75, 1, 1.75, 3, 18, 123, 1000, 1234)]
    assert [v for v in values if gsm8k_is_right(f"\\boxed{{{answer}}}", v)] == ([] if value is None else [value])


@pytest.mark.parametrize(
    ("answer", "truth", "right"),
    [("3+2x", "2x+3", True), ("2x-3", "2x+3", False), ("\\frac{2\\sqrt{3}}{4}", "\\frac{\\sqrt{3}}{2}", True),
     ("\\frac{2\\sqrt{3}}{3}", "\\frac{\\sqrt{3}}{2}", False), ("(x-2)(x+2)", "x^2-4", True), ("(1, 2)", "(1,2)", True),
     ("(2,1)", "(1,2)", False), ("EAST", "\\text{east}", True), ("seat", "\\text{east}", False),
     ("\\frac34", Fraction(3, 4), True), ("0.7", Fraction(3, 4), False), ("2^{3}", "2 \\cdot 4", True),
     ("((", "2", False),
     ("6'2", Fraction(62), False), ('6"2', Fraction(62), False), ("2x+'3", "2x+3", False), ('2x"+3', "2x+3", False),
     (r"\frac{x}6", r"\frac{x}{6}", True), (r"\frac x{{6}}", r"\frac{x}{6}", True), (r"\frac{x}7", r"\frac{x}6", False),
     ("1{,\n}510", Fraction(1510), True), ("((4,5))", "(4,5)", True), ("[(4,5)]", "(4,5)", True),
     ("(4,5]", "(4,5)", False), ("4,5", "(4,5)", False), ("2{3}", Fraction(6), False), ("2{3}", Fraction(23), True),
     ("3%", Fraction(3), False), ("3\\%", Fraction(3, 100), True), ("2*sqrt(3)", r"2\sqrt{3}", True),
     ("(1,2)", r"\{1,2\}", False),
     ("2, 1", r"\{1,2\}", True), (r"\{1,3\}", r"\{1,2\}", False), (r"x \in [0,1)", "[0,1)", True),
     ("(0,1)", "[0,1)", False),
     ("2x%", "2x", False), ("0 or 00", Fraction(0), True), ("0 or 1", Fraction(0), False), ("2*pi", r"2\pi", True),
     (r"0 \pm .0", Fraction(0), True), (r"5 \pm 1", Fraction(6), False), ("0.0.0", Fraction(0), False)],
)  # fmt: skip
def test_the_math_evaluator_by_hand(answer, truth, right):
    assert math_is_right(f"<answer>{answer}</answer>", truth) is right


@pytest.mark.parametrize(("failing", "code"), [(False, 0), (True, 1)])
def test_the_last_line_is_json_and_the_exit_code_tells(monkeypatch, capsys, failing, code):
    if failing:
        monkeypatch.setattr(rl_datasets, "last_answer", lambda text: 1 / 0)
        monkeypatch.setattr(fuzz_rewards, "GRADE_SAMPLE", 0)
    monkeypatch.setattr("sys.argv", ["fuzz_rewards", "--task", "countdown", "--cases", "40", "--seed", "5"])
    assert fuzz_rewards.main() == code
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["cases"] == result["tasks"]["countdown"]["cases"] == 40 and result["seed"] == 5
    assert result["failures"] == (40 if failing else 0)


def test_found_by_the_fuzz_a_scaled_number_is_not_the_number_nor_feet_and_inches_one():
    for answer in ("18 thousandths", "18 tenths", "18 tens", "triple 18", "root 18", "18万", "18 百"):
        assert not number_is_correct(answer, "18"), answer
    for answer in ("6'2", '6"2', "1'8\""):
        assert not math_is_correct(answer, "".join(filter(str.isdigit, answer))), answer


def test_a_case_can_be_repeated_by_its_number():
    cases = [fuzz_rewards.make_case("gsm8k", 3, index) for index in range(50)]
    assert fuzz_rewards.make_case("gsm8k", 3, 49) == cases[49]
    assert len({case.text for case in cases}) > 45
    assert fuzz_rewards.make_case("gsm8k", 4, 49) != cases[49]
