# SPDX-License-Identifier: Apache-2.0
"""Random sealed pages for tests of the kernels: raw pages, tier maps, tables, a poisoned arena."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from sglang_diffxkv.kernels.layout import HIGH, LOW, PAGE_TOKENS, PRUNED, PageLayout, measure
from sglang_diffxkv.kernels.pack import Grades, RawTokens
from sglang_diffxkv.kernels.pages import SealedTables


@dataclass(frozen=True)
class Sealed:
    """S sealed pages of one layer and what they were made from."""

    layout: PageLayout
    k_raw: torch.Tensor
    v_raw: torch.Tensor
    slots: torch.Tensor
    tiers: torch.Tensor
    importance: torch.Tensor
    frames: torch.Tensor
    heads: torch.Tensor
    arena: torch.Tensor

    @property
    def raw(self) -> RawTokens:
        return RawTokens(self.k_raw, self.v_raw, self.slots)

    @property
    def grades(self) -> Grades:
        return Grades(self.tiers, self.importance)

    @property
    def tables(self) -> SealedTables:
        return SealedTables(self.arena, self.frames, self.heads, self.layout)

    def to(self, device: torch.device) -> Sealed:
        """The same on another device."""
        moved = {k: x.to(device) for k, x in vars(self).items() if isinstance(x, torch.Tensor)}
        return replace(self, **moved)


def random_tiers(seed: int, pages: int, heads: int) -> torch.Tensor:
    """Tier maps uint8 [pages, heads, 64] with very different shares; some all in one tier."""
    gen = torch.Generator().manual_seed(seed)
    shares = torch.rand(pages, heads, 1, 3, generator=gen) ** 3 + 1e-3
    draws = torch.rand(pages, heads, PAGE_TOKENS, 1, generator=gen)
    edges = (shares / shares.sum(-1, keepdim=True)).cumsum(-1)[..., :2]
    tiers = (draws > edges).sum(-1).to(torch.uint8)
    if pages:
        tiers[0, 0] = PRUNED
        tiers[-1, -1] = (LOW, HIGH)[seed % 2]
    return tiers


def seal(
    layout: PageLayout,
    *,
    pages: int,
    dtype: torch.dtype,
    pack: Callable[[RawTokens, Grades, SealedTables], None],
    tiers: int | torch.Tensor | None = None,
    k: torch.Tensor | None = None,
    v: torch.Tensor | None = None,
) -> Sealed:
    """Pack random pages into an arena poisoned with 0xFF; unused raw pages hold NaN.

    Args:
        tiers: uint8 [pages, H, 64], one tier code for all tokens, or None for random ones.
        k, v: [pages, 64, H, D] contents, random if None.
    """
    heads, dim = layout.num_kv_heads, layout.head_dim
    shape = (pages, PAGE_TOKENS, heads, dim)
    slots = torch.randperm(2 * pages + 1)[:pages].int()
    raws = []
    for given in (k, v):
        raw = torch.full((2 * pages + 1, *shape[1:]), torch.nan, dtype=dtype)
        raw[slots.long()] = (torch.randn(shape) if given is None else given).to(dtype)
        raws.append(raw)
    if tiers is None:
        tiers = random_tiers(int(torch.randint(1 << 30, ())), pages, heads)
    elif isinstance(tiers, int):
        tiers = torch.full((pages, heads, PAGE_TOKENS), tiers, dtype=torch.uint8)
    words, nbytes = measure(tiers, layout)
    counts = -(-nbytes // layout.frame_bytes)
    total = int(counts.sum())
    width = max(layout.max_frames, int(counts.max()) if pages else 0)
    frames = torch.full((pages, width), -1, dtype=torch.int32)
    frames[torch.arange(width) < counts[:, None]] = torch.randperm(total + 3)[:total].int()
    arena = torch.full((total + 3, layout.frame_bytes), 0xFF, dtype=torch.uint8)
    importance = torch.randint(0, 256, tiers.shape, dtype=torch.uint8)
    sealed = Sealed(layout, *raws, slots, tiers, importance, frames, words, arena)
    pack(sealed.raw, sealed.grades, sealed.tables)
    return sealed
