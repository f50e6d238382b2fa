"""Models in, checkpoints out: round trips, half-written folders, and what is refused."""

import copy
import errno
import hashlib
import json
import logging
import math
import os
import random
import resource
import shutil
from collections import namedtuple
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, MixtralConfig, MixtralForCausalLM

from benchmarks.kill_storm import same
from src.config import Config, ConfigError, dump_config
from src.engine import Engine
from src.engine.models import end_token_ids, load_model, resolve_device, resolve_model_path
from src.engine.weights import load_weights
from src.records import Episode, Group, Problem
from src.run.checkpoint import (
    best_checkpoint,
    check_same_experiment,
    finished_step,
    list_checkpoints,
    newest_checkpoint,
    random_states,
    read_state,
    save_checkpoint,
    save_model,
    set_random_states,
)
from src.run.storage import StorageError, find_damage, read_manifest, write_file

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch):
    """fsync takes most of the time of these tests, and only a power cut could tell whether it was done."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


def config_for(folder, dtype: str = "float32", **training) -> Config:
    config = Config()
    config.model.pretrained_model_path, config.model.dtype, config.model.device = str(folder), dtype, "cpu"
    for name, value in {"learning_rate": 1e-2, "weight_decay": 0.1, **training}.items():
        setattr(config.training, name, value)
    return config


def engine_for(folder, dtype: str = "float32", rank: int = 0, **training) -> Engine:
    config = config_for(folder, dtype, **training)
    config.lora.r = rank
    engine = Engine(config)
    engine.load_model()
    return engine


def train(engine: Engine, seeds) -> None:
    """Optimizer steps with random gradients, one a seed."""
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        for parameter in (p for p in engine.model.parameters() if p.requires_grad):
            parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
        engine.optim_step(1e-2)


def save(folder: Path, step: int, engine: Engine, keep: int = 2, **state) -> None:
    save_checkpoint(folder, step, engine.state(), state, keep)


# --- checkpoints ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"memory_efficient_adamw": True},
        {"dtype": "bfloat16"},
        {"dtype": "bfloat16", "memory_efficient_adamw": True},
        {"reference_sync_steps": 1},
        {"rank": 2, "dtype": "bfloat16"},
    ],
    ids=str,
)
def test_a_loaded_checkpoint_goes_on_as_if_nothing_had_happened(tmp_path, tiny_model_folder, options):
    if "rank" in options:
        pytest.importorskip("peft")
    engine = engine_for(tiny_model_folder, **options)
    train(engine, (1, 2))
    if "reference_sync_steps" in options:
        engine.move_anchor()
    for seed in (torch.manual_seed, random.seed, np.random.seed):
        seed(5)
    state = {"first_evaluation": {"eval/greedy": 0.25}, "state": {"controllers": {"tau": math.inf}}}
    save(tmp_path, 2, engine, **state, **random_states())
    drawn = [torch.rand(3).tolist(), random.random(), np.random.randn(3).tolist()]
    train(engine, (3, 4))

    resumed, (newest,) = engine_for(tiny_model_folder, **options), list_checkpoints(tmp_path)
    for seed in (torch.manual_seed, random.seed, np.random.seed):
        seed(99)
    resumed.load(newest)
    found = read_state(newest)
    set_random_states(found)
    assert found == {"step": 2, **state}
    again = [torch.rand(3).tolist(), random.random(), np.random.randn(3).tolist()]
    assert again == drawn, "the random generators go on where they were"
    assert not same(resumed.model.state_dict(), engine.model.state_dict())
    train(resumed, (3, 4))
    assert same(resumed.model.state_dict(), engine.model.state_dict())
    assert same(resumed.optimizer.state_dict(), engine.optimizer.state_dict())
    if "rank" in options:  # an adapter is saved alone
        assert (newest / "adapter_model.safetensors").exists() and not (newest / "model.safetensors").exists()
    else:
        assert same(resumed.anchor.state_dict(), engine.anchor.state_dict())


class Killed(BaseException):
    """Stands for SIGKILL: nothing in the code may catch it."""


class Stub:
    """The state of an engine that is written in no time; `content` tells two apart; `before` is called first."""

    def __init__(self, content: str = "", before=lambda: None):
        self.content, self.before = content, before

    def write(self, folder: Path) -> None:
        self.before()
        (folder / "model.safetensors").write_text(self.content)


def save_stub(folder, step: int, keep: int = 2, content: str = "", score=None, before=lambda: None) -> None:
    save_checkpoint(folder, step, Stub(content, before), {}, keep, score)


def names_in(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def warnings(caplog, monkeypatch):
    """What the project's logger warned of."""
    monkeypatch.setattr(logging.getLogger("grpo"), "propagate", True)
    caplog.set_level(logging.WARNING, "grpo")
    return lambda: [record.getMessage() for record in caplog.records if record.name == "grpo"]


