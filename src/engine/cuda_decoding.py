"""Decode steps on a GPU: a CUDA graph each, the cache in the joined layout, by flash attention where that works."""

import logging
from collections.abc import Callable
from contextlib import contextmanager
from functools import cache, partial

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

import src.engine.cpu_layers as cpu_layers
from src.engine.cpu_layers import LoopAttention
from src.engine.decoding import GroupedAttention, JoinedAttention, MergedAttention, cache_shape
from src.engine.kernels import works
from src.engine.memory import causes, out_of_memory

logger = logging.getLogger("grpo")

GRAPHS_ON = ("cuda",)  # device types whose steps are captured; elsewhere capturing does nothing (the tests do that)
Layout = GroupedAttention | JoinedAttention | LoopAttention
HALF = (torch.bfloat16, torch.float16)  # what the flash kernel takes
FLASH = {"has_splits": True}  # in this process it was not refused yet


def uses_graphs(device: torch.device) -> bool:
    """Whether steps on this device are captured, in the joined layout."""
    return device.type in GRAPHS_ON


class PaddedAttention(JoinedAttention):
    """The joined layout with few widths, as each is a graph of its own."""

    width_step = 256

    def read(self, layer: int, query: Tensor, scaling: float) -> Tensor:
        """query [n, Hkv, R, D] -> [n, 1, H, D].

        By plain products: scaled_dot_product_attention would take cuDNN's kernel here, which plans anew for each shape.
        """
        keys, values = self.so_far(layer, len(query))  # [n, Hkv, T, D] each
        weights = (
            (query * scaling @ keys.transpose(-1, -2) + self.mask).softmax(-1, dtype=torch.float32).to(values.dtype)
        )
        return (weights @ values).flatten(1, 2)[:, None]


def flash(
    query: Tensor, keys: Tensor, values: Tensor, offsets, queries: int, used: Tensor, longest: int, scaling: float
) -> Tensor:
    """query [n * queries, H, D]: row i reads used[i] of the keys and values [tokens, H, D] from its offset on.

    offsets: those of the queries and those of the keys, both [n + 1]. torch's varlen_attn is this operator, but hands
    seqused_k on only since 2.12.
    """
    operator = torch.ops.aten._flash_attention_forward
    call = partial(
        operator, query, keys, values, *offsets, queries, longest, 0.0, False, False, scale=scaling, seqused_k=used
    )
    if not FLASH["has_splits"] or all(argument.name != "num_splits" for argument in operator.default._schema.arguments):
        return call()[0]
    try:
        return call(num_splits=1)[0]  # else a row's result depends on the longest of its neighbours
    except RuntimeError as error:
        if "num_splits" not in str(error):
            raise
        FLASH["has_splits"] = False  # torch 2.12 has the argument and refuses it
        return call()[0]


class FlashAttention(JoinedAttention):
    """The joined layout, read by torch's flash attention for rows of different lengths: no mask, no place in vain."""

    token_major = True

    def begin_block(self, steps: int) -> None:
        """One width for all graphs: what is not used is not read, also not what an ended slot leaves behind `reach`."""
        self.filled += steps
        self.width = self.capacity
        self.reach = max(self.reach, min(self.filled, self.capacity))

    def begin_step(self, lengths: Tensor, positions: Tensor) -> None:
        """positions [n]: tokens already in the cache, the prompt's included; this step's goes to that place."""
        self.places = positions.clamp(max=self.width - 1)  # a slot that ended keeps overwriting the last place
        self.slots = torch.arange(len(positions), device=self.device)
        self.used = (self.places + 1).int()  # [n]
        self.ends = torch.arange(len(positions) + 1, device=self.device, dtype=torch.int32)  # [n + 1]
        self.key_offsets = self.ends * self.capacity
        self.query_offsets: Tensor | None = None  # as many queries a slot as heads read the same keys

    def read(self, layer: int, query: Tensor, scaling: float) -> Tensor:
        """query [n, Hkv, R, D] -> [n, 1, H, D].

        The R heads that read the same keys are as many queries: flash attention would do so itself, in two more copies.
        """
        keys, values = (part[layer].transpose(1, 2).flatten(0, 1) for part in (self.keys, self.values))  # no copy
        n, kv_heads, repeats, dim = query.shape
        if self.query_offsets is None:
            self.query_offsets = self.ends * repeats  # once for all layers
        offsets = (self.query_offsets, self.key_offsets)
        query = query.transpose(1, 2).reshape(n * repeats, kv_heads, dim)
        output = flash(query, keys, values, offsets, repeats, self.used, self.capacity, scaling)  # [n * R, Hkv, D]
        return output.view(n, 1, repeats, kv_heads, dim).transpose(2, 3).flatten(2, 3)


