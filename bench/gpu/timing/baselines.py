# SPDX-License-Identifier: Apache-2.0
"""What stock SGLang would run: FlashInfer over an uncompressed cache. Without it, torch's SDPA."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import util
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from bench.gpu.timing.timer import Candidate
from sglang_diffxkv.kernels.layout import PAGE_TOKENS

WORKSPACE = 384 << 20
FP8 = torch.float8_e4m3fn
DTYPES = {"bf16": torch.bfloat16, "fp8": FP8}
"""Of the cache; queries are bf16."""


def has_flashinfer() -> bool:
    return util.find_spec("flashinfer") is not None


def random_cache(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Keys and values for timing: a few random numbers, many times over."""
    seed = torch.randn(1 << 20, device=device).to(torch.bfloat16)
    count = torch.Size(shape).numel()
    flat = torch.empty(count, dtype=dtype, device=device)
    for at in range(0, count, len(seed)):
        flat[at : at + len(seed)] = seed[: count - at].to(dtype)
    return flat.view(shape)


def flashinfer_decode(
    cache: str, batch: int, tokens: int, heads: int, kv_heads: int, dim: int, copies: int,
    device: torch.device,
) -> Candidate:  # fmt: skip
    """Decode over pages of 64 tokens as the CUDA graphs of SGLang run it, planned once.

    Args:
        cache: a key of DTYPES. copies: independent caches, which share the page table.
    """
    import flashinfer

    dtype = DTYPES[cache]
    pages = -(-tokens // PAGE_TOKENS)
    indptr = torch.arange(batch + 1, dtype=torch.int32, device=device) * pages
    indices = torch.randperm(batch * pages, device=device).int()
    last = (tokens - 1) % PAGE_TOKENS + 1
    last_len = torch.full((batch,), last, dtype=torch.int32, device=device)
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
        torch.empty(WORKSPACE, dtype=torch.uint8, device=device),
        "NHD",
        use_cuda_graph=True,
        # As SGLang chooses.
        use_tensor_cores=cache == "fp8" or heads // kv_heads >= 4,
        paged_kv_indptr_buffer=indptr.clone(),
        paged_kv_indices_buffer=indices.clone(),
        paged_kv_last_page_len_buffer=last_len.clone(),
    )
    wrapper.plan(
        indptr, indices, last_len, heads, kv_heads, dim, PAGE_TOKENS,
        q_data_type=torch.bfloat16, kv_data_type=dtype,
    )  # fmt: skip
    shape = (copies, 2, batch * pages, PAGE_TOKENS, kv_heads, dim)
    pool = random_cache(shape, dtype, device)
    q = torch.randn(copies, batch, heads, dim, device=device).to(torch.bfloat16)
    return lambda i: wrapper.run(q[i], (pool[i, 0], pool[i, 1]))


def sdpa_decode(
    batch: int, tokens: int, heads: int, kv_heads: int, dim: int, copies: int, device: torch.device
) -> Candidate:
    """torch's attention over a dense bf16 cache, the query group folded into the queries."""
    shape = (copies, 2, batch, kv_heads, tokens, dim)
    pool = random_cache(shape, torch.bfloat16, device)
    q = torch.randn(copies, batch, kv_heads, heads // kv_heads, dim, device=device)
    q = q.to(torch.bfloat16)
    return lambda i: scaled_dot_product_attention(q[i], pool[i, 0], pool[i, 1])


def flashinfer_prefill(
    chunk: int, tokens: int, heads: int, kv_heads: int, dim: int, device: torch.device
) -> Candidate:
    """Causal prefill of the last ``chunk`` of ``tokens`` tokens of one sequence."""
    import flashinfer

    wrapper = flashinfer.BatchPrefillWithRaggedKVCacheWrapper(
        torch.empty(WORKSPACE, dtype=torch.uint8, device=device), "NHD"
    )
    bounds = [torch.tensor([0, n], dtype=torch.int32, device=device) for n in (chunk, tokens)]
    wrapper.plan(
        *bounds, heads, kv_heads, dim, causal=True, q_data_type=torch.bfloat16,
        kv_data_type=torch.bfloat16,
    )  # fmt: skip
    k, v = random_cache((2, tokens, kv_heads, dim), torch.bfloat16, device)
    q = torch.randn(chunk, heads, dim, device=device).to(torch.bfloat16)
    return lambda _: wrapper.run(q, k, v, return_lse=True)


def sdpa_prefill(
    chunk: int, tokens: int, heads: int, kv_heads: int, dim: int, device: torch.device
) -> Candidate:
    """The same in torch, whose mask is aligned to the last query."""
    from torch.nn.attention.bias import causal_lower_right

    k, v = random_cache((2, 1, heads, tokens, dim), torch.bfloat16, device)
    q = torch.randn(1, heads, chunk, dim, device=device).to(torch.bfloat16)
    if chunk == tokens:
        return lambda _: scaled_dot_product_attention(q, k, v, is_causal=True)
    mask = causal_lower_right(chunk, tokens)
    return lambda _: scaled_dot_product_attention(q, k, v, attn_mask=mask)


def warm_up(device: torch.device) -> Iterator[dict[str, Any]]:
    """Have FlashInfer build what will be timed (its compiler takes minutes): one record each."""
    if device.type != "cuda" or not has_flashinfer():
        return
    makers = {
        "decode bf16": lambda: flashinfer_decode("bf16", 2, 200, 32, 8, 128, 1, device),
        "decode fp8": lambda: flashinfer_decode("fp8", 2, 200, 32, 8, 128, 1, device),
        "prefill": lambda: flashinfer_prefill(64, 128, 32, 8, 128, device),
    }
    for name, make in makers.items():
        try:
            make()(0)
            torch.cuda.synchronize()
            yield {"ready": name}
        except Exception as error:  # of nvcc, ninja or the driver
            yield {"failed": name, "message": f"{type(error).__name__}: {error}"[-500:]}
