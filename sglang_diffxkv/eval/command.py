# SPDX-License-Identifier: Apache-2.0
"""The subcommand `eval`: its options, and what it does with what is measured."""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path
from typing import Any

from sglang_diffxkv.arguments import add_server_options
from sglang_diffxkv.eval.defaults import DOCUMENT_TASKS, POLICIES, TASKS

HELP = "measure what policies cost against full KV, on tasks with known answers or on documents"


def add_options(parser: argparse.ArgumentParser) -> None:
    add_server_options(parser)
    parser.add_argument(
        "--policies",
        default=POLICIES,
        help="names, with commas (default: %(default)s); full, SGLang's own pool, always runs",
    )
    parser.add_argument(
        "--documents",
        nargs="*",
        type=Path,
        metavar="FILE",
        help="compare predictions on running text instead: files of text, or .jsonl with the field "
        "'text' (default: Python's documentation)",
    )
    parser.add_argument(
        "--tasks",
        help=f"names, with commas (default: {TASKS}; with --documents {DOCUMENT_TASKS})",
    )
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
    parser.add_argument(
        "--lengths",
        default="1024,2048",
        help="tokens of a prompt or document, with commas (default: %(default)s)",
    )
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
        "--importance",
        type=Path,
        metavar="FILE",
        help="importance model that `diffxkv` predicts with, from `sglang-diffxkv calibrate`",
    )
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FILE.json",
        help="write the rows here, and beside it a page (.md) and a plot (.png)",
    )


def run(args: argparse.Namespace) -> None:
    """Evaluate, and report what was measured, also where something goes wrong then."""
    # Imported here: no --help waits for torch.
    from sglang_diffxkv.eval.documents import report as documents_report
    from sglang_diffxkv.eval.documents.run import evaluate_documents
    from sglang_diffxkv.eval.options import parse_options
    from sglang_diffxkv.eval.questions import report
    from sglang_diffxkv.eval.questions.run import evaluate

    options = parse_options(args)
    measure: Any = evaluate
    write: Any = report.write
    if args.documents is not None:
        measure = partial(evaluate_documents, files=args.documents)
        write = partial(documents_report.write, files=args.documents)
    records: list[Any] = []
    try:
        for record in measure(options):
            records.append(record)
    finally:
        # What was measured before an error took its time, too.
        if records:
            print(write(records, f"sglang-diffxkv {' '.join(sys.argv[1:])}", options, args.output))
