# SPDX-License-Identifier: Apache-2.0
"""Checks of what the server has FlashInfer do: prefill over open pages, merged by our LSEs."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from bench.gpu.device import to
from bench.gpu.verify.check import Check, Found, compare
from bench.gpu.verify.extend import CPU, OPEN_LARGE, OPEN_SMALL, Open, describe, draw_open
from sglang_diffxkv.kernels.extend import flashinfer, naive
from sglang_diffxkv.kernels.extend.prefill import OpenPrefill
from sglang_diffxkv.kernels.layout import PAGE_TOKENS

TOLERANCE = 5e-3
"""FlashInfer rounds weights and outputs to bf16."""


def check(case: Open, device: torch.device) -> Found:
    args = draw_open(case, device)
    queries, _, softmax = args
    q, ends = queries.q, queries.position + queries.indptr.diff()
    last_len = (ends - 1) % PAGE_TOKENS + 1
    shape = flashinfer.Shape(device, q.dtype, q.shape[1], case.kv_heads, case.dim)
    if not flashinfer.make_ready(shape, [softmax]):
        raise RuntimeError("FlashInfer did not start; the log says why")
    part = OpenPrefill(last_len).attend(*args)
    return compare(part, naive.extend_open(*to(CPU, *args)))


def checks(large: bool) -> Iterator[Check]:
    for case in (OPEN_SMALL[0], OPEN_LARGE[0], *OPEN_SMALL[2:]):
        name = f"FlashInfer over open pages, {len(case.sequences)} sequences"
        name += describe(case.softmax)
        yield Check(name, "open_prefill", TOLERANCE, partial(check, case), timed=True)
