# SPDX-License-Identifier: Apache-2.0
"""What a check is, and how its result is compared with the true one."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch

from bench.gpu.shapes import LLAMA_8B, TIERS
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
