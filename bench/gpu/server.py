# SPDX-License-Identifier: Apache-2.0
"""The whole server on a GPU: equal outputs with CUDA graphs on and off, and throughput.

    PYTHON=.venv/bin/python bench/gpu/run.sh bench.gpu.server [--output FOLDER]

Needs SGLang 0.5.23 with this package installed into its environment. Equality is asked of the demo
model with policy `lossless`; throughput is that of a model of Llama-3.1-8B's shape with dummy
weights, beside stock SGLang with FlashInfer, both servers up and loaded in turn. Without SGLang or
a GPU it says so, and ends.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from importlib import util
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from tests.server.harness import Server

Record = dict[str, Any]

RESULTS = Path(__file__).parents[1] / "results"
TOGETHER = 3
"""Requests at once, not a batch size that graphs are captured for."""
NO_GRAPHS = ("--cuda-graph-backend-decode", "disabled", "--cuda-graph-backend-prefill", "disabled")
LLAMA_8B = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
}


def missing() -> str | None:
    """Why nothing can run here; None if it can."""
    if util.find_spec("sglang") is None:
        return "SGLang is not installed here: no server was started"
    if not torch.cuda.is_available():
        return "there is no GPU here: no server was started"
    return None


def server(model: Path, *arguments: object, config: Record | None = None) -> Server:
    """A bf16 server on the GPU: diffxkv's where it has a config, else stock's with FlashInfer."""
    from tests.server.harness import Server

    own: tuple[object, ...] = ("--attention-backend", "flashinfer")
    if config is not None:
        own = ("--attention-backend", "diffxkv", "--diffxkv-config", json.dumps(config))
    return Server(model, *own, *arguments, device="cuda", dtype="bfloat16")


def prompts(lengths: list[int], seed: int) -> list[list[int]]:
    """Token ids of random bytes."""
    rng = random.Random(seed)
    return [[rng.randrange(256) for _ in range(length)] for length in lengths]


def outputs(model: Path, config: Record | None, *arguments: object) -> list[list[int]]:
    """Greedy answers to prompts of odd lengths, asked twice, so that sealed pages are read.

    One request at a time, so that batches do not differ; then `TOGETHER` at once, whose graphs are
    padded, and whose batches may differ from one run to the next.
    """
    asked = prompts([1, 63, 64, 65, 200, 517, 1500], seed=1)
    with server(model, *arguments, "--mem-fraction-static", 0.3, config=config) as running:
        answers = [running.generate(ids, max_new_tokens=100) for ids in asked + asked]
        together = [{"prompt": ids, "max_new_tokens": 100} for ids in asked[-TOGETHER:]]
        answers += running.generate_many(together, workers=TOGETHER)
    return [answer["output_ids"] for answer in answers]


def equality(folder: Path) -> Record:
    """Of outputs with CUDA graphs and without, and with stock's."""
    from sglang_diffxkv.demo_model import write_demo_model

    model = write_demo_model(
        folder / "small", layers=8, heads=16, kv_heads=4, head_dim=128, hidden=1024,
        dtype="bfloat16",
    )  # fmt: skip
    stock, record = outputs(model, None), Record()
    for policy in ("lossless", "uniform"):
        graphs = outputs(model, {"policy": policy})
        eager = outputs(model, {"policy": policy}, *NO_GRAPHS)
        same = [a == b for a, b in zip(graphs, eager, strict=True)]
        record[policy] = {
            "answers": len(graphs),
            "equal_with_and_without_graphs": sum(same),
            "so_are_all_asked_alone": all(same[:-TOGETHER]),
            "equal_to_stock": sum(a == b for a, b in zip(graphs, stock, strict=True)),
        }
    return record


def write_dummy_model(folder: Path) -> Path:
    """Configuration and tokenizer of a model without weights, for ``--load-format dummy``."""
    from sglang_diffxkv.demo_model import write_demo_model

    write_demo_model(folder, layers=1, dtype="bfloat16")
    (folder / "model.safetensors").unlink()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | LLAMA_8B))
    return folder


def load(running: Server, requests: int, prompt: int, output: int, seed: int) -> float:
    """Output tokens per second, from the first request to the last answer; the cache is empty."""
    running.flush_cache()
    asked = prompts([prompt] * requests, seed)
    items = [{"prompt": ids, "max_new_tokens": output} for ids in asked]
    begin = time.perf_counter()
    answers = running.generate_many(items, workers=requests)
    tokens = sum(len(answer["output_ids"]) for answer in answers)
    return tokens / (time.perf_counter() - begin)


def throughput(folder: Path, rounds: int) -> Record:
    """Both servers in equal memory, the same load in turn; the first round is not counted."""
    model = write_dummy_model(folder / "dummy")
    # The fractions are of the memory that is free when a server starts.
    arguments = ("--load-format", "dummy", "--context-length", 16384)
    size = {"requests": 64, "prompt": 4096, "output": 256}
    found: dict[str, list[float]] = {"diffxkv": [], "stock": []}
    tokens = torch.cuda.get_device_properties(0).total_memory // 8 // (32 * 8 * 128 * 4)
    memory = {"memory_bytes": tokens * 32 * 8 * 128 * 4}
    fraction = ("--mem-fraction-static", 0.8)
    with (
        server(model, *arguments, *fraction, config=memory) as ours,
        server(model, *arguments, *fraction, "--max-total-tokens", tokens) as stock,
    ):
        for i in range(rounds + 1):
            for name, running in (("diffxkv", ours), ("stock", stock)):
                found[name].append(load(running, **size, seed=i))
        stats = ours.stats()
    ratios = [a / b for a, b in zip(found["diffxkv"][1:], found["stock"][1:], strict=True)]
    return {
        "load": size,
        "memory_bytes": memory["memory_bytes"],
        "tokens_per_second": {name: values[1:] for name, values in found.items()},
        "ratio": median(ratios),
        "stats": stats,
    }


def main() -> None:
    """Run, print and write; exit status 1 if outputs differ."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder (bench/results)")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    if reason := missing():
        print(f"skipped: {reason}")
        return
    result: Record = {"device": torch.cuda.get_device_name()}
    path = options.output / "gpu_server.json"
    options.output.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix="gpu-server-") as name:
        for key, run in (
            ("equality", lambda: equality(Path(name))),
            ("throughput", lambda: throughput(Path(name), options.rounds)),
        ):
            result[key] = run()
            path.write_text(json.dumps(result, indent=1) + "\n")
            print(f"{key}: {json.dumps(result[key])}", flush=True)
    sys.exit(not all(x["so_are_all_asked_alone"] for x in result["equality"].values()))


if __name__ == "__main__":
    main()
