# SPDX-License-Identifier: Apache-2.0
"""The router demo's replicas: all their settings, and how they are started side by side."""

import json
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

from sglang_diffxkv.bundled_model import BUNDLED
from sglang_diffxkv.launch import ServerProcess

NAMES = ("replica 1", "replica 2")
MEMORY_BYTES = 8 * 2**20
"""Of each replica: with compression about two thirds of what all tenants say."""
HOST_BYTES, DISK_BYTES = MEMORY_BYTES // 2, 16 * MEMORY_BYTES
"""Beside that. Little host memory: what is read from disk comes by way of it."""

Servers = Mapping[str, ServerProcess]
"""By name."""


@contextmanager
def replicas(device: str, folder: Path) -> Iterator[Servers]:
    """All of them, while the context lasts; what they write lies in `folder`.

    Raises:
        ServerError: one did not start.
    """
    servers = {name: _replica(name, device, folder) for name in NAMES}
    with ExitStack() as running:
        with ThreadPoolExecutor(len(servers)) as pool:
            list(pool.map(running.enter_context, servers.values()))
        yield servers


def _replica(name: str, device: str, folder: Path) -> ServerProcess:
    own = folder / name.replace(" ", "-")
    own.mkdir()
    options: list[object] = ["--model-path", BUNDLED, "--served-model-name", "default"]
    options += ["--device", device, "--dtype", "bfloat16", "--sleep-on-idle"]
    options += ["--attention-backend", "diffxkv", "--diffxkv-config", json.dumps(_config(own))]
    # Answers say how much of their prompt was cached, and who gave them: the weights' version
    # comes with every answer, and all have the same weights.
    options += ["--enable-cache-report", "--weight-version", name]
    options += ["--enable-metrics"]
    return ServerProcess(*options, log=own / "log")


def _config(folder: Path) -> dict[str, object]:
    """The pool's settings; a replica that is started again finds its `folder` as it left it."""
    return {
        "memory_bytes": MEMORY_BYTES,
        "host_bytes": HOST_BYTES,
        "disk_path": str(folder / "disk"),
        "disk_bytes": DISK_BYTES,
    }


def router_options(policy: str) -> Sequence[object]:
    """Flags of a router that notices within seconds that a replica has gone or come back.

    Two failures open a worker's circuit, fewer than a request is retried: with the router's own
    ten a request can spend all its retries on a dead worker, and fails.
    """
    options: list[object] = ["--policy", policy, "--health-check-interval-secs", 1]
    options += ["--health-failure-threshold", 1, "--health-success-threshold", 1]
    options += ["--cb-failure-threshold", 2, "--cb-timeout-duration-secs", 2]
    return [*options, "--worker-startup-check-interval", 1]