def test_other_files_are_no_checkpoints_and_the_others_are_in_order_of_their_steps(tmp_path):
    assert list_checkpoints(tmp_path / "missing") == []
    for name in ("step_000007.partial", "step_000005.old", "step_x", "notes"):
        (tmp_path / name).mkdir()
    (tmp_path / "step_000008").write_text("a file")
    for step in (1_000_000, 999_999, 5):
        (tmp_path / f"step_{step:06d}").mkdir()
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step_000005", "step_999999", "step_1000000"]


def test_a_checkpoint_is_loaded_without_unpickling(tmp_path, tiny_model_folder):
    engine = engine_for(tiny_model_folder)
    save(tmp_path, 1, engine)
    for name, load in (("training_state.pt", read_state), ("engine_state.pt", engine.load)):
        torch.save({"step": 1, "optimizer": SimpleNamespace()}, tmp_path / "step_000001" / name)
        with pytest.raises(Exception, match=r"[Ww]eights.only"):
            load(tmp_path / "step_000001")


# --- which are kept ---------------------------------------------------------------------------------------------------


def test_the_best_is_kept_beside_the_newest_and_the_oldest_goes_after_the_save(tmp_path):
    kept, seen = [], []
    for step, accuracy in enumerate((0.2, 0.9, math.nan, 0.3, None, 0.9, 0.1, 0.1, 0.1), start=1):
        save_stub(tmp_path, step, keep=2, score=accuracy, before=lambda: seen.append(names_in(tmp_path)))
        kept.append([int(name[5:]) for name in names_in(tmp_path)])
    # worked out by hand: the last two and the highest score so far, of equal ones the newest
    assert kept == [[1], [1, 2], [2, 3], [2, 3, 4], [2, 4, 5], [5, 6], [6, 7], [6, 7, 8], [6, 8, 9]]
    assert best_checkpoint(tmp_path).name == "step_000006" and best_checkpoint(tmp_path / "none") is None
    before = [[], *kept]
    assert seen == [[f"step_{n:06d}" for n in before[i]] + [f"step_{i + 1:06d}.partial"] for i in range(9)]


def test_a_damaged_one_of_a_later_step_does_not_push_out_the_good_ones(tmp_path, warnings):
    save_stub(tmp_path, 3, keep=1)
    shutil.copytree(tmp_path / "step_000003", tmp_path / "step_000009")
    (tmp_path / "step_000009" / "training_state.pt").unlink()
    assert newest_checkpoint(tmp_path).name == "step_000003"
    save_stub(tmp_path, 4, keep=1)
    assert newest_checkpoint(tmp_path).name == "step_000004"
    assert len(warnings()) == 2


# --- damage -----------------------------------------------------------------------------------------------------------


