# SPDX-License-Identifier: Apache-2.0
"""Chats that return when others have filled the pool: their pages come back from host memory."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from sglang_diffxkv.launch import free_port
from tests.support.harness import Json, Server
from tests.support.kv_events import GPU, HOST, CacheMirror, wait_until
from tests.support.workload import assert_healthy, hang_up, mixed_prompts, random_tokens

PAGE = 64
CHATS, PROMPT, TURN, ANSWER = 12, 700, 60, 40
BUSY = {"SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_BUSY": "1"}


def arguments(**config: object) -> list[str]:
    args = ["--attention-backend", "diffxkv", "--diffxkv-config", json.dumps(config)]
    return [*args, "--chunked-prefill-size", "512", "--enable-cache-report"]


@pytest.fixture(scope="module")
def model(make_model: Callable[..., Path]) -> Path:
    return make_model(dtype="float32", head_dim=64, layers=3)


Asked = tuple[list[int], Json]


def converse(server: Server, turns: int) -> list[list[Asked]]:
    """A turn of all chats after the other: what each of them said, and the answer."""
    rng = random.Random(7)
    chats = [random_tokens(rng, PROMPT) for _ in range(CHATS)]
    asked: list[list[Asked]] = []
    for _ in range(turns):
        asked.append([(chat, server.generate(chat, max_new_tokens=ANSWER)) for chat in chats])
        chats = [
            [*chat, *answer["output_ids"], *random_tokens(rng, TURN)] for chat, answer in asked[-1]
        ]
    return asked


def test_returning_chats_find_their_pages(model: Path) -> None:
    """All of them, bit for bit: answers are what the same prompts get from an empty cache."""
    config = arguments(policy="lossless", memory_bytes="14MiB", host_bytes="56MiB")
    with Server(model, *config, env=BUSY) as server:
        turns = converse(server, 3)
        for turn in turns[1:]:
            for chat, answer in turn:
                reused = answer["meta_info"]["cached_tokens"]
                assert reused > len(chat) - ANSWER - TURN - 2 * PAGE
        host = server.stats()["host"]
        assert host["offloaded"] > 50 and host["loaded_back"] > 50 and host["evicted"] == 0
        assert_healthy(server)
        for chat, answer in (asked for turn in turns for asked in turn[::3]):
            server.flush_cache()
            assert (
                server.generate(chat, max_new_tokens=ANSWER)["output_ids"] == answer["output_ids"]
            )


@pytest.fixture(scope="module")
def endpoint() -> str:
    """Where the server publishes KV events."""
    return f"tcp://127.0.0.1:{free_port()}"


@pytest.fixture(scope="module")
def server(model: Path, endpoint: str) -> Iterator[Server]:
    config = arguments(memory_bytes="6MiB", host_bytes="4MiB")
    events = json.dumps({"publisher": "zmq", "endpoint": endpoint, "bind": True})
    with Server(model, *config, "--kv-events-config", events, env=BUSY) as server:
        yield server
        assert_healthy(server)


def test_mixed_work_keeps_the_books(server: Server) -> None:
    """Concurrent requests of all qualities, some given up, with prefixes that come and go."""
    rng = random.Random(3)
    shared = [random_tokens(rng, 500) for _ in range(6)]
    for _ in range(2):
        items: list[Json] = [
            {"prompt": rng.choice(shared) + random_tokens(rng, 80), "max_new_tokens": 20}
            for _ in range(24)
        ]
        items += [{"prompt": prompt, "max_new_tokens": 8} for prompt in mixed_prompts(3, 8)]
        answers = server.generate_many(items, workers=6)
        assert all(answer["output_ids"] for answer in answers)
        hang_up(server, shared[0] + random_tokens(rng, 40))
    assert server.violations() == []
    host = server.stats()["host"]
    assert host["loaded_back"] > 0
    assert host["evicted"] > 0, "the host was full"


def test_flushed_on_every_level(server: Server) -> None:
    server.flush_cache()
    stats = server.stats()
    assert stats["host"]["pages"] == stats["host"]["bytes_in_use"] == stats["sealed_pages"] == 0


def test_kv_events_name_levels(server: Server, endpoint: str) -> None:
    """A consumer has on each medium as many blocks as the pool has pages there."""
    server.flush_cache()
    before = server.stats()["host"]
    with CacheMirror(endpoint) as mirror:
        time.sleep(0.5)  # a subscription takes a moment to reach the publisher
        for turn in converse(server, 3):
            wait_until(lambda: pages_by_medium(mirror) == pages_by_level(server))
            assert pages_by_medium(mirror) == pages_by_level(server)
            for chat, answer in turn[-2:]:
                prompt = chat + answer["output_ids"]
                expected = mirror.cached_tokens(prompt, PAGE)
                again = server.generate(prompt, max_new_tokens=1)["meta_info"]
                assert again["cached_tokens"] == expected
        crowd = [{"prompt": p, "max_new_tokens": 4} for p in mixed_prompts(5, 40, 1000)]
        server.generate_many(crowd)
        wait_until(lambda: pages_by_medium(mirror) == pages_by_level(server))
        assert pages_by_medium(mirror) == pages_by_level(server)
        host = server.stats()["host"]
        assert host["loaded_back"] > before["loaded_back"]
        assert host["evicted"] > before["evicted"]
        assert not mirror.faults
        server.flush_cache()
        wait_until(lambda: not mirror.blocks)
        assert not mirror.blocks


def pages_by_medium(mirror: CacheMirror) -> tuple[int, int]:
    return len(mirror.media[GPU]), len(mirror.media[HOST])


def pages_by_level(server: Server) -> tuple[int, int]:
    """On the device and on the host."""
    stats = server.stats()
    on_host = stats["host"]["pages"]
    return sum(stats["pages_by_quality"].values()) - on_host, on_host
