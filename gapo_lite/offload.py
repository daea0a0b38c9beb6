"""Inputs of recomputed layers wait in the host's memory between forward and backward pass.

A layer that computes its activations again keeps its input, (1, T, H): for Llama-3-8B 8 KiB a token
and layer, 1.0 GiB of 4,096 tokens. Here it travels to pinned host memory while the next layer
computes, and comes back while the layer after it is differentiated, on a stream of its own: two of
these inputs are on the GPU at a time instead of one a layer. Numbers stay the same to the last bit.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch.autograd.graph import saved_tensors_hooks

logger = logging.getLogger(__name__)


class HostOffload:
    """The inputs of one model's layers.

    Args:
        device: where the layers are.
    """

    def __init__(self, device: torch.device):
        self._stream: Any = torch.cuda.Stream(device)
        self._newest: Callable[[], _Waiting | None] = _nothing
        self._leaving: list[tuple[torch.Tensor, Any]] = []  # inputs and the events of their copies
        self._can_pin = True

    def checkpoint(self, plain: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """A checkpointed call (`plain` is torch's `checkpoint`, not reentrant) whose inputs wait on
        the host. What the call itself saves is not seen here: checkpoint's own hooks are nearer."""
        with saved_tensors_hooks(self._pack, self._unpack):
            return plain(*args, **kwargs)

    def _pack(self, tensor: torch.Tensor) -> torch.Tensor | _Waiting:
        if tensor.dim() != 3 or not self._can_pin:  # checkpoint also saves an empty tensor
            return tensor
        try:
            host = torch.empty_like(tensor, device="cpu", pin_memory=True)
        except RuntimeError as error:  # says "out of memory", too, but means the host's
            self._can_pin = False
            logger.warning("Inputs stay on the GPU: the host gives no pinned memory (%s).", error)
            return tensor
        self._let_go()
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            host.copy_(tensor, non_blocking=True)
        self._leaving.append((tensor, self._stream.record_event()))
        waiting = _Waiting(host, tensor.device, self._newest)
        self._newest = weakref.ref(waiting)
        return waiting

    def _let_go(self) -> None:
        """Frees the input before, whose copy the computing stream waits for first. (record_stream
        would do without waiting, and hold as many inputs as the host is ahead: all of them.)"""
        for _, copied in self._leaving:
            torch.cuda.current_stream().wait_event(copied)
        self._leaving.clear()

    def _unpack(self, packed: torch.Tensor | _Waiting) -> torch.Tensor:
        if isinstance(packed, torch.Tensor):
            return packed
        self._let_go()
        self._fetch(packed)
        torch.cuda.current_stream().wait_event(packed.arrival)
        tensor, packed.tensor = packed.tensor, None
        assert tensor is not None
        if earlier := packed.earlier():  # the backward pass wants it next
            self._fetch(earlier)
        return tensor

    def _fetch(self, waiting: _Waiting) -> None:
        """Starts its way back, unless it is on it."""
        if waiting.tensor is not None:
            return
        waiting.tensor = torch.empty_like(waiting.host, device=waiting.device)
        # Its memory may be in use until here; after this it is filled beside what is computed.
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            waiting.tensor.copy_(waiting.host, non_blocking=True)
        waiting.arrival = self._stream.record_event()


class _Waiting:
    """An input on the host.

    Attributes:
        host: its values.
        device: where it belongs.
        earlier: gives the input of the layer before, if its pass still lives (a weak reference:
            what is left of a pass that ran out of memory must not be held).
        tensor: its copy on the device, once it is on the way.
        arrival: event of that copy.
    """

    def __init__(
        self, host: torch.Tensor, device: torch.device, earlier: Callable[[], _Waiting | None]
    ):
        self.host, self.device, self.earlier = host, device, earlier
        self.tensor: torch.Tensor | None = None
        self.arrival: Any = None


def _nothing() -> None:
    return None