def flip_a_byte(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut(path):
    path.write_bytes(path.read_bytes()[:-1])


def lengthen(path):
    path.write_bytes(path.read_bytes() + b"\0")


@pytest.fixture(scope="module")
def two_checkpoints(tmp_path_factory, tiny_model_folder):
    folder, engine = tmp_path_factory.mktemp("two"), engine_for(tiny_model_folder)
    for step in (1, 2):
        save(folder, step, engine)
    return folder


@pytest.mark.parametrize("damage", [flip_a_byte, cut, lengthen, Path.unlink])
def test_damage_to_any_file_is_found_and_the_one_before_is_used(two_checkpoints, warnings, damage, caplog):
    newest = two_checkpoints / "step_000002"
    (newest / ".DS_Store").write_text("")  # what others put there does no harm
    written = read_manifest(newest)["files"]
    wanted = {"config.json", "model.safetensors", "tokenizer.json", "training_state.pt", "engine_state.pt"}
    assert wanted <= set(written) and newest_checkpoint(two_checkpoints) == newest and warnings() == []
    for path in (newest / name for name in [*written, "manifest.json"]):
        content = path.read_bytes()
        damage(path)
        caplog.clear()
        assert newest_checkpoint(two_checkpoints).name == "step_000001", path.name
        (warning,) = warnings()
        assert warning.startswith(f"checkpoint step_000002 cannot be used: {path.name} ")
        assert warning.endswith("; going on from step_000001, before it")
        path.write_bytes(content)
    assert newest_checkpoint(two_checkpoints) == newest


def test_every_byte_of_the_manifest_counts_and_its_hashes_are_those_of_sha256sum(tmp_path, monkeypatch):
    save_stub(tmp_path, 1, content="weights", score=0.1 + 0.2)
    path = tmp_path / "step_000001" / "manifest.json"
    content, manifest = path.read_bytes(), read_manifest(path.parent)
    assert manifest["score"] == 0.1 + 0.2 and set(manifest["files"]) == {"model.safetensors", "training_state.pt"}
    wanted = {"bytes": 7, "sha256": hashlib.sha256(b"weights").hexdigest()}
    assert manifest["files"]["model.safetensors"] == wanted
    for index in range(len(content)):
        for mask in (1, 7, 32, 128):  # 7 makes a carriage return of a line feed
            changed = bytearray(content)
            changed[index] ^= mask
            monkeypatch.setattr(Path, "read_bytes", lambda _: bytes(changed))  # noqa: B023
            assert read_manifest(path.parent) is None, (index, mask)


def test_without_a_good_checkpoint_it_is_said_which_files_are_wrong(tmp_path):
    assert newest_checkpoint(tmp_path) is None and newest_checkpoint(tmp_path / "none") is None
    for step in (1, 2, 3):
        save_stub(tmp_path, step, keep=3)
    cut(tmp_path / "step_000001" / "training_state.pt")
    (tmp_path / "step_000002" / "model.safetensors").unlink()
    (tmp_path / "step_000003" / "manifest.json").unlink()
    with pytest.raises(ConfigError) as refusal:
        newest_checkpoint(tmp_path)
    for fragment in (
        "step_000001: training_state.pt has ",
        "step_000002: model.safetensors is missing",
        "step_000003: manifest.json is missing, as in a checkpoint of an older version",
        "restore these files from a copy, or use --fresh to start over",
    ):
        assert fragment in str(refusal.value)
    assert names_in(tmp_path) == ["step_000001", "step_000002", "step_000003"], "nothing is touched"


# --- killed at any moment ---------------------------------------------------------------------------------------------

CALLS = [(os, name) for name in ("mkdir", "open", "rename", "replace", "fsync", "unlink", "rmdir")]
CALLS += [(torch, "save"), (hashlib, "file_digest"), (Path, "write_text"), (shutil, "rmtree")]


def killed_at(monkeypatch, number: int, action) -> bool:
    """Do something in a process that is killed at its `number`th call of the above. Whether it was."""
    count = 0

    def counting(function):
        def call(*arguments, **options):
            nonlocal count
            count += 1
            if count >= number:  # a dead process does nothing more, whatever handlers it had
                raise Killed
            return function(*arguments, **options)

        return call

    with monkeypatch.context() as patch:
        for owner, name in CALLS:
            patch.setattr(owner, name, counting(getattr(owner, name)))
        try:
            action()
        except Killed:
            return True
    return False


@pytest.mark.parametrize("step", [2, 1], ids=["a new step", "the same step again"])
def test_wherever_a_save_is_killed_a_good_checkpoint_is_found(tmp_path, monkeypatch, step):
    outcomes, number = [], 0
    while not outcomes or outcomes[-1] is not None:
        number += 1
        folder = tmp_path / str(number)
        save_stub(folder, 1, keep=1, content="old")
        killed = killed_at(monkeypatch, number, lambda: save_stub(folder, step, keep=1, content="new"))  # noqa: B023
        newest = newest_checkpoint(folder)
        content = (newest / "model.safetensors").read_text()
        assert content == "new" or killed
        assert newest.name == f"step_00000{step if content == 'new' else 1}"
        assert {name.partition(".")[2] for name in names_in(folder)} == {""}, "leftovers are gone"
        assert not any(map(find_damage, list_checkpoints(folder))), "none is half removed"
        save_stub(folder, 3, keep=1)
        assert names_in(folder) == ["step_000003"]
        outcomes.append(content if killed else None)
    assert outcomes[0] == "old" and outcomes[-2] == "new" and len(outcomes) > 15
    assert sorted(outcomes[:-1], reverse=True) == outcomes[:-1], "old until one moment, new from then on"


def test_wherever_a_final_save_is_killed_the_old_one_or_the_new_one_is_there(tmp_path, monkeypatch):
    number, killed = 0, True
    while killed:
        number += 1
        final = tmp_path / str(number) / "final"
        final.parent.mkdir()
        assert finished_step(final) is None
        save_model(final, Stub("old"), step=1)
        killed = killed_at(monkeypatch, number, lambda: save_model(final, Stub("new"), step=2))  # noqa: B023
        there = final if final.exists() else final.with_name("final.old")
        assert (there / "model.safetensors").read_text() == ("new" if finished_step(there) == 2 else "old")
        save_model(final, Stub("newest"), step=3)
        assert names_in(final.parent) == ["final"] and finished_step(final) == 3
    assert number > 10
    cut(final / "model.safetensors")
    assert finished_step(final) is None, "damaged, it is not the model of that step"


def test_every_file_is_on_the_disk_before_the_checkpoint_has_its_name(tmp_path, monkeypatch):
    """And the name before an older checkpoint is removed: a power cut is a kill that forgets what was not synced."""
    events = []
    monkeypatch.setattr(os, "fsync", lambda fd: events.append(os.readlink(f"/proc/self/fd/{fd}")))
    for owner, name in ((os, "rename"), (shutil, "rmtree")):
        real = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *a, real=real, name=name, **k: (events.append(name), real(*a, **k))[1])
    save_stub(tmp_path, 1, keep=1)
    events.clear()
    save_stub(tmp_path, 2, keep=1)
    partial, named = f"{tmp_path}/step_000002.partial", events.index("rename")
    wanted = {"model.safetensors", "training_state.pt", "manifest.json"}
    assert {partial, *(f"{partial}/{name}" for name in wanted)} <= set(events[:named])
    assert events[named + 1] == str(tmp_path) and "rmtree" not in events[: named + 2] and "rmtree" in events


