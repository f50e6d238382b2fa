"""Models in, checkpoints out: everything a run needs to go on as if it had not stopped, in Hugging Face format.

A checkpoint is one folder, written beside its final name and then renamed, so that a half-written one is never taken
for a whole one. Data order and sampling are functions of (seed, step) and need no state of their own.
"""

import logging
import os
import shutil
import signal
from pathlib import Path

import torch
import yaml
from huggingface_hub import HfApi, try_to_load_from_cache
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from src.config import Config, ConfigError, dump_config
from src.packing import ATTENTION_NAME

logger = logging.getLogger("grpo")
PROJECT_FOLDER = Path(__file__).resolve().parent.parent
transformers_logging.set_verbosity_error()
transformers_logging.disable_progress_bar()


def resolve_device(name: str) -> torch.device:
    """`auto` is CUDA if there is one, else CPU; a device that is not there is an error."""
    available = torch.cuda.is_available()
    if name == "auto":
        return torch.device("cuda" if available else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"model.device: {name!r} is not a device; use auto, cpu, cuda or cuda:N") from error
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"model.device: {name!r} is not supported; use auto, cpu, cuda or cuda:N")
    if device.type == "cuda" and (not available or (device.index or 0) >= torch.cuda.device_count()):
        raise ConfigError(
            f"model.device: {name} is not there; this machine has "
            f"{torch.cuda.device_count()} CUDA devices; use model.device: auto"
        )
    return device


def resolve_model_path(path: str) -> str:
    """A local folder, as given or beside main.py; else a name the hub knows, or that is in its local cache."""
    for candidate in (Path(path).expanduser(), PROJECT_FOLDER / path):
        if candidate.is_dir():
            if not (candidate / "config.json").is_file():
                raise ConfigError(
                    f"model.pretrained_model_path: {path} has no config.json, so it is not a model in "
                    f"Hugging Face format"
                )
            return str(candidate)
    is_hub_id = path.count("/") <= 1 and not path.startswith((".", "~", "/", "models/"))
    if not is_hub_id:
        raise ConfigError(f"model.pretrained_model_path: there is no folder {path}; give a folder or a hub id")
    try:
        if try_to_load_from_cache(path, "config.json") is None:
            HfApi().model_info(path, timeout=10)  # asks once, where from_pretrained goes on asking for half a minute
    except Exception as error:
        raise cannot_load(path, error) from error
    return path


def cannot_load(path: str, error: Exception) -> ConfigError:
    """What the user reads when a model can not be had: what to do, and the first line of the library's reason."""
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    advice = "check that folder" if Path(path).is_dir() else "check the name and the network, or give a local folder"
    return ConfigError(f"model.pretrained_model_path: {path} cannot be loaded; {advice} ({reason})")


def from_hub_or_folder(loader, path: str, **options):
    """loader.from_pretrained, its errors in one sentence: a damaged file can raise nearly anything."""
    try:
        return loader.from_pretrained(path, **options)
    except Exception as error:
        raise cannot_load(path, error) from error


def load_tokenizer(config: Config):
    """The model's tokenizer; loading it first shows early whether the model is there at all."""
    path = resolve_model_path(config.model.pretrained_model_path)
    return from_hub_or_folder(AutoTokenizer, path, trust_remote_code=config.model.trust_remote_code)


def load_model(config: Config, device: torch.device, path: str | None = None):
    """The model with the packed attention, dropout off; `path` loads the weights of a checkpoint instead."""
    path = path or resolve_model_path(config.model.pretrained_model_path)
    model_config = from_hub_or_folder(AutoConfig, path, trust_remote_code=config.model.trust_remote_code)
    for name in vars(model_config):  # dropout would make the sampler and the trainer two different policies
        if "dropout" in name and isinstance(getattr(model_config, name), float):
            setattr(model_config, name, 0.0)
    model, loading = from_hub_or_folder(
        AutoModelForCausalLM,
        path,
        config=model_config,
        dtype=getattr(torch, config.model.dtype),
        attn_implementation=ATTENTION_NAME,
        trust_remote_code=config.model.trust_remote_code,
        output_loading_info=True,
    )
    if loading["missing_keys"]:  # transformers would fill them with random numbers
        raise ConfigError(
            f"model.pretrained_model_path: {path} is incomplete; it has no weights for "
            f"{', '.join(sorted(loading['missing_keys'])[:3])}; get the folder again"
        )
    if config.model.gradient_checkpointing:  # transformers does it in training mode only; dropout is off in any case
        model.gradient_checkpointing_enable({"use_reentrant": False})
        return model.to(device).train()
    return model.to(device).eval()


