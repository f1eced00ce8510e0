# SPDX-License-Identifier: Apache-2.0
"""Attention over sealed rows, brought back, is attention over the model's own."""

import math

import pytest
import torch

from sglang_diffxkv.kernels.basis.rotation import rotate
from sglang_diffxkv.kernels.basis.sealed import from_sealed, to_sealed_keys
from sglang_diffxkv.kernels.merge import AttentionState, merge_states
from sglang_diffxkv.kernels.softmax import Softmax
from tests.support.builders import error_norm

LOG2_E = math.log2(math.e)


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> AttentionState:
    """Of q [T, Hq, D] over all of k, v [n, H, D], in float64."""
    keys, values = (x.double().repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    scores = torch.einsum("thd,nhd->thn", q.double(), keys) * scale
    lse = scores.logsumexp(-1)
    out = torch.einsum("thn,nhd->thd", (scores - lse[..., None]).exp(), values)
    return AttentionState(out, lse * LOG2_E)


@pytest.mark.parametrize("dim", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("group", [1, 3])
def test_the_way_back(dim: int, group: int) -> None:
    torch.manual_seed(dim + group)
    q = torch.randn(5, 2 * group, dim)
    k, v = 3 + torch.randn(2, 70, 2, dim)
    mean = k.mean(0) + 0.1
    part = attention(rotate(q), to_sealed_keys(k, mean), rotate(v), 0.1)
    found = from_sealed(AttentionState(part.out.float(), part.lse.float()), q, mean, Softmax(0.1))
    expected = attention(q, k, v, 0.1)
    assert error_norm(found.out, expected.out) < 1e-6
    assert error_norm(found.lse, expected.lse) < 1e-6


def test_nothing_comes_of_no_tokens() -> None:
    q, mean = torch.randn(2, 4, 16), torch.randn(2, 16)
    empty = AttentionState(torch.zeros(2, 4, 16), torch.full((2, 4), -torch.inf))
    other = AttentionState(torch.randn(2, 4, 16), torch.randn(2, 4))
    merged = merge_states(other, from_sealed(empty, q, mean, Softmax(1.0)))
    assert torch.equal(merged.out, other.out) and torch.equal(merged.lse, other.lse)
