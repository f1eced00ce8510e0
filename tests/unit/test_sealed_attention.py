# SPDX-License-Identifier: Apache-2.0
"""What the store seals and what attention asks of it fit together: rotated, or not at all."""

import math

import pytest
import torch

from sglang_diffxkv.config import Tiers
from sglang_diffxkv.kernels.basis.rotation import rotate
from sglang_diffxkv.kernels.basis.sealed import from_sealed
from sglang_diffxkv.kernels.decode import decode_sealed
from sglang_diffxkv.kernels.extend import extend_sealed
from sglang_diffxkv.kernels.layout import PAGE_TOKENS
from sglang_diffxkv.kernels.merge import AttentionState
from sglang_diffxkv.kernels.pages import Queries
from sglang_diffxkv.kernels.softmax import Softmax
from sglang_diffxkv.pool.sealing import seal
from tests.support.builders import error_norm
from tests.support.stores import STORE, make_store

LAYERS, HEADS, DIM, _ = STORE
PAGES, GROUP, SOFTMAX = 3, 2, Softmax(DIM**-0.5)
CASES = [
    ("uniform", Tiers("K8V8", "K4V2"), True, 0.02),
    ("uniform", Tiers("K4V4", "K4V2"), True, 0.25),
    ("diffkv", Tiers("K8V8", "K4V4"), True, 0.25),
    ("diffkv", Tiers("raw", "K8V8"), False, 0.02),
    ("lossless", Tiers(), False, 1e-5),
]


@pytest.mark.parametrize(("policy", "tiers", "rotates", "most"), CASES)
def test_attention_over_sealed_pages(policy: str, tiers: Tiers, rotates: bool, most: float) -> None:
    gen = torch.Generator().manual_seed(3)
    store = make_store(policy, tiers=tiers, alpha_low=0.0)
    assert store.layout.rotates == rotates
    pages = torch.arange(1, PAGES + 1)
    store.open(pages)
    slots = store.directory.raw_slot[pages].long()
    k, v = 2 * torch.randn(2, LAYERS, PAGES, PAGE_TOKENS, HEADS, DIM, generator=gen)
    if rotates:  # means, which sealed keys lack
        k += 8 * torch.randn(LAYERS, 1, 1, HEADS, DIM, generator=gen)
    for layer in range(LAYERS):
        store.raw.keys[layer][slots], store.raw.values[layer][slots] = k[layer], v[layer]
    store.raw.scores[:, slots] = 16 * torch.rand(LAYERS, PAGES, HEADS, PAGE_TOKENS, generator=gen)
    store.raw.counts[slots] = 8
    context = torch.full((PAGES,), PAGES * PAGE_TOKENS)
    store.recency.touch(pages, torch.arange(PAGES), context, window=0)
    seal(store, pages)
    assert store.key_means.by_layer.any() == rotates
    q = torch.randn(1, GROUP * HEADS, DIM, generator=gen)
    indptr = torch.tensor([0, PAGES], dtype=torch.int32)
    for layer in range(LAYERS):
        sealed = store.layer_pages(layer).tables.listed(indptr, pages.int())
        one = torch.tensor([0, 1], dtype=torch.int32)
        queries = Queries(rotate(q) if rotates else q, one, PAGES * PAGE_TOKENS * one[:1])
        parts = decode_sealed(queries.q, sealed, SOFTMAX), extend_sealed(queries, sealed, SOFTMAX)
        if rotates:
            mean = store.key_means.by_layer[layer]
            parts = tuple(from_sealed(part, q, mean, SOFTMAX) for part in parts)
        expected = attention(q, k[layer].flatten(0, 1), v[layer].flatten(0, 1))
        for part in parts:
            assert error_norm(part.out, expected.out) < most
            assert error_norm(part.lse, expected.lse) < most


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> AttentionState:
    """In float64, of q [1, Hq, D] over k, v [n, H, D]."""
    keys, values = (x.double().repeat_interleave(GROUP, 1) for x in (k, v))
    scores = torch.einsum("thd,nhd->thn", q.double(), keys) * SOFTMAX.scale
    out = torch.einsum("thn,nhd->thd", scores.softmax(-1), values)
    return AttentionState(out, scores.logsumexp(-1) * math.log2(math.e))
