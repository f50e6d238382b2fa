"""From a config to a run that is ready for its first step: data, model, reference, optimizer, and what will fit.

Everything a user can get wrong is wrong here, before anything is written.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from src.config import Config, ConfigError, TrainingConfig
from src.console import fact, log_block, quoted, shortened, tokens_line
from src.distributed import from_main, world
from src.hub import check_hub, check_hub_keys
from src.maxent import Controllers, ControllerSettings
from src.memory import memory_plan, peak_of
from src.models import (
    check_compiler,
    compile_layers,
    end_token_ids,
    load_model,
    load_tokenizer,
    resolve_device,
    resolve_model_path,
)
from src.offline import given_groups
from src.optim import build_optimizer
from src.packing import Episode, Group, check_attention
from src.penalties import PENALTIES
from src.reference import StreamedReference
from src.rewards import Rewards
from src.rl_datasets import Problem, get_task, load_eval_rows, load_train_rows, make_problems
from src.sharding import shard
from src.telemetry import free_memory

logger = logging.getLogger("grpo")


@dataclass
class Run:
    """Everything a run holds; the functions of src/train_grpo.py take it."""

    config: Config
    task: Any
    rewards: Rewards
    tokenizer: Any
    train_problems: list[Problem]
    eval_problems: list[Problem]
    model: Any  # of transformers, or of peft around it
    anchor: Any  # frozen: the initial policy, or with `anchor: rollout` the one that sampled
    optimizer: Any  # a torch.optim.Optimizer; None where nothing is trained
    controllers: Controllers  # the live values of tau and beta
    max_steps: int
    eos_ids: tuple[int, ...]
    left_out: tuple[int, int] = (0, 0)  # training and evaluation problems that are too long
    mid_update: bool = False  # between two optimizer steps of one rollout
    check_stop: Callable[[], None] = lambda: None  # leaves the step in progress when the user wants to stop


def is_lora(config: Config) -> bool:
    """Whether adapters are trained and not the full weights."""
    return bool(config.lora.r or config.lora.path)


def fitting_problems(config: Config, task, rows: list[dict], tokenizer, split: str) -> list[Problem]:
    """Every row of a split whose prompt fits."""
    limit = config.training.max_prompt_len
    problems = make_problems(task, rows, tokenizer, limit)
    if len(problems) < len(rows):
        logger.warning(
            f"{len(rows) - len(problems)} of {len(rows)} {split} prompts are longer than max_prompt_len: left out"
        )
    if not problems:
        raise ConfigError(f"{config.source}: no {split} prompt fits training.max_prompt_len ({limit} tokens); raise it")
    return problems


def warn_of_idle_penalty(training: TrainingConfig) -> None:
    """With one update a rollout the rollout anchor is the policy itself: distance and gradient are zero (k1: noise)."""
    penalty = PENALTIES[training.loss_type]
    idle = penalty.needs_anchor and not penalty.is_objective and (training.loss_type != "ot" or training.ot_debias)
    if training.anchor == "rollout" and training.minibatches * training.inner_epochs == 1 and idle:
        logger.warning(
            "anchor: rollout with one update a rollout compares the policy with itself: the penalty does nothing; "
            "use anchor: reference, or minibatches or inner_epochs above 1"
        )


def build_controllers(training: TrainingConfig) -> Controllers:
    """tau and beta with what moves them, if anything does."""
    same = ("tau_target_entropy", "tau_target_entropy_start", "tau_target_anneal_steps", "tau_lr", "tau_min", "tau_max",
            "tau_warmup_steps", "beta_min", "beta_max")  # fmt: skip
    settings = {name: getattr(training, name) for name in same}
    settings |= {"kl_target": training.beta_kl_target, "kl_horizon": training.beta_horizon}
    return Controllers(training.tau, training.beta, ControllerSettings(**settings, meta_lr=training.meta_lr or 0.1))


def check_task(config: Config, task) -> None:
    """Keys that mean nothing where the completions come from a file."""
    training = config.training
    if not getattr(task, "offline", False):
        return
    for name, wrong in (
        ("importance_cap", training.importance_cap is not None),
        ("seed_grpo_alpha", training.seed_grpo_alpha > 0),
        ("old_logprobs", training.old_logprobs == "sampler"),
        ("anchor", training.anchor == "rollout"),
        ("zero_truncated_rewards", training.zero_truncated_rewards),
    ):
        if wrong:
            raise ConfigError(
                f"{config.source}: training.{name} is about the policy that sampled, but here the completions come "
                f"from a file; remove the key"
            )
    if config.data.reward_functions:
        raise ConfigError(f"{config.source}: data.reward_functions does nothing where the file has the scores; remove")


def check_reference_offload(config: Config) -> None:
    """The reference can stay in host memory only where it is a whole model of its own."""
    if not config.training.reference_offload:
        return
    if is_lora(config):
        raise ConfigError(
            f"{config.source}: training.reference_offload does nothing with lora, whose reference is the base under "
            f"the adapter and takes no memory; remove the key"
        )
    if world() > 1 and config.training.parallel == "shard":
        raise ConfigError(
            f"{config.source}: training.reference_offload is not possible with several processes and "
            f"training.parallel: shard, where each holds a slice of the reference; remove the key, or set "
            f"training.parallel: replicate"
        )


def load_anchor(config: Config, device: torch.device):
    """The initial policy once more, frozen: on the device, cut into slices like the policy, or in host memory."""
    training = config.training
    anchor = load_model(config, torch.device("cpu") if training.reference_offload else device).requires_grad_(False)
    if config.model.compile:  # as the policy is, so that the same weights give the same log-probs
        compile_layers(anchor)
    if training.reference_offload:
        return StreamedReference(anchor, device)
    return shard(anchor, device) if world() > 1 and training.parallel == "shard" else anchor


def optimizer_of(model, training: TrainingConfig) -> torch.optim.Optimizer:
    """For what is trained of the model: everything, or the adapter."""
    return build_optimizer(
        [parameter for parameter in model.parameters() if parameter.requires_grad],
        learning_rate=training.learning_rate,
        betas=tuple(training.betas),
        eps=training.adam_eps,
        weight_decay=training.weight_decay,
        memory_efficient=training.memory_efficient_adamw,
        master_bits=training.master_bits,
        state_bits=training.state_bits,
        offload=training.offload,
    )


def check_enough(config: Config, train_problems: list[Problem] | None) -> None:
    """A step must not hold a problem twice."""
    questions = config.training.num_questions_per_batch
    if train_problems is not None and len(train_problems) < questions:
        raise ConfigError(
            f"{config.source}: training.num_questions_per_batch ({questions}) is more than there are training problems "
            f"({len(train_problems)}); lower it"
        )


def with_two_completions(config: Config, problems: list[Problem], tokenizer, eos_ids, split: str) -> list[Problem]:
    """The problems of a file of scores of which at least two completions fit: one alone teaches nothing."""
    groups = given_groups(problems, tokenizer, eos_ids, config.training)
    long = sum(len(g.problem.reference["completions"]) - len(g.episodes) for g in groups)
    kept = [group.problem for group in groups if len(group.episodes) > 1]
    if long:
        logger.warning(
            f"{long} {split} completions are longer than max_gen_len or max_seq_length, and with them "
            f"{len(problems) - len(kept)} of {len(problems)} prompts: left out"
        )
    if problems and not kept:
        raise ConfigError(
            f"{config.source}: no {split} prompt has two completions that fit training.max_gen_len and max_seq_length; "
            f"raise them"
        )
    return kept


def prepare(config: Config, dataset_name: str, for_training: bool = True) -> Run:
    """Load data and model; ConfigError for whatever is wrong with them."""
    training = config.training
    device = resolve_device(config.model.device)
    if world() > 1 and device.index is not None:
        raise ConfigError(
            f"{config.source}: model.device: {device} would be that of every process; with several set it to cuda"
        )
    check_reference_offload(config)
    if config.model.compile and for_training:
        check_compiler(device)
    check_hub_keys(config.hub, config.source)
    if for_training:
        check_hub(config.hub)
    from_main(resolve_model_path, config.model.pretrained_model_path)  # a download happens once
    tokenizer = load_tokenizer(config)
    task = get_task(dataset_name, config.data)
    check_task(config, task)
    rewards = Rewards(task, config.data)
    train_rows, eval_rows = load_train_rows(task) if for_training else [], load_eval_rows(task)
    train_problems = fitting_problems(config, task, train_rows, tokenizer, "train") if for_training else []
    split = config.data.eval_split
    eval_problems = fitting_problems(config, task, eval_rows, tokenizer, split)
    rewards.check_columns([problem.reference for problem in train_problems + eval_problems])
    if not getattr(task, "offline", False):  # what is wrong with a reward itself shows with any completion
        rewards.grade([Group(eval_problems[0], (Episode((), (), False, "no answer"),))])
    check_enough(config, train_problems if for_training else None)
    warn_of_idle_penalty(training)
    model = load_model(config, device)
    if is_lora(config):
        from src.lora import FrozenBase, add_adapter  # here, because only a LoRA run needs peft

        model = add_adapter(model, config.lora, training.random_seed)
    eos_ids = end_token_ids(model, tokenizer)
    if getattr(task, "offline", False):
        train_problems = with_two_completions(config, train_problems, tokenizer, eos_ids, "train")
        eval_problems = with_two_completions(config, eval_problems, tokenizer, eos_ids, split)
        check_enough(config, train_problems if for_training else None)
    check_attention(model, training.max_prompt_len + training.max_gen_len)
    if config.model.compile and for_training:
        compile_layers(model)
    if world() > 1 and training.parallel == "shard" and not is_lora(config):
        model = shard(model, device)
    anchor = optimizer = None
    if for_training:
        anchor = FrozenBase(model) if is_lora(config) else load_anchor(config, device)
        optimizer = optimizer_of(model, training)
    per_epoch = len(train_problems) // training.num_questions_per_batch
    max_steps = training.max_steps or per_epoch * training.num_epochs
    left_out = (len(train_rows) - len(train_problems), len(eval_rows) - len(eval_problems))
    return Run(config, task, rewards, tokenizer, train_problems, eval_problems, model, anchor, optimizer,
               build_controllers(training), max_steps, eos_ids, left_out)  # fmt: skip


def describe(run: Run, dataset_name: str) -> None:
    """The block at the start of a run: model, data, a step, memory, and the first prompt as the model sees it."""
    training, device = run.config.training, run.model.device
    parameters = list(run.model.parameters())
    trained = sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
    total = sum(parameter.numel() for parameter in parameters)
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else device
    prompts, too_long = training.num_questions_per_batch, " ({} too long, left out)"
    left_out = [too_long.format(f"{count:,}") if count else "" for count in run.left_out]
    group = "given completions" if getattr(run.task, "offline", False) else training.batch_size // prompts
    problem = run.train_problems[0]
    updates = training.minibatches * training.inner_epochs
    block = {
        "model": f"{run.config.model.pretrained_model_path}: {trained:,} of {total:,} parameters are trained, "
        f"{run.config.model.dtype} on {where}",
        "data": f"{dataset_name}: {len(run.train_problems):,} training problems{left_out[0]}, "
        f"{len(run.eval_problems):,} for the evaluation{left_out[1]}",
        "step": f"{prompts} prompts x {group} completions of at most {training.max_gen_len:,} tokens, "
        f"{updates} update{'s' * (updates > 1)}; {run.max_steps:,} steps",
        "loss": f"{training.loss_type}, beta {training.beta:g}, learning rate {training.learning_rate:g}",
        "memory": memory_line(run),
        "prompt": f"the first one, {tokens_line(run.tokenizer, problem.prompt_ids)}",
    }
    lines = [fact(label, text) for label, text in block.items()]
    log_block("\n".join([*lines, quoted("", shortened(problem.prompt_text, 2000))]))


def memory_line(run: Run) -> str:
    """The plan of src/memory.py beside what is free."""
    plan = memory_plan(run)
    unit, name = (2**30, "GiB") if peak_of(plan) > 2**30 else (2**20, "MiB")
    parts = ", ".join(f"{purpose} {size / unit:.1f}" for purpose, size in plan.items())
    return (
        f"estimated {parts} {name}, at most {peak_of(plan) / unit:.1f} {name} at once; "
        f"{free_memory(run.model.device) / 2**30:.1f} GiB are free with the model loaded"
    )
