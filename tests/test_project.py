"""The project's own promises: one version of everything, a README that names what exists, a model that fits."""

import importlib.metadata
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name

from src.config import SECTIONS, known_penalties, load_config

PROJECT = Path(__file__).parent.parent
README = (PROJECT / "README.md").read_text(encoding="utf-8")

# ---------------------------------------------------------------------------------------------------------------------
# One version of everything, without asking a registry
# ---------------------------------------------------------------------------------------------------------------------

PINS = (PROJECT / "pyproject.toml").read_text(encoding="utf-8")
LOCK = (PROJECT / "requirements.txt").read_text(encoding="utf-8")


def version_of(requirement: Requirement) -> str | None:
    """The one version that it allows, if it is one."""
    (specifier,) = requirement.specifier if len(requirement.specifier) == 1 else (None,)
    exact = specifier is not None and specifier.operator == "==" and "*" not in specifier.version
    return specifier.version if exact and not requirement.url else None


def direct_pins(project: str) -> list[Requirement]:
    """What pyproject.toml asks for by name: of the program, and of the groups."""
    content = tomllib.loads(project)
    groups = [content["project"]["dependencies"], *content["dependency-groups"].values()]
    return [Requirement(line) for group in groups for line in group]


def constraints(project: str) -> dict[str, str | None]:
    """Package -> its one version, as .ci/lock.py has found it."""
    lines = map(Requirement, tomllib.loads(project)["tool"]["uv"]["constraint-dependencies"])
    return {canonicalize_name(line.name): version_of(line) for line in lines}


def entries(lock: str) -> list[tuple[str, list[str]]]:
    """Each requirement of requirements.txt, and its options."""
    lines = filter(str.strip, lock.replace("\\\n", " ").splitlines())
    return [(line.partition(" --")[0].strip(), re.findall(r" (--\S+)", line)) for line in lines]


def faults_of_entries(lock: str) -> list[str]:
    """Entries that are not `name==version` with hashes and perhaps a marker."""
    faults = []
    for text, options in entries(lock):
        try:
            pinned = version_of(Requirement(text)) is not None
        except InvalidRequirement:
            pinned = False
        if not pinned or not options or not all(re.fullmatch(r"--hash=sha256:[0-9a-f]{64}", item) for item in options):
            faults.append(text or " ".join(options))
    return faults


def faults_of_versions(project: str, lock: str) -> list[str]:
    """Packages of which direct pins, constraints and requirements.txt do not all say the same version."""
    said = constraints(project)
    asked = direct_pins(project) + [Requirement(text) for text, _ in entries(lock)]
    wrong = {line.name for line in asked if version_of(line) != said.get(canonicalize_name(line.name), "")}
    return sorted(wrong | {name for name, version in said.items() if version is None})


def needed_here(project: str, requires=importlib.metadata.requires) -> set[str]:
    """What the program and its dev group need on this platform, by what the installed packages say of themselves."""
    content = tomllib.loads(project)
    waiting = [Requirement(line) for line in content["project"]["dependencies"] + content["dependency-groups"]["dev"]]
    seen: set[tuple[str, str]] = set()  # a package and one of its extras, or none
    while waiting:
        requirement = waiting.pop()
        for extra in {"", *requirement.extras} - {extra for name, extra in seen if name == requirement.name}:
            seen.add((requirement.name, extra))
            try:
                lines = map(Requirement, requires(requirement.name) or ())
            except importlib.metadata.PackageNotFoundError:  # what it needs is not known here
                continue
            waiting += [line for line in lines if line.marker is None or line.marker.evaluate({"extra": extra})]
    return {canonicalize_name(name) for name, _ in seen}


def missing(project: str, lock: str, requires=importlib.metadata.requires) -> list[str]:
    """What is needed here and does not stand in requirements.txt."""
    return sorted(
        needed_here(project, requires) - {canonicalize_name(Requirement(text).name) for text, _ in entries(lock)}
    )


def test_every_version_is_fixed_and_the_same_everywhere():
    wrong = faults_of_entries(LOCK) or faults_of_versions(PINS, LOCK) or missing(PINS, LOCK)
    assert not wrong, f"{', '.join(wrong)}: requirements.txt is not of this pyproject.toml; run `python .ci/lock.py`"
    assert len(entries(LOCK)) > 100 and len(needed_here(PINS)) > 60, "it was compared with something"


SMALL_PINS = """
[project]
dependencies = ["one==1.0"]
[dependency-groups]
dev = ["two[fast]==2.0"]
[tool.uv]
constraint-dependencies = ["one==1.0", "two==2.0", "three==3.0"]
"""
HASH = f"--hash=sha256:{'0a' * 32}"
SMALL_LOCK = "".join(
    f"{line} \\\n    {HASH} \\\n    {HASH}\n" for line in ("one==1.0", "Two==2.0", "three==3.0 ; python_version > '3'")
)
SAYS = {"one": ["one", "gone; sys_platform == 'never'"], "two": ["three>=2; extra == 'fast'", "slow; extra == 'slow'"]}


def requires_small(name: str) -> list[str] | None:
    if name not in SAYS:
        raise importlib.metadata.PackageNotFoundError(name)
    return SAYS[name]


