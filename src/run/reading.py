"""Read runs back: run folders -> plain tables, for results_reading.ipynb and for scripts of your own.

A run that goes on, was killed, or has no metrics yet is a run like any other. Nothing here imports torch.
"""

import json
import math
import os
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import yaml

# what names a method in a legend, after its loss type; a target of 0 is no target, and is left out
LABEL_OPTIONS = {
    "kl": ("beta", "kl_target"), "approx_kl": ("beta", "kl_target"), "ot": ("beta", "ot_window", "ot_target"),
    "maxent": ("tau", "beta"), "listwise_kl": ("q_temperature",), "none": (),
}  # fmt: skip


@dataclass(frozen=True)
class Run:
    """One run folder: its resolved config, and its metrics as one row a step, in order."""

    name: str
    folder: Path
    config: dict  # {"model": {...}, "data": {...}, "training": {...}}; empty when config.yaml is missing
    rows: list[dict]  # [{"step": 0, "eval/greedy": ...}, ...]

    @property
    def options(self) -> dict:
        """The config as one flat table: {"training.beta": 0.04, ...}."""
        sections = {name: values for name, values in self.config.items() if isinstance(values, dict)}
        return {f"{section}.{name}": value for section, values in sections.items() for name, value in values.items()}

    @property
    def dataset(self) -> str:
        """The last word of the folder's name; a folder that --fresh set aside has a number behind it."""
        return re.sub(r"\.\d+$", "", self.name).rpartition("_")[2]

    @property
    def last_step(self) -> int:
        """The last step written, -1 before the evaluation of step 0."""
        return self.rows[-1]["step"] if self.rows else -1

    @property
    def complete(self) -> bool:
        """Whether the last step is done; a run without max_steps tells by its final model."""
        steps = self.options.get("training.max_steps")
        return (self.folder / "final").is_dir() if steps is None else self.last_step >= steps


def read_rows(path: Path) -> list[dict]:
    """metrics.jsonl by step: an evaluation has a line of its own, the later value counts, a broken line does not."""
    rows: dict[int, dict] = {}
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else ():
        try:
            row = json.loads(line)
            step = int(row["step"])
            rows[step] = rows.get(step, {}) | row | {"step": step}
        except (ValueError, KeyError, TypeError, OverflowError):
            continue
    return [rows[step] for step in sorted(rows)]


def read_config(path: Path) -> dict:
    """config.yaml, or nothing if there is none that can be read."""
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return config if isinstance(config, dict) else {}


def read_runs(folder: str | Path) -> list[Run]:
    """Every run in or below a folder, in order of their paths; a folder with metrics.jsonl or config.yaml is a run."""
    runs = []
    for path, folders, files in os.walk(folder):
        if "metrics.jsonl" in files or "config.yaml" in files:
            place = Path(path)
            runs.append(Run(place.resolve().name, place, read_config(place / "config.yaml"),
                            read_rows(place / "metrics.jsonl")))  # fmt: skip
            folders.clear()  # checkpoints are no runs
        folders[:] = [name for name in folders if not name.startswith(".")]
    return sorted(runs, key=lambda run: run.folder.parts)


def is_number(value) -> bool:
    """Whether a metric is there, and finite."""
    return isinstance(value, int | float) and math.isfinite(value)


