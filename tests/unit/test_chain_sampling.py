# SPDX-License-Identifier: Apache-2.0
"""Sampling while chains are verified: as a loop does it, and distributed as it should."""

from __future__ import annotations

import pytest
import torch

from sglang_diffxkv.platform import sampling
from sglang_diffxkv.platform.chains import Accepted


def random_probs(*shape: int) -> torch.Tensor:
    return torch.randn(*shape).mul(2).softmax(-1)


def kept_by(values: list[float], count: int) -> set[int]:
    return set(sorted(range(len(values)), key=lambda i: -values[i])[:count])


def test_top_k() -> None:
    probs, top_ks = random_probs(5, 33), torch.tensor([1, 2, 7, 33, 1 << 30], dtype=torch.int32)
    found = sampling.top_k_renorm(probs, top_ks)
    for row, out, k in zip(probs.double(), found, top_ks.tolist(), strict=True):
        kept = kept_by(row.tolist(), min(k, 33))
        total = sum(float(row[i]) for i in kept)
        expected = [float(row[i]) / total if i in kept else 0.0 for i in range(33)]
        torch.testing.assert_close(out.double(), torch.tensor(expected).double())


def test_top_p() -> None:
    probs, top_ps = random_probs(6, 33), torch.tensor([1e-9, 0.1, 0.5, 0.9, 0.999, 1.0])
    found = sampling.top_p_renorm(probs, top_ps)
    for row, out, p in zip(probs.double(), found, top_ps.tolist(), strict=True):
        count, total = 0, 0.0
        ordered = sorted(row.tolist(), reverse=True)
        while count < 33 and (total < p or count == 0):
            total += ordered[count]
            count += 1
        kept = kept_by(row.tolist(), count)
        assert set(out.nonzero().flatten().tolist()) <= kept
        assert float(out.sum()) == pytest.approx(1.0)
        assert abs(len(out.nonzero()) - count) <= (p == 1.0)  # where rounding decides


def verify(
    candidates: torch.Tensor,
    probs: torch.Tensor,
    coins: sampling.Coins,
    thresholds: tuple[float, float] = (1.0, 1.0),
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    batch, nodes = candidates.shape
    predicts = torch.full((batch * nodes,), -5, dtype=torch.int32)
    index = torch.full((batch, nodes), -1, dtype=torch.int32)
    accepted = Accepted(predicts, index, torch.empty(batch, dtype=torch.int32))
    before = probs.clone()
    sampling.sample_chains(candidates, probs, coins, accepted, thresholds)
    assert torch.equal(probs, before)
    return predicts.view(batch, nodes), index, accepted.count


def walk(
    candidates: list[int],
    probs: torch.Tensor,
    coins: list[float],
    last: float,
    thresholds: tuple[float, float],
) -> list[int]:
    """What SGLang's kernel does to one sequence, node by node."""
    (single, acc), tokens, rest = thresholds, [], probs[0]
    for i in range(1, len(candidates)):
        likely = float(probs[i - 1, candidates[i]])
        if likely > 0 and (coins[i - 1] < likely / acc or likely >= single):
            tokens.append(candidates[i])
            rest = probs[i]
        else:
            rest = probs[i - 1].clone()
            rest[candidates[i]] = 0
            break
    sums = rest.cumsum(0).tolist()
    following = next(i for i, total in enumerate(sums) if total > last * sums[-1])
    return [*tokens, following]


@pytest.mark.parametrize("thresholds", [(1.0, 1.0), (0.3, 1.0), (1.0, 0.4)])
@pytest.mark.parametrize(("batch", "nodes"), [(1, 1), (7, 2), (50, 5), (9, 16)])
def test_as_a_loop(batch: int, nodes: int, thresholds: tuple[float, float]) -> None:
    candidates = torch.randint(0, 4, (batch, nodes))
    probs, drafts, last = random_probs(batch, nodes, 4), torch.rand(batch, nodes), torch.rand(batch)
    predicts, index, count = verify(candidates, probs, sampling.Coins(drafts, last), thresholds)
    for b in range(batch):
        row = candidates[b].tolist(), probs[b], drafts[b].tolist(), float(last[b])
        expected = walk(*row, thresholds)
        assert count[b] == len(expected) - 1
        assert predicts[b, : len(expected)].tolist() == expected
        numbers = [b * nodes + i for i in range(len(expected))]
        assert index[b].tolist() == numbers + [-1] * (nodes - len(expected))


def test_tokens_are_the_targets() -> None:
    """Whatever the draft is, the first token has the target's distribution."""
    draws = 20_000
    probs = random_probs(1, 2, 5).expand(draws, 2, 5).contiguous()
    for draft in range(5):
        candidates = torch.tensor([[0, draft]]).expand(draws, 2)
        predicts, _, _ = verify(
            candidates, probs, sampling.Coins(torch.rand(draws, 2), torch.rand(draws))
        )
        shares = predicts[:, 0].bincount(minlength=5) / draws
        error = (shares - probs[0, 0]).abs().max()
        assert float(error) < 5 * (0.25 / draws) ** 0.5


def test_rounding_leaves_a_token_that_is_likely() -> None:
    probs = torch.tensor([[[0.5, 0.5, 0.0]]])
    coins = sampling.Coins(torch.rand(1, 1), torch.ones(1))
    predicts, _, _ = verify(torch.zeros(1, 1).long(), probs, coins)
    assert predicts.tolist() == [[1]]
