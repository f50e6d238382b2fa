"""What the command line does beside training: --eval_only, --check, --profile."""

import logging
from dataclasses import asdict, replace
from pathlib import Path

from src.config import Config, ConfigError
from src.engine import on_main, world
from src.engine.profiling import TIMED_STEPS, caption, ceilings, measured, table
from src.prepare import prepare
from src.run import check_same_experiment, run_folder
from src.run.console import RESULT, log_block, progress
from src.run.report import accuracy_line, write_report
from src.run.storage import RunLock, set_aside
from src.train_grpo import evaluate, train_step

logger = logging.getLogger("grpo")


def run_evaluation(config: Config, dataset_name: str, work_dir: str | Path = ".") -> dict[str, float]:
    """--eval_only: evaluate the config's model; report and completions go to the run folder's name + _eval."""
    data, training = config.data, config.training
    run = prepare(config, dataset_name, work_dir, for_training=False)
    folder = run_folder(config, f"{dataset_name}_eval", work_dir)
    if (folder / "report.json").exists():  # perhaps of another model
        with on_main(RunLock, folder):
            on_main(set_aside, folder)
    with on_main(RunLock, folder):
        metrics = evaluate(run, data.eval_samples)
        about = {"dataset": dataset_name, "split": data.eval_split, "config": asdict(config)}
        if run.sampled:
            about["sampling"] = {
                "temperature": training.temperature, "samples": data.eval_samples, "max_gen_len": training.max_gen_len
            }  # fmt: skip
        on_main(write_report, folder, about, metrics, *run.judged)
    progress.rest()
    line = accuracy_line(metrics)
    logger.log(RESULT, f"{config.model.pretrained_model_path}: {line}\nthe report is in {folder}")
    return metrics


def run_check(config: Config, dataset_name: str, work_dir: str | Path = ".") -> None:
    """--check: load config, data and model, say what would happen, and write nothing."""
    check_same_experiment(run_folder(config, dataset_name, work_dir), config, refuse=False)
    prepare(config, dataset_name, work_dir, fresh=True).describe()
    progress.rest()
    logger.log(RESULT, "everything is in order; nothing was written")


def run_profile(config: Config, dataset_name: str) -> None:
    """--profile: take the first step a few times, say where its time goes, and write nothing."""
    if world() > 1:
        raise ConfigError("--profile is of one process; start it without torchrun")
    run = prepare(config, dataset_name, fresh=True)
    run.describe()
    run.config.training = replace(config.training, learning_rate=0.0)  # so every step samples the same tokens
    at_first = dict(run.state)

    def take_step() -> int:
        run.state = dict(at_first)  # and draws the same prompts
        run.engine.begin(1)
        _, groups = train_step(run, 1)
        return sum(episode.length for group in groups for episode in group.episodes)

    model = run.engine.model
    limits = ceilings(model.device, model.dtype)
    counted, _ = measured(take_step, model.device, counting=True)
    take_step()  # warms up, and on a GPU captures what the timed steps repeat
    profiles, tokens = zip(*(measured(take_step, model.device) for _ in range(TIMED_STEPS)), strict=True)
    mean = sum(tokens) / TIMED_STEPS
    log_block(table(counted, profiles, mean, limits), RESULT)
    log_block(caption(model, mean, limits), RESULT)
    progress.rest()
