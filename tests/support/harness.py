# SPDX-License-Identifier: Apache-2.0
"""Starts a real SGLang server as a subprocess and talks to it over HTTP."""

import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import requests

from sglang_diffxkv.launch import ServerProcess

Json = dict[str, Any]
Prompt = str | Sequence[int]


class Server(ServerProcess):
    """A running `sglang serve`, as a context manager, and its HTTP interface.

    `args` are its command-line arguments, `env` what to add to its environment. Its log stays in
    the file `log` (a temporary one unless given).
    """

    def __init__(
        self,
        model: str | Path,
        *args: object,
        device: str = "cpu",
        dtype: str = "float32",
        env: dict[str, str] | None = None,
        log: Path | None = None,
    ) -> None:
        own = ["--model-path", model, "--device", device, "--dtype", dtype]
        # Without --sleep-on-idle the scheduler spins, which on two cores halves all else.
        super().__init__(
            *own,
            "--sleep-on-idle",
            *args,
            log=log or Path(tempfile.mkstemp(prefix="sglang-", suffix=".log")[1]),
            env=fast_environment(device) | (env or {}),
        )

    def generate(
        self,
        prompt: Prompt,
        *,
        max_new_tokens: int = 16,
        temperature: float = 0.0,
        sampling: Json | None = None,
        **body: Any,
    ) -> Any:
        """POST /generate with text or token ids: one answer, or a list of them where n > 1."""
        request = _generate_body(prompt, max_new_tokens, temperature, sampling)
        return self.post("/generate", request | body).json()

    def stream(self, prompt: Prompt, *, max_new_tokens: int = 16, **body: Any) -> Iterator[Json]:
        """POST /generate with stream on: each event's JSON (its text is the text so far)."""
        request = _generate_body(prompt, max_new_tokens, 0.0, None) | {"stream": True} | body
        with self.post("/generate", request, stream=True) as response:
            for line in response.iter_lines():
                data = line.removeprefix(b"data: ")
                if data and data != b"[DONE]":
                    yield json.loads(data)

    def generate_many(self, items: Sequence[Prompt | Json], workers: int = 16) -> list[Any]:
        """`generate` for each item (a prompt or its keyword arguments), `workers` at a time.

        Answers come in the order of the items.
        """

        def one(item: Prompt | Json) -> Any:
            return self.generate(**item) if isinstance(item, dict) else self.generate(item)

        with ThreadPoolExecutor(workers) as pool:
            return list(pool.map(one, items))

    def chat(
        self, messages: Sequence[dict[str, str]], *, max_tokens: int = 16, **body: Any
    ) -> Json:
        """POST /v1/chat/completions, greedy unless `temperature` is given."""
        request = {"model": "default", "messages": list(messages), "max_tokens": max_tokens}
        return self.post("/v1/chat/completions", request | {"temperature": 0.0} | body).json()

    def stats(self) -> Json:
        """GET /diffxkv/stats."""
        return self.get("/diffxkv/stats").json()

    def violations(self) -> list[str]:
        """POST /diffxkv/check: what is wrong with the pool, by all of its tables."""
        found: list[str] = self.post("/diffxkv/check", {}).json()["violations"]
        return found

    def server_info(self) -> Json:
        return self.get("/server_info").json()

    def flush_cache(self) -> None:
        """Empty the radix tree; the server must be idle within 30 seconds."""
        self.post("/flush_cache?timeout=30", {})

    def get(self, path: str) -> requests.Response:
        return self._request("GET", path)

    def post(self, path: str, body: Json, **options: Any) -> requests.Response:
        return self._request("POST", path, json=body, **options)

    def _request(self, method: str, path: str, **options: Any) -> requests.Response:
        try:
            response = requests.request(method, self.url + path, timeout=600, **options)
        except requests.ConnectionError as error:
            raise RuntimeError(f"no answer to {method} {path}\n{self.log_tail()}") from error
        if not response.ok:
            raise requests.HTTPError(
                f"{response.status_code} to {method} {path}: {response.text}", response=response
            )
        return response


def _generate_body(
    prompt: Prompt, max_new_tokens: int, temperature: float, sampling: Json | None
) -> Json:
    key, value = ("text", prompt) if isinstance(prompt, str) else ("input_ids", list(prompt))
    params = {"max_new_tokens": max_new_tokens, "temperature": temperature, "ignore_eos": True}
    return {key: value, "sampling_params": params | (sampling or {})}


def fast_environment(device: str) -> dict[str, str]:
    """What makes servers of tiny models start fast and stay off the network."""
    env = {"HF_HUB_OFFLINE": "1", "SGLANG_DISABLED_MODEL_ARCHS": ",".join(_models_but_llama())}
    if device == "cpu":
        env["SGLANG_PLATFORM"] = "diffxkv"
        # Tiny matrices: a second thread costs more than it gives.
        env["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS", "1")
    return env


def _models_but_llama() -> list[str]:
    """SGLang imports every model file it has (seconds each start): those that tests never need."""
    spec = find_spec("sglang")
    assert spec is not None and spec.origin is not None, "SGLang is not installed"
    files = (Path(spec.origin).parent / "srt" / "models").glob("*.py")
    return sorted(file.stem for file in files if file.stem != "llama")
