# SPDX-License-Identifier: Apache-2.0
"""SGLang's own layers, with and without our kernels in their place."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang.kernels.fused_op import BaseFusedOp
from sglang.srt.layers.activation import SiluAndMul
from sglang.srt.layers.layernorm import GemmaRMSNorm, RMSNorm
from sglang.srt.layers.quantization.unquant import UnquantizedLinearMethod
from sglang.srt.layers.rotary_embedding.base import RotaryEmbedding
from sglang.srt.layers.rotary_embedding.mrope import MRotaryEmbedding
from sglang.srt.layers.rotary_embedding.rope_variant import Llama3RotaryEmbedding

from sglang_diffxkv.patches import layers, linear

KEY = "test"


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> dict[type, Any]:
    platform = SimpleNamespace(is_out_of_tree=lambda: True, get_dispatch_key_name=lambda: KEY)
    monkeypatch.setattr(layers, "current_platform", platform)
    monkeypatch.setattr(BaseFusedOp, "_oot_forward_registry", {})
    layers.install()
    return BaseFusedOp._oot_forward_registry[KEY]


def test_exactly_what_we_know_is_replaced(registered: dict[type, Any]) -> None:
    assert {RMSNorm, SiluAndMul, RotaryEmbedding, Llama3RotaryEmbedding} <= registered.keys()
    assert not {GemmaRMSNorm, MRotaryEmbedding} & registered.keys()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rms_norm(registered: dict[type, Any], dtype: torch.dtype) -> None:
    norm = RMSNorm(64).to(dtype)
    norm.weight.data.copy_(torch.randn(64))
    forward = registered[RMSNorm].__get__(norm)
    x, residual = torch.randn(2, 5, 64).to(dtype)
    close = {"rtol": 1e-2, "atol": 1e-2} if dtype == torch.bfloat16 else {}
    torch.testing.assert_close(forward(x), norm.forward_native(x), **close)
    expected = norm.forward_native(x, residual.clone())
    torch.testing.assert_close(forward(x, residual.clone(), None), expected, **close)
    added = torch.randn(5, 64).to(dtype)
    expected = norm.forward_native(x, residual.clone(), added)
    torch.testing.assert_close(forward(x, residual.clone(), added), expected)
    norm.cast_x_before_out_mul = True  # which the kernel does not know
    assert torch.equal(forward(x), norm.forward_native(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("neox", [True, False])
def test_rotary(registered: dict[type, Any], neox: bool, dtype: torch.dtype) -> None:
    rope = RotaryEmbedding(64, 32, 100, 10000, neox, dtype)
    rope.cos_sin_cache = rope.cos_sin_cache.to(dtype)
    forward = registered[RotaryEmbedding].__get__(rope)
    positions = torch.tensor([3, 99, 0])
    q, k, _ = torch.randn(3, 256 + 128 + 7).to(dtype).split([256, 128, 7], -1)
    expected = rope.forward_native(positions, q, k)
    offset = rope.forward_native(positions, q, k, torch.tensor([0, 0, 5]))
    actual = forward(positions, q.clone(), k.clone(), torch.tensor([0, 0, 5]))
    assert all(torch.equal(*pair) for pair in zip(actual, offset, strict=True))
    actual = forward(positions, q, k)
    if dtype == torch.bfloat16:  # the same bits
        assert all(torch.equal(*pair) for pair in zip(actual, expected, strict=True))
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_silu_and_mul(registered: dict[type, Any], dtype: torch.dtype) -> None:
    layer = SiluAndMul()
    forward = registered[SiluAndMul].__get__(layer)
    x = torch.randn(5, 128).to(dtype)
    torch.testing.assert_close(forward(x), layer.forward_native(x))
    assert torch.equal(forward(x[:, ::2]), layer.forward_native(x[:, ::2]))


@pytest.mark.parametrize("tokens", [3, linear.MANY_TOKENS, 300])
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_linear(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, biased: bool, tokens: int
) -> None:
    monkeypatch.setattr(linear, "SLICE", 48 * 10)
    layer = torch.nn.Linear(48, 37, bias=biased).to(dtype)
    x = torch.randn(tokens, 48).to(dtype)
    expected = UnquantizedLinearMethod().apply(layer, x, layer.bias)
    if dtype == torch.bfloat16 and tokens >= linear.MANY_TOKENS:
        monkeypatch.delattr(UnquantizedLinearMethod, "apply")  # it is not to be used
    actual = linear.WideLinearMethod().apply(layer, x, layer.bias)
    close = {"rtol": 1e-2, "atol": 1e-3} if dtype == torch.bfloat16 else {}
    torch.testing.assert_close(actual, expected, **close)


def test_unquantized_layers_are_widened(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "current_platform", SimpleNamespace(is_out_of_tree=lambda: True))
    monkeypatch.setattr(linear.platform, "machine", lambda: "x86_64")
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4), torch.nn.ReLU())
    other = object()
    model[0].quant_method, model[1].quant_method = UnquantizedLinearMethod(), other
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    linear.widen(model)
    assert type(model[0].quant_method) is UnquantizedLinearMethod
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    linear.widen(model)
    assert type(model[0].quant_method) is linear.WideLinearMethod
    assert model[1].quant_method is other
