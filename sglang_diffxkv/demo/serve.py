# SPDX-License-Identifier: Apache-2.0
"""Runs a load on one of the demo's two servers."""

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from sglang_diffxkv.demo.measure import Probe
from sglang_diffxkv.demo.table import Run, progress
from sglang_diffxkv.demo.workload import Stage
from sglang_diffxkv.kernels.layout import PAGE_TOKENS
from sglang_diffxkv.launch import ServerProcess

OURS, STOCK = "sglang_diffxkv", "stock SGLang"
POOLS = (STOCK, OURS)

Load = Callable[[str, Probe], Iterator[Stage]]
"""Of a server's address and its probe."""


class Setup(NamedTuple):
    """What both servers have in common."""

    model: Path
    device: str
    dtype: str
    dense_bytes: int
    """Of one token's KV in SGLang's own pool, which holds 16-bit elements in any dtype."""
    memory_bytes: int

    @property
    def stock_tokens(self) -> int:
        return self.memory_bytes // self.dense_bytes // PAGE_TOKENS * PAGE_TOKENS


def serve(name: str, setup: Setup, load: Load, folder: Path) -> Run:
    """Start the server `name`, one of `POOLS`, send it the load, and stop it.

    Args:
        folder: for its log.

    Raises:
        ServerError: it did not start.
    """
    print(f"\n{name}: starting (some 30 s on two cores)", flush=True)
    log = folder / f"{name.replace(' ', '-')}.log"
    with ServerProcess(*_options(name, setup), log=log) as server:
        print(f"{name}: answers at {server.url} after {server.start_seconds:.0f} s")
        stock_tokens = setup.stock_tokens if name == STOCK else None
        probe = Probe(server.url, setup.dense_bytes, stock_tokens)
        stages = []
        try:
            for stage in load(server.url, probe):
                print(progress(stage), flush=True)
                stages.append(stage)
        except Exception:
            print(server.log_tail(), file=sys.stderr)
            raise
    return Run(name, setup.dense_bytes, stages)


def _options(name: str, setup: Setup) -> list[object]:
    options: list[object]
    if name == STOCK:
        options = ["--attention-backend", "torch_native", "--page-size", PAGE_TOKENS]
        options += ["--max-total-tokens", setup.stock_tokens]
        if setup.dtype == "float32":
            options += ["--kv-cache-dtype", "bfloat16"]
    else:
        config: dict[str, object] = {"memory_bytes": setup.memory_bytes}
        if setup.dtype == "float32":
            config["raw_share"] = 0.4  # as many raw pages as the default has in 16 bit
        options = ["--attention-backend", "diffxkv", "--diffxkv-config", json.dumps(config)]
    options += ["--model-path", setup.model, "--device", setup.device, "--dtype", setup.dtype]
    options += ["--enable-metrics"]
    if setup.device == "cpu":
        options += ["--sleep-on-idle"]  # spinning would take a core from everything else
    return options
