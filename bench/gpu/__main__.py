# SPDX-License-Identifier: Apache-2.0
"""Verifies every kernel on a GPU, then times them beside FlashInfer, within a budget of time.

    bench/gpu/run.sh bench.gpu [--seconds 540] [--output FOLDER]

Needs PyTorch and Triton, and FlashInfer if it is to be compared with; not SGLang. Writes
gpu_<device>.{json,md}, anew after every result, so that a run that is cut off loses nothing.
Without a GPU, `--dry` goes through the same steps on small inputs in Triton's interpreter.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

from bench.gpu.children import SILENCE_S, Child
from bench.gpu.report.records import BACKGROUND
from bench.gpu.report.results import Results

BENCH = Path(__file__).resolve().parents[1]
RESULTS, DRY_RESULTS = BENCH / "results", BENCH.parent / "build/dry"
SHARDS = {"decode": 4, "extend": 2, "score": 1, "pack": 2, "arena": 1}
"""Processes that share a group of checks: their time is that of compiling, on one core each."""

TIMED = {"decode": 0.5, "sweep": 0.55, "prefill": 0.8, "arena": 0.5, "copies": 1.0}
"""In this order; each may take so much of the time that is left when it begins."""

LEAST_S = 3.0
"""No section begins with less time than this."""

VERIFY_SHARE, FLASHINFER_SHARE = 0.35, 0.5
"""Of the whole time: when checks have to be done, and until when decode waits for FlashInfer."""


class Run:
    """One run of the bench.

    Args:
        only: sections that are run.
        dry: in Triton's interpreter, one process at a time.
    """

    def __init__(self, results: Results, seconds: float, only: Sequence[str], dry: bool) -> None:
        self.results, self.only, self.dry = results, only, dry
        self.begin = time.time()
        self.end = self.begin + seconds
        self.seconds = seconds
        self.children: list[Child] = []

    def start(self, name: str, deadline: float, *arguments: str) -> Child | None:
        """A section in a process of its own, if it is to be run and there is time for it."""
        if name not in self.only:
            return None
        if deadline < time.time() + LEAST_S:
            kind = "error" if name.startswith("verify") else "skipped"
            self.results.add(name, {kind: "not run: no time was left", "late": True})
            return None
        self.results.log(f"{name} begins, {self.end - time.time():.0f} s are left")
        resumes = name.startswith("verify") or name == "decode"
        silence = SILENCE_S if resumes and not self.dry else None
        child = Child(name, deadline, arguments, self.results, silence)
        self.children.append(child)
        return child

    def wait(self, children: Iterable[Child | None]) -> None:
        for child in children:
            if child is not None:
                child.wait()

    def all(self) -> None:
        """Every section in order."""
        background = {name: self.start(name, self.end) for name in BACKGROUND}
        machine = self.start("machine", self.begin + 0.2 * self.seconds)
        self.wait([machine])
        deadline = self.begin + VERIFY_SHARE * self.seconds
        checks: list[Child | None] = []
        for name in checks_of(self.dry):
            shards = 1 if self.dry else SHARDS[name.split("-")[1]]
            checks.append(self.start(name, deadline, "--shards", str(shards)))
            if self.dry:
                self.wait(checks)
        self.wait(checks)
        flashinfer = background["flashinfer"]
        for name, share in TIMED.items():
            if name == "decode" and flashinfer is not None:
                flashinfer.wait_until(self.begin + FLASHINFER_SHARE * self.seconds)
            left = max(0.0, self.end - time.time())
            ready, red = self.results.ready(), self.results.red()
            lists = ("--ready", ",".join(ready), "--red", ",".join(red))
            self.wait([self.start(name, time.time() + share * left, *lists)])

    def stop(self) -> None:
        """End what is still running."""
        for child in self.children:
            child.stop()


def checks_of(dry: bool) -> list[str]:
    """Sections of checks, such as verify-decode-1."""
    shards = dict.fromkeys(SHARDS, 1) if dry else SHARDS
    return [f"verify-{group}-{i + 1}" for group, count in shards.items() for i in range(count)]


def sections(dry: bool) -> list[str]:
    """All sections; what compiles ahead is of no use in the interpreter."""
    return ["machine", *(() if dry else BACKGROUND), *checks_of(dry), *TIMED]


def main() -> None:
    """Run; exit status 1 if a check or a section failed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=540, help="for everything (default 540)")
    parser.add_argument("--output", type=Path, help="folder (bench/results, build/dry)")
    parser.add_argument("--only", help="sections or beginnings of their names, such as verify")
    parser.add_argument("--dry", action="store_true", help="small, in Triton's interpreter")
    options = parser.parse_args()
    only = sections(options.dry)
    if options.only:
        only = [name for name in only if name.startswith(tuple(options.only.split(",")))]
    if not only:
        parser.error(f"there are {', '.join(sections(options.dry))}")
    if options.dry:
        os.environ["TRITON_INTERPRET"] = "1"
        os.environ.setdefault("OMP_NUM_THREADS", "1")
    output = options.output or (DRY_RESULTS if options.dry else RESULTS)
    results = Results(output, " ".join(sys.argv[1:]))
    run = Run(results, options.seconds, only, options.dry)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # `finally` then ends the children
    try:
        run.all()
    finally:
        run.stop()
        results.close()
    print(results.markdown())
    sys.exit(1 if results.failures() else 0)


if __name__ == "__main__":
    main()
