# SPDX-License-Identifier: Apache-2.0
"""Means that sealed rows lack: what sets them, and that nothing does afterwards."""

import pytest
import torch

from sglang_diffxkv.pool.raw_pages import RawPages
from sglang_diffxkv.pool.sealed_means import SINKS, SealedMeans

LAYERS, HEADS, DIM = 2, 3, 16
SLOTS = torch.tensor([4, 2, 1])
POSITION = torch.tensor([0, 1, 7])


def pages(seed: int = 0) -> RawPages:
    raw = RawPages(6, LAYERS, HEADS, DIM, torch.bfloat16, "cpu")
    gen = torch.Generator().manual_seed(seed)
    for rows in (*raw.keys, *raw.values):
        rows.copy_(5 + torch.randn(rows.shape, generator=gen))
    return raw


def expected(raw: RawPages, slots: list[int]) -> torch.Tensor:
    """Float64 [L, 2, H, D], the sinks of slot 4 left out."""
    found = []
    for rows in zip(raw.keys, raw.values, strict=True):
        for side in rows:
            kept = [side[slot][SINKS if slot == 4 else 0 :].double() for slot in slots]
            found.append(torch.cat(kept).mean(0))
    return torch.stack(found).view(LAYERS, 2, HEADS, DIM)


@pytest.mark.parametrize("at_once", [1, 2, 100])
def test_the_first_tokens_set_them_without_the_sinks(at_once: int) -> None:
    raw, means = pages(), SealedMeans(LAYERS, HEADS, DIM, "cpu")
    raw.keys[0][4, :SINKS] = 1e4
    means.learn(raw, SLOTS, POSITION, None, at_once)
    torch.testing.assert_close(
        means.by_layer.double(), expected(raw, [4, 2, 1]), rtol=1e-5, atol=1e-5
    )
    first = means.by_layer.clone()
    means.learn(pages(1), SLOTS, POSITION, None, at_once)
    assert torch.equal(means.by_layer, first)


def test_pages_that_are_not_ready_do_not_count() -> None:
    raw, means = pages(), SealedMeans(LAYERS, HEADS, DIM, "cpu")
    raw.keys[1][2], raw.values[0][2] = torch.nan, torch.inf
    means.learn(raw, SLOTS[1:], POSITION[1:], torch.tensor([False, False]), 8)
    assert not means.by_layer.any()
    means.learn(raw, SLOTS, POSITION, torch.tensor([True, False, True]), 2)
    torch.testing.assert_close(means.by_layer.double(), expected(raw, [4, 1]), rtol=1e-5, atol=1e-5)


def test_keys_that_are_no_numbers_spoil_nothing() -> None:
    raw, means = pages(), SealedMeans(LAYERS, HEADS, DIM, "cpu")
    raw.keys[0][2, 5, 1, 3] = torch.nan
    means.learn(raw, SLOTS, POSITION, None, 2)
    raw.keys[0][2, 5, 1, 3] = 0
    torch.testing.assert_close(
        means.by_layer.double(), expected(raw, [4, 2, 1]), rtol=1e-5, atol=1e-5
    )


def test_those_of_an_earlier_run_stay() -> None:
    means = SealedMeans(LAYERS, HEADS, DIM, "cpu")
    mine = torch.randn(LAYERS, 2, HEADS, DIM)
    means.set(mine)
    means.learn(pages(), SLOTS, POSITION, None, 8)
    assert torch.equal(means.by_layer, mine)
    assert means.nbytes == SealedMeans.bytes_for(LAYERS, HEADS, DIM) == mine.nbytes
