# SPDX-License-Identifier: Apache-2.0
"""Binding of cpu.cpp."""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch

from sglang_diffxkv.kernels.cpu.abi import int64_words
from sglang_diffxkv.kernels.cpu.build import load_library
from sglang_diffxkv.kernels.layout import PAGE_TOKENS
from sglang_diffxkv.kernels.step import PageNotes, StepPages

LIBRARY = "step", (Path(__file__).with_name("cpu.cpp"),)
"""Its name and sources."""

_P, _I = ctypes.c_void_p, ctypes.c_int64
_BEGIN = (_P, _I, _P, _P, _I, _I, _I, _I, _I, _P, _P)


class StepKernel:
    """``begin_decode`` in one call, for tables that stay where they are.

    Args:
        req_to_token, notes, window: as for `kernels.step.begin_decode`.
        sealed: bool [V]; None: nobody asks whether a page is free.
    """

    def __init__(
        self,
        req_to_token: torch.Tensor,
        notes: PageNotes,
        window: int,
        sealed: torch.Tensor | None = None,
    ) -> None:
        library = load_library(*LIBRARY)
        self._call = library.diffxkv_begin_decode
        self._call.argtypes, self._call.restype = _BEGIN, ctypes.c_bool
        self._kept = req_to_token, notes, sealed  # alive: the kernel has their addresses
        self._table, self._window = req_to_token, window
        first, *rest, counts = notes
        words = [first, sealed, *rest, counts]
        self._notes = int64_words(*(0 if t is None else t.data_ptr() for t in words))

    def begin(
        self,
        rows: torch.Tensor,
        seq_lens: torch.Tensor,
        num_real: int,
        step: int,
        decode_step: int,
    ) -> StepPages:
        """`kernels.step.begin_decode` with the time on the host; ``rows``, ``seq_lens`` int64 [B].

        The table is as wide as the longest sequence needs, or wider.

        Raises:
            ValueError: a page is neither open nor sealed.
        """
        batch, context = len(rows), self._table.shape[1]
        width = -(-context // PAGE_TOKENS)
        lengths, count, last_len = torch.empty(3, batch, dtype=torch.int32).unbind()
        table = torch.empty(batch, width, dtype=torch.int32)
        new_rows = torch.empty(batch, dtype=torch.int64)
        pages = StepPages(table, lengths, count, last_len, new_rows)
        out = int64_words(pages.table.data_ptr(), width, *(t.data_ptr() for t in pages[1:]))
        known = self._call(
            self._table.data_ptr(),
            self._table.stride(0),
            rows.data_ptr(),
            seq_lens.data_ptr(),
            batch,
            num_real,
            step,
            decode_step,
            self._window,
            self._notes,
            out,
        )
        if not known:
            raise ValueError("a sequence of the batch has a free page")
        return pages
