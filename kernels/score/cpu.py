# SPDX-License-Identifier: Apache-2.0
"""Scores in C++ (cpu.cpp)."""

from __future__ import annotations

import torch

from sglang_diffxkv.kernels import score
from sglang_diffxkv.kernels.cpu.abi import DTYPE_CODES, int64_words, threads
from sglang_diffxkv.kernels.cpu.function import CFunction
from sglang_diffxkv.kernels.pages import OpenPages
from sglang_diffxkv.kernels.score import ScoringQueries
from sglang_diffxkv.kernels.softmax import Softmax

_score_open = CFunction("score", "diffxkv_score_open")


@score.score_open.register("cpu")
def score_open(
    queries: ScoringQueries, opened: OpenPages, accum: torch.Tensor, softmax: Softmax
) -> None:
    q, keys = queries.q.contiguous(), opened.keys
    kv_heads, dim = keys.shape[2:]
    asking = int64_words(
        q.data_ptr(),
        DTYPE_CODES[q.dtype],
        queries.lse.data_ptr(),
        queries.indptr.data_ptr(),
        queries.position.data_ptr(),
        len(queries.indptr) - 1,
        q.shape[1] // kv_heads,
    )
    asked = int64_words(
        keys.data_ptr(),
        DTYPE_CODES[keys.dtype],
        keys.stride(0),
        kv_heads,
        dim,
        opened.indptr.data_ptr(),
        opened.slots.data_ptr(),
        opened.position.data_ptr(),
    )
    scores = accum.data_ptr(), accum.stride(0)
    _score_open(asking, asked, softmax.log2_scale, softmax.log2_cap, *scores, threads())
