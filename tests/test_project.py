"""The project's own promises: pins that agree, a README that names what exists, a default model that fits."""

import os
import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest

from src.config import LOSS_TYPES, SECTIONS, load_config

PROJECT = Path(__file__).parent.parent
README = (PROJECT / "README.md").read_text(encoding="utf-8")


def test_requirements_txt_is_what_uv_exports(tmp_path):
    uv = os.environ.get("UV") or shutil.which("uv")
    if uv is None:
        pytest.skip("uv is not installed, so the lock cannot be made again; `pip install uv`")
    shutil.copy(PROJECT / "pyproject.toml", tmp_path)
    export = subprocess.run(
        [
            uv,
            "export",
            "--quiet",
            "--format",
            "requirements-txt",
            "--no-header",
            "--no-annotate",
            "--project",
            str(tmp_path),
        ],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert export.returncode == 0, export.stderr
    assert locked(export.stdout) == locked((PROJECT / "requirements.txt").read_text(encoding="utf-8"))


def locked(requirements: str) -> dict[str, tuple[set[str], set[str]]]:
    """Version, words of the marker and hashes of each package; versions of uv write the same marker differently."""
    entries = requirements.replace("\\\n", " ").splitlines()
    packages = {}
    for entry in filter(str.strip, entries):
        package, *hashes = entry.split("--hash=")
        name, _, marker = package.partition(";")
        packages[name.strip()] = (set(re.findall(r"'[^']*'", marker)), {each.strip() for each in hashes})
    return packages


def test_every_direct_dependency_is_pinned_exactly():
    project = tomllib.loads((PROJECT / "pyproject.toml").read_text(encoding="utf-8"))
    groups = [project["project"]["dependencies"], *project["dependency-groups"].values()]
    for requirement in (name for group in groups for name in group):
        assert re.fullmatch(r"[a-zA-Z0-9_.\[\]-]+==[0-9][0-9a-z.]*", requirement), requirement


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


def test_the_readme_names_files_keys_and_loss_types_that_exist():
    for path in set(re.findall(r"(?:configs|src|models|benchmarks|runs)/[\w./-]+\.(?:py|yaml|md)", README)):
        assert (PROJECT / path).exists(), path
    keys = {name for section in SECTIONS.values() for name in section.__dataclass_fields__}
    for name in re.findall(r"`([a-z]+_[a-z_]+)`", README):
        known = keys | {"add_advantages", "questions_of_step", "countdown", *LOSS_TYPES}
        assert name in known, f"the README names `{name}`, which is no key"
    for loss_type in LOSS_TYPES:
        assert f"| `{loss_type}` |" in README, f"the README's table misses {loss_type}"


def test_the_embedded_model_is_small_and_has_all_its_files():
    folder = PROJECT / "models" / "countdown-tiny"
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {file.name for file in folder.iterdir()}
    assert sum(file.stat().st_size for file in folder.iterdir()) < 5e6


def test_compared_configs_differ_in_nothing_but_the_penalty():
    own = {
        "loss_type",
        "beta",
        "kl_target",
        "kl_direction",
        "kl_estimator",
        "ot_target",
        "ot_window",
        "tau",
        "q_temperature",
    }
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
    assert (training.loss_type, training.beta, training.ot_target, training.ot_window) == ("ot", 0.1, 0.05, 8)
