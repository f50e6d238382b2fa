"""A frozen reference in host memory, whose layers visit the device one by one while they compute.

The copy of the next layer runs beside the compute of the current one. Space for it is taken on the computing stream and
filled on another: given back, it is reused in the order of that stream, so at most two layers exist however far the
host runs ahead, and nothing is overwritten early.
"""

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn
from torch.func import functional_call


class StreamedReference:
    """The model for scoring.py, as FrozenBase is for LoRA. On a CPU the same copies are made, without streams."""

    def __init__(self, model, device: torch.device):
        self.model, self.config, self.device = model.requires_grad_(False).eval(), model.config, device
        self.copier = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.copies: WeakValueDictionary[int, Tensor] = WeakValueDictionary()  # alive on the device, by id of weight
        self.fetched: dict[nn.Module, dict[str, Tensor]] = {}  # on their way to the device, or there and computing
        self.at_home: dict[nn.Parameter, Tensor] = {}  # the host storage of weights that are on the device
        for buffer in model.buffers():  # small ones, such as the frequencies of the positions
            buffer.data = buffer.data.to(device)
        if self.copier:  # only pinned memory is copied beside the compute
            for weight in model.parameters():
                weight.data = weight.data.pin_memory()
        children = model.get_decoder().children()
        parts = [part for child in children for part in (child if isinstance(child, nn.ModuleList) else [child])]
        parts = [part for part in parts if next(part.parameters(), None) is not None]
        for part, following in zip(parts, [*parts[1:], None], strict=True):
            part.register_forward_pre_hook(partial(self.enter, following))
            part.register_forward_hook(self.leave, always_call=True)

    def get_decoder(self):
        return self.decode

    def get_output_embeddings(self) -> Callable[[Tensor], Tensor]:
        """The head with weights on the device, for as long as the caller keeps it; a tied embedding is then shared."""
        head = self.model.get_output_embeddings()
        weights = self.fetch(head)
        self.await_copies()
        return partial(functional_call, head, weights)

    def state_dict(self) -> dict[str, Tensor]:
        return self.model.state_dict()

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        if self.copier:
            self.copier.synchronize()  # the old weights may still be on their way
        self.copies.clear()  # whoever still keeps a head keeps the old one
        self.model.load_state_dict(state)

    @torch.no_grad()
    def decode(self, **inputs) -> Any:
        """The decoder's output; afterwards none of its weights is on the device."""
        try:
            return self.model.get_decoder()(**inputs)
        finally:
            self.await_copies()  # of a layer that an error kept from running: its space must not be reused before
            self.fetched.clear()

    def fetch(self, module: nn.Module) -> dict[str, Tensor]:
        """Copies of a module's weights on the device, perhaps still on their way."""
        weights: dict[str, Tensor] = {}
        missing = []
        for name, weight in module.named_parameters():
            home = weight.detach()
            copy = self.copies.get(id(weight))
            if copy is None:
                copy = torch.empty_like(home, device=self.device)
                missing.append((copy, home))
            weights[name] = self.copies[id(weight)] = copy
        if self.copier:  # this space was another's, until what the device has been told to compute so far is done
            self.copier.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.copier) if self.copier else nullcontext():
            for copy, home in missing:
                copy.copy_(home, non_blocking=True)
        return weights

    def await_copies(self) -> None:
        """What the device computes from here on waits for every copy that was begun."""
        if self.copier:
            torch.cuda.current_stream(self.device).wait_stream(self.copier)

    def enter(self, following: nn.Module | None, part: nn.Module, _inputs) -> None:
        """Before a layer: its weights are those on the device, and the next layer's set out."""
        weights = self.fetched[part] = self.fetched.get(part) or self.fetch(part)
        self.await_copies()
        for name, weight in part.named_parameters():
            self.at_home[weight], weight.data = weight.data, weights[name]
        if following is not None:
            self.fetched[following] = self.fetch(following)

    def leave(self, part: nn.Module, _inputs, _output) -> None:
        """After a layer, also one that failed: its weights are those in host memory again."""
        for weight in part.parameters():
            weight.data = self.at_home.pop(weight, weight.data)
        self.fetched.pop(part, None)
