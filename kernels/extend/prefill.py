# SPDX-License-Identifier: Apache-2.0
"""Attention of one step's new tokens for all layers, planned once: what serves which part.

On a CPU one compiled kernel does all pages. On a GPU open pages are FlashInfer's where that was
made ready (`flashinfer`), ours elsewhere. Sealed pages are ours everywhere: heads keep different
numbers of tokens, so FlashInfer would be planned for each layer anew, and wait for the device each
time.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from sglang_diffxkv.kernels.basis.rotation import rotate
from sglang_diffxkv.kernels.basis.sealed import from_sealed
from sglang_diffxkv.kernels.extend import cpu, flashinfer
from sglang_diffxkv.kernels.extend.lists import OpenList, PageList
from sglang_diffxkv.kernels.extend.open import extend_open
from sglang_diffxkv.kernels.extend.scratch import PrefixScratch
from sglang_diffxkv.kernels.extend.sealed import extend_sealed
from sglang_diffxkv.kernels.gpu.device import on_gpu
from sglang_diffxkv.kernels.layout import PAGE_TOKENS, PageLayout
from sglang_diffxkv.kernels.merge import AttentionState, empty_state, merge_states
from sglang_diffxkv.kernels.pages import SealedTables

if TYPE_CHECKING:
    from flashinfer import BatchPrefillWithPagedKVCacheWrapper

UNPACK_FROM = 64
"""New tokens of a sequence from which its sealed pages are unpacked for dense attention: fewer meet
the codes themselves. Predicted; `bench.gpu.timing.prefill` measures where the two break even."""


class OpenPrefill:
    """`extend_open` of one step's queries: FlashInfer where it can, our kernels elsewhere.

    Only the latest object may run: FlashInfer's plan lives in a wrapper that all share.
    """

    def __init__(
        self,
        q_indptr: torch.Tensor,
        q_position: torch.Tensor,
        indptr: torch.Tensor,
        slots: torch.Tensor,
        page_position: torch.Tensor,
        last_len: torch.Tensor,
    ) -> None:
        """Remember the step's sequences; nothing is computed yet.

        Args:
            q_indptr, q_position, indptr, slots, page_position: as in `extend_open`, but a
                sequence's listed pages end with that of its last new token.
            last_len: int32 [B], tokens in each sequence's last page, 1 to 64.
        """
        self._q_indptr, self._q_position = q_indptr, q_position
        self._indptr, self._slots, self._page_position = indptr, slots, page_position
        self._last_len = last_len
        self._planned: tuple[BatchPrefillWithPagedKVCacheWrapper, float] | None = None

    def run(
        self, q: torch.Tensor, k_raw: torch.Tensor, v_raw: torch.Tensor, sm_scale: float
    ) -> AttentionState:
        """Attention of one layer; arguments as in `extend_open`.

        The first layer plans for all. So does one whose scale differs from the last one's.
        """
        where = (self._indptr, self._slots, self._page_position)
        if not flashinfer.supports(q):
            new = self._q_indptr, self._q_position
            return extend_open(q, *new, k_raw, v_raw, *where, sm_scale)
        if self._planned is None or self._planned[1] != sm_scale:
            wrapper = flashinfer.plan(
                q, self._q_indptr, k_raw, self._indptr, self._slots, self._last_len, sm_scale
            )
            self._planned = wrapper, sm_scale
        return flashinfer.run(self._planned[0], q, k_raw, v_raw)


class SealedPrefill:
    """`extend_sealed` of one step's queries: fused or, for sequences with many, unpacked."""

    def __init__(
        self,
        q_indptr: torch.Tensor,
        sealed: PageList,
        new: list[int],
        prefix: list[int],
        scratch: PrefixScratch | None,
    ) -> None:
        """Divide the step's sequences; the host does not wait for the device.

        Args:
            q_indptr: int32 [B + 1], new tokens of each sequence. sealed: their sealed pages.
            new, prefix: the numbers of tokens of each sequence, new and earlier ones, on the host.
            scratch: to unpack to, on a GPU; None: nothing is unpacked.
        """
        self._q_indptr, self._scratch = q_indptr, scratch
        self._fused: PageList | None = sealed
        self._unpacked: PageList | None = None
        if scratch is None:
            return
        most = [0, 0]
        for tokens, earlier in zip(new, prefix, strict=True):
            most[tokens >= UNPACK_FROM] += earlier // PAGE_TOKENS
        if not most[0]:
            self._fused, self._unpacked = None, sealed
        elif most[1]:
            unpacks = q_indptr.diff() >= UNPACK_FROM
            self._fused = _select(sealed, ~unpacks, most[0])
            self._unpacked = _select(sealed, unpacks, most[1])

    def run(
        self,
        q: torch.Tensor,
        arena: torch.Tensor,
        frames: torch.Tensor,
        heads: torch.Tensor,
        layout: PageLayout,
        sm_scale: float,
    ) -> AttentionState:
        """Attention of one layer; arguments as in `extend_sealed`."""
        tables = arena, frames, heads
        if self._fused is not None:
            part = extend_sealed(q, self._q_indptr, *tables, *self._fused, layout, sm_scale)
        else:
            part = empty_state(q)
        if self._unpacked is not None:
            from sglang_diffxkv.kernels.extend.unpacked import extend_unpacked  # needs Triton

            assert self._scratch is not None
            lists = *tables, *self._unpacked
            extend_unpacked(part, q, self._q_indptr, *lists, layout, sm_scale, self._scratch)
        return part


