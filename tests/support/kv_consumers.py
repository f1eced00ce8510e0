# SPDX-License-Identifier: Apache-2.0
"""Routers that read KV events off the wire, after what their sources do, in few lines.

Both name one worker here. Neither uses SGLang's classes: what they make of the bytes is theirs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

import msgspec

Tokens = tuple[Any, ...]


def events_of(payload: bytes) -> list[dict[str, Any]]:
    """A batch is an array of time, events and rank; an event is a map that names its type."""
    _, events, *_ = msgspec.msgpack.decode(payload)
    return list(events)


class Dynamo:
    """Dynamo's publisher and KV router (lib/kv-router: `zmq_wire`, `indexer/lower_tier.rs`,
    `indexer/concurrent_radix_tree_compressed`; lib/llm: `kv_router/publisher/dedup.rs`).

    - Media it does not know are dropped (before 1.4 they were the device's).
    - A block that was stored twice on a tier is there until it is removed twice.
    - On the device a block whose parent is not there is refused, and a block that goes takes those
      behind it along. Here all of them; Dynamo's edges may end before.
    - Below it blocks are edges from parent to child, in any order; what is removed and not there is
      ignored everywhere.
    - A prompt is matched on the device first, where that ends on the host, then on the disk.

    Attributes:
        refused: hashes of blocks without a parent on the device.
    """

    TIERS: ClassVar = {
        **dict.fromkeys(("GPU", "DEVICE"), "device"),
        **dict.fromkeys(("CPU", "CPU_PINNED", "CPU_TIER1"), "host"),
        **dict.fromkeys(("CPU_TIER2", "DISK", "NVME", "STORAGE"), "disk"),
    }

    def __init__(self, block_size: int) -> None:
        self.refused: list[int] = []
        self._block_size = block_size
        self._copies: Counter[tuple[str, int]] = Counter()
        self._device: dict[int, int | None] = {}
        self._edges: dict[str, dict[tuple[int | None, Tokens], int]]
        self._edges = {"device": {}, "host": {}, "disk": {}}

    def take(self, payload: bytes) -> None:
        for event in events_of(payload):
            tier = self.TIERS.get(event.get("medium") or "GPU")
            if event["type"] == "AllBlocksCleared":
                self.__init__(self._block_size)  # type: ignore[misc]
            elif tier is not None and event["type"] == "BlockStored":
                self._store(tier, event)
            elif tier is not None and event["type"] == "BlockRemoved":
                self._remove(tier, event["block_hashes"])

    def on(self, tier: str) -> set[int]:
        """Hashes of the blocks that it believes in."""
        return set(self._edges[tier].values())

    def match(self, prompt: Sequence[int], salt: str | None) -> dict[str, int]:
        """Blocks of a prompt that it finds on each tier."""
        size = self._block_size
        pages = [tuple(prompt[i : i + size]) for i in range(0, len(prompt) // size * size, size)]
        parent: int | None = None
        found = dict.fromkeys(self._edges, 0)
        for tier, edges in self._edges.items():
            while pages and (parent, (salt, pages[0])) in edges:
                parent = edges[parent, (salt, pages.pop(0))]
                found[tier] += 1
        return found

    def _store(self, tier: str, event: dict[str, Any]) -> None:
        parent, size = event["parent_block_hash"], event["block_size"]
        assert size == self._block_size, "blocks of another size are not published"
        names = event["block_hashes"]
        assert len({parent, *names}) == len(names) + 1, "a block that refers to itself"
        for i, block in enumerate(names):
            self._copies[tier, block] += 1
            if tier == "device" and parent is not None and parent not in self._device:
                self.refused.append(block)
            else:
                tokens = tuple(event["token_ids"][i * size : (i + 1) * size])
                self._edges[tier][parent, (event.get("cache_salt"), tokens)] = block
                if tier == "device":
                    self._device[block] = parent
            parent = block

    def _remove(self, tier: str, blocks: Iterable[int]) -> None:
        for block in blocks:
            self._copies[tier, block] -= 1
            if self._copies[tier, block] <= 0:
                del self._copies[tier, block]
                self._drop(tier, {block})

    def _drop(self, tier: str, gone: set[int]) -> None:
        while tier == "device":
            behind = {block for block, parent in self._device.items() if parent in gone} - gone
            if not behind:
                self._device = {b: p for b, p in self._device.items() if b not in gone}
                break
            gone |= behind
        edges = self._edges[tier]
        self._edges[tier] = {edge: block for edge, block in edges.items() if block not in gone}


class LlmD:
    """llm-d's indexer (llm-d-kv-cache: `kvevents/pool.go`, `kvcache/kvblock/in_memory.go`,
    `kvcache/kvblock_scorer.go`), which reads maps from v0.9 on, as engine `vllm`.

    - A medium's name, in lower case, is a tier; one without a weight of its own counts in full.
    - Blocks are found by a hash of their tokens and their parent's, which no salt is part of.
    - A block whose parent it knows nowhere is refused: what moves is stored before it is removed.
    - What is removed and not there is ignored.

    Attributes:
        refused: hashes of blocks without a parent.
        weights: as configured; the default is llm-d's own.
    """

    def __init__(self, weights: dict[str, float] | None = None) -> None:
        self.refused: list[int] = []
        self.weights = {"gpu": 1.0, "cpu": 0.8} if weights is None else weights
        self._requests: dict[int, Tokens] = {}
        self._tiers: dict[Tokens, set[str]] = {}

    def take(self, payload: bytes) -> None:
        for event in events_of(payload):
            tier = (event.get("medium") or "gpu").lower()
            if event["type"] == "AllBlocksCleared":
                self._tiers.clear()
            elif event["type"] == "BlockStored":
                self._store(tier, event)
            elif event["type"] == "BlockRemoved":
                for block in event["block_hashes"]:
                    self._remove(tier, block)

    def on(self, tier: str) -> set[int]:
        """Hashes of the blocks that it believes in."""
        return {b for b, request in self._requests.items() if tier in self._tiers.get(request, ())}

    def score(self, prompt: Sequence[int], block_size: int) -> float:
        """Of this worker for a prompt."""
        score, request = 0.0, ()
        for start in range(0, len(prompt) // block_size * block_size, block_size):
            request = (*request, *prompt[start : start + block_size])
            tiers = self._tiers.get(request)
            if not tiers:
                break
            score += max(self.weights.get(tier, 1.0) for tier in tiers)
        return score

    def _store(self, tier: str, event: dict[str, Any]) -> None:
        parent, size = event["parent_block_hash"], event["block_size"]
        request: Tokens = ()
        if parent is not None:
            if parent not in self._requests:
                self.refused += event["block_hashes"]
                return
            request = self._requests[parent]
        for i, block in enumerate(event["block_hashes"]):
            request = (*request, *event["token_ids"][i * size : (i + 1) * size])
            self._requests[block] = request
            self._tiers.setdefault(request, set()).add(tier)

    def _remove(self, tier: str, block: int) -> None:
        request = self._requests.get(block)
        if request is None:
            return
        tiers = self._tiers.get(request, set())
        tiers.discard(tier)
        if not tiers:
            self._tiers.pop(request, None)
            del self._requests[block]
