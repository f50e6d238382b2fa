"""Under LD_PRELOAD=nullgpu.so: what a GPU would be asked to do, as JSON. See tests/test_null_gpu.py.

tests/null_gpu/run.sh python worker.py [SHAPE LAYERS]       # shapes are those of benchmarks/rollout.py
"""

import ctypes
import json
import os
import sys
import tempfile
import time
from collections import Counter
from dataclasses import replace
from unittest.mock import patch

import src  # noqa: F401  before torch

# isort: split
import numpy as np
import torch

from benchmarks import gpu_first
from benchmarks.rollout import SHAPES
from src.engine import cuda_decoding, layers, lighter
from src.engine.decoding import cache_shape
from src.engine.packing import apart, pack
from src.engine.plan import memory_plan, of_update
from src.engine.sampler import SYNC_EVERY, SlotDecoder
from src.engine.token_choice import SamplingSettings

SHAPE, LAYERS = "qwen2.5-0.5b", 4
GPU = ctypes.CDLL(None)
GPU.nullgpu_kernels.restype = ctypes.c_uint64
waits: Counter[str] = Counter()


@ctypes.CFUNCTYPE(None, ctypes.c_char_p)
def on_wait(what):
    waits[what.decode()] += 1


class Watch:
    """What is launched, and how often the host waits for the device."""

    def __enter__(self):
        waits.clear()
        GPU.nullgpu_reset()
        GPU.nullgpu_on_sync(on_wait)
        return self

    def __exit__(self, *_):
        GPU.nullgpu_on_sync(ctypes.cast(None, type(on_wait)))
        self.kernels, self.waits = int(GPU.nullgpu_kernels()), sum(waits.values())


def decode(made, slots: int = 16) -> dict:
    """A decode step of the one layout or the other: its kernels, and whether it can be captured."""
    settings = SamplingSettings(64, 1.0, slots, (), seed=1)
    found = {}
    for name, half in (("flash", None), ("padded", ())):
        with (
            torch.inference_mode(),
            cuda_decoding.own_stream(made.model.device),
            patch.object(cuda_decoding, "HALF", cuda_decoding.HALF if half is None else half),
        ):
            decoder = SlotDecoder(made.model, None, gpu_first.problems_of(2, 40), 8, slots, settings)
            decoder.start(torch.arange(slots, device=made.model.device))
            decoder.attention.arrange(np.arange(slots) // 8, np.full(slots, 4), np.zeros(slots, bool))
            decoder.attention.begin_block(SYNC_EVERY)
            decoder.step()
            with Watch() as step:
                decoder.step()
            times = []
            for _ in range(12):
                started = time.process_time()
                decoder.step()
                times.append(time.process_time() - started)
            graph = decoder.runner.capture(decoder.step)
        found[name] = {"layout": type(decoder.attention).__name__, "kernels": step.kernels, "waits": step.waits,
                       "captured": graph is not None, "host_ms": round(1000 * min(times), 1)}  # fmt: skip
    return found


def update(made) -> dict:
    """Forward, backward and optimizer of two passes."""
    groups = gpu_first.groups_of(2, 4, 40, 24)
    gpu_first.update_of(made, groups)
    made.optim_step(1e-6)
    with Watch() as passes:
        gpu_first.update_of(made, groups)
    with Watch() as optimizer:
        made.optim_step(1e-6)
    shared = [replace(group, problem=replace(group.problem, prompt_ids=(7,) * 20 + group.problem.prompt_ids))
              for group in groups]  # fmt: skip
    tokens = pack(shared, made.model.device, made.model.dtype).input_ids.numel()
    gpu_first.update_of(made, shared)  # with a head that all prompts share: other keys, the same rules
    return {"kernels": passes.kernels, "waits": passes.waits, "optimizer": optimizer.kernels,
            "optimizer_waits": optimizer.waits, "without_head": sum(g.tokens() for g in shared) - tokens}  # fmt: skip


def peak(options) -> dict:
    """The longest pass of the shipped config of 0.5b, twice, and what was planned."""
    sizes = {"batch_size": 256, "num_questions_per_batch": 16, "max_prompt_len": 256, "max_gen_len": 1024}
    rooms = {"max_tokens_per_microbatch": 16384, "inference_batch_size": 256}
    made = gpu_first.engine_of(options, SHAPE, loss_type="kl", beta=0.04, **sizes, **rooms)
    planned = of_update(memory_plan(made.config, made.model, made.anchor))
    batch = made.limit.cut(made.longest_groups(), False)[0]
    gpu_first.peak_gib(options)
    for _ in range(2):
        gpu_first.update_of(made, apart(2 * batch))
        made.optim_step(1e-6)
        taken = gpu_first.peak_gib(options)  # of the second: the states come with the first
    return {"planned": planned / 2**30, "taken": taken}


def nothing_is_compared() -> None:
    """As nothing is computed."""
    torch.testing.assert_close = lambda *_, **__: None
    lighter.gives_the_same = lambda *_: True
    layers.differ = lambda *_: False


def main() -> None:
    options = gpu_first.parse_arguments(["--output", tempfile.mkdtemp()])
    nothing_is_compared()
    name, depth = sys.argv[1:] or (SHAPE, LAYERS)
    found = {} if sys.argv[1:] else {"peak": peak(options)}
    chosen = SHAPES[name]
    chosen.num_hidden_layers, chosen.layer_types = int(depth), chosen.layer_types[: int(depth)]
    made = gpu_first.engine_of(options, name)
    assert cache_shape(made.model)[0] == int(depth)
    print(json.dumps(found | {"decode": decode(made), "update": update(made)}), flush=True)
    os._exit(0)  # what was not computed would fail as it is taken apart


if __name__ == "__main__":
    main()
