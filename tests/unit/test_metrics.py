# SPDX-License-Identifier: Apache-2.0
"""Gauges say what the statistics do, of levels that are on."""

from __future__ import annotations

from collections.abc import Iterator

import prometheus_client
import pytest

from sglang_diffxkv.metrics import LEVELS, PREFIX, PrometheusGauges, pool_gauges
from sglang_diffxkv.patches.observability import PrefixHits
from tests.support.monitoring import exposed
from tests.support.stores import make_store

LABELS = {"model_name": "demo", "tp_rank": "0"}


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> Iterator[prometheus_client.CollectorRegistry]:
    found = prometheus_client.CollectorRegistry()
    gauge = prometheus_client.Gauge
    monkeypatch.setattr(prometheus_client, "Gauge", lambda *a, **k: gauge(*a, registry=found, **k))
    yield found


def test_gauges_are_what_the_store_says(registry: prometheus_client.CollectorRegistry) -> None:
    stats = pool_gauges(make_store("diffxkv")) | {"disk": None}
    PrometheusGauges(LABELS).update(stats)
    for name in ("sealed_pages", "bytes_total", "physical_compression"):
        assert registry.get_sample_value(PREFIX + name, LABELS) == stats[name]
    for name, label, keys in (
        ("tier_tokens", "tier", {"high", "low", "pruned"}),
        ("events", "event", set(stats["counters"])),
        ("importance", "part", {"sealed", "kept", "demoted"}),
    ):
        shown = exposed(prometheus_client.generate_latest(registry).decode())[PREFIX + name]
        assert {labels[label] for labels in shown} == keys


@pytest.mark.parametrize("on", [(), ("host",), ("host", "disk")])
def test_levels_that_are_off_have_none(
    registry: prometheus_client.CollectorRegistry, on: tuple[str, ...]
) -> None:
    levels = {
        level: {key: 7 + i for i, key in enumerate(texts)} if level in on else None
        for level, texts in LEVELS.items()
    }
    PrometheusGauges(LABELS).update(pool_gauges(make_store("uniform")) | levels)
    for level, texts in LEVELS.items():
        found = [registry.get_sample_value(f"{PREFIX}{level}_{key}", LABELS) for key in texts]
        assert found == (list((levels[level] or {}).values()) or [None] * len(texts))


def test_what_is_prefilled_again_counts_once() -> None:
    class Stats:
        log_input_tokens, log_hit_tokens = 100, 60
        reprocessed_log_input_tokens, reprocessed_log_hit_tokens = 30, 20

    hits = PrefixHits()
    hits.add(Stats())  # type: ignore[arg-type]
    hits.add(Stats())  # type: ignore[arg-type]
    assert (hits.prompt_tokens, hits.cached_tokens) == (220, 80)
