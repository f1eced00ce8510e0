# SPDX-License-Identifier: Apache-2.0
"""What was compiled, as tables and as JSON."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from bench.gpu.build import Built
from bench.gpu.sass import Loop

COLUMNS = (
    "kernel", "for", "warps", "stages", "registers", "spills", "shared bytes", "instructions",
    "main loops", "blocks/SM", "warps/SM", "limited by",
)  # fmt: skip


def markdown_table(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A table in Markdown."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines) + "\n"


def shortened(cases: Sequence[str]) -> str:
    """The first case and the number of others."""
    return cases[0] + (f" + {len(cases) - 1}" if len(cases) > 1 else "")


def row(built: Built) -> list[Any]:
    """One row of `COLUMNS`; spills are instructions."""
    head = [built.kernel, shortened(built.cases), built.num_warps, built.num_stages]
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
    """One table per architecture."""
    text = ""
    for arch in dict.fromkeys(r.arch for r in results):
        text += f"\n## {arch}\n\n"
        text += markdown_table(COLUMNS, (row(r) for r in results if r.arch == arch))
    return text


def problems(results: Iterable[Built]) -> list[str]:
    """One line per problem."""
    return [f"{r.name}: {problem}" for r in results for problem in r.problems]


def as_json(results: Iterable[Built]) -> list[dict[str, Any]]:
    """What is known of each result, but for the time it took, which is this machine's."""
    rows = []
    for r in results:
        entry = r._asdict()
        del entry["seconds"]
        if r.code is not None and r.occupancy is not None:
            loops = [_without_mix(x) for x in r.code.main_loops]
            entry["code"] = r.code._asdict() | {"whole": _without_mix(r.code.whole), "loops": loops}
            entry["occupancy"] = r.occupancy._asdict()
        rows.append(entry)
    return rows


def _without_mix(loop: Loop) -> dict[str, Any]:
    entry = loop._asdict()
    del entry["mix"]
    return entry
