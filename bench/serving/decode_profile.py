# SPDX-License-Identifier: Apache-2.0
"""Where the time of a decode step goes: the scheduler's Python stacks, sampled while it decodes.

py-spy, which SGLang brings, reads the stacks from outside, so the server runs as it is. Time in a
C++ kernel or a torch operation counts for the line that called it.

    python -m bench.serving.decode_profile --state before    # on an old commit
    python -m bench.serving.decode_profile --state after
"""

from __future__ import annotations

import argparse
import json
import random
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from bench.serving.common import (
    RESULTS,
    command_line,
    diffxkv_server,
    random_prompt,
    stock_server,
    table,
    write_results,
)
from bench.serving.scale_process import processes
from sglang_diffxkv.bundled_model import BUNDLED
from tests.support.harness import Json, Server

RATE = 250
"""Samples per second."""
POOL_TOKENS = 32768
MOST_TOKENS = 2400
"""More than any load decodes while it is watched: what is left is aborted."""
SKIP_STEPS = 20


class Load(NamedTuple):
    """Requests that decode together."""

    batch: int
    prompt: int

    @property
    def name(self) -> str:
        return f"batch {self.batch}"

    def section(self, rows: list[list[object]]) -> str:
        """Its part of a report."""
        return f"## {self.batch} at once, prompts of {self.prompt} tokens\n\n{table(rows)}"


LOADS = (Load(1, 1500), Load(16, 512))

PARTS: tuple[tuple[str, str, str], ...] = (
    ("ours", "seal, count scores", r"end_of_step .*sglang_diffxkv"),
    ("ours", "metadata of the step", r"init_forward_metadata .*sglang_diffxkv"),
    ("ours", "write, attend, merge, score", r"forward_decode .*sglang_diffxkv"),
    ("ours", "RMSNorm, rotary, activation", r"sglang_diffxkv/(kernels|patches)/layers"),
    ("ours", "allocator", r"sglang_diffxkv/pool/"),
    ("model", "linear layers", r"srt/layers/linear\.py|quantization/unquant\.py"),
    ("ours", "hooks", r"sglang_diffxkv/patches/"),
    ("model", "attention of stock", r"torch_native_backend\.py"),
    ("model", "RMSNorm", r"layernorm\.py"),
    ("model", "rotary embedding", r"rotary_embedding/"),
    ("model", "activation", r"activation\.py"),
    ("model", "embedding, logits", r"vocab_parallel_embedding\.py|logits_processor\.py"),
    ("model", "glue of the model", r"models/"),
    ("scheduler", "sampler", r"sampler\.py|sampling/"),
    ("scheduler", "forward batch", r"forward_batch_info\.py|model_runner\.py"),
    ("scheduler", "tensor-parallel worker", r"tp_worker\.py"),
    ("scheduler", "results, output", r"batch_result_processor|output_processor|output_streamer"),
    ("scheduler", "next batch", r"schedule_batch\.py|get_next_batch_to_run|schedule_policy\.py"),
    ("scheduler", "other", r"."),
)
"""Owner, name and pattern of a frame, `function (file:line)`; the first to fit any frame wins."""


def part_of(stack: list[str]) -> tuple[str, str]:
    """Owner and name of the first part that any of these frames is of."""
    found = next(part for part in PARTS if any(re.search(part[2], frame) for frame in stack))
    return found[0], found[1]


class Profile(NamedTuple):
    """Samples by part while some steps ran, and milliseconds of a step without the profiler."""

    samples: Counter[tuple[str, str]]
    step_ms: float
    lines: Counter[str]


