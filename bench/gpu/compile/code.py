# SPDX-License-Identifier: Apache-2.0
"""What `sass` reads from machine code."""

from __future__ import annotations

from typing import NamedTuple

from bench.gpu.compile.stalls import Stalls

COUNTED = ("BAR", "LDGSTS", "LDG", "STS", "LDS", "LDSM", "SHFL")
"""What is told of a loop beside its number of instructions and its products."""

KEPT = {*COUNTED, "STL", "LDL"}


class Loop(NamedTuple):
    """A natural loop: what one warp issues per iteration if it takes every branch in it.

    Attributes:
        start: index of its first instruction.
        instructions: static count, inner loops included once.
        inner: where the loops in it start; some wait for a barrier, and that is all.
        tensor: number of its tensor core instructions.
        tensor_flops: how many fp16 multiplications and additions would take them as long, of one
            warp, where their names tell.
        load_bytes: what its loads from global memory ask for, of one warp without predicates.
        stalls: of one warp that is alone; of all the code, of one pass.
        mix: count by opcode, of `KEPT` and products.
    """

    start: int
    instructions: int
    inner: list[int]
    tensor: int
    tensor_flops: int
    load_bytes: int
    stalls: Stalls
    mix: dict[str, int]


class Code(NamedTuple):
    """Registers per thread, bytes of stack, counts of instructions; ``whole`` is all the code."""

    registers: int
    stack: int
    spill_stores: int
    spill_loads: int
    whole: Loop
    loops: list[Loop]

    @property
    def instructions(self) -> int:
        return self.whole.instructions

    @property
    def main_loops(self) -> list[Loop]:
        """Innermost of the loops that use tensor cores; where none does, the largest innermost."""
        using = {x.start for x in self.loops if x.tensor}
        found = [x for x in self.loops if x.tensor and not using.intersection(x.inner)]
        leaves = [x for x in self.loops if not x.inner]
        return found or sorted(leaves, key=lambda x: x.instructions)[-1:]

    def around(self, loop: Loop) -> Loop | None:
        """The smallest loop that ``loop`` is in."""
        outer = [x for x in self.loops if loop.start in x.inner]
        return min(outer, key=lambda x: x.instructions, default=None)

    @property
    def told(self) -> list[Loop]:
        """The main loops, and those that these are in directly."""
        around = {x.start for x in map(self.around, self.main_loops) if x}
        main = {x.start for x in self.main_loops}
        return [x for x in self.loops if x.start in around | main]

    @property
    def spills(self) -> bool:
        return self.stack + self.spill_stores + self.spill_loads > 0
