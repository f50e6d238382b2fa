"""Memory: an estimate of what a step needs before it begins, and smaller micro-batches when it was not enough."""

import logging
import math
import time
from collections.abc import Callable
from dataclasses import replace

import torch

from src.config import ConfigError
from src.distributed import AloneError, world
from src.models import decoder_layers
from src.offline import given_groups
from src.packing import Episode, Group, split_into_microbatches
from src.penalties import PENALTIES
from src.rl_datasets import Problem
from src.sampler import cache_bytes
from src.scoring import CHUNK_ELEMENTS
from src.sharding import is_sharded
from src.telemetry import peak_memory

logger = logging.getLogger("grpo")


def memory_plan(run) -> dict[str, int]:
    """Bytes by purpose, an estimate from shapes: what a step holds, and what rollout and update need beside it."""
    training, model = run.config.training, run.model
    config = model.config.get_text_config()
    parameters = list(model.parameters())
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    weights = sum(parameter.nbytes for parameter in parameters)
    ranks = world() if is_sharded(model) else 1  # each holds a slice; in a rollout all of the weights
    state_bytes = 8 + 4 * any(parameter.dtype != torch.float32 for parameter in trained)  # moments and fp32 masters
    if training.memory_efficient_adamw:
        state_bytes = 2 * training.state_bits / 8 + (training.master_bits - 16) / 8
        if training.offload and model.device.type == "cuda":
            state_bytes = 0  # in host memory
    prompt, completion = training.max_prompt_len, training.max_gen_len
    group = training.batch_size // training.num_questions_per_batch
    tokens = (
        training.max_tokens_per_microbatch
        or training.micro_batch_size * completion + math.ceil(training.micro_batch_size / group) * prompt
    )
    vocabulary = config.vocab_size
    wide = max(getattr(config, "intermediate_size", None) or 4 * config.hidden_size, config.hidden_size)
    # what autograd keeps of a layer: its input, norms, projections and their products
    kept = (12 * config.hidden_size + 4 * wide) * model.dtype.itemsize
    layers, again = config.num_hidden_layers, 0
    if run.config.model.gradient_checkpointing:  # of these only the input is kept, and all of the one at work
        again = math.ceil(layers / run.config.model.checkpoint_every)
    inputs = again * config.hidden_size * model.dtype.itemsize
    activations = tokens * (inputs + (layers - again + bool(again)) * kept)
    logits = 4 * 4 * min(tokens * vocabulary, CHUNK_ELEMENTS[model.device.type] + vocabulary)  # fp32, and its copies
    slots = min(training.inference_batch_size, training.batch_size)
    of_slot, of_prompt = cache_bytes(model, prompt, completion)
    cache = slots * of_slot + math.ceil(slots / group) * of_prompt
    return {
        "weights": weights // ranks,
        "reference": reference_bytes(run, weights) // ranks,
        "gradients": sum(parameter.nbytes for parameter in trained) // ranks,
        "optimizer": int(sum(parameter.numel() for parameter in trained) * state_bytes / ranks),
        "rollout": cache + (weights if ranks > 1 else 0),
        "update": int(activations + logits),
    }


def reference_bytes(run, weights: int) -> int:
    """Of the reference on the device: nothing with LoRA; in host memory, two layers and what is not a layer."""
    if run.config.lora.r or run.config.lora.path or run.anchor is None:
        return 0
    if not run.config.training.reference_offload:
        return weights
    layers = [sum(weight.nbytes for weight in layer.parameters()) for layer in decoder_layers(run.model)]
    return weights - sum(layers) + 2 * max(layers)


def peak_of(plan: dict[str, int]) -> int:
    """The largest sum that is alive at once: the rollout has no gradients, the update no key-value cache."""
    held = plan["weights"] + plan["reference"] + plan["optimizer"]
    return held + max(plan["rollout"], plan["gradients"] + plan["update"])


