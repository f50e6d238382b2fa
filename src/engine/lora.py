"""LoRA (Hu et al. 2021) through peft: small trained matrices beside the frozen linear layers of the decoder.

A new adapter begins at zero, so the policy begins as the base, and the base is still there: with the adapter switched
off the same weights are the reference, and a run holds one model. An adapter from `lora.path` does not begin at zero,
so of it a copy is kept: the reference is the base with that. Sampler and scoring call the adapted layers as they are;
nothing is merged on the way, which in bf16 would make them two policies.
Left out: DoRA, quantized bases, adapters of embeddings or the head, whole modules trained beside the adapter.
"""

import copy
import warnings
from contextlib import contextmanager
from pathlib import Path

import peft
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import load_file
from transformers.pytorch_utils import Conv1D

from src.config import ConfigError, LoraConfig

# what a saved adapter may choose; anything else, such as trained biases or a changed base, would need code of its own
FREE_KEYS = {"r", "lora_alpha", "lora_dropout", "use_rslora", "rank_pattern", "alpha_pattern", "target_modules",
             "exclude_modules", "layers_to_transform", "layers_pattern", "fan_in_fan_out", "task_type", "auto_mapping",
             "peft_version", "base_model_name_or_path", "revision", "inference_mode"}  # fmt: skip


def add_adapter(model, lora: LoraConfig, seed: int) -> peft.PeftModel:
    """Freeze the model and put an adapter into it: a new one, zero at the start, or the one saved in `lora.path`."""
    if Path(model.name_or_path).is_dir():  # so that peft finds the base again, from wherever it is called
        model.name_or_path = str(Path(model.name_or_path).resolve())
    adapter = saved_adapter(lora, Path(lora.path).expanduser()) if lora.path else new_adapter(model, lora)
    try:
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # peft asks transformers by an old name
            torch.default_generator.manual_seed(seed)  # peft draws on the CPU
            adapted = peft.get_peft_model(model, adapter)  # in fp32, also beside a bf16 base
    except ValueError as error:
        raise ConfigError(f"lora.path: the adapter in {lora.path} was made for another model ({error})") from error
    adapted.train(model.training)
    set_dropout(adapted, False)
    layers = [module for module in adapted.modules() if isinstance(module, BaseTunerLayer)]
    if adapted.get_output_embeddings() in layers or not all(isinstance(x, peft.tuners.lora.Linear) for x in layers):
        raise ConfigError(f"lora.path: {lora.path} adapts the head or the embedding; give an adapter of linear layers")
    if lora.path:
        load_adapter_weights(adapted, Path(lora.path).expanduser())
    return adapted


def new_adapter(model, lora: LoraConfig) -> peft.LoraConfig:
    """peft's description of a new adapter, of all linear layers but the head or of those that are named."""
    head, linear = model.get_output_embeddings(), (torch.nn.Linear, Conv1D)
    layers = [name for name, layer in model.named_modules() if isinstance(layer, linear) and layer is not head]
    for wanted in lora.target_modules or []:
        if not any(f".{name}".endswith(f".{wanted}") for name in layers):
            known = ", ".join(sorted({name.rpartition(".")[2] for name in layers}))
            raise ConfigError(f"lora.target_modules: {wanted} is not a linear layer of this model; those are: {known}")
    names = lora.target_modules or "all-linear"
    return peft.LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]  # peft says int; any number will do
        target_modules=names,
        lora_dropout=lora.dropout,
        task_type="CAUSAL_LM",
    )


def saved_adapter(lora: LoraConfig, folder: Path) -> peft.LoraConfig:
    """The description of the adapter in `folder`; ConfigError when it cannot be trained or is not what was asked."""
    if not (folder / CONFIG_NAME).is_file():
        raise ConfigError(f"lora.path: there is no {CONFIG_NAME} in {folder}; give the folder of a peft adapter")
    try:
        adapter = peft.PeftConfig.from_pretrained(str(folder))
    except Exception as error:  # a damaged file can raise nearly anything
        raise ConfigError(f"lora.path: {folder / CONFIG_NAME} cannot be read; save it again ({error!r})") from error
    given, plain = adapter.to_dict(), peft.LoraConfig().to_dict()
    special = sorted(name for name in plain if name not in FREE_KEYS and given.get(name) != plain[name])
    if special:
        raise ConfigError(f"lora.path: {folder} is not plain LoRA (see {', '.join(special)}); give an adapter that is")
    for name, asked, found in (
        ("r", lora.r, adapter.r),
        ("alpha", lora.alpha, adapter.lora_alpha),
        ("target_modules", lora.target_modules and set(lora.target_modules), adapter.target_modules),
    ):
        if asked not in (getattr(LoraConfig(), name), found):
            raise ConfigError(f"lora.{name} is {asked}, but the adapter in {folder} has {found}; remove lora.{name}")
    adapter.lora_dropout, adapter.inference_mode = lora.dropout, False
    return adapter


