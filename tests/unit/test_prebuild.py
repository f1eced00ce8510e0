# SPDX-License-Identifier: Apache-2.0
"""The C++ kernels are compiled before anything asks for them."""

import logging
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from sglang_diffxkv.kernels.cpu import build, prebuild
from sglang_diffxkv.kernels.cpu.build import CompilerError
from sglang_diffxkv.kernels.decode import cpu as decode
from sglang_diffxkv.kernels.extend import cpu as extend
from sglang_diffxkv.kernels.pack import cpu as pack
from sglang_diffxkv.kernels.score import cpu as score

USERS = (decode.kernels, extend.library, pack.library, score.kernel)


@pytest.fixture(autouse=True)
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And a process that has loaded nothing, for an instruction set that compiles fast."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv(build.ISA_VARIABLE, "baseline")
    build._load.cache_clear()


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
    for use in USERS:
        use()
    assert build._load.cache_info().misses == misses
    build._load.cache_clear()  # as another process, which finds the files
    caplog.clear()
    prebuild.load_all(scores=True)
    for use in USERS:
        use()
    assert not caplog.records


@pytest.fixture
def no_compiler(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(build.shutil, "which", lambda name: None)
    build.find_compiler.cache_clear()
    yield
    build.find_compiler.cache_clear()


@pytest.mark.usefixtures("no_compiler")
@pytest.mark.parametrize("use", USERS)
def test_without_a_compiler(use: Callable[[], object], tmp_path: Path) -> None:
    with pytest.raises(CompilerError, match=r"^no C.. compiler.*install g.*, or set CXX [^\n]*$"):
        use()
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
            score.kernel()
    finally:
        build.find_compiler.cache_clear()
    assert not list(tmp_path.rglob("*.so"))


def test_a_cache_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(CompilerError, match=r"^C[^\n]* set XDG_CACHE_HOME to a folder [^\n]*$"):
        score.kernel()
