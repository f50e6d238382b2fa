"""rg: tasks with a package that has reasoning-gym's API and misbehaves; and the audit of the real one, if installed."""

import json
import sys

import pytest

from benchmarks import audit_reasoning_gym
from src.config import ConfigError, DataConfig
from src.rl_datasets import get_task
from src.tasks import grader, gym, gym_families, gym_items, load_eval_rows, load_train_rows
from src.tasks.gym_families import EXACT, EXPRESSION, FAMILIES, REFUSED, SCORER, Family

PACKAGE = """
import os, random, time
from dataclasses import dataclass
from reasoning_gym.factory import DATASETS, create_dataset, register

@dataclass
class Config:
    low: int = 0
    high: int = 999
    seed: int = 0
    size: int = 500
    def validate(self):
        assert self.high >= self.low, "high must be at least low"

class Sums:
    def __init__(self, config):
        self.config = config
    def __getitem__(self, index):
        number = random.Random(self.config.seed + index).randint(self.config.low, self.config.high)
        return {"question": f"{type(self).__name__}: {number} + {self.config.size} = {{}}", "answer": f"{number} , 1",
                "metadata": {"numbers": [number, 2], "target": number + 2, "valid_answers": ["Q _", "_ Q"]}}
    def score_answer(self, answer, entry):
        entry["metadata"]["numbers"].append(len(answer))
        if len(entry["metadata"]["numbers"]) != 3: return 0.5
        if answer == "hang":
            while True: pass
        if answer == "raise": raise ArithmeticError
        if answer == "exit": raise SystemExit
        if answer == "gone": os._exit(0)
        if answer == "print": print("right", flush=True)
        if answer == "memory": return len(bytearray(3 << 30)) and 1
        if answer == "deep": return self.score_answer(answer, entry)
        odd = {"text": "1.0", "none": None, "list": [1], "nan": float("nan"), "most": 0.99, "more": 1.01}
        return odd[answer] if answer in odd else float(answer == entry["answer"])

class Lists(Sums): pass

for name, kind in (("chain_sum", Lists), ("jugs", Sums), ("kakurasu", Sums), ("countdown", Sums), ("n_queens", Sums),
                   ("boxnet", Sums), ("unheard_of", Sums), ("composite", Sums), ("ab", Sums)):
    register(name, kind, Config)
"""
FACTORY = """
DATASETS = {}
def register(name, kind, config): DATASETS[name] = (kind, config)
def create_dataset(name, **given):
    config = DATASETS[name][1](**given)
    config.validate()
    return DATASETS[name][0](config)
"""


def forget_package() -> None:
    """What was imported of the package, and the worker that did."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "reasoning_gym"]:
        del sys.modules[name]
    gym_items.dataset_of.cache_clear()
    gym_items.entry_of.cache_clear()
    if gym.GYM.worker is not None:
        grader.stop_worker(gym.GYM.worker)
        gym.GYM.worker = None


@pytest.fixture(scope="module", autouse=True)
def no_worker_is_left():
    yield
    forget_package()


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A reasoning_gym of this file, here and in the worker process."""
    (tmp_path / "reasoning_gym").mkdir()
    (tmp_path / "reasoning_gym" / "__init__.py").write_text(PACKAGE)
    (tmp_path / "reasoning_gym" / "factory.py").write_text(FACTORY)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.syspath_prepend(str(tmp_path))
    forget_package()
    yield tmp_path
    forget_package()


def refused(name: str, **data) -> str:
    with pytest.raises(ConfigError) as error:
        get_task(name, DataConfig(**data)).load("test")
    assert "\n" not in str(error.value)
    return str(error.value)


def rewarded(task, row: dict, answer: str) -> float:
    return task.reward(f"<think> x </think> <answer> {answer} </answer>", row)["answer"]


# --- What is refused --------------------------------------------------------------------------------------------------


def test_a_missing_package_is_one_line_with_the_command(monkeypatch):
    forget_package()
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    assert "`uv run --with reasoning-gym==0.1.25 main.py ...`" in refused("rg:chain_sum")


