# SPDX-License-Identifier: Apache-2.0
"""Prefill over open pages with FlashInfer, which reads our raw pages as its own page table.

It compiles itself for what it is asked for, which takes minutes, or fails: so it is asked once,
before the server is ready, and serves only what it was made ready for. Layers with other softmaxes
have wrappers of their own: models that alternate between two plan twice a step.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable
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
"""What FlashInfer recommends; of all wrappers, as they run one after the other."""
PLAN_BYTES = (8 << 20) + (128 << 10)
"""Of a wrapper's own."""
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
    """What FlashInfer serves, and its wrapper for each softmax, which is planned for each step."""

    shape: Shape
    wrappers: dict[Softmax, BatchPrefillWithPagedKVCacheWrapper]


_ready: Ready | None = None
"""Of this process, which has one model on one device."""


def make_ready(
    shape: Shape,
    softmaxes: Iterable[Softmax],
    build: Callable[[torch.Tensor], BatchPrefillWithPagedKVCacheWrapper] | None = None,
) -> bool:
    """Build or load FlashInfer's kernels and allocate its workspace, or log why ours serve instead.

    Args:
        softmaxes: of the model's layers; their sinks are left out.
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
        workspace = torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device=shape.device)
        parts = dict.fromkeys(softmax.of_part for softmax in softmaxes)
        wrappers = {softmax: (build or _build)(workspace) for softmax in parts}
        for softmax, wrapper in wrappers.items():
            check(wrapper, shape, softmax)
        _ready = Ready(shape, wrappers)
    except Exception as error:  # of imports, nvcc, ninja, the driver: a server starts without it
        logger.warning(
            "diffxkv: prefill runs on our Triton kernels, as FlashInfer failed (%s); to have it, "
            "install flashinfer-python with its flashinfer-cubin, or ninja and CUDA's nvcc",
            _last_line(error),
        )
        return False
    logger.info("diffxkv: FlashInfer is ready for prefill, after %.1f s", time.monotonic() - begin)
    return True


def workspace_bytes() -> int:
    """What FlashInfer takes on the device."""
    return WORKSPACE_BYTES + len(_ready.wrappers) * PLAN_BYTES if _ready is not None else 0


def supports(q: torch.Tensor, softmax: Softmax) -> bool:
    """Whether FlashInfer was made ready for these queries [T, Hq, D] and the `Softmax.of_part`."""
    if _ready is None or len(q) == 0 or softmax not in _ready.wrappers:
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
    must end with the page of its last new token. A window is counted back from there: with one,
    there may be no gaps between the pages, but those before it may be left out. What is listed and
    seen by nobody gets a weight of 0, and must be finite.

    Args:
        queries, opened: as in `extend_open`. softmax: that `supports` says yes to.
        last_len: int32 [B], tokens in each sequence's last listed page, 1 to 64.
    """
    assert _ready is not None
    wrapper = _ready.wrappers[softmax]
    _plan(wrapper, queries, opened, last_len, softmax)
    return wrapper


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
        window_left=softmax.window_left,
        logits_soft_cap=softmax.cap,
        sm_scale=softmax.scale,
        q_data_type=queries.q.dtype,
        kv_data_type=opened.keys.dtype,
    )


def _build(workspace: torch.Tensor) -> BatchPrefillWithPagedKVCacheWrapper:
    from flashinfer import BatchPrefillWithPagedKVCacheWrapper  # takes seconds

    return BatchPrefillWithPagedKVCacheWrapper(workspace, "NHD")


def check(wrapper: BatchPrefillWithPagedKVCacheWrapper, shape: Shape, softmax: Softmax) -> None:
    """Plan and run three new tokens after 69 others.

    What a window and a cap do shows: FlashInfer is compiled for whether there are any, not for
    which.

    Args:
        softmax: of which that is known.

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
    cap, window_left = min(softmax.cap, 1.0), min(softmax.window_left, 20)
    softmax = Softmax(shape.head_dim**-0.5, cap, window_left)
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
