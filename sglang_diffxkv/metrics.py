# SPDX-License-Identifier: Apache-2.0
"""What the pool holds, in numbers: the JSON of ``/diffxkv/stats`` and the Prometheus gauges."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from sglang_diffxkv.kernels.layout import META_BYTES, PAGE_TOKENS, TOKEN_METADATA_BYTES, TierFormat
from sglang_diffxkv.policy.quality import Quality
from sglang_diffxkv.pool.store import PageStore
from sglang_diffxkv.pool.totals import LayerSums
from sglang_diffxkv.pool.window_use import WindowUse

if TYPE_CHECKING:
    from prometheus_client import Gauge

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

    On a GPU tiers and importances may be some steps older or newer than pages are.
    """
    meter = store.retention
    return {
        **_gauges(store, store.totals.lately(), windows),
        "importance": {} if meter is None else meter.lately(),
    }


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


GAUGES = {
    "sealed_pages": "Sealed pages",
    "open_pages": "Open pages",
    "frames_used": "Frames allocated to sealed pages",
    "tokens_held": "Tokens of open and sealed pages",
    "bytes_total": "Bytes that the pool has allocated on the device",
    "bytes_in_use": "Bytes of those that serve what is held",
    "physical_compression": "Bytes that SGLang's own pool takes for the tokens held, over ours",
}

LABELLED = {
    "tier_tokens": (
        "tier_tokens",
        "tier",
        "(token, KV head, layer) entries of sealed pages",
    ),
    "counters": (
        "events",
        "event",
        "Pages opened, sealed, released, evicted, demoted, offloaded, loaded back and prefetched, "
        "frames freed by demotion, and reclaims, since the start",
    ),
    "importance": (
        "importance",
        "part",
        "Attention on what was sealed, kept of it by sealing, and taken since by demotion, since "
        "the start, in units of uniform attention",
    ),
}
"""Parts of the statistics that are gauges with a label more: name, label and meaning."""

LEVELS = {
    "host": {
        "bytes_total": "Bytes of host memory for offloaded pages",
        "bytes_in_use": "Bytes of those in use",
        "pages": "Pages in host memory",
        "frames": "Frames of host memory",
        "frames_used": "Frames of those in use",
        "offloaded": "Pages offloaded from the device, since the start",
        "loaded_back": "Pages loaded back to the device, since the start",
        "evicted": "Pages evicted from host memory, since the start",
    },
    "disk": {
        "bytes_total": "Bytes that pages may take on disk",
        "bytes_in_use": "Bytes that they take",
        "pages": "Pages on disk",
        "written": "Pages backed up to disk, since the start",
        "read": "Pages read from disk, since the start",
        "hits": "Pages that were looked for and found on disk, since the start",
        "misses": "Pages that were looked for and not found on disk, since the start",
        "dropped": "Pages not backed up because the disk was too slow, since the start",
        "errors": "Reads and writes that failed, and records found damaged, since the start",
    },
}
"""Levels below the device, and what the gauges of each say; a level that is off has none."""


class PrometheusGauges:
    """Gauges of one scheduler process; made after SGLang has set up multiprocess mode."""

    def __init__(self, labels: dict[str, str]) -> None:
        self.labels = labels
        self.gauges = {name: self._gauge(name, text) for name, text in GAUGES.items()}
        self.labelled = {
            key: (label, self._gauge(name, text, label))
            for key, (name, label, text) in LABELLED.items()
        }
        self.levels = {
            level: {key: self._gauge(f"{level}_{key}", text) for key, text in texts.items()}
            for level, texts in LEVELS.items()
        }

    def _gauge(self, name: str, text: str, *more_labels: str) -> Gauge:
        from prometheus_client import Gauge

        labels = [*self.labels, *more_labels]
        return Gauge(PREFIX + name, f"DiffXKV: {text}", labels, multiprocess_mode="mostrecent")

    def update(self, stats: dict[str, Any]) -> None:
        """Show what `pool_gauges` says, with ``disk`` as in ``/diffxkv/stats``."""
        for name, gauge in self.gauges.items():
            gauge.labels(**self.labels).set(stats[name])
        for part, (label, gauge) in self.labelled.items():
            for key, value in stats[part].items():
                gauge.labels(**self.labels, **{label: key}).set(value)
        for level, gauges in self.levels.items():
            for key, value in (stats[level] or {}).items():
                gauges[key].labels(**self.labels).set(value)
