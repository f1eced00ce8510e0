# SPDX-License-Identifier: Apache-2.0
"""Launch constants of the decode kernel: which are the fastest, on which tiers."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import asdict, astuple
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
import triton

from bench.gpu.device import kernels
from bench.gpu.shapes import LLAMA_8B, PURE, TINY, USUAL, Load, draw
from bench.gpu.timing.timer import Candidate, Deadline, copies_needed, interleaved
from bench.gpu.verify.check import TOLERANCE, compare
from sglang_diffxkv.kernels.decode import work as dividing
from sglang_diffxkv.kernels.decode.constants import Constants, attend_constants
from sglang_diffxkv.kernels.merge import AttentionState
from sglang_diffxkv.kernels.softmax import Softmax


class Setting(NamedTuple):
    """What the kernel is launched with, and work tiles per multiprocessor."""

    constants: Constants
    items: int

    @property
    def name(self) -> str:
        tokens, num_warps, num_stages, registers = astuple(self.constants)
        return (
            f"{tokens} tokens, {num_warps} warps, {num_stages} stages, {registers} registers, "
            f"{self.items} items/SM"
        )

    def record(self) -> dict[str, int]:
        return asdict(self.constants) | {"items": self.items}


def shipped() -> Setting:
    """What `decode.triton` launches with."""
    model = LLAMA_8B
    group = triton.next_power_of_2(model.heads // model.kv_heads)
    return Setting(attend_constants(max(8, group), model.dim), dividing.TILES_PER_SM)


def grid() -> list[Setting]:
    """Those that ship first; then without prefetching, and what hides more latency or less.

    Of three stages all are the frame table's, five fetch the codes a tile ahead, seven two tiles.
    """
    first = shipped()
    constants = (
        Constants(32, 1, 1, 168),
        Constants(32, 1, 3, 168),
        Constants(64, 1, 5, 255),
        Constants(32, 1, 7, 168),
        Constants(16, 1, 5, 128),
        Constants(32, 1, 5, 255),
        Constants(64, 2, 5, 168),
        Constants(64, 2, 1, 168),
    )
    changed = [first._replace(constants=x) for x in constants]
    items = [first._replace(items=n) for n in (12, 36, 18, 48)]
    return list(dict.fromkeys((first, *changed[:4], *items, *changed[4:])))


@contextmanager
def overridden(setting: Setting) -> Iterator[None]:
    """Launch the kernel with other constants."""
    module = kernels("decode")
    with (
        patch.object(module, "attend_constants", lambda *_, **__: setting.constants),
        patch.object(dividing, "TILES_PER_SM", setting.items),
    ):
        yield


class Input:
    """A load that all constants are tried on."""

    def __init__(self, load: Load, device: torch.device) -> None:
        self.device = device
        self.copies = copies_needed(load.raw_bytes / 5, device)
        self.layers = draw(load, self.copies, device)
        q = torch.randn(self.copies, load.batch, load.model.heads, load.model.dim, device=device)
        self.q = q.to(torch.bfloat16)
        self.softmax = Softmax(load.model.dim**-0.5)
        self.bytes = self.layers.payload_bytes()

    def candidate(self, setting: Setting) -> tuple[Candidate, AttentionState]:
        """Attention with this setting, and its result on the first layer."""
        layers = self.layers
        with overridden(setting):
            work = dividing.divide_work(layers.sequences, layers.heads, layers.layout)

        def attend(i: int) -> AttentionState:
            with overridden(setting):
                return kernels("decode").attend(
                    self.q[i], self.q[i], layers.pages(i), work.layer(i), self.softmax
                )

        return attend, attend(0)


def run(device: torch.device, deadline: Deadline, red: Collection[str]) -> Iterator[dict[str, Any]]:
    """Every setting beside the shipped one, on a usual mix and on each tier alone."""
    if "decode" in red or "pack" in red:
        yield {"skipped": "decode, or pack which makes its inputs, crashed or gave NaN"}
        return
    cuda = device.type == "cuda"
    mixes = (USUAL, *PURE) if cuda else (USUAL,)
    model, size = (LLAMA_8B, (64, 8192)) if cuda else (TINY, (2, 192))
    inputs = {mix: Input(Load(model, *size, mix), device) for mix in mixes}
    first = shipped()
    base = {mix: x.candidate(first) for mix, x in inputs.items()}
    settings = grid() if cuda else [first, Setting(Constants(16, 1, 1, 168), 3)]
    for setting in settings:
        if deadline.left() < 10:
            yield {"skipped": f"no time left from {setting.name} on"}
            return
        for mix, x in inputs.items():
            record = {"constants": setting.record(), "mix": mix.name, "bytes": x.bytes}
            try:
                attend, part = x.candidate(setting)
                found = compare(part, base[mix][1])
                if not max(found) <= TOLERANCE:
                    yield record | {"wrong": found._asdict()}
                    continue
                both = {"shipped": base[mix][0], "changed": attend}
                timed = interleaved(both, x.copies, device, seconds=0.2)
            except Exception as error:  # too much shared memory, or what does not compile
                yield record | {"failed": f"{type(error).__name__}: {error}"[:300]}
                continue
            yield record | {"times": {name: t._asdict() for name, t in timed.items()}}
