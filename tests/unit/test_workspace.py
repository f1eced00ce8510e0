# SPDX-License-Identifier: Apache-2.0
"""Sealing and demotion take no more memory beside the pool than is set aside for them."""

from pathlib import Path

import pytest
import torch

from bench.peak import peak_bytes
from sglang_diffxkv.calibrate.importance.fit import HIDDEN
from sglang_diffxkv.config import Tiers
from sglang_diffxkv.kernels.layout import PAGE_TOKENS
from sglang_diffxkv.policy.budgeting.caps import full_bytes
from sglang_diffxkv.policy.importance.features import Rotary
from sglang_diffxkv.policy.importance.file import save_importance
from sglang_diffxkv.policy.registry import POLICIES
from sglang_diffxkv.pool.demotion import demote
from sglang_diffxkv.pool.integrity import check_integrity
from sglang_diffxkv.pool.sealing import seal, seal_context
from sglang_diffxkv.pool.sizing import PoolBudget, size_pool
from sglang_diffxkv.pool.store import PageStore
from sglang_diffxkv.pool.workspace import MOST_BYTES, size_workspace
from tests.support.importance import random_importance
from tests.support.pages import write
from tests.support.policies import Shape, config_of, policy_of
from tests.support.stores import make_store

SHAPE = Shape(layers=6, heads=4, dim=128, dtype=torch.bfloat16)
LLAMA_8B = Shape(layers=32, heads=8, dim=128, dtype=torch.bfloat16)
LAYERS, HEADS, _, _ = SHAPE
PAGES = 210
SLACK = 64 << 10
"""Tables of page ids and the like, which no workspace counts."""


def full_store(policy: str, budget: int = 400 << 20, sequences: int = 3) -> PageStore:
    """A store with `PAGES` open pages of random tokens, all full and scored."""
    return filled(make_store(policy, budget, 2.0, shape=SHAPE, raw_share=0.5), sequences)


