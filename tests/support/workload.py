# SPDX-License-Identifier: Apache-2.0
"""Requests that several test files send, and how to compare answers."""

import json
import random
from collections.abc import Sequence
from typing import Any

import requests

from tests.support.harness import Json, Server

TIE = 2e-3
"""Two next tokens closer than this in log-probability are a tie: which one wins depends on the
shapes of the batch's matrix products, in stock SGLang as much as here."""

_EXPECTED: dict[str, list[int]] = {}

SCHEMA = {
    "type": "object",
    "properties": {"name": {"enum": ["ada", "bob"]}, "old": {"type": "boolean"}},
    "required": ["name", "old"],
}


def random_tokens(rng: random.Random, length: int) -> list[int]:
    return [rng.randrange(256) for _ in range(length)]


def quality(level: object) -> Json:
    """Sampling parameters that ask for it; none where `level` is None."""
    return {} if level is None else {"custom_params": {"diffxkv": {"quality": level}}}


def mixed_prompts(seed: int, count: int, longest: int = 3000) -> list[list[int]]:
    """Random prompts of 1 to ``longest`` tokens; a third share one of three long prefixes."""
    rng = random.Random(seed)
    prefixes = [random_tokens(rng, n) for n in (200, 640, 1100)]
    prompts = []
    for i in range(count):
        if i % 3 == 2:
            tail = random_tokens(rng, rng.randint(1, 300))
            prompts.append(rng.choice(prefixes) + tail)
        else:
            length = min(longest, int(2 ** rng.uniform(0, 12)))
            prompts.append(random_tokens(rng, max(1, length)))
    prompts[0] = random_tokens(rng, longest)
    prompts[1] = random_tokens(rng, 1)
    return prompts


def answer_in_json(server: Server, prompt: list[int]) -> str:
    """The text of an answer that follows `SCHEMA`."""
    sampling = {"json_schema": json.dumps(SCHEMA), "ignore_eos": False}
    text: str = server.generate(prompt, max_new_tokens=60, sampling=sampling)["text"]
    return text


def hang_up(server: Server, prompt: list[int]) -> None:
    """Ask for a long answer, and go after its first tokens: SGLang then aborts the request."""
    body = {"input_ids": prompt, "stream": True}
    body |= {"sampling_params": {"max_new_tokens": 200, "ignore_eos": True}}
    with requests.post(server.url + "/generate", json=body, stream=True) as response:
        next(response.iter_lines())


def outputs(answers: Sequence[Any]) -> list[list[int]]:
    return [answer["output_ids"] for answer in answers]


def expected_outputs(stock: Server, items: Sequence[Json]) -> list[list[int]]:
    """Of stock SGLang, which is asked once for what several tests compare with."""
    keys = [f"{stock.url} {json.dumps(item)}" for item in items]
    new = {key: item for key, item in zip(keys, items, strict=True) if key not in _EXPECTED}
    answers = stock.generate_many(list(new.values()))
    _EXPECTED.update(zip(new, outputs(answers), strict=True))
    return [_EXPECTED[key] for key in keys]


def is_tie(server: Server, prompt: list[int], expected: list[int], got: list[int]) -> bool:
    """Whether two greedy outputs part at a step where stock SGLang's two best tokens are level."""
    same = next((i for i, (a, b) in enumerate(zip(expected, got, strict=True)) if a != b), None)
    if same is None:
        return True
    answer: Json = server.generate(
        prompt + expected[:same], max_new_tokens=1, return_logprob=True, top_logprobs_num=2
    )
    (first, token_1, _), (second, token_2, _) = answer["meta_info"]["output_top_logprobs"][0]
    return first - second < TIE and {token_1, token_2} == {expected[same], got[same]}


def assert_same_outputs(
    stock: Server, prompts: Sequence[list[int]], expected: list[list[int]], got: list[list[int]]
) -> None:
    """Greedy outputs are identical, up to at most two ties."""
    different = [i for i, (a, b) in enumerate(zip(expected, got, strict=True)) if a != b]
    real = [i for i in different if not is_tie(stock, prompts[i], expected[i], got[i])]
    assert not real, f"outputs of prompts {real} differ"
    assert len(different) <= 2, f"{len(different)} of {len(prompts)} outputs differ, if by ties"


def assert_healthy(server: Server) -> None:
    """Alive, the pool's tables add up, and neither leak checks nor byte accounting complained."""
    assert server.is_alive()
    log = server.log_text()
    # byte accounting is reported as a leak of the pool "pool-bytes"
    for complaint in ("leak detected", "Mem Check", "hit an exception"):
        assert complaint not in log, f"{complaint!r} in {server.log}"
    assert server.violations() == []
