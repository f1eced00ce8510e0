# SPDX-License-Identifier: Apache-2.0
"""Seam: lossless requests are admitted on raw pages, which sealing does not free."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from sglang.srt.managers.schedule_policy import AddReqResult
from sglang.srt.plugins.hook_registry import HookType

from sglang_diffxkv.kernels.layout import PAGE_TOKENS
from sglang_diffxkv.patches.quality import quality_of, set_quality
from sglang_diffxkv.patches.seam import hook
from sglang_diffxkv.policy.quality import Quality

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req

_WAITS = "diffxkv_lossless_waits"


def _limit_length(self: Any, req: Req) -> None:
    """Clip a lossless request to the raw pages that it can have, as SGLang clips to the pool."""
    allocator = self.token_to_kv_pool_allocator
    if quality_of(req) is not Quality.LOSSLESS or req.to_finish is not None:
        return
    capacity = allocator.lossless_pages * PAGE_TOKENS
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
    if quality_of(req) is not Quality.LOSSLESS:
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
        if quality_of(req) is Quality.LOSSLESS
    ]
    return sum(-(-n // PAGE_TOKENS) for n in tokens)


def install() -> None:
    scheduler = "sglang.srt.managers.scheduler.Scheduler"
    hook(f"{scheduler}.init_req_max_new_tokens", _limit_length, HookType.BEFORE, ("req",))
    adder = "sglang.srt.managers.schedule_policy.PrefillAdder"
    hook(f"{adder}.add_one_req", _admit, HookType.AROUND, ("req",))
