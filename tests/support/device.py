# SPDX-License-Identifier: Apache-2.0
"""Where the tests run Triton kernels: on the GPU, or interpreted on the CPU (`conftest`)."""

from __future__ import annotations

import torch

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
