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
SINKS = torch.ones(4)
PLAIN, WINDOW = Softmax(0.1, sinks=SINKS), Softmax(0.1, window_left=8)
SOFTMAXES = [PLAIN, WINDOW, Softmax(0.1, window_left=8, sinks=SINKS), Softmax(0.2, cap=3.0)]
"""Of layers, two of which differ in their sinks alone."""


@pytest.fixture(autouse=True)
def forgotten(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    caplog.set_level(logging.INFO)
    yield
    flashinfer._ready = None


HEEDED = "logits_soft_cap", "window_left"


class Wrapper:
    """Computes what FlashInfer's would, if it is right: the reference.

    Args:
        lse_factor: of its LSE, which is in base 2 with 1.
        heeds: which parameters of the softmax it does not forget.
    """

    def __init__(self, lse_factor: float = 1.0, heeds: tuple[str, ...] = HEEDED) -> None:
        self.lse_factor, self.heeds = lse_factor, heeds
        self.planned: list[Softmax] = []

    def plan(self, *args: Any, causal: bool, sm_scale: float, **options: Any) -> None:
        assert causal and set(options) == {"q_data_type", "kv_data_type", *HEEDED}
        cap, window_left = (
            options[name] if name in self.heeds else none
            for name, none in zip(HEEDED, (0.0, -1), strict=True)
        )
        self.lists, self.softmax = args[:4], Softmax(sm_scale, cap, window_left)
        self.planned.append(self.softmax)

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
    def build(workspace: torch.Tensor) -> Any:
        raise error

    return build


def making(made: list[Wrapper], **options: Any) -> Any:
    """Builds wrappers, which are put on record."""

    def build(workspace: torch.Tensor) -> Any:
        assert workspace.nbytes == flashinfer.WORKSPACE_BYTES
        made.append(Wrapper(**options))
        return made[-1]

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
        making([], lse_factor=0.69),
        making([], heeds=HEEDED[:1]),
        making([], heeds=HEEDED[1:]),
    ],
    ids=[
        "not installed",
        "no ninja",
        "no nvcc",
        "no message",
        "natural logarithms",
        "no window",
        "no cap",
    ],
)
def test_our_kernel_serves_where_it_fails(build: Any, caplog: pytest.LogCaptureFixture) -> None:
    """With one line that says why, and what to install."""
    assert not make_ready(SHAPE, SOFTMAXES, build)
    assert not any(supports(queries(3, 4, 64), x.of_part) for x in SOFTMAXES)
    assert flashinfer.workspace_bytes() == 0
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
    """What it was made ready for; planned once for all layers whose softmax is the same."""
    made: list[Wrapper] = []
    assert make_ready(SHAPE, SOFTMAXES, making(made))
    assert len(made) == 3 and all(len(wrapper.planned) == 1 for wrapper in made)
    taken = flashinfer.WORKSPACE_BYTES + 3 * flashinfer.PLAN_BYTES
    assert flashinfer.workspace_bytes() == taken
    (record,) = caplog.records
    assert record.levelno == logging.INFO and "FlashInfer is ready" in record.message
    assert all(supports(queries(3, 4, 64), x.of_part) for x in SOFTMAXES)
    assert not supports(queries(3, 4, 64), Softmax(0.3))
    for other in (
        queries(0, 4, 64), queries(3, 8, 64), queries(3, 4, 128),
        queries(3, 4, 64, dtype=torch.float16), queries(3, 4, 64).to("meta"),
    ):  # fmt: skip
        assert not supports(other, WINDOW)
    step, lists = open_prefill()
    new, raw = Queries(queries(3, 4, 64), *lists[:2]), queries(2, 2, 64, 2, 64)
    opened = OpenPages(torch.randn_like(raw[0]), raw[1], *lists[2:])
    opened.values.normal_()
    for softmax in 2 * SOFTMAXES:
        part = step.attend(new, opened, softmax)
        expected = naive.extend_open(new, opened, softmax)
        torch.testing.assert_close(part.out, expected.out, rtol=1e-2, atol=1e-2)
        torch.testing.assert_close(part.lse, expected.lse)
    planned = [wrapper.planned[1:] for wrapper in made]
    assert planned == [[PLAIN.of_part], [WINDOW], [SOFTMAXES[-1]]]


def test_pages_before_the_window_are_left_out() -> None:
    """It counts positions from the first page that is listed, and windows from the last."""
    made: list[Wrapper] = []
    assert make_ready(SHAPE, [WINDOW], making(made))
    # Three new tokens after 5 * 64 + 6, and 70 after 64: the first sees 8 before it.
    q_indptr, start, indptr, slots, position, last_len = (
        torch.tensor(x, dtype=torch.int32)
        for x in ([0, 3, 73], [326, 64], [0, 2, 5], [4, 1, 3, 0, 2], [4, 5, 0, 1, 2], [9, 6])
    )
    gen = torch.Generator().manual_seed(0)
    q = torch.randn(73, 4, 64, generator=gen).bfloat16()
    k, v = torch.randn(2, 5, 64, 2, 64, generator=gen).bfloat16()
    new, opened = Queries(q, q_indptr, start), OpenPages(k, v, indptr, slots, position)
    part = OpenPrefill(last_len).attend(new, opened, WINDOW)
    expected = naive.extend_open(new, opened, WINDOW)
    assert len(made[0].planned) == 2
    torch.testing.assert_close(part.out, expected.out, rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(part.lse, expected.lse)


@pytest.mark.parametrize("changed", [{"head_dim": 80}, {"dtype": torch.float32}])
def test_it_is_not_asked_for_what_it_lacks(
    changed: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    assert not make_ready(SHAPE._replace(**changed), SOFTMAXES, failing(RuntimeError("asked")))
    (record,) = caplog.records
    assert record.levelno == logging.INFO and "asked" not in record.message


def test_a_later_failure_takes_it_out_of_service() -> None:
    assert make_ready(SHAPE, SOFTMAXES, making([]))
    assert not make_ready(SHAPE, SOFTMAXES, failing(RuntimeError("driver")))
    assert not supports(queries(3, 4, 64), WINDOW)


def test_here_it_does_not_start(caplog: pytest.LogCaptureFixture) -> None:
    """The real thing, without a GPU: a line in the log, no exception."""
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert not make_ready(SHAPE._replace(device=torch.device("cuda")), SOFTMAXES)
    assert len(caplog.records) == 1
