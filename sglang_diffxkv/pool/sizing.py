# SPDX-License-Identifier: Apache-2.0
"""Dividing the memory budget into raw pages, frames and directory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from sglang_diffxkv.kernels.layout import PAGE_TOKENS, PageLayout
from sglang_diffxkv.pool.directory import ALIGNED_PAGES, PageDirectory
from sglang_diffxkv.pool.host_level import HostLevel
from sglang_diffxkv.pool.key_means import KeyMeans
from sglang_diffxkv.pool.raw_pages import RawPages
from sglang_diffxkv.pool.totals import Totals
from sglang_diffxkv.pool.workspace import Workspace, size_workspace

MIN_RAW_PAGES = 4
VIRTUAL_SLACK = 1.25
"""Virtual pages beyond the expected number, so that bytes and not page ids run out first."""
DEMOTION_SLACK = 2.0
"""The same where pages may be demoted: one at its floor has less than half of the frames that it
was sealed into."""
MAX_VIRTUAL_RATIO = 8
"""At most this many virtual pages per page that stock SGLang would hold in the same bytes: SGLang
keeps some tens of bytes per token slot of its own."""
FREE_LIST_BYTES = 8
"""SGLang's allocator keeps an int64 per free page."""


class PoolBudget(NamedTuple):
    """Memory for the pool, and how it is to be divided.

    Attributes:
        nbytes: the sum of all that is sized.
        raw_share: share of it for raw pages.
        virtual_slack: virtual pages per page that is expected to fit, raw pages aside.
        max_virtual_pages: user's bound (``--max-total-tokens``); memory beyond what so many
            uncompressed pages would take is then not allocated.
        attention_bytes: what attention keeps beside the pages, on a GPU.
        slot_bytes: what SGLang keeps for each token slot, beside what it does for any model.
        host_bytes: of host memory, for payload only: what pages there cost on the device is part of
            ``nbytes``.
        whole_bytes: what the user gave, of which other layers or the policy got the rest; 0: all of
            it is the pool's. A refusal speaks of it.
    """

    nbytes: int
    raw_share: float
    virtual_slack: float = VIRTUAL_SLACK
    max_virtual_pages: int | None = None
    attention_bytes: int = 0
    slot_bytes: int = 0
    host_bytes: int = 0
    whole_bytes: int = 0


class PoolSizes(NamedTuple):
    """How many of what; ``worst_frames`` is the most a page can need when it is sealed.

    ``host_pages`` of the virtual pages are there because of ``host_frames``, those in host memory.

    ``workspace`` and ``attention_bytes`` are memory that is taken when it is needed.
    """

    num_layers: int
    virtual_pages: int
    raw_pages: int
    frames: int
    worst_frames: int
    expected_frames: float
    dense_page_bytes: int
    workspace: Workspace
    attention_bytes: int
    host_frames: int = 0
    host_pages: int = 0

    @property
    def device_pages(self) -> int:
        """Virtual pages without those that are there for pages on the host."""
        return self.virtual_pages - self.host_pages

    @property
    def virtual_tokens(self) -> int:
        return self.virtual_pages * PAGE_TOKENS

    @property
    def expected_tokens(self) -> int:
        """Tokens that are expected to fit when all of their pages are sealed: what SGLang
        publishes as the capacity, as virtual pages are plenty by design."""
        pages = min(self.device_pages, int(self.frames / self.expected_frames))
        return pages * PAGE_TOKENS


def size_pool(
    budget: PoolBudget, layout: PageLayout, caps: Sequence[int], expected_fill: float
) -> PoolSizes:
    """Size everything so that its sum is at most the budget.

    Args:
        caps: bytes, by layer, that a sealed (page, layer) may take at most.
        expected_fill: share of its caps that a sealed page takes on average (policy's estimate).

    Raises:
        ValueError: the budget is too small to serve anything.
    """
    nbytes, raw_share, virtual_slack, max_virtual_pages, attention_bytes, slot_bytes = budget[:6]
    num_layers = len(caps)
    dense = 2 * num_layers * PAGE_TOKENS * layout.num_kv_heads * layout.row_bytes(0)
    if max_virtual_pages is not None:
        most = max_virtual_pages * (dense + PAGE_TOKENS * slot_bytes) + attention_bytes
        nbytes = min(nbytes, most)
    raw_bytes = RawPages.bytes_per_slot(
        num_layers, layout.num_kv_heads, layout.head_dim, layout.raw_itemsize
    )
    entry_bytes = PageDirectory.bytes_per_page(num_layers, layout) + FREE_LIST_BYTES
    entry_bytes += PAGE_TOKENS * slot_bytes
    if budget.host_bytes:
        entry_bytes += HostLevel.table_bytes_per_page(num_layers, layout)
    frame_bytes = layout.frame_bytes + 4
    worst = sum(-(-cap // layout.frame_bytes) for cap in caps)
    expected = max(1.0, worst * expected_fill)

    workspace = size_workspace(nbytes, layout, num_layers)
    fixed = workspace.nbytes + attention_bytes + Totals.bytes_for(num_layers)
    fixed += KeyMeans.bytes_for(num_layers, layout.num_kv_heads, layout.head_dim)
    host_frames = budget.host_bytes // layout.frame_bytes
    host_pages = int(virtual_slack * host_frames / expected)
    fixed += 4 * host_frames + host_pages * entry_bytes
    # One more slot takes padded tokens.
    open_bytes = raw_bytes + PAGE_TOKENS * slot_bytes
    raw_pages = int((nbytes - attention_bytes) * raw_share) // open_bytes - 1
    # Two entries of the directory are no pages: those of padded tokens, and of none. Others pad it.
    entries = raw_pages + 2 + ALIGNED_PAGES - 1
    rest = nbytes - fixed - (raw_pages + 1) * raw_bytes - entries * entry_bytes
    sealed_bytes = frame_bytes + virtual_slack * entry_bytes / expected
    frames = int(rest / sealed_bytes)
    if raw_pages < MIN_RAW_PAGES or frames < MIN_RAW_PAGES * worst:
        others = fixed + (2 + ALIGNED_PAGES) * entry_bytes
        need = max(
            attention_bytes + (MIN_RAW_PAGES + 2) * open_bytes / raw_share,
            (others + (MIN_RAW_PAGES + 1) * worst * sealed_bytes) / (1 - raw_share),
        )
        # Others get their share of more memory, too.
        mib = 2**20 * min(1.0, budget.nbytes / (budget.whole_bytes or budget.nbytes))
        raise ValueError(
            f"diffxkv: {nbytes / mib:.1f} MiB hold {max(raw_pages, 0)} raw pages and "
            f"{max(frames, 0) // worst} sealed pages; raise memory_bytes (or --mem-fraction-static "
            f"or --max-total-tokens) to at least {need / mib:.1f} MiB"
        )
    pages = raw_pages + int(virtual_slack * frames / expected)
    limit = max(MAX_VIRTUAL_RATIO * nbytes // dense, raw_pages + frames // worst)
    return PoolSizes(
        num_layers=num_layers,
        virtual_pages=min(pages, limit, max_virtual_pages or pages) + host_pages,
        raw_pages=raw_pages,
        frames=frames,
        worst_frames=worst,
        expected_frames=expected,
        dense_page_bytes=dense,
        workspace=workspace,
        attention_bytes=attention_bytes,
        host_frames=host_frames,
        host_pages=host_pages,
    )