@pytest.mark.parametrize(
    ("name", "rg", "fragment"),
    [
        ("rg:chainsum", None, "no family of reasoning-gym; did you mean chain_sum?"),
        ("rg:", None, "'' is no family of reasoning-gym; known are: ab, boxnet, chain_sum,"),
        ("rg:composite", None, "'composite' is no family"),
        ("rg:jugs+chainsum", None, "did you mean chain_sum?"),
        ("rg:jugs+jugs", None, "named twice"),
        ("rg:boxnet", None, "rg:boxnet: not to be graded safely: it gives no right answer"),
        ("rg:unheard_of", None, "rg:unheard_of: it is not of reasoning-gym 0.1.25"),
        ("rg:chain_sum", {"hihg": 3}, "data.rg: 'hihg' is no parameter of chain_sum; did you mean high?"),
        ("rg:chain_sum", {"seed": 3}, "'seed' is no parameter of chain_sum"),
        ("rg:chain_sum", {"high": -1}, "AssertionError: high must be at least low); change its parameters"),
        ("rg:chain_sum", {"high": "much"}, "TypeError"),
        ("rg:chain_sum+jugs", {"high": 3}, "{chain_sum: {...}}, not high: 3"),
        ("rg:chain_sum+jugs", {"ab": {}}, "not ab: {}"),
        ("rg:chain_sum+jugs", {"jugs": {"hihg": 3}}, "'hihg' is no parameter of jugs"),
        ("rg:chain_sum", {"low": 5, "high": 5}, "none of 12800 questions is for test; take parameters that allow more"),
    ],
)
def test_what_is_wrong_with_a_name_or_a_parameter_is_one_sentence(package, name, rg, fragment):
    assert fragment in refused(name, rg=rg)


def test_a_split_that_is_not_generated_is_refused(package):
    with pytest.raises(ConfigError, match="splits train, validation, test, not dev"):
        get_task("rg:chain_sum").load("dev")


def test_a_package_that_breaks_in_the_worker_stops_the_run_before_it_begins(package):
    task = get_task("rg:jugs", DataConfig(eval_size=1))
    (package / "reasoning_gym" / "__init__.py").write_text("raise ImportError('no such luck')")
    with pytest.raises(ConfigError, match=r"reasoning-gym.*no such luck"):
        task.load("test")


# --- Rows -------------------------------------------------------------------------------------------------------------


def rows_of(name: str = "rg:chain_sum", **data) -> dict[str, list[dict]]:
    task = get_task(name, DataConfig(**{"train_size": 300, "eval_size": 30} | data))
    return {split: task.load(split) for split in ("validation", "train", "test")}


@pytest.mark.parametrize(("high", "train_size"), [(999, 300), (200, 300), (10**9, 12_000)])
def test_no_problem_and_no_question_is_in_two_splits(package, high, train_size):
    rows = rows_of(train_size=train_size, rg={"high": high})
    assert len(rows["train"]) == train_size and (high == 200 or len(rows["test"]) == len(rows["validation"]) == 30)
    for key in ("item", "question"):
        found = [{row[key] for row in rows[split]} for split in rows]
        assert len(set.union(*found)) == sum(map(len, found))
    for split in ("test", "validation"):
        assert len({row["question"] for row in rows[split]}) == len(rows[split]) >= 5
    if high == 10**9:  # beyond the first 10,000 items too
        assert len({row["question"] for row in rows["train"]}) == train_size


def test_rows_are_those_of_the_seed_whatever_is_loaded_first_and_how_much(package):
    rows, more = rows_of(), rows_of(train_size=500, eval_size=50)
    assert rows == rows_of() and all(more[split][: len(rows[split])] == rows[split] for split in rows)
    alone = get_task("rg:chain_sum", DataConfig(train_size=300, eval_size=30))
    assert load_eval_rows(alone) == rows["test"] and load_train_rows(alone) == rows["train"]
    other = rows_of(seed=1, rg={"high": 10**9}), rows_of(rg={"high": 10**9})
    assert not {row["question"] for row in other[0]["train"]} & {row["question"] for row in other[1]["train"]}


def test_a_size_of_its_own_is_never_given_to_the_package(package):
    assert {row["question"].split(" + ")[1] for row in rows_of(train_size=12_000)["train"]} == {"10000 = {}"}


