# SPDX-License-Identifier: Apache-2.0
"""Hook: pages that a request brings into the radix tree get their keys, where anybody reads them.

Of some requests tokens do not say what their pages hold: those with images or embeddings, and those
with a LoRA adapter, whose id SGLang derives from its name and path. Theirs have no key.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from sglang.srt.plugins.hook_registry import HookType

from sglang_diffxkv.kernels.gpu.transfer import upload
from sglang_diffxkv.kernels.layout import PAGE_TOKENS
from sglang_diffxkv.offload.keys import PageKeys
from sglang_diffxkv.patches.hook import hook
from sglang_diffxkv.pool.allocator import find_allocator

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req

_KEYS = "diffxkv_page_keys"
_DYNAMO = "diffxkv_dynamo_keys"


def give_keys(tree: Any, *, dynamo: bool) -> None:
    """Have pages of an empty ``tree`` given keys from now on.

    Args:
        dynamo: whether KV events are published in Dynamo's format.
    """
    setattr(tree, _DYNAMO, dynamo)


def keys_of(tree: Any, req: Req) -> PageKeys | None:
    """Keys of the full pages of a request as far as it has grown; None: it has none."""
    if not hasattr(tree, _DYNAMO) or tree.tree_core.is_eagle:
        return None
    if any(
        x is not None
        for x in (req.multimodal_inputs, req.input_embeds, req.positional_embed_overrides)
    ):
        return None
    if req.lora_id is not None:
        return None
    keys: PageKeys | None = getattr(req, _KEYS, None)
    if keys is None:
        keys = PageKeys(req.extra_key, req.cache_salt, dynamo=getattr(tree, _DYNAMO))
        setattr(req, _KEYS, keys)
    keys.extend(req.full_untruncated_fill_ids)
    return keys


def _note(original: Callable[..., None], self: Any, req: Req, *args: Any, **kwargs: Any) -> None:
    """Those before had them when the request came, or have got them since."""
    start = req.kv.cache_protected_len // PAGE_TOKENS
    original(self, req, *args, **kwargs)
    end = req.kv.cache_protected_len // PAGE_TOKENS
    allocator, keys = find_allocator(self.token_to_kv_pool_allocator), None
    if start < end and allocator is not None:
        keys = keys_of(self, req)
    if allocator is None or keys is None:
        return
    row = self.req_to_token_pool.req_to_token[req.kv.req_pool_idx]
    pages = row[start * PAGE_TOKENS : end * PAGE_TOKENS : PAGE_TOKENS].long() // PAGE_TOKENS
    numbers = torch.from_numpy(keys.numbers(start, end))
    allocator.store.directory.key[pages] = upload(numbers, pages.device)


def install() -> None:
    tree = "sglang.srt.mem_cache.unified_radix_cache.UnifiedRadixCache"
    hook(f"{tree}.checkpoint_into_tree", _note, HookType.AROUND, ("req", "up_to"))