def series(run: Run, tag: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of one metric, without the steps that lack it or where it was not finite."""
    points = [(row["step"], row[tag]) for row in run.rows if is_number(row.get(tag))]
    return np.array([step for step, _ in points], dtype=int), np.array([value for _, value in points], dtype=float)


def smooth(values, weight: float) -> np.ndarray:
    """TensorBoard's smoothing: an exponential moving average, divided by the sum of its weights so far."""
    if not 0 <= weight < 1:
        raise ValueError(f"the smoothing weight is from 0 to below 1, not {weight}")
    smoothed, average = [], 0.0
    for count, value in enumerate(values, start=1):
        average = weight * average + (1 - weight) * value
        smoothed.append(average / (1 - weight**count))
    return np.array(smoothed)


def loss_name(run: Run) -> tuple[str, tuple[str, ...]]:
    """The loss type, of several penalties `kl 0.04 + ot 0.1`, and the options that matter to it."""
    loss_type = run.options.get("training.loss_type", run.name)
    if isinstance(loss_type, dict):
        return " + ".join(f"{name} {weight:g}" for name, weight in loss_type.items()), ()
    return loss_type, LABEL_OPTIONS.get(loss_type, ("beta",))


def method(run: Run) -> str:
    """`ot beta 0.5 window 8`: the loss type and the options that matter to it; the folder's name without a config."""
    loss_type, names = loss_name(run)
    shown = {name: run.options.get(f"training.{name}") for name in names}
    return " ".join([loss_type, *(f"{name.rpartition('_')[2]} {value}" for name, value in shown.items() if value)])


def by_seed(runs: list[Run]) -> dict[str, list[Run]]:
    """Runs that differ only in their random seed, under a label that tells the groups apart.

    Of several runs with the same config and seed (one was set aside) only the one that got farthest counts.
    """
    groups: dict[str, tuple[dict, dict]] = {}  # settings as text -> settings, {seed: run}
    for run in runs:
        settings = run.options | {"dataset": run.dataset} if run.config else {"folder": str(run.folder)}
        settings = {name: value for name, value in settings.items() if value is not None}  # as good as not given
        seed = settings.pop("training.random_seed", None)
        _, seeds = groups.setdefault(json.dumps(settings, sort_keys=True, default=str), (settings, {}))
        if seed not in seeds or run.last_step > seeds[seed].last_step:
            seeds[seed] = run
    named = [
        (method(next(iter(seeds.values()))), settings, list(seeds.values())) for settings, seeds in groups.values()
    ]
    always = differing([settings for _, settings, _ in named if "dataset" in settings])
    always &= {"dataset", "model.pretrained_model_path"}
    labelled = {}
    for name, settings, members in named:
        namesakes = differing([other for other_name, other, _ in named if other_name == name])
        told = [f"{key.rpartition('.')[2]} {settings[key]}" for key in sorted(always | namesakes) if key in settings]
        labelled[", ".join([name, *told]).replace("pretrained_model_path", "model")] = members
    return dict(sorted(labelled.items()))


def differing(tables: list[dict]) -> set[str]:
    """The keys that do not have the same value in every table."""
    return {key for table in tables for key in table if any(other.get(key) != table[key] for other in tables)}


def mean_and_band(runs: list[Run], tag: str) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Steps, mean, lowest and highest of the runs that have the metric, at the steps that all of those have."""
    curves = [dict(zip(*map(np.ndarray.tolist, series(run, tag)), strict=True)) for run in runs]
    curves = [curve for curve in curves if curve]
    steps = sorted(set.intersection(*map(set, curves))) if curves else []
    if not steps:
        return np.array([]), np.array([]), np.array([]), np.array([])
    table = np.array([[curve[step] for step in steps] for curve in curves])  # [runs, steps]
    return np.array(steps), table.mean(0), table.min(0), table.max(0)


def frontier(
    runs: list[Run], tag: str = "eval/pass@1", distance_tag: str = "train/kl_k3"
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Steps, KL to the reference (nats a token) and accuracy at the evaluations, means over the runs.

    Before the first step the KL is 0: the policy is the reference. Where the anchor moves the KL is to something else,
    and there is no frontier. The KL of a step is measured on what it sampled, the accuracy after its update.
    """
    if any(run.options.get("training.anchor") == "rollout" or run.options.get("training.reference_sync_steps")
           for run in runs):  # fmt: skip
        runs = []
    accuracy, distance = (dict(zip(*mean_and_band(runs, name)[:2], strict=True)) for name in (tag, distance_tag))
    distance[0] = 0.0
    steps = sorted(accuracy.keys() & distance.keys())
    return np.array(steps), np.array([distance[s] for s in steps]), np.array([accuracy[s] for s in steps])


def summary(runs: list[Run], tag: str = "eval/pass@1") -> list[dict]:
    """One row a run. An accuracy is a pair: the value, and half the width of its 95% interval over problems."""
    table = []
    for run in runs:
        options = {name.rpartition(".")[2]: value for name, value in run.options.items()}
        loss_type, names = loss_name(run)
        read = {name: options.get(name) for name in names}
        accuracies = [(row[tag], row.get(f"{tag}_ci95")) for row in run.rows if row.get(tag) is not None]
        seconds = [row["time/rollout"] + row["time/update"] for row in run.rows if "time/update" in row]
        table.append({
            "method": loss_type,
            "beta": read.get("beta"),
            "window": read.get("ot_window"),
            "tau": read.get("tau"),
            "model": Path(options.get("pretrained_model_path", "")).name,
            "seed": options.get("random_seed"),
            "steps": max(run.last_step, 0),
            "initial": accuracies[0] if accuracies else None,
            "best": max(accuracies, key=lambda pair: pair[0]) if accuracies else None,
            "final": accuracies[-1] if accuracies else None,
            "seconds a step": float(np.mean(seconds)) if seconds else None,
            "complete": run.complete,
        })  # fmt: skip
    return table


def markdown(rows: list[dict]) -> str:
    """A table's rows as Markdown; pairs are percentages with their interval."""

    def cell(value) -> str:
        if value is None or isinstance(value, bool):
            return {None: "", True: "yes", False: "no"}[value]
        if isinstance(value, tuple):
            return f"{value[0]:.1%}" + ("" if value[1] is None else f" ± {value[1]:.1%}")
        return (f"{value:.3g}" if isinstance(value, float) else str(value)).replace("|", "\\|")

    if not rows:
        return "no runs"
    lines = [list(rows[0]), ["---"] * len(rows[0]), *([cell(value) for value in row.values()] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
