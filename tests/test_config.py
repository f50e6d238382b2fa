"""The config is the experiment: what is accepted, what is refused and in which words, and that it round-trips."""

from dataclasses import asdict, fields
from pathlib import Path
from types import UnionType
from typing import get_args, get_origin

import pytest
import yaml

from src.config import SECTIONS, Config, ConfigError, dump_config, known_penalties, load_config, unread_by

PROJECT = Path(__file__).resolve().parent.parent
SHIPPED = sorted(PROJECT.glob("configs/**/*.yaml"))
LOSS_TYPES = [*known_penalties(), {"kl": 0.04, "ot": 0.1}, {"maxent": 1.0, "approx_kl": 0.5}]
every_loss_type = pytest.mark.parametrize("loss_type", LOSS_TYPES, ids=str)

# every key of the GRPO-mini format, with values other than our defaults
SEED_FORMAT = """
model:
  pretrained_model_path: "some/model-3B-Instruct"
  device: "cuda"
  dtype: "bfloat16"

training:
  random_seed: 42
  max_prompt_len: 200
  max_gen_len: 1000
  batch_size: 128
  num_questions_per_batch: 16
  micro_batch_size: 4
  max_grad_norm: 2.0
  learning_rate: 5.0e-6
  weight_decay: 0.01
  betas: [0.8, 0.99]
  inference_batch_size: 64
  skip_unfinished_episodes: true
  ckpt_save_interval: 20
  eval_interval: 5
  memory_efficient_adamw: true
  loss_type: "kl"
  beta: 0.1
  kl_target: 0.5
  ot_target: 0.05
  ot_window: 4
"""


@pytest.fixture
def write(tmp_path):
    """write(text) -> path of a config file with that text."""

    def write_text(text: str, name: str = "config.yaml") -> Path:
        path = tmp_path / name
        path.write_text(text, encoding="utf-8")
        return path

    return write_text


# --- what is accepted -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_config_is_valid_and_its_dump_loads_back(write, path):
    config = load_config(path)
    assert config.source == str(path)
    assert config.training.loss_type == yaml.safe_load(path.read_text(encoding="utf-8"))["training"]["loss_type"]
    assert settings_read(load_config(write(dump_config(config)))) == settings_read(config)


@pytest.mark.parametrize("loss_type", known_penalties())
def test_grpo_mini_file_loads_unmodified(write, loss_type):
    text = SEED_FORMAT.replace('"kl"', f'"{loss_type}"')
    config = load_config(write(text))
    for section, given in yaml.safe_load(text).items():
        for name, value in given.items():
            assert getattr(getattr(config, section), name) == (float(value) if name == "learning_rate" else value), name


@pytest.mark.parametrize("text", ["1e-6", "1E-6", "'1e-6'", "1.0e-6", "0.000001", "1_0e-7"])
def test_scientific_notation_is_a_number(write, text):
    """YAML 1.1 reads 1e-6, which has no dot, as a text."""
    path = write(f"training:\n  learning_rate: {text}\n")
    for config in (load_config(path), load_config(path, [f"training.learning_rate={text}"])):
        assert config.training.learning_rate == 1e-6 and isinstance(config.training.learning_rate, float)


def test_values_become_what_the_key_is(write):
    config = load_config(
        write("""
model:
data:
  num_numbers: 3
training:
  random_seed: 9007199254740993
  max_steps: 1e3
  beta: 1
  max_tokens_per_microbatch: auto
  loss_type: none
  mask_truncated: true
""")
    )
    training = config.training
    assert config.model == Config().model and config.data.num_numbers == [3], "a single number is a list of one"
    assert training.random_seed == 2**53 + 1, "whole numbers stay exact"
    assert training.max_steps == 1000 and isinstance(training.max_steps, int)
    assert training.beta == 1.0 and isinstance(training.beta, float)
    assert training.max_tokens_per_microbatch == "auto" and training.loss_type == "none", "the name, and not nothing"
    assert training.skip_unfinished_episodes, "by the name that other trainers use"
    assert load_config(write("training:\n  max_steps:\n")).training.max_steps is None


