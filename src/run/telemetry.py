"""What a run leaves to look at: TensorBoard, metrics.jsonl, training.log, and a progress bar or plain lines.

metrics.jsonl is part of what must not be lost: a step is on the disk when write_step returns, or the run stops. The
rest is for looking at: where it cannot be written, one warning says so and training goes on.
"""

import json
import logging
import math
import os
import re
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from tensorboard.summary.writer.record_writer import RecordWriter
from torch.utils.tensorboard.summary import custom_scalars, histogram, hparams, scalar, text
from tqdm import tqdm

from src.run.console import (
    RESULT,
    Stalls,
    configure_logging,
    log_block,
    progress,
    shows_bar,
    step_line,
    summary,
    visible,
)
from src.run.storage import StorageError, storage_problem, write_file

logger = logging.getLogger("grpo")

# Final metrics by which the HParams page sorts runs, and the settings that are columns there without being asked for
HPARAM_METRICS = ("eval/pass@1", "eval/greedy", "eval/pass@8", "eval/pair_accuracy", "train/reward")
HPARAM_COLUMNS = ("batch_size", "beta", "learning_rate", "loss_type", "random_seed")

# The page Custom Scalars: charts by the question they answer, lines by regular expressions that match from the start of
# a tag. The same for every run: TensorBoard shows the charts of all runs, and equal ones once.
LAYOUT = {
    "Does it learn?": {
        "held-out accuracy": ["eval/greedy$", "eval/pass@1$", "eval/pass@8$"],
        "reward and its parts, training": ["train/reward$", "reward/"],
    },
    "Is it healthy?": {
        "entropy": ["train/entropy$"],
        "KL to the anchor": ["train/kl$", "train/kl_k3$"],
        "gradient norm before clipping": ["train/grad_norm$"],
        "share of clipped tokens": ["train/clip_fraction$"],
        "groups without variance": ["train/groups_without_variance$"],
        "finished before max_gen_len": ["rollout/finished$"],
        "completion length in tokens": ["rollout/length$"],
        "sampler against trainer, log-probs": ["rollout/mismatch$"],
    },
    "Is it fast?": {
        "seconds": ["time/"],
        "tokens a second": ["rollout/tokens_per_second$", "update/tokens_per_second$"],
        "peak memory, GiB": ["memory/peak_gib$"],
    },
}
RANKING_LAYOUT = {
    "Does it learn?": {
        "held-out ranking": ["eval/pair_accuracy$", "eval/best_probability$"],
        "train loss": ["train/loss$"],
    }
}


def keep_lines_through(path: Path, step: int) -> None:
    """Drop metrics of steps after `step`, which a resumed run will take again, and a broken last line."""
    if not path.exists():
        return
    before, kept = path.read_bytes(), []
    for line in before.decode(errors="replace").splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line)
        except (json.JSONDecodeError, KeyError, TypeError):
            continue
    after = "".join(line + "\n" for line in kept)
    if after.encode() != before:
        write_file(path, after)  # a crash here must not lose the steps that are kept


class MetricsFile:
    """metrics.jsonl: one line a step, written in one piece and forced onto the disk."""

    def __init__(self, path: Path, first_step: int):
        self.path = path
        try:
            keep_lines_through(path, first_step - 1)
            self.descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        except OSError as error:
            raise StorageError(str(path), error, "the last checkpoint is safe") from error

    def write(self, row: dict) -> None:
        line, size = json.dumps(row).encode() + b"\n", os.fstat(self.descriptor).st_size
        try:
            while line:  # once, unless the disk becomes full just here: then the rest fails
                line = line[os.write(self.descriptor, line) :]
            os.fsync(self.descriptor)
        except OSError as error:
            with suppress(OSError):
                os.ftruncate(self.descriptor, size)  # no half line
            raise StorageError(str(self.path), error, "the last checkpoint is safe") from error

    def close(self) -> None:
        os.close(self.descriptor)


class EventFile:
    """One TensorBoard event file a process. torch's SummaryWriter would do but for two things: it writes minutes later,
    in a thread, so that a kill loses steps; and it names files by the clock alone, and TensorBoard reads them by name.
    """

    def __init__(self, folder: Path, first_step: int):
        folder.mkdir(parents=True, exist_ok=True)
        numbers = [
            int(found[1]) for p in folder.iterdir() if (found := re.match(r"events\.out\.tfevents\.(\d+)", p.name))
        ]
        number = max([int(time.time()), *(n + 1 for n in numbers)])  # also when the clock has gone back
        self.file = (folder / f"events.out.tfevents.{number:010d}.{os.getpid()}").open("xb")
        self.records = RecordWriter(self.file)
        self.write(file_version="brain.Event:2")
        # readers forget what an earlier process wrote from this step on
        self.write(step=first_step, session_log=SessionLog(status=SessionLog.START))

    def write(self, **event) -> None:
        self.records.write(Event(wall_time=time.time(), **event).SerializeToString())
        self.file.flush()


