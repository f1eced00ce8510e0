# SPDX-License-Identifier: Apache-2.0
"""Without a GPU the Triton kernels run in Triton's interpreter, on tensors of the CPU.

Triton reads the variable when a kernel is defined, so it is set before anything imports one.
"""

from __future__ import annotations

import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
