# SPDX-License-Identifier: Apache-2.0
"""The default policy as users run it: sharing, structured output, statistics, KV events."""

import json
import random
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.support.harness import Server
from tests.support.kv_events import CacheMirror, wait_until
from tests.support.workload import (
    SCHEMA,
    assert_healthy,
    mixed_prompts,
    quality,
    random_tokens,
)

PAGE = 64


@pytest.fixture(scope="module")
def events_endpoint() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"tcp://127.0.0.1:{probe.getsockname()[1]}"


@pytest.fixture(scope="module")
def server(make_model: Callable[..., Path], events_endpoint: str) -> Iterator[Server]:
    model = make_model(dtype="bfloat16", head_dim=128, layers=3)
    config = {"memory_bytes": "24MiB"}
    events = {"publisher": "zmq", "endpoint": events_endpoint, "bind": True}
    args = ["--attention-backend", "diffxkv", "--diffxkv-config", json.dumps(config)]
    args += ["--chunked-prefill-size", "512", "--enable-metrics", "--enable-cache-report"]
    args += ["--kv-events-config", json.dumps(events), "--constrained-json-disable-any-whitespace"]
    env = {"SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_BUSY": "1"}
    with Server(model, *args, dtype="bfloat16", env=env) as server:
        yield server
        assert_healthy(server)


@pytest.fixture(scope="module")
def mirror(server: Server, events_endpoint: str) -> Iterator[CacheMirror]:
    with CacheMirror(events_endpoint) as mirror:
        time.sleep(0.5)  # a subscription takes a moment to reach the publisher
        yield mirror


def sharing_prompts(seed: int) -> list[list[int]]:
    """Turns of five chats, each extending the turn before, and questions about one document."""
    rng = random.Random(seed)
    prompts = []
    for _ in range(5):
        chat: list[int] = []
        for _ in range(4):
            chat = chat + random_tokens(rng, rng.randint(30, 200))
            prompts.append(chat)
    document = random_tokens(rng, 1000)
    prompts += [document + random_tokens(rng, rng.randint(5, 90)) for _ in range(8)]
    return prompts


def test_prefix_hits_equal_stock(stock_server: Server, server: Server) -> None:
    """Whatever is sealed stays shared: the hits of every request, token for token."""
    hits = []
    for target in (stock_server, server):
        target.flush_cache()
        answers = [target.generate(p, max_new_tokens=8) for p in sharing_prompts(seed=11)]
        hits.append([answer["meta_info"]["cached_tokens"] for answer in answers])
    assert hits[0] == hits[1]
    assert sum(hits[1]) > 7 * 900


def test_sealed_prefix_is_read_not_recomputed(server: Server) -> None:
    server.flush_cache()
    document = random_tokens(random.Random(12), 20 * PAGE)
    server.generate([*document, 1, 2, 3], max_new_tokens=4)
    before = server.stats()
    assert before["sealed_pages"] >= 17
    answer = server.generate([*document, 7, 8, 9], max_new_tokens=4)
    after = server.stats()
    assert answer["meta_info"]["cached_tokens"] == len(document)
    assert after["counters"]["opened"] - before["counters"]["opened"] == 1
    assert after["sealed_pages"] >= before["sealed_pages"]


