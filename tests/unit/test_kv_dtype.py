# SPDX-License-Identifier: Apache-2.0
"""The dtype of raw pages, whatever a checkpoint asks for."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang.srt.model_executor.model_runner import ModelRunner
from sglang.srt.plugins import load_plugins
from sglang.srt.runtime_context import publish, restore_context, snapshot_context
from sglang.srt.server_args import prepare_server_args

from sglang_diffxkv.patches.kv_dtype import check_dtype
from sglang_diffxkv.patches.validation import check_kv_dtype
from tests.support.demo_model import write_demo_model


@pytest.fixture(params=["diffxkv", "torch_native"])
def backend(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[str]:
    """The server that this process is of."""
    load_plugins()
    for name in ("SGLANG_CPU_OMP_THREADS_BIND", "OMP_NUM_THREADS"):
        monkeypatch.setenv(name, "1")  # which the CPU platform would set for good
    state = snapshot_context()
    model = str(write_demo_model(tmp_path, layers=1))
    argv = ["--model-path", model, "--device", "cpu", "--attention-backend", request.param]
    server_args = prepare_server_args(argv)
    server_args.resolve_once()
    publish(server_args, role="scheduler")
    yield request.param
    restore_context(state)


def configured(algorithm: str | None) -> Any:
    """A model runner, as far as this goes, of a checkpoint that asks for KV like that."""
    runner = SimpleNamespace(
        dtype=torch.bfloat16,
        draft_attention_backend=None,
        model=SimpleNamespace(quant_config=SimpleNamespace(kv_cache_quant_algo=algorithm)),
    )
    ModelRunner.configure_kv_cache_dtype(runner)  # type: ignore[arg-type]
    return runner


@pytest.mark.parametrize("algorithm", ["FP8", "fp8", "auto", None])
def test_raw_pages_stay_in_the_models_dtype(backend: str, algorithm: str | None) -> None:
    runner = configured(algorithm)
    stock_takes_fp8 = backend != "diffxkv" and str(algorithm).upper() == "FP8"
    assert (runner.kv_cache_dtype != torch.bfloat16) == stock_takes_fp8
    assert runner.kv_cache_dtype_str == ("fp8_e4m3" if stock_takes_fp8 else "auto")


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.uint8, torch.float64])
def test_other_dtypes_are_refused_in_one_line(dtype: torch.dtype) -> None:
    with pytest.raises(ValueError, match=f"KV in {dtype} of a model") as refusal:
        check_dtype(dtype, dtype)
    assert "\n" not in str(refusal.value)
    for known in (torch.float32, torch.float16, torch.bfloat16):
        check_dtype(known, known)


def test_raw_pages_of_another_dtype_than_the_models_are_refused() -> None:
    with pytest.raises(ValueError, match=r"KV in torch.bfloat16 of a model in torch.float32"):
        check_dtype(torch.bfloat16, torch.float32)
    check_kv_dtype("auto", torch.float32)
    check_kv_dtype("bf16", torch.bfloat16)
    with pytest.raises(ValueError, match="a model in float32") as refusal:
        check_kv_dtype("bfloat16", torch.float32)
    assert "\n" not in str(refusal.value)
