# SPDX-License-Identifier: Apache-2.0
"""Copies between host and device that the host does not wait for.

On a GPU every other copy does: from or to memory that is not pinned it drains the stream first.
"""

from __future__ import annotations

import torch


def upload(values: torch.Tensor, device: torch.device) -> torch.Tensor:
    """``values``, of the host, on ``device``."""
    if device.type != "cuda":
        return values.to(device)
    return values.pin_memory().to(device, non_blocking=True)


class Download:
    """The values that a device tensor has at this point of the current stream, for the host."""

    def __init__(self, source: torch.Tensor) -> None:
        self._copied: torch.cuda.Event | None = None
        self._values = source
        if source.device.type == "cuda":
            self._values = torch.empty(source.shape, dtype=source.dtype, pin_memory=True)
            self._values.copy_(source, non_blocking=True)
            self._copied = torch.cuda.Event()
            self._copied.record()

    @property
    def is_here(self) -> bool:
        """Whether `values` has nothing to wait for."""
        return self._copied is None or self._copied.query()

    def values(self) -> torch.Tensor:
        """On the host, of the source's shape and dtype; the source itself where that was there."""
        if self._copied is not None:
            self._copied.synchronize()
        return self._values


class Readback:
    """The values of a small device tensor, copied to the host when somebody looks."""

    def __init__(self, source: torch.Tensor) -> None:
        self._source = source
        self._values = torch.zeros(source.shape, dtype=source.dtype)
        self._coming: Download | None = None

    def latest(self) -> torch.Tensor:
        """On the host: the newest values that have arrived. Asks for newer ones."""
        if self._source.is_cpu:
            return self._source
        if self._source.is_meta:  # which has none
            return self._values
        if self._coming is None or self._coming.is_here:
            if self._coming is not None:
                self._values = self._coming.values()
            self._coming = Download(self._source)
        return self._values
