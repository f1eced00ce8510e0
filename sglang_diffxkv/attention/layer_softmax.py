# SPDX-License-Identifier: Apache-2.0
"""A `Softmax` from what SGLang's attention layers say."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sglang.srt.layers.radix_attention import RadixAttention

from sglang_diffxkv.kernels.softmax import Softmax

if TYPE_CHECKING:
    import torch
    from torch import nn


def softmax_of(layer: RadixAttention, sinks: torch.Tensor | None = None) -> Softmax:
    """Of one layer.

    Args:
        sinks: [Hq], contiguous; SGLang's models hand them over with each call.
    """
    window_left = layer.sliding_window_size  # tokens before a query, as FlashInfer counts
    if window_left is None or window_left <= 0:
        window_left = -1
    sinks = None if sinks is None else sinks.float()
    return Softmax(layer.scaling, layer.logit_cap, window_left, sinks)


def softmaxes_of(model: nn.Module) -> set[Softmax]:
    """Of all layers, without sinks."""
    layers = (layer for layer in model.modules() if isinstance(layer, RadixAttention))
    return {softmax_of(layer) for layer in layers}
