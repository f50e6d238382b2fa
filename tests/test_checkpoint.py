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
import select
import shutil
import signal
import time
from collections import namedtuple
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, MixtralConfig, MixtralForCausalLM

from benchmarks.kill_storm import same
from src.checkpoint import (
    best_checkpoint,
    check_same_experiment,
    finished_step,
    list_checkpoints,
    load_checkpoint,
    load_weights,
    newest_checkpoint,
    save_checkpoint,
    save_model,
)
from src.config import Config, ConfigError, dump_config
from src.maxent import Controllers
from src.models import end_token_ids, load_model, load_tokenizer, resolve_device, resolve_model_path
from src.optim import build_optimizer
from src.packing import Episode, Group, pack
from src.rl_datasets import Problem
from src.scoring import score
from src.stop import Stopped, StopSignal
from src.storage import RunLock, StorageError, find_damage, read_manifest, set_aside, write_file

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch):
    """fsync takes most of the time of these tests, and only a power cut could tell whether it was done."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


def config_for(folder, dtype: str = "float32") -> Config:
    config = Config()
    config.model.pretrained_model_path, config.model.dtype, config.model.device = str(folder), dtype, "cpu"
    return config


def make_optimizer(model, memory_efficient: bool):
    return build_optimizer(
        list(model.parameters()),
        learning_rate=1e-2,
        betas=(0.9, 0.99),
        weight_decay=0.1,
        memory_efficient=memory_efficient,
        master_bits=24,
        state_bits=8,
        offload=False,
    )


def train(model, optimizer, seeds) -> None:
    """Optimizer steps with random gradients, one a seed."""
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        for parameter in model.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
        optimizer.step()


# --- checkpoints ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("memory_efficient", [False, True])
def test_a_loaded_checkpoint_goes_on_as_if_nothing_had_happened(tmp_path, tiny_model_folder, dtype, memory_efficient):
    config = config_for(tiny_model_folder, dtype)
    tokenizer = load_tokenizer(config)
    model = load_model(config, CPU)
    optimizer = make_optimizer(model, memory_efficient)
    train(model, optimizer, (1, 2))
    for seed in (torch.manual_seed, random.seed, np.random.seed):
        seed(5)
    extra = {"first_evaluation": {"eval/greedy": 0.25}}
    save_checkpoint(tmp_path, 2, model, tokenizer, optimizer, Controllers(math.inf, 0.07), extra, keep=2)
    drawn = [torch.rand(3).tolist(), random.random(), np.random.randn(3).tolist()]
    train(model, optimizer, (3, 4))

    resumed = load_model(config, CPU)
    resumed_optimizer = make_optimizer(resumed, memory_efficient)
    for seed in (torch.manual_seed, random.seed, np.random.seed):
        seed(99)
    controllers = Controllers(0.1, 0.04)
    state = load_checkpoint(list_checkpoints(tmp_path)[-1], resumed, resumed_optimizer, controllers)
    assert state["step"] == 2
    assert (controllers.tau, controllers.beta) == (math.inf, 0.07)
    assert {name: state[name] for name in extra} == extra
    assert not state.keys() & {"torch_rng", "cuda_rng", "python_rng", "numpy_rng"}
    again = [torch.rand(3).tolist(), random.random(), np.random.randn(3).tolist()]
    assert again == drawn, "the random generators go on where they were"
    assert not same(resumed.state_dict(), model.state_dict())
    train(resumed, resumed_optimizer, (3, 4))
    assert same(resumed.state_dict(), model.state_dict())
    assert same(resumed_optimizer.state_dict(), optimizer.state_dict())


def save_steps(folder, config, steps, keep: int) -> None:
    model, tokenizer = load_model(config, CPU), load_tokenizer(config)
    optimizer = make_optimizer(model, False)
    for step in steps:
        save_checkpoint(folder, step, model, tokenizer, optimizer, Controllers(0.1, 0.04), {}, keep)


class Killed(BaseException):
    """Stands for SIGKILL: nothing in the code may catch it."""


class Stub:
    """A model, tokenizer, optimizer and controllers at once, that save in no time; `content` tells two of them apart.

    `before`: called as the weights are written.
    """

    def __init__(self, content: str = "", before=lambda: None):
        self.content, self.before = content, before

    def save_pretrained(self, folder):
        self.before()
        (folder / "model.safetensors").write_text(self.content)

    def state_dict(self):
        return {}

    def save(self, path):
        path.write_text("{}")


class NoFiles:
    def save_pretrained(self, folder):
        pass


def save_stub(folder, step: int, keep: int = 2, content: str = "", score=None, before=lambda: None) -> None:
    stub = Stub(content, before)
    save_checkpoint(folder, step, stub, NoFiles(), stub, stub, {}, keep, score)


def names_in(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def warnings(caplog, monkeypatch):
    """What the project's logger warned of."""
    monkeypatch.setattr(logging.getLogger("grpo"), "propagate", True)
    caplog.set_level(logging.WARNING, "grpo")
    return lambda: [record.getMessage() for record in caplog.records if record.name == "grpo"]


