# SPDX-License-Identifier: Apache-2.0
"""Times of operations on the GPU: CUDA graph replays, candidates in turn, caches cold.

Every candidate is a function of the number of an independent input. All of its inputs are captured
into one graph, one after the other as the layers of a model are; together they are larger than the
L2 cache, so that each finds it cold. Graphs of different candidates are replayed in turn, so that
whatever else happens to the machine happens to all.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from statistics import quantiles
from typing import NamedTuple

import torch

L2_SHARE = 4
"""Inputs together are at least this many times the L2 cache."""

COPIES = (2, 512)
"""Fewest and most inputs; the most leaves the smallest inputs in the cache."""

ROUNDS = (7, 30)
"""Fewest and most replays of each candidate."""

Candidate = Callable[[int], object]


class Timing(NamedTuple):
    """Seconds of one call: median, tenth and ninetieth percentile, and how many replays."""

    median: float
    low: float
    high: float
    rounds: int


class Deadline(NamedTuple):
    """When a section has to be done.

    Attributes:
        at: of `time.time`.
    """

    at: float

    def left(self) -> float:
        """Seconds that are left."""
        return self.at - time.time()


def l2_bytes(device: torch.device) -> int:
    """Size of the L2 cache."""
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).L2_cache_size


def copies_needed(nbytes: float, device: torch.device) -> int:
    """How many independent inputs of ``nbytes`` leave the L2 cache cold, within `COPIES`."""
    needed = -(-L2_SHARE * l2_bytes(device) // max(1, int(nbytes)))
    return min(COPIES[1], max(COPIES[0], needed))


def interleaved(
    candidates: Mapping[str, Candidate], copies: int, device: torch.device, seconds: float = 0.6
) -> dict[str, Timing]:
    """Time of one call of each candidate.

    Args:
        copies: calls ``candidate(0) ... candidate(copies - 1)`` make one replay.
        seconds: about how long to measure, of all candidates together.

    Raises:
        RuntimeError: a candidate cannot be captured, or failed.
    """
    if device.type != "cuda":
        return {name: _on_cpu(candidate, copies) for name, candidate in candidates.items()}
    graphs = {name: _captured(candidate, copies) for name, candidate in candidates.items()}
    spent = sum(_replayed(graph) for graph in graphs.values())  # not timed: clocks, caches
    rounds = int(min(ROUNDS[1], max(ROUNDS[0], seconds / max(spent, 1e-6))))
    times: dict[str, list[float]] = {name: [] for name in graphs}
    events: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {n: [] for n in graphs}
    for _ in range(rounds):
        for name, graph in graphs.items():
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            graph.replay()
            end.record()
            events[name].append((begin, end))
    torch.cuda.synchronize()
    for name, pairs in events.items():
        times[name] = [begin.elapsed_time(end) * 1e-3 / copies for begin, end in pairs]
    return {name: summary(values) for name, values in times.items()}


def summary(values: list[float]) -> Timing:
    """Median and spread."""
    if len(values) == 1:
        return Timing(values[0], values[0], values[0], 1)
    deciles = quantiles(values, n=10, method="inclusive")
    return Timing(deciles[4], deciles[0], deciles[8], len(values))


def _captured(candidate: Candidate, copies: int) -> torch.cuda.CUDAGraph:
    """Compile and warm up on a stream of its own, then capture."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        # Slices of different layers are aligned differently, which Triton compiles kernels for.
        for i in range(min(copies, 8)):
            candidate(i)
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(copies):
            candidate(i)
    return graph


def _replayed(graph: torch.cuda.CUDAGraph) -> float:
    """Seconds of a replay, seen from the host, after one that is not timed."""
    graph.replay()
    torch.cuda.synchronize()
    begin = time.perf_counter()
    graph.replay()
    torch.cuda.synchronize()
    return time.perf_counter() - begin


def _on_cpu(candidate: Candidate, copies: int) -> Timing:
    """One call, in a dry run: whether it works, not how fast it is."""
    begin = time.perf_counter()
    for i in range(copies):
        candidate(i)
    return summary([(time.perf_counter() - begin) / copies])
