"""The first minutes on a GPU: does it run, is it right, what costs what. What is known is on the disk at once.

    python3 -m benchmarks.gpu_first --output OUT                  # about 8 minutes on an H200
    python3 -m benchmarks.gpu_first --output OUT --stages train   # 5 minutes: trains the embedded model end to end
    python3 -m benchmarks.gpu_first --output OUT --quick --device cpu --dtype float32  # anywhere: shows that it runs

Each stage is a process of its own with a limit, so that what one breaks does not cost the others: a line of
OUT/results.jsonl for every result, what it prints in OUT/log.txt. Weights are random and made on the device; nothing is
downloaded. Not needed: pot, peft, reasoning-gym, TRL; `train` needs tensorboard. The last line is one JSON document.
"""

import argparse
import copy
import json
import os
import random
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

PROJECT = Path(__file__).resolve().parent.parent
LIMITS = {  # seconds of a stage
    "environment": 60, "tests": 150, "mismatch": 60, "decode": 90, "update": 110, "optimizer": 45, "peaks": 90,
    "step": 100, "generate": 100, "train": 290,
}  # fmt: skip
IN_ALL = [name for name in LIMITS if name != "train"]
TESTS = [
    "test_gpu.py",
    "test_kernels.py",
    "test_layers.py",
    "test_optim.py",
    "test_reference.py",
    "test_profiling.py",
]  # those that a bare machine has


def note(options, **values) -> None:
    """A result: on the screen and on the disk."""
    line = json.dumps({"stage": options.stage, "seconds": round(time.time() - options.began, 1), **values})
    print(line, flush=True)
    with (Path(options.output) / "results.jsonl").open("a") as file:
        file.write(line + "\n")


def timed(options, work: Callable, times: int = 10) -> float:
    """Milliseconds of one of so many in a row, after one that warms up."""
    from benchmarks.step import synchronize

    work()
    synchronize(options.device)
    started = time.perf_counter()
    for _ in range(times):
        work()
    synchronize(options.device)
    return round(1000 * (time.perf_counter() - started) / times, 4)


def peak_gib(options) -> float:
    """Largest amount of memory since the last look."""
    import torch

    from src.engine.memory import peak_memory

    found = peak_memory(torch.device(options.device)) / 2**30
    if options.device != "cpu":
        torch.cuda.reset_peak_memory_stats()
    return round(found, 2)


def random_model(options, shape: str, config, place):
    """What src.engine.models.load_model gives, with random weights; with --quick of the smallest shape."""
    import torch
    from transformers import AutoModelForCausalLM

    from benchmarks.rollout import SHAPES
    from src.engine.attention import ATTENTION_NAME

    chosen = copy.deepcopy(SHAPES["tiny" if options.quick else shape])
    torch.manual_seed(0)
    with torch.device(options.device):  # on a CPU random weights of 1.5B take half a minute
        model = AutoModelForCausalLM.from_config(
            chosen, dtype=getattr(torch, config.model.dtype), attn_implementation=ATTENTION_NAME
        )
    if config.model.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        return model.to(place).train()
    return model.to(place).eval()


def engine_of(options, shape: str, model: dict | None = None, **training):
    """An engine with random weights whose completions do not end by themselves."""
    from benchmarks.rollout import NoText
    from src.config import Config, DataConfig, ModelConfig, TrainingConfig
    from src.engine import Engine, build

    embedded = str(PROJECT / "models" / "countdown-tiny")  # only for its tokenizer
    config = Config(
        ModelConfig(pretrained_model_path=embedded, dtype=options.dtype, device=options.device, **(model or {})),
        DataConfig(),
        TrainingConfig(**{"learning_rate": 1e-6, "memory_efficient_adamw": True} | training),
    )
    with patch.object(build, "load_model", partial(random_model, options, shape)):
        engine = Engine(config)
        engine.load_model()
    engine.eos_ids, engine.tokenizer = (), NoText()
    engine.begin(1)
    return engine


def problems_of(count: int, length: int) -> list:
    """Prompts of random tokens."""
    from src.records import Problem

    generator = random.Random(1)
    return [Problem(index, tuple(generator.choices(range(2, 129), k=length)), "", {}) for index in range(count)]


def groups_of(count: int, samples: int, prompt: int, new: int) -> list:
    """Completions of random tokens with random advantages, weighted as in an update."""
    from src.records import Episode, Group

    generator = random.Random(2)

    def episode():
        advantages = (generator.gauss(0, 1),) * new
        ids = tuple(generator.choices(range(2, 129), k=new))
        return Episode(ids, (-6.0,) * new, True, "", advantages=advantages, token_weight=1 / (count * samples * new),
                       episode_weight=1 / (count * samples))  # fmt: skip

    return [Group(problem, tuple(episode() for _ in range(samples))) for problem in problems_of(count, prompt)]