def test_only_the_newest_are_kept(tmp_path, tiny_model_folder):
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    save_steps(folder, config_for(tiny_model_folder), (8, 9, 10, 11), keep=2)
    assert [path.name for path in list_checkpoints(folder)] == ["step_000010", "step_000011"]
    assert sorted(path.name for path in folder.iterdir()) == ["step_000010", "step_000011"], "no .partial is left"


def test_a_half_written_checkpoint_is_none(tmp_path, tiny_model_folder, monkeypatch):
    config = config_for(tiny_model_folder)
    save_steps(tmp_path, config, (1, 2), keep=2)

    def die(state, file):
        file.write(b"PK")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", die)
        with pytest.raises(KeyboardInterrupt):
            save_steps(tmp_path, config, (3,), keep=1)
    assert (tmp_path / "step_000003.partial" / "model.safetensors").exists(), (
        "this test must leave a half-written folder"
    )
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step_000001", "step_000002"], (
        "nothing was dropped yet"
    )
    save_steps(tmp_path, config, (3,), keep=2)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step_000002", "step_000003"]
    assert not list(tmp_path.glob("*.partial"))


def test_other_files_are_no_checkpoints(tmp_path):
    assert list_checkpoints(tmp_path / "missing") == []
    (tmp_path / "step_000007.partial").mkdir()
    (tmp_path / "step_000008").write_text("a file")
    (tmp_path / "notes").mkdir()
    assert list_checkpoints(tmp_path) == []


def test_a_checkpoint_is_loaded_without_unpickling(tmp_path, tiny_model_folder):
    config = config_for(tiny_model_folder)
    save_steps(tmp_path, config, (1,), keep=1)
    checkpoint = list_checkpoints(tmp_path)[0]
    torch.save({"step": 1, "optimizer": SimpleNamespace()}, checkpoint / "training_state.pt")
    with pytest.raises(Exception, match=r"[Ww]eights.only"):
        load_checkpoint(checkpoint, load_model(config, CPU), None, None)


# --- which are kept ---------------------------------------------------------------------------------------------------


def test_the_best_is_kept_beside_the_newest(tmp_path):
    kept = []
    for step, accuracy in enumerate((0.2, 0.9, math.nan, 0.3, None, 0.9, 0.1, 0.1, 0.1), start=1):
        save_stub(tmp_path, step, keep=2, score=accuracy)
        kept.append([int(path.name[5:]) for path in list_checkpoints(tmp_path)])
    # worked out by hand: the last two and the highest score so far, of equal ones the newest
    assert kept == [[1], [1, 2], [2, 3], [2, 3, 4], [2, 4, 5], [5, 6], [6, 7], [6, 7, 8], [6, 8, 9]]
    assert best_checkpoint(tmp_path).name == "step_000006"
    assert best_checkpoint(tmp_path / "none") is None


def test_no_more_than_one_beyond_those_kept_is_ever_on_the_disk(tmp_path):
    seen = []
    for step in range(1, 7):
        save_stub(tmp_path, step, keep=2, before=lambda: seen.append(names_in(tmp_path)))
    assert [len(names) for names in seen] == [1, 2, 3, 3, 3, 3]
    assert seen[3] == ["step_000002", "step_000003", "step_000004.partial"], (
        "the oldest goes after the save, not before"
    )


