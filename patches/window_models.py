# SPDX-License-Identifier: Apache-2.0
"""Hook: with our backend, window layers have a pool of their own in every model that has some.

SGLang has such pools for some architectures. In others (Gemma 2 and 3, for example) it keeps the
K/V of window layers as long as that of all others, which is most of the memory.
"""

from __future__ import annotations

from typing import Any

from sglang.srt.plugins.hook_registry import HookType

from sglang_diffxkv.patches.hook import hook
from sglang_diffxkv.patches.validation import is_requested

WINDOW, FULL = "sliding_attention", "full_attention"


def layer_types(model: Any) -> list[str]:
    """By layer, as far as the model's configuration says."""
    return list(getattr(model.hf_text_config, "layer_types", None) or ())


def divide_layers(model: Any) -> None:
    """Have SGLang's ``ModelConfig`` tell window layers from the others."""
    types = layer_types(model)
    if model.is_hybrid_swa or WINDOW not in types:
        return
    model.is_hybrid_swa, model.is_deepseek_v4_arch = True, False
    model.swa_attention_layer_ids = [i for i, kind in enumerate(types) if kind == WINDOW]
    model.full_attention_layer_ids = [i for i, kind in enumerate(types) if kind == FULL]


def _divide(model: Any, server_args: Any, *args: Any, **kwargs: Any) -> None:
    if is_requested(server_args) and not model.is_draft_model:
        divide_layers(model)


def install() -> None:
    config = "sglang.srt.configs.model_config.ModelConfig.from_server_args"
    hook(config, _divide, HookType.AFTER, ("server_args",))
