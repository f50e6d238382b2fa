"""From a config to what an engine is made of: policy, frozen anchor, optimizer; ConfigError for what cannot work."""

import logging

import torch

import src.engine.decode_loops as decode_loops
import src.engine.wide_products as wide_products
from src.config import Config, ConfigError, TrainingConfig
from src.engine.attention import check_attention
from src.engine.distributed import from_main, world
from src.engine.lighter import lighten
from src.engine.models import check_compiler, compile_layers, load_model, resolve_device, resolve_model_path
from src.engine.operations import put_side_by_side
from src.engine.optim import build_optimizer
from src.engine.reference import StreamedReference
from src.engine.sharding import shard

logger = logging.getLogger("grpo")
LIGHT_ON = ("cuda",)


def is_lora(config: Config) -> bool:
    """Whether adapters are trained and not the full weights."""
    return bool(config.lora.r or config.lora.path)


def check_reference_offload(config: Config) -> None:
    """The reference can stay in host memory only where it is a whole model of its own."""
    if not config.training.reference_offload:
        return
    if is_lora(config):
        raise ConfigError(
            f"{config.source}: training.reference_offload does nothing with lora, whose reference is in the model that "
            f"is trained and takes no more than the adapter's memory; remove the key"
        )
    if world() > 1 and config.training.parallel == "shard":
        raise ConfigError(
            f"{config.source}: training.reference_offload is not possible with several processes and "
            f"training.parallel: shard, where each holds a slice of the reference; remove the key, or set "
            f"training.parallel: replicate"
        )


def check_machine(config: Config, for_training: bool) -> torch.device:
    """The device, when everything that the config asks of the machine is there."""
    device = resolve_device(config.model.device)
    if world() > 1 and device.index is not None:
        raise ConfigError(
            f"{config.source}: model.device: {device} would be that of every process; with several set it to cuda"
        )
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)  # Triton launches its kernels on the current one
    check_reference_offload(config)
    if (
        device.type == "cpu"
        and config.model.dtype == "bfloat16"
        and config.model.compile
        and wide_products.are_faster()
    ):
        logger.warning(
            f"{config.source}: with model.compile bf16 is multiplied in bf16, which takes 2 to 8 times as long on this "
            f"processor as fp32; set model.dtype: float32, or model.compile: false"
        )
    if config.model.compile and for_training:
        check_compiler(device)
    from_main(resolve_model_path, config.model.pretrained_model_path)  # a download happens once
    return device


def load_for(device: torch.device, config: Config, place: torch.device):
    """A model that computes on `device`, with its weights in `place`."""
    model = load_model(config, place)
    if device.type in LIGHT_ON:
        lighten(model)
        put_side_by_side(model)
    elif not config.model.compile:
        wide_products.widen(model)
        if decode_loops.applies(model):
            lighten(model, in_loops=True)
    return model


def load_policy(config: Config, device: torch.device, for_training: bool):
    """The model that is trained: whole, sharded, or with an adapter."""
    training = config.training
    model = load_for(device, config, device)
    if is_lora(config):
        from src.engine.lora import add_adapter  # here, because only a LoRA run needs peft

        model = add_adapter(model, config.lora, training.random_seed)
    check_attention(model, training.max_prompt_len + training.max_gen_len + config.most_told())
    if config.model.compile and for_training:
        compile_layers(model)
    if world() > 1 and training.parallel == "shard" and not is_lora(config):
        model = shard(model, device)
    return model


def load_anchor(config: Config, model, device: torch.device):
    """The initial policy once more, frozen: on the device, cut into slices like the policy, or in host memory."""
    training = config.training
    if is_lora(config):
        from src.engine.lora import FrozenBase  # here, because only a LoRA run needs peft

        return FrozenBase(model, loaded=bool(config.lora.path))
    place = torch.device("cpu") if training.reference_offload else device
    anchor = load_for(device, config, place).requires_grad_(False)
    if config.model.compile:  # as the policy is, so that the same weights give the same log-probs
        compile_layers(anchor)
    if training.reference_offload:
        return StreamedReference(anchor, device)
    return shard(anchor, device) if world() > 1 and training.parallel == "shard" else anchor


def optimizer_of(model, training: TrainingConfig) -> torch.optim.Optimizer:
    """For what is trained of the model: everything, or the adapter."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return build_optimizer(
        trained, training.learning_rate, training.betas, training.weight_decay,
        memory_efficient=training.memory_efficient_adamw, state_bits=training.state_bits, offload=training.offload,
    )  # fmt: skip