class Prefill:
    """Attention of one step's new tokens over all pages of their sequences."""

    def __init__(
        self,
        q_indptr: torch.Tensor,
        open_list: OpenList,
        last_len: torch.Tensor,
        sealed: PageList | None,
        new: list[int],
        prefix: list[int],
        scratch: PrefixScratch | None,
    ) -> None:
        """Note what all layers share; arguments as in `OpenPrefill` and `SealedPrefill`.

        Args:
            sealed: None if no sequence has sealed pages.
        """
        library = None if on_gpu(q_indptr) else cpu.library()
        if library is not None:
            self._compiled: cpu.Extend | None = cpu.Extend(library, q_indptr, open_list, sealed)
            return
        self._compiled = None
        self._open = OpenPrefill(q_indptr, *open_list, last_len)
        self._sealed: SealedPrefill | None = None
        if sealed is not None:
            self._sealed = SealedPrefill(q_indptr, sealed, new, prefix, scratch)

    def run(
        self,
        q: torch.Tensor,
        k_raw: torch.Tensor,
        v_raw: torch.Tensor,
        tables: SealedTables,
        key_mean: torch.Tensor,
        sm_scale: float,
    ) -> AttentionState:
        """Attention of one layer.

        Args:
            q: [T, Hq, D], not rotated. k_raw, v_raw: as in `extend_open`.
            tables: of the sealed pages. key_mean: fp32 [H, D], which their keys lack where they
                rotate.
            sm_scale: factor of the scores.
        """
        rotates = tables.layout.rotates
        if self._compiled is not None:
            mean = key_mean if rotates else None
            return self._compiled.run(q, (k_raw, v_raw), tables, sm_scale, mean)
        part = self._open.run(q, k_raw, v_raw, sm_scale)
        if self._sealed is None:
            return part
        if not rotates:
            return merge_states(part, self._sealed.run(q, *tables, sm_scale))
        sealed = self._sealed.run(rotate(q.float()), *tables, sm_scale)
        return merge_states(part, from_sealed(sealed, q, key_mean, sm_scale))


def _select(sealed: PageList, chosen: torch.Tensor, most: int) -> PageList:
    """The pages of some sequences; the others have none.

    Args:
        chosen: bool [B]. most: pages of these sequences at most: the list is as long, and filled up
            with page 0, which has no tokens.
    """
    n = len(sealed.pages)
    most = min(most, n)
    counts = sealed.indptr.diff()
    indptr = torch.nn.functional.pad((counts * chosen).cumsum(0), (1, 0)).to(torch.int32)
    mine = torch.repeat_interleave(chosen, counts, output_size=n)
    place = torch.where(mine, mine.cumsum(0) - 1, most)  # the rest goes to a place that is cut off
    pages = sealed.pages.new_zeros(most + 1).scatter_(0, place, sealed.pages)
    return PageList(indptr, pages[:most])
