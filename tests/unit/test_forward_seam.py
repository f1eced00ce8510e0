# SPDX-License-Identifier: Apache-2.0
"""What the hook before a forward pass tells the backend."""

from __future__ import annotations

from types import SimpleNamespace

from sglang.srt.model_executor.forward_batch_info import ForwardMode

from sglang_diffxkv.backend import DiffXKVBackend
from sglang_diffxkv.patches.forward import _before_forward


def test_mixed_batches_are_told_apart() -> None:
    """SGLang turns them into prefills before the backend sees them."""
    backend = object.__new__(DiffXKVBackend)
    runner = SimpleNamespace(attn_backend=backend)
    for mode in (ForwardMode.MIXED, ForwardMode.EXTEND, ForwardMode.MIXED, ForwardMode.DECODE):
        _before_forward(runner, SimpleNamespace(forward_mode=mode))
        assert backend.is_mixed == (mode == ForwardMode.MIXED)
