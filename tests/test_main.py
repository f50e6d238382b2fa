"""The command line as a user meets it: what is wrong is said in one line, the exit code is 2, and nothing is left."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

PROJECT = Path(__file__).resolve().parent.parent
MAIN = PROJECT / "main.py"
GOOD = """
model:
  pretrained_model_path: model
  device: cpu
  dtype: float32
data:
  num_numbers: [3]
  number_max: 20
  train_size: 8
  eval_size: 2
  eval_samples: 2
  response_prefix: ""
training:
  max_steps: 1
  batch_size: 4
  num_questions_per_batch: 2
  max_prompt_len: 32
  max_gen_len: 4
"""


def run_main(folder: Path, *arguments: str, python: tuple[str, ...] = (str(MAIN),), **environment: str):
    """main.py in a process of its own, in `folder`, without a network."""
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "HF_HOME": str(folder / "hub"),
        "HF_ENDPOINT": "http://127.0.0.1:9",
        "CUDA_VISIBLE_DEVICES": "",
        **environment,
    }
    return subprocess.run(
        [sys.executable, *python, *arguments], cwd=folder, env=environment, capture_output=True, text=True, timeout=120
    )


def assert_refused(code: int, shown: str, complaint: str, *fragments: str) -> None:
    """Exit code 2, and one line that begins with `error: ` and holds the fragments."""
    assert len(complaint.splitlines()) == 1, complaint
    assert complaint.startswith("error: ")
    for fragment in fragments:
        assert fragment in complaint
    assert code == 2
    assert "Traceback" not in shown


# --- answered before anything heavy is imported -----------------------------------------------------------------------


def test_help_names_every_option():
    result = run_main(PROJECT, "--help")
    assert result.returncode == 0 and result.stderr == ""
    for option in (
        "--config",
        "--dataset_name",
        "--set",
        "--fresh",
        "--eval_only",
        "--profile",
        "--log_every",
        "--quiet",
        "countdown",
    ):
        assert option in result.stdout


HEAVY = ("torch", "transformers", "numpy", "tensorboard", "datasets", "huggingface_hub", "tqdm")
PROBE = f"""
import runpy, sys
sys.argv = [{str(MAIN)!r}, *sys.argv[1:]]
sys.path.insert(0, {str(PROJECT)!r})
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    print("imported:", *(name for name in {HEAVY!r} if name in sys.modules))
"""


@pytest.mark.parametrize(
    "arguments",
    [
        ("--help",),
        ("--config", "nope.yaml", "--dataset_name", "countdown"),
        ("--config", "good.yaml", "--dataset_name", "nope"),
        ("--config", "good.yaml", "--dataset_name", "countdown", "--set", "training.beta=x"),
    ],
)
def test_nothing_heavy_is_imported_for_an_answer(tmp_path, arguments):
    """Which modules are loaded, not how long it takes: that is what makes --help answer at once on any machine."""
    (tmp_path / "good.yaml").write_text(GOOD)
    result = run_main(tmp_path, *arguments, python=("-c", PROBE))
    assert result.stdout.splitlines()[-1].split() == ["imported:"]
    assert result.returncode == (0 if arguments == ("--help",) else 2)


BAD = {
    "no arguments": ((), "the following arguments are required: --config, --dataset_name; see --help"),
    "no dataset": (("--config", "good.yaml"), "the following arguments are required: --dataset_name"),
    "unknown dataset": (
        ("--config", "good.yaml", "--dataset_name", "countdwn"),
        "countdwn is not a dataset; did you mean countdown?",
    ),
    "unknown option": (
        ("--config", "good.yaml", "--dataset_name", "countdown", "--resume"),
        "unrecognized arguments: --resume",
    ),
    "nothing to set": (("--config", "good.yaml", "--dataset_name", "countdown", "--set"), "expected one argument"),
    "no step has a line": (
        ("--config", "good.yaml", "--dataset_name", "countdown", "--log_every", "0"),
        "--log_every: give a whole number from 1, not '0'",
    ),
    "lines and none": (
        ("--config", "good.yaml", "--dataset_name", "countdown", "--log_every", "2", "--quiet"),
        "--quiet: not allowed with argument --log_every",
    ),
    "profile and check": (
        ("--config", "good.yaml", "--dataset_name", "countdown", "--profile", "--check"),
        "--check: not allowed with argument --profile",
    ),
    "missing config": (
        ("--config", "nope.yaml", "--dataset_name", "countdown"),
        "nope.yaml: there is no such config file",
    ),
    "config is a folder": (("--config", ".", "--dataset_name", "countdown"), "there is no such config file"),
}
BAD_SETTINGS = {
    "unknown key": (
        "training.learning_rat=1",
        "good.yaml: training.learning_rat is not a key; did you mean learning_r",
    ),
    "unknown section": ("trainer.beta=1", "--set trainer.beta=1: write it as section.key=value"),
    "wrong type": ("training.batch_size=many", "good.yaml: training.batch_size must be a whole number, not 'many'"),
    "out of range": ("training.learning_rate=0", "good.yaml: training.learning_rate must be greater than 0"),
    "impossible group": ("training.batch_size=5", "good.yaml: training.batch_size (5) must be a multiple of"),
    "unknown loss": ("training.loss_type=klx", "good.yaml: training.loss_type: 'klx' is not known; did you mean kl?"),
    "key of another loss": ("training.kl_estimator=k1", "is not read by loss_type kl; it belongs to approx_kl; remove"),
    "key of two lines": ('training."a\n\nb"=1', "is not a key"),
}


@pytest.mark.parametrize("name", [*BAD, *BAD_SETTINGS])
def test_bad_command_line_or_config(tmp_path, name):
    (tmp_path / "good.yaml").write_text(GOOD)
    if name in BAD:
        arguments, fragment = BAD[name]
    else:
        setting, fragment = BAD_SETTINGS[name]
        arguments = ("--config", "good.yaml", "--dataset_name", "countdown", "--set", setting)
    result = run_main(tmp_path, *arguments)
    assert_refused(result.returncode, result.stdout, result.stderr, fragment)
    assert [path.name for path in tmp_path.iterdir()] == ["good.yaml"]


# --- found wrong once data and model are looked at --------------------------------------------------------------------

# Torch and transformers take seconds to import. So one process imports them and then forks for every case: the child
# runs main.py as `python main.py` would, with streams, folder and exit code of its own.
FORKS = f"""
import json, os, runpy, sys
sys.path.insert(0, {str(PROJECT)!r})
import src.train_grpo
for number, arguments in enumerate(json.loads(sys.argv[1])):
    child = os.fork()
    if child == 0:
        for descriptor, name in ((1, "out"), (2, "err")):
            os.dup2(os.open(f"{{number}}.{{name}}", os.O_WRONLY | os.O_CREAT), descriptor)
        sys.argv = [{str(MAIN)!r}, *arguments]
        code = 1
        try:
            os.mkdir(str(number))
            os.chdir(str(number))
            for name in os.listdir("../given"):
                os.symlink("../given/" + name, name)
            runpy.run_path(sys.argv[0], run_name="__main__")
        except SystemExit as error:
            code = error.code or 0
        except BaseException:
            import traceback
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


