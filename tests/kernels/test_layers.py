# SPDX-License-Identifier: Apache-2.0
"""Small layers: compiled kernels against float64, and in place of SGLang's own."""

from __future__ import annotations

import ctypes
from types import ModuleType

import pytest
import torch

from sglang_diffxkv.kernels import layers
from sglang_diffxkv.kernels.cpu import function
from sglang_diffxkv.kernels.cpu.build import ISA_VARIABLE, available_isas, cpu_isa, load_library
from sglang_diffxkv.kernels.layers import naive
from tests.support.builders import error_norm

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 6e-3, torch.float16: 8e-4}
EPS = 1e-5


@pytest.fixture(params=available_isas())
def compiled(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.setenv(ISA_VARIABLE, request.param)
    return layers


def normal(*shape: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    gen = torch.Generator().manual_seed(seed)
    return (2 * torch.randn(shape, generator=gen)).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 7), (3, 128), (33, 576), (300, 2048)])
def test_rms_norm(compiled: ModuleType, shape: tuple[int, int], dtype: torch.dtype) -> None:
    x, residual = normal(*shape, dtype=dtype), normal(*shape, dtype=dtype, seed=1)
    weight = normal(shape[1], dtype=dtype, seed=2)
    alone = compiled.rms_norm(x, weight, EPS)
    assert alone.dtype == dtype
    assert error_norm(alone, naive.rms_norm(x, weight, EPS)) < TOLERANCE[dtype]
    total = residual.clone()
    out = compiled.rms_norm(x, weight, EPS, total)
    assert torch.equal(total, x + residual)
    assert error_norm(out, naive.rms_norm(x, weight, EPS, residual)) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("neox", [True, False])
@pytest.mark.parametrize(("dim", "rotary"), [(64, 64), (80, 32), (128, 128), (18, 14)])
def test_rotary(
    compiled: ModuleType, dim: int, rotary: int, neox: bool, dtype: torch.dtype
) -> None:
    tokens, heads = 45, 3
    width = heads * dim
    cache = normal(100, rotary, dtype=dtype)
    positions = torch.randperm(100, generator=torch.Generator().manual_seed(3))[:tokens]
    product = torch.full((tokens, 2 * width + 5), torch.nan, dtype=dtype)
    x = product[:, 2 : 2 + width]
    x.copy_(normal(tokens, width, dtype=dtype, seed=4))
    expected = naive.rotary(positions, x, dim, cache, neox)
    compiled.rotary(positions, x, dim, cache, neox)
    assert error_norm(x, expected) < TOLERANCE[dtype]
    assert product[:, :2].isnan().all() and product[:, 2 + width :].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 14), (5, 512), (200, 1000)])
def test_silu_and_mul(compiled: ModuleType, shape: tuple[int, int], dtype: torch.dtype) -> None:
    x = normal(*shape, dtype=dtype)
    x[0, 0], x[0, 1] = -100, 80
    assert error_norm(compiled.silu_and_mul(x), naive.silu_and_mul(x)) < TOLERANCE[dtype]


@pytest.mark.parametrize("isa", [*available_isas(), *available_isas()])
def test_the_forced_instruction_set_runs(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In each test anew, or those of other instruction sets would all try one."""
    monkeypatch.setenv(ISA_VARIABLE, isa)
    bound: list[str] = []

    def load(operation: str) -> ctypes.CDLL:
        bound.append(cpu_isa())
        return load_library(operation)

    monkeypatch.setattr(function, "load_library", load)
    for _ in range(2):
        layers.rms_norm(torch.ones(1, 8), torch.ones(8), EPS)
    assert bound == [isa]