class Telemetry:
    """Writers of one run folder. Every key of metrics.jsonl is a TensorBoard tag."""

    def __init__(self, run_folder: Path, first_step: int, max_steps: int, sampled: bool = True):
        """`first_step`: the first step to be written; what an earlier process wrote from there on is dropped.

        `sampled`: False where the completions come from a file, so that no setting would give better ones.
        """
        configure_logging(run_folder / "training.log")
        self.metrics_file = MetricsFile(run_folder / "metrics.jsonl", first_step)
        self.events: EventFile | None = None
        try:
            self.events = EventFile(run_folder / "tb", first_step)
        except Exception as error:
            self.lose_events(error)
        layout = LAYOUT if sampled else {**LAYOUT, **RANKING_LAYOUT}
        as_lines = {
            title: {name: ["Multiline", tags] for name, tags in charts.items()} for title, charts in layout.items()
        }
        self.write_events(lambda: [custom_scalars(as_lines)])
        self.bar = tqdm(
            total=max_steps,
            initial=max(first_step - 1, 0),
            unit="step",
            disable=not shows_bar(),
            file=sys.stdout,
            dynamic_ncols=True,
        )
        self.reward = ""
        progress.show = self.at_end_of_bar if shows_bar() else None
        self.max_steps = max_steps
        self.stalls = Stalls() if sampled else None
        self.started = self.first_step_started = time.perf_counter()
        self.steps, self.peak_gib = 0, math.nan  # of this process
        self.seconds: dict[str, float] = defaultdict(float)

    def at_end_of_bar(self, text: str) -> None:
        self.bar.set_postfix_str(", ".join(filter(None, (self.reward, text))))

    def lose_events(self, error: Exception) -> None:
        self.events = None
        reason = storage_problem(error) or f"{type(error).__name__}: {error}"
        logger.warning(
            f"TensorBoard's file cannot be written ({reason}): the run goes on without it, see metrics.jsonl"
        )

    def write_events(self, make: Callable[[], list[Summary]], step: int = 0) -> None:
        """Summaries of one step as one record: whole or not there. Whatever fails here does not stop the run."""
        if self.events is not None:
            try:
                values = [value for summary in make() for value in summary.value]
                self.events.write(step=step, summary=Summary(value=values))
            except Exception as error:
                self.lose_events(error)

    def write_step(self, step: int, metrics: dict[str, float]) -> None:
        """One JSON line, one point per TensorBoard tag, one step of the bar."""
        self.write_row(step, metrics)
        self.steps, self.peak_gib = self.steps + 1, metrics["memory/peak_gib"]
        for purpose in ("rollout", "update"):
            self.seconds[purpose] += metrics[f"time/{purpose}"]
        left = (time.perf_counter() - self.first_step_started) / self.steps * (self.max_steps - step)
        logger.info(
            step_line(step, self.max_steps, metrics, left), extra={"step": step, "last": step == self.max_steps}
        )
        self.reward = f"reward {metrics['train/reward']:.3f}, {metrics['rollout/tokens_per_second']:,.0f} tokens/s"
        self.bar.set_postfix_str(self.reward, refresh=False)
        self.bar.update(1)
        if self.stalls:
            self.stalls.look(step, metrics)

    def write_row(self, step: int, metrics: dict[str, float]) -> None:
        clean = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
        self.metrics_file.write({"step": step, **clean})
        self.write_events(lambda: [scalar(name, value) for name, value in metrics.items()], step)

    def write_evaluation(self, step: int, metrics: dict[str, float]) -> None:
        """A line of its own, as the step's may have been written by an earlier process."""
        self.write_row(step, metrics)
        if step == 0:
            self.first_step_started = time.perf_counter()
        else:
            self.seconds["evaluate"] += metrics["time/evaluate"]

    def write_text(self, tag: str, content: str, step: int) -> None:
        self.write_events(lambda: [text(tag, content)], step)

    def write_histogram(self, tag: str, values, step: int) -> None:
        self.write_events(lambda: [histogram(tag, np.array(values), bins=30)], step)

    def write_hparams(self, settings: dict, metrics: dict[str, float]) -> None:
        """Settings with final metrics for TensorBoard's HParams page, in the run's own event file."""
        final = {name: metrics[name] for name in HPARAM_METRICS if name in metrics}
        plain = {
            name: value if isinstance(value, bool | int | float | str) else str(value)
            for name, value in settings.items()
        }

        def make() -> list[Summary]:
            experiment, *session = hparams(plain, final)
            plugin = experiment.value[0].metadata.plugin_data
            data = HParamsPluginData.FromString(plugin.content)
            for info in data.experiment.hparam_infos:
                info.differs = info.name in HPARAM_COLUMNS  # the page lists and shows these first
            plugin.content = data.SerializeToString()
            return [experiment, *session]

        self.write_events(make)

    def log_summary(self, evaluations: dict[str, str], final: Path) -> None:
        """The last block of a run: what it gained, what it cost, and where to look."""
        self.bar.close()
        wall = time.perf_counter() - self.started
        log_block(summary(evaluations, final, self.steps, wall, self.seconds, self.peak_gib), RESULT)

    def close(self) -> None:
        progress.rest()
        self.bar.close()
        self.metrics_file.close()
        if self.events is not None:
            self.events.file.close()


def markdown_table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table; cells are shown literally, line breaks as arrows."""

    def cell(text: str) -> str:
        return "`" + visible(text.replace("`", "'").replace("\n", " ↵ "))[:2000] + "`"

    lines = [" | ".join(header), " | ".join("---" for _ in header)]
    return "\n".join(lines + [" | ".join(cell(text) for text in row) for row in rows])
