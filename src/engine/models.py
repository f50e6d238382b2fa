"""Models and tokenizers in, in Hugging Face format: from a folder, or by a name the hub knows."""

import logging
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from huggingface_hub import HfApi, snapshot_download, try_to_load_from_cache
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from src.config import Config, ConfigError
from src.engine.attention import ATTENTION_NAME, grpo_packed_attention

logger = logging.getLogger("grpo")
# what some repositories hold beside the safetensors: the same weights again, larger
OTHER_FORMATS = ["*.bin", "*.pth", "*.gguf", "*.onnx", "*.h5", "*.msgpack", "*.ot", "onnx/*", "original/*"]
PROJECT_FOLDER = Path(__file__).resolve().parents[2]
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
    """A local folder, as given, beside main.py or in models/; else a name the hub knows, loaded into models/ once."""
    for candidate in (Path(path).expanduser(), PROJECT_FOLDER / path, PROJECT_FOLDER / "models" / path):
        if candidate.is_dir():
            if (candidate / "adapter_config.json").is_file():
                raise ConfigError(
                    f"model.pretrained_model_path: {path} is a LoRA adapter; set lora.path to it and "
                    f"model.pretrained_model_path to its base"
                )
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
        if isinstance(try_to_load_from_cache(path, "config.json"), str):  # other tools have it already
            return path
        HfApi().model_info(path, timeout=10)  # asks once, where a download goes on asking for half a minute
        return download(path)
    except Exception as error:
        raise cannot_load(path, error) from error


def download(path: str) -> str:
    """A model of the hub into models/<name>. An interrupted download goes on beside it, and is not taken for whole."""
    final = PROJECT_FOLDER / "models" / path
    partial = final.with_name(final.name + ".partial")
    logger.info(f"downloading {path} to {final}")
    snapshot_download(path, local_dir=partial, ignore_patterns=OTHER_FORMATS)
    partial.rename(final)
    return str(final)


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


def from_weights(path: str, **options):
    """AutoModelForCausalLM, but refused if weights are missing: transformers would fill them with random numbers."""
    model, loading = from_hub_or_folder(AutoModelForCausalLM, path, output_loading_info=True, **options)
    if loading["missing_keys"]:
        raise ConfigError(
            f"model.pretrained_model_path: {path} is incomplete; it has no weights for "
            f"{', '.join(sorted(loading['missing_keys'])[:3])}; get the folder again"
        )
    return model


class Float32Head(nn.Linear):
    """A head in bf16 that multiplies in fp32. A layer becomes one by its class alone: weights and files stay theirs."""

    def forward(self, hidden: Tensor) -> Tensor:
        """Logits [..., vocab] of hidden [..., hidden]."""
        bias = None if self.bias is None else self.bias.float()
        return F.linear(hidden.float(), self.weight.float(), bias)


def widen_head(model) -> None:
    """The head multiplies in fp32 from now on, for whoever calls it."""
    head = model.get_output_embeddings()
    if type(head) is not nn.Linear:
        raise ConfigError(
            f"model.fp32_head is not possible with this model, whose head is a {type(head).__name__} and not a linear "
            f"layer; remove the key"
        )
    head.__class__ = Float32Head


def load_model(config: Config, device: torch.device, path: str | None = None):
    """The model with the packed attention, dropout off; `path` loads the weights of a checkpoint instead."""
    path = path or resolve_model_path(config.model.pretrained_model_path)
    model_config = from_hub_or_folder(AutoConfig, path, trust_remote_code=config.model.trust_remote_code)
    for name in vars(model_config):  # dropout would make the sampler and the trainer two different policies
        if "dropout" in name and isinstance(getattr(model_config, name), float):
            setattr(model_config, name, 0.0)
    model = from_weights(
        path,
        config=model_config,
        dtype=getattr(torch, config.model.dtype),
        attn_implementation=ATTENTION_NAME,
        trust_remote_code=config.model.trust_remote_code,
    )
    if config.model.fp32_head and model.dtype != torch.float32:
        widen_head(model)
    if config.model.gradient_checkpointing:  # transformers does it in training mode only; dropout is off in any case
        model.gradient_checkpointing_enable({"use_reentrant": False})
        return model.to(device).train()
    return model.to(device).eval()


def decoder_layers(model) -> torch.nn.ModuleList:
    """The layers of a model, in order."""
    return next(part for part in model.get_decoder().children() if isinstance(part, torch.nn.ModuleList))


def check_compiler(device: torch.device) -> None:
    """ConfigError unless torch.compile works on this machine."""
    try:
        torch.compile(lambda x: x.sin() + 1)(torch.ones(8, device=device))
    except Exception as error:  # of a C++ compiler, of triton, of Python's headers
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ConfigError(
            f"model.compile: torch.compile does not work on this machine ({reason}); install a C++ compiler, and for "
            f"CUDA triton and Python's headers, or set model.compile: false"
        ) from error


def compile_layers(model) -> None:
    """Compile the layers for scores and gradients. The sampler, in inference mode, runs them as they are.

    What is compiled lies within what is checkpointed: computed again, a layer must keep the tensors it kept before.
    """
    AttentionInterface.register(ATTENTION_NAME, torch.compiler.disable(grpo_packed_attention))  # its shapes are data
    layer: Any
    for layer in decoder_layers(model):
        layer.forward = switched(layer.forward, getattr(layer, "gradient_checkpointing", False))
        layer.gradient_checkpointing = False


def switched(plain, checkpointing: bool):
    """A layer's forward: plain in a rollout, else compiled."""
    fused = torch.compile(plain, dynamic=True)

    def forward(*arguments, **keywords):
        if torch.is_inference_mode_enabled():
            return plain(*arguments, **keywords)
        if checkpointing and torch.is_grad_enabled():
            return checkpoint(fused, *arguments, use_reentrant=False, **keywords)
        return fused(*arguments, **keywords)

    return forward


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