def test_overrides_win_and_are_typed(write):
    path = write("model:\n  dtype: float32\ntraining:\n  beta: 0.1\n")
    overrides = [
        "training.beta=0.2",
        "training.betas=[0.5, 0.6]",
        " model.dtype =bfloat16",
        "data.system_prompt=a=b",
        "training.max_steps=",
        "training.skip_unfinished_episodes=true",
        "training.loss_type={kl: 4e-2, ot: 1}",
        "training.beta=3e-1",
    ]
    config = load_config(path, overrides)
    assert config.training.beta == 0.3, "the last of two overrides counts"
    assert config.training.betas == [0.5, 0.6]
    assert config.model.dtype == "bfloat16" and config.data.system_prompt == "a=b"
    assert config.training.max_steps is None and config.training.skip_unfinished_episodes is True
    assert config.training.loss_type == config.training.penalties() == {"kl": 0.04, "ot": 1.0}
    config.training.betas.append(0.5)
    assert len(load_config(path).training.betas) == 2, "defaults are not shared between configs"


# --- what is refused, and in which words ------------------------------------------------------------------------------

TRAINING = "training:\n  {}\n".format
BAD = {  # text -> what the message says besides the file
    # the file
    "": "must hold the sections model, data, training",
    "# beta: 1\n": "must hold the sections",
    "- model\n- training\n": "must hold the sections",
    "hello\n": "must hold the sections",
    "training: {beta: 1\n": "cannot be read as YAML",
    "training:\n\tbeta: 1\n": "cannot be read as YAML",
    "training: \x07\n": "cannot be read as YAML",
    "model: !!python/object/apply:os.system ['true']\n": "cannot be read as YAML",
    TRAINING("random_seed: 2024-13-01"): "cannot be read as YAML",
    "[" * 5000: "cannot be read as YAML",
    TRAINING("beta: 0.1\n  beta: 0.2"): "beta is given twice, again in line 3",
    "model:\ntraining:\nmodel:\n": "model is given twice",
    TRAINING("mask_truncated: true\n  skip_unfinished_episodes: false"): "given twice",
    # sections and keys
    "trainer:\n  beta: 1\n": "trainer is not a section; did you mean training?",
    "zzz:\n": "zzz is not a section; known are: data, hub, lora, model, training",
    "1: 2\n": "1 is not a section",
    "source: x\n": "source is not a section",
    "name: x\n": "name is not a section",
    "model: hello\n": "model must be a list of `key: value` lines, not 'hello'",
    "training: []\n": "training must be a list of `key: value` lines, not []",
    "training: false\n": "training must be a list of `key: value` lines",
    TRAINING("learning_rat: 1"): "training.learning_rat is not a key; did you mean learning_rate?",
    TRAINING("dtype: float32"): "training.dtype is not a key",
    "model:\n  zzzzzz: 1\n": "model.zzzzzz is not a key; known are: compile, device",
    TRAINING("1: 2"): "training.1 is not a key",
    TRAINING('"a\\nb": 1'): "training.a b is not a key",
    # types
    TRAINING("batch_size: 1.5"): "training.batch_size must be a whole number, not 1.5",
    TRAINING("max_gen_len: many"): "training.max_gen_len must be a whole number, not 'many'",
    TRAINING("batch_size: [64]"): "training.batch_size must be a whole number, not [64]",
    TRAINING("eval_interval: true"): "training.eval_interval must be a whole number",
    TRAINING("max_steps: 1e999"): "training.max_steps must be a whole number",
    TRAINING("learning_rate: fast"): "training.learning_rate must be a finite number, not 'fast'",
    TRAINING("learning_rate: .nan"): "training.learning_rate must be a finite number, not nan",
    TRAINING("beta: .inf"): "training.beta must be a finite number, not inf",
    TRAINING("beta:"): "training.beta must be a finite number, not None",
    TRAINING("beta: true"): "training.beta must be a finite number, not True",
    TRAINING("skip_unfinished_episodes: 1"): "must be true or false, not 1",
    TRAINING("memory_efficient_adamw: 'yes'"): "must be true or false, not 'yes'",
    "model:\n  pretrained_model_path: 7\n": "model.pretrained_model_path must be a text, not 7",
    TRAINING("loss_type: no"): "training.loss_type must be a text, not False",
    TRAINING("betas: {a: 1}"): "training.betas must be a finite number",
    "data:\n  num_numbers: [[3]]\n": "data.num_numbers must be a whole number, not [3]",
    "data:\n  num_numbers: []\n": "data.num_numbers must hold at least one value",
    "data:\n  rg: max_terms\n": "data.rg must be a mapping such as {name: value}, not 'max_terms'",
    # ranges and choices
    TRAINING("betas: [0.9, 1.0]"): "training.betas must be less than 1, not 1.0",
    TRAINING("kl_direction: sideways"): "training.kl_direction: 'sideways' is not known; known are: forward, reverse",
    "data:\n  num_numbers: [3, 7]\n": "data.num_numbers must be at most 6, not 7",
    TRAINING("loss_type: klx"): "training.loss_type: 'klx' is not known; did you mean kl?",
    TRAINING("loss_type: KL"): "training.loss_type: 'KL' is not known; known are: approx_kl,",
    "model:\n  dtype: float16\n": "model.dtype: 'float16' is not known; did you mean bfloat16?",
    TRAINING("loss_type: maxent\n  tau: 0\n  beta: 0"): "training.tau + training.beta must be greater than 0",
    TRAINING("loss_type: maxent\n  meta_lr: 0.1"): "training.meta_lr needs training.tau_target_entropy",
    # several penalties
    TRAINING("loss_type: {klx: 1, ot: 1}"): "training.loss_type: 'klx' is not known; did you mean kl?",
    TRAINING("loss_type: {none: 1}"): "training.loss_type: 'none' is not known",
    TRAINING("loss_type: {kl: -0.1, ot: 1}"): "training.loss_type.kl must be at least 0, not -0.1",
    TRAINING("loss_type: {maxent: 0}"): "training.loss_type.maxent must be above 0, as it takes the place of",
    TRAINING("loss_type: {kl: much}"): "training.loss_type.kl must be a finite number, not 'much'",
    TRAINING("loss_type: [kl, ot]"): "training.loss_type must be a text, not ['kl', 'ot']",
    TRAINING("loss_type: {maxent: 1, listwise_kl: 1}"): "of maxent, listwise_kl more than one takes the place of",
    TRAINING("loss_type: {kl: 1, ot: 1}\n  beta_kl_target: 0.1"): "the weights of a mapping do not move",
    # combinations
    TRAINING("batch_size: 100\n  num_questions_per_batch: 32"): (
        "training.batch_size (100) must be a multiple of num_questions_per_batch (32)"
    ),
    TRAINING("batch_size: 32\n  num_questions_per_batch: 32"): (
        "at least twice as large; set batch_size to num_questions_per_batch x group size"
    ),
    TRAINING("minibatches: 5"): "training.num_questions_per_batch (32) must be a multiple of minibatches (5)",
    TRAINING("betas: 0.9"): "training.betas must be two numbers such as [0.9, 0.999]",
    TRAINING("betas: [0.9, 0.99, 0.999]"): "training.betas must be two numbers",
    TRAINING("betas: [0.9, 0.0]"): "training.betas must be two numbers",
    TRAINING("loss_type: kl\n  kl_estimator: k1"): (
        "training.kl_estimator is not read by loss_type kl; it belongs to approx_kl; remove the key"
    ),
    TRAINING("loss_type: {kl: 1, ot: 1}\n  kl_estimator: k1"): "is not read by loss_type kl and ot; it belongs to",
}


