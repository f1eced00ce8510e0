# SPDX-License-Identifier: Apache-2.0
"""When the CPU platform offers itself."""

import inspect
from types import SimpleNamespace

import pytest
import torch
from sglang.srt.platforms import _load_platform_class
from sglang.srt.platforms.device_mixin import DeviceMixin
from sglang.srt.platforms.interface import SRTPlatform

from sglang_diffxkv import platform

CHOSEN = "sglang_diffxkv.platform.CpuPlatform"


@pytest.mark.parametrize(
    ("accelerators", "env", "expected"),
    [
        (0, {}, CHOSEN),
        (1, {}, None),
        (1, {"SGLANG_PLATFORM": "diffxkv"}, CHOSEN),
        (0, {"SGLANG_USE_CPU_ENGINE": "1"}, None),
        (1, {"SGLANG_PLATFORM": "diffxkv", "SGLANG_USE_CPU_ENGINE": "1"}, CHOSEN),
    ],
)
def test_activate(
    monkeypatch: pytest.MonkeyPatch, accelerators: int, env: dict[str, str], expected: str | None
) -> None:
    for name in ("SGLANG_PLATFORM", "SGLANG_USE_CPU_ENGINE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    for name in platform._ACCELERATORS:
        monkeypatch.setattr(torch, name, SimpleNamespace(device_count=lambda: 0), raising=False)
    monkeypatch.setattr(torch, "xpu", SimpleNamespace(device_count=lambda: accelerators))
    assert platform.activate() == expected


def test_class_is_what_sglang_asks_for() -> None:
    chosen = _load_platform_class(CHOSEN)()
    assert chosen.is_out_of_tree()
    # What /start_profile asks of it.
    activity = getattr(torch.profiler.ProfilerActivity, chosen.get_torch_profiler_activity_str())
    assert activity == chosen.get_torch_profiler_activity()
    assert chosen.get_default_attention_backend() == "torch_native"
    assert not chosen.capabilities.supports_triton
    assert not chosen.capabilities.graph_capture


def test_whatever_a_cpu_server_asks_is_answered() -> None:
    """By a flag or an HTTP request: a question without an answer ends the scheduler.

    The attention of drafts is asked about for an algorithm that SGLang refuses before.
    """
    unanswered = {
        name
        for base in (DeviceMixin, SRTPlatform)
        for name, method in vars(base).items()
        if inspect.isfunction(method)
        and "NotImplementedError" in method.__code__.co_names
        and getattr(platform.CpuPlatform, name) is method
    }
    assert unanswered == {"get_default_speculative_draft_attention_backend"}
    assert not platform.CpuPlatform().supports_speculative_algorithm("DFLASH")


def test_ranks_divide_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    binding, threads = "SGLANG_CPU_OMP_THREADS_BIND", "OMP_NUM_THREADS"
    for name in (binding, threads):  # so that what is set below is taken back
        monkeypatch.setenv(name, "")
        del platform.os.environ[name]
    monkeypatch.setattr(platform.os, "sched_getaffinity", lambda _: {0, 1, 2, 5, 6})
    monkeypatch.setattr(torch, "get_num_threads", lambda: 5)
    apply = platform.CpuPlatform().apply_server_args_defaults
    apply(SimpleNamespace(tp_size=1))
    assert binding not in platform.os.environ and threads not in platform.os.environ
    apply(SimpleNamespace(tp_size=2))
    assert platform.os.environ[binding] == "0,2,6|1,5" and platform.os.environ[threads] == "2"
    apply(SimpleNamespace(tp_size=8))
    assert platform.os.environ[binding] == "0,2,6|1,5", "what is set stays"
