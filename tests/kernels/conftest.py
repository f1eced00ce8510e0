# SPDX-License-Identifier: Apache-2.0
"""Without a GPU the Triton kernels run in Triton's interpreter, on tensors of the CPU.

Triton reads the variable when a kernel is defined, so it is set before anything imports one.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

from sglang_diffxkv.kernels.cpu.function import unbind_all

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

    from tests.support.interpreter import speed_up

    speed_up()


@pytest.fixture(autouse=True)
def asked_instruction_set() -> Iterator[None]:
    """C++ functions ask for it when they are first called: in each test anew."""
    unbind_all()
    yield
    unbind_all()


@pytest.fixture
def one_thread() -> Iterator[None]:
    """The reference is thousands of tiny operations, which threads only slow down."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def noticing_device() -> Iterator[None]:
    """A device that notices what mixes it with the host, or waits for it."""
    from tests.support.fake_device import fake_device

    with fake_device():
        yield
