# SPDX-License-Identifier: Apache-2.0
"""Seam: the quality that a request asks for, from ``custom_params`` to the row of its pages.

It is checked where the request enters the server, so that a mistake is answered with HTTP 400, and
noted where it enters the scheduler. Pages are shared by requests of one quality only: it becomes a
part of the request's ``extra_key``, SGLang's namespaces in the radix tree. Balanced requests share
with those that ask for nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sglang.srt.plugins.hook_registry import HookType

from sglang_diffxkv.patches.seam import hook
from sglang_diffxkv.patches.server_args import get_config, is_active
from sglang_diffxkv.policy.quality import Quality, QualityError, requested_quality
from sglang_diffxkv.policy.registry import policy_class
from sglang_diffxkv.pool.allocator import DiffXKVAllocator
from sglang_diffxkv.pool.request_rows import RequestRows, RunningRequest

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req

_MARK = "|diffxkv:"
_QUALITY = "diffxkv_quality"
_ALLOCATOR = "diffxkv_allocator"


def follow_rows(req_to_token_pool: Any, allocator: DiffXKVAllocator, rows: RequestRows) -> None:
    """Keep ``rows`` up to date with the requests that get rows of ``req_to_token_pool``."""
    allocator.rows = rows
    setattr(req_to_token_pool, _ALLOCATOR, allocator)


def _check(result: None, self: Any, vocab_size: int) -> None:
    """A ValueError from here is HTTP 400, for `sglang.Engine` an exception."""
    if is_active() and self.custom_params:
        requested_quality(self.custom_params, policy_class(get_config().policy))


def _note(req: Req, self: Any, recv_req: Any, *args: Any, **kwargs: Any) -> None:
    allocator = self.token_to_kv_pool_allocator
    if not isinstance(allocator, DiffXKVAllocator):
        return
    try:
        policy = type(allocator.store.policy)
        quality = requested_quality(recv_req.sampling_params.custom_params, policy)
    except QualityError as error:  # from a process that loads no plugins, so that it went unchecked
        req.set_finish_with_abort(str(error))
        return
    set_quality(req, quality)
    # Whatever a client writes into its key, the last part of it is ours where it matters.
    if quality is not Quality.BALANCED or _MARK in (req.extra_key or ""):
        req.extra_key = f"{req.extra_key or ''}{_MARK}{quality.name.lower()}"


def _enter_rows(result: list[int] | None, self: Any, reqs: list[Req]) -> None:
    allocator: DiffXKVAllocator | None = getattr(self, _ALLOCATOR, None)
    if allocator is not None and allocator.rows is not None and result:
        step = allocator.store.next_step
        running = [RunningRequest(quality_of(req), step, req) for req in reqs]
        allocator.rows.enter(result, running)


def _leave_rows(result: None, self: Any, indices: list[int]) -> None:
    allocator: DiffXKVAllocator | None = getattr(self, _ALLOCATOR, None)
    if allocator is not None and allocator.rows is not None:
        allocator.rows.leave(indices)


def set_quality(req: Req, quality: Quality) -> None:
    setattr(req, _QUALITY, quality)


def quality_of(req: Req) -> Quality:
    """What a request in the scheduler asked for."""
    return getattr(req, _QUALITY, Quality.BALANCED)


def install() -> None:
    hook(
        "sglang.srt.sampling.sampling_params.SamplingParams.verify",
        _check,
        HookType.AFTER,
        ("vocab_size",),
    )
    scheduler = "sglang.srt.managers.scheduler.Scheduler"
    hook(f"{scheduler}._create_generation_req", _note, HookType.AFTER, ("recv_req",))
    rows = "sglang.srt.mem_cache.memory_pool.ReqToTokenPool"
    hook(f"{rows}.alloc", _enter_rows, HookType.AFTER, ("reqs",))
    hook(f"{rows}.free_rows", _leave_rows, HookType.AFTER, ("indices",))
