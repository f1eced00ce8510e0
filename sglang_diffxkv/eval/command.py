# SPDX-License-Identifier: Apache-2.0
"""The subcommand `eval`: its options, its progress and its files."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TypeVar

HELP = "measure what policies cost in accuracy against full KV, on tasks with known answers"
BUNDLED = Path(__file__).parents[1] / "bundled_model"
POLICIES = "full,int8,k8v4,k4v8,int4,int2,streaming,snapkv,diffkv"
TASKS = "niah_single,niah_multikey,kv_lookup,vt"

_Number = TypeVar("_Number", int, float)


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model",
        type=Path,
        default=BUNDLED,
        help="folder of a Hugging Face checkpoint (default: the bundled demo model)",
    )
    parser.add_argument(
        "--policies", default=POLICIES, help="names, with commas; full, SGLang's own pool, is first"
    )
    parser.add_argument("--tasks", default=TASKS, help="names, with commas (default: %(default)s)")
    parser.add_argument("--lengths", default="1024,2048", help="tokens of a prompt, with commas")
    parser.add_argument("--samples", type=_positive, default=50, help="per task and length")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), help="default: cuda where there is one, else cpu"
    )
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
    from sglang_diffxkv.config import ConfigError
    from sglang_diffxkv.eval.plot import plot
    from sglang_diffxkv.eval.report import markdown, table, write_json
    from sglang_diffxkv.eval.run import Options, evaluate
    from sglang_diffxkv.launch import ServerError

    try:
        options = Options(
            model=args.model,
            policies=_names(args.policies),
            tasks=_names(args.tasks),
            lengths=[_number(text, int) for text in _names(args.lengths)],
            samples=args.samples,
            seed=args.seed,
            device=args.device or _default_device(),
            targets=[_number(text, float) for text in _names(args.target_compression)],
        )
        rows = []
        for row in evaluate(options):
            rows.append(row)
            print(table([row]).splitlines()[-1], file=sys.stderr, flush=True)
    except (ConfigError, ServerError, OSError) as error:
        print(f"sglang-diffxkv eval: {error}", file=sys.stderr)
        return 1
    command = f"sglang-diffxkv {' '.join(sys.argv[1:])}"
    about = json.loads(json.dumps(options._asdict(), default=lambda path: path.name))
    page = markdown(rows, "Accuracy against full KV", f"`{command}`")
    print(page)
    if args.output:
        write_json(args.output, rows, {"command": command, "options": about})
        args.output.with_suffix(".md").write_text(page)
        plot(args.output.with_suffix(".png"), rows)
    return 0


def _names(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _number(text: str, kind: type[_Number]) -> _Number:
    from sglang_diffxkv.config import ConfigError

    try:
        value = kind(text)
    except ValueError:
        value = kind(0)
    if not value > 0:
        raise ConfigError(f"{text!r} is not a positive number")
    return value


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not a positive number")
    return value


def _default_device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"
