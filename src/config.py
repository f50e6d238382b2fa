"""The experiment, typed: every key with its default, range and meaning; strict YAML loading; nothing heavy imported.

Keys are declared as `name: type = key(default, "what it does", ...)`. To add one, declare it, and read it somewhere.
Which keys a penalty reads is declared where the penalty is (src/penalties.py): giving a key that nothing reads is an
error, except for the keys of the GRPO-mini format, whose files load unmodified.
"""

import ast
import difflib
import os
from dataclasses import Field, asdict, dataclass, field, fields
from functools import cache
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin

import yaml

AUTO = "auto"  # in place of a number: what the machine allows


class ConfigError(ValueError):
    """A line for the user: which file and key is wrong, and what to do. main.py prints it and exits with 2."""

    def __init__(self, sentence: str):
        super().__init__(" ".join(sentence.splitlines()))


class RunError(Exception):
    """A run cannot go on, and what it has saved is good: a line for the user. main.py prints it and exits with 1."""


class Stopped(SystemExit):
    """Leaves the step in progress because the user wants it; uncaught it ends the process with its code."""


@dataclass(frozen=True)
class Declared:
    """What the decorator of a penalty in src/penalties.py says of it."""

    objective: bool  # it takes the place of the policy term
    reads: tuple[str, ...]  # keys of `training` that only such penalties read


@cache
def known_penalties() -> dict[str, Declared]:
    """The penalties by name, from the text of src/penalties.py: importing it would take torch, and seconds."""
    found = {"none": Declared(False, ())}
    for function in ast.parse((Path(__file__).parent / "penalties.py").read_text(encoding="utf-8")).body:
        for decorator in getattr(function, "decorator_list", ()):
            if isinstance(decorator, ast.Call) and getattr(decorator.func, "id", "") == "penalty":
                options = {item.arg: item.value for item in decorator.keywords if item.arg in ("objective", "reads")}
                values = {name: ast.literal_eval(value) for name, value in options.items()}
                found[ast.literal_eval(decorator.args[0])] = Declared(
                    values.get("objective", False), tuple(values.get("reads", ()))
                )
    return found


def key(default: Any, doc: str, **rules: Any) -> Any:
    """A config field. Rules: minimum, above, maximum, below (numbers), choices.

    `policy`: the clipped policy loss reads it; `advantages`: it is about advantages, which an objective has not.
    """
    metadata = {"doc": doc, **rules}
    return (
        field(default_factory=lambda: list(default), metadata=metadata)
        if isinstance(default, list)
        else field(default=default, metadata=metadata)
    )


@dataclass
class ModelConfig:
    """Which model, where and in which precision."""

    pretrained_model_path: str = key("models/countdown-tiny", "Local folder in Hugging Face format, or a hub id.")
    device: str = key("auto", "`auto` (CUDA if there is one, else CPU), `cpu`, `cuda` or `cuda:N`.")
    dtype: str = key("bfloat16", "Precision of the weights.", choices=("float32", "bfloat16"))
    trust_remote_code: bool = key(False, "Allow a model repository to run its own Python code.")
    gradient_checkpointing: bool = key(False, "Compute each layer again in the backward pass: less memory, more time.")
    compile: bool = key(False, "Run the layers through torch.compile in the update; sampling does without.")
    fp32_head: bool = key(
        False,
        "With bf16 weights: multiply hidden states and head in fp32, in sampling, update and reference. SmolLM2-135M "
        "on a CPU: 0.14% of tokens, without 1.0%, with a trainer / sampler ratio outside 0.8 to 1.2; a step took "
        "12% to 43% longer. Not yet measured on a GPU.",
    )


