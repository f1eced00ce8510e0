# SPDX-License-Identifier: Apache-2.0
"""Soft caps of final logits on a CPU, by the functions of SGLang that models call."""

import pytest
import torch
from sglang.kernels.ops.activation import softcap
from sglang.srt.plugins import load_plugins


@pytest.fixture(autouse=True, scope="module")
def hooked() -> None:
    load_plugins()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_are_capped_in_place(dtype: torch.dtype) -> None:
    logits = (torch.randn(3, 301) * 40).to(dtype)
    expected = torch.tanh(logits.double() / 30) * 30
    softcap.softcap_inplace_logits(logits, 30.0)
    torch.testing.assert_close(logits.double(), expected, rtol=1e-2, atol=1e-5)


def test_capped_or_not_they_are_written_in_fp32() -> None:
    logits = (torch.randn(3, 301) * 40).bfloat16()
    before, output = logits.clone(), torch.empty(3, 301)
    softcap.softcap_to_float32_logits(logits, 30.0, output)
    torch.testing.assert_close(output, torch.tanh(before.float() / 30) * 30)
    softcap.cast_to_float32_logits(logits, output)
    assert torch.equal(output, before.float()) and torch.equal(logits, before)
