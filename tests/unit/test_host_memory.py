# SPDX-License-Identifier: Apache-2.0
"""What a host or a container has left, and what a pool on a CPU takes of it."""

import logging
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from sglang_diffxkv.patches import pool_setup
from sglang_diffxkv.pool.host_memory import (
    available_memory,
    default_budget,
    too_much,
    too_much_on_host,
)

GIB = 2**30
V2 = ("memory.max", "memory.current", "")
V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_")


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """100 GiB available, whatever this one has."""
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=100 * GIB))


def group(
    folder: Path, names: tuple[str, str, str], limit: object, used: int, cached: int = 0
) -> None:
    """A control group with so many GiB, of which some are cached files."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / names[0]).write_text(f"{limit}\n")
    (folder / names[1]).write_text(f"{used * GIB}\n")
    stat = {"anon": used, "inactive_file": cached, "active_file": cached}
    lines = [f"{names[2]}{name} {gib * GIB}\n" for name, gib in stat.items()]
    (folder / "memory.stat").write_text("".join(lines))


def available(tmp_path: Path, membership: str) -> float:
    (tmp_path / "membership").write_text(membership)
    return available_memory(tmp_path / "cgroups", tmp_path / "membership") / GIB


def test_a_machine_without_groups(tmp_path: Path) -> None:
    assert available_memory(tmp_path, tmp_path / "none") == 100 * GIB
    assert available(tmp_path, "0::/somewhere\n") == 100


def test_the_tightest_group_counts(tmp_path: Path) -> None:
    root = tmp_path / "cgroups"
    group(root / "pods" / "mine", V2, 40 * GIB, used=10)
    assert available(tmp_path, "0::/pods/mine\n") == 30
    group(root / "pods", V2, 60 * GIB, used=45, cached=2)
    assert available(tmp_path, "0::/pods/mine\n") == 19, "cached files make way"
    group(root / "pods", V2, "max", used=90)
    assert available(tmp_path, "0::/pods/mine\n") == 30
    group(root / "pods" / "mine", V2, 40 * GIB, used=41)
    assert available(tmp_path, "0::/pods/mine\n") == 0


def test_the_first_version_of_groups(tmp_path: Path) -> None:
    root = tmp_path / "cgroups" / "memory"
    lines = "5:cpu,cpuacct:/\n4:hugetlb,memory:/jobs/7\n0::/\n"
    group(root, V1, 9223372036854771712, used=70)
    group(root / "jobs", V1, 50 * GIB, used=8, cached=3)
    group(root / "jobs" / "7", V1, 9223372036854771712, used=4)
    assert available(tmp_path, lines) == 48


def test_a_container_sees_its_group_as_the_root(tmp_path: Path) -> None:
    """Of the first version it is told the host's path."""
    group(tmp_path / "cgroups", V2, 20 * GIB, used=5)
    assert available(tmp_path, "0::/\n") == 15
    group(tmp_path / "cgroups" / "memory", V1, 10 * GIB, used=4)
    assert available(tmp_path, "4:memory:/docker/0123\n0::/\n") == 6


def test_a_quarter_divided_by_the_ranks() -> None:
    assert default_budget(own=90 * GIB, available=100 * GIB, ranks=1) == 25 * GIB
    assert default_budget(own=90 * GIB, available=100 * GIB, ranks=2) == 25 * GIB // 2
    assert default_budget(own=3 * GIB, available=100 * GIB, ranks=2) == 3 * GIB


def test_too_much_is_told_in_one_line() -> None:
    assert too_much(50 * GIB, 100 * GIB, 2) is None
    message = too_much(51 * GIB, 100 * GIB, 2)
    assert message is not None and "\n" not in message
    for part in ("memory_bytes of 51.0 GiB", "each of 2 ranks", "100.0 GiB", "12.5 GiB"):
        assert part in message
    assert "rank" not in str(too_much(101 * GIB, 100 * GIB, 1))


@pytest.mark.parametrize(
    ("memory", "given", "expected"),
    [(None, False, 10 * GIB), (None, True, 90 * GIB), (30 * GIB, False, 90 * GIB)],
)
def test_budget_of_a_rank(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    memory: int | None,
    given: bool,
    expected: int,
) -> None:
    """With `memory_bytes`, which is used as it is, SGLang's own budget is passed on."""
    sizes = SimpleNamespace(tp_size=4, dp_size=1, nnodes=2, tp_rank=0)
    monkeypatch.setattr("sglang.srt.runtime_context.get_parallel", lambda: sizes)
    monkeypatch.setattr(pool_setup, "available_memory", lambda: 80 * GIB)
    monkeypatch.setattr(pool_setup, "fraction_is_given", lambda: given)
    with caplog.at_level(logging.INFO):
        assert pool_setup.host_budget(memory, 90 * GIB) == expected
    told = [record.message for record in caplog.records]
    assert len(told) == (expected == 10 * GIB)
    for part in ("10.00 GiB", "2 ranks", "80.0 GiB", "memory_bytes", "--mem-fraction-static"):
        assert all(part in line for line in told)
    with pytest.raises(ValueError, match=r"^diffxkv: memory_bytes of 41.0 GiB on each of 2 ranks"):
        pool_setup.host_budget(41 * GIB, 90 * GIB)


def test_too_much_host_memory_is_told_in_one_line() -> None:
    assert too_much_on_host(50 * GIB, 100 * GIB, 2) is None
    message = str(too_much_on_host(51 * GIB, 100 * GIB, 2))
    assert "host_bytes of 51.0 GiB on each of 2 ranks" in message and "100.0 GiB" in message