@dataclass
class DataConfig:
    """Problems to train on and to evaluate on."""

    seed: int = key(
        0,
        "Seed of the built-in problem generator; separate from random_seed, so that runs with different "
        "seeds share their problems.",
        minimum=0,
    )
    train_size: int = key(8192, "Training problems to generate.", minimum=1)
    path: str | None = key(
        None,
        "Where the problems come from, in place of the task's own source: a local folder in the hub's layout, a "
        ".parquet, .jsonl, .json or .csv file, or a hub id.",
    )
    eval_path: str | None = key(
        None, "Separate source of the evaluation problems; a single file without it keeps a tenth of its rows for them."
    )
    subset: str | None = key(None, "Configuration of the data set on the hub, in place of the task's own.")
    prompt_column: str | None = key(None, "Column of the question, in place of the task's own.")
    answer_column: str | None = key(None, "Column of the reference answer, in place of the task's own.")
    train_split: str = key("train", "Split to train on.")
    eval_split: str = key("test", "Held-out split to evaluate on; choose settings on `validation`, where there is one.")
    eval_size: int | None = key(
        None,
        "Problems of the fixed evaluation set, drawn by data.seed. Empty: 256 where problems are generated, else a "
        "tenth of the split (all of it where it was cut from a file without splits), at least 1 and at most 1,000.",
        minimum=1,
    )
    math_levels: list[int] | None = key(None, "math: train on these levels only; empty: all.", minimum=1, maximum=5)
    prompt_format: str = key(
        "auto",
        "`chat`: the tokenizer's chat template; `raw`: the messages as plain text, for base models; `auto`: chat where "
        "there is a template.",
        choices=("auto", "chat", "raw"),
    )
    task_file: str | None = key(None, "Python file with task classes of your own; --dataset_name names the class.")
    reward_functions: list[str] | None = key(
        None, "Reward functions of your own, as `file.py:function`: fn(completions, **columns) -> list of numbers."
    )
    reward_weights: list[float] | None = key(None, "Weight of each of reward_functions; empty: 1 each.")
    on_reward_error: str = key(
        "zero",
        "When a reward function raises, hangs or returns nonsense: reward 0 and a counted warning, or stop the run.",
        choices=("zero", "stop"),
    )
    eval_samples: int = key(
        8,
        "Completions sampled for each problem by the first and the last evaluation, for pass@1 and pass@k.",
        minimum=1,
    )
    eval_samples_between: int = key(
        2, "The same for the evaluations between them, which cost the time of training.", minimum=1
    )
    max_turns: int = key(
        4,
        "Turns of an episode at most, where the task has a `reply`. They share max_gen_len; each reply may be as long "
        "as max_prompt_len.",
        minimum=1,
    )
    num_numbers: list[int] = key(
        [3, 4], "countdown: how many numbers a problem has; one of these at random.", minimum=2, maximum=6
    )
    number_max: int = key(99, "countdown: numbers are drawn from 1 to this.", minimum=2, maximum=9999)
    target_max: int = key(99, "countdown: targets are 1 to this.", minimum=1, maximum=9999)
    rg: dict[str, Any] | None = key(
        None,
        "rg: tasks: parameters of the family of reasoning-gym, as `{max_terms: 2}`; of a mixture a mapping for each "
        "family, as `{chain_sum: {max_terms: 2}}`. Those not given are the package's own.",
    )
    system_prompt: str | None = key(None, "System message in place of the task's own; an empty string for none.")
    response_prefix: str | None = key(
        None, "What the answer must begin with, in place of the task's own; it is part of the prompt."
    )


