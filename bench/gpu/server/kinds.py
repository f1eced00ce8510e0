# SPDX-License-Identifier: Apache-2.0
"""The servers of `bench.gpu.server`: models, sizes and arguments, on a GPU and in a dry run."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

if TYPE_CHECKING:
    from tests.support.harness import Server

Record = dict[str, Any]

SITE = Path(__file__).parents[1] / "remote/site"
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
TOKEN_BYTES = 32 * 8 * 128 * 4
"""Of LLAMA_8B's bf16 cache."""
THIRD_SERVER_BYTES = 120 << 30
"""On a device of so much memory a third server of LLAMA_8B fits."""
COMMON = ("--sampling-backend", "pytorch", "--grammar-backend", "none")
# Neither side captures prefill: ours cannot.
GRAPHS = ("--cuda-graph-backend-prefill", "disabled", "--cuda-graph-bs-decode",
          *map(str, (1, 2, 4, 8, 16, 24, 32, 48, 64)))  # fmt: skip
NO_GRAPHS = ("--cuda-graph-backend-decode", "disabled", "--cuda-graph-backend-prefill", "disabled")


class Load(NamedTuple):
    """Requests that are sent at once, and tokens of each."""

    name: str
    requests: int
    prompt: int
    output: int


class Scale(NamedTuple):
    """How large everything is.

    Attributes:
        small: arguments of `write_demo_model`.
        lengths: of the prompts that are asked for equality, with ``output`` tokens each.
        memory: bytes of the pools of the small and of the large model's servers.
        loads: of the large model, in the order in which they are run in every round.
    """

    device: str
    dtype: str
    small: Mapping[str, Any]
    large: Mapping[str, int]
    lengths: tuple[int, ...]
    output: int
    memory: tuple[int, int]
    loads: tuple[Load, ...]
    warm_up: Load
    step_tokens: int


GPU = Scale(
    "cuda", "bfloat16", {"layers": 8, "heads": 16, "kv_heads": 4, "head_dim": 128, "hidden": 1024},
    LLAMA_8B, (1, 63, 64, 65, 200, 517, 1500), 100, (1 << 30, 10 << 30),
    (Load("memory-bound", 64, 4096, 256), Load("not memory-bound", 16, 4096, 256)),
    Load("warm-up", 16, 2048, 16), 256,
)  # fmt: skip
DRY = Scale(
    "cpu", "float32", {"layers": 1, "heads": 4}, {"num_hidden_layers": 1}, (1, 70), 3,
    (24 << 20, 24 << 20), (Load("memory-bound", 2, 70, 2), Load("not memory-bound", 1, 70, 2)),
    Load("warm-up", 1, 8, 1), 2,
)  # fmt: skip


class Kind(NamedTuple):
    """One server.

    Attributes:
        config: of diffxkv; stock where it is None.
        fallback: arguments of a second try without FlashInfer, where the first does not start.
    """

    is_large: bool
    config: Record | None
    arguments: tuple[str, ...]
    fallback: tuple[str, ...] | None = None


def kinds(scale: Scale) -> dict[str, Kind]:
    """The servers by name; those that differ in graphs or overlap need a GPU."""
    gpu = scale.device == "cuda"
    graphs = GRAPHS if gpu else ()
    flashinfer, triton = (("--attention-backend", name) for name in ("flashinfer", "triton"))
    stock, fallback = ((*flashinfer, *graphs), (*triton, *graphs)) if gpu else ((), None)
    small, large = ({"memory_bytes": nbytes} for nbytes in scale.memory)
    ours = {"policy": "diffkv"} | small
    again = graphs if gpu else None
    found = {
        "ours": Kind(False, ours, graphs, again),
        "stock": Kind(False, None, stock, fallback),
        "ours 8B": Kind(True, large, graphs, again),
        "stock 8B": Kind(True, None, stock, fallback),
    }
    if not gpu:
        return found
    no_overlap = ("--disable-overlap-schedule", *graphs)
    found["ours, no overlap"] = Kind(False, ours, no_overlap, no_overlap)
    found["ours, no graphs"] = Kind(False, ours, NO_GRAPHS, NO_GRAPHS)
    if torch.cuda.get_device_properties(0).total_memory > THIRD_SERVER_BYTES:
        found["ours 8B, no overlap"] = Kind(True, large, no_overlap, no_overlap)
    return found


def make_server(
    name: str, kind: Kind, arguments: tuple[str, ...], models: tuple[Path, Path], folder: Path,
    scale: Scale, seconds: float,
) -> Server:  # fmt: skip
    """A server that is still to be started; its log goes to ``folder``."""
    from tests.support.harness import Server

    slug = name.replace(",", "").replace(" ", "_")
    given = [*COMMON, *arguments]
    if kind.config is None:
        given += [
            "--max-total-tokens",
            str(scale.memory[kind.is_large] // token_bytes(scale, kind)),
        ]
    else:
        given += ["--attention-backend", "diffxkv", "--diffxkv-config", json.dumps(kind.config)]
    if scale.device == "cuda":
        # Of what is free when a server starts, while others start; pools have sizes of their own.
        given += ["--mem-fraction-static", "0.93"]
    if kind.is_large:
        given += ["--load-format", "dummy", "--skip-tokenizer-init", "--context-length", "8192"]
    path = os.pathsep.join((str(SITE), os.environ.get("PYTHONPATH", "")))
    env = {"PYTHONPATH": path}
    if not kind.is_large:  # whose throughput it would cost
        env["SYNC_LOG"] = str(folder / f"{slug}.syncs.json")
    if scale.device == "cpu" and kind.config is not None:
        env["TRITON_INTERPRET"] = "1"
    made = Server(
        models[kind.is_large], *given, device=scale.device, dtype=scale.dtype, env=env,
        log=folder / f"{slug}.log",
    )  # fmt: skip
    if not Path(made._command[0]).exists():  # SGLang is on the path, but not installed
        start = "import sys; from sglang.cli.main import main; sys.argv[0] = 'sglang'; main()"
        made._command[:1] = [sys.executable, "-c", start]
    made._start_timeout = seconds
    return made


def without_flashinfer(path: str) -> str:
    """A search path less the folders that hold FlashInfer."""
    kept = (x for x in path.split(os.pathsep) if not (Path(x) / "flashinfer").is_dir())
    return os.pathsep.join(kept)


def token_bytes(scale: Scale, kind: Kind) -> int:
    """Of an uncompressed token."""
    if kind.is_large and scale is GPU:
        return TOKEN_BYTES
    small = {"layers": 4, "kv_heads": 2, "head_dim": 64} | dict(scale.small)
    itemsize = 2 if scale.dtype == "bfloat16" else 4
    return int(small["layers"] * small["kv_heads"] * small["head_dim"] * 2 * itemsize)


def write_models(folder: Path, scale: Scale) -> tuple[Path, Path]:
    """The small model, and configuration of the large one, for ``--load-format dummy``."""
    from tests.support.demo_model import write_demo_model

    small = write_demo_model(folder / "small", dtype=scale.dtype, **scale.small)
    large = write_demo_model(folder / "large", dtype=scale.dtype, layers=1)
    (large / "model.safetensors").unlink()
    config = json.loads((large / "config.json").read_text())
    (large / "config.json").write_text(json.dumps(config | dict(scale.large)))
    return small, large
