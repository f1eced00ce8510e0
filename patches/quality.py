# SPDX-License-Identifier: Apache-2.0
"""Hook: the quality that a request asks for, from where it is tokenized to the scheduler.

It is settled where SGLang makes a request's sampling parameters, whatever endpoint it came by, and
noted where it enters the scheduler. Pages are shared by requests of one quality only: it becomes a
part of the request's ``cache_salt``, which divides the radix tree, and which, unlike ``extra_key``,
SGLang hashes into the blocks of its KV events and names in them. Balanced requests share with those
that ask for nothing, and their blocks have SGLang's own hashes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sglang.srt.managers.io_struct import TokenizedEmbeddingReqInput
from sglang.srt.plugins.hook_registry import HookType

from sglang_diffxkv.patches.asked import (
    QualityError,
    agreed,
    asked_in_params,
    requested_quality,
    with_quality,
)
from sglang_diffxkv.patches.hook import hook
from sglang_diffxkv.patches.http_app import ASKED, server_policy
from sglang_diffxkv.patches.server_args import is_active
from sglang_diffxkv.policy.quality import Quality
from sglang_diffxkv.pool.allocator import find_allocator

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req

_MARK = "|diffxkv:"
_QUALITY = "diffxkv_quality"


def _settle(result: Any, self: Any, obj: Any, *args: Any, **kwargs: Any) -> None:
    """A ValueError from here is HTTP 400, for `sglang.Engine` an exception."""
    if not is_active():
        return
    policy, params = server_policy(), result.sampling_params
    asked = agreed(ASKED.get(), asked_in_params(obj.sampling_params.get("custom_params"), policy))
    if asked is None:  # so that what the server prefers holds
        asked = asked_in_params(params.custom_params, policy)
    if asked is None:
        return
    if isinstance(result, TokenizedEmbeddingReqInput) and asked.level != "balanced":
        raise QualityError(f"{asked.where} = {asked.level!r}: only what generates has a quality")
    params.custom_params = with_quality(params.custom_params, asked)


def _note(req: Req, self: Any, recv_req: Any, *args: Any, **kwargs: Any) -> None:
    allocator = find_allocator(self.token_to_kv_pool_allocator)
    if allocator is None:
        return
    try:
        policy = type(allocator.store.policy)
        quality = requested_quality(recv_req.sampling_params.custom_params, policy)
    except QualityError as error:  # it came by another way than through SGLang's tokenizer
        req.set_finish_with_abort(str(error))
        return
    set_quality(req, quality)
    req.cache_salt = namespace(req.cache_salt, quality)


def namespace(salt: str | None, quality: Quality) -> str | None:
    """A client's ``salt``, with the quality of its request as the last part.

    Whatever a client writes, nobody gets into the namespace of another quality than his own. One
    that writes what we would has it as it is: routers can so look for blocks of one quality.
    """
    salt = salt or ""
    mark = f"{_MARK}{quality.name.lower()}"
    if salt.endswith(mark) or (quality is Quality.BALANCED and _MARK not in salt):
        return salt or None
    return salt + mark


def set_quality(req: Req, quality: Quality) -> None:
    setattr(req, _QUALITY, quality)


def quality_of(req: Req) -> Quality:
    """What a request in the scheduler asked for."""
    return getattr(req, _QUALITY, Quality.BALANCED)


def install() -> None:
    manager = "sglang.srt.managers.tokenizer_manager.TokenizerManager"
    hook(f"{manager}._create_tokenized_object", _settle, HookType.AFTER, ("obj",))
    scheduler = "sglang.srt.managers.scheduler.Scheduler"
    hook(f"{scheduler}._create_generation_req", _note, HookType.AFTER, ("recv_req",))
