# SPDX-License-Identifier: Apache-2.0
"""Portable CPU platform: stock SGLang on any x86-64 or ARM CPU, without AMX or sgl-kernel.

SGLang's own CPU engine (SGLANG_USE_CPU_ENGINE=1) needs the CPU build of sgl-kernel. An out-of-tree
platform takes the native (plain torch) implementation of every layer instead.
"""

import os
from collections.abc import Callable
from typing import Any

import torch
from sglang.srt.platforms.cpu import CpuDeviceMixin
from sglang.srt.platforms.device_mixin import PlatformEnum
from sglang.srt.platforms.interface import SRTPlatform

from sglang_diffxkv.platform.chains import extend_slots

NAME = "diffxkv"
SPECULATIVE_ALGORITHMS = ("EAGLE", "EAGLE3", "STANDALONE", "NGRAM")
"""By SGLang's own names: NEXTN is EAGLE there."""
_ACCELERATORS = ("cuda", "xpu", "npu", "musa", "hpu", "mps")


def activate() -> str | None:
    """Entry point `sglang.srt.platforms`: our class where no accelerator is present, else None.

    SGLANG_PLATFORM=diffxkv chooses it on any machine; SGLANG_USE_CPU_ENGINE=1 chooses SGLang's own.
    """
    chosen = os.environ.get("SGLANG_PLATFORM") == NAME
    in_tree_cpu = os.environ.get("SGLANG_USE_CPU_ENGINE") == "1"
    if chosen or not (in_tree_cpu or _accelerator_present()):
        return f"{__name__}.{CpuPlatform.__qualname__}"
    return None


def _accelerator_present() -> bool:
    # device_count, not is_available: on CUDA it asks NVML and so leaves the runtime uninitialised.
    modules = (getattr(torch, name, None) for name in _ACCELERATORS)
    return any(module is not None and module.device_count() > 0 for module in modules)


class CpuPlatform(CpuDeviceMixin, SRTPlatform):
    """Plain torch on the CPU: no Triton, no graphs; `capabilities` keep their cautious defaults."""

    _enum = PlatformEnum.OOT

    def apply_server_args_defaults(self, server_args: Any) -> None:
        """Divide the cores among the ranks, where there are several and nobody has done so.

        SGLang wants to be told where ranks outnumber NUMA nodes. It binds threads with its own CPU
        kernels only, so each rank is also kept to as many threads as it has cores.
        """
        ranks = server_args.tp_size
        if ranks > 1:
            cores = sorted(os.sched_getaffinity(0))
            shares = [cores[rank::ranks] or cores for rank in range(ranks)]
            binding = "|".join(",".join(map(str, share)) for share in shares)
            os.environ.setdefault("SGLANG_CPU_OMP_THREADS_BIND", binding)
            os.environ.setdefault("OMP_NUM_THREADS", str(max(1, torch.get_num_threads() // ranks)))

    def get_default_attention_backend(self) -> str:
        return "torch_native"

    def support_mamba_cache_extra_buffer(self) -> bool:
        # State snapshots need nothing that the layers of these models do not need themselves.
        return True

    def get_compile_backend(self, mode: str | None = None) -> str:
        # Inductor would compile C++ for small per-step helpers: seconds of start-up for nothing.
        return "eager"

    def supports_speculative_algorithm(self, algorithm: str) -> bool:
        return algorithm in SPECULATIVE_ALGORITHMS

    def get_speculative_cache_locs_fn(self) -> Callable[..., torch.Tensor]:
        return extend_slots

    def get_torch_profiler_activity_str(self) -> str:
        # /start_profile asks out-of-tree platforms; without an answer it ends the scheduler.
        return "CPU"

    def get_torch_profiler_activity(self) -> torch.profiler.ProfilerActivity:
        return torch.profiler.ProfilerActivity.CPU
