# SPDX-License-Identifier: Apache-2.0
"""What a server says of itself: SGLang's Prometheus counters and gauges, and `/diffxkv/stats`."""

import time
from typing import NamedTuple, Self

from prometheus_client.parser import text_string_to_metric_families

from sglang_diffxkv.client import Client

_TIMEOUT_S = 30.0
_SETTLE_S = 3.0


class Counters(NamedTuple):
    """Sums since the server's start."""

    requests: int
    prompt_tokens: int
    cached_tokens: int
    """Prompt tokens that were read from the prefix cache instead of being computed."""
    generated_tokens: int
    evicted_tokens: int
    """Tokens that the prefix cache has dropped."""
    retractions: int
    """Running requests that were put back into the queue for want of memory."""

    def since(self, earlier: Self) -> "Counters":
        return Counters(*(now - then for now, then in zip(self, earlier, strict=True)))

    @property
    def hit_rate(self) -> float:
        return self.cached_tokens / max(1, self.prompt_tokens)


class Held(NamedTuple):
    """What an idle server keeps in its pool for requests to come."""

    tokens: int
    bytes_in_use: int
    bytes_total: int

    def compression(self, dense_bytes: int) -> float:
        """Bytes that SGLang's own pool takes for these tokens, over the bytes in use."""
        return self.tokens * dense_bytes / max(1, self.bytes_in_use)


class Probe:
    """Reads one server.

    Args:
        dense_bytes: bytes of one token, all layers, in SGLang's own pool.
        stock_tokens: capacity of SGLang's own pool in tokens; None where the pool is ours.
    """

    def __init__(self, url: str, dense_bytes: int, stock_tokens: int | None) -> None:
        self._client = Client(url, _TIMEOUT_S)
        self._dense_bytes = dense_bytes
        self._stock_tokens = stock_tokens

    def counters(self) -> Counters:
        sums = self._metrics()
        names = (
            "num_requests_total",
            "prompt_tokens_total",
            "cached_tokens_total",
            "generation_tokens_total",
            "evicted_tokens_total",
            "num_retracted_requests_total",
        )
        return Counters(*(int(sums.get(f"sglang:{name}", 0)) for name in names))

    def held(self) -> Held:
        """State of the pool; the server must be idle."""
        if self._stock_tokens is None:
            stats = self._client.stats()
            return Held(stats["tokens_held"], stats["bytes_in_use"], stats["bytes_total"])
        sums = self._idle_metrics()
        tokens = int(sums["sglang:kv_used_tokens"] + sums["sglang:kv_evictable_tokens"])
        return Held(tokens, tokens * self._dense_bytes, self._stock_tokens * self._dense_bytes)

    def _idle_metrics(self) -> dict[str, float]:
        """Metrics once the scheduler has published that it is idle, moments after an answer."""
        deadline = time.monotonic() + _SETTLE_S
        sums = self._metrics()
        while sums.get("sglang:num_running_reqs", 0) > 0 and time.monotonic() < deadline:
            time.sleep(0.1)
            sums = self._metrics()
        return sums

    def _metrics(self) -> dict[str, float]:
        """Every sample of `/metrics` by its name, summed over its labels."""
        sums: dict[str, float] = {}
        for family in text_string_to_metric_families(self._client.get("/metrics").text):
            for sample in family.samples:
                sums[sample.name] = sums.get(sample.name, 0.0) + sample.value
        return sums
