# SPDX-License-Identifier: Apache-2.0
"""What the pool holds, in numbers: the JSON of ``/diffxkv/stats`` and the Prometheus gauges."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from sglang_diffxkv.kernels.layout import META_BYTES, PAGE_TOKENS, TOKEN_METADATA_BYTES, TierFormat
from sglang_diffxkv.policy.quality import Quality
from sglang_diffxkv.pool.store import PageStore
from sglang_diffxkv.pool.totals import LayerSums
from sglang_diffxkv.pool.window_use import WindowUse

PREFIX = "sglang:diffxkv_"


def pool_stats(store: PageStore, windows: WindowUse | None = None) -> dict[str, Any]:
    """A snapshot of the pool; all byte counts are of memory that was really allocated.

    From sums that the store keeps, whatever its size; waits for the device. ``bytes`` has the parts
    of ``bytes_in_use``. What is said of tokens, pages and bytes is said of full-attention layers;
    ``window_layers`` has those of SGLang's pool for the others, which ``physical_compression``
    counts as what they are in both.
    """
    layout, ledger, sizes, meter = store.layout, store.ledger, store.sizes, store.retention
    store.settle()  # so that all figures are of one moment
    sums = store.totals.by_layer()
    high, low = sum(sums.high), sum(sums.low)

    def rows(tier: TierFormat) -> int:
        return layout.row_bytes(tier.key_bits) + layout.row_bytes(tier.value_bits)

    def metadata(tier: TierFormat) -> int:
        return TOKEN_METADATA_BYTES + (0 if tier.is_raw else META_BYTES)

    payload = high * rows(layout.high) + low * rows(layout.low)
    meta = high * metadata(layout.high) + low * metadata(layout.low)
    frame_bytes = ledger.frames_used * layout.frame_bytes
    raw_bytes = ledger.open_pages * store.raw.page_bytes
    sealed_tokens = max(1, ledger.sealed_pages * PAGE_TOKENS)
    return {
        "policy": store.policy.name,
        "tiers": {"high": layout.high.name, "low": layout.low.name},
        "virtual_pages": sizes.virtual_pages,
        "raw_pages": sizes.raw_pages,
        "pages_by_quality": {x.name.lower(): store.totals.by_quality[x] for x in Quality},
        "frames": sizes.frames,
        "frame_bytes": layout.frame_bytes,
        **_gauges(store, sums, windows),
        "bytes": {
            "payload": payload,
            "metadata": meta,
            "slack": frame_bytes - payload - meta,
            "raw_pages": raw_bytes,
            "overhead": store.bytes_in_use - frame_bytes - raw_bytes,
        },
        "sealed_bytes_per_token_by_layer": [
            frames * layout.frame_bytes / sealed_tokens for frames in sums.frames
        ],
        "window_layers": None if windows is None else windows.report(),
        "retention_by_layer": None if meter is None else meter.by_layer(),
        "retention_demoted_by_layer": None if meter is None else meter.demoted_by_layer(),
        "plan": store.policy.plan_report(),
        "sealed_pages_by_plan": {
            str(number): pages for number, pages in sorted(store.totals.by_plan.items()) if pages
        },
    }


def pool_gauges(store: PageStore, windows: WindowUse | None = None) -> dict[str, Any]:
    """The part of `pool_stats` that gauges show, as far as it is known without any wait.

    On a GPU tiers may be some steps older or newer than pages are.
    """
    return _gauges(store, store.totals.lately(), windows)


def _gauges(store: PageStore, sums: LayerSums, windows: WindowUse | None) -> dict[str, Any]:
    ledger, sizes = store.ledger, store.sizes
    high, low = sum(sums.high), sum(sums.low)
    beside = 0 if windows is None else windows.bytes_in_use
    entries = ledger.sealed_pages * PAGE_TOKENS * sizes.num_layers * store.layout.num_kv_heads
    return {
        "sealed_pages": ledger.sealed_pages,
        "open_pages": ledger.open_pages,
        "frames_used": ledger.frames_used,
        "tokens_held": ledger.tokens_held,
        "bytes_total": store.nbytes,
        "bytes_in_use": store.bytes_in_use,
        "physical_compression": store.physical_compression(beside),
        "tier_tokens": {"high": high, "low": low, "pruned": max(0, entries - high - low)},
        "counters": asdict(store.counters),
        "host": _host(store),
    }


def _host(store: PageStore) -> dict[str, int] | None:
    """What host memory holds, and pages that went there, came back and were forgotten there."""
    if store.host is None:
        return None
    ledger, counters, frame_bytes = store.ledger, store.counters, store.layout.frame_bytes
    came = counters.offloaded + counters.prefetched
    return {
        "bytes_total": ledger.host_total * frame_bytes,
        "bytes_in_use": ledger.host_used * frame_bytes,
        "pages": ledger.host_pages,
        "frames": ledger.host_total,
        "frames_used": ledger.host_used,
        "offloaded": counters.offloaded,
        "loaded_back": counters.loaded_back,
        "evicted": came - counters.loaded_back - ledger.host_pages,
    }


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
        """Show what `pool_gauges` says."""
        for name, gauge in self.gauges.items():
            gauge.labels(**self.labels).set(stats[name])
        for tier, tokens in stats["tier_tokens"].items():
            self.tiers.labels(**self.labels, tier=tier).set(tokens)
        for event, count in stats["counters"].items():
            self.events.labels(**self.labels, event=event).set(count)