def test_a_problem_that_cannot_be_made_is_left_out_and_so_is_one_with_an_empty_answer(package):
    path = package / "reasoning_gym" / "__init__.py"
    broken = "if (self.config.seed + index) % 7 == 3: raise RuntimeError('gave up')"
    text = PACKAGE.replace("        number = random", f"        {broken}\n        number = random")
    path.write_text(text.replace('f"{number} , 1"', '"" if index % 7 == 4 else "1"'))
    rows = rows_of(rg={"high": 10**9})
    assert {row["item"] % 7 for split in rows for row in rows[split]} == {0, 1, 2, 5, 6}


def test_a_space_with_few_questions_says_how_many_there_are(package, caplog):
    with caplog.at_level("WARNING", "grpo"):
        rows = rows_of(rg={"high": 99})
    assert 3 <= len(rows["test"]) <= 25 and f"test has {len(rows['test'])} problems, not 30" in caplog.text
    assert len(rows["train"]) == 300, "training repeats questions"


def test_a_mixture_takes_turns_and_gives_each_its_parameters(package):
    rows = rows_of("rg:chain_sum+jugs", rg={"jugs": {"low": 10**6, "high": 10**9}})["train"]
    assert {row["item"] % 2: row["family"] for row in rows} == {0: "chain_sum", 1: "jugs"}
    numbers = {
        family: [int(r["question"].split()[1]) for r in rows if r["family"] == family]
        for family in ("chain_sum", "jugs")
    }
    assert max(numbers["chain_sum"]) <= 999 and min(numbers["jugs"]) >= 10**6
    assert 100 < len(numbers["jugs"]) < 200


def test_the_prompt_is_the_question_and_the_format(package):
    task = get_task("rg:chain_sum", DataConfig(eval_size=1))
    [row] = task.load("test")
    _, user = task.messages(row)
    assert user["content"].startswith(row["question"] + "\n\nWork it out in <think> </think> tags.")
    assert "<answer> </answer>" in user["content"] and task.response_prefix.endswith("<think>")


# --- Grading ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("answer", ["hang", "raise", "exit", "gone", "print", "memory", "deep", "text", "none", "list",
                                    "nan", "most", "more"])  # fmt: skip
def test_whatever_a_scorer_does_the_answer_is_wrong_and_the_next_one_is_graded(package, answer):
    task = get_task("rg:jugs", DataConfig(eval_size=1))
    [row] = task.load("test")
    right, worker = gym_items.entry_of(*task.item_of(row))["answer"], gym.GYM.worker
    assert "answers" not in row and [rewarded(task, row, text) for text in (right, answer, right)] == [1, 0, 1]
    assert (gym.GYM.worker is worker) is (answer not in ("exit", "gone")), "of processor time, not by the clock"


def test_only_the_final_answer_reaches_a_scorer_trimmed_and_of_its_shape(package, monkeypatch):
    asked = []
    monkeypatch.setattr(gym.GYM, "ask", lambda request, seconds: asked.append(request[-1]) or True)
    task = get_task("rg:kakurasu+jugs", DataConfig(eval_size=2))
    rows = task.load("train")
    kakurasu, jugs = (next(row for row in rows if row["family"] == family) for family in ("kakurasu", "jugs"))
    asked.clear()
    for answer in ("1 0", "1 0 or not", "１ 0", ""):
        rewarded(task, kakurasu, answer)
    for text in ("no answer", "<answer>first</answer><answer> \\boxed{ last } </answer>", "<answer>٣</answer>"):
        task.reward(text, jugs)
    assert asked == ["1 0", "last"]


def test_an_answer_too_long_for_the_pipe_is_wrong_and_not_sent(package, monkeypatch):
    task = get_task("rg:jugs", DataConfig(eval_size=1))
    [row] = task.load("test")
    monkeypatch.setattr(grader, "read_line", lambda *_: pytest.fail("it was sent"))
    assert rewarded(task, row, "x" * 90_000) == 0 and rewarded(task, row, "\U0001f600" * 9_000) == 0


def test_one_text_is_right_and_white_space_that_parts_nothing_does_not_count(package):
    task = get_task("rg:ab", DataConfig(eval_size=1))
    [row] = task.load("test")
    number = row["answers"][0].split()[0]
    assert all(rewarded(task, row, text) for text in (f"{number} , 1", f"{number},1", f" {number} ,\n 1"))
    wrong = (f"{number},1 or not", f"{number},1 {number},1", f"{number}1", f"{number} 1", f"{number},01", "")
    assert not any(rewarded(task, row, text) for text in wrong)
    assert task.answer_of(f"<answer>{number} ,\n 1</answer>") == f"{number},1" and task.answer_of("none") is None