@cache
def flash_works(device: torch.device, dtype: torch.dtype, heads: int, kv_heads: int, head_dim: int) -> bool:
    """Whether FlashAttention gives what PaddedAttention gives, tried on rows of different lengths; tells when not."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    prompt = (draw(1, 2, kv_heads, 40, head_dim), draw(1, 2, kv_heads, 40, head_dim), np.array([40, 3]))
    lengths = torch.tensor([0, 290, 17], device=device)
    rows, positions = torch.tensor([0, 1, 1], device=device), lengths + torch.tensor([40, 3, 3], device=device)
    query, key, value = draw(3, heads, 1, head_dim), draw(3, kv_heads, 1, head_dim), draw(3, kv_heads, 1, head_dim)
    own = draw(3, kv_heads, 300, head_dim)

    def output(layout: type[JoinedAttention]) -> Tensor:
        attention = layout(prompt, 3, 300)
        attention.start(torch.arange(3, device=device), rows)
        for part in (attention.keys[0], attention.values[0]):
            part[:, :, 40:340] = own
        attention.arrange(rows.cpu().numpy(), lengths.cpu().numpy(), np.zeros(3, dtype=bool))
        attention.begin_block(1)
        attention.begin_step(lengths, positions)
        return attention.attend(0, query, key, value, head_dim**-0.5).float()

    def trial() -> None:
        worst = float((output(FlashAttention) - output(PaddedAttention)).abs().max())
        if not worst < 0.05:  # NaN is wrong too
            raise ValueError(f"wrong by {worst:.2g}")

    return works("decoding without flash attention", trial)


def layout_for(model) -> type[Layout]:
    """The layout of the cache to start with."""
    if not uses_graphs(model.device):
        if cpu_layers.applies(model):
            return LoopAttention
        in_bf16 = model.device.type == "cpu" and model.dtype == torch.bfloat16
        return MergedAttention if in_bf16 else GroupedAttention
    heads = model.config.get_text_config().num_attention_heads
    _, kv_heads, head_dim = cache_shape(model)
    works = model.dtype in HALF and flash_works(model.device, model.dtype, heads, kv_heads, head_dim)
    return FlashAttention if works else PaddedAttention


class StepRunner:
    """Runs a step many times. On CUDA as a graph for each shape, captured when the shape comes up first.

    A graph repeats its kernels on the addresses of its capture: all that a step reads and writes must stay in place,
    and Python inside the step runs only once. The graphs live as long as the cache they write to, one wave of prompts.
    """

    works = True  # capturing has not failed yet, in this process

    def __init__(self, device: torch.device):
        self.has_graphs = uses_graphs(device)
        self.graphs: dict[tuple[int, int], torch.cuda.CUDAGraph | None] = {}  # by slots and width
        self.pool = torch.cuda.graph_pool_handle() if device.type == "cuda" else None  # shared: one runs at a time

    def rows(self, live: int, rows: int) -> int:
        """How many of `rows` slots to decode when so many are live: few sizes for graphs, else without an eighth."""
        if not self.has_graphs:
            return live if live * 8 <= rows * 7 else rows
        sizes = (size for power in range(live.bit_length() + 1) for size in (2**power, 3 * 2**power // 2))
        return min(rows, min(size for size in sizes if size >= live))

    def run(self, step: Callable[[], None], shape: tuple[int, int], times: int) -> None:
        """So many steps with this number of slots and this width."""
        if self.has_graphs and shape not in self.graphs:
            step()  # loads the kernels, which a capture cannot, and counts as any other
            times -= 1
            self.graphs[shape] = self.capture(step)
        graph = self.graphs.get(shape)
        for _ in range(times):
            step() if graph is None else graph.replay()

    def capture(self, step: Callable[[], None]) -> torch.cuda.CUDAGraph | None:
        """The graph of a step, which is not run; None where there are no graphs."""
        if self.pool is None or not StepRunner.works or is_in_torch_dispatch_mode():  # --profile counts operations
            return None
        try:
            graph = torch.cuda.CUDAGraph()
            # thread_local: other threads (NCCL's watchdog) may talk to the device meanwhile
            with torch.cuda.graph(graph, self.pool, torch.cuda.current_stream(), "thread_local"):
                step()
        except RuntimeError as error:
            if out_of_memory(error):  # of this capture, and not of all: the rollout is done again with fewer slots
                raise
            StepRunner.works = False
            reason = [line for _, line in causes(error)][-1]  # the end of a failed capture says only that it failed
            logger.warning(f"decoding without CUDA graphs, which is slower: a step could not be captured ({reason})")
            return None
        return graph


@cache
def stream_of(device: torch.device) -> torch.cuda.Stream:
    """One stream for all rollouts: memory that is freed on a stream serves only that stream again."""
    return torch.cuda.Stream(device)


@contextmanager
def own_stream(device: torch.device):
    """Graphs are not captured on the default stream. What comes before and after waits for what is inside."""
    if device.type != "cuda":
        yield
        return
    stream, outside = stream_of(device), torch.cuda.current_stream(device)
    stream.wait_stream(outside)
    try:
        with torch.cuda.stream(stream):
            yield
    finally:
        outside.wait_stream(stream)
