"""Audit: no family of reasoning-gym that is graded pays a wrong or hostile answer, and each pays its right ones.

    uv run --with reasoning-gym==0.1.25 python -m benchmarks.audit_reasoning_gym       # minutes on one core
    uv run --with reasoning-gym==0.1.25 python -m benchmarks.audit_reasoning_gym --families chain_sum jugs --items 1

For every family that src/tasks/gym_families.py does not refuse: the right answers of several items and seeds earn 1.
Answers that are wrong whatever the question is, or are made wrong from the right one, earn 0 by the task's own reward,
each in at most 50 ms or the worker's limit. Nothing is executed. Two processes make the same questions. Where several
answers are right, one of another item may be as well: those are counted and not judged. The last line of stdout is one
JSON document; the exit code is 1 if anything failed.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from importlib.metadata import version

from src.config import DataConfig
from src.tasks import ReasoningGym, grader
from src.tasks.gym import known_families, spelling
from src.tasks.gym_families import FAMILIES, REFUSED, SCORER, Family
from src.tasks.gym_items import entry_of

SLOWEST_MS = 50.0
SLOWEST_WORKER_MS = 1000 * grader.WORKER_SECONDS + 50
SEEDS, ITEMS = [0, 1, 2], 3
COMPARED = 10  # questions of each seed that two processes make
EXAMPLES = ("example_answer", "example_correct_answer", "possible_answer")  # of families whose answer is None
FULL_WIDTH = {digit + 48: digit + 0xFF10 for digit in range(10)}


@dataclass
class Outcome:
    """What the audit found in one family."""

    family: str
    how: str
    why: str
    right: int = 0  # right answers that earned 1
    wrong: int = 0  # wrong ones that earned 0
    others_paid: int = 0  # answers of other items that a scorer of many right answers paid
    slowest_ms: float = 0.0
    failures: list[str] = field(default_factory=list)


def right_answer(entry: dict) -> str | None:
    """An answer that the item itself says is right."""
    answer = entry["answer"]
    if answer is None:
        answer = next((entry["metadata"][key] for key in EXAMPLES if key in entry["metadata"]), None)
    return answer if answer is None or isinstance(answer, str) else json.dumps(answer)


def hostile_answers(right: str, touched: str) -> dict[str, str]:
    """Wrong answers by name. Those made from the right one say more, or something else."""
    command = f'__import__("os").system("touch {touched}")'
    foreign = right.translate(FULL_WIDTH)
    return {
        "empty": "", "blanks": " \n\t ", "prose": "I do not know the answer.", "or": f"{right} or maybe not",
        "and": f"{right} and 7", "twice": f"{right} {right}", "two lines": f"{right}\nor else\n{right} 7",
        "choice": f"either {right} or not {right}", "comment": f"{right} # or not", "denied": f"not {right}",
        "digits": foreign if foreign != right else "１２３", "tower": "9**9**9", "tower in it": f"{right} + 9**9**9",
        "factorial": "factorial(10**9)", "import": command, "list": f"[{command}]", "lambda": f"(lambda: {command})()",
        "format": "{0.__class__.__mro__}", "exit": "exit()", "huge number": "9" * 100_000, "long": "A" * 100_000,
        "long prose": "maybe " * 15_000, "right and long": right + " and" * 25_000, "brackets": "[" * 100_000,
        "braces": '{"a":' * 20_000, "deep": "[" * 5000 + "]" * 5000, "sum": "(" * 5000 + "1" + ")" * 5000,
        "nan": "NaN", "minus nan": "-nan", "nan pair": "nan + nani", "inf": "Infinity", "exponent": "1e999999999",
        "zero byte": "\x00", "half pair": "\ud800", "lines": "\n7" * 20_000, "none": "None",
        "moves": "LRUD" * 20_000, "json": "{}", "odd json": '{"0": NaN}', "letters": "A=1,A=2,B=" + "9" * 5000,
    }  # fmt: skip


def questions_elsewhere(families: list[str], seeds: list[int], items: int, hash_seed: str) -> dict[str, list[str]]:
    """The questions that another process makes, whose sets and dicts have another order."""
    code = (
        "import sys, json; from src.config import DataConfig; from src.tasks import ReasoningGym; made = {}\n"
        "families, seeds, size = json.loads(sys.argv[1])\n"
        "for name in families:\n"
        "    tasks = [ReasoningGym(f'rg:{name}', DataConfig(seed=seed, train_size=size)) for seed in seeds]\n"
        "    made[name] = [row['question'] for task in tasks for row in task.load('train')]\n"
        "print('\\n' + json.dumps(made))"  # on a line of its own: some families print while they make items
    )
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps([families, seeds, items])],
        env=os.environ | {"PYTHONHASHSEED": hash_seed},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


def timed(task: ReasoningGym, answer: str, row: dict) -> tuple[float, float]:
    """What an answer earns, and the milliseconds it took: by the clock where the worker grades, else of this thread."""
    clock = (
        time.perf_counter if FAMILIES[row["family"]].how == SCORER else time.thread_time
    )  # other processes take none
    begin = clock()
    earned = task.reward(f"<think>x</think><answer>{answer}</answer>", row)["answer"]
    return earned, 1000 * (clock() - begin)


def audit_item(task: ReasoningGym, row: dict, right: str, others: dict[str, str], found: Outcome, touched: str) -> None:
    """The right answer of an item, the hostile ones, and those of other items."""
    has_many = found.how == SCORER
    limit = SLOWEST_WORKER_MS if has_many else SLOWEST_MS
    timed(task, right, row)  # makes the item in the worker, on nobody's account
    for name, answer in ({"right": right} | hostile_answers(right, touched) | others).items():
        earned, milliseconds = timed(task, answer, row)
        found.slowest_ms = max(found.slowest_ms, milliseconds)
        found.right += name == "right" and earned == 1
        found.wrong += name != "right" and earned == 0
        found.others_paid += name in others and earned == 1
        may_earn = name == "right" or (name in others and has_many)
        if (earned and not may_earn) or (name == "right" and not earned) or milliseconds > limit:
            place = f"seed {task.data.seed} item {row['item']}"
            found.failures.append(f"{place}: {name} earned {earned:g} in {milliseconds:.0f} ms")


def audit_family(family: str, seeds: list[int], items: int, touched: str) -> Outcome:
    """Some items of a family."""
    known = FAMILIES.get(family, Family(REFUSED, "it is not in the table"))
    found = Outcome(family, known.how, known.why)
    for seed in seeds if known.how != REFUSED else ():
        task = ReasoningGym(f"rg:{family}", DataConfig(seed=seed, eval_size=items))
        rows = task.load("test")
        rights = [right_answer(entry_of(*task.item_of(row))) for row in rows]
        for row, right in zip(rows, rights, strict=True):
            if right is None:
                found.failures.append(f"seed {seed} item {row['item']}: it has no right answer")
                continue
            said = spelling(known.how, right)
            differing = [other for other in rights if other and spelling(known.how, other) != said]
            others = {f"other {number}": other for number, other in enumerate(differing)}
            audit_item(task, row, right, others, found, touched)
            if os.path.exists(touched):
                os.remove(touched)
                found.failures.append(f"seed {seed} item {row['item']}: an answer was executed")
    return found


def audit(families: list[str], seeds: list[int], items: int) -> list[Outcome]:
    """The outcome of every family."""
    graded = [family for family in families if FAMILIES.get(family, Family(REFUSED, "")).how != REFUSED]
    made, made_again = (questions_elsewhere(graded, seeds, COMPARED, hash_seed) for hash_seed in ("1", "2"))
    with tempfile.TemporaryDirectory() as folder:
        outcomes = [audit_family(family, seeds, items, f"{folder}/touched") for family in families]
    for found in outcomes:
        if made.get(found.family) != made_again.get(found.family):
            found.failures.append("two processes make different questions")
    return outcomes


def table(outcomes: list[Outcome]) -> str:
    """The outcomes as Markdown."""
    lines = ["| family | graded | why | right paid | wrong refused | others paid | slowest ms |", "|" + "---|" * 7]
    for found in outcomes:
        counts = (
            ["", "", "", ""]
            if found.how == REFUSED
            else [str(found.right), str(found.wrong), str(found.others_paid), f"{found.slowest_ms:.1f}"]
        )
        lines.append(f"| `{found.family}` | {found.how} | {found.why} | {' | '.join(counts)} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", nargs="+", metavar="FAMILY", help="only these")
    parser.add_argument("--items", type=int, default=ITEMS, help="of each seed")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    arguments = parser.parse_args()
    begin, installed = time.monotonic(), known_families()
    outcomes = audit(arguments.families or sorted(installed), arguments.seeds, arguments.items)
    print(table(outcomes))
    failures = [f"{found.family}: {failure}" for found in outcomes for failure in found.failures]
    failures += [f"{name}: in the table and not installed" for name in FAMILIES if name not in installed]
    failures += [f"{name}: installed and not in the table" for name in installed if name not in FAMILIES]
    print(*failures, sep="\n")
    counts = {how: sum(found.how == how for found in outcomes) for how in dict.fromkeys(f.how for f in outcomes)}
    seconds = round(time.monotonic() - begin, 1)
    result = {"benchmark": "audit_reasoning_gym", "version": version("reasoning-gym"), "families": len(outcomes),
              "graded": counts, "right": sum(found.right for found in outcomes),
              "wrong": sum(found.wrong for found in outcomes), "failures": failures,
              "seconds": seconds, "outcomes": [asdict(found) for found in outcomes]}  # fmt: skip
    print(json.dumps(result))
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
