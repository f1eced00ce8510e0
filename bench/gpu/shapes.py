# SPDX-License-Identifier: Apache-2.0
"""Attention shapes of the models that are timed, and the papers' mixes of tiers."""

from __future__ import annotations

from typing import NamedTuple

import torch

from bench.gpu.inputs import Layers, Mix, draw_layers
from sglang_diffxkv.kernels.pack import pack
from tests.support.layouts import layout_of


class Model(NamedTuple):
    """Attention of one rank; ``hidden`` and ``inner`` are for the products around it."""

    name: str
    heads: int
    kv_heads: int
    dim: int = 128
    hidden: int = 4096
    inner: int = 14336


LLAMA_8B = Model("Llama-3.1-8B", 32, 8)
QWEN_7B = Model("Qwen2.5-7B", 28, 4, hidden=3584, inner=18944)
LLAMA_70B = Model("Llama-3.1-70B/TP8", 8, 1, hidden=8192, inner=28672 // 8)
TINY = Model("tiny", 4, 2, 64, 64, 128)

USUAL = Mix(25, 50, 25)
MIXES = (Mix(75, 25, 0), Mix(50, 40, 10), USUAL, Mix(20, 40, 40))
PURE = (Mix(100, 0, 0), Mix(0, 100, 0))
"""One tier alone, for its rate of bytes."""

TIERS = ("K8V4", "K4V2")
OPEN_PAGES = 2
"""A full page and the one that is being written: a window of 65 to 128 tokens."""


class Load(NamedTuple):
    """A decode step: ``batch`` sequences of ``tokens`` tokens."""

    model: Model
    batch: int
    tokens: int
    mix: Mix

    @property
    def name(self) -> str:
        return f"{self.model.name} {self.batch} x {self.tokens} {self.mix.name}"

    @property
    def raw_bytes(self) -> int:
        """Of an uncompressed bf16 cache, in one layer."""
        return self.batch * self.tokens * self.model.kv_heads * self.model.dim * 4


def draw(load: Load, copies: int, device: torch.device) -> Layers:
    """Inputs of a load, with ``copies`` layers."""
    layout = layout_of(*TIERS, head_dim=load.model.dim, kv_heads=load.model.kv_heads, itemsize=2)
    return draw_layers(
        layout, load.mix, layers=copies, batch=load.batch, tokens=load.tokens,
        open_pages=OPEN_PAGES, dtype=torch.bfloat16, device=device, pack=pack,
    )  # fmt: skip
