# SPDX-License-Identifier: Apache-2.0
"""What an evaluation asks a server for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import requests

from sglang_diffxkv.eval.prompts import Stop

TOP = 256
"""Likeliest tokens of each distribution that are compared; the others count as one."""
WARM_TOKENS = 4
"""Generated while the cache is filled: a page is sealed once a later step has scored it."""
_TIMEOUT_S = 600.0


class Client:
    """Of one server; requests raise `requests.RequestException` where they are refused."""

    def __init__(self, url: str) -> None:
        self._url = url

    def flush(self) -> None:
        """Empty the prefix cache."""
        # Its own timeout: how long to wait until the scheduler is idle.
        url = f"{self._url}/flush_cache?timeout=30"
        requests.post(url, timeout=_TIMEOUT_S).raise_for_status()

    def stats(self) -> dict[str, Any]:
        """`/diffxkv/stats`."""
        response = requests.get(f"{self._url}/diffxkv/stats", timeout=_TIMEOUT_S)
        response.raise_for_status()
        stats: dict[str, Any] = response.json()
        return stats

    def warm(self, ids: Sequence[int], namespace: str) -> None:
        """Fill the cache with the KV of `ids`, sealed as far as the policy seals it."""
        self.generate(ids, namespace, WARM_TOKENS, ignore_eos=True)

    def generate(
        self,
        ids: Sequence[int],
        namespace: str,
        tokens: int,
        ignore_eos: bool = False,
        stop: Stop | None = None,
        **body: Any,
    ) -> Any:
        """The likeliest continuation of `ids`, `tokens` at most; `body` is added to the request.

        Requests of one `namespace` share cached pages.
        """
        sampling: dict[str, Any] = {"temperature": 0.0, "max_new_tokens": tokens}
        sampling["ignore_eos"] = ignore_eos
        if stop is not None:
            sampling |= {"stop_token_ids": stop.token_ids, "stop": stop.strings}
        request = {"input_ids": ids, "sampling_params": sampling, "extra_key": namespace}
        response = requests.post(f"{self._url}/generate", json=request | body, timeout=_TIMEOUT_S)
        if not response.ok:
            raise requests.HTTPError(f"HTTP {response.status_code}: {response.text}")
        return response.json()
