# SPDX-License-Identifier: Apache-2.0
"""Recipes of faults that users of SGLang and its routers have reported, on a real server."""

from __future__ import annotations

import json
import random
import re
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import requests
import torch
from safetensors.torch import load_file, save_file

from tests.support.demo_model import write_demo_model
from tests.support.harness import Json, Server
from tests.support.workload import assert_healthy, random_tokens

PAGE = 64
ROWS = 8
LOSSLESS: Json = {"custom_params": {"diffxkv": {"quality": "lossless"}}}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """It asks for KV in fp8, and has scales for it."""
    folder = write_demo_model(tmp_path_factory.mktemp("fp8"), dtype="bfloat16")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "modelopt",
        "quant_algo": "FP8",
        "kv_cache_quant_algo": "FP8",
        "ignore": ["*"],
    }
    (folder / "config.json").write_text(json.dumps(config))
    tensors = load_file(folder / "model.safetensors")
    for layer in range(config["num_hidden_layers"]):
        for part in "kv":
            name = f"model.layers.{layer}.self_attn.{part}_proj.{part}_scale"
            tensors[name] = torch.tensor(0.02)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def server(checkpoint: Path) -> Iterator[Server]:
    """46 raw pages, of which lossless requests may hold 43."""
    config = {"policy": "diffkv", "memory_bytes": "30MiB", "raw_share": 0.2}
    args = ["--attention-backend", "diffxkv", "--diffxkv-config", json.dumps(config)]
    args += ["--max-running-requests", ROWS, "--enable-priority-scheduling", "--enable-metrics"]
    args += ["--decode-log-interval", 1, "--enable-return-hidden-states"]
    args += ["--chunked-prefill-size", 256, "--kv-cache-dtype", "fp8_e4m3"]
    with Server(checkpoint, *args, dtype="bfloat16") as server:
        assert server.stats()["raw_pages"] == 46
        yield server
        assert_healthy(server)


class Log:
    """What the server logs from here on."""

    def __init__(self, server: Server) -> None:
        self._server, self._start = server, len(server.log_text())

    def numbers(self, pattern: str) -> list[float]:
        return [float(x) for x in re.findall(pattern, self._server.log_text()[self._start :])]

    def most_running(self) -> float:
        return max(self.numbers(r"Decode batch, #running-req: (\d+)"))

    def prefills(self) -> int:
        return len(self.numbers(r"Prefill batch, #new-seq: (\d+)"))


def ask(server: Server, prompt: list[int], new: int, sampling: Json, priority: int = 0) -> Any:
    return server.generate(prompt, max_new_tokens=new, sampling=sampling, priority=priority)


def test_checkpoints_and_recipes_may_ask_for_fp8_kv(server: Server) -> None:
    """The server was healthy, and its first request ended the scheduler."""
    assert len(server.generate(random_tokens(random.Random(0), 200))["output_ids"]) == 16
    log = server.log_text().splitlines()
    asked = [line for line in log if "--kv-cache-dtype fp8_e4m3: raw pages stay" in line]
    checkpoint = [line for line in log if "asks for KV" in line]
    assert len(asked) == len(checkpoint) == 1
    assert "raw pages stay in the model's torch.bfloat16" in checkpoint[0]


def test_lossless_requests_share_raw_pages(server: Server) -> None:
    """Eight requests on one cached prefix of 19 pages ran two at a time."""
    server.flush_cache()
    rng = random.Random(1)
    prefix = random_tokens(rng, 19 * PAGE)
    ask(server, prefix, 1, LOSSLESS)
    prompts = [[*prefix, *random_tokens(rng, 20)] for _ in range(8)]
    log = Log(server)
    items = [{"prompt": p, "max_new_tokens": 64, "sampling": LOSSLESS} for p in prompts]
    server.generate_many(items)
    assert log.most_running() == 8
    log = Log(server)
    ask(server, random_tokens(rng, 19 * PAGE), 64, LOSSLESS | {"n": 8})
    assert log.most_running() == 8


def test_nobody_is_preempted_for_who_does_not_fit(server: Server) -> None:
    """Each step preempted a running request for one that was not admitted then."""
    server.flush_cache()
    rng = random.Random(2)
    with ThreadPoolExecutor(ROWS + 1) as pool:
        log = Log(server)
        first = pool.submit(ask, server, random_tokens(rng, 25 * PAGE), 300, LOSSLESS, 100)
        others = [
            pool.submit(ask, server, random_tokens(rng, 80), 300, {}) for _ in range(ROWS - 1)
        ]
        wait_for(lambda: log.most_running() == ROWS)
        prefills = log.prefills()
        second = pool.submit(ask, server, random_tokens(rng, 25 * PAGE), 20, LOSSLESS, 100)
        assert len(first.result()["output_ids"]) == 300
        assert len(second.result()["output_ids"]) == 20
        assert all(len(other.result()["output_ids"]) == 300 for other in others)
    assert log.prefills() <= prefills + 10, "7 chunks"


def test_lossless_requests_of_less_importance_make_room(server: Server) -> None:
    server.flush_cache()
    rng = random.Random(3)
    done: list[str] = []

    def run(name: str, priority: int, new: int) -> Any:
        answer = ask(server, random_tokens(rng, 25 * PAGE), new, LOSSLESS, priority)
        done.append(name)
        return answer

    with ThreadPoolExecutor(2) as pool:
        log = Log(server)
        low = pool.submit(run, "low", 0, 400)
        wait_for(lambda: log.most_running() == 1)
        high = pool.submit(run, "high", 100, 20)
        assert len(high.result()["output_ids"]) == 20
        assert len(low.result()["output_ids"]) == 400
    assert done == ["high", "low"]