def test_a_small_file_is_replaced_whole_or_stays_what_it_was(tmp_path, monkeypatch):
    path, number = tmp_path / "config.yaml", 1
    write_file(path, "old")
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", raising(OSError(errno.ENOSPC, "")))
        with pytest.raises(StorageError, match=r"config\.yaml could not be written \(No space left on .*; what was th"):
            write_file(path, "new")
    assert names_in(tmp_path) == ["config.yaml"]
    while killed_at(monkeypatch, number, lambda: write_file(path, "new\n")):
        assert path.read_text() == "old"
        number += 1
    assert path.read_bytes() == b"new\n" and number > 3 and names_in(tmp_path) == ["config.yaml"]


# --- a disk that does not take it -------------------------------------------------------------------------------------


def raising(error: BaseException):
    def fail(*_, **__):
        raise error

    return fail


def wrapped(error: OSError) -> RuntimeError:
    """As torch.save raises it: the system's error is only the context."""
    outer = RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534")
    outer.__context__ = error
    return outer


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (OSError(errno.ENOSPC, "x"), "No space left on device"),
        (OSError(errno.EDQUOT, "x"), "Disk quota exceeded"),
        (OSError(errno.EROFS, "x"), "Read-only file system"),
        (OSError(errno.EACCES, "x"), "Permission denied"),
        (OSError(errno.EIO, "x"), "Input/output error"),
        (OSError("in words\nonly"), "in words only"),
        (SafetensorError("Error while serializing: I/O error: full (os error 28)"), "No space left on device"),
        (wrapped(OSError(errno.ENOSPC, "x")), "No space left on device"),
    ],
)
@pytest.mark.parametrize("call", [(os, "mkdir"), (torch, "save"), (os, "fsync"), (os, "rename")], ids=lambda c: c[1])
def test_a_disk_that_fails_leaves_the_last_checkpoint_and_says_so(tmp_path, monkeypatch, error, reason, call):
    save_stub(tmp_path, 4, keep=1, content="old")
    with monkeypatch.context() as patch:
        patch.setattr(*call, raising(error))
        with pytest.raises(StorageError) as failure:
            save_stub(tmp_path, 5, keep=1)
    assert str(failure.value) == (
        f"the checkpoint of step 5 in {tmp_path} could not be written ({reason}); step 4 is safe in step_000004; "
        f"make room there or make it writable, then give the same command again"
    )
    assert names_in(tmp_path) == ["step_000004"]
    assert (newest_checkpoint(tmp_path) / "model.safetensors").read_text() == "old"


