# SPDX-License-Identifier: Apache-2.0
"""Attention of many new queries per sequence: over sealed pages, and over open (raw) pages.

The two parts of a sequence are disjoint and are merged by `merge.merge_states`.
"""

from __future__ import annotations

from sglang_diffxkv.kernels.extend.lists import OpenList, PageList
from sglang_diffxkv.kernels.extend.open import extend_open
from sglang_diffxkv.kernels.extend.prefill import OpenPrefill, Prefill, SealedPrefill
from sglang_diffxkv.kernels.extend.scratch import PrefixScratch, make_scratch
from sglang_diffxkv.kernels.extend.sealed import extend_sealed
from sglang_diffxkv.kernels.pages import SealedTables

__all__ = [
    "OpenList",
    "OpenPrefill",
    "PageList",
    "Prefill",
    "PrefixScratch",
    "SealedPrefill",
    "SealedTables",
    "extend_open",
    "extend_sealed",
    "make_scratch",
]
