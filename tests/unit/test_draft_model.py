# SPDX-License-Identifier: Apache-2.0
"""What a draft model needs: its share of the budget, and attention over several steps."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sglang_diffxkv.kernels.layout import PAGE_TOKENS
from sglang_diffxkv.patches import draft_pool
from sglang_diffxkv.platform.draft_attention import DraftSteps
from sglang_diffxkv.policy.budgeting.caps import full_bytes
from sglang_diffxkv.pool.sizing import PoolBudget, PoolSizes, size_pool
from tests.support.layouts import layout_of

HEADS, KV_HEADS, DIM = 6, 2, 16


def test_bytes_of_a_token(monkeypatch: pytest.MonkeyPatch) -> None:
    parallel = SimpleNamespace(attn_tp_size=2)
    monkeypatch.setattr("sglang.srt.runtime_context.get_parallel", lambda: parallel)
    model = SimpleNamespace(
        head_dim=64, v_head_dim=64, dtype=torch.bfloat16, get_num_kv_heads=lambda ranks: 8 // ranks
    )
    drafts = SimpleNamespace(draft_model_config=model, draft_kv_num_layers=3)
    configurator = SimpleNamespace(spec_aux_config=drafts)
    assert draft_pool.draft_token_bytes(configurator) == 3 * 4 * (64 + 64) * 2
    drafts.draft_kv_num_layers = None
    assert draft_pool.draft_token_bytes(configurator) == 0


@pytest.mark.parametrize("share", [0.03, 0.25, 1.0])
@pytest.mark.parametrize("fill", [0.2, 0.5, 1.0])
def test_both_pools_fit_the_budget(share: float, fill: float) -> None:
    layout, layers, memory = layout_of(itemsize=2), 8, 1 << 30
    token = 2 * layers * layout.num_kv_heads * layout.row_bytes(0)
    caps, draft = [full_bytes(layout)] * layers, int(share * token)

    def sizes_of(slack: float, most: int | None = None) -> PoolSizes:
        return size_pool(PoolBudget(memory, 0.2, slack, most, slot_bytes=draft), layout, caps, fill)

    def taken(sizes: PoolSizes) -> int:
        sealed = sizes.frames * layout.frame_bytes
        drafts = (sizes.virtual_pages + 1) * PAGE_TOKENS * draft
        return sealed + sizes.raw_pages * sizes.dense_page_bytes + drafts

    sizes = sizes_of(draft_pool.DRAFT_SLACK)
    assert 0.8 * memory < taken(sizes) <= memory
    assert sizes.expected_tokens > sizes_of(1.25).expected_tokens
    few = sizes_of(draft_pool.DRAFT_SLACK, 100)
    assert few.virtual_pages == 100

    memory = 3 << 20
    with pytest.raises(ValueError, match="raise memory_bytes") as refusal:
        sizes_of(draft_pool.DRAFT_SLACK)
    needed = float(str(refusal.value).rsplit("at least ", 1)[1].split()[0])
    memory = int(needed * 2**20) + 1
    assert taken(sizes_of(draft_pool.DRAFT_SLACK)) <= memory


def attend(q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """[heads, dim] over [tokens, KV heads, dim], in float64."""
    group = HEADS // KV_HEADS
    keys, values = (x.double().repeat_interleave(group, 1) for x in (keys, values))
    weights = torch.einsum("hd,thd->ht", q.double(), keys).mul(DIM**-0.5).softmax(1)
    return torch.einsum("ht,thd->hd", weights, values)


def test_each_step_sees_what_those_before_it_wrote() -> None:
    lengths, steps, slots = torch.tensor([5, 130, 1]), 4, 1000
    table = torch.randperm(slots)[:840].view(4, 210).int()
    rows = torch.tensor([2, 0, 3])
    keys, values = (torch.full((slots, KV_HEADS, DIM), float("nan")) for _ in range(2))
    for row, length in zip(rows, lengths, strict=True):
        written = table[row, :length].long()
        keys[written], values[written] = torch.randn(2, len(written), KV_HEADS, DIM)

    def write(layer: Any, where: Any, k: torch.Tensor, v: torch.Tensor) -> None:
        keys[where.loc], values[where.loc] = k.view(3, KV_HEADS, DIM), v.view(3, KV_HEADS, DIM)

    pool = SimpleNamespace(
        get_key_buffer=lambda layer: keys,
        get_value_buffer=lambda layer: values,
        set_kv_buffer=write,
    )
    runner = SimpleNamespace(
        device="cpu",
        req_to_token_pool=SimpleNamespace(req_to_token=table),
        token_to_kv_pool=pool,
    )
    layer = SimpleNamespace(
        layer_id=0,
        tp_q_head_num=HEADS,
        tp_k_head_num=KV_HEADS,
        qk_head_dim=DIM,
        v_head_dim=DIM,
        scaling=DIM**-0.5,
        is_cross_attention=False,
        sliding_window_size=None,
    )
    backend = DraftSteps(runner, steps)
    batch = SimpleNamespace(
        req_pool_indices=rows, seq_lens=lengths, encoder_lens=None, out_cache_loc=None
    )
    backend.init_forward_metadata(batch)
    assert len(backend.attn_backends) == steps - 1
    for step, attention in enumerate(backend.attn_backends):
        batch.out_cache_loc = table[rows, lengths + step].long()
        q = torch.randn(3, HEADS * DIM)
        k, v = torch.randn(2, 3, KV_HEADS * DIM)
        out = attention.forward_decode(q, k, v, layer, batch).view(3, HEADS, DIM)
        for i, (row, length) in enumerate(zip(rows, lengths.tolist(), strict=True)):
            read = table[row, : length + step + 1].long()
            expected = attend(q.view(3, HEADS, DIM)[i], keys[read], values[read])
            assert float((out[i] - expected).norm() / expected.norm()) < 1e-5