def test_a_failed_second_rename_gives_the_old_one_its_name_back(tmp_path, monkeypatch):
    save_stub(tmp_path, 4, content="old")
    renames, rename = [], os.rename

    def fail_at_the_second(*paths):
        renames.append(paths)
        if len(renames) == 2:
            raise OSError(errno.EDQUOT, "")
        return rename(*paths)

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", fail_at_the_second)
        with pytest.raises(StorageError, match="Disk quota exceeded"):
            save_stub(tmp_path, 4, content="new")
    assert names_in(tmp_path) == ["step_000004"]
    assert (newest_checkpoint(tmp_path) / "model.safetensors").read_text() == "old"


def test_a_first_checkpoint_that_fails_says_that_there_is_none_and_another_error_stays_what_it_is(tmp_path):
    with pytest.raises(TypeError, match="not the disk"):
        save_stub(tmp_path, 1, before=raising(TypeError("not the disk's fault")))
    assert names_in(tmp_path) == []
    (tmp_path / "checkpoints").write_text("a file where the folder should be")
    with pytest.raises(StorageError, match=r"step 1 in .* could not be written \(.*\); there is no earlier one; make"):
        save_stub(tmp_path / "checkpoints", 1)


def test_too_little_room_is_seen_before_anything_is_written(tmp_path, monkeypatch):
    Usage = namedtuple("Usage", "total used free")
    save_stub(tmp_path, 1, content="x" * 1000)
    size = sum(path.stat().st_size for path in (tmp_path / "step_000001").iterdir())
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(0, 0, size - 1))
    with pytest.raises(StorageError, match=r"step 2 in .* written \(No space left on device\); step 1 is safe"):
        save_stub(tmp_path, 2, before=lambda: pytest.fail("it has begun to write"))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(0, 0, size))
    save_stub(tmp_path, 2)


