# SPDX-License-Identifier: Apache-2.0
"""What the pool of layers with a sliding window needs, by SGLang's configuration of this rank."""

from __future__ import annotations

import logging
from typing import Any

from sglang_diffxkv.kernels.layout import PAGE_TOKENS
from sglang_diffxkv.pool.window_sizing import FEW_REQUESTS, WindowLayers

logger = logging.getLogger(__name__)


def window_layers(configurator: Any) -> WindowLayers | None:
    """Those of the model of SGLang's ``KVCacheConfigurator``; None: it has none."""
    layers = configurator.layer_info.swa_attention_layer_ids
    if not layers:
        return None
    from sglang.srt.model_executor.pool_configurator import compute_swa_request_cap
    from sglang.srt.runtime_context import get_parallel, get_schedule

    model, schedule = configurator.model_config, get_schedule()
    heads = model.get_swa_num_kv_heads(get_parallel().attn_tp_size)
    row = heads * (model.swa_head_dim + model.swa_v_head_dim)
    least = compute_swa_request_cap(
        page_size=PAGE_TOKENS,
        window=configurator.sliding_window_size,
        attn_dp_size=1,
        max_running_requests=FEW_REQUESTS,
    )
    given = schedule._swa_full_tokens_ratio_explicitly_set
    return WindowLayers(
        layers=len(layers),
        token_bytes=len(layers) * row * configurator.kv_cache_dtype.itemsize,
        window_left=configurator.sliding_window_size,
        least=least,
        ratio=schedule.swa_full_tokens_ratio if given else None,
    )


def log_division(windows: WindowLayers, tokens: int, nbytes: int, total: int) -> None:
    """Log what the window layers' pool gets of all memory."""
    logger.info(
        "diffxkv: of %.1f MiB, %d layers with a window of %d tokens get %.1f MiB in SGLang's own "
        "pool (%d tokens); --swa-full-tokens-ratio changes that",
        total / 2**20,
        windows.layers,
        windows.window_left + 1,
        nbytes / 2**20,
        tokens,
    )
