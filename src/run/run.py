"""One run: which step comes next, what is saved when, and how it leaves when the user or an error wants it to.

The method asks `steps()` for numbers and hands back what each step measured by `record`. Between two steps, and in a
step before the first weight has moved, a run can be left, and the finished steps are on the disk.
"""

import copy
import hashlib
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import src.run.checkpoint as checkpoint
import src.run.report as report
from src.config import Config, ConfigError, RunError, Stopped, dump_config
from src.engine import AloneError, Engine, from_main, on_main, together
from src.records import Group, Problem
from src.run.console import RESULT, fact, first_completions, log_block, progress, quoted, shortened, tokens_line
from src.run.doctor import log_diagnosis
from src.run.hub import push_final
from src.run.metrics import step_metrics
from src.run.stop import StopSignal
from src.run.storage import RunLock, set_aside, write_file
from src.run.telemetry import Telemetry

logger = logging.getLogger("grpo")
LONGEST_NAME = 200  # bytes of a folder's name; file systems take 255
MAX_BAD_STEPS = 5  # so many steps in a row without a finite gradient end the run
Evaluate = Callable[["Run", int], dict[str, float]]


class Source(Protocol):
    """Where completions come from: the engine, or a file."""

    def sample(
        self, problems: list[Problem], samples: int, stream: int, temperature: float | None = None
    ) -> list[Group]: ...

    def summarize(self, problems: list[Problem], greedy: list[Group], sampled: list[Group]) -> dict[str, float]: ...

    def longest(self, problems: list[Problem]) -> list[Group] | None: ...


