# SPDX-License-Identifier: Apache-2.0
"""Whole servers on one GPU beside stock SGLang: equal outputs, steps, hidden waits, throughput.

    PYTHON=.venv/bin/python bench/gpu/run.sh bench.gpu.server [--seconds 330] [--output FOLDER]

Needs SGLang 0.5.23, with this package's entry points on the path. All servers start together.
Equality is asked of a small model with real weights; throughput is that of a model of
Llama-3.1-8B's shape with dummy weights. gpu_server.{json,md} are written anew after every figure,
and a server that hangs or dies costs its own figures only. `--dry` goes through it on a CPU, with a
tiny model, and with the kernels in Triton's interpreter.
"""

from __future__ import annotations

import argparse
import json
import random
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from importlib import util
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from bench.gpu.report.results import write_whole
from bench.gpu.server import report
from bench.gpu.server.kinds import (
    DRY,
    GPU,
    Kind,
    Load,
    Scale,
    kinds,
    make_server,
    without_flashinfer,
    write_models,
)

if TYPE_CHECKING:
    from tests.support.harness import Server

Record = dict[str, Any]

RESULTS = Path(__file__).parents[2] / "results"
TOGETHER = 3
"""Requests at once, not a batch size that graphs are captured for."""
LOSSLESS = {"custom_params": {"diffxkv": {"quality": "lossless"}}}


def prompts(lengths: tuple[int, ...], seed: int) -> list[list[int]]:
    """Token ids of random bytes."""
    rng = random.Random(seed)
    return [[rng.randrange(256) for _ in range(length)] for length in lengths]


class Answers(NamedTuple):
    """Greedy outputs of one server, asked twice, so that sealed pages are read.

    Attributes:
        alone: one request at a time, so that batches do not differ.
        together: several, whose graphs are padded, and whose batches may differ between runs.
    """

    alone: list[list[int]]
    together: list[list[int]]


def ask(running: Server, scale: Scale, sampling: Record | None) -> Answers:
    asked = prompts(scale.lengths, seed=1)
    body = {"max_new_tokens": scale.output, "sampling": sampling}
    alone = [running.generate(ids, **body) for ids in asked + asked]
    many = [{"prompt": ids, **body} for ids in asked[-TOGETHER:]]
    together = running.generate_many(many, workers=TOGETHER)
    return Answers(*([x["output_ids"] for x in answers] for answers in (alone, together)))


def load(running: Server, size: Load, seed: int) -> float:
    """Output tokens per second, from the first request to the last answer; the cache is empty."""
    running.flush_cache()
    asked = prompts((size.prompt,) * size.requests, seed)
    items = [{"prompt": ids, "max_new_tokens": size.output} for ids in asked]
    begin = time.perf_counter()
    answers = running.generate_many(items, workers=size.requests)
    tokens = sum(len(answer["output_ids"]) for answer in answers)
    return tokens / (time.perf_counter() - begin)


def step_seconds(running: Server, tokens: int) -> float:
    """Of a decode step of one request: that many steps more or less make the difference."""
    (ids,) = prompts((128,), seed=3)
    spent = []
    for count in (1, 1 + tokens):
        begin = time.perf_counter()
        running.generate(ids, max_new_tokens=count)
        spent.append(time.perf_counter() - begin)
    return (spent[1] - spent[0]) / tokens


class Late(Exception):
    """A part took longer than it may; the servers that it used were ended."""


@contextmanager
def limit(seconds: float, running: Mapping[str, Server]) -> Iterator[None]:
    """Raise Late, and end the servers, so that threads which wait for them end, too."""

    def late(*_: Any) -> None:
        for server in running.values():
            server.stop()
        raise Late(f"ended after {seconds:.0f} s, with {', '.join(running)}")

    previous = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, max(0.1, seconds))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


