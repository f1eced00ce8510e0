# SPDX-License-Identifier: Apache-2.0
"""Whole servers where memory is ample: diffxkv against stock SGLang, by SGLang's own benchmark.

Both servers are up all the time, asleep unless asked, one thread each. Every round puts each load
to one and then to the other, in alternating order, with empty caches: whatever else the machine
does hits both. A run adds its rounds to those in bench/results of the same model and dtype, so a
long measurement can be made in pieces; `--fresh` drops them.

    python -m bench.serving.ample --fresh --rounds 4
    python -m bench.serving.ample --dtype bfloat16
    python -m bench.serving.ample --model SmolLM2-135M --label SmolLM2-135M --pool-tokens 32768
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import sys
import tempfile
from pathlib import Path

from bench.serving.ample_report import plot, report
from bench.serving.common import (
    RESULTS,
    command_line,
    diffxkv_server,
    page_floor,
    stock_server,
    write_results,
)
from sglang_diffxkv.bundled_model import BUNDLED
from sglang_diffxkv.eval.model import load_model
from tests.support.harness import Json, Server

LOADS = {
    "16 at once, 512 + 64": (
        "random-ids --num-prompts 16 --random-input-len 512 --random-output-len 64"
    ),
    "alone, 1,500 + 128": (
        "random-ids --num-prompts 2 --max-concurrency 1 --random-input-len 1500 "
        "--random-output-len 128"
    ),
    "shared prefix, 4 x 4, 512 + 64 + 64": (
        "generated-shared-prefix --num-prompts 16 --gsp-num-groups 4 --gsp-prompts-per-group 4 "
        "--gsp-system-prompt-len 512 --gsp-question-len 64 --gsp-output-len 64"
    ),
}
WARM_UP = "random-ids --num-prompts 4 --random-input-len 200 --random-output-len 16"
"""Dataset and its options, as `sglang.benchmark.serving` takes them."""
METRICS = (
    "output_throughput",
    "median_ttft_ms",
    "p99_ttft_ms",
    "median_itl_ms",
    "p99_itl_ms",
    "completed",
)


def ask(server: Server, model: Path, load: str, seed: int) -> Json:
    """Run SGLang's benchmark against a server; its figures.

    In this process: to import SGLang's program takes longer than to run a load.
    """
    from sglang.benchmark.serving import cli_main

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "result.jsonl"
        options = f"--backend sglang --base-url {server.url} --model {model} --seed {seed}"
        options += f" --dataset-name {load} --random-range-ratio 1 --tokenize-prompt --flush-cache"
        options += f" --disable-tqdm --output-file {path}"
        before, sys.argv = sys.argv, ["sglang.benchmark.serving", *options.split()]
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                cli_main()
        finally:
            sys.argv = before
        found = json.loads(path.read_text())
    return {name: found[name] for name in METRICS}


def run_rounds(
    servers: dict[str, Server], model: Path, loads: list[str], first: int, count: int
) -> Json:
    """Figures by load: of each round, by server."""
    found: Json = {name: [] for name in loads}
    for number in range(first, first + count):
        order = list(servers.items())[:: 1 if number % 2 == 0 else -1]
        for name in loads:
            round_ = {side: ask(server, model, LOADS[name], number) for side, server in order}
            if len({one["completed"] for one in round_.values()}) > 1:
                raise SystemExit(f"{name}: not every request was answered: {round_}")
            found[name].append(round_)
            speeds = {side: one["output_throughput"] for side, one in round_.items()}
            print(f"{name}: {speeds['diffxkv'] / speeds['stock']:.2f}", flush=True)
    return found


def parse() -> argparse.Namespace:
    made = command_line(__doc__, "ample")
    made.add_argument("--model", type=Path, default=BUNDLED)
    made.add_argument("--label", default="embedded model")
    made.add_argument("--dtype", default="float32")
    made.add_argument("--pool-tokens", type=int, default=65536, help="of stock's pool")
    made.add_argument("--loads", type=int, nargs="+", default=range(len(LOADS)), help="numbers")
    made.add_argument("--rounds", type=int, default=4)
    made.add_argument("--fresh", action="store_true", help="drop what was measured before")
    return made.parse_args()


def main() -> None:
    options = parse()
    path = RESULTS / f"{options.name}.json"
    old: Json = json.loads(path.read_text()) if path.exists() and not options.fresh else {}
    runs: Json = old.get("runs", {})
    setting = f"{options.label}, {options.dtype}"
    rounds: Json = runs.setdefault(setting, {})
    loads = [list(LOADS)[number] for number in options.loads]
    done = max((len(rounds.get(name, [])) for name in loads), default=0)
    tokens = page_floor(options.pool_tokens)
    itemsize = 4 if options.dtype == "float32" else 2
    shape = load_model(options.model)
    memory = tokens * 2 * shape.layers * shape.kv_heads * shape.head_dim * itemsize
    with (
        stock_server(options.model, tokens, dtype=options.dtype) as stock,
        diffxkv_server(options.model, {"memory_bytes": memory}, dtype=options.dtype) as ours,
    ):
        servers = {"stock": stock, "diffxkv": ours}
        for server in servers.values():
            ask(server, options.model, WARM_UP, seed=10**6)
        for name, found in run_rounds(servers, options.model, loads, done, options.rounds).items():
            rounds.setdefault(name, []).extend(found)
    result: Json = {"loads": LOADS, "runs": runs}
    write_results(options.name, "Whole servers where memory is ample", result, report(result))
    plot(RESULTS / f"{options.name}.png", result)


if __name__ == "__main__":
    main()