@dataclass
class Run:
    """Everything a run holds. `state` is saved as of the last finished step: put what must survive a stop there."""

    config: Config
    dataset_name: str
    folder: Path
    engine: Engine
    task: Any
    source: Source
    train_problems: list[Problem]
    eval_problems: list[Problem]
    max_steps: int
    left_out: tuple[int, int] = (0, 0)  # training and evaluation problems that are too long
    sampled: bool = True  # the completions are the policy's and not those of a file
    state: dict[str, Any] = field(default_factory=dict)
    done: int = 0  # the last finished step
    first_evaluation: dict[str, float] = field(default_factory=dict)
    last_evaluation: dict[str, float] = field(default_factory=dict)
    evaluated: int = -1  # the step of the last evaluation
    saved: int = 0  # the step of the last checkpoint
    bad_steps: int = 0  # without a finite gradient, in a row until now
    complete: bool = False
    metrics: dict[str, float] = field(default_factory=dict)  # of the last step
    telemetry: Any = None
    judged: tuple[list[Group], list[Group]] = ([], [])  # of the last evaluation

    # -- what the method calls -----------------------------------------------------------------------------------------

    def sample(
        self, problems: list[Problem], samples: int, stream: int, temperature: float | None = None
    ) -> list[Group]:
        """`samples` graded completions for each problem. `stream`: the step, or below 0 for an evaluation."""
        return self.source.sample(problems, samples, stream, temperature)

    def summarize(self, greedy: list[Group], sampled: list[Group]) -> dict[str, float]:
        """The metrics of an evaluation of the held-out problems."""
        self.judged = greedy, sampled
        return self.source.summarize(self.eval_problems, greedy, sampled)

    def steps(self, evaluate: Evaluate) -> Iterator[int]:
        """The numbers of the steps that are still to be taken; evaluates and saves between them."""
        while not self.complete:
            if self.owes_evaluation():
                self.take_evaluation(evaluate)
            self.save_when_due()
            if self.done >= self.max_steps:
                break
            together(self.engine.check_stop)
            self.engine.begin(self.done + 1)
            yield self.done + 1
        if not self.complete:
            self.finish()

    def record(self, metrics: dict[str, float], groups: list[Group]) -> None:
        """The step that steps() named last is finished."""
        step = self.engine.step
        self.metrics = metrics | step_metrics(groups, self.engine.seconds, metrics.get("rollout/tokens"))
        self.metrics |= {"rollout/failed_groups": self.engine.failed, "memory/peak_gib": self.engine.peak_gib()}
        self.metrics["train/weights_moved"] = self.engine.weights_moved()
        self.bad_steps = self.bad_steps + 1 if metrics["train/skipped_updates"] else 0
        if step == 1:
            log_block(first_completions(step, groups))
        # a step that is not written is not finished; all processes hear of a full disk
        from_main(self.telemetry.write_step, step, self.metrics)
        self.done, self.engine.untouched = step, True
        self.note()
        if self.evaluates_at(step) or step == 1:
            self.telemetry.write_text("completions", report.completions_table(groups), step)
            self.telemetry.write_histogram("rollout/lengths", [e.length for g in groups for e in g.episodes], step)
        if self.bad_steps:
            on_main(report.keep_bad_batch, self.folder / "bad_steps", step, groups)
        if self.bad_steps >= MAX_BAD_STEPS and step < self.max_steps:
            self.save()
            raise RunError(
                f"{self.bad_steps} steps in a row had no finite gradient; what they were computed on is in "
                f"{self.folder / 'bad_steps'}; the weights are those from before them, saved as step {step}; go on "
                f"with a lower training.learning_rate, or start over with model.dtype: float32"
            )

    def evaluates_at(self, step: int) -> bool:
        """Whether an evaluation follows this step: every eval_interval steps and after the last one."""
        interval = self.config.training.eval_interval
        return step == self.max_steps or (interval > 0 and step % interval == 0)

    def rehearse(self, objective: Callable, **want: Any) -> None:
        """Try the longest pass before anything else; see Engine.rehearse."""
        if not self.complete:
            self.engine.rehearse(objective, self.source.longest(self.train_problems), **want)

    # -- evaluations and checkpoints -----------------------------------------------------------------------------------

    def owes_evaluation(self) -> bool:
        """Whether the step that is done has not been evaluated and should be."""
        due = self.config.training.eval_first if self.done == 0 else self.evaluates_at(self.done)
        return due and self.evaluated < self.done

    def take_evaluation(self, evaluate: Evaluate) -> None:
        """Evaluate what is there after the step that is done; with fewer samples in between than first and last."""
        data, started = self.config.data, time.perf_counter()
        ends = self.done in (0, self.max_steps)
        if self.done == 0:
            logger.info(f"evaluating {len(self.eval_problems):,} problems before the first step")
        samples = data.eval_samples if ends else min(data.eval_samples, data.eval_samples_between)
        metrics = {name: float(value) for name, value in evaluate(self, samples).items()}
        seconds = {"time/evaluate": time.perf_counter() - started}
        from_main(self.telemetry.write_evaluation, self.done, metrics | seconds)
        self.last_evaluation = metrics
        if self.done == 0:
            self.first_evaluation = metrics
        self.evaluated = self.done
        self.note()
        when = f"step {self.done}/{self.max_steps}" if self.done else "before training"
        logger.info(f"{when}: {report.accuracy_line(self.last_evaluation)}")

    def note(self) -> None:
        """What would be saved now: a stop in the middle of the next step must not see half of it."""
        parts = {
            name: value.state_dict() if hasattr(value, "state_dict") else value for name, value in self.state.items()
        }
        for name in [name for name, value in parts.items() if not checkpoint.is_plain(value)]:
            raise RunError(f"run.state[{name!r}] cannot be saved; use numbers, texts, tensors, lists, tuples, dicts")
        self.noted = {
            "state": copy.deepcopy(parts),
            "bad_steps": self.bad_steps,
            "evaluated": self.evaluated,
            "first_evaluation": self.first_evaluation,
            "last_evaluation": self.last_evaluation,
            **checkpoint.random_states(),
        }

    def save_when_due(self) -> None:
        """Every ckpt_save_interval steps and after the last one."""
        interval = self.config.training.ckpt_save_interval
        if self.done > self.saved and (self.done == self.max_steps or (interval > 0 and self.done % interval == 0)):
            self.save()

    def save(self) -> None:
        self.engine.report("saving", lambda: 0.0)
        score = report.headline(self.last_evaluation) if self.evaluated == self.done else None
        keep = self.config.training.keep_checkpoints
        checkpoint.save_checkpoint(self.folder / "checkpoints", self.done, self.engine.state(), self.noted, keep, score)
        self.saved = self.done

    def resume(self, folder: Path) -> None:
        """Go on from a checkpoint."""
        saved = checkpoint.read_state(folder)
        self.engine.load(folder)
        for name, value in saved["state"].items():
            if hasattr(self.state.get(name), "load_state_dict"):
                self.state[name].load_state_dict(value)
            else:
                self.state[name] = value
        self.done, self.bad_steps, self.evaluated = saved["step"], saved["bad_steps"], saved["evaluated"]
        self.saved = self.done - self.owes_evaluation()  # one that is owed is to be in this checkpoint too
        self.first_evaluation, self.last_evaluation = saved["first_evaluation"], saved["last_evaluation"]
        checkpoint.set_random_states(saved)

    # -- begin and end -------------------------------------------------------------------------------------------------

    @contextmanager
    def opened(self, fresh: bool = False) -> Iterator[None]:
        """The run's folder is ours; inside, Ctrl-C leaves at the next place where nothing is lost."""
        if fresh and self.folder.exists():  # only now: a config that cannot run moves nothing
            with on_main(RunLock, self.folder):
                on_main(set_aside, self.folder)
        with on_main(RunLock, self.folder):
            newest = from_main(checkpoint.newest_checkpoint, self.folder / "checkpoints")
            if newest:
                self.resume(newest)
            else:  # nothing of ours draws from these, but a reward function of the user's may
                checkpoint.seed_everything(self.config.training.random_seed)
            self.note()
            final = from_main(checkpoint.finished_step, self.folder / "final")
            if newest and self.done >= self.max_steps and final == self.done:
                line = report.accuracy_line(self.last_evaluation)
                logger.log(RESULT, f"{self.folder} is complete: {line}; --fresh starts over")
                self.complete = True
                progress.rest()
                on_main(self.push)
                yield
                return
            on_main(write_file, self.folder / "config.yaml", dump_config(self.config))
            first_row = self.done + 1 if newest else 0
            self.telemetry = on_main(Telemetry, self.folder, first_row, self.max_steps, self.sampled)
            self.describe()
            try:
                with StopSignal() as stop:
                    self.engine.check_stop = stop.check
                    yield from self.until_left()
            finally:
                self.telemetry.close()

    def until_left(self) -> Iterator[None]:
        """What is inside `with run.opened()`; where it is left early, the finished steps are saved."""
        if self.done:
            logger.info(f"going on after step {self.done}")
        try:
            yield
        except (Stopped, RunError, ConfigError) as error:
            if self.done > self.saved and self.engine.untouched and not isinstance(error, AloneError):
                self.save()
            if self.engine.step > 0 and not self.complete:
                saved = f"the first {self.saved} steps are saved"
                logger.log(RESULT, f"stopped; {saved}, the same command goes on from there")
            raise

    def finish(self) -> None:
        """final/, the hyperparameters with the result, and the push to the hub."""
        config, final = self.config, self.folder / "final"
        checkpoint.save_model(final, self.engine.state(finished=True), self.done)
        lora = {f"lora.{name}": value for name, value in asdict(config.lora).items()}
        adapted = config.lora.r or config.lora.path
        settings = {**asdict(config.model), **asdict(config.training), **(lora if adapted else {})}
        self.telemetry.write_hparams(settings, self.metrics | self.last_evaluation)
        best = on_main(report.best_line, self.folder / "metrics.jsonl")
        lines = {
            "before": report.accuracy_line(self.first_evaluation),
            "after": report.accuracy_line(self.last_evaluation),
            "best": best,
        }
        self.telemetry.log_summary(lines, final)
        on_main(log_diagnosis, self.folder)
        self.complete = True
        on_main(self.push)

    def push(self) -> None:
        """final/ to the hub, if the config says so."""
        if not self.config.hub.push_to_hub:
            return
        source = self.config.data.path or getattr(self.task, "hub_id", None)
        about = {
            "model": self.config.model.pretrained_model_path,
            "dataset": self.dataset_name,
            "datasets": [source] if source and not Path(source).exists() else [],
            "config": dump_config(self.config),
        }
        evaluations = {"before": self.first_evaluation, "after": self.last_evaluation}
        url = push_final(self.folder / "final", self.config.hub, about, evaluations, self.folder / "metrics.jsonl")
        logger.info(f"pushed to {url}")

    def describe(self) -> None:
        """The block at the start of a run: model, data, a step, memory, and the first prompt as the model sees it."""
        training = self.config.training
        prompts, too_long = training.num_questions_per_batch, " ({} too long, left out)"
        left_out = [too_long.format(f"{count:,}") if count else "" for count in self.left_out]
        group = training.batch_size // prompts if self.sampled else "given completions"
        problem, facts = self.train_problems[0], self.engine.facts()
        updates = training.minibatches * training.inner_epochs
        penalties = ", ".join(f"{name} x {weight:g}" for name, weight in training.penalties().items()) or "none"
        if "maxent" in training.penalties():
            effective = training.q_temperature * (training.tau + training.beta)
            penalties += (
                f" (tau {training.tau:g}, beta {training.beta:g}: rewards act at a temperature of {effective:.3g})"
            )
        block = {
            "model": facts["model"],
            "data": f"{self.dataset_name}: {len(self.train_problems):,} training problems{left_out[0]}, "
            f"{len(self.eval_problems):,} for the evaluation{left_out[1]}",
            "step": f"{prompts} prompts x {group} completions of at most {training.max_gen_len:,} tokens, "
            f"{updates} update{'s' * (updates > 1)}; {self.max_steps:,} steps",
            "loss": f"{penalties}, learning rate {training.learning_rate:g}",
            "memory": facts["memory"],
            "prompt": f"the first one, {tokens_line(self.engine.tokenizer, problem.prompt_ids)}",
        }
        lines = [fact(label, text) for label, text in block.items()]
        lines.append(quoted("", shortened(problem.prompt_text, 2000)))
        log_block("\n".join(lines))
        logger.info(f"{'folder':<12}{self.folder}")


def run_folder(config: Config, dataset_name: str, work_dir: str | Path = ".") -> Path:
    """Where a run of this config lives; a mixture of many families would be too long for the name of a folder."""
    name = f"{config.name or Path(config.source).stem}_{dataset_name.replace(':', '_')}"
    if len(name.encode()) > LONGEST_NAME:
        name = f"{name[: LONGEST_NAME // 2]}_{hashlib.md5(name.encode(), usedforsecurity=False).hexdigest()}"
    return Path(work_dir) / "runs" / name