@pytest.mark.parametrize("limit", [30_000, 120_000], ids=["the weights", "the training state"])
def test_a_real_limit_of_the_system(tmp_path, tiny_model_folder, limit):
    """RLIMIT_FSIZE makes writes fail within safetensors and within torch, as a quota does."""
    engine = engine_for(tiny_model_folder)
    save(tmp_path, 1, engine)
    train(engine, (1,))  # now the optimizer has states
    weights = (tmp_path / "step_000001" / "model.safetensors").stat().st_size
    assert 30_000 < weights < 120_000 < 2 * weights, "each limit has to hit the file it is meant for"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        with pytest.raises(StorageError, match=r"step 2 in .* could not be written \(File too large\); step 1 is safe"):
            save(tmp_path, 2, engine)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert names_in(tmp_path) == ["step_000001"] and newest_checkpoint(tmp_path).name == "step_000001"


def test_an_old_checkpoint_that_cannot_be_removed_does_not_stop_the_run(tmp_path, monkeypatch, warnings):
    save_stub(tmp_path, 1, keep=1)
    with monkeypatch.context() as patch:
        patch.setattr(os, "rmdir", raising(OSError(errno.EACCES, "")))
        save_stub(tmp_path, 2, keep=1)
    assert newest_checkpoint(tmp_path).name == "step_000002"
    assert len(warnings()) == 1 and "could not be removed (Permission denied)" in warnings()[0]


# --- weights into the model -------------------------------------------------------------------------------------------


def test_weights_are_read_into_the_model_without_a_second_one(tmp_path, tiny_model_folder, monkeypatch):
    engine = engine_for(tiny_model_folder, "bfloat16")
    train(engine, (1,))
    engine.model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    other = load_model(engine.config, CPU)
    addresses = {name: tensor.data_ptr() for name, tensor in other.state_dict().items()}
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("a second model"))
    load_weights(tmp_path, other)
    assert same(other.state_dict(), engine.model.state_dict())
    assert {name: tensor.data_ptr() for name, tensor in other.state_dict().items()} == addresses
    assert other.lm_head.weight is other.model.embed_tokens.weight


def test_weights_that_transformers_saves_under_other_names_come_back(tmp_path, monkeypatch):
    config = MixtralConfig(
        vocab_size=11, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, num_local_experts=2, max_position_embeddings=16,
    )  # fmt: skip
    model, other = MixtralForCausalLM(config), MixtralForCausalLM(config)
    model.save_pretrained(tmp_path)
    assert not load_file(tmp_path / "model.safetensors").keys() <= model.state_dict().keys()
    options, load = {}, AutoModelForCausalLM.from_pretrained
    monkeypatch.setattr(
        AutoModelForCausalLM, "from_pretrained", lambda *args, **given: options.update(given) or load(*args, **given)
    )
    assert not same(other.state_dict(), model.state_dict())
    load_weights(tmp_path, other, trust_remote_code=True)
    assert same(other.state_dict(), model.state_dict()) and options["trust_remote_code"] is True


NORM, DEEP = "model.norm.weight", "model.layers.1.mlp.up_proj.weight"


def with_weights(folder: Path, target: Path, change) -> Path:
    """A copy of the model whose weights have been changed."""
    shutil.copytree(folder, target)
    weights = load_file(target / "model.safetensors")
    change(weights)
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
    return target


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda w: w.update(norm=w.pop(NORM)), r"no weights for model.norm.weight"),
        (lambda w: w.update({NORM: torch.ones(31)}), r"norm.weight is \[31\] of .*float32 there and \[32\]"),
        (
            lambda w: w.update({NORM: torch.ones(32).bfloat16()}),
            r"norm.weight is \[32\] of torch.bfloat16 there and \[32\] of torch.float32 here; use the config it was",
        ),
        (lambda w: w.pop(NORM), r"has no weights for model.norm.weight; use --fresh"),
    ],
)
def test_weights_that_do_not_fit_are_refused(tmp_path, tiny_model_folder, change, complaint):
    saved = with_weights(tiny_model_folder, tmp_path / "saved", change)
    with pytest.raises(ConfigError, match=complaint):
        load_weights(saved, load_model(config_for(tiny_model_folder), CPU))


