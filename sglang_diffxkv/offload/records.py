# SPDX-License-Identifier: Apache-2.0
"""A page's payload as a record on disk: tables as metadata, frames as they are."""

from __future__ import annotations

import struct
from typing import NamedTuple, Self

import numpy as np
import torch

from sglang_diffxkv.kernels.layout import PageLayout
from sglang_diffxkv.offload.disk.record import Record
from sglang_diffxkv.pool.payload import FACTS, PagePayload
from sglang_diffxkv.pool.store import PageStore

MEANS_ID_BYTES = 8
_SHAPE = struct.Struct(f"<{MEANS_ID_BYTES}sHHH")  # key means, layers, KV heads, facts


class PageForm(NamedTuple):
    """What is the same of all pages that a server can read.

    Attributes:
        means_id: names the means that its sealed keys lack (`offload.means`).
    """

    layout: PageLayout
    num_layers: int
    means_id: bytes

    @classmethod
    def of(cls, store: PageStore, means_id: bytes | None) -> Self:
        assert means_id is not None
        return cls(store.layout, store.num_layers, means_id)

    @property
    def _prefix(self) -> bytes:
        shape = self.num_layers, self.layout.num_kv_heads, len(FACTS)
        return _SHAPE.pack(self.means_id, *shape)

    def metadata(self, page: PagePayload) -> bytes:
        tables = (page.heads, page.counts, page.facts)
        return self._prefix + b"".join(table.numpy().tobytes() for table in tables)

    def payload(self, record: Record) -> PagePayload | None:
        """None: it is not of this server's shape. The plan of another run has no number here."""
        layers, heads = self.num_layers, self.layout.num_kv_heads
        sizes = np.array([layers * heads * 2, layers, len(FACTS)])
        if not record.metadata.startswith(self._prefix):
            return None
        words = record.metadata[len(self._prefix) :]
        if len(words) != 4 * sizes.sum():
            return None
        table = torch.from_numpy(np.frombuffer(words, dtype=np.int32).copy())
        records, counts, facts = table.split(sizes.tolist())
        facts[FACTS.index("plan")] = 0
        frames = torch.from_numpy(record.payload)
        frame_bytes, allowed = self.layout.frame_bytes, self.layout.max_frames
        if frames.numel() != int(counts.sum()) * frame_bytes or int(counts.max()) > allowed:
            return None
        return PagePayload(
            records.view(layers, heads, 2), counts, frames.view(-1, frame_bytes), facts
        )
