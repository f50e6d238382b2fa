"""What a run leaves to look at: TensorBoard, metrics.jsonl, training.log, and a progress bar or plain lines.

metrics.jsonl is part of what must not be lost: a step is on the disk when write_step returns, or the run stops. The
rest is for looking at: where it cannot be written, one warning says so and training goes on.
"""

import json
import logging
import math
import os
import re
import resource
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter
from torch import Tensor
from torch.utils.tensorboard.summary import histogram, hparams, scalar, text
from tqdm import tqdm

from src.distributed import gather
from src.storage import StorageError, storage_problem, write_file

logger = logging.getLogger("grpo")

# Final metrics by which the HParams page sorts runs
HPARAM_METRICS = ("eval/greedy", "eval/pass@1", "eval/pass@8", "train/reward")


class Console(logging.StreamHandler):
    """Lines on the terminal, above a progress bar; when the terminal is gone, training goes on without it."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            tqdm.write(self.format(record), file=sys.stdout)
            sys.stdout.flush()  # into a pipe as well: what was logged before a kill has been seen
        except (OSError, ValueError):
            logger.removeHandler(self)


def configure_logging(log_file: Path | None = None) -> None:
    """Log to the terminal, and once a run folder exists to its training.log."""
    logger.setLevel(logging.INFO)
    logger.propagate = False
    if not logger.handlers:
        logger.addHandler(Console(sys.stdout))
    for handler in [h for h in logger.handlers if isinstance(h, logging.FileHandler)]:
        logger.removeHandler(handler)
        handler.close()
    if log_file is not None:
        try:
            handler = logging.FileHandler(log_file, encoding="utf-8")
        except OSError as error:
            logger.warning(f"{log_file} cannot be written ({error.strerror}); the log is only on the terminal")
            return
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", datefmt="%Y-%m-%d %H:%M:%S"))
        logger.addHandler(handler)


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

    def __init__(self, run_folder: Path, first_step: int, max_steps: int):
        """`first_step`: the first step to be written; what an earlier process wrote from there on is dropped."""
        configure_logging(run_folder / "training.log")
        self.metrics_file = MetricsFile(run_folder / "metrics.jsonl", first_step)
        self.events: EventFile | None = None
        try:
            self.events = EventFile(run_folder / "tb", first_step)
        except Exception as error:
            self.lose_events(error)
        self.bar = tqdm(
            total=max_steps,
            initial=max(first_step - 1, 0),
            unit="step",
            disable=not sys.stdout.isatty(),
            file=sys.stdout,
            dynamic_ncols=True,
        )
        self.max_steps = max_steps

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
        clean = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
        self.metrics_file.write({"step": step, **clean})
        self.write_events(lambda: [scalar(name, value) for name, value in metrics.items()], step)
        if step == 0:
            return
        self.bar.update(1)
        reward, speed = metrics["train/reward"], metrics["rollout/tokens_per_second"]
        self.bar.set_postfix_str(f"reward {reward:.3f}, {speed:,.0f} tokens/s")
        if self.bar.disable:
            seconds = metrics["time/rollout"] + metrics["time/update"]
            logger.info(
                f"step {step}/{self.max_steps}  reward {reward:.3f}  "
                f"answer {metrics.get('train/answer', math.nan):.3f}  "
                + (f"kl {metrics['train/kl_k3']:.4f}  " if "train/kl_k3" in metrics else "")
                + (f"entropy {metrics['train/entropy']:.3f}  " if "train/entropy" in metrics else "")
                + f"length {metrics['rollout/length']:.1f}  {speed:,.0f} tokens/s  {seconds:.2f} s"
            )

    def write_text(self, tag: str, content: str, step: int) -> None:
        self.write_events(lambda: [text(tag, content)], step)

    def write_histogram(self, tag: str, values, step: int) -> None:
        self.write_events(lambda: [histogram(tag, values, bins=30)], step)

    def write_hparams(self, settings: dict, metrics: dict[str, float]) -> None:
        """Settings with final metrics for TensorBoard's HParams page, in the run's own event file."""
        final = {name: metrics[name] for name in HPARAM_METRICS if name in metrics}
        plain = {
            name: value if isinstance(value, bool | int | float | str) else str(value)
            for name, value in settings.items()
        }
        self.write_events(lambda: list(hparams(plain, final)))

    def close(self) -> None:
        self.bar.close()
        self.metrics_file.close()
        if self.events is not None:
            self.events.file.close()


def peak_memory(device: torch.device) -> int:
    """Largest number of bytes in use so far: by torch on a GPU, by the whole process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


class Means:
    """Means over all elements of a step, of tensors that arrive micro-batch by micro-batch (or their min or max)."""

    def __init__(self):
        self.totals: dict[str, float] = {}
        self.counts: dict[str, int] = defaultdict(int)

    def add(self, name: str, values: Tensor) -> None:
        if values.numel() > 0:
            extreme = name.endswith(("_min", "_max"))
            value = getattr(values.detach(), name[-3:] if extreme else "sum")()
            self.merge(name, float(value), 1 if extreme else values.numel())

    def merge(self, name: str, value: float, count: int) -> None:
        if name.endswith(("_min", "_max")):
            chosen = min if name.endswith("_min") else max
            self.totals[name], self.counts[name] = chosen(self.totals.get(name, value), value), 1
        else:
            self.totals[name] = self.totals.get(name, 0.0) + value
            self.counts[name] += count

    def result(self) -> dict[str, float]:
        """Over all processes of the run."""
        means = Means()
        for totals, counts in gather((self.totals, dict(self.counts))):
            for name, value in totals.items():
                means.merge(name, value, counts[name])
        return {name: value / means.counts[name] for name, value in means.totals.items()}


def markdown_table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table; cells are shown literally, line breaks as arrows."""

    def cell(text: str) -> str:
        return "`" + text.replace("`", "'").replace("|", "\\|").replace("\n", " ↵ ")[:2000] + "`"

    lines = [" | ".join(header), " | ".join("---" for _ in header)]
    return "\n".join(lines + [" | ".join(cell(text) for text in row) for row in rows])
