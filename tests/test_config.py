"""The config is the experiment: what is accepted, what is refused and in which words, and that it round-trips."""

import re
from dataclasses import asdict, fields
from pathlib import Path
from types import UnionType
from typing import get_args, get_origin

import pytest
import yaml

from src.config import LOSS_TYPES, SECTIONS, Config, ConfigError, dump_config, load_config, unread_by

PROJECT = Path(__file__).resolve().parent.parent
SHIPPED = sorted(PROJECT.glob("configs/**/*.yaml"))

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


def test_there_are_shipped_configs():
    assert SHIPPED


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_config_is_valid(path):
    config = load_config(path)
    assert config.source == str(path)
    given = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert config.training.loss_type == given["training"]["loss_type"]


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
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


def test_whole_numbers_stay_exact(write):
    config = load_config(write("training:\n  random_seed: 9007199254740993\n  max_steps: 1e3\n  beta: 1\n"))
    assert config.training.random_seed == 2**53 + 1
    assert config.training.max_steps == 1000 and isinstance(config.training.max_steps, int)
    assert config.training.beta == 1.0 and isinstance(config.training.beta, float)


def test_empty_values(write):
    config = load_config(write("model:\ntraining:\n  max_steps:\n  max_tokens_per_microbatch: null\n"))
    assert config.model == Config().model
    assert config.training.max_steps is None and config.training.max_tokens_per_microbatch is None


def test_a_single_number_is_a_list_of_one(write):
    assert load_config(write("data:\n  num_numbers: 3\n")).data.num_numbers == [3]


def test_loss_type_none_is_the_name_and_not_nothing(write):
    assert load_config(write("training:\n  loss_type: none\n")).training.loss_type == "none"


def test_overrides_win_and_are_typed(write):
    path = write("model:\n  dtype: float32\ntraining:\n  beta: 0.1\n")
    overrides = [
        "training.beta=0.2",
        "training.betas=[0.5, 0.6]",
        " model.dtype =bfloat16",
        "data.system_prompt=a=b",
        "training.max_steps=",
        "training.skip_unfinished_episodes=true",
        "training.beta=3e-1",
    ]
    config = load_config(path, overrides)
    assert config.training.beta == 0.3, "the last of two overrides counts"
    assert config.training.betas == [0.5, 0.6]
    assert config.model.dtype == "bfloat16"
    assert config.data.system_prompt == "a=b"
    assert config.training.max_steps is None
    assert config.training.skip_unfinished_episodes is True


def test_defaults_are_not_shared_between_configs(write):
    path = write("model:\n")
    load_config(path).training.betas.append(0.5)
    assert len(load_config(path).training.betas) == 2


def test_other_trainers_name_is_an_alias(write):
    assert load_config(write("training:\n  mask_truncated: true\n")).training.skip_unfinished_episodes


# --- what is refused, and in which words ------------------------------------------------------------------------------

