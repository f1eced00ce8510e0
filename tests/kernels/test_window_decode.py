# SPDX-License-Identifier: Apache-2.0
"""Decode steps of window layers, on either kind of device, against the reference in float64."""

from __future__ import annotations

from contextlib import nullcontext
from typing import NamedTuple

import pytest
import torch

from sglang_diffxkv.attention.decode_batch import StepTokens
from sglang_diffxkv.attention.device_windows import DeviceWindowDecode
from sglang_diffxkv.attention.host_windows import HostWindowDecode
from sglang_diffxkv.attention.window_layers import WindowDecode, WindowLayers, WindowPages
from sglang_diffxkv.kernels.extend import naive
from sglang_diffxkv.kernels.layout import PAGE_TOKENS
from sglang_diffxkv.kernels.pages import OpenPages, Queries
from sglang_diffxkv.kernels.softmax import Softmax, add_sinks
from tests.support.builders import error_norm
from tests.support.device import DEVICE, as_on_gpu

LAYERS, KV_HEADS, GROUP, DIM = 2, 2, 3, 64
PAGES = 7
"""Of the longest sequence."""


class Step(NamedTuple):
    """New tokens of B sequences in a window pool whose other places are poisoned.

    Attributes:
        pages: the pool, whose new tokens are not written yet.
        table: int32 [B, PAGES * 64], as SGLang's ``req_to_token``.
        lens: int64 [B], with the new tokens.
    """

    pages: WindowPages
    table: torch.Tensor
    lens: torch.Tensor


def make_step(lens: list[int], window_left: int, queries: int) -> Step:
    """Pages of our pool and of the windows' differ; those behind each window are freed."""
    batch, count = len(lens), len(lens) * PAGES
    ours = torch.randperm(count).view(batch, PAGES) + 1
    theirs = torch.randperm(count).view(batch, PAGES) + 1
    offsets = torch.arange(PAGE_TOKENS)
    slots = torch.zeros((count + 1) * PAGE_TOKENS, dtype=torch.int64)
    shape = LAYERS, count + 1, PAGE_TOKENS, KV_HEADS, DIM
    keys, values = (torch.full(shape, torch.nan) for _ in range(2))
    for b, length in enumerate(lens):
        first = max(0, length - queries - window_left)
        for place in range(first // PAGE_TOKENS, -(-length // PAGE_TOKENS)):
            begin = int(ours[b, place]) * PAGE_TOKENS
            slots[begin : begin + PAGE_TOKENS] = theirs[b, place] * PAGE_TOKENS + offsets
        for place in range(first, length - queries):
            page, token = theirs[b, place // PAGE_TOKENS], place % PAGE_TOKENS
            keys[:, page, token] = torch.randn(LAYERS, KV_HEADS, DIM)
            values[:, page, token] = torch.randn(LAYERS, KV_HEADS, DIM)
    # Of what a window begins in, the tokens before it are read and masked, so they are numbers.
    for side in (keys, values):
        for b, length in enumerate(lens):
            first = max(0, length - queries - window_left)
            page = theirs[b, first // PAGE_TOKENS]
            side[:, page, : first % PAGE_TOKENS] = torch.randn(
                LAYERS, first % PAGE_TOKENS, KV_HEADS, DIM
            )
    table = (ours[:, :, None] * PAGE_TOKENS + offsets).flatten(1).to(torch.int32)
    pages = WindowPages([*keys], [*values], slots, window_left)
    return Step(pages, table, torch.tensor(lens))


def decode_on(device: str, pages: WindowPages) -> WindowDecode:
    return HostWindowDecode(pages) if device == "host" else DeviceWindowDecode(pages)


@pytest.mark.parametrize("device", ["host", "device"])
@pytest.mark.parametrize("queries", [1, 4])
@pytest.mark.parametrize("cap", [0.0, 1.5])
def test_what_a_window_shows(device: str, queries: int, cap: float) -> None:
    window_left = 100
    lens = [queries, 63, 64 + queries, 101, 102, 200, PAGES * PAGE_TOKENS]
    step = make_step(lens, window_left, queries)
    tokens = len(lens) * queries
    q = torch.randn(tokens, KV_HEADS * GROUP, DIM)
    k, v = torch.randn(2, tokens, KV_HEADS, DIM)
    sinks = torch.randn(KV_HEADS * GROUP)
    softmax = Softmax(0.2, cap, window_left, sinks)

    where = "cpu" if device == "host" else DEVICE
    rows = torch.arange(len(lens))
    pool = WindowPages(
        [x.clone().to(where) for x in step.pages.keys],
        [x.clone().to(where) for x in step.pages.values],
        step.pages.slots.to(where),
        window_left,
    )
    windows = WindowLayers({3: 0, 5: 1}, pool, decode_on(device, pool), step.table.to(where))
    there = softmax._replace(sinks=sinks.to(where))
    with as_on_gpu() if device == "device" else nullcontext():
        windows.begin_decode(StepTokens(rows.to(where), step.lens.to(where), queries))
        found = windows.decode(5, *(x.to(where) for x in (q, k, v)), there)

    indptr = torch.arange(0, tokens + 1, queries, dtype=torch.int32)
    starts = (step.lens - queries).to(torch.int32)
    ours = step.table[:, ::PAGE_TOKENS].long() // PAGE_TOKENS
    listed = step.pages.listed(ours, starts.long(), step.lens)
    keys, values = (side[1].clone() for side in (step.pages.keys, step.pages.values))
    at = step.table.gather(1, (starts[:, None] + torch.arange(queries)).long()).flatten().long()
    for side, new in ((keys, k), (values, v)):
        side.flatten(0, 1)[step.pages.slots[at]] = new
    opened = OpenPages(keys.nan_to_num(), values.nan_to_num(), *listed)
    expected = add_sinks(naive.extend_open(Queries(q, indptr, starts), opened, softmax), sinks)
    assert error_norm(found.out.cpu(), expected.out) < 1e-5
    assert error_norm(found.lse.cpu(), expected.lse) < 1e-5
    written = pool.keys[1].cpu().flatten(0, 1)[step.pages.slots[at]]
    assert torch.equal(written, k)