def test_checkpoints_are_in_order_of_their_steps_beyond_six_digits(tmp_path):
    for step in (1_000_000, 999_999, 5):
        (tmp_path / f"step_{step:06d}").mkdir()
    (tmp_path / "step_000005.old").mkdir()
    (tmp_path / "step_x").mkdir()
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step_000005", "step_999999", "step_1000000"]


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
    folder = tmp_path_factory.mktemp("two")
    save_steps(folder, config_for(tiny_model_folder), (1, 2), keep=2)
    return folder


@pytest.mark.parametrize("damage", [flip_a_byte, cut, lengthen, Path.unlink])
def test_damage_to_any_file_is_found_and_the_one_before_is_used(two_checkpoints, warnings, damage, caplog):
    newest = two_checkpoints / "step_000002"
    files = [path for path in sorted(newest.rglob("*")) if path.is_file()]
    wanted = {"config.json", "model.safetensors", "tokenizer.json", "training_state.pt", "controllers.json"}
    assert wanted | {"manifest.json"} <= {path.name for path in files}
    assert newest_checkpoint(two_checkpoints) == newest and warnings() == []
    for path in files:
        content = path.read_bytes()
        damage(path)
        caplog.clear()
        assert newest_checkpoint(two_checkpoints).name == "step_000001", path.name
        (warning,) = warnings()
        assert warning.startswith(f"checkpoint step_000002 cannot be used: {path.name} ")
        assert warning.endswith("; going on from step_000001, before it")
        path.write_bytes(content)
    assert newest_checkpoint(two_checkpoints) == newest


def test_every_byte_of_the_manifest_counts(tmp_path, monkeypatch):
    save_stub(tmp_path, 1, score=0.1 + 0.2)
    path = tmp_path / "step_000001" / "manifest.json"
    content = path.read_bytes()
    assert read_manifest(path.parent)["score"] == 0.1 + 0.2
    for index in range(len(content)):
        for mask in (1, 7, 32, 128):  # 7 makes a carriage return of a line feed
            changed = bytearray(content)
            changed[index] ^= mask
            monkeypatch.setattr(Path, "read_bytes", lambda _: bytes(changed))  # noqa: B023
            assert read_manifest(path.parent) is None, (index, mask)


def test_hashes_are_of_the_files(tmp_path):
    """Against a plain SHA-256 of the bytes, so that anybody can check a checkpoint with sha256sum."""
    save_stub(tmp_path, 1, content="weights")
    files = read_manifest(tmp_path / "step_000001")["files"]
    assert set(files) == {"model.safetensors", "training_state.pt", "controllers.json"}
    assert files["model.safetensors"] == {"bytes": 7, "sha256": hashlib.sha256(b"weights").hexdigest()}


def test_without_a_good_checkpoint_it_is_said_which_files_are_wrong(tmp_path):
    assert newest_checkpoint(tmp_path) is None and newest_checkpoint(tmp_path / "none") is None
    for step in (1, 2, 3):
        save_stub(tmp_path, step, keep=3)
    cut(tmp_path / "step_000001" / "training_state.pt")
    (tmp_path / "step_000002" / "controllers.json").unlink()
    (tmp_path / "step_000003" / "manifest.json").unlink()
    with pytest.raises(ConfigError) as refusal:
        newest_checkpoint(tmp_path)
    for fragment in (
        "step_000001: training_state.pt has ",
        "step_000002: controllers.json is missing",
        "step_000003: manifest.json is missing, as in a checkpoint of an older version",
        "restore these files from a copy, or use --fresh to start over",
    ):
        assert fragment in str(refusal.value)
    assert names_in(tmp_path) == ["step_000001", "step_000002", "step_000003"], "nothing is touched"


