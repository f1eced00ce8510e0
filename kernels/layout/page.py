# SPDX-License-Identifier: Apache-2.0
"""Byte layout of a sealed page: tier formats, payload sections, frames.

The payload of one (page, layer) is the payloads of its KV heads laid one after the other in a
*virtual byte space*; the frame table of that (page, layer) maps it to frames of the arena, like
a CPU's page table: byte ``x`` lives in ``arena[frames[x // frame_bytes], x % frame_bytes]``.

Payload of one head with ``n_high`` and ``n_low`` kept tokens, in this order::

    K high [n_high, key_bytes]     V high [n_high, value_bytes]
    K low  [n_low,  key_bytes]     V low  [n_low,  value_bytes]
    meta high [n_high, 4] fp16     meta low [n_low, 4] fp16     (K scale, K zero, V scale, V zero)
    token metadata [n_high + n_low, 2] uint8                    (position in page, importance code)

Each section starts at a multiple of its own row size, each head at a multiple of ``align``, and a
frame is a multiple of ``align``, so no row straddles two frames. Raw tiers have no meta section.
Codes are in split-plane order: with ``f = 8 / bits`` codes to a byte, byte ``i`` of a row holds
elements ``i, i + D/f, i + 2D/f, ...`` from its lowest bits upwards.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Generic, NamedTuple, TypeVar

import torch

PAGE_TOKENS = 64
"""Token slots of a page (SGLang's ``page_size``)."""

META_BYTES = 8
TOKEN_METADATA_BYTES = 2
PRUNED, LOW, HIGH = 0, 1, 2
"""Tier codes of a token, as stored in tier maps (uint8)."""


@dataclass(frozen=True)
class TierFormat:
    """Bits per key and value element; 0 bits stand for raw elements of the model's dtype."""

    name: str
    key_bits: int
    value_bits: int

    @property
    def is_raw(self) -> bool:
        return self.key_bits == 0


FORMATS: dict[str, TierFormat] = {
    f.name: f
    for f in (
        TierFormat("raw", 0, 0),
        TierFormat("K8V8", 8, 8),
        TierFormat("K8V4", 8, 4),
        TierFormat("K4V8", 4, 8),
        TierFormat("K4V4", 4, 4),
        TierFormat("K4V2", 4, 2),
        TierFormat("K2V2", 2, 2),
    )
}


Count = TypeVar("Count", int, torch.Tensor)
"""Of one head, or of many: int64 tensors of one shape."""


class Sections(NamedTuple, Generic[Count]):
    """Byte offsets of the sections of a head's payload, relative to its start, and its size."""

    key_high: Count
    value_high: Count
    key_low: Count
    value_low: Count
    meta_high: Count
    meta_low: Count
    token_metadata: Count
    total: Count


def _align_up(x: Count, multiple: int) -> Count:
    return (x + (multiple - 1)) // multiple * multiple


@dataclass(frozen=True)
class PageLayout:
    """Everything a kernel needs to address sealed bytes; hashable, so usable as a cache key.

    Args:
        head_dim: D, a multiple of 16 (64, 80, 96, 128 or 256).
        num_kv_heads: KV heads per layer on this rank.
        raw_itemsize: bytes of an element of the model's dtype (2 or 4).
        high, low: formats of the two tiers.
        frame_bytes: size of a frame; a multiple of ``align``.
        max_frames: frames of the fullest (page, layer).
    """

    head_dim: int
    num_kv_heads: int
    raw_itemsize: int
    high: TierFormat
    low: TierFormat
    frame_bytes: int
    max_frames: int

    @property
    def rotates(self) -> bool:
        """Whether sealed keys are rotated (`kernels.basis.rotation`), and so must be the queries.

        Raw tiers hold the model's own bits, and both tiers are read with the same queries.
        """
        return not (self.high.is_raw or self.low.is_raw)

    def row_bytes(self, bits: int) -> int:
        """Bytes of one key or value row at ``bits`` per element (0: raw)."""
        return self.head_dim * bits // 8 if bits else self.head_dim * self.raw_itemsize

    def token_bytes(self, tier: TierFormat) -> int:
        """Bytes one kept token of one head costs in ``tier``, metadata included."""
        rows = self.row_bytes(tier.key_bits) + self.row_bytes(tier.value_bits)
        return rows + (0 if tier.is_raw else META_BYTES) + TOKEN_METADATA_BYTES

    @cached_property
    def align(self) -> int:
        """Every head's payload starts at a multiple of this many bytes."""
        bits = (self.high.key_bits, self.high.value_bits, self.low.key_bits, self.low.value_bits)
        return math.lcm(max(self.row_bytes(b) for b in bits), 16)

    def sections(self, n_high: Count, n_low: Count) -> Sections[Count]:
        """Section offsets of the payload of heads with these token counts."""
        high, low = self.high, self.low
        rows = (
            (n_high, self.row_bytes(high.key_bits)),
            (n_high, self.row_bytes(high.value_bits)),
            (n_low, self.row_bytes(low.key_bits)),
            (n_low, self.row_bytes(low.value_bits)),
            (n_high, 0 if high.is_raw else META_BYTES),
            (n_low, 0 if low.is_raw else META_BYTES),
            (n_high + n_low, TOKEN_METADATA_BYTES),
        )
        starts: list[Count] = []
        end = n_high * 0
        for n, row in rows:
            start = _align_up(end, row) if row else end
            starts.append(start)
            end = start + n * row
        return Sections._make([*starts, _align_up(end, self.align)])

    @cached_property
    def page_bytes(self) -> int:
        """Bytes of the largest (page, layer): every token kept, in the dearest mix of tiers."""
        mixes = (self.sections(n, PAGE_TOKENS - n).total for n in range(PAGE_TOKENS + 1))
        return self.num_kv_heads * max(mixes)


FRAMES_PER_FULL_PAGE = 32
"""The last frame of a (page, layer) is half empty on average: 1/64 of a full page is wasted."""


def make_layout(
    *, head_dim: int, num_kv_heads: int, raw_itemsize: int, high: TierFormat, low: TierFormat
) -> PageLayout:
    """Derive the frame size from the model's dimensions (``docs/decisions/001``).

    Raises:
        ValueError: head_dim is not a multiple of 16.
    """
    if head_dim % 16:
        raise ValueError(f"head_dim {head_dim} is not a multiple of 16")
    draft = PageLayout(head_dim, num_kv_heads, raw_itemsize, high, low, 0, 0)
    frame_bytes = _align_up(-(-draft.page_bytes // FRAMES_PER_FULL_PAGE), draft.align)
    max_frames = -(-draft.page_bytes // frame_bytes)
    return PageLayout(head_dim, num_kv_heads, raw_itemsize, high, low, frame_bytes, max_frames)