@pytest.mark.parametrize("length", [1, 2, 63, 64, 65, 100, 128, 190])
def test_repeated_prompts(server: Server, length: int) -> None:
    """A few new tokens after pages that are cached and open."""
    prompt = random_tokens(random.Random(f"again {length}"), length)
    answers = [server.generate(prompt, max_new_tokens=1) for _ in range(3)]
    answers.append(server.generate([*prompt, 7, 8, 9], max_new_tokens=1))
    cached = [answer["meta_info"]["cached_tokens"] for answer in answers]
    full = length // PAGE * PAGE
    assert cached == [0, *[(length - 1) // PAGE * PAGE] * 2, full]


def test_stats_everywhere_agree(server: Server) -> None:
    server.generate_many([{"prompt": p, "max_new_tokens": 4} for p in mixed_prompts(13, 24, 900)])
    stats = server.stats()
    assert server.server_info()["internal_states"][0]["diffxkv"] == stats
    parts, tiers = stats["bytes"], stats["tier_tokens"]
    assert parts["payload"] == 192 * tiers["high"] + 96 * tiers["low"]  # K8V4, K4V2 of 128
    assert parts["metadata"] == 10 * (tiers["high"] + tiers["low"])
    assert stats["bytes_in_use"] <= stats["bytes_total"] <= 24 << 20
    assert 0 < parts["overhead"] < 0.2 * stats["bytes_in_use"]
    # Frames by layer are counted on the device, frames used by the ledger, tiers by neither.
    sealed = stats["frames_used"] * stats["frame_bytes"]
    by_layer = sum(stats["sealed_bytes_per_token_by_layer"]) * stats["sealed_pages"] * PAGE
    assert by_layer == pytest.approx(sealed)
    assert 0.95 * sealed <= parts["payload"] + parts["metadata"] <= sealed
    entries = stats["sealed_pages"] * PAGE * 3 * 2  # layers, KV heads
    assert stats["tier_tokens"]["low"] > 0.1 * entries
    assert len(stats["sealed_bytes_per_token_by_layer"]) == 3
    dense = stats["tokens_held"] * 3 * 2 * 2 * 128 * 2
    assert stats["physical_compression"] == pytest.approx(dense / stats["bytes_in_use"])
    assert stats["physical_compression"] > 1.5
    for _ in range(20):  # gauges are exported once a second at most
        server.generate([1, 2, 3], max_new_tokens=2)
        gauges = server.get("/metrics").text
        if "sglang:diffxkv_sealed_pages{" in gauges:
            break
        time.sleep(0.3)
    for name in ("sealed_pages", "open_pages", "bytes_in_use", "physical_compression", "events"):
        assert f"sglang:diffxkv_{name}{{" in gauges


def test_token_usage_is_of_bytes(server: Server) -> None:
    """Virtual pages are plenty: by them alone usage could never come near 1."""
    server.flush_cache()
    rng = random.Random(16)
    items = [{"prompt": random_tokens(rng, 900), "max_new_tokens": 40} for _ in range(24)]
    begin = len(server.log_text())
    server.generate_many(items, workers=24)
    lines = [line for line in server.log_text()[begin:].splitlines() if "token usage: " in line]
    assert max(float(line.split("token usage: ")[1][:4]) for line in lines) > 0.7
    stats = server.stats()
    assert stats["tokens_held"] / (stats["virtual_pages"] * PAGE) < 0.7


def test_chat_schema_stream_and_samples(server: Server) -> None:
    chat = [{"role": "user", "content": "who is it? " * 30}]
    first = server.chat(chat, max_tokens=8)
    assert first["usage"]["completion_tokens"] <= 8
    chat += [{"role": "assistant", "content": "ada"}, {"role": "user", "content": "how old?"}]
    body = {
        "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}
    }
    second = server.chat(chat, max_tokens=80, **body)
    answer = json.loads(second["choices"][0]["message"]["content"])
    assert set(answer) == {"name", "old"}
    assert second["usage"]["prompt_tokens_details"]["cached_tokens"] >= 256
    texts = [event["text"] for event in server.stream([5] * 200, max_new_tokens=12)]
    assert len(texts) > 3
    samples = server.generate([9] * 300, max_new_tokens=90, sampling={"n": 3, "temperature": 1.0})
    assert len({tuple(sample["output_ids"]) for sample in samples}) == 3


def test_kv_events_mirror_the_cache(server: Server, mirror: CacheMirror) -> None:
    """Equal prompts in several qualities, and more of them than fits, so that blocks go, too."""
    server.flush_cache()
    mirror.clear()
    before = server.stats()["counters"]["evicted"]
    rng = random.Random(14)
    loose = ["balanced", "high", "small"]
    prompts = mixed_prompts(14, 36, 2000)
    crowd = [(prompt, level) for prompt in prompts for level in rng.sample(loose, 2)]
    crowd[::8] = [(prompt[:600], "lossless") for prompt, _ in crowd[::8]]
    last = [(p[:300], level) for p in prompts[-9::3] for level in (*loose, "lossless")]
    for requests in (crowd, last):
        server.generate_many(
            [
                {"prompt": prompt, "max_new_tokens": 12, "sampling": quality(level)}
                for prompt, level in requests
            ]
        )
    wait_until(lambda: _by_quality(mirror) == server.stats()["pages_by_quality"])
    assert _by_quality(mirror) == server.stats()["pages_by_quality"]
    assert all(_by_quality(mirror).values())
    assert all(len(block.tokens) == PAGE for block in mirror.blocks.values())
    assert all(block.parent in {None, *mirror.blocks} for block in mirror.blocks.values())
    assert server.stats()["counters"]["evicted"] > before
    for prompt, level in [*crowd[:5], *last]:
        salt = None if level == "balanced" else f"|diffxkv:{level}"
        expected = mirror.cached_tokens(prompt, PAGE, salt)
        answer = server.generate(prompt, max_new_tokens=1, sampling=quality(level))
        assert answer["meta_info"]["cached_tokens"] == expected
        wait_until(lambda: _by_quality(mirror) == server.stats()["pages_by_quality"])
    assert not mirror.faults
    server.flush_cache()
    wait_until(lambda: not mirror.blocks)
    assert not mirror.blocks


def _by_quality(mirror: CacheMirror) -> dict[str, int]:
    """Blocks of each quality, as `/diffxkv/stats` counts pages."""
    counts = mirror.count_by_salt()
    levels = {"lossless": 0, "high": 0, "small": 0} | {"balanced": counts[None]}
    return levels | {salt.split(":")[1]: n for salt, n in counts.items() if salt is not None}


def test_pressure_with_compression(server: Server) -> None:
    rng = random.Random(15)
    items = [
        {"prompt": p, "max_new_tokens": rng.randint(1, 150)} for p in mixed_prompts(15, 100, 1500)
    ]
    with ThreadPoolExecutor(1) as pool:
        answering = pool.submit(server.generate_many, items, workers=32)
        checks = 0
        while not answering.done():  # the pool's state adds up between any two steps
            assert server.violations() == []
            checks += 1
            time.sleep(0.5)
        answers = answering.result()
    assert checks > 3
    for item, answer in zip(items, answers, strict=True):
        assert len(answer["output_ids"]) == item["max_new_tokens"]
    assert server.stats()["counters"]["sealed_under_pressure"] > 0
    assert_healthy(server)


def test_cold_chats_are_demoted(server: Server) -> None:
    """More chats than fit, whose turns come in any order: what is idle for long loses tiers."""
    server.flush_cache()
    before = server.stats()["counters"]
    rng = random.Random(17)
    chats: list[list[int]] = [[] for _ in range(40)]
    for _ in range(3):
        chats = [chat + random_tokens(rng, rng.randint(150, 500)) for chat in chats]
        rng.shuffle(chats)
        server.generate_many([{"prompt": chat, "max_new_tokens": 20} for chat in chats])
    stats = server.stats()
    events = {name: count - before[name] for name, count in stats["counters"].items()}
    assert events["demoted"] > 0 and events["frames_demoted"] > 0
    assert events["evicted"] > 0
    assert stats["tier_tokens"]["pruned"] > 0
    assert_healthy(server)
