# SPDX-License-Identifier: Apache-2.0
"""Compiles the FlashInfer kernels that the bench and the servers run, where FlashInfer keeps them.

`FLASHINFER_CUDA_ARCH_LIST` says for which GPU, so none is needed here. What is there is left alone.
"""

from __future__ import annotations

import time
from typing import Any

import torch

BF16, FP8, HEAD_DIM = torch.bfloat16, torch.float8_e4m3fn, 128


def attention(backend: str, kv: torch.dtype) -> Any:
    """Of prefill, and of decode with tensor cores: no positions, windows nor caps of logits."""
    from flashinfer.jit.attention.modules import gen_batch_prefill_module

    dims = HEAD_DIM, HEAD_DIM, 0
    return gen_batch_prefill_module(
        backend, BF16, kv, BF16, torch.int32, *dims, False, False, False
    )


def main() -> None:
    from flashinfer.jit.cascade import gen_cascade_module
    from flashinfer.jit.page import gen_page_module

    for make in (
        lambda: attention("fa2", BF16),
        lambda: attention("fa2", FP8),
        gen_cascade_module,
        gen_page_module,
        lambda: attention("fa3", BF16),
    ):
        begin, spec = time.monotonic(), make()
        if not spec.jit_library_path.exists():
            spec.build()
        print(f"{spec.name[:60]}: {time.monotonic() - begin:.0f} s", flush=True)


if __name__ == "__main__":
    main()
