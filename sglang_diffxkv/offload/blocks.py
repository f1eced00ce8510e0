# SPDX-License-Identifier: Apache-2.0
"""What SGLang's KV events said of the blocks that lie on any level, to say it again on another."""

from __future__ import annotations

import sys
from array import array
from collections.abc import Iterable, Iterator
from typing import Any

import msgspec
from sglang.srt.disaggregation.kv_events import BlockStored, StorageMedium


class Block(msgspec.Struct, gc=False):  # a million of them, and none refers to another
    """A page's block.

    ``device`` and ``host`` count the tree's pages of this block there: in SGLang's default format
    blocks of different ``extra_key`` have equal hashes.
    """

    hash: int
    parent: int | None
    tokens: array[int]
    """Two for each position where drafts are EAGLE's, whose tree is of pairs."""
    paired: bool
    salt: str | None
    lora: str | None
    device: int = 0
    host: int = 0
    disk: bool = False
    writing: bool = False

    @property
    def is_anywhere(self) -> bool:
        return bool(self.device or self.host or self.disk or self.writing)

    def to_host(self) -> bool:
        """Whether a page of it was on the device, and is on the host now."""
        if not self.device:
            return False
        self.device, self.host = self.device - 1, self.host + 1
        return True

    def to_device(self) -> bool:
        """The other way."""
        if not self.host:
            return False
        self.device, self.host = self.device + 1, self.host - 1
        return True

    def stored(self, medium: StorageMedium) -> BlockStored:
        tokens: list[Any] = self.tokens.tolist()
        if self.paired:
            tokens = list(zip(tokens[::2], tokens[1::2], strict=True))
        return BlockStored(
            block_hashes=[self.hash],
            parent_block_hash=self.parent,
            token_ids=tokens,
            block_size=len(tokens),
            lora_id=None,
            medium=medium,
            cache_salt=self.salt,
            lora_name=self.lora,
        )


def blocks_of(event: BlockStored) -> Iterator[Block]:
    """The chain of blocks that an event names."""
    parent, size = event.parent_block_hash, event.block_size
    paired = bool(event.token_ids) and isinstance(event.token_ids[0], tuple | list)
    salt = event.cache_salt and sys.intern(event.cache_salt)
    lora = event.lora_name and sys.intern(event.lora_name)
    for i, block in enumerate(event.block_hashes):
        tokens = event.token_ids[i * size : (i + 1) * size]
        flat = [token for pair in tokens for token in pair] if paired else tokens
        yield Block(block, parent, array("I", flat), paired, salt, lora)
        parent = block


def in_chains(blocks: Iterable[Block]) -> Iterator[Block]:
    """Parents before their children, which follow at once: SGLang merges such events to one."""
    of_parent: dict[int | None, list[Block]] = {}
    for block in blocks:
        of_parent.setdefault(block.parent, []).append(block)
    inside = {block.hash for siblings in of_parent.values() for block in siblings}
    first = [parent for parent in of_parent if parent not in inside]
    stack = [block for parent in first for block in of_parent[parent]][::-1]
    while stack:
        block = stack.pop()
        yield block
        stack += reversed(of_parent.pop(block.hash, []))
