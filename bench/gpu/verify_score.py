# SPDX-License-Identifier: Apache-2.0
"""Checks of score: what tokens of open pages receive from sampled queries."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import torch

from bench.gpu.verify import TOLERANCE, Check, Found, kernels, relative_error, to
from bench.gpu.verify_extend import indptr
from sglang_diffxkv.kernels.layout import PAGE_TOKENS
from sglang_diffxkv.kernels.score import naive


class Case(NamedTuple):
    """Sequences as (positions of the sampled queries, positions of the listed pages)."""

    dim: int
    kv_heads: int
    group: int
    dtype: torch.dtype
    sequences: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]


SMALL = (
    Case(64, 2, 3, torch.bfloat16, (((70, 71, 130), (0, 1)), ((), (0,)), ((5,), (0,)))),
    Case(80, 1, 4, torch.float16, ((tuple(range(3, 200, 17)), (0, 2)),)),
)
LARGE = (
    Case(128, 4, 4, torch.bfloat16, ((tuple(range(450, 514)), tuple(range(8))), ((9,), (0,)))),
    Case(256, 1, 2, torch.bfloat16, ((tuple(range(60, 130, 2)), (0, 1, 2)),)),
)


def check(case: Case, device: torch.device) -> Found:
    """The accumulators are not empty before; keys that no sampled query may see are NaN."""
    samples, listed = zip(*case.sequences, strict=True)
    pages = [page for mine in listed for page in mine]
    q_position = [position for mine in samples for position in mine]
    k_raw = torch.randn(
        2 * len(pages), PAGE_TOKENS, case.kv_heads, case.dim, device=device
    ).to(case.dtype)  # fmt: skip
    slots = torch.randperm(len(k_raw), device=device)[: len(pages)].int()
    lasts = [max(mine, default=-1) for mine, own in case.sequences for _ in own]
    for slot, page, last in zip(slots.tolist(), pages, lasts, strict=True):
        k_raw[slot, max(0, last + 1 - page * PAGE_TOKENS) :] = torch.nan
    heads = case.kv_heads * case.group
    accum = torch.rand(len(k_raw), case.kv_heads, PAGE_TOKENS, device=device)
    args = (
        torch.randn(len(q_position), heads, case.dim, device=device).to(case.dtype),
        5 + torch.rand(len(q_position), heads, device=device),
        indptr(tuple(len(x) for x in samples), device),
        torch.tensor(q_position, dtype=torch.int32, device=device),
        k_raw,
        indptr(tuple(len(x) for x in listed), device),
        slots,
        torch.tensor(pages, dtype=torch.int32, device=device),
    )
    before = accum.cpu()
    expected = before.double()
    kernels("score").score_open(*args, accum, case.dim**-0.5)
    naive.score_open(*to(torch.device("cpu"), *args), expected, case.dim**-0.5)
    return Found(relative_error(accum.cpu() - before, expected - before))


def checks(large: bool) -> Iterator[Check]:
    for case in (*SMALL, *LARGE) if large else SMALL:
        dtype = str(case.dtype).removeprefix("torch.")
        name = f"score_open D={case.dim} G={case.group} {dtype}, {len(case.sequences)} sequences"
        yield Check(name, "score", TOLERANCE, partial(check, case))
