# SPDX-License-Identifier: Apache-2.0
"""Hook: with our backend on a CPU, bf16 products of many tokens are computed in fp32.

On x86 CPUs without AMX oneDNN takes twice as long for bf16 products as for fp32 ones, with
AVX512-BF16, too, and it adds up in fp32 as well: results are the same to rounding. Weights are
converted a slice at a time, which many tokens pay for.
"""

from __future__ import annotations

import platform
from typing import Any

import torch
from sglang.srt.layers.quantization.unquant import UnquantizedLinearMethod
from sglang.srt.platforms import current_platform
from torch.nn.functional import linear

MANY_TOKENS = 128
SLICE = 2**20
"""Elements of a weight that are converted at a time."""


class WideLinearMethod(UnquantizedLinearMethod):
    """`UnquantizedLinearMethod`, but for many tokens in bf16."""

    def apply(
        self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        weight, dtype = layer.weight, torch.bfloat16
        if x.dtype != dtype or weight.dtype != dtype or x.dim() != 2 or len(x) < MANY_TOKENS:
            return super().apply(layer, x, bias)
        wide, out = x.float(), x.new_empty(len(x), len(weight))
        rows = max(1, SLICE // weight.shape[1])
        offset = None if bias is None else bias.float()
        for first in range(0, len(weight), rows):
            part = slice(first, first + rows)
            out[:, part] = linear(
                wide, weight[part].float(), None if offset is None else offset[part]
            )
        return out


def widen(model: torch.nn.Module) -> None:
    """Have the model's unquantized linear layers do so, where it is faster."""
    x86 = platform.machine() in ("x86_64", "AMD64")
    if not x86 or torch.cpu._is_amx_tile_supported() or not current_platform.is_out_of_tree():
        return
    for module in model.modules():
        method: Any = getattr(module, "quant_method", None)
        if type(method) is UnquantizedLinearMethod:
            module.quant_method = WideLinearMethod()
