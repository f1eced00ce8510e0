# SPDX-License-Identifier: Apache-2.0
"""SGLang's input buffers do not grow with our pool."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from sglang_diffxkv.patches import input_buffers


@pytest.mark.parametrize(
    ("active", "asked", "got"),
    [(True, 128_000_000, 2 * (16384 + 48)), (True, 500, 500), (False, 128_000_000, 128_000_000)],
)
def test_buffers_hold_the_longest_batch(
    monkeypatch: pytest.MonkeyPatch, active: bool, asked: int, got: int
) -> None:
    schedule = SimpleNamespace(chunked_prefill_size=2048, max_prefill_tokens=16384)
    monkeypatch.setattr("sglang.srt.runtime_context.get_schedule", lambda: schedule)
    monkeypatch.setattr(input_buffers, "is_active", lambda: active)

    def original(*, max_bs: int, max_num_token: int, device: str) -> tuple[int, int, str]:
        return max_bs, max_num_token, device

    made = input_buffers._build(original, device="cpu", max_bs=48, max_num_token=asked)
    assert made == (48, got, "cpu")
