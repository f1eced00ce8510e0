# SPDX-License-Identifier: Apache-2.0
"""Starts a real SGLang server as a subprocess and talks to it over HTTP."""

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Self

import psutil
import requests

Json = dict[str, Any]
Prompt = str | Sequence[int]


class Server:
    """A running `sglang serve`, as a context manager.

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
        start_timeout: float = 300.0,
    ) -> None:
        self.port = _free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = log or Path(tempfile.mkstemp(prefix="sglang-", suffix=".log")[1])
        self.start_seconds = 0.0
        self._start_timeout = start_timeout
        self._env = server_environment(device) | (env or {})
        own = ["--model-path", model, "--device", device, "--dtype", dtype, "--port", self.port]
        # Without --sleep-on-idle the scheduler spins, which on two cores halves all else.
        own += ["--host", "127.0.0.1", "--sleep-on-idle", "--skip-server-warmup"]
        sglang = Path(sys.executable).with_name("sglang")
        self._command = [str(part) for part in (sglang, "serve", *own, *args)]
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        begin = time.monotonic()
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(
                self._command,
                env=self._env,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        try:
            self._wait_until_healthy(begin + self._start_timeout)
        except BaseException:
            self.stop()
            raise
        self.start_seconds = time.monotonic() - begin
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()

    def stop(self) -> None:
        """End the server and all its children."""
        if self._process is None:
            return
        try:
            root = psutil.Process(self._process.pid)
            tree = [*root.children(recursive=True), root]
        except psutil.NoSuchProcess:
            tree = []
        # Children first: asked alone, the main process takes many seconds to drain.
        for process in tree:
            with suppress(psutil.NoSuchProcess):
                process.terminate()
        _, alive = psutil.wait_procs(tree, timeout=2)
        for process in alive:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        self._process.wait()
        self._process = None

    def is_alive(self) -> bool:
        """Whether the main process runs; SGLang ends it when its scheduler dies."""
        return self._process is not None and self._process.poll() is None

    def log_text(self) -> str:
        return self.log.read_text(errors="replace")

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
            raise RuntimeError(f"no answer to {method} {path}\n{self._log_tail()}") from error
        if not response.ok:
            raise requests.HTTPError(
                f"{response.status_code} to {method} {path}: {response.text}", response=response
            )
        return response

    def _wait_until_healthy(self, deadline: float) -> None:
        while time.monotonic() < deadline:
            if not self.is_alive():
                raise RuntimeError(f"the server ended while starting\n{self._log_tail()}")
            try:
                if requests.get(self.url + "/health", timeout=5).ok:
                    return
            except requests.RequestException:
                pass
            time.sleep(0.2)
        raise TimeoutError(f"no server after {self._start_timeout} s\n{self._log_tail()}")

    def _log_tail(self, lines: int = 60) -> str:
        tail = "\n".join(line[:1000] for line in self.log_text().splitlines()[-lines:])
        return f"--- end of {self.log} ---\n{tail}"


def _generate_body(
    prompt: Prompt, max_new_tokens: int, temperature: float, sampling: Json | None
) -> Json:
    key, value = ("text", prompt) if isinstance(prompt, str) else ("input_ids", list(prompt))
    params = {"max_new_tokens": max_new_tokens, "temperature": temperature, "ignore_eos": True}
    return {key: value, "sampling_params": params | (sampling or {})}


def server_environment(device: str) -> dict[str, str]:
    """What makes a server start fast and stay off the network."""
    env = dict(os.environ)
    # Three processes import some thousand modules each: never without their bytecode.
    env.pop("PYTHONDONTWRITEBYTECODE", None)
    if device == "cpu":
        env["SGLANG_PLATFORM"] = "diffxkv"
        # Tiny matrices: a second thread gains little, and on busy cores waits cost tenfold.
        env.setdefault("OMP_NUM_THREADS", "1")
    env["HF_HUB_OFFLINE"] = "1"
    # /health then answers once the server is up, without a request of its own.
    env["SGLANG_ENABLE_HEALTH_ENDPOINT_GENERATION"] = "0"
    env["SGLANG_DISABLED_MODEL_ARCHS"] = ",".join(_models_but_llama())
    return env


def _models_but_llama() -> list[str]:
    """SGLang imports every model file it has (seconds each start): those that tests never need."""
    spec = find_spec("sglang")
    assert spec is not None and spec.origin is not None, "SGLang is not installed"
    files = (Path(spec.origin).parent / "srt" / "models").glob("*.py")
    return sorted(file.stem for file in files if file.stem != "llama")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
