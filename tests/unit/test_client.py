# SPDX-License-Identifier: Apache-2.0
"""What is sent to a server, and what is raised where it refuses or is gone."""

import json
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
import requests

from sglang_diffxkv.client import Client, Json
from sglang_diffxkv.eval.ask import distributions_after, warm
from sglang_diffxkv.launch import ServerError, ServerProcess, free_port

TOP_LOGPROBS = [None, [[-0.1, 3, None], [-2.4, 5, None]]]


class Handler(BaseHTTPRequestHandler):
    """Answers with what it was asked; refuses what has the key `refuse`."""

    def do_GET(self) -> None:
        self._answer(200 if self.path == "/health" else 404, {"path": self.path})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        meta = {"input_top_logprobs": TOP_LOGPROBS}
        self._answer(400 if "refuse" in body else 200, {"asked": body, "meta_info": meta})
        self.server.asked.append(body)  # type: ignore[attr-defined]

    def _answer(self, status: int, answer: Json) -> None:
        self.send_response(status)
        self.end_headers()
        self.wfile.write(json.dumps(answer).encode())

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[ThreadingHTTPServer]:
    found = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    found.asked = []  # type: ignore[attr-defined]
    Thread(target=found.serve_forever, daemon=True).start()
    yield found
    found.shutdown()
    found.server_close()


@pytest.fixture
def client(server: ThreadingHTTPServer) -> Client:
    return Client(f"http://127.0.0.1:{server.server_port}", timeout_s=5)


def test_generate(client: Client) -> None:
    greedy = {"max_new_tokens": 16, "temperature": 0.0, "ignore_eos": True}
    asked = client.generate("text")["asked"]
    assert asked == {"text": "text", "sampling_params": greedy}
    asked = client.generate((1, 2), sampling={"ignore_eos": False}, extra_key="a")["asked"]
    sampling = greedy | {"ignore_eos": False}
    assert asked == {"input_ids": [1, 2], "sampling_params": sampling, "extra_key": "a"}


def test_refusals_have_the_servers_words(client: Client) -> None:
    with pytest.raises(requests.HTTPError, match=r"^400 to POST /generate: .*refuse"):
        client.generate("text", refuse=True)
    with pytest.raises(requests.HTTPError, match="404 to GET /diffxkv/stats"):
        client.stats()


def test_a_server_is_healthy_or_gone(client: Client, tmp_path: Path) -> None:
    assert client.is_healthy()
    gone = f"http://127.0.0.1:{free_port()}"
    assert not Client(gone).is_healthy()
    with pytest.raises(requests.ConnectionError):
        Client(gone).stats()
    process = ServerProcess(log=tmp_path / "log")
    process.log.write_text("its last words")
    with pytest.raises(ServerError, match="no answer to GET /server_info\nits last words"):
        process.server_info()


def test_distributions_are_those_before_the_given_tokens(
    client: Client, server: ThreadingHTTPServer
) -> None:
    warm(client, [7, 8, 9], "a")
    assert distributions_after(client, [7, 8], [9], "a") == [{3: -0.1, 5: -2.4}]
    filled, read = server.asked  # type: ignore[attr-defined]
    assert filled["sampling_params"]["ignore_eos"] and filled["extra_key"] == "a"
    assert (read["input_ids"], read["logprob_start_len"], read["extra_key"]) == ([7, 8, 9], 1, "a")
    assert read["sampling_params"]["max_new_tokens"] == 1
