"""A training step of two checkouts in turn: which is faster, also on a machine whose speed changes all the time.

    git clone . ../before && git -C ../before checkout COMMIT && (cd ../before && uv sync)
    uv run python -m benchmarks.in_turn ../before --steps 100

Both train the same config, each with the Python of its own checkout, and one waits while the other makes a step: A B,
B A, A B ... After `--warm_up` steps each pair is a ratio; what is said is their geometric mean with its 95% interval
(of their logarithms), in seconds and in seconds of processors. Nothing of the checkouts is changed: the runs go to a
temporary folder. The last line of stdout is one JSON document.
"""

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.frontier import interval

PROJECT = Path(__file__).resolve().parent.parent
CHILD = """
import os, runpy, sys, time
folder, written, read = sys.argv[1], os.fdopen(int(sys.argv[2]), "w"), os.fdopen(int(sys.argv[3]))
sys.argv = [os.path.join(folder, "main.py"), *sys.argv[4:]]
sys.path.insert(0, folder)
import src.train_grpo as method
train_step = method.train_step
def step(*given, **named):
    if not read.readline():
        sys.exit("the other checkout has ended")
    begun = time.perf_counter(), time.process_time()
    found = train_step(*given, **named)
    print(time.perf_counter() - begun[0], time.process_time() - begun[1], file=written, flush=True)
    return found
method.train_step = step
runpy.run_path(sys.argv[0], run_name="__main__")
"""


class Checkout:
    """A run in a process of its own, that makes a step when it is told to."""

    def __init__(self, folder: Path, config: str, options, output: Path):
        output.mkdir()
        self.log = output / "log"
        python = folder / ".venv" / "bin" / "python"
        theirs, written = os.pipe()
        read, ours = os.pipe()
        words = ["--config", str(folder / config), "--dataset_name", options.dataset_name]
        for setting in (f"training.max_steps={options.steps}", *options.set):
            words += ["--set", setting]
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [str(python) if python.exists() else sys.executable, "-c", CHILD, str(folder), str(written), str(read),
                 *words],
                cwd=output, pass_fds=(written, read), stdout=log, stderr=log,
            )  # fmt: skip
        os.close(written), os.close(read)
        self.said, self.told = os.fdopen(theirs), os.fdopen(ours, "w")

    def step(self) -> tuple[float, float]:
        """Seconds, and seconds of processors."""
        try:
            self.told.write("go\n")
            self.told.flush()
            wall, processors = map(float, self.said.readline().split())
        except (OSError, ValueError) as error:
            raise SystemExit(f"a run has ended: {self.log.read_text().strip()[-2000:]}") from error
        return wall, processors


def mean_ratio(ratios: Sequence[float]) -> list[float]:
    """Geometric mean, and the ends of its 95% interval."""
    mean, half = interval([math.log(ratio) for ratio in ratios])
    return [round(math.exp(value), 3) for value in (mean, mean - half, mean + half)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path, help="the folder of the other checkout")
    parser.add_argument("--config", default="configs/recipes/grpo.yaml")
    parser.add_argument("--before_config", help="where the other checkout has another one")
    parser.add_argument("--dataset_name", default="countdown")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--warm_up", type=int, default=4)
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="of both configs")
    options = parser.parse_args()
    if options.steps < options.warm_up + 2:
        parser.error("an interval wants two pairs or more; let --steps be --warm_up + 2 at least")
    options.set = ["training.eval_interval=0", "data.eval_size=16", "data.eval_samples=1", *options.set]
    with tempfile.TemporaryDirectory() as folder:
        sides = {
            "before": Checkout(options.before.resolve(), options.before_config or options.config, options,
                               Path(folder) / "before"),
            "now": Checkout(PROJECT, options.config, options, Path(folder) / "now"),
        }  # fmt: skip
        steps: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
        for number in range(options.steps):
            for name in sorted(sides, reverse=number % 2 == 1):
                steps[name].append(sides[name].step())
        for side in sides.values():
            side.process.wait()
    taken = {name: found[options.warm_up :] for name, found in steps.items()}
    document = {"benchmark": "in_turn", "date": time.strftime("%Y-%m-%d"), "pairs": len(taken["now"])}
    for place, what in enumerate(("seconds", "processor_seconds")):
        values = {name: [step[place] for step in found] for name, found in taken.items()}
        ratios = [before / now for before, now in zip(values["before"], values["now"], strict=True)]
        document[what] = {name: round(statistics.median(found), 4) for name, found in values.items()}
        document[f"ratio_of_{what}"] = mean_ratio(ratios)
        print(f"{what}: before {document[what]['before']}, now {document[what]['now']}; before over now "
              "{} [{}, {}]".format(*document[f"ratio_of_{what}"]), file=sys.stderr)  # fmt: skip
    print(json.dumps(document))


if __name__ == "__main__":
    main()