def test_files_that_others_put_there_do_no_harm(tmp_path):
    save_stub(tmp_path, 1)
    (tmp_path / "step_000001" / ".DS_Store").write_text("")
    assert newest_checkpoint(tmp_path).name == "step_000001"


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
        assert [find_damage(path) for path in list_checkpoints(folder)] in ([None], [None, None]), (
            "none is half removed"
        )
        save_stub(folder, 3, keep=1)
        assert names_in(folder) == ["step_000003"]
        outcomes.append(content if killed else None)
    assert outcomes[0] == "old" and outcomes[-2] == "new" and len(outcomes) > 20
    assert sorted(outcomes[:-1], reverse=True) == outcomes[:-1], "old until one moment, new from then on"


def test_wherever_a_final_save_is_killed_the_old_one_or_the_new_one_is_there(tmp_path, monkeypatch):
    number, killed = 0, True
    while killed:
        number += 1
        final = tmp_path / str(number) / "final"
        final.parent.mkdir()
        save_model(Stub("old"), NoFiles(), final, step=1)
        killed = killed_at(monkeypatch, number, lambda: save_model(Stub("new"), NoFiles(), final, step=2))  # noqa: B023
        there = final if final.exists() else final.with_name("final.old")
        assert (there / "model.safetensors").read_text() == ("new" if finished_step(there) == 2 else "old")
        save_model(Stub("newest"), NoFiles(), final, step=3)
        assert names_in(final.parent) == ["final"] and finished_step(final) == 3
    assert number > 15


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
    partial = f"{tmp_path}/step_000002.partial"
    named = events.index("rename")
    wanted = {"model.safetensors", "training_state.pt", "controllers.json", "manifest.json"}
    assert {partial, *(f"{partial}/{name}" for name in wanted)} <= set(events[:named])
    assert events[named + 1] == str(tmp_path) and "rmtree" not in events[: named + 2] and "rmtree" in events


def test_the_final_model_knows_its_step(tmp_path):
    final = tmp_path / "final"
    assert finished_step(final) is None
    save_model(Stub("weights"), NoFiles(), final)
    assert finished_step(final) is None
    save_model(Stub("weights"), NoFiles(), final, step=7)
    assert finished_step(final) == 7
    cut(final / "model.safetensors")
    assert finished_step(final) is None


def test_a_small_file_is_replaced_whole(tmp_path, monkeypatch):
    path = tmp_path / "config.yaml"
    write_file(path, "old")
    number = 1
    while killed_at(monkeypatch, number, lambda: write_file(path, "new\n")):
        assert path.read_text() == "old"
        number += 1
    assert path.read_bytes() == b"new\n" and number > 3 and names_in(tmp_path) == ["config.yaml"]


def test_a_small_file_that_cannot_be_written_stays_what_it_was(tmp_path, monkeypatch):
    def fail(_):
        raise OSError(errno.ENOSPC, "")

    write_file(tmp_path / "config.yaml", "old")
    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(
        StorageError, match=r"config\.yaml could not be written \(No space left on device\); what was there"
    ):
        write_file(tmp_path / "config.yaml", "new")
    assert (tmp_path / "config.yaml").read_text() == "old" and names_in(tmp_path) == ["config.yaml"]


# --- a disk that does not take it -------------------------------------------------------------------------------------


def wrapped(error: OSError) -> RuntimeError:
    """As torch.save raises it: the system's error is only the context."""
    try:
        try:
            raise error
        except OSError:
            raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534")  # noqa: B904
    except RuntimeError as outer:
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
    def fail(*_, **__):
        raise error

    save_stub(tmp_path, 4, keep=1, content="old")
    with monkeypatch.context() as patch:
        patch.setattr(*call, fail)
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


def test_a_first_checkpoint_that_fails_says_that_there_is_none(tmp_path):
    (tmp_path / "checkpoints").write_text("a file where the folder should be")
    with pytest.raises(StorageError, match=r"step 1 in .* could not be written \(.*\); there is no earlier one; make"):
        save_stub(tmp_path / "checkpoints", 1)


