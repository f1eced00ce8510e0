# SPDX-License-Identifier: Apache-2.0
"""What is known of a compiled kernel, and the record of all of them. Needs no Triton."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from bench.gpu.compile.code import Code, Loop
from bench.gpu.compile.occupancy import Occupancy
from bench.gpu.compile.stalls import Stalls


class Built(NamedTuple):
    """One configuration for one architecture.

    Attributes:
        triton: the version of the compiler.
        fingerprint: equal where the machine code must be (`build.fingerprint`); empty where the
            source is wrong.
        kernel: folder and name, such as "extend.open_kernel".
        cases: those that use it so.
        signature: Triton's type by name.
        constants: value by name, as text where it is no number.
        shared: bytes of shared memory per block.
        code, occupancy: None where it did not compile.
        seconds: of compiling and disassembling; little where Triton's cache had it.
        problems: one line each; empty if it may ship.
    """

    triton: str
    fingerprint: str
    kernel: str
    cases: list[str]
    arch: str
    signature: dict[str, str]
    constants: dict[str, Any]
    num_warps: int
    num_stages: int
    shared: int
    code: Code | None
    occupancy: Occupancy | None
    seconds: float
    problems: list[str]

    @property
    def name(self) -> str:
        where = f"on {self.arch}, Triton {self.triton}"
        return f"{self.kernel} ({self.cases[0]}, {self.num_warps} warps) {where}"


def as_json(results: Iterable[Built]) -> list[dict[str, Any]]:
    """What is known of each result, but for the time it took, which is this machine's."""
    rows = []
    for r in results:
        entry = r._asdict()
        del entry["seconds"]
        if r.code is not None and r.occupancy is not None:
            loops = [_loop_as_json(x) for x in r.code.told]
            entry["code"] = r.code._asdict() | {
                "whole": _loop_as_json(r.code.whole),
                "loops": loops,
            }
            entry["occupancy"] = r.occupancy._asdict()
        rows.append(entry)
    return rows


def _loop_as_json(loop: Loop) -> dict[str, Any]:
    return loop._asdict() | {"stalls": loop.stalls._asdict()}


def from_json(rows: Iterable[dict[str, Any]]) -> list[Built]:
    """What `as_json` made rows of."""
    results = []
    for row in rows:
        code = row["code"]
        if code is not None:
            loops = [_loop(x) for x in code["loops"]]
            code = Code(**code | {"whole": _loop(code["whole"]), "loops": loops})
            row = row | {"code": code, "occupancy": Occupancy(**row["occupancy"])}
        results.append(Built(**row, seconds=0.0))
    return results


def _loop(row: dict[str, Any]) -> Loop:
    return Loop(**row | {"stalls": Stalls(**row["stalls"])})


def save(path: Path, results: Iterable[Built]) -> None:
    """Write a record, one line per result."""
    lines = ",\n".join(json.dumps(entry) for entry in as_json(results))
    path.write_text(f"[\n{lines}\n]\n")


def load(path: Path) -> list[Built]:
    """Read a record."""
    return from_json(json.loads(path.read_text()))


def differences(recorded: Iterable[Built], found: Iterable[Built]) -> list[str]:
    """One line for each of ``found`` that is recorded as something else."""
    known = {r.fingerprint: _facts(r) for r in recorded}
    lines = []
    for r in found:
        facts = _facts(r)
        then = known.get(r.fingerprint, facts)
        false = [
            f"{name} {str(then[name])[:60]}, not {str(facts[name])[:60]}"
            for name in facts
            if facts[name] != then[name]
        ]
        if false:
            lines.append(f"{r.name}: the record says {'; '.join(false)}")
    return lines


def _facts(built: Built) -> dict[str, Any]:
    """What must be the same wherever it was compiled."""
    (row,) = json.loads(json.dumps(as_json([built])))
    code = row["code"] or dict.fromkeys(Code._fields)
    return {"shared": row["shared"], "problems": row["problems"], **code}
