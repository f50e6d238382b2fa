"""MemoryEfficientAdamW: bytes a parameter, loss of a small language model, displacement at lr 1e-6, step time.

    python benchmarks/optimizer.py [--quick] [--steps 2000]

The last line on stdout is one JSON document. The text is Python's own standard library, read as bytes, so nothing
is downloaded. With --quick the training is shorter and the figures are only a smoke test.
"""

import argparse
import importlib.util
import json
import pathlib
import statistics
import sys
import time

import torch
from torch import Tensor, nn

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
from src.engine import MemoryEfficientAdamW

CONTEXT, WIDTH, HEADS, LAYERS = 64, 96, 4, 2
FORMATS = {"32/32": (32, 32), "24/16": (24, 16), "24/8": (24, 8)}  # name -> (master_bits, state_bits)


class Block(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self):
        super().__init__()
        self.norm_attention, self.norm_mlp = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attention_in, self.attention_out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp_in, self.mlp_out = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, hidden: Tensor) -> Tensor:  # [batch, time, width]
        split = self.attention_in(self.norm_attention(hidden)).unflatten(-1, (3, HEADS, -1))
        query, key, value = split.permute(2, 0, 3, 1, 4)  # [batch, heads, time, width / heads] each
        mixed = nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        hidden = hidden + self.attention_out(mixed.transpose(1, 2).flatten(2))
        return hidden + self.mlp_out(nn.functional.gelu(self.mlp_in(self.norm_mlp(hidden))))


class ByteModel(nn.Module):
    """A small language model over bytes."""

    def __init__(self):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(128, WIDTH), nn.Embedding(CONTEXT, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 128, bias=False)

    def forward(self, ids: Tensor) -> Tensor:  # [batch, time] -> logits [batch, time, 128]
        hidden = self.tokens(ids) + self.positions.weight[: ids.shape[1]]
        for block in self.blocks:
            hidden = block(hidden)
        return self.head(self.norm(hidden))


def read_text() -> Tensor:
    """About 2 MB of the standard library as 7-bit ids, [characters]."""
    folder = pathlib.Path(argparse.__file__).parent
    text = b"".join(path.read_bytes() for path in sorted(folder.glob("*.py")))[:2_000_000]
    return torch.frombuffer(bytearray(text), dtype=torch.uint8).long().clamp(max=127)


def batch_loss(model: nn.Module, windows: Tensor, chosen: Tensor) -> Tensor:
    ids = windows[chosen]  # [batch, time + 1]
    logits = model(ids[:, :-1]).float()
    return nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())


