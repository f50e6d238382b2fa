"""What a run says: lines of the log on the terminal, blocks of facts, the first completions, warnings, the summary.

What a model or a data set wrote is hostile: nothing of it reaches a terminal before `visible`.
"""

import logging
import math
import os
import shlex
import sys
import textwrap
import threading
import time
from collections.abc import Callable
from pathlib import Path

logger = logging.getLogger("grpo")
WIDTH, INDENT = 100, 12
RESULT = 25  # a level between INFO and WARNING: what a run comes to, shown with --quiet as well
PREFIXES = {logging.WARNING: "warning: ", logging.ERROR: "error: "}

# ---------------------------------------------------------------------------------------------------------------------
# Text of a model
# ---------------------------------------------------------------------------------------------------------------------


def visible(text: str) -> str:
    """Control characters, escape sequences, bidirectional marks and the like as \\x1b and \\u202e; line breaks stay."""
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)


def shortened(text: str, limit: int = 800) -> str:
    """Begin and end of a long text, with the number of characters between them that are left out."""
    left_out = len(text) - limit
    return text if left_out <= 0 else f"{text[: limit // 2]} [... {left_out:,} characters ...] {text[-limit // 2 :]}"


def quoted(label: str, text: str) -> str:
    """A text of somebody else's: every line of it behind a bar, so that it cannot pass for a line of the log."""
    if text.count("\n") > 20:
        text = text.replace("\n", " ↵ ")
    lines, width = [], WIDTH - INDENT - 2
    for line in visible(text).split("\n"):
        lines += [line[start : start + width] for start in range(0, len(line) or 1, width)]
    return "\n".join(f"{label if number == 0 else '':<{INDENT}}| {line}" for number, line in enumerate(lines))


def fact(label: str, text: str) -> str:
    """`label` and what is to be said of it, as one entry of an aligned block; lines do not break at a NUL."""
    filled = textwrap.fill(
        text,
        WIDTH,
        initial_indent=label.ljust(INDENT),
        subsequent_indent=" " * INDENT,
        break_long_words=False,
        break_on_hyphens=False,
    )
    return filled.replace("\0", " ")


def log_block(block: str, level: int = logging.INFO) -> None:
    """Line by line, so that the times in training.log do not shift the first one."""
    for line in block.split("\n"):
        logger.log(level, line)


def tokens_line(tokenizer, token_ids: tuple[int, ...]) -> str:
    """Number, first and last tokens of a prompt: a missing generation prompt or a doubled BOS is seen here."""
    shown = [f"{token}\0{tokenizer.decode([token])!r}".replace(" ", "\0") for token in token_ids]
    if len(shown) > 10:
        shown = [*shown[:3], "...", *shown[-6:]]
    return f"{len(token_ids)} tokens: {', '.join(shown)}"


def best_and_worst(groups: list) -> list[tuple]:
    """(group, episode) of the highest and of the lowest reward; of equal ones, two of different groups that teach."""
    pairs = [(group, episode) for group in groups for episode in group.episodes]
    pairs.sort(key=lambda pair: not any(pair[1].advantages))
    rewards = [episode.reward for _, episode in pairs]
    tops = [pair for pair in pairs if pair[1].reward == max(rewards)]
    bottoms = [pair for pair in pairs if pair[1].reward == min(rewards)]
    for top in tops:
        for bottom in bottoms:
            if bottom[0] is not top[0]:
                return [top, bottom]
    return [tops[0], bottoms[-1]] if len(pairs) > 1 else pairs


def first_completions(step: int, groups: list) -> str:
    """The best and the worst completion of a step with every part of their rewards."""
    count, blocks = sum(len(group.episodes) for group in groups), []
    for name, (group, episode) in zip(("best", "worst"), best_and_worst(groups), strict=False):
        parts = ", ".join(f"{part} {value:.3f}" for part, value in (episode.reward_parts or {}).items())
        head = (
            f"{episode.reward:.3f} ({parts}), advantage {sum(episode.advantages) / episode.length:+.2f}, "
            f"{episode.length} tokens, {'finished' if episode.finished else 'cut off by max_gen_len'}"
        )
        prompt, completion = shortened(group.problem.prompt_text, 400), shortened(episode.text)
        blocks += [f"the {name} of the {count} completions of step {step}"]
        blocks += [quoted("prompt", prompt), quoted("completion", completion), fact("reward", head)]
    return "\n".join(blocks)


# ---------------------------------------------------------------------------------------------------------------------
# The log
# ---------------------------------------------------------------------------------------------------------------------


