# SPDX-License-Identifier: Apache-2.0
"""How much memory the host has left, and how much of it a pool on a CPU may take.

A container may have less than the machine: its control group limits it, and so do those around it.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import psutil

DEFAULT_SHARE = 0.25
"""Of the available memory, where nobody has said how much: other servers may want some, too."""
_GIB = 2**30


class _Files(NamedTuple):
    """Names in a control group's folder, and of the lines of its memory.stat for cached files."""

    limit: str
    usage: str
    cached: tuple[str, ...]


_V1 = _Files(
    "memory.limit_in_bytes",
    "memory.usage_in_bytes",
    ("total_inactive_file", "total_active_file"),
)
_V2 = _Files("memory.max", "memory.current", ("inactive_file", "active_file"))


def available_memory(
    cgroups: Path = Path("/sys/fs/cgroup"), membership: Path = Path("/proc/self/cgroup")
) -> int:
    """Bytes that processes here may still take, without swapping."""
    return min([psutil.virtual_memory().available, *_headrooms(cgroups, membership)])


def _headrooms(cgroups: Path, membership: Path) -> list[int]:
    """Bytes left to each limited control group that this process is in."""
    try:
        lines = membership.read_text().splitlines()
    except OSError:  # not Linux
        return []
    found = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            root, files = cgroups, _V2
        elif "memory" in controllers.split(","):
            root, files = cgroups / "memory", _V1
        else:
            continue
        own = root / path.lstrip("/")
        # Inside a container the path may be the host's, and only the root be there.
        folders = [own, *own.parents]
        found += [_headroom(folder, files) for folder in folders[: folders.index(root) + 1]]
    return [bytes_ for bytes_ in found if bytes_ is not None]


def _headroom(folder: Path, files: _Files) -> int | None:
    """Bytes that a control group may still take; None where it has no limit."""
    try:
        limit = (folder / files.limit).read_text().strip()
        used = int((folder / files.usage).read_text())
        stat = dict(x.split() for x in (folder / "memory.stat").read_text().splitlines())
    except OSError:
        return None
    if limit == "max":
        return None
    # Files that the kernel has cached count as used, but make way for whatever needs memory.
    cached = sum(int(stat.get(name, 0)) for name in files.cached)
    return max(0, int(limit) - max(0, used - cached))


def default_budget(own: int, available: int, ranks: int) -> int:
    """Bytes that the pool of a rank takes unless told.

    Args:
        own: what SGLang would give its own pool.
        available: `available_memory`.
        ranks: how many share the host.
    """
    return min(own, int(available * DEFAULT_SHARE) // ranks)


def on_each(ranks: int) -> str:
    """For sentences about what a rank takes."""
    return "" if ranks == 1 else f" on each of {ranks} ranks"


def too_much_on_host(host_bytes: int, available: int, ranks: int) -> str | None:
    """What is wrong with so much host memory for pages on every rank; None where it fits."""
    if host_bytes * ranks <= available:
        return None
    return (
        f"host_bytes of {host_bytes / _GIB:.1f} GiB{on_each(ranks)} is more than the "
        f"{available / _GIB:.1f} GiB that this host has available: lower host_bytes"
    )


def too_much(memory_bytes: int, available: int, ranks: int) -> str | None:
    """What is wrong with a pool of this size on every rank of a host; None where it fits."""
    if memory_bytes * ranks <= available:
        return None
    return (
        f"memory_bytes of {memory_bytes / _GIB:.1f} GiB{on_each(ranks)} is more than the "
        f"{available / _GIB:.1f} GiB that this host has available: lower memory_bytes, or leave it "
        f"out for {default_budget(available, available, ranks) / _GIB:.1f} GiB"
    )
