# SPDX-License-Identifier: Apache-2.0
"""Compiles every shipped configuration of every Triton kernel, on a machine without a GPU.

Fails where one does not compile, spills registers or wants more shared memory than there is.

    python -m bench.gpu.compile [--arch sm_90] [--only decode]

Without filters it writes bench/results/kernels_compiled.{md,json} and kernels_predicted.md.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import triton

from bench.gpu import predict, steps
from bench.gpu.build import Built, Job, build_all, target_of
from bench.gpu.cases import cases
from bench.gpu.occupancy import ARCHITECTURES
from bench.gpu.report import as_json, problems, tables
from bench.gpu.specialise import distinct
from sglang_diffxkv.kernels.gpu.device import assumed_capability

RESULTS = Path(__file__).parents[1] / "results"

INTRODUCTION = """# Compiled kernels

Triton {version}, `make compile-kernels`: {count} kernels, over all architectures, read from the
machine code.
Nothing here was run. "For" is the first case that uses a configuration, and how many others do;
"main loops" counts the instructions of the innermost loops that use tensor cores, or of the largest
one, as one warp issues them per iteration.
Blocks and warps are what fits on a multiprocessor.
"""


def jobs_of(arch: str, only: Sequence[str] | None) -> list[Job]:
    """Every distinct launch of the shipped operations on this architecture, which may choose it."""
    target = target_of(arch)
    with assumed_capability(target.arch):
        return [Job(found, arch) for found in distinct(cases(only), target)]


def compile_all(jobs: Sequence[Job], processes: int | None = None) -> list[Built]:
    """Do all jobs, telling on stderr how far it is."""
    begin = time.monotonic()
    total, results = len(jobs), []
    for result in build_all(jobs, processes):
        results.append(result)
        print(f"{len(results)}/{total} {result.name} {result.seconds:.1f} s", file=sys.stderr)
    seconds, busy = time.monotonic() - begin, sum(r.seconds for r in results)
    print(f"{total} compilations in {seconds:.0f} s ({busy:.0f} s of work)", file=sys.stderr)
    return results


def write(results: Sequence[Built]) -> None:
    """Write what was compiled, and what that predicts."""
    count = len(results)
    text = INTRODUCTION.format(version=triton.__version__, count=count) + tables(results)
    (RESULTS / "kernels_compiled.md").write_text(text)
    lines = ",\n".join(json.dumps(entry) for entry in as_json(results))
    (RESULTS / "kernels_predicted.md").write_text(predict.report(results) + steps.report(results))
    (RESULTS / "kernels_compiled.json").write_text(f"[\n{lines}\n]\n")


def main() -> None:
    """Compile, print, write; exit status 1 if there was a problem."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--arch", action="append", choices=ARCHITECTURES, help="only this one")
    parser.add_argument("--only", action="append", help="only cases of this operation")
    parser.add_argument("--processes", type=int, help="default: one per core")
    args = parser.parse_args()
    jobs = [job for arch in args.arch or ARCHITECTURES for job in jobs_of(arch, args.only)]
    if not jobs:
        sys.exit(f"no kernels in {args.only or 'any operation'}")
    results = compile_all(jobs, args.processes)
    print(tables(results))
    if not args.arch and not args.only:
        write(results)
    found = problems(results)
    print("\n".join(found))
    sys.exit(1 if found else 0)


if __name__ == "__main__":
    main()
