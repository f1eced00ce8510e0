# SPDX-License-Identifier: Apache-2.0
"""KV events that tell on which level a cached block lies.

SGLang's radix tree sees pages come and go; that they lie on the host meanwhile, or on the disk, it
does not know. Consumers get from us what HiCache tells them, in its order: a block is stored where
it goes before it is removed where it was, parents are named first, and sessions only on the device.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from sglang.srt.disaggregation.kv_events import (
    AllBlocksCleared,
    BlockRemoved,
    BlockStored,
    StorageMedium,
)
from sglang.srt.mem_cache.events import KVCacheEventRecorder

from sglang_diffxkv.offload.blocks import Block, blocks_of, in_chains

GPU, HOST, DISK = StorageMedium.GPU, StorageMedium.CPU, StorageMedium.DISK


class LevelRecorder:
    """Stands before the recorder of a tree, Rust's or Python's, and is a `LevelEvents`.

    A block is known by the hash in its events, which is the first number of its page's key.
    """

    def __init__(self, recorder: Any, page_size: int) -> None:
        self._recorder = recorder
        self._events = KVCacheEventRecorder(enabled=True, page_size=page_size)
        self._blocks: dict[int, Block] = {}
        self._of_disk: deque[tuple[bool, Sequence[bytes]]] = deque()
        self._adopting = False

    def __getattr__(self, name: str) -> Any:
        """What the tree calls: ``record_store`` and the like."""
        return getattr(self._recorder, name)

    def __len__(self) -> int:
        """Blocks that are remembered."""
        return len(self._blocks)

    def take(self) -> list[Any]:
        """All events since the last call, as SGLang's recorder gives them."""
        self._follow()
        return self._events.take()

    def offloaded(self, keys: torch.Tensor) -> None:
        moved = [block for block in self._named(keys) if block.to_host()]
        self._tell(moved, HOST, GPU)

    def loaded_back(self, keys: torch.Tensor) -> None:
        moved = [block for block in self._named(keys) if block.to_device()]
        self._tell(moved, GPU, HOST)

    @contextmanager
    def adopting(self) -> Iterator[None]:
        self._follow()
        self._adopting = True
        try:
            yield
        finally:
            self._follow()
            self._adopting = False

    def backing_up(self, keys: Sequence[bytes]) -> None:
        self._follow()
        for block in self._find(map(block_hash, keys)):
            block.writing = True

    def backed_up(self, keys: Sequence[bytes]) -> None:
        self._of_disk.append((True, keys))

    def dropped_from_disk(self, keys: Sequence[bytes]) -> None:
        self._of_disk.append((False, keys))

    def _named(self, keys: torch.Tensor) -> list[Block]:
        self._follow()
        return list(self._find(keys[:, 0].tolist()))

    def _find(self, hashes: Iterable[int]) -> Iterator[Block]:
        return (self._blocks[x] for x in hashes if x in self._blocks)

    def _tell(self, blocks: list[Block], stored: StorageMedium, removed: StorageMedium) -> None:
        self._tell_stored(blocks, stored)
        self._tell_removed([block.hash for block in in_chains(blocks)], removed)

    def _tell_stored(self, blocks: list[Block], medium: StorageMedium) -> None:
        for block in in_chains(blocks):
            self._events.enqueue(block.stored(medium))

    def _tell_removed(self, hashes: list[int], medium: StorageMedium) -> None:
        if hashes:
            self._events.enqueue(BlockRemoved(block_hashes=hashes, medium=medium))

    def _follow(self) -> None:
        """Take in what the tree and the disk's threads have said."""
        for event in self._recorder.take():
            if isinstance(event, BlockStored):
                self._cached(event)
            elif isinstance(event, BlockRemoved):
                self._evicted(event)
            else:
                self._cleared(event)
        while self._of_disk:
            written, keys = self._of_disk.popleft()
            (self._written if written else self._dropped)(map(block_hash, keys))

    def _cached(self, event: BlockStored) -> None:
        for fresh in blocks_of(event):
            block = self._blocks.setdefault(fresh.hash, fresh)
            block.host += self._adopting
            block.device += not self._adopting
        event.medium = HOST if self._adopting else GPU
        self._events.enqueue(event)

    def _evicted(self, event: BlockRemoved) -> None:
        """The tree has forgotten pages, wherever they lay."""
        on_device, on_host = [], []
        for block in self._find(event.block_hashes):
            if block.device:
                block.device -= 1
                on_device.append(block.hash)
            elif block.host:
                block.host -= 1
                on_host.append(block.hash)
            self._forget(block)
        self._tell_removed(on_device, GPU)
        self._tell_removed(on_host, HOST)

    def _cleared(self, event: AllBlocksCleared) -> None:
        """Consumers forget all levels, and the disk does not."""
        self._events.enqueue(event)
        for block in list(self._blocks.values()):
            block.device = block.host = 0
            self._forget(block)
        self._tell_stored([block for block in self._blocks.values() if block.disk], DISK)

    def _written(self, hashes: Iterable[int]) -> None:
        fresh = []
        for block in self._find(hashes):
            if not block.disk:
                fresh.append(block)
            block.writing, block.disk = False, True
        self._tell_stored(fresh, DISK)

    def _dropped(self, hashes: Iterable[int]) -> None:
        gone = []
        for block in list(self._find(hashes)):
            if block.disk:
                gone.append(block.hash)
            block.writing = block.disk = False
            self._forget(block)
        self._tell_removed(gone, DISK)

    def _forget(self, block: Block) -> None:
        """Unless it is still on some level."""
        if not block.is_anywhere:
            self._blocks.pop(block.hash, None)


def block_hash(key: bytes) -> int:
    """What a page of this key is called in KV events."""
    return int.from_bytes(key[:8], "big", signed=True)
