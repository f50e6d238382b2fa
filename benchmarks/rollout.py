"""Rollouts against transformers: model.generate (batched, left-padded, sampling) and generate_batch, in turn.

    uv run python -m benchmarks.rollout --shape smollm2-135m          # on a CPU: 2 to 10 minutes
    uv run python -m benchmarks.rollout --shape models/countdown-tiny --prompts 64 --slots 512
    uv run python -m benchmarks.rollout --shape tiny --quick          # seconds: only shows that it runs

A shape is a config with random weights, so nothing is downloaded; a path is loaded. Lengths: `fixed`, where every
completion has --new_tokens, and `long_tail`: quantiles of an exponential distribution cut at --new_tokens, with a mean
of a third of it, shuffled. Random weights do not end by themselves, so every contestant is told each row's length:
generate by a StoppingCriteria (one comparison a step), ours by the same comparison after each token, generate_batch by
max_new_tokens of each request. No end token is set. All contestants sample at temperature 1 from the whole vocabulary,
and a contestant's tokens/s counts only the tokens up to each row's length, prompts' prefill included in the time.

The floor is the time of the model's matrix products alone, as torch runs them at the row counts of each step, measured
in the same process. On a machine that others use, look at the minima, or with one thread (OMP_NUM_THREADS=1) at
the seconds of the processor, which waiting does not lengthen. The last line of stdout is one JSON document.
"""

import argparse
import copy
import json
import math
import os
import platform
import statistics
import time
from collections import Counter

import src  # noqa: F401  before torch: how its threads wait

# isort: split
import torch
import transformers
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    ContinuousBatchingConfig,
    GenerationConfig,
    LlamaConfig,
    Qwen2Config,
    Qwen3Config,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.generation.continuous_batching.continuous_api import WorkloadHints

from src.engine.attention import ATTENTION_NAME
from src.engine.packing import pack
from src.engine.room import fit_to_memory
from src.engine.sampler import SYNC_EVERY, SlotDecoder, rollout
from src.engine.scoring import score
from src.engine.token_choice import SamplingSettings
from src.records import Problem


def shape(kind, vocab_size, hidden, intermediate, layers, heads, kv_heads, tied=True):
    """A transformers config; the model's own end tokens play no part."""
    return kind(
        vocab_size=vocab_size,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=32768,
        tie_word_embeddings=tied,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )


SHAPES = {
    "tiny": shape(LlamaConfig, 129, 128, 384, 3, 4, 4),
    "smollm2-135m": shape(LlamaConfig, 49152, 576, 1536, 30, 9, 3),
    "qwen2.5-0.5b": shape(Qwen2Config, 151936, 896, 4864, 24, 14, 2),
    "qwen3-0.6b": shape(Qwen3Config, 151936, 1024, 3072, 28, 16, 8),
    "1.5b": shape(Qwen2Config, 151936, 1536, 8960, 28, 12, 2),
    "3b": shape(Qwen2Config, 151936, 2048, 11008, 36, 16, 2),
    "7b": shape(Qwen2Config, 152064, 3584, 18944, 28, 28, 4, tied=False),
}


class NoText:
    """In place of a tokenizer: turning tokens into text is not what is measured."""

    def batch_decode(self, rows, **options):
        return [""] * len(rows)


class EndAtTarget(StoppingCriteria):
    """A row of generate is done at its own length."""

    def __init__(self, targets: Tensor, prompt_width: int):
        self.targets, self.prompt_width = targets, prompt_width

    def __call__(self, input_ids, scores, **kwargs):
        return input_ids.shape[1] - self.prompt_width >= self.targets


class TargetDecoder(SlotDecoder):
    """Ours, ending each episode at its own length. In one wave, so that an episode's number is its row."""

    targets: Tensor
    live_counts: Counter  # row counts of the steps, for the floor

    def choose(self, hidden: Tensor, slots) -> None:
        super().choose(hidden, slots)
        self.ended[slots] |= self.lengths[slots] + 1 >= self.targets[self.episodes[slots]]

    def block(self) -> None:
        super().block()
        self.live_counts[self.rows] += 1 if self.attention.moves_freely else SYNC_EVERY


