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
COMMAND = ("--config", "good.yaml", "--dataset_name", "countdown")
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


def run_main(folder: Path, *arguments: str, python: tuple[str, ...]):
    """Python in a process of its own, in `folder`, without a network."""
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "HF_HOME": str(folder / "hub"),
        "HF_ENDPOINT": "http://127.0.0.1:9",
        "CUDA_VISIBLE_DEVICES": "",
    }
    return subprocess.run(
        [sys.executable, *python, *arguments], cwd=folder, env=environment, capture_output=True, text=True, timeout=120
    )


def assert_refused(code: int, shown: str, complaint: str, *fragments: str) -> None:
    """Exit code 2, and one line that begins with `error: ` and holds the fragments."""
    assert len(complaint.splitlines()) == 1, complaint
    assert complaint.startswith("error: ") and all(fragment in complaint for fragment in fragments), complaint
    assert code == 2 and "Traceback" not in shown


# --- answered before anything heavy is imported -----------------------------------------------------------------------

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
OPTIONS = (
    "--config --dataset_name --set --name --fresh --eval_only --check --profile --doctor --log_every --quiet countdown"
)
REFUSED = {
    "no arguments": ((), "the following arguments are required: --config, --dataset_name; see --help"),
    "no dataset": (COMMAND[:2], "the following arguments are required: --dataset_name"),
    "unknown dataset": ((*COMMAND[:3], "countdwn"), "countdwn is not a dataset; did you mean countdown?"),
    "missing config": (("--config", "nope.yaml", *COMMAND[2:]), "nope.yaml: there is no such config file"),
    "config is a folder": (("--config", ".", *COMMAND[2:]), "there is no such config file"),
}
SWITCHES = {  # what follows a good command
    "--resume": "unrecognized arguments: --resume",
    "--set": "argument --set: expected at least one argument",
    "--log_every 0": "--log_every: give a whole number from 1, not '0'",
    "--log_every 2 --quiet": "--quiet: not allowed with argument --log_every",
    "--profile --check": "--check: not allowed with argument --profile",
    "--doctor runs/x --check": "--check: not allowed with argument --doctor",
    "--name a/b": "--name a/b: use letters, digits, points, dashes and underscores",
    "--name ..": "--name ..: use letters",
    "--name=-x": "--name -x: use letters",
    "--name=": "--name : use letters",
    f"--name {'x' * 101}": "use letters",
    "--set trainer.beta=1": "--set trainer.beta=1: write it as section.key=value",
    "--set training.learning_rat=1": "good.yaml: training.learning_rat is not a key; did you mean learning_r",
    "--set training.beta=0 training.batch_size=many": "training.batch_size must be a whole number, not 'many'",
    "--set training.beta=0 --set training.learning_rate=0": "training.learning_rate must be greater than 0",
    '--set training."a\n\nb"=1': "is not a key",
}
REFUSED |= {switches: ((*COMMAND, *switches.split(" ")), fragment) for switches, fragment in SWITCHES.items()}


@pytest.mark.parametrize("name", ["help", *REFUSED])
def test_an_answer_is_one_line_and_nothing_heavy_is_imported_for_it(tmp_path, name):
    """Which modules are loaded, not how long it takes: that is what makes --help answer at once on any machine."""
    (tmp_path / "good.yaml").write_text(GOOD)
    arguments, fragment = REFUSED.get(name, (("--help",), ""))
    result = run_main(tmp_path, *arguments, python=("-c", PROBE))
    *shown, imported = result.stdout.splitlines()
    assert imported.split() == ["imported:"]
    if name == "help":
        assert result.returncode == 0 and result.stderr == "" and all(word in result.stdout for word in OPTIONS.split())
    else:
        assert_refused(result.returncode, "".join(shown), result.stderr, fragment)
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


def writes(name: str, text: str):
    """Damage: a file of the model's folder holds this."""
    return lambda folder: (folder / name).write_text(text)


def removes(*patterns: str):
    """Damage: files of the model's folder are gone."""
    return lambda folder: [file.unlink() for pattern in patterns for file in folder.glob(pattern)]


def break_header(folder: Path) -> None:
    with (folder / "model.safetensors").open("r+b") as file:
        file.write(b"\xff" * 64)