def test_an_optimizer_of_another_kind_is_refused(tmp_path, tiny_model_folder):
    save(tmp_path, 1, engine_for(tiny_model_folder))
    with pytest.raises(ConfigError, match=r"step_000001 does not fit this config: .*; use --fresh to start over"):
        engine_for(tiny_model_folder, memory_efficient_adamw=True).load(tmp_path / "step_000001")


# --- whose run folder it is -------------------------------------------------------------------------------------------


def test_a_config_that_cannot_be_read_back_is_said(tmp_path):
    check_same_experiment(tmp_path, Config())
    for text in ("", "5", "[", "model: 3", "\x00"):
        (tmp_path / "config.yaml").write_text(text)
        with pytest.raises(ConfigError, match=r"config\.yaml cannot be read; restore it, or use --fresh"):
            check_same_experiment(tmp_path, Config())


def test_what_does_not_change_the_experiment_may_change(tmp_path, warnings):
    config = Config()
    (tmp_path / "config.yaml").write_text(dump_config(config))
    config.hub.push_to_hub, config.training.max_steps = True, 7
    check_same_experiment(tmp_path, config)
    assert warnings() == []
    config.training.learning_rate = 0.5
    check_same_experiment(tmp_path, config)
    assert "training.learning_rate was 1e-06 so far and is 0.5 from here on" in warnings()[0]
    config.training.beta = 0.5
    with pytest.raises(ConfigError, match=r"training\.beta = .*, this config says 0\.5"):
        check_same_experiment(tmp_path, config)


# --- final/ -----------------------------------------------------------------------------------------------------------


def test_final_model_is_the_trained_one_for_anybody(tmp_path, tiny_model_folder):
    """Plain transformers, with its own attention, finds the log-probs that the trainer finds."""
    engine = engine_for(tiny_model_folder)
    problem = Problem(0, (3, 20, 21, 22, 4), "", {})
    episodes = tuple(Episode(ids, (0.0,) * len(ids), True, "") for ids in ((5, 30, 31, 6), (40, 1), (9,)))

    def logprobs() -> torch.Tensor:
        (group,) = engine.score([Group(problem, episodes)])
        return torch.tensor([value for episode in group.episodes for value in episode.old_logprobs])

    untrained = logprobs()
    train(engine, range(3))
    trained = logprobs()
    assert (trained - untrained).abs().max() > 0.1, "the training must have changed something"

    for step in (1, 2):  # the second over the first
        save_model(tmp_path / "final", engine.state(finished=True), step)
    assert names_in(tmp_path) == ["final"] and not (tmp_path / "final" / "engine_state.pt").exists()
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "final")
    assert plain.config._attn_implementation == "sdpa" and plain.dtype == torch.float32
    expected = []
    for episode in episodes:
        ids = torch.tensor([problem.prompt_ids + episode.token_ids])
        rows = plain(ids).logits[0].log_softmax(-1)[len(problem.prompt_ids) - 1 : -1]
        expected.append(rows.gather(1, torch.tensor(episode.token_ids)[:, None])[:, 0])
    torch.testing.assert_close(trained, torch.cat(expected), atol=1e-4, rtol=1e-4)

    again, tokenizer = AutoTokenizer.from_pretrained(tmp_path / "final"), engine.tokenizer
    assert again.chat_template == tokenizer.chat_template and again.eos_token == tokenizer.eos_token
    assert again("3 * 5 + 7").input_ids == tokenizer("3 * 5 + 7").input_ids


