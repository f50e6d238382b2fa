"""What will fit: an estimate of what a step needs, and smaller passes when memory runs out."""

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from src.config import Config, ConfigError
from src.engine.cuda_decoding import uses_graphs
from src.engine.distributed import AloneError, world
from src.engine.lighter import kept_of_layer
from src.engine.memory import free_memory, give_back, memory_of, out_of_memory, peak_memory
from src.engine.models import decoder_layers
from src.engine.packing import split_into_microbatches
from src.engine.room import Kept, cache_bytes, fit_to_memory
from src.engine.scoring import CHUNK_ELEMENTS, KEPT
from src.engine.sharding import is_sharded
from src.engine.wide_products import multiplied_in
from src.records import Group, Problem

logger = logging.getLogger("grpo")
# of `auto`: tokens of a pass at least and at most (more is not faster), and the share of the memory that a run may plan
FEWEST, MOST, SHARE = 256, {"cpu": 8192, "cuda": 16384}, {"cpu": 0.5, "cuda": 0.85}
STAYS = 1.15  # the plan is an estimate, and some memory lies in pieces
FEWEST_LOGITS = 2**22  # elements of a chunk at least; of the largest vocabularies 28 tokens


@dataclass
class Limit:
    """How much a forward and backward pass may hold: as the config says, and less once memory has run out."""

    completions: int
    tokens: int | None  # in place of completions
    head: int  # elements of a chunk's logits, tokens x vocabulary

    def size(self) -> str:
        """Of a pass."""
        return f"{self.tokens:,} tokens" if self.tokens else f"{self.completions} completions"

    def __str__(self) -> str:
        return f"{self.size()} and {self.head:,} logits at a time"

    def cut(self, groups: list[Group], whole_groups: bool) -> list[list[Group]]:
        """Passes of this size."""
        return split_into_microbatches(groups, self.completions, self.tokens, whole_groups)

    def least(self, other: dict[str, Any]) -> "Limit":
        """The smaller of both, as of a run that goes on where memory had run out."""
        tokens = [count for count in (self.tokens, other["tokens"]) if count is not None]
        return Limit(
            min(self.completions, other["completions"]), min(tokens, default=None), min(self.head, other["head"])
        )

    def halve(self, groups: list[Group], whole_groups: bool, reason: str) -> None:
        """Half of the largest pass of these groups from now on; the gradient does not depend on it."""
        batches = self.cut(groups, whole_groups)
        smallest = all(len(batch) == 1 and (whole_groups or len(batch[0].episodes) == 1) for batch in batches)
        if self.head > FEWEST_LOGITS:
            self.head = max(FEWEST_LOGITS, self.head // 2)
        elif smallest:
            raise ConfigError(
                f"memory does not suffice for the update of a single {'group' if whole_groups else 'completion'} "
                f"({reason}); lower training.max_gen_len, or set model.gradient_checkpointing: true"
            )
        if smallest:
            smaller = f"{self.head:,} logits at a time"
        elif self.tokens:
            self.tokens = max(1, max(sum(group.tokens() for group in batch) for batch in batches) // 2)
            smaller = f"{self.tokens:,} tokens a pass"
        else:
            self.completions = max(1, max(sum(len(g.episodes) for g in batch) for batch in batches) // 2)
            smaller = f"{self.completions} completions a pass"
        logger.warning(f"out of memory in the update ({reason}); it is done again with {smaller}")


def limit_of(config: Config, model, anchor) -> Limit:
    """What the config asks for, and where it leaves that open what the memory of the machine holds."""
    completions, tokens = config.training.micro_batch_size, config.training.max_tokens_per_microbatch
    if not isinstance(tokens, int):
        tokens = None if completions else tokens_that_fit(config, model, anchor)
    return Limit(completions or 1, tokens, CHUNK_ELEMENTS[model.device.type])


def tokens_that_fit(config: Config, model, anchor) -> int:
    """A budget for a pass whose plan takes no more than its share of the memory: a power of two, at most MOST."""
    budget = FEWEST
    room = SHARE[model.device.type] * memory_of(model.device)
    while budget < MOST[model.device.type] and of_update(memory_plan(config, model, anchor, 2 * budget)) <= room:
        budget *= 2
    return budget


def in_parts_that_fit(
    model, limit: Limit, kept: Kept, groups: list[Group], whole_groups: bool, compute: Callable[[], Any]
) -> Any:
    """compute() over passes of the limit; when memory runs out again, without what is kept or in smaller ones."""
    while True:
        try:
            return compute()
        except (RuntimeError, MemoryError) as error:
            reason = out_of_memory(error)
            if reason is None:
                raise
        # outside of the handler, whose traceback would keep the activations alive
        model.zero_grad(set_to_none=True)
        if kept.drop(model.device):
            kept.may_stay = False
            continue
        if is_sharded(model):
            raise AloneError(
                f"out of memory in the update ({reason}), where the other processes wait for this one; the last "
                f"checkpoint is safe: go on from it with half the training.max_tokens_per_microbatch or "
                f"micro_batch_size"
            )
        try:
            limit.halve(groups, whole_groups, reason)
        except ConfigError as error:
            raise AloneError(str(error)) if world() > 1 else error from None
        give_back(model.device)
        if model.device.type == "cuda":  # the peak of what failed is not what is needed
            torch.cuda.reset_peak_memory_stats(model.device)


@dataclass
class Rooms:
    """Slots and prompts at a time of the rollouts so far, by their size: what fits, and never more than before.

    Rounding depends on it, so it is part of the state: a resumed run does not take more because more is free.
    """

    sizes: dict[str, tuple[int, int]] = field(default_factory=dict)
    kept: Kept = field(default_factory=Kept)

    def rollout(self, model, problems: Sequence[Problem], samples: int, settings, sample: Callable) -> list[Group]:
        """sample(room=...), in half the room when memory runs out; random numbers do not depend on it."""
        size = f"{len(problems)} x {samples}"
        slots, prompts = self.sizes.get(size, (0, 0))  # known before the first try only of an earlier rollout
        while True:
            served = False
            try:
                served = self.kept.serves(model, problems[: prompts or None], samples, settings)
                if served:
                    fits = self.sizes.get(size) or self.kept.room(problems, samples)
                else:
                    self.kept.drop(model.device)
                    fits = fit_to_memory(model, problems, samples, settings)
                slots, prompts = (min(pair) for pair in zip(fits, self.sizes.get(size, fits), strict=True))
                self.sizes[size] = (slots, prompts)
                return sample(room=(slots, prompts), kept=self.kept)
            except (RuntimeError, MemoryError) as error:
                reason = out_of_memory(error)
                if reason is None:
                    raise
            if served:  # as much as once: without what was kept it is seen how much there is now
                self.kept.drop(model.device)
                continue
            # outside of the handler, whose traceback would keep the cache alive
            if slots == prompts == 1:
                raise ConfigError(
                    f"memory does not suffice to decode a single completion ({reason}); lower training.max_gen_len or "
                    f"training.max_prompt_len, or take a smaller model"
                )
            self.sizes[size] = (max(1, slots // 2), max(1, prompts // 2))
            logger.warning(
                f"out of memory in the rollout ({reason}); it is done again with {self.sizes[size][0]} completions at "
                f"once"
            )


def cache_may_stay(config: Config, model, anchor) -> bool:
    """Whether the rollout's cache fits beside an update, on a GPU, where that saves captures."""
    if not uses_graphs(model.device) or is_sharded(model):
        return False
    plan = memory_plan(config, model, anchor)
    return STAYS * (of_update(plan) + plan["rollout"]) <= memory_of(model.device)


def memory_plan(config: Config, model, anchor, tokens: int | None = None) -> dict[str, int]:
    """Bytes by purpose, an estimate from shapes: what a step holds, and what rollout and update need beside it.

    `tokens` of a pass; None: as many as the config asks for.
    """
    training, shape = config.training, model.config.get_text_config()
    parameters = list(model.parameters())
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    weights = sum(parameter.nbytes for parameter in parameters)
    ranks = world() if is_sharded(model) else 1  # each holds a slice; in a rollout all of the weights
    state_bytes: float = 8 + 4 * any(
        parameter.dtype != torch.float32 for parameter in trained
    )  # moments and fp32 masters
    if training.memory_efficient_adamw:
        state_bytes = 2 * training.state_bits / 8 + 1  # 24-bit masters beside bf16
        if training.offload and model.device.type == "cuda":
            state_bytes = 0  # in host memory
    prompt, completion = training.max_prompt_len, training.max_gen_len + config.most_told()
    group = max(1, training.batch_size // max(1, training.num_questions_per_batch))
    if tokens is None:
        limit = limit_of(config, model, anchor)
        tokens = limit.tokens or limit.completions * completion + math.ceil(limit.completions / group) * prompt
    tokens = min(tokens, training.batch_size * completion + training.num_questions_per_batch * prompt)
    vocabulary = shape.vocab_size
    kept = kept_of_layer(model) * model.dtype.itemsize
    layers, again = shape.num_hidden_layers, 0
    if config.model.gradient_checkpointing:  # of these only the input is kept, and all of the one at work
        again = layers
    inputs = again * shape.hidden_size * model.dtype.itemsize
    activations = tokens * (inputs + (layers - again + bool(again)) * kept)
    chunk = CHUNK_ELEMENTS[model.device.type]  # its gradient, and in fp32 what is computed of it; kept are more
    wanted = tokens * vocabulary * model.dtype.itemsize * (1 if anchor is None else 2)
    logits = min(wanted, KEPT * chunk) + 8 * min(tokens * vocabulary, chunk + vocabulary)
    is_wide = config.model.fp32_head or multiplied_in(model.device, model.dtype) == torch.float32
    wide_head = 4 * vocabulary * shape.hidden_size if is_wide and model.dtype != torch.float32 else 0
    slots = min(training.inference_batch_size, training.batch_size)
    of_slot, of_prompt = cache_bytes(model, prompt, completion)
    cache = slots * of_slot + math.ceil(slots / group) * of_prompt
    return {
        "weights": weights // ranks,
        "reference": reference_bytes(config, model, anchor, weights) // ranks,
        "gradients": sum(parameter.nbytes for parameter in trained) // ranks,
        "optimizer": int(sum(parameter.numel() for parameter in trained) * state_bytes / ranks),
        "rollout": cache + (weights if ranks > 1 else 0),
        "update": int(activations + logits + 2 * wide_head),  # of its weights in fp32 and of their gradient
    }


def reference_bytes(config: Config, model, anchor, weights: int) -> int:
    """Of the reference on the device: with LoRA of a loaded adapter; in host memory, two layers and the rest."""
    if anchor is None or (config.lora.r and not config.lora.path):
        return 0
    if config.lora.path:
        return sum(weight.nbytes for weight in model.parameters() if weight.requires_grad)
    if not config.training.reference_offload:
        return weights
    layers = [sum(weight.nbytes for weight in layer.parameters()) for layer in decoder_layers(model)]
    return weights - sum(layers) + 2 * max(layers)


def of_update(plan: dict[str, int]) -> int:
    """What is alive in an update, which has no key-value cache."""
    return sum(size for purpose, size in plan.items() if purpose != "rollout")


def peak_of(plan: dict[str, int]) -> int:
    """The largest sum that is alive at once: the rollout has no gradients."""
    return max(of_update(plan), plan["weights"] + plan["reference"] + plan["optimizer"] + plan["rollout"])


def memory_line(config: Config, model, anchor) -> str:
    """The plan beside what is free."""
    plan, limit = memory_plan(config, model, anchor), limit_of(config, model, anchor)
    most = sum(plan.values()) if cache_may_stay(config, model, anchor) else peak_of(plan)
    unit, name = (2**30, "GiB") if most > 2**30 else (2**20, "MiB")
    parts = ", ".join(f"{purpose} {size / unit:.1f}" for purpose, size in plan.items())
    return (
        f"estimated {parts} {name}, at most {most / unit:.1f} {name} at once, with {limit.size()} a pass; "
        f"{free_memory(model.device) / 2**30:.1f} GiB are free with the model loaded"
    )


def tell_of_rehearsal(config: Config, model, anchor, seconds: float, begun: bool) -> None:
    """What the longest pass has taken. `begun`: the optimizer's states are there, which come with the first step."""
    plan, device = memory_plan(config, model, anchor), model.device
    update = peak_memory(device) + (0 if begun else plan["optimizer"])
    rollout = plan["weights"] + plan["reference"] + plan["optimizer"] + plan["rollout"]
    logger.info(
        f"it took {seconds:.1f} s; at its peak the update needs about {update / 2**30:.1f} GiB, "
        f"the rollout by estimate {rollout / 2**30:.1f} GiB"
    )
    if device.type == "cuda" and update > torch.cuda.get_device_properties(device).total_memory:
        logger.warning(
            "that is more than the device has; set training.memory_efficient_adamw: true with training.offload: true, "
            "or lower training.max_tokens_per_microbatch"
        )
