# SPDX-License-Identifier: Apache-2.0
"""How much a request's answer depends on earlier and on other traffic.

One greedy request of 990 + 128 tokens, with all prompt logprobs and the hidden states of its
answer: again, when its prefix is cached, after other traffic, beside it, and after `/flush_cache`;
each against the first time, when nothing was cached.

    python -m bench.serving.determinism
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np

from bench.serving.common import Shape, demo_model, table, write_results
from tests.support.harness import Json, Server
from tests.support.workload import mixed_prompts, random_tokens

CHUNK = 256
LOSSLESS = {"custom_params": {"diffxkv": {"quality": "lossless"}}}
PROMPT = random_tokens(random.Random(3), 990)
TRAFFIC: list[Json] = [{"prompt": p, "max_new_tokens": 40} for p in mixed_prompts(5, 40, 900)]


class Variant(NamedTuple):
    """A server, by its arguments, and what the request asks for."""

    name: str
    args: tuple[object, ...]
    sampling: Json


class Answer(NamedTuple):
    """Greedy tokens, and float arrays: logprobs of prompt and answer, hidden states [T, H]."""

    tokens: list[int]
    prompt: np.ndarray
    logprobs: np.ndarray
    hidden: np.ndarray


def ours(config: Json, *args: object) -> tuple[object, ...]:
    memory = {"memory_bytes": "40MiB", "raw_share": 0.4}
    return (
        "--attention-backend",
        "diffxkv",
        "--diffxkv-config",
        json.dumps(config | memory),
        *args,
    )


STOCK = ("--attention-backend", "torch_native", "--page-size", 64, "--max-total-tokens", 16384)
KEPT: Json = {"learn_share": 0}
"""No plan is learnt from traffic."""
VARIANTS = (
    Variant("stock", STOCK, {}),
    Variant("policy lossless", ours({"policy": "lossless"}), {}),
    Variant("quality lossless", ours({}), LOSSLESS),
    Variant("quality balanced", ours({}), {}),
    Variant("balanced, learn_share 0", ours(KEPT), {}),
    Variant(
        "balanced, learn_share 0, --disable-radix-cache", ours(KEPT, "--disable-radix-cache"), {}
    ),
)


def ask(server: Server, sampling: Json, start: int) -> Answer:
    """``start``: of the prompt's logprobs; from 0 SGLang takes no token from the cache."""
    answer = server.generate(
        PROMPT,
        max_new_tokens=128,
        sampling=sampling,
        return_logprob=True,
        logprob_start_len=start,
        return_hidden_states=True,
    )
    meta = answer["meta_info"]

    def values(name: str) -> np.ndarray:
        return np.array([x for x, *_ in meta[name] if x is not None])

    hidden = np.concatenate([np.atleast_2d(h)[-1:] for h in meta["hidden_states"]])
    return Answer(
        answer["output_ids"],
        values("input_token_logprobs"),
        values("output_token_logprobs"),
        hidden,
    )


def beside(server: Server, request: Callable[[], Answer]) -> Answer:
    with ThreadPoolExecutor(1) as pool:
        others = pool.submit(server.generate_many, TRAFFIC)
        time.sleep(0.5)
        answer = request()
        others.result()
    return answer


def compare(first: Answer, other: Answer) -> list[object]:
    """Equal tokens at the start, then the largest differences there; in logprobs and elements."""
    pairs = enumerate(zip(first.tokens, other.tokens, strict=True))
    same = next((i for i, (a, b) in pairs if a != b), len(first.tokens))

    def most(a: np.ndarray, b: np.ndarray) -> float | str:
        return float(np.abs(a - b).max()) if len(a) == len(b) > 0 else "-"

    return [
        same,
        most(first.prompt, other.prompt),
        most(first.logprobs[:same], other.logprobs[:same]),
        most(first.hidden[:same], other.hidden[:same]),
    ]


def measure(server: Server, sampling: Json) -> dict[str, list[object]]:
    first = ask(server, sampling, 0)
    found = {"again": ask(server, sampling, 0), "on its cached prefix": ask(server, sampling, -1)}
    server.generate_many(TRAFFIC)
    found["after others"] = ask(server, sampling, 0)
    found["beside others"] = beside(server, lambda: ask(server, sampling, 0))
    server.flush_cache()
    found["after a flush"] = ask(server, sampling, 0)
    return {name: compare(first, answer) for name, answer in found.items()}


def main() -> None:
    rows: list[list[object]] = [
        ["server", "asked", "equal tokens of 128", "prompt logprobs", "logprobs", "hidden states"]
    ]
    with demo_model(Shape(head_dim=64), dtype="float32") as model:
        for name, args, sampling in VARIANTS:
            common = ("--enable-return-hidden-states", "--chunked-prefill-size", CHUNK)
            with Server(model, *common, *args) as server:
                rows += [[name, when, *row] for when, row in measure(server, sampling).items()]
    text = (
        "Largest differences from the first answer, up to the first token that differs; `-` where "
        "there is nothing to compare.\n\n" + table(rows)
    )
    write_results("determinism", "Does an answer depend on traffic?", {"rows": rows}, text)


if __name__ == "__main__":
    main()
