# SPDX-License-Identifier: Apache-2.0
"""The HTTP interface of a running server, as far as this project's programs need it."""

from collections.abc import Sequence
from typing import Any

import requests

Json = dict[str, Any]
Prompt = str | Sequence[int]
"""Text or token ids."""


class Client:
    """Talks to the server at `url`.

    Requests raise `requests.HTTPError`, whose text has the server's answer, where they are refused,
    and other kinds of `requests.RequestException` where there is none within `timeout_s` seconds.
    """

    def __init__(self, url: str, timeout_s: float = 600.0) -> None:
        self.url = url
        self._timeout_s = timeout_s

    def generate(
        self,
        prompt: Prompt,
        *,
        max_new_tokens: int = 16,
        temperature: float = 0.0,
        sampling: Json | None = None,
        **body: Any,
    ) -> Any:
        """POST /generate: one answer, or a list of them where n > 1.

        Args:
            sampling: sampling parameters; by default all `max_new_tokens` are generated.
            body: other fields of the request.
        """
        request = generate_body(prompt, max_new_tokens, temperature, sampling)
        return self.post("/generate", request | body).json()

    def stats(self) -> Json:
        """GET /diffxkv/stats: what the pool holds."""
        return self._json("/diffxkv/stats")

    def server_info(self) -> Json:
        """GET /server_info."""
        return self._json("/server_info")

    def is_healthy(self) -> bool:
        """Whether GET /health answers, in a few seconds, that the server is up."""
        try:
            return requests.get(f"{self.url}/health", timeout=5).ok
        except requests.RequestException:
            return False

    def flush_cache(self) -> None:
        """Empty the prefix cache; the server must be idle within 30 seconds."""
        self.post("/flush_cache?timeout=30", {})

    def get(self, path: str) -> requests.Response:
        return self._request("GET", path)

    def post(self, path: str, body: Json, **options: Any) -> requests.Response:
        """POST a JSON `body`; `options` are those of `requests.request`."""
        return self._request("POST", path, json=body, **options)

    def _json(self, path: str) -> Json:
        found: Json = self.get(path).json()
        return found

    def _request(self, method: str, path: str, **options: Any) -> requests.Response:
        response = requests.request(method, self.url + path, timeout=self._timeout_s, **options)
        if not response.ok:
            raise requests.HTTPError(
                f"{response.status_code} to {method} {path}: {response.text}", response=response
            )
        return response


def generate_body(
    prompt: Prompt, max_new_tokens: int, temperature: float, sampling: Json | None
) -> Json:
    """What POST /generate takes."""
    key, value = ("text", prompt) if isinstance(prompt, str) else ("input_ids", list(prompt))
    params = {"max_new_tokens": max_new_tokens, "temperature": temperature, "ignore_eos": True}
    return {key: value, "sampling_params": params | (sampling or {})}