@dataclass
class TrainingConfig:
    """The loop: sizes of a step, sampling, the objective, the optimizer, and when to save and evaluate."""

    random_seed: int = key(1337, "Seed of sampling and of the order of the problems.", minimum=0)
    max_steps: int | None = key(
        None, "Steps of the run; empty: as many as one pass over the training problems takes.", minimum=1
    )
    batch_size: int = key(256, "Completions a step.", minimum=2)
    num_questions_per_batch: int = key(
        0, "Prompts a step; a group is batch_size / num_questions_per_batch. 0: groups of 8.", minimum=0
    )
    max_prompt_len: int = key(
        256, "Longest prompt in tokens; a longer one is left out, with a count in the log.", minimum=1
    )
    max_gen_len: int = key(1024, "Longest completion in tokens.", minimum=1)
    max_seq_length: int | None = key(
        None,
        "scored: a completion that is longer than this with its prompt is left out; empty: the sum of the two above.",
        minimum=2,
    )
    inference_batch_size: int = key(256, "Completions decoded at once (slots of the key-value cache).", minimum=1)
    temperature: float = key(1.0, "Sampling temperature; log-probs are those of the tempered distribution.", above=0)
    stop_strings: list[str] | None = key(
        None, "A completion ends with the token that completes one of these texts; empty: none."
    )
    micro_batch_size: int | None = key(
        None,
        "Completions a forward and backward pass, where max_tokens_per_microbatch gives no number.",
        minimum=1,
    )
    max_tokens_per_microbatch: int | str | None = key(
        AUTO,
        "Token budget of a pass; `auto`: what the memory of the machine holds. The result depends on it by rounding.",
        minimum=1,
    )
    minibatches: int = key(1, "Optimizer steps a rollout is divided into.", minimum=1)
    inner_epochs: int = key(1, "Passes over a rollout.", minimum=1)
    skip_unfinished_episodes: bool = key(False, "Leave completions that hit max_gen_len out of the loss.")
    # the policy term
    epsilon: float = key(
        0.2,
        "Clip range of the probability ratio, downwards (and upwards, see epsilon_high).",
        minimum=0,
        below=1,
        policy=True,
    )
    epsilon_high: float | None = key(
        0.28, "Clip range upwards (DAPO, 2503.14476, section 3.1); empty: epsilon.", minimum=0, policy=True
    )
    delta: float | None = key(
        None,
        "Upper bound of the ratio also where the advantage is negative (two-sided clip, INTELLECT-2); empty: none.",
        above=1,
        policy=True,
    )
    policy_loss: str = key(
        "ppo",
        "`ppo`: clipped surrogate; `cispo`: the clipped ratio is a constant weight of the log-prob.",
        choices=("ppo", "cispo"),
        policy=True,
    )
    importance_sampling_level: str = key(
        "token",
        "One ratio a token (GRPO), or one a sequence, the geometric mean of its tokens' (GSPO).",
        choices=("token", "sequence"),
        policy=True,
    )
    importance_cap: float | None = key(
        None,
        "Tokens are weighed by min(trainer / sampler probability, this), which "
        "corrects a sampler in lower precision; empty: off.",
        above=0,
        advantages=True,
    )
    mismatch_mask: float | None = key(
        None,
        "A completion does not count where the geometric mean of trainer / sampler probability leaves "
        "[1 / this, this]; empty: off. (IcePop masks tokens so, TRL a product above 3.)",
        above=1,
        advantages=True,
    )
    top_entropy_quantile: float = key(
        1.0,
        "Only this share of a rollout's tokens, those of highest entropy, has an advantage (2506.01939: 0.2). One "
        "forward pass more a step.",
        above=0,
        maximum=1,
        advantages=True,
    )
    loss_agg: str = key(
        "token",
        "Mean over all tokens of the update (DAPO), over sequences of their token means (GRPO), over prompts of the "
        "token means of their groups (ScaleRL), or divided by the constant max_gen_len (Dr. GRPO).",
        choices=("token", "sequence", "prompt", "constant"),
    )
    baseline: str = key(
        "mean",
        "What is taken from a reward: the mean of its group, that of the others of its group (RLOO, 2402.14740), or "
        "the mean of the batch (REINFORCE).",
        choices=("mean", "leave_one_out", "batch"),
        advantages=True,
    )
    scale_rewards: str = key(
        "group",
        "Advantages are divided by the standard deviation of the group or of the batch, or not at all (Dr. GRPO), or "
        "by the mean of the group (MaxRL, 2602.02710; rewards must not be negative). `parts`: the task's reward and "
        "each reward function are normalised one by one in the group, then their weighted sum over the batch (GDPO, "
        "2601.05242).",
        choices=("group", "batch", "none", "mean", "parts"),
    )
    overlong_buffer: int = key(
        0,
        "Over the last so many tokens before max_gen_len the reward falls by up to 1, and by 1 for a completion that "
        "was cut off (DAPO, 2503.14476, equation 13: a fifth of max_gen_len); 0: off.",
        minimum=0,
    )
    dynamic_sampling: int = key(
        0,
        "Groups without variance make room for those of further prompts, in up to so many helpings a step (DAPO); "
        "what still lacks is filled with them.",
        minimum=0,
    )
    retire_solved: float | None = key(
        None,
        "Prompts whose running accuracy is at least this are not drawn again (ScaleRL, 2510.13786: 0.9); empty: all.",
        above=0,
        maximum=1,
    )
    curriculum: bool = key(
        False,
        "Prompts come the more often the nearer their running accuracy a is to one half: of their turns they take the "
        "share 4 a (1 - a), but at least a tenth; one not seen before always.",
    )
    zero_truncated_rewards: bool = key(False, "A completion that hit max_gen_len gets reward 0.")
    seed_grpo_alpha: float = key(
        0.0,
        "Scale a prompt's advantages by 1 / (1 + this / log G x semantic entropy) (SEED-GRPO).",
        minimum=0,
        advantages=True,
    )
    entropy_coef: float = key(0.0, "Weight of the entropy bonus (exact entropy).", minimum=0)
    entropy_target: float | None = key(
        None,
        "Entropy in nats a token of the step before, below which the bonus acts, and its weight grows by 0.005 a step "
        "from entropy_coef; above it shrinks (Skywork-OR1, 2505.22312); empty: off.",
        minimum=0,
    )
    old_logprobs: str = key(
        "trainer",
        "With several updates a rollout: ratios against log-probs of an extra pass before the "
        "first update, or against the sampler's own.",
        choices=("trainer", "sampler"),
    )
    # the penalty
    loss_type: str | dict[str, float] = key(
        "none",
        "The penalty, weighed by beta; or several, as a mapping of their names to weights. maxent and listwise_kl take "
        "the place of the policy term. Verifiable tasks need none (DAPO 2503.14476, Dr. GRPO 2503.20783).",
    )
    beta: float = key(
        0.04,
        "Weight of the penalty. In maxent that of the reference in the closed form, where it reweighs completions of a "
        "group by their reference log-probs and flattens the target; it is no trust region.",
        minimum=0,
    )
    anchor: str = key(
        "reference",
        "What the penalty measures distance from: the initial policy, or the one that sampled.",
        choices=("reference", "rollout"),
    )
    reference_sync_steps: int = key(
        0, "Every so many steps the reference becomes the current policy; 0: never.", minimum=0
    )
    kl_target: float = key(
        0.0, "The KL penalty counts only what a completion's mean exceeds this by, in nats a token.", minimum=0
    )
    kl_direction: str = key(
        "reverse",
        "`reverse`: KL(policy || other); `forward`: KL(other || policy). The other is the "
        "anchor, for listwise_kl the target.",
        choices=("reverse", "forward"),
    )
    kl_estimator: str = key(
        "k3",
        "Estimator of the KL from the sampled tokens. As a loss k1 has no gradient on average, k2 that of the reverse "
        "KL, k3 that of the forward KL; k3_unbiased has the value of k3 and the gradient of the reverse KL.",
        choices=("k1", "k2", "k3", "k3_unbiased"),
    )
    ot_target: float = key(0.0, "The OT penalty counts only what a completion exceeds this by.", minimum=0)
    ot_window: int = key(16, "Half width of the band |i - j| of the transport.", minimum=1)
    ot_eps: float = key(0.1, "Entropic regularisation of the transport.", above=0)
    q_temperature: float = key(
        1.0,
        "Temperature of the listwise target softmax(reward / this). In maxent rewards then act at a temperature of "
        "this times (tau + beta): with rewards of 0 and 1 tau is a knob where that is 0.2 to 2, so at 4 or so.",
        above=0,
    )
    q_epsilon: float = key(0.01, "Share of the uniform distribution in the listwise target.", minimum=0, maximum=1)
    length_normalized: bool = key(
        True,
        "Sequence log-probs over a group are means a token (of the reference for maxent, "
        "of the policy for listwise_kl), not sums.",
    )
    tau: float = key(
        0.05,
        "Weight of the entropy of the group weights; `.inf`: uniform weights. (MaxEnt-GRPO: at 0.05 pass@8 rose by "
        "0.079 on Qwen2.5-0.5B, at 0.1 not significantly.)",
        minimum=0,
    )
    maxent_baseline: bool = key(True, "Weights minus 1 / G: worse than average completions are pushed down.")
    maxent_clipped: bool = key(False, "The weights take the place of advantages in the clipped policy loss.")
    # controllers
    tau_target_entropy: float | None = key(
        None, "Weight entropy in nats that tau is steered to; empty: tau stays.", minimum=0
    )
    tau_lr: float = key(0.05, "Step of the controller in log tau.", above=0)
    tau_warmup_steps: int = key(0, "Steps before tau moves.", minimum=0)
    meta_lr: float = key(
        0.0,
        "Above 0: tau and beta go this times the analytic gradient of (weight entropy - tau_target_entropy)^2 "
        "downhill instead.",
        minimum=0,
    )
    beta_kl_target: float | None = key(
        None, "KL to the anchor (k3, nats a token) that beta is steered to; empty: beta stays.", above=0
    )
    # the optimizer
    learning_rate: float = key(1e-6, "Peak learning rate.", above=0)
    warmup_steps: int = key(0, "Steps of linear warm-up.", minimum=0)
    lr_schedule: str = key(
        "constant",
        "After the warm-up: constant, or linear or cosine decay that would reach zero just after the last step.",
        choices=("constant", "linear", "cosine"),
    )
    betas: list[float] = key([0.9, 0.999], "Adam's decay rates.", minimum=0, below=1)
    weight_decay: float = key(0.0, "Decoupled weight decay.", minimum=0)
    max_grad_norm: float = key(1.0, "The gradient is clipped to this norm.", above=0)
    memory_efficient_adamw: bool = key(False, "Compressed optimizer states, see src/engine/optim.py.")
    state_bits: int = key(8, "memory_efficient_adamw: bits of each of Adam's two moments.", choices=(8, 16, 32))
    offload: bool = key(False, "memory_efficient_adamw: keep the optimizer's states in host memory.")
    reference_offload: bool = key(
        False, "Keep the reference in host memory; its layers come to the device one by one while they compute."
    )
    parallel: str = key(
        "shard",
        "Several processes: shard weights and states over them (FSDP2), or replicate; LoRA is replicated.",
        choices=("shard", "replicate"),
    )
    eval_interval: int = key(10, "Steps between evaluations; 0: only before and after.", minimum=0)
    eval_first: bool = key(True, "Evaluate before the first step too.")
    ckpt_save_interval: int = key(100, "Steps between checkpoints; 0: only at the end.", minimum=0)
    keep_checkpoints: int = key(2, "Checkpoints kept.", minimum=1)

    def penalties(self) -> dict[str, float]:
        """Penalty -> weight; that of a single objective is 1, since beta is something else in it."""
        if isinstance(self.loss_type, dict):
            return self.loss_type
        if self.loss_type == "none":
            return {}
        return {self.loss_type: 1.0 if known_penalties()[self.loss_type].objective else self.beta}

    def has_policy_term(self) -> bool:
        """Whether no penalty takes its place, or only gives its advantages (maxent_clipped)."""
        objectives = [name for name in self.penalties() if known_penalties()[name].objective]
        return not objectives or (objectives == ["maxent"] and self.maxent_clipped)


