# SPDX-License-Identifier: Apache-2.0
"""Hook: ``POST /diffxkv/check`` recomputes the pool's whole state, and says what is wrong with it.

It reaches the scheduler as SGLang's request to update internal state, which answers yes or no only;
what was found is read back with the state.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import torch
from sglang.srt.managers.scheduler_components.internal_state import _UpdateHandler
from sglang.srt.plugins.hook_registry import HookType

from sglang_diffxkv.patches.hook import hook
from sglang_diffxkv.pool.allocator import DiffXKVAllocator, find_allocator
from sglang_diffxkv.pool.window_allocator import DiffXKVWindowAllocator

if TYPE_CHECKING:
    from fastapi import FastAPI

KEY = "diffxkv_check"


def _accept(key: str, value: Any) -> None:
    """Nothing to be refused."""


def _add_handler(result: dict[str, Any], self: Any) -> dict[str, Any]:
    scheduler = self.scheduler
    allocator = scheduler.token_to_kv_pool_allocator
    if find_allocator(allocator) is None:
        return result

    def check(key: str, value: Any) -> None:
        setattr(scheduler, KEY, run_check(allocator))

    return result | {KEY: _UpdateHandler(_accept, check)}


def run_check(allocator: DiffXKVAllocator | DiffXKVWindowAllocator) -> dict[str, Any]:
    """What its `check` finds on this rank, and how many ranks found something."""
    begin = time.perf_counter()
    if torch.device(allocator.device).type == "cuda":
        torch.cuda.synchronize()  # forward passes run on another stream
    violations = allocator.check()
    found = torch.tensor([float(bool(violations))], dtype=torch.float64)
    ours = find_allocator(allocator)
    assert ours is not None
    if bool(ours.store.agree(found)) and not violations:
        violations = ["another rank has found violations: see its log"]
    return {"violations": violations, "seconds": time.perf_counter() - begin}


def _add_result(result: Any, self: Any, state: dict[str, Any]) -> None:
    found = getattr(self.scheduler, KEY, None)
    if found is not None:
        state[KEY] = found


def add_route(app: FastAPI) -> None:
    """Add ``POST /diffxkv/check``."""
    from sglang.srt.entrypoints import http_server
    from sglang.srt.managers.io_struct import SetInternalStateReq

    @app.post("/diffxkv/check")
    async def diffxkv_check() -> list[dict[str, Any]] | dict[str, Any]:
        """Violations of the pool's invariants; a list where there are several data-parallel ranks.

        The scheduler does nothing else meanwhile: seconds on a large pool.
        """
        manager = http_server._global_state.tokenizer_manager
        await manager.set_internal_state(SetInternalStateReq(server_args={KEY: True}))
        states = await manager.get_internal_state()
        found = [state[KEY] for state in states if KEY in state]
        return found[0] if len(found) == 1 else found


def install() -> None:
    state = (
        "sglang.srt.managers.scheduler_components.internal_state.SchedulerInternalStateController"
    )
    hook(f"{state}._update_handlers", _add_handler, HookType.AFTER, ())
    hook(f"{state}._add_memory_usage", _add_result, HookType.AFTER, ("state",))
