# SPDX-License-Identifier: Apache-2.0
"""Hook: soft caps of the final logits (Gemma 2) on a CPU, for which SGLang has a Triton kernel."""

from __future__ import annotations

from collections.abc import Callable

import torch
from sglang.srt.plugins.hook_registry import HookType

from sglang_diffxkv.patches.hook import hook


def _softcap(
    original: Callable[..., torch.Tensor],
    full_logits: torch.Tensor,
    final_logit_softcapping: float | None,
    output: torch.Tensor | None = None,
) -> torch.Tensor:
    """In place, or into ``output``; without a cap only the dtype changes."""
    if not full_logits.is_cpu:
        return original(full_logits, final_logit_softcapping, output)
    cap, into = final_logit_softcapping, full_logits if output is None else output
    into.copy_(full_logits)
    return into if cap is None else into.div_(cap).tanh_().mul_(cap)


def install() -> None:
    kernel = "sglang.kernels.ops.activation.softcap._softcap_logits"
    hook(kernel, _softcap, HookType.AROUND, ("full_logits", "final_logit_softcapping", "output"))