@pytest.mark.parametrize(
    "file, old, new, entry, version, absent",
    [
        ("lock", "", "", [], [], []),
        ("lock", "one==1.0", "one==1.1", [], ["one"], []),
        ("pins", '["one==1.0"]', '["one==1.1"]', [], ["one"], []),
        ("pins", ', "three==3.0"', "", [], ["three"], []),
        ("pins", '"three==3.0"', '"three>=3.0"', [], ["three"], []),
        ("pins", '["one==1.0"]', '["one"]', [], ["one"], []),
        ("lock", "one==1.0", "one>=1.0", ["one>=1.0"], ["one"], []),
        ("lock", "three==3.0", "four==3.0", [], ["four"], ["three"]),
        ("lock", "0a0a", "0g0a", ["one==1.0", "Two==2.0", "three==3.0 ; python_version > '3'"], [], []),
        ("lock", f" \\\n    {HASH}", "", ["one==1.0", "Two==2.0", "three==3.0 ; python_version > '3'"], [], []),
        ("lock", "one==1.0", "one @ https://example.org/one.whl", ["one @ https://example.org/one.whl"], ["one"], []),
        ("lock", "one==1.0 \\\n", "--index-url=x\none==1.0 \\\n", ["--index-url=x"], None, None),
    ],
)
def test_what_does_not_fit_is_named(file, old, new, entry, version, absent):
    pins, lock = SMALL_PINS, SMALL_LOCK
    if file == "pins":
        pins = pins.replace(old, new)
    elif old:
        lock = lock.replace(old, new)
    assert faults_of_entries(lock) == entry
    if version is not None:
        assert faults_of_versions(pins, lock) == version
        assert missing(pins, lock, requires_small) == absent
    assert needed_here(pins, requires_small) == {"one", "two", "three"}


def test_no_committed_file_names_a_package_registry():
    listing = subprocess.run(["git", "ls-files"], capture_output=True, text=True, cwd=PROJECT)
    if listing.returncode != 0:
        pytest.skip("not a git checkout")
    host = "py" + "pi.org"  # in two parts, so that this file does not name it either
    for name in listing.stdout.splitlines():
        file = PROJECT / name
        if file.suffix in {".py", ".txt", ".toml", ".md", ".yaml", ".ipynb", ".json", ".lock"} and file.exists():
            text = file.read_text(encoding="utf-8")
            assert host not in text and "pythonhosted" + ".org" not in text, name
    assert "uv.lock" not in listing.stdout.split()


# ---------------------------------------------------------------------------------------------------------------------
# What the project says of itself
# ---------------------------------------------------------------------------------------------------------------------


def test_the_readme_names_files_keys_and_loss_types_that_exist():
    pages = ["README.md", "CONTRIBUTING.md", "runs/README.md", "configs/README.md", "benchmarks/MEMORY.md"]
    for page in pages:
        text = (PROJECT / page).read_text(encoding="utf-8")
        for path in set(re.findall(r"(?:configs|src|models|benchmarks|runs)/[\w./-]+\.(?:py|yaml|md|png)", text)):
            assert (PROJECT / path).exists(), f"{page} names {path}"
    keys = {name for section in SECTIONS.values() for name in section.__dataclass_fields__}
    functions = re.findall(r"(?m)^def (\w+)|^    def (\w+)", "".join(
        (PROJECT / "src" / name).read_text(encoding="utf-8")
        for name in ("train_grpo.py", "engine/engine.py", "engine/build.py")
    ))  # fmt: skip
    known = (
        keys
        | {*known_penalties()}
        | {name for pair in functions for name in pair}
        | {"state_dict", "forward_backward", "prompt_ids"}
        | {file.stem for file in (PROJECT / "configs" / "recipes").glob("*.yaml")}
    )
    for name in re.findall(r"`([a-z]+_[a-z_]+)`", README):
        assert name in known, f"the README names `{name}`, which is no key"
    for loss_type in known_penalties():
        assert f"| `{loss_type}` |" in README, f"the README's table misses {loss_type}"


def test_the_embedded_model_is_small_and_has_all_its_files():
    folder = PROJECT / "models" / "countdown-tiny"
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {file.name for file in folder.iterdir()}
    assert sum(file.stat().st_size for file in folder.iterdir()) < 5e6


def test_compared_configs_differ_in_nothing_but_the_penalty():
    own = {"loss_type", "beta", "kl_target", "kl_direction", "kl_estimator", "ot_target", "ot_window", "tau",
           "q_temperature", "q_epsilon", "length_normalized"}  # fmt: skip
    for folder in ("configs_tiny", "configs_0.5b", "configs_3b", "configs_7b"):
        files = [*(PROJECT / "configs" / folder).glob("*.yaml"), *(PROJECT / "configs" / f"{folder}_ot").glob("*.yaml")]
        shared = []
        for file in files:
            config = load_config(file)
            training = {name: value for name, value in vars(config.training).items() if name not in own}
            shared.append((training, vars(config.model), vars(config.data)))
        assert len(files) >= 6
        assert all(settings == shared[0] for settings in shared), folder
    name = PROJECT / "configs" / "configs_3b_ot" / "config_ot_beta0.1_target0.05_w8_3b.yaml"
    training = load_config(name).training
    assert (training.loss_type, training.beta, training.ot_target, training.ot_window) == ("ot", 0.1, 0.005, 8)


@pytest.mark.slow  # collects all tests once more
def test_the_gpu_tests_are_collected_where_only_torch_and_transformers_are():
    absent = ["peft", "ot", "datasets", "math_verify", "reasoning_gym"]
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({absent})); import pytest; "
        "sys.exit(pytest.main(['-m', 'gpu', '--collect-only', '-q', '-n0', '-p', 'no:cacheprovider', 'tests']))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=PROJECT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert "test_gpu.py: " in done.stdout and "error" not in done.stdout.lower()
