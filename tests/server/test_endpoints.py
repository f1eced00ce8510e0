# SPDX-License-Identifier: Apache-2.0
"""Every endpoint that generates takes a quality, wherever a request says it, on every worker."""

import asyncio
from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

import aiohttp
import pytest
import requests

from tests.support.harness import Server
from tests.support.workload import quality

TEXT = "what is it? " * 30
CHAT = [{"role": "user", "content": TEXT}]
GREEDY = {"max_new_tokens": 2, "temperature": 0.0}
ANSWERS = {
    "/generate": {"text": TEXT, "sampling_params": GREEDY},
    "/v1/completions": {"prompt": [TEXT, "you? " * 60], "max_tokens": 2},
    "/v1/chat/completions": {"messages": CHAT, "max_tokens": 2},
    "/v1/responses": {"input": TEXT, "max_output_tokens": 2},
    "/v1/messages": {"messages": CHAT, "max_tokens": 2},
    "/v1/score": {"query": TEXT, "items": ["a", "b"], "label_token_ids": [1, 2]},
    "/api/chat": {"messages": CHAT, "stream": False, "options": {"num_predict": 2}},
    "/api/generate": {"prompt": TEXT, "stream": False, "options": {"num_predict": 2}},
    "/invocations": {"messages": CHAT, "max_tokens": 2},
    "/vertex_generate": {"instances": [{"text": TEXT}], "parameters": {"sampling_params": GREEDY}},
}
"""Bodies for the endpoints that generate, or score tokens, with the demo model."""


class Way(NamedTuple):
    """Where a request says its quality: nowhere, unless in one of these."""

    headers: Mapping[str, str] = MappingProxyType({})
    body: Mapping[str, object] = MappingProxyType({})


def ways(level: str) -> dict[str, Way]:
    return {
        "header": Way(headers={"X-DiffXKV-Quality": level}),
        "custom_params": Way(body=quality(level)),
        "model": Way(body={"model": f"default:diffxkv={level}"}),
    }


def post(server: Server, path: str, way: Way, **body: object) -> requests.Response:
    sent = {"model": "default"} | ANSWERS[path] | dict(way.body) | body
    return requests.post(server.url + path, json=sent, headers=dict(way.headers), timeout=120)


@pytest.mark.parametrize("path", ANSWERS)
def test_it_is_taken(workers_server: Server, path: str) -> None:
    server = workers_server
    for name, way in ways("lossless").items():
        server.flush_cache()
        answer = post(server, path, way)
        assert answer.ok, (name, answer.text)
        pages = server.stats()["pages_by_quality"]
        assert pages["lossless"] >= 2 and not pages["balanced"], name


@pytest.mark.parametrize("path", ANSWERS)
def test_mistakes_are_http_400(workers_server: Server, path: str) -> None:
    for stream in ({}, {"stream": True}):
        for name, way in ways("losless").items():
            answer = post(workers_server, path, way, **stream)
            assert answer.status_code == 400, name
            assert "did you mean 'lossless'?" in answer.text
            assert answer.json(), "an error in the manner of the API"


@pytest.mark.parametrize("header", ["X-DiffXKV-Qualty", "X-DiffXKV", "X-DiffKV-Quality"])
def test_misspelt_headers_are_http_400(workers_server: Server, header: str) -> None:
    answer = post(workers_server, "/generate", Way(headers={header: "high"}))
    assert answer.status_code == 400
    assert "did you mean 'X-DiffXKV-Quality'?" in answer.json()["error"]["message"]


def test_forms_are_checked_too(workers_server: Server) -> None:
    """Our model takes no audio, but says so only when its turn comes."""
    for name, way in ways("losless").items():
        if name == "custom_params":
            continue
        answer = requests.post(
            workers_server.url + "/v1/audio/transcriptions",
            data=dict(way.body),
            files={"file": b"RIFF"},
            headers=dict(way.headers),
            timeout=60,
        )
        assert answer.status_code == 400
        assert "did you mean 'lossless'?" in answer.text


def test_websockets_are_refused_too(workers_server: Server) -> None:
    async def status() -> int:
        async with aiohttp.ClientSession() as session:
            headers = {"X-DiffXKV-Quality": "losless"}
            try:
                await session.ws_connect(workers_server.url + "/v1/realtime", headers=headers)
            except aiohttp.WSServerHandshakeError as error:
                return error.status
            return 101

    assert asyncio.run(status()) == 400


def test_what_is_said_twice_must_agree(workers_server: Server) -> None:
    headers = {"X-DiffXKV-Quality": "high"}
    model = {"model": "default:diffxkv=high"}
    for body in (quality("high"), model, quality("high") | model):
        assert post(workers_server, "/v1/messages", Way(headers, body)).ok
    for body in (quality("small"), {"model": "default:diffxkv=small"}, quality("small") | model):
        answer = post(workers_server, "/v1/messages", Way(headers, body))
        assert answer.status_code == 400
        assert "do not agree" in answer.text


def test_prompts_of_a_batch(workers_server: Server) -> None:
    """Each may ask for its own, unless the request as a whole does."""
    server = workers_server
    texts = ["one? " * 60, "two? " * 60, "six? " * 60]
    params = [GREEDY | quality("high"), GREEDY | quality("small"), GREEDY]
    batch = {"text": texts, "sampling_params": params}
    server.flush_cache()
    assert post(server, "/generate", Way(), **batch).ok
    pages = server.stats()["pages_by_quality"]
    assert pages["high"] == pages["small"] == pages["balanced"] > 0
    whole = Way(headers={"X-DiffXKV-Quality": "high"})
    assert post(server, "/generate", whole, **batch).status_code == 400
    server.flush_cache()
    assert post(server, "/generate", whole, **batch | {"sampling_params": params[::2] * 2}).ok


def test_every_worker_says_what_runs(workers_server: Server) -> None:
    """Its answers find their way back to the worker that asked."""
    for _ in range(8):
        assert workers_server.get("/diffxkv/requests").json() == []
        assert workers_server.get("/diffxkv").text.startswith("<!doctype html>")