@pytest.mark.parametrize("text", BAD, ids=lambda text: repr(text[:60]))
def test_bad_config_is_refused_in_one_line(write, text):
    path = write(text)
    with pytest.raises(ConfigError) as refusal:
        load_config(path)
    message = str(refusal.value)
    assert BAD[text] in message and message.startswith(f"{path}: ") and len(message.splitlines()) == 1


RULES = {  # what a value must be and is not -> keys of training
    "must be at least 0, not -1": "beta kl_target ot_target reference_sync_steps epsilon epsilon_high entropy_coef "
    "entropy_target overlong_buffer dynamic_sampling "
    "seed_grpo_alpha tau q_epsilon meta_lr tau_target_entropy warmup_steps weight_decay eval_interval random_seed",
    "must be greater than 0, not 0": "top_entropy_quantile retire_solved "
    "ot_eps q_temperature tau_lr beta_kl_target importance_cap temperature "
    "learning_rate max_grad_norm",
    "must be at least 1, not 0": "ot_window max_steps max_gen_len micro_batch_size minibatches inner_epochs",
    "must be greater than 1, not 1": "delta mismatch_mask",
    "must be less than 1, not 1": "epsilon betas",
    "must be at most 1, not 2": "q_epsilon top_entropy_quantile retire_solved",
    "must be a whole number, not 2.5": "ot_window reference_sync_steps tau_warmup_steps",
    "is not known": "kl_direction kl_estimator anchor policy_loss importance_sampling_level loss_agg scale_rewards "
    "baseline old_logprobs lr_schedule",
}


