# SPDX-License-Identifier: Apache-2.0
"""What a cubin says of itself: registers, spills, and the instructions of its loops.

The cubin that Triton made is read, with the disassembler that ships in Triton's wheel: running an
assembler again on the PTX gives other code.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

from triton import knobs

from bench.gpu.compile.code import KEPT, Code, Loop
from bench.gpu.compile.stalls import of_loop, of_pass

LINE = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+\s+)?([A-Z][\w.]*)\s*([^;]*);")
SECOND = re.compile(r"^\s*/\* 0x([0-9a-f]{16}) \*/\s*$")
TARGET = re.compile(r"\b0x([0-9a-f]+)\s*$")
RESOURCES = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)")
TILE = re.compile(r"MMA\.(?:(\d+)x(\d+)x(\d+)|(16)(8)(8|16|32|64|128)(?=\.|$))")
WIDTH = {"128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}
ENDS = {"EXIT", "RET", "BRX", "JMX"}
NO_CONTROL = 1 | 7 << 5 | 7 << 8
"""One cycle, no scoreboards."""


class Instruction(NamedTuple):
    """One instruction.

    Attributes:
        target: the index that a branch goes to.
        control: how it is scheduled: the bits above 41 of its second word.
    """

    opcode: str
    conditional: bool
    target: int | None
    operands: str = ""
    control: int = NO_CONTROL

    @property
    def base(self) -> str:
        return self.opcode.split(".", 1)[0]

    @property
    def stall(self) -> int:
        """Cycles until the warp's next one."""
        return self.control & 15

    @property
    def releases(self) -> int | None:
        """The scoreboard that says that the result is there."""
        return _scoreboard(self.control >> 5)

    @property
    def frees(self) -> int | None:
        """The scoreboard that says that the operands were read."""
        return _scoreboard(self.control >> 8)

    @property
    def waits(self) -> list[int]:
        """Scoreboards that must have been released."""
        return [i for i in range(6) if self.control >> (11 + i) & 1]


def _scoreboard(bits: int) -> int | None:
    return bits & 7 if bits & 7 < 6 else None


def read_cubin(cubin: bytes) -> Code:
    """Disassemble a cubin of one kernel.

    Raises:
        ValueError: the disassembler's output has another form.
    """
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "-res-usage", "-sass", file.name]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found = RESOURCES.search(text)
    program = parse(text)
    if found is None or not program:
        raise ValueError(f"not understood: {text[:500]}")
    registers, stack, local = map(int, found.groups())
    loops = find_loops(program)
    whole = _summary(program, 0, set(range(len(program))), [x.start for x in loops])
    spills = whole.mix.get("STL", 0), whole.mix.get("LDL", 0)
    return Code(registers, stack + local, *spills, whole, loops)


def parse(listing: str) -> list[Instruction]:
    """The instructions of a listing of one function, without the padding after its end."""
    rows: list[tuple[str, ...]] = []
    controls: dict[int, int] = {}
    for line in listing.splitlines():
        if found := LINE.match(line):
            rows.append(found.groups())
        elif found := SECOND.match(line):
            controls[len(rows) - 1] = int(found.group(1), 16) >> 41
    index = {int(address, 16): i for i, (address, *_) in enumerate(rows)}
    program = []
    for i, (_, predicate, opcode, operands) in enumerate(rows):
        goal = TARGET.search(operands) if opcode.split(".")[0] == "BRA" else None
        # The slow path of a warp that has diverged where the compiler expects that none does.
        taken = goal is not None and ".DIV" not in opcode
        program.append(
            Instruction(
                opcode,
                predicate is not None or (goal is not None and goal.start() > 0),
                index.get(int(goal.group(1), 16)) if goal and taken else None,
                operands,
                controls.get(i, NO_CONTROL),
            )
        )
    traps = (i for i, x in enumerate(program) if x.target == i)
    return program[: next(traps, len(program))]


def find_loops(program: list[Instruction]) -> list[Loop]:
    """All natural loops, in the order of their first instructions."""
    successors = [list(_successors(program, i)) for i in range(len(program))]
    live = sorted(_reach(successors, 0, barrier=-1))
    predecessors: list[list[int]] = [[] for _ in program]
    for i in live:
        for j in successors[i]:
            predecessors[j].append(i)
    bodies: dict[int, set[int]] = {}
    for tail in live:
        head = program[tail].target
        if head is None or head > tail or tail in _reach(successors, 0, barrier=head):
            continue  # forwards, or into a loop from its side
        bodies.setdefault(head, {head}).update(_reach(predecessors, tail, barrier=head))
    heads = sorted(bodies)
    return [
        _summary(program, head, body, [x for x in heads if x != head and x in body])
        for head, body in sorted(bodies.items())
    ]


def _successors(program: list[Instruction], i: int) -> Iterator[int]:
    instruction = program[i]
    leaves = instruction.base in ENDS or instruction.target is not None
    if i + 1 < len(program) and (instruction.conditional or not leaves):
        yield i + 1
    if instruction.target is not None and instruction.target < len(program):
        yield instruction.target


def _reach(edges: list[list[int]], start: int, barrier: int) -> set[int]:
    """Nodes that are reached from ``start`` without entering ``barrier``."""
    seen, todo = {start} - {barrier}, [start] if start != barrier else []
    while todo:
        for j in edges[todo.pop()]:
            if j != barrier and j not in seen:
                seen.add(j)
                todo.append(j)
    return seen


def _summary(program: list[Instruction], head: int, indices: set[int], inner: list[int]) -> Loop:
    body = [program[i] for i in sorted(indices)]
    return Loop(
        start=head,
        instructions=len(body),
        inner=inner,
        tensor=sum("MMA" in x.base for x in body),
        tensor_flops=sum(_tensor_flops(x.opcode) for x in body),
        load_bytes=sum(32 * _load_bytes(x) for x in body),
        stalls=of_pass(body) if len(body) == len(program) else of_loop(body),
        mix=dict(
            sorted(Counter(x.base for x in body if x.base in KEPT or "MMA" in x.base).items())
        ),
    )


def _tensor_flops(opcode: str) -> int:
    """Of one instruction of one warp, where its name tells its shape. HGMMA is of four warps."""
    found = TILE.search(opcode)
    if found is None:
        return 0
    m, n, k = (int(x) for x in found.groups() if x)
    flops = 2 * m * n * k // (4 if "GMMA" in opcode else 1)
    if "TF32" in opcode:
        return 2 * flops
    return flops // 2 if opcode[0] in "IQ" else flops


def _load_bytes(instruction: Instruction) -> int:
    """Bytes per thread that an instruction loads from global memory."""
    if instruction.base not in ("LDG", "LDGSTS"):
        return 0
    return next((WIDTH[x] for x in instruction.opcode.split(".") if x in WIDTH), 4)