class LineFormatter(logging.Formatter):
    """The message without anything a terminal would obey; warnings say that they are."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        record.message = PREFIXES.get(record.levelno, "") + visible(record.message)
        return super().formatMessage(record)


class Console(logging.StreamHandler):
    """Lines on the terminal, above a progress bar; when the terminal is gone, training goes on without it."""

    def __init__(self, log_every: int | None = None, quiet: bool = False):
        """`log_every`: which steps get a line; None: every step, but none where there is a bar."""
        super().__init__(sys.stdout)
        self.log_every, self.last_line = log_every, time.monotonic()
        self.setLevel(RESULT if quiet else logging.INFO)
        self.setFormatter(LineFormatter())

    def has_bar(self) -> bool:
        return self.level < RESULT and sys.stdout.isatty()

    def wants(self, record: logging.LogRecord) -> bool:
        """Lines of steps have `step` and `last`; all others are shown."""
        if not hasattr(record, "step"):
            return True
        if self.log_every is None:
            return not self.has_bar()
        return getattr(record, "last", False) or record.step % self.log_every == 0

    def emit(self, record: logging.LogRecord) -> None:
        from tqdm import tqdm  # here: --help must stay instant

        try:
            if self.wants(record):
                self.last_line = time.monotonic()
                encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
                line = self.format(record).encode(encoding, "backslashreplace").decode(encoding)
                tqdm.write(line, file=sys.stdout)
                sys.stdout.flush()  # into a pipe as well: what was logged before a kill has been seen
        except (OSError, ValueError):
            logger.removeHandler(self)


def configure_console(log_every: int | None = None, quiet: bool = False) -> None:
    """The command line's choice of what the terminal shows; training.log has every line."""
    for handler in [h for h in logger.handlers if isinstance(h, Console)]:
        logger.removeHandler(handler)
    logger.addHandler(Console(log_every, quiet))
    configure_logging()


def shows_bar() -> bool:
    """Whether steps are a progress bar: on a terminal that is not to be quiet."""
    return any(isinstance(handler, Console) and handler.has_bar() for handler in logger.handlers)


def configure_logging(log_file: Path | None = None) -> None:
    """Log to the terminal, and once a run folder exists to its training.log."""
    logger.setLevel(logging.INFO)
    logger.propagate = False
    if not logger.handlers:
        logger.addHandler(Console())
    for handler in [h for h in logger.handlers if isinstance(h, logging.FileHandler)]:
        logger.removeHandler(handler)
        handler.close()
    if log_file is not None:
        try:
            handler = logging.FileHandler(log_file, encoding="utf-8")
        except OSError as error:
            logger.warning(f"{log_file} cannot be written ({error.strerror}); the log is only on the terminal")
            return
        handler.setFormatter(LineFormatter("%(asctime)s %(message)s", datefmt="%Y-%m-%d %H:%M:%S"))
        logger.addHandler(handler)


class Progress:
    """What goes on, where nothing else has been said for SILENCE seconds: a line, or on a terminal the bar's end.

    A thread, because one call of torch can take minutes. `report` is what the engine calls; how much is done it asks
    for only now and then, as the answer may wait for a GPU.
    """

    SILENCE = 10.0

    def __init__(self) -> None:
        self.show: Callable[[str], None] | None = None  # where a terminal has a bar: puts a text at its end
        self.doing, self.share, self.since, self.asked = "", 0.0, time.monotonic(), 0.0
        self.thread: threading.Thread | None = None

    def report(self, doing: str, share: Callable[[], float] = lambda: 0.0) -> None:
        """`doing` goes on, and this share of it is done."""
        if self.thread is None:
            self.thread = threading.Thread(target=self.watch, daemon=True)
            self.thread.start()
        now = time.monotonic()
        if doing != self.doing:
            self.doing, self.share, self.since, self.asked = doing, 0.0, now, now
        elif now - self.asked > 0.5:
            latest, self.asked = share(), now
            if latest < self.share:  # it has begun anew
                self.since = now
            self.share = latest
            if self.show and now - self.since > 1:
                self.show(self.text())

    def text(self) -> str:
        """`sampling: 40%, about 0:18 left`."""
        so_far = time.monotonic() - self.since
        if self.share <= 0.02:
            return f"{self.doing}: {clock(so_far)} so far"
        return f"{self.doing}: {self.share:.0%}, about {clock(so_far * (1 - self.share) / self.share)} left"

    def watch(self) -> None:
        while True:
            time.sleep(min(1.0, self.SILENCE / 2))
            consoles = [handler for handler in logger.handlers if isinstance(handler, Console)]
            listening = [console for console in consoles if console.level <= logging.INFO]
            silent = all(time.monotonic() - console.last_line > self.SILENCE for console in listening)
            if self.doing and listening and silent and not self.show:
                logger.info(self.text())

    def rest(self) -> None:
        """Nothing goes on any more that should be told of."""
        self.doing, self.show = "", None


progress = Progress()  # of the process


# ---------------------------------------------------------------------------------------------------------------------
# Steps and their end
# ---------------------------------------------------------------------------------------------------------------------


