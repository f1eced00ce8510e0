# SPDX-License-Identifier: Apache-2.0
"""The subcommand `eval`: its options, its progress and its files."""

from __future__ import annotations

import argparse
import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from sglang_diffxkv.launch import add_server_options, default_device

if TYPE_CHECKING:
    from sglang_diffxkv.eval.run import Options
    from sglang_diffxkv.eval.score import Row

HELP = "measure what policies cost in accuracy against full KV, on tasks with known answers"
POLICIES = "full,lossless,int8,k8v4,k4v8,int4,int2,streaming,snapkv,diffkv,xkv,diffxkv"
TASKS = "niah_single,niah_multikey,kv_lookup,vt"

_Number = TypeVar("_Number", int, float)


def add_options(parser: argparse.ArgumentParser) -> None:
    add_server_options(parser)
    parser.add_argument(
        "--policies",
        default=POLICIES,
        help="names, with commas (default: %(default)s); full, SGLang's own pool, always runs",
    )
    parser.add_argument("--tasks", default=TASKS, help="names, with commas (default: %(default)s)")
    parser.add_argument(
        "--dtype",
        choices=("bfloat16", "float16", "float32"),
        help="that servers compute in (default: what the machine is fast at)",
    )
    parser.add_argument(
        "--filler",
        choices=("documentation", "noise", "words"),
        help="text that needles are hidden in: Python's documentation, RULER's noise, or generated "
        "sentences (default: documentation; the bundled model knows words alone)",
    )
    parser.add_argument("--lengths", default="1024,2048", help="tokens of a prompt, with commas")
    parser.add_argument(
        "--samples", default="50", help="per task and length (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--target-compression",
        default="",
        metavar="X[,X...]",
        help="set the knob of each policy that has one so that its physical compression is X",
    )
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FILE.json",
        help="write the rows here, and beside it a page (.md) and a plot (.png)",
    )


def run(args: argparse.Namespace) -> int:
    """Evaluate; return the exit status."""
    import requests

    from sglang_diffxkv.config import ConfigError
    from sglang_diffxkv.eval.ask import CacheError
    from sglang_diffxkv.eval.report import write
    from sglang_diffxkv.eval.run import evaluate
    from sglang_diffxkv.launch import ServerError

    rows: list[Row] = []
    status = 0
    try:
        options = _options(args)
        for row in evaluate(options):
            rows.append(row)
    except (ConfigError, ServerError, CacheError, requests.RequestException) as error:
        print("\n".join(getattr(error, "__notes__", [])), end="", file=sys.stderr)
        print(f"sglang-diffxkv eval: {error}", file=sys.stderr)
        status = 1
    except KeyboardInterrupt:
        status = 130
    # What was measured before that took its time, too.
    if rows:
        print(write(rows, f"sglang-diffxkv {' '.join(sys.argv[1:])}", options, args.output))
    return status


def _options(args: argparse.Namespace) -> Options:
    from sglang_diffxkv.eval.dtype import fast_dtype
    from sglang_diffxkv.eval.run import Options

    device = args.device or default_device()
    return Options(
        model=args.model,
        policies=_names(args.policies),
        tasks=_names(args.tasks),
        lengths=[_number(text, int) for text in _names(args.lengths)],
        samples=_number(args.samples, int),
        seed=args.seed,
        device=device,
        targets=[_number(text, float) for text in _names(args.target_compression)],
        dtype=args.dtype or fast_dtype(device),
        filler=args.filler,
    )


def _names(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _number(text: str, kind: type[_Number]) -> _Number:
    from sglang_diffxkv.config import ConfigError

    with suppress(ValueError):
        value = kind(text)
        if value > 0:
            return value
    raise ConfigError(f"{text!r} is not a positive number")
