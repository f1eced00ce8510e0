# SPDX-License-Identifier: Apache-2.0
"""Seam: the quality that a request asks for, from ``custom_params`` to the row of its pages.

It is checked where the request enters the server, so that a mistake is answered with HTTP 400, and
noted where it enters the scheduler. Pages are shared by requests of one quality only: it becomes a
part of the request's ``extra_key``, SGLang's namespaces in the radix tree. Balanced requests share
with those that ask for nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from sglang.srt.managers.schedule_policy import AddReqResult
from sglang.srt.plugins.hook_registry import HookType

from sglang_diffxkv.kernels.layout import PAGE_TOKENS
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
_WAITS = "diffxkv_lossless_waits"


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
    setattr(req, _QUALITY, quality)
    # Whatever a client writes into its key, the last part of it is ours where it matters.
    if quality is not Quality.BALANCED or _MARK in (req.extra_key or ""):
        req.extra_key = f"{req.extra_key or ''}{_MARK}{quality.name.lower()}"


def _enter_rows(result: list[int] | None, self: Any, reqs: list[Req]) -> None:
    allocator: DiffXKVAllocator | None = getattr(self, _ALLOCATOR, None)
    if allocator is not None and allocator.rows is not None and result:
        step = allocator.store.next_step
        running = [RunningRequest(_quality(req), step) for req in reqs]
        allocator.rows.enter(result, running)


def _leave_rows(result: None, self: Any, indices: list[int]) -> None:
    allocator: DiffXKVAllocator | None = getattr(self, _ALLOCATOR, None)
    if allocator is not None and allocator.rows is not None:
        allocator.rows.leave(indices)


def _quality(req: Req) -> Quality:
    return getattr(req, _QUALITY, Quality.BALANCED)


def _limit_length(self: Any, req: Req) -> None:
    """Clip a lossless request to the raw pages that it can have, as SGLang clips to the pool."""
    allocator = self.token_to_kv_pool_allocator
    if _quality(req) is not Quality.LOSSLESS or req.to_finish is not None:
        return
    capacity = allocator.lossless_pages * PAGE_TOKENS
    room = capacity - len(req.origin_input_ids)
    if room > 0:
        params = req.sampling_params
        asked = room if params.max_new_tokens is None else params.max_new_tokens
        params.max_new_tokens = min(asked, room)
        return
    setattr(req, _QUALITY, Quality.BALANCED)  # so that its refusal waits for no raw pages
    req.set_finish_with_abort(
        f"quality 'lossless' keeps a request in raw pages, which hold {capacity} tokens here, but "
        f"the prompt has {len(req.origin_input_ids)}: shorten it, ask for another quality, or have "
        "raw_share or memory_bytes raised on the server"
    )


def _admit(
    original: Callable[..., AddReqResult], self: Any, req: Req, *args: Any, **kwargs: Any
) -> AddReqResult:
    """Pass a lossless request over until raw pages can hold it whole beside the others.

    Their pages are not freed by sealing, and a prompt between two chunks cannot be retracted: if
    two of them might need more than there is, each could wait for the other.
    """
    if _quality(req) is not Quality.LOSSLESS:
        return original(self, req, *args, **kwargs)
    running = () if self.running_batch is None else self.running_batch.reqs
    pages = _lossless_pages([*running, *self.can_run_list, req])
    if hasattr(self, _WAITS) or pages > self.token_to_kv_pool_allocator.lossless_pages:
        setattr(self, _WAITS, True)  # nor is any shorter one admitted before it
        return AddReqResult.CONTINUE
    return original(self, req, *args, **kwargs)


def _lossless_pages(reqs: Sequence[Req]) -> int:
    """Pages that the lossless ones of ``reqs`` hold when they are as long as they may get."""
    tokens = [
        len(req.origin_input_ids) + req.sampling_params.max_new_tokens
        for req in reqs
        if _quality(req) is Quality.LOSSLESS
    ]
    return sum(-(-n // PAGE_TOKENS) for n in tokens)


def install() -> None:
    hook(
        "sglang.srt.sampling.sampling_params.SamplingParams.verify",
        _check,
        HookType.AFTER,
        ("vocab_size",),
    )
    scheduler = "sglang.srt.managers.scheduler.Scheduler"
    hook(f"{scheduler}._create_generation_req", _note, HookType.AFTER, ("recv_req",))
    hook(f"{scheduler}.init_req_max_new_tokens", _limit_length, HookType.BEFORE, ("req",))
    adder = "sglang.srt.managers.schedule_policy.PrefillAdder"
    hook(f"{adder}.add_one_req", _admit, HookType.AROUND, ("req",))
    rows = "sglang.srt.mem_cache.memory_pool.ReqToTokenPool"
    hook(f"{rows}.alloc", _enter_rows, HookType.AFTER, ("reqs",))
    hook(f"{rows}.free_rows", _leave_rows, HookType.AFTER, ("indices",))
