# SPDX-License-Identifier: Apache-2.0
"""Flags of SGLang that the backend does not go with: refused at start, in one line that says why.

What it needs of the model is in `model_validation`.
"""

from typing import Any, NamedTuple

import torch
from sglang.srt.arg_groups.overrides import attention_backends_of, resolving_view
from sglang.srt.environ import envs
from sglang.srt.model_executor.cuda_graph_config import Backend

from sglang_diffxkv.kernels.cpu.build import CompilerError, cpu_isa, find_compiler
from sglang_diffxkv.kernels.layout import PAGE_TOKENS

BACKEND = "diffxkv"
WORKER_APP = "sglang_diffxkv.worker_app:app"
"""The HTTP application that tokenizer workers serve."""


FP8_DTYPES = ("fp8_e4m3", "fp8_e5m2")
"""Of `--kv-cache-dtype`: recipes pin them for KV that is not compressed otherwise."""


class _Flag(NamedTuple):
    """A field of ServerArgs, the values that we go with, and why not with others."""

    field: str
    allowed: tuple[object, ...]
    """The last one is what to use instead."""
    why: str


_RANKS = "only tensor-parallel ranks agree on what their pages take"
_OWN_CACHE = "it moves KV out of the pool, whose pages are compressed"
_HOST_LEVEL = "it keeps its own pages in host memory (host_bytes in --diffxkv-config)"
_FLAGS = (
    _Flag("page_size", (None, PAGE_TOKENS), f"sealed pages hold {PAGE_TOKENS} tokens"),
    _Flag(
        "kv_cache_dtype",
        ("bf16", "bfloat16", *FP8_DTYPES, "auto"),
        "it compresses the KV cache itself",
    ),
    _Flag("dllm_algorithm", (None,), "diffusion rewrites tokens, sealed pages are written once"),
    _Flag("disaggregation_mode", ("null",), "sealed pages are not transferred between servers"),
    _Flag("enable_pdmux", (False,), "prefill and decode share its pages"),
    _Flag("enable_hierarchical_cache", (False,), _HOST_LEVEL),
    _Flag("enable_lmcache", (False,), _OWN_CACHE),
    _Flag("enable_flexkv", (False,), _OWN_CACHE),
    _Flag("enable_unified_cache_external_linker", (False,), _OWN_CACHE),
    _Flag("radix_cache_backend", (None,), "it relies on SGLang's own radix tree"),
    _Flag("enable_unified_memory", (False,), "it has a memory pool of its own"),
    _Flag("enable_page_major_kv_layout", (False,), "it has a memory pool of its own"),
    _Flag("enable_kv_cache_sharding", (False,), "it has a memory pool of its own"),
    _Flag("enable_hisparse", (False,), "it has a memory pool of its own"),
    _Flag("prefill_only_disable_kv_cache", (False,), "it is a KV cache"),
    _Flag("kv_canary", ("none",), "the canary reads uncompressed KV"),
    _Flag("enable_two_batch_overlap", (False,), "it plans one batch at a time"),
    _Flag("enable_mis", (False,), "it has no custom attention masks"),
    _Flag("enable_nvidia_megakernel", (False,), "fused kernels read uncompressed KV"),
    _Flag("enable_amd_monokernel", (False,), "fused kernels read uncompressed KV"),
    _Flag("pp_size", (1,), _RANKS),
    _Flag("attn_dp_size", (1,), _RANKS),
    _Flag("enable_dp_attention", (False,), _RANKS),
    _Flag("attn_cp_size", (1,), _RANKS),
    _Flag("dcp_size", (1,), _RANKS),
    _Flag("enable_prefill_cp", (False,), _RANKS),
    _Flag("enable_streaming_session", (False,), "a retried turn rewrites a token that was sealed"),
    _Flag("enable_memory_saver", (False,), "its tables do not survive being paged out"),
    _Flag("use_ray", (False,), "SGLang's Ray actors load no plugins"),
)
_VARIABLES = {
    "SGLANG_ENABLE_POST_CAPTURE_KV_SIZING": "divides its memory once at start",
    "SGLANG_ENABLE_METADATA_GLUE_GRAPH": "tells its kernels the time before each step",
    "SGLANG_ENABLE_OVERLAP_PLAN_STREAM": "tells its kernels the time on their own stream",
    "SGLANG_RUST_SERVER": "reads a request's quality in SGLang's Python server",
}


def is_requested(server_args: Any) -> bool:
    """Whether the user asked for our backend, for prefill, decode or both."""
    view = resolving_view(server_args)
    return BACKEND in (view.attention_backend, *attention_backends_of(view))


