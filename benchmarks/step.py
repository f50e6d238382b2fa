"""A whole GRPO step against TRL's GRPOTrainer: the same weights, prompts, lengths and loss, a step of each in turn.

    uv run --group benchmarks python -m benchmarks.step --shape smollm2-135m         # on a CPU: about 8 minutes
    uv run python -m benchmarks.step --shape tiny --quick --skip trl trl_allocator   # seconds: only shows that it runs

All start from the same random weights in --dtype and take `--repetitions` steps after one that warms up, each in a
process of its own that waits while another works: rollout (tokens, text, reward), then update (log-probs, loss,
backward, clipping, optimizer). Before each round the machine's ceilings are measured, and at the end the arithmetic of
one step of ours is counted, so that its share of the ceiling can be said. Every completion has --new_tokens: no end
token is set. With --beta above 0 all score a frozen reference; that is counted as update. TRL runs as its defaults say,
but without gradient checkpointing and without writing anything; `trl_allocator` is TRL with what src/__init__.py sets
for the memory and threads of a CPU, `trl` runs with `--skip` and no name behind it. Ours keeps fp32 master weights
where TRL trains the bf16 weights themselves. The last line of stdout is one JSON document.
"""

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import zlib
from pathlib import Path

import src  # noqa: F401  before torch: how its threads wait

# isort: split
import tokenizers
import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from benchmarks.rollout import SHAPES, machine
from src.config import Config, DataConfig, ModelConfig, TrainingConfig
from src.engine import Engine
from src.engine.memory import peak_memory
from src.engine.profiling import ceilings, measured
from src.maxent import Controllers
from src.prepare import SampledCompletions
from src.records import Problem
from src.run import Run
from src.tasks import Rewards


def reward(text: str) -> float:
    """Anything that differs between completions and costs nothing."""
    return zlib.crc32(text.encode()) % 1000 / 1000


class BenchmarkTask:
    """What the loop asks of a task."""

    def reward(self, text: str, row) -> dict[str, float]:
        return {"reward": reward(text), "answer": 0.0}


def make_model(folder: Path, options) -> None:
    """Random weights of the shape, and a tokenizer whose words are numbers, in Hugging Face format."""
    torch.manual_seed(0)
    config = SHAPES[options.shape]
    with torch.device(options.device):  # on a CPU random weights of 1.5B take half a minute
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, options.dtype))
    model.generation_config.eos_token_id = None
    model.save_pretrained(folder)
    words = {str(index): index for index in range(config.vocab_size)}
    words["<end>"] = words.pop(str(config.vocab_size - 1))
    words["<pad>"] = words.pop("0")
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<pad>"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<end>", pad_token="<pad>").save_pretrained(folder)


def make_prompts(options) -> list[list[int]]:
    """Ragged prompts of random tokens, others for each step."""
    generator = torch.Generator().manual_seed(1)
    lengths = [max(1, options.prompt_tokens + (0, -6, 3, 0, -2, 5)[index % 6]) for index in range(options.prompts)]
    vocabulary = SHAPES[options.shape].vocab_size
    steps = options.repetitions + 2  # the first warms up, of the last the arithmetic is counted
    return [torch.randint(1, vocabulary - 1, (n,), generator=generator).tolist() for _ in range(steps) for n in lengths]


def make_run(folder: Path, options) -> Run:
    """What prepare makes of a config, on random prompts."""
    config = Config(
        ModelConfig(
            pretrained_model_path=str(folder),
            dtype=options.dtype,
            device=options.device,
            gradient_checkpointing="gradient_checkpointing" in options.using,
            compile="compile" in options.using,
        ),
        DataConfig(),
        TrainingConfig(
            batch_size=options.prompts * options.samples,
            num_questions_per_batch=options.prompts,
            max_gen_len=options.new_tokens,
            max_prompt_len=options.prompt_tokens + 8,
            micro_batch_size=options.micro_batch,
            loss_type="approx_kl" if options.beta else "none",
            beta=options.beta,
            learning_rate=1e-6,
            eval_interval=0,
            memory_efficient_adamw=options.device != "cpu",
            offload="offload" in options.using,
            reference_offload="reference_offload" in options.using,
        ),
    )
    engine, task = Engine(config), BenchmarkTask()
    engine.load_model()
    engine.eos_ids = ()  # every completion has its full length
    problems = [Problem(index, tuple(ids), "", {}) for index, ids in enumerate(make_prompts(options))]
    source = SampledCompletions(config, engine, task, Rewards(task, config.data))
    return Run(config, "benchmark", folder, engine, task, source, problems, problems, max_steps=10**6,
               state={"controllers": Controllers(config.training)})  # fmt: skip


