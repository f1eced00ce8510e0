# SPDX-License-Identifier: Apache-2.0
"""A draft model's decode steps with SGLang's ``torch_native`` attention, which knows one step."""

from __future__ import annotations

from typing import Any

import torch
from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend


class _DraftStep(TorchNativeAttnBackend):
    """Step ``number`` from 0 on: a sequence is longer by what this and earlier ones wrote."""

    def __init__(self, model_runner: Any, number: int) -> None:
        super().__init__(model_runner)
        self._number = number

    def _run_sdpa_forward_decode(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        query, output, keys, values, table, rows, seq_lens, *others = args
        longer = seq_lens + self._number + 1
        return super()._run_sdpa_forward_decode(
            query, output, keys, values, table, rows, longer, *others, **kwargs
        )


class DraftSteps:
    """The attention backends of the steps but the last, which only samples.

    SGLang's multi-step draft backends have these attributes and this method.
    """

    def __init__(self, model_runner: Any, num_steps: int) -> None:
        self.attn_backends = [_DraftStep(model_runner, step) for step in range(num_steps - 1)]

    def init_forward_metadata(self, forward_batch: Any) -> None:
        for backend in self.attn_backends:
            backend.init_forward_metadata(forward_batch)