def update_of(engine, groups) -> None:
    """forward_backward of the loop's own loss."""
    from src.train_grpo import objective, wanted

    training = engine.config.training
    pulls = training.loss_type != "none"
    engine.forward_backward(groups, partial(objective, training), **wanted(training, pulls))


# ---------------------------------------------------------------------------------------------------------------------
# The stages
# ---------------------------------------------------------------------------------------------------------------------


def environment(options) -> None:
    """Versions, ceilings, and what a small kernel costs in a graph and without."""
    import torch

    from benchmarks.rollout import machine
    from src.engine.attention import VARLEN_HAS_GQA, varlen_attn
    from src.engine.profiling import ceilings

    device = torch.device(options.device)
    found = dict(zip(("flops", "bytes"), ceilings(device, getattr(torch, options.dtype)), strict=True))
    note(options, **machine(), **found, varlen=varlen_attn is not None, gqa=varlen_attn is not None and VARLEN_HAS_GQA)
    if options.device == "cpu":
        return
    x, graph, stream = torch.ones(256, 1536, device=device), torch.cuda.CUDAGraph(), torch.cuda.Stream()

    def chain() -> None:
        for _ in range(1000):
            x.add_(1)

    with torch.cuda.stream(stream):
        chain()
        with torch.cuda.graph(graph, stream=stream):
            chain()
        note(options, free_gib=round(torch.cuda.mem_get_info()[0] / 2**30, 1),
             us_of_a_small_kernel_in_a_graph=timed(options, graph.replay),
             us_of_one_without=timed(options, chain))  # fmt: skip


def tests(options) -> None:
    """The tests that need a GPU."""
    files = [str(PROJECT / "tests" / name) for name in (TESTS[:1] if options.quick else TESTS)]
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-p", "no:cacheprovider", "--tb=short", *files]
    note(options, pytest=subprocess.run(command, cwd=PROJECT).returncode)


def mismatch(options) -> None:
    """Log-probs of sampler and trainer, in each layout, with graphs and without; with weights that have preferences."""
    import torch

    from src.engine import cuda_decoding

    engine = engine_of(options, options.shape, max_gen_len=8 if options.quick else 96, max_prompt_len=128)
    with torch.no_grad():
        engine.model.get_output_embeddings().weight.mul_(4)
    tokens = {}
    for layout, half in (("flash", cuda_decoding.HALF), ("padded", ())):
        for graphs in (True, False):
            with patch.object(cuda_decoding, "HALF", half), patch.object(cuda_decoding.StepRunner, "works", graphs):
                groups = engine.sample(problems_of(6, 100), 4, stream=1, temperature=1.0)
                still = cuda_decoding.StepRunner.works
            engine.drawn.clear()
            scored = [episode for group in engine.score(groups) for episode in group.episodes]
            gaps = [abs(a - b) for e in scored for a, b in zip(e.logprobs, e.old_logprobs, strict=True)]
            tokens[layout, graphs] = [episode.token_ids for episode in scored]
            note(options, layout=layout, graphs=graphs, captured=graphs and still, mean=sum(gaps) / len(gaps),
                 largest=max(gaps))  # fmt: skip
    note(
        options,
        graphs_sample_the_same={name: tokens[name, True] == tokens[name, False] for name in ("flash", "padded")},
    )


