# SPDX-License-Identifier: Apache-2.0
"""The console script `sglang-diffxkv`: one subcommand per thing to do beside serving.

A subcommand is a module with `HELP`, `add_options(parser)` and `run(args)`, which raises an error
whose text is what the user reads.
"""

import argparse
import signal
import sys
from collections.abc import Sequence
from types import FrameType

from sglang_diffxkv.calibrate import command as calibrate
from sglang_diffxkv.demo import command as demo
from sglang_diffxkv.demo.router import command as demo_router
from sglang_diffxkv.eval import command as evaluation
from sglang_diffxkv.models import command as model

_COMMANDS = {
    "demo": demo,
    "demo-router": demo_router,
    "eval": evaluation,
    "calibrate": calibrate,
    "model": model,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the subcommand in `argv` (default: the command line); return the exit status."""
    args = _parser().parse_args(argv)
    # As Ctrl-C does, so that a server which the subcommand has started is stopped.
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        _COMMANDS[args.subcommand].run(args)
    except Exception as error:
        if not isinstance(error, _expected_errors()):
            raise
        for note in getattr(error, "__notes__", []):
            print(note, file=sys.stderr)
        print(f"sglang-diffxkv {args.subcommand}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="sglang-diffxkv",
        description="Compressed KV cache for stock SGLang. To serve: "
        "sglang serve --model-path MODEL --attention-backend diffxkv",
    )
    commands = parser.add_subparsers(
        title="subcommands", dest="subcommand", required=True, metavar="SUBCOMMAND"
    )
    for name, command in _COMMANDS.items():
        command.add_options(commands.add_parser(name, help=command.HELP, description=command.HELP))
    return parser


def _expected_errors() -> tuple[type[Exception], ...]:
    """Of the user's making, or the machine's; those of `requests` are OSErrors."""
    # Imported where something went wrong: no --help waits for torch.
    from sglang_diffxkv.config import ConfigError
    from sglang_diffxkv.eval.ask import CacheError
    from sglang_diffxkv.launch import ServerError
    from sglang_diffxkv.models.known import ModelError

    return ConfigError, ServerError, CacheError, ModelError, OSError


def _interrupt(signum: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt
