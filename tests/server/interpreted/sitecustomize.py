# SPDX-License-Identifier: Apache-2.0
"""Lets SGLang run models with linear layers on a CPU, by its own Triton kernels, interpreted.

With TRITON_INTERPRET=1. What else they rely on a GPU for is here: the current device, names that a
module of SGLang imports on GPUs only, timing, and two kernels that the interpreter cannot run.
"""

import builtins
import contextlib
import sys
from pathlib import Path
from typing import Any

import torch
from triton.runtime.autotuner import Autotuner

sys.path.append(str(Path(__file__).parent))
import gated_delta
import sglang.kernels.ops.attention.fla.chunk as chunk
import sglang.kernels.ops.attention.fla.fused_recurrent as recurrent
import sglang.kernels.ops.attention.fla.layernorm_gated as norm

_device_module = torch.get_device_module


def _cpu_module(device: Any = None) -> Any:
    return torch.cpu if device is None else _device_module(device)


def _conv1d(name: str) -> Any:
    def run(*args: Any, **kwargs: Any) -> Any:
        from sglang.srt.layers.attention.mamba import causal_conv1d

        return getattr(causal_conv1d, name)(*args, **kwargs)

    return run


torch.get_device_module = _cpu_module
torch.Tensor.pin_memory = lambda tensor, *args: tensor  # no driver, nothing to pin for
torch.cpu.device = contextlib.nullcontext
Autotuner._bench = lambda *args, **kwargs: (1.0, 1.0, 1.0)  # which times on a GPU
norm._get_sm_count = lambda device: 1
chunk.chunk_gated_delta_rule = gated_delta.chunk_gated_delta_rule
recurrent.fused_recurrent_gated_delta_rule_packed_decode = (
    gated_delta.fused_recurrent_gated_delta_rule_packed_decode
)
for _name in ("causal_conv1d_fn", "causal_conv1d_update"):
    # `sglang.srt.layers.attention.mamba.mamba` looks for them under both names.
    setattr(builtins, _name, _conv1d(_name))
    setattr(builtins, f"{_name}_triton", _conv1d(_name))
