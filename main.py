"""Train a language model with GRPO: python main.py --config configs/... --dataset_name countdown"""

import argparse
import logging
import re
import sys
from pathlib import Path

from src.config import ConfigError, RunError, load_config
from src.rl_datasets import TASKS, get_task
from src.run.console import configure_console, progress, visible
from src.run.stop import leave


class OneLineParser(argparse.ArgumentParser):
    """argparse, but a wrong command line is answered by one line instead of the whole usage."""

    def error(self, message: str):
        self.exit(2, f"error: {message}; see --help\n")


def positive(text: str) -> int:
    """A whole number from 1, for argparse."""
    if not (text.isascii() and text.isdecimal() and int(text) > 0):
        raise argparse.ArgumentTypeError(f"give a whole number from 1, not {text!r}")
    return int(text)


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line. Nothing heavy is imported before it and the config are known to be good."""
    parser = OneLineParser(description=__doc__)
    parser.add_argument("--config", metavar="FILE", help="YAML file that defines the experiment")
    parser.add_argument(
        "--dataset_name",
        metavar="TASK",
        help=f"{', '.join(TASKS)}, rg:FAMILY of reasoning-gym, or a class of data.task_file",
    )
    parser.add_argument(
        "--set",
        action="extend",
        nargs="+",
        default=[],
        metavar="SECTION.KEY=VALUE",
        dest="overrides",
        help="override config keys, for example training.learning_rate=1e-5 training.beta=0; repeatable",
    )
    parser.add_argument("--name", metavar="NAME", help="name of the run (default: that of the config file)")
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument("--fresh", action="store_true", help="start over; an old run folder is set aside, not deleted")
    instead.add_argument("--eval_only", action="store_true", help="evaluate the model and write a report; no training")
    instead.add_argument("--check", action="store_true", help="load config, data and model, say what will fit, stop")
    instead.add_argument("--profile", action="store_true", help="take a few steps, say where their time goes, stop")
    instead.add_argument(
        "--doctor", type=Path, metavar="RUN", help="say what is wrong with the run in this folder; needs nothing else"
    )
    shown = parser.add_mutually_exclusive_group()
    shown.add_argument(
        "--log_every", type=positive, metavar="N", help="a line every N steps (default: each; on a terminal a bar)"
    )
    shown.add_argument("--quiet", action="store_true", help="show only warnings, errors and the result")
    given = parser.parse_args(arguments)
    missing = [f"--{name}" for name in ("config", "dataset_name") if getattr(given, name) is None]
    if missing and not given.doctor:
        parser.error(f"the following arguments are required: {', '.join(missing)}")
    return given


def run_name(name: str | None) -> str:
    """--name as part of a folder's name."""
    if name is not None and not re.fullmatch(r"\w[\w.-]{0,99}", name):
        raise ConfigError(f"--name {name}: use letters, digits, points, dashes and underscores")
    return name or ""


def main() -> int:
    arguments = parse_arguments()
    try:
        if arguments.doctor:
            from src.run.doctor import diagnosis  # numpy: a tenth of a second

            print(visible("\n".join(diagnosis(arguments.doctor))))
            return 0
        config = load_config(arguments.config, arguments.overrides)
        config.name = run_name(arguments.name)
        get_task(arguments.dataset_name, config.data)
        configure_console(arguments.log_every, arguments.quiet)
        logging.getLogger("grpo").info(f"loading {config.model.pretrained_model_path}")
        progress.report("loading")
        from src.commands import run_check, run_evaluation, run_profile  # torch and transformers: seconds to import
        from src.engine import session
        from src.train_grpo import run_training

        with session():
            if arguments.check:
                run_check(config, arguments.dataset_name)
            elif arguments.profile:
                run_profile(config, arguments.dataset_name)
            elif arguments.eval_only:
                run_evaluation(config, arguments.dataset_name)
            else:
                run_training(config, arguments.dataset_name, fresh=arguments.fresh)
    except ConfigError as error:
        # what was found wrong after the file was read (device, model, data) does not say where it was written
        file = "" if str(error).startswith("--") or arguments.config in str(error) else f"{arguments.config}: "
        print(visible(f"error: {file}{error}"), file=sys.stderr)
        return 2
    except RunError as error:  # a full disk, weights that became NaN: the run stopped, and what is saved is good
        print(visible(f"error: {error}"), file=sys.stderr)
        return 1
    except KeyboardInterrupt:  # before the first step; afterwards the loop saves and exits by itself
        return 130
    return 0


if __name__ == "__main__":
    leave(main())
