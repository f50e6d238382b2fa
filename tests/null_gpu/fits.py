"""Under LD_PRELOAD=nullgpu.so: whether whole steps of a shipped config fit into a card, by torch's own allocator.

    NULLGPU_GIB=23 tests/null_gpu/run.sh python fits.py SIZE_OF_THE_CONFIG SHAPE [KEY=VALUE ...]

The longest pass, as before a run, then two steps of a rollout of full length and an update of three longest passes.
What a completion says is not computed, so half of the slots end every third time that one looks. The last line is JSON.
"""

import json
import os
import sys
import tempfile
from collections import Counter
from functools import partial

import torch
import worker  # first: it imports src before torch
import yaml

from benchmarks import gpu_first
from src.config import load_config
from src.engine import cuda_decoding, sampler
from src.engine.decoding import JoinedAttention
from src.engine.packing import apart
from src.train_grpo import objective, wanted

KEYS = ("batch_size", "num_questions_per_batch", "max_prompt_len", "max_gen_len", "max_tokens_per_microbatch",
        "inference_batch_size", "loss_type", "beta")  # fmt: skip


def look(decoder) -> torch.Tensor:
    """In place of SlotDecoder.look, which would wait for what is not computed."""
    if getattr(decoder, "seen", None) != decoder.waiting:  # some have just started
        decoder.seen, decoder.looks = decoder.waiting, 0
        return torch.full((decoder.rows,), decoder.waiting == 0)
    decoder.looks += 1
    ended = torch.zeros(decoder.rows, dtype=torch.bool)
    if decoder.looks % 3 == 0:
        ended[decoder.rows // 2 if decoder.looks < 24 else 0 :] = True
    return ended


def without_numbers() -> None:
    """Neither is pinned memory filled, nor is anything compared or read."""
    zeros = torch.zeros
    torch.zeros = lambda *a, **k: torch.empty(*a, **k) if k.get("pin_memory") else zeros(*a, **k)
    torch.Tensor.pin_memory = lambda x, *_: torch.empty(x.shape, dtype=x.dtype, pin_memory=True)
    worker.nothing_is_compared()
    sampler.SlotDecoder.look = look
    JoinedAttention.arrange = lambda self, *_: setattr(self, "filled", self.capacity // 2)

    def cut(tokenizer, tokens, logprobs, settings):
        return [gpu_first.groups_of(1, 1, 4, 8)[0].episodes[0]] * len(tokens)

    sampler.cut_episodes = cut


def gib() -> list[float]:
    """The most that was allocated and reserved since the last time."""
    found = [round(x() / 2**30, 1) for x in (torch.cuda.max_memory_allocated, torch.cuda.max_memory_reserved)]
    torch.cuda.reset_peak_memory_stats()
    return found


def main() -> None:
    size, shape, *given = sys.argv[1:]
    config = load_config(f"configs/configs_{size}/config_kl_beta0.04_{size}.yaml")
    keys = {name: getattr(config.training, name) for name in KEYS}
    keys |= {name: yaml.safe_load(value) for name, value in (pair.split("=") for pair in given)}
    without_numbers()
    options = gpu_first.parse_arguments(["--output", tempfile.mkdtemp()])
    made = gpu_first.engine_of(options, shape, {"gradient_checkpointing": config.model.gradient_checkpointing}, **keys)
    training = made.config.training
    made.rehearse(partial(objective, training), **wanted(training, True))
    found = {"card": torch.cuda.get_device_properties(0).total_memory / 2**30, "rehearsal": gib()}
    captures, capture = Counter(), cuda_decoding.StepRunner.capture
    cuda_decoding.StepRunner.capture = lambda *a: captures.update([made.step]) or capture(*a)
    for step in (1, 2):
        made.begin(step)
        problems = gpu_first.problems_of(training.num_questions_per_batch, training.max_prompt_len)
        made.sample(problems, training.batch_size // training.num_questions_per_batch, step)
        found[f"rollout {step}"] = gib()
        gpu_first.update_of(made, apart(3 * made.limit.cut(made.longest_groups(), False)[0]))
        made.optim_step(1e-6)
        found[f"update {step}"] = gib()
    slots = [slots for slots, _ in made.rooms.sizes.values()]
    print(json.dumps(found | {"tokens": made.limit.tokens, "slots": slots, "captures": [captures[1], captures[2]],
                      "graphs": cuda_decoding.StepRunner.works}))  # fmt: skip


if __name__ == "__main__":
    main()
    sys.stdout.flush()
    os._exit(0)  # what was not computed would fail as it is taken apart
