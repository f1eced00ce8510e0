# SPDX-License-Identifier: Apache-2.0
"""Hook: lossless requests are admitted on raw pages, which sealing does not free."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, Any

from sglang.srt.managers.schedule_policy import AddReqResult
from sglang.srt.plugins.hook_registry import HookType
from sglang.srt.runtime_context import get_schedule

from sglang_diffxkv.kernels.layout import PAGE_TOKENS
from sglang_diffxkv.patches.hook import hook
from sglang_diffxkv.patches.quality import quality_of, set_quality
from sglang_diffxkv.policy.quality import Quality
from sglang_diffxkv.pool.allocator import find_allocator
from sglang_diffxkv.pool.shared_pages import distinct_pages, paged

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req

_WAITS = "diffxkv_lossless_waits"


def _limit_length(self: Any, req: Req) -> None:
    """Clip a lossless request to the raw pages that it can have, as SGLang clips to the pool."""
    if quality_of(req) is not Quality.LOSSLESS or req.to_finish is not None:
        return
    allocator = find_allocator(self.token_to_kv_pool_allocator)
    assert allocator is not None  # no other server has lossless requests
    capacity = allocator.capacity.lossless_pages * PAGE_TOKENS - allocator.capacity.drafts
    room = capacity - len(req.origin_input_ids)
    if room > 0:
        params = req.sampling_params
        asked = room if params.max_new_tokens is None else params.max_new_tokens
        params.max_new_tokens = min(asked, room)
        return
    set_quality(req, Quality.BALANCED)  # so that its refusal waits for no raw pages
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
    if quality_of(req) is Quality.LOSSLESS:
        if not _fits(self, req) and _preempts():
            self.preempt_to_schedule(req)
        if not _fits(self, req):
            setattr(self, _WAITS, True)  # nor is any shorter one admitted before it
            return AddReqResult.CONTINUE
    return original(self, req, *args, **kwargs)


def _preempts() -> bool:
    schedule = get_schedule()
    return schedule.enable_priority_scheduling and not schedule.disable_priority_preemption


def _preempt(original: Callable[[Any, Req], bool], self: Any, req: Req) -> bool:
    """Preempt nobody for a request that will not be admitted in this pass.

    The victim would be admitted again at once, and preempted again in the next step. SGLang asks
    when all rows are taken, `_admit` when raw pages are short: then lossless requests go.
    """
    if find_allocator(self.token_to_kv_pool_allocator) is None:
        return original(self, req)
    if self.memory_budget.closed:
        return False
    if quality_of(req) is not Quality.LOSSLESS:
        return original(self, req)
    req.init_next_round_input(self.tree_cache)  # whose pages it shares
    if _fits(self, req):
        return original(self, req)
    if not _preempt_lossless(original, self, req):
        setattr(self, _WAITS, True)  # so that `_admit` passes it over, and SGLang goes on
    return True


def _preempt_lossless(preempt: Callable[[Any, Req], bool], adder: Any, req: Req) -> bool:
    """Preempt lossless requests, the least important first, until raw pages can hold ``req``.

    Returns:
        Whether they can; if it shows beforehand that they cannot, nobody is preempted.
    """
    running = adder.running_batch.reqs
    victims = {r for r in running if _holds_raw_pages(r) and _outranks(adder, req, r)}
    if not victims or not _fits(adder, req, without=victims):
        return False
    preempted, spared = adder.preempt_list, [r for r in running if r not in victims]
    while not _fits(adder, req):
        adder.preempt_list = [*preempted, *spared]  # which SGLang leaves alone
        done = preempt(adder, req)
        preempted = [*preempted, *adder.preempt_list[len(preempted) + len(spared) :]]
        adder.preempt_list = preempted
        if not done:
            return False
        req.init_next_round_input(adder.tree_cache)
    return True


def _outranks(adder: Any, req: Req, running: Req) -> bool:
    """Whether SGLang would preempt ``running`` for ``req``."""
    more = req.priority - running.priority
    if get_schedule().schedule_low_priority_values_first:
        more = -more
    return bool(more > adder.priority_scheduling_preemption_threshold)


def _holds_raw_pages(req: Req) -> bool:
    return quality_of(req) is Quality.LOSSLESS and not req.finished()


def _fits(adder: Any, req: Req, without: Collection[Req] = ()) -> bool:
    """Whether raw pages can hold ``req`` and those admitted, each as long as it may get.

    A prefix that they share counts once: all who read it have its nodes locked, ``req`` from the
    moment that it is admitted. What nobody holds is cached, and evicted when its pages are needed.
    """
    if hasattr(adder, _WAITS):
        return False
    allocator = find_allocator(adder.token_to_kv_pool_allocator)
    assert allocator is not None  # no other server has lossless requests
    drafts = allocator.capacity.drafts
    running = () if adder.running_batch is None else adder.running_batch.reqs
    admitted = [r for r in (*running, *adder.can_run_list) if r not in without]
    sequences = [
        paged(r, len(r.origin_input_ids) + r.sampling_params.max_new_tokens + drafts)
        for r in (*admitted, req)
        if _holds_raw_pages(r)
    ]
    return distinct_pages(adder.tree_cache, sequences) <= allocator.capacity.lossless_pages


def install() -> None:
    scheduler = "sglang.srt.managers.scheduler.Scheduler"
    hook(f"{scheduler}.init_req_max_new_tokens", _limit_length, HookType.BEFORE, ("req",))
    adder = "sglang.srt.managers.schedule_policy.PrefillAdder"
    hook(f"{adder}.add_one_req", _admit, HookType.AROUND, ("req",))
    hook(f"{adder}.preempt_to_schedule", _preempt, HookType.AROUND, ("req",))
