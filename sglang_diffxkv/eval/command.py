# SPDX-License-Identifier: Apache-2.0
"""The subcommand `eval`: its options, its progress and its files."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from sglang_diffxkv.launch import add_server_options, default_device

if TYPE_CHECKING:
    from sglang_diffxkv.eval.run import Options

HELP = "measure what policies cost against full KV, on tasks with known answers or on documents"
POLICIES = "full,lossless,int8,k8v4,k4v8,int4,int2,streaming,snapkv,diffkv,xkv,diffxkv"
TASKS = "niah_single,niah_multikey,kv_lookup,vt"
DOCUMENT_TASKS = "half,grow,shared"

_Number = TypeVar("_Number", int, float)


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
    from sglang_diffxkv.launch import ServerError

    rows: list[Any] = []
    status = 0
    try:
        options = _options(args)
        for row in _evaluate(args, options):
            rows.append(row)
    except (ConfigError, ServerError, CacheError, requests.RequestException) as error:
        print("\n".join(getattr(error, "__notes__", [])), end="", file=sys.stderr)
        print(f"sglang-diffxkv eval: {error}", file=sys.stderr)
        status = 1
    except KeyboardInterrupt:
        status = 130
    # What was measured before that took its time, too.
    if rows:
        print(_write(args, options, rows))
    return status


def _evaluate(args: argparse.Namespace, options: Options) -> Iterator[Any]:
    """Rows of tasks with known answers, or about documents where those are asked for."""
    if args.documents is None:
        from sglang_diffxkv.eval.run import evaluate

        return evaluate(options)
    from sglang_diffxkv.eval.documents.run import evaluate_documents

    return evaluate_documents(options, args.documents)


def _write(args: argparse.Namespace, options: Options, rows: Sequence[Any]) -> str:
    command = f"sglang-diffxkv {' '.join(sys.argv[1:])}"
    if args.documents is None:
        from sglang_diffxkv.eval.report import write

        return write(rows, command, options, args.output)
    from sglang_diffxkv.eval.documents.report import write as write_documents

    return write_documents(rows, command, options, args.documents, args.output)


def _options(args: argparse.Namespace) -> Options:
    from sglang_diffxkv.eval.dtype import fast_dtype
    from sglang_diffxkv.eval.run import Options
    from sglang_diffxkv.eval.tasks.registry import default_filler

    default_tasks = TASKS if args.documents is None else DOCUMENT_TASKS
    tasks = _some("--tasks", _names(default_tasks if args.tasks is None else args.tasks))
    lengths = _some("--lengths", _names(args.lengths))
    _check_output(args.output)
    device = args.device or default_device()
    return Options(
        model=args.model,
        policies=_names(args.policies),
        tasks=tasks,
        lengths=[_number(text, int) for text in lengths],
        samples=_number(args.samples, int),
        seed=args.seed,
        device=device,
        targets=[_number(text, float) for text in _names(args.target_compression)],
        dtype=args.dtype or fast_dtype(device),
        filler=args.filler or default_filler(args.model),
    )


def _names(text: str) -> list[str]:
    """None twice: what is measured twice would count as more samples."""
    return list(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))


def _some(option: str, names: list[str]) -> list[str]:
    from sglang_diffxkv.config import ConfigError

    if not names:
        raise ConfigError(f"{option} names nothing")
    return names


def _check_output(output: Path | None) -> None:
    """Refuse what could not be written hours later."""
    from sglang_diffxkv.config import ConfigError

    if output is None:
        return
    if output.suffix in (".md", ".png"):
        raise ConfigError(f"--output {output}: name the .json, the {output.suffix} comes beside it")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.open("a").close()
    except OSError as error:
        raise ConfigError(f"--output {output}: {error.strerror}") from None


def _number(text: str, kind: type[_Number]) -> _Number:
    from sglang_diffxkv.config import ConfigError

    with suppress(ValueError):
        value = kind(text)
        if value > 0:
            return value
    raise ConfigError(f"{text!r} is not a positive number")
