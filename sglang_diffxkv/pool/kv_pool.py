# SPDX-License-Identifier: Apache-2.0
"""SGLang's view of the page store: a KV pool that stores by virtual token slot."""

from __future__ import annotations

import logging
from typing import Any, NamedTuple, NoReturn

import torch
from sglang.srt.constants import GPU_MEMORY_TYPE_KV_CACHE
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool, unwrap_write_loc

from sglang_diffxkv.policy.base import TierPolicy
from sglang_diffxkv.pool.ranks import Agree, alone
from sglang_diffxkv.pool.sizing import PoolSizes
from sglang_diffxkv.pool.store import PageStore

logger = logging.getLogger(__name__)


class PoolSetup(NamedTuple):
    """What was decided when memory was sized, for the pool that is built later."""

    policy: TierPolicy
    sizes: PoolSizes
    agree: Agree = alone
    window_tokens: int = 0
    """Of the pool of layers with a sliding window, which is SGLang's."""


class DiffXKVPool(MHATokenToKVPool):
    """``MHATokenToKVPool`` whose bytes live in a :class:`PageStore`.

    Token slots are virtual: ``slot // 64`` is a page of the directory. Reading K/V by slot is
    impossible for sealed pages, so SGLang's buffer getters raise. Of models with other kinds of
    layers, too, it holds the full-attention layers, in one of SGLang's composite pools.

    Attributes:
        model_layer_ids: the model's ids of its layers (SGLang's; composite pools assign them).
    """

    model_layer_ids: tuple[int, ...]

    def __init__(self, *args: Any, setup: PoolSetup, **kwargs: Any) -> None:
        self._setup = setup
        super().__init__(*args, **kwargs)

    def _create_buffers(self) -> None:
        policy, sizes, agree, _ = self._setup
        layout = policy.layout
        if (self.head_num, self.head_dim, self.layer_num) != (
            layout.num_kv_heads,
            layout.head_dim,
            sizes.num_layers,
        ) or self.size != sizes.virtual_tokens:
            raise RuntimeError("diffxkv: the pool was sized for another model shape")
        with self.memory_saver_adapter.region(GPU_MEMORY_TYPE_KV_CACHE):
            self.store = PageStore(sizes, policy, self.dtype, self.device, agree)
        # SGLang keeps views and pointer tables of these; the raw pages are the real thing.
        self.k_buffer = [k.flatten(0, 1) for k in self.store.raw.keys]
        self.v_buffer = [v.flatten(0, 1) for v in self.store.raw.values]
        self._init_data_ptrs_and_strides()

    def _finalize_allocation_log(self, num_tokens: int) -> None:
        store, sizes, mib = self.store, self._setup.sizes, 2**20
        self.mem_usage = store.nbytes / 2**30
        logger.info(
            "DiffXKV pool: policy=%s, %.1f MiB = %d raw pages (%.1f MiB) + %d frames of %d B "
            "(%.1f MiB) + directory of %d virtual pages (%.1f MiB); about %d tokens, "
            "the same bytes hold %d uncompressed tokens",
            store.policy.name,
            store.nbytes / mib,
            sizes.raw_pages,
            store.raw.nbytes / mib,
            sizes.frames,
            store.layout.frame_bytes,
            store.arena.nbytes / mib,
            sizes.virtual_pages,
            store.directory.nbytes / mib,
            sizes.expected_tokens,
            store.nbytes // sizes.dense_page_bytes * self.page_size,
        )

    def get_kv_size_bytes(self) -> tuple[int, int]:
        """As a pair, which composite pools add up; ours are not divided into keys and values."""
        return self.store.nbytes, 0

    @property
    def store_layers(self) -> dict[int, int]:
        """Indices in the store, by the model's ids of its layers."""
        return {layer: index for index, layer in enumerate(self.model_layer_ids)}

    def set_kv_buffer(
        self,
        layer: Any,
        loc_info: Any,
        cache_k: torch.Tensor,
        cache_v: torch.Tensor,
        *scales: Any,
        layer_id_override: int | None = None,
        **others: Any,
    ) -> None:
        """Write K/V [T, H, D] of one layer to virtual slots (``MHATokenToKVPool.set_kv_buffer``).

        Args:
            scales, others: of KV in fp8, and where a sequence's KV is on several ranks.
            layer_id_override: index in the store, where a composite pool asks.

        Raises:
            PageStateError: a slot's page is not open.
        """
        loc, _, _ = unwrap_write_loc(loc_info)
        index = layer_id_override
        if index is None:
            index = self.store_layers[layer.layer_id]
        self.store.raw.write(index, self.store.write_rows(loc), cache_k, cache_v)

    def _unreadable(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise RuntimeError("diffxkv: sealed K/V can only be read through the diffxkv backend")

    get_key_buffer = get_value_buffer = get_kv_buffer = _unreadable
    get_cpu_copy = load_cpu_copy = move_kv_cache = _unreadable
    get_contiguous_buf_infos = get_device_pool_infos = _unreadable


def find_pool(pool: Any) -> DiffXKVPool | None:
    """Ours: ``pool`` itself, or the full-attention layers' in a composite one of SGLang's."""
    found = getattr(pool, "full_kv_pool", pool)
    return found if isinstance(found, DiffXKVPool) else None
