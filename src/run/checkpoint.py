"""Checkpoints: everything a run needs to go on as if it had not stopped, in Hugging Face format.

Each is one folder (storage.py): the engine writes its part, the rest is training_state.pt. Sampling is a function of
(seed, step) and has no state; the order of the data is one of the seed and of the cursor in run.state.
"""

import errno
import logging
import math
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import yaml

from src.config import Config, ConfigError, dump_config
from src.engine import EngineState, from_main, on_main
from src.run.storage import (
    StorageError,
    find_damage,
    read_manifest,
    recover,
    recover_all,
    storage_problem,
    write_folder,
)

logger = logging.getLogger("grpo")


def write_safely(final: Path, what: str, safe: str, about: dict, write: Callable[[Path], None]) -> None:
    """write_folder; when the disk does not take it, leave things as they were and say so in one sentence."""
    try:
        recover_all(final.parent)
        check_free_space(final)
        write_folder(final, about, write)
    except Exception as error:
        try:
            recover(final)
        except OSError:
            logger.warning(f"{final}.partial could not be removed; it will be before the next save")
        if storage_problem(error) is None:
            raise
        raise StorageError(f"{what} in {final.parent}", error, safe) from error


def check_free_space(final: Path) -> None:
    """Fail before anything is written if there is less room than the newest checkpoint takes."""
    newest = list_checkpoints(final.parent)[-1:]
    needed = sum(file.stat().st_size for path in newest for file in path.rglob("*") if file.is_file())
    if newest and shutil.disk_usage(final.parent).free < needed:
        raise OSError(errno.ENOSPC, f"less than {needed} bytes are free")


# ---------------------------------------------------------------------------------------------------------------------
# Saving
# ---------------------------------------------------------------------------------------------------------------------


def save_model(folder: Path, state: EngineState, step: int) -> None:
    """Weights, config and tokenizer: AutoModelForCausalLM loads the folder. `step` is what finished_step returns."""
    from_main(write_safely, folder, "the final model", "the checkpoints are safe", {"step": step}, state.write)


def finished_step(folder: Path) -> int | None:
    """The step whose weights final/ holds; None if it is not there or not as it was written."""
    return (read_manifest(folder) or {}).get("step") if find_damage(folder) is None else None


def seed_everything(seed: int) -> None:
    """The generators of Python, NumPy and torch; a checkpoint holds where they are."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def random_states() -> dict:
    """Where every random generator is, as tensors and plain values: torch.load(weights_only=True) reads them."""
    kind, keys, position, has_gauss, gauss = np.random.get_state()
    return {
        "torch_rng": torch.get_rng_state(),
        "cuda_rng": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "python_rng": random.getstate(),
        "numpy_rng": (kind, torch.from_numpy(np.array(keys, np.int64)), position, has_gauss, gauss),
    }


def set_random_states(state: dict) -> None:
    """Put every random generator back; takes the four entries out of `state`."""
    torch.set_rng_state(state.pop("torch_rng"))
    for index, cuda_state in enumerate(state.pop("cuda_rng")[: torch.cuda.device_count()]):
        torch.cuda.set_rng_state(cuda_state, index)
    random.setstate(state.pop("python_rng"))
    kind, keys, *rest = state.pop("numpy_rng")
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))


def save_checkpoint(
    folder: Path, step: int, engine_state: EngineState, run_state: dict, keep: int, score: float | None = None
) -> None:
    """Write checkpoints/step_N; keep the last `keep` and the one with the highest score. StorageError: no room.

    While it writes there are `keep` + 1 of them (and the best, if it is older).
    """

    def write(partial: Path) -> None:
        engine_state.write(partial)
        with (partial / "training_state.pt").open("wb") as file:  # opened here, for the system's own errors
            torch.save({"step": step, **run_state}, file)

    earlier = list_checkpoints(folder)
    safe = f"step {step_of(earlier[-1])} is safe in {earlier[-1].name}" if earlier else "there is no earlier one"
    about = {"step": step, "score": score if score is not None and math.isfinite(score) else None}
    from_main(write_safely, folder / f"step_{step:06d}", f"the checkpoint of step {step}", safe, about, write)
    on_main(drop_checkpoints, folder, step, keep)


def is_plain(value: object) -> bool:
    """Whether torch.load(weights_only=True) will read it back."""
    if isinstance(value, dict):
        return all(map(is_plain, value.keys())) and all(map(is_plain, value.values()))
    if isinstance(value, list | tuple | set):
        return type(value) in (list, tuple, set) and all(map(is_plain, value))
    return value is None or type(value) in (bool, int, float, str, bytes) or isinstance(value, torch.Tensor)


def read_state(folder: Path) -> dict:
    """What save_checkpoint was given as `run_state`, and the step."""
    return torch.load(folder / "training_state.pt", map_location="cpu", weights_only=True)


def drop_checkpoints(folder: Path, step: int, keep: int) -> None:
    """Remove all but the last `keep` up to `step` and the best; what lies beyond was found bad and is written again."""
    best = best_checkpoint(folder)
    for path in [path for path in list_checkpoints(folder) if step_of(path) <= step][:-keep]:
        if path == best:
            continue
        try:
            leftover = path.rename(path.with_name(path.name + ".partial"))  # half removed, it is none any more
            shutil.rmtree(leftover)
        except OSError as error:
            logger.warning(f"{path} could not be removed ({storage_problem(error)}); it takes up room")


# ---------------------------------------------------------------------------------------------------------------------
# Going on
# ---------------------------------------------------------------------------------------------------------------------


def step_of(path: Path) -> int:
    """The step in a checkpoint's name."""
    return int(path.name.removeprefix("step_"))


