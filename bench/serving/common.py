# SPDX-License-Identifier: Apache-2.0
"""What the serving benches share: the model, the two servers, reading their logs, the results."""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import re
import shlex
import sys
from argparse import ArgumentParser
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

from bench.serving.heavy_hitters import add_heavy_hitters
from tests.support.demo_model import write_demo_model
from tests.support.harness import Json, Server

RESULTS = Path(__file__).parents[1] / "results"
MIB = 2**20
PAGE_TOKENS = 64
PAPER = {"tiers": {"high": "K8V4", "low": "K4V2"}, "alpha_high": 1, "alpha_low": 0.02}
"""DiffKV's setting for Llama-3 (arXiv 2412.03131)."""
WEIGHTS = ("random", "heavy-hitters")

_STEP = re.compile(
    r"Decode batch.*?#running-req: (\d+), #token: (\d+), token usage: ([\d.]+).*?#queue-req: (\d+)"
)


class Shape(NamedTuple):
    """Dimensions of the bfloat16 demo model that decide what a token costs."""

    layers: int = 4
    heads: int = 8
    kv_heads: int = 2
    head_dim: int = 128

    @property
    def token_bytes(self) -> int:
        """Bytes of one token's K and V in all layers, uncompressed."""
        return 2 * self.layers * self.kv_heads * self.head_dim * 2


class Step(NamedTuple):
    """One decode step as SGLang logged it; `tokens` are those of running requests."""

    running: int
    tokens: int
    usage: float
    queued: int


@contextmanager
def demo_model(shape: Shape, dtype: str = "bfloat16", weights: str = "random") -> Iterator[Path]:
    """Folder of a demo model; `weights` is one of WEIGHTS."""
    with TemporaryDirectory(prefix="demo-model-") as name:
        folder = write_demo_model(name, dtype=dtype, **shape._asdict())
        if weights == "heavy-hitters":
            add_heavy_hitters(folder)
        yield folder


def stock_server(model: Path, tokens: int, *args: object, dtype: str = "bfloat16") -> Server:
    """Stock SGLang's pool of `tokens` and its `torch_native` attention, page size 64."""
    own = ["--attention-backend", "torch_native", "--page-size", PAGE_TOKENS]
    return Server(model, *own, "--max-total-tokens", tokens, *args, dtype=dtype)


def diffxkv_server(model: Path, config: Json, *args: object, dtype: str = "bfloat16") -> Server:
    own = ["--attention-backend", "diffxkv", "--diffxkv-config", json.dumps(config)]
    return Server(model, *own, *args, dtype=dtype)


def page_floor(tokens: int) -> int:
    return tokens // PAGE_TOKENS * PAGE_TOKENS


def random_prompt(rng: random.Random, length: int) -> list[int]:
    """Ids of random bytes."""
    return [rng.randrange(256) for _ in range(length)]


class Load(NamedTuple):
    """Distinct random prompts of `prompt` ± 10 % tokens, `output` new tokens each."""

    requests: int
    prompt: int
    output: int

    def send(self, server: Server) -> list[Json]:
        """All requests at once; answers in order."""
        rng = random.Random(0)
        lengths = [round(self.prompt * rng.uniform(0.9, 1.1)) for _ in range(self.requests)]
        items = [{"prompt": random_prompt(rng, n), "max_new_tokens": self.output} for n in lengths]
        return server.generate_many(items, workers=self.requests)


def equal_memory(description: str, name: str, *, memory_mib: int, load: Load) -> ArgumentParser:
    """The command line of benches that give both servers the same memory; with its defaults."""
    parser = ArgumentParser(description=description)
    parser.add_argument("--memory-mib", type=int, default=memory_mib)
    parser.add_argument("--requests", type=int, default=load.requests)
    parser.add_argument("--prompt", type=int, default=load.prompt)
    parser.add_argument("--output", type=int, default=load.output)
    parser.add_argument("--config", type=json.loads, default={}, help="JSON beside the paper's")
    parser.add_argument("--name", default=name, help="of the files in bench/results")
    return parser


def decode_steps(log: str) -> list[Step]:
    """Steps from a server's log; every one of them with `--decode-log-interval 1`."""
    return [
        Step(int(running), int(tokens), float(usage), int(queued))
        for running, tokens, usage, queued in _STEP.findall(log)
    ]


def retractions(log: str) -> int:
    """How many requests were sent back to the queue for want of memory."""
    return sum(int(n) for n in re.findall(r"#retracted_reqs: (\d+)", log))


def environment() -> dict[str, str | int]:
    names = ("sglang", "torch", "sglang-diffxkv")
    versions = {name: version(name) for name in names}
    cores = os.cpu_count() or 1
    return {"cpu": _cpu_model(), "cores": cores, "python": platform.python_version()} | versions


def command() -> str:
    """How this run was started, as a user would type it."""
    main = sys.modules["__main__"].__spec__
    module = main.name.removesuffix(".__main__") if main else Path(sys.argv[0]).name
    return shlex.join(["python", "-m", module, *sys.argv[1:]])


def command_line(about: str, name: str) -> argparse.ArgumentParser:
    """A command line, with the option that names the files in bench/results.

    Args:
        about: the bench's docstring, whose first line is shown.
    """
    made = argparse.ArgumentParser(description=about.splitlines()[0])
    made.add_argument("--name", default=name, help="of the files in bench/results")
    return made


def table(rows: Sequence[Sequence[Any]]) -> str:
    """Markdown of `rows`, the first of which is the head."""
    head, *body = [[_cell(x) for x in row] for row in rows]
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *body])


def write_results(name: str, title: str, result: Json, text: str) -> None:
    """Write `name`.json and `name`.md to bench/results, each with command and machine."""
    env = environment()
    machine = ", ".join(f"{k} {v}" for k, v in env.items())
    RESULTS.mkdir(exist_ok=True)
    full = {"command": command(), "environment": env} | result
    (RESULTS / f"{name}.json").write_text(json.dumps(full, indent=1) + "\n")
    page = f"# {title}\n\n`{command()}`\n\n{machine}\n\n{text}\n"
    (RESULTS / f"{name}.md").write_text(page)
    print(page)


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.+)", info.read_text()) if info.exists() else None
    return found[1].strip() if found else platform.processor() or platform.machine()