def sample_stacks(pid: int, seconds: int) -> list[tuple[list[str], int]]:
    """Stacks, outermost frame first, with how often each was seen."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "stacks.txt"
        spy = Path(sys.executable).with_name("py-spy")
        command = [spy, "record", "--pid", pid, "--rate", RATE, "--duration", seconds]
        command += ["--format", "raw", "--output", path, "--idle", "--full-filenames"]
        done = subprocess.run([str(x) for x in command], capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(done.stderr)
        lines = path.read_text().splitlines()
    stacks = []
    for line in lines:
        text, _, count = line.rpartition(" ")
        stacks.append((text.split(";"), int(count)))
    return stacks


def run(server: Server, load: Load, seconds: int) -> Profile:
    """Profile one load: first the time of a step alone, then where it goes."""
    rng = random.Random(load.batch)
    scheduler = processes(server)["scheduler"].pid
    step_ms = decode(server, load, rng, lambda: time.sleep(seconds))
    stacks: list[tuple[list[str], int]] = []
    decode(server, load, rng, lambda: stacks.extend(sample_stacks(scheduler, seconds)))
    samples: Counter[tuple[str, str]] = Counter()
    lines: Counter[str] = Counter()
    for stack, count in stacks:
        if not any("event_loop" in frame for frame in stack):
            continue  # another thread
        samples[part_of(stack)] += count
        lines[";".join(stack[-3:])] += count
    return Profile(samples, step_ms, lines)


def decode(server: Server, load: Load, rng: random.Random, work: Callable[[], None]) -> float:
    """Run `work` while the load decodes; milliseconds of a step meanwhile."""
    server.flush_cache()
    prompts = [random_prompt(rng, load.prompt) for _ in range(load.batch)]
    stamps: list[float] = []

    def follow() -> None:
        for _ in server.stream(prompts[0], max_new_tokens=MOST_TOKENS):
            stamps.append(time.perf_counter())

    with ThreadPoolExecutor(load.batch) as pool:
        streams = [pool.submit(follow)]
        for prompt in prompts[1:]:
            streams.append(pool.submit(server.generate, prompt, max_new_tokens=MOST_TOKENS))
        while len(stamps) < load.batch + SKIP_STEPS:  # until all have been prefilled
            time.sleep(0.01)
        first, begin = len(stamps), time.perf_counter()
        work()
        seconds, steps = time.perf_counter() - begin, len(stamps) - first
        if any(stream.done() for stream in streams):
            raise SystemExit("the load ended before it was measured: lower --seconds")
        server.post("/abort_request", {"abort_all": True})
    return 1000 * seconds / steps


def summary(profile: Profile) -> Json:
    """Milliseconds of a step by owner and part."""
    total = profile.samples.total()
    parts = {}
    for owner, name, _ in PARTS:
        count = profile.samples[owner, name]
        if count:
            parts[f"{owner}: {name}"] = profile.step_ms * count / total
    return {"step_ms": profile.step_ms, "samples": total, "parts_ms": parts}


def profile_parser(about: str, name: str) -> argparse.ArgumentParser:
    made = command_line(about, name)
    made.add_argument("--seconds", type=int, default=4)
    made.add_argument("--lines", type=int, default=0, help="print the most frequent stacks")
    return made


def sections(about: str, rows: Callable[[Load], list[list[object]]]) -> str:
    """Markdown: what was done, then a table for each load."""
    return "\n\n".join([about, *(load.section(rows(load)) for load in LOADS)])


def report(result: Json) -> str:
    """One table per load: parts by server and state."""

    def rows(load: Load) -> list[list[object]]:
        columns = {
            name: loads[load.name] for name, loads in result["runs"].items() if load.name in loads
        }
        found: list[list[object]] = [["milliseconds of a step", *columns]]
        found.append(["whole step", *(f"{c['step_ms']:.2f}" for c in columns.values())])
        for owner, name, _ in PARTS:
            key = f"{owner}: {name}"
            cells = [c["parts_ms"].get(key, 0) for c in columns.values()]
            if any(cells):
                found.append([key, *(f"{cell:.2f}" for cell in cells)])
        return found

    return sections(__doc__.split("\n\n")[1], rows)


def main() -> None:
    parser = profile_parser(__doc__, "decode_profile")
    parser.add_argument("--state", default="after", help="name of our column")
    parser.add_argument("--dtype", default="float32")
    options = parser.parse_args()
    path = RESULTS / f"{options.name}.json"
    result: Json = {"runs": json.loads(path.read_text())["runs"] if path.exists() else {}}
    args = ["--context-length", 4096, "--stream-interval", 1]
    servers = {
        "stock": stock_server(BUNDLED, POOL_TOKENS, *args, dtype=options.dtype),
        f"diffxkv, {options.state}": diffxkv_server(
            BUNDLED, {"memory_bytes": "256MiB"}, *args, dtype=options.dtype
        ),
    }
    for name, server in servers.items():
        with server:
            for load in LOADS:
                profile = run(server, load, options.seconds)
                result["runs"].setdefault(name, {})[load.name] = summary(profile)
                for stack, count in profile.lines.most_common(options.lines):
                    print(count, stack)
    write_results(options.name, "Where the time of a decode step goes", result, report(result))


if __name__ == "__main__":
    main()