def test_an_error_of_another_kind_stays_what_it_is(tmp_path):
    def fail():
        raise TypeError("not the disk's fault")

    with pytest.raises(TypeError, match="not the disk"):
        save_stub(tmp_path, 1, before=fail)
    assert names_in(tmp_path) == []


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
    config = config_for(tiny_model_folder)
    model, tokenizer = load_model(config, CPU), load_tokenizer(config)
    optimizer = make_optimizer(model, False)
    train(model, optimizer, (1,))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    save_steps(tmp_path, config, (1,), keep=2)
    weights = (tmp_path / "step_000001" / "model.safetensors").stat().st_size
    assert 30_000 < weights < 120_000 < 2 * weights, "each limit has to hit the file it is meant for"
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        with pytest.raises(StorageError, match=r"step 2 in .* could not be written \(File too large\); step 1 is safe"):
            save_checkpoint(tmp_path, 2, model, tokenizer, optimizer, Controllers(0.1, 0.04), {}, 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert names_in(tmp_path) == ["step_000001"] and newest_checkpoint(tmp_path).name == "step_000001"


def test_an_old_checkpoint_that_cannot_be_removed_does_not_stop_the_run(tmp_path, monkeypatch, warnings):
    save_stub(tmp_path, 1, keep=1)
    with monkeypatch.context() as patch:
        patch.setattr(os, "rmdir", lambda *_, **__: (_ for _ in ()).throw(OSError(errno.EACCES, "")))
        save_stub(tmp_path, 2, keep=1)
    assert newest_checkpoint(tmp_path).name == "step_000002"
    assert len(warnings()) == 1 and "could not be removed (Permission denied)" in warnings()[0]


# --- weights into the model -------------------------------------------------------------------------------------------


def test_weights_are_read_into_the_model_without_a_second_one(tmp_path, tiny_model_folder, monkeypatch):
    config = config_for(tiny_model_folder, "bfloat16")
    model = load_model(config, CPU)
    train(model, make_optimizer(model, False), (1,))
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    other = load_model(config, CPU)
    addresses = {name: tensor.data_ptr() for name, tensor in other.state_dict().items()}
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("a second model"))
    load_weights(tmp_path, other)
    assert same(other.state_dict(), model.state_dict())
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
    assert same(other.state_dict(), model.state_dict())
    assert options["trust_remote_code"] is True


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda w: w.update(norm=w.pop("model.norm.weight")), r"no weights for model.norm.weight"),
        (
            lambda w: w.update({"model.norm.weight": torch.ones(31)}),
            r"norm.weight is \[31\] of .*float32 there and \[32\]",
        ),
        (
            lambda w: w.update({"model.norm.weight": torch.ones(32).bfloat16()}),
            r"norm.weight is \[32\] of torch.bfloat16 there and \[32\] of torch.float32 here; use the config it was",
        ),
        (lambda w: w.pop("model.norm.weight"), r"has no weights for model.norm.weight; use --fresh"),
    ],
)
def test_weights_that_do_not_fit_are_refused(tmp_path, tiny_model_folder, change, complaint):
    shutil.copytree(tiny_model_folder, tmp_path / "saved")
    weights = load_file(tmp_path / "saved" / "model.safetensors")
    change(weights)
    save_file(weights, tmp_path / "saved" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=complaint):
        load_weights(tmp_path / "saved", load_model(config_for(tiny_model_folder), CPU))


def test_an_optimizer_of_another_kind_is_refused(tmp_path, tiny_model_folder):
    config = config_for(tiny_model_folder)
    save_steps(tmp_path, config, (1,), keep=1)
    model = load_model(config, CPU)
    with pytest.raises(ConfigError, match=r"step_000001 does not fit this config: .*; use --fresh to start over"):
        load_checkpoint(tmp_path / "step_000001", model, make_optimizer(model, True), Controllers(0.1, 0.04))


def test_an_adapter_is_saved_and_loaded_alone(tmp_path, tiny_model_folder):
    peft = pytest.importorskip("peft")
    config = config_for(tiny_model_folder, "bfloat16")

    def adapted(seed: int):
        torch.manual_seed(seed)
        adapter = peft.LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
        model = peft.get_peft_model(load_model(config, CPU), adapter)
        return model, make_optimizer(SimpleNamespace(parameters=lambda: filter(is_trained, model.parameters())), False)

    def is_trained(parameter) -> bool:
        return parameter.requires_grad

    model, optimizer = adapted(0)
    trained = SimpleNamespace(parameters=lambda: filter(is_trained, model.parameters()))
    train(trained, optimizer, (1,))
    save_checkpoint(tmp_path, 1, model, load_tokenizer(config), optimizer, Controllers(0.1, 0.04), {}, 1)
    newest = newest_checkpoint(tmp_path)
    assert (newest / "adapter_model.safetensors").exists() and not (newest / "model.safetensors").exists()
    other, other_optimizer = adapted(1)
    assert not same(other.state_dict(), model.state_dict())
    load_checkpoint(newest, other, other_optimizer, Controllers(0.1, 0.04))
    assert same(other.state_dict(), model.state_dict())
    assert same(other_optimizer.state_dict(), optimizer.state_dict())


