"""Train once undisturbed, and again with SIGKILL at bad moments: is everything that is left behind the same?

    uv run python -m benchmarks.kill_storm               # 50 kills, minutes on 2 cores
    uv run python -m benchmarks.kill_storm --kills 3     # the short form

Of three kills one comes within the time that a save takes, one within a step, and one at any moment of the process.
Compared, bit for bit: weights in final/, all of the last checkpoint, metrics.jsonl without times and memory; and that
TensorBoard shows each step once. The last line of stdout is one JSON document; the exit code is 1 if anything differs.

A life is main.py in a process of its own, forked from one that has imported torch and done nothing with it.
"""

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterable
from multiprocessing import get_context
from pathlib import Path

import torch
import yaml
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tqdm import tqdm

from src.config import dump_config, load_config
from src.run.checkpoint import list_checkpoints, step_of
from src.run.reading import read_rows

PROJECT = Path(__file__).resolve().parent.parent
BASE = PROJECT / "configs" / "configs_tiny" / "config_kl_beta0.04_tiny.yaml"
SAVE_SECONDS = 0.2  # about what a save takes, most of it fsync
KINDS = ("save", "step", "any")  # moments of a kill, in turn
SMALL = {
    "data": {"train_size": 64, "eval_size": 8, "eval_samples": 1},
    "training": {"batch_size": 32, "num_questions_per_batch": 4, "minibatches": 2, "max_gen_len": 32, "warmup_steps": 0,
                 "eval_interval": 5, "ckpt_save_interval": 1, "keep_checkpoints": 2},
}  # fmt: skip
PROCESSES = get_context("forkserver")
PROCESSES.set_forkserver_preload(["main", "src.commands", "src.train_grpo"])


def write_config(folder: Path, steps: int) -> Path:
    """The tiny config, smaller still, with a checkpoint every step."""
    config = yaml.safe_load(dump_config(load_config(BASE)))
    path = str(PROJECT / config["model"]["pretrained_model_path"])
    config["model"] |= {"device": "cpu", "pretrained_model_path": path}
    for section, values in SMALL.items():
        config[section] |= values
    config["training"]["max_steps"] = steps
    path = folder / "storm.yaml"
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    return path


