# SPDX-License-Identifier: Apache-2.0
"""Random histories of SGLang's own admission over a small device and a host, for each kind of pool:
nobody reads what is on the host, nothing is lost, and nobody waits for ever."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

import pytest

from sglang_diffxkv.kernels.layout import PAGE_TOKENS
from sglang_diffxkv.policy.quality import Quality
from tests.support.hybrid import HybridScheduling, hybrid_allocator, hybrid_rows
from tests.support.published import published
from tests.support.scheduling import Requests, Scheduling, prompt
from tests.support.stores import make_allocator
from tests.support.window_pool import WindowScheduling, window_allocator

ROWS, CHUNK = 8, 192
HOST_BYTES = 500_000


def plain() -> Scheduling:
    return Scheduling(make_allocator(mib=2, host_bytes=HOST_BYTES), ROWS, CHUNK)


def hybrid() -> Scheduling:
    rows = hybrid_rows(ROWS, 40)
    return HybridScheduling(hybrid_allocator(rows, mib=2, host_bytes=HOST_BYTES), rows, CHUNK)


def windows() -> Scheduling:
    return WindowScheduling(window_allocator(3, 60, 0.3, host_bytes=HOST_BYTES), ROWS, CHUNK)


@pytest.fixture(scope="module", autouse=True)
def server_arguments(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with published(tmp_path_factory.mktemp("model")):
        yield


class Walk:
    """Requests come, go on, finish and are aborted, in any order that SGLang has them in."""

    def __init__(self, scheduling: Scheduling, seed: int) -> None:
        self.scheduling, self._random = scheduling, random.Random(seed)
        self._request = Requests()
        self._prompts: list[list[int]] = []
        capacity = scheduling.ours.capacity.longest_prompt
        self._longest = min(12, capacity // PAGE_TOKENS)

    def submit(self) -> None:
        """A prompt of its own, or one that goes on with an earlier one; some want log
        probabilities of cached tokens, which are computed again."""
        rng = self._random
        text = prompt(rng.uniform(0.1, self._longest), rng.randrange(1 << 30))
        if self._prompts and rng.random() < 0.7:
            text = (rng.choice(self._prompts[-12:]) + text[:80])[: self._longest * PAGE_TOKENS]
        request = self._request(text, 8, rng.choice([Quality.BALANCED] * 9 + [Quality.HIGH]))
        if rng.random() < 0.3:
            request.return_logprob, request.logprob_start_len = True, rng.randrange(len(text))
        self._prompts.append(text)
        self.scheduling.waiting.append(request)

    def prefill(self) -> None:
        """Its results come at once, or after a step that had been launched before."""
        s = self.scheduling
        idle, hopeful = not s.held, bool(s.waiting)
        admitted = s.prefill(cached=False)
        if idle and hopeful and not admitted:
            raise AssertionError("nobody runs, and nobody is admitted")
        if self._random.random() < 0.5:
            self.decode()
        s.cache(admitted)

    def decode(self) -> None:
        s = self.scheduling
        if s.running.reqs:
            pages = self._random.choice((0, s.ours.store.ledger.frame_headroom + 2))
            s.allocator.check_decode_capacity(num_tokens=pages * PAGE_TOKENS, tree_cache=s.tree)
            s.decode()

    def finish(self) -> None:
        if self.scheduling.running.reqs:
            self.scheduling.finish(self._random.choice(self.scheduling.running.reqs))

    def abort(self) -> None:
        """Who waits, or is between two chunks."""
        s = self.scheduling
        if s.chunked is not None:
            s.abort_chunked()
        elif s.waiting:
            s.waiting.remove(self._random.choice(s.waiting))

    def leave(self) -> None:
        """Everybody who holds pages does, and no step follows: who waits finds room, or never."""
        s = self.scheduling
        for request in list(s.running.reqs):
            s.finish(request)
        if s.chunked is not None:
            s.abort_chunked()
        self.prefill()

    def step(self) -> None:
        rng = self._random
        weights: dict[Callable[[], None], float] = {
            self.submit: 2.0 if len(self.scheduling.waiting) < 6 else 0.0,
            self.prefill: 4.0,
            self.decode: 2.0,
            self.finish: 1.5,
            self.abort: 0.7,
            self.leave: 0.5,
        }
        (rule,) = rng.choices([*weights], [*weights.values()])
        rule()

    def check(self) -> None:
        s = self.scheduling
        d = s.ours.store.directory
        for request in s.held:
            pages = list(s.pages(request) - {0})
            assert bool(d.in_use[pages].all()), "a reader's page is free"
            assert not bool(d.on_host[pages].any()), "a reader's page is on the host"
        assert s.allocator.check() == []


@pytest.mark.parametrize("make", [plain, hybrid, windows])
def test_nobody_waits_for_ever(make: Callable[[], Scheduling], seed: int) -> None:
    walk = Walk(make(), seed)
    for _ in range(400):
        walk.step()
        walk.check()
    counters = walk.scheduling.ours.store.counters
    assert counters.offloaded > 20 and counters.evicted > 0
    s = walk.scheduling
    for _ in range(200):  # all that wait are served
        if not s.waiting and not s.held:
            break
        walk.prefill()
        walk.decode()
        walk.finish()
        walk.check()
    assert not s.waiting and not s.held
