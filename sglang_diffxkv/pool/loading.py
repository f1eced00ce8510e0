# SPDX-License-Identifier: Apache-2.0
"""Copies from the host that forward passes wait for layer by layer, and the host never."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Loading:
    """On a GPU a stream of its own, and an event for each layer; elsewhere copies are done at once.

    Whoever waits does so for all: a forward pass's stream waits for the scheduler's before it
    begins, and the scheduler's for it once it is launched (`patches.forward` sees to that).
    """

    def __init__(self, num_layers: int, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._coming: list[torch.cuda.Event | None] = [None] * num_layers
        self._kept: deque[tuple[torch.cuda.Event, torch.Tensor]] = deque()

    @contextmanager
    def layers(self, *used: torch.Tensor) -> Iterator[range]:
        """The layers to copy, behind what the current stream has done; call `copied` after each.

        Args:
            used: tensors that the copies use, which may be freed before these are done.
        """
        layers = range(len(self._coming))
        if self._stream is None:
            yield layers
            return
        self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        with torch.cuda.stream(self._stream):
            yield layers
        for tensor in used:
            tensor.record_stream(self._stream)

    def copied(self, layer: int) -> None:
        """What was copied so far, of this layer, is to be waited for by `wait`."""
        if self._stream is not None:
            self._coming[layer] = self._stream.record_event()

    def wait(self, layer: int) -> None:
        """Have the current stream wait for the layer's copies."""
        coming = self._coming[layer]
        if self._stream is not None and coming is not None:
            torch.cuda.current_stream(self._stream.device).wait_event(coming)
            self._coming[layer] = None

    def wait_all(self) -> None:
        for layer in range(len(self._coming)):
            self.wait(layer)

    def keep(self, memory: torch.Tensor) -> None:
        """Keep pinned memory that kernels of the current stream use until they have: torch knows
        only of its own copies, and would give it to somebody else once nobody refers to it."""
        if self._stream is None:
            return
        while self._kept and self._kept[0][0].query():
            self._kept.popleft()
        used = torch.cuda.current_stream(self._stream.device).record_event()
        self._kept.append((used, memory))
