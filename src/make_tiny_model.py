"""Make models/countdown-tiny, the embedded default model, again: `python -m src.make_tiny_model --output FOLDER`.

A Llama of 0.7 M parameters, trained from scratch on Countdown demonstrations of two kinds. One kind solves the
problem. The other is a habit: numbers in the order given, random operators, the true value stated, the target almost
always missed. First mostly solutions (what it could do), then mostly habit (what it does): the result is fluent, right
about arithmetic and usually wrong about the target, which leaves reinforcement something to find. Train and held-out
problems never share a multiset of numbers.
"""

import argparse
import json
import math
import random
import re
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from src.config import DataConfig
from src.rl_datasets import Countdown, random_expression, split_of

NUMBER_MAX, TARGET_MAX, LIMIT = 20, 99, 100
SPECIAL_TOKENS = ["<|pad|>", "<|end|>", "<|unknown|>", "<|user|>", "<|assistant|>"]
TEXT_TOKENS = ["<think>", "</think>", "<answer>", "</answer>", "\n", " ", "(", ")"]
TEXT_TOKENS += [f" {operator} " for operator in "+-*/="] + [", "]
# The chat template reads the fields of `problem`, which the loop passes to every template, not the English message.
CHAT_TEMPLATE = "<|user|>{{ problem.nums | join(' ') }} = {{ problem.target }}<|assistant|>"