@pytest.mark.parametrize("words", RULES)
def test_a_value_out_of_range_is_refused_in_one_line_that_names_the_key(write, words):
    for name in RULES[words].split():
        with pytest.raises(ConfigError) as refusal:
            load_config(write(f"training:\n  {name}: {words.partition('not ')[2] if 'must' in words else 'word'}\n"))
        assert f"training.{name}" in str(refusal.value) and words in str(refusal.value)
        assert len(str(refusal.value).splitlines()) == 1


HOW = "write it as section.key=value, for example training.learning_rate=1e-5"
BAD_METHODS = {  # combinations that mean nothing
    "baseline: batch\n  scale_rewards: none\n  dynamic_sampling: 2": "use baseline: mean or leave_one_out",
    "baseline: leave_one_out\n  scale_rewards: parts": "remove baseline: leave_one_out",
    "baseline: batch\n  scale_rewards: group": "use scale_rewards: batch or none",
    "dynamic_sampling: 2\n  scale_rewards: parts": "remove one of the two keys",
    "scale_rewards: mean\n  overlong_buffer: 8": "remove one of the two keys",
    "importance_sampling_level: sequence\n  top_entropy_quantile: 0.2": "use token",
    "importance_sampling_level: sequence\n  loss_type: kl_in_reward": "use token",
    "loss_type: kl_in_reward\n  reference_sync_steps: 1": "reference_sync_steps: 0 or above 1",
    "importance_cap: 2\n  minibatches: 2\n  old_logprobs: sampler": "importance_cap compares the trainer's",
    "baseline: leave_one_out\n  skip_unfinished_episodes: true": "remove one of the two keys",
    "overlong_buffer: 40\n  max_gen_len: 40": "must be below max_gen_len (40)",
    "loss_type: kl_in_reward\n  anchor: rollout": "use anchor: reference",
    "loss_type: {kl_in_reward: 0.1, maxent: 1}": "remove it, or use kl",
    "mismatch_mask: 2\n  minibatches: 2\n  old_logprobs: sampler": "use old_logprobs: trainer",
}


