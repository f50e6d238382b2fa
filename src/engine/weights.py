"""A model's weights in a folder, in Hugging Face format: written whole, loaded bit for bit."""

from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from transformers import GenerationConfig

from src.config import ConfigError
from src.engine.models import from_weights
from src.engine.sharding import like, local


def write_model(model, weights: dict[str, dict], tokenizer, folder: Path) -> None:
    """Weights (see full_state), config and tokenizer; of a model with an adapter (lora.py) the adapter alone."""
    if hasattr(model, "peft_config"):
        from src.engine.lora import save_adapter  # here, because only a LoRA run needs peft

        return save_adapter(model, tokenizer, folder)
    given, model.generation_config = model.generation_config, GenerationConfig()
    try:
        model.save_pretrained(folder, **weights)
    finally:
        model.generation_config = given
    if given is not None:  # as the model came: transformers refuses to save some that it has loaded
        given.to_json_file(folder / "generation_config.json", use_diff=True, keys_to_pop=["compile_config"])
    tokenizer.save_pretrained(folder)


def live_weights(model) -> dict[str, torch.Tensor]:
    """The model's own tensors by the names they are saved under; of a model with an adapter the adapter's."""
    if hasattr(model, "peft_config"):
        from src.engine.lora import adapter_state

        return adapter_state(model)
    return model.state_dict()


def saved_weights(folder: Path, model, trust_remote_code: bool) -> Iterator[tuple[str, torch.Tensor]]:
    """The weights in a folder, one tensor at a time, on the CPU."""
    readers = [safe_open(path, "pt") for path in sorted(folder.glob("*.safetensors"))]
    if readers and live_weights(model).keys() >= {name for reader in readers for name in reader.keys()}:  # noqa: SIM118
        for reader in readers:
            yield from ((name, reader.get_tensor(name)) for name in reader.keys())  # noqa: SIM118
    else:  # transformers writes the weights of some architectures under other names, and knows the way back
        options = {"dtype": model.dtype, "trust_remote_code": trust_remote_code}
        yield from from_weights(str(folder), **options).state_dict().items()


@torch.no_grad()
def load_weights(folder: Path, model, trust_remote_code: bool = False) -> None:
    """Copy saved weights into the model, tensor by tensor, bit for bit: no second model on its device."""
    live, loaded = live_weights(model), set()
    for name, tensor in saved_weights(folder, model, trust_remote_code):
        here = live.get(name)
        if here is None or here.shape != tensor.shape or here.dtype != tensor.dtype:
            now = f"{list(here.shape)} of {here.dtype}" if here is not None else "nothing"
            raise ConfigError(
                f"{folder} does not fit the model: {name} is {list(tensor.shape)} of {tensor.dtype} there and {now} "
                f"here; use the config it was made with, or --fresh to start over"
            )
        here.copy_(like(tensor, here))
        loaded.add(local(here).data_ptr())
    missing = [name for name, tensor in live.items() if local(tensor).data_ptr() not in loaded]  # tied: one address
    if missing:
        raise ConfigError(f"{folder} has no weights for {', '.join(missing[:3])}; use --fresh to start over")
