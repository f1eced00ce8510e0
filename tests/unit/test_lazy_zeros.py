# SPDX-License-Identifier: Apache-2.0
"""Large zeroed tensors that cost what is written to them."""

import sys
from pathlib import Path

import pytest
import torch

from sglang_diffxkv.pool.lazy_zeros import MIN_BYTES, lazy_zeros

GIB = 2**30


@pytest.mark.parametrize("shape", [(3, 5), (0, 7), (MIN_BYTES,), (3, MIN_BYTES // 2, 2)])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.bool, torch.int64, torch.bfloat16])
def test_zeros_that_can_be_written(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    tensor = lazy_zeros(*shape, dtype=dtype, device="cpu")
    assert tensor.shape == shape and tensor.dtype == dtype and tensor.is_contiguous()
    assert not tensor.any()
    tensor.fill_(1)
    assert tensor.all()


def test_other_devices_are_torchs_business() -> None:
    tensor = lazy_zeros(MIN_BYTES, 2, dtype=torch.int32, device="meta")
    assert tensor.device.type == "meta" and tensor.shape == (MIN_BYTES, 2)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_only_what_is_written_is_resident() -> None:
    """More than this machine has, probably."""
    before = resident()
    tensor = lazy_zeros(100, GIB // 4, dtype=torch.int32, device="cpu")
    tensor[::10, :1000] = 7
    assert tensor.nbytes == 100 * GIB and int(tensor[90, 999]) == 7 and int(tensor[91, 5]) == 0
    assert resident() - before < 50 << 20


def resident() -> int:
    """Bytes of this process's own memory."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("RssAnon:"))
