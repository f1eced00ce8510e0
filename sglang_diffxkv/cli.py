# SPDX-License-Identifier: Apache-2.0
"""The console script `sglang-diffxkv`: one subcommand per thing to do beside serving."""

import argparse
import signal
import sys
from collections.abc import Sequence
from types import FrameType

from sglang_diffxkv import calibrate
from sglang_diffxkv.bundled_model import BUNDLED
from sglang_diffxkv.eval import command
from sglang_diffxkv.models import command as model_command
from sglang_diffxkv.models.known import ModelError

DEMO_HELP = "serve a small embedded model on sealed pages, and compare with stock SGLang's pool"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the subcommand in `argv` (default: the command line); return the exit status."""
    args = _parser().parse_args(argv)
    # As Ctrl-C does, so that a server which the subcommand has started is stopped.
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        status: int = args.run(args)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="sglang-diffxkv",
        description="Compressed KV cache for stock SGLang. To serve: "
        "sglang serve --model-path MODEL --attention-backend diffxkv",
    )
    commands = parser.add_subparsers(title="subcommands", required=True, metavar="SUBCOMMAND")
    demo = commands.add_parser("demo", help=DEMO_HELP, description=DEMO_HELP)
    demo.add_argument(
        "--device", choices=("cpu", "cuda"), help="default: cuda where there is one, else cpu"
    )
    demo.add_argument(
        "--model",
        default=str(BUNDLED),
        help="a name that the subcommand model knows, or the folder of a Hugging Face checkpoint: "
        "it chats about documents (default: the embedded model, which looks things up)",
    )
    demo.set_defaults(run=_demo)
    evaluation = commands.add_parser("eval", help=command.HELP, description=command.HELP)
    command.add_options(evaluation)
    evaluation.set_defaults(run=command.run)
    calibration = commands.add_parser("calibrate", help=calibrate.HELP, description=calibrate.HELP)
    calibrate.add_options(calibration)
    calibration.set_defaults(run=calibrate.run)
    model = commands.add_parser("model", help=model_command.HELP, description=model_command.HELP)
    model_command.add_options(model)
    model.set_defaults(run=model_command.run)
    return parser


def _demo(args: argparse.Namespace) -> int:
    # Imported here: the help of the command must not wait for torch.
    from sglang_diffxkv.demo.run import run_demo

    try:
        model = model_command.find_model(args.model)
    except (ModelError, OSError) as error:
        print(f"sglang-diffxkv demo: {error}", file=sys.stderr)
        return 1
    return run_demo(args.device, model)


def _interrupt(signum: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt
