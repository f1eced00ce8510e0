# SPDX-License-Identifier: Apache-2.0
"""Compiling configurations for GPUs that are not there, one process per core."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget

from bench.gpu.occupancy import ARCHITECTURES, Occupancy, occupancy
from bench.gpu.sass import Code, read_cubin
from bench.gpu.specialise import Configuration, specialise


class Built(NamedTuple):
    """One configuration for one architecture.

    Attributes:
        kernel: folder and name, such as "extend.open_kernel".
        cases: those that use it so.
        signature: Triton's type by name.
        constants: value by name, as text where it is no number.
        shared: bytes of shared memory per block.
        code, occupancy: None where it did not compile.
        seconds: of compiling and disassembling; little where Triton's cache had it.
        problems: one line each; empty if it may ship.
    """

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
        return f"{self.kernel} ({self.cases[0]}, {self.num_warps} warps) on {self.arch}"


def target_of(arch: str) -> GPUTarget:
    """Triton's name of "sm_90" and its like."""
    return GPUTarget("cuda", int(arch.removeprefix("sm_")), 32)


def build(configuration: Configuration, arch: str) -> Built:
    """Compile and inspect; whatever goes wrong is among the problems."""
    begin = time.monotonic()
    launch, limits = configuration.launch, ARCHITECTURES[arch]
    made = specialise(launch, target_of(arch))
    result = Built(
        kernel=f"{launch.kernel.module.split('.')[-2]}.{launch.kernel.__name__}",
        cases=configuration.cases,
        arch=arch,
        signature=made.signature,
        constants={k: _plain(v) for k, v in made.named_constants.items()},
        num_warps=launch.num_warps,
        num_stages=launch.num_stages,
        shared=0,
        code=None,
        occupancy=None,
        seconds=0.0,
        problems=[],
    )
    try:
        compiled = triton.compile(made.source, target=target_of(arch), options=made.options)
    except Exception as error:  # of Triton, LLVM and ptxas, which share no base class
        return result._replace(problems=[_root(error)], seconds=time.monotonic() - begin)
    code, shared = read_cubin(compiled.asm["cubin"]), compiled.metadata.shared
    problems = []
    if code.spills:
        problems.append(
            f"spills: {code.spill_stores} stores, {code.spill_loads} loads, "
            f"{code.stack} bytes of stack, at {code.registers} registers"
        )
    if shared > limits.shared_per_block:
        problems.append(f"{shared} bytes of shared memory of {limits.shared_per_block}")
    return result._replace(
        shared=shared,
        code=code,
        occupancy=occupancy(
            limits,
            num_warps=compiled.metadata.num_warps,
            registers=code.registers,
            shared=shared,
            tensor_columns=compiled.metadata.tmem_size or 0,
        ),
        seconds=time.monotonic() - begin,
        problems=problems,
    )


def _root(error: BaseException) -> str:
    """The last line of the first cause: Triton wraps an error once per function that calls it."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip(" ^")]
    return f"{type(error).__name__}: {' | '.join((lines or ['?'])[-3:])[:500]}"


def _plain(value: Any) -> Any:
    return value if isinstance(value, int | float | str | None) else str(value)


class Job(NamedTuple):
    """What to compile, and for which architecture."""

    configuration: Configuration
    arch: str


def build_all(jobs: Sequence[Job], processes: int | None = None) -> Iterator[Built]:
    """Do every job; results come in order.

    The processes are forked before anything is compiled here: they inherit the kernels, which
    cannot be pickled, and no thread of a compiler.
    """
    pool = ProcessPoolExecutor(
        processes or len(os.sched_getaffinity(0)), multiprocessing.get_context("fork"), _inherit,
        (jobs,),
    )  # fmt: skip
    with pool:
        futures: list[Future[Built]] = [pool.submit(_build, i) for i in range(len(jobs))]
        for future in futures:
            yield future.result()


_jobs: Sequence[Job] = ()


def _inherit(jobs: Sequence[Job]) -> None:
    global _jobs
    _jobs = jobs


def _build(index: int) -> Built:
    return build(*_jobs[index])
