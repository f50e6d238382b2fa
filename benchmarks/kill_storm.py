"""Train once undisturbed, and again with SIGKILL at random moments: is everything that is left behind the same?

    uv run python -m benchmarks.kill_storm               # 50 kills, about 10 minutes on 2 cores
    uv run python -m benchmarks.kill_storm --kills 5     # the short form

Every second kill waits for a save to begin and comes within the time a save takes; the others come at random moments
after the start of the process. Compared, bit for bit: weights in final/, training
state of the last checkpoint, metrics.jsonl without times and memory; and that TensorBoard shows each step once.
The last line of stdout is one JSON document; the exit code is 1 if anything differs.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

import torch
import yaml
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from src.checkpoint import list_checkpoints, step_of

PROJECT = Path(__file__).resolve().parent.parent
BASE = PROJECT / "configs" / "configs_tiny" / "config_kl_beta0.04_tiny.yaml"
SAVE_SECONDS = 0.2  # about what a save takes, most of it fsync
SMALL = {
    "data": {"train_size": 64, "eval_size": 8, "eval_samples": 1},
    "training": {"batch_size": 32, "num_questions_per_batch": 4, "minibatches": 2, "max_gen_len": 32, "warmup_steps": 0,
                 "eval_interval": 5, "ckpt_save_interval": 1, "keep_checkpoints": 2},
}  # fmt: skip


def write_config(folder: Path, steps: int) -> Path:
    """The tiny config, smaller still, with a checkpoint every step."""
    config = yaml.safe_load(BASE.read_text(encoding="utf-8"))
    config["model"] |= {
        "device": "cpu",
        "pretrained_model_path": str(PROJECT / config["model"]["pretrained_model_path"]),
    }
    for section, values in SMALL.items():
        config[section] |= values
    config["training"]["max_steps"] = steps
    path = folder / "storm.yaml"
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    return path


def start(config: Path, work: Path) -> subprocess.Popen:
    """main.py in a process of its own, its output kept in a file."""
    work.mkdir(exist_ok=True)
    command = [sys.executable, str(PROJECT / "main.py"), "--config", str(config), "--dataset_name", "countdown"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    with (work / "output.txt").open("a", encoding="utf-8") as output:
        return subprocess.Popen(command, cwd=work, env=environment, stdout=output, stderr=subprocess.STDOUT)


def finish(process: subprocess.Popen, work: Path) -> None:
    """Wait for a process that nobody kills; it has to end well."""
    if process.wait() != 0:
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


def kill_once(config: Path, work: Path, delay: float, at_save: bool) -> bool | None:
    """One life that ends by SIGKILL, `delay` after its start or after it began to save.

    Returns whether it left something half written; None if it came to its end before.
    """
    born, process = time.time(), start(config, work)
    while at_save and process.poll() is None and not saving(work, born):
        time.sleep(0.001)
    end = time.monotonic() + delay
    while process.poll() is None and time.monotonic() < end:
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    if process.wait() == -signal.SIGKILL:
        return saving(work, born)
    finish(process, work)
    return None


def metrics_of(folder: Path) -> list[dict]:
    """metrics.jsonl without what a clock or the machine decides."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    timed = ("time/", "memory/")
    return [{k: v for k, v in row.items() if not k.startswith(timed) and "per_second" not in k} for row in rows]


def shown_steps(folder: Path) -> dict[str, list[int]]:
    """Tag -> steps, as TensorBoard shows them."""
    events = EventAccumulator(str(folder / "tb"), size_guidance={"scalars": 0})
    events.Reload()
    return {tag: [event.step for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def training_state(folder: Path) -> dict:
    """Optimizer, controllers, evaluations. Not the generators: each process starts them elsewhere, nothing draws."""
    state = torch.load(list_checkpoints(folder / "checkpoints")[-1] / "training_state.pt", weights_only=True)
    return {name: value for name, value in state.items() if not name.endswith("_rng")}


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
    for row in (json.loads(line) for line in (quiet / "metrics.jsonl").read_text(encoding="utf-8").splitlines()):
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
    config = write_config(folder, steps)
    quiet = folder / "quiet"
    process = start(config, quiet)
    while process.poll() is None and steps_done(quiet) == 0:
        time.sleep(0.01)
    first = time.monotonic() - started  # imports, evaluation, one step
    finish(process, quiet)
    undisturbed = time.monotonic() - started
    done, during_save, round_, wrong = 0, 0, 1, []
    while True:  # a run that comes to its end before all kills are done is compared, and another one begun
        work = folder / f"killed{round_}"
        hit = False
        while done < kills and hit is not None:
            at_save = done % 2 == 0
            spare = 2 * (undisturbed - first) / max(2, kills / 2)  # so that the kills are spread over the run
            delay = moment.uniform(0.4 * first, first + spare)  # not while it still imports torch
            if at_save:
                delay = moment.uniform(0, SAVE_SECONDS) if done else 0.0
            hit = kill_once(config, work, delay, at_save)
            if hit is not None:
                done, during_save = done + 1, during_save + hit
                where = "while saving" if hit else "between saves"
                print(f"run {round_}, kill {done}: {where}, {steps_done(work)} steps saved", flush=True)
        if hit is not None:
            finish(start(config, work), work)
        wrong += [f"run {round_}: {difference}" for difference in differences(run_folder(quiet), run_folder(work))]
        if done == kills:
            break
        round_ += 1
    return {
        "benchmark": "kill_storm",
        "kills": done,
        "kills_during_save": during_save,
        "identical": not wrong,
        "different": wrong,
        "runs": round_,
        "steps": steps,
        "seed": seed,
        "seconds": round(time.monotonic() - started, 1),
        "seconds_undisturbed": round(undisturbed, 1),
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