@dataclass
class LoraConfig:
    """Low-rank adapters (peft) in place of full weights: on when `r` or `path` is given."""

    r: int = key(0, "Rank; 0: train the full weights.", minimum=0)
    alpha: float = key(32.0, "The adapter's output is multiplied by alpha / r.", above=0)
    dropout: float = key(
        0.0,
        "Dropout of the adapter's input in the update; sampling, evaluation and the reference have none.",
        minimum=0,
        below=1,
    )
    target_modules: list[str] | None = key(
        None, "Names of the linear layers that get an adapter; empty: all but the head."
    )
    path: str | None = key(
        None,
        "Folder of a peft adapter to go on training; the reference is the base with this adapter as it was loaded.",
    )
    merge_on_save: bool = key(False, "final/ holds the whole model with the adapter merged in, not the adapter.")


@dataclass
class HubConfig:
    """Push final/ to the Hugging Face hub when the run is complete."""

    push_to_hub: bool = key(False, "Push final/, with a model card.")
    hub_model_id: str | None = key(None, "Repository, as owner/name; empty: the run folder's name, under your account.")


@dataclass
class Config:
    """One experiment: the sections of a config file."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    hub: HubConfig = field(default_factory=HubConfig)
    source: str = ""  # the file it came from
    name: str = ""  # of the run; empty: the stem of source
    replies = False  # not of the file, so not a field: the task has a reply, and an episode may have several turns

    def most_told(self) -> int:
        """Tokens that an episode may be told beside what the policy writes."""
        return self.replies * (self.data.max_turns - 1) * self.training.max_prompt_len


SECTIONS = {"model": ModelConfig, "data": DataConfig, "training": TrainingConfig, "lora": LoraConfig, "hub": HubConfig}
ALIASES = {"mask_truncated": "skip_unfinished_episodes"}  # names other trainers use
# Keys of the GRPO-mini format that only some loss types read: its files carry all of them, so they never complain.
SEED_FORMAT_KEYS = {"beta", "kl_target", "ot_target", "ot_window"}


def suggest(name: str, known: list[str]) -> str:
    """`; did you mean ...?` for a near miss, else the list of what is known."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return f"; did you mean {close[0]}?" if close else f"; known are: {', '.join(sorted(known))}"