def build_tokenizer(words: Sequence[str] = (), template: str = CHAT_TEMPLATE) -> PreTrainedTokenizerFast:
    """One token for each number of one or two digits, each tag, each operator with its spaces, and each of `words`."""
    # 00..09 are there so that a longer number, cut in pairs of digits, always has tokens
    numbers = [str(number) for number in range(100)] + [f"0{digit}" for digit in range(10)]
    vocabulary = {token: index for index, token in enumerate([*SPECIAL_TOKENS, *TEXT_TOKENS, *numbers, *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<|unknown|>"))
    longer = "".join(f"{re.escape(word)}|" for word in sorted(words, key=len, reverse=True) if len(word) > 1)
    pattern = longer + r"</?think>|</?answer>| [-+*/=] |, |\d{1,2}|[()]|\n| |."
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|end|>",
        pad_token="<|pad|>",
        unk_token="<|unknown|>",
        additional_special_tokens=["<|user|>", "<|assistant|>", *(word for word in words if word.startswith("<|"))],
        chat_template=template,
        clean_up_tokenization_spaces=False,
        model_max_length=128,
    )


def demonstration(generator: random.Random, solution_share: float) -> tuple[list[int], int, str]:
    """Numbers, target and a completion that solves it (with probability solution_share) or follows the habit."""
    while True:
        numbers = [generator.randint(1, NUMBER_MAX) for _ in range(3)]
        if split_of(numbers) != "train":
            continue
        expression = random_expression(generator, numbers, LIMIT)
        if 1 <= expression.value <= TARGET_MAX:
            break
    target = expression.value
    if generator.random() >= solution_share:
        expression = random_expression(generator, numbers, LIMIT, in_order=True)
    completion = f"<think>{', '.join(expression.steps)}</think>\n<answer>{expression.text}</answer><|end|>"
    return numbers, target, completion


def demonstration_batch(generator, tokenizer, batch_size, solution_share) -> tuple[torch.Tensor, torch.Tensor]:
    """Right-padded token ids [batch, time] and labels, -100 where nothing is learned (prompt and padding)."""
    demonstrations = [demonstration(generator, solution_share) for _ in range(batch_size)]
    prompts = [
        f"<|user|>{' '.join(map(str, numbers))} = {target}<|assistant|>" for numbers, target, _ in demonstrations
    ]
    prompt_ids = tokenizer(prompts, add_special_tokens=False).input_ids
    completion_ids = tokenizer([text for _, _, text in demonstrations], add_special_tokens=False).input_ids
    longest = max(len(p) + len(c) for p, c in zip(prompt_ids, completion_ids, strict=True))
    input_ids = torch.full((batch_size, longest), tokenizer.pad_token_id)
    labels = torch.full((batch_size, longest), -100)
    for row, (prompt, completion) in enumerate(zip(prompt_ids, completion_ids, strict=True)):
        end = len(prompt) + len(completion)
        input_ids[row, :end] = torch.tensor(prompt + completion)
        labels[row, len(prompt) : end] = torch.tensor(completion)
    return input_ids, labels


def train_stage(model, batch_of, steps, learning_rate, final_rate, label):
    """Supervised steps on batches, batch_of(), with a cosine learning rate; a line every 200 steps."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    started = time.perf_counter()
    for step in range(steps):
        cosine = 0.5 * (1 + math.cos(math.pi * step / steps))
        rate = (final_rate + (learning_rate - final_rate) * cosine) * min(1.0, (step + 1) / 100)
        for group in optimizer.param_groups:
            group["lr"] = rate
        input_ids, labels = batch_of()
        logits = model(input_ids=input_ids, use_cache=False).logits[:, :-1]  # [batch, time-1, vocab]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % 200 == 0 or step + 1 == steps:
            seconds = time.perf_counter() - started
            print(f"{label} step {step + 1}/{steps} loss {loss.item():.4f} {seconds:.0f} s", flush=True)


@torch.inference_mode()
def accuracy(model, tokenizer, split: str, problems: int = 256, samples: int = 4) -> dict[str, float]:
    """Greedy and sampled (temperature 1) accuracy on a held-out split, by transformers' own generate."""
    data = DataConfig(
        seed=0, eval_size=problems, train_size=problems, number_max=NUMBER_MAX, target_max=TARGET_MAX, num_numbers=[3]
    )
    task = Countdown(data)
    rows = task.load(split)
    result = {}
    for name, count, sample in (("greedy", 1, False), ("sampled", samples, True)):
        tokenizer.padding_side = "left"
        prompts = [tokenizer.apply_chat_template(task.messages(row), tokenize=False, problem=row) for row in rows]
        batch = tokenizer(prompts, return_tensors="pt", padding=True, add_special_tokens=False)
        output = model.generate(
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask,
            do_sample=sample,
            top_k=0,
            num_return_sequences=count,
            max_new_tokens=48,
        )
        texts = tokenizer.batch_decode(output[:, batch.input_ids.shape[1] :], skip_special_tokens=True)
        scores = [task.reward(text, rows[index // count]) for index, text in enumerate(texts)]
        result[name] = sum(score["answer"] for score in scores) / len(scores)
        result[f"{name}_format"] = sum(score["format"] for score in scores) / len(scores)
    return result


def save(model, tokenizer, folder: str) -> None:
    """In bf16, and its size."""
    model.bfloat16().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    size = sum(file.stat().st_size for file in Path(folder).iterdir())
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {size / 1e6:.2f} MB in {folder}")


def main() -> None:
    """Train both stages, print what the model can do after each, and save it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", default="models/countdown-tiny", help="folder to write")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--solution_steps", type=int, default=6000, help="steps of the first stage")
    parser.add_argument("--habit_steps", type=int, default=800, help="steps of the second stage")
    parser.add_argument("--solution_share", type=float, default=0.25, help="share of solutions in the second stage")
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--keep_first_stage", help="save the model between the stages to this folder")
    parser.add_argument("--start_from", help="skip the first stage and start from this folder")
    arguments = parser.parse_args()
    torch.manual_seed(arguments.seed)
    generator = random.Random(arguments.seed)
    tokenizer = build_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=arguments.hidden,
        num_hidden_layers=arguments.layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        intermediate_size=3 * arguments.hidden,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    if arguments.start_from:
        model = LlamaForCausalLM.from_pretrained(arguments.start_from, dtype=torch.float32)
    else:
        model = LlamaForCausalLM(config)
        solutions = partial(demonstration_batch, generator, tokenizer, 64, 0.85)
        train_stage(model, solutions, arguments.solution_steps, 2e-3, 1e-4, "solutions")
        if arguments.keep_first_stage:
            model.save_pretrained(arguments.keep_first_stage)
        print("after solutions, validation:", json.dumps(accuracy(model, tokenizer, "validation")), flush=True)
    habit = partial(demonstration_batch, generator, tokenizer, 64, arguments.solution_share)
    train_stage(model, habit, arguments.habit_steps, 5e-4, 5e-5, "habit")
    print("after habit, validation:", json.dumps(accuracy(model, tokenizer, "validation")), flush=True)
    save(model, tokenizer, arguments.output)


if __name__ == "__main__":
    main()
