# SPDX-License-Identifier: Apache-2.0
"""The subcommand `calibrate`."""

import argparse
from pathlib import Path

from sglang_diffxkv.arguments import add_server_options

HELP = "learn from texts what tokens matter, and from prompts how that spreads over layers: what "
HELP += "`diffxkv` predicts importance with, and the plan to serve with"


def add_options(parser: argparse.ArgumentParser) -> None:
    add_server_options(parser)
    parser.add_argument(
        "--prompts",
        type=Path,
        metavar="FILE",
        help='text, a prompt per line, or JSON lines with a "prompt" or "text"; default: synthetic '
        "prompts, and for importance, too, modules of Python's library",
    )
    parser.add_argument("--length", type=int, default=1024, help="tokens of synthetic prompts")
    parser.add_argument("--samples", type=int, default=8, help="synthetic prompts of each task")
    parser.add_argument("--target", type=float, help="as in the configuration")
    parser.add_argument(
        "--config", default="{}", metavar="JSON", help="other settings of --diffxkv-config"
    )
    parser.add_argument(
        "--output",
        type=Path,
        required=True,
        metavar="PLAN.json",
        help="the plan; the importance model is written beside it, as PLAN.importance.safetensors",
    )
    parser.add_argument(
        "--ranks",
        type=int,
        default=1,
        metavar="N",
        help="tensor-parallel ranks that will serve: each gets files of its own KV heads, with "
        "its number for {rank} in --output (default: 1)",
    )


def run(args: argparse.Namespace) -> None:
    from sglang_diffxkv.calibrate.run import run_calibrate  # no --help waits for torch

    run_calibrate(args)
