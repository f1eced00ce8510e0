# SPDX-License-Identifier: Apache-2.0
"""Random sealed arenas, made head by head: slow, and independent of the kernels.

Everything that no kernel may read is poisoned: arena bytes 0xFF (NaN in every float format),
unused entries of frame tables -1.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sglang_diffxkv.kernels.layout import (
    HIGH,
    LOW,
    PAGE_TOKENS,
    PRUNED,
    PageLayout,
    head_records,
)
from sglang_diffxkv.kernels.pack.quantize import CLIP
from sglang_diffxkv.kernels.pages import SealedTables


@dataclass(frozen=True, eq=False)
class SealedArena:
    """One layer's sealed pages.

    Attributes:
        layout, arena, frames, heads: `SealedTables`.
        keys, values: float64 [V, 64, H, D], dequantized; meaningless where ``tiers`` is PRUNED.
        tiers: uint8 [V, 64, H].
    """

    layout: PageLayout
    arena: torch.Tensor
    frames: torch.Tensor
    heads: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    tiers: torch.Tensor

    @property
    def tables(self) -> SealedTables:
        return SealedTables(self.arena, self.frames, self.heads, self.layout)


def random_tiers(
    pages: int, kv_heads: int, shares: tuple[float, float, float], gen: torch.Generator
) -> torch.Tensor:
    """Tiers uint8 [pages, 64, H] with about these shares of high, low and pruned tokens.

    The shares vary from head to head, and now and then a page's head keeps nothing or everything.
    """
    spread = torch.tensor(shares) * (0.25 + 1.5 * torch.rand(pages, kv_heads, 3, generator=gen))
    draws = torch.multinomial(spread.view(-1, 3), PAGE_TOKENS, replacement=True, generator=gen)
    tiers = torch.tensor([HIGH, LOW, PRUNED], dtype=torch.uint8)[draws]
    tiers = tiers.view(pages, kv_heads, PAGE_TOKENS).transpose(1, 2).contiguous()
    odd = torch.rand(pages, 1, kv_heads, generator=gen).expand_as(tiers)
    for tier, below in ((HIGH, 0.15), (LOW, 0.1), (PRUNED, 0.05)):
        tiers[odd < below] = tier
    return tiers


def quantize(rows: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes, scales and zeros (both rounded to fp16) of rows float64 [n, D]."""
    low, high = rows.amin(1, keepdim=True), rows.amax(1, keepdim=True)
    scale, zero = ((high - low) / (2**bits - 1)).half(), low.half()
    codes = ((rows - zero.double()) / scale.double()).round().clamp(0, 2**bits - 1)
    return codes, scale, zero


def pack_codes(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Split-plane bytes uint8 [n, D * bits / 8] of codes [n, D]."""
    planes = codes.to(torch.int64).unflatten(1, (8 // bits, -1))
    shifts = torch.arange(0, 8, bits).view(-1, 1)
    return (planes << shifts).sum(1).to(torch.uint8)


def _store(space: torch.Tensor, at: int, data: torch.Tensor) -> None:
    raw = data.contiguous().view(torch.uint8).flatten()
    space[at : at + len(raw)] = raw


def _pack_head(
    layout: PageLayout,
    space: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    tiers: torch.Tensor,
    raw_dtype: torch.dtype,
) -> int:
    """Pack one head's tokens to the start of ``space``; key and value [64, D] become dequantized.

    Returns the bytes used.
    """
    high, low = (tiers == HIGH).nonzero().flatten(), (tiers == LOW).nonzero().flatten()
    s = layout.sections(len(high), len(low))
    for tier, tokens, starts, meta_start in (
        (layout.high, high, (s.key_high, s.value_high), s.meta_high),
        (layout.low, low, (s.key_low, s.value_low), s.meta_low),
    ):
        meta: list[torch.Tensor] = []
        bits_of = (tier.key_bits, tier.value_bits)
        for x, bits, start in zip((key, value), bits_of, starts, strict=True):
            if tier.is_raw:
                rows = x[tokens].to(raw_dtype)
                x[tokens] = rows.double()
            else:
                codes, scale, zero = quantize(x[tokens], bits)
                rows = pack_codes(codes, bits)
                x[tokens] = codes * scale.double() + zero.double()
                meta += [scale, zero]
            _store(space, start, rows)
        if meta:
            _store(space, meta_start, torch.cat(meta, 1))
    return s.total


def build_sealed(
    layout: PageLayout,
    tiers: torch.Tensor,
    gen: torch.Generator,
    raw_dtype: torch.dtype = torch.float32,
    value_size: float = 1.0,
) -> SealedArena:
    """Seal random keys and values with these tiers, in shuffled frames of a poisoned arena.

    ``value_size`` is the standard deviation of values; that of keys is 1.
    """
    pages, _, kv_heads = tiers.shape
    keys = torch.randn(pages, PAGE_TOKENS, kv_heads, layout.head_dim, generator=gen).double()
    values = torch.randn(keys.shape, generator=gen).double() * value_size
    heads = torch.zeros(pages, kv_heads, 2, dtype=torch.int32)
    frames = torch.full((pages, layout.max_frames), -1, dtype=torch.int32)
    pool = torch.randperm(pages * layout.max_frames + 1, generator=gen).to(torch.int32)
    arena = torch.full((len(pool), layout.frame_bytes), 0xFF, dtype=torch.uint8)
    taken = 0
    for page in range(pages):
        space = torch.full((layout.max_frames * layout.frame_bytes,), 0xFF, dtype=torch.uint8)
        used = 0
        for h in range(kv_heads):
            tier = tiers[page, :, h]
            n_high, n_low = int((tier == HIGH).sum()), int((tier == LOW).sum())
            counts = (torch.tensor(n) for n in (used, n_high, n_low))
            heads[page, h] = head_records(*counts)
            key, value = keys[page, :, h], values[page, :, h]
            used += _pack_head(layout, space[used:], key, value, tier, raw_dtype)
        count = -(-used // layout.frame_bytes)
        frames[page, :count] = pool[taken : taken + count]
        arena[frames[page, :count].long()] = space.view(-1, layout.frame_bytes)[:count]
        taken += count
    return SealedArena(layout, arena, frames, heads, keys, values, tiers)


def page_lists(lengths: list[int], pages: int, gen: torch.Generator) -> tuple[torch.Tensor, ...]:
    """``indptr`` and page ids (int32) for sequences of these many pages, drawn with repetition."""
    indptr = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    listed = torch.randint(pages, (int(indptr[-1]),), generator=gen, dtype=torch.int32)
    return indptr, listed


def error_norm(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative error of the norm; NaN and inf in ``actual`` show as NaN."""
    diff = (actual.double() - expected.double()).norm()
    return float(diff / expected.double().norm().clamp_min(1e-30))


def error_bound(bits: int) -> float:
    """Largest error of an element in shares of its row's range: half a step, or what is clipped.

    ``bits`` 0 are raw elements.
    """
    if bits == 0:
        return 0.0
    return 1.04 * max(CLIP[bits] / (2**bits - 1) / 2, (1 - CLIP[bits]) / 2)