def longest_microbatch(run) -> list[Group]:
    """The largest pass that the config allows: prompts and completions as long as they may be, or those of the file."""
    training = run.config.training
    questions = training.num_questions_per_batch
    if getattr(run.task, "offline", False):
        groups = given_groups(run.train_problems, run.tokenizer, run.eos_ids, training)
        groups = sorted(groups, key=Group.tokens, reverse=True)[:questions]
    else:
        length = training.max_gen_len
        episode = Episode((0,) * length, (0.0,) * length, True, "")
        problem = Problem(0, (0,) * training.max_prompt_len, "", {})
        groups = [Group(problem, (episode,) * (training.batch_size // questions))] * questions
    whole = PENALTIES[training.loss_type].is_objective
    size, budget = training.micro_batch_size, training.max_tokens_per_microbatch
    batches = split_into_microbatches(groups, size, budget, whole)
    return max(batches, key=lambda batch: sum(group.tokens() for group in batch))


def preflight(run, backward: Callable[[list[Group]], list]) -> None:
    """Run the largest micro-batch before step 0: what does not fit is cut smaller now, not late in the run."""
    device = run.model.device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    batch = longest_microbatch(run)
    logger.info(f"trying the longest micro-batch: {sum(group.tokens() for group in batch):,} tokens")
    started = time.perf_counter()
    backward(batch * world())  # one for each process
    run.model.zero_grad(set_to_none=True)
    peak = peak_memory(device)
    plan = memory_plan(run)
    update = peak + (0 if run.optimizer.state else plan["optimizer"])  # its states come with the first step
    rollout = plan["weights"] + plan["reference"] + plan["optimizer"] + plan["rollout"]
    logger.info(
        f"it took {time.perf_counter() - started:.1f} s; at its peak the update needs about {update / 2**30:.1f} GiB, "
        f"the rollout by estimate {rollout / 2**30:.1f} GiB"
    )
    if device.type == "cuda" and update > torch.cuda.get_device_properties(device).total_memory:
        logger.warning(
            "that is more than the device has; set training.memory_efficient_adamw: true with training.offload: true, "
            "or lower training.max_tokens_per_microbatch"
        )


def in_parts_that_fit(run, groups: list[Group], compute: Callable[[], list]) -> list:
    """compute() over the micro-batches of these groups; again in smaller ones when memory runs out."""
    while True:
        try:
            return compute()
        except (RuntimeError, MemoryError) as error:
            reason = (str(error) or "MemoryError").splitlines()[0]
            # on a CPU torch raises a plain RuntimeError
            words = ("out of memory", "allocate memory", "enough memory")
            if not isinstance(error, torch.OutOfMemoryError | MemoryError) and not any(w in reason for w in words):
                raise
        # outside of the handler, whose traceback would keep the activations alive
        run.model.zero_grad(set_to_none=True)  # an evaluation has no optimizer
        shrink_microbatches(run, groups, reason)


def shrink_microbatches(run, groups: list[Group], reason: str) -> None:
    """Half of the largest micro-batch from now on; the gradient does not depend on it."""
    training = run.config.training
    if is_sharded(run.model):
        raise AloneError(
            f"out of memory in the update ({reason}), where the other processes wait for this one; the last checkpoint "
            f"is safe: go on from it with half the training.micro_batch_size or max_tokens_per_microbatch"
        )
    whole = PENALTIES[training.loss_type].is_objective
    size, budget = training.micro_batch_size, training.max_tokens_per_microbatch
    batches = split_into_microbatches(groups, size, budget, whole)
    if all(len(batch) == 1 and (whole or len(batch[0].episodes) == 1) for batch in batches):
        raise ConfigError(
            f"memory does not suffice for the update of a single {'group' if whole else 'completion'} ({reason}); "
            f"lower training.max_gen_len, or set model.gradient_checkpointing: true"
        )
    if budget:
        tokens = max(sum(group.tokens() for group in batch) for batch in batches)
        smaller = {"max_tokens_per_microbatch": max(1, tokens // 2)}
    else:
        smaller = {"micro_batch_size": max(1, max(sum(len(g.episodes) for g in batch) for batch in batches) // 2)}
    run.config.training = replace(training, **smaller)
    if run.model.device.type == "cuda":
        torch.cuda.empty_cache()
    logger.warning(f"out of memory in the update ({reason}); it is done again with {smaller}")