def clock(seconds: float) -> str:
    """3:20 or 1:03:20."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def step_line(step: int, max_steps: int, metrics: dict[str, float], left: float) -> str:
    """One step in one line; `left` is in seconds."""
    seconds = metrics["time/rollout"] + metrics["time/update"]
    kl = metrics.get("train/kl", metrics.get("train/kl_k3"))  # the exact one, where it is known
    words = [
        f"step {step}/{max_steps}",
        f"reward {metrics['train/reward']:.3f}",
        f"answer {metrics['reward/answer']:.3f}" if "reward/answer" in metrics else "",
        f"kl {kl:.4f}" if kl is not None else "",
        f"entropy {metrics['train/entropy']:.3f}" if "train/entropy" in metrics else "",
        f"length {metrics['rollout/length']:.1f}",
        f"{metrics['rollout/tokens_per_second']:,.0f} tokens/s",
        f"{seconds:.2f} s",
        f"{clock(left)} left" if step < max_steps else "",
    ]
    return "  ".join(filter(None, words))


class Stalls:
    """Says when steps teach nothing: at the first such step, then once when 10 in a row did, once at 100, ...

    And once when a penalty's target was not exceeded by any completion of SHUT steps in a row.

    No completion right is judged by the `answer` part, as a reward for form alone can rise while nothing is solved.
    """

    SHUT = 20

    def __init__(self):
        self.in_a_row = {"wrong": 0, "flat": 0}
        self.next_warning = {"wrong": 1, "flat": 1}
        self.shut: dict[str, int] = {}

    def look(self, step: int, metrics: dict[str, float]) -> None:
        for name in [name for name in metrics if name.startswith("train/beyond_target/")]:
            self.shut[name] = self.shut.get(name, 0) + 1 if metrics[name] == 0 else 0
            if self.shut[name] == self.SHUT:
                penalty = name.rpartition("/")[2]
                key = "ot_target" if penalty == "ot" else "kl_target"
                value = metrics.get(f"train/{penalty}", metrics.get("train/kl_k3", math.nan))
                logger.warning(
                    f"in the last {self.SHUT} steps no completion exceeded training.{key}, so {penalty} did nothing: "
                    f"its mean is {value:.2g}; lower {key}, or leave the penalty out"
                )
        flat = metrics.get("train/groups_without_variance") == 1
        wrong = metrics.get("reward/answer", 1) <= 0
        for name, found in (("wrong", wrong), ("flat", flat and not wrong)):
            self.in_a_row[name] = self.in_a_row[name] + 1 if found else 0
            if self.in_a_row[name] >= self.next_warning[name]:
                when = (
                    f"step {step}" if self.in_a_row[name] == 1 else f"steps {step + 1 - self.in_a_row[name]} to {step}"
                )
                logger.warning(f"{when}: " + (self.no_answer(metrics, flat) if wrong else self.no_variance()))
                self.next_warning[name] *= 10

    @staticmethod
    def no_answer(metrics: dict[str, float], flat: bool) -> str:
        return (
            f"no completion was right, {metrics['rollout/finished']:.0%} of the last ended before max_gen_len"
            + (", and all rewards of a group are equal, so there is nothing to learn" if flat else "")
            + "; look at prompt and completions in training.log, and if they are as they should be, take easier "
            "problems, a better model or more completions a prompt (batch_size / num_questions_per_batch)"
        )

    @staticmethod
    def no_variance() -> str:
        return (
            "in every group all rewards are equal, so there is nothing to learn; take more completions a prompt "
            "(batch_size / num_questions_per_batch), a higher temperature, or problems that are neither solved "
            "always nor never"
        )


def viewer(folder: Path) -> str:
    """The command that shows the curves below a folder, as this user can type it."""
    prefix = "uv run " if "UV" in os.environ else ""  # uv sets it for what it runs, and its programs are on no PATH
    return f"{prefix}tensorboard --logdir {shlex.quote(str(folder))}"


def summary(
    evaluations: dict[str, str], final: Path, steps: int, wall: float, seconds: dict[str, float], peak_gib: float
) -> str:
    """The last block of a run. `steps` and `wall` seconds are those of this process; `seconds` of the steps by purpose.

    What is to be copied stands in one line.
    """
    lines = [fact(name, text) for name, text in evaluations.items()]
    if steps:
        total = sum(seconds.values())
        shares = ", ".join(f"{purpose} {value / total:.0%}" for purpose, value in seconds.items())  # evaluations too
        lines.append(fact("time", f"{steps} steps here in {clock(wall)}, {total / steps:.2f} s a step ({shares})"))
        lines.append(fact("memory", f"{peak_gib:.1f} GiB at its peak"))
    lines += [f"{'model':<{INDENT}}{final}", f"{'curves':<{INDENT}}{viewer(final.parent.parent)}"]
    return "\n".join(lines)
