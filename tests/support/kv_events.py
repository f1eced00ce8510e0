# SPDX-License-Identifier: Apache-2.0
"""A subscriber of SGLang's KV events that mirrors the prefix cache, as a router would."""

import hashlib
import threading
import time
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import NamedTuple, Self

import msgspec
import zmq
from sglang.srt.disaggregation.kv_events import (
    AllBlocksCleared,
    BlockRemoved,
    BlockStored,
    KVEventBatch,
    StorageMedium,
)

GPU, HOST, DISK = (x.value for x in (StorageMedium.GPU, StorageMedium.CPU, StorageMedium.DISK))
BATCHES = msgspec.msgpack.Decoder(KVEventBatch)


class Block(NamedTuple):
    """A page that the server says it holds."""

    tokens: tuple[int | tuple[int, int], ...]
    parent: int | None
    """Hash of the page before it."""
    salt: str | None


class Mirror:
    """`media` has each block that is stored, by its medium and its hash.

    `faults` has what a router could not make sense of: blocks that are stored or removed twice, or
    that are not the same on every medium.
    """

    def __init__(self) -> None:
        self.media: dict[str, dict[int, Block]] = {GPU: {}, HOST: {}, DISK: {}}
        self.faults: list[str] = []

    @property
    def blocks(self) -> dict[int, Block]:
        """Those in memory: what the radix tree has."""
        return self.media[HOST] | self.media[GPU]

    def clear(self) -> None:
        for blocks in self.media.values():
            blocks.clear()

    def count_by_salt(self) -> Counter[str | None]:
        return Counter(block.salt for block in self.blocks.values())

    def cached_tokens(self, prompt: Sequence[int], page: int, salt: str | None = None) -> int:
        """Tokens of `prompt` that a request with that salt should find; one is never looked up."""
        held, blocks = 0, self.blocks
        for block in block_hashes(prompt[:-1], page, salt):
            if block not in blocks:
                break
            held += page
        return held

    def take(self, payload: bytes) -> None:
        """A batch as it is published."""
        for event in BATCHES.decode(payload).events:
            self._apply(event)

    def _apply(self, event: BlockStored | BlockRemoved | AllBlocksCleared) -> None:
        if isinstance(event, BlockStored):
            parent, size = event.parent_block_hash, event.block_size
            for i, block in enumerate(event.block_hashes):
                tokens = tuple(event.token_ids[i * size : (i + 1) * size])
                self._store(event.medium or GPU, block, Block(tokens, parent, event.cache_salt))
                parent = block
        elif isinstance(event, BlockRemoved):
            medium = event.medium or GPU
            for block in event.block_hashes:
                if self.media[medium].pop(block, None) is None:
                    self.faults.append(f"{block} is removed from {medium}, and not there")
        else:
            self.clear()

    def _store(self, medium: str, name: int, block: Block) -> None:
        for other, blocks in self.media.items():
            if blocks.get(name, block) != block:
                self.faults.append(f"{name} is stored on {medium} as it is not on {other}")
        if name in self.media[medium]:
            self.faults.append(f"{name} is stored on {medium} twice")
        self.media[medium][name] = block


class CacheMirror(Mirror):
    """Listens on `endpoint` in a thread."""

    def __init__(self, endpoint: str) -> None:
        super().__init__()
        self._socket = zmq.Context.instance().socket(zmq.SUB)
        self._socket.connect(endpoint)
        self._socket.setsockopt(zmq.SUBSCRIBE, b"")
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._listen, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop.set()
        self._thread.join()
        self._socket.close()

    def _listen(self) -> None:
        while not self._stop.is_set():
            if self._socket.poll(100):
                self.take(self._socket.recv_multipart()[-1])


def block_hashes(tokens: Sequence[int], page: int, salt: str | None) -> Iterator[int]:
    """Hashes of the whole pages of a prompt, as a router computes them that knows SGLang's."""
    digest = b""
    if salt is not None:
        digest = hashlib.sha256(b"sglang-cache-salt-v1\0" + salt.encode()).digest()
    for start in range(0, len(tokens) // page * page, page):
        words = array("I", tokens[start : start + page]).tobytes()
        digest = hashlib.sha256(digest + words).digest()
        yield int.from_bytes(digest[:8], "big", signed=True)


def wait_until(condition: Callable[[], bool], seconds: float = 10.0) -> None:
    """Events arrive a moment after answers."""
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.1)
