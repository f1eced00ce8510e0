# SPDX-License-Identifier: Apache-2.0
"""Every kernel against float64, on the device, or in Triton's interpreter where there is none.

    python -m bench.gpu.verify [decode pack ...]    # exit status 1 if a check fails

Arenas are poisoned with 0xFF and raw pages with NaN wherever no token was written.
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from types import ModuleType
from typing import Any, NamedTuple

import torch

from bench.gpu.shapes import LLAMA_8B, TIERS
from sglang_diffxkv.kernels.gpu.launch import is_interpreted
from sglang_diffxkv.kernels.merge import AttentionState

TOLERANCE = 1e-3
"""Relative error of the output's norm, and error of a base-2 LSE."""


class Found(NamedTuple):
    """Errors of one result; NaN and inf in it show as NaN.

    Attributes:
        error: relative error of the norm; for operations on bytes, how many of them differ.
        lse_error: largest error of an LSE; 0 where there is none.
    """

    error: float
    lse_error: float = 0.0


class Check(NamedTuple):
    """One operation on one random input.

    Attributes:
        operation: what is not timed if it fails.
        tolerance: of both errors; 0 asks for equal bytes.
        run: on a device.
        timed: whether it is of the dimensions that are timed: others may fail without it.
    """

    name: str
    operation: str
    tolerance: float
    run: Callable[[torch.device], Found]
    timed: bool


GROUPS = ("decode", "extend", "score", "pack", "arena")
"""Each is the name of a module ``verify_<name>`` with ``checks(large)``."""


def kernels(operation: str) -> ModuleType:
    """The Triton launches of an operation: on a CPU its public functions would run C++ instead."""
    return importlib.import_module(f"sglang_diffxkv.kernels.{operation}.triton")


def to(device: torch.device, *values: Any) -> tuple[Any, ...]:
    """The same values with tensors on a device."""
    return tuple(x.to(device) if isinstance(x, torch.Tensor) else x for x in values)


def is_timed(dim: int, dtype: torch.dtype, tiers: tuple[str, str] = TIERS) -> bool:
    """Whether these are the dimensions that the timing sections use."""
    return dim == LLAMA_8B.dim and dtype == torch.bfloat16 and tiers == TIERS


def compare(part: AttentionState, expected: AttentionState) -> Found:
    """Errors of an attention part; one that is NaN, or -inf where it must not be, is NaN."""
    out, lse = part.out.double().cpu(), part.lse.double().cpu()
    true_out, true_lse = expected.out.double().cpu(), expected.lse.double().cpu()
    empty = torch.isneginf(true_lse)
    if not torch.equal(torch.isneginf(lse), empty) or out[empty].any():
        return Found(math.nan, math.nan)
    difference = (lse - true_lse)[~empty].abs()
    lse_error = float(difference.max()) if difference.numel() else 0.0
    return Found(relative_error(out, true_out), lse_error)


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative error of the norm, in float64."""
    expected = expected.double().cpu()
    difference = (actual.double().cpu() - expected).norm()
    return float(difference / expected.norm().clamp_min(1e-30))


def differing(actual: torch.Tensor, expected: torch.Tensor) -> Found:
    """How many elements differ in any bit."""
    if actual.shape != expected.shape or actual.dtype != expected.dtype:
        return Found(math.nan)
    a, b = (x.cpu().contiguous().view(torch.uint8) for x in (actual, expected))
    return Found(float((a != b).sum()))


def worst(found: Iterable[Found]) -> Found:
    """The largest of each error; NaN is larger than any number."""
    columns = zip(*found, strict=True)
    return Found(*(max(column, key=lambda x: (math.isnan(x), x)) for column in columns))


def group_checks(group: str, *, large: bool) -> list[Check]:
    """The checks of a group; ``large`` adds those that take Triton's interpreter too long."""
    module = importlib.import_module(f"bench.gpu.verify_{group}")
    return list(module.checks(large))


class DeviceLost(RuntimeError):
    """The device reported an error that this process cannot get rid of."""


def check_device(device: torch.device) -> None:
    """Raise DeviceLost where nothing works any more."""
    if device.type == "cuda":
        try:
            torch.cuda.synchronize(device)
        except RuntimeError as error:
            raise DeviceLost(_last_line(error)) from error


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
            yield failure(check.name, check.operation, _last_line(error)) | {"timed": check.timed}
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


def _last_line(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip(" ^")] or ["?"]
    return f"{type(error).__name__}: {lines[-1][:300]}"


def main() -> None:
    """Run groups of checks in this process, one line of JSON each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("groups", nargs="*", metavar="group", help=f"of {', '.join(GROUPS)}")
    parser.add_argument("--small", action="store_true", help="small inputs only")
    options = parser.parse_args()
    if unknown := set(options.groups) - set(GROUPS):
        parser.error(f"no group {', '.join(unknown)}")
    device = torch.device("cpu" if is_interpreted() else "cuda")
    red = False
    for group in options.groups or GROUPS:
        for record in run_group(group, device, large=not options.small):
            red |= not record["passed"]
            print(json.dumps(record), flush=True)
    sys.exit(red)


if __name__ == "__main__":
    main()
