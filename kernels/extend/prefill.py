# SPDX-License-Identifier: Apache-2.0
"""Attention of one step's new tokens for all layers, planned once: what serves which part.

On a CPU one compiled kernel does all pages. On a GPU open pages are FlashInfer's where that was
made ready (`flashinfer`), ours elsewhere. Sealed pages are ours everywhere: heads keep different
numbers of tokens, so FlashInfer would be planned for each layer anew, and wait for the device each
time.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

from sglang_diffxkv.kernels.basis.rotation import rotate
from sglang_diffxkv.kernels.basis.sealed import from_sealed
from sglang_diffxkv.kernels.extend import cpu, extend_open, extend_sealed, flashinfer
from sglang_diffxkv.kernels.extend.scratch import PrefixScratch, UnpackedPages
from sglang_diffxkv.kernels.gpu.device import on_gpu
from sglang_diffxkv.kernels.layout import PAGE_TOKENS
from sglang_diffxkv.kernels.merge import AttentionState, add_sinks, empty_state, merge_states
from sglang_diffxkv.kernels.pages import (
    LayerPages,
    OpenLists,
    OpenPages,
    Queries,
    SealedLists,
    SealedTables,
)
from sglang_diffxkv.kernels.softmax import Softmax

if TYPE_CHECKING:
    from flashinfer import BatchPrefillWithPagedKVCacheWrapper

UNPACK_FROM = 64
"""New tokens of a sequence from which its sealed pages are unpacked for dense attention: fewer meet
the codes themselves. Predicted; `bench.gpu.timing.prefill` measures where the two break even."""


class PrefillBatch(NamedTuple):
    """The B sequences of a prefill, for all layers, or for all that have the same pages.

    Attributes:
        indptr, position: of their new tokens, as in `Queries`.
        opened: open pages; a sequence's end with that of its last new token. Of layers with a
            window, all pages from that on which holds the first token that the first new token
            sees; all their slots hold numbers.
        last_len: int32 [B], tokens of each sequence's last open page, 1 to 64.
        sealed: None if there are none.
        new, prefix: numbers of tokens of each sequence, new and earlier ones, on the host.
    """

    indptr: torch.Tensor
    position: torch.Tensor
    opened: OpenLists
    last_len: torch.Tensor
    sealed: SealedLists | None
    new: list[int]
    prefix: list[int]


class OpenPrefill:
    """`extend_open` of one step's queries: FlashInfer where it can, our kernels elsewhere.

    Of those that run with the same softmax, only the latest may: FlashInfer's plan lives in a
    wrapper that they share.

    Args:
        last_len: int32 [B], tokens of each sequence's last listed page, 1 to 64, which is that of
            its last new token.
    """

    def __init__(self, last_len: torch.Tensor) -> None:
        self._last_len = last_len
        self._planned: dict[Softmax, BatchPrefillWithPagedKVCacheWrapper] = {}

    def attend(self, queries: Queries, opened: OpenPages, softmax: Softmax) -> AttentionState:
        """Attention of one layer; arguments as in `extend_open`.

        The first layer plans for all with the same softmax but for its sinks.
        """
        softmax = softmax.of_part
        if not flashinfer.supports(queries.q, softmax):
            return extend_open(queries, opened, softmax)
        if softmax not in self._planned:
            self._planned[softmax] = flashinfer.plan(queries, opened, self._last_len, softmax)
        return flashinfer.run(self._planned[softmax], queries.q, opened.keys, opened.values)


class SealedPrefill:
    """`extend_sealed` of one step's queries: fused or, for sequences with many, unpacked."""

    def __init__(self, batch: PrefillBatch, scratch: PrefixScratch | None) -> None:
        """Divide the step's sequences; the host does not wait for the device.

        Args:
            batch: with sealed pages.
            scratch: to unpack to, on a GPU; None: nothing is unpacked.
        """
        assert batch.sealed is not None
        self._scratch = scratch
        self._fused: SealedLists | None = batch.sealed
        self._unpacked: list[UnpackedPages] | None = None
        if scratch is None:
            return
        most = [0, 0]
        for tokens, earlier in zip(batch.new, batch.prefix, strict=True):
            most[tokens >= UNPACK_FROM] += earlier // PAGE_TOKENS
        if not most[0]:
            self._fused, self._unpacked = None, scratch.slices(batch.sealed)
        elif most[1]:
            unpacks = batch.indptr.diff() >= UNPACK_FROM
            self._fused = _select(batch.sealed, ~unpacks, most[0])
            self._unpacked = scratch.slices(_select(batch.sealed, unpacks, most[1]))

    def attend(self, queries: Queries, tables: SealedTables, softmax: Softmax) -> AttentionState:
        """Attention of one layer; arguments as in `extend_sealed`."""
        if self._fused is not None:
            state = extend_sealed(queries, tables.listed(*self._fused), softmax)
        else:
            state = empty_state(queries.q)
        if self._unpacked is not None:
            from sglang_diffxkv.kernels.extend.unpacked import extend_slices  # needs Triton

            assert self._scratch is not None
            extend_slices(state, queries, tables, self._unpacked, softmax, self._scratch)
        return state


class Prefill:
    """Attention of one step's new tokens over all pages of their sequences.

    Args:
        scratch: to unpack sealed pages to, on a GPU.
    """

    def __init__(self, batch: PrefillBatch, scratch: PrefixScratch | None) -> None:
        self._batch = batch
        self._open = OpenPrefill(batch.last_len)
        self._sealed = None if batch.sealed is None else SealedPrefill(batch, scratch)

    def attend(self, q: torch.Tensor, pages: LayerPages, softmax: Softmax) -> AttentionState:
        """Attention of one layer.

        Args:
            q: [T, Hq, D], not rotated.
            pages: the new tokens are written already. Of layers without sealed pages the tables
                are not looked at.
            softmax: of the layer.
        """
        queries = Queries(q, self._batch.indptr, self._batch.position)
        opened = self._batch.opened.of(pages.keys, pages.values)
        if not on_gpu(q):
            lists = self._batch.sealed
            sealed = None if lists is None else pages.tables.listed(*lists)
            return cpu.extend(queries, opened, sealed, pages.key_mean, softmax)
        state = self._on_gpu(queries, opened, pages, softmax.of_part)
        return state if softmax.sinks is None else add_sinks(state, softmax.sinks)

    def _on_gpu(
        self, queries: Queries, opened: OpenPages, pages: LayerPages, softmax: Softmax
    ) -> AttentionState:
        """Over tokens alone."""
        tables, key_mean, q = pages.tables, pages.key_mean, queries.q
        state = self._open.attend(queries, opened, softmax)
        if self._sealed is None:
            return state
        if key_mean is None:
            return merge_states(state, self._sealed.attend(queries, tables, softmax))
        rotated = queries._replace(q=rotate(q.float()))
        part = self._sealed.attend(rotated, tables, softmax)
        return merge_states(state, from_sealed(part, q, key_mean, softmax))


def _select(sealed: SealedLists, chosen: torch.Tensor, most: int) -> SealedLists:
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
    return SealedLists(indptr, pages[:most])
