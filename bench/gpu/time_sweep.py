# SPDX-License-Identifier: Apache-2.0
"""Launch constants of the decode kernel: which are the fastest, on which tiers."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from itertools import product
from typing import Any, NamedTuple
from unittest.mock import patch

import torch

from bench.gpu.meta import decode_launches
from bench.gpu.shapes import LLAMA_8B, PURE, TINY, USUAL, Load, draw
from bench.gpu.timer import Candidate, Deadline, copies_needed, interleaved
from bench.gpu.verify import TOLERANCE, compare, kernels
from sglang_diffxkv.kernels.attention_part import AttentionPart
from sglang_diffxkv.kernels.decode import plan as plans
from sglang_diffxkv.kernels.decode.attend import attend_item
from sglang_diffxkv.kernels.gpu.launch import launch


class Constants(NamedTuple):
    """Tokens of a tile, warps and stages of a program, and items per multiprocessor."""

    tokens: int
    num_warps: int
    num_stages: int
    items: int

    @property
    def name(self) -> str:
        return f"{self.tokens} tokens, {self.num_warps} warps, {self.num_stages} stages, " + (
            f"{self.items} items/SM"
        )


def shipped() -> Constants:
    """What `decode.triton` launches with."""
    made = decode_launches(LLAMA_8B, 1, 3)
    attend = next(x for x in made if x.kernel is attend_item)
    tokens = attend.arguments["BLOCK_N"]
    return Constants(tokens, attend.num_warps, attend.num_stages, plans.ITEMS_PER_SM)


def grid() -> list[Constants]:
    """Those that ship first, then tiles, then how finely the work is divided."""
    first = shipped()
    tiles = [Constants(*x, first.items) for x in product((32, 64, 128), (1, 2, 4), (1, 2))]
    items = [first._replace(items=n) for n in (4, 8, 16, 24)]
    return list(dict.fromkeys((first, *items, *tiles)))


@contextmanager
def overridden(constants: Constants) -> Iterator[None]:
    """Launch the kernel with other constants."""
    module = kernels("decode")

    def changed(kernel: Any, grid: tuple[int, ...], **arguments: Any) -> None:
        if kernel is attend_item:
            arguments |= {"num_warps": constants.num_warps, "num_stages": constants.num_stages}
        launch(kernel, grid, **arguments)

    with (
        patch.object(module, "_TOKENS", constants.tokens),
        patch.object(module, "launch", changed),
        patch.object(plans, "ITEMS_PER_SM", constants.items),
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
        self.sm_scale = load.model.dim**-0.5
        self.bytes = self.layers.payload_bytes()

    def candidate(self, constants: Constants) -> tuple[Candidate, AttentionPart]:
        """Attention with these constants, and its result on the first layer."""
        layers = self.layers
        with overridden(constants):
            plan = plans.plan_decode(layers.sequences, layers.heads, layers.layout)

        def attend(i: int) -> AttentionPart:
            with overridden(constants):
                return kernels("decode").attend(
                    self.q[i], self.q[i], *layers.tables(i), layers.k_raw[i], layers.v_raw[i],
                    plan.layer(i), layers.layout, self.sm_scale,
                )  # fmt: skip

        return attend, attend(0)


def run(device: torch.device, deadline: Deadline, red: Collection[str]) -> Iterator[dict[str, Any]]:
    """Every setting beside the shipped one, on a usual mix and on each tier alone."""
    if "decode" in red or "pack" in red:
        yield {"skipped": "decode, or pack which makes its inputs, failed its checks"}
        return
    cuda = device.type == "cuda"
    mixes = (USUAL, *PURE) if cuda else (USUAL,)
    model, size = (LLAMA_8B, (64, 8192)) if cuda else (TINY, (2, 192))
    inputs = {mix: Input(Load(model, *size, mix), device) for mix in mixes}
    first = shipped()
    base = {mix: x.candidate(first) for mix, x in inputs.items()}
    settings = grid() if cuda else [first, Constants(32, 1, 2, 3)]
    for constants in settings:
        if deadline.left() < 10:
            yield {"skipped": f"no time left from {constants.name} on"}
            return
        for mix, x in inputs.items():
            record = {"constants": constants._asdict(), "mix": mix.name, "bytes": x.bytes}
            try:
                attend, part = x.candidate(constants)
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
