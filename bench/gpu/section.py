# SPDX-License-Identifier: Apache-2.0
"""One section of the bench, in a process of its own: a GPU's error ends that process alone.

Prints one line of JSON per record. Meant for `python -m bench.gpu`, which starts these.
"""

from __future__ import annotations

import argparse
import json
import sys
import traceback
from collections.abc import Iterator
from typing import Any

import torch

from bench.gpu import device as devices
from bench.gpu.children import LOST
from bench.gpu.timing.timer import Deadline
from bench.gpu.verify.run import run_group


def records(name: str, options: argparse.Namespace, device: torch.device) -> Iterator[Any]:
    """The records of a section; only what it needs is imported."""
    deadline, large = Deadline(options.deadline), device.type == "cuda"
    ready, red = options.ready.split(","), options.red.split(",")
    if name.startswith("verify-"):
        _, group, shard = name.split("-")
        split = {"shard": int(shard) - 1, "shards": options.shards, "first": options.first}
        yield from run_group(group, device, large=large, **split)
    elif name == "machine":
        from bench.gpu import machine

        yield from machine.run(device)
    elif name == "flashinfer":
        from bench.gpu.timing import baselines

        yield from baselines.warm_up(device)
        if device.type == "cuda" and baselines.has_flashinfer():
            yield from run_group("flashinfer", device, large=True)
    elif name == "prebuild":
        from bench.gpu import machine
        from bench.gpu.compile import prebuild

        if capability := machine.query("compute_cap"):
            yield from prebuild.run(int(capability.replace(".", "")))
    elif name == "decode":
        from bench.gpu.timing import decode

        yield from decode.run(device, deadline, ready, red, options.first)
    elif name == "sweep":
        from bench.gpu.timing import sweep

        yield from sweep.run(device, deadline, red)
    elif name == "prefill":
        from bench.gpu.timing import prefill

        yield from prefill.run(device, deadline, ready, red)
    elif name == "arena":
        from bench.gpu.timing import arena

        yield from arena.run(device, deadline, red)
    elif name == "copies":
        from bench.gpu.timing import copies

        yield from copies.run(device, deadline, red)
    else:
        sys.exit(f"no section {name}")


def main() -> None:
    """Run a section; whatever ends it early is its last record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name")
    parser.add_argument("--deadline", type=float, required=True, help="as time.time() has it")
    parser.add_argument("--ready", default="", help="what FlashInfer was built for")
    parser.add_argument("--shards", type=int, default=1, help="how many share a group of checks")
    parser.add_argument("--red", default="", help="operations that cannot be timed")
    parser.add_argument("--first", type=int, default=0, help="how many pieces of work are done")
    options = parser.parse_args()
    device = devices.chosen()
    torch.manual_seed(0)
    try:
        for record in records(options.name, options, device):
            print(json.dumps(record), flush=True)
    except devices.DeviceLost:
        traceback.print_exc()
        sys.exit(LOST)
    except Exception as error:  # of Triton, CUDA or FlashInfer
        traceback.print_exc()
        message = f"{type(error).__name__}: {error}"
        print(json.dumps({"error": message[-500:]}), flush=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