@pytest.mark.parametrize("text", BAD_METHODS)
def test_combinations_that_mean_nothing_are_refused_in_one_line(write, text):
    with pytest.raises(ConfigError) as refusal:
        load_config(write(f"training:\n  {text}\n"))
    assert BAD_METHODS[text] in str(refusal.value) and len(str(refusal.value).splitlines()) == 1
    for line in text.split("\n  "):  # each by itself is possible, but for a mapping and what must be below 1,024
        if not any(word in line for word in ("{", "buffer", "baseline: batch")):
            load_config(write(f"training:\n  {line}\n"))


def test_a_config_may_name_another_as_its_base(write, tmp_path):
    (tmp_path / "below").mkdir()
    write("training:\n  loss_type: maxent\n  tau: 0.3\n  batch_size: 64\ndata:\n  eval_size: 7\n", "below/first.yaml")
    path = write("base: below/first.yaml\ntraining:\n  loss_type: kl\n  batch_size: 32\nmodel:\n  dtype: float32\n")
    config = load_config(path, ["training.beta=0.5"])
    training = config.training
    assert (training.loss_type, training.batch_size, training.beta, training.tau) == ("kl", 32, 0.5, 0.3)
    assert (config.data.eval_size, config.model.dtype, config.source) == (7, "float32", str(path))
    dumped = dump_config(config)
    assert "base" not in yaml.safe_load(dumped) and yaml.safe_load(dumped)["data"]["eval_size"] == 7
    assert dump_config(load_config(write(dumped, "dump.yaml"))) == dumped
    for text, words in {
        "base: 3": "base must be the path of another config, not 3",
        "base: nowhere.yaml": "there is no such config file",
        "base: config.yaml": "has a base too; name that one",
        "base: below/first.yaml\ntraining:\n  loss_type: kl\n  tau: 1": "training.tau is not read by loss_type kl",
    }.items():
        with pytest.raises(ConfigError) as refusal:
            load_config(write(text, "second.yaml"))
        assert words in str(refusal.value) and len(str(refusal.value).splitlines()) == 1


BAD_OVERRIDES = {
    "training.beta": f"--set training.beta: {HOW}",
    "beta=1": f"--set beta=1: {HOW}",
    ".beta=1": HOW,
    "training.=1": HOW,
    "training=1": HOW,
    "trainer.beta=1": HOW,
    "": HOW,
    "training.beta=[": "--set training.beta=[: the value cannot be read as YAML",
    "data.seed=2024-13-01": "the value cannot be read as YAML",
    "training.betas={a: 1, a: 2}": "the value cannot be read as YAML",
    "training.betta=1": "training.betta is not a key; did you mean beta",
    "training.beta.x=1": "training.beta.x is not a key",
    "training.beta=": "training.beta must be a finite number, not None",
    "training.batch_size=33": "training.batch_size (33) must be a multiple of num_questions_per_batch (4)",
    "training.kl_estimator=k2": "training.kl_estimator is not read by loss_type kl",
    "model.dtype=int8": "model.dtype: 'int8' is not known",
}


@pytest.mark.parametrize("override", BAD_OVERRIDES)
def test_bad_override_is_refused_in_one_line(write, override):
    path = write("training:\n  loss_type: kl\n")
    with pytest.raises(ConfigError) as refusal:
        load_config(path, [override])
    message = str(refusal.value)
    assert BAD_OVERRIDES[override] in message
    assert message.startswith((f"{path}: ", f"--set {override}")) and len(message.splitlines()) == 1
    with pytest.raises(ConfigError, match="model must be a list of `key: value` lines, not 5"):
        load_config(write("model: 5\n"), ["model.dtype=float32"])


@pytest.mark.parametrize("given", ["nope.yaml", "", ".", "x" * 5000, "configs/configs_tiny/config_none_tin.yaml"])
def test_missing_config_file(given, monkeypatch):
    monkeypatch.chdir(PROJECT)
    with pytest.raises(ConfigError, match="there is no such config file") as refusal:
        load_config(given)
    if given.startswith("configs"):
        assert "did you mean configs/configs_tiny/config_none_tiny.yaml?" in str(refusal.value)