def end_token_ids(model, tokenizer) -> tuple[int, ...]:
    """Every id that ends a completion: the tokenizer's and all of the model's own."""
    ids = {tokenizer.eos_token_id}
    for source in (model.generation_config, model.config.get_text_config()):
        given = getattr(source, "eos_token_id", None)
        ids.update(given if isinstance(given, list) else [given])
    ids.discard(None)
    if not ids:
        raise ConfigError("the tokenizer and the model name no end-of-sequence token, so no completion could ever end")
    return tuple(sorted(ids))


def sync_folder(folder: Path) -> None:
    """Force every file of a folder, and the folder itself, onto the disk."""
    for path in [*sorted(folder.rglob("*")), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def save_model(model, tokenizer, folder: Path) -> None:
    """Weights, config and tokenizer: AutoModelForCausalLM loads the folder. Written beside, then renamed."""
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    replace_folder(partial, folder)


def replace_folder(partial: Path, final: Path) -> None:
    """Give a completely written folder its name."""
    sync_folder(partial)
    if final.exists():
        shutil.rmtree(final)
    partial.rename(final)
    descriptor = os.open(final.parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def save_checkpoint(folder: Path, step: int, model, tokenizer, optimizer, controllers, extra: dict, keep: int) -> None:
    """Write checkpoints/step_N and drop the oldest beyond `keep`."""
    final = folder / f"step_{step:06d}"
    partial = folder / f"step_{step:06d}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    state = {"step": step, "optimizer": optimizer.state_dict(), "torch_rng": torch.get_rng_state(), **extra}
    state["controllers"] = controllers.state_dict()
    if torch.cuda.is_available():
        state["cuda_rng"] = torch.cuda.get_rng_state_all()
    torch.save(state, partial / "training_state.pt")
    controllers.save(partial / "controllers.json")  # for people to read; what is loaded is in training_state.pt
    replace_folder(partial, final)
    for old in list_checkpoints(folder)[:-keep]:
        shutil.rmtree(old)


def list_checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    return sorted(path for path in folder.glob("step_*") if path.suffix != ".partial" and path.is_dir())


def load_checkpoint(folder: Path, model, optimizer, controllers) -> dict:
    """Put a checkpoint's weights and optimizer state into place; returns the rest of the state."""
    state = torch.load(folder / "training_state.pt", map_location="cpu", weights_only=True)
    saved = AutoModelForCausalLM.from_pretrained(folder, dtype=model.dtype)
    model.load_state_dict(saved.state_dict())
    optimizer.load_state_dict(state.pop("optimizer"))
    controllers.load_state_dict(state.pop("controllers"))
    torch.set_rng_state(state.pop("torch_rng"))
    if "cuda_rng" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state.pop("cuda_rng"))
    return state


class StopSignal:
    """SIGINT and SIGTERM ask the loop to stop after this step; a second one stops at once."""

    def __init__(self):
        self.number = 0
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.handle)

    def handle(self, number: int, frame) -> None:
        if self.number:
            raise SystemExit(128 + number)
        self.number = number
        logger.info("stopping after this step; once more to stop at once")


def set_aside(folder: Path) -> None:
    """--fresh: the old run keeps its files under folder.1, folder.2, ..."""
    number = 1
    while folder.with_name(f"{folder.name}.{number}").exists():
        number += 1
    folder.rename(folder.with_name(f"{folder.name}.{number}"))
    logger.info(f"the old run is now {folder.name}.{number}")


def check_same_experiment(folder: Path, config: Config) -> None:
    """A run folder goes on only with the config it was made with; its length and intervals may change."""
    if not (folder / "config.yaml").exists():
        return
    old, new = (yaml.safe_load(text) for text in ((folder / "config.yaml").read_text("utf-8"), dump_config(config)))
    free = {"eval_interval", "ckpt_save_interval", "keep_checkpoints", "device", "gradient_checkpointing"}
    if config.training.lr_schedule == "constant":  # a decaying rate would jump if the end moved
        free |= {"max_steps", "num_epochs"}
    for section in new:
        for name in sorted(set(new[section]) & set(old.get(section, {}))):  # a key of a later version has its default
            before, now = old[section][name], new[section][name]
            if before != now and name not in free:
                raise ConfigError(
                    f"{folder} was made with {section}.{name} = {before}, this config says {now}; "
                    f"use --fresh to start over, or another config file name"
                )
