# SPDX-License-Identifier: Apache-2.0
"""Compiles with the one Triton that this process imports: see `compile`, which starts it."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import NamedTuple

import triton

from bench.gpu.compile.build import Job, build_all, target_of
from bench.gpu.compile.built import Built, save
from bench.gpu.compile.cases import cases
from bench.gpu.compile.specialise import distinct
from sglang_diffxkv.kernels.gpu.device import assumed_capability


class Request(NamedTuple):
    """What to compile.

    Attributes:
        triton: the version that must be the one imported.
        only: operations; all if empty.
        processes: None for one per core.
        skip: fingerprints of what is known.
        output: where the results go (`built.save`).
        seen: where the fingerprints of what was skipped go.
    """

    triton: str
    archs: list[str]
    only: list[str]
    processes: int | None
    skip: list[str]
    output: str
    seen: str


def jobs_of(arch: str, only: Sequence[str] | None) -> list[Job]:
    """Every distinct launch of the shipped operations on this architecture, which may choose it."""
    target = target_of(arch)
    with assumed_capability(target.arch):
        return [Job(found, arch) for found in distinct(cases(only), target)]


def compile_all(
    jobs: Sequence[Job], processes: int | None = None, skip: Collection[str] = ()
) -> tuple[list[Built], list[str]]:
    """Do all jobs, telling on stderr how far it is.

    Returns:
        The results, and fingerprints of ``skip`` that jobs have.
    """
    begin = time.monotonic()
    results, seen = [], []
    for count, result in enumerate(build_all(jobs, processes, skip), 1):
        if isinstance(result, str):
            seen.append(result)
            continue
        results.append(result)
        print(f"{count}/{len(jobs)} {result.name} {result.seconds:.1f} s", file=sys.stderr)
    seconds, busy = time.monotonic() - begin, sum(r.seconds for r in results)
    print(
        f"Triton {triton.__version__}: {len(results)} compilations and {len(seen)} on record in "
        f"{seconds:.0f} s ({busy:.0f} s of work)",
        file=sys.stderr,
    )
    return results, seen


def main() -> None:
    """Do the request on stdin."""
    request = Request(**json.load(sys.stdin))
    if triton.__version__ != request.triton:
        sys.exit(f"Triton {request.triton} was asked for, {triton.__version__} is imported")
    jobs = [job for arch in request.archs for job in jobs_of(arch, request.only or None)]
    results, seen = compile_all(jobs, request.processes, frozenset(request.skip))
    save(Path(request.output), results)
    Path(request.seen).write_text(json.dumps(seen))


if __name__ == "__main__":
    main()
