# SPDX-License-Identifier: Apache-2.0
"""What was compiled, as tables and as JSON."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from bench.gpu.compile.built import Built
from bench.gpu.compile.code import COUNTED
from bench.gpu.compile.tiles import tiles_of

INTRODUCTION = """# Compiled kernels

`make compile-kernels`: {count} kernels, over all architectures, by {versions}, read
from the machine code. Nothing here was run. "For" is the first case that comes to such code, and
how many others do. Blocks and warps are what fits on a multiprocessor; spills are instructions.

"""

LOOPS = """## Main loops on sm_90

What one warp issues per iteration of the innermost loops that use tensor cores, or of the largest
one; all branches count. "Products" are instructions of tensor cores; "alone" the cycles of an
iteration if no other warp interferes, and "exposed" those of them that are spent waiting for loads
(assumptions: kernels_predicted.md). "Per element" is thread instructions per element of keys and
values, where the tile is known.

"""

COLUMNS = (
    "kernel", "for", "warps", "stages", "registers", "spills", "shared bytes", "instructions",
    "main loops", "blocks/SM", "warps/SM", "limited by",
)  # fmt: skip

LOOP_COLUMNS = (
    "Triton", "kernel", "for", "tokens", "instructions", "per element", *COUNTED, "products",
    "exposed", "alone",
)  # fmt: skip


def markdown_table(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A table in Markdown."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines) + "\n"


def shortened(cases: Sequence[str]) -> str:
    """The first case and the number of others."""
    return cases[0] + (f" + {len(cases) - 1}" if len(cases) > 1 else "")


def folded(rows: Iterable[Sequence[Any]], at: int) -> list[list[Any]]:
    """One row for all that differ in nothing but their cases, which are in column ``at``."""
    found: dict[tuple[Any, ...], list[str]] = {}
    for cells in rows:
        found.setdefault((*cells[:at], *cells[at + 1 :]), []).extend(cells[at])
    return [
        [*cells[:at], shortened(list(dict.fromkeys(cases))), *cells[at:]]
        for cells, cases in found.items()
    ]


def row(built: Built) -> list[Any]:
    """One row of `COLUMNS`, to be folded."""
    head = [built.kernel, built.cases, built.num_warps, built.num_stages]
    code, fits = built.code, built.occupancy
    if code is None or fits is None:
        return [*head, "**does not compile**", *["–"] * (len(COLUMNS) - len(head) - 1)]
    spilt = code.spill_stores + code.spill_loads
    loops = ", ".join(str(x.instructions) for x in code.main_loops)
    return [
        *head, code.registers, f"**{spilt}**" if code.spills else 0, built.shared,
        code.instructions, loops or "–", fits.blocks, fits.warps, fits.limit,
    ]  # fmt: skip


def tables(results: Sequence[Built]) -> str:
    """One table per architecture and compiler."""
    text = ""
    for arch, version in dict.fromkeys((r.arch, r.triton) for r in results):
        mine = [row(r) for r in results if (r.arch, r.triton) == (arch, version)]
        text += f"\n## {arch}, Triton {version}\n\n" + markdown_table(COLUMNS, folded(mine, 1))
    return text


def loop_rows(built: Built) -> Iterator[list[Any]]:
    """Rows of `LOOP_COLUMNS`, to be folded."""
    loops = built.code.main_loops if built.code else []
    tiles = tiles_of(built)
    matched = len(tiles) == len(loops) and any(x.tensor for x in loops)
    for i, loop in enumerate(loops):
        name, element = "–", "–"
        if matched:
            issued = loop.instructions * built.num_warps * tiles[i].iterations
            name, element = tiles[i].name, f"{issued * 32 / tiles[i].elements:.1f}"
        yield [
            built.triton, built.kernel, built.cases, name, loop.instructions, element,
            *(loop.mix.get(x, 0) for x in COUNTED), loop.tensor, round(loop.stalls.exposed),
            round(loop.stalls.cycles),
        ]  # fmt: skip


def page(results: Sequence[Built]) -> str:
    """All tables."""
    versions = " and ".join(f"Triton {x}" for x in dict.fromkeys(r.triton for r in results))
    hopper = [r for r in results if r.arch == "sm_90"]
    lines = folded((line for r in hopper for line in loop_rows(r)), 2)
    head = INTRODUCTION.format(count=len(results), versions=versions)
    return head + LOOPS + markdown_table(LOOP_COLUMNS, lines) + tables(results)


def problems(results: Iterable[Built]) -> list[str]:
    """One line per problem."""
    return [f"{r.name}: {problem}" for r in results for problem in r.problems]