# --- one process at a time, and how it is stopped ---------------------------------------------------------------------


def child(action) -> tuple[int, int]:
    """A forked process that does `action(ready)`, ready now, and the pipe it said so on. Exit code 99: an error."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            action(lambda text=b"ready": os.write(writer, text))
        except SystemExit as error:
            os._exit(error.code)
        finally:
            os._exit(99)
    os.close(writer)
    assert select.select([reader], [], [], 10)[0], "the child did not get ready"
    assert os.read(reader, 5) == b"ready"
    return pid, reader


def end_of(pid: int, seconds: float = 5) -> int | None:
    """Exit code of a child, minus the signal that killed it; None, and it is killed, if it still runs then."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return None


def test_a_second_process_is_refused_until_the_first_is_dead(tmp_path):
    folder = tmp_path / "runs" / "x"

    def hold(ready):
        with RunLock(folder):
            ready()
            signal.pause()

    pid, _ = child(hold)
    with pytest.raises(ConfigError) as refusal, RunLock(folder):
        pytest.fail("two at once")
    assert str(refusal.value) == (
        f"another process (pid {pid}) is using {folder}; wait for it or use another config name"
    )
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    with RunLock(folder):
        assert names_in(folder) == [".lock"]
    with RunLock(folder), pytest.raises(ConfigError, match=rf"\(pid {os.getpid()}\)"), RunLock(folder):
        pytest.fail("not even the same process")


def test_a_run_that_is_set_aside_leaves_its_name_to_a_new_one(tmp_path):
    folder = tmp_path / "x"
    with RunLock(folder):
        set_aside(folder)
        with RunLock(folder):
            assert names_in(tmp_path) == ["x", "x.1"]


def test_a_lock_in_a_folder_that_is_moved_meanwhile_is_none(tmp_path, monkeypatch):
    folder, calls = tmp_path / "x", []
    import fcntl

    flock = fcntl.flock

    def slow(file, how):
        calls.append(how)
        if len(calls) == 1:
            set_aside(folder)
        return flock(file, how)

    monkeypatch.setattr(fcntl, "flock", slow)
    with RunLock(folder), pytest.raises(ConfigError), RunLock(folder):
        pytest.fail("the new folder was not locked")
    assert len(calls) == 3


def test_a_file_system_without_locks_is_warned_of(tmp_path, monkeypatch, warnings):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "")

    monkeypatch.setattr("fcntl.flock", refuse)
    with RunLock(tmp_path):
        pass
    assert len(warnings()) == 1 and "file system without locks (No locks available)" in warnings()[0]


def test_a_run_folder_that_cannot_be_written_is_said(tmp_path):
    (tmp_path / "runs").write_text("a file")
    with (
        pytest.raises(StorageError, match=r"runs/x could not be written \(Not a directory\); nothing has"),
        RunLock(tmp_path / "runs" / "x"),
    ):
        pass


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_is_noted_and_leaves_a_step_where_asked(number):
    before = signal.getsignal(number)
    with StopSignal() as stop:
        stop.check()
        os.kill(os.getpid(), number)
        assert stop.number == number
        with pytest.raises(Stopped) as stopped:
            stop.check()
        assert stopped.value.code == 128 + number
        assert not isinstance(stopped.value, Exception), "`except Exception` must not swallow it"
    assert signal.getsignal(number) == before and signal.set_wakeup_fd(-1) == -1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_second_signal_ends_the_process_even_in_a_long_call(number):
    def work(ready):
        StopSignal.ONE = 0.01  # in this child only: a busy machine may hold up the first signal
        stop = StopSignal()
        ready()
        hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)  # minutes without a return to the interpreter
        stop.check()

    pid, _ = child(work)
    os.kill(pid, number)
    time.sleep(0.4)
    assert os.waitpid(pid, os.WNOHANG) == (0, 0), "one signal lets it finish"
    os.kill(pid, number)
    assert end_of(pid) == 128 + number