@pytest.mark.parametrize(
    ("how", "right", "same", "other"),
    [
        ("exact but for case", "Blue", "bLUE", "blu"),
        ("number", "1000", "$1,000.00", "1000 or 7"),
        ("exact", "[1, 2]", "[1,2]", "[1, 2"),
        ("exact", "1 2\n3 4", "1 2 3 4", "12 34"),
    ],
)
def test_spellings(how, right, same, other):
    assert gym.spelling(how, right) == gym.spelling(how, same) != gym.spelling(how, other)


def test_our_evaluator_grades_expressions_and_any_listed_board_is_right(package):
    task = get_task("rg:countdown+n_queens", DataConfig(train_size=20))
    sums, boards = ([row for row in task.load("train") if row["family"] == name] for name in ("countdown", "n_queens"))
    number = sums[0]["numbers"][0]
    assert [rewarded(task, sums[0], text) for text in (f"2 + {number}", f"{number} + 1 + 1", "9**9**9")] == [1, 0, 0]
    assert [rewarded(task, boards[0], text) for text in ("_ Q", "Q _", "Q Q", "'Q _'", "Q _ Q _")] == [1, 1, 0, 0, 0]
    assert get_task("rg:countdown").answer_of("<answer>( 1+2 )</answer>") == "(1+2)"


def test_the_reward_is_one_and_a_tenth_for_the_format(package):
    task = get_task("rg:ab", DataConfig(eval_size=1))
    [row] = task.load("test")
    right = row["answers"][0]
    assert task.reward(f"x</think><answer>{right}</answer>", row) == {"reward": 1.1, "answer": 1.0, "format": 1.0}
    assert task.reward(f"\\boxed{{{right}}}", row) == {"reward": 1.0, "answer": 1.0, "format": 0.0}


# --- The table, and the package itself --------------------------------------------------------------------------------


def test_every_family_of_the_table_has_a_known_way_and_a_reason():
    hows = {EXACT, EXPRESSION, REFUSED, SCORER, gym_families.CASELESS, gym_families.NUMBER}
    assert len(FAMILIES) == 105 and {family.how for family in FAMILIES.values()} == hows
    assert all(family.why for family in FAMILIES.values())


def test_the_audit_finds_a_scorer_that_pays_too_much_and_an_answer_that_is_not_paid(package, monkeypatch):
    assert audit_reasoning_gym.audit(["ab", "boxnet"], [0], 2)[0].failures == []
    monkeypatch.setitem(FAMILIES, "ab", Family(SCORER, "for this test"))
    path = package / "reasoning_gym" / "__init__.py"
    path.write_text(
        PACKAGE.replace("float(answer ==", "float(answer in (entry['answer'] + ' or maybe not') or answer ==")
    )
    [found] = audit_reasoning_gym.audit(["ab"], [0], 2)
    assert len(found.failures) == 2 and all("or earned 1" in failure for failure in found.failures)
    forget_package()
    path.write_text(PACKAGE.replace("float(answer ==", "0.9 * float(answer =="))
    [found] = audit_reasoning_gym.audit(["ab"], [0], 2)
    assert [failure.partition(": ")[2].partition(" in ")[0] for failure in found.failures] == ["right earned 0"] * 2


def test_the_audit_of_the_installed_package(monkeypatch, capsys):
    pytest.importorskip("reasoning_gym", reason="reasoning-gym is not installed: uv run --with reasoning-gym==0.1.25")
    monkeypatch.setattr(sys, "argv", ["audit", "--items", "1", "--seeds", "0"])
    assert audit_reasoning_gym.main() == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["families"] == len(FAMILIES) and result["failures"] == [] and result["wrong"] > 3000


def test_a_worker_reserves_no_memory_for_each_processor(monkeypatch):
    """OpenBLAS takes 40 MB of address space for each of them, and a worker has 2 GiB."""
    found = []

    class Started(Exception):
        pass

    def worker(*arguments, env, **options):
        found.append(env)
        raise Started

    monkeypatch.setattr(grader, "Worker", worker)
    with pytest.raises(Started):
        grader.start_worker("src.tasks.gym_items", "{}")
    assert {found[0][f"{name}_NUM_THREADS"] for name in ("OPENBLAS", "OMP", "MKL")} == {"1"}