def decode(options) -> None:
    """Milliseconds of a decode step by rows, as a graph and without, beside the bytes it must read."""
    import numpy as np
    import torch

    from benchmarks.rollout import NoText, read_bandwidth
    from src.engine.cuda_decoding import own_stream
    from src.engine.decoding import cache_shape
    from src.engine.sampler import SYNC_EVERY, SlotDecoder
    from src.engine.token_choice import SamplingSettings

    engine = engine_of(options, options.shape, max_gen_len=64)
    model, prompt, new, slots = engine.model, 128, 32 if options.quick else 512, 16 if options.quick else 256
    settings = SamplingSettings(new, 1.0, slots, (), seed=1)
    bandwidth = read_bandwidth(model.device)
    weights = sum(parameter.nbytes for parameter in model.parameters())
    with torch.inference_mode(), own_stream(model.device):
        decoder = SlotDecoder(model, NoText(), problems_of(slots // 8, prompt), 8, slots, settings)
        decoder.start(torch.arange(slots, device=model.device))
        for rows in [rows for rows in (256, 128, 64, 16, 4, 1) if rows <= slots]:
            decoder.rows, half = rows, np.full(rows, new // 2)

            def begin() -> None:
                decoder.lengths.fill_(new // 2)  # the mean context of a rollout
                decoder.attention.arrange(np.arange(rows) // 8, half, np.zeros(rows, bool))  # noqa: B023
                decoder.attention.begin_block(SYNC_EVERY)

            begin()
            decoder.step()
            begin()
            graph = decoder.runner.capture(decoder.step)
            found = {"graph_ms": timed(options, graph.replay, 20)} if graph else {}
            begin()
            read = weights + rows * 2 * cache_shape(model)[0] * cache_shape(model)[1] * cache_shape(model)[2] * (
                (prompt + new // 2) * model.dtype.itemsize
            )
            note(options, rows=rows, layout=type(decoder.attention).__name__, **found,
                 eager_ms=timed(options, decoder.step, 4), floor_ms=round(1000 * read / bandwidth, 3))  # fmt: skip


def update(options) -> None:
    """Passes of 16,384 tokens: milliseconds, tokens/s and memory, with compiled layers and without."""
    import gc

    import torch

    for compiled in (False,) if options.quick else (False, True):
        for shape, loss in ((options.shape, "kl"), ("qwen3-0.6b", "none")):  # the second: prime-rl has 11,896 tokens/s
            engine = engine_of(options, shape, {"gradient_checkpointing": True, "compile": compiled}, loss_type=loss,
                               beta=0.04, max_tokens_per_microbatch=16384)  # fmt: skip
            groups = groups_of(2, 2, 16, 16) if options.quick else groups_of(8, 8, 128, 496)
            tokens = sum(group.tokens() for group in groups)
            peak_gib(options)
            taken = timed(options, partial(update_of, engine, groups), 1 if options.quick else 3)
            note(options, shape=shape, loss_type=loss, compiled=compiled, tokens=tokens, ms=taken,
                 tokens_per_second=round(1000 * tokens / taken), peak_gib=peak_gib(options))  # fmt: skip
            del engine
            torch.compiler.reset()
            gc.collect()  # a compiled layer is part of a circle


def optimizer(options) -> None:
    """A step of the optimizer against torch's fused AdamW, which has bf16 moments and no fp32 masters."""
    import torch

    from src.engine.build import optimizer_of

    engine = engine_of(options, options.shape)
    parameters = list(engine.model.parameters())
    for parameter in parameters:
        parameter.grad = torch.full_like(parameter, 1e-4)
    training = engine.config.training
    engine.optimizer, made = None, {}
    for bits, offload in ((8, False), (16, False), (8, True)):
        keys = vars(training) | {"state_bits": bits, "offload": offload}
        made[f"24/{bits}{', offloaded' * offload}"] = partial(optimizer_of, engine.model, SimpleNamespace(**keys))
    made["torch, fused"] = partial(torch.optim.AdamW, parameters, lr=1e-6, fused=True)
    for name, make in made.items():
        chosen = make()
        taken = timed(options, chosen.step, 1 if options.quick else 3)
        note(options, optimizer=name, ms=taken, parameters=sum(map(torch.Tensor.numel, parameters)),
             peak_gib=peak_gib(options))  # fmt: skip
        del chosen


def peaks(options) -> None:
    """The longest pass of a config of each size, and its step, beside what `--check` has planned."""
    from src.config import load_config
    from src.engine.packing import apart
    from src.engine.plan import memory_plan, of_update

    for size in ("3b", "7b"):
        training = load_config(PROJECT / "configs" / f"configs_{size}" / f"config_kl_beta0.04_{size}.yaml").training
        keys = {name: getattr(training, name) for name in (
            "batch_size", "num_questions_per_batch", "max_prompt_len", "max_gen_len", "max_tokens_per_microbatch",
            "inference_batch_size", "loss_type", "beta")}  # fmt: skip
        if options.quick:
            keys |= {"batch_size": 8, "num_questions_per_batch": 4, "max_prompt_len": 8, "max_gen_len": 8}
        engine = engine_of(options, size, {"gradient_checkpointing": True}, **keys)
        plan = memory_plan(engine.config, engine.model, engine.anchor)
        peak_gib(options)
        for step in (1, 2):  # the optimizer's states come with the first
            batch = engine.limit.cut(engine.longest_groups(), False)[0]
            update_of(engine, apart(2 * batch))  # the second adds to gradients
            engine.optim_step(1e-6)
            note(
                options, size=size, step=step, planned_gib=round(of_update(plan) / 2**30, 2), peak_gib=peak_gib(options)
            )
        del engine


def of_benchmark(options, name: str, *words: str) -> None:
    """Another benchmark; its last line is the result."""
    command = [sys.executable, "-m", f"benchmarks.{name}", "--device", options.device, "--dtype", options.dtype, *words]
    line = ""
    with subprocess.Popen(command, cwd=PROJECT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
    note(options, code=process.returncode, result=None if process.returncode else json.loads(line))


def sizes(options, new: int) -> list[str]:
    """What step and rollout are measured with."""
    if options.quick:
        return ["--shape", "tiny", "--quick"]
    return ["--shape", options.shape, "--prompts", "32", "--samples", "8", "--prompt_tokens", "120", "--new_tokens",
            str(new)]  # fmt: skip


def step(options) -> None:
    """Whole steps of the loop with a reference (k3), every completion of 256 tokens."""
    words = ["--skip", "trl", "trl_allocator", "--repetitions", "1", "--beta", "0.04"]
    of_benchmark(options, "step", *sizes(options, 256), *words, "--using", "gradient_checkpointing")


def generate(options) -> None:
    """Rollouts against transformers' generate."""
    words = ["--skip", "generate_batch", "--repetitions", "1", "--slots", "256", "--lengths", "fixed"]
    of_benchmark(options, "rollout", *sizes(options, 512), *words)


def train(options) -> None:
    """The embedded model, end to end: the first command, in fp32 and in bf16 with 24/8 bit states."""
    short = ["training.max_steps=2", "data.eval_size=8", "data.eval_samples=1"] if options.quick else []
    for name, keys in (("fp32", []), ("bf16", ["model.dtype=bfloat16", "training.memory_efficient_adamw=true"])):
        command = [
            sys.executable,
            "main.py",
            "--config",
            "configs/recipes/grpo.yaml",
            "--dataset_name",
            "countdown",
            "--name",
            f"gpu_first_{name}",
            "--fresh",
            "--set",
            f"model.device={options.device}",
            *keys,
            *short,
        ]
        done = subprocess.run(command, cwd=PROJECT)
        file = PROJECT / "runs" / f"gpu_first_{name}_countdown" / "metrics.jsonl"
        rows = [json.loads(line) for line in file.read_text().splitlines()] if not done.returncode else []
        accuracies = [(row["step"], row["eval/pass@1"]) for row in rows if "eval/pass@1" in row]
        times = sorted(row["time/rollout"] + row["time/update"] for row in rows if "time/update" in row)
        gaps = [row["rollout/mismatch"] for row in rows if "rollout/mismatch" in row]
        note(options, dtype=name, code=done.returncode, accuracies=accuracies,
             seconds_a_step=times[len(times) // 2] if times else None, mismatch=max(gaps, default=None))  # fmt: skip


STAGES = {
    "environment": environment, "tests": tests, "mismatch": mismatch, "decode": decode, "update": update,
    "optimizer": optimizer, "peaks": peaks, "step": step, "generate": generate, "train": train,
}  # fmt: skip


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", required=True)
    parser.add_argument("--stages", nargs="*", default=IN_ALL, choices=STAGES)
    parser.add_argument("--stage", choices=STAGES, help="one, in this process: used by the script itself")
    parser.add_argument("--shape", default="1.5b")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--quick", action="store_true", help="the smallest shape, few tokens")
    parser.add_argument("--limit", type=float, default=480, help="seconds after which no stage begins")
    options = parser.parse_args(arguments)
    options.began = time.time()
    Path(options.output).mkdir(parents=True, exist_ok=True)
    return options


def run_stage(options, name: str, limit: float) -> int | str:
    """A stage in a process of its own; at its limit it is stopped with all that it has started."""
    command = [sys.executable, "-m", "benchmarks.gpu_first", "--output", options.output, "--stage", name,
               "--shape", options.shape, "--dtype", options.dtype, "--device", options.device,
               *["--quick"] * options.quick]  # fmt: skip
    with (Path(options.output) / "log.txt").open("a") as log:
        log.write(f"\n--- {name}\n")
        log.flush()
        process = subprocess.Popen(command, cwd=PROJECT, stdout=log, stderr=log, start_new_session=True)
        try:
            return process.wait(limit)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return f"stopped after {limit:.0f} s"


def main() -> None:
    options = parse_arguments()
    if options.stage:
        import src  # noqa: F401  before torch: how its threads wait

        code = 0
        try:
            STAGES[options.stage](options)
        except BaseException as error:
            code = 1
            note(options, error=f"{type(error).__name__}: {error}"[:500], context=repr(error.__context__)[:300])
            traceback.print_exc()
        sys.stdout.flush()
        os._exit(code)  # what a broken device leaves behind must not hang at the end
    results = Path(options.output) / "results.jsonl"
    if results.exists():
        raise SystemExit(f"{results} is there already; give another --output")
    codes: dict[str, int | str] = {}
    for name in options.stages:
        left = options.limit - (time.time() - options.began)
        codes[name] = "no time was left" if left < 20 else run_stage(options, name, min(left, LIMITS[name]))
        print(f"{name}: {codes[name]}, {time.time() - options.began:.0f} s", flush=True)
    rows = [json.loads(line) for line in results.read_text().splitlines()] if results.is_file() else []
    print(json.dumps({"benchmark": "gpu_first", "date": time.strftime("%Y-%m-%d"), "codes": codes, "results": rows}))


if __name__ == "__main__":
    main()