def test_config_file_that_is_no_text(tmp_path):
    (tmp_path / "config.yaml").write_bytes(b"training:\n  loss_type: \xff\xfe\n")
    with pytest.raises(ConfigError, match="cannot be read as YAML"):
        load_config(tmp_path / "config.yaml")


# --- every key: documented, kept by a round trip (that each is read: test_house.py) -----------------------------------


def test_every_key_has_a_doc():
    for field in (field for section in SECTIONS.values() for field in fields(section)):
        assert len(field.metadata["doc"].split()) >= 2 and field.metadata["doc"].endswith((".", ")")), field.name


def other_value(field, default):
    """A permitted value of a field that is not its default."""
    rules, kind = field.metadata, field.type
    if isinstance(kind, UnionType):
        kind = get_args(kind)[0]
    if kind is bool:
        return not default
    if "choices" in rules:
        return next(choice for choice in rules["choices"] if choice != default)
    if kind is str:
        return "two lines:\n# 'and' \"more\" \u20ac"
    if get_origin(kind) is dict:
        return {"max_terms": 2, "gcd": {"text": "1e3", "list": [1.5, True, None]}}
    permitted = [
        number
        for number in (1, 2, 3, 5, 0.25, 0.5, 1.5, 17)
        if number >= rules.get("minimum", number)
        and number > rules.get("above", number - 1)
        and number <= rules.get("maximum", number)
        and number < rules.get("below", number + 1)
    ]
    if get_origin(kind) is list:
        item = get_args(kind)[0]
        if item is str:
            return ["</answer>", "two\nlines"]
        return [item(number) for number in permitted if item(number) == number][:2]
    return next(kind(number) for number in permitted if kind(number) == number and number != default)


def settings_read(config: Config) -> dict:
    """All values of a config but its names and what its loss type does not read."""
    sections = asdict(config)
    del sections["source"], sections["name"]
    sections["training"] = {name: value for name, value in sections["training"].items() if not unread_by(config, name)}
    return sections


@every_loss_type
def test_dump_loads_back_with_every_key_changed(write, loss_type):
    probe = Config()
    probe.training.loss_type = loss_type
    probe.training.maxent_clipped = True  # as it will be, and it decides whether the keys of the policy term are read
    probe.training.meta_lr = 0.5  # likewise, of the keys of the other controller
    given = {
        section: {
            field.name: other_value(field, getattr(getattr(Config(), section), field.name)) for field in fields(kind)
        }
        for section, kind in SECTIONS.items()
    }
    given["training"] = {name: value for name, value in given["training"].items() if not unread_by(probe, name)}
    given["training"] |= {"loss_type": loss_type, "batch_size": 24, "num_questions_per_batch": 6, "betas": [0.25, 0.5]}
    given["training"] |= {"anchor": "reference", "reference_sync_steps": 0}  # lora has no other anchor
    given["training"] |= {"max_gen_len": 17, "skip_unfinished_episodes": False}
    given["training"] |= {"scale_rewards": "batch", "old_logprobs": "trainer"}
    if "importance_sampling_level" in given["training"]:
        given["training"]["importance_sampling_level"] = "token"
    if isinstance(loss_type, dict):
        given["training"]["beta_kl_target"] = None
    config = load_config(write(yaml.safe_dump(given)))
    for section in given:
        assert {name: getattr(getattr(config, section), name) for name in given[section]} == given[section]
    again = load_config(write(dump_config(config), "dump.yaml"))
    assert settings_read(again) == settings_read(config) == given
    assert dump_config(again) == dump_config(config)


@pytest.mark.parametrize(
    "text", ["null", "1e-5", "on", "", "{a: b}", "- x", "a: b # c", "\u2028\x85", "\x00\ud7ff", " "]
)
def test_texts_that_look_like_yaml_survive(write, text):
    config = Config()
    config.data.system_prompt = text
    assert load_config(write(dump_config(config))).data.system_prompt == text
