# SPDX-License-Identifier: Apache-2.0
"""How long one warp takes for a stretch of machine code that it has a multiprocessor for.

Every instruction says how many cycles it holds its warp up, which of six scoreboards it will
release, and which it waits for. Following them, with assumed times for what has no fixed one, gives
the time of an iteration, prefetching included: what a later iteration waits for costs less, or
nothing.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from bench.gpu.compile.sass import Instruction

LOAD = 1400
"""Cycles from a global load to its data when memory is busy: 800 ns at 1.755 GHz; assumed."""

TABLE = 450
"""Cycles of a load of 32 bits: an entry of a table, which other heads of its page read as well and
the L2 has (256 ns); assumed."""

OTHER = 30
"""Cycles of whatever else releases a scoreboard: shared memory, shuffles, conversions; assumed."""

READ = 12
"""Cycles until a memory instruction has read its registers; assumed."""

BARRIER = 35
"""Cycles of a barrier of the block, beyond its own issue; assumed."""

ITERATIONS = 16
"""Of a loop, of which the second half is counted, after prefetching has come into step."""

WIDTHS = {"128", "64", "U16", "S16", "U8", "S8"}

PENDING = re.compile(r"SB\d, 0x([0-9a-f]+)")


class Stalls(NamedTuple):
    """Of one iteration.

    Attributes:
        cycles: from one iteration to the next.
        exposed: of them, spent waiting for loads from global memory.
    """

    cycles: float
    exposed: float


class _Warp:
    """The clock of a warp, and when what it has started will be done."""

    def __init__(self) -> None:
        self.clock = 0
        self.exposed = 0
        self.loaded = [0] * 6
        self.done = [0] * 6
        self.group = 0
        self.groups: deque[int] = deque()

    def step(self, x: Instruction) -> None:
        for i in x.waits:
            self._wait_for_load(self.loaded[i])
            self.clock = max(self.clock, self.done[i])
        if x.base == "DEPBAR" and self.groups and (found := PENDING.search(x.operands)):
            while len(self.groups) > int(found.group(1), 16):
                self._wait_for_load(self.groups.popleft())
        now = self.clock
        self.clock += max(1, x.stall) + (BARRIER if x.base == "BAR" else 0)
        if x.base == "LDGSTS":
            self.group = max(self.group, now + _latency(x))
        if x.base == "LDGDEPBAR":
            self.groups.append(self.group)
        elif x.releases is not None:
            loads = x.base in ("LDG", "LD")
            times, cycles = (self.loaded, _latency(x)) if loads else (self.done, OTHER)
            times[x.releases] = max(times[x.releases], now + cycles)
        if x.frees is not None:
            self.done[x.frees] = max(self.done[x.frees], now + READ)

    def _wait_for_load(self, until: int) -> None:
        self.exposed += max(0, until - self.clock)
        self.clock = max(self.clock, until)


def _latency(load: Instruction) -> int:
    """Of a load from global memory; the names of all but those of 32 bits tell their width."""
    return LOAD if WIDTHS.intersection(load.opcode.split(".")) else TABLE


def of_loop(body: Sequence[Instruction]) -> Stalls:
    """One iteration of a loop that never ends."""
    warp, half = _Warp(), ITERATIONS // 2
    begin = 0, 0
    for i in range(ITERATIONS):
        if i == half:
            begin = warp.clock, warp.exposed
        for x in body:
            warp.step(x)
    cycles, exposed = warp.clock - begin[0], warp.exposed - begin[1]
    return Stalls(cycles / half, exposed / half)


def of_pass(body: Sequence[Instruction]) -> Stalls:
    """All of a program, once."""
    warp = _Warp()
    for x in body:
        warp.step(x)
    return Stalls(warp.clock, warp.exposed)