def live(config: Path, work: Path) -> None:
    """What a life does: main.py, its output kept in a file."""
    import main  # here: the program that starts the lives needs nothing of it

    os.chdir(work)
    output = os.open("output.txt", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.dup2(output, 1)
    os.dup2(output, 2)
    torch.set_num_threads(1)
    tqdm.set_lock(threading.RLock())  # its own is a semaphore of the system, which a kill would leave behind
    sys.argv = ["main.py", "--config", str(config), "--dataset_name", "countdown"]
    sys.exit(main.main())


def start(config: Path, work: Path):
    """A life begins."""
    work.mkdir(exist_ok=True)
    process = PROCESSES.Process(target=live, args=(config, work))
    process.start()
    return process


def finish(process, work: Path) -> None:
    """Wait for a process that nobody kills; it has to end well."""
    process.join()
    if process.exitcode != 0:
        raise SystemExit(f"the training failed by itself, see its output:\n{(work / 'output.txt').read_text()[-3000:]}")


def run_folder(work: Path) -> Path:
    return work / "runs" / "storm_countdown"


def saving(work: Path, since: float) -> bool:
    """Whether a checkpoint or the final model has been half written since then (time.time())."""
    for partial in [*run_folder(work).glob("checkpoints/*.partial"), run_folder(work) / "final.partial"]:
        try:
            if partial.stat().st_mtime >= since:
                return True
        except FileNotFoundError:  # it has just got its name
            continue
    return False


def steps_done(work: Path) -> int:
    """The step of the newest checkpoint, 0 before the first."""
    return max(map(step_of, list_checkpoints(run_folder(work) / "checkpoints")), default=0)


def kill_once(config: Path, work: Path, kind: str, delay: float) -> str | None:
    """One life that ends by SIGKILL, `delay` after its start, after it began to save, or after it has saved a step.

    Returns where it was killed; None if it came to its end before.
    """
    before, born, process = steps_done(work), time.time(), start(config, work)

    def waits() -> bool:
        if kind == "save":
            return not saving(work, born)
        return kind == "step" and (steps_done(work) == before or saving(work, born))

    while process.is_alive() and waits():
        time.sleep(0.001)
    end = time.monotonic() + delay
    while process.is_alive() and time.monotonic() < end:
        time.sleep(0.001)
    process.kill()
    process.join()
    if process.exitcode != -signal.SIGKILL:
        finish(process, work)
        return None
    if saving(work, born):
        return "save"
    rows = read_rows(run_folder(work) / "metrics.jsonl")
    within = steps_done(work) > 0 and rows[-1]["step"] == steps_done(work)  # the next step is not written yet
    return "step" if within else "between"


def metrics_of(folder: Path) -> list[dict]:
    """metrics.jsonl without what a clock or the machine decides."""
    timed = ("time/", "memory/")
    return [
        {k: v for k, v in row.items() if not k.startswith(timed) and "per_second" not in k}
        for row in read_rows(folder / "metrics.jsonl")
    ]


def shown_steps(folder: Path) -> dict[str, list[int]]:
    """Tag -> steps, as TensorBoard shows them."""
    events = EventAccumulator(str(folder / "tb"), size_guidance={"scalars": 0})
    events.Reload()
    return {tag: [event.step for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def training_state(folder: Path) -> dict:
    """Optimizer, controllers, evaluations. Not the generators: each process starts them elsewhere, nothing draws."""
    newest = list_checkpoints(folder / "checkpoints")[-1]
    run, engine = (torch.load(newest / f"{name}_state.pt", weights_only=True) for name in ("training", "engine"))
    return {name: value for name, value in (run | engine).items() if not name.endswith("_rng")}


def same(left, right) -> bool:
    """Whether two nested states hold the same bits."""
    if isinstance(left, torch.Tensor):
        return left.dtype == right.dtype and torch.equal(left, right)
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(left[name], right[name]) for name in left)
    if isinstance(left, list | tuple):
        return len(left) == len(right) and all(same(a, b) for a, b in zip(left, right, strict=True))
    return left == right


def differences(quiet: Path, stormy: Path) -> Iterable[str]:
    """Names of everything that is not the same in two run folders."""
    for name in ("config.yaml", "final/config.json"):
        if (quiet / name).read_bytes() != (stormy / name).read_bytes():
            yield name
    if not same(*(load_file(folder / "final" / "model.safetensors") for folder in (quiet, stormy))):
        yield "final weights"
    if not same(*(training_state(folder) for folder in (quiet, stormy))):
        yield "training state of the last checkpoint"
    if metrics_of(quiet) != metrics_of(stormy):
        yield "metrics.jsonl"
    expected = {}
    for row in read_rows(quiet / "metrics.jsonl"):
        for tag in row.keys() - {"step"}:
            expected.setdefault(tag, []).append(row["step"])
    for which, folder in (("quiet", quiet), ("killed", stormy)):
        shown = shown_steps(folder)
        yield from (f"TensorBoard, {which} run: {tag}" for tag in expected if shown.get(tag) != expected[tag])
    names = [sorted(path.name for path in (folder / "checkpoints").iterdir()) for folder in (quiet, stormy)]
    if names[0] != names[1]:
        yield f"checkpoints: {names[0]} and {names[1]}"


def storm(folder: Path, kills: int, steps: int, seed: int) -> dict:
    """The whole experiment in `folder`; what the last line of output says."""
    started, moment = time.monotonic(), random.Random(seed)
    config, quiet = write_config(folder, steps), folder / "quiet"
    start(config, quiet).kill()  # the first life waits for imports
    began = time.monotonic()
    process = start(config, quiet)
    while process.is_alive() and steps_done(quiet) == 0:
        time.sleep(0.01)
    first = time.monotonic() - began  # loading, evaluation, one step
    finish(process, quiet)
    undisturbed = time.monotonic() - began
    step = min(row["time/rollout"] + row["time/update"] for row in read_rows(run_folder(quiet) / "metrics.jsonl")[1:])
    places, round_, wrong = [], 1, []
    while True:  # a run that comes to its end before all kills are done is compared, and another one begun
        work, place = folder / f"killed{round_}", ""
        while len(places) < kills and place is not None:
            kind = KINDS[len(places) % len(KINDS)]
            longest = {"save": SAVE_SECONDS, "step": 0.5 * step, "any": undisturbed}[kind]
            delay = 0.0 if not places else moment.uniform(0, longest)
            place = kill_once(config, work, kind, delay)
            if place is not None:
                places.append(place)
                print(f"run {round_}, kill {len(places)}: {place}, {steps_done(work)} steps saved", flush=True)
        if place is not None:
            finish(start(config, work), work)
        wrong += [f"run {round_}: {difference}" for difference in differences(run_folder(quiet), run_folder(work))]
        if len(places) == kills:
            break
        round_ += 1
    return {
        "benchmark": "kill_storm",
        "kills": len(places),
        "kills_during_save": places.count("save"),
        "kills_within_step": places.count("step"),
        "identical": not wrong,
        "different": wrong,
        "runs": round_,
        "steps": steps,
        "seed": seed,
        "seconds": round(time.monotonic() - started, 1),
        "seconds_undisturbed": round(undisturbed, 1),
        "seconds_to_first_step": round(first, 1),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--steps", type=int, default=24, help="length of the training")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="kill_storm_") as folder:
        result = storm(Path(folder), arguments.kills, arguments.steps, arguments.seed)
    print(json.dumps(result))
    return 0 if result["identical"] else 1


if __name__ == "__main__":
    sys.exit(main())
