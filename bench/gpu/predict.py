# SPDX-License-Identifier: Apache-2.0
"""What limits a kernel on an H200, predicted from its machine code. Nothing here is measured.

Three floors on the time per head-token of a main loop: the bytes that it reads at the bandwidth of
a plain copy; the instructions that it issues, one per clock in each quarter of a multiprocessor;
and the products that its tensor cores form.
"""

from __future__ import annotations

from typing import NamedTuple

from bench.gpu.sass import Loop

BANDWIDTH = 4.3e12
"""Bytes per second of a copy, assumed."""

MULTIPROCESSORS = 132
CLOCKS = (1.755e9, 1.98e9)
"""Hz: sustained and boost."""

ISSUE_PER_CLOCK = 4
TENSOR_FLOPS_PER_CLOCK = 0.62 * 4096
"""Of one multiprocessor, fp16, by `mma.sync`: 62 % of what its asynchronous products reach."""


class Tile(NamedTuple):
    """What one iteration of a main loop handles in one thread block.

    Attributes:
        name: of the tier.
        tokens: head-tokens.
        elements: of keys and values, together.
        bytes: of payload read or written.
    """

    name: str
    tokens: int
    elements: int
    bytes: float


class Prediction(NamedTuple):
    """Of one main loop.

    Attributes:
        per_element: thread instructions per element.
        bytes, issue, tensor: floors in picoseconds per head-token, of the whole GPU, at the lower
            clock.
        limit: the name of the highest.
        share: of the bandwidth that is reached if nothing but the floors counts; at both clocks.
    """

    per_element: float
    bytes: float
    issue: float
    tensor: float
    limit: str
    share: tuple[float, float]


def predict(tile: Tile, loop: Loop, num_warps: int) -> Prediction:
    """Floors of ``loop``, one iteration of which does ``tile`` with all warps of a block."""
    issued = loop.instructions * num_warps
    flops = loop.tensor_flops * num_warps

    def floors(clock: float) -> dict[str, float]:
        """Picoseconds per head-token."""
        scale = 1e12 / tile.tokens
        return {
            "bytes": tile.bytes / BANDWIDTH * scale,
            "issue": issued / (ISSUE_PER_CLOCK * MULTIPROCESSORS * clock) * scale,
            "tensor": flops / (TENSOR_FLOPS_PER_CLOCK * MULTIPROCESSORS * clock) * scale,
        }

    low, high = (floors(clock) for clock in CLOCKS)
    return Prediction(
        issued * 32 / tile.elements,
        **low,
        limit=max(low, key=lambda name: low[name]),
        share=(low["bytes"] / max(low.values()), high["bytes"] / max(high.values())),
    )
