# SPDX-License-Identifier: Apache-2.0
"""Where the time of a prefill goes: the scheduler's Python stacks, sampled as in `decode_profile`.

Prompts are new in every round and answered with one token; a round ends with its last answer.

    python -m bench.serving.prefill_profile [--seconds 4]
"""

from __future__ import annotations

import random
import re
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from statistics import median

from bench.serving.common import (
    diffxkv_server,
    random_prompt,
    stock_server,
    write_results,
)
from bench.serving.decode_profile import (
    LOADS,
    POOL_TOKENS,
    Load,
    profile_parser,
    sample_stacks,
    sections,
)
from bench.serving.decode_profile import PARTS as DECODE_PARTS
from bench.serving.scale_process import processes
from sglang_diffxkv.bundled_model import BUNDLED
from tests.support.harness import Json, Server

PARTS: tuple[tuple[str, str, str], ...] = (
    ("ours", "attention", r"run .*kernels/extend/"),
    ("ours", "score", r"score_open .*kernels/score/"),
    ("ours", "write", r"write .*sglang_diffxkv/pool/"),
    ("ours", "queries that score, output", r"forward_extend .*sglang_diffxkv/"),
    ("model", "linear layers", r"patches/linear\.py"),  # ours to call, the model's to need
    *DECODE_PARTS,
)
"""As there: owner, name and pattern of a frame, the first to fit any frame wins."""
BETWEEN = r"idle_sleep|maybe_sleep|flush_wrapper\.py"
"""Frames of what happens between rounds."""


def part_of(stack: list[str]) -> str:
    """Owner and name of the first part that any of these frames is of."""
    found = next(part for part in PARTS if any(re.search(part[2], frame) for frame in stack))
    return f"{found[0]}: {found[1]}"


def rounds(server: Server, load: Load, rng: random.Random, seconds: float) -> list[float]:
    """Milliseconds of each round, as many as take `seconds` in all."""
    times: list[float] = []
    with ThreadPoolExecutor(load.batch) as pool:
        while sum(times) < 1000 * seconds:
            server.flush_cache()
            prompts = [random_prompt(rng, load.prompt) for _ in range(load.batch)]
            begin = time.perf_counter()
            list(pool.map(lambda prompt: server.generate(prompt, max_new_tokens=1), prompts))
            times.append(1000 * (time.perf_counter() - begin))
    return times


def run(server: Server, load: Load, seconds: int, lines: int) -> Json:
    """Profile one load: first the time of a round alone, then where it goes."""
    rng = random.Random(load.batch)
    rounds(server, load, rng, 0.5)
    times = rounds(server, load, rng, seconds)
    scheduler = processes(server)["scheduler"].pid
    with ThreadPoolExecutor(1) as pool:
        sampled = pool.submit(sample_stacks, scheduler, seconds)
        while not sampled.done():
            rounds(server, load, rng, 0.5)
    samples: Counter[str] = Counter()
    tops: Counter[str] = Counter()
    for stack, count in sampled.result():
        if any("event_loop" in x for x in stack) and not any(re.search(BETWEEN, x) for x in stack):
            samples[part_of(stack)] += count
            tops[";".join(stack[-3:])] += count
    for stack, count in tops.most_common(lines):
        print(count, stack)
    parts = {name: count / samples.total() for name, count in samples.items()}
    return {"rounds_ms": times, "samples": samples.total(), "parts": parts}


def report(runs: Json) -> str:
    """One table per load: parts by server."""

    def rows(load: Load) -> list[list[object]]:
        columns = {name: loads[load.name] for name, loads in runs.items()}
        times = [c["rounds_ms"] for c in columns.values()]
        found: list[list[object]] = [["", *columns]]
        found.append(["round, ms: median", *(f"{median(x):.1f}" for x in times)])
        found.append(
            ["round, ms: least to most", *(f"{min(x):.1f} to {max(x):.1f}" for x in times)]
        )
        for part in dict.fromkeys(f"{owner}: {name}" for owner, name, _ in PARTS):
            shares = [c["parts"].get(part, 0) for c in columns.values()]
            if any(shares):
                found.append([part, *(f"{100 * x:.1f} %" for x in shares)])
        return found

    return sections(__doc__.split("\n\n")[1], rows)


def main() -> None:
    parser = profile_parser(__doc__, "prefill_profile")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    options = parser.parse_args()
    runs: Json = {}
    for dtype in options.dtypes:
        servers = {
            f"stock, {dtype}": stock_server(BUNDLED, POOL_TOKENS, dtype=dtype),
            f"diffxkv, {dtype}": diffxkv_server(BUNDLED, {"memory_bytes": "256MiB"}, dtype=dtype),
        }
        for name, server in servers.items():
            with server:
                runs[name] = {x.name: run(server, x, options.seconds, options.lines) for x in LOADS}
    write_results(options.name, "Where the time of a prefill goes", {"runs": runs}, report(runs))


if __name__ == "__main__":
    main()
