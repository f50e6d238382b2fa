"""What the processes of tests/test_distributed.py run: torchrun ... distributed_worker.py PLAN.json

The plan names what to do; what a process found is in <folder>/rank_<number>.pt.
"""

import json
import os
import signal
import sys
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import torch

from src import train_grpo
from src.config import Config, load_config
from src.distributed import rank, session
from src.prepare import prepare
from src.sharding import full, sum_gradients
from src.stop import leave
from src.train_grpo import add_advantages, add_loss_weights, backward, questions_of_step, run_training, sample


def gradient_of_a_step(config: Config) -> dict[str, torch.Tensor]:
    """Of the first step's first update, over all processes, whole."""
    run = prepare(config, "countdown")
    training = replace(config.training, tau=run.controllers.tau, beta=run.controllers.beta)
    per_prompt = training.batch_size // training.num_questions_per_batch
    groups = sample(run, questions_of_step(run, 1), per_prompt, training.temperature, 1)
    weighted = add_loss_weights(add_advantages(groups, training, run.task), training)
    backward(run, weighted, training, on_policy=True, use_anchor=True, stoppable=False)
    sum_gradients(run.model)
    return {name: full(p.grad) for name, p in run.model.named_parameters() if p.grad is not None}


def train(config: Config, folder: str) -> dict:
    """A run; what each process has at its end, which must be the same everywhere."""
    finish = train_grpo.finish

    def look(run, *rest):
        found.update(controllers=run.controllers.state_dict(), metrics=rest[-1], trained=run)
        finish(run, *rest)

    found: dict = {}
    with patch.object(train_grpo, "finish", look):
        last = run_training(config, "countdown", folder)
    run = found.pop("trained", None)
    weights = {name: full(weight) for name, weight in run.model.state_dict().items()} if run else {}
    return found | {"weights": weights, "last": last}


def die_in_step(config: Config, folder: str, step: int, which: int) -> None:
    """Process `which` is killed in the middle of a step."""
    update = train_grpo.update

    def killed(run, groups, now):
        if now == step and rank() == which:
            os.kill(os.getpid(), signal.SIGKILL)
        return update(run, groups, now)

    with patch.object(train_grpo, "update", killed):
        run_training(config, "countdown", folder)


def main() -> None:
    plan = json.loads(Path(sys.argv[1]).read_text())
    with session():
        for number, (what, file, overrides, folder, *more) in enumerate(plan["tasks"]):
            config = load_config(file, overrides)
            if what == "gradient":
                found = gradient_of_a_step(config)
            elif what == "train":
                found = train(config, folder)
            else:
                found = die_in_step(config, folder, *more)
            torch.save(found, Path(plan["folder"]) / f"task_{number}_rank_{rank()}.pt")


if __name__ == "__main__":
    main()
    leave(0)