def convert(value: Any, wanted: Any, where: str) -> Any:
    """`value` as the field's type, or a ConfigError. YAML reads 1e-6 as a string, so number-like strings count."""
    names = {int: "a whole number", float: "a finite number", bool: "true or false", str: "a text"}
    if isinstance(wanted, UnionType):
        if value is None and type(None) in get_args(wanted):
            return None
        options = [option for option in get_args(wanted) if option is not type(None)]
        if isinstance(value, dict) and get_origin(options[-1]) is dict:
            return {
                str(name): convert(item, get_args(options[-1])[1], f"{where}.{name}") for name, item in value.items()
            }
        if options == [int, str]:
            if value == AUTO:
                return value
            names[int] += f" or {AUTO}"
        wanted = options[0]
    if get_origin(wanted) is list:
        items = value if isinstance(value, list) else [value]
        if not items:
            raise ConfigError(f"{where} must hold at least one value")
        return [convert(item, get_args(wanted)[0], where) for item in items]
    if wanted is Any or (wanted is bool and isinstance(value, bool)):
        return value
    if wanted is str and isinstance(value, str):
        return value
    if wanted is int and isinstance(value, int) and not isinstance(value, bool):
        return value
    if wanted in (int, float) and isinstance(value, int | float | str) and not isinstance(value, bool):
        try:
            number = float(value)
            if wanted is float and number == number and (abs(number) != float("inf") or where.endswith(".tau")):
                return number
            if wanted is int and number == int(number):
                return int(number)
        except (ValueError, OverflowError):
            pass
    wanted_name = names.get(wanted, "a mapping such as {name: value}")
    raise ConfigError(f"{where} must be {wanted_name}, not {value!r}")


