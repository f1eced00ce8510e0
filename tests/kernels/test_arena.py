# SPDX-License-Identifier: Apache-2.0
"""The free stack of frames: popping, pushing, and conservation under random use."""

from __future__ import annotations

import pytest
import torch

from sglang_diffxkv.kernels.arena import naive, torch_ops

IMPLEMENTATIONS = [naive, torch_ops]


def new_stack(n: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randperm(n).int(), torch.tensor([n], dtype=torch.int32)


@pytest.mark.parametrize("arena", IMPLEMENTATIONS)
def test_takes_from_the_top(arena) -> None:
    stack, n_free = torch.tensor([4, 2, 0, 1, 3]).int(), torch.tensor([4]).int()
    frames = arena.take_frames(stack, n_free, torch.tensor([2, 0, 1]).int(), 3)
    assert frames.tolist() == [[1, 0, -1], [-1, -1, -1], [2, -1, -1]]
    assert frames.dtype == torch.int32
    assert n_free.tolist() == [1]


@pytest.mark.parametrize("arena", IMPLEMENTATIONS)
@pytest.mark.parametrize("given", [[], [-1, -1], [7], [[-1, 9, -1], [8, -1, -1]], [[[5]], [[-1]]]])
def test_returns_valid_ids_of_any_shape(arena, given) -> None:
    stack, n_free = torch.tensor([1, 2, 0, 0, 0]).int(), torch.tensor([2]).int()
    frames = torch.tensor(given).int()
    arena.return_frames(stack, n_free, frames)
    ids = [i for i in frames.reshape(-1).tolist() if i >= 0]
    assert stack[: int(n_free)].tolist() == [1, 2, *ids]


@pytest.mark.parametrize("arena", IMPLEMENTATIONS)
def test_empties_and_fills_completely(arena) -> None:
    stack, n_free = new_stack(10)
    frames = arena.take_frames(stack, n_free, torch.tensor([4, 4, 2]), 4)
    assert n_free.tolist() == [0]
    assert arena.take_frames(stack, n_free, torch.zeros(3, dtype=torch.int32), 4).max() == -1
    arena.return_frames(stack, n_free, torch.full((2, 3), -1).int())
    assert n_free.tolist() == [0]
    arena.return_frames(stack, n_free, frames)
    assert sorted(stack.tolist()) == list(range(10))
    assert n_free.tolist() == [10]


@pytest.mark.parametrize("seed", range(3))
def test_random_use_conserves_frames(seed: int) -> None:
    """Both implementations stay equal, and every frame is free or held by exactly one owner."""
    torch.manual_seed(seed)
    total, width = 157, 7
    stack, n_free = new_stack(total)
    oracle_stack, oracle_free = stack.clone(), n_free.clone()
    held = torch.empty(0, width, dtype=torch.int32)
    for _ in range(200):
        if torch.rand(()) < 0.5:
            counts = torch.randint(0, width + 1, (int(torch.randint(0, 9, ())),)).int()
            counts = counts[counts.cumsum(0) <= n_free]
            frames = torch_ops.take_frames(stack, n_free, counts, width)
            expected = naive.take_frames(oracle_stack, oracle_free, counts, width)
            assert torch.equal(frames, expected)
            held = torch.cat([held, frames])
        else:
            leaving = torch.rand(len(held)) < 0.4
            torch_ops.return_frames(stack, n_free, held[leaving])
            naive.return_frames(oracle_stack, oracle_free, held[leaving])
            held = held[~leaving]
        assert torch.equal(n_free, oracle_free)
        free = stack[: int(n_free)]
        assert torch.equal(free, oracle_stack[: int(n_free)])
        everything = torch.cat([free, held[held >= 0]])
        assert sorted(everything.tolist()) == list(range(total))
