"""Offline training on scored completions: does it raise the probability of the better ones on held-out groups?

    uv run python -m benchmarks.scored            # 3 objectives x 3 seeds on the embedded model, minutes on 2 cores
    uv run python -m benchmarks.scored --quick    # 1 seed, 3 steps: only shows that it runs

The file is made first: the embedded model answers Countdown problems, and the task scores the answers. Every run then
reads it like any user's file (`--dataset_name scored`). The last line of stdout is one JSON document.
"""

import argparse
import json
import platform
import tempfile
from pathlib import Path
from statistics import mean, stdev

import torch

from src.config import load_config
from src.prepare import prepare
from src.run.reading import read_rows
from src.train_grpo import run_training

PROJECT = Path(__file__).resolve().parent.parent
CONFIG = PROJECT / "configs" / "configs_tiny" / "config_{}_tiny.yaml"
OBJECTIVES = {"none": "none", "maxent": "maxent_tau0.1_beta0.04", "listwise_kl": "listwise_kl_t0.1"}
MEASURES = ("pair_accuracy", "expected_score", "best_probability")


def write_scored_file(path: Path, problems: int, samples: int) -> None:
    """Groups whose completions do not all earn the same. nums and target are what the model's chat template reads."""
    config = load_config(str(CONFIG).format(OBJECTIVES["none"]), [f"data.train_size={problems}", "data.seed=7"])
    run = prepare(config, "countdown")
    with path.open("w", encoding="utf-8") as file:
        for group in run.sample(run.train_problems, samples, stream=0):
            scores = [episode.reward for episode in group.episodes]
            if len(set(scores)) > 1:
                row = dict(group.problem.row)
                row["prompt"] = f"Make {row['target']} from {row['nums']}."  # a tenth of the prompts is held out
                row["completions"] = [{"text": e.text, "score": e.reward} for e in group.episodes]
                file.write(json.dumps(row) + "\n")


def run_one(objective: str, seed: int, file: Path, folder: Path, steps: int) -> list[dict]:
    """One run's evaluations."""
    sizes = ["training.batch_size=256", "training.num_questions_per_batch=32", f"training.max_steps={steps}"]
    overrides = [f"data.path={file}", f"training.random_seed={seed}", "training.old_logprobs=trainer", *sizes,
                 "data.eval_size=1000", "training.eval_interval=10", "training.learning_rate=1e-4"]  # fmt: skip
    config = load_config(str(CONFIG).format(OBJECTIVES[objective]), overrides)
    run_training(config, "scored", folder / f"{objective}_{seed}", fresh=True)
    (metrics,) = (folder / f"{objective}_{seed}").glob("runs/*/metrics.jsonl")
    return [row for row in read_rows(metrics) if "eval/pair_accuracy" in row]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--steps", type=int, default=60)
    options = parser.parse_args()
    seeds, steps, problems = ([0], 3, 64) if options.quick else ([0, 1, 2], options.steps, 2400)
    result = {"machine": platform.machine(), "torch": torch.__version__, "threads": torch.get_num_threads(),
              "steps": steps, "seeds": seeds, "objectives": {}}  # fmt: skip
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "scored.jsonl"
        write_scored_file(file, problems, 8)
        result["groups"] = sum(1 for _ in file.open(encoding="utf-8"))
        print("| objective | measure on held-out groups | before | after |\n|---|---|---|---|")
        for objective in OBJECTIVES:
            runs = [run_one(objective, seed, file, Path(scratch), steps) for seed in seeds]
            result["objectives"][objective] = [[runs_of[0], runs_of[-1]] for runs_of in runs]
            for measure in MEASURES:
                ends = [[evaluations[i][f"eval/{measure}"] for evaluations in runs] for i in (0, -1)]
                cells = [f"{mean(v):.3f} ± {stdev(v) if len(v) > 1 else 0:.3f}" for v in ends]
                print(f"| `{objective}` | {measure} | {cells[0]} | {cells[1]} |", flush=True)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