def check_rules(value: Any, rules: Any, where: str) -> None:
    """Range and choice of one value (each item of a list), or a ConfigError."""
    for item in value if isinstance(value, list) else [value]:
        if item is None:
            continue
        if "choices" in rules and item not in rules["choices"]:
            advice = suggest(str(item), list(rules["choices"]))
            if "did you mean" in advice:
                advice += f" known are: {', '.join(sorted(rules['choices']))}"
            raise ConfigError(f"{where}: {item!r} is not known{advice}")
        for rule, wrong, words in (
            ("minimum", lambda a, b: a < b, "at least"),
            ("above", lambda a, b: a <= b, "greater than"),
            ("maximum", lambda a, b: a > b, "at most"),
            ("below", lambda a, b: a >= b, "less than"),
        ):
            if rule in rules and item != AUTO and wrong(item, rules[rule]):
                raise ConfigError(f"{where} must be {words} {rules[rule]}, not {item}")


def fill_section(section: str, given: dict, source: str) -> Any:
    """One section's dataclass from its YAML mapping."""
    known: dict[str, Field] = {item.name: item for item in fields(SECTIONS[section])}
    values = {}
    for name, value in given.items():
        name = ALIASES.get(name, name)
        if name not in known:
            raise ConfigError(f"{source}: {section}.{name} is not a key{suggest(str(name), list(known))}")
        where = f"{source}: {section}.{name}"
        if name in values:
            raise ConfigError(f"{where} is given twice, once by another name; remove one of them")
        values[name] = convert(value, known[name].type, where)
        check_rules(values[name], known[name].metadata, where)
    return SECTIONS[section](**values)


