# SPDX-License-Identifier: Apache-2.0
"""Hook: ``/start_profile`` of a CPU server refuses what would end its scheduler there."""

from __future__ import annotations

from typing import Any

from fastapi import HTTPException
from sglang.srt.plugins.hook_registry import HookType
from sglang.srt.runtime_context import get_device

from sglang_diffxkv.patches.hook import hook
from sglang_diffxkv.patches.server_args import is_active

ON_CPU = ("CPU", "GPU")
"""Activities that torch records without a GPU; it warns of the second, which SGLang asks for."""


def _check_activities(self: Any, req: Any = None) -> None:
    if not is_active() or get_device().device != "cpu" or req is None:
        return
    refused = sorted(set(req.activities or ()) - set(ON_CPU))
    if refused:
        raise HTTPException(
            400, f"activities {refused} need a GPU: on a CPU server use {list(ON_CPU)}"
        )


def install() -> None:
    control = "sglang.srt.managers.tokenizer_control_mixin.TokenizerControlMixin"
    hook(f"{control}.start_profile", _check_activities, HookType.BEFORE, ("req",))
