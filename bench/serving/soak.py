# SPDX-License-Identifier: Apache-2.0
"""Mixed requests under memory pressure, with SGLang's leak checks on, for each kind of serving.

    python -m bench.serving.soak [--requests 500] [--kinds ngram,standalone,gemma3,gpt_oss,...]

Of random lengths, with shared prefixes, several samples, JSON schemas, aborts, qualities, sixteen
at once, policy `diffxkv`. With host memory, or that and a disk, a third of the prompts have been
there before. Afterwards the pool is recounted, and flushed: nothing may be left. Kinds that are not
asked for stay in bench/results as they were.
"""

from __future__ import annotations

import json
import random
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from bench.serving.common import RESULTS, command_line, retractions, table, write_results
from tests.support.demo_model import write_demo_model
from tests.support.harness import Json, Server, models_but
from tests.support.window_models import write_window_model
from tests.support.workload import (
    answer_in_json,
    assert_healthy,
    hang_up,
    mixed_prompts,
    quality,
)

REQUESTS = {"plain": 60, "n=3": 8, "json": 8, "abort": 12, "lossless": 6, "small": 6}
"""Kinds of requests, and how many of a hundred."""
DRAFTS = {"ngram": 8, "standalone": 4}
WINDOWS = {"gemma3": ("wwwwwf", "gemma3_causal"), "gpt_oss": ("wf", "gpt_oss")}
"""Layers in turn, and the file of SGLang that has the model."""
LEVELS = {
    "host": {"host_bytes": "12MiB"},
    "disk": {"host_bytes": "12MiB", "disk_bytes": "64MiB"},
}
COMBINED = ("ngram-disk", "gemma3-host")
KINDS = (*DRAFTS, *WINDOWS, *LEVELS, *COMBINED)
EVENTS = ("sealed", "offloaded", "loaded_back", "demoted", "evicted")
MEMORY = {"standalone": "40MiB", "gemma3-host": "24MiB"}
"""With the draft model's KV in it; 16 MiB elsewhere."""


@contextmanager
def serve(kind: str) -> Iterator[Server]:
    parts = kind.split("-")
    config: Json = {"memory_bytes": MEMORY.get(kind, "16MiB"), "raw_share": 0.3}
    args: list[object] = ["--attention-backend", "diffxkv", "--chunked-prefill-size", 128]
    args += ["--schedule-conservativeness", 0.1, "--constrained-json-disable-any-whitespace"]
    env = {"SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_BUSY": "1"}
    with TemporaryDirectory(prefix="soak-") as name, TemporaryDirectory(prefix="soak-") as disk:
        folder = Path(name)
        if parts[0] in WINDOWS:
            layers, file = WINDOWS[parts[0]]
            write_window_model(folder, parts[0], layers)
            env["SGLANG_DISABLED_MODEL_ARCHS"] = ",".join(models_but(file))
        else:
            write_demo_model(folder)
        for method in set(parts) & set(DRAFTS):
            args += ["--speculative-algorithm", method.upper()]
            args += ["--speculative-num-draft-tokens", DRAFTS[method]]
            args += ["--speculative-draft-model-path", folder] if method == "standalone" else []
        for level in set(parts) & set(LEVELS):
            config |= LEVELS[level]
            config |= {"disk_path": disk} if level == "disk" else {}
        if kind == "gpt_oss":  # what SGLang has for its experts on a CPU
            args += ["--moe-runner-backend", "triton"]
        with Server(folder, *args, "--diffxkv-config", json.dumps(config), env=env) as server:
            yield server


def returning(rng: random.Random, prompts: list[list[int]]) -> list[list[int]]:
    """A third of them are an earlier one, and some tokens more."""
    found: list[list[int]] = []
    for prompt in prompts:
        if found and rng.random() < 1 / 3:
            prompt = [*rng.choice(found)[:900], *prompt[:40]]
        found.append(prompt)
    return found


def send(server: Server, kind: str, prompt: list[int], new: int) -> None:
    """One request, whose answer must be whole.

    Raises:
        AssertionError: it is not. requests.HTTPError: it was refused.
    """
    if kind == "abort":
        hang_up(server, prompt)
        return
    if kind == "json":
        json.loads(answer_in_json(server, prompt))
        return
    sampling = {"n=3": {"n": 3, "temperature": 0.7}}.get(kind, {})
    if kind in ("lossless", "small"):
        sampling, prompt = quality(kind), prompt[:400]  # raw pages must hold a lossless one
    answers = server.generate(prompt, max_new_tokens=new, sampling=sampling)
    for answer in answers if isinstance(answers, list) else [answers]:
        assert len(answer["output_ids"]) == new


def soak(kind: str, count: int) -> Json:
    """What happened to so many requests on a server of that kind."""
    rng = random.Random(kind)
    asked = rng.choices([*REQUESTS], [*REQUESTS.values()], k=count)
    prompts = mixed_prompts(seed=count, count=count, longest=900)
    if set(kind.split("-")) & set(LEVELS):
        prompts = returning(rng, prompts)
    jobs = [(what, prompt, rng.randint(1, 96)) for what, prompt in zip(asked, prompts, strict=True)]
    with serve(kind) as server:
        begin = time.monotonic()
        with ThreadPoolExecutor(16) as pool:
            for _ in pool.map(lambda job: send(server, *job), jobs):
                pass
        seconds = time.monotonic() - begin
        assert_healthy(server)
        stats = server.stats()
        server.flush_cache()
        left = server.stats()["bytes_in_use"]
        assert left == 0, f"{left} bytes are in use after a flush"
        assert not any((server.stats()[level] or {}).get("pages") for level in LEVELS)
        assert_healthy(server)
        log = server.log_text()
    return {
        "requests": dict(Counter(asked)),
        "seconds": seconds,
        "retractions": retractions(log),
        "counters": stats["counters"],
        "levels": {level: stats[level] for level in LEVELS},
    }


def report(runs: dict[str, Json]) -> str:
    head = ["kind", "requests", "seconds", "retracted", *EVENTS, "from disk"]
    rows: list[list[Any]] = [head]
    for kind, run in runs.items():
        events = [run["counters"].get(name, 0) for name in EVENTS]
        events.append((run.get("levels", {}).get("disk") or {}).get("hits", 0))
        asked = sum(run["requests"].values())
        rows.append([kind, asked, f"{run['seconds']:.0f}", run["retractions"], *events])
    return (
        f"{table(rows)}\n\nEvents are of pages. No leak or byte check complained, "
        "busy or idle; the recounted pool was right, and empty after a flush."
    )


def main() -> None:
    made = command_line(__doc__ or "", "soak")
    made.add_argument("--requests", type=int, default=500)
    made.add_argument("--kinds", default=",".join(KINDS))
    args = made.parse_args()
    path = RESULTS / f"{args.name}.json"
    runs: dict[str, Json] = json.loads(path.read_text())["runs"] if path.exists() else {}
    for kind in args.kinds.split(","):
        runs[kind] = soak(kind, args.requests)
        write_results(args.name, "Soak under memory pressure", {"runs": runs}, report(runs))


if __name__ == "__main__":
    main()