def wait_for(condition: Any, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            if condition():
                return
        except ValueError:  # nothing logged yet
            pass
        time.sleep(0.05)
    raise TimeoutError


class Load(NamedTuple):
    """What a router reads."""

    used: int
    capacity: int
    usage: float


def published(server: Server) -> list[Load]:
    """By ``/v1/loads`` and by Prometheus."""
    load = server.get("/v1/loads").json()["loads"][0]
    text = server.get("/metrics").text

    def gauge(name: str) -> float:
        found = re.search(rf"^sglang:{name}{{[^}}]*}} (\S+)$", text, re.MULTILINE)
        assert found, name
        return float(found[1])

    names = ("num_used_tokens", "max_total_num_tokens", "token_usage")
    parts = [gauge(f"kv_{part}_tokens") for part in ("used", "evictable", "available")]
    assert sum(parts) <= gauge("max_total_num_tokens")
    return [Load(*(load[x] for x in names)), Load(*(gauge(x) for x in names))]  # type: ignore[arg-type]


@pytest.mark.parametrize("sampling", [{}, LOSSLESS], ids=["balanced", "lossless"])
def test_used_of_capacity_is_token_usage(server: Server, sampling: Json) -> None:
    """``num_used_tokens / max_total_num_tokens`` said 0.35 where ``token_usage`` said 0.85."""
    server.flush_cache()
    rng = random.Random(4)
    stats, info = server.stats(), server.server_info()
    capacity = info["max_total_num_tokens"]
    assert capacity < stats["virtual_pages"] * PAGE / 1.2
    state = info["internal_states"][0]
    assert state["memory_usage"]["token_capacity"] == capacity
    assert info["max_req_input_len"] < capacity
    items: list[Json] = [
        {"prompt": random_tokens(rng, 300), "max_new_tokens": 200, "sampling": sampling}
        for _ in range(6)
    ]
    seen: list[Load] = []
    with ThreadPoolExecutor(1) as pool:
        answers: Future[list[Any]] = pool.submit(server.generate_many, items)
        while not answers.done():
            seen += published(server)
            time.sleep(0.1)
    for load in seen:
        assert load.capacity == capacity
        assert load.used / load.capacity == pytest.approx(load.usage, abs=0.006)
    assert max(load.usage for load in seen) > (0.1 if not sampling else 0.5)


class Answer(NamedTuple):
    """What an evaluation reads."""

    tokens: list[int]
    logprobs: list[Any]
    prompt_logprobs: list[Any]
    hidden: list[Any]


def evaluated(server: Server, prompt: list[int], sampling: Json, start: int = 0) -> Answer:
    """Without ``start`` = 0 SGLang reads the cached prefix, for which it has no logprobs then."""
    answer = server.generate(
        prompt,
        max_new_tokens=100,
        sampling=sampling,
        return_logprob=True,
        logprob_start_len=start,
        return_hidden_states=True,
    )
    meta = answer["meta_info"]
    logprobs, prompt_logprobs = meta["output_token_logprobs"], meta["input_token_logprobs"]
    return Answer(answer["output_ids"], logprobs, prompt_logprobs, meta["hidden_states"])


def test_lossless_answers_do_not_depend_on_earlier_traffic(server: Server) -> None:
    """Bit for bit, when the same is computed; to rounding, when a part of it was cached."""
    server.flush_cache()
    rng = random.Random(6)
    prompt = random_tokens(rng, 990)
    first = evaluated(server, prompt, LOSSLESS)
    traffic: list[Json] = [
        {"prompt": random_tokens(rng, 400), "max_new_tokens": 30, "sampling": sampling}
        for sampling in (LOSSLESS, {}) * 6
    ]
    server.generate_many([*traffic, {"prompt": prompt, "max_new_tokens": 90}])
    assert evaluated(server, prompt, LOSSLESS) == first
    cached = evaluated(server, prompt, LOSSLESS, start=-1)
    assert error(last_hidden(cached), last_hidden(first)) < 0.02  # bf16 has 8 bits


def test_other_answers_depend_on_sealed_pages_until_they_are_flushed(server: Server) -> None:
    """docs/determinism.md; even prompt logprobs, which SGLang computes without cached tokens."""
    prompt = random_tokens(random.Random(7), 990)
    server.flush_cache()
    first = evaluated(server, prompt, {})
    assert evaluated(server, prompt, {}).prompt_logprobs != first.prompt_logprobs
    server.flush_cache()
    assert evaluated(server, prompt, {}) == first


def last_hidden(answer: Answer) -> list[float]:
    """Of the prompt's last token."""
    return list(answer.hidden[0][-1])


def error(actual: list[float], expected: list[float]) -> float:
    """Relative, by norm."""
    a, b = torch.tensor(actual), torch.tensor(expected)
    return float((a - b).norm() / b.norm())


def test_profiling_does_not_end_the_scheduler(server: Server, tmp_path: Path) -> None:
    body = {"num_steps": 2, "output_dir": str(tmp_path)}
    server.post("/start_profile", body | {"activities": ["CPU"]})
    server.generate([1, 2, 3], max_new_tokens=6)
    wait_for(lambda: list(tmp_path.glob("*.trace.json.gz")))
    for activity in ("MEM", "CUDA_PROFILER", "RPD"):
        with pytest.raises(requests.HTTPError, match="need a GPU"):
            server.post("/start_profile", body | {"activities": [activity]})
    server.generate([1, 2, 3], max_new_tokens=6)
