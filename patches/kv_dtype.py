# SPDX-License-Identifier: Apache-2.0
"""Hook: raw pages are in the model's dtype, whatever a checkpoint says of its KV cache."""

from __future__ import annotations

import logging
from typing import Any

import torch
from sglang.srt.plugins.hook_registry import HookType

from sglang_diffxkv.patches.hook import hook
from sglang_diffxkv.patches.server_args import is_active

logger = logging.getLogger(__name__)

RAW_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
"""Of raw pages: what the kernels read and write."""


def check_dtype(dtype: torch.dtype, model: torch.dtype) -> None:
    """
    Raises:
        ValueError: no kernel reads or writes raw pages in it, or it is not the model's.
    """
    if dtype not in RAW_DTYPES or dtype != model:
        known = ", ".join(str(x).removeprefix("torch.") for x in RAW_DTYPES)
        raise ValueError(
            f"diffxkv: KV in {dtype} of a model in {model} is not supported, only in the model's "
            f"dtype, and in {known}: leave out --kv-cache-dtype, or choose another --dtype"
        )


def _keep_model_dtype(result: None, self: Any) -> None:
    """Raw pages stay in the model's dtype where a checkpoint asks for fp8 KV.

    Its scales are for storing fp8, and nobody reads them here: to keep more is to lose less.
    """
    if not is_active() or self.kv_cache_dtype in RAW_DTYPES:
        return
    logger.info(
        "diffxkv: the checkpoint asks for KV in %s; raw pages stay in the model's %s, and its KV "
        "scales are not used",
        self.kv_cache_dtype,
        self.dtype,
    )
    self.kv_cache_dtype, self.kv_cache_dtype_str = self.dtype, "auto"


def install() -> None:
    runner = "sglang.srt.model_executor.model_runner.ModelRunner.configure_kv_cache_dtype"
    hook(runner, _keep_model_dtype, HookType.AFTER, ())