def filled(store: PageStore, sequences: int = 3) -> PageStore:
    """With `PAGES` open pages of random tokens, all full and scored."""
    pages = torch.arange(1, PAGES + 1)
    gen = torch.Generator().manual_seed(3)
    store.open(pages)
    slots = store.directory.raw_slot[pages].long()
    for raw in (*store.raw.keys, *store.raw.values):
        raw[slots] = torch.randn(raw[slots].shape, generator=gen).to(raw.dtype)
    scores = torch.rand(
        store.num_layers, PAGES, store.layout.num_kv_heads, PAGE_TOKENS, generator=gen
    )
    store.raw.scores[:, slots] = 8 * scores**8
    store.raw.counts[slots] = 8
    position = torch.arange(PAGES) // sequences
    write(store, pages, position, torch.full((PAGES,), (PAGES // sequences + 2) * PAGE_TOKENS))
    return store


@pytest.mark.parametrize("policy", POLICIES)
def test_sealing_many_pages_at_once_stays_in_the_workspace(policy: str) -> None:
    store = full_store(policy)
    pages, workspace = torch.arange(1, PAGES + 1), store.sizes.workspace
    assert workspace.graded_pages < PAGES / 2, "the test would show nothing"
    peak = peak_bytes(lambda: seal(store, pages, torch.arange(PAGES) % 3))
    assert peak <= workspace.nbytes + SLACK
    if policy == "diffxkv":  # what it takes most for: the figures are not idle
        assert peak > 0.7 * workspace.nbytes
    assert store.ledger.sealed_pages == PAGES and check_integrity(store) == []
    # Freeing them all looks at a bounded number at a time.
    assert peak_bytes(lambda: store.release(pages)) < workspace.nbytes


@pytest.mark.parametrize(
    ("dim", "dtype", "rotary_share", "tiers"),
    [
        (64, torch.bfloat16, 1, Tiers()),
        (128, torch.bfloat16, 1, Tiers(high="raw", low="K8V4")),
        (256, torch.bfloat16, 0, Tiers()),
        (64, torch.float32, 0, Tiers(high="raw", low="K8V4")),
    ],
)
def test_predicting_stays_in_the_workspace(
    dim: int, dtype: torch.dtype, rotary_share: int, tiers: Tiers, tmp_path: Path
) -> None:
    """Without RoPE there are most features."""
    shape, path = Shape(3, 2, dim, dtype), tmp_path / "importance.safetensors"
    save_importance(random_importance(Rotary(rotary_share * dim), shape, hidden=HIDDEN), path)
    fields = {"importance": str(path), "tiers": tiers}
    store = filled(
        make_store("diffxkv", (dim + 30) << 20, 2.0, shape=shape, raw_share=0.5, **fields)
    )
    pages, workspace = torch.arange(1, PAGES + 1), store.sizes.workspace
    slots = store.directory.raw_slot[pages].long()[: workspace.graded_pages]
    assert workspace.predicted_pages < len(slots) / 2, "the test would show nothing"
    peak = peak_bytes(lambda: seal_context(store, pages[: len(slots)], slots, None))
    assert 0.3 * workspace.nbytes < peak <= workspace.nbytes
    peak = peak_bytes(lambda: seal(store, pages, torch.arange(PAGES) % 3))
    assert peak <= workspace.nbytes + SLACK


@pytest.mark.parametrize("policy", ["diffkv", "diffxkv"])
def test_demotion_stays_in_the_workspace(policy: str) -> None:
    store = full_store(policy)
    pages = torch.arange(1, PAGES + 1)
    seal(store, pages, torch.arange(PAGES) % 3)
    batch = pages[: store.sizes.workspace.demoted_pages]
    for _ in (1, 2):
        peak = peak_bytes(lambda: demote(store, batch))
        assert 0 < peak <= store.sizes.workspace.nbytes + SLACK
    assert store.counters.demoted > 0


def test_the_budget_holds_the_workspace() -> None:
    store = full_store("diffxkv", budget=400 << 20)
    assert store.nbytes <= 400 << 20
    assert store.nbytes - store.sizes.workspace.nbytes < 392 << 20


def test_workspaces_stop_growing() -> None:
    """32 layers of 8 KV heads of 128: a chunk of 2,048 tokens is graded together."""
    layout = policy_of(config_of("diffxkv"), LLAMA_8B).layout
    for budget in (100 << 30, 1 << 40):
        workspace = size_workspace(budget, layout, 32)
        assert workspace.nbytes == MOST_BYTES <= 64 << 20
        assert workspace.graded_pages >= 32
    assert size_workspace(64 << 20, layout, 32).graded_pages == 1


def test_attention_on_a_gpu_has_its_share() -> None:
    """As many bytes as a decode step of Llama-3.1-8B's shape takes, and no more than a few MiB.

    FlashInfer's workspace counts, if it serves, and what prefixes are unpacked to.
    """
    from sglang_diffxkv.kernels.decode.work import SequencePages, divide_work
    from sglang_diffxkv.kernels.extend.scratch import make_scratch
    from sglang_diffxkv.kernels.gpu.launch import recorded
    from sglang_diffxkv.kernels.workspace import attention_bytes

    layout = policy_of(config_of("diffxkv"), LLAMA_8B).layout
    batch, width, meta = 200, 2048, torch.device("meta")
    table = torch.empty(batch * width, dtype=torch.int32, device=meta)
    of_sequence = torch.empty(batch, dtype=torch.int32, device=meta)
    heads = torch.empty(32, 1000, 8, 2, dtype=torch.int32, device=meta)
    with recorded():
        sequences = SequencePages(table, of_sequence, of_sequence, of_sequence, of_sequence)
        work = divide_work(sequences, heads, layout)
    parts = work.tiles.shape[1] * (32 // 8) * (128 + 1) * 4
    taken = work.tiles.nbytes + 2 * work.segment_start.nbytes + table.nbytes + parts
    shape = layout, 32, 32, batch, width, meta
    counted = attention_bytes(*shape, flashinfer_bytes=0)
    assert attention_bytes(*shape, flashinfer_bytes=1 << 27) == counted + (1 << 27)
    counted -= make_scratch(layout, torch.bfloat16, meta).nbytes
    assert taken <= counted <= taken + (8 << 20)
    caps, budget = [full_bytes(layout)] * 32, PoolBudget(10 << 30, raw_share=0.2)
    sizes = size_pool(budget, layout, caps, 0.5)
    smaller = size_pool(budget._replace(attention_bytes=1 << 30), layout, caps, 0.5)
    per_frame = layout.frame_bytes + 4
    assert (sizes.frames - smaller.frames) * per_frame == pytest.approx(0.8 * 2**30, rel=0.1)
