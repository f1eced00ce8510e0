# SPDX-License-Identifier: Apache-2.0
"""Quality through SGLang's own router, which hands on only what it knows of a request."""

from collections.abc import Iterator

import pytest
import requests

from sglang_diffxkv.demo.router.process import RouterProcess
from tests.support.harness import Json, Server

TEXT = "what is it? " * 30
CHAT = [{"role": "user", "content": TEXT}]
ANSWERS = {
    "/generate": {"text": TEXT, "sampling_params": {"max_new_tokens": 2}},
    "/v1/completions": {"prompt": TEXT, "max_tokens": 2},
    "/v1/chat/completions": {"messages": CHAT, "max_tokens": 2},
    # SGLang refuses the null that the router puts there otherwise
    "/v1/responses": {"input": TEXT, "max_output_tokens": 2, "stream": False},
}


@pytest.fixture(scope="module")
def router(workers_server: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of a router with one worker."""
    log = tmp_path_factory.mktemp("router") / "log"
    with RouterProcess([workers_server.url], log=log) as process:
        yield process.url


def post(url: str, path: str, model: str, body: Json | None = None) -> requests.Response:
    sent = {"model": model} | ANSWERS[path] | (body or {})
    return requests.post(url + path, json=sent, timeout=120)


@pytest.mark.parametrize("path", ANSWERS)
def test_the_models_name_says_it(router: str, workers_server: Server, path: str) -> None:
    for level in ("lossless", "high", "small", "balanced"):
        workers_server.flush_cache()
        answer = post(router, path, f"default:diffxkv={level}")
        assert answer.ok, answer.text
        pages = workers_server.stats()["pages_by_quality"]
        assert {name for name, count in pages.items() if count} == {level}


@pytest.mark.parametrize("path", ANSWERS)
def test_mistakes_come_back(router: str, path: str) -> None:
    for stream in (False, True):
        answer = post(router, path, "default:diffxkv=losless", {"stream": stream})
        assert answer.status_code == 400
        assert "did you mean 'lossless'?" in answer.text


def test_streams(router: str, workers_server: Server) -> None:
    workers_server.flush_cache()
    body = {"stream": True}
    answer = post(router, "/v1/chat/completions", "default:diffxkv=lossless", body)
    assert answer.ok and answer.text.rstrip().endswith("data: [DONE]")
    assert workers_server.stats()["pages_by_quality"]["lossless"] >= 2
