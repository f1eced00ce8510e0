# SPDX-License-Identifier: Apache-2.0
"""Attention of layers that see a window, over SGLang's own pool for them.

Its buffers are raw pages, all of them open. A page of it has the same tokens as one of ours, as
long as they are in the window; those that SGLang has freed since are never listed.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import torch

from sglang_diffxkv.attention.decode_batch import StepTokens
from sglang_diffxkv.attention.scoring import NewTokens
from sglang_diffxkv.kernels.extend.prefill import Prefill, PrefillBatch
from sglang_diffxkv.kernels.layout import PAGE_TOKENS
from sglang_diffxkv.kernels.merge import AttentionState
from sglang_diffxkv.kernels.pages import LayerPages, OpenLists
from sglang_diffxkv.kernels.softmax import Softmax
from sglang_diffxkv.kernels.step import StepPages


class WindowPages(NamedTuple):
    """The pages of all window layers.

    Attributes:
        keys, values: per layer [R, 64, H, D]; page 0 takes the writes of padded tokens.
        slots: int64 [V], token slot in them by ours (``full_to_swa_index_mapping``): 0 is none.
        window_left: tokens before its own that a query sees.
    """

    keys: list[torch.Tensor]
    values: list[torch.Tensor]
    slots: torch.Tensor
    window_left: int

    @classmethod
    def of(cls, pool: Any, window_left: int) -> WindowPages:
        """Those of SGLang's ``SWAKVPool``, which its allocator has a mapping registered with."""
        buffers = pool.swa_kv_pool.k_buffer, pool.swa_kv_pool.v_buffer
        keys, values = ([x.unflatten(0, (-1, PAGE_TOKENS)) for x in side] for side in buffers)
        return cls(keys, values, pool.full_to_swa_index_mapping, window_left)

    def of_decode(self, req_to_token: torch.Tensor, tokens: StepTokens) -> StepPages:
        """The pages of a decode step's windows: shapes depend on the batch size alone.

        Sequences are as if they began with the page that the window of their first query begins in.

        Args:
            req_to_token: int32 [max_requests, max_context], SGLang's ``ReqToTokenPool`` table.
            tokens: of B sequences.
        """
        queries, seq_lens = tokens.queries, tokens.seq_lens.long()
        width = (self.window_left + queries - 1) // PAGE_TOKENS + 2
        first = (seq_lens - queries - self.window_left).clamp(min=0) // PAGE_TOKENS
        index = first[:, None] + torch.arange(width, device=seq_lens.device)
        place = (index * PAGE_TOKENS).clamp(max=req_to_token.shape[1] - 1)
        loc = self.slots[req_to_token[tokens.req_pool_indices[:, None].long(), place].long()]
        table = torch.where(index * PAGE_TOKENS < seq_lens[:, None], loc // PAGE_TOKENS, 0)
        lengths = seq_lens - first * PAGE_TOKENS
        new = lengths[:, None] - queries + torch.arange(queries, device=seq_lens.device)
        new = new.clamp(min=0)  # of padding
        rows = table.gather(1, new // PAGE_TOKENS) * PAGE_TOKENS + new % PAGE_TOKENS
        numbers = table, lengths, new[:, -1] // PAGE_TOKENS + 1, new[:, -1] % PAGE_TOKENS + 1
        table, lengths, count, last_len = (x.to(torch.int32) for x in numbers)
        return StepPages(table, lengths, count, last_len, rows.flatten())

    def listed(
        self, table: torch.Tensor, prefix_lens: torch.Tensor, seq_lens: torch.Tensor
    ) -> OpenLists:
        """The pages that new tokens see; waits for the device.

        Args:
            table: int64 [B, P], from `page_table`.
            prefix_lens, seq_lens: int64 [B], tokens without the new ones, and with them.
        """
        index = torch.arange(table.shape[1], device=table.device)
        first = (prefix_lens - self.window_left).clamp(min=0) // PAGE_TOKENS
        seen = (index >= first[:, None]) & (index * PAGE_TOKENS < seq_lens[:, None])
        indptr = torch.nn.functional.pad(seen.sum(1).cumsum(0), (1, 0))
        pages = self.slots[table[seen] * PAGE_TOKENS] // PAGE_TOKENS
        position = index.expand_as(table)[seen]
        return OpenLists(*(x.to(torch.int32) for x in (indptr, pages, position)))

    def write(self, layer: int, rows: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
        """Write K/V [T, H, D] of one layer to ``rows`` (int64 [T]) of the flattened pages."""
        for pages, new in ((self.keys[layer], k), (self.values[layer], v)):
            pages.flatten(0, 1)[rows] = new.to(pages.dtype)


class WindowDecode(Protocol):
    """Decode steps of window layers on one kind of device."""

    def begin(self, pages: StepPages) -> None:
        """A step of these sequences."""

    def attend(
        self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, softmax: Softmax
    ) -> AttentionState:
        """Write k and v [B * N, H, D] of one layer of the step, and attend with q [B * N, Hq, D].

        Returns:
            Its output is of q's dtype.
        """


class _Extend(NamedTuple):
    """What all window layers of one prefill share.

    Attributes:
        rows: int64 [T], of the flattened pages, that the new tokens are written to.
    """

    rows: torch.Tensor
    attention: Prefill


class WindowLayers:
    """All window layers of a model.

    Args:
        layers: indices in the pages, by the model's ids of its layers.
        req_to_token: int32 [max_requests, max_context], SGLang's ``ReqToTokenPool`` table.
    """

    def __init__(
        self,
        layers: dict[int, int],
        pages: WindowPages,
        decode: WindowDecode,
        req_to_token: torch.Tensor,
    ) -> None:
        self.layers, self.pages, self._decode = layers, pages, decode
        self._req_to_token = req_to_token
        self._step: _Extend | None = None

    def begin_extend(
        self, new: NewTokens, table: torch.Tensor, seq_lens: torch.Tensor, loc: torch.Tensor
    ) -> None:
        """A prefill, or a verification, of these tokens.

        Args:
            table: int64 [B, P], from `page_table`. seq_lens: int64 [B], with the new tokens.
            loc: int64 [T], our token slots that they are written to.
        """
        batch = PrefillBatch(
            indptr=new.indptr,
            position=new.prefix_lens.to(torch.int32),
            opened=self.pages.listed(table, new.prefix_lens, seq_lens),
            last_len=((seq_lens - 1) % PAGE_TOKENS + 1).to(torch.int32),
            sealed=None,
            new=new.lens,
            prefix=[],
        )
        self._step = _Extend(self.pages.slots[loc.long()], Prefill(batch, None))

    def extend(
        self, layer_id: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, softmax: Softmax
    ) -> AttentionState:
        """Write k and v [T, H, D] of one layer of the step that runs, and attend with q [T, Hq, D].

        Args:
            layer_id: the model's.
        """
        step, layer, pages = self._step, self.layers[layer_id], self.pages
        assert step is not None
        pages.write(layer, step.rows, k, v)
        raw = LayerPages.of_open(pages.keys[layer], pages.values[layer])
        return step.attention.attend(q, raw, softmax)

    def begin_decode(self, tokens: StepTokens) -> None:
        """A decode step, or a verification; the host does not wait."""
        self._decode.begin(self.pages.of_decode(self._req_to_token, tokens))

    def decode(
        self, layer_id: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, softmax: Softmax
    ) -> AttentionState:
        """`WindowDecode.attend`, by the model's id of the layer."""
        return self._decode.attend(self.layers[layer_id], q, k, v, softmax)
