# SPDX-License-Identifier: Apache-2.0
"""Random pages on a device: tiers, tables, sealed payload and raw pages of several layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from sglang_diffxkv.kernels.decode.work import SequencePages
from sglang_diffxkv.kernels.layout import (
    META_BYTES,
    PAGE_TOKENS,
    PageLayout,
    TierFormat,
    head_counts,
    measure,
)
from sglang_diffxkv.kernels.pack import Grades, RawTokens
from sglang_diffxkv.kernels.pages import LayerPages, SealedPages, SealedTables

PACKED_AT_ONCE = 4096
"""(page, layer)s whose tiers, importance and scratch exist at one time."""

RAGGED = 0.5
"""Standard deviation of the logarithm of a share, from head to head and again from page to page."""


class Mix(NamedTuple):
    """Percent of the tokens that are of the high tier, of the low one, and pruned."""

    high: float
    low: float
    pruned: float

    @property
    def name(self) -> str:
        return "/".join(f"{share:g}" for share in self)


class Layers(NamedTuple):
    """Pages of B sequences in L layers: all but the last pages of each are sealed.

    Attributes:
        arena: uint8 [F, frame_bytes], of all layers.
        frames, heads: int32 [L, V, max_frames] and [L, V, H, 2], the tables.
        k_raw, v_raw: [L, R, 64, H, D] raw pages.
        sequences: their pages, shuffled.
        sealed_indptr, sealed_pages: int32 [B + 1] and [N], the sealed ones alone.
    """

    layout: PageLayout
    arena: torch.Tensor
    frames: torch.Tensor
    heads: torch.Tensor
    k_raw: torch.Tensor
    v_raw: torch.Tensor
    sequences: SequencePages
    sealed_indptr: torch.Tensor
    sealed_pages: torch.Tensor

    def tables(self, layer: int) -> SealedTables:
        """Of the sealed pages."""
        return SealedTables(self.arena, self.frames[layer], self.heads[layer], self.layout)

    def sealed(self, layer: int) -> SealedPages:
        """The sealed pages, of each sequence."""
        return self.tables(layer).listed(self.sealed_indptr, self.sealed_pages)

    def pages(self, layer: int, key_mean: torch.Tensor | None = None) -> LayerPages:
        """All pages."""
        return LayerPages(self.tables(layer), self.k_raw[layer], self.v_raw[layer], key_mean)

    def payload_bytes(self) -> float:
        """Bytes of codes, scales and raw tokens that attention reads per layer, on average."""
        n_high, n_low = head_counts(self.heads[:, self.sealed_pages.long()])
        high, low = self.layout.high, self.layout.low
        sealed = int(n_high.sum()) * read_bytes(self.layout, high)
        sealed += int(n_low.sum()) * read_bytes(self.layout, low)
        return sealed / len(self.heads) + self.open_tokens() * self.raw_token_bytes()

    def open_tokens(self) -> int:
        """Tokens in open pages, of all sequences."""
        last = self.sequences.last_len
        return int(last.sum()) + (len(self.k_raw[0]) - len(last)) * PAGE_TOKENS

    def raw_token_bytes(self) -> int:
        """Bytes of an uncompressed token in one layer."""
        layout = self.layout
        return 2 * layout.num_kv_heads * layout.head_dim * layout.raw_itemsize

    def shares(self) -> tuple[float, float]:
        """High and low tokens as shares of the sealed ones, as drawn."""
        n_high, n_low = head_counts(self.heads[:, self.sealed_pages.long()])
        tokens = n_high.numel() * PAGE_TOKENS
        return int(n_high.sum()) / tokens, int(n_low.sum()) / tokens


def read_bytes(layout: PageLayout, tier: TierFormat) -> int:
    """Bytes that attention reads of a kept token of one head: its notes are not among them."""
    rows = layout.row_bytes(tier.key_bits) + layout.row_bytes(tier.value_bits)
    return rows + (0 if tier.is_raw else META_BYTES)


def draw_tiers(mix: Mix, pages: int, heads: int, device: torch.device) -> torch.Tensor:
    """Tier maps uint8 [pages, heads, 64] whose counts differ from page to page and head to head."""
    shares = torch.tensor([mix.pruned, mix.low, mix.high], device=device).clamp(min=1e-9)
    spread = torch.randn(pages, heads, 3, device=device) + torch.randn(1, heads, 3, device=device)
    odds = (shares.log() + RAGGED * spread).softmax(-1)
    draws = torch.rand(pages, heads, PAGE_TOKENS, device=device)
    above_pruned = draws >= odds[..., :1]
    above_low = draws >= odds[..., :1] + odds[..., 1:2]
    return above_pruned.to(torch.uint8) + above_low.to(torch.uint8)


def shuffled_frames(counts: torch.Tensor, max_frames: int) -> tuple[torch.Tensor, int]:
    """Frame table int32 [N, max_frames] with ``counts`` frames in each row, -1 elsewhere.

    Returns:
        The table, and how many frames there are: one more than are used.
    """
    total = int(counts.sum())
    table = counts.new_full((len(counts), max_frames), -1, dtype=torch.int32)
    used = torch.arange(max_frames, device=counts.device) < counts[:, None]
    table[used] = torch.randperm(total + 1, device=counts.device)[:total].int()
    return table, total + 1


def draw_layers(
    layout: PageLayout,
    mix: Mix,
    *,
    layers: int,
    batch: int,
    tokens: int,
    open_pages: int,
    dtype: torch.dtype,
    device: torch.device,
    pack: Callable[[RawTokens, Grades, SealedTables], None],
) -> Layers:
    """Sequences of ``tokens`` tokens each, but for the last page's, whose length is random.

    Unwritten bytes of the arena are 0xFF, which is NaN as fp16 and bf16; unwritten tokens are NaN.

    Args:
        open_pages: pages at the end of each sequence that stay open.
        pack: writes the payload, as `kernels.pack.pack` does.
    """
    heads, dim = layout.num_kv_heads, layout.head_dim
    pages = -(-tokens // PAGE_TOKENS)
    per_sequence = pages - min(pages, open_pages)
    virtual = torch.randperm(batch * pages, device=device).int().view(batch, pages)
    sealed = virtual[:, :per_sequence].reshape(-1)
    tiers = [draw_tiers(mix, len(sealed), heads, device) for _ in range(layers)]
    words, nbytes = measure(torch.stack(tiers), layout)
    counts = -(-nbytes // layout.frame_bytes)
    table, total = shuffled_frames(counts.flatten(), layout.max_frames)
    arena = torch.full((total, layout.frame_bytes), 0xFF, dtype=torch.uint8, device=device)
    source = torch.randn(2, min(64, PAGE_TOKENS), PAGE_TOKENS, heads, dim, device=device).to(dtype)
    table = table.view(layers, len(sealed), layout.max_frames)
    for layer in range(layers):
        for at in range(0, len(sealed), PACKED_AT_ONCE):
            part = slice(at, at + PACKED_AT_ONCE)
            slots = torch.arange(len(sealed[part]), device=device) % source.shape[1]
            chosen = tiers[layer][part]
            grades = Grades(chosen, torch.zeros_like(chosen))
            tables = SealedTables(arena, table[layer, part], words[layer, part], layout)
            pack(RawTokens(source[0], source[1], slots), grades, tables)
    frames = table.new_full((layers, batch * pages, layout.max_frames), -1)
    records = words.new_zeros(layers, batch * pages, heads, 2)
    frames[:, sealed.long()] = table
    records[:, sealed.long()] = words
    return _with_open_pages(layout, arena, frames, records, virtual, per_sequence, dtype)


def _with_open_pages(
    layout: PageLayout,
    arena: torch.Tensor,
    frames: torch.Tensor,
    records: torch.Tensor,
    virtual: torch.Tensor,
    per_sequence: int,
    dtype: torch.dtype,
) -> Layers:
    """Add raw pages for what is not sealed of ``virtual`` (int32 [B, pages])."""
    batch, pages = virtual.shape
    device, layers = arena.device, len(frames)
    opened = virtual[:, per_sequence:]
    raw_slot = virtual.new_full((batch * pages,), -1)
    raw_slot[opened.reshape(-1).long()] = torch.randperm(opened.numel(), device=device).int()
    shape = (layers, opened.numel(), PAGE_TOKENS, layout.num_kv_heads, layout.head_dim)
    k_raw, v_raw = (torch.randn(shape, device=device).to(dtype) for _ in range(2))
    last_len = torch.randint(1, PAGE_TOKENS + 1, (batch,), device=device, dtype=torch.int32)
    if opened.numel():
        beyond = torch.arange(PAGE_TOKENS, device=device) >= last_len[:, None]
        sequence, token = beyond.nonzero().unbind(1)
        slot = raw_slot[opened[:, -1].long()].long()[sequence]
        for raw in (k_raw, v_raw):
            raw[:, slot, token] = torch.nan
    starts = torch.arange(batch + 1, device=device, dtype=torch.int32)
    sequences = SequencePages(
        virtual.reshape(-1),
        starts[:-1] * pages,
        virtual.new_full((batch,), pages),
        raw_slot if opened.numel() else None,
        last_len,
    )
    sealed = virtual[:, :per_sequence].reshape(-1)
    return Layers(
        layout, arena, frames, records, k_raw, v_raw, sequences, starts * per_sequence, sealed
    )