def test_a_model_with_sampling_defaults_of_its_own_is_saved_with_them(tmp_path, tiny_model_folder):
    """transformers refuses to save a generation config that asks for a temperature without sampling."""
    folder = shutil.copytree(tiny_model_folder, tmp_path / "model")
    defaults = {"temperature": 0.6, "top_p": 0.9, "eos_token_id": [1, 2]}
    (folder / "generation_config.json").write_text(json.dumps(defaults))
    engine = engine_for(folder)
    save_model(tmp_path / "final", engine.state(finished=True), 1)
    assert engine.eos_ids == (1, 2) and engine.model.generation_config.temperature == 0.6
    again = GenerationConfig.from_pretrained(tmp_path / "final")
    assert {name: getattr(again, name) for name in defaults} == defaults


# --- models in --------------------------------------------------------------------------------------------------------


def test_loaded_model_has_no_dropout_the_asked_precision_and_its_head_tied(tmp_path, tiny_model_folder):
    folder = shutil.copytree(tiny_model_folder, tmp_path / "model")
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | {"attention_dropout": 0.1}))
    model = load_model(config_for(folder, "bfloat16"), CPU)
    assert model.config.attention_dropout == 0.0 and not model.training
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert "lm_head.weight" not in load_file(folder / "model.safetensors"), "it is tied, and not missing"
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert copy.deepcopy(model).lm_head.weight.abs().sum() > 0


@pytest.mark.parametrize(
    ("tokenizer_id", "generation_ids", "config_ids", "expected"),
    [
        (1, 1, 1, (1,)),
        (1, [7, 3], 3, (1, 3, 7)),
        (None, None, [4, 2], (2, 4)),
        (5, None, None, (5,)),
        (0, [0], None, (0,)),
        (None, None, None, None),
    ],
)
def test_every_end_token_is_collected_and_a_model_that_can_not_end_is_refused(
    tokenizer_id, generation_ids, config_ids, expected
):
    config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(eos_token_id=config_ids))
    generation = SimpleNamespace(eos_token_id=generation_ids) if generation_ids else None
    model, tokenizer = SimpleNamespace(generation_config=generation, config=config), SimpleNamespace()
    tokenizer.eos_token_id = tokenizer_id
    if expected:
        assert end_token_ids(model, tokenizer) == expected
    else:
        with pytest.raises(ConfigError, match="no end-of-sequence token"):
            end_token_ids(model, tokenizer)


def test_a_model_without_some_of_its_weights_is_refused(tmp_path, tiny_model_folder):
    """transformers would fill the gap with random numbers and go on."""
    folder = with_weights(tiny_model_folder, tmp_path / "model", lambda weights: weights.pop(DEEP))
    with pytest.raises(ConfigError, match=rf"is incomplete; it has no weights for {DEEP}"):
        load_model(config_for(folder), CPU)


@pytest.mark.parametrize(
    ("name", "fragment"),
    [
        ("cuda:99", "model.device: cuda:99 is not there"),
        ("tpu", "'tpu' is not a device; use auto, cpu"),
        ("meta", "'meta' is not supported; use auto, cpu"),
        ("", "'' is not a device"),
        ("cpu:x", "'cpu:x' is not a device"),
    ],
)
def test_device(name, fragment):
    with pytest.raises(ConfigError) as refusal:
        resolve_device(name)
    assert fragment in str(refusal.value)
    assert resolve_device("cpu") == CPU
    assert resolve_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")


def test_model_folder_as_given_or_beside_main(tmp_path, tiny_model_folder, monkeypatch):
    assert resolve_model_path(str(tiny_model_folder)) == str(tiny_model_folder)
    monkeypatch.chdir(tiny_model_folder.parent)
    assert resolve_model_path("tiny") == "tiny"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("src.engine.models.PROJECT_FOLDER", tiny_model_folder.parent)
    assert resolve_model_path("tiny") == str(tiny_model_folder)
    for missing in ("./tiny2", "/tiny2", "models/tiny2", "~/tiny2", "a/b/c"):
        with pytest.raises(ConfigError, match=f"there is no folder {missing}; give a folder or a hub id"):
            resolve_model_path(missing)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"empty has no config\.json, so it is not a model in Hugging Face format"):
        resolve_model_path("empty")
