# SPDX-License-Identifier: Apache-2.0
"""The fifteen-minute run, on a machine with a GPU, torch and Triton, and no network: two calls.

    bench/gpu/run.sh bench.gpu.remote first     # kernels: checks, times, counters, memcheck
    bench/gpu/run.sh bench.gpu.remote second    # servers: equality, waits, throughput

Each step has a limit of its own, after which it is ended with all of its processes. Results go to
the folder that `$OUT` names (build/gpu-out without it), anew after every figure. `--dry` goes
through the same steps on a CPU: small inputs, kernels in Triton's interpreter.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from bench.gpu.remote.unpack import FLASHINFER, ROOT, SITE, TRITON_CACHE
from bench.gpu.report.markdown import table
from bench.gpu.report.results import write_whole

SERVERS = {
    "HF_HUB_OFFLINE": "1",
    "SGLANG_SKIP_SGL_KERNEL_VERSION_CHECK": "1",
    "SGLANG_UNIFIED_RADIX_TREE_CORE_BACKEND": "python",
}
"""SGLang's parts that are not packed are not asked for."""

MEMCHECK = ("compute-sanitizer", "--tool", "memcheck", "--target-processes", "all")
SECTIONS = ("SpeedOfLight", "MemoryWorkloadAnalysis", "WarpStateStats", "SchedulerStats",
            "LaunchStats", "Occupancy", "InstructionStats")  # fmt: skip
NCU = (
    "ncu", "--clock-control", "none", "--target-processes", "all", "-k", "regex:attend_work_tile",
    *(argument for section in SECTIONS for argument in ("--section", section)),
)  # fmt: skip


class Step(NamedTuple):
    """A program and its limits.

    Attributes:
        seconds: after so many it is ended.
        arguments: of Python.
        tool: what the program runs under; the step is skipped where that is not installed.
        output: name of a file in the folder of results that takes what it prints.
    """

    name: str
    seconds: float
    arguments: tuple[str, ...]
    tool: tuple[str, ...] = ()
    env: tuple[tuple[str, str], ...] = ()
    output: str | None = None


def first(out: Path, dry: bool) -> list[Step]:
    """Kernels. The bench itself keeps to its time, and runs its most telling parts first."""
    small = ("--dry",) if dry else ()
    seconds = 300 if dry else 240
    bench = ("-m", "bench.gpu", "--seconds", str(seconds), "--output", str(out), *small)
    checks = ("-m", "bench.gpu.verify", "--small", "decode", "pack")
    alone = (("PYTORCH_NO_CUDA_MEMORY_CACHING", "1"),)
    return [
        Step("unpack", 240 if dry else 45, ("-m", "bench.gpu.remote.unpack")),
        Step("kernels", seconds + 15, bench),
        Step("ncu", 40, ("-m", "bench.gpu.remote.attend"), NCU, output="ncu.txt"),
        Step("memcheck", 35, checks, MEMCHECK, alone, output="memcheck.txt"),
    ]


def second(out: Path, dry: bool) -> list[Step]:
    """Servers, all of which start at once."""
    seconds = 700 if dry else 300
    small = ("--dry",) if dry else ()
    bench = ("-m", "bench.gpu.server", "--seconds", str(seconds), "--output", str(out), *small)
    return [
        Step("unpack", 240 if dry else 45, ("-m", "bench.gpu.remote.unpack")),
        Step("servers", seconds + 20, bench),
    ]


CALLS = {"first": first, "second": second}


def environment(dry: bool) -> dict[str, str]:
    """What is packed comes behind this checkout, and before what is installed."""
    path = os.pathsep.join((os.environ["PYTHONPATH"], str(SITE), str(FLASHINFER)))
    env = os.environ | SERVERS | {"PYTHONPATH": path, "TRITON_CACHE_DIR": str(TRITON_CACHE)}
    if (headers := _cuda_headers()) is not None:
        env["CPATH"] = str(headers)
    env["PYTHONUNBUFFERED"] = "1"
    return env | ({"TRITON_INTERPRET": "1"} if dry else {})


def _cuda_headers() -> Path | None:
    """Those that came with torch: FlashInfer wants more than nvcc brings along."""
    found = (Path(x) / "nvidia/cu13/include" for x in sys.path)
    return next((x for x in found if (x / "curand_kernel.h").exists()), None)


def run(step: Step, env: dict[str, str], log: Path, out: Path) -> str:
    """Do a step within its limit; how it ended."""
    if step.tool and shutil.which(step.tool[0]) is None:
        return f"skipped: no {step.tool[0]} here"
    with (out / step.output if step.output else log).open("ab") as sink:
        process = subprocess.Popen(
            [*step.tool, sys.executable, *step.arguments],
            env=env | dict(step.env),
            stdin=subprocess.DEVNULL,
            stdout=sink,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            status = process.wait(step.seconds)
        except subprocess.TimeoutExpired:
            # The bench then ends its own children, which have sessions of their own.
            process.terminate()
            with suppress(subprocess.TimeoutExpired):
                process.wait(15)
            status = None
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return f"ENDED after {step.seconds:.0f} s" if status is None else f"exit status {status}"


def perform(name: str, steps: Sequence[Step], out: Path, env: dict[str, str]) -> bool:
    """Do all steps, one after the other whatever becomes of them; whether all ended well."""
    begin, rows = time.monotonic(), []
    log = out / f"{name}.log"
    for step in steps:
        print(f"[{time.monotonic() - begin:4.0f} s] {step.name} ...", flush=True)
        since = time.monotonic()
        how = run(step, env, log, out)
        rows.append([step.name, f"{step.seconds:.0f}", f"{time.monotonic() - since:.0f}", how])
        head = ["step", "limit, s", "took, s", "ended with"]
        write_whole(out / f"{name}.md", f"# {name} call\n\n{table(head, rows)}\n")
        print(f"[{time.monotonic() - begin:4.0f} s] {step.name}: {how}", flush=True)
    return all(row[-1] == "exit status 0" or row[-1].startswith("skipped") for row in rows)


def main() -> None:
    """Do one call; prints the reports; exit status 1 if a step did not end well."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("call", choices=CALLS)
    parser.add_argument("--dry", action="store_true", help="small, on a CPU")
    options = parser.parse_args()
    out = Path(os.environ.get("OUT") or ROOT / "build/gpu-out")
    out.mkdir(parents=True, exist_ok=True)
    steps = CALLS[options.call](out, options.dry)
    fine = perform(options.call, steps, out, environment(options.dry))
    for page in sorted(out.glob("*.md"), key=lambda path: path.stat().st_mtime):
        print(f"\n{page.read_text()}")
    sys.exit(not fine)


if __name__ == "__main__":
    main()
