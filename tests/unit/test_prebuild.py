# SPDX-License-Identifier: Apache-2.0
"""The C++ kernels are compiled before anything asks for them."""

import logging
from pathlib import Path

import pytest

from sglang_diffxkv.kernels.cpu import build, prebuild
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


@pytest.mark.skipif(build._compiler() is None, reason="needs a C++ compiler")
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
    assert all(use() is not None for use in USERS)
    assert build._load.cache_info().misses == misses
    build._load.cache_clear()  # as another process, which finds the files
    caplog.clear()
    prebuild.load_all(scores=True)
    assert all(use() is not None for use in USERS) and not caplog.records


@pytest.mark.parametrize("isa", ["baseline", "none"])
def test_without_a_compiler_torch_serves(
    isa: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv(build.ISA_VARIABLE, isa)
    monkeypatch.setattr(build.shutil, "which", lambda name: None)
    build._compiler.cache_clear()
    try:
        prebuild.load_all(scores=True)
        assert all(use() is None for use in USERS)
    finally:
        build._compiler.cache_clear()
        build._load.cache_clear()
    assert len(caplog.records) == (isa != "none") and not list(tmp_path.iterdir())
