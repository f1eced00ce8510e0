# SPDX-License-Identifier: Apache-2.0
"""The C++ kernels are compiled before anything asks for them."""

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

from sglang_diffxkv.kernels.cpu import build, prebuild
from sglang_diffxkv.kernels.cpu.build import CompilerError, load_library

OPERATIONS = (*prebuild.OPERATIONS, "score")


def test_no_operation_is_left_out() -> None:
    assert {path.parent.name for path in build.INCLUDE.parent.glob("*/*.cpp")} == {*OPERATIONS}


@pytest.fixture(autouse=True)
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And a process that has loaded nothing, for what compiles fast."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv(build.ISA_VARIABLE, "baseline")
    monkeypatch.setattr(build, "_COMMON", build._COMMON.replace("-O3", "-O0"))
    build._load.cache_clear()


@pytest.mark.slow
def test_nothing_is_compiled_afterwards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    prebuild.load_all(scores=False)
    prebuild.load_all(scores=True)
    told = [record.message for record in caplog.records]
    assert [line.split(" in ")[0] for line in told] == [
        "diffxkv: compiled C++ kernels (decode, extend, layers, pack, step)",
        "diffxkv: compiled C++ kernels (score)",
    ]
    assert len(list(tmp_path.rglob("*.so"))) == 6
    monkeypatch.setattr(build, "_compile", None)
    misses = build._load.cache_info().misses
    for operation in OPERATIONS:
        load_library(operation)
    assert build._load.cache_info().misses == misses
    build._load.cache_clear()  # as another process, which finds the files
    caplog.clear()
    prebuild.load_all(scores=True)
    for operation in OPERATIONS:
        load_library(operation)
    assert not caplog.records


@pytest.fixture
def no_compiler(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(build.shutil, "which", lambda name: None)
    build.find_compiler.cache_clear()
    yield
    build.find_compiler.cache_clear()


@pytest.mark.usefixtures("no_compiler")
def test_without_a_compiler(tmp_path: Path) -> None:
    with pytest.raises(CompilerError, match=r"^no C.. compiler.*install g.*, or set CXX [^\n]*$"):
        load_library("score")
    assert not list(tmp_path.iterdir())


def compiler_that(tmp_path: Path, then: str) -> str:
    """A program that has a version, and else does that."""
    path = tmp_path / "c++"
    path.write_text(f"#!/bin/sh\n[ $1 = --version ] || {then}\n")
    path.chmod(0o755)
    return str(path)


@pytest.mark.parametrize(
    ("then", "reason"),
    [("{ echo 'x.h:1: error: no'; echo more; exit 1; } >&2", "x.h:1: error: no"),
     ("exit 3", "exit status 3")],
)  # fmt: skip
def test_compilers_that_fail(
    then: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", compiler_that(tmp_path, then))
    build.find_compiler.cache_clear()
    try:
        with pytest.raises(CompilerError, match=f"compile with [^\n]*: {reason}; install [^\n]*$"):
            load_library("score")
    finally:
        build.find_compiler.cache_clear()
    assert not list(tmp_path.rglob("*.so"))


def test_a_cache_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(CompilerError, match=r"^C[^\n]* set XDG_CACHE_HOME to a folder [^\n]*$"):
        load_library("score")
