# SPDX-License-Identifier: Apache-2.0
"""The subcommand `demo`."""

import argparse

from sglang_diffxkv.arguments import add_device_option
from sglang_diffxkv.bundled_model import BUNDLED
from sglang_diffxkv.models.command import find_model

HELP = "serve a small embedded model on sealed pages, and compare with stock SGLang's pool"


def add_options(parser: argparse.ArgumentParser) -> None:
    add_device_option(parser)
    parser.add_argument(
        "--model",
        default=str(BUNDLED),
        help="a name that the subcommand model knows, or the folder of a Hugging Face checkpoint: "
        "it chats about documents (default: the embedded model, which looks things up)",
    )


def run(args: argparse.Namespace) -> None:
    """Run the demo on `args.device` (default: cuda where there is one, else cpu)."""
    # Imported here: it brings what only its load needs.
    from sglang_diffxkv.demo.run import run_demo

    run_demo(args.device, find_model(args.model))