def test_a_signal_that_comes_twice_at_once_is_one():
    """`timeout` sends it to the process and to its group."""

    def work(ready):
        StopSignal.ONE = 30  # in this child only: a busy machine may hold up the second signal
        stop = StopSignal()
        ready()
        while not stop.number:
            time.sleep(0.01)
        time.sleep(0.2)
        raise SystemExit(7)

    pid, _ = child(work)
    os.kill(pid, signal.SIGTERM)
    os.kill(pid, signal.SIGTERM)
    assert end_of(pid) == 7


def test_signals_of_a_forked_child_are_its_own():
    """A pool of a reward function: terminating its workers must end them, and must not stop the training."""

    def work(ready):
        stop = StopSignal()
        for _ in range(3):
            pid, _ = child(lambda ready: (ready(), signal.pause()))
            os.kill(pid, signal.SIGTERM)
            if end_of(pid) != -signal.SIGTERM:
                raise SystemExit(1)
            time.sleep(StopSignal.ONE * 1.5)
        ready()
        raise SystemExit(stop.number)

    pid, _ = child(work)
    assert end_of(pid) == 0


# --- whose run folder it is -------------------------------------------------------------------------------------------


def test_a_config_that_cannot_be_read_back_is_said(tmp_path):
    check_same_experiment(tmp_path, Config())
    for text in ("", "5", "[", "model: 3", "\x00"):
        (tmp_path / "config.yaml").write_text(text)
        with pytest.raises(ConfigError, match=r"config\.yaml cannot be read; restore it, or use --fresh"):
            check_same_experiment(tmp_path, Config())


def test_where_a_model_is_pushed_may_change(tmp_path):
    config = Config()
    (tmp_path / "config.yaml").write_text(dump_config(config))
    config.hub.push_to_hub, config.training.max_steps = True, 7
    check_same_experiment(tmp_path, config)
    config.training.beta = 0.5
    with pytest.raises(ConfigError, match=r"training\.beta = .*, this config says 0\.5"):
        check_same_experiment(tmp_path, config)


# --- final/ -----------------------------------------------------------------------------------------------------------


def test_final_model_is_the_trained_one_for_anybody(tmp_path, tiny_model_folder):
    """Plain transformers, with its own attention, finds the log-probs that the trainer finds."""
    config = config_for(tiny_model_folder)
    model, tokenizer = load_model(config, CPU), load_tokenizer(config)
    problem = Problem(0, (3, 20, 21, 22, 4), "", {})
    episodes = tuple(Episode(ids, (0.0,) * len(ids), True, "") for ids in ((5, 30, 31, 6), (40, 1), (9,)))
    batch = pack([Group(problem, episodes)], CPU, torch.float32)
    untrained = score(model, batch, 1.0).logprobs.detach()
    train(model, make_optimizer(model, False), range(3))
    trained = score(model, batch, 1.0).logprobs.detach()
    assert (trained - untrained).abs().max() > 0.1, "the training must have changed something"

    save_model(model, tokenizer, tmp_path / "final")
    save_model(model, tokenizer, tmp_path / "final")  # over the first
    assert [path.name for path in tmp_path.iterdir()] == ["final"]
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "final")
    assert plain.config._attn_implementation == "sdpa" and plain.dtype == torch.float32
    expected = []
    for episode in episodes:
        ids = torch.tensor([problem.prompt_ids + episode.token_ids])
        logprobs = plain(ids).logits[0].log_softmax(-1)[len(problem.prompt_ids) - 1 : -1]
        expected.append(logprobs.gather(1, torch.tensor(episode.token_ids)[:, None])[:, 0])
    torch.testing.assert_close(trained, torch.cat(expected), atol=1e-4, rtol=1e-4)

    again = AutoTokenizer.from_pretrained(tmp_path / "final")
    assert again.chat_template == tokenizer.chat_template
    assert again("3 * 5 + 7").input_ids == tokenizer("3 * 5 + 7").input_ids
    assert again.eos_token == tokenizer.eos_token


