# SPDX-License-Identifier: Apache-2.0
"""Starts a real SGLang server of a tiny model as a subprocess, for tests and benches."""

import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from sglang_diffxkv.client import Json, Prompt, generate_body
from sglang_diffxkv.launch import ServerProcess


class Server(ServerProcess):
    """A running `sglang serve`, as a context manager, with more of its HTTP interface.

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

    def stream(self, prompt: Prompt, *, max_new_tokens: int = 16, **body: Any) -> Iterator[Json]:
        """POST /generate with stream on: each event's JSON (its text is the text so far)."""
        request = generate_body(prompt, max_new_tokens, 0.0, None) | {"stream": True} | body
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

    def violations(self) -> list[str]:
        """POST /diffxkv/check: what is wrong with the pools of all replicas, by their tables."""
        answer = self.post("/diffxkv/check", {}).json()
        replicas = answer if isinstance(answer, list) else [answer]
        return [violation for replica in replicas for violation in replica["violations"]]


class ColdServer(Server):
    """Started as users do, where others are forked (`tests.support.warm_start`)."""

    _launch = ServerProcess._launch


def fast_environment(device: str) -> dict[str, str]:
    """What makes servers of tiny models start fast and stay off the network."""
    env = {
        "HF_HUB_OFFLINE": "1",
        "SGLANG_DISABLED_MODEL_ARCHS": ",".join(models_but("llama", "llama_eagle")),
    }
    if device == "cpu":
        env["SGLANG_PLATFORM"] = "diffxkv"
        # Tiny matrices: a second thread costs more than it gives.
        env["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS", "1")
    return env


def models_but(*kept: str) -> list[str]:
    """SGLang imports every model file it has (seconds each start): those that tests never need."""
    spec = find_spec("sglang")
    assert spec is not None and spec.origin is not None, "SGLang is not installed"
    files = (Path(spec.origin).parent / "srt" / "models").glob("*.py")
    return sorted(file.stem for file in files if file.stem not in kept)