def load(options) -> tuple:
    """The same weights twice: with our attention, and as transformers ships the model."""
    dtype = getattr(torch, options.dtype)
    torch.manual_seed(0)
    if options.shape in SHAPES:
        config = SHAPES[options.shape]
        with torch.device(options.device):  # on a CPU random weights of 1.5B take half a minute
            ours = AutoModelForCausalLM.from_config(
                copy.deepcopy(config), attn_implementation=ATTENTION_NAME, dtype=dtype
            )
    else:
        config = AutoConfig.from_pretrained(options.shape)
        ours = AutoModelForCausalLM.from_pretrained(options.shape, attn_implementation=ATTENTION_NAME, dtype=dtype)
    with torch.device("meta"):
        theirs = AutoModelForCausalLM.from_config(copy.deepcopy(config), attn_implementation="sdpa", dtype=dtype)
    # the same tensors, not a copy; buffers that are not saved (rotary frequencies) come from ours too
    theirs.load_state_dict(ours.state_dict(), assign=True)
    theirs.tie_weights()
    for name, module in ours.named_modules():
        for key, value in module.named_buffers(recurse=False):
            theirs.get_submodule(name).register_buffer(key, value, persistent=False)
    device = torch.device(options.device)
    return ours.to(device).eval().requires_grad_(False), theirs.to(device).eval().requires_grad_(False)


def long_tail(rows: int, longest: int) -> list[int]:
    """Quantiles of an exponential distribution, cut at `longest`, with a mean of a third of it; shuffled."""
    draws = [-math.log(1 - (index + 0.5) / rows) for index in range(rows)]
    low, high = 0.0, float(longest)
    for _ in range(60):  # bisection for the scale
        middle = (low + high) / 2
        mean = sum(min(longest, max(1, round(middle * draw))) for draw in draws) / rows
        low, high = (middle, high) if mean < longest / 3 else (low, middle)
    lengths = [min(longest, max(1, round(low * draw))) for draw in draws]
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(5)).tolist()
    return [lengths[index] for index in order]


def run_ours(model, problems, targets: list[int], options) -> None:
    settings = SamplingSettings(max(targets), 1.0, options.slots, (), seed=1)
    slots, prompts = fit_to_memory(model, problems, options.samples, settings)
    assert prompts == len(problems), "one wave: raise --slots or lower --prompts"
    TargetDecoder.targets = torch.tensor(targets, device=model.device)
    with torch.inference_mode():
        TargetDecoder(model, NoText(), problems, options.samples, slots, settings).run()


def run_generate(model, problems, targets: list[int], options) -> None:
    width = max(len(problem.prompt_ids) for problem in problems)
    rows = [problem.prompt_ids for problem in problems for _ in range(options.samples)]
    ids = torch.tensor([(0,) * (width - len(row)) + row for row in rows], device=model.device)  # [rows, width]
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=model.device)
    stop = StoppingCriteriaList([EndAtTarget(torch.tensor(targets, device=model.device), width)])
    sampling = GenerationConfig(
        do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=max(targets), pad_token_id=0
    )
    with torch.inference_mode():
        output = model.generate(ids, attention_mask=mask, generation_config=sampling, stopping_criteria=stop)
    assert output.shape[1] == width + max(targets)