class Bench:
    """One run; `record` is all that is known so far.

    Args:
        logs: folder of the servers' logs.
    """

    def __init__(self, scale: Scale, output: Path, logs: Path, seconds: float) -> None:
        self.scale, self.logs, self.path = scale, logs, output / "gpu_server.json"
        self.begin, self.seconds = time.monotonic(), seconds
        gpu = scale.device == "cuda"
        self.record: Record = {"device": torch.cuda.get_device_name() if gpu else "cpu, dry"}
        self.running: dict[str, Server] = {}

    @property
    def left(self) -> float:
        return self.seconds - (time.monotonic() - self.begin)

    def put(self, key: str, value: Any) -> None:
        """Take in a figure; write everything."""
        self.record[key] = value
        self.record["seconds"] = round(time.monotonic() - self.begin, 1)
        write_whole(self.path, json.dumps(self.record, indent=1) + "\n")
        write_whole(self.path.with_suffix(".md"), report.report(self.record))
        print(f"[{self.record['seconds']:5.0f} s] {key}: {json.dumps(value)[:400]}", flush=True)

    def part(self, name: str, seconds: float, run: Callable[[], None], *names: str) -> None:
        """One part with a limit of its own; whatever goes wrong is written down."""
        if self.left < 5:
            self.put(f"failed: {name}", "no time was left")
            return
        using = {key: self.running[key] for key in names or self.running if key in self.running}
        try:
            with limit(min(seconds, self.left), using):
                run()
        except Exception as error:  # of a server that died or hung
            traceback.print_exc()
            self.put(f"failed: {name}", f"{type(error).__name__}: {error}"[-1500:])
        for key in [key for key, server in self.running.items() if not server.is_alive()]:
            self.running.pop(key).stop()
            self.put(f"failed: {key}", f"the server ended during {name}")

    def start(self, models: tuple[Path, Path], seconds: float) -> None:
        """All servers at once; one that does not start is left out."""
        found = kinds(self.scale)
        with ThreadPoolExecutor(len(found)) as pool:
            list(pool.map(lambda x: self._start(*x, models, seconds), found.items()))
        self.put("start_seconds", {k: round(x.start_seconds, 1) for k, x in self.running.items()})
        if "stock 8B" in self.running:
            self.put("stock_tokens", self.running["stock 8B"].server_info()["max_total_num_tokens"])

    def _start(self, name: str, kind: Kind, models: tuple[Path, Path], seconds: float) -> None:
        begin = time.monotonic()
        for tries, arguments in enumerate((kind.arguments, kind.fallback)):
            left = seconds - (time.monotonic() - begin)
            if arguments is None or left < 10:
                return
            made = make_server(name, kind, arguments, models, self.logs, self.scale, left)
            if tries:
                made._env["PYTHONPATH"] = without_flashinfer(made._env["PYTHONPATH"])
            try:
                made.__enter__()
            except Exception as error:  # ServerError: its text ends with the log's last lines
                how = ", without FlashInfer" if tries else ""
                self.put(f"failed: start of {name}{how}", str(error)[-3000:])
            else:
                self.running[name] = made
                return

    def equality(self) -> None:
        """Small servers, all at once; lossless outputs also with stock's."""
        small = {name: x for name, x in self.running.items() if "8B" not in name}
        with ThreadPoolExecutor(len(small) or 1) as pool:
            lossless = dict(zip(small, pool.map(self._lossless, small.values()), strict=True))
            ours = {name: x for name, x in small.items() if name != "stock"}
            asked = pool.map(lambda x: ask(x, self.scale, None), ours.values())
            sealed = dict(zip(ours, asked, strict=True))
        for title, found in (("lossless", lossless), ("compressed", sealed)):
            first = found.pop("ours", None)
            if first is not None and found:
                others = {name: equal(first, answers) for name, answers in found.items()}
                self.put(f"equality, {title}", others)

    def _lossless(self, server: Server) -> Answers:
        is_ours = "diffxkv" in server._command
        return ask(server, self.scale, LOSSLESS if is_ours else None)

    def steps(self) -> None:
        """Decode steps of one request; two rounds, one server after the other."""
        names = [name for name in self.running if "8B" not in name]
        rounds = [
            {name: step_seconds(self.running[name], self.scale.step_tokens) for name in names}
            for _ in range(2)
        ]
        self.put("step_seconds", {name: [x[name] for x in rounds] for name in names})

    def syncs(self) -> None:
        """What the servers have seen of waits in decode steps."""
        files = sorted(self.logs.glob("*.syncs.json"))
        found = {x.name.removesuffix(".syncs.json"): json.loads(x.read_text()) for x in files}
        self.put("syncs", found)

    def throughput(self, size: Load, seed: int) -> None:
        """One round, the servers in turn; the order changes."""
        names = [name for name in self.running if "8B" in name]
        for name in names[:: 1 if seed % 2 else -1]:
            rate = load(self.running[name], size, seed)
            if size is self.scale.warm_up:
                continue
            rates = self.record.setdefault(f"throughput, {size.name}", {})
            rates.setdefault(name, []).append(rate)
            self.put(f"throughput, {size.name}", rates)

    def ratios(self) -> None:
        """Of medians, ours to stock's, and what the servers' own statistics say."""
        for size in self.scale.loads:
            rates = self.record.get(f"throughput, {size.name}", {})
            middle = {name: median(values) for name, values in rates.items()}
            if stock := middle.get("stock 8B"):
                key = f"ratio to stock, {size.name}"
                self.put(key, {name: x / stock for name, x in middle.items()})

    def all(self, models: tuple[Path, Path], rounds: int) -> None:
        """Every part, the most telling first."""
        scale = self.scale
        self.put("loads", [size._asdict() for size in scale.loads])
        self.put("memory_bytes", scale.memory[1])
        self.start(models, (0.5 if scale is GPU else 0.75) * self.seconds)
        self.part("equality", 60, self.equality)
        self.part("steps", 30, self.steps)
        self.part("syncs", 5, self.syncs)
        large = [name for name in self.running if "8B" in name]
        for name in [name for name in self.running if name not in large]:
            self.running.pop(name).stop()
        self.part("warm-up", 60, lambda: self.throughput(scale.warm_up, 0), *large)
        for i in range(rounds):
            for size in scale.loads:
                run = lambda size=size, i=i: self.throughput(size, i + 1)  # noqa: E731
                self.part(f"{size.name} {i + 1}", 100, run, *large)
                self.ratios()
        if "ours 8B" in self.running:
            self.part("stats", 10, lambda: self.put("stats", self.running["ours 8B"].stats()))

    def stop(self) -> None:
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda x: x.stop(), self.running.values()))


