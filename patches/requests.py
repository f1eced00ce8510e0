# SPDX-License-Identifier: Apache-2.0
"""Hook: ``GET /diffxkv/requests`` says what each running request holds.

It reaches the scheduler as SGLang's request for the internal state, under an id of ours, and gets
the list alone: nothing of it costs anything unless somebody asks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from sglang.srt.managers.io_struct import GetInternalStateReq, GetInternalStateReqOutput
from sglang.srt.plugins.hook_registry import HookType

from sglang_diffxkv.patches.hook import hook
from sglang_diffxkv.pool.allocator import DiffXKVAllocator, find_allocator
from sglang_diffxkv.pool.held import held

if TYPE_CHECKING:
    from fastapi import FastAPI

KEY = "diffxkv_requests"


def running_requests(allocator: DiffXKVAllocator, req_to_token: Any) -> list[dict[str, Any]]:
    """What each running request holds; waits for the device.

    Args:
        req_to_token: int32 [max_requests, max_context], SGLang's ``ReqToTokenPool`` table.
    """
    holding = held(allocator.store, allocator.running, req_to_token)
    by_index = allocator.running.by_index
    return [
        {
            "rid": by_index[index].request.rid,
            "quality": by_index[index].quality.name.lower(),
            "cached_tokens": by_index[index].request.cached_tokens,
            **pages._asdict(),
        }
        for index, pages in holding.items()
    ]


def _answer(
    original: Callable[..., Any], self: Any, recv_req: GetInternalStateReq
) -> GetInternalStateReqOutput:
    allocator = find_allocator(self.scheduler.token_to_kv_pool_allocator)
    if recv_req.rid != KEY or allocator is None:
        return original(self, recv_req)
    found = running_requests(allocator, self.scheduler.req_to_token_pool.req_to_token)
    return GetInternalStateReqOutput(internal_state={KEY: found})


def add_route(app: FastAPI) -> None:
    """Add ``GET /diffxkv/requests``."""
    from sglang.srt.entrypoints import http_server

    @app.get("/diffxkv/requests")
    async def diffxkv_requests() -> list[dict[str, Any]]:
        """What each running request holds, those of all data-parallel ranks."""
        manager = http_server._global_state.tokenizer_manager
        manager.auto_create_handle_loop()
        answers = await manager.get_internal_state_communicator(GetInternalStateReq(rid=KEY))
        return [request for answer in answers for request in answer.internal_state.get(KEY, ())]


def install() -> None:
    state = (
        "sglang.srt.managers.scheduler_components.internal_state.SchedulerInternalStateController"
    )
    hook(f"{state}.get_internal_state", _answer, HookType.AROUND, ("recv_req",))
