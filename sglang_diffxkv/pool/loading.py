# SPDX-License-Identifier: Apache-2.0
"""Copies from the host that forward passes wait for layer by layer, and the host never."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Loading:
    """On a GPU a stream of its own, and an event for each layer; elsewhere copies are done at once.

    SGLang's scheduler and its forward passes wait for each other's streams in every step: what one
    of them has waited for, the other has, too.
    """

    def __init__(self, num_layers: int, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._coming: list[torch.cuda.Event | None] = [None] * num_layers

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
        if coming is not None:
            torch.cuda.current_stream().wait_event(coming)
            self._coming[layer] = None

    def wait_all(self) -> None:
        for layer in range(len(self._coming)):
            self.wait(layer)