def cut_weights(folder: Path) -> None:
    os.truncate(folder / "model.safetensors", (folder / "model.safetensors").stat().st_size // 2)


def remove_a_tensor(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


# what happens to the model's folder, or settings -> fragments of the complaint
PATH = "good.yaml: model.pretrained_model_path: "
FOLDER = (PATH, " cannot be loaded; check that folder (")
DAMAGED = {
    "no config.json": (removes("config.json"), (PATH, " has no config.json, so it is not a model")),
    "broken config.json": (writes("config.json", '{"model_type": '), FOLDER),
    "unknown architecture": (writes("config.json", '{"model_type": "nobody-knows"}'), FOLDER),
    "broken weights": (break_header, FOLDER),
    "cut weights": (cut_weights, FOLDER),
    "no weights": (removes("model.safetensors"), FOLDER),
    "a tensor is missing": (remove_a_tensor, (PATH, "is incomplete; it has no weights for model.norm.weight")),
    "no tokenizer": (removes("tokenizer*", "chat_template*"), FOLDER),
    "broken tokenizer": (writes("tokenizer.json", "{}"), FOLDER),
}
WRONG = {
    "model.pretrained_model_path=models/none": (PATH + "there is no folder models/none; give a folder or a hub id",),
    "model.pretrained_model_path=./none": (PATH + "there is no folder ./none",),
    'model.pretrained_model_path=""': (PATH,),
    "model.pretrained_model_path=some/model": (
        PATH + "some/model cannot be loaded; check the name and the network, or",
    ),
    "model.pretrained_model_path=a b/c": (PATH + "a b/c cannot be loaded; check the name",),
    "model.device=cuda": ("good.yaml: model.device: cuda is not there", "use model.device: auto"),
    "model.device=tpu": ("good.yaml: model.device: 'tpu' is not a device; use",),
    "training.max_prompt_len=2": ("good.yaml: no train prompt fits training.max_prompt_len (2 tokens); raise it",),
    "data.num_numbers=[2]; data.number_max=2": ("good.yaml: data: ", "raise number_max or target_max"),
}
EVAL_ONLY = "--eval_only --name mine.1 --set data.eval_samples=3 data.eval_size=1 --set training.temperature=0.5"


@pytest.fixture(scope="module")
def late(tmp_path_factory, tiny_model_folder) -> dict:
    """Of every case its exit code, its two streams and its folder; one process for all of them."""
    folder = tmp_path_factory.mktemp("late")
    given = folder / "given"
    shutil.copytree(tiny_model_folder, given / "model")
    (given / "good.yaml").write_text(GOOD)
    commands = {settings: [*COMMAND, "--set", *settings.split("; ")] for settings in WRONG}
    for number, (name, (damage, _)) in enumerate(DAMAGED.items()):
        shutil.copytree(tiny_model_folder, given / f"model{number}")
        damage(given / f"model{number}")
        commands[name] = [*COMMAND, "--set", f"model.pretrained_model_path=model{number}"]
    commands["eval_only"] = [*COMMAND, *EVAL_ONLY.split()]
    result = run_main(folder, json.dumps(list(commands.values())), python=("-c", FORKS))
    assert (result.returncode, result.stderr) == (0, ""), "the imports say nothing"
    outcomes = {}
    for number, (name, code) in enumerate(zip(commands, map(int, result.stdout.split()), strict=True)):
        shown, complaint = ((folder / f"{number}.{stream}").read_text() for stream in ("out", "err"))
        outcomes[name] = (code, shown, complaint, folder / str(number))
    return outcomes


@pytest.mark.parametrize("name", [*WRONG, *DAMAGED])
def test_bad_data_or_model(late, name):
    code, shown, complaint, folder = late[name]
    assert_refused(code, shown, complaint, *(WRONG[name] if name in WRONG else DAMAGED[name][1]))
    assert {path.name for path in folder.iterdir()} == {path.name for path in (folder.parent / "given").iterdir()}


def test_eval_only_evaluates_what_is_set_and_leaves_only_a_report_by_its_name(late):
    code, shown, complaint, folder = late["eval_only"]
    assert (code, complaint) == (0, "")
    assert shown.partition(": ")[2].startswith("greedy ") and "pass@1" in shown and "pass@3" in shown
    given = {path.name for path in (folder.parent / "given").iterdir()}
    assert {path.name for path in folder.iterdir()} == given | {"runs"}
    assert [path.name for path in (folder / "runs").iterdir()] == ["mine.1_countdown_eval"]
    config = json.loads((folder / "runs" / "mine.1_countdown_eval" / "report.json").read_text())["about"]["config"]
    assert (config["data"]["eval_samples"], config["data"]["eval_size"], config["training"]["temperature"]) == (
        3,
        1,
        0.5,
    )
