"""What a run leaves to look at: TensorBoard, metrics.jsonl, training.log, and a progress bar or plain lines."""

import json
import logging
import math
import os
import sys
from collections import defaultdict
from pathlib import Path

from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams
from tqdm import tqdm

logger = logging.getLogger("grpo")

# Final metrics by which the HParams page sorts runs
HPARAM_METRICS = ("eval/greedy", "eval/pass@1", "eval/pass@8", "train/reward")


def configure_logging(log_file: Path | None = None) -> None:
    """Log to the terminal, and once a run folder exists to its training.log."""
    logger.setLevel(logging.INFO)
    logger.propagate = False
    if not logger.handlers:
        console = logging.StreamHandler(sys.stdout)
        console.setFormatter(logging.Formatter("%(message)s"))
        # a line printed under a progress bar would break it
        console.emit = lambda record: tqdm.write(console.format(record), file=sys.stdout)
        logger.addHandler(console)
    for handler in [h for h in logger.handlers if isinstance(h, logging.FileHandler)]:
        logger.removeHandler(handler)
        handler.close()
    if log_file is not None:
        handler = logging.FileHandler(log_file, encoding="utf-8")
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", datefmt="%Y-%m-%d %H:%M:%S"))
        logger.addHandler(handler)


def keep_lines_through(path: Path, step: int) -> None:
    """Drop metrics of steps after `step`, which a resumed run will take again, and a broken last line."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line)
        except (json.JSONDecodeError, KeyError, TypeError):
            continue
    beside = path.with_name(path.name + ".partial")
    beside.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
    os.replace(beside, path)  # a crash here must not lose the steps that are kept


class Telemetry:
    """Writers of one run folder. Every key of metrics.jsonl is a TensorBoard tag."""

    def __init__(self, run_folder: Path, first_step: int, max_steps: int):
        """`first_step`: the first step to be written; what an earlier process wrote from there on is dropped."""
        configure_logging(run_folder / "training.log")
        keep_lines_through(run_folder / "metrics.jsonl", first_step - 1)
        self.metrics_file = (run_folder / "metrics.jsonl").open("a", encoding="utf-8")
        self.writer = SummaryWriter(str(run_folder / "tb"), purge_step=first_step)
        self.bar = tqdm(
            total=max_steps,
            initial=max(first_step - 1, 0),
            unit="step",
            disable=not sys.stdout.isatty(),
            file=sys.stdout,
            dynamic_ncols=True,
        )
        self.max_steps = max_steps

    def write_step(self, step: int, metrics: dict[str, float]) -> None:
        """One JSON line, one point per TensorBoard tag, one step of the bar."""
        clean = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
        self.metrics_file.write(json.dumps({"step": step, **clean}) + "\n")
        self.metrics_file.flush()
        for name, value in metrics.items():
            self.writer.add_scalar(name, value, step)
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

    def write_text(self, tag: str, text: str, step: int) -> None:
        self.writer.add_text(tag, text, step)

    def write_histogram(self, tag: str, values, step: int) -> None:
        self.writer.add_histogram(tag, values, step)

    def write_hparams(self, settings: dict, metrics: dict[str, float]) -> None:
        """Settings with final metrics for TensorBoard's HParams page, in the run's own event file."""
        final = {name: metrics[name] for name in HPARAM_METRICS if name in metrics}
        plain = {
            name: value if isinstance(value, bool | int | float | str) else str(value)
            for name, value in settings.items()
        }
        for summary in hparams(plain, final):
            self.writer.file_writer.add_summary(summary)

    def close(self) -> None:
        self.bar.close()
        self.writer.close()
        self.metrics_file.close()


class Means:
    """Means over all elements of a step, of tensors that arrive micro-batch by micro-batch (or their min or max)."""

    def __init__(self):
        self.totals: dict[str, float] = {}
        self.counts: dict[str, int] = defaultdict(int)

    def add(self, name: str, values: Tensor) -> None:
        values = values.detach()
        if values.numel() == 0:
            return
        if name.endswith(("_min", "_max")):
            chosen = min if name.endswith("_min") else max
            value = float(getattr(values, name[-3:])())
            self.totals[name] = chosen(self.totals.get(name, value), value)
            self.counts[name] = 1
        else:
            self.totals[name] = self.totals.get(name, 0.0) + float(values.sum())
            self.counts[name] += values.numel()

    def result(self) -> dict[str, float]:
        return {name: total / self.counts[name] for name, total in self.totals.items()}


def markdown_table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table; cells are shown literally, line breaks as arrows."""

    def cell(text: str) -> str:
        return "`" + text.replace("`", "'").replace("|", "\\|").replace("\n", " ↵ ")[:2000] + "`"

    lines = [" | ".join(header), " | ".join("---" for _ in header)]
    return "\n".join(lines + [" | ".join(cell(text) for text in row) for row in rows])
