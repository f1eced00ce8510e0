# SPDX-License-Identifier: Apache-2.0
"""What one budget gives window layers and ours, and what is refused where it is too small."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sglang_diffxkv.config import DiffXKVConfig
from sglang_diffxkv.kernels.layout import PAGE_TOKENS
from sglang_diffxkv.patches import pool_setup
from sglang_diffxkv.pool.kv_pool import PoolSetup
from sglang_diffxkv.pool.ranks import alone
from sglang_diffxkv.pool.window_sizing import WindowLayers

TOKEN_BYTES = 5 * 2 * 2 * 64 * 2


@pytest.fixture
def divide(monkeypatch: pytest.MonkeyPatch) -> Any:
    """``divide(bytes, chunk, cached, raw_share)`` for five window layers and one without."""

    def setup_of(
        nbytes: int, chunk: int = 128, cached: bool = True, raw_share: float = 0.2
    ) -> PoolSetup:
        least = 2 * (100 + 2 * PAGE_TOKENS) + 2 * chunk + PAGE_TOKENS
        windows = WindowLayers(5, TOKEN_BYTES, window_left=99, least=least)
        context = "sglang.srt.runtime_context"
        parallel = SimpleNamespace(attn_tp_rank=0, attn_tp_size=1, attn_tp_group=None)
        monkeypatch.setattr(f"{context}.get_parallel", lambda: parallel)
        memory = SimpleNamespace(disable_radix_cache=not cached)
        monkeypatch.setattr(f"{context}.get_memory", lambda: memory)
        schedule = SimpleNamespace(chunked_prefill_size=chunk)
        monkeypatch.setattr(f"{context}.get_schedule", lambda: schedule)
        monkeypatch.setattr(pool_setup, "make_agreement", lambda group: alone)
        monkeypatch.setattr(pool_setup, "window_layers", lambda configurator: windows)
        configurator = SimpleNamespace(
            model_config=SimpleNamespace(
                head_dim=64, dtype=torch.bfloat16, get_num_kv_heads=lambda ranks: 2
            ),
            layer_info=SimpleNamespace(full_attention_layer_ids=[5]),
            mambaish_config=None,
            spec_aux_config=SimpleNamespace(draft_kv_num_layers=None),
            kv_cache_dtype=torch.bfloat16,
            device="cpu",
        )
        return pool_setup.make_setup(DiffXKVConfig(raw_share=raw_share), configurator, nbytes, None)

    return setup_of


@pytest.mark.parametrize("nbytes", [1_400_000, 1_800_000, 2_100_000, 2_500_000])
def test_too_little_memory_is_refused_with_what_both_need(divide: Any, nbytes: int) -> None:
    with pytest.raises(ValueError, match="raise memory_bytes") as refusal:
        divide(nbytes)
    said = str(refusal.value)
    assert float(said.split()[1]) == pytest.approx(nbytes / 2**20, abs=0.06)
    needed = float(said.rsplit("at least ", 1)[1].split()[0])
    rounding = 2 * PAGE_TOKENS * TOKEN_BYTES  # both get whole pages
    divide(int((needed + 0.05) * 2**20) + rounding)


def test_chunks_that_window_layers_cannot_hold_are_refused(divide: Any) -> None:
    """Without the radix cache, where SGLang would wait forever for a chunk's room."""
    divide(20 << 20, chunk=4096, raw_share=0.7)
    with pytest.raises(ValueError, match="tokens of window layers") as refusal:
        divide(20 << 20, chunk=4096, cached=False, raw_share=0.7)
    largest = int(str(refusal.value).split("at most ")[1].split()[0])
    assert largest % PAGE_TOKENS == 0
    setup = divide(20 << 20, chunk=largest, cached=False, raw_share=0.7)
    assert setup.window_tokens >= largest + 100 + 4 * PAGE_TOKENS
