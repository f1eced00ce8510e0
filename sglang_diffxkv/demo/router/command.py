# SPDX-License-Identifier: Apache-2.0
"""The subcommand `demo-router`."""

import argparse
from pathlib import Path

from sglang_diffxkv.arguments import add_device_option

HELP = "serve two replicas behind SGLang's router: cache-aware routing against round robin"


def add_options(parser: argparse.ArgumentParser) -> None:
    add_device_option(parser)
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("build"),
        metavar="FOLDER",
        help="of the pictures, router_policies.png and router_return.png (default: %(default)s)",
    )


def run(args: argparse.Namespace) -> None:
    """Run the demo on `args.device` (default: cuda where there is one, else cpu)."""
    # Imported here: it brings what only its load needs.
    from sglang_diffxkv.demo.router.run import run_router_demo

    run_router_demo(args.device, args.output)
