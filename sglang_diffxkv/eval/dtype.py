# SPDX-License-Identifier: Apache-2.0
"""Dtypes that a model can be asked in, and which of them the machine is fast at."""

import time

import torch

ITEMSIZES = {"bfloat16": 2, "float16": 2, "float32": 4}
ITEMSIZE = 2
"""Bytes of a raw element in all figures, whatever the dtype that a model is asked in."""
_TOKENS, _WIDTH, _ROUNDS = 128, 1024, 5


def fast_dtype(device: str) -> str:
    """bfloat16, unless the CPU takes longer for its products than for those of float32.

    Flags do not tell: with AVX512-BF16 they took 1.7 times as long (torch 2.14). On a GPU without
    bfloat16 float16.
    """
    if device != "cpu":
        return "bfloat16" if torch.cuda.is_bf16_supported() else "float16"
    bfloat16, float32 = (_product_seconds(dtype) for dtype in (torch.bfloat16, torch.float32))
    return "bfloat16" if bfloat16 <= float32 else "float32"


def _product_seconds(dtype: torch.dtype) -> float:
    """Of one product as in a prefill, with one thread: a busy machine delays several more."""
    x = torch.ones(_TOKENS, _WIDTH, dtype=dtype)
    weight = torch.ones(_WIDTH, _WIDTH, dtype=dtype)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return min(_seconds(x, weight) for _ in range(_ROUNDS))
    finally:
        torch.set_num_threads(threads)


def _seconds(x: torch.Tensor, weight: torch.Tensor) -> float:
    begin = time.perf_counter()
    torch.nn.functional.linear(x, weight)
    return time.perf_counter() - begin