def check_combinations(config: Config, given: dict[str, dict], source: str) -> None:
    """Rules that concern several keys at once."""
    training = config.training
    training.num_questions_per_batch = training.num_questions_per_batch or max(1, training.batch_size // 8)
    questions, size = training.num_questions_per_batch, training.batch_size
    if size % questions or size // questions < 2:
        raise ConfigError(
            f"{source}: training.batch_size ({size}) must be a multiple of num_questions_per_batch ({questions}) and "
            f"at least twice as large; set batch_size to num_questions_per_batch x group size"
        )
    if questions % training.minibatches:
        raise ConfigError(
            f"{source}: training.num_questions_per_batch ({questions}) must be a multiple of minibatches "
            f"({training.minibatches}); groups are not cut apart"
        )
    check_loss_type(training, source)
    check_method(training, source)
    if training.meta_lr > 0 and training.tau_target_entropy is None:
        raise ConfigError(f"{source}: training.meta_lr needs training.tau_target_entropy, the entropy to steer to")
    for name in ("state_bits", "offload"):
        if getattr(training, name) != getattr(TrainingConfig, name) and not training.memory_efficient_adamw:
            raise ConfigError(f"{source}: training.{name} needs training.memory_efficient_adamw: true")
    check_lora(config, source)
    if "" in (training.stop_strings or []):
        raise ConfigError(f"{source}: training.stop_strings must not hold an empty text; every completion contains it")
    if len(training.betas) != 2 or training.betas[1] == 0:
        raise ConfigError(
            f"{source}: training.betas must be two numbers such as [0.9, 0.999], the second above 0, not "
            f"{training.betas}"
        )
    for name in given.get("training", {}):
        name = ALIASES.get(name, name)
        read_by = unread_by(config, name)
        if read_by and name not in SEED_FORMAT_KEYS:
            now = " and ".join(training.penalties()) or "none"
            raise ConfigError(
                f"{source}: training.{name} is not read by loss_type {now}; it belongs to {', '.join(read_by)}; "
                f"remove the key or change the loss_type"
            )


def check_loss_type(training: TrainingConfig, source: str) -> None:
    """The names of the penalties, and what they can not be together with."""
    known = known_penalties()
    given = training.loss_type if isinstance(training.loss_type, dict) else {training.loss_type: 1.0}
    for name, weight in given.items():
        if name not in known or (name == "none" and isinstance(training.loss_type, dict)):
            raise ConfigError(f"{source}: training.loss_type: {name!r} is not known{suggest(name, list(known))}")
        if weight < 0 or (weight == 0 and known[name].objective):
            least = "above 0, as it takes the place of the policy term" if known[name].objective else "at least 0"
            raise ConfigError(f"{source}: training.loss_type.{name} must be {least}, not {weight}")
    if len([name for name in given if known[name].objective]) > 1:
        raise ConfigError(
            f"{source}: training.loss_type: of {', '.join(given)} more than one takes the place of the policy term; "
            f"keep one of these"
        )
    if isinstance(training.loss_type, dict) and training.beta_kl_target is not None:
        raise ConfigError(
            f"{source}: training.beta_kl_target moves beta, and the weights of a mapping do not move; "
            f"give loss_type as a word"
        )
    if "maxent" in given and training.tau + training.beta == 0:
        raise ConfigError(f"{source}: training.tau + training.beta must be greater than 0 for loss_type maxent")


def check_method(training: TrainingConfig, source: str) -> None:
    """Combinations of the method's keys that mean nothing."""
    several = training.minibatches * training.inner_epochs > 1
    in_reward, sequences = "kl_in_reward" in training.penalties(), training.importance_sampling_level == "sequence"
    corrects = "mismatch_mask" if training.mismatch_mask is not None else "importance_cap"
    for wrong, sentence in (
        (
            training.baseline == "batch" and training.dynamic_sampling > 0,
            "dynamic_sampling replaces groups that teach nothing, and against baseline: batch every group teaches; "
            "use baseline: mean or leave_one_out",
        ),
        (
            training.baseline == "batch" and training.scale_rewards not in ("batch", "none"),
            f"baseline: batch compares with the whole batch, and scale_rewards: {training.scale_rewards} is of a "
            f"group; use scale_rewards: batch or none",
        ),
        (
            training.scale_rewards == "parts" and training.dynamic_sampling > 0,
            "dynamic_sampling replaces groups whose sums of rewards are equal, and scale_rewards: parts learns from "
            "their parts; remove one of the two keys",
        ),
        (
            training.scale_rewards == "mean" and training.overlong_buffer > 0,
            "scale_rewards: mean divides by a mean reward, and overlong_buffer makes rewards negative; remove one of "
            "the two keys",
        ),
        (
            training.baseline != "mean" and training.scale_rewards == "parts",
            f"scale_rewards: parts takes each reward's mean over the group; remove baseline: {training.baseline}",
        ),
        (
            training.baseline == "leave_one_out" and training.skip_unfinished_episodes,
            "baseline: leave_one_out compares a completion with the others of its group, and skip_unfinished_episodes "
            "may leave one alone; remove one of the two keys",
        ),
        (
            training.overlong_buffer >= training.max_gen_len,
            f"overlong_buffer ({training.overlong_buffer}) must be below max_gen_len ({training.max_gen_len}); "
            f"a fifth of it is usual",
        ),
        (
            in_reward and (training.anchor == "rollout" or training.reference_sync_steps == 1),
            "kl_in_reward with anchor: rollout or reference_sync_steps: 1 compares the policy that sampled with "
            "itself; use anchor: reference, and reference_sync_steps: 0 or above 1",
        ),
        (
            in_reward and not training.has_policy_term(),
            "kl_in_reward changes advantages, which maxent and listwise_kl do not read; remove it, or use kl",
        ),
        (
            sequences and (in_reward or training.top_entropy_quantile < 1),
            f"{'loss_type: kl_in_reward' if in_reward else 'top_entropy_quantile'} gives each token an advantage of "
            f"its own, and importance_sampling_level: sequence weighs completions as one; use token",
        ),
        (
            (training.mismatch_mask or training.importance_cap) is not None
            and several
            and training.old_logprobs == "sampler",
            f"{corrects} compares the trainer's log-probs with the sampler's, and old_logprobs: sampler takes one "
            f"for the other; use old_logprobs: trainer",
        ),
    ):
        if wrong:
            raise ConfigError(f"{source}: training.{sentence}")


def check_lora(config: Config, source: str) -> None:
    """The reference is the policy at the start, within the trained model, so it cannot be another policy."""
    lora, training = config.lora, config.training
    if not lora.r and not lora.path:
        given = [name for name, value in asdict(lora).items() if value != getattr(LoraConfig(), name)]
        if given:
            raise ConfigError(f"{source}: lora.{given[0]} needs lora.r or lora.path; set one of them")
    elif training.anchor == "rollout" or training.reference_sync_steps:
        name = "anchor: rollout" if training.anchor == "rollout" else "reference_sync_steps"
        raise ConfigError(
            f"{source}: training.{name} is not possible with lora, whose reference is always the policy at the "
            f"start; remove it"
        )


def unread_by(config: Config, name: str) -> tuple[str, ...]:
    """What would read training key `name`, if nothing of this config does; else ()."""
    training, known = config.training, known_penalties()
    active = training.penalties()
    rules = TrainingConfig.__dataclass_fields__[name].metadata
    with_policy_term = tuple(other for other, declared in known.items() if not declared.objective)
    if rules.get("policy") and not training.has_policy_term():
        return (*with_policy_term, "maxent with maxent_clipped: true")
    if rules.get("advantages") and any(known[other].objective for other in active):
        return with_policy_term
    if "maxent" in active and training.meta_lr > 0 and name in ("tau_lr", "tau_warmup_steps"):
        return ("maxent with meta_lr: 0",)
    readers = tuple(other for other, declared in known.items() if name in declared.reads)
    return () if any(reader in active for reader in readers) else readers


class UniqueKeyLoader(yaml.SafeLoader):
    """YAML's safe loader, but a key given twice is an error instead of silently the last one's value."""

    def construct_mapping(self, node, deep=False):
        names = [name.value for name, _ in node.value]
        for index, (name, _) in enumerate(node.value):
            if name.value in names[:index]:
                raise yaml.YAMLError(f"{name.value} is given twice, again in line {name.start_mark.line + 1}")
        return super().construct_mapping(node, deep)


def read_yaml(path: str) -> dict:
    """The file's mapping, or a ConfigError that says what is wrong with it."""
    if not os.path.isfile(path):
        near = sorted(str(file) for file in Path("configs").glob("*/*.yaml"))
        raise ConfigError(f"{path}: there is no such config file{suggest(path, near) if near else ''}")
    try:
        raw = yaml.load(Path(path).read_text(encoding="utf-8"), UniqueKeyLoader)
    except (yaml.YAMLError, ValueError, RecursionError, OSError) as error:  # ValueError: bad UTF-8, a 13th month
        raise ConfigError(f"{path}: cannot be read as YAML: {' '.join(str(error).split())}") from error
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}: must hold the sections {', '.join(SECTIONS)}")
    return raw


