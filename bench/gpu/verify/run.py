# SPDX-License-Identifier: Apache-2.0
"""Groups of checks, one record each."""

from __future__ import annotations

import importlib
import time
import traceback
from collections.abc import Iterator
from typing import Any

import torch

from bench.gpu.device import check_device, last_line
from bench.gpu.verify.check import Check

GROUPS = ("decode", "extend", "score", "pack", "arena")
"""Each is the name of a module of this package with ``checks(large)``."""


def group_checks(group: str, *, large: bool) -> list[Check]:
    """The checks of a group; ``large`` adds those that take Triton's interpreter too long."""
    module = importlib.import_module(f"bench.gpu.verify.{group}")
    return list(module.checks(large))


def run_group(
    group: str, device: torch.device, *, large: bool, shard: int = 0, shards: int = 1,
    first: int = 0,
) -> Iterator[dict[str, Any]]:  # fmt: skip
    """One record per check, whatever it ends with.

    Args:
        shard: of ``shards``: every so many of the checks.
        first: how many of the shard's checks are left out.

    Raises:
        DeviceLost: after the record of the check that lost it; a new process can go on.
    """
    try:
        checks = group_checks(group, large=large)
    except ImportError as error:
        yield failure(group, group, f"not there: {error}")
        return
    # What is timed comes first: time may run out.
    ordered = sorted(enumerate(checks), key=lambda x: not x[1].timed)
    for index, check in ordered[shard::shards][first:]:
        torch.manual_seed(index)
        begin = time.monotonic()
        try:
            found = check.run(device)
        except Exception as error:  # of Triton, CUDA or the kernel's own checks
            traceback.print_exc()
            yield failure(check.name, check.operation, last_line(error)) | {"timed": check.timed}
            check_device(device)
            continue
        passed = found.error <= check.tolerance and found.lse_error <= check.tolerance
        yield {
            "name": check.name,
            "operation": check.operation,
            "timed": check.timed,
            "passed": passed,
            "error": found.error,
            "lse_error": found.lse_error,
            "tolerance": check.tolerance,
            "seconds": round(time.monotonic() - begin, 2),
        }


def failure(name: str, operation: str, message: str) -> dict[str, Any]:
    """The record of a check that has no result."""
    return {"name": name, "operation": operation, "passed": False, "message": message}
