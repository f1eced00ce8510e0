# SPDX-License-Identifier: Apache-2.0
"""Entry point ``sglang.srt.plugins``: makes ``--attention-backend diffxkv`` known to SGLang.

SGLang runs it in its main process, in every scheduler process and in the detokenizer, before any
of them reads its arguments, and logs instead of raising what goes wrong here. So when a hook does
not fit, the backend is registered all the same, and choosing it is refused with the reason.
"""

from __future__ import annotations

from typing import Any


def register() -> None:
    """Register the backend and install every hook; harmless unless the backend is chosen."""
    from sglang_diffxkv.patches.hook import HookError, check_version, refuse_backend

    try:
        check_version()
        _install()
    except HookError as problem:
        refuse_backend(problem)


def _install() -> None:
    from sglang.srt.layers.attention.attention_registry import register_attention_backend

    from sglang_diffxkv.patches import (
        chains,
        check,
        committed,
        dashboard,
        disk,
        expected_pages,
        forward,
        http_app,
        idle,
        input_buffers,
        kv_dtype,
        kv_events,
        linear_state,
        logits_softcap,
        lossless,
        observability,
        page_keys,
        pool,
        prefetch,
        profiling,
        published_capacity,
        quality,
        recomputed,
        requests,
        running,
        server_args,
        window_models,
    )

    of_model = (server_args, window_models, kv_dtype, logits_softcap)
    of_pool = (
        linear_state,
        pool,
        published_capacity,
        input_buffers,
        kv_events,
        forward,
        check,
        idle,
    )
    of_disk = (page_keys, disk, prefetch)
    of_requests = (
        running,
        committed,
        expected_pages,
        recomputed,
        http_app,
        quality,
        lossless,
        observability,
        requests,
        dashboard,
        profiling,
        chains,
    )
    for hook in (*of_model, *of_pool, *of_disk, *of_requests):
        hook.install()

    @register_attention_backend(server_args.BACKEND)
    def create_backend(model_runner: Any) -> Any:
        from sglang_diffxkv.attention.factory import make_backend
        from sglang_diffxkv.patches.hook import check_applied
        from sglang_diffxkv.patches.model_validation import check_layers

        check_applied()
        check_layers(model_runner.model, model_runner.model_config.swa_attention_layer_ids or ())
        backend = make_backend(model_runner, server_args.get_config())
        _prepare_kernels(model_runner, scores=backend.store.policy.needs_scores)
        allocator = model_runner.token_to_kv_pool_allocator
        running.follow(model_runner.req_to_token_pool, allocator)
        committed.expect_drafts(allocator)
        return backend


def _prepare_kernels(model_runner: Any, scores: bool) -> None:
    """Compile what runs on a CPU now: the first request would wait for it otherwise."""
    from sglang_diffxkv.kernels.cpu.prebuild import load_all
    from sglang_diffxkv.kernels.gpu.device import on_gpu
    from sglang_diffxkv.patches import layers, linear

    if not on_gpu(model_runner.req_to_token_pool.req_to_token):
        load_all(scores=scores)
        layers.install()
        linear.widen(model_runner.model)