def run_ours(folder: Path, options) -> dict[str, float]:
    """Tells the seconds of rollout and update of each step, by the loop itself; the arithmetic of a step."""
    from src.train_grpo import train_step

    run = make_run(folder, options)

    def take(step: int) -> int:
        run.engine.begin(step)
        metrics, groups = train_step(run, step)
        assert all(episode.length == options.new_tokens for group in groups for episode in group.episodes)
        assert metrics["train/grad_norm"] > 0
        return options.prompts * options.samples * options.new_tokens

    for step in range(1, options.repetitions + 2):
        wait_for_turn()
        take(step)
        print(json.dumps(dict(run.engine.seconds)), flush=True)
    wait_for_turn()
    flops = measured(lambda: take(options.repetitions + 2), run.engine.device, counting=True)[0].flops
    rollout = sum(flops[name] for name in ("prefill", "decode", "head and sampling"))
    return {"rollout": rollout, "update": sum(flops.values()) - rollout}


def wait_for_turn() -> None:
    """Until the process that started this one says so."""
    sys.stdin.readline()


def run_trl(folder: Path, options) -> dict[str, float]:
    """The same of TRL's GRPOTrainer; the reference's log-probs count as update. Its arithmetic is not counted."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    rows = options.prompts * options.samples
    config = GRPOConfig(
        output_dir=str(folder / "trl"),
        per_device_train_batch_size=options.trl_micro_batch,
        gradient_accumulation_steps=rows // options.trl_micro_batch,
        num_generations=options.samples,
        max_completion_length=options.new_tokens,
        max_steps=options.repetitions + 1,
        learning_rate=1e-6,
        lr_scheduler_type="constant",
        beta=options.beta,
        temperature=1.0,
        gradient_checkpointing=False,
        bf16=False,  # would compute fp32 weights in bf16; the weights are --dtype already
        use_cpu=options.device == "cpu",
        generation_kwargs={"eos_token_id": None},
        shuffle_dataset=False,
        report_to=[],
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        model_init_kwargs={"dtype": options.dtype},
    )
    moments: dict[str, float] = {"started": 0.0, "rollout": 0.0, "reference": 0.0}

    class TimedTrainer(GRPOTrainer):
        """Notes when generation begins and ends, and the time of the reference in between."""

        def _generate_and_score_completions(self, inputs):
            synchronize(options.device)
            moments.update(started=time.perf_counter(), reference=0.0)
            result = super()._generate_and_score_completions(inputs)
            synchronize(options.device)
            moments["rollout"] = time.perf_counter() - moments["started"]
            return result

        def _get_per_token_logps_and_entropies(self, *arguments, **keywords):
            started = time.perf_counter()
            result = super()._get_per_token_logps_and_entropies(*arguments, **keywords)
            synchronize(options.device)
            if not torch.is_grad_enabled():
                moments["reference"] += time.perf_counter() - started
            return result

    class StepClock(transformers.TrainerCallback):
        """Begin and end of a step."""

        def on_step_begin(self, *arguments, **keywords):
            wait_for_turn()

        def on_step_end(self, *arguments, **keywords):
            synchronize(options.device)
            total = time.perf_counter() - moments["started"]
            rollout = moments["rollout"] - moments["reference"]
            print(json.dumps({"rollout": rollout, "update": total - rollout}), flush=True)

    prompts = [" ".join(map(str, ids)) for ids in make_prompts(options)]
    trainer = TimedTrainer(
        model=str(folder),
        reward_funcs=lambda completions, **columns: [reward(text) for text in completions],
        args=config,
        train_dataset=Dataset.from_dict({"prompt": prompts}),
        processing_class=transformers.AutoTokenizer.from_pretrained(folder),
        callbacks=[StepClock()],
    )
    trainer.train()
    return {}


def synchronize(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()


CONTESTANTS = {"ours": run_ours, "trl": run_trl, "trl_allocator": run_trl}


def parse_arguments(description: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--shape", default="smollm2-135m", choices=SHAPES)
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--samples", type=int, default=8, help="completions a prompt")
    parser.add_argument("--prompt_tokens", type=int, default=118, help="about; prompts are ragged")
    parser.add_argument("--new_tokens", type=int, default=128)
    parser.add_argument("--micro_batch", type=int, help="completions a forward and backward pass, ours; else what fits")
    parser.add_argument("--trl_micro_batch", type=int, default=8)
    parser.add_argument("--beta", type=float, default=0.0)
    memory = ("gradient_checkpointing", "compile", "offload", "reference_offload")
    parser.add_argument("--using", nargs="*", default=[], choices=memory, help="config keys that ours sets to true")
    parser.add_argument("--repetitions", type=int, default=2, help="steps after the first one, which warms up")
    parser.add_argument("--skip", nargs="*", default=["trl"], choices=CONTESTANTS)
    parser.add_argument("--quick", action="store_true", help="few tokens, one repetition")
    parser.add_argument("--alone", nargs=2, help="a contestant and the model's folder: used by the benchmark itself")
    options = parser.parse_args()
    if options.quick:
        options.repetitions, options.new_tokens, options.prompt_tokens = 1, min(options.new_tokens, 12), 20
    return options


def run_alone(name: str, folder: Path, options) -> dict:
    """One contestant in this process; its arithmetic where it is counted, and its memory."""
    flops = CONTESTANTS[name](folder, options)
    return {"flops": flops, "peak_gib": peak_memory(torch.device(options.device)) / 2**30}


class Contestant:
    """One of them in a process of its own, so that memory and settings of one are not those of another."""

    def __init__(self, name: str, folder: str):
        self.name, environment = name, dict(os.environ)
        self.seconds: list[dict[str, float]] = []
        if name == "trl":  # any such variable keeps src/__init__.py from its own; this one, 0, changes nothing
            environment["MALLOC_PERTURB_"] = "0"
        command = [sys.executable, "-m", "benchmarks.step", *sys.argv[1:], "--alone", name, folder]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self.process = subprocess.Popen(command, env=environment, text=True, **pipes)

    def hear(self) -> dict:
        """The next JSON document that it prints."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith('{"'):
                return json.loads(line)
        raise SystemExit(f"{self.name} has failed")

    def step(self) -> None:
        """Its turn."""
        assert self.process.stdin is not None
        try:
            self.process.stdin.write("\n")
            self.process.stdin.flush()
        except BrokenPipeError:  # it ended: where memory does not suffice for all of them the system kills one
            raise SystemExit(f"{self.name} has failed") from None
        self.seconds.append(found := self.hear())
        print(f"  {self.name:13} rollout {found['rollout']:7.2f} s   update {found['update']:7.2f} s", flush=True)

    def finish(self) -> dict:
        """What it says at its end."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        return self.hear()


def take_turns(contestants: list[Contestant], options) -> dict[str, list[float]]:
    """A step of each, again and again; the ceilings of the machine as they were before each round."""
    limits: dict[str, list[float]] = {"flops": [], "bytes": []}
    for _ in range(options.repetitions + 1):
        found = ceilings(torch.device(options.device), getattr(torch, options.dtype))
        for name, limit in zip(limits, found, strict=True):
            limits[name].append(limit)
        print(f"  ceilings      {found[0] / 1e12:.3f} TFLOP/s   {found[1] / 1e9:.1f} GB/s", flush=True)
        for contestant in contestants:
            contestant.step()
    return limits


def main() -> None:
    options = parse_arguments(__doc__.splitlines()[0])
    transformers.logging.set_verbosity_error()
    if options.alone:
        print(json.dumps(run_alone(options.alone[0], Path(options.alone[1]), options)))
        return
    names = [name for name in CONTESTANTS if name not in options.skip]
    if names != ["ours"] and importlib.util.find_spec("trl") is None:
        raise SystemExit("TRL is not installed: run with `uv run --group benchmarks`, or --skip trl trl_allocator")
    result: dict = {"options": vars(options), **machine()}
    with tempfile.TemporaryDirectory() as folder:
        make_model(Path(folder), options)
        contestants = [Contestant(name, folder) for name in names]
        limits = take_turns(contestants, options)
        results = {each.name: {"seconds": each.seconds, **each.finish()} for each in contestants}
    medians = {
        name: {phase: statistics.median(step[phase] for step in each["seconds"][1:]) for phase in ("rollout", "update")}
        for name, each in results.items()
    }
    for phases in medians.values():
        phases["step"] = phases["rollout"] + phases["update"]
    result |= {"ceilings": limits, "results": results, "median": medians}
    if "ours" in results:
        flops = results["ours"]["flops"]
        flops["step"] = sum(flops.values())
        limit = statistics.median(limits["flops"])
        result["share_of_ceiling"] = {phase: flops[phase] / limit / medians["ours"][phase] for phase in flops}
    for name in medians.keys() - {"ours"}:
        result[f"{name}_over_ours"] = {phase: medians[name][phase] / medians["ours"][phase] for phase in medians[name]}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
