# SPDX-License-Identifier: Apache-2.0
"""What we rely on of FlashInfer, as far as it can be checked without a GPU."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import flashinfer as installed
import pytest
import torch

from sglang_diffxkv.kernels.extend import extend_open, flashinfer, naive
from sglang_diffxkv.kernels.extend.prefill import OpenPrefill
from sglang_diffxkv.kernels.layout import PAGE_TOKENS
from sglang_diffxkv.kernels.pages import OpenPages, Queries
from sglang_diffxkv.kernels.softmax import Softmax

SOFTMAXES = Softmax(0.1), Softmax(0.2, cap=30.0, window_left=100)


def step(dtype: torch.dtype = torch.float32) -> tuple[Queries, OpenPages]:
    """Arguments of extend_open before the scale; every last page is full."""
    gen = torch.Generator().manual_seed(1)
    q = torch.randn(75, 4, 64, generator=gen).to(dtype)
    k, v = torch.randn(2, 9, PAGE_TOKENS, 2, 64, generator=gen).to(dtype)
    lists = ([0, 70, 75], [186, 251], [0, 3, 5], [7, 2, 0, 4, 8], [0, 2, 3, 1, 3])
    q_indptr, q_position, indptr, slots, position = (
        torch.tensor(x, dtype=torch.int32) for x in lists
    )
    return Queries(q, q_indptr, q_position), OpenPages(k, v, indptr, slots, position)


@pytest.fixture
def wrapper(monkeypatch: pytest.MonkeyPatch) -> Iterator[mock.MagicMock]:
    """FlashInfer's wrapper class, replaced by one that only checks how it is called."""
    fake = mock.create_autospec(installed.BatchPrefillWithPagedKVCacheWrapper)
    fake.return_value.run.side_effect = lambda q, kv, return_lse: (q, q[..., 0].float())
    monkeypatch.setattr(installed, "BatchPrefillWithPagedKVCacheWrapper", fake)
    shape = flashinfer.Shape(torch.device("cpu"), torch.bfloat16, 4, 2, 64)
    monkeypatch.setattr(flashinfer, "check", lambda wrapper, shape, softmax: None)
    monkeypatch.setattr(flashinfer, "WORKSPACE_BYTES", 1 << 10)
    assert flashinfer.make_ready(shape, SOFTMAXES)
    yield fake
    flashinfer._ready = None


def test_our_calls_fit_the_installed_signatures(wrapper: mock.MagicMock) -> None:
    """One plan for all layers with the same softmax."""
    queries, opened = step(torch.bfloat16)
    prefill = OpenPrefill(torch.full((2,), PAGE_TOKENS, dtype=torch.int32))
    planned = wrapper.return_value
    for i in (0, 0, 1, 0, 1):
        part = prefill.attend(queries, opened, SOFTMAXES[i])
        assert part.out.dtype == part.lse.dtype == torch.float32
    names = "sm_scale", "logits_soft_cap", "window_left"
    found = [tuple(call.kwargs[name] for name in names) for call in planned.plan.call_args_list]
    assert found == [softmax[:3] for softmax in SOFTMAXES]
    workspaces = [call.args[0].data_ptr() for call in wrapper.call_args_list]
    assert len(workspaces) == 2 and len(set(workspaces)) == 1


def test_elsewhere_our_own_kernel_runs() -> None:
    queries, opened = step()
    assert not flashinfer.supports(queries.q, SOFTMAXES[0])
    prefill = OpenPrefill(torch.full((2,), PAGE_TOKENS, dtype=torch.int32))
    part, expected = (
        prefill.attend(queries, opened, Softmax(0.1)),
        extend_open(queries, opened, Softmax(0.1)),
    )
    assert torch.equal(part.out, expected.out) and torch.equal(part.lse, expected.lse)


def test_its_reference_means_what_ours_does() -> None:
    """Pages [R, 64, H, D], the last query sees the last token, LSE in base 2."""
    from flashinfer.trace.templates.attention import _gqa_paged_prefill_reference

    (q, q_indptr, _), (k, v, indptr, slots, _) = queries, opened = step()
    out, lse = _gqa_paged_prefill_reference(q, k, v, q_indptr, indptr, slots, 0.1)
    expected = naive.extend_open(queries, opened, Softmax(0.1))
    torch.testing.assert_close(out.float(), expected.out, rtol=1e-2, atol=1e-3)
    torch.testing.assert_close(lse, expected.lse, rtol=1e-4, atol=1e-4)


def test_its_sources_say_what_we_rely_on() -> None:
    from flashinfer.utils import TensorLayout, is_fa3_prefill_head_dim_supported

    assert hasattr(TensorLayout, "NHD")
    assert all(is_fa3_prefill_head_dim_supported(dim, dim) for dim in flashinfer.HEAD_DIMS)
    headers = Path(installed.__file__).parent / "data" / "include" / "flashinfer"
    macro = (headers / "utils.cuh").read_text().split("#define DISPATCH_HEAD_DIM(")[1]
    dims = re.findall(r"case (\d+)", macro.split("#define")[0])
    assert {str(dim) for dim in flashinfer.HEAD_DIMS} <= set(dims)
    assert not {"80", "96"} & set(dims)
    made = inspect.getsource(installed.BatchPrefillWithPagedKVCacheWrapper.__init__)
    assert "8 * 1024 * 1024" in made and "32768" in made  # what `PLAN_BYTES` counts
    variants = (headers / "attention" / "variants.cuh").read_text()
    assert "kv_idx + qo_len + window_left >= kv_len + qo_idx" in variants, "windows from the end"
    prefill = (headers / "attention" / "prefill.cuh").read_text()
    assert "SharedMemFillMode::kFillZero" in prefill, "values after the end may be NaN"
