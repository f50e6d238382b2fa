"""Where the penalties differ: accuracy against coverage, forgetting and distance, a line a method over its strength.

    uv run python -m benchmarks.frontier                   # 34 points x 3 seeds, about two hours on 2 cores
    uv run python -m benchmarks.frontier --seeds 5 --lines none kl "kl forward" k3 ot maxent       # an hour; more seeds
    uv run python -m benchmarks.frontier --quick           # 3 points, 1 seed, 2 steps: only shows that it runs
    uv run python -m benchmarks.frontier --show benchmarks/frontier.jsonl     # the tables of what is committed

models/turns-tiny knows three tasks; it is trained on Countdown alone, until plain policy gradient has sharpened so far
that 64 samples solve fewer problems than those of the base. Then, on problems of `test` (settings were chosen on
`validation`): accuracy, how many different right expressions 64 samples find (coverage), the KL to the base in both
directions, and by how much the base's own answers to the two other tasks became less likely (forgetting). `none` is the
line of a run that is stopped earlier: a penalty is worth something where it lies above that.

Every finished run is a line of the results file. Stopped anywhere, the same command goes on; a changed setting is
another point. The last line of stdout is one JSON document.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import time
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import is_dataclass, replace
from pathlib import Path
from statistics import mean, stdev

import numpy as np
from scipy.stats import t as student

PROJECT = Path(__file__).resolve().parent.parent
CONFIG = PROJECT / "benchmarks" / "frontier.yaml"
BASE = "models/turns-tiny"
OTHERS = ("calculator", "higher_lower")  # what the base knows beside Countdown
PROBLEMS, SAMPLES, SCORED = 256, 64, 4  # of `test`; completions of each; of them those whose KL is taken
AXES = {  # metric -> its name, and how it is printed
    "pass@1": ("sampled", "{:.1%}"),
    "greedy": ("greedy", "{:.1%}"),
    "pass@8": ("pass@8", "{:.1%}"),
    "pass@64": ("pass@64", "{:.1%}"),
    "coverage": ("coverage", "{:.2f}"),
    "kl": ("KL(policy, base)", "{:.3f}"),
    "kl_forward": ("KL(base, policy)", "{:.3f}"),
    "forgetting": ("forgetting, nats a token", "{:.4f}"),
    "entropy": ("entropy", "{:.3f}"),
}


def strengths(key: str, values: tuple, **fixed) -> dict[str, dict]:
    """Points of a line: the settings of each by its label."""
    return {f"{key} {value}": fixed | {key: value} for value in values}


LINES: dict[str, dict[str, dict]] = {
    "none": strengths("max_steps", (15, 30, 60, 120), loss_type="none"),
    "kl": strengths("beta", (0.03, 0.1, 0.3, 1.0), loss_type="kl"),
    "kl forward": strengths("beta", (0.03, 0.1, 0.3, 1.0), loss_type="kl", kl_direction="forward"),
    "k3": strengths("beta", (0.1, 1.0), loss_type="approx_kl"),
    "k2": strengths("beta", (0.1, 1.0), loss_type="approx_kl", kl_estimator="k2"),
    "k1 as a loss": strengths("beta", (0.1,), loss_type="approx_kl", kl_estimator="k1"),
    "kl in reward": strengths("beta", (0.03, 0.1), loss_type="kl_in_reward"),
    "ot": strengths("beta", (0.1, 0.5, 2.0), loss_type="ot", ot_window=8),
    "ot window 16": strengths("beta", (0.5,), loss_type="ot", ot_window=16),
    "ot target": strengths("ot_target", (0.02,), loss_type="ot", ot_window=8, beta=2.0),
    "maxent": strengths("tau", (0.0, 0.01, 0.05, 0.1, 0.25), loss_type="maxent", q_temperature=4.0),
    "listwise": strengths("q_temperature", (0.1, 1.0), loss_type="listwise_kl"),
    "entropy bonus": strengths("entropy_coef", (0.01, 0.03), loss_type="none"),
    "entropy target": strengths("entropy_target", (0.12,), loss_type="none"),
}  # fmt: skip
DRAWN = ("none", "kl", "kl forward", "k3", "ot", "maxent", "listwise", "entropy bonus", "entropy target")
QUICK = ("none", "kl", "maxent")
COMPARED = (("kl forward", "kl"), ("ot", "kl"), ("k3", "kl"), ("maxent", "kl"))  # beside each and `none`


# ---------------------------------------------------------------------------------------------------------------------
# One run
# ---------------------------------------------------------------------------------------------------------------------


def settings_of(point: dict, seed: int, problems: int) -> dict:
    """What is given for a run; with an empty point for the base, which is only measured."""
    return {"training": point | {"random_seed": seed}, "problems": problems, "samples": SAMPLES}


def config_of(settings: dict):
    """The config of a run."""
    from src.config import load_config

    overrides = [f"training.{name}={value}" for name, value in settings["training"].items()]
    return load_config(CONFIG, overrides)


def given_in(config) -> dict[str, dict]:
    """What differs from the defaults, by section."""
    return {
        section: {name: value for name, value in vars(part).items() if value != getattr(type(part)(), name)}
        for section, part in vars(config).items()
        if is_dataclass(part)
    }


def fingerprint(settings: dict) -> str:
    """A name for a run that changes with every value that is given, here and in its config file.

    Not with defaults of src/config.py, the base's weights and the code: after changing those name another results file.
    """
    given = given_in(config_of(settings))
    return hashlib.sha256(json.dumps([settings, given], sort_keys=True).encode()).hexdigest()[:12]


def load(model: str | Path, task: str, problems: int):
    """A model with the problems of a task, ready to sample."""
    from src.config import load_config
    from src.prepare import prepare

    config = CONFIG if task == "countdown" else PROJECT / "examples" / f"{task}.yaml"
    run = prepare(
        load_config(config, [f"model.pretrained_model_path={model}", f"data.eval_size={problems}"]), task,
        for_training=False,
    )  # fmt: skip
    run.engine.begin(1)
    return run


def distance(groups, others) -> float:
    """Mean over tokens of the log-prob that groups were sampled with, minus that of another model."""
    ours = [value for group in groups for episode in group.episodes for value in episode.logprobs]
    theirs = [value for group in others for episode in group.episodes for value in episode.old_logprobs]
    return mean(ours) - mean(theirs)


def different_answers(task, group) -> int:
    """How many different right answers a group has."""
    from src.tasks import answers_of, solved

    return len(set(answers_of(task, [episode.text for episode in group.episodes if solved(episode)])))


def measure(model: str | Path, problems: int, samples: int) -> dict[str, float]:
    """Everything that a trained model is compared by."""
    policy, base = load(model, "countdown", problems), load(BASE, "countdown", problems)
    greedy = policy.sample(policy.eval_problems, 1, stream=-1, temperature=0.0)
    sampled = policy.sample(policy.eval_problems, samples, stream=-1)
    metrics = {name.removeprefix("eval/"): value for name, value in policy.summarize(greedy, sampled).items()}
    metrics["coverage"] = mean(different_answers(policy.task, group) for group in sampled)
    few = [replace(group, episodes=group.episodes[:SCORED]) for group in sampled]
    metrics["kl"] = distance(few, base.engine.score(few))
    metrics["entropy"] = mean(h for g in policy.engine.score(few) for e in g.episodes for h in e.entropies)
    theirs = base.sample(base.eval_problems, min(samples, SCORED), stream=-2)
    metrics["kl_forward"] = distance(theirs, policy.engine.score(theirs))
    lost = []
    for task in OTHERS:
        then, now = load(BASE, task, problems // 2), load(model, task, problems // 2)
        theirs = then.sample(then.eval_problems, min(samples, SCORED), stream=-2)
        lost.append(distance(theirs, now.engine.score(theirs)))
        found = now.summarize([], now.sample(now.eval_problems, min(samples, SCORED), stream=-2))
        metrics[f"{task}/pass@1"] = found["eval/pass@1"]
    metrics["forgetting"] = mean(lost)
    return metrics


def run_alone(settings: dict, folder: Path) -> dict[str, float]:
    """Train and measure, in this process; without a loss the base itself."""
    from src.train_grpo import run_training

    if "loss_type" not in settings["training"]:
        return measure(BASE, settings["problems"], settings["samples"])
    run_training(config_of(settings), "countdown", str(folder))
    return measure(folder / "runs" / "frontier_countdown" / "final", settings["problems"], settings["samples"])


# ---------------------------------------------------------------------------------------------------------------------
# All of them
# ---------------------------------------------------------------------------------------------------------------------


def read_results(file: Path) -> dict[str, dict]:
    """The finished runs by fingerprint; a line cut off by a stop does not count."""
    found = {}
    for line in file.read_text(encoding="utf-8").splitlines() if file.is_file() else ():
        try:
            row = json.loads(line)
            found[row["run"]] = row
        except (ValueError, KeyError, TypeError):
            continue
    return found


def read_lines(file: str | Path, problems: int = PROBLEMS) -> tuple[dict, dict[str, dict[str, list[dict]]]]:
    """What a results file has of the base and of the points of LINES, of all seeds; nothing where there is none."""
    rows = list(read_results(Path(file)).values())
    base = next((row["metrics"] for row in rows if row["settings"] == settings_of({}, 0, problems)), {})
    points = {(line, label): point for line, points in LINES.items() for label, point in points.items()}
    return base, by_point([
        row for row in rows
        if row["settings"] == settings_of(points.get((row["line"], row["point"]), {}), row["seed"], problems)
    ])  # fmt: skip


def append(row: dict, file: Path) -> None:
    """A line of the results; one that a stop has cut off stays a line of its own."""
    cut = file.is_file() and not file.read_bytes().endswith(b"\n")
    with file.open("a", encoding="utf-8") as lines:
        lines.write("\n" * cut + json.dumps(row) + "\n")


def run_apart(module: str, words: list[str], folder: Path, threads: int, what: str) -> dict:
    """What --alone of a benchmark writes to found.json in this folder, in a process of its own; the log is there."""
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", f"benchmarks.{module}", *words, str(folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    with (folder / "log").open("a") as log:
        code = subprocess.run(command, cwd=PROJECT, env=environment, stdout=log, stderr=log).returncode
    if code:
        raise SystemExit(f"{what} ended with {code}; see {folder / 'log'}; the same command goes on")
    return json.loads((folder / "found.json").read_text())


def take(line: str, label: str, settings: dict, results: Path) -> dict:
    """One run, and its line in the results file."""
    name = fingerprint(settings)
    words = ["--alone", json.dumps(settings)]
    metrics = run_apart("frontier", words, results.parent / "frontier" / name, 1, f"{line}, {label},")
    row = {"run": name, "line": line, "point": label, "seed": settings["training"]["random_seed"],
           "settings": settings, "metrics": metrics}  # fmt: skip
    append(row, results)
    print(f"{line}, {label}, seed {row['seed']}: {row['metrics']['pass@1']:.1%}", file=sys.stderr)
    return row


def interval(values: list[float]) -> tuple[float, float]:
    """Mean over two seeds or more, and half the width of its 95% interval (Student's t)."""
    return mean(values), float(student.ppf(0.975, len(values) - 1)) * stdev(values) / len(values) ** 0.5


def by_point(rows: list[dict]) -> dict[str, dict[str, list[dict]]]:
    """Line -> point -> its runs, in the order of LINES and of the seeds."""
    found: dict[str, dict[str, list[dict]]] = {}
    for line, points in LINES.items():
        for label in points:
            runs = [row for row in rows if (row["line"], row["point"]) == (line, label)]
            if runs:
                found.setdefault(line, {})[label] = sorted(runs, key=lambda row: row["seed"])
    return found


def curve(points: dict[str, list[dict]], seed: int, axis: str) -> tuple[list[float], list[float]]:
    """Accuracy and another metric of the points of a line that this seed has, by accuracy."""
    runs = [row["metrics"] for rows in points.values() for row in rows if row["seed"] == seed]
    pairs = sorted((run["pass@1"], run[axis]) for run in runs)
    return [x for x, _ in pairs], [y for _, y in pairs]


def gap(points: dict[str, list[dict]], others: dict[str, list[dict]], axis: str) -> list[float]:
    """By how much a line is above another at equal accuracy, of each seed: the mean over its points.

    The other is a line between its points, and level beyond its most accurate one; below its least accurate one there
    is nothing to compare.
    """
    found = []
    for seed in sorted({row["seed"] for rows in points.values() for row in rows}):
        (x, y), (other_x, other_y) = (curve(line, seed, axis) for line in (points, others))
        if other_x:
            above = [b - np.interp(a, other_x, other_y) for a, b in zip(x, y, strict=True) if a >= other_x[0]]
            found += [float(np.mean(above))] if above else []
    return found


def statements(lines: dict[str, dict[str, list[dict]]], base: dict) -> list[dict]:
    """Each line against another at equal accuracy, and maxent's tau against tau 0 with the same seeds."""
    found: list[dict] = []
    seeds = {row["seed"] for points in lines.values() for rows in points.values() for row in rows}
    others = {name: lines[name] for name in ("none", "kl") if name in lines}
    if "none" in others:  # stopped before its first step it is the base
        others["none"] = others["none"] | {"base": [{"seed": seed, "metrics": base} for seed in seeds]}
    for name, other in [(name, "none") for name in lines if name != "none"] + list(COMPARED):
        for axis in ("coverage", "pass@64", "pass@8", "kl", "kl_forward", "forgetting"):
            gaps = gap(lines[name], others[other], axis) if name in lines and other in others else []
            if len(gaps) > 1:
                value, half = interval(gaps)
                found.append({"line": name, "against": other, "axis": axis, "difference": value, "half": half,
                              "seeds": len(gaps)})  # fmt: skip
    plain = lines.get("maxent", {}).get("tau 0.0", [])
    for label, rows in lines.get("maxent", {}).items():
        for axis in ("pass@1", "pass@8", "pass@64", "coverage"):
            gaps = [row["metrics"][axis] - zero["metrics"][axis] for row in rows for zero in plain
                    if row["seed"] == zero["seed"]]  # fmt: skip
            if rows is not plain and len(gaps) > 1:
                value, half = interval(gaps)
                found.append({"line": f"maxent {label}", "against": "tau 0.0", "axis": axis, "difference": value,
                              "half": half, "seeds": len(gaps)})  # fmt: skip
    return found


def table(lines: dict[str, dict[str, list[dict]]]) -> str:
    """Markdown: mean and standard deviation over the seeds of every point."""
    rows = ["| line | point | seeds | " + " | ".join(title for title, _ in AXES.values()) + " |"]
    rows.append("|" + "---|" * (len(AXES) + 3))
    for line, points in lines.items():
        for label, runs in points.items():
            cells = []
            for axis, (_, form) in AXES.items():
                values = [run["metrics"][axis] for run in runs]
                spread = f" ± {form.format(stdev(values))}" if len(values) > 1 else ""
                cells.append(form.format(mean(values)) + spread)
            rows.append(f"| {line} | {label} | {len(runs)} | " + " | ".join(cells) + " |")
    return "\n".join(rows)


def chance(row: dict) -> float:
    """Of a difference at least as large where there is none: the p-value of Student's t."""
    if not row["half"]:
        return float(row["difference"] == 0)
    scale = float(student.ppf(0.975, row["seeds"] - 1))
    return 2 * float(student.sf(abs(row["difference"]) / row["half"] * scale, row["seeds"] - 1))


def differences(found: list[dict]) -> str:
    """Markdown: a line for each pair, a column for each axis.

    Bold where the 95% interval does not hold 0, with a dagger where it does not for all of them together (Bonferroni).
    """
    cells: dict[tuple[str, str], dict[str, str]] = defaultdict(dict)
    for row in found:
        text = f"{row['difference']:+.3f} ± {row['half']:.3f}"
        sure = abs(row["difference"]) > row["half"]
        all_of_them = chance(row) * len(found) < 0.05
        cells[row["line"], row["against"]][row["axis"]] = f"**{text}**{'†' * all_of_them}" if sure else text
    axes = list(dict.fromkeys(row["axis"] for row in found))
    rows = ["| line | against | " + " | ".join(axes) + " |", "|" + "---|" * (len(axes) + 2)]
    rows += [f"| {a} | {b} | " + " | ".join(row.get(axis, "") for axis in axes) + " |" for (a, b), row in cells.items()]
    return "\n".join(rows)


def draw(lines: dict[str, dict[str, list[dict]]], base: dict):
    """A figure: four axes against accuracy, a line a method; bars are one standard deviation over the seeds."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 2, figsize=(11, 8), sharex=True, layout="constrained")
    for axis, key in zip(axes.flat, ("coverage", "pass@64", "kl", "forgetting"), strict=True):
        for index, line in enumerate(line for line in DRAWN if line in lines):
            places = []
            for runs in lines[line].values():
                x, y = ([run["metrics"][name] for run in runs] for name in ("pass@1", key))
                places.append([mean(x), mean(y), stdev(y) if len(y) > 1 else 0.0])
            x, y, spread = np.array(sorted(places)).T
            color = f"C{index - 1}" if index else "black"
            axis.errorbar(
                x, y, spread, color=color, marker="o", markersize=4, linewidth=1.2, elinewidth=0.6, label=line
            )
        axis.axhline(base[key], color="black", linestyle=":", linewidth=1, label="base")
        axis.set(title=AXES[key][0], xlabel="held-out accuracy, sampled")
        axis.grid(alpha=0.3)
    axes[0, 0].legend(fontsize="small", ncols=2)
    return figure


def sweep(chosen: dict[str, dict[str, dict]], options) -> tuple[list[dict], int]:
    """The runs of base and points, those that are missing trained now; and how many those were."""
    results = options.results.resolve()
    results.parent.mkdir(parents=True, exist_ok=True)
    wanted = [("base", "", settings_of({}, 0, options.problems))]
    wanted += [(line, label, settings_of(point, seed, options.problems))  # seed by seed: all soon have a first figure
               for seed in range(options.seeds) for line, points in chosen.items() for label, point in points.items()
               ]  # fmt: skip
    known = read_results(results)
    missing = [entry for entry in wanted if fingerprint(entry[2]) not in known]
    with ThreadPoolExecutor(options.processes) as pool:
        for row in pool.map(lambda entry: take(*entry, results), missing):
            known[row["run"]] = row
    return [known[fingerprint(settings)] for _, _, settings in wanted], len(missing)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--show", type=Path, metavar="FILE", help="train nothing: the tables of a results file")
    parser.add_argument("--results", type=Path, metavar="FILE", help="where finished runs are recorded")
    parser.add_argument("--lines", nargs="+", choices=LINES)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--problems", type=int, default=PROBLEMS)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--alone", nargs=2, help="settings and folder of one run: used by the benchmark itself")
    options = parser.parse_args()
    if options.alone:
        settings, folder = json.loads(options.alone[0]), Path(options.alone[1])
        (folder / "found.json").write_text(json.dumps(run_alone(settings, folder)))
        return
    started, new = time.perf_counter(), 0
    if options.show:
        base, lines = read_lines(options.show)
        if not base:
            raise SystemExit(f"{options.show} has no sweep of {PROBLEMS} problems; make one without --show")
    else:
        names = options.lines or (QUICK if options.quick else list(LINES))
        chosen = {line: LINES[line] for line in names}
        if options.quick:
            options.seeds, options.problems = 1, 4
            chosen = {line: {label: point | {"max_steps": 2} for label, point in list(LINES[line].items())[:1]}
                      for line in names}  # fmt: skip
        output = PROJECT / "benchmarks" / "output"
        options.results = options.results or output / f"frontier{'_quick' * options.quick}.jsonl"
        rows, new = sweep(chosen, options)
        base, lines = rows[0]["metrics"], by_point(rows[1:])
        if not options.quick:  # with the seeds of earlier sweeps
            lines = {name: points for name, points in read_lines(options.results, options.problems)[1].items()
                     if name in chosen}  # fmt: skip
        import matplotlib

        matplotlib.use("Agg")
        figure = draw(lines, base)
        figure.savefig(options.results.with_suffix(".png"), dpi=80)
        matplotlib.pyplot.close(figure)  # else a notebook in the same process would show it
    found = statements(lines, base)
    print(table({"base": {"": [{"metrics": base}]}} | lines), differences(found), sep="\n\n")
    points = {f"{line} {label}": [run["metrics"] for run in runs]
              for line, points in lines.items() for label, runs in points.items()}  # fmt: skip
    print(json.dumps({"benchmark": "frontier", "date": time.strftime("%Y-%m-%d"), "quick": options.quick,
                      "runs": 1 + sum(map(len, points.values())), "new": new,
                      "seconds": round(time.perf_counter() - started), "base": base, "points": points,
                      "differences": found}))  # fmt: skip


if __name__ == "__main__":
    main()