def test_a_model_with_sampling_defaults_of_its_own_can_be_saved(tmp_path, tiny_model_folder):
    """transformers refuses to save a generation config that asks for a temperature without sampling."""
    folder = tmp_path / "model"
    shutil.copytree(tiny_model_folder, folder)
    (folder / "generation_config.json").write_text(
        json.dumps({"temperature": 0.6, "top_p": 0.9, "eos_token_id": [1, 2]})
    )
    config = config_for(folder)
    model, tokenizer = load_model(config, CPU), load_tokenizer(config)
    save_model(model, tokenizer, tmp_path / "final")
    assert (tmp_path / "final" / "model.safetensors").exists()
    assert end_token_ids(model, tokenizer) == (1, 2)


# --- models in --------------------------------------------------------------------------------------------------------


def test_loaded_model_has_no_dropout_and_the_asked_precision(tmp_path, tiny_model_folder):
    folder = tmp_path / "model"
    shutil.copytree(tiny_model_folder, folder)
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | {"attention_dropout": 0.1}))
    model = load_model(config_for(folder, "bfloat16"), CPU)
    assert model.config.attention_dropout == 0.0 and not model.training
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("tokenizer_id", "generation_ids", "config_ids", "expected"),
    [
        (1, 1, 1, (1,)),
        (1, [7, 3], 3, (1, 3, 7)),
        (None, None, [4, 2], (2, 4)),
        (5, None, None, (5,)),
        (0, [0], None, (0,)),
    ],
)
def test_every_end_token_is_collected(tokenizer_id, generation_ids, config_ids, expected):
    config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(eos_token_id=config_ids))
    model = SimpleNamespace(generation_config=SimpleNamespace(eos_token_id=generation_ids), config=config)
    assert end_token_ids(model, SimpleNamespace(eos_token_id=tokenizer_id)) == expected


def test_a_model_that_can_not_end_is_refused():
    config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(eos_token_id=None))
    model = SimpleNamespace(generation_config=None, config=config)
    with pytest.raises(ConfigError, match="no end-of-sequence token"):
        end_token_ids(model, SimpleNamespace(eos_token_id=None))


def test_a_model_without_some_of_its_weights_is_refused(tmp_path, tiny_model_folder):
    """transformers would fill the gap with random numbers and go on."""
    folder = tmp_path / "model"
    shutil.copytree(tiny_model_folder, folder)
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        ConfigError, match=r"is incomplete; it has no weights for model\.layers\.1\.mlp\.up_proj\.weight"
    ):
        load_model(config_for(folder), CPU)


def test_tied_heads_are_not_missing_weights(tiny_model_folder):
    assert "lm_head.weight" not in load_file(tiny_model_folder / "model.safetensors")
    model = load_model(config_for(tiny_model_folder), CPU)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert copy.deepcopy(model).lm_head.weight.abs().sum() > 0


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
def test_device_that_is_not_there(name, fragment):
    with pytest.raises(ConfigError) as refusal:
        resolve_device(name)
    assert fragment in str(refusal.value)


def test_device():
    assert resolve_device("cpu") == CPU
    assert resolve_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")


def test_model_folder_as_given_or_beside_main(tmp_path, tiny_model_folder, monkeypatch):
    assert resolve_model_path(str(tiny_model_folder)) == str(tiny_model_folder)
    monkeypatch.chdir(tiny_model_folder.parent)
    assert resolve_model_path("tiny") == "tiny"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("src.models.PROJECT_FOLDER", tiny_model_folder.parent)
    assert resolve_model_path("tiny") == str(tiny_model_folder)
    for missing in ("./tiny2", "/tiny2", "models/tiny2", "~/tiny2", "a/b/c"):
        with pytest.raises(ConfigError, match=f"there is no folder {missing}; give a folder or a hub id"):
            resolve_model_path(missing)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"empty has no config\.json, so it is not a model in Hugging Face format"):
        resolve_model_path("empty")
