# SPDX-License-Identifier: Apache-2.0
"""Operations on chains of drafts against loops that say the same, and NGRAM's trees as chains."""

from __future__ import annotations

import inspect
import pkgutil

import numpy as np
import pytest
import torch

from sglang_diffxkv.patches.chains import longest_chain
from sglang_diffxkv.patches.chains_cpu import MISSING, OPERATIONS
from sglang_diffxkv.platform import chains

SHAPES = [(1, 1), (1, 2), (3, 4), (5, 12), (2, 16)]


@pytest.mark.parametrize("target", OPERATIONS)
def test_sglang_calls_them_so(target: str) -> None:
    """What follows ``topk`` of drafts are outputs for GPUs; the links of a chain are known."""
    theirs = inspect.signature(pkgutil.resolve_name(target)).parameters
    _, parameters = OPERATIONS[target]
    ignored = {"positions", "mrope", "topk"}
    ignored |= {"retrieve_index", "retrieve_next_token", "retrieve_next_sibling"}
    assert [x for x in theirs if x not in ignored] == [
        x for x in parameters.split() if x not in ignored
    ]


def test_sglang_has_none_of_these_on_a_cpu() -> None:
    from sglang.kernels.ops.sampling import renorm
    from sglang.kernels.ops.speculative import verify_sampling

    for name in MISSING:
        assert getattr(renorm, name, None) or getattr(verify_sampling, name, None) is None


def random_table(rows: int, width: int) -> torch.Tensor:
    return torch.randperm(rows * width, dtype=torch.int32).view(rows, width)


def test_slots_are_read_and_written_row_after_row() -> None:
    table, rows = random_table(9, 40), torch.tensor([7, 0, 3])
    starts, ends = torch.tensor([0, 13, 39]), torch.tensor([5, 13, 40])
    expected = [
        int(table[row, position])
        for row, start, end in zip(rows, starts, ends, strict=True)
        for position in range(start, end)
    ]
    found = chains.extend_slots(rows, table, starts, ends, batch_size=3, draft_token_num=5)
    assert found.tolist() == expected and found.dtype == torch.int64

    new, before = torch.arange(1000, 1010), table.clone()
    chains.write_slots(rows, table, starts, ends, new, 3)
    written = chains.extend_slots(rows, table, starts, ends)
    assert written.tolist() == new[:6].tolist()
    assert int((table != before).sum()) == 6


def test_slots_of_drafts() -> None:
    table, rows = random_table(4, 30), torch.tensor([2, 1])
    out = torch.full((8,), -7)
    chains.draft_slots(rows, table, torch.tensor([3, 26]), out, 1, 4, positions=None, mrope=None)
    assert out.tolist() == [*table[2, 3:7].tolist(), *table[1, 26:30].tolist()]


@pytest.mark.parametrize("full", [True, False])
@pytest.mark.parametrize(("batch", "nodes"), SHAPES)
def test_a_chain_is_described_as_a_tree(batch: int, nodes: int, full: bool) -> None:
    lengths = torch.randint(1, 30, (batch,))
    columns = lengths * full + nodes
    mask = torch.ones(int((columns * nodes).sum()), dtype=torch.bool)
    positions = torch.full((batch * nodes,), -9)
    links = torch.full((3, batch, nodes), -9)
    chains.link_chains(lengths, chains.Links(positions, *links))
    chains.mask_chains((lengths * full).tolist(), nodes, mask)
    begin = 0
    for b, length in enumerate(lengths.tolist()):
        for i in range(nodes):
            assert positions[b * nodes + i] == length + i
            assert links[0, b, i] == b * nodes + i
            assert links[1, b, i] == (i + 1 if i + 1 < nodes else -1)
            assert links[2, b, i] == -1
            seen = length * full + i + 1
            row = mask[begin : begin + int(columns[b])]
            assert bool(row[:seen].all()) and not bool(row[seen:].any())
            begin += int(columns[b])


def walk(candidates: list[int], target: list[int]) -> list[int]:
    """The tokens that a sequence gets, one after the other."""
    tokens = [target[0]]
    for i in range(1, len(candidates)):
        if candidates[i] != target[i - 1]:
            break
        tokens.append(target[i])
    return tokens


@pytest.mark.parametrize(("batch", "nodes"), SHAPES)
def test_greedy_verification(batch: int, nodes: int) -> None:
    candidates = torch.randint(0, 2, (batch, nodes))
    target = torch.randint(0, 2, (batch, nodes))
    predicts = torch.full((batch * nodes,), -5, dtype=torch.int32)
    index = torch.full((batch, nodes), -7, dtype=torch.int32)
    count = torch.empty(batch, dtype=torch.int32)
    chains.verify_greedy(candidates, target, chains.Accepted(predicts, index, count))
    for b in range(batch):
        expected = walk(candidates[b].tolist(), target[b].tolist())
        number = len(expected)
        assert count[b] == number - 1
        numbers = [b * nodes + i for i in range(number)]
        assert index[b].tolist() == numbers + [-1] * (nodes - number)
        row = predicts.view(batch, nodes)[b].tolist()
        assert row == expected + [-5] * (nodes - number)

    last = torch.empty(batch, dtype=torch.int32)
    accepted = predicts[index.long()]
    chains.last_tokens(accepted, count + 1, last, nodes, batch)
    assert last.tolist() == [
        walk(candidates[b].tolist(), target[b].tolist())[-1] for b in range(batch)
    ]


def tree(parents: list[int]) -> np.ndarray:
    mask = np.zeros((len(parents), len(parents)), dtype=np.int64)
    for i, parent in enumerate(parents):
        if parent >= 0:
            mask[i] = mask[parent]
        mask[i, i] = 1
    return mask


def test_the_longest_branch_becomes_the_chain() -> None:
    trees = [
        ([5, 6, 7, 8, 9, 0], [-1, 0, 0, 2, 3, 0], [5, 7, 8, 9, 0, 0]),
        ([5, 6, 7, 8, 9, 1], [-1, 0, 1, 2, 3, 4], [5, 6, 7, 8, 9, 1]),
        ([5, 0, 0, 0, 0, 0], [-1, 0, 0, 0, 0, 0], [5, 0, 0, 0, 0, 0]),
    ]
    drafts = np.array([tokens for tokens, _, _ in trees])
    mask = np.stack([tree(parents) for _, parents, _ in trees])
    tokens, causal = longest_chain(drafts, mask)
    assert tokens.tolist() == [expected for _, _, expected in trees]
    assert (causal == np.tril(np.ones((6, 6)))).all()


def test_random_trees() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        nodes = int(rng.integers(1, 17))
        parents = [-1, *(int(rng.integers(0, i)) for i in range(1, nodes))]
        drafts = rng.integers(1, 100, (1, nodes))
        tokens, _ = longest_chain(drafts, tree(parents)[None])
        depth = [0] * nodes
        branches: list[list[int]] = [[int(drafts[0, 0])]]
        for i in range(1, nodes):
            depth[i] = depth[parents[i]] + 1
            branches.append([*branches[parents[i]], int(drafts[0, i])])
        longest = max(depth) + 1
        found = tokens[0, :longest].tolist()
        assert found in [branch for branch in branches if len(branch) == longest]
        assert not tokens[0, longest:].any()