def set_dropout(model: peft.PeftModel, on: bool) -> None:
    """Dropout of the adapter's inputs, which is on in the update alone."""
    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            module.get_submodule("lora_dropout").train(on)


@contextmanager
def dropout_in_update(model: peft.PeftModel, seed: int):
    """Dropout is on, and what it draws is a function of the seed: a step that is done again is the same step."""
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        set_dropout(model, True)
        try:
            yield
        finally:
            set_dropout(model, False)


class FrozenBase:
    """The reference of a LoRA run: the same model, as the policy was at the start. It has what scoring.py reads.

    While it runs a new adapter is off, and one that was loaded has the weights that it had here, at the beginning. The
    head has no adapter, so only the decoder changes. Nothing is recorded for a backward pass: checkpointing would
    compute it again with the policy's adapter.
    """

    def __init__(self, model: peft.PeftModel, loaded: bool = False):
        self.model, self.config = model, model.config
        trained = [weight for weight in model.parameters() if weight.requires_grad]
        self.copies = [(weight, weight.detach().clone()) for weight in trained] if loaded else []

    def get_output_embeddings(self) -> torch.nn.Module:
        return self.model.get_output_embeddings()

    def get_decoder(self):
        return self.decode

    @torch.no_grad()
    def decode(self, **inputs):
        """The decoder's output as it would have been at the start."""
        with self.loaded_adapter() if self.copies else self.model.disable_adapter():
            return self.model.get_decoder()(**inputs)

    @contextmanager
    def loaded_adapter(self):
        """Inside, the adapter is as it was loaded, without dropout; the policy's is back before a backward pass."""
        dropout = any(module.training for name, module in self.model.named_modules() if name.endswith("lora_dropout"))
        set_dropout(self.model, False)
        self.swap()
        try:
            yield
        finally:
            self.swap()
            set_dropout(self.model, dropout)

    def swap(self) -> None:
        """The adapter's weights and the copies change places; a parameter and its gradient stay what they are."""
        for weight, other in self.copies:
            weight.data, other.data = other.data, weight.data


def adapter_state(model: peft.PeftModel) -> dict[str, torch.Tensor]:
    """The adapter's weights, not copied, by the names of peft's file format."""
    return peft.get_peft_model_state_dict(model, save_embedding_layers=False)  # "auto" would ask the hub


def save_adapter(model: peft.PeftModel, tokenizer, folder: Path) -> None:
    """The adapter in peft's format, and the tokenizer; the caller writes beside and renames (src/run/checkpoint.py)."""
    model.save_pretrained(str(folder), save_embedding_layers=False)
    (folder / "README.md").unlink()  # peft's model card, a form that nobody has filled in
    tokenizer.save_pretrained(folder)


@torch.no_grad()
def load_adapter_weights(model: peft.PeftModel, folder: Path) -> None:
    """Put saved adapter weights into place, bit for bit; ConfigError unless they are exactly those this model has."""
    try:
        saved = load_file(folder / SAFETENSORS_WEIGHTS_NAME)
    except Exception as error:
        raise ConfigError(f"{folder}: {SAFETENSORS_WEIGHTS_NAME} cannot be read; save it again ({error})") from error
    own = adapter_state(model)
    shapes = [{name: list(weight.shape) for name, weight in state.items()} for state in (own, saved)]
    for name in sorted(own.keys() | saved.keys()):
        mine, theirs = (shape.get(name, "missing") for shape in shapes)
        if mine != theirs:
            raise ConfigError(
                f"the adapter in {folder} was made for another model: {name} is {theirs} there, {mine} here; "
                f"set model.pretrained_model_path to its base"
            )
    for name, weight in own.items():
        weight.copy_(saved[name])


def merged_model(model: peft.PeftModel) -> torch.nn.Module:
    """The adapter added to the weights, in a copy on the CPU of the base's class and precision."""
    on_cpu = {id(buffer): buffer.to("cpu", copy=True) for buffer in model.buffers()}
    for weight in model.parameters():
        on_cpu[id(weight)] = torch.nn.Parameter(weight.detach().to("cpu", copy=True), requires_grad=False)
    return copy.deepcopy(model, on_cpu).merge_and_unload()  # deepcopy takes these copies: no second model on a GPU
