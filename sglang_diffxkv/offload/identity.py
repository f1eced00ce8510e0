# SPDX-License-Identifier: Apache-2.0
"""What must be the same for pages of one server to be read by another: all that decides their bytes
beside the tokens before them, and that can change between two runs."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sglang_diffxkv.kernels.layout import PageLayout

FORMAT = 1
"""Of metadata (`offload.records`) and of what is written into frames."""
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf")
SAMPLES, SAMPLE_BYTES = 16, 1 << 16
"""Of a weight file, beside its ends: a fine-tuned model's has the same size."""
_NOT_IN_PAGES = (
    *("memory_bytes", "host_bytes", "disk_path", "disk_bytes", "raw_share"),
    *("window", "score_queries", "learn_share", "save_plan"),
)
"""Settings that say how much is kept, and when it is sealed, not what a sealed page is."""
_BY_CONTENT = ("plan", "importance")
"""Settings that name a file."""


def of_model(path: Path) -> dict[str, Any]:
    """Of a checkpoint: a folder, or one file (GGUF).

    Raises:
        OSError: a file cannot be read.
        ValueError: there are no weights.
    """
    files = [path] if path.is_file() else sorted(path.iterdir())
    weights = [file for file in files if file.suffix in WEIGHTS]
    if not weights:
        raise ValueError(f"{path} has no weights ({', '.join(WEIGHTS)})")
    described = [file for file in files if file.suffix == ".json"]
    return {
        "weights": [_weight_file(file) for file in weights],
        "json": {file.name: of_file(file) for file in described},
    }


def _weight_file(path: Path) -> tuple[str, int, int, str]:
    status, hashed = path.stat(), hashlib.sha256()
    with path.open("rb") as file:
        for start in _sample_starts(status.st_size):
            file.seek(start)
            hashed.update(file.read(SAMPLE_BYTES))
    return path.name, status.st_size, status.st_mtime_ns, hashed.hexdigest()


def _sample_starts(nbytes: int) -> Iterator[int]:
    last = max(0, nbytes - SAMPLE_BYTES)
    yield from sorted({last * i // (SAMPLES + 1) for i in range(SAMPLES + 2)})


def of_file(path: str | Path) -> str:
    """Of a whole file; raises OSError."""
    return hashlib.sha256(Path(path).expanduser().read_bytes()).hexdigest()


def of_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Of the fields of a `DiffXKVConfig`, this rank's; raises OSError.

    A plan that is learnt in a run is not part of it, nor the number of one: pages that were graded
    under another are as good as those that a plan before it has left in a pool.
    """
    kept = {name: value for name, value in config.items() if name not in _NOT_IN_PAGES}
    named = {name: of_file(kept[name]) for name in _BY_CONTENT if kept.get(name) is not None}
    return kept | named


def of_layout(layout: PageLayout) -> dict[str, Any]:
    return asdict(layout) | {"format": FORMAT}
