"""Fixtures that several test files share; and the tests on two cores, one thread each."""

import ctypes
import os
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

import src  # noqa: F401  before torch: how its threads wait

WORKERS = 2
IS_WORKER = "PYTEST_XDIST_WORKER" in os.environ
if IS_WORKER:
    os.environ["OMP_NUM_THREADS"] = "1"  # read when torch is imported, also by the processes that tests start

if not any(Path(device).exists() for device in ("/dev/nvidia0", "/dev/dxg")):  # dxg: a GPU of Windows
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported: its kernels run on the CPU then, by NumPy

# a bare machine with a GPU has torch and transformers: what needs more is left out there, and the rest still runs
NEEDS = {"test_lora.py": "peft", "test_sinkhorn.py": "ot"}
collect_ignore = [file for file, package in NEEDS.items() if find_spec(package) is None]


def pytest_report_header() -> list[str]:
    return [f"{file} is left out: {NEEDS[file]} is not installed" for file in collect_ignore]


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config) -> None:
    """Two workers where pytest-xdist is installed and nobody asked for another number; none under a debugger."""
    options = config.option
    if IS_WORKER or options.usepdb or options.collectonly or not config.pluginmanager.hasplugin("xdist"):
        return
    if options.numprocesses is None:
        options.numprocesses, options.dist = min(WORKERS, os.cpu_count() or 1), "worksteal"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """A worker sends its report as UTF-8, and hostile texts of some tests are not."""
    report = yield
    report.sections = [(name, text.encode("utf-8", "backslashreplace").decode()) for name, text in report.sections]
    return report


@pytest.fixture(autouse=True)
def nothing_goes_on() -> Iterator[None]:
    """What an engine last did in a test is not told of in the output of the next one."""
    yield
    if "src.run.console" in sys.modules:
        sys.modules["src.run.console"].progress.rest()


@pytest.fixture(scope="session")
def tiny_model_folder(tmp_path_factory) -> Path:
    """A random Llama of 20 thousand parameters with the tokenizer of countdown-tiny, in Hugging Face format."""
    import torch  # here, so that tests without a model do not wait for it
    from transformers import LlamaConfig, LlamaForCausalLM

    from src.make_tiny_model import build_tokenizer

    tokenizer = build_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=48,
        max_position_embeddings=256,
        initializer_range=0.3,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    state = torch.random.get_rng_state()
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    torch.random.set_rng_state(state)
    folder = tmp_path_factory.mktemp("models") / "tiny"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


WAYS = ["tiles", "dots", "wide", "wide with AVX2"]


@pytest.fixture(params=WAYS)
def way(request, monkeypatch):
    """How bf16 is multiplied: by tiles (AMX), by dot products, in fp32; where this processor can."""
    import torch  # here and below, because the number of threads is read when it is imported

    from src.engine import decode_loops, wide_products

    wanted, has_tiles = request.param, wide_products.has_tiles()
    if wanted == "tiles" and not has_tiles:
        pytest.skip("this processor has no tiles")
    has_dots = torch.cpu._is_avx512_bf16_supported() and torch.backends.cpu.get_cpu_capability() == "AVX512"
    if wanted == "dots" and not has_dots:
        pytest.skip("this processor has no dot products of bf16")
    monkeypatch.setattr(wide_products, "has_tiles", lambda: wanted == "tiles")
    known = torch.cpu.get_capabilities() | {"cpu_name": "AMD" if wanted == "dots" else "Intel"}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: known)
    if wanted == "wide with AVX2":
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    cached = wide_products.faster_with, decode_loops.functions, decode_loops.product_works
    for one in cached:
        one.cache_clear()
    try:
        used = ctypes.c_int.in_dll(decode_loops.loops(torch.bfloat16), "has_tiles").value
        assert used == (wanted == "tiles")
        assert decode_loops.shape_for(torch.bfloat16).dots == (wanted in ("tiles", "dots"))
        yield wanted
    finally:
        for one in cached:
            one.cache_clear()


@pytest.fixture(params=["as it is", "AVX2"])
def capability(request, monkeypatch):
    """The loops for vectors of this processor, and where it has longer ones, those for AVX2."""
    import torch

    if request.param == "AVX2":
        if torch.backends.cpu.get_cpu_capability() != "AVX512":
            pytest.skip("this processor has no longer ones")
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
