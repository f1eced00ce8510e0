# SPDX-License-Identifier: Apache-2.0
"""Compiles every shipped configuration of every Triton kernel, on a machine without a GPU.

With each version of Triton in `compilers`. Fails where one does not compile, spills registers or
wants more shared memory than there is.

    python -m bench.gpu.compile [--triton 3.8.0] [--arch sm_90] [--only decode]
    python -m bench.gpu.compile --update
    python -m bench.gpu.compile --check [--seed WORD]
    python -m bench.gpu.compile --report

Without filters it writes the record, bench/results/kernels_compiled.json, and its pages. --update
compiles what is not on record, and strikes off what ships no more. --check
compiles what is not on record and a sample of what is, and fails if the record is not true, or
bad. --report writes the pages anew from the record.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import NamedTuple

from bench.gpu.compile import predict, steps
from bench.gpu.compile.built import Built, differences, load, save
from bench.gpu.compile.compilers import VERSIONS, environment, install
from bench.gpu.compile.occupancy import ARCHITECTURES
from bench.gpu.compile.report import page, problems, tables
from bench.gpu.compile.worker import Request

RESULTS = Path(__file__).parents[2] / "results"
RECORD = RESULTS / "kernels_compiled.json"

SAMPLE = 0.02
"""Share of what is on record that --check compiles all the same."""


class Compiled(NamedTuple):
    """What a worker answers: results, and fingerprints of what it was told to skip."""

    results: list[Built]
    seen: list[str]


def compile_with(
    version: str,
    archs: Sequence[str],
    only: Sequence[str],
    processes: int | None,
    skip: Collection[str] = (),
) -> Compiled:
    """Compile in a process that imports this version of Triton.

    Raises:
        subprocess.CalledProcessError: it failed for other reasons than a kernel's.
    """
    with tempfile.TemporaryDirectory() as folder:
        output, seen = Path(folder) / "results.json", Path(folder) / "seen.json"
        request = Request(
            version, list(archs), list(only), processes, sorted(skip), str(output), str(seen)
        )
        command = [sys.executable, "-m", "bench.gpu.compile.worker"]
        text = json.dumps(request._asdict())
        subprocess.run(command, check=True, input=text, text=True, env=environment(version))
        return Compiled(load(output), json.loads(seen.read_text()))


def sampled(fingerprint: str, seed: str) -> bool:
    """Whether --check compiles this although it is on record."""
    digest = hashlib.sha256(f"{seed} {fingerprint}".encode()).digest()
    return int.from_bytes(digest[:4], "big") < SAMPLE * 2**32


def verdict(record: Sequence[Built], compiled: Compiled) -> list[str]:
    """One line for each way in which the kernels of today, or what is recorded of them, are bad."""
    shipped = {*compiled.seen, *(r.fingerprint for r in compiled.results)}
    known = [r for r in record if r.fingerprint in shipped]
    found = differences(known, compiled.results) + problems(compiled.results)
    return list(dict.fromkeys(found + problems(known)))


def check(seed: str, processes: int | None) -> list[str]:
    """Compile what --check does; its verdict on all versions."""
    record, found = load(RECORD), []
    for version in VERSIONS:
        mine = [r for r in record if r.triton == version]
        known = {r.fingerprint for r in mine}
        skip = {x for x in known if not sampled(x, seed)}
        compiled = compile_with(version, list(ARCHITECTURES), (), processes, skip)
        missing = [r for r in compiled.results if r.fingerprint not in known]
        print(
            f"Triton {version}: {len(missing)} compilations were not on record, "
            f"{len(compiled.results) - len(missing)} of those on it were repeated"
        )
        found += verdict(mine, compiled)
    return found


def updated(processes: int | None) -> list[Built]:
    """The record of today's kernels, of which those that it has are not compiled again."""
    record, results = load(RECORD), []
    for version in VERSIONS:
        mine = {r.fingerprint: r for r in record if r.triton == version}
        compiled = compile_with(version, list(ARCHITECTURES), (), processes, mine)
        results += [mine[x] for x in compiled.seen] + compiled.results
        print(f"Triton {version}: {len(compiled.results)} compiled")
    return results


def write_pages(results: Sequence[Built]) -> None:
    """Write what was compiled, and what that predicts."""
    (RESULTS / "kernels_compiled.md").write_text(page(results))
    (RESULTS / "kernels_predicted.md").write_text(predict.report(results) + steps.report(results))


def arguments() -> argparse.Namespace:
    """Of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--triton", action="append", choices=VERSIONS, help="only this version")
    parser.add_argument("--arch", action="append", choices=ARCHITECTURES, help="only this one")
    parser.add_argument("--only", action="append", help="only cases of this operation")
    parser.add_argument("--processes", type=int, help="default: one per core")
    parser.add_argument("--update", action="store_true", help="the record, where it lacks")
    parser.add_argument("--check", action="store_true", help="against the record")
    parser.add_argument("--seed", default="", help="of --check's sample")
    parser.add_argument("--report", action="store_true", help="write pages from the record")
    return parser.parse_args()


def main() -> None:
    """Compile, print, write; exit status 1 if there was a problem."""
    args = arguments()
    if args.report:
        return write_pages(load(RECORD))
    install()
    if args.check:
        found = check(args.seed, args.processes)
    elif args.update:
        results = updated(args.processes)
        save(RECORD, results)
        write_pages(results)
        found = problems(results)
    else:
        archs, only = args.arch or list(ARCHITECTURES), args.only or []
        versions = args.triton or VERSIONS
        compiled = [compile_with(v, archs, only, args.processes) for v in versions]
        results = [r for x in compiled for r in x.results]
        if args.triton or args.arch or args.only:
            print(tables(results) + "\n" + predict.table(results))
        else:
            save(RECORD, results)
            write_pages(results)
        found = problems(results)
    print("\n".join(found))
    sys.exit(1 if found else 0)


if __name__ == "__main__":
    main()
