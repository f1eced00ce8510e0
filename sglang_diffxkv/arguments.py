# SPDX-License-Identifier: Apache-2.0
"""Options that several subcommands have."""

import argparse
from pathlib import Path

from sglang_diffxkv.bundled_model import BUNDLED


def add_server_options(parser: argparse.ArgumentParser) -> None:
    """Options of a subcommand that serves a checkpoint: `--model` and `--device`."""
    parser.add_argument(
        "--model",
        type=Path,
        default=BUNDLED,
        help="folder of a Hugging Face checkpoint (default: the bundled demo model)",
    )
    add_device_option(parser)


def add_device_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), help="default: cuda where there is one, else cpu"
    )