def sections_of(raw: dict, path: str) -> dict[str, dict]:
    """The sections of a file, each a mapping of its own."""
    for section, values in raw.items():
        if section not in SECTIONS:
            raise ConfigError(f"{path}: {section} is not a section{suggest(str(section), list(SECTIONS))}")
        if not isinstance(values, dict | None):
            raise ConfigError(f"{path}: {section} must be a list of `key: value` lines, not {values!r}")
    return {section: dict(values or {}) for section, values in raw.items()}


def read_base(raw: dict, path: str) -> dict[str, dict]:
    """The sections of the file that `base:` names, as seen from this one; it has no base itself."""
    name = raw.pop("base", None)
    if name is None:
        return {}
    if not isinstance(name, str):
        raise ConfigError(f"{path}: base must be the path of another config, not {name!r}")
    base = str(Path(path).parent / name)
    found = read_yaml(base)
    if "base" in found:
        raise ConfigError(f"{path}: its base {base} has a base too; name that one, and give here what differs")
    return sections_of(found, base)


def load_config(path: str | Path, overrides: tuple[str, ...] | list[str] = ()) -> Config:
    """Read a YAML file over its base, apply `section.key=value` overrides, check everything.

    ConfigError says what is wrong.
    """
    path = str(path)
    raw = read_yaml(path)
    base = read_base(raw, path)
    given = sections_of(raw, path)
    for override in overrides:
        name, equals, text = override.partition("=")
        section, _, option = name.strip().partition(".")
        if not equals or section not in SECTIONS or not option:
            raise ConfigError(
                f"--set {override}: write it as section.key=value, for example training.learning_rate=1e-5"
            )
        try:
            given.setdefault(section, {})[option] = yaml.load(text, UniqueKeyLoader)
        except (yaml.YAMLError, ValueError, RecursionError) as error:
            raise ConfigError(f"--set {override}: the value cannot be read as YAML") from error
    whole = {section: base.get(section, {}) | given.get(section, {}) for section in {**base, **given}}
    config = Config(**{section: fill_section(section, values, path) for section, values in whole.items()}, source=path)
    check_combinations(config, given, path)  # what a base says for all who name it may be unread in one of them
    return config


def dump_config(config: Config) -> str:
    """The resolved config as YAML that loads again; keys the loss type does not read are left out."""
    sections = asdict(config)
    del sections["source"], sections["name"]
    sections["training"] = {name: value for name, value in sections["training"].items() if not unread_by(config, name)}
    return yaml.safe_dump(sections, sort_keys=False, width=120)
