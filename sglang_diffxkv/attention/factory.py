# SPDX-License-Identifier: Apache-2.0
"""The backend for one of SGLang's model runners."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from sglang.srt.layers.radix_attention import RadixAttention

from sglang_diffxkv.attention.backend import DiffXKVBackend
from sglang_diffxkv.attention.host_backend import HostBackend
from sglang_diffxkv.attention.host_windows import HostWindowDecode
from sglang_diffxkv.attention.window_layers import WindowDecode, WindowLayers, WindowPages
from sglang_diffxkv.config import DiffXKVConfig
from sglang_diffxkv.kernels.gpu.device import on_gpu
from sglang_diffxkv.pool.allocator import find_allocator
from sglang_diffxkv.pool.kv_pool import find_pool

if TYPE_CHECKING:
    from sglang.srt.model_executor.model_runner import ModelRunner


def make_backend(model_runner: ModelRunner, config: DiffXKVConfig) -> DiffXKVBackend:
    """Of the kind for the device that it runs on.

    Raises:
        RuntimeError: its pool is not ours.
    """
    pool = find_pool(model_runner.token_to_kv_pool)
    allocator = find_allocator(model_runner.token_to_kv_pool_allocator)
    if pool is None or allocator is None:
        raise RuntimeError(
            "diffxkv: SGLang did not build the diffxkv pool, so a hook failed to apply; see "
            "the plugin errors above in the log"
        )
    rows = model_runner.req_to_token_pool
    backend = _class_for(rows.req_to_token)(
        pool.store, rows.req_to_token, config, allocator.running, pool.store_layers
    )
    # The backend that SGLang wraps ours in, of models with linear attention, takes them from it.
    backend.token_to_kv_pool, backend.req_to_token_pool = model_runner.token_to_kv_pool, rows
    backend.windows = _window_layers(model_runner, backend)
    if any(layer.logit_cap > 0 for layer in _attention_layers(model_runner.model)):
        pool.store.key_means.keep_zero()
    return backend


def _attention_layers(model: torch.nn.Module) -> list[RadixAttention]:
    return [layer for layer in model.modules() if isinstance(layer, RadixAttention)]


def _window_layers(model_runner: ModelRunner, backend: DiffXKVBackend) -> WindowLayers | None:
    pool: Any = model_runner.token_to_kv_pool
    windows = [x for x in _attention_layers(model_runner.model) if x.sliding_window_size > 0]
    if not windows:
        return None
    pages = WindowPages.of(pool, windows[0].sliding_window_size)
    indices = {x.layer_id: pool.layers_mapping[x.layer_id][0] for x in windows}
    return WindowLayers(indices, pages, _window_decode(pages, backend), backend.req_to_token)


def _window_decode(pages: WindowPages, backend: DiffXKVBackend) -> WindowDecode:
    if not on_gpu(backend.req_to_token):
        return HostWindowDecode(pages)
    from sglang_diffxkv.attention.device_windows import DeviceWindowDecode  # needs Triton

    return DeviceWindowDecode(pages)


def _class_for(table: torch.Tensor) -> type[DiffXKVBackend]:
    if not on_gpu(table):
        return HostBackend
    from sglang_diffxkv.attention.device_backend import DeviceBackend  # needs Triton

    return DeviceBackend
