# SPDX-License-Identifier: Apache-2.0
"""Window layers of a decode step on a GPU; CUDA graphs can hold it, and no host waits for it."""

from __future__ import annotations

import torch

from sglang_diffxkv.attention.window_layers import WindowPages
from sglang_diffxkv.kernels.decode.triton import attend
from sglang_diffxkv.kernels.decode.work import SequencePages, WorkTiles, divide_open
from sglang_diffxkv.kernels.merge import AttentionState
from sglang_diffxkv.kernels.pages import LayerPages
from sglang_diffxkv.kernels.softmax import Softmax
from sglang_diffxkv.kernels.step import StepPages
from sglang_diffxkv.kernels.write import NewQKV, write_tokens


class DeviceWindowDecode:
    """`WindowDecode` on a GPU: the kernels of all pages, none of which is sealed."""

    def __init__(self, pages: WindowPages) -> None:
        self._layers = [LayerPages.of_open(*x) for x in zip(pages.keys, pages.values, strict=True)]
        keys = pages.keys[0]
        self._raw_slot = torch.arange(len(keys), dtype=torch.int32, device=keys.device)
        self._step: tuple[StepPages, WorkTiles] | None = None

    def begin(self, pages: StepPages) -> None:
        batch, width = pages.table.shape
        first = torch.arange(0, batch * width, width, dtype=torch.int32, device=pages.table.device)
        sequences = SequencePages(
            pages.table.flatten(), first, pages.count, self._raw_slot, pages.last_len
        )
        self._step = pages, divide_open(sequences, self._layers[0].tables.layout)

    def attend(
        self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, softmax: Softmax
    ) -> AttentionState:
        """Three launches; see `WindowDecode`."""
        assert self._step is not None
        (step, work), pages = self._step, self._layers[layer]
        write_tokens(NewQKV(q, k, v, step.rows), pages.keys, pages.values)
        return attend(q, q, pages, work, softmax, q.dtype)