def check_server_args(server_args: Any) -> None:
    """Check the flags as they stand; fit for any moment of resolution.

    Raises:
        ValueError: a flag that the backend does not go with.
    """
    view = resolving_view(server_args)
    prefill, decode = attention_backends_of(view)
    if (prefill, decode) != (BACKEND, BACKEND):
        raise ValueError(
            f"attention backends {prefill} for prefill and {decode} for decode do not go together: "
            f"both need the pages of {BACKEND}; give --attention-backend {BACKEND} and no other"
        )
    for flag in _FLAGS:
        value = getattr(view, flag.field)
        if value not in flag.allowed:
            raise ValueError(_refusal(flag, value))
    chunk = view.chunked_prefill_size
    if chunk is not None and (chunk <= 0 or chunk % PAGE_TOKENS):
        raise ValueError(
            f"--chunked-prefill-size {chunk} does not go with {BACKEND}, which seals pages between "
            f"chunks: use a multiple of {PAGE_TOKENS}, such as 2048"
        )
    for name, why in _VARIABLES.items():
        if getattr(envs, name).get():
            raise ValueError(f"{name} does not go with {BACKEND}, which {why}: unset it")
    app = envs.SGLANG_HTTP_SERVER_APP_PATH
    if view.tokenizer_worker_num > 1 and app.get() not in (app.default, WORKER_APP):
        raise ValueError(
            f"SGLANG_HTTP_SERVER_APP_PATH does not go with {BACKEND} and --tokenizer-worker-num "
            f"{view.tokenizer_worker_num}, whose workers serve {WORKER_APP}: unset it"
        )


def check_kv_dtype(asked: str, model: torch.dtype) -> None:
    """Check `--kv-cache-dtype` against the dtype that the model runs in.

    Raises:
        ValueError: they differ.
    """
    if asked != "auto" and model != torch.bfloat16:
        raise ValueError(
            f"--kv-cache-dtype {asked} does not go with --attention-backend {BACKEND} and a model "
            f"in {str(model).removeprefix('torch.')}, whose dtype raw pages have; leave it out"
        )


def check_host() -> None:
    """Check that kernels for the CPU can be compiled.

    Raises:
        ValueError: there is no C++ compiler, or the environment asks for other instructions than
            the CPU has.
    """
    cpu_isa()
    try:
        find_compiler()
    except CompilerError as problem:
        raise ValueError(f"--attention-backend {BACKEND} on a CPU: {problem}") from None


def captures_decode(server_args: Any) -> bool:
    """Whether decode steps may be captured in CUDA graphs: on the device that has kernels for it.

    To be asked once SGLang has chosen a device.
    """
    return bool(resolving_view(server_args).device == "cuda")


def check_resolution(server_args: Any) -> None:
    """Check what SGLang made of the flags, at the end of resolution.

    Raises:
        ValueError: it chose another backend for this model, or a CPU without a compiler, or was
            told to capture CUDA graphs that the backend cannot be in.
    """
    view = resolving_view(server_args)
    if view.attention_backend != BACKEND:
        raise ValueError(
            f"SGLang runs this model on attention backend {view.attention_backend!r} whatever was "
            f"asked for: leave out --attention-backend {BACKEND} or choose another model"
        )
    if view.device == "cuda" and torch.version.hip:
        raise ValueError(
            f"--attention-backend {BACKEND} does not go with ROCm, where SGLang does not order its "
            "streams as the pool needs it: use a GPU with CUDA, or --device cpu"
        )
    if view.device == "cpu":
        check_host()
    graphs = view.cuda_graph_config
    decode = (Backend.DISABLED, Backend.FULL)[: 1 + captures_decode(server_args)]
    for phase, config, allowed in (
        ("decode", graphs.decode, decode),
        ("prefill", graphs.prefill, (Backend.DISABLED,)),
    ):
        if config.backend not in allowed:
            raise ValueError(
                f"CUDA graphs for {phase} ({config.backend}) do not go with --attention-backend "
                f"{BACKEND} on {view.device}: leave out --cuda-graph-backend-{phase} and "
                "--cuda-graph-config"
            )
    if view.enable_torch_compile and graphs.decode.backend == Backend.FULL:
        raise ValueError(
            f"--enable-torch-compile does not go with --attention-backend {BACKEND} on "
            f"{view.device}, whose kernels torch.compile cannot trace: leave it out"
        )


def _refusal(flag: _Flag, value: object) -> str:
    name = "--" + flag.field.replace("_", "-")
    shown = name if value is True else f"{name} {value}"
    default = flag.allowed[-1]
    advice = f"use {default}" if default not in (None, False, "null", "none") else "leave it out"
    return f"{shown} does not go with --attention-backend {BACKEND}: {flag.why}; {advice}"
