# SPDX-License-Identifier: Apache-2.0
"""What `bench/results/real_models_tiers.md` is made of."""

from itertools import product

import pytest
import torch

from bench.accuracy.real_models.reader import States
from bench.accuracy.real_models.tiers.bases import hadamard_basis, learnt, read
from bench.accuracy.real_models.tiers.oracle import attention
from bench.accuracy.real_models.tiers.simulated import PRUNED, RAW, choose, read_back
from sglang_diffxkv.kernels.layout import FORMATS

LAYERS, KV_HEADS, GROUP, DIM = 2, 2, 3, 16
TIERS = [FORMATS["K8V4"], FORMATS["K2V2"]]


def states(seed: int, tokens: int = 70) -> States:
    """With outlying channels, other ones in queries than in keys."""
    generator = torch.Generator().manual_seed(seed)
    sides = (KV_HEADS * GROUP, KV_HEADS, KV_HEADS)
    scales = torch.rand(3, DIM, generator=torch.Generator().manual_seed(0)) ** 4 * 9 + 0.1
    return States(
        *(
            torch.randn(LAYERS, heads, tokens, DIM, generator=generator) * scale
            for heads, scale in zip(sides, scales, strict=True)
        )
    )


def test_attention_of_later_queries() -> None:
    given, rows, tokens = states(1), torch.tensor([3, 40, 69]), 50
    found = attention(given, rows, tokens)
    for layer, head, token in product(range(LAYERS), range(KV_HEADS), (0, 3, 20, 41, 49)):
        means = []
        for q in given.queries[layer, head * GROUP : (head + 1) * GROUP].double():
            weights = [
                (given.keys[layer, head, : row + 1].double() @ q[row] / DIM**0.5).softmax(0)[token]
                * (row + 1)
                for row in rows.tolist()
                if row > token
            ]
            means.append((sum(weights) / len(weights), sum(w * w for w in weights) / len(weights)))
        for got, expected in zip(found, zip(*means, strict=True), strict=True):
            assert float(got[layer, head, token]) == pytest.approx(float(max(expected)), rel=1e-4)


@pytest.mark.parametrize("seed", range(30))
def test_no_choice_of_as_many_bytes_loses_less(seed: int) -> None:
    importance = torch.rand(6, generator=torch.Generator().manual_seed(seed)) ** 6
    loss = torch.tensor([1.0, 0.0002, 0.005, 0.05], dtype=torch.float64)
    nbytes = torch.tensor([0.0, 106, 58, 42], dtype=torch.float64)
    budget = 40.0 * (seed % 12 + 1)
    codes = choose(importance, loss, nbytes, budget)
    spent = float(nbytes[codes].sum())
    assert spent <= budget
    every = torch.tensor(list(product(range(4), repeat=6)))
    lost = (importance.double() * loss[every]).sum(-1)
    lost[nbytes[every].sum(-1) > spent] = torch.inf
    assert float((importance.double() * loss[codes]).sum()) == pytest.approx(float(lost.min()))


def test_tokens_are_read_back_as_their_codes_say() -> None:
    given = states(2)
    reads = read(given, hadamard_basis(given), TIERS)
    codes = torch.randint(-1, 3, (LAYERS, KV_HEADS, 60))
    prefix = read_back(given.keys, given.values, codes, TIERS, reads)
    for layer, found in enumerate(prefix):
        assert found.kept is not None
        assert torch.equal(found.kept[:, :60], codes[layer] != PRUNED) and found.kept[:, 60:].all()
        assert torch.equal(found.keys[:, 60:], given.keys[layer, :, 60:])
        for code, bits in ((RAW, None), (1, 8), (2, 2)):
            mine = codes[layer] == code
            expected = given.keys if bits is None else reads.keys[bits]
            assert torch.equal(found.keys[:, :60][mine], expected[layer, :, :60][mine])


def test_bases_keep_scores_and_spread_outliers() -> None:
    bases = learnt([states(3, 400), states(4, 300)])
    given = states(5, 400)
    exact = given.queries.unflatten(1, (KV_HEADS, GROUP)) @ given.keys[:, :, None].mT
    error = {}
    for name, basis in bases.items():
        inverse = torch.linalg.inv(basis.keys.double())
        assert torch.allclose(basis.keys.double() @ inverse, torch.eye(DIM).double(), atol=1e-6)
        keys = read(given, basis, TIERS).keys[2]
        found = given.queries.unflatten(1, (KV_HEADS, GROUP)) @ keys[:, :, None].mT
        error[name] = float((found - exact).norm() / exact.norm())
    assert error["keys: balanced"] < min(error["keys: OSCAR"], error["Hadamard"])
    assert error["values: OSCAR"] == error["Hadamard"]
