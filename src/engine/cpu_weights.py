"""Weights in the order in which a CPU multiplies them, for the time of a rollout.

A decode step multiplies few rows with every weight, and torch brings each weight into that order anew each time, which
takes as long as the product. Here it is done once for each wave of prompts (30 to 70 ms for 135M parameters, and as
much memory as the weights), for the products of oneDNN or of decode_loops.c. Layers that read the same input are
multiplied at once. A head that multiplies in fp32 (model.fp32_head) does so here, with a copy in fp32.
"""

from collections.abc import Callable
from contextlib import contextmanager

import torch
from torch import Tensor, nn

import src.engine.decode_loops as decode_loops
from src.engine.compiler import X86
from src.engine.models import Float32Head
from src.engine.wide_products import LINEAR, WideProduct

SMALLEST = {
    torch.bfloat16: 0,
    torch.float32: 2**25,
}  # bytes of weights; in fp32 torch is as fast where a cache holds them
PRODUCTS = "products_of_a_rollout"  # of a decoder while its weights lie so: those of its layers
SIBLINGS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))  # called one after the other on the same tensor


def multiplied(weights: Tensor, bias: Tensor | None, rows: int) -> Callable[[Tensor], Tensor]:
    """x -> x @ weights.T + bias, of about `rows` rows, with a copy of the weights [outputs, inputs], by oneDNN."""
    if not has_products(weights.dtype):
        return lambda x: WideProduct.apply(x, weights, bias)
    linear, reordered = (
        torch.ops.mkldnn._linear_pointwise.default,
        torch.ops.mkldnn._reorder_linear_weight(weights, rows),
    )
    return lambda x: linear(x, reordered, bias, "none", [], "")


class Product:
    """One product for layers that read the same input: the first call computes it, the others take their part."""

    def __init__(self, layers: list[nn.Linear], rows: int, in_loops: bool):
        self.layers, self.wide = layers, isinstance(layers[0], Float32Head)
        dtype = torch.float32 if self.wide else layers[0].weight.dtype
        weights = torch.cat(tuple(layer.weight for layer in layers)).to(dtype)  # [all outputs, inputs]
        bias = None if layers[0].bias is None else torch.cat(tuple(layer.bias for layer in layers)).to(dtype)
        self.bias, self.panels, outputs = bias, None, len(weights)
        if in_loops and decode_loops.fits(weights):
            self.panels = panels = decode_loops.side_by_side(weights)
            self.multiply: Callable = lambda x: decode_loops.product(x, panels, bias, outputs)
        else:
            self.multiply = multiplied(weights, bias, rows)
        self.sizes = [layer.out_features for layer in layers]
        self.input: Tensor | None = None
        self.parts: tuple[Tensor, ...] = ()

    def part(self, index: int):
        """In place of the forward of layer number `index`. Called 200 times a step: it does little else."""
        multiply, sizes = self.multiply, self.sizes
        if self.wide:
            return lambda x: multiply(x.float())
        if len(sizes) == 1:
            return multiply
        is_last = index == len(sizes) - 1

        def forward(x: Tensor) -> Tensor:
            if x is not self.input:
                self.input, self.parts = x, multiply(x).split_with_sizes(sizes, -1)
            result = self.parts[index]
            if is_last:
                self.input, self.parts = None, ()
            return result

        return forward


def is_plain(layer: nn.Module | None, classes: tuple = LINEAR) -> bool:
    """Whether it multiplies as its class does: nobody gave it a forward of its own."""
    return type(layer) in classes and "forward" not in vars(layer)


def gathered(model) -> list[list[nn.Linear]]:
    """The plain linear layers, siblings together."""
    groups: list[list[nn.Linear]] = []
    seen: set[nn.Module] = set()
    for module in model.modules():
        for names in SIBLINGS:
            layers: list = [getattr(module, name, None) for name in names]
            alike = {(type(layer), getattr(layer, "bias", None) is None) for layer in layers}
            if len(alike) == 1 and all(map(is_plain, layers)):
                groups.append(layers)
                seen.update(layers)
    single = (module for module in model.modules() if is_plain(module, (*LINEAR, Float32Head)))
    return groups + [[module] for module in single if module not in seen]


def has_products(dtype: torch.dtype = torch.bfloat16) -> bool:
    """Whether this processor multiplies so: in bf16 of x86 those with AVX-512 and a few more, not with AVX2 alone."""
    supported = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)
    if not X86 or not torch.backends.mkldnn.is_available() or supported is None:
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and supported())


def applies(model, free: float) -> bool:
    """Whether this machine has such products, and memory (`free` bytes) for the weights a second time."""
    size = sum(parameter.nbytes for parameter in model.parameters())
    if size >= free / 4 or decode_loops.applies(model):
        return size < free / 4
    plain = all(type(parameter) is nn.Parameter for parameter in model.parameters())  # not sharded
    known = has_products(model.dtype) and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
    return model.device.type == "cpu" and plain and known and size >= SMALLEST[model.dtype]


@contextmanager
def in_order_of_the_processor(model, rows: int, free: float):
    """Inside, where it `applies`, linear layers multiply about `rows` rows with reordered copies of their weights."""
    layers: list[nn.Linear] = []
    decoder, products = model.get_decoder(), {}
    if applies(model, free):
        in_loops = decode_loops.applies(model)
        for group in gathered(model):
            product = Product(group, rows, in_loops)
            for index, layer in enumerate(group):
                vars(layer)["forward"] = product.part(index)
                layers.append(layer)
                products[layer] = product
        vars(decoder)[PRODUCTS] = products
    try:
        yield
    finally:
        vars(decoder).pop(PRODUCTS, None)
        for layer in layers:
            del vars(layer)["forward"]
