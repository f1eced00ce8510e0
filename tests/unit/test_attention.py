# SPDX-License-Identifier: Apache-2.0
"""The measures of attention that `bench/results/ddid.md` is made of."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from bench.accuracy.attention import (
    QUERIES,
    importances,
    retained_by_snapkv,
    retention,
    share_needed,
)
from sglang_diffxkv.bundled_model import BUNDLED
from sglang_diffxkv.policy.base import SealContext
from sglang_diffxkv.policy.registry import make_policy
from tests.support.policies import config_of


def scores(seed: int, *shape: int) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) ** 4


@pytest.mark.parametrize("target", [0.1, 0.5, 0.9, 0.999])
def test_share_needed_is_the_least(target):
    for row in scores(1, 20, 37):
        kept = [row.sort(descending=True).values[:n].sum() / row.sum() for n in range(1, 38)]
        least = next(n for n, held in enumerate(kept, 1) if held >= target)
        assert share_needed(row, target) == pytest.approx(least / 37)


def test_retention():
    importance = torch.tensor([[4.0, 1.0, 3.0, 2.0], [1.0, 1.0, 1.0, 1.0]])
    assert retention(importance, 0.5).tolist() == pytest.approx([0.7, 0.5])
    assert retention(importance, 1.0).tolist() == [1, 1]


def test_retained_is_what_the_policy_keeps():
    """The same tokens as policy `snapkv` grades high, when it seals the same pages."""
    config = config_of("snapkv")
    policy = make_policy(config, head_dim=64, num_kv_heads=2, raw_itemsize=2, num_layers=3)
    pages = 5
    importance = scores(2, 3, 2, pages * 64)
    tiers = policy.assign(
        SealContext(
            importance=importance.unflatten(-1, (pages, 64)).permute(2, 0, 1, 3).contiguous(),
            count=torch.ones(pages, 64),
            position=torch.arange(pages),
            context=torch.full((pages,), 400),
            sequence=torch.zeros(pages, dtype=torch.int64),
            quality=torch.zeros(pages, dtype=torch.int64),
        )
    )
    kept = tiers.permute(1, 2, 0, 3).flatten(-2) > 0  # [L, H, pages * 64]
    expected = (importance * kept).sum(-1) / importance.sum(-1)
    torch.testing.assert_close(retained_by_snapkv(importance, policy.shares[0]), expected)


def test_importances_are_the_models_attention():
    tokenizer = AutoTokenizer.from_pretrained(BUNDLED)
    ids = tokenizer.encode(" The code of falcon is marble." * 20)
    (found,) = importances(BUNDLED, [ids])
    model = AutoModelForCausalLM.from_pretrained(BUNDLED, dtype=torch.float32)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        attention = model(torch.tensor([ids]), output_attentions=True).attentions
    layer, head, token = 3, 1, 17
    groups = [attention[layer][0, q, -QUERIES:, token].mean() for q in (2, 3)]
    assert found.shape == (6, 2, len(ids) - QUERIES)
    assert found[layer, head, token] == pytest.approx(float(max(groups)), rel=1e-5)
