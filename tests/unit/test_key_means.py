# SPDX-License-Identifier: Apache-2.0
"""Means that sealed keys lack: what sets them, and that nothing does afterwards."""

import json
from pathlib import Path

import pytest
import torch

from sglang_diffxkv.config import Tiers
from sglang_diffxkv.pool.key_means import SINKS, KeyMeans
from sglang_diffxkv.pool.raw_pages import RawPages
from sglang_diffxkv.pool.sealing import seal
from tests.support.pages import write
from tests.support.stores import make_store

LAYERS, HEADS, DIM = 2, 3, 16
SLOTS = torch.tensor([4, 2, 1])
POSITION = torch.tensor([0, 1, 7])


def pages(seed: int = 0, offset: float = 5.0) -> RawPages:
    raw = RawPages(6, LAYERS, HEADS, DIM, torch.bfloat16, "cpu")
    gen = torch.Generator().manual_seed(seed)
    for rows in raw.keys:
        rows.copy_(offset + torch.randn(rows.shape, generator=gen))
    return raw


def expected(raw: RawPages, slots: list[int]) -> torch.Tensor:
    """Float64 [L, H, D], the sinks of slot 4 left out."""
    found = []
    for keys in raw.keys:
        kept = [keys[slot][SINKS if slot == 4 else 0 :].double() for slot in slots]
        found.append(torch.cat(kept).mean(0))
    return torch.stack(found)


def learn(
    means: KeyMeans,
    raw: RawPages,
    ready: list[bool] | None = None,
    key_bits: int = 8,
    at_once: int = 2,
) -> None:
    mask = None if ready is None else torch.tensor(ready)
    means.learn(raw, SLOTS, POSITION, mask, key_bits=key_bits, at_once=at_once)


def assert_close(means: KeyMeans, found: torch.Tensor) -> None:
    torch.testing.assert_close(means.by_layer.double(), found, rtol=1e-5, atol=1e-5)


def test_where_scores_are_capped_nothing_sets_them() -> None:
    """What the mean adds to scores would have to be added before the cap."""
    means = KeyMeans(LAYERS, HEADS, DIM, "cpu")
    means.set(torch.ones(LAYERS, HEADS, DIM))  # of a plan
    means.keep_zero()
    learn(means, pages())
    assert not bool(means.by_layer.any())


@pytest.mark.parametrize("at_once", [1, 2, 100])
def test_the_first_tokens_set_them_without_the_sinks(at_once: int) -> None:
    raw, means = pages(), KeyMeans(LAYERS, HEADS, DIM, "cpu")
    raw.keys[0][4, :SINKS] = 1e4
    learn(means, raw, at_once=at_once)
    assert_close(means, expected(raw, [4, 2, 1]))
    first = means.by_layer.clone()
    learn(means, pages(1))
    assert torch.equal(means.by_layer, first)


def test_pages_that_are_not_ready_do_not_count() -> None:
    raw, means = pages(), KeyMeans(LAYERS, HEADS, DIM, "cpu")
    raw.keys[0][2], raw.keys[1][2] = torch.nan, torch.inf
    learn(means, raw, [False, False, False])
    assert not means.by_layer.any()
    learn(means, raw, [True, False, True])
    assert_close(means, expected(raw, [4, 1]))


def test_keys_that_are_no_numbers_spoil_nothing() -> None:
    raw, means = pages(), KeyMeans(LAYERS, HEADS, DIM, "cpu")
    raw.keys[0][2, 5, 1, 3] = torch.nan
    learn(means, raw)
    raw.keys[0][2, 5, 1, 3] = 0
    assert_close(means, expected(raw, [4, 2, 1]))


@pytest.mark.parametrize(("offset", "centred"), [(0.5, ()), (1.5, (8,)), (2.5, (8, 4, 2))])
def test_heads_whose_mean_is_small_keep_it(offset: float, centred: tuple[int, ...]) -> None:
    """Offsets are in units of what is left, in the same direction in each channel."""
    raw = pages(offset=offset)
    raw.keys[1][:, :, 2] += 50 - offset
    for key_bits in (8, 4, 2):
        means = KeyMeans(LAYERS, HEADS, DIM, "cpu")
        learn(means, raw, key_bits=key_bits)
        found = expected(raw, [4, 2, 1])
        if key_bits not in centred:
            kept = found[1, 2].clone()
            found.zero_()[1, 2] = kept
        assert_close(means, found)


def test_those_of_an_earlier_run_stay() -> None:
    means = KeyMeans(LAYERS, HEADS, DIM, "cpu")
    mine = torch.randn(LAYERS, HEADS, DIM)
    means.set(mine)
    learn(means, pages())
    assert torch.equal(means.by_layer, mine)
    assert means.nbytes == KeyMeans.bytes_for(LAYERS, HEADS, DIM) == mine.nbytes


def test_a_plan_of_pages_that_lack_none_sets_none(tmp_path: Path) -> None:
    """Zeros would otherwise count as what an earlier run has found."""
    path = str(tmp_path / "plan.json")
    tiers = Tiers("raw", "K4V2")
    saving = make_store("diffxkv", tiers=tiers, save_plan=path, learn_share=1.0)
    page = torch.tensor([1])
    saving.open(page)
    write(saving, page, torch.tensor([0]), torch.tensor([64]))
    seal(saving, page)
    saving.policy.on_idle()
    saving.policy.learner.wait()
    assert json.loads(Path(path).read_text())["key_means"] is None
    serving = make_store("diffxkv", tiers=Tiers("K8V4", "K4V2"), plan=path)
    assert not serving.key_means._is_set
