# SPDX-License-Identifier: Apache-2.0
"""FlashInfer serves what it was made ready for, and nothing where it failed."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from sglang_diffxkv.kernels.extend import flashinfer, naive
from sglang_diffxkv.kernels.extend.flashinfer import Shape, make_ready, supports
from sglang_diffxkv.kernels.extend.prefill import OpenPrefill
from sglang_diffxkv.kernels.pages import OpenPages, Queries
from sglang_diffxkv.kernels.softmax import Softmax

CPU = torch.device("cpu")
SHAPE = Shape(CPU, torch.bfloat16, heads=4, kv_heads=2, head_dim=64)


@pytest.fixture(autouse=True)
def forgotten(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    caplog.set_level(logging.INFO)
    yield
    flashinfer._ready = None


class Wrapper:
    """Computes what FlashInfer's would, if it is right: the reference.

    Args:
        lse_factor: of its LSE, which is in base 2 with 1.
    """

    def __init__(self, lse_factor: float = 1.0) -> None:
        self.lse_factor, self.plans = lse_factor, 0

    def plan(self, *args: Any, causal: bool, sm_scale: float, **dtypes: torch.dtype) -> None:
        assert causal and set(dtypes) == {"q_data_type", "kv_data_type"}
        self.lists, self.softmax = args[:4], Softmax(sm_scale)
        self.plans += 1

    def run(
        self, q: torch.Tensor, kv: tuple[torch.Tensor, torch.Tensor], return_lse: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        q_indptr, indptr, slots, last_len = self.lists
        listed = indptr.diff()
        position = torch.cat([torch.arange(n) for n in listed.tolist()])
        start = (listed - 1) * 64 + last_len - q_indptr.diff()
        queries = Queries(q, q_indptr, start)
        part = naive.extend_open(queries, OpenPages(*kv, indptr, slots, position), self.softmax)
        assert return_lse
        return part.out.to(q.dtype), self.lse_factor * part.lse


def failing(error: Exception) -> Any:
    def build(shape: Shape) -> Any:
        raise error

    return build


def checked(wrapper: Wrapper) -> Any:
    def build(shape: Shape) -> Any:
        flashinfer.check(wrapper, shape)  # type: ignore[arg-type]
        return wrapper

    return build


def queries(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.ones(shape, dtype=dtype)


@pytest.mark.parametrize(
    "build",
    [
        failing(ModuleNotFoundError("No module named 'flashinfer'")),
        failing(FileNotFoundError(2, "No such file or directory", "ninja")),
        failing(RuntimeError("Ninja build failed.\nnvcc: not found\n")),
        failing(AssertionError()),
        checked(Wrapper(lse_factor=0.69)),
    ],
    ids=["not installed", "no ninja", "no nvcc", "no message", "natural logarithms"],
)
def test_our_kernel_serves_where_it_fails(build: Any, caplog: pytest.LogCaptureFixture) -> None:
    """With one line that says why, and what to install."""
    assert not make_ready(SHAPE, build)
    assert not supports(queries(3, 4, 64))
    (record,) = caplog.records
    assert record.levelno == logging.WARNING and "\n" not in record.message
    for text in ("our Triton kernels", "flashinfer-python", "ninja", "nvcc"):
        assert text in record.message
    prefill, lists = open_prefill()
    new, raw = Queries(queries(3, 4, 64), *lists[:2]), queries(2, 2, 64, 2, 64)
    part = prefill.attend(new, OpenPages(*raw, *lists[2:]), Softmax(0.1))
    assert part.out.isfinite().all()


def open_prefill() -> tuple[OpenPrefill, list[torch.Tensor]]:
    """Three new tokens after 69: lists of `Queries`, and of `OpenPages`."""
    values = [0, 3], [69], [0, 2], [1, 0], [0, 1], [8]
    *lists, last_len = (torch.tensor(x, dtype=torch.int32) for x in values)
    return OpenPrefill(last_len), lists


def test_it_serves_where_it_is_right(caplog: pytest.LogCaptureFixture) -> None:
    """What it was made ready for; planned once for all layers, and again for another scale."""
    wrapper = Wrapper()
    assert make_ready(SHAPE, checked(wrapper)) and wrapper.plans == 1
    (record,) = caplog.records
    assert record.levelno == logging.INFO and "FlashInfer is ready" in record.message
    assert supports(queries(3, 4, 64))
    for other in (
        queries(0, 4, 64), queries(3, 8, 64), queries(3, 4, 128),
        queries(3, 4, 64, dtype=torch.float16), queries(3, 4, 64).to("meta"),
    ):  # fmt: skip
        assert not supports(other)
    step, lists = open_prefill()
    new, raw = Queries(queries(3, 4, 64), *lists[:2]), queries(2, 2, 64, 2, 64)
    for scale, plans in ((0.1, 2), (0.1, 2), (0.2, 3)):
        step.attend(new, OpenPages(*raw, *lists[2:]), Softmax(scale))
        assert wrapper.plans == plans


@pytest.mark.parametrize("changed", [{"head_dim": 80}, {"dtype": torch.float32}])
def test_it_is_not_asked_for_what_it_lacks(
    changed: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    assert not make_ready(SHAPE._replace(**changed), failing(RuntimeError("asked")))
    (record,) = caplog.records
    assert record.levelno == logging.INFO and "asked" not in record.message


def test_a_later_failure_takes_it_out_of_service() -> None:
    assert make_ready(SHAPE, checked(Wrapper()))
    assert not make_ready(SHAPE, failing(RuntimeError("driver")))
    assert not supports(queries(3, 4, 64))


def test_here_it_does_not_start(caplog: pytest.LogCaptureFixture) -> None:
    """The real thing, without a GPU: a line in the log, no exception."""
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert not make_ready(SHAPE._replace(device=torch.device("cuda")))
    assert len(caplog.records) == 1