def list_checkpoints(folder: Path) -> list[Path]:
    """Checkpoints that have their name, oldest first."""
    return sorted((p for p in folder.glob("step_*") if re.fullmatch(r"step_\d+", p.name) and p.is_dir()), key=step_of)


def best_checkpoint(folder: Path) -> Path | None:
    """The checkpoint with the highest score, the newest of several; None if none has one."""
    manifests = {path: read_manifest(path) or {} for path in list_checkpoints(folder)}
    scored = [path for path, manifest in manifests.items() if manifest.get("score") is not None]
    return max(scored, key=lambda path: (manifests[path]["score"], step_of(path)), default=None)


def newest_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint whose files are all as they were written; None if there are no checkpoints at all.

    Each newer one that is damaged is named in a warning. Call it under the RunLock: it clears up after a crash.
    """
    recover_all(folder)
    damaged = {}
    for path in reversed(list_checkpoints(folder)):
        damaged[path.name] = find_damage(path)
        if damaged[path.name] is None:
            del damaged[path.name]
            for name, damage in damaged.items():
                logger.warning(f"checkpoint {name} cannot be used: {damage}; going on from {path.name}, before it")
            return path
    if damaged:
        found = "; ".join(f"{name}: {damage}" for name, damage in damaged.items())
        raise ConfigError(
            f"{folder} holds no checkpoint that can be used ({found}); "
            f"restore these files from a copy, or use --fresh to start over"
        )
    return None


def check_same_experiment(folder: Path, config: Config, refuse: bool = True) -> None:
    """A run folder goes on only with the config it was made with; its length, intervals and hub may change."""
    if not (folder / "config.yaml").exists():
        return
    try:
        old, new = yaml.safe_load((folder / "config.yaml").read_text("utf-8")), yaml.safe_load(dump_config(config))
        sections = {section: dict(old.get(section) or {}) for section in new if section != "hub"}
    except (OSError, ValueError, TypeError, AttributeError, yaml.YAMLError) as error:
        raise ConfigError(f"{folder}/config.yaml cannot be read; restore it, or use --fresh to start over") from error
    free = {"eval_interval", "ckpt_save_interval", "keep_checkpoints", "eval_first", "device",
            "gradient_checkpointing", "compile", "reference_offload", "parallel",
            "micro_batch_size", "max_tokens_per_microbatch", "inference_batch_size",
            "on_reward_error", "eval_samples_between"}  # fmt: skip
    if config.training.lr_schedule == "constant":  # a decaying rate would jump if the end moved
        free |= {"max_steps"}
    for section, known in sections.items():
        for name in sorted(set(new[section]) & set(known)):  # a key of a later version has its default
            before, now = known[name], new[section][name]
            if before != now and name in ("learning_rate", "max_gen_len"):  # what advice in mid-run names
                logger.warning(f"{section}.{name} was {before} so far and is {now} from here on")
            elif before != now and name not in free:
                wrong = (
                    f"{folder} was made with {section}.{name} = {before}, this config says {now}; "
                    f"use --name for another run beside it, or --fresh to start over"
                )
                if refuse:
                    raise ConfigError(wrong)
                logger.warning(wrong)
