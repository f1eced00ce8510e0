# SPDX-License-Identifier: Apache-2.0
"""Window layers of a decode step on a CPU: one call of C++ for each."""

from __future__ import annotations

import torch

from sglang_diffxkv.attention.host_decode import fitting
from sglang_diffxkv.attention.window_layers import WindowPages
from sglang_diffxkv.kernels.decode.layer import DecodeLayers, LayerTables
from sglang_diffxkv.kernels.merge import AttentionState
from sglang_diffxkv.kernels.softmax import Softmax
from sglang_diffxkv.kernels.step import StepPages


class HostWindowDecode:
    """`WindowDecode` on a CPU."""

    def __init__(self, pages: WindowPages) -> None:
        raw_slot = torch.arange(len(pages.keys[0]), dtype=torch.int32)  # they name raw pages
        self._layers = DecodeLayers(LayerTables(raw_slot, pages.keys, pages.values, None, None))

    def begin(self, pages: StepPages) -> None:
        self._layers.begin(pages)

    def attend(
        self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, softmax: Softmax
    ) -> AttentionState:
        """`DecodeLayers.attend` of this step, of whatever dtype and strides the model has."""
        q, k, v = (fitting(x, self._layers.dtype) for x in (q, k, v))
        return self._layers.attend(layer, q, k, v, softmax)
