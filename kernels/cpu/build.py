# SPDX-License-Identifier: Apache-2.0
"""Compile the C++ kernels once per instruction set and load them through a plain C ABI.

A library is keyed by the hash of its sources, the headers beside them, the flags and the compiler,
and kept in ``$XDG_CACHE_HOME/sglang-diffxkv`` (default ``~/.cache/sglang-diffxkv``).

Kernels share work through pool.h, not OpenMP, of which they have SIMD loops alone: a second OpenMP
runtime beside torch's has spinning threads of its own, which slow torch down about five times.
"""

from __future__ import annotations

import ctypes
import fcntl
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

ISA_VARIABLE = "DIFFXKV_CPU_ISA"
"""Environment variable that forces one of ISAS."""

ISAS = ("avx512", "avx2", "baseline")
"""Instruction sets, best first. "baseline" is whatever the compiler targets by default."""

INCLUDE = Path(__file__).parent


class CompilerError(RuntimeError):
    """No C++ kernels: one line that says what to install or to set."""


_NEEDS = {
    "avx512": {"avx512f", "avx512bw", "avx512dq", "avx512vl", "avx2", "fma", "f16c"},
    "avx2": {"avx2", "fma", "f16c"},
    "baseline": set(),
}
_OPTIONAL = {"avx512": {"avx512_vnni": "-mavx512vnni"}}
_FLAGS = {
    "avx512": "-mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx2 -mfma -mf16c "
    "-mprefer-vector-width=512 -mtune=icelake-server",
    "avx2": "-mavx2 -mfma -mf16c",
    "baseline": "",
}
_COMMON = "-std=c++17 -O3 -fPIC -pthread -fopenmp-simd -fno-math-errno -fno-trapping-math -w"


@functools.cache
def _cpu_flags() -> frozenset[str]:
    """Features of this CPU as Linux names them; empty where it does not tell (then: baseline)."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return frozenset()
    flags = next((line for line in lines if line.startswith("flags")), "")
    return frozenset(flags.split())


@functools.cache
def available_isas() -> tuple[str, ...]:
    """Members of ISAS that this CPU can run, best first."""
    return tuple(isa for isa in ISAS if _NEEDS[isa] <= _cpu_flags())


def cpu_isa() -> str:
    """The instruction set to use: the environment's choice or the best available.

    Raises:
        ValueError: the environment names an unknown instruction set or one this CPU lacks.
    """
    forced = os.environ.get(ISA_VARIABLE, "")
    if not forced:
        return available_isas()[0]
    if forced not in available_isas():
        raise ValueError(f"{ISA_VARIABLE}={forced}: this CPU offers {list(available_isas())}")
    return forced


class Compiler(NamedTuple):
    """Path of a C++ compiler, and the version that it reports."""

    path: str
    version: str


@functools.cache
def find_compiler() -> Compiler:
    """The compiler that ``CXX`` names, or else the first that works.

    Raises:
        CompilerError: there is none.
    """
    for name in (os.environ.get("CXX", ""), "c++", "g++", "clang++"):
        path = shutil.which(name) if name else None
        if path:
            shown = subprocess.run([path, "--version"], capture_output=True, text=True)
            if shown.returncode == 0:
                return Compiler(path, shown.stdout)
    raise CompilerError(
        "no C++ compiler, which kernels for CPUs are compiled with at first start: install g++ 12 "
        "or later, or set CXX to the path of a compiler"
    )


def _cache_dir() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(base) / "sglang-diffxkv"


def _flags(isa: str) -> list[str]:
    extra = [flag for name, flag in _OPTIONAL.get(isa, {}).items() if name in _cpu_flags()]
    return [*_COMMON.split(), *_FLAGS[isa].split(), *extra, f"-I{INCLUDE}"]


def _digest(sources: Sequence[Path], flags: Sequence[str], version: str) -> str:
    folders = sorted({INCLUDE, *(source.parent for source in sources)})
    headers = [header for folder in folders for header in sorted(folder.glob("*.h"))]
    state = hashlib.sha256("\0".join([*flags, version, platform.machine()]).encode())
    for path in [*sources, *headers]:
        state.update(path.name.encode() + b"\0" + path.read_bytes())
    return state.hexdigest()[:20]


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock, so that the ranks of one server compile a library once."""
    with path.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _compile(compiler: str, flags: list[str], sources: Sequence[Path], library: Path) -> None:
    """Build ``library`` under a temporary name and rename it, so that readers never see a part."""
    with tempfile.TemporaryDirectory(dir=library.parent) as work:
        objects = [str(Path(work) / f"{i}.o") for i in range(len(sources))]
        for source, target in zip(sources, objects, strict=True):
            _run([compiler, *flags, "-c", str(source), "-o", target])
        built = Path(work) / library.name
        _run([compiler, "-shared", "-pthread", "-o", str(built), *objects])
        built.replace(library)


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        lines = done.stderr.splitlines() or [f"exit status {done.returncode}"]
        reason = next((line for line in lines if "error" in line), lines[-1])
        raise CompilerError(
            f"C++ kernels do not compile with {command[0]}: {reason}; install g++ "
            "12 or later, or set CXX to the path of another compiler"
        )


@functools.cache
def sources_of(operation: str) -> list[Path]:
    """The C++ files in an operation's folder."""
    return sorted((INCLUDE.parent / operation).glob("*.cpp"))


def _library_path(operation: str, isa: str) -> Path:
    digest = _digest(sources_of(operation), _flags(isa), find_compiler().version)
    return _cache_dir() / f"{operation}-{isa}-{digest}.so"


@functools.cache
def _load(operation: str, isa: str) -> ctypes.CDLL:
    library = _library_path(operation, isa)
    try:
        library.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        if not library.exists():
            with _locked(library.with_name(f"{operation}-{isa}.lock")):
                if not library.exists():
                    _compile(find_compiler().path, _flags(isa), sources_of(operation), library)
        return ctypes.CDLL(str(library))
    except OSError as problem:
        raise CompilerError(
            f"C++ kernels cannot be kept in, or loaded from, {library.parent}: {problem}; set "
            "XDG_CACHE_HOME to a folder where files can be written and executed"
        ) from problem


def is_built(operation: str) -> bool:
    """Whether `load_library` has nothing to compile."""
    return _library_path(operation, cpu_isa()).exists()


def load_library(operation: str) -> ctypes.CDLL:
    """An operation's kernels for the instruction set in use; compiled on first use, then cached.

    Args:
        operation: its folder. Headers there and in ``kernels/cpu`` are on the include path.

    Raises:
        CompilerError: there is no compiler, or it fails, or no place to keep what it makes.
    """
    return _load(operation, cpu_isa())
