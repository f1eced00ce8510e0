# SPDX-License-Identifier: Apache-2.0
"""A subscriber of SGLang's KV events that mirrors the prefix cache, as a router would."""

import threading
from types import TracebackType
from typing import Self

import msgspec
import zmq
from sglang.srt.disaggregation.kv_events import (
    AllBlocksCleared,
    BlockRemoved,
    BlockStored,
    KVEventBatch,
)


class CacheMirror:
    """Listens on `endpoint` in a thread; `blocks` maps each stored block's hash to its tokens."""

    def __init__(self, endpoint: str) -> None:
        self.blocks: dict[int, tuple[int, ...]] = {}
        self._socket = zmq.Context.instance().socket(zmq.SUB)
        self._socket.connect(endpoint)
        self._socket.setsockopt(zmq.SUBSCRIBE, b"")
        self._decoder = msgspec.msgpack.Decoder(KVEventBatch)
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
                for event in self._decoder.decode(self._socket.recv_multipart()[-1]).events:
                    self._apply(event)

    def _apply(self, event: BlockStored | BlockRemoved | AllBlocksCleared) -> None:
        if isinstance(event, BlockStored):
            size = event.block_size
            for i, block in enumerate(event.block_hashes):
                self.blocks[block] = tuple(event.token_ids[i * size : (i + 1) * size])
        elif isinstance(event, BlockRemoved):
            for block in event.block_hashes:
                del self.blocks[block]
        else:
            self.blocks.clear()