def train(make_optimizer, dtype: torch.dtype, text: Tensor, count: int) -> dict:
    """Train on the same batches from the same bf16 weights; the losses of the last tenth and of held-out text."""
    torch.manual_seed(0)
    model = ByteModel().to(torch.bfloat16).to(dtype)
    optimizer = make_optimizer(model.parameters())
    schedule = torch.optim.lr_scheduler.LambdaLR(  # 100 steps of warm-up, then linear to a tenth
        optimizer, lambda step: min(1, (step + 1) / 100) * (1 - 0.9 * step / count)
    )
    held_out = len(text) * 9 // 10
    windows, tests = text[:held_out].unfold(0, CONTEXT + 1, 1), text[held_out:].unfold(0, CONTEXT + 1, CONTEXT)
    generator, losses = torch.Generator().manual_seed(1), []
    for _ in range(count):
        loss = batch_loss(model, windows, torch.randint(len(windows), (16,), generator=generator))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    with torch.no_grad():
        test = statistics.fmean(
            batch_loss(model, tests, chosen).item() for chosen in torch.arange(len(tests) // 64 * 64).split(64)[:40]
        )
    return {"train": statistics.fmean(losses[-count // 10 :]), "held_out": test}


def measure_losses(text: Tensor, count: int) -> dict:
    options = dict(lr=2e-3, betas=(0.9, 0.999), weight_decay=0.01)
    runs = {"torch fp32": (lambda p: torch.optim.AdamW(p, **options, fused=True), torch.float32)}
    for name, (master, state) in FORMATS.items():
        runs[name] = (
            lambda p, m=master, s=state: MemoryEfficientAdamW(p, **options, master_bits=m, state_bits=s),
            torch.bfloat16,
        )
    runs["fp32 weights, 8-bit states"] = (lambda p: MemoryEfficientAdamW(p, **options), torch.float32)
    runs["plain bf16"] = (lambda p: torch.optim.AdamW(p, **options, fused=True), torch.bfloat16)
    losses = {}
    for name, (make, dtype) in runs.items():
        start = time.perf_counter()
        losses[name] = train(make, dtype, text, count)
        print(f"{name:28} {losses[name]} {time.perf_counter() - start:.0f} s", flush=True)
    for result in losses.values():
        result["against_fp32"] = result["held_out"] / losses["torch fp32"]["held_out"] - 1
        result["against_32_32"] = result["held_out"] / losses["32/32"]["held_out"] - 1
    return losses


def measure_displacement(text: Tensor, count: int) -> dict:
    """Mean |master - start| after `count` steps at lr 1e-6, all on the gradients of one fp32 model."""
    torch.manual_seed(0)
    model = ByteModel().to(torch.bfloat16).float()
    exact = list(model.parameters())
    origin = [parameter.detach().clone() for parameter in exact]
    copies = {name: [nn.Parameter(start.bfloat16()) for start in origin] for name in [*FORMATS, "plain bf16"]}
    options = dict(lr=1e-6, betas=(0.9, 0.999), weight_decay=0.0)
    optimizers = {
        name: MemoryEfficientAdamW(copies[name], **options, master_bits=master, state_bits=state)
        for name, (master, state) in FORMATS.items()
    }
    optimizers["plain bf16"] = torch.optim.AdamW(copies["plain bf16"], **options, fused=True)
    reference = torch.optim.AdamW(exact, **options, fused=True)
    windows, generator = text.unfold(0, CONTEXT + 1, 1), torch.Generator().manual_seed(1)
    for _ in range(count):
        reference.zero_grad()
        batch_loss(model, windows, torch.randint(len(windows), (16,), generator=generator)).backward()
        for parameters in copies.values():
            for parameter, source in zip(parameters, exact, strict=True):
                parameter.grad = source.grad.bfloat16()
        for source in exact:
            source.grad = source.grad.bfloat16().float()
        for optimizer in (reference, *optimizers.values()):
            optimizer.step()

    def displacement(masters) -> float:
        moved = [(one.detach().float() - start).flatten() for one, start in zip(masters, origin, strict=True)]
        return torch.cat(moved).abs().mean().item()

    result = {"steps": count, "torch fp32": displacement(exact)}
    for name, optimizer in optimizers.items():
        masters = copies[name] if name == "plain bf16" else optimizer.master_weights()
        result[name] = displacement(masters)
        result[f"{name} over fp32"] = result[name] / result["torch fp32"]
    changed = [(one.float() != start).flatten() for one, start in zip(copies["plain bf16"], origin, strict=True)]
    result["plain bf16 share of weights moved"] = torch.cat(changed).float().mean().item()
    return result


def measure_bytes() -> dict:
    result = {}
    for name, (master, state) in FORMATS.items():
        weight = nn.Parameter(torch.zeros(2**20, dtype=torch.bfloat16))
        weight.grad = torch.zeros_like(weight)
        optimizer = MemoryEfficientAdamW([weight], master_bits=master, state_bits=state)
        optimizer.step()
        states = {key: value.nbytes for key, value in optimizer.state[weight].items() if key != "step"}
        scales = sum(size for key, size in states.items() if key.endswith("_scale"))
        total = weight.nbytes + weight.grad.nbytes + sum(states.values())
        result[name] = {
            "with_gradient": (total - scales) / weight.numel(),
            "scales": scales / weight.numel(),
            "on_device_with_offload": (weight.nbytes + weight.grad.nbytes) / weight.numel(),
        }
    result["torch fused on fp32 masters, bf16 model"] = {"with_gradient": 16.0}
    return result


def without_loop(parameters) -> MemoryEfficientAdamW:
    """24/8 bits by torch's operations one by one, as where there is no C compiler."""
    optimizer = MemoryEfficientAdamW(parameters)
    optimizer.has_kernel = False
    return optimizer


def rivals(device: str) -> dict:
    """name -> (constructor, dtype) of everything timed; flashoptim and torchao only where importable."""
    result = {
        "torch fused fp32": (lambda p: torch.optim.AdamW(p, fused=True), torch.float32),
        "32 bits, fp32 weights": (lambda p: MemoryEfficientAdamW(p, state_bits=32), torch.float32),
        "8 bits, fp32 weights": (MemoryEfficientAdamW, torch.float32),
        "24/8, operations one by one": (without_loop, torch.bfloat16),
    }
    for name, (master, state) in FORMATS.items():
        result[name] = (
            lambda p, m=master, s=state: MemoryEfficientAdamW(p, master_bits=m, state_bits=s),
            torch.bfloat16,
        )
    if device == "cuda":
        result["24/8 offload"] = (lambda p: MemoryEfficientAdamW(p, offload=True), torch.bfloat16)
        if importlib.util.find_spec("flashoptim"):
            from flashoptim import FlashAdamW

            result["flashoptim 24/8"] = (lambda p: FlashAdamW(p, lr=1e-3), torch.bfloat16)
        if importlib.util.find_spec("torchao"):
            from torchao.optim import AdamW8bit

            result["torchao AdamW8bit bf16"] = (lambda p: AdamW8bit(p), torch.bfloat16)
    return result


def measure_time(device: str, shapes: list[tuple[int, ...]], rounds: int) -> dict:
    """Median milliseconds a step, the optimizers taking turns so that a busy machine troubles all alike."""
    timed, samples = {}, {}
    for name, (make, dtype) in rivals(device).items():
        parameters = [nn.Parameter(torch.randn(shape, device=device, dtype=dtype) * 0.02) for shape in shapes]
        for parameter in parameters:
            parameter.grad = torch.randn_like(parameter)
        timed[name], samples[name] = make(parameters), []
    for turn in range(rounds + 3):
        for name, optimizer in timed.items():
            if device == "cuda":
                torch.cuda.synchronize()
            start = time.perf_counter()
            optimizer.step()
            if device == "cuda":
                torch.cuda.synchronize()
            if turn >= 3:
                samples[name].append(time.perf_counter() - start)
    base = samples["torch fused fp32"]
    return {
        name: {
            "milliseconds": 1e3 * statistics.median(times),
            "times_torch_fused": statistics.median(a / b for a, b in zip(times, base, strict=True)),
        }
        for name, times in samples.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a smoke test: 100 steps, 10 rounds")
    parser.add_argument("--steps", type=int, default=2000, help="training steps of the language model")
    arguments = parser.parse_args()
    steps, rounds = (100, 10) if arguments.quick else (arguments.steps, 60)
    text = read_text()
    result = {"bytes_per_parameter": measure_bytes()}
    tiny = [(128, 192)] * 28 + [(192,)] * 2  # the default model's 30 tensors and 0.7 M elements
    result["step_time"] = {
        "cpu, 30 tensors, 0.69 M": measure_time("cpu", tiny, rounds),
        "cpu, 12 tensors, 14 M": measure_time("cpu", [(1024, 1152)] * 12, max(3, rounds // 4)),
        "cpu, 64 tensors, 67 M": measure_time("cpu", [(1024, 1024)] * 64, max(3, rounds // 6)),
    }
    if torch.cuda.is_available():
        result["step_time"]["cuda, 64 tensors, 512 M"] = measure_time("cuda", [(2048, 4096)] * 64, rounds)
    result["displacement_at_lr_1e-6"] = measure_displacement(text, 20 if arguments.quick else 100)
    result["language_model"] = {"steps": steps, "losses": measure_losses(text, steps)}
    result["machine"] = {
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "cuda": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
