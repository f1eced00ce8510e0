# SPDX-License-Identifier: Apache-2.0
"""Compiling configurations for GPUs that are not there, one process per core."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import time
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from typing import Any, NamedTuple

import triton
from triton._C.libtriton import ir
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend

from bench.gpu.compile.built import Built
from bench.gpu.compile.occupancy import ARCHITECTURES, occupancy
from bench.gpu.compile.sass import read_cubin
from bench.gpu.compile.specialise import Configuration, Specialisation, specialise

FINGERPRINT_DIGITS = 20


def target_of(arch: str) -> GPUTarget:
    """Triton's name of "sm_90" and its like."""
    return GPUTarget("cuda", int(arch.removeprefix("sm_")), 32)


def fingerprint(made: Specialisation, target: GPUTarget) -> str:
    """Of all that the machine code depends on: Triton, its input as it is parsed, and options.

    Neither comments nor line numbers are in it, nor code that the constants leave out.

    Raises:
        Exception: one of Triton's, where the source is wrong.
    """
    backend, context = make_backend(target), ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    options = backend.parse_options(made.options)
    functions = backend.get_codegen_implementation(options), backend.get_module_map()
    parsed = made.source.make_ir(target, options, *functions, context).str_nodebug()
    names = ("num_warps", "num_stages", "num_ctas", "maxnreg")
    chosen = [made.options.get(name) for name in names]
    text = f"{triton.__version__} {target} {chosen}\n{parsed}"
    return hashlib.sha256(text.encode()).hexdigest()[:FINGERPRINT_DIGITS]


def build(configuration: Configuration, arch: str, skip: Collection[str] = ()) -> Built | str:
    """Compile and inspect; whatever goes wrong is among the problems.

    Args:
        skip: fingerprints of what is not to be compiled: it is returned instead.
    """
    begin = time.monotonic()
    launch, limits = configuration.launch, ARCHITECTURES[arch]
    made = specialise(launch, target_of(arch))
    result = Built(
        triton=triton.__version__,
        fingerprint="",
        kernel=f"{launch.kernel.module.split('.')[-2]}.{launch.kernel.__name__}",
        cases=configuration.cases,
        arch=arch,
        signature=made.named_types,
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
        result = result._replace(fingerprint=fingerprint(made, target_of(arch)))
        if result.fingerprint in skip:
            return result.fingerprint
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


def build_all(
    jobs: Sequence[Job], processes: int | None = None, skip: Collection[str] = ()
) -> Iterator[Built | str]:
    """Do every job, as `build` does; results come in order.

    The processes are forked before anything is compiled here: they inherit the kernels, which
    cannot be pickled, and no thread of a compiler.
    """
    pool = ProcessPoolExecutor(
        processes or len(os.sched_getaffinity(0)), multiprocessing.get_context("fork"), _inherit,
        (jobs, skip),
    )  # fmt: skip
    with pool:
        futures: list[Future[Built | str]] = [pool.submit(_build, i) for i in range(len(jobs))]
        for future in futures:
            yield future.result()


_jobs: Sequence[Job] = ()
_skip: Collection[str] = ()


def _inherit(jobs: Sequence[Job], skip: Collection[str]) -> None:
    global _jobs, _skip
    _jobs, _skip = jobs, skip


def _build(index: int) -> Built | str:
    return build(*_jobs[index], _skip)