def run_generate_batch(model, problems, targets: list[int], options) -> None:
    rows = [list(problem.prompt_ids) for problem in problems for _ in range(options.samples)]
    sampling = GenerationConfig(do_sample=True, temperature=1.0, top_k=0, top_p=1.0, eos_token_id=-1, pad_token_id=0)
    options = {"workload_hints": WorkloadHints(max(map(len, rows)), max(targets), len(rows))}
    if (
        model.device.type == "cpu"
    ):  # by itself it sizes its cache, and a mask over all of it, by the memory of the machine
        pages = sum(math.ceil((len(row) + target) / 32) + 1 for row, target in zip(rows, targets, strict=True))
        options["continuous_batching_config"] = ContinuousBatchingConfig(
            block_size=32, num_blocks=pages, max_batch_tokens=sum(map(len, rows[:8]))
        )
    with model.continuous_batching_context_manager(sampling, timeout=60, **options) as manager:
        for row, target in zip(rows, targets, strict=True):
            manager.add_request(row, max_new_tokens=target)
        lengths = []
        while len(lengths) < len(rows):
            result = manager.get_result(timeout=5)
            if result is not None and result.is_finished():
                lengths.append(len(result.generated_tokens))
            elif result is None and not manager.is_running():
                raise RuntimeError(f"stopped after {len(lengths)} of {len(rows)} requests")
    assert sorted(lengths) == sorted(targets), "generate_batch made other lengths"


CONTESTANTS = {"ours": run_ours, "generate": run_generate, "generate_batch": run_generate_batch}


def timed(function, device: torch.device) -> tuple[float, float]:
    """Seconds by the clock, and of the processors."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    started, used = time.perf_counter(), time.process_time()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started, time.process_time() - used


def matmul_seconds(model, rows: int, with_head: bool = True) -> float:
    """Seconds of all of the model's linear layers, one after the other, at this many rows; the best of 3."""
    linears = [module for module in model.modules() if isinstance(module, torch.nn.Linear)]
    head = model.get_output_embeddings()
    linears = [module for module in linears if with_head or module is not head]
    inputs = {
        width: torch.randn(rows, width, device=model.device, dtype=model.dtype)
        for width in {module.in_features for module in linears}
    }

    def products():
        for module in linears:
            module(inputs[module.in_features])

    with torch.inference_mode():
        products()
        return min(timed(products, model.device)[0] for _ in range(3))


def floor_seconds(model, problems, live_counts: Counter) -> float:
    """Matrix products alone: every decode step at its row count, the prompts once. Row counts are rounded up to 2^k."""
    rounded = Counter()
    for rows, steps in live_counts.items():
        rounded[2 ** math.ceil(math.log2(rows))] += steps
    prompt_tokens = sum(len(problem.prompt_ids) for problem in problems)
    prefill = matmul_seconds(model, prompt_tokens, with_head=False)
    return prefill + sum(steps * matmul_seconds(model, rows) for rows, steps in rounded.items())