def damage_nothing(folder: Path) -> None:
    pass


def remove_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def break_config(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": ')


def make_config_strange(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "nobody-knows"}')


def break_header(folder: Path) -> None:
    with (folder / "model.safetensors").open("r+b") as file:
        file.write(b"\xff" * 64)


def cut_weights(folder: Path) -> None:
    os.truncate(folder / "model.safetensors", (folder / "model.safetensors").stat().st_size // 2)


def remove_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def remove_a_tensor(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def remove_tokenizer(folder: Path) -> None:
    for file in (*folder.glob("tokenizer*"), *folder.glob("chat_template*")):
        file.unlink()


def break_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{}")


# name: (what happens to the model's folder, settings, fragments of the complaint)
PATH = "good.yaml: model.pretrained_model_path: "
FOLDER = (PATH, " cannot be loaded; check that folder (")
REFUSED_LATE = {
    "missing folder": (
        None,
        ["model.pretrained_model_path=models/none"],
        (PATH + "there is no folder models/none; give a folder or a hub id",),
    ),
    "missing folder with a dot": (None, ["model.pretrained_model_path=./none"], (PATH + "there is no folder ./none",)),
    "empty path": (None, ['model.pretrained_model_path=""'], (PATH,)),
    "hub out of reach": (
        None,
        ["model.pretrained_model_path=some/model"],
        (PATH + "some/model cannot be loaded; check the name and the network, or give a local",),
    ),
    "no hub id": (None, ["model.pretrained_model_path=a b/c"], (PATH + "a b/c cannot be loaded; check the name",)),
    "folder without config.json": (
        remove_config,
        [],
        (
            PATH,
            " has no config.json, so it is not a model",
        ),
    ),
    "broken config.json": (break_config, [], FOLDER),
    "unknown architecture": (make_config_strange, [], FOLDER),
    "broken weights": (break_header, [], FOLDER),
    "cut weights": (cut_weights, [], FOLDER),
    "no weights": (remove_weights, [], FOLDER),
    "a tensor is missing": (
        remove_a_tensor,
        [],
        (
            PATH,
            "is incomplete; it has no weights for model.norm.weight",
        ),
    ),
    "no tokenizer": (remove_tokenizer, [], FOLDER),
    "broken tokenizer": (break_tokenizer, [], FOLDER),
    "no CUDA": (
        damage_nothing,
        ["model.device=cuda"],
        ("good.yaml: model.device: cuda is not there", "use model.device: auto"),
    ),
    "no such device": (damage_nothing, ["model.device=tpu"], ("good.yaml: model.device: 'tpu' is not a device; use",)),
    "prompts too long": (
        damage_nothing,
        ["training.max_prompt_len=2"],
        ("good.yaml: no train prompt fits training.max_prompt_len (2 tokens); raise it",),
    ),
    "impossible data": (
        damage_nothing,
        ["data.num_numbers=[2]", "data.number_max=2"],
        ("good.yaml: data: ", "raise number_max or target_max"),
    ),
}


@pytest.fixture(scope="module")
def late(tmp_path_factory, tiny_model_folder) -> dict:
    """Of every case its exit code, its two streams and its folder; one process for all of them."""
    folder = tmp_path_factory.mktemp("late")
    (folder / "given").mkdir()
    (folder / "given" / "good.yaml").write_text(GOOD)
    command = ["--config", "good.yaml", "--dataset_name", "countdown"]
    commands = []
    for number, (damage, settings, _) in enumerate(REFUSED_LATE.values()):
        model = folder / "given" / f"model{number}"
        if damage is not None:
            shutil.copytree(tiny_model_folder, model)
            damage(model)
            settings = [f"model.pretrained_model_path={model.name}", *settings]
        commands.append([*command, *(word for setting in settings for word in ("--set", setting))])
    commands.append([*command, "--eval_only", "--set", f"model.pretrained_model_path={tiny_model_folder}"])
    result = run_main(folder, json.dumps(commands), python=("-c", FORKS))
    assert result.returncode == 0, result.stderr
    codes = [int(line) for line in result.stdout.splitlines()]
    outcomes = {}
    for number, (name, code) in enumerate(zip([*REFUSED_LATE, "eval_only"], codes, strict=True)):
        shown, complaint = ((folder / f"{number}.{stream}").read_text() for stream in ("out", "err"))
        outcomes[name] = (code, shown, complaint, folder / str(number))
    return outcomes


@pytest.mark.parametrize("name", REFUSED_LATE)
def test_bad_data_or_model(late, name):
    code, shown, complaint, folder = late[name]
    assert_refused(code, shown, complaint, *REFUSED_LATE[name][2])
    assert {path.name for path in folder.iterdir()} == {path.name for path in (folder.parent / "given").iterdir()}


def test_eval_only_evaluates_and_leaves_only_a_report(late):
    code, shown, complaint, folder = late["eval_only"]
    assert (code, complaint) == (0, "")
    assert shown.partition(": ")[2].startswith("greedy ") and "pass@1" in shown and "pass@2" in shown
    given = {path.name for path in (folder.parent / "given").iterdir()}
    assert {path.name for path in folder.iterdir()} == given | {"runs"}
    assert [path.name for path in (folder / "runs").iterdir()] == ["good_countdown_eval"]


def test_missing_model_in_a_process_of_its_own(tmp_path):
    """One of the cases above without the fork: imports and their warnings included."""
    (tmp_path / "good.yaml").write_text(GOOD)
    result = run_main(
        tmp_path,
        "--config",
        "good.yaml",
        "--dataset_name",
        "countdown",
        "--set",
        "model.pretrained_model_path=some/model",
        HF_HUB_OFFLINE="1",
    )
    assert_refused(result.returncode, result.stdout, result.stderr, PATH + "some/model cannot be loaded; check")
    assert result.stdout == ""
    assert not (tmp_path / "runs").exists()
