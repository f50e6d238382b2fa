"""What the processes of tests/test_distributed.py run: torchrun ... distributed_worker.py PLAN.json

The plan names what to do; what a process found is in <folder>/task_<number>_rank_<number>.pt.
"""

import json
import os
import signal
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from unittest.mock import patch

import torch

from src import train_grpo
from src.config import Config, load_config
from src.engine import session
from src.engine.distributed import rank
from src.engine.sharding import full
from src.prepare import prepare
from src.run import Run
from src.run.stop import leave
from src.train_grpo import next_problems, objective, run_training, wanted, with_advantages, with_loss_weights


def gradient_of_a_step(config: Config) -> dict[str, torch.Tensor]:
    """Of the first step's first update, over all processes, whole."""
    run, training = prepare(config, "countdown"), config.training
    run.engine.begin(1)
    per_prompt = training.batch_size // training.num_questions_per_batch
    groups = run.sample(next_problems(run, 6), per_prompt, stream=1)
    weighted = with_loss_weights(with_advantages(groups, training, run.task), training)
    run.engine.forward_backward(weighted, partial(objective, training), **wanted(training, anchor=True))
    return {name: full(p.grad) for name, p in run.engine.model.named_parameters() if p.grad is not None}


def train(config: Config, folder: str, keep: Callable[[dict], None] = lambda found: None) -> dict:
    """A run; what each process has after each of its steps, which must be the same everywhere."""
    found: dict = {"steps": {}}
    record, finish = Run.record, Run.finish

    def recorded(run, *arguments):
        record(run, *arguments)
        controllers = run.state["controllers"].state_dict()
        found["steps"][run.done] = {"controllers": controllers, **run.metrics, **run.last_evaluation}
        keep(found)

    def finished(run):
        found["weights"] = {name: full(weight) for name, weight in run.engine.model.state_dict().items()}
        finish(run)

    with patch.object(Run, "record", recorded), patch.object(Run, "finish", finished):
        return found | {"last": run_training(config, "countdown", folder)}


def die_in_step(config: Config, folder: str, keep: Callable[[dict], None], step: int, which: int) -> None:
    """Process `which` is killed in the middle of a step."""
    update = train_grpo.update

    def killed(run, groups, now):
        if now == step and rank() == which:
            os.kill(os.getpid(), signal.SIGKILL)
        return update(run, groups, now)

    with patch.object(train_grpo, "update", killed):
        train(config, folder, keep)


def main() -> None:
    plan = json.loads(Path(sys.argv[1]).read_text())
    with session():
        for number, (what, file, overrides, folder, *more) in enumerate(plan["tasks"]):
            config = load_config(file, overrides)
            keep = partial(torch.save, f=Path(plan["folder"]) / f"task_{number}_rank_{rank()}.pt")
            if what == "gradient":
                keep(gradient_of_a_step(config))
            elif what == "train":
                keep(train(config, folder))
            else:
                die_in_step(config, folder, keep, *more)


if __name__ == "__main__":
    main()
    leave(0)