TRAINING = "training:\n  {}\n".format
BAD = {
    # the file
    "empty file": ("", "must hold the sections model, data, training"),
    "only a comment": ("# beta: 1\n", "must hold the sections"),
    "a list": ("- model\n- training\n", "must hold the sections"),
    "a text": ("hello\n", "must hold the sections"),
    "no YAML": ("training: {beta: 1\n", "cannot be read as YAML"),
    "a tab": ("training:\n\tbeta: 1\n", "cannot be read as YAML"),
    "control character": ("training: \x07\n", "cannot be read as YAML"),
    "python object": ("model: !!python/object/apply:os.system ['true']\n", "cannot be read as YAML"),
    "a thirteenth month": (TRAINING("random_seed: 2024-13-01"), "cannot be read as YAML"),
    "endless nesting": ("[" * 5000, "cannot be read as YAML"),
    "key twice": (TRAINING("beta: 0.1\n  beta: 0.2"), "beta is given twice, again in line 3"),
    "section twice": ("model:\ntraining:\nmodel:\n", "model is given twice"),
    "two names of one key": (TRAINING("mask_truncated: true\n  skip_unfinished_episodes: false"), "given twice"),
    # sections and keys
    "unknown section": ("trainer:\n  beta: 1\n", "trainer is not a section; did you mean training?"),
    "section of nonsense": ("zzz:\n", "zzz is not a section; known are: data, hub, lora, model, training"),
    "numeric section": ("1: 2\n", "1 is not a section"),
    "internal field": ("source: x\n", "source is not a section"),
    "section is a text": ("model: hello\n", "model must be a list of `key: value` lines, not 'hello'"),
    "section is a list": ("training: []\n", "training must be a list of `key: value` lines, not []"),
    "section is false": ("training: false\n", "training must be a list of `key: value` lines"),
    "key misspelt": (TRAINING("learning_rat: 1"), "training.learning_rat is not a key; did you mean learning_rate?"),
    "key of another section": (TRAINING("dtype: float32"), "training.dtype is not a key"),
    "key far from any": ("model:\n  zzzzzz: 1\n", "model.zzzzzz is not a key; known are: checkpoint_every, compile"),
    "numeric key": (TRAINING("1: 2"), "training.1 is not a key"),
    "key of two lines": (TRAINING('"a\\nb": 1'), "training.a b is not a key"),
    # types
    "fraction for a whole number": (TRAINING("batch_size: 1.5"), "training.batch_size must be a whole number, not 1.5"),
    "text for a whole number": (
        TRAINING("max_gen_len: many"),
        "training.max_gen_len must be a whole number, not 'many'",
    ),
    "list for a whole number": (TRAINING("batch_size: [64]"), "training.batch_size must be a whole number, not [64]"),
    "truth for a whole number": (TRAINING("eval_interval: true"), "training.eval_interval must be a whole number"),
    "endless whole number": (TRAINING("max_steps: 1e999"), "training.max_steps must be a whole number"),
    "text for a number": (
        TRAINING("learning_rate: fast"),
        "training.learning_rate must be a finite number, not 'fast'",
    ),
    "nan": (TRAINING("learning_rate: .nan"), "training.learning_rate must be a finite number, not nan"),
    "infinity": (TRAINING("beta: .inf"), "training.beta must be a finite number, not inf"),
    "nothing for a number": (TRAINING("beta:"), "training.beta must be a finite number, not None"),
    "truth for a number": (TRAINING("beta: true"), "training.beta must be a finite number, not True"),
    "number for a truth": (TRAINING("skip_unfinished_episodes: 1"), "must be true or false, not 1"),
    "text for a truth": (TRAINING("memory_efficient_adamw: 'yes'"), "must be true or false, not 'yes'"),
    "number for a text": ("model:\n  pretrained_model_path: 7\n", "model.pretrained_model_path must be a text, not 7"),
    "truth for a text": (TRAINING("loss_type: no"), "training.loss_type must be a text, not False"),
    "mapping for a list": (TRAINING("betas: {a: 1}"), "training.betas must be a finite number"),
    "nested list": ("data:\n  num_numbers: [[3]]\n", "data.num_numbers must be a whole number, not [3]"),
    "empty list": ("data:\n  num_numbers: []\n", "data.num_numbers must hold at least one value"),
    # ranges and choices
    "negative beta": (TRAINING("beta: -0.1"), "training.beta must be at least 0, not -0.1"),
    "no learning rate": (TRAINING("learning_rate: 0"), "training.learning_rate must be greater than 0, not 0.0"),
    "temperature zero": (TRAINING("temperature: 0"), "training.temperature must be greater than 0"),
    "epsilon one": (TRAINING("epsilon: 1"), "training.epsilon must be less than 1"),
    "one decay rate is 1": (TRAINING("betas: [0.9, 1.0]"), "training.betas must be less than 1, not 1.0"),
    "no steps": (TRAINING("max_steps: 0"), "training.max_steps must be at least 1, not 0"),
    "seven numbers": ("data:\n  num_numbers: [3, 7]\n", "data.num_numbers must be at most 6, not 7"),
    "loss type of nobody": (TRAINING("loss_type: klx"), "training.loss_type: 'klx' is not known; did you mean kl?"),
    "loss type in capitals": (
        TRAINING("loss_type: KL"),
        "training.loss_type: 'KL' is not known; known are: approx_kl,",
    ),
    "half precision": ("model:\n  dtype: float16\n", "model.dtype: 'float16' is not known; did you mean bfloat16?"),
    # combinations
    "group does not divide": (
        TRAINING("batch_size: 100\n  num_questions_per_batch: 32"),
        "training.batch_size (100) must be a multiple of num_questions_per_batch (32)",
    ),
    "group of one": (
        TRAINING("batch_size: 32\n  num_questions_per_batch: 32"),
        "at least twice as large; set batch_size to num_questions_per_batch x group size",
    ),
    "minibatches do not divide": (
        TRAINING("minibatches: 5"),
        "training.num_questions_per_batch (32) must be a multiple of minibatches (5)",
    ),
    "one decay rate": (TRAINING("betas: 0.9"), "training.betas must be two numbers such as [0.9, 0.999]"),
    "three decay rates": (TRAINING("betas: [0.9, 0.99, 0.999]"), "training.betas must be two numbers"),
    "second decay rate 0": (TRAINING("betas: [0.9, 0.0]"), "training.betas must be two numbers"),
    "key of another loss": (
        TRAINING("loss_type: kl\n  kl_estimator: k1"),
        "training.kl_estimator is not read by loss_type kl; it belongs to approx_kl; remove the key",
    ),
    "nothing to weigh with": (TRAINING("loss_type: maxent\n  tau: 0\n  beta: 0"), "must be greater than 0"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_config_is_refused_in_one_line(write, name):
    text, fragment = BAD[name]
    path = write(text)
    with pytest.raises(ConfigError) as refusal:
        load_config(path)
    message = str(refusal.value)
    assert fragment in message
    assert message.startswith(f"{path}: ")
    assert len(message.splitlines()) == 1


HOW = "write it as section.key=value, for example training.learning_rate=1e-5"
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
    assert message.startswith((f"{path}: ", f"--set {override}"))
    assert len(message.splitlines()) == 1


def test_override_of_a_section_that_is_no_mapping(write):
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
    path = tmp_path / "config.yaml"
    path.write_bytes(b"training:\n  loss_type: \xff\xfe\n")
    with pytest.raises(ConfigError, match="cannot be read as YAML"):
        load_config(path)


# --- every key: documented, read, kept by a round trip ----------------------------------------------------------------

KEYS = [(section, field) for section, kind in SECTIONS.items() for field in fields(kind)]
UNREAD = set()  # keys that nothing reads yet


@pytest.mark.parametrize(("section", "field"), KEYS, ids=lambda value: getattr(value, "name", value))
def test_every_key_has_a_doc(section, field):
    assert len(field.metadata["doc"].split()) >= 2 and field.metadata["doc"].endswith((".", ")"))


def test_every_key_is_read_by_something():
    files = [PROJECT / "main.py", *sorted((PROJECT / "src").glob("*.py"))]
    code = "\n".join(file.read_text(encoding="utf-8") for file in files if file.name != "config.py")
    unread = {f"{section}.{field.name}" for section, field in KEYS if not re.search(rf"[.\"]{field.name}\b", code)}
    assert unread == UNREAD


def other_value(field):
    """A permitted value of a field that is not its default."""
    rules, default = field.metadata, Config().__dict__
    default = next(getattr(section, field.name) for section in default.values() if hasattr(section, field.name))
    kind = field.type
    if isinstance(kind, UnionType):
        kind = get_args(kind)[0]
    if kind is bool:
        return not default
    if "choices" in rules:
        return next(choice for choice in rules["choices"] if choice != default)
    if kind is str:
        return "two lines:\n# 'and' \"more\" \u20ac"
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


def every_key_changed(loss_type: str) -> dict:
    """A config in which every key that this loss type reads differs from its default."""
    probe = Config()
    probe.training.loss_type = loss_type
    probe.training.maxent_clipped = True  # as it will be, and it decides whether the keys of the policy term are read
    given = {section: {field.name: other_value(field) for field in fields(SECTIONS[section])} for section in SECTIONS}
    given["training"] = {name: value for name, value in given["training"].items() if not unread_by(probe, name)}
    given["training"] |= {"loss_type": loss_type, "batch_size": 24, "num_questions_per_batch": 6, "betas": [0.25, 0.5]}
    given["training"] |= {"anchor": "reference", "reference_sync_steps": 0}  # lora has no other anchor
    for low, high in (("tau_min", "tau_max"), ("beta_min", "beta_max")):
        if low in given["training"]:
            given["training"] |= {low: 0.5, high: 5.0}
    return given


def settings_read(config: Config) -> dict:
    """All values of a config but its file's name and what its loss type does not read."""
    sections = asdict(config)
    sections.pop("source")
    sections["training"] = {name: value for name, value in sections["training"].items() if not unread_by(config, name)}
    return sections


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_dump_loads_back_with_every_key_changed(write, loss_type):
    given = every_key_changed(loss_type)
    config = load_config(write(yaml.safe_dump(given)))
    for section in given:
        assert {name: getattr(getattr(config, section), name) for name in given[section]} == given[section]
    again = load_config(write(dump_config(config), "dump.yaml"))
    assert settings_read(again) == settings_read(config) == given
    assert dump_config(again) == dump_config(config)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_dump_of_a_shipped_config_loads_back(write, path):
    config = load_config(path)
    assert settings_read(load_config(write(dump_config(config)))) == settings_read(config)


@pytest.mark.parametrize(
    "text", ["null", "1e-5", "on", "", "{a: b}", "- x", "a: b # c", "\u2028\x85", "\x00\ud7ff", " "]
)
def test_texts_that_look_like_yaml_survive(write, text):
    config = Config()
    config.data.system_prompt = text
    assert load_config(write(dump_config(config))).data.system_prompt == text
