# SPDX-License-Identifier: Apache-2.0
"""The free stack of frames: popping, pushing, and conservation under random use. Copies."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch

from sglang_diffxkv.kernels.arena import cpu, naive, stack_ids, triton
from tests.support.device import DEVICE

IMPLEMENTATIONS = [naive, cpu, triton]


def ints(*values: object) -> torch.Tensor:
    """int32, where the kernels run."""
    return torch.tensor(*values, dtype=torch.int32, device=DEVICE)


def stack_of(ids: list[int]) -> torch.Tensor:
    """A stack with these ids from its bottom."""
    return ints([frame - place for place, frame in enumerate(ids)])


def new_stack(n: int) -> tuple[torch.Tensor, torch.Tensor]:
    return stack_of(torch.randperm(n).tolist()), ints([n])


def ids_in(stack: torch.Tensor, n_free: torch.Tensor) -> torch.Tensor:
    return stack_ids(stack, int(n_free)).cpu()


@pytest.mark.parametrize("arena", IMPLEMENTATIONS)
def test_zeros_are_all_frames(arena: ModuleType) -> None:
    stack, n_free = ints([0] * 5), ints([5])
    assert ids_in(stack, n_free).tolist() == [0, 1, 2, 3, 4]
    frames = arena.take_frames(stack, n_free, ints([2, 3]), 3)
    assert frames.tolist() == [[4, 3, -1], [2, 1, 0]] and n_free.tolist() == [0]


@pytest.mark.parametrize("arena", IMPLEMENTATIONS)
def test_takes_from_the_top(arena: ModuleType) -> None:
    stack, n_free = stack_of([4, 2, 0, 1, 3]), ints([4])
    frames = arena.take_frames(stack, n_free, ints([2, 0, 1]), 3)
    assert frames.tolist() == [[1, 0, -1], [-1, -1, -1], [2, -1, -1]]
    assert frames.dtype == torch.int32
    assert n_free.tolist() == [1]


@pytest.mark.parametrize("arena", IMPLEMENTATIONS)
@pytest.mark.parametrize("given", [[], [-1, -1], [7], [[-1, 9, -1], [8, -1, -1]], [[[5]], [[-1]]]])
def test_returns_valid_ids_of_any_shape(arena: ModuleType, given: list) -> None:
    stack, n_free = stack_of([1, 2, 0, 0, 0]), ints([2])
    frames = ints(given)
    arena.return_frames(stack, n_free, frames)
    ids = [i for i in frames.reshape(-1).tolist() if i >= 0]
    assert ids_in(stack, n_free).tolist() == [1, 2, *ids]


@pytest.mark.parametrize("arena", IMPLEMENTATIONS)
def test_empties_and_fills_completely(arena: ModuleType) -> None:
    stack, n_free = new_stack(10)
    frames = arena.take_frames(stack, n_free, torch.tensor([4, 4, 2], device=DEVICE), 4)
    assert n_free.tolist() == [0]
    assert arena.take_frames(stack, n_free, ints([0, 0, 0]), 4).max() == -1
    arena.return_frames(stack, n_free, ints([[-1, -1, -1]] * 2))
    assert n_free.tolist() == [0]
    arena.return_frames(stack, n_free, frames)
    assert n_free.tolist() == [10]
    assert sorted(ids_in(stack, n_free).tolist()) == list(range(10))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("arena", [cpu, triton])
def test_random_use_conserves_frames(
    arena: ModuleType, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Equal to the naive implementation, and every frame is free or held by exactly one owner."""
    torch.manual_seed(seed)
    for constant, value in (("OWNERS", 4), ("IDS", 16), ("SUMS", 2)):
        monkeypatch.setattr(triton, constant, value)
    total, width = 157, 7
    stack, n_free = new_stack(total)
    oracle_stack, oracle_free = stack.clone().cpu(), n_free.clone().cpu()
    held = torch.empty(0, width, dtype=torch.int32)
    for _ in range(200 if arena is cpu else 40):
        if torch.rand(()) < 0.5:
            counts = torch.randint(0, width + 1, (int(torch.randint(0, 19, ())),)).int()
            counts = counts[counts.cumsum(0) <= oracle_free]
            frames = arena.take_frames(stack, n_free, counts.to(DEVICE), width).cpu()
            expected = naive.take_frames(oracle_stack, oracle_free, counts, width)
            assert torch.equal(frames, expected)
            held = torch.cat([held, frames])
        else:
            leaving = torch.rand(len(held)) < 0.4
            arena.return_frames(stack, n_free, held[leaving].to(DEVICE))
            naive.return_frames(oracle_stack, oracle_free, held[leaving])
            held = held[~leaving]
        assert n_free.tolist() == oracle_free.tolist()
        free = ids_in(stack, n_free)
        assert torch.equal(free, ids_in(oracle_stack, oracle_free))
        everything = torch.cat([free, held[held >= 0]])
        assert sorted(everything.tolist()) == list(range(total))


def test_many_owners() -> None:
    """Several blocks of the size that is shipped."""
    counts = torch.randint(0, 34, (3 * triton.OWNERS + 1,))
    total = int(counts.sum()) + 5
    stack, n_free = new_stack(total)
    before, unchanged = ids_in(stack, n_free), stack.clone()
    frames = triton.take_frames(stack, n_free, counts.to(DEVICE), 33)
    assert frames.numel() > 2 * triton.IDS and n_free.tolist() == [5]
    wanted = torch.arange(33) < counts[:, None]
    assert torch.equal(frames.cpu()[wanted], before.flip(0)[: total - 5].int())
    assert (frames.cpu()[~wanted] == -1).all() and torch.equal(stack, unchanged)
    triton.return_frames(stack, n_free, frames)
    assert n_free.tolist() == [total]
    after = ids_in(stack, n_free)
    assert torch.equal(after[5:], before[5:].flip(0)) and torch.equal(after[:5], before[:5])


@pytest.mark.parametrize("arena", IMPLEMENTATIONS)
@pytest.mark.parametrize(("frames", "frame_bytes", "shape"), [(7, 16, (5,)), (97, 4176, (3, 7, 4))])
def test_copies_frames(
    arena: ModuleType, frames: int, frame_bytes: int, shape: tuple[int, ...]
) -> None:
    """Those that are listed, and no byte beside them."""
    source, target = torch.randint(0, 256, (2, frames, frame_bytes), dtype=torch.uint8)
    source, target = source.to(DEVICE), target.to(DEVICE)
    there = torch.rand(shape) < 0.7
    if there.sum() > frames:
        there.view(-1)[frames:] = False
    old, new = (torch.full(shape, -1, dtype=torch.int32) for _ in range(2))
    count = int(there.sum())
    old[there] = torch.randint(0, frames, (count,), dtype=torch.int32)
    new[there] = torch.randperm(frames, dtype=torch.int32)[:count]
    expected = target.clone()
    for a, b in zip(old[there].tolist(), new[there].tolist(), strict=True):
        expected[b] = source[a]
    before = source.clone()
    arena.copy_frames(source, old.to(DEVICE), target, new.to(DEVICE))
    assert torch.equal(target, expected) and torch.equal(source, before)