def equal(first: Answers, second: Answers) -> Record:
    """How many answers are the same."""
    same = [a == b for a, b in zip(first.alone, second.alone, strict=True)]
    together = [a == b for a, b in zip(first.together, second.together, strict=True)]
    return {
        "alone": f"{sum(same)} of {len(same)}",
        "together": f"{sum(together)} of {len(together)}",
        "all_alone": all(same),
    }


def join_logs(logs: Path, path: Path, nbytes: int = 1_500_000) -> None:
    """The ends of all logs in one file: few files come back from some machines."""
    with path.open("w") as out:
        for log in sorted(logs.glob("*.log")):
            out.write(f"===== {log.stem}\n{log.read_text(errors='replace')[-nbytes:]}\n")


def main() -> None:
    """Run, print and write; exit status 1 if something failed or lossless outputs differ."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--output", type=Path, help="folder (bench/results, build/dry)")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=330, help="for everything (default 330)")
    parser.add_argument("--dry", action="store_true", help="tiny, on a CPU")
    options = parser.parse_args()
    if util.find_spec("sglang") is None or not (options.dry or torch.cuda.is_available()):
        print("skipped: SGLang or a GPU is missing here: no server was started")
        return
    output = options.output or (Path("build/dry") if options.dry else RESULTS)
    output.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix="gpu-server-") as folder:
        scale = DRY if options.dry else GPU
        bench = Bench(scale, output, Path(folder), options.seconds)
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # `finally` then ends the servers
        try:
            bench.all(write_models(Path(folder), scale), options.rounds)
        finally:
            bench.stop()
            join_logs(Path(folder), output / "gpu_server_logs.txt")
    print(report.report(bench.record))
    sys.exit(bool(report.failures(bench.record)))


if __name__ == "__main__":
    main()
