# SPDX-License-Identifier: Apache-2.0
"""Prefill over open pages with FlashInfer, which reads our raw pages as its own page table.

It compiles itself for what it is asked for, which takes minutes, or fails: so it is asked once,
before the server is ready, and serves only what it was made ready for.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import torch

from sglang_diffxkv.kernels.layout import PAGE_TOKENS
from sglang_diffxkv.kernels.merge import AttentionState
from sglang_diffxkv.kernels.pages import OpenPages, Queries
from sglang_diffxkv.kernels.softmax import Softmax

if TYPE_CHECKING:
    from flashinfer import BatchPrefillWithPagedKVCacheWrapper

logger = logging.getLogger(__name__)

HEAD_DIMS = (64, 128, 256)
DTYPES = (torch.float16, torch.bfloat16)
WORKSPACE_BYTES = 128 << 20
"""What FlashInfer recommends."""
TOLERANCE = 0.02
"""Relative error of the norm, and error of the LSE, of FlashInfer's first result."""


class Shape(NamedTuple):
    """What FlashInfer is compiled and checked for."""

    device: torch.device
    dtype: torch.dtype
    heads: int
    kv_heads: int
    head_dim: int


class Ready(NamedTuple):
    """FlashInfer's wrapper, which is planned anew for each step, and what it serves."""

    wrapper: BatchPrefillWithPagedKVCacheWrapper
    shape: Shape


_ready: Ready | None = None
"""Of this process, which has one model on one device."""


def make_ready(
    shape: Shape, build: Callable[[Shape], BatchPrefillWithPagedKVCacheWrapper] | None = None
) -> bool:
    """Build or load FlashInfer's kernels and allocate its workspace, or log why ours serve instead.

    Args:
        build: `_build`, or what stands for it.

    Returns:
        Whether `supports` says yes from now on.
    """
    global _ready
    _ready, begin = None, time.monotonic()
    if shape.head_dim not in HEAD_DIMS or shape.dtype not in DTYPES:
        logger.info(
            "diffxkv: prefill runs on our Triton kernels: FlashInfer has none for head_dim %d in "
            "%s", shape.head_dim, shape.dtype,
        )  # fmt: skip
        return False
    try:
        _ready = Ready((build or _build)(shape), shape)
    except Exception as error:  # of imports, nvcc, ninja, the driver: a server starts without it
        logger.warning(
            "diffxkv: prefill runs on our Triton kernels, as FlashInfer failed (%s); to have it, "
            "install flashinfer-python with its flashinfer-cubin, or ninja and CUDA's nvcc",
            _last_line(error),
        )
        return False
    logger.info("diffxkv: FlashInfer is ready for prefill, after %.1f s", time.monotonic() - begin)
    return True


def supports(q: torch.Tensor) -> bool:
    """Whether FlashInfer was made ready for these queries [T, Hq, D]."""
    if _ready is None or len(q) == 0:
        return False
    shape = _ready.shape
    if q.device.type != shape.device.type:
        return False
    return (q.dtype, *q.shape[1:]) == (shape.dtype, shape.heads, shape.head_dim)


def plan(
    queries: Queries, opened: OpenPages, last_len: torch.Tensor, softmax: Softmax
) -> BatchPrefillWithPagedKVCacheWrapper:
    """Make ready for layers with queries and raw pages like these. Waits for the device.

    Causal attention lets the last query see the last listed token: so a sequence's listed pages
    must end with the page of its last new token. Gaps between earlier pages do not matter.

    Args:
        queries, opened, softmax: as in `extend_open`.
        last_len: int32 [B], tokens in each sequence's last listed page, 1 to 64.
    """
    assert _ready is not None
    _plan(_ready.wrapper, queries, opened, last_len, softmax)
    return _ready.wrapper


def run(
    wrapper: BatchPrefillWithPagedKVCacheWrapper,
    q: torch.Tensor,
    k_raw: torch.Tensor,
    v_raw: torch.Tensor,
) -> AttentionState:
    """Attention of one layer, as planned; the output is rounded to q's dtype in between."""
    out, lse = wrapper.run(q, (k_raw, v_raw), return_lse=True)
    return AttentionState(out.float(), lse)


def _plan(
    wrapper: BatchPrefillWithPagedKVCacheWrapper,
    queries: Queries,
    opened: OpenPages,
    last_len: torch.Tensor,
    softmax: Softmax,
) -> None:
    wrapper.plan(
        queries.indptr,
        opened.indptr,
        opened.slots,
        last_len,
        queries.q.shape[1],
        opened.keys.shape[2],
        queries.q.shape[2],
        PAGE_TOKENS,
        causal=True,
        sm_scale=softmax.scale,
        q_data_type=queries.q.dtype,
        kv_data_type=opened.keys.dtype,
    )


def _build(shape: Shape) -> BatchPrefillWithPagedKVCacheWrapper:
    """A wrapper that has planned, run, and computed what our reference does.

    Raises:
        Exception: whatever keeps FlashInfer from it.
    """
    from flashinfer import BatchPrefillWithPagedKVCacheWrapper  # takes seconds

    workspace = torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device=shape.device)
    wrapper = BatchPrefillWithPagedKVCacheWrapper(workspace, "NHD")
    check(wrapper, shape)
    return wrapper


def check(wrapper: BatchPrefillWithPagedKVCacheWrapper, shape: Shape) -> None:
    """Plan and run three new tokens after 69 others.

    Raises:
        RuntimeError: the result is not that of `naive.extend_open`.
    """
    from sglang_diffxkv.kernels.extend import naive

    gen = torch.Generator().manual_seed(0)
    q = torch.randn(3, shape.heads, shape.head_dim, generator=gen).to(shape.dtype)
    raw_shape = 2, 3, PAGE_TOKENS, shape.kv_heads, shape.head_dim
    k, v = torch.randn(raw_shape, generator=gen).to(shape.dtype)
    indptr, start, listed, slots, position, last_len = (
        torch.tensor(x, dtype=torch.int32) for x in ([0, 3], [69], [0, 2], [2, 0], [0, 1], [8])
    )
    softmax = Softmax(shape.head_dim**-0.5)
    queries, opened = Queries(q, indptr, start), OpenPages(k, v, listed, slots, position)
    on_device = Queries(*(x.to(shape.device) for x in queries))
    pages = OpenPages(*(x.to(shape.device) for x in opened))
    _plan(wrapper, on_device, pages, last_len.to(shape.device), softmax)
    found = run(wrapper, on_device.q, pages.keys, pages.values)
    part = AttentionState(*(x.double().cpu() for x in found))
    true = naive.extend_open(queries, opened, softmax)
    error = float((part.out - true.out).norm() / true.out.norm())
    lse_error = float((part.lse - true.lse).abs().max())
    if not (error <= TOLERANCE and lse_error <= TOLERANCE):
        raise RuntimeError(f"its result is off by {error:.1%}, its LSE by {lse_error:.3f}")


def _last_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[-1][:300] if lines else ''}"
