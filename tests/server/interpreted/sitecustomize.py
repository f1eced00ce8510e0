# SPDX-License-Identifier: Apache-2.0
"""Lets SGLang run models with linear layers on a CPU, by its own Triton kernels, interpreted.

With TRITON_INTERPRET=1. What else they rely on a GPU for is here: the current device, and names
that a module of SGLang imports on GPUs only.
"""

import builtins
from typing import Any

import torch

_device_module = torch.get_device_module


def _cpu_module(device: Any = None) -> Any:
    return torch.cpu if device is None else _device_module(device)


def _conv1d(name: str) -> Any:
    def run(*args: Any, **kwargs: Any) -> Any:
        from sglang.srt.layers.attention.mamba import causal_conv1d

        return getattr(causal_conv1d, name)(*args, **kwargs)

    return run


torch.get_device_module = _cpu_module
for _name in ("causal_conv1d_fn", "causal_conv1d_update"):
    # `sglang.srt.layers.attention.mamba.mamba` looks for them under both names.
    setattr(builtins, _name, _conv1d(_name))
    setattr(builtins, f"{_name}_triton", _conv1d(_name))
