# SPDX-License-Identifier: Apache-2.0
"""The demo as a whole: runs the load on both pools with the embedded model, prints the table."""

import json
import os
import sys
import tempfile
from pathlib import Path

from tokenizers import Tokenizer

from sglang_diffxkv.bundled_model import BUNDLED
from sglang_diffxkv.demo.measure import Probe
from sglang_diffxkv.demo.table import Run, progress, table
from sglang_diffxkv.demo.workload import run_load
from sglang_diffxkv.eval.run import load_model
from sglang_diffxkv.kernels.layout import PAGE_TOKENS
from sglang_diffxkv.launch import ServerError, ServerProcess, default_device

MEMORY_BYTES = 20 * 2**20

NOTE = (
    "The embedded model knows nothing but to look up what its prompts say: answers are compared "
    "with what was said."
)


def run_demo(device: str | None) -> int:
    """Run it on `device` (default: cuda where there is one, else cpu); return the exit status."""
    # Both servers alike: more threads than this gain nothing on matrices as small as this model's.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    device = device or default_device()
    print(f"{NOTE}\nDevice: {device}. KV memory of each server: {MEMORY_BYTES / 2**20:.0f} MiB.")
    with tempfile.TemporaryDirectory(prefix="diffxkv-demo-") as folder:
        try:
            runs = [_serve(name, device, Path(folder)) for name in _POOLS]
        except ServerError as error:
            print(error, file=sys.stderr)
            return 1
    print(f"\n{table(runs)}\n\n{NOTE}")
    return 0


_OURS, _STOCK = "sglang_diffxkv", "stock SGLang"
_POOLS = (_STOCK, _OURS)


def _serve(name: str, device: str, folder: Path) -> Run:
    """Start the server `name`, send it the load, and stop it."""
    dense_bytes = load_model(BUNDLED).token_bytes
    tokenizer = Tokenizer.from_file(str(BUNDLED / "tokenizer.json"))
    stock_tokens = MEMORY_BYTES // dense_bytes // PAGE_TOKENS * PAGE_TOKENS
    options: list[object]
    if name == _STOCK:
        options = ["--attention-backend", "torch_native", "--page-size", PAGE_TOKENS]
        options += ["--max-total-tokens", stock_tokens]
    else:
        config = {"memory_bytes": MEMORY_BYTES}
        options = ["--attention-backend", "diffxkv", "--diffxkv-config", json.dumps(config)]
    options += ["--model-path", BUNDLED, "--device", device, "--dtype", "bfloat16"]
    options += ["--enable-metrics"]
    if device == "cpu":
        options += ["--sleep-on-idle"]  # spinning would take a core from everything else
    print(f"\n{name}: starting (some 30 s on two cores)", flush=True)
    log = folder / f"{name.replace(' ', '-')}.log"
    with ServerProcess(*options, log=log) as server:
        print(f"{name}: answers at {server.url} after {server.start_seconds:.0f} s")
        probe = Probe(server.url, dense_bytes, stock_tokens if name == _STOCK else None)
        stages = []
        try:
            for stage in run_load(server.url, probe, lambda text: len(tokenizer.encode(text))):
                print(progress(stage), flush=True)
                stages.append(stage)
        except Exception:
            print(server.log_tail(), file=sys.stderr)
            raise
    return Run(name, dense_bytes, stages)
