# SPDX-License-Identifier: Apache-2.0
"""What operations are compiled for: attention of real models, as meta tensors of their shapes."""

from __future__ import annotations

from typing import NamedTuple

import torch

from sglang_diffxkv.kernels.layout import PAGE_TOKENS, PageLayout
from sglang_diffxkv.kernels.pages import OpenPages, Queries, SealedPages, SealedTables
from sglang_diffxkv.kernels.softmax import Softmax
from tests.support.layouts import layout_of

BATCH, PAGES, OPEN_PAGES, QUERIES, FRAMES = 64, 8192, 192, 2048, 65536
"""Sequences; sealed pages listed and in the tables; raw pages; new tokens; frames of the arena."""


class Model(NamedTuple):
    """Attention of one rank."""

    name: str
    heads: int
    kv_heads: int
    head_dim: int


LLAMA_8B = Model("Llama-3.1-8B", 32, 8, 128)
MODELS = (
    LLAMA_8B,
    Model("Qwen2.5-7B", 28, 4, 128),
    Model("Llama-3.1-70B TP8", 8, 1, 128),
    Model("Qwen3-235B", 64, 4, 128),
    Model("Qwen2.5-0.5B", 14, 2, 64),
    Model("Phi-2", 32, 32, 80),
    Model("Phi-3-mini", 32, 32, 96),
    Model("Gemma-2-9B", 16, 8, 256),
)
TIERS = ("K8V4", "K4V2")


class Setting(NamedTuple):
    """What an operation is called for; its tensors are on the meta device."""

    model: Model
    layout: PageLayout
    dtype: torch.dtype

    @property
    def name(self) -> str:
        tiers = f"{self.layout.high.name}/{self.layout.low.name}"
        return f"{self.model.name} {tiers} {str(self.dtype).removeprefix('torch.')}"

    @property
    def softmax(self) -> Softmax:
        return Softmax(self.model.head_dim**-0.5)

    def of_model(self, *shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=self.dtype, device="meta")

    def queries(self, count: int) -> torch.Tensor:
        return self.of_model(count, self.model.heads, self.model.head_dim)

    def new_tokens(self, count: int, sequences: int) -> Queries:
        return Queries(self.queries(count), ints(sequences + 1), ints(sequences))

    def raw_pages(self) -> torch.Tensor:
        return self.of_model(OPEN_PAGES, PAGE_TOKENS, self.model.kv_heads, self.model.head_dim)

    def accumulated(self) -> torch.Tensor:
        return floats(OPEN_PAGES, self.model.kv_heads, PAGE_TOKENS)

    def arena(self) -> torch.Tensor:
        return torch.empty(FRAMES, self.layout.frame_bytes, dtype=torch.uint8, device="meta")

    def key_mean(self) -> torch.Tensor | None:
        shape = self.model.kv_heads, self.model.head_dim
        return torch.empty(shape, device="meta") if self.layout.rotates else None

    def sealed_pages(self, sequences: int, pages: int) -> SealedPages:
        """So many of `PAGES` pages, of so many sequences."""
        return self.sealed().listed(ints(sequences + 1), ints(pages))

    def opened(self) -> OpenPages:
        """`OPEN_PAGES` pages of `BATCH` sequences."""
        raw = self.raw_pages()
        return OpenPages(raw, raw, ints(BATCH + 1), ints(OPEN_PAGES), ints(OPEN_PAGES))

    def tables(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Frame table and head records of `PAGES` pages."""
        return ints(PAGES, self.layout.max_frames), ints(PAGES, self.model.kv_heads, 2)

    def sealed(self) -> SealedTables:
        return SealedTables(self.arena(), *self.tables(), self.layout)

    def tiers(self) -> torch.Tensor:
        shape = PAGES, self.model.kv_heads, PAGE_TOKENS
        return torch.empty(shape, dtype=torch.uint8, device="meta")


def ints(*shape: int) -> torch.Tensor:
    return torch.empty(shape, dtype=torch.int32, device="meta")


def floats(*shape: int) -> torch.Tensor:
    return torch.empty(shape, dtype=torch.float32, device="meta")


def setting(
    model: Model, tiers: tuple[str, str] = TIERS, dtype: torch.dtype = torch.bfloat16
) -> Setting:
    """A model with a pair of tiers."""
    layout = layout_of(
        *tiers, head_dim=model.head_dim, kv_heads=model.kv_heads, itemsize=dtype.itemsize
    )
    return Setting(model, layout, dtype)


SETTINGS = (
    *(setting(model) for model in MODELS),
    setting(LLAMA_8B, ("raw", "K4V2")),
    setting(LLAMA_8B, ("K8V8", "K4V4")),
    setting(LLAMA_8B, dtype=torch.float16),
)
