# SPDX-License-Identifier: Apache-2.0
"""Seam: after every forward pass of the model the backend seals pages."""

from __future__ import annotations

from typing import Any

from sglang.srt.plugins.hook_registry import HookType

from sglang_diffxkv.backend import DiffXKVBackend
from sglang_diffxkv.patches.seam import hook


def _after_forward(result: Any, self: Any, *args: Any, **kwargs: Any) -> None:
    if isinstance(self.attn_backend, DiffXKVBackend):
        self.attn_backend.end_of_step()


def install() -> None:
    hook(
        "sglang.srt.model_executor.model_runner.ModelRunner.forward",
        _after_forward,
        HookType.AFTER,
        ("forward_batch",),
    )
