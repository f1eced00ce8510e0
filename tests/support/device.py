# SPDX-License-Identifier: Apache-2.0
"""Where the tests run Triton kernels: on the GPU, or interpreted on the CPU (`conftest`)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import torch

from sglang_diffxkv.kernels import dispatch

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@contextmanager
def as_on_gpu() -> Iterator[None]:
    """Within this context operations run Triton kernels, wherever their tensors are."""
    with mock.patch.object(dispatch, "on_gpu", lambda x: True):
        yield
