# SPDX-License-Identifier: Apache-2.0
"""What the pool holds, in numbers: the JSON of ``/diffxkv/stats`` and the Prometheus gauges."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any, NamedTuple

import torch

from sglang_diffxkv.kernels.layout import META_BYTES, NOTE_BYTES, PAGE_TOKENS, TierFormat
from sglang_diffxkv.kernels.pack import head_counts
from sglang_diffxkv.policy.quality import Quality
from sglang_diffxkv.pool.store import PageStore

PREFIX = "sglang:diffxkv_"


class TierCounts(NamedTuple):
    """Kept (token, KV head) pairs of sealed pages per layer, int64 [L] each."""

    high: torch.Tensor
    low: torch.Tensor


def tier_counts(store: PageStore) -> TierCounts:
    high, low = head_counts(store.directory.heads)  # [L, V, H]
    return TierCounts(high.sum(dim=(1, 2)).long(), low.sum(dim=(1, 2)).long())


def pages_by_quality(store: PageStore) -> dict[str, int]:
    """Open and sealed pages by what their requests asked for."""
    directory = store.directory
    held = (directory.raw_slot[1:] >= 0) | directory.sealed[1:]
    counts = torch.bincount(directory.quality[1:][held].long(), minlength=len(Quality))
    return {level.name.lower(): int(counts[level]) for level in Quality}


def pool_stats(store: PageStore) -> dict[str, Any]:
    """A snapshot of the pool; all byte counts are of memory that was really allocated.

    ``physical_compression`` is what SGLang's own pool would take for the tokens held, over
    ``bytes_in_use``: frames and raw pages in use, and the whole directory. ``bytes`` has its parts.
    """
    layout, ledger, plan = store.layout, store.ledger, store.plan
    tiers = tier_counts(store)
    high, low = int(tiers.high.sum()), int(tiers.low.sum())
    graded = ledger.sealed_pages * PAGE_TOKENS * plan.num_layers * layout.num_kv_heads

    def rows(tier: TierFormat) -> int:
        return layout.row_bytes(tier.key_bits) + layout.row_bytes(tier.value_bits)

    def metadata(tier: TierFormat) -> int:
        return NOTE_BYTES + (0 if tier.is_raw else META_BYTES)

    payload = high * rows(layout.high) + low * rows(layout.low)
    meta = high * metadata(layout.high) + low * metadata(layout.low)
    frame_bytes = ledger.frames_used * layout.frame_bytes
    raw_bytes = store.raw.nbytes * ledger.open_pages // plan.raw_pages
    in_use = frame_bytes + raw_bytes + store.directory.nbytes
    open_pages = store.directory.raw_slot[1:] >= 0
    tokens = ledger.sealed_pages * PAGE_TOKENS + int(store.directory.filled[1:][open_pages].sum())
    per_layer = (store.directory.frames >= 0).sum(dim=(1, 2)) * layout.frame_bytes
    sealed_tokens = max(1, ledger.sealed_pages * PAGE_TOKENS)
    return {
        "policy": store.policy.name,
        "tiers": {"high": layout.high.name, "low": layout.low.name},
        "virtual_pages": plan.virtual_pages,
        "sealed_pages": ledger.sealed_pages,
        "open_pages": ledger.open_pages,
        "raw_pages": plan.raw_pages,
        "pages_by_quality": pages_by_quality(store),
        "frames": plan.frames,
        "frames_used": ledger.frames_used,
        "frame_bytes": layout.frame_bytes,
        "tokens_held": tokens,
        "bytes_total": store.nbytes,
        "bytes_in_use": in_use,
        "bytes": {
            "payload": payload,
            "metadata": meta,
            "slack": frame_bytes - payload - meta,
            "directory": store.directory.nbytes,
            "raw_pages": raw_bytes,
        },
        "physical_compression": tokens * (plan.dense_page_bytes // PAGE_TOKENS) / in_use,
        "sealed_bytes_per_token_by_layer": [int(b) / sealed_tokens for b in per_layer],
        "tier_tokens": {"high": high, "low": low, "pruned": graded - high - low},
        "retention_by_layer": None if store.retention is None else store.retention.by_layer(),
        "plan": store.policy.plan_report(),
        "sealed_pages_by_plan": _pages_by_plan(store),
        "counters": asdict(store.counters),
    }


def _pages_by_plan(store: PageStore) -> dict[str, int]:
    """Sealed pages by the number of the plan that was in force when they were sealed."""
    directory = store.directory
    numbers, pages = directory.plan[directory.sealed].unique(return_counts=True)
    return dict(zip(map(str, numbers.tolist()), pages.tolist(), strict=True))


class PrometheusGauges:
    """Gauges of one scheduler process; made after SGLang has set up multiprocess mode."""

    NAMES = (
        "sealed_pages",
        "open_pages",
        "frames_used",
        "tokens_held",
        "bytes_total",
        "bytes_in_use",
        "physical_compression",
    )

    def __init__(self, labels: dict[str, str]) -> None:
        from prometheus_client import Gauge

        self.labels = labels
        self.gauges = {
            name: Gauge(
                PREFIX + name,
                f"DiffXKV: {name}",
                list(labels),
                multiprocess_mode="mostrecent",
            )
            for name in self.NAMES
        }
        self.tiers = Gauge(
            PREFIX + "tier_tokens",
            "DiffXKV: (token, KV head, layer) entries of sealed pages by tier",
            [*labels, "tier"],
            multiprocess_mode="mostrecent",
        )
        self.events = Gauge(
            PREFIX + "events",
            "DiffXKV: pages opened, sealed, released, evicted, demoted, frames freed by demotion, "
            "and reclaims, since the start",
            [*labels, "event"],
            multiprocess_mode="mostrecent",
        )

    def update(self, stats: dict[str, Any]) -> None:
        for name, gauge in self.gauges.items():
            gauge.labels(**self.labels).set(stats[name])
        for tier, tokens in stats["tier_tokens"].items():
            self.tiers.labels(**self.labels, tier=tier).set(tokens)
        for event, count in stats["counters"].items():
            self.events.labels(**self.labels, event=event).set(count)