def read_bandwidth(device: torch.device) -> float:
    """Bytes a second of a large copy, reading and writing counted."""
    source = torch.ones(2**28 if device.type == "cuda" else 2**26, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / min(timed(lambda: target.copy_(source), device)[0] for _ in range(4))


def measure(models, problems, targets: list[int], options, skipped: dict[str, str]) -> dict:
    """All contestants in turn, several times."""
    ours, theirs = models
    seconds = {name: [] for name in CONTESTANTS if name not in skipped}
    processor = {name: [] for name in seconds}
    counts = Counter()
    for repetition in range(options.repetitions + 1):  # the first one warms up
        for name in list(seconds):
            TargetDecoder.live_counts = Counter()
            try:
                function, model = CONTESTANTS[name], ours if name == "ours" else theirs
                took, used = timed(lambda: function(model, problems, targets, options), ours.device)  # noqa: B023
            except Exception as error:
                if name == "ours":
                    raise
                skipped[name] = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
                del seconds[name]
                continue
            counts = TargetDecoder.live_counts if name == "ours" else counts
            if repetition:
                seconds[name].append(took)
                processor[name].append(used)
            print(
                f"  {name:15} {took:8.2f} s ({used:.2f} s of processors) {sum(targets) / took:10,.0f} tokens/s",
                flush=True,
            )
    floor = floor_seconds(ours, problems, counts)
    steps = sum(counts.values())
    moved = sum(parameter.nbytes for parameter in ours.parameters()) * steps
    result = {
        "tokens": sum(targets),
        "steps": steps,
        "tokens_per_second": {name: sum(targets) / statistics.median(values) for name, values in seconds.items()},
        "ms_per_step": 1000 * statistics.median(seconds["ours"]) / steps,
        "seconds": seconds,
        "processor_seconds": processor,
        "matmul_floor_seconds": floor,
        "share_of_matmul_floor": floor / min(seconds["ours"]),
        "share_of_bandwidth_floor": moved / read_bandwidth(ours.device) / min(seconds["ours"]),
    }
    for name in set(seconds) - {"ours"}:
        result[f"times_{name}"] = {
            "median": statistics.median(seconds[name]) / statistics.median(seconds["ours"]),
            "minimum": min(seconds[name]) / min(seconds["ours"]),
            "processor": min(processor[name]) / min(processor["ours"]),
        }
    return result


def mismatch(model, problems) -> dict[str, float]:
    """Absolute difference between the sampler's log-probs and the trainer's, in nats."""
    settings = SamplingSettings(16, 1.0, 64, (), seed=3)
    with torch.inference_mode():
        groups = rollout(model, NoText(), problems[:4], 4, settings)
        row = pack(groups, model.device, model.dtype)
        difference = (score(model, row, 1.0).logprobs - row.batch.sampled_logprobs).abs()
    return {"mean": float(difference.mean()), "max": float(difference.max())}


def machine() -> dict:
    """What a figure depends on beside the options."""
    cuda = torch.cuda.is_available()
    return {
        "device": torch.cuda.get_device_name() if cuda else platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg()[0],
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="smollm2-135m", help=f"{', '.join(SHAPES)}, or a model's path")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--samples", type=int, default=8, help="completions a prompt")
    parser.add_argument("--prompt_tokens", type=int, default=118, help="about; prompts are ragged")
    parser.add_argument("--new_tokens", type=int, default=128)
    parser.add_argument("--slots", type=int, default=512)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--lengths", nargs="+", default=["fixed", "long_tail"], choices=("fixed", "long_tail"))
    parser.add_argument("--skip", nargs="*", default=[], choices=("generate", "generate_batch"))
    parser.add_argument("--quick", action="store_true", help="few tokens, one repetition")
    options = parser.parse_args()
    if options.quick:
        options.repetitions, options.new_tokens, options.prompt_tokens = 1, min(options.new_tokens, 12), 20
    return options


def main() -> None:
    options = parse_arguments()
    transformers.logging.set_verbosity_error()
    models = load(options)
    vocabulary = models[0].config.get_text_config().vocab_size
    generator = torch.Generator().manual_seed(1)
    problems = []
    for index in range(options.prompts):
        length = max(1, options.prompt_tokens + (0, -6, 3, 0, -2, 5)[index % 6])
        ids = torch.randint(2, vocabulary, (length,), generator=generator).tolist()
        problems.append(Problem(index, tuple(ids), "", {}))
    rows = options.prompts * options.samples
    result = {
        "options": vars(options),
        **machine(),
        "parameters": sum(parameter.numel() for parameter in models[0].parameters()),
        "skipped": {name: "by --skip" for name in options.skip},
    }
    for kind in options.lengths:
        targets = [options.new_tokens] * rows if kind == "fixed" else long_tail(rows, options.new_tokens)
        print(f"{kind}: {rows} completions, {sum(targets)} tokens", flush=True)
        result[kind] = measure(models, problems, targets, options, result["skipped"])
    result["mismatch"] = {options.dtype: mismatch(models[0], problems)}
    other = "float32" if options.dtype == "bfloat16" else "bfloat16"
    result["mismatch"][other] = mismatch(models[0].to(getattr(torch, other)), problems)
    result["load_average_after"] = os.getloadavg()[0]
    print(json.dumps(result))


if __name__ == "__main__":
    main()
